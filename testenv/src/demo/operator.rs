//! The operator under demonstration: the binary with its own ServiceAccount's token and nothing of this machine's
//! environment. It is watched to the end: if it ends by itself, or needs more memory than it may, the demo has failed.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::certs::http_client;
use crate::commands::Commands;
use crate::controlplane::free_port;
use crate::env::Env;
use crate::process::Process;
use crate::terminal;

const READY_DEADLINE: Duration = Duration::from_secs(30);
/// The operator promises to end within 25 s.
const STOP_DEADLINE: Duration = Duration::from_secs(25);
const MAX_RSS_KIB: u64 = 64 << 10;

/// Shorter than the defaults, so that a copy of a few seconds shows its progress.
const CONFIG: &str = "\
timing: {progressFirst: 1s, progressInterval: 1s}
networks: {allow: [127.0.0.0/8, '::1']}
";

/// The running operator.
pub(super) struct Operator {
    process: Process,
    pub(super) log: PathBuf,
}

impl Operator {
    /// Starts `binary` as the user of `token` and waits until it is ready.
    pub(super) async fn start(env: &Env, commands: &Commands, binary: &Path, token: &str) -> Result<Self> {
        commands.write("operator.yaml", CONFIG)?;
        commands.write("operator.kubeconfig", &env.kubeconfig_for(token))?;
        let listen = format!("127.0.0.1:{}", free_port()?);
        let arguments = format!(
            "operator --config operator.yaml --kubeconfig operator.kubeconfig --listen {listen} \
             --lease-namespace imagemirror-system --log-level info"
        );
        commands.announce(&format!("imagemirror {arguments}"));
        let mut command = Command::new(binary);
        command.args(arguments.split_whitespace()).current_dir(&commands.dir).env_clear();
        let log = env.log("operator");
        let mut process = Process::spawn("the operator", command, &log)?;
        let client = http_client(&env.ca_pem, None)?;
        let readyz = format!("http://{listen}/readyz");
        let is_ready = async || client.get(&readyz).send().await.ok()?.status().is_success().then_some(());
        process.until_ready(READY_DEADLINE, is_ready).await?;
        terminal::output(&format!("process {} is ready", process.pid()));
        Ok(Self { process, log })
    }

    pub(super) fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Waits until it ends.
    pub(super) async fn ended(&mut self) -> Result<ExitStatus> {
        self.process.wait().await
    }

    /// SIGTERM, as Kubernetes sends it; an error if it does not end well and in time.
    pub(super) async fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        let Ok(status) = tokio::time::timeout(STOP_DEADLINE, self.process.wait()).await else {
            bail!("the operator is still there {} s after SIGTERM", STOP_DEADLINE.as_secs());
        };
        let status = status?;
        ensure!(status.success(), "the operator ended with {status} after SIGTERM");
        Ok(())
    }
}

/// Prints the most memory that process `pid` has held so far; an error if that is too much.
pub(super) fn check_memory(pid: i32) -> Result<()> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("read the operator's memory")?;
    let peak = peak_kib(&status).context("no VmHWM in the status of the process")?;
    let tenths = peak * 10 / 1024;
    terminal::output(&format!("peak resident memory: {}.{} MiB (allowed: 64 MiB)", tenths / 10, tenths % 10));
    ensure!(peak <= MAX_RSS_KIB, "the operator held {peak} KiB of memory, more than {MAX_RSS_KIB} KiB");
    Ok(())
}

fn peak_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_from_the_status_of_a_process() {
        assert_eq!(peak_kib("Name:\tx\nVmHWM:\t   32100 kB\nVmRSS:\t   1 kB\n"), Some(32100));
        assert_eq!(peak_kib("Name:\tx\n"), None);
    }
}
