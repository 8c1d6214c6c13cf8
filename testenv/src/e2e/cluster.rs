//! Everything that the test's steps act on: a control plane with a node, and registries that both pods and we reach under
//! one address. The line to the source is slow, so that there is a mid-copy; the target is behind the fault proxy, which
//! checks that no manifest comes before its children.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Inside;
use crate::certs::HOST;
use crate::client::Client;
use crate::commands::Commands;
use crate::controlplane::Reach;
use crate::env::Env;
use crate::forwarder::Forwarder;
use crate::images::Image;
use crate::node::Node;
use crate::proxy::Proxy;
use crate::registry::Registry;
use crate::supervisor::Parts;
use crate::terminal::{output, say};
use crate::token::TokenOptions;
use crate::tools::Tools;

const STEP: Duration = Duration::from_millis(100);
/// Of the line to the source.
const BYTES_PER_SECOND: u64 = 8_000_000;
/// Four layers; at the line's speed they take six seconds.
const LAYERS: usize = 4;
const LAYER_BYTES: usize = 12_000_000;

/// Without arguments it waits, as the first container of a pod does; else it prints the first one and ends.
const PROGRAM: &str = r"
#include <stdio.h>
#include <unistd.h>
int main(int count, char **arguments) {
  if (count > 1) return puts(arguments[1]) < 0;
  for (;;) pause();
}
";

/// The namespace of the ImageMirror and of the pods that run what it mirrors.
pub(super) const APPS: &str = "apps";
/// The namespace of the operator.
pub(super) const SYSTEM: &str = "imagemirror-system";

pub(super) struct Cluster {
    pub(super) commands: Commands,
    pub(super) env: Env,
    /// With the operator's image, and a password; a fast line.
    pub(super) images: Registry,
    /// The same at the slow line's address.
    pub(super) source: Registry,
    /// Bearer tokens; with the credentials of who may push.
    pub(super) target: Registry,
    /// With those of who may pull.
    pub(super) target_pull: Registry,
    pub(super) proxy: Proxy,
    /// What is mirrored; its entry point is [`PROGRAM`].
    pub(super) image: Image,
    started: Instant,
    _node: Node,
    _lines: [Forwarder; 3],
    _parts: Parts,
}

impl Cluster {
    pub(super) async fn start(tools: &Tools, options: &Inside, started: Instant) -> Result<Self> {
        say("[  0 s] Kubernetes, registries and a node, in namespaces of their own");
        let tokens = TokenOptions { host: HOST.to_owned(), ..Default::default() };
        let parts = Parts::start(tools, &options.run_dir, tokens, Reach::Pods).await?;
        let env = parts.env.clone();
        let fast = Forwarder::to(&env.source.host).listen(&format!("{HOST}:0")).start().await?;
        let slow =
            Forwarder::to(&env.source.host).listen(&format!("{HOST}:0")).bytes_per_second(BYTES_PER_SECOND).start();
        let slow = slow.await?;
        let realm = env.token.url.trim_start_matches("https://").trim_end_matches("/token");
        let tokens = Forwarder::to(&realm.replace(HOST, "127.0.0.1")).listen(realm).start().await?;
        let proxy = Proxy::to(&env, &env.target).label("target").listen(HOST).start().await?;
        let (images, source, target) =
            (env.source.at(&fast.host()), env.source.at(&slow.host()), proxy.registry().clone());
        let pull = env.token.user("pull").context("no user pull")?;
        let target_pull = target.with_credentials(&pull.name, &pull.password);
        let commands = Commands::new(&env, "e2e", &[&images, &source, &target_pull, &target])?;

        let program = compile(&commands.dir)?;
        let pause = Image::of_programs(&[(&platform(), &[("pause", &program)])])?;
        Client::new(&env, &env.source)?.push("pause", "1", &pause).await?;
        let image = mirrored(&program, &commands.dir)?;
        Client::new(&env, &env.source)?.push("vendor/app", "1.0", &image).await?;
        let node = Node::start(&env, &options.cgroup, &images, &format!("{}/pause:1", images.host)).await?;
        Ok(Self {
            commands,
            env,
            images,
            source,
            target,
            target_pull,
            proxy,
            image,
            started,
            _node: node,
            _lines: [fast, slow, tokens],
            _parts: parts,
        })
    }

    /// Begins a step.
    pub(super) fn step(&self, title: &str) {
        say(&format!("[{:>3} s] {title}", self.started.elapsed().as_secs()));
    }

