//! What a run costs, on both sides: a client is run by a process of its own that waits for it and reads what the kernel
//! counted for it and its children; the registries' processor time is in `/proc`, the requests in their access logs.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};
use testenv::registry::Access;
use testenv::{Process, RegistryServer};

/// A registry writes a line when it has answered; that the client got the answer may be a moment earlier.
const QUIET: Duration = Duration::from_millis(60);

/// What one run cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    /// From the start of the client to its end, in seconds.
    pub(crate) wall: f64,
    /// Of the client and its children, user and system, in seconds.
    pub(crate) cpu: f64,
    /// Of both registries, in seconds.
    pub(crate) registries_cpu: f64,
    /// The most that the client had in memory, in MiB; of several processes the largest.
    pub(crate) memory: f64,
    pub(crate) target_requests: f64,
    pub(crate) source_requests: f64,
}

/// What the kernel counted for a client, written to a file for the process that asked.
#[derive(Debug, Serialize, Deserialize)]
struct Usage {
    wall: f64,
    cpu: f64,
    memory: f64,
    /// None if a signal ended it.
    code: Option<i32>,
}

/// The main function of the process in between: runs the command, and writes what it cost. Such a process is small, so
/// that its own memory, which the kernel counts for the child until that is another program, does not matter.
pub(crate) fn run(report: &Path, command: &[std::ffi::OsString]) -> Result<()> {
    let (program, arguments) = command.split_first().context("no command")?;
    let started = Instant::now();
    let status =
        Command::new(program).args(arguments).status().with_context(|| format!("start {}", program.display()))?;
    let wall = started.elapsed().as_secs_f64();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    #[allow(clippy::cast_precision_loss, reason = "memory in kilobytes")]
    let memory = usage.max_rss() as f64 / 1024.0;
    let usage =
        Usage { wall, cpu: seconds(usage.user_time()) + seconds(usage.system_time()), memory, code: status.code() };
    Ok(std::fs::write(report, serde_json::to_vec(&usage)?)?)
}

#[allow(clippy::cast_precision_loss, reason = "seconds of a benchmark")]
fn seconds(time: TimeVal) -> f64 {
    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
}

/// Runs a client to its end. An error says what it failed of, with the last line that it wrote.
pub(crate) async fn sample(
    command: &Command,
    deadline: Duration,
    log: &Path,
    [source, target]: [&mut Meter; 2],
) -> Result<Sample> {
    let report = log.with_extension("json");
    let mut measured = Command::new(std::env::current_exe()?);
    measured.arg("measure").arg(&report).arg("--").arg(command.get_program()).args(command.get_args());
    measured.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(directory) = command.get_current_dir() {
        measured.current_dir(directory);
    }
    source.settle().await?;
    target.settle().await?;
    let mut process = Process::spawn("the client", measured, log)?;
    let Ok(status) = tokio::time::timeout(deadline, process.wait()).await else {
        process.kill().await?;
        bail!("it was not done after {} s", deadline.as_secs());
    };
    let last_line = || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it wrote nothing").trim().to_owned()
    };
    if !status?.success() {
        bail!("{}", last_line());
    }
    let usage: Usage = serde_json::from_slice(&std::fs::read(&report).context("read the report of a run")?)?;
    match usage.code {
        Some(0) => {}
        Some(code) => bail!("exit code {code}: {}", last_line()),
        None => bail!("a signal ended it: {}", last_line()),
    }
    let (source, target) = (source.settle().await?, target.settle().await?);
    Ok(Sample {
        wall: usage.wall,
        cpu: usage.cpu,
        registries_cpu: source.cpu + target.cpu,
        memory: usage.memory,
        target_requests: target.requests,
        source_requests: source.requests,
    })
}

/// What a registry did since it was last asked.
pub(crate) struct Done {
    cpu: f64,
    requests: f64,
}

/// Reads what a registry does.
pub(crate) struct Meter {
    pid: i32,
    log: PathBuf,
    /// How far the log has been read.
    offset: u64,
    cpu: f64,
}

impl Meter {
    pub(crate) fn of(server: &RegistryServer) -> Self {
        Self { pid: server.pid(), log: server.registry().log.clone(), offset: 0, cpu: 0.0 }
    }

    /// Waits until the registry has nothing more to write, and says what it did since the last time.
    async fn settle(&mut self) -> Result<Done> {
        let mut requests = 0.0;
        loop {
            let more = self.requests()?;
            requests += more;
            tokio::time::sleep(QUIET).await;
            if more == 0.0 {
                break;
            }
        }
        let before = std::mem::replace(&mut self.cpu, processor_time(self.pid)?);
        Ok(Done { cpu: self.cpu - before, requests })
    }

    /// The requests in whole lines that have not been read yet.
    #[allow(clippy::cast_precision_loss, reason = "requests of a benchmark")]
    fn requests(&mut self) -> Result<f64> {
        let mut log = File::open(&self.log)?;
        log.seek(SeekFrom::Start(self.offset))?;
        let mut text = String::new();
        log.read_to_string(&mut text)?;
        let (count, read) = count(&text);
        self.offset += read as u64;
        Ok(count as f64)
    }
}

/// The requests in the whole lines of an access log, and where those lines end.
fn count(text: &str) -> (usize, usize) {
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    (whole.lines().filter(|line| Access::parse(line).is_some()).count(), whole.len())
}

/// User and system time of a process in seconds (proc(5), `/proc/pid/stat`).
fn processor_time(pid: i32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("a registry is gone")?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("the kernel does not say how long a tick is")?;
    let ticks = ticks(&stat).context("/proc/PID/stat is not as proc(5) says")?;
    #[allow(clippy::cast_precision_loss, reason = "seconds of a benchmark")]
    Ok(ticks as f64 / per_second as f64)
}

fn ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything. After it, user and system time are the 12th and 13th field.
    let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_of_requests_are_counted() {
        let line = r#"127.0.0.1 - - [21/Nov/2026:10:00:00 +0000] "GET /v2/ HTTP/1.1" 200 2 "" "x/1""#;
        let text = format!("{line}\ntime=\"2026\" level=info msg=\"response completed\"\n{line}\n{line}");
        let (requests, read) = count(&text);
        assert_eq!((requests, &text[read..]), (2, line));
        assert_eq!(count(""), (0, 0));
    }

    #[test]
    fn processor_time_is_read_behind_a_name_that_holds_anything() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 9 0 100 1 1";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("12 (a) S"), None);
    }
}
