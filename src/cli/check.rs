//! `imagemirror check -f FILE…`: which login is used where, what each registry grants for it, and what to do where that is
//! too little. Nothing is copied, and nothing is left at a target.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use clap::Args;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::{
    Failure, Output,
    mirrors::{Mirrors, Outcome},
    print_json, runtime, say,
};
use crate::{
    mirror::{Prepared, Problem},
    registry::{Client, ClientOptions, Timing},
    sync::{Check, Login, LoginOutcome, RepositoryCheck, check},
};

/// Entries that do not match are named up to so many.
const MAX_OTHERS: usize = 5;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Files with ImageMirrors and, if wanted, Secrets and ServiceAccounts; `-` is standard input.
    #[arg(short = 'f', long = "filename", required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// How the report is written to standard output.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// What is known of the logins of a mirror.
#[derive(Serialize)]
pub(super) struct Report {
    /// Secrets that are missing or cannot be used.
    problems: Vec<Problem>,
    #[serde(flatten)]
    check: Check,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mirrors = Mirrors::of_files(&arguments.files)?;
    let client = client();
    let one = async |_: &str, prepared, cancel: &CancellationToken| {
        of(&client, prepared, cancel).await.ok_or_else(Failure::nothing_changed)
    };
    let outcomes = runtime()?.block_on(mirrors.each_prepared(one))?;
    report(&outcomes, arguments.output)
}

/// A client that does not try for long what does not work: somebody waits.
pub(super) fn client() -> Client {
    let (backoff_first, backoff_max) = (Duration::from_millis(200), Duration::from_secs(1));
    Client::new(ClientOptions {
        timing: Timing { backoff_first, backoff_max, ..Timing::default() },
        ..ClientOptions::default()
    })
}

/// Tries the logins of a mirror. `None` if `cancel` came first.
pub(super) async fn of(
    client: &Client,
    prepared: Prepared,
    cancel: &tokio_util::sync::CancellationToken,
) -> Option<Report> {
    let Prepared { request, selections, registries, blocked, problems, .. } = prepared;
    let check = check(client, &request, &selections, (&registries, &blocked), cancel).await?;
    Some(Report { problems, check })
}

/// Prints what was found; the error says what that means for the exit code.
pub(super) fn report(outcomes: &[Outcome<Report>], output: Output) -> Result<(), Failure> {
    match output {
        Output::Text => say(&outcomes.iter().map(text).collect::<String>()),
        Output::Json => print_json(&serde_json::json!({ "mirrors": outcomes }))?,
    }
    let is_fine =
        |Outcome { report, .. }: &Outcome<Report>| report.problems.is_empty() && report.check.failed().next().is_none();
    if outcomes.iter().all(is_fine) { Ok(()) } else { Err(Failure::Reported) }
}

fn text(Outcome { name, report, .. }: &Outcome<Report>) -> String {
    let Report { problems, check } = report;
    let mut text = String::new();
    for problem in problems {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name}: {}: {}", problem.reason, problem.message);
    }
    for repository in &check.repositories {
        text += &lines(repository);
    }
    let (total, failed) = (check.repositories.len(), check.failed().count());
    let _ = writeln!(text, "{name}: {} of {total} repositories would work", total - failed);
    text
}

fn lines(found: &RepositoryCheck) -> String {
    let wants = if found.is_target { "pull and push" } else { "pull" };
    let mut text = format!("{}, {wants}\n", found.repository);
    let mut line = |what: &str, said: &str| {
        let _ = writeln!(text, "  {what:<10} {said}");
    };
    let failure = found.failure.as_ref().map(|failure| failure.message.as_str()).unwrap_or_default();
    for (number, login) in found.logins.iter().enumerate() {
        line(if number == 0 { "logins" } else { "" }, &format!("{}. {}", number + 1, in_words(login, failure)));
    }
    if found.logins.is_empty() {
        line("logins", if found.pull.is_some() { "none matches; it is asked without one" } else { "none matches" });
        let others = &found.other_entries;
        let rest = others.len().saturating_sub(MAX_OTHERS);
        others.iter().take(MAX_OTHERS).for_each(|other| line("", &format!("{other} is for something else")));
        if rest > 0 {
            line("", &format!("and so are {rest} more"));
        }
    }
    if !found.asked_for.is_empty() {
        line("asked for", &found.asked_for.join(", or "));
    }
    if let Some(granted) = &found.granted {
        line("granted", if granted.is_empty() { "nothing".to_owned() } else { granted.join(" ") }.as_str());
    }
    let works = |works: bool| if works { "works" } else { "does not work" };
    if let Some(pull) = found.pull {
        let found = found.found.as_ref().map(|found| format!(": {found}")).unwrap_or_default();
        line("pull", &format!("{}{found}", works(pull)));
    }
    if let Some(push) = found.push {
        line("push", works(push));
    }
    if let Some(failure) = &found.failure {
        line("failure", &format!("{}: {}", failure.reason, failure.message));
        if let Some(guide) = &found.guide {
            line("see", guide);
        }
    }
    text
}

/// The failure of the repository says what a refusal is, too.
fn in_words(login: &Login, failure: &str) -> String {
    let what = format!("{}, entry {:?}, {}", login.origin, login.entry, login.shape);
    match (login.outcome, &login.refusal) {
        (LoginOutcome::Used, _) => format!("{what}: used"),
        (LoginOutcome::Refused, Some(refusal)) if !failure.starts_with(refusal) => {
            format!("{what}: refused: {refusal}")
        }
        (LoginOutcome::Refused, _) => format!("{what}: refused"),
        (LoginOutcome::NotAskedFor, _) => format!("{what}: not asked for"),
        (LoginOutcome::Untried, _) => format!("{what}: not tried"),
    }
}
