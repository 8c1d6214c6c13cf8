//! The command line: one file for each subcommand, and what an error means for the exit code.
//!
//! | code | means |
//! |---|---|
//! | 0 | all in step, or the operator was stopped |
//! | 1 | something failed |
//! | 2 | the command or its input is wrong |
//! | 3 | the target has tags with digests that the policy does not let us overwrite |
//! | 4 | there is something to do, says a plan |
//! | 130 | interrupted |

mod crd;
mod documents;
mod mirrors;
mod operator;
mod plan;
mod probe;
mod sync;
mod validate;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::telemetry::logging::{self, Format};

/// Mirrors container images declaratively.
#[derive(Debug, Parser)]
#[command(name = "imagemirror", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// How log lines are written; the operator's configuration has the default.
    #[arg(long, global = true, value_enum, env = "IMAGEMIRROR_LOG_FORMAT")]
    log_format: Option<Format>,
    /// What is logged: error, warn, info, debug, trace, or a filter such as `info,hyper=debug`.
    #[arg(long, global = true, env = "IMAGEMIRROR_LOG_LEVEL")]
    log_level: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the Kubernetes operator.
    Operator(operator::Arguments),
    /// Sync the ImageMirrors in the files once, without Kubernetes.
    Sync(mirrors::MirrorArguments),
    /// Say what a sync of the ImageMirrors in the files would do, and why; change nothing.
    Plan(mirrors::MirrorArguments),
    /// Check the ImageMirrors in the files as the API server and the operator do, without either.
    Validate(validate::Arguments),
    /// Print the CustomResourceDefinition.
    Crd,
    /// Ask a running operator whether it is Ready (`helm test`).
    #[command(hide = true)]
    Probe(probe::Arguments),
}

/// Why a command ended, other than well.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The command or its input is wrong.
    #[error("{0}")]
    Usage(String),
    /// Something failed.
    #[error("{0}")]
    Failed(String),
    /// What failed has been said already.
    #[error("failed")]
    Reported,
    /// Some tags were left as they are.
    #[error("some tags at the target were not written here, and were left")]
    Drift,
    /// A plan has something to do.
    #[error("there is something to do")]
    Work,
    /// Ctrl-C.
    #[error("interrupted; what was begun at the target has been given up")]
    Interrupted,
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Failed(_) | Self::Reported => 1,
            Self::Usage(_) => 2,
            Self::Drift => 3,
            Self::Work => 4,
            Self::Interrupted => 130,
        }
    }
}

/// Runs the command that the arguments name. Errors go to standard error as one line.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors: clap knows, and prints to the right stream.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let Cli { command, log_format, log_level } = cli;
    let result = match command {
        Command::Operator(arguments) => operator::run(arguments, log_format, log_level),
        Command::Sync(arguments) => logs(log_format, log_level).and_then(|()| sync::run(&arguments)),
        Command::Plan(arguments) => logs(log_format, log_level).and_then(|()| plan::run(&arguments)),
        Command::Validate(arguments) => validate::run(&arguments),
        Command::Crd => crd::run(),
        Command::Probe(arguments) => probe::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::Reported | Failure::Work) {
                eprintln!("imagemirror: {failure}");
            }
            ExitCode::from(failure.code())
        }
    }
}

/// The log of a command that reports by itself: errors alone, unless more is asked for.
fn logs(format: Option<Format>, level: Option<String>) -> Result<(), Failure> {
    let level = level.unwrap_or_else(|| "error".to_owned());
    logging::init(format.unwrap_or_default(), &level, None)
        .map(|_| ())
        .map_err(|error| Failure::Usage(error.to_string()))
}

fn print_json(value: &serde_json::Value) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(value).map_err(|error| Failure::Failed(error.to_string()))?;
    println!("{json}");
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let builder = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    builder.map_err(|error| Failure::Failed(format!("the runtime could not be started: {error}")))
}

/// A token that SIGINT and SIGTERM cancel.
fn signals() -> tokio_util::sync::CancellationToken {
    let token = tokio_util::sync::CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return;
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        cancelled.cancel();
    });
    token
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
