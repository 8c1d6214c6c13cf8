//! Who copies, and how each is called: as somebody would who wants it fast, with the same tags and without referrers.
//!
//! All find the authority that signed the registries' certificates in `$SSL_CERT_FILE`, and have no other environment
//! than `$PATH` and an empty home.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::workload::{Kind, Workload};

/// crane copies one tag or one repository a process: as many of them side by side.
const PROCESSES: &str = "8";
/// What regsync may have in flight at one host, where the default of 3 would decide everything: as many as ImageMirror.
const IN_FLIGHT: u32 = 32;
/// Tags that regsync copies side by side.
const PARALLEL: u32 = 16;

/// Somebody who copies.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) name: String,
    program: PathBuf,
    call: Call,
}

/// What a client is measured for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// What no client can do without.
    Floor,
    Ours,
    /// Ours, doing more than the peers: no part of the comparison.
    More,
    Peer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Floor,
    ImageMirror,
    /// With what is attached to images, as by default.
    WithReferrers,
    Crane,
    Regsync,
    Skopeo,
    /// `PROGRAM SOURCE TARGET FILE`: the hosts with their ports, and a file with a line `REPOSITORY TAG` for each tag.
    Convention,
}

/// What a client is to copy, from where to where.
pub(crate) struct Task<'a> {
    /// `127.0.0.1:PORT`, as the target.
    pub(crate) source: &'a str,
    pub(crate) target: &'a str,
    pub(crate) workload: &'a Workload,
    pub(crate) ca_pem: &'a str,
    pub(crate) ca_path: &'a Path,
    /// For the files of the client, its own for this task.
    pub(crate) dir: &'a Path,
}

/// The floor, ImageMirror, crane and regsync, skopeo if it is in `path`, and further ones as `NAME=PROGRAM`.
pub(crate) fn clients(
    imagemirror: &Path,
    tools: &testenv::tools::Tools,
    path: Option<&OsStr>,
    further: &[String],
) -> Result<Vec<Client>> {
    let client = |name: &str, program: PathBuf, call| Client { name: name.to_owned(), program, call };
    let imagemirror = std::fs::canonicalize(imagemirror)
        .with_context(|| format!("{} is not there: `make release` builds it", imagemirror.display()))?;
    let mut clients = vec![
        client("floor", std::env::current_exe()?, Call::Floor),
        client("imagemirror", imagemirror.clone(), Call::ImageMirror),
        client("with referrers", imagemirror, Call::WithReferrers),
        client("crane", tools.path("crane"), Call::Crane),
        client("regsync", tools.path("regsync"), Call::Regsync),
    ];
    let directories = path.into_iter().flat_map(std::env::split_paths);
    let skopeo = directories.map(|directory| directory.join("skopeo")).find(|program| program.is_file());
    clients.extend(skopeo.map(|program| client("skopeo", program, Call::Skopeo)));
    for peer in further {
        let (name, program) = peer.split_once('=').with_context(|| format!("{peer}: expected NAME=PROGRAM"))?;
        ensure!(!name.is_empty() && clients.iter().all(|client| client.name != name), "{peer}: the name is taken");
        let program = std::fs::canonicalize(program).with_context(|| format!("{program} is not there"))?;
        clients.push(client(name, program, Call::Convention));
    }
    Ok(clients)
}

impl Client {
    pub(crate) fn role(&self) -> Role {
        match self.call {
            Call::Floor => Role::Floor,
            Call::ImageMirror => Role::Ours,
            Call::WithReferrers => Role::More,
            Call::Crane | Call::Regsync | Call::Skopeo | Call::Convention => Role::Peer,
        }
    }

    /// skopeo copies images one after the other: with hundreds of tags that takes longer than anybody waits.
    pub(crate) fn takes(&self, kind: Kind) -> bool {
        self.call != Call::Skopeo || kind == Kind::W1
    }

    /// The version as the program gives it, without its name; for a table.
    pub(crate) fn version(&self) -> Option<String> {
        let argument = match self.call {
            Call::ImageMirror | Call::Skopeo | Call::Convention => "--version",
            Call::Crane | Call::Regsync => "version",
            Call::Floor | Call::WithReferrers => return None,
        };
        let output =
            Command::new(&self.program).arg(argument).output().ok().filter(|output| output.status.success())?;
        version_in(&String::from_utf8_lossy(&output.stdout))
    }

