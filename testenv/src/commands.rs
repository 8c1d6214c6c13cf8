//! Runs kubectl, helm and crane of the environment as a person would: each command is one line without quotes, and what
//! is printed is what is run. They work in a directory that holds the caller's files and links to `crds`, `charts`
//! and `config` of the repository, and see nothing of the user's own configuration.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::env::Env;
use crate::process::Process;
use crate::registry::Registry;
use crate::terminal;

/// For one command; the slowest waits two minutes by itself, for pods (`helm install --wait`).
const DEADLINE: Duration = Duration::from_mins(3);

/// The directory and the programs.
pub(crate) struct Commands {
    pub(crate) dir: PathBuf,
    tools: PathBuf,
    kubeconfig: PathBuf,
    ca: PathBuf,
    passwords: Vec<String>,
}

/// A command that goes on, and what it has printed.
pub(crate) struct Running {
    pub(crate) process: Process,
    output: File,
    read: u64,
}

impl Commands {
    /// Makes the directory `name` of the run; crane will know the passwords of `registries`.
    pub(crate) fn new(env: &Env, name: &str, registries: &[&Registry]) -> Result<Self> {
        let dir = env.run_dir.join(name);
        std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("testenv is not in the repository")?;
        for part in ["crds", "charts", "config"] {
            std::os::unix::fs::symlink(repository.join(part), dir.join(part))?;
        }
        std::fs::copy(&env.ca_path, dir.join("ca.crt"))?;
        let mut auths = json!({});
        for registry in registries {
            let config: Value = serde_json::from_str(&registry.dockerconfigjson())?;
            auths[&registry.host] = config["auths"][&registry.host].clone();
        }
        std::fs::write(dir.join("config.json"), json!({ "auths": auths }).to_string())?;
        Ok(Self {
            ca: dir.join("ca.crt"),
            dir,
            tools: env.tools.clone(),
            kubeconfig: env.kubeconfig.clone(),
            passwords: registries.iter().filter_map(|registry| registry.password.clone()).collect(),
        })
    }

    /// Lets kubectl find the program as its plugin.
    pub(crate) fn install_plugin(&self, binary: &Path) -> Result<()> {
        let link = self.dir.join("kubectl-imagemirror");
        std::os::unix::fs::symlink(binary, &link).with_context(|| format!("link {}", link.display()))
    }

    /// Writes a file into the directory.
    pub(crate) fn write(&self, name: &str, content: &str) -> Result<()> {
        std::fs::write(self.dir.join(name), content).with_context(|| format!("write {name}"))
    }

    /// Prints the command and what it prints.
    pub(crate) async fn show(&self, line: &str) -> Result<()> {
        self.announce(line);
        terminal::output(&self.quiet(line).await?);
        Ok(())
    }

    /// The same with what it prints to standard error, for a command that ends with `code`.
    pub(crate) async fn show_all(&self, line: &str, code: i32) -> Result<()> {
        self.announce(line);
        let output = tempfile::tempfile()?;
        let mut running = self.start_into(line, output.try_clone()?, output.into())?;
        let Ok(status) = tokio::time::timeout(DEADLINE, running.process.wait()).await else {
            bail!("`{line}` has not ended in {} s", DEADLINE.as_secs());
        };
        let (status, said) = (status?, running.news()?);
        terminal::output(said.trim_end());
        if status.code() != Some(code) {
            bail!("`{line}` ended with {status} instead of {code}");
        }
        Ok(())
    }

    /// Prints the command, without passwords.
    pub(crate) fn announce(&self, line: &str) {
        let hide = |line: String, password: &String| line.replace(password, "…");
        terminal::command(&self.passwords.iter().fold(line.to_owned(), hide));
    }

    /// Runs the command and gives what it printed. An error holds its error output.
    pub(crate) async fn quiet(&self, line: &str) -> Result<String> {
        let errors = tempfile::tempfile()?;
        let mut running = self.start_with(line, errors.try_clone()?.into())?;
        let Ok(status) = tokio::time::timeout(DEADLINE, running.process.wait()).await else {
            bail!("`{line}` has not ended in {} s", DEADLINE.as_secs());
        };
        if !status?.success() {
            bail!("`{line}` failed: {}", text_from(&errors, &mut 0)?.trim());
        }
        Ok(running.news()?.trim_end().to_owned())
    }

    /// Starts a command that goes on.
    pub(crate) fn start(&self, line: &str) -> Result<Running> {
        self.start_with(line, Stdio::null())
    }

    fn start_with(&self, line: &str, errors: Stdio) -> Result<Running> {
        self.start_into(line, tempfile::tempfile()?, errors)
    }

    fn start_into(&self, line: &str, output: File, errors: Stdio) -> Result<Running> {
        let mut words = line.split_whitespace();
        let program = words.next().context("no command")?;
        let mut command = Command::new(self.tools.join(program));
        command
            .args(words)
            .current_dir(&self.dir)
            .env_clear()
            .env("HOME", &self.dir)
            // Where kubectl finds its plugins.
            .env("PATH", &self.dir)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("SSL_CERT_FILE", &self.ca)
            .env("DOCKER_CONFIG", &self.dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(errors);
        let process = Process::spawn_foreground(line, command)?;
        Ok(Running { process, output, read: 0 })
    }

    /// `line` as a person can run it in any directory: with full paths and the variables that its program needs.
    pub(crate) fn for_a_person(&self, line: &str) -> String {
        let program = self.tools.join(line.split_whitespace().next().unwrap_or_default());
        let arguments = line.split_once(' ').map(|(_, rest)| rest).unwrap_or_default();
        let variables = if line.starts_with("kubectl") {
            format!("KUBECONFIG={}", self.kubeconfig.display())
        } else {
            format!("SSL_CERT_FILE={} DOCKER_CONFIG={}", self.ca.display(), self.dir.display())
        };
        format!("{variables} {} {arguments}", program.display())
    }
}

impl Running {
    /// What was printed since the last call.
    pub(crate) fn news(&mut self) -> Result<String> {
        text_from(&self.output, &mut self.read)
    }
}

/// Reads from `from` on and moves it. The position of the file is the writer's, so it must not be used. Stops before a
/// character of which only the first bytes are there.
fn text_from(file: &File, from: &mut u64) -> Result<String> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        let n = file.read_at(&mut buffer, *from + bytes.len() as u64)?;
        if n == 0 {
            break;
        }
        bytes.extend_from_slice(&buffer[..n]);
    }
    if let Err(error) = std::str::from_utf8(&bytes)
        && error.error_len().is_none()
    {
        bytes.truncate(error.valid_up_to());
    }
    *from += bytes.len() as u64;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
