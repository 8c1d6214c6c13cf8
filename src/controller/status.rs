//! The status that an object should have: pure functions of the object, the run and the time.
//!
//! `Ready=False` only when a run has ended with a failure, `Ready=Unknown` only beside `Reconciling=True`; a periodic
//! run of a healthy object leaves `Ready=True`. So waiting tools neither hang nor flap.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::runner::Ended;
use crate::{
    api::{
        ConditionSet, ConditionType, ImageMirrorStatus, Status,
        v1alpha1::{FailureStatus, ImageState, ImageStatus, LastSync, ProgressStatus, Summary},
    },
    copy::ProgressSnapshot,
    mirror::{InvalidSpec, Problem, ValidatedMirror, last_digests},
    plan::Action,
    reason::{Reason, Retry},
    sync::{Failure, ImageReport, SyncReport},
};

const MAX_FAILURES: usize = 20;
const MAX_IMAGES: usize = 100;
const MAX_IMAGES_BYTES: usize = 48 << 10;
/// Images and failures together, so that the whole status stays below 64 KiB.
const MAX_LISTS_BYTES: usize = 56 << 10;
/// Failures that a condition's message names.
const NAMED_FAILURES: usize = 3;

/// A run for a new spec or a requested token is about to start.
pub(super) fn begun(mirror: &ValidatedMirror, current: &ImageMirrorStatus, now: Timestamp) -> ImageMirrorStatus {
    let mut conditions = ConditionSet::new(&current.conditions, mirror.generation, now);
    let message = format!("comparing {} with {}", wanted(mirror), mirror.target_host);
    conditions.set(ConditionType::Ready, Status::Unknown, Reason::Progressing, &message);
    conditions.set(ConditionType::Reconciling, Status::True, Reason::Progressing, &message);
    conditions.remove(ConditionType::Stalled);
    let same_spec = current.last_sync.as_ref().is_some_and(|last| last.spec_hash == mirror.spec_hash);
    let mut status = ImageMirrorStatus {
        observed_generation: mirror.generation,
        conditions: conditions.finish(),
        progress: None,
        ..current.clone()
    };
    if !same_spec {
        let mut conditions = ConditionSet::new(&status.conditions, mirror.generation, now);
        conditions.set(ConditionType::TargetInSync, Status::False, Reason::Progressing, &message);
        conditions.set(ConditionType::CredentialsResolved, Status::Unknown, Reason::Progressing, "not looked at yet");
        status.conditions = conditions.finish();
        let known = last_digests(mirror, current);
        let synced = mirror.images.iter().filter(|image| known.contains_key(&mirror.target_of(image))).count();
        let total = to_i64(mirror.images.len());
        let synced = to_i64(synced);
        // How many tags rules choose is not known before the lists have been read.
        let is_known = mirror.selections.is_empty();
        status.summary = is_known.then_some(Summary { total, synced, pending: total - synced, failed: 0, skipped: 0 });
        status.synced = is_known.then(|| format!("{synced}/{total}"));
    }
    status
}

/// A run is going on and has something to do.
pub(super) fn progressing(
    mirror: &ValidatedMirror,
    current: &ImageMirrorStatus,
    progress: ProgressSnapshot,
    now: Timestamp,
) -> ImageMirrorStatus {
    let mut conditions = ConditionSet::new(&current.conditions, mirror.generation, now);
    if !conditions.is(ConditionType::TargetInSync, Status::False) {
        let message = format!("copying to {}", mirror.target_host);
        conditions.set(ConditionType::TargetInSync, Status::False, Reason::Progressing, &message);
    }
    ImageMirrorStatus {
        observed_generation: mirror.generation,
        conditions: conditions.finish(),
        progress: Some(ProgressStatus {
            bytes_done: unsigned(progress.bytes_done),
            bytes_total: unsigned(progress.bytes_total),
            images_done: unsigned(progress.images_done),
            images_total: unsigned(progress.images_total),
        }),
        ..current.clone()
    }
}