    /// The command that does the task, with its files written.
    pub(crate) fn command(&self, task: &Task) -> Result<Command> {
        let file = |name: &str, content: &str| {
            let path = task.dir.join(name);
            std::fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
            anyhow::Ok(path)
        };
        let mut command = Command::new(&self.program);
        match self.call {
            Call::Floor => {
                command.arg("floor").args([task.source, task.target]);
                command.arg(file("tags", &task.workload.list())?).arg(task.ca_path);
            }
            Call::Convention => {
                command.args([task.source, task.target]).arg(file("tags", &task.workload.list())?);
            }
            Call::ImageMirror | Call::WithReferrers => {
                let policy = if self.call == Call::ImageMirror { "None" } else { "All" };
                command.args(["sync", "-o", "json", "-f"]).arg(file("mirror.yaml", &mirror(task, policy))?);
            }
            Call::Regsync => {
                command.args(["once", "--verbosity", "warn", "--config"]);
                command.arg(file("regsync.yaml", &regsync(task).to_string())?);
            }
            Call::Skopeo => {
                command.args([
                    "--insecure-policy",
                    "sync",
                    "--all",
                    "--preserve-digests",
                    "--src",
                    "yaml",
                    "--dest",
                    "docker",
                ]);
                command.arg(file("skopeo.yaml", &skopeo(task).to_string())?).arg(task.target);
            }
            Call::Crane => {
                let list = file("arguments", &crane(task))?;
                let xargs = Command::new("xargs");
                let crane = std::mem::replace(&mut command, xargs);
                command.arg("-a").arg(list).args(["-P", PROCESSES, "-n"]);
                // A whole repository in one call, where there is more than one tag to it.
                match task.workload.kind {
                    Kind::W1 => command.arg("2").arg(crane.get_program()).arg("copy"),
                    Kind::W2 => command.arg("2").arg(crane.get_program()).args(["copy", "--all-tags"]),
                };
            }
        }
        command.current_dir(task.dir).env_clear().env("HOME", task.dir).env("SSL_CERT_FILE", task.ca_path);
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        Ok(command)
    }
}

/// One `ImageMirror`, and the Secret with the authority.
fn mirror(task: &Task, referrers: &str) -> String {
    let images: Vec<Value> = task
        .workload
        .repositories()
        .into_iter()
        .map(|(repository, tags)| json!({ "source": format!("{}/{repository}", task.source), "tags": tags }))
        .collect();
    let registry = |host: &str| json!({ "host": host, "certSecretRef": { "name": "ca" } });
    let mirror = json!({
        "apiVersion": "imagemirror.dev/v1alpha1", "kind": "ImageMirror", "metadata": { "name": "bench" },
        "spec": {
            "registries": [registry(task.source), registry(task.target)],
            "images": images,
            "target": { "registry": task.target },
            "referrers": { "policy": referrers },
        },
    });
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "ca" }, "type": "Opaque",
        "stringData": { "ca.crt": task.ca_pem },
    });
    format!("{mirror}\n---\n{secret}\n")
}

fn regsync(task: &Task) -> Value {
    let host =
        |host: &str| json!({ "registry": host, "tls": "enabled", "regcert": task.ca_pem, "reqConcurrent": IN_FLIGHT });
    let sync: Vec<Value> = task
        .workload
        .repositories()
        .into_iter()
        .map(|(repository, tags)| {
            let place = |host: &str| format!("{host}/{repository}");
            let tags = json!({ "allow": tags });
            json!({ "source": place(task.source), "target": place(task.target), "type": "repository", "tags": tags })
        })
        .collect();
    json!({
        "version": 1, "creds": [host(task.source), host(task.target)],
        "defaults": { "parallel": PARALLEL, "skipDockerConfig": true }, "sync": sync,
    })
}

fn skopeo(task: &Task) -> Value {
    let images =
        task.workload.repositories().into_iter().map(|(repository, tags)| (repository.to_owned(), tags.into()));
    json!({ task.source: { "images": images.collect::<serde_json::Map<_, _>>() } })
}

/// The arguments of each call, a line.
fn crane(task: &Task) -> String {
    let lines = task.workload.repositories().into_iter().flat_map(|(repository, tags)| match task.workload.kind {
        Kind::W1 => tags.iter().map(|tag| format!("{repository}:{tag}")).collect(),
        Kind::W2 => vec![repository.to_owned()],
    });
    lines.map(|name| format!("{}/{name} {}/{name}\n", task.source, task.target)).collect::<Vec<_>>().concat()
}

/// The first word that begins as a version does.
fn version_in(text: &str) -> Option<String> {
    let words = text.split_whitespace().map(|word| word.trim_start_matches('v'));
    let mut versions =
        words.filter(|word| word.contains('.') && word.starts_with(|first: char| first.is_ascii_digit()));
    versions.next().map(|word| word.trim_end_matches(',').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_where_programs_print_them() {
        assert_eq!(version_in("imagemirror 0.1.0\n").as_deref(), Some("0.1.0"));
        assert_eq!(version_in("VCSTag:     v0.11.7\nVCSRef: unknown\n").as_deref(), Some("0.11.7"));
        assert_eq!(version_in("no version"), None);
    }
}
