//! What is released and how, and the threat model: that both say what is so.

use std::{collections::HashMap, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{catalogue, support::run};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The jobs that may write, and what. Nothing else may.
const RIGHTS: &[(&str, &str, &str)] = &[("release.yml", "push", "packages"), ("release.yml", "release", "contents")];

fn read(path: &str) -> Result<String> {
    fs::read_to_string(Path::new(ROOT).join(path)).with_context(|| path.to_owned())
}

/// Every workflow by its file's name.
fn workflows() -> Result<Vec<(String, String)>> {
    let entries = fs::read_dir(Path::new(ROOT).join(".github/workflows"))?;
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry?.path();
        let name = path.file_name().context("no name")?.to_string_lossy().into_owned();
        Ok((name, fs::read_to_string(&path)?))
    };
    entries.map(file).collect()
}

/// The rights that a job or a workflow asks to write with.
fn written(permissions: &Value) -> Vec<&str> {
    let rights = permissions.as_object().into_iter().flatten();
    rights.filter(|(_, how)| *how != "read").map(|(what, _)| what.as_str()).collect()
}

#[test]
fn workflows_name_actions_by_commit_and_have_no_right_without_need() -> Result<()> {
    let mut commits: HashMap<String, String> = HashMap::new();
    let mut rights = Vec::new();
    for (file, text) in &workflows()? {
        for line in text.lines().filter_map(|line| line.split_once("uses: ").map(|(_, action)| action)) {
            let (action, commit) = line.split_once('@').with_context(|| format!("{file}: {line}"))?;
            let (hash, version) = commit.split_once(" # v").with_context(|| format!("{file}: {line}: no version"))?;
            let is_hash = hash.len() == 40 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
            ensure!(is_hash && !version.is_empty(), "{file}: {line} is no commit with its version");
            let first = commits.entry(action.to_owned()).or_insert_with(|| commit.to_owned());
            ensure!(first == commit, "{file}: {action} is there in two versions");
        }
        let workflow: Value = serde_saphyr::from_str(text).with_context(|| file.clone())?;
        let permissions = &workflow["permissions"];
        ensure!(permissions.is_object() && written(permissions).is_empty(), "{file}: rights for all of its jobs");
        for (name, job) in workflow["jobs"].as_object().context("no jobs")? {
            rights.extend(written(&job["permissions"]).iter().map(|what| format!("{file} {name} {what}")));
            for step in job["steps"].as_array().into_iter().flatten() {
                let Some(script) = step["run"].as_str() else { continue };
                // What is put into a script before a shell reads it could be a command.
                ensure!(!script.contains("${{"), "{file}: {name}: a value goes by the environment: {script}");
                run(Command::new("bash").args(["-n", "-c", script]), None)?;
            }
        }
    }
    rights.sort();
    let expected: Vec<_> = RIGHTS.iter().map(|(file, job, what)| format!("{file} {job} {what}")).collect();
    ensure!(rights == expected && commits.len() > 3, "{rights:?} {commits:?}");
    Ok(())
}

#[test]
fn the_lock_file_holds_only_what_has_a_checksum() -> Result<()> {
    let text = read("Cargo.lock")?;
    let packages: Vec<&str> = text.split("[[package]]").skip(1).collect();
    for package in &packages {
        let name = package.lines().find_map(|line| line.strip_prefix("name = ")).unwrap_or_default();
        let is_ours = ["\"imagemirror\"", "\"imagemirror-bench\"", "\"testenv\""].contains(&name);
        let is_pinned = package.contains("\nsource = \"registry+https://github.com/rust-lang/crates.io-index\"\n")
            && package.contains("\nchecksum = \"");
        ensure!(is_ours != is_pinned, "{name} comes from elsewhere");
    }
    ensure!(packages.len() > 100 && !read(".gitignore")?.contains("Cargo.lock"));
    Ok(())
}

/// A step of release.yml that a shell runs.
fn script(job: &str, step: &str) -> Result<String> {
    let workflow: Value = serde_saphyr::from_str(&read(".github/workflows/release.yml")?)?;
    let steps = workflow["jobs"][job]["steps"].as_array().context("no steps")?;
    let found = steps.iter().find(|it| it["name"] == step).and_then(|it| it["run"].as_str());
    Ok(found.with_context(|| format!("no step {step:?}"))?.to_owned())
}

