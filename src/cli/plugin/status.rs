//! `kubectl imagemirror status NAME`: what the status of an object says, for people.

use std::fmt::Write as _;

use clap::Args;
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{
    cluster::Cluster,
    table::{age, condition, table},
};
use crate::{
    api::v1alpha1::{ImageMirror, ImageMirrorStatus, ImageState, LastSync, ProgressStatus},
    cli::{Failure, Output, bytes, print_json, say},
};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The ImageMirror.
    name: String,
    /// How it is written; as JSON, the whole object.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub(super) async fn run(cluster: &Cluster, arguments: &Arguments) -> Result<(), Failure> {
    let mirror = cluster.get(&arguments.name).await?;
    match arguments.output {
        Output::Json => print_json(&serde_json::json!(mirror)),
        Output::Text => {
            say(&text(&mirror, Timestamp::now()));
            Ok(())
        }
    }
}

fn text(mirror: &ImageMirror, now: Timestamp) -> String {
    let status = mirror.status.clone().unwrap_or_default();
    let mut text = head(mirror, now);
    // Writing to a String does not fail.
    let mut line = |what: &str, said: &str| {
        let _ = writeln!(text, "{what:<12} {said}");
    };
    line("Target:", &mirror.spec.target.registry);
    line("Synced:", &synced(&status));
    line("Runs:", &runs(mirror));
    if let Some(last) = &status.last_sync {
        line("Last sync:", &format!("{} ago, {}", age(Some(&last.finished_at), now), moved(last)));
    }
    if let Some(progress) = &status.progress {
        line("Progress:", &in_words(progress));
    }
    let conditions = status.conditions.iter().map(|it| {
        let since = age(Some(&it.last_transition_time), now);
        [it.type_.clone(), it.status.clone(), it.reason.clone(), since, it.message.clone()]
    });
    section(&mut text, ["CONDITION", "STATUS", "REASON", "SINCE", "MESSAGE"], &conditions.collect::<Vec<_>>());
    let failures = status.failures.iter().map(|it| {
        let (since, attempts) = (age(Some(&it.since), now), it.attempts.to_string());
        [it.source.clone(), it.reason.to_string(), since, attempts, it.message.clone()]
    });
    section(&mut text, ["FAILURE", "REASON", "SINCE", "ATTEMPTS", "MESSAGE"], &failures.collect::<Vec<_>>());
    let images = status.images.iter().map(|it| {
        let state = match it.state {
            ImageState::Pending => "Pending",
            ImageState::Synced => "Synced",
            ImageState::Failed => "Failed",
            ImageState::Skipped => "Skipped",
        };
        let digest = it.digest.as_ref().map(|digest| digest.to_string().chars().take(19).collect()).unwrap_or_default();
        [it.target.clone(), state.to_owned(), digest, age(it.synced_at.as_ref(), now)]
    });
    section(&mut text, ["IMAGE", "STATE", "DIGEST", "SYNCED"], &images.collect::<Vec<_>>());
    if status.truncated {
        text += "\nThere are too many images to list them in the status.\n";
    }
    text
}

fn head(mirror: &ImageMirror, now: Timestamp) -> String {
    let name = format!("{}/{}", mirror.namespace().unwrap_or_default(), mirror.name_any());
    let Some(ready) = condition(mirror, "Ready") else {
        return format!("{name}: no operator has looked at it yet\n\n");
    };
    let since = age(Some(&ready.last_transition_time), now);
    format!("{name}: Ready is {} since {since} ({})\n{}\n\n", ready.status, ready.reason, ready.message)
}

fn synced(status: &ImageMirrorStatus) -> String {
    let Some(count) = &status.synced else { return "unknown".to_owned() };
    let summary = status.summary.unwrap_or_default();
    let parts = [(summary.failed, "failed"), (summary.skipped, "skipped"), (summary.pending, "pending")];
    let rest: Vec<String> =
        parts.iter().filter(|(number, _)| *number > 0).map(|(number, what)| format!("{number} {what}")).collect();
    [count.clone()].into_iter().chain(rest).collect::<Vec<_>>().join(", ")
}

fn runs(mirror: &ImageMirror) -> String {
    let spec = &mirror.spec;
    match (&spec.schedule, &spec.interval) {
        _ if spec.suspend.unwrap_or_default() => "none, it is suspended".to_owned(),
        (Some(schedule), _) => format!("at {schedule} {}", spec.time_zone.as_deref().unwrap_or("UTC")),
        (None, interval) => format!("every {}", interval.as_deref().unwrap_or("1h")),
    }
}

/// What a run moved.
pub(super) fn moved(last: &LastSync) -> String {
    let seconds = last.finished_at.0.duration_since(last.started_at.0).as_secs_f64();
    let copied = bytes(last.bytes_copied.unsigned_abs());
    format!(
        "{copied} in {} blobs copied, {} mounted, {} present, in {seconds:.1} s",
        last.blobs_copied, last.blobs_mounted, last.blobs_present
    )
}

/// How far a run is.
pub(super) fn in_words(progress: &ProgressStatus) -> String {
    let (done, total) = (bytes(progress.bytes_done.unsigned_abs()), bytes(progress.bytes_total.unsigned_abs()));
    format!("{} of {} images, {done} of {total}", progress.images_done, progress.images_total)
}

fn section<const N: usize>(text: &mut String, head: [&str; N], rows: &[[String; N]]) {
    if !rows.is_empty() {
        *text += "\n";
        *text += &table(head, rows);
    }
}