/// Nothing is going on: what changed in the spec, if anything, does not change the outcome.
pub(super) fn settled(mirror: &ValidatedMirror, current: &ImageMirrorStatus, now: Timestamp) -> ImageMirrorStatus {
    let mut conditions = ConditionSet::new(&current.conditions, mirror.generation, now);
    conditions.remove(ConditionType::Stalled);
    if !current.failures.is_empty() && !conditions.is(ConditionType::Reconciling, Status::True) {
        conditions.set(
            ConditionType::Reconciling,
            Status::True,
            Reason::ProgressingWithRetry,
            "what failed is tried again",
        );
    }
    ImageMirrorStatus {
        observed_generation: mirror.generation,
        conditions: conditions.finish(),
        progress: None,
        ..current.clone()
    }
}

/// The object is suspended and no run is going on.
pub(super) fn suspended(mirror: &ValidatedMirror, current: &ImageMirrorStatus, now: Timestamp) -> ImageMirrorStatus {
    let mut conditions = ConditionSet::new(&current.conditions, mirror.generation, now);
    conditions.remove(ConditionType::Reconciling);
    conditions.remove(ConditionType::Stalled);
    let is_current = current.last_sync.as_ref().is_some_and(|last| last.spec_hash == mirror.spec_hash);
    let is_known =
        conditions.is(ConditionType::Ready, Status::True) || conditions.is(ConditionType::Ready, Status::False);
    if !(is_current && is_known) {
        let message = "suspended before this spec was carried out; set spec.suspend to false to go on";
        conditions.set(ConditionType::Ready, Status::False, Reason::Suspended, message);
        conditions.set(ConditionType::TargetInSync, Status::Unknown, Reason::Suspended, message);
    }
    ImageMirrorStatus {
        observed_generation: mirror.generation,
        conditions: conditions.finish(),
        progress: None,
        ..current.clone()
    }
}

/// The spec cannot be carried out: nothing but a change of it can help.
pub(super) fn invalid(
    generation: i64,
    current: &ImageMirrorStatus,
    error: &InvalidSpec,
    now: Timestamp,
) -> ImageMirrorStatus {
    let mut conditions = ConditionSet::new(&current.conditions, generation, now);
    let message = error.to_string();
    conditions.set(ConditionType::Ready, Status::False, Reason::InvalidSpec, &message);
    conditions.set(ConditionType::Stalled, Status::True, Reason::InvalidSpec, &message);
    conditions.set(ConditionType::TargetInSync, Status::Unknown, Reason::InvalidSpec, &message);
    conditions.remove(ConditionType::Reconciling);
    ImageMirrorStatus {
        observed_generation: generation,
        conditions: conditions.finish(),
        progress: None,
        ..current.clone()
    }
}

/// The status without the condition that only some statuses have.
pub(super) fn without_stalled(mut status: ImageMirrorStatus) -> ImageMirrorStatus {
    status.conditions.retain(|condition| condition.type_ != ConditionType::Stalled.as_str());
    status
}

