//! `imagemirror sync -f FILE…`: one sync of the `ImageMirror`s in the files, without Kubernetes.

use std::{fmt::Write as _, sync::Arc};

use serde::Serialize;

use super::{
    Failure,
    mirrors::{MirrorArguments, Mirrors, Output},
    print_json, runtime, signals,
};
use crate::{
    copy::{Fence, Progress},
    plan::Action,
    registry::{Client, ClientOptions},
    sync::{ImageReport, SyncReport, sync},
};

#[derive(Serialize)]
struct Outcome {
    namespace: String,
    name: String,
    #[serde(flatten)]
    report: SyncReport,
}

pub(super) fn run(arguments: &MirrorArguments) -> Result<(), Failure> {
    let mirrors = Mirrors::of(arguments)?;
    runtime()?.block_on(sync_all(&mirrors, arguments.output))
}

async fn sync_all(mirrors: &Mirrors, output: Output) -> Result<(), Failure> {
    let cancel = signals();
    let client = Client::new(ClientOptions::default());
    mirrors.say_credentials();
    let mut outcomes = Vec::new();
    for mirror in &mirrors.validated {
        let (request, registries) = mirrors.request(mirror, &client, &cancel).await?;
        let progress = Arc::new(Progress::default());
        let report = sync(&client, &request, &registries, Fence::Open, progress, &cancel).await;
        let report = report.ok_or(Failure::Interrupted)?;
        outcomes.push(Outcome { namespace: mirror.namespace.clone(), name: mirror.name.clone(), report });
    }
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

fn text(outcomes: &[Outcome]) -> String {
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
