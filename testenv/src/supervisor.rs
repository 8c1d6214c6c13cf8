//! `testenv up`: starts all parts, runs the command in the foreground, and ends everything, whatever happens. What it
//! starts is known to the guard, and ending means closing the guard's life line and waiting for it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use crate::certs::Ca;
use crate::controlplane::{ControlPlane, Reach};
use crate::env::{self, Env, log_path};
use crate::guard;
use crate::process::Process;
use crate::registry::{Auth, RegistryOptions, RegistryServer};
use crate::token::{TokenOptions, TokenServer};
use crate::tools::{self, Tools};

/// The directory of the programs, for the command.
const TOOLS_VARIABLE: &str = "TESTENV_BIN";

/// Runs `command` with everything around it and gives the exit code to end with: the command's, or 128 and the number
/// of the signal that ended it or us.
pub fn up(command: &[OsString]) -> Result<u8> {
    session(async |run_dir: &Path| {
        let tools = tools::find_all().await?;
        let parts = Parts::start(&tools, run_dir, TokenOptions::default(), Reach::Loopback).await?;
        parts.env.save()?;
        foreground(command, &tools).await
    })
}

/// Builds what is missing and prints the directory.
pub fn tools() -> Result<u8> {
    session(async |_: &Path| {
        println!("{}", tools::find_all().await?.dir.display());
        Ok(0)
    })
}

/// Runs `work` with a run directory and a guard, until it ends or a signal comes. The program that calls it must run
/// [`guard::run`] when its one argument is `guard`. The directory stays where `work` failed.
pub fn session(work: impl AsyncFnOnce(&Path) -> Result<u8>) -> Result<u8> {
    let (run_dir, guard) = start_guard()?;
    guard::attach(&run_dir);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut work = Box::pin(work(&run_dir));
    let result = runtime.block_on(async {
        let mut signals = Signals::new()?;
        tokio::select! {
            result = &mut work => result.map(End::Done),
            number = signals.recv() => Ok(End::Signal(number)),
        }
    });
    let failed = matches!(&result, Err(_) | Ok(End::Done(1..)));
    guard.end(failed)?;
    // Only now, because dropping a process is SIGKILL, and the guard is kinder to the command.
    drop(work);
    runtime.shutdown_background();
    if failed && run_dir.join("logs").read_dir().is_ok_and(|mut logs| logs.next().is_some()) {
        eprintln!("testenv: the logs of this run are in {}", run_dir.join("logs").display());
    } else if failed {
        std::fs::remove_dir_all(&run_dir)?;
    }
    match result? {
        End::Done(code) => Ok(code),
        End::Signal(number) => Ok(128 + number),
    }
}

enum End {
    Done(u8),
    Signal(u8),
}

struct Signals([(tokio::signal::unix::Signal, Signal); 3]);

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self([
            (signal(SignalKind::interrupt())?, Signal::SIGINT),
            (signal(SignalKind::terminate())?, Signal::SIGTERM),
            (signal(SignalKind::hangup())?, Signal::SIGHUP),
        ]))
    }

    async fn recv(&mut self) -> u8 {
        let [(interrupt, _), (terminate, _), (hangup, _)] = &mut self.0;
        let signal = tokio::select! {
            _ = interrupt.recv() => Signal::SIGINT,
            _ = terminate.recv() => Signal::SIGTERM,
            _ = hangup.recv() => Signal::SIGHUP,
        };
        u8::try_from(signal as i32).unwrap_or_default()
    }
}

/// The guard as a child of ours. Not ended by dropping: if we end without a word, the closed pipe is the word.
struct Guard(Child);

impl Guard {
    fn end(mut self, keep: bool) -> Result<()> {
        if let (Some(mut life_line), true) = (self.0.stdin.take(), keep) {
            life_line.write_all(&[guard::KEEP])?;
        }
        let status = self.0.wait()?;
        ensure!(status.success(), "the guard failed ({status}): processes of this run may be left");
        Ok(())
    }
}

