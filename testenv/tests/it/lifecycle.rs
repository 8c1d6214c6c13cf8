//! Nothing outlives a run, however it ends: an environment inside the environment, ended at different moments.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testenv::{Env, Process};

/// Everything a run starts has its run directory in its arguments or in its environment.
fn processes_of(directory: &Path) -> Vec<String> {
    let name = directory.display().to_string();
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let read = |file: &str| {
            let bytes = std::fs::read(process.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        if read("cmdline").contains(&name) || read("environ").contains(&name) {
            found.push(read("cmdline"));
        }
    }
    found
}

async fn until(what: &str, is_true: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_true() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A run of its own, with everything it makes in `directory`.
fn up(directory: &Path, script: &str) -> Process {
    std::fs::create_dir_all(directory).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_testenv"));
    command.args(["up", "--", "sh", "-c", script]).env("TMPDIR", directory);
    Process::spawn("testenv", command, &directory.join("output")).unwrap()
}

fn directory(test: &str) -> PathBuf {
    Env::get().run_dir.join(format!("{test}-{:08x}", fastrand::u32(..)))
}

fn left_in(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

#[tokio::test]
async fn a_command_that_succeeds_leaves_nothing() {
    let directory = directory("succeeds");
    let mut run =
        up(&directory, "setsid sleep 1000 & sleep 1000 & test -r $IMAGEMIRROR_TESTENV && kubectl version --client");
    assert_eq!(run.wait().await.unwrap().code(), Some(0));
    assert_eq!(processes_of(&directory), Vec::<String>::new());
    assert_eq!(left_in(&directory), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_command_that_fails_gives_its_code_and_the_logs_stay() {
    let directory = directory("fails");
    let mut run = up(&directory, "exit 7");
    assert_eq!(run.wait().await.unwrap().code(), Some(7));
    assert_eq!(processes_of(&directory), Vec::<String>::new());
    let logs = left_in(&directory)[0].join("logs");
    assert!(std::fs::read_to_string(directory.join("output")).unwrap().contains(logs.to_str().unwrap()));
    assert!(std::fs::read_dir(logs).unwrap().count() >= 6);
}

#[tokio::test]
async fn a_signal_ends_everything_and_the_command_gets_a_chance_to_say_goodbye() {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let directory = directory(signal.as_str());
        let (running, goodbye) = (directory.join("running"), directory.join("goodbye"));
        let script = format!(
            "trap 'touch {}; exit 0' TERM; touch {}; while :; do sleep 0.1; done",
            goodbye.display(),
            running.display()
        );
        let mut run = up(&directory, &script);
        until("the command runs", || running.exists()).await;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(run.pid()), signal).unwrap();
        assert_eq!(run.wait().await.unwrap().code(), Some(code));
        assert!(goodbye.exists());
        assert_eq!(processes_of(&directory), Vec::<String>::new());
        assert_eq!(left_in(&directory), Vec::<PathBuf>::new());
    }
}

#[tokio::test]
async fn a_signal_at_any_moment_of_the_start_leaves_nothing() {
    for milliseconds in [10, 20, 40, 60, 80, 100, 120, 140, 300, 700, 1500, 2500] {
        for signal in [Signal::SIGINT, Signal::SIGKILL] {
            let directory = directory(&format!("start-{milliseconds}-{signal}"));
            let mut run = up(&directory, "sleep 1000");
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(run.pid()), signal).unwrap();
            run.wait().await.unwrap();
            until("nothing is left", || processes_of(&directory).is_empty() && left_in(&directory).is_empty()).await;
        }
    }
}

#[tokio::test]
async fn a_supervisor_that_is_killed_leaves_nothing() {
    let directory = directory("killed");
    let running = directory.join("running");
    // The command ignores what it can.
    let script = format!("trap '' TERM INT HUP; touch {}; while :; do sleep 0.1; done", running.display());
    let mut run = up(&directory, &script);
    until("the command runs", || running.exists()).await;
    assert!(processes_of(&directory).len() >= 7);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(run.pid()), Signal::SIGKILL).unwrap();
    run.wait().await.unwrap();
    until("nothing is left", || processes_of(&directory).is_empty() && left_in(&directory).is_empty()).await;
}
