//! When the next run is due, and when what failed is tried again. Pure: the clock and the jitter are arguments.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::reason::Retry;

/// How often a healthy object runs when it does not say.
pub const DEFAULT_INTERVAL: Duration = Duration::from_hours(1);
/// The shortest interval that is accepted.
pub const MIN_INTERVAL: Duration = Duration::from_secs(30);
/// Runs are spread over ± this part of the interval.
const JITTER: f64 = 0.05;

/// The bounds between which failed images are tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryTiming {
    /// The first wait after a failure that passes by itself.
    pub transient_min: Duration,
    /// The longest wait after such failures.
    pub transient_max: Duration,
    /// The wait after a registry refused a credential.
    pub authentication: Duration,
}

impl Default for RetryTiming {
    fn default() -> Self {
        Self {
            transient_min: Duration::from_secs(30),
            transient_max: Duration::from_mins(15),
            authentication: Duration::from_mins(15),
        }
    }
}

/// When the run after one that ended at `last` is due. `spread` in 0..1 is where within the jitter it falls; the same
/// object always uses the same value, so that a restart does not move it.
#[must_use]
pub fn next_run(last: Timestamp, interval: Duration, spread: f64) -> Timestamp {
    let factor = 1.0 + JITTER * (2.0 * spread.clamp(0.0, 1.0) - 1.0);
    let wait = Duration::try_from_secs_f64(interval.as_secs_f64() * factor).unwrap_or(Duration::MAX);
    last.saturating_add(signed(wait)).unwrap_or(Timestamp::MAX)
}

/// When an object whose `attempts`-th run in a row failed at `last` is tried again. `None`: at its next regular run.
#[must_use]
pub fn next_retry(last: Timestamp, retry: Retry, attempts: u32, timing: &RetryTiming) -> Option<Timestamp> {
    let wait = match retry {
        Retry::Permanent => return None,
        Retry::Authentication => timing.authentication,
        Retry::Transient => {
            let doublings = attempts.saturating_sub(1).min(20);
            timing.transient_min.saturating_mul(1 << doublings).min(timing.transient_max)
        }
    };
    Some(last.saturating_add(signed(wait)).unwrap_or(Timestamp::MAX))
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(from: Timestamp, to: Timestamp) -> i64 {
        to.duration_since(from).as_secs()
    }

    #[test]
    fn runs_are_spread_by_five_percent() {
        let last = Timestamp::UNIX_EPOCH;
        let hour = Duration::from_hours(1);
        assert_eq!(seconds(last, next_run(last, hour, 0.0)), 3420);
        assert_eq!(seconds(last, next_run(last, hour, 0.5)), 3600);
        assert_eq!(seconds(last, next_run(last, hour, 1.0)), 3780);
        assert_eq!(next_run(Timestamp::MAX, Duration::MAX, 1.0), Timestamp::MAX);
    }

    #[test]
    fn transient_failures_double_up_to_fifteen_minutes() {
        let timing = RetryTiming::default();
        let last = Timestamp::UNIX_EPOCH;
        let wait = |retry, attempts| next_retry(last, retry, attempts, &timing).map(|at| seconds(last, at));
        let waits: Vec<_> = (1..=7).filter_map(|attempts| wait(Retry::Transient, attempts)).collect();
        assert_eq!(waits, [30, 60, 120, 240, 480, 900, 900]);
        assert_eq!(wait(Retry::Authentication, 5), Some(900));
        assert_eq!(wait(Retry::Permanent, 1), None);
    }
}