/// A run has ended.
pub(super) fn finished(
    mirror: &ValidatedMirror,
    current: &ImageMirrorStatus,
    ended: &Ended,
    now: Timestamp,
) -> ImageMirrorStatus {
    let report = &ended.report;
    let mut conditions = ConditionSet::new(&current.conditions, mirror.generation, now);
    conditions.remove(ConditionType::Stalled);
    match ended.problems.first() {
        None => {
            let message = "every Secret named exists and parses";
            conditions.set(ConditionType::CredentialsResolved, Status::True, Reason::Succeeded, message);
        }
        Some(problem) => {
            let message = problems_message(&ended.problems);
            conditions.set(ConditionType::CredentialsResolved, Status::False, problem.reason, &message);
        }
    }
    let left: Vec<&ImageReport> = report.left().collect();
    let skipped = report.images.iter().filter(|image| state_of(image) == ImageState::Skipped).count();
    match outcome(report) {
        None => {
            let message = match skipped {
                0 => format!("{} in step with the sources", count(report.images.len(), "image")),
                _ => format!("{} looked at, {skipped} left as the policy says", count(report.images.len(), "image")),
            };
            conditions.set(ConditionType::Ready, Status::True, Reason::Succeeded, &message);
            match left_message(&left) {
                None => conditions.set(ConditionType::TargetInSync, Status::True, Reason::Succeeded, &message),
                Some(left) => {
                    conditions.set(ConditionType::TargetInSync, Status::False, Reason::TargetChanged, &left);
                }
            }
            conditions.remove(ConditionType::Reconciling);
        }
        Some(Failure { reason, message }) => {
            conditions.set(ConditionType::Ready, Status::False, reason, &message);
            let behind = report.failed().count() + left.len();
            let behind = format!("{behind} of {} not in step", count(report.images.len(), "image"));
            conditions.set(ConditionType::TargetInSync, Status::False, reason, &behind);
            conditions.set(
                ConditionType::Reconciling,
                Status::True,
                Reason::ProgressingWithRetry,
                "what failed is tried again",
            );
        }
    }
    let failed = to_i64(report.failed().count());
    let (total, skipped) = (to_i64(report.images.len()), to_i64(skipped));
    let synced = total - failed - skipped;
    let failures = failures(current, report, now);
    let size_of_failures = serde_json::to_vec(&failures).map_or(0, |bytes| bytes.len());
    let images = images(current, report, MAX_LISTS_BYTES.saturating_sub(size_of_failures), now);
    ImageMirrorStatus {
        observed_generation: mirror.generation,
        last_handled_reconcile_at: ended.token.clone().or_else(|| current.last_handled_reconcile_at.clone()),
        conditions: conditions.finish(),
        synced: Some(format!("{synced}/{total}")),
        summary: Some(Summary { total, synced, pending: 0, failed, skipped }),
        last_sync: Some(LastSync {
            generation: ended.generation,
            spec_hash: ended.spec_hash.clone(),
            started_at: Time(report.started_at),
            finished_at: Time(report.finished_at),
            bytes_copied: unsigned(report.totals.bytes_copied),
            blobs_copied: unsigned(report.totals.blobs_copied),
            blobs_mounted: unsigned(report.totals.blobs_mounted),
            blobs_present: unsigned(report.totals.blobs_present),
        }),
        progress: None,
        failures,
        truncated: images.is_none(),
        images: images.unwrap_or_default(),
    }
}

/// What a report with failures comes to: their reason where they all have one and nothing else worked, else
/// `PartialFailure`.
fn outcome(report: &SyncReport) -> Option<Failure> {
    let failed: Vec<(&ImageReport, &Failure)> = report.failed().collect();
    let (_, first) = failed.first()?;
    let of_one_kind = failed.len() == report.images.len() && failed.iter().all(|(_, f)| f.reason == first.reason);
    if of_one_kind && failed.iter().all(|(_, failure)| failure.message == first.message) {
        return Some((*first).clone());
    }
    let reason = if of_one_kind { first.reason } else { Reason::PartialFailure };
    let name = |(image, failure): &(&ImageReport, &Failure)| {
        format!("{} ({}: {})", image.name(), failure.reason, failure.message)
    };
    let named: Vec<String> = failed.iter().take(NAMED_FAILURES).map(name).collect();
    let more = if failed.len() > NAMED_FAILURES { ", …" } else { "" };
    let (count, total) = (failed.len(), count(report.images.len(), "image"));
    Some(Failure { reason, message: format!("{count} of {total} failed: {}{more}", named.join(", ")) })
}

/// Which tags have digests at the target that were not written here.
fn left_message(left: &[&ImageReport]) -> Option<String> {
    let named: Vec<&str> = left.iter().take(NAMED_FAILURES).map(|image| image.target.as_str()).collect();
    let more = if left.len() > NAMED_FAILURES { ", …" } else { "" };
    let what = "not written here, and spec.policy.overwrite leaves";
    (!left.is_empty())
        .then(|| format!("{} with a digest that was {what}: {}{more}", count(left.len(), "tag"), named.join(", ")))
}

