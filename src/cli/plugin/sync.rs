//! `kubectl imagemirror sync NAME [--wait]`: asks for a sync now, and follows it by the object's status until it has ended.

use std::{io::IsTerminal as _, time::Duration};

use clap::Args;
use futures::StreamExt as _;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use kube::runtime::{
    WatchStreamExt as _,
    watcher::{Error, watch_object},
};
use serde_json::json;

use super::{
    cluster::Cluster,
    status::{in_words, moved},
    table::condition,
};
use crate::{
    api::{REQUESTED_AT, parse_duration, v1alpha1::ImageMirror, v1alpha1::ProgressStatus},
    cli::{Failure, say, signals},
};

const TEMPLATE: &str = "{prefix} {wide_bar:.cyan/dim} {decimal_bytes:>9} of {decimal_total_bytes:9} {decimal_bytes_per_sec:>11} {eta:>4} left";

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The ImageMirror.
    name: String,
    /// Wait until the sync has ended, and show how far it is.
    #[arg(long)]
    wait: bool,
    /// How long to wait at most, such as 90s or 1h; without it, until the end.
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = duration)]
    timeout: Option<Duration>,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "write a duration such as 90s, 1h or 1h30m".into())
}

pub(super) async fn run(cluster: &Cluster, arguments: &Arguments) -> Result<(), Failure> {
    let Arguments { name, wait, timeout } = arguments;
    let place = format!("{}/{name}", cluster.namespace);
    let is_suspended = cluster.get(name).await?.spec.suspend.unwrap_or_default();
    if is_suspended && *wait {
        let hint = format!("`kubectl imagemirror resume -n {} {name}` resumes it", cluster.namespace);
        return Err(Failure::Failed(format!("{place} is suspended, and does not sync; {hint}")));
    }
    let token = Timestamp::now().to_string();
    cluster.patch(name, &json!({"metadata": {"annotations": {REQUESTED_AT: token}}})).await?;
    let when = if is_suspended { ", and begins when it is resumed" } else { "" };
    say(&format!("{place}: a sync is asked for{when}\n"));
    if !wait {
        return Ok(());
    }
    let cancel = signals();
    let limit = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(*timeout).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        ended = until_ended(cluster, name, &token) => outcome(&place, &ended?),
        () = limit => {
            let hint = format!("it goes on; `kubectl imagemirror status -n {} {name}` shows how far it is", cluster.namespace);
            Err(Failure::Failed(format!("{place}: the sync has not ended in time; {hint}")))
        }
        () = cancel.cancelled() => {
            let hint = format!("`kubectl imagemirror status -n {} {name}` shows how far it is", cluster.namespace);
            Err(Failure::StoppedWaiting(hint))
        }
    }
}

/// The object when the sync that `token` asks for has ended, or cannot begin.
async fn until_ended(cluster: &Cluster, name: &str, token: &str) -> Result<ImageMirror, Failure> {
    let mut seen = std::pin::pin!(watch_object(cluster.mirrors(), name).default_backoff());
    let mut shown = Shown::new();
    while let Some(event) = seen.next().await {
        match event {
            Ok(Some(mirror)) => {
                let status = mirror.status.as_ref();
                if status.is_some_and(|status| status.last_handled_reconcile_at.as_deref() == Some(token))
                    || is_stalled(&mirror)
                {
                    shown.clear();
                    return Ok(mirror);
                }
                if let Some(progress) = status.and_then(|status| status.progress.as_ref()) {
                    shown.show(progress);
                }
            }
            Ok(None) => {
                let what = format!("{}/{name} has been deleted, and its sync with it", cluster.namespace);
                return Err(Failure::Failed(format!("{what}; apply it again")));
            }
            // Whatever else happens to a watch, it is begun again.
            Err(Error::InitialListFailed(error) | Error::WatchStartFailed(error)) if is_refused(&error) => {
                return Err(cluster.explain(&format!("ImageMirror {name:?} cannot be watched"), &error));
            }
            Err(_) => {}
        }
    }
    Err(Failure::Failed(format!("{}/{name} cannot be watched any more; try again", cluster.namespace)))
}

fn is_refused(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403 | 404))
}

/// Whether nothing but a change of the spec can help.
fn is_stalled(mirror: &ImageMirror) -> bool {
    let is_current = |observed: Option<i64>| observed >= mirror.metadata.generation;
    condition(mirror, "Stalled").is_some_and(|it| it.status == "True" && is_current(it.observed_generation))
}

/// What the sync came to.
fn outcome(place: &str, mirror: &ImageMirror) -> Result<(), Failure> {
    let status = mirror.status.clone().unwrap_or_default();
    for failure in &status.failures {
        say(&format!("failed     {}: {}: {}\n", failure.source, failure.reason, failure.message));
    }
    let moved = status.last_sync.as_ref().map(moved).unwrap_or_default();
    let summary = format!("{place}: {} in step, {moved}\n", status.synced.unwrap_or_default());
    if !status.failures.is_empty() {
        say(&summary);
        return Err(Failure::Reported);
    }
    let ready = condition(mirror, "Ready");
    if ready.is_none_or(|ready| ready.status != "True") {
        let (reason, message) = ready.map(|ready| (ready.reason.as_str(), ready.message.as_str())).unwrap_or_default();
        return Err(Failure::Failed(format!("{place} is not in step: {reason}: {message}")));
    }
    say(&summary);
    match condition(mirror, "TargetInSync") {
        Some(it) if it.status == "False" && it.reason == "TargetChanged" => Err(Failure::Drift),
        _ => Ok(()),
    }
}

/// The progress that the status tells, as a bar on a terminal, else as lines.
struct Shown {
    bar: Option<ProgressBar>,
    last: Option<ProgressStatus>,
}

impl Shown {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0).with_style(style.progress_chars("━━─"))
        });
        Self { bar, last: None }
    }

    fn show(&mut self, progress: &ProgressStatus) {
        if self.last.as_ref() == Some(progress) {
            return;
        }
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(format!("{} of {} images", progress.images_done, progress.images_total));
                bar.set_length(progress.bytes_total.unsigned_abs());
                bar.set_position(progress.bytes_done.unsigned_abs());
            }
            None => eprintln!("{}", in_words(progress)),
        }
        self.last = Some(*progress);
    }

    fn clear(&self) {
        self.bar.iter().for_each(ProgressBar::finish_and_clear);
    }
}