/// The release is packed by the workflow's own script, and its archive installed as krew does it.
#[test]
fn krew_installs_the_plugin_from_the_archive_of_a_release() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let host = run(Command::new("rustc").arg("-vV"), None)?;
    let host = host.lines().find_map(|line| line.strip_prefix("host: ")).context("no host")?;
    let built = dir.path().join("target").join(host).join("release");
    for made in [&built, &dir.path().join("target/sbom"), &dir.path().join("crds")] {
        fs::create_dir_all(made)?;
    }
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_imagemirror"), built.join("imagemirror"))?;
    fs::write(dir.path().join("target/sbom/imagemirror.cdx.json"), "{}")?;
    for file in ["LICENSE", "crds/imagemirrors.imagemirror.dev.yaml"] {
        fs::copy(Path::new(ROOT).join(file), dir.path().join(file))?;
    }
    let pack = script("build", "Try, pack")?;
    for arch in ["amd64", "arm64"] {
        let mut bash = Command::new("bash");
        bash.args(["-euo", "pipefail", "-c", &pack]).current_dir(dir.path());
        run(bash.env("VERSION", "1.2.3").env("ARCH", arch), None)?;
    }
    ensure!(script("release", "Checksums, the release")?.contains("hack/krew "), "no manifest is released");
    let mut krew = Command::new(Path::new(ROOT).join("hack/krew"));
    let manifest = run(krew.args(["1.2.3", "https://git.example.com/a/b"]).arg(dir.path().join("dist")), None)?;
    let manifest: Value = serde_saphyr::from_str(&manifest)?;
    let spec = &manifest["spec"];
    ensure!(manifest["apiVersion"] == "krew.googlecontainertools.github.com/v1alpha2" && manifest["kind"] == "Plugin");
    ensure!(manifest["metadata"]["name"] == "imagemirror" && spec["version"] == "v1.2.3", "{manifest}");
    // krew's index takes no longer ones.
    ensure!(spec["shortDescription"].as_str().is_some_and(|it| (1..=50).contains(&it.len())), "{spec}");
    ensure!(spec["description"].is_string() && spec["homepage"] == "https://git.example.com/a/b", "{spec}");
    let platforms = spec["platforms"].as_array().context("no platforms")?;
    for (platform, arch) in platforms.iter().zip(["amd64", "arm64"]) {
        ensure!(platform["selector"]["matchLabels"] == serde_json::json!({"os": "linux", "arch": arch}), "{platform}");
        let uri = platform["uri"].as_str().context("no URI")?;
        let name = uri.strip_prefix("https://git.example.com/a/b/releases/download/v1.2.3/").context("elsewhere")?;
        let archive = dir.path().join("dist").join(name);
        let sum = run(Command::new("sha256sum").arg(&archive), None)?;
        ensure!(platform["sha256"] == sum.split(' ').next().unwrap_or_default(), "{platform}");
        let (unpacked, installed) = (dir.path().join(format!("u-{arch}")), dir.path().join(format!("i-{arch}")));
        fs::create_dir_all(&unpacked)?;
        fs::create_dir_all(&installed)?;
        run(Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(&unpacked), None)?;
        for file in platform["files"].as_array().context("no files")? {
            let (from, to) = (file["from"].as_str().context("from")?, file["to"].as_str().context("to")?);
            let to = if to == "." { from } else { to };
            fs::rename(unpacked.join(from), installed.join(to)).with_context(|| format!("{name} has no {from}"))?;
        }
        ensure!(fs::read_to_string(installed.join("LICENSE"))? == read("LICENSE")?);
        let program = installed.join(platform["bin"].as_str().context("no program")?);
        // By its name it knows what it is.
        let said = run(Command::new(program).arg("--version"), None)?;
        ensure!(said.starts_with("kubectl-imagemirror "), "{said}");
    }
    ensure!(platforms.len() == 2, "{spec}");
    Ok(())
}

/// Whether there is a test of this name, as the threat model writes names.
fn is_test(name: &str, rows: &[String]) -> Result<bool> {
    let (file, test) = name.split_once("::").with_context(|| name.to_owned())?;
    if file == "catalogue" {
        return Ok(match test.strip_suffix('*') {
            Some(prefix) => rows.iter().any(|id| id.starts_with(prefix)),
            None => rows.iter().any(|id| id == test),
        });
    }
    let source = read(file)?;
    // The first function after the attribute is the test.
    let is_next = |after: &str| after.split_once("fn ").is_some_and(|(_, rest)| rest.starts_with(&format!("{test}(")));
    Ok(["#[test]", "#[tokio::test"].iter().any(|attribute| source.split(attribute).skip(1).any(is_next)))
}

#[test]
fn the_threat_model_leaves_no_threat_out_and_names_tests_that_there_are() -> Result<()> {
    let text = read("docs/security.md")?;
    let rows: Vec<String> = catalogue::rows().into_iter().map(|row| row.id).collect();
    let threats: Vec<&str> = text.lines().filter(|line| line.starts_with("| T")).collect();
    for (number, line) in (1..).zip(&threats) {
        ensure!(line.starts_with(&format!("| T{number} | ")), "T{number} is missing before {line}");
        let cells: Vec<&str> = line.trim_end_matches(" |").split(" | ").collect();
        let tests =
            cells.get(3).filter(|_| cells.len() == 4).with_context(|| format!("T{number} has not four cells"))?;
        ensure!(
            tests.contains("::") || tests.contains("none"),
            "T{number} neither names a test nor says that there is none"
        );
    }
    ensure!(threats.len() == 26, "{} threats", threats.len());
    let is_name = |code: &&str| code.contains("::") && !["file::name", "catalogue::ID"].contains(code);
    let names: Vec<&str> = text.split('`').skip(1).step_by(2).filter(is_name).collect();
    for name in &names {
        ensure!(is_test(name, &rows)?, "there is no test {name}");
    }
    ensure!(names.len() > 50 && !is_test("tests/it/supply.rs::no_such", &rows)? && !is_test("catalogue::T0-*", &rows)?);
    Ok(())
}
