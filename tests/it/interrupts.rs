//! What the command line prints where there is no terminal, and what it leaves after Ctrl-C.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use regex::Regex;
use testenv::{
    Proxy,
    images::Image,
    proxy::{Action, Exchange, Gate, Matcher, Route},
};

use crate::{
    golden::{file, mirror, secrets},
    support::{PATIENCE, Place},
    terminal::{Terminal, sync},
};

/// A sync of a small and a large image that is under way: the small one is there, and half of the large one.
struct Begun {
    place: Place,
    target: Proxy,
    /// What holds the rest of the large layer back.
    _source: Proxy,
    terminal: Terminal,
}

fn interrupt(pid: u32) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGINT)?)
}

fn is_upload(request: &Exchange) -> bool {
    request.key.route == Route::Upload && request.request_bytes > 100_000
}

impl Begun {
    async fn new(test: &str) -> Result<Self> {
        let place = Place::new(test).await?;
        let source = Proxy::to(place.env, &place.env.source).bytes_per_second_down(300_000).start().await?;
        let target = Proxy::to(place.env, &place.env.target).start().await?;
        for (name, size) in [("small", 1000), ("large", 6_000_000)] {
            place.push(&place.env.source, name, "1", &Image::single(fastrand::u64(..), &[size])).await?;
        }
        let spec = place.spec(source.registry(), target.registry(), &[("small", &["1"]), ("large", &["1"])]);
        let mut documents = vec![mirror(&place, &spec)];
        documents.extend(secrets(&place));
        for (document, name, proxy) in [(1, "pull", &source), (2, "push", &target)] {
            let login = proxy.registry().dockerconfigjson();
            documents[document] =
                place.document(name, "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &login)]);
        }
        let file = file(&place, "interrupt", &documents)?;
        let terminal = Terminal::start(&mut sync(&place, &file), 24, 300)?;
        let begun = Self { place, target, _source: source, terminal };
        let is_half = |screen: &str| screen.contains("copied ") && screen.contains("1 of 2 images");
        begun.terminal.shows("the small image", is_half).await?;
        begun.target.wait_for(|requests| requests.iter().any(is_upload), PATIENCE).await?;
        Ok(begun)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_gives_up_what_was_begun_and_says_what_is_left() -> Result<()> {
    let mut begun = Begun::new("interrupt").await?;
    interrupt(begun.terminal.pid())?;
    let code = begun.terminal.ends().await?;
    let screen = begun.terminal.shows("the end", |screen| screen.contains("to go on")).await?;
    ensure!(code == Some(130), "{code:?}: {screen}");
    let said = "imagemirror: interrupted; m: 1 of 2 images are finished; no tag of the others was written";
    ensure!(screen.lines().last().is_some_and(|line| line.starts_with(said)), "{screen}");
    ensure!(!screen.contains(" left") && begun.terminal.has_cursor(), "the terminal is not as it was: {screen}");

    let cancelled = Matcher::new().method("DELETE").route(Route::Upload);
    let requests = begun.target.requests();
    let cancelled: Vec<_> = requests.iter().filter(|request| cancelled.matches(&request.key, &request.path)).collect();
    ensure!(cancelled.iter().any(|request| request.status == Some(204)), "no upload was cancelled: {cancelled:#?}");
    let (place, target) = (&begun.place, &begun.place.env.target);
    ensure!(place.digest_of(target, "small", "1").await?.is_some());
    ensure!(place.digest_of(target, "large", "1").await?.is_none(), "half an image has a tag");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_ctrl_c_waits_for_nothing() -> Result<()> {
    let mut begun = Begun::new("interrupt-twice").await?;
    let gate = Gate::new();
    begun.target.rule(Matcher::new().method("DELETE").route(Route::Upload), Action::Gate(gate.clone()));
    interrupt(begun.terminal.pid())?;
    // It waits for the registry, which does not answer.
    gate.arrived(1).await?;
    interrupt(begun.terminal.pid())?;
    let code = begun.terminal.ends().await?;
    // What it says when it has waited.
    let waited = begun.terminal.written().contains("to go on");
    ensure!(code == Some(130) && !waited, "{code:?}: {}", begun.terminal.screen());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_terminal_progress_is_plain_lines() -> Result<()> {
    let place = Place::new("plain").await?;
    place.push(&place.env.source, "agent", "1", &Image::single(721, &[1_000_000])).await?;
    let mut running = Vec::new();
    for style in ["auto", "plain", "none"] {
        // Each its own, so that each takes three seconds and a half.
        let source = Proxy::to(place.env, &place.env.source).bytes_per_second_down(300_000).start().await?;
        let spec = place.spec(source.registry(), &place.env.target, &[("agent", &["1"])]);
        let login = source.registry().dockerconfigjson();
        let [_, push, ca] = secrets(&place);
        let pull = place.document("pull", "kubernetes.io/dockerconfigjson", &[(".dockerconfigjson", &login)]);
        let file = file(&place, style, &[mirror(&place, &spec), pull, push, ca])?;
        let mut command = sync(&place, &file);
        command.args(["--progress", style, "--to", &format!("oci:{}-{style}", place.namespace)]);
        command.env("TERM", "xterm").env("CLICOLOR_FORCE", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
        running.push((style, source, tokio::process::Command::from(command).spawn()?));
    }
    let line = Regex::new(r"^m: 0 of 1 images, [0-9.]+ [kM]?B of 1\.0 MB, [0-9.]+ [kM]?B/s, [0-9]+s left$")?;
    for (style, _source, child) in running {
        let output = child.wait_with_output().await?;
        let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        ensure!(output.status.success() && !(out.clone() + &err).contains('\x1b'), "{style}: {out:?} {err:?}");
        let mut report = out.lines();
        let first = report.next().is_some_and(|line| line.starts_with("copied     "));
        ensure!(first && report.next().is_some_and(|line| line.starts_with("m: 1/1 in step")), "{style}: {out}");
        let shown: Vec<&str> = err.lines().filter(|line| !line.starts_with("credentials: ")).collect();
        let expected = usize::from(style != "none");
        ensure!(shown.len() == expected && shown.iter().all(|shown| line.is_match(shown)), "{style}: {err}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_the_wait_of_the_plugin_and_the_operator_goes_on() -> Result<()> {
    let place = Place::new("plugin-interrupt").await?;
    let source = Proxy::to(place.env, &place.env.source).start().await?;
    place.pull_secret("pull", &[source.registry()]).await?;
    let _operator = place.operator()?;
    place.push(&place.env.source, "agent", "1", &Image::single(731, &[1000])).await?;
    place.apply("m", &place.spec(source.registry(), &place.env.target, &[("agent", &["1"])])).await?;
    place.until_ready("m").await?;
    let image = Image::single(732, &[1000]);
    place.push(&place.env.source, "agent", "1", &image).await?;
    let gate = Gate::new();
    source.rule(Matcher::new().route(Route::Blob), Action::Gate(gate.clone()));
    let plugin = crate::plugin::Plugin::new(&place)?;
    let mut waiting = plugin.command(&format!("sync m --wait -n {}", place.namespace));
    waiting.stdout(Stdio::piped()).stderr(Stdio::piped());
    let waiting = tokio::process::Command::from(waiting).spawn()?;
    gate.arrived(1).await?;
    // kubectl has become the plugin.
    interrupt(waiting.id().context("it has ended")?)?;
    let output = tokio::time::timeout(PATIENCE, waiting.wait_with_output()).await??;
    let said = String::from_utf8_lossy(&output.stderr);
    let (code, last) = (output.status.code(), said.lines().last().unwrap_or_default());
    let expected = "kubectl imagemirror: interrupted; the operator goes on with the sync; `kubectl imagemirror status";
    ensure!(code == Some(130) && last.starts_with(expected), "{code:?}: {said}");
    gate.open();
    place.until("m", "the sync to end", |status| status.last_handled_reconcile_at.is_some()).await?;
    ensure!(place.holds(&place.env.target, "agent", "1", &image).await?);
    Ok(())
}
