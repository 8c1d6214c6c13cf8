//! A sync as it looks on a terminal: the real program at a pseudo-terminal, its screen read by a terminal emulator.

use std::{
    fs::File,
    io::Read as _,
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use anyhow::{Result, bail, ensure};
use nix::pty::{Winsize, openpty};
use regex::Regex;
use testenv::{
    Proxy,
    images::Image,
    proxy::{Action, Gate, Matcher, Route},
};

use crate::{
    golden::{Session, file, mirror, secrets},
    support::{Place, eventually, golden},
};

/// A program and the screen that it writes to.
pub(crate) struct Terminal {
    child: Child,
    seen: Arc<Mutex<(vt100::Parser, Vec<u8>)>>,
    /// Ends when nobody can write any more.
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    pub(crate) fn start(command: &mut Command, rows: u16, columns: u16) -> Result<Self> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None)?;
        let end = |fd: &OwnedFd| fd.try_clone().map(Stdio::from);
        command.stdin(end(&pty.slave)?).stdout(end(&pty.slave)?).stderr(end(&pty.slave)?);
        command.env("TERM", "xterm");
        let child = command.spawn()?;
        drop(pty.slave);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let seen = Arc::new(Mutex::new((vt100::Parser::new(rows.try_into()?, columns.try_into()?, 0), Vec::new())));
        let (mut master, written) = (File::from(pty.master), Arc::clone(&seen));
        // Ends with the program: then reading fails.
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = master.read(&mut buffer) {
                let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
                written.0.process(&buffer[..count]);
                written.1.extend(&buffer[..count]);
            }
        });
        Ok(Self { child, seen, reader: Some(reader) })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_cursor(&self) -> bool {
        !self.seen.lock().unwrap_or_else(PoisonError::into_inner).0.screen().hide_cursor()
    }

    pub(crate) fn screen(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let screen = seen.0.screen();
        let rows = screen.rows(0, screen.size().1.get()).map(|row| row.trim_end().to_owned());
        rows.collect::<Vec<_>>().join("\n").trim_end().to_owned()
    }

    pub(crate) fn written(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap_or_else(PoisonError::into_inner).1).into_owned()
    }

    pub(crate) async fn shows(&self, what: &str, is_so: impl Fn(&str) -> bool) -> Result<String> {
        let waited = eventually(what, || async { Ok(is_so(&self.screen())) }).await;
        waited.map_err(|error| error.context(self.screen()))?;
        Ok(self.screen())
    }

    /// Waits until the program has ended and all that it wrote has been read.
    pub(crate) async fn ends(&mut self) -> Result<Option<i32>> {
        let child = Mutex::new(&mut self.child);
        let mut code = None;
        eventually("the end of the program", || {
            let ended = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
            let is_over = matches!(ended, Ok(Some(_)));
            if let Ok(Some(status)) = ended {
                code = status.code();
            }
            async move { Ok(is_over) }
        })
        .await?;
        if self.reader.take().is_some_and(|reader| reader.join().is_err()) {
            bail!("what is written to the terminal cannot be read");
        }
        Ok(code)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn sync(place: &Place, file: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
    command.args(["sync", "-f", file]).current_dir(&place.env.run_dir).env_remove("NO_COLOR");
    command
}

/// Numbers that are others every time, and how long a bar is.
fn masked(session: &Session<'_>, screen: &str) -> Result<String> {
    let mut masked = session.masked(screen);
    for (pattern, shown) in [
        (r"[━─]+", "━━━━━─────"),
        (r"[0-9.]+ [kM]?B of", "1.00 MB of"),
        (r"[0-9.]+ [kM]?B/s +[0-9a-z]+ left", "1.00 MB/s 1s left"),
        (r"…[0-9]*/team", "…/team"),
        (r" +", " "),
    ] {
        masked = Regex::new(pattern)?.replace_all(&masked, shown).into_owned();
    }
    Ok(masked)
}

#[tokio::test]
async fn a_sync_at_a_terminal_is_as_in_the_golden_file() -> Result<()> {
    let place = Place::new("terminal").await?;
    let (source, target) = (&place.env.source, &place.env.target);
    let slow = Proxy::to(place.env, source).bytes_per_second_down(400_000).start().await?;
    place.push(source, "small", "1", &Image::single(401, &[1000])).await?;
    for (name, seed) in [("large", 402), ("larger", 403)] {
        place.push(source, name, "1", &Image::single(seed, &[1_000_000])).await?;
    }
    let spec = place.spec(slow.registry(), target, &[("small", &["1"]), ("large", &["1"]), ("larger", &["1"])]);
    place.pull_secret("pull", &[slow.registry()]).await?;
    let mut documents = vec![mirror(&place, &spec)];
    documents.extend(secrets(&place));
    let login = slow.registry().dockerconfigjson();
    documents[1] = place.document("pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &login)]);
    let file = file(&place, "terminal", &documents)?;
    let session = Session::new(&place)?;
    let mut terminal = Terminal::start(&mut sync(&place, &file), 24, 200)?;
    let is_half = |screen: &str| {
        screen.contains("1 of 3 images") && screen.matches(" left").count() == 3 && !screen.contains(" 0 B of")
    };
    let half = terminal.shows("two bars and the sum", is_half).await?;
    let code = terminal.ends().await?;
    ensure!(code == Some(0), "{code:?}: {}", terminal.screen());
    let end = terminal.shows("the summary", |screen| screen.contains("3/3 in step")).await?;
    ensure!(!end.contains(" left"), "bars are left: {end}");
    ensure!(terminal.written().contains("\x1b[36m"), "no colour");
    let sorted = |screen: &str| {
        let mut lines: Vec<String> = screen.lines().map(ToOwned::to_owned).collect();
        // Which image is first is chance.
        lines.sort_by_key(|line| (line.contains(" of "), line.contains("images"), line.contains("m: "), line.clone()));
        lines.join("\n")
    };
    let both = format!("{}\n\n{}\n", sorted(&masked(&session, &half)?), sorted(&masked(&session, &end)?));
    golden("tests/golden/screens/terminal.txt", &both)
}

#[tokio::test]
async fn a_low_terminal_has_few_bars_and_no_colour_is_no_colour() -> Result<()> {
    let place = Place::new("low").await?;
    let source = Proxy::to(place.env, &place.env.open).start().await?;
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    for (name, seed) in names.iter().zip(410..) {
        place.push(&place.env.open, name, "1", &Image::single(seed, &[300_000])).await?;
    }
    let gate = Gate::new();
    source.rule(Matcher::new().method("GET").route(Route::Blob), Action::GateAnswer(gate.clone()));
    let images: Vec<(&str, &[&str])> = names.iter().map(|name| (*name, &["1"][..])).collect();
    let mut spec = place.spec(source.registry(), &place.env.open, &images);
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("imagePullSecrets");
        spec["target"].as_object_mut().map(|target| target.remove("secretRef"));
    }
    spec["target"]["repository"] = format!("{}/copy/{{name}}", place.prefix).into();
    let file = file(&place, "low", &[mirror(&place, &spec)])?;
    let mut command = sync(&place, &file);
    let mut terminal = Terminal::start(command.env("NO_COLOR", "1").env("DOCKER_CONFIG", &place.env.run_dir), 6, 100)?;
    gate.arrived(8).await?;
    let shown = terminal.shows("three bars and the sum", |screen| screen.matches(" left").count() == 4).await?;
    ensure!(shown.contains("0 of 8 images"), "{shown}");
    gate.open();
    let code = terminal.ends().await?;
    terminal.shows("the summary", |screen| screen.contains("8/8 in step")).await?;
    ensure!(code == Some(0), "{code:?}");
    let colour = Regex::new("\x1b\\[[0-9;]*[1-9][0-9;]*m")?;
    ensure!(!colour.is_match(&terminal.written()), "{:?}", colour.find(&terminal.written()));
    Ok(())
}
