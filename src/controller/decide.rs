//! What to do with a mirror now. Pure: everything it looks at is an argument.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::runner::Times;
use crate::{
    api::{ConditionType, ImageMirrorStatus, Status},
    config::Timing,
    mirror::ValidatedMirror,
    reason::{Reason, Retry},
    schedule::next_retry,
};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Start a run.
    Start(Scope),
    /// Cancel the run that is going on: it is for another spec.
    Cancel,
    /// Look again after this time.
    Wait(Duration),
    /// Nothing, until the object changes.
    Idle,
}

/// What a run is to cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Every image.
    All,
    /// Those whose failure passes by itself.
    Transient,
    /// Those, and the ones that a credential may heal.
    Authentication,
}

/// The run of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunState<'a> {
    /// There is none.
    Idle,
    /// One is waiting for its turn or going on, for a spec with this hash; it has been there for so long.
    Running { spec_hash: &'a str, cancelled: bool, since: Duration },
}

/// What this process knows of an object beside what the object says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Known {
    /// Whether the Secrets say something else than in the last run.
    pub(super) credentials_changed: bool,
    /// How long ago they were read.
    pub(super) credentials_age: Duration,
    /// When it last looked at which images; `None` after a restart.
    pub(super) times: Option<Times>,
    /// The object's place within the jitter, in 0..1.
    pub(super) spread: f64,
}

/// Decides. Everything it looks at is an argument.
pub(super) fn decide(
    mirror: &ValidatedMirror,
    status: &ImageMirrorStatus,
    run: RunState<'_>,
    known: &Known,
    timing: &Timing,
    now: Timestamp,
) -> Decision {
    if let RunState::Running { spec_hash, cancelled, since } = run {
        return match () {
            () if cancelled => Decision::Idle,
            () if spec_hash != mirror.spec_hash => Decision::Cancel,
            () if since < timing.progress_first => Decision::Wait(timing.progress_first.saturating_sub(since)),
            () => Decision::Wait(progress_interval(since, timing)),
        };
    }
    if mirror.suspended {
        return Decision::Idle;
    }
    let Some(last) = status.last_sync.as_ref().filter(|last| last.spec_hash == mirror.spec_hash) else {
        return Decision::Start(Scope::All);
    };
    if is_requested(mirror, status) || is_unsettled(status) {
        return Decision::Start(Scope::All);
    }
    // Without memory, after a restart, the last run was of everything as far as anybody knows.
    let times = known.times.unwrap_or(Times {
        all: last.finished(),
        authentication: last.finished(),
        attached: last.finished(),
    });
    let due = mirror.schedule.next(times.all, known.spread);
    if due <= now {
        return Decision::Start(Scope::All);
    }
    let transient = retry_at(status, Retry::Transient, last.finished(), timing);
    let authentication = retry_at(status, Retry::Authentication, times.authentication, timing);
    let is_due = |at: Option<Timestamp>| at.is_some_and(|at| at <= now);
    if known.credentials_changed || is_due(authentication) {
        return Decision::Start(Scope::Authentication);
    }
    if is_due(transient) {
        return Decision::Start(Scope::Transient);
    }
    let next = [transient, authentication].into_iter().flatten().fold(due, Ord::min);
    let wait = Duration::try_from(next.duration_since(now)).unwrap_or(Duration::ZERO);
    let poll = waiting_for_credentials(status).map(|since| credentials_due(since, known.credentials_age, now, timing));
    Decision::Wait(poll.map_or(wait, |poll| poll.min(wait)))
}

/// Whether a run has been asked for that has not ended.
pub(super) fn is_requested(mirror: &ValidatedMirror, status: &ImageMirrorStatus) -> bool {
    mirror.requested_at.is_some() && mirror.requested_at != status.last_handled_reconcile_at
}

/// Since when something fails that another content of a Secret may heal, or a Secret is missing or wrong that nothing
/// needed yet.
pub(super) fn waiting_for_credentials(status: &ImageMirrorStatus) -> Option<Timestamp> {
    let failing = status.failures.iter().filter(|failure| failure.reason.retry() == Retry::Authentication);
    let unresolved = status.conditions.iter().filter(|condition| {
        condition.type_ == ConditionType::CredentialsResolved.as_str() && condition.status == Status::False.as_str()
    });
    let unresolved = unresolved.map(|condition| condition.last_transition_time.0);
    failing.map(|failure| failure.since.0).chain(unresolved).min()
}

