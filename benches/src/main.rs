//! `make bench`: ImageMirror beside other tools that copy images, over TLS, between real registries on this machine, once
//! directly and once with round trips of 20 ms at both sides. Prints what each took and writes `benches/RESULTS.md`.
//! `make scale`: the operator with many objects; `benches/SCALE.md`.

mod floor;
mod machine;
mod measure;
mod peers;
mod report;
mod rounds;
mod scale;
mod selection;
mod workload;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use testenv::{guard, supervisor, tools};

use crate::peers::Client;
use crate::rounds::{Bench, Case};

/// ImageMirror beside other tools that copy images.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Sub,
}

#[derive(Subcommand)]
enum Sub {
    /// Measure, print the tables and write them to a file.
    Run(Options),
    /// Measure the operator with many objects, in an environment of `testenv up`.
    Scale(scale::Options),
    /// The least that a client can do, as a client (src/floor.rs).
    #[command(hide = true)]
    Floor { source: String, target: String, list: PathBuf, ca: PathBuf },
    /// Run COMMAND and write what it cost to REPORT.
    #[command(hide = true)]
    Measure {
        report: PathBuf,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Kill what is left when the benchmark is gone.
    #[command(hide = true)]
    Guard,
}

#[derive(Args)]
struct Options {
    /// The program of `ImageMirror`.
    #[arg(long)]
    binary: PathBuf,
    /// A further peer, as NAME=PROGRAM. It is called as `PROGRAM SOURCE TARGET FILE`: two hosts with their ports, and a
    /// file with a line `REPOSITORY TAG` for each tag. The authority of both is in `$SSL_CERT_FILE`.
    #[arg(long = "peer", value_name = "NAME=PROGRAM")]
    peers: Vec<String>,
    /// How many times each run is made.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only these cases; then no file is written.
    #[arg(long = "workload", value_enum, value_name = "CASE")]
    cases: Vec<Case>,
    /// Only these clients; then no file is written.
    #[arg(long = "client", value_name = "NAME")]
    clients: Vec<String>,
    /// How long a run may take, in seconds.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    deadline: u64,
    /// The file that is written.
    #[arg(long)]
    results: PathBuf,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Sub::Run(options) => run(&options),
        Sub::Scale(options) => scale(&options).map(|()| 0),
        Sub::Floor { source, target, list, ca } => floor::run(&source, &target, &list, &ca).map(|()| 0),
        Sub::Measure { report, command } => measure::run(&report, &command).map(|()| 0),
        Sub::Guard => guard::run().map(|()| 0),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn scale(options: &scale::Options) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(scale::run(options))
}

fn run(options: &Options) -> Result<u8> {
    let mut result = Ok(());
    let code = supervisor::session(async |run_dir: &Path| {
        // An error is kept back, so that the run directory is removed: it holds hundreds of megabytes.
        result = bench(options, run_dir).await;
        Ok(0)
    })?;
    result.map(|()| code)
}

async fn bench(options: &Options, run_dir: &Path) -> Result<()> {
    let tools = tools::find_registries().await?;
    let path = std::env::var_os("PATH");
    let mut clients = peers::clients(&options.binary, &tools, path.as_deref(), &options.peers)?;
    let is_whole = options.cases.is_empty() && options.clients.is_empty();
    if !options.clients.is_empty() {
        let unknown = options.clients.iter().find(|name| clients.iter().all(|client| client.name != **name));
        ensure!(unknown.is_none(), "no client is called {}", unknown.map_or("", String::as_str));
        clients.retain(|client| options.clients.contains(&client.name));
    }
    let cases = if options.cases.is_empty() { Case::ALL.to_vec() } else { options.cases.clone() };
    let deadline = Duration::from_secs(options.deadline);
    let series = Bench::new(&tools, run_dir, options.rounds, deadline)?.run(&cases, &clients).await?;
    let tables = format!("{}\n{}", report::tables(&series), selection::table()?);
    println!("\n{tables}");
    if is_whole {
        let text = format!("{}\n{tables}\n{}", head(options.rounds, run_dir, &clients)?, include_str!("tail.md"));
        std::fs::write(&options.results, text).with_context(|| format!("write {}", options.results.display()))?;
        eprintln!("bench: {} is written", options.results.display());
    } else {
        eprintln!("bench: this was a part of the whole; {} stays as it is", options.results.display());
    }
    Ok(())
}

/// What the tables are of, how they were made, and how to read them.
fn head(rounds: u32, run_dir: &Path, clients: &[Client]) -> Result<String> {
    let versions: Vec<String> = clients
        .iter()
        .filter_map(|client| Some(format!("{} {}", client.name, client.version()?)))
        .chain([format!("distribution {}", machine::DISTRIBUTION)])
        .collect();
    Ok(include_str!("head.md")
        .replace("{rounds}", &rounds.to_string())
        .replace("{machine}", &machine::facts(run_dir)?)
        .replace("{versions}", &versions.join(", ")))
}
