//! Log lines on standard error, as text for people or JSON for machines.

use std::io::IsTerminal as _;

use clap::ValueEnum;
use serde::Deserialize;
use tracing_subscriber::{EnvFilter, fmt};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Logging that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter does not parse.
    #[error("invalid log level {0:?}: write error, warn, info, debug, trace, or a filter such as info,hyper=debug")]
    Filter(String),
    /// There is a logger already.
    #[error("logging has been set up before")]
    Twice,
}

/// Sets the process's logger. A bare level is for our own lines, with warnings of everything else; anything else is a
/// filter as `tracing-subscriber` reads it.
pub fn init(format: Format, level: &str) -> Result<(), LoggingError> {
    let is_bare = level.parse::<tracing::Level>().is_ok();
    let directives = if is_bare { format!("warn,imagemirror={level}") } else { level.to_owned() };
    let filter = EnvFilter::try_new(&directives).map_err(|_| LoggingError::Filter(level.to_owned()))?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let result = match format {
        Format::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    result.map_err(|_| LoggingError::Twice)
}
