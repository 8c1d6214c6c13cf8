//! The guard: a small process in a session of its own that knows every process group a run has started and kills them
//! when the supervisor is gone, however it went: a pipe from the supervisor is its life line, and the kernel closes
//! that even after SIGKILL. Every process of the run, tests included, tells it process groups through a FIFO in the
//! run directory. Who is killed between starting a process and telling, or starts a group of its own, is found by the
//! run directory in its environment. The guard is the only thing that cleans up, so the good end and the bad one are
//! the same code.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::unistd::Pid;

use crate::env;
use crate::node::walls;

/// The FIFO's name in the run directory.
pub(crate) const FIFO: &str = "guard";
/// What the supervisor says on the life line so that the run directory stays.
pub(crate) const KEEP: u8 = b'k';

const GRACE: Duration = Duration::from_secs(3);
const STEP: Duration = Duration::from_millis(20);

static CURRENT: OnceLock<PathBuf> = OnceLock::new();

/// How a process group ends when the run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// SIGTERM, and SIGKILL if it is still there three seconds later.
    Graceful,
    /// SIGKILL at once: it holds nothing that outlives the run.
    Abrupt,
}

/// Says which run this process is of; processes under the supervisor know it from `$IMAGEMIRROR_TESTENV`.
pub(crate) fn attach(run_dir: &Path) {
    let _ = CURRENT.set(run_dir.to_owned());
}

/// The run directory that this process starts others in, if a run is on.
pub(crate) fn current() -> Option<PathBuf> {
    let of_environment = || Some(PathBuf::from(std::env::var_os(env::VARIABLE)?).parent()?.to_owned());
    CURRENT.get().cloned().or_else(of_environment)
}

/// Tells the guard of a process group. Without a guard (no run is on) it does nothing.
pub(crate) fn add(group: i32, ending: Ending) -> Result<()> {
    match ending {
        Ending::Graceful => tell(&format!("+{group}\n")),
        Ending::Abrupt => tell(&format!("!{group}\n")),
    }
}

/// Tells the guard that a process group is gone, before its number is used again.
pub(crate) fn remove(group: i32) {
    // The guard being gone means that the run is at its end anyway.
    let _ = tell(&format!("-{group}\n"));
}

fn tell(line: &str) -> Result<()> {
    let Some(path) = current().map(|run_dir| run_dir.join(FIFO)) else { return Ok(()) };
    let mut fifo = OpenOptions::new()
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(&path)
        .with_context(|| format!("the guard of this run is gone ({})", path.display()))?;
    // Shorter than PIPE_BUF, so lines of different processes do not mix.
    fifo.write_all(line.as_bytes()).context("tell the guard of a process")
}

