//! The tutorial, from its first command to its last, as somebody would type it, in a cluster of its own.
//!
//! In a block marked `console` a line with `$ ` is a command, and what follows is what it prints, on both outputs: `…`
//! stands for anything in a line, and alone in a line for any lines. Columns may be of another width. A block marked
//! `yaml` is a file; its first line has the name.
//!
//! What stands in for what: two registries of the test for `gcr.io` and `registry.example.com`, whose authority is among
//! the system's roots (`SSL_CERT_FILE`); a cluster without nodes, so that the operator runs here, with the ServiceAccount
//! and the configuration of the chart, as long as it is installed; the program of this build for the one that
//! `make image` makes; the layout that `make test` has assembled for its image.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use regex::Regex;
use testenv::{
    Client, Env, Image, Process, RegistryOptions, RegistryServer,
    controlplane::{ControlPlane, Reach, kubeconfig_with_token},
    registry::Auth,
    tools::Tools,
};

use crate::{
    docs::blocks,
    support::{free_port, run},
};

/// What a page asks its reader to do.
enum Step {
    Write { name: String, text: String },
    Run { command: String, prints: String },
}

fn steps(page: &str) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for (language, text) in blocks(page) {
        if language == "yaml" {
            let name = text.lines().next().and_then(|line| line.strip_prefix("# ")).context("no file's name")?;
            steps.push(Step::Write { name: name.to_owned(), text: text.clone() });
        } else {
            ensure!(language == "console", "a block that is neither console nor yaml:\n{text}");
            steps.extend(commands(&text)?);
        }
    }
    Ok(steps)
}

fn commands(block: &str) -> Result<Vec<Step>> {
    let block = block.replace("\\\n", "");
    let block = format!("\n{block}");
    let mut parts = block.split("\n$ ");
    ensure!(parts.next().is_some_and(str::is_empty), "a block begins with what is printed:\n{block}");
    let step = |part: &str| {
        let (command, prints) = part.split_once('\n').unwrap_or((part, ""));
        Step::Run { command: command.to_owned(), prints: prints.to_owned() }
    };
    Ok(parts.map(step).collect())
}

/// What must have been printed.
fn pattern(prints: &str) -> Result<Regex> {
    let line = |line: &str| match line.trim() {
        "…" => "(.*\n)*?".to_owned(),
        line => format!("{}\n", regex::escape(&columns(line)).replace('…', ".*")),
    };
    Ok(Regex::new(&format!("^{}$", prints.lines().map(line).collect::<String>()))?)
}

