//! Log lines: to standard error, as text for people or JSON for machines.
//!
//! A bare level is about `ImageMirror`; the libraries below it then speak from `warn` on. Whoever wants more writes a
//! whole filter such as `info,hyper=debug` or `trace,imagemirror=trace` (the grammar is that of `tracing_subscriber::EnvFilter`).
//! What a library writes that has secrets in it is left out of every filter.

use std::io::{self, IsTerminal as _};

use serde::Deserialize;
use tracing::Metadata;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{LevelFilter, filter_fn},
    layer::{Layered, SubscriberExt as _},
    reload,
    util::SubscriberInitExt as _,
};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Why nothing can be logged.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The level is neither a level nor a filter.
    #[error("invalid log level {0:?}: write error, warn, info, debug, trace, or a filter such as info,hyper=debug")]
    Level(String),
    /// Logging was set up before.
    #[error("logging cannot be set up: {0}")]
    Init(Box<dyn std::error::Error + Send + Sync>),
}

/// Who else is told of what happens, beside the log.
pub type Further = Option<Box<dyn Layer<Registry> + Send + Sync>>;

/// Sends log lines to standard error from now on. Works once in a process.
pub fn init(format: Format, level: &str, further: Further) -> Result<Level, LoggingError> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines = match format {
        Format::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        Format::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    let discreet = filter_fn(|metadata| !tells_secrets(metadata));
    let subscriber = tracing_subscriber::registry().with(further).with(filter).with(discreet).with(lines);
    subscriber.try_init().map_err(|error| LoggingError::Init(error.into()))?;
    Ok(Level(handle))
}

/// What is logged, which can be changed while the process runs.
pub struct Level(reload::Handle<EnvFilter, Layered<Further, Registry>>);

impl Level {
    /// Logs this level, or by this filter, from now on.
    pub fn set(&self, level: &str) -> Result<(), LoggingError> {
        self.0.reload(filter(level)?).map_err(|error| LoggingError::Init(error.into()))
    }
}

/// The filter of a bare level, or of a whole filter.
pub(crate) fn filter(level: &str) -> Result<EnvFilter, LoggingError> {
    let level = level.trim();
    if level.is_empty() {
        return Err(LoggingError::Level(String::new()));
    }
    let bare = !level.contains(['=', ',', '[']);
    let directives = match level.parse::<LevelFilter>() {
        Ok(found) if bare => format!("warn,imagemirror={found}"),
        // A single word that is no level would be taken for a module, and log nothing: a typing error.
        Err(_) if bare => return Err(LoggingError::Level(level.to_owned())),
        _ => level.to_owned(),
    };
    EnvFilter::builder().parse(directives).map_err(|_| LoggingError::Level(level.to_owned()))
}

/// Amazon's crates write whole requests and answers at `trace`: session tokens, keys and passwords.
fn tells_secrets(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("aws_") && *metadata.level() == tracing::Level::TRACE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_level_is_about_imagemirror() {
        assert_eq!(filter("debug").unwrap().to_string(), "imagemirror=debug,warn");
        assert_eq!(filter(" INFO ").unwrap().to_string(), "imagemirror=info,warn");
    }

    #[test]
    fn a_whole_filter_is_taken_as_it_is() {
        assert_eq!(filter("info,hyper=debug").unwrap().to_string(), "hyper=debug,info");
    }

    #[test]
    fn a_typing_error_is_refused() {
        for wrong in ["inof", "", "imagemirror=lots", "7"] {
            assert!(matches!(filter(wrong), Err(LoggingError::Level(_))), "{wrong}");
        }
    }
}
