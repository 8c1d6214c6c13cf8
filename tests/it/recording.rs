//! `make recording` writes `docs/recording.svg`: a real sync at a pseudo-terminal, as its screen looked every quarter of a
//! second. Two registries of the test stand in for the hosts that are shown, the source behind a slow line.

use std::{
    fmt::Write as _,
    fs::File,
    io::Read as _,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::pty::{Winsize, openpty};
use regex::{Captures, Regex};
use testenv::{Client, Env, Image, Proxy, RegistryOptions, RegistryServer, registry::Kind};
use vt100::{Color, Screen};

const ROWS: u16 = 9;
const COLUMNS: u16 = 110;
const FRAME: Duration = Duration::from_millis(250);
/// How long the end stays.
const END: usize = 12;
const FILE: &str = "\
apiVersion: imagemirror.dev/v1alpha1
kind: ImageMirror
metadata: {name: datadog}
spec:
  registries: [{host: gcr.io, plainHTTP: true}, {host: registry.example.com, plainHTTP: true}]
  target: {registry: registry.example.com, repository: 'datadog/{name}'}
  images:
  - {source: gcr.io/datadoghq/agent, tags: ['7.70.0']}
  - {source: gcr.io/datadoghq/cluster-agent, tags: ['7.70.0']}
  - {source: gcr.io/datadoghq/operator, tags: ['1.18.0']}
";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it writes docs/recording.svg: make recording"]
async fn recording() -> Result<()> {
    let env = Env::get();
    let plain = || RegistryOptions { kind: Kind::Crane, tls: false, ..RegistryOptions::default() };
    let (source, target) = (RegistryServer::start(env, plain()).await?, RegistryServer::start(env, plain()).await?);
    for (name, tag, seed, bytes) in [
        ("agent", "7.70.0", 1, 14_000_000),
        ("cluster-agent", "7.70.0", 2, 7_000_000),
        ("operator", "1.18.0", 3, 3_000_000),
    ] {
        let image = Image::multi_arch(seed, &[bytes, bytes / 3], &["linux/amd64", "linux/arm64"]);
        Client::new(env, source.registry())?.push(&format!("datadoghq/{name}"), tag, &image).await?;
    }
    let slow = Proxy::to(env, source.registry()).bytes_per_second_down(9_000_000).start().await?;
    let hosts = [("gcr.io", slow.host()), ("registry.example.com", target.host().to_owned())];
    let file = hosts.iter().fold(FILE.to_owned(), |file, (name, host)| file.replace(name, host));
    std::fs::write(env.run_dir.join("datadog.yaml"), file)?;

    let size = Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_imagemirror"));
    command.args(["sync", "-f", "datadog.yaml"]).current_dir(&env.run_dir).env_remove("NO_COLOR").env("TERM", "xterm");
    command.env("DOCKER_CONFIG", &env.run_dir).stdin(Stdio::null());
    command.stdout(Stdio::from(pty.slave.try_clone()?)).stderr(Stdio::from(pty.slave));
    let mut child = command.spawn()?;
    // Its own ends of the terminal would keep reading from ending.
    drop(command);
    let seen = Arc::new(Mutex::new(vt100::Parser::new(ROWS.try_into()?, COLUMNS.try_into()?, 0)));
    let (mut master, written) = (File::from(pty.master), Arc::clone(&seen));
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = master.read(&mut buffer) {
            written.lock().unwrap_or_else(PoisonError::into_inner).process(&buffer[..count]);
        }
    });
    let mut frames = Vec::new();
    let shown =
        |seen: &Mutex<vt100::Parser>| frame(seen.lock().unwrap_or_else(PoisonError::into_inner).screen(), &hosts);
    while !reader.is_finished() {
        frames.push(shown(&seen)?);
        tokio::time::sleep(FRAME).await;
    }
    ensure!(child.wait()?.success(), "the sync failed");
    let end = shown(&seen)?;
    frames.extend(vec![end; END]);
    let with_bars = frames.iter().filter(|frame| frame.contains('━')).count();
    ensure!(with_bars > 10, "only {with_bars} frames have bars");
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/recording.svg"), svg(&frames)?)?;
    Ok(())
}

