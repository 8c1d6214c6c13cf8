//! `imagemirror sync -f FILE…`: one sync of the `ImageMirror`s in the files, without Kubernetes.

use std::{fmt::Write as _, sync::Arc};

use super::{
    Failure,
    mirrors::{MirrorArguments, Mirrors, Outcome, Output},
    print_json, runtime,
};
use crate::{
    copy::{Fence, Progress},
    plan::Action,
    sync::{ImageReport, SyncReport, sync},
};

pub(super) fn run(arguments: &MirrorArguments) -> Result<(), Failure> {
    let mirrors = Mirrors::of(arguments)?;
    runtime()?.block_on(sync_all(&mirrors, arguments.output))
}

async fn sync_all(mirrors: &Mirrors, output: Output) -> Result<(), Failure> {
    let outcomes = mirrors.each(async |client, request, registries, cancel| {
        sync(client, request, registries, Fence::Open, Arc::new(Progress::default()), cancel).await
    });
    let outcomes = outcomes.await?;
    match output {
        Output::Text => print!("{}", text(&outcomes)),
        Output::Json => print_json(&serde_json::json!({ "mirrors": outcomes }))?,
    }
    let any = |what: fn(&SyncReport) -> bool| outcomes.iter().any(|outcome| what(&outcome.report));
    match () {
        () if any(|report| report.failed().next().is_some()) => Err(Failure::Reported),
        () if any(|report| report.left().next().is_some()) => Err(Failure::Drift),
        () => Ok(()),
    }
}

fn text(outcomes: &[Outcome<SyncReport>]) -> String {
    let mut text = String::new();
    for Outcome { name, report, .. } in outcomes {
        for image in &report.images {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{}", line(image));
        }
        let total = report.images.len();
        let synced = total - report.failed().count() - report.left().count();
        let seconds = report.finished_at.duration_since(report.started_at).as_secs_f64();
        let bytes = report.totals.bytes_copied;
        let _ = writeln!(text, "{name}: {synced}/{total} in step, {bytes} bytes copied in {seconds:.1} s");
    }
    text
}

fn line(image: &ImageReport) -> String {
    let source = image.name();
    if let Some(failure) = &image.failure {
        return format!("failed     {source}: {}: {}", failure.reason, failure.message);
    }
    let word = match image.action {
        Some(Action::Copy) => "copied",
        Some(Action::Update) => "updated",
        Some(Action::Restore) => "restored",
        Some(Action::Keep) => "kept",
        Some(Action::Leave) => "left",
        Some(Action::Unchanged) | None => "unchanged",
    };
    let digest = image.digest.as_ref().or(image.replaced.as_ref()).map(ToString::to_string).unwrap_or_default();
    format!("{word:<10} {source} -> {} {digest}", image.target)
}
