//! One look at one object: the steps in their order, and what is written of them.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt as _;
use jiff::Timestamp;
use kube::{
    Resource as _, ResourceExt as _,
    core::{DeserializeGuard, ObjectMeta, error_boundary::InvalidObject},
    runtime::controller::Action as Requeue,
};
use tracing::Instrument as _;

use super::{
    context::{Context, Current, Identity},
    decide::{
        Decision, Known, RunState, Scope, credentials_due, decide, elapsed, is_requested, is_unsettled, spread_of,
        waiting_for_credentials,
    },
    error::Error,
    events::Summary,
    resolve::{Glance, glance, resolve},
    runner::{Completes, Ended, Job, Reread, View, run_span},
    status,
};
use crate::{
    api::{ConditionType, ImageMirror, ImageMirrorStatus, schema},
    config::Timing,
    mirror::{InvalidSpec, Prepared, Secrets, ValidatedMirror, last_digests, prepare, validate},
    plan::Action,
    reason::{Reason, Retry},
    sync::Last,
};

/// An object as it is watched: one that does not fit our types harms nobody but itself.
pub(super) type Guarded = DeserializeGuard<ImageMirror>;

/// Looks at an object, does the next thing, and says when to look again.
pub(super) async fn reconcile(object: Arc<Guarded>, context: Arc<Context>) -> Result<Requeue, Error> {
    caught(async {
        let id = identity(object.meta())?;
        let span = tracing::error_span!("reconcile", object = %id);
        look(id, &object, &context).instrument(span).await
    })
    .await
}

/// A fault of ours at one object ends neither the controller nor the reconciles of others.
async fn caught<T>(reconcile: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    AssertUnwindSafe(reconcile).catch_unwind().await.unwrap_or(Err(Error::Panicked))
}

async fn look(id: Identity, object: &Arc<Guarded>, context: &Arc<Context>) -> Result<Requeue, Error> {
    if !context.config.watches(&id.namespace) {
        return Ok(Requeue::await_change());
    }
    let mirror = match &object.0 {
        Ok(mirror) => mirror,
        Err(invalid) => return unreadable(&id, invalid, context).await,
    };
    let mut current = context.current(&id, mirror);
    let now = Timestamp::now();
    let validated = match validate(mirror) {
        Ok(validated) => validated,
        Err(error) => {
            context.runner.cancel(&id.uid);
            let generation = mirror.metadata.generation.unwrap_or_default();
            let status = status::invalid(generation, &current.status, &error, now);
            context.apply(&id, &mut current, status).await?;
            return Ok(Requeue::await_change());
        }
    };
    // The run before its outcome: one that ends in between is then seen as going on, and wakes the object again.
    let view = context.runner.view(&id.uid);
    if let Some(ended) = context.runner.ended(&id.uid) {
        let span = run_span(&id, ended.number);
        report(&id, &validated, &mut current, &ended, context).instrument(span).await?;
    }
    context.observe(&id, &current.status);
    let timing = context.config.timing_of_decisions();
    let glance = look_at_secrets(&id, &validated, &current.status, (now, &timing), context).await?;
    let last = context.runner.last(&id.uid);
    let is_change = |glance: &Glance| last.as_ref().is_none_or(|last| last.fingerprint != glance.fingerprint);
    let times = last.as_ref().filter(|last| last.spec_hash == validated.spec_hash).map(|last| last.times);
    let run = view.as_ref().map_or(RunState::Idle, |view| RunState::Running {
        spec_hash: &view.spec_hash,
        cancelled: view.cancelled,
        since: view.since,
    });
    let known = Known {
        credentials_changed: glance.as_ref().is_some_and(is_change),
        credentials_age: glance.map_or(Duration::ZERO, |glance| glance.age),
        times,
        spread: spread_of(&id.uid),
    };
    match decide(&validated, &current.status, run, &known, &timing, now) {
        Decision::Start(scope) => {
            start(&id, &validated, &mut current, scope, context).await?;
            Ok(Requeue::requeue(timing.progress_first))
        }
        Decision::Cancel => {
            context.runner.cancel(&id.uid);
            if !validated.suspended {
                let status = status::begun(&validated, &current.status, now);
                context.apply(&id, &mut current, status).await?;
            }
            // The run wakes the object when it has ended.
            Ok(Requeue::await_change())
        }
        Decision::Wait(wait) => {
            let status = match &view {
                Some(view) => running(&validated, &current.status, view, timing.progress_first, now),
                None => status::settled(&validated, &current.status, now),
            };
            context.apply(&id, &mut current, status).await?;
            // Never at once: what makes it due may be rounded.
            Ok(Requeue::requeue(wait.max(Duration::from_millis(10))))
        }
        Decision::Idle => {
            if validated.suspended && view.is_none() {
                let status = status::suspended(&validated, &current.status, now);
                context.apply(&id, &mut current, status).await?;
            }
            Ok(Requeue::await_change())
        }
    }
}

