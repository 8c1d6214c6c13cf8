//! `imagemirror plan -f FILE…`: what a sync would do and why. Nothing is written.

use std::fmt::Write as _;

use super::{
    Failure, Output, bytes,
    mirrors::{MirrorArguments, Mirrors, Outcome},
    print_json, runtime, say,
};
use crate::{
    plan::Action,
    sync::{ImagePreview, Preview, preview},
};

pub(super) fn run(arguments: &MirrorArguments) -> Result<(), Failure> {
    let mirrors = Mirrors::of(arguments)?;
    runtime()?.block_on(plan_all(&mirrors, arguments.output))
}

async fn plan_all(mirrors: &Mirrors, output: Output) -> Result<(), Failure> {
    let outcomes = mirrors.each(async |_, client, (request, registries), cancel| {
        preview(client, request, registries, cancel).await.ok_or_else(Failure::nothing_changed)
    });
    report(&outcomes.await?, output)
}

/// Prints what a sync would do; the error says what that means for the exit code.
pub(super) fn report(outcomes: &[Outcome<Preview>], output: Output) -> Result<(), Failure> {
    match output {
        Output::Text => say(&text(outcomes)),
        Output::Json => print_json(&serde_json::json!({ "mirrors": outcomes }))?,
    }
    let mut images = outcomes.iter().flat_map(|outcome| &outcome.report.images);
    if images.any(|image| image.failure.is_some()) {
        return Err(Failure::Reported);
    }
    if outcomes.iter().any(|outcome| outcome.report.writes().next().is_some()) { Err(Failure::Work) } else { Ok(()) }
}

fn text(outcomes: &[Outcome<Preview>]) -> String {
    let mut text = String::new();
    for Outcome { name, report, .. } in outcomes {
        for image in &report.images {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{}", line(image));
        }
        let (count, total) = (report.writes().count(), report.images.len());
        let size = bytes(report.images.iter().map(|image| image.bytes).sum());
        let _ = writeln!(text, "{name}: {count} of {total} tags to write, {size} to copy");
    }
    text
}

fn line(image: &ImagePreview) -> String {
    let target = format!("{} -> {}", image.source, image.target);
    if let Some(failure) = &image.failure {
        return format!("fail       {target}: {}: {}", failure.reason, failure.message);
    }
    let word = match image.action {
        Some(Action::Copy) => "copy",
        Some(Action::Update) => "update",
        Some(Action::Restore) => "restore",
        Some(Action::Keep) => "keep",
        Some(Action::Leave) => "leave",
        Some(Action::Unchanged) | None => "unchanged",
    };
    let size =
        if image.action.is_some_and(Action::writes) { format!(", {}", bytes(image.bytes)) } else { String::new() };
    format!("{word:<10} {target}: {}{size}", image.why)
}