    /// Runs a command that is shown, and gives what it prints.
    pub(super) async fn run(&self, line: &str) -> Result<String> {
        self.commands.announce(line);
        self.commands.quiet(line).await
    }

    /// An object, or all of a kind.
    pub(super) async fn get(&self, namespace: &str, what: &str) -> Result<Value> {
        let text = self.commands.quiet(&format!("kubectl -n {namespace} get {what} -o json")).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Creates or changes an object.
    pub(super) async fn apply(&self, object: &Value) -> Result<()> {
        let file = "object.json";
        self.commands.write(file, &object.to_string())?;
        output(&self.commands.quiet(&format!("kubectl apply -f {file}")).await?);
        Ok(())
    }

    /// Makes a pull secret of a registry's credentials.
    pub(super) async fn pull_secret(&self, namespace: &str, name: &str, registry: &Registry) -> Result<()> {
        let (username, password) = registry.username.as_deref().zip(registry.password.as_deref()).unwrap_or_default();
        let host = &registry.host;
        let line = format!(
            "kubectl -n {namespace} create secret docker-registry {name} --docker-server={host} \
             --docker-username={username} --docker-password={password}"
        );
        self.run(&line).await.map(drop)
    }

    /// The names of the operator's pods that are not about to end.
    pub(super) async fn operators(&self) -> Result<Vec<String>> {
        let pods = self.get(SYSTEM, "pods -l app.kubernetes.io/name=imagemirror").await?;
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        let stay = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(stay.map(|pod| text(&pod["metadata"]["name"])).collect())
    }

    /// Asks again and again until there is a value. The error after `seconds` says what was waited for, and `last`.
    pub(super) async fn until<T>(
        &self,
        what: &str,
        seconds: u64,
        mut ask: impl AsyncFnMut() -> Result<Asked<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        loop {
            match ask().await? {
                Asked::Done(value) => return Ok(value),
                Asked::NotYet(last) if Instant::now() >= deadline => {
                    bail!("{what}: not within {seconds} s; the last answer was {last}")
                }
                Asked::NotYet(_) => tokio::time::sleep(STEP).await,
            }
        }
    }

    /// Prints what Kubernetes, the operator and the test's pods say, for whoever looks for the cause of an error.
    pub(super) async fn explain(&self) {
        for line in [
            "kubectl get pods -A -o wide".to_owned(),
            "kubectl get imagemirrors.imagemirror.dev -A -o yaml".to_owned(),
            "kubectl get events -A --sort-by=.metadata.creationTimestamp".to_owned(),
            format!("kubectl -n {SYSTEM} logs -l app.kubernetes.io/name=imagemirror --prefix --tail=60"),
            format!("kubectl -n {APPS} logs -l app=mirrored --prefix --tail=20"),
        ] {
            let said = self.run(&line).await;
            output(&said.unwrap_or_else(|error| format!("{error:#}")));
        }
    }
}

/// An answer.
pub(super) enum Asked<T> {
    Done(T),
    /// What was there instead.
    NotYet(String),
}

impl<T> Asked<T> {
    pub(super) fn when(is_done: bool, value: T, else_last: &impl ToString) -> Self {
        if is_done { Self::Done(value) } else { Self::NotYet(else_last.to_string()) }
    }
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// As images name this machine's platform.
fn platform() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{arch}")
}

fn compile(dir: &Path) -> Result<PathBuf> {
    let (source, program) = (dir.join("program.c"), dir.join("program"));
    std::fs::write(&source, PROGRAM)?;
    let mut cc = Command::new("cc");
    cc.args(["-static", "-Os", "-o"]).args([&program, &source]);
    let said = cc.output().context("start cc")?;
    ensure!(said.status.success(), "cc failed: {}", String::from_utf8_lossy(&said.stderr));
    Ok(program)
}

/// The program and layers that take a while.
fn mirrored(program: &Path, dir: &Path) -> Result<Image> {
    let mut files = vec![("app".to_owned(), program.to_owned())];
    for number in 0..LAYERS {
        let mut bytes = vec![0; LAYER_BYTES];
        fastrand::Rng::with_seed(number as u64).fill(&mut bytes);
        let path = dir.join(format!("layer-{number}"));
        std::fs::write(&path, bytes)?;
        files.push((format!("data/{number}"), path));
    }
    let files: Vec<(&str, &Path)> = files.iter().map(|(name, path)| (name.as_str(), path.as_path())).collect();
    Image::of_programs(&[(&platform(), &files)])
}