/// When to look again after a reconcile that failed.
#[allow(clippy::needless_pass_by_value, reason = "the form that the controller calls")]
pub(super) fn after_error(object: Arc<Guarded>, error: &Error, context: Arc<Context>) -> Requeue {
    context.metrics.reconcile_error(error.reason().as_str());
    let object = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
    let timing = &context.config.timing;
    if error.is_not_found() {
        // Gone: the watch says so soon, and nobody looks again. Or the API server has lost the kind for a moment, and
        // what is left to be written must not be forgotten.
        tracing::debug!(object, %error, "the object is not there");
        return Requeue::requeue(timing.secret_retry);
    }
    if error.is_conflict() {
        tracing::debug!(object, "somebody else wrote the object: looking again");
        // For as long as the watch takes to bring what was written; a longer one would only be later.
        return Requeue::requeue(Duration::from_millis(200));
    }
    tracing::warn!(object, %error, "a reconcile failed");
    match error {
        Error::Panicked => Requeue::requeue(timing.retry_transient_min),
        _ => Requeue::requeue(error.retry_after().unwrap_or_default().max(timing.secret_retry)),
    }
}

fn identity(meta: &ObjectMeta) -> Result<Identity, Error> {
    let namespace = meta.namespace.clone().ok_or(Error::Anonymous)?;
    let name = meta.name.clone().ok_or(Error::Anonymous)?;
    let uid = meta.uid.clone().ok_or(Error::Anonymous)?;
    Ok(Identity { namespace, name, uid })
}

/// An object that was stored under another schema and does not fit our types.
async fn unreadable(id: &Identity, invalid: &InvalidObject, context: &Context) -> Result<Requeue, Error> {
    context.runner.cancel(&id.uid);
    let generation = invalid.metadata.generation.unwrap_or_default();
    let mut current = context.unread(id, invalid.metadata.resource_version.clone());
    let refused = schema::check_spec(&context.stored(id).await?["spec"]);
    let why = InvalidSpec::unreadable(&invalid.error, &refused);
    let status = status::invalid(generation, &current.status, &why, Timestamp::now());
    match context.apply(id, &mut current, status.clone()).await {
        // The API server applies nothing to an object that it cannot read itself.
        Err(error) if error.is_internal() => {
            context.overwrite(id, &mut current, status::without_stalled(status)).await?;
        }
        outcome => outcome?,
    }
    // If it was the status that could not be read, it can be now.
    Ok(Requeue::requeue(context.config.timing.retry_auth))
}

/// Writes what a run came to. A run for another spec is of no interest any more.
async fn report(
    id: &Identity,
    mirror: &ValidatedMirror,
    current: &mut Current,
    ended: &Arc<Ended>,
    context: &Context,
) -> Result<(), Error> {
    if ended.spec_hash == mirror.spec_hash {
        let before = current.status.clone();
        let status = status::finished(mirror, &before, ended, Timestamp::now());
        context.apply(id, current, status).await?;
        let report = &ended.report;
        let failed = report.failed().count();
        let seconds = elapsed(report.started_at, report.finished_at);
        tracing::debug!(
            images = report.images.len(),
            failed,
            bytes_copied = report.totals.bytes_copied,
            seconds = seconds.as_secs_f64(),
            "run ended"
        );
        context.metrics.observe_sync(seconds);
        for summary in summaries(&before, &current.status, ended) {
            context.events.publish(id, summary).await;
        }
    }
    context.runner.acknowledge(&id.uid);
    Ok(())
}

