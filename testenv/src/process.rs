//! A child process of a run: in a process group of its own, known to the guard, its output in a log file. It is killed
//! with its whole group when it is dropped, so nothing outlives the test that started it.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::env;
use crate::guard::{self, Ending};

const GRACE: Duration = Duration::from_secs(3);

/// A running child and its process group.
pub struct Process {
    name: String,
    child: Child,
    group: i32,
    log: Option<PathBuf>,
}

impl Process {
    /// Starts `command` with its output appended to `log`. It gets SIGTERM and a little time when the run ends.
    pub fn spawn(name: &str, command: std::process::Command, log: &Path) -> Result<Self> {
        Self::start(name, command, Some(log), Ending::Graceful)
    }

    /// Starts a part that keeps nothing: it is killed at once when the run ends.
    pub(crate) fn spawn_part(name: &str, command: std::process::Command, log: &Path) -> Result<Self> {
        Self::start(name, command, Some(log), Ending::Abrupt)
    }

    /// Starts `command` with the terminal or whatever else our own input and output are.
    pub(crate) fn spawn_foreground(name: &str, command: std::process::Command) -> Result<Self> {
        Self::start(name, command, None, Ending::Graceful)
    }

    fn start(name: &str, command: std::process::Command, log: Option<&Path>, ending: Ending) -> Result<Self> {
        let mut command = Command::from(command);
        command.process_group(0).kill_on_drop(true);
        if let Some(log) = log {
            let file = append(log)?;
            command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        }
        if let Some(run_dir) = guard::current() {
            // For the guard, if we are killed before we have told it.
            command.env(env::VARIABLE, run_dir.join(env::FILE));
        }
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        let group = i32::try_from(child.id().context("the child has no id")?)?;
        let process = Self { name: name.to_owned(), child, group, log: log.map(Path::to_owned) };
        guard::add(group, ending)?;
        Ok(process)
    }

    /// The process id, which is the id of its group too.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.group
    }

    /// Sends a signal to the whole group.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        killpg(Pid::from_raw(self.group), signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// Waits until the process itself ends.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().await.with_context(|| format!("wait for {}", self.name))
    }

    /// Whether the process itself has not ended yet.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// SIGTERM, and SIGKILL if it has not ended three seconds later.
    pub async fn stop(mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            self.signal(Signal::SIGTERM)?;
            if tokio::time::timeout(GRACE, self.child.wait()).await.is_err() {
                self.signal(Signal::SIGKILL)?;
                self.child.wait().await?;
            }
        }
        Ok(())
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill(mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            self.signal(Signal::SIGKILL)?;
            self.child.wait().await?;
        }
        Ok(())
    }

    /// Asks `ready` again and again until it gives a value. An error if the process ends first or the deadline passes;
    /// it shows the end of the log.
    pub(crate) async fn until_ready<T>(
        &mut self,
        deadline: Duration,
        mut ready: impl AsyncFnMut() -> Option<T>,
    ) -> Result<T> {
        let deadline = tokio::time::Instant::now() + deadline;
        loop {
            if let Ok(Some(value)) = tokio::time::timeout_at(deadline, ready()).await {
                return Ok(value);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at once ({status}){}", self.name, self.log_tail());
            }
            if tokio::time::Instant::now() >= deadline {
                bail!("{} is not ready{}", self.name, self.log_tail());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    fn log_tail(&self) -> String {
        let Some(path) = &self.log else { return String::new() };
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n");
        format!("; the end of {}:\n{tail}", path.display())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Also when the process itself has ended: others of its group may still be there.
        let _ = killpg(Pid::from_raw(self.group), Signal::SIGKILL);
        // Dying takes some milliseconds. If it takes long, the guard goes on to know the group and waits for it.
        let deadline = Instant::now() + Duration::from_millis(500);
        while guard::is_alive(self.group) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        guard::remove(self.group);
    }
}

fn append(log: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("open {}", log.display()))
}