fn start_guard() -> Result<(PathBuf, Guard)> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("guard")
        // A run inside a run: the outer guard must not take this one for a process of its own.
        .env_remove(env::VARIABLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the guard")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("the guard has no output")?).read_line(&mut line)?;
    let run_dir = PathBuf::from(line.trim_end_matches('\n'));
    ensure!(run_dir.is_dir(), "the guard did not start");
    Ok((run_dir, Guard(child)))
}

/// Everything that runs beside the command.
pub(crate) struct Parts {
    pub(crate) env: Env,
    _running: (ControlPlane, TokenServer, [RegistryServer; 3]),
}

impl Parts {
    pub(crate) async fn start(tools: &Tools, run_dir: &Path, tokens: TokenOptions, reach: Reach) -> Result<Self> {
        let (ca_path, ca_key_path) = (run_dir.join("ca.pem"), run_dir.join("ca.key"));
        let ca = Ca::generate()?;
        ca.save(&ca_path, &ca_key_path)?;
        let tokens = TokenServer::start(&ca, &log_path(run_dir, "token"), tokens).await?;
        let token = tokens.endpoint().clone();
        let puller = ("puller".to_owned(), "puller-password-1234".to_owned());
        let options =
            |name: &str, tls, auth| RegistryOptions { name: name.to_owned(), tls, auth, ..Default::default() };
        let registry = |options| RegistryServer::start_in(tools, run_dir, &ca, options);
        let (controlplane, source, target, open) = tokio::try_join!(
            ControlPlane::start(tools, run_dir, &ca, &ca_path, reach),
            registry(options("source", true, Auth::Htpasswd(vec![puller]))),
            registry(options("target", true, token.auth())),
            registry(options("open", false, Auth::None)),
        )?;
        let push = token.user("push").context("no user push")?;
        let env = Env {
            run_dir: run_dir.to_owned(),
            tools: tools.dir.clone(),
            kubeconfig: controlplane.kubeconfig.clone(),
            apiserver: controlplane.url.clone(),
            etcd: controlplane.etcd.clone(),
            audit: controlplane.audit.clone(),
            ca_pem: ca.cert_pem().to_owned(),
            ca_path,
            ca_key_path,
            source: source.registry().clone(),
            target: target.registry().with_credentials(&push.name, &push.password),
            open: open.registry().clone(),
            token,
        };
        Ok(Self { env, _running: (controlplane, tokens, [source, target, open]) })
    }
}

async fn foreground(command: &[OsString], tools: &Tools) -> Result<u8> {
    let (program, arguments) = command.split_first().context("no command")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([tools.dir.clone()].into_iter().chain(std::env::split_paths(&path)))?;
    let mut command = Command::new(program);
    command.args(arguments).env(TOOLS_VARIABLE, &tools.dir).env("PATH", path).env_remove("KUBECONFIG");
    let mut process = Process::spawn_foreground(&program.to_string_lossy(), command)?;
    let _terminal = Terminal::lend(&process)?;
    Ok(exit_code(process.wait().await?))
}

pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(1)
}

/// The terminal, lent to the command's process group as a shell does: Ctrl-C goes there, and it may read. We end when
/// the command does.
struct Terminal {
    ours: Pid,
}

impl Terminal {
    fn lend(process: &Process) -> Result<Option<Self>> {
        let ours = nix::unistd::getpgrp();
        let stdin = std::io::stdin();
        // In the background of a shell it is not ours to lend.
        if !stdin.is_terminal() || nix::unistd::tcgetpgrp(&stdin) != Ok(ours) {
            return Ok(None);
        }
        give_to(Pid::from_raw(process.pid()))?;
        // It may have read before the terminal was its own, and be stopped.
        process.signal(Signal::SIGCONT)?;
        Ok(Some(Self { ours }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = give_to(self.ours);
    }
}

fn give_to(group: Pid) -> Result<()> {
    // Who changes the terminal from the background is stopped, unless SIGTTOU is blocked.
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGTTOU);
    let before = blocked.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)?;
    let given = nix::unistd::tcsetpgrp(std::io::stdin(), group);
    before.thread_set_mask()?;
    given.context("hand over the terminal")
}