/// The events of a transition.
fn summaries(before: &ImageMirrorStatus, after: &ImageMirrorStatus, ended: &Ended) -> Vec<Summary> {
    let ready = |status: &ImageMirrorStatus| {
        let found = status.conditions.iter().find(|condition| condition.type_ == ConditionType::Ready.as_str());
        found.map(|condition| (condition.status.clone(), condition.reason.clone(), condition.message.clone()))
    };
    let count = |action| ended.report.images.iter().filter(|image| image.action == Some(action)).count();
    let restored = count(Action::Restore);
    let mut summaries = Vec::new();
    if restored > 0 && before.last_sync.is_some() {
        let note = format!("{restored} tags at the target were gone or had been changed, and were restored");
        summaries.push(Summary { reason: "DriftRestored", is_warning: false, note });
    }
    let limited = ended.report.failed().find(|(_, failure)| failure.reason == Reason::RateLimited);
    let was_limited = before.failures.iter().any(|failure| failure.reason == Reason::RateLimited);
    if let Some((_, failure)) = limited.filter(|_| !was_limited) {
        summaries.push(Summary { reason: "RateLimited", is_warning: true, note: failure.message.clone() });
    }
    let Some((state, reason, message)) = ready(after) else { return summaries };
    let changed = ready(before).is_none_or(|(old, old_reason, _)| (old, old_reason) != (state.clone(), reason.clone()));
    let moved = count(Action::Copy) + count(Action::Update);
    if state == "True" && (changed || moved > 0) {
        let note = format!("{message}; {moved} tags written, {} bytes copied", ended.report.totals.bytes_copied);
        summaries.push(Summary { reason: "Synced", is_warning: false, note });
    } else if state == "False" && changed {
        summaries.push(Summary { reason: "PartialFailure", is_warning: true, note: format!("{reason}: {message}") });
    }
    summaries
}

/// What the Secrets say, if something waits for them. Whoever waits for the same ones looks at them together.
async fn look_at_secrets(
    id: &Identity,
    mirror: &ValidatedMirror,
    status: &ImageMirrorStatus,
    (now, timing): (Timestamp, &Timing),
    context: &Context,
) -> Result<Option<Glance>, Error> {
    let Some(since) = waiting_for_credentials(status).filter(|_| !mirror.suspended) else { return Ok(None) };
    if context.runner.view(&id.uid).is_some() {
        return Ok(None);
    }
    let is_fresh = |age| !credentials_due(since, age, now, timing).is_zero();
    glance(context, mirror, is_fresh).await.map(Some)
}

fn prepared(
    id: &Identity,
    mirror: &ValidatedMirror,
    status: &ImageMirrorStatus,
    secrets: &Secrets,
    context: &Context,
) -> Prepared {
    let transport = |host: &crate::oci::Host| context.config.transport_for(host);
    let mut last = last_digests(mirror, status);
    // The status of a large mirror lists no images; this process still knows them.
    if let Some(ended) = context.runner.last(&id.uid) {
        let is_current = ended.spec_hash == mirror.spec_hash;
        let known = ended.report.images.iter().filter_map(|image| {
            let source_digest = image.source_digest.clone().filter(|_| is_current);
            Some((image.target.clone(), Last { digest: image.digest.clone()?, source_digest }))
        });
        last.extend(known);
    }
    prepare(mirror, secrets, transport, &last)
}

