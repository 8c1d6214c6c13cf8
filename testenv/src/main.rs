//! The `testenv` program: `testenv up -- COMMAND` runs COMMAND with a control plane and registries around it;
//! `testenv demo` shows the operator at work; `testenv e2e` installs it on a real node; `testenv tools` builds the programs this
//! needs and prints their directory; `testenv chart` writes what is generated of a chart.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A real Kubernetes control plane and real registries for tests.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Sub,
}

#[derive(Subcommand)]
enum Sub {
    /// Start everything, run COMMAND, stop everything; exits as COMMAND does.
    Up {
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Show the operator at work, from installation to a restored tag (`make demo`).
    Demo {
        /// The operator's program.
        #[arg(long)]
        binary: PathBuf,
        /// Leave everything running until Ctrl-C, and say what to try.
        #[arg(long)]
        keep: bool,
    },
    /// Install the chart on a real node and run what was mirrored (`make e2e`); needs root and containerd.
    E2e {
        /// The operator's image, an OCI image layout.
        #[arg(long)]
        image: PathBuf,
    },
    /// The part of it that runs in namespaces of its own.
    #[command(hide = true)]
    E2eInside(testenv::e2e::Inside),
    /// Build what is missing and print the directory of the programs.
    Tools,
    /// Write the values of the chart in DIR into its README.md and values.schema.json.
    Chart {
        dir: PathBuf,
        /// Fail instead if they are not current.
        #[arg(long)]
        check: bool,
    },
    /// Kill what is left when the supervisor is gone.
    #[command(hide = true)]
    Guard,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Sub::Up { command } => testenv::supervisor::up(&command),
        Sub::Demo { binary, keep } => testenv::demo::run(&testenv::demo::Options { binary, keep }),
        Sub::E2e { image } => testenv::e2e::run(&image),
        Sub::E2eInside(options) => testenv::e2e::run_inside(&options),
        Sub::Tools => testenv::supervisor::tools(),
        Sub::Chart { dir, check } => testenv::chart::run(&dir, check).map(|()| 0),
        Sub::Guard => testenv::guard::run().map(|()| 0),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("testenv: {error:#}");
            ExitCode::FAILURE
        }
    }
}
