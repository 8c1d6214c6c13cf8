//! `imagemirror sync -f FILE…`: one sync of the `ImageMirror`s in the files, without Kubernetes.

use std::sync::Arc;

use clap::Args;

use super::{
    Failure, Output, bytes,
    mirrors::{MirrorArguments, Mirrors},
    print_json,
    progress::{Screen, Style},
    runtime, say,
};
use crate::{
    copy::{Fence, ProgressSnapshot},
    plan::Action,
    sync::{ImageReport, SyncReport, sync_watched},
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    mirrors: MirrorArguments,
    /// How progress is shown on standard error.
    #[arg(long, value_enum, default_value_t = Style::Auto)]
    progress: Style,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let mirrors = Mirrors::of(&arguments.mirrors)?;
    runtime()?.block_on(sync_all(&mirrors, arguments.mirrors.output, arguments.progress))
}

async fn sync_all(mirrors: &Mirrors, output: Output, style: Style) -> Result<(), Failure> {
    let outcomes = mirrors.each(async |name, client, (request, registries), cancel| {
        let screen = Screen::new(name, style, output, line);
        let progress = Arc::clone(&screen.progress);
        let sync = sync_watched(client, request, registries, Fence::Open, progress, &screen, cancel);
        let report = screen.follow(sync).await.ok_or_else(|| interrupted(name, &screen.progress.snapshot()))?;
        if matches!(output, Output::Text) {
            say(&format!("{name}: {}\n", summary(&report)));
        }
        Ok(report)
    });
    let outcomes = outcomes.await?;
    if matches!(output, Output::Json) {
        print_json(&serde_json::json!({ "mirrors": outcomes }))?;
    }
    let any = |what: fn(&SyncReport) -> bool| outcomes.iter().any(|outcome| what(&outcome.report));
    match () {
        () if any(|report| report.failed().next().is_some()) => Err(Failure::Reported),
        () if any(|report| report.left().next().is_some()) => Err(Failure::Drift),
        () => Ok(()),
    }
}

/// What an interrupted sync leaves, and how to go on.
fn interrupted(name: &str, progress: &ProgressSnapshot) -> Failure {
    let ProgressSnapshot { images_done, images_total, .. } = *progress;
    let left = "no tag of the others was written, and their uploads have been given up; sync again to go on";
    Failure::Interrupted(format!("{name}: {images_done} of {images_total} images are finished; {left}"))
}

fn summary(report: &SyncReport) -> String {
    let total = report.images.len();
    let synced = total - report.failed().count() - report.left().count();
    let seconds = report.finished_at.duration_since(report.started_at).as_secs_f64();
    let copied = bytes(report.totals.bytes_copied);
    format!("{synced}/{total} in step, {copied} copied in {seconds:.1} s")
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