/// Whether the conditions still speak of a run that never ended: one for a spec that has been taken back since.
pub(super) fn is_unsettled(status: &ImageMirrorStatus) -> bool {
    let unsettled = [Reason::Progressing, Reason::InvalidSpec, Reason::Suspended].map(Reason::as_str);
    let ready = status.conditions.iter().find(|condition| condition.type_ == ConditionType::Ready.as_str());
    ready.is_none_or(|ready| ready.status == Status::Unknown.as_str() || unsettled.contains(&ready.reason.as_str()))
}

/// The first moment at which a failure of this class is worth another try.
fn retry_at(status: &ImageMirrorStatus, class: Retry, last: Timestamp, timing: &Timing) -> Option<Timestamp> {
    let bounds = timing.retry();
    let attempts = |attempts: i64| u32::try_from(attempts).unwrap_or(1);
    let of_class = status.failures.iter().filter(|failure| failure.reason.retry() == class);
    of_class.filter_map(|failure| next_retry(last, class, attempts(failure.attempts), &bounds)).min()
}

/// How long until Secrets are read again that were read so long ago; zero if it is time. Often at first, then about as long
/// as it had lasted then.
pub(super) fn credentials_due(since: Timestamp, age: Duration, now: Timestamp, timing: &Timing) -> Duration {
    let interval = match elapsed(since, now).saturating_sub(age).checked_sub(timing.secret_retry_window) {
        None => timing.secret_retry,
        Some(beyond) => beyond.max(timing.secret_retry * 2).min(timing.secret_retry_max),
    };
    interval.saturating_sub(age)
}

/// Every 10 s in the first minute, every 30 s after, with the default timing.
fn progress_interval(since: Duration, timing: &Timing) -> Duration {
    if since < timing.progress_interval * 6 { timing.progress_interval } else { timing.progress_interval * 3 }
}

/// The place of an object within the jitter: the same after a restart, another for every object.
pub(super) fn spread_of(uid: &str) -> f64 {
    let hash = crate::oci::Digest::sha256(uid.as_bytes());
    let head = u32::from_str_radix(hash.hex().get(..8).unwrap_or("0"), 16).unwrap_or_default();
    f64::from(head) / f64::from(u32::MAX)
}

