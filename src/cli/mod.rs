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

mod check;
mod completion;
mod crd;
mod documents;
mod import;
mod logins;
mod mirrors;
mod operator;
mod plan;
mod plugin;
mod probe;
mod progress;
mod sync;
mod validate;

use std::{
    ffi::{OsStr, OsString},
    io::{Read as _, Write as _},
    path::Path,
    process::ExitCode,
};

use clap::{Parser, Subcommand, ValueEnum};

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
    Sync(sync::Arguments),
    /// Say what a sync of the ImageMirrors in the files would do, and why; change nothing.
    Plan(mirrors::MirrorArguments),
    /// Say which login is used for which registry, and whether pull and push would work; copy nothing.
    Check(check::Arguments),
    /// Check the ImageMirrors in the files as the API server and the operator do, without either.
    Validate(validate::Arguments),
    /// Turn the configuration of another program into ImageMirrors, with comments where something has no equal.
    Import(import::Arguments),
    /// Print the CustomResourceDefinition.
    Crd,
    /// Ask a running operator whether it is Ready (`helm test`).
    #[command(hide = true)]
    Probe(probe::Arguments),
    /// Print what makes a shell complete the arguments.
    Completion(completion::Arguments),
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
    #[error("some tags at the target were not written here, and were left; policy.overwrite: Always writes them")]
    Drift,
    /// A plan has something to do.
    #[error("there is something to do")]
    Work,
    /// Ctrl-C, with what that leaves.
    #[error("interrupted; {0}")]
    Interrupted(String),
    /// Ctrl-C while something goes on elsewhere.
    #[error("interrupted; the operator goes on with the sync; {0}")]
    StoppedWaiting(String),
}

/// The exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

impl Failure {
    /// Interrupted while nothing was being written.
    fn nothing_changed() -> Self {
        Self::Interrupted("nothing was changed".into())
    }

    fn code(&self) -> u8 {
        match self {
            Self::Failed(_) | Self::Reported => 1,
            Self::Usage(_) => 2,
            Self::Drift => 3,
            Self::Work => 4,
            Self::Interrupted(_) | Self::StoppedWaiting(_) => INTERRUPTED,
        }
    }
}

/// Runs the command that the arguments name: the plugin's if the program is called by the plugin's name. Errors go to
/// standard error as one line.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let called = arguments.first().map(Path::new).and_then(Path::file_stem);
    if called == Some(OsStr::new(plugin::NAME)) {
        return end("kubectl imagemirror", plugin::Plugin::try_parse_from(arguments), |plugin| {
            // What the client of the API server logs is said in the error, too.
            logs(None, Some("error,kube_client=off".to_owned())).and_then(|()| plugin::run(plugin))
        });
    }
    end("imagemirror", Cli::try_parse_from(arguments), dispatch)
}

fn dispatch(cli: Cli) -> Result<(), Failure> {
    let Cli { command, log_format, log_level } = cli;
    match command {
        Command::Operator(arguments) => operator::run(arguments, log_format, log_level),
        Command::Sync(arguments) => logs(log_format, log_level).and_then(|()| sync::run(&arguments)),
        Command::Plan(arguments) => logs(log_format, log_level).and_then(|()| plan::run(&arguments)),
        Command::Check(arguments) => logs(log_format, log_level).and_then(|()| check::run(&arguments)),
        Command::Validate(arguments) => validate::run(&arguments),
        Command::Import(arguments) => import::run(&arguments),
        Command::Crd => crd::run(),
        Command::Probe(arguments) => probe::run(&arguments),
        Command::Completion(arguments) => {
            completion::run(&arguments);
            Ok(())
        }
    }
}

/// Runs what was parsed, and says what went wrong.
fn end<T>(name: &str, parsed: Result<T, clap::Error>, run: impl FnOnce(T) -> Result<(), Failure>) -> ExitCode {
    let parsed = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and version are no errors: clap knows, and prints to the right stream.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(parsed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::Reported | Failure::Work) {
                eprintln!("{name}: {failure}");
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

/// How a report is written to standard output.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

fn print_json(value: &serde_json::Value) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(value).map_err(|error| Failure::Failed(error.to_string()))?;
    say(&format!("{json}\n"));
    Ok(())
}

/// The text of a file, or of standard input for `-`.
fn read_text(file: &Path) -> Result<String, Failure> {
    let text = if file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    text.map_err(|error| Failure::Usage(format!("{} cannot be read: {error}; name a file that can", file.display())))
}

/// Writes to standard output. A reader who has gone away (`imagemirror sync | head`) does not end the work.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Bytes as people read them: three digits or so, and a unit.
fn bytes(count: u64) -> String {
    const UNITS: [(u64, &str); 4] =
        [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
    match UNITS.into_iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => {
            let tenths = u128::from(count) * 10 / u128::from(size);
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
        None => format!("{count} B"),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let builder = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    builder.map_err(|error| {
        Failure::Failed(format!("the runtime could not be started: {error}; see how many threads the user may have"))
    })
}

/// A token that SIGINT and SIGTERM cancel. The second of them ends the program at once: what is being given up at a registry
/// then is left to it.
fn signals() -> tokio_util::sync::CancellationToken {
    let token = tokio_util::sync::CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return;
        };
        for is_first in [true, false] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if !is_first {
                std::process::exit(INTERRUPTED.into());
            }
            cancelled.cancel();
        }
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

    #[test]
    fn bytes_have_the_unit_that_suits_them() {
        for (count, said) in
            [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (47_690_000, "47.6 MB"), (u64::MAX, "18446744.0 TB")]
        {
            assert_eq!(bytes(count), said);
        }
    }
}