fn columns(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Where the page is followed.
struct Scene {
    env: &'static Env,
    dir: PathBuf,
    cluster: ControlPlane,
    /// A host of the page, and the registry that stands in for it.
    registries: [(&'static str, RegistryServer); 2],
    operator: Option<Process>,
}

impl Scene {
    async fn new() -> Result<Self> {
        let env = Env::get();
        let dir = env.run_dir.join("tutorial");
        std::fs::create_dir(&dir)?;
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        std::os::unix::fs::symlink(env.run_dir.join("logs"), dir.join("logs"))?;
        std::os::unix::fs::symlink(repository.join("charts"), dir.join("charts"))?;
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from);
        std::fs::create_dir_all(dir.join("target/this/release"))?;
        std::os::unix::fs::symlink(target.join("image"), dir.join("target/image"))?;
        std::fs::copy(env!("CARGO_BIN_EXE_imagemirror"), dir.join("target/this/release/imagemirror"))?;
        let tools = Tools { dir: env.tools.clone() };
        let robot = Auth::Htpasswd(vec![("robot".into(), "tutorial-1234".into())]);
        let registry = |auth| RegistryOptions { name: "tutorial".into(), auth, ..RegistryOptions::default() };
        Ok(Self {
            env,
            cluster: ControlPlane::start(&tools, &dir, &env.ca()?, &env.ca_path, Reach::Loopback).await?,
            dir,
            registries: [
                ("gcr.io", RegistryServer::start(env, registry(Auth::None)).await?),
                ("registry.example.com", RegistryServer::start(env, registry(robot)).await?),
            ],
            operator: None,
        })
    }

    /// With the hosts of the page, or with those of the test.
    fn here(&self, text: &str) -> String {
        self.registries.iter().fold(text.to_owned(), |text, (name, registry)| text.replace(name, registry.host()))
    }

    fn as_shown(&self, text: &str) -> String {
        self.registries.iter().fold(text.to_owned(), |text, (name, registry)| text.replace(registry.host(), name))
    }

    fn command(&self, line: &str) -> Result<Command> {
        let path = std::env::var("PATH")?;
        let mut command = Command::new("timeout");
        command.args(["120", "bash", "-euo", "pipefail", "-c", &format!("exec 2>&1\n{line}")]).current_dir(&self.dir);
        command.env_clear().env("HOME", &self.dir).env("KUBECONFIG", &self.cluster.kubeconfig);
        command.env("SSL_CERT_FILE", &self.env.ca_path);
        command.env("PATH", format!("{}:{}:{path}", self.dir.join(".local/bin").display(), self.env.tools.display()));
        Ok(command)
    }

    /// Does what a command stands for, and gives what it printed.
    async fn follow(&mut self, line: &str) -> Result<String> {
        let here = self.here(line);
        if line == "make image" {
            return Ok(String::new());
        }
        if line.starts_with("helm install ") {
            // Nothing would run the pod.
            let waits = here.strip_suffix(" --wait").context("the page does not wait for the operator")?;
            let printed =
                run(&mut self.command(&format!("{waits} --set config.networks.allow={{127.0.0.0/8}}"))?, None)?;
            self.start_operator()?;
            return Ok(printed);
        }
        let printed = run(&mut self.command(&here)?, None)?;
        if line.starts_with("helm uninstall ") {
            let mut operator = self.operator.take().context("no operator is installed")?;
            operator.signal(Signal::SIGTERM)?;
            ensure!(operator.wait().await?.success(), "the operator did not end well");
        }
        Ok(printed)
    }

    fn start_operator(&mut self) -> Result<()> {
        let kubectl =
            |arguments: &str| run(&mut self.command(&format!("kubectl -n imagemirror-system {arguments}"))?, None);
        let token = kubectl("create token imagemirror --duration=1h")?;
        let config = kubectl(r"get configmap imagemirror -o jsonpath='{.data.operator\.yaml}'")?;
        let kubeconfig = kubeconfig_with_token(&self.cluster.url, &self.env.ca_pem, token.trim());
        for (name, text) in [("operator.yaml", &config), ("operator.kubeconfig", &kubeconfig)] {
            std::fs::write(self.dir.join(name), text)?;
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
        command.current_dir(&self.dir).env("SSL_CERT_FILE", &self.env.ca_path);
        command.args(["operator", "--config", "operator.yaml", "--kubeconfig", "operator.kubeconfig", "--listen"]);
        command.arg(format!("127.0.0.1:{}", free_port()?));
        self.operator = Some(Process::spawn("the operator of the tutorial", command, &self.env.log("tutorial"))?);
        Ok(())
    }
}

#[tokio::test]
async fn the_tutorial_is_what_happens() -> Result<()> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/tutorial.md"))?;
    ensure!(page.contains(concat!("/imagemirror:", env!("CARGO_PKG_VERSION"), "\n")), "the page is of another version");
    let steps = steps(&page)?;
    let mut scene = Scene::new().await?;
    let platforms = ["linux/amd64", "linux/arm64"];
    let upstream = Client::new(scene.env, scene.registries[0].1.registry())?;
    for (name, tag, seed) in [("agent", "7.70.0", 901), ("cluster-agent", "7.70.0", 902), ("operator", "1.18.0", 903)] {
        upstream
            .push(&format!("datadoghq/{name}"), tag, &Image::multi_arch(seed, &[100_000, 1000], &platforms))
            .await?;
    }
    for step in &steps {
        match step {
            Step::Write { name, text } => std::fs::write(scene.dir.join(name), scene.here(text))?,
            Step::Run { command, prints } => {
                let printed = scene.follow(command).await.with_context(|| command.clone())?;
                let printed = scene.as_shown(&printed);
                let lines: String = printed.lines().map(|line| columns(line) + "\n").collect();
                ensure!(
                    pattern(prints)?.is_match(&lines),
                    "$ {command}\nprints\n{printed}\nand in the page stands\n{prints}"
                );
            }
        }
    }
    ensure!(steps.len() > 30 && scene.operator.is_none(), "the page does not remove what it has installed");
    Ok(())
}

#[test]
fn what_a_command_prints_otherwise_is_seen() -> Result<()> {
    let shown = pattern("NAME   AGE\na      …s\n…\nend (1/2)\n")?;
    for (printed, is_so) in [
        ("NAME AGE\na 3s\nend (1/2)\n", true),
        ("NAME AGE\na 3s\nmore\n\nend (1/2)\n", true),
        ("NAME AGE\na 3m\nend (1/2)\n", false),
        ("NAME AGE\na 3s\nend (1/2)\nmore\n", false),
        ("a 3s\nend (1/2)\n", false),
        ("NAME AGE\na 3s\nend 1/2\n", false),
    ] {
        ensure!(shown.is_match(printed) == is_so, "{printed}");
    }
    let found = steps("```console\n$ one \\\n    two\n$ three\nprinted\n```\n\n```yaml\n# a.yaml\na: 1\n```\n")?;
    let [Step::Run { command, .. }, Step::Run { prints, .. }, Step::Write { name, text }] = found.as_slice() else {
        anyhow::bail!("{} steps", found.len());
    };
    ensure!(command == "one     two" && prints == "printed\n" && name == "a.yaml" && text.ends_with("a: 1\n"));
    ensure!(steps("```sh\nls\n```\n").is_err() && steps("```console\nls\n```\n").is_err());
    Ok(())
}