/// The time since an instant in the past; zero for one in the future.
pub(super) fn elapsed(since: Timestamp, now: Timestamp) -> Duration {
    let elapsed: SignedDuration = now.duration_since(since);
    Duration::try_from(elapsed).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::{
        api::ConditionSet,
        api::v1alpha1::{FailureStatus, LastSync},
        mirror::validate,
        reason::Reason,
    };

    const KNOWN: Known =
        Known { credentials_changed: false, credentials_age: Duration::ZERO, times: None, spread: 0.5 };
    const HASH_OF_OTHER: &str = "other";

    fn mirror(rest: &str, requested: Option<&str>) -> ValidatedMirror {
        let annotations =
            requested.map_or(String::new(), |token| format!(", annotations: {{imagemirror.dev/requestedAt: {token}}}"));
        let text = format!(
            "apiVersion: imagemirror.dev/v1alpha1\nkind: ImageMirror\nmetadata: {{name: a, namespace: n{annotations}}}\n\
             spec: {{images: [{{source: 'gcr.io/a:1'}}], target: {{registry: t.io}}{rest}}}"
        );
        validate(&serde_saphyr::from_str(&text).unwrap()).unwrap()
    }

    fn seconds(n: i64) -> Timestamp {
        Timestamp::from_second(n).unwrap()
    }

    fn synced(mirror: &ValidatedMirror) -> ImageMirrorStatus {
        let last = LastSync {
            generation: 1,
            spec_hash: mirror.spec_hash.clone(),
            started_at: Time(seconds(0)),
            finished_at: Time(seconds(0)),
            bytes_copied: 0,
            blobs_copied: 0,
            blobs_mounted: 0,
            blobs_present: 0,
        };
        let mut conditions = ConditionSet::new(&[], 1, seconds(0));
        conditions.set(ConditionType::Ready, Status::True, Reason::Succeeded, "");
        ImageMirrorStatus { last_sync: Some(last), conditions: conditions.finish(), ..ImageMirrorStatus::default() }
    }

    fn failed(mirror: &ValidatedMirror, reason: Reason, attempts: i64) -> ImageMirrorStatus {
        let failure = FailureStatus {
            source: "gcr.io/a:1".into(),
            target: "t.io/a:1".into(),
            reason,
            message: String::new(),
            since: Time(seconds(0)),
            attempts,
        };
        ImageMirrorStatus { failures: vec![failure], ..synced(mirror) }
    }

    fn at(mirror: &ValidatedMirror, status: &ImageMirrorStatus, now: i64) -> Decision {
        decide(mirror, status, RunState::Idle, &KNOWN, &Timing::default(), seconds(now))
    }

    #[test]
    fn a_new_spec_starts_a_run_and_a_healthy_object_waits_for_its_interval() {
        let mirror = mirror("", None);
        assert_eq!(at(&mirror, &ImageMirrorStatus::default(), 0), Decision::Start(Scope::All));
        assert_eq!(at(&mirror, &synced(&mirror), 10), Decision::Wait(Duration::from_secs(3590)));
        assert_eq!(at(&mirror, &synced(&mirror), 3600), Decision::Start(Scope::All));
    }

    #[test]
    fn a_calendar_has_its_own_times_and_what_was_missed_happens_once() {
        let mirror = mirror(", schedule: '0 * * * *', timeZone: Europe/Berlin", None);
        assert_eq!(at(&mirror, &synced(&mirror), 600), Decision::Wait(Duration::from_mins(50)));
        let after_a_day = at(&mirror, &synced(&mirror), 86_400 + 600);
        assert_eq!(after_a_day, Decision::Start(Scope::All));
        let mut status = synced(&mirror);
        if let Some(last) = &mut status.last_sync {
            last.finished_at = Time(seconds(86_400 + 660));
        }
        assert_eq!(at(&mirror, &status, 86_400 + 660), Decision::Wait(Duration::from_mins(49)));
    }

    #[test]
    fn a_token_starts_a_run_until_it_has_been_handled() {
        let mirror = mirror("", Some("t1"));
        assert_eq!(at(&mirror, &synced(&mirror), 1), Decision::Start(Scope::All));
        let handled = ImageMirrorStatus { last_handled_reconcile_at: Some("t1".into()), ..synced(&mirror) };
        assert!(matches!(at(&mirror, &handled, 1), Decision::Wait(_)));
    }

    #[test]
    fn a_suspended_object_starts_nothing() {
        let mirror = mirror(", suspend: true", Some("t1"));
        assert_eq!(at(&mirror, &ImageMirrorStatus::default(), 0), Decision::Idle);
    }

    #[test]
    fn only_a_change_of_the_outcome_cancels_a_run() {
        let mirror = mirror(", interval: 2h", None);
        let running = |spec_hash, cancelled, since| {
            let run = RunState::Running { spec_hash, cancelled, since: Duration::from_secs(since) };
            decide(&mirror, &synced(&mirror), run, &KNOWN, &Timing::default(), seconds(0))
        };
        assert_eq!(running(&mirror.spec_hash, false, 0), Decision::Wait(Duration::from_secs(2)));
        assert_eq!(running(&mirror.spec_hash, false, 5), Decision::Wait(Duration::from_secs(10)));
        assert_eq!(running(&mirror.spec_hash, false, 70), Decision::Wait(Duration::from_secs(30)));
        assert_eq!(running(HASH_OF_OTHER, false, 5), Decision::Cancel);
        assert_eq!(running(HASH_OF_OTHER, true, 5), Decision::Idle);
    }

    #[test]
    fn what_failed_is_tried_again_as_its_class_says() {
        let mirror = mirror("", None);
        assert_eq!(
            at(&mirror, &failed(&mirror, Reason::SourceUnavailable, 1), 29),
            Decision::Wait(Duration::from_secs(1))
        );
        assert_eq!(at(&mirror, &failed(&mirror, Reason::SourceUnavailable, 1), 30), Decision::Start(Scope::Transient));
        assert_eq!(
            at(&mirror, &failed(&mirror, Reason::SourceUnavailable, 3), 30),
            Decision::Wait(Duration::from_secs(90))
        );
        assert_eq!(
            at(&mirror, &failed(&mirror, Reason::SourceNotFound, 1), 30),
            Decision::Wait(Duration::from_secs(3570))
        );
        assert_eq!(
            at(&mirror, &failed(&mirror, Reason::AuthenticationFailed, 1), 900),
            Decision::Start(Scope::Authentication)
        );
    }

    #[test]
    fn retries_of_some_do_not_put_off_the_look_at_all() {
        let mirror = mirror("", None);
        let mut status = failed(&mirror, Reason::SourceUnavailable, 9);
        let retried = |status: &ImageMirrorStatus, all, now| {
            let times = Times { all: seconds(all), authentication: seconds(all), attached: seconds(all) };
            decide(
                &mirror,
                status,
                RunState::Idle,
                &Known { times: Some(times), ..KNOWN },
                &Timing::default(),
                seconds(now),
            )
        };
        if let Some(last) = &mut status.last_sync {
            last.finished_at = Time(seconds(3500));
        }
        assert_eq!(retried(&status, 0, 3600), Decision::Start(Scope::All));
        assert_eq!(retried(&status, 3500, 3600), Decision::Wait(Duration::from_secs(800)));
        // And one class does not hurry the other.
        let mut refused = failed(&mirror, Reason::AuthenticationFailed, 1);
        refused.failures.extend(status.failures);
        assert_eq!(retried(&refused, 0, 900), Decision::Start(Scope::Authentication));
        assert_eq!(retried(&refused, 100, 960), Decision::Start(Scope::Transient));
    }

    #[test]
    fn a_spec_that_is_taken_back_is_carried_out_again() {
        let mirror = mirror("", None);
        for (state, reason) in [
            (Status::Unknown, Reason::Progressing),
            (Status::False, Reason::InvalidSpec),
            (Status::False, Reason::Suspended),
        ] {
            let mut status = synced(&mirror);
            let mut conditions = ConditionSet::new(&status.conditions, 2, seconds(1));
            conditions.set(ConditionType::Ready, state, reason, "");
            status.conditions = conditions.finish();
            assert_eq!(at(&mirror, &status, 2), Decision::Start(Scope::All), "{reason}");
        }
    }

    #[test]
    fn secrets_are_looked_at_often_at_first_and_then_rarely() {
        let mirror = mirror("", None);
        let status = failed(&mirror, Reason::SecretNotFound, 1);
        assert_eq!(at(&mirror, &status, 1), Decision::Wait(Duration::from_secs(5)));
        assert_eq!(at(&mirror, &status, 119), Decision::Wait(Duration::from_secs(5)));
        assert_eq!(at(&mirror, &status, 121), Decision::Wait(Duration::from_secs(10)));
        assert_eq!(at(&mirror, &status, 160), Decision::Wait(Duration::from_secs(40)));
        assert_eq!(at(&mirror, &status, 500), Decision::Wait(Duration::from_mins(5)));
        let aged = |age, now| {
            let known = Known { credentials_age: Duration::from_secs(age), ..KNOWN };
            decide(&mirror, &status, RunState::Idle, &known, &Timing::default(), seconds(now))
        };
        // What was read when the wait was short is read again after that, though the wait would be longer now.
        assert_eq!(aged(3, 60), Decision::Wait(Duration::from_secs(2)));
        assert_eq!(aged(39, 199), Decision::Wait(Duration::from_secs(1)));
        assert_eq!(aged(40, 200), Decision::Wait(Duration::ZERO));
        let mut unresolved = synced(&mirror);
        let mut conditions = ConditionSet::new(&unresolved.conditions, 1, seconds(0));
        conditions.set(ConditionType::CredentialsResolved, Status::False, Reason::SecretNotFound, "");
        unresolved.conditions = conditions.finish();
        assert_eq!(
            at(&mirror, &unresolved, 1),
            Decision::Wait(Duration::from_secs(5)),
            "nothing fails, one is missing"
        );
        let changed = decide(
            &mirror,
            &status,
            RunState::Idle,
            &Known { credentials_changed: true, ..KNOWN },
            &Timing::default(),
            seconds(1),
        );
        assert_eq!(changed, Decision::Start(Scope::Authentication));
    }

    #[test]
    fn the_spread_is_stable_and_within_bounds() {
        let spread = spread_of("0b6a9a3e");
        assert!((0.0..=1.0).contains(&spread));
        assert!((spread - spread_of("0b6a9a3e")).abs() < f64::EPSILON);
    }
}