async fn start(
    id: &Identity,
    mirror: &ValidatedMirror,
    current: &mut Current,
    scope: Scope,
    context: &Arc<Context>,
) -> Result<(), Error> {
    let secrets = resolve(context, mirror).await?;
    let mut prepared = prepared(id, mirror, &current.status, &secrets, context);
    let retry = match scope {
        Scope::All => None,
        Scope::Transient => Some(Retry::Transient),
        Scope::Authentication => Some(Retry::Authentication),
    };
    let last = context.runner.last(&id.uid).filter(|last| last.spec_hash == mirror.spec_hash);
    // What is attached to images is looked at when it is asked for, after a start, and once in a while.
    let interval = context.config.timing.referrers_interval;
    let now = Timestamp::now();
    let attached = last.as_ref().map(|last| last.times.attached).filter(|attached| elapsed(*attached, now) < interval);
    let attached = attached.filter(|_| !is_requested(mirror, &current.status));
    prepared.request.looks_at_attached = attached.is_none();
    let completes = last.zip(retry).map(|(earlier, retry)| {
        let is_due = |reason: Reason| {
            let class = reason.retry();
            class == Retry::Transient || (class == Retry::Authentication && retry == Retry::Authentication)
        };
        let due = earlier.report.failed().filter(|(_, failure)| is_due(failure.reason));
        let due = due.map(|(image, _)| image.target.clone()).collect();
        Completes { earlier, retry, due }
    });
    let is_new = current.status.last_sync.as_ref().is_none_or(|last| last.spec_hash != mirror.spec_hash);
    if is_new || is_requested(mirror, &current.status) || is_unsettled(&current.status) {
        let status = status::begun(mirror, &current.status, Timestamp::now());
        context.apply(id, current, status).await?;
    }
    context.runner.start(Job {
        id: id.clone(),
        spec_hash: mirror.spec_hash.clone(),
        generation: mirror.generation,
        token: mirror.requested_at.clone(),
        reread: reread(id, mirror, &current.status, &prepared, context),
        prepared,
        attached: attached.unwrap_or(now),
        completes,
    });
    Ok(())
}

/// How a run that was refused learns whether its credentials have been replaced since it began.
fn reread(
    id: &Identity,
    mirror: &ValidatedMirror,
    status: &ImageMirrorStatus,
    first: &Prepared,
    context: &Arc<Context>,
) -> Reread {
    let (id, mirror, status, context) = (id.clone(), mirror.clone(), status.clone(), Arc::clone(context));
    let (before, looks_at_attached) = (first.fingerprint.clone(), first.request.looks_at_attached);
    Box::new(move || {
        let again = async move {
            let secrets = resolve(&context, &mirror).await;
            // Who cannot ask now asks soon: what was refused is tried again.
            let secrets = secrets.inspect_err(|error| tracing::warn!(%error, "Secrets are not read again")).ok()?;
            let mut prepared = prepared(&id, &mirror, &status, &secrets, &context);
            prepared.request.looks_at_attached = looks_at_attached;
            (prepared.fingerprint != before).then_some(prepared)
        };
        again.boxed()
    })
}

/// The status while a run goes on: progress only once there is something to copy and it has taken a moment.
fn running(
    mirror: &ValidatedMirror,
    current: &ImageMirrorStatus,
    view: &View,
    first: Duration,
    now: Timestamp,
) -> ImageMirrorStatus {
    if mirror.suspended {
        return ImageMirrorStatus { progress: current.progress, ..status::suspended(mirror, current, now) };
    }
    if is_requested(mirror, current) && view.token != mirror.requested_at && !is_unsettled(current) {
        // Asked for during a run: another follows, and until that has ended nothing is known.
        return ImageMirrorStatus { progress: current.progress, ..status::begun(mirror, current, now) };
    }
    if view.progress.bytes_total > 0 && view.since >= first {
        return status::progressing(mirror, current, view.progress, now);
    }
    ImageMirrorStatus { progress: current.progress, ..status::settled(mirror, current, now) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reconcile_that_panics_is_one_that_failed() {
        let panics = async {
            // Not at the first poll: what was awaited before is dropped too.
            tokio::task::yield_now().await;
            assert_ne!(1, 1, "a fault of ours");
            Ok(())
        };
        let error = caught(panics).await.expect_err("it panicked");
        assert!(matches!(error, Error::Panicked) && error.reason() == Reason::InternalError);
        assert!(caught(async { Ok(()) }).await.is_ok());
    }
}