/// The state of an image after a run.
fn state_of(image: &ImageReport) -> ImageState {
    match (&image.failure, image.action) {
        (Some(_), _) => ImageState::Failed,
        (None, Some(Action::Keep | Action::Leave)) => ImageState::Skipped,
        (None, _) => ImageState::Synced,
    }
}

/// What a mirror is about, as far as the spec says.
fn wanted(mirror: &ValidatedMirror) -> String {
    match (mirror.images.len(), mirror.selections.len()) {
        (images, 0) => count(images, "image"),
        (0, repositories) => format!("what is selected from {repositories} repositories"),
        (images, repositories) => {
            format!("{} and what is selected from {repositories} repositories", count(images, "image"))
        }
    }
}

fn problems_message(problems: &[Problem]) -> String {
    problems.iter().take(NAMED_FAILURES).map(|problem| problem.message.as_str()).collect::<Vec<_>>().join("; ")
}

fn failures(current: &ImageMirrorStatus, report: &SyncReport, now: Timestamp) -> Vec<FailureStatus> {
    let before: HashMap<&str, &FailureStatus> =
        current.failures.iter().map(|failure| (failure.target.as_str(), failure)).collect();
    let failure = |(image, failure): (&ImageReport, &Failure)| {
        let before = before.get(image.target.as_str()).filter(|before| before.reason == failure.reason);
        FailureStatus {
            source: image.name(),
            target: image.target.clone(),
            reason: failure.reason,
            message: failure.message.clone(),
            since: before.map_or(Time(now), |before| before.since.clone()),
            attempts: before.map_or(1, |before| before.attempts.saturating_add(i64::from(image.is_news))),
        }
    };
    let mut failures: Vec<FailureStatus> = report.failed().map(failure).collect();
    // What is tried again soonest first: the list decides when that is.
    failures.sort_by_key(|failure| match failure.reason.retry() {
        Retry::Transient => 0,
        Retry::Authentication => 1,
        Retry::Permanent => 2,
    });
    let mut kept: Vec<FailureStatus> = Vec::new();
    for failure in failures {
        // Of each class at least one stays, however many there are of another.
        let is_new_class = !kept.iter().any(|other| other.reason.retry() == failure.reason.retry());
        if kept.len() < MAX_FAILURES {
            kept.push(failure);
        } else if is_new_class && let Some(last) = kept.last_mut() {
            *last = failure;
        }
    }
    kept
}

/// Every image, or nothing where that would be too much.
fn images(current: &ImageMirrorStatus, report: &SyncReport, room: usize, now: Timestamp) -> Option<Vec<ImageStatus>> {
    if report.images.len() > MAX_IMAGES {
        return None;
    }
    // Of two that want one target tag each has its own past.
    let before: HashMap<(&str, &str), &ImageStatus> =
        current.images.iter().map(|image| ((image.target.as_str(), image.source.as_str()), image)).collect();
    let status = |image: &ImageReport| {
        let before = before.get(&(image.target.as_str(), image.source.as_str()));
        // An image that fails keeps what was known of it: its copy at the target stays.
        let digest = image.digest.clone().or_else(|| before.and_then(|before| before.digest.clone()));
        let unchanged = before.filter(|before| before.digest == digest);
        let synced_at = match (&image.failure, unchanged) {
            (_, Some(before)) => before.synced_at.clone(),
            (None, None) => Some(Time(now)),
            (Some(_), None) => None,
        };
        ImageStatus {
            source: image.source.clone(),
            tag: image.tag.clone(),
            target: image.target.clone(),
            source_digest: image
                .source_digest
                .clone()
                .or_else(|| before.and_then(|before| before.source_digest.clone())),
            digest,
            state: state_of(image),
            synced_at,
        }
    };
    let images: Vec<ImageStatus> = report.images.iter().map(status).collect();
    let size = serde_json::to_vec(&images).map_or(usize::MAX, |bytes| bytes.len());
    (size <= MAX_IMAGES_BYTES.min(room)).then_some(images)
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

fn to_i64(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn unsigned(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