/// The guard's main function: `testenv guard`, with the life line as standard input. It makes the run directory, so that
/// nobody can be killed between making and guarding it, and prints its path.
pub fn run() -> Result<()> {
    nix::unistd::setsid().context("setsid")?;
    let mut blocked = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        blocked.add(signal);
    }
    blocked.thread_block()?;
    let run_dir = &tempfile::Builder::new().prefix("imagemirror-testenv-").tempdir()?.keep();
    std::fs::create_dir(run_dir.join("logs"))?;
    nix::unistd::mkfifo(&run_dir.join(FIFO), nix::sys::stat::Mode::S_IRWXU)?;
    // Opened for writing too, so that it never reads as closed.
    let mut fifo =
        OpenOptions::new().read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(run_dir.join(FIFO))?;
    let mut line_of_life = std::io::stdin();
    // Nobody may read it any more; what is to be cleaned up then is only the directory.
    let _ = writeln!(std::io::stdout(), "{}", run_dir.display());

    let mut groups = Groups::default();
    let mut keep = false;
    loop {
        let mut waits =
            [PollFd::new(line_of_life.as_fd(), PollFlags::POLLIN), PollFd::new(fifo.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waits, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let alive = waits[0].revents().is_none_or(|events| events.is_empty());
        groups.read(&mut fifo);
        if !alive {
            let mut byte = [0];
            match line_of_life.read(&mut byte) {
                Ok(1) => keep |= byte[0] == KEEP,
                Ok(_) | Err(_) => break,
            }
        }
    }
    groups.end(&mut fifo);
    kill_marked(run_dir);
    walls::remove_cgroup(run_dir);
    if !keep {
        std::fs::remove_dir_all(run_dir).with_context(|| format!("remove {}", run_dir.display()))?;
    }
    Ok(())
}

#[derive(Default)]
struct Groups {
    known: BTreeMap<i32, Ending>,
    partial: String,
}

impl Groups {
    fn read(&mut self, fifo: &mut File) {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = fifo.read(&mut buffer) {
            self.partial.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        while let Some((line, rest)) = self.partial.split_once('\n') {
            if let Some((sign, Ok(group))) = line.split_at_checked(1).map(|(sign, group)| (sign, group.parse::<i32>()))
            {
                // 0 and 1 would mean our own group and everybody.
                match sign {
                    "+" if group > 1 => drop(self.known.insert(group, Ending::Graceful)),
                    "!" if group > 1 => drop(self.known.insert(group, Ending::Abrupt)),
                    _ => drop(self.known.remove(&group)),
                }
            }
            self.partial = rest.to_owned();
        }
    }

    /// Ends all groups, also those that are announced meanwhile. The abrupt ones go last: the graceful ones may still
    /// say goodbye to them.
    fn end(&mut self, fifo: &mut File) {
        let deadline = Instant::now() + GRACE;
        let mut told = Vec::new();
        loop {
            self.read(fifo);
            let graceful = self.known.iter().filter(|(_, ending)| **ending == Ending::Graceful);
            let left: Vec<i32> = graceful.map(|(group, _)| *group).filter(|group| is_alive(*group)).collect();
            for group in &left {
                if !told.contains(group) {
                    told.push(*group);
                    let _ = killpg(Pid::from_raw(*group), Signal::SIGTERM);
                    // A stopped process takes the signal only once it goes on.
                    let _ = killpg(Pid::from_raw(*group), Signal::SIGCONT);
                }
            }
            if left.is_empty() || Instant::now() >= deadline {
                break;
            }
            std::thread::sleep(STEP);
        }
        self.read(fifo);
        for group in self.known.keys() {
            let _ = killpg(Pid::from_raw(*group), Signal::SIGKILL);
        }
        // Whoever waits for the guard may rely on everything being gone.
        let deadline = Instant::now() + GRACE;
        while self.known.keys().any(|group| is_alive(*group)) && Instant::now() < deadline {
            std::thread::sleep(STEP);
        }
    }
}

/// Kills every process whose environment says that it is of the run, until none has been there for a moment: one that
/// is just being started has not got its environment yet. Only where there is a `/proc`.
fn kill_marked(run_dir: &Path) {
    let mark = format!("{}={}/", env::VARIABLE, run_dir.display());
    let deadline = Instant::now() + GRACE;
    let mut quiet = 0;
    while quiet < 3 && Instant::now() < deadline {
        quiet += 1;
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(id) = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let environment = std::fs::read(process.path().join("environ")).unwrap_or_default();
            if environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(mark.as_bytes())) {
                let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
                quiet = 0;
            }
        }
        std::thread::sleep(STEP);
    }
}

/// Whether a process of the group is running; one that is dead and only waits to be reaped does not count.
pub(crate) fn is_alive(group: i32) -> bool {
    if killpg(Pid::from_raw(group), None).is_err() {
        return false;
    }
    let Ok(processes) = std::fs::read_dir("/proc") else { return true };
    processes.flatten().any(|process| {
        let stat = std::fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        // "pid (name) state parent group …"; the name may hold anything, so read from its last parenthesis on.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let state = fields.next();
        let _parent = fields.next();
        fields.next().and_then(|field| field.parse().ok()) == Some(group) && !matches!(state, Some("Z" | "X"))
    })
}