/// A screen as the text of an SVG: a line for each row, a span for each colour.
fn frame(screen: &Screen, hosts: &[(&str, String)]) -> Result<String> {
    let (mut text, rest_of_port) = (String::new(), Regex::new("…[0-9.:]+/")?);
    for row in 0..ROWS {
        let (mut line, mut colour) = (String::new(), Color::Default);
        for column in 0..COLUMNS {
            let Some(cell) = screen.cell(row, column) else { continue };
            if cell.fgcolor() != colour && cell.has_contents() {
                line += if colour == Color::Default { "" } else { "</tspan>" };
                colour = cell.fgcolor();
                if let Color::Idx(number) = colour {
                    write!(line, "<tspan class='c{number}'>")?;
                }
            }
            line += match cell.contents() {
                "" => " ",
                "&" => "&amp;",
                "<" => "&lt;",
                ">" => "&gt;",
                letter => letter,
            };
        }
        line.truncate(line.trim_end().len());
        line += if colour == Color::Default { "" } else { "</tspan>" };
        let line = hosts.iter().fold(line, |line, (name, host)| line.replace(host, name));
        // Of a name that is too long for its column the end is shown: what is left of the host is a part of a port.
        let line = rest_of_port.replace(&line, |rest: &Captures<'_>| format!("{:>1$}", "…/", rest[0].chars().count()));
        if !line.is_empty() {
            write!(text, "<text y='{}'>{line}</text>", 38 + 18 * row)?;
        }
    }
    Ok(text)
}

/// Frames one after the other, each as long as it stays the same, again and again; the last one where nothing may move.
fn svg(frames: &[String]) -> Result<String> {
    let total = frames.len();
    let (mut styles, mut groups, mut first) = (String::new(), String::new(), 0);
    while first < total {
        let same = frames[first..].iter().take_while(|frame| **frame == frames[first]).count();
        let percent = |frame: usize| frame * 10_000 / total;
        let (from, to) = (percent(first), percent(first + same));
        let from = format!("{}.{:02}%", from / 100, from % 100);
        let to =
            if first + same == total { String::new() } else { format!("{}.{:02}%{{opacity:0}}", to / 100, to % 100) };
        writeln!(styles, "@keyframes f{first}{{0%{{opacity:0}}{from}{{opacity:1}}{to}}}")?;
        writeln!(groups, "<g class='f' style='animation-name:f{first}'>{}</g>", frames[first])?;
        first += same;
    }
    let (width, height) = (20 + COLUMNS * 8, 36 + ROWS * 18);
    let seconds = FRAME.as_secs_f64() * f64::from(u32::try_from(total)?);
    Ok(format!(
        "<svg xmlns='http://www.w3.org/2000/svg' xml:space='preserve' viewBox='0 0 {width} {height}' role='img' aria-label='imagemirror sync, recorded'>\n\
         <style>\n\
         text{{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#d4d4d4;white-space:pre}}\n\
         .c1{{fill:#f48771}} .c2{{fill:#89d185}} .c3{{fill:#e5c07b}} .c6{{fill:#56b6c2}} .c8{{fill:#808080}}\n\
         .f{{opacity:0;animation:{seconds}s step-end infinite}}\n\
         @media (prefers-reduced-motion){{.f{{animation:none}} .f:last-child{{opacity:1}}}}\n\
         {styles}</style>\n\
         <rect width='100%' height='100%' rx='6' fill='#1e1e1e'/>\n\
         <svg x='10' overflow='visible'><text y='20'>$ imagemirror sync -f datadog.yaml</text>\n{groups}</svg>\n</svg>\n"
    ))
}
