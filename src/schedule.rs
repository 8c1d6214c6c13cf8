//! When the next run is due, and when what failed is tried again. Pure: the clock and the jitter are arguments.

use std::time::Duration;

use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};

use crate::reason::Retry;

/// How often a healthy object runs when it does not say. This and the next are what the API promises, and the same in every
/// installation.
pub const DEFAULT_INTERVAL: Duration = Duration::from_hours(1);
/// The shortest interval that is accepted.
pub const MIN_INTERVAL: Duration = Duration::from_secs(30);
/// Runs are spread over ± this part of the interval.
const JITTER: f64 = 0.05;

/// When an object runs while nothing changes.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// So long after the last run, spread.
    Interval(Duration),
    /// At these times of the calendar.
    Calendar(Box<Calendar>),
}

/// Five cron fields in a time zone: minute, hour, day of month, month, day of week. A time that the day does not have,
/// because clocks go forward, is the first moment after it; one that it has twice counts once.
#[derive(Clone, Debug)]
pub struct Calendar {
    cron: Cron,
    zone: TimeZone,
}

/// A schedule that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CalendarError {
    /// Not five cron fields.
    #[error(
        "{0:?} is no schedule, write five fields: minute, hour, day of month, month, day of week, as in '0 3 * * 1-5'"
    )]
    Cron(String),
    /// A schedule that never comes.
    #[error("{0:?} never comes")]
    Never(String),
    /// No time zone of that name.
    #[error("{0:?} is no time zone, write its IANA name, as in Europe/Berlin")]
    Zone(String),
}

impl PartialEq for Calendar {
    fn eq(&self, other: &Self) -> bool {
        self.cron.as_str() == other.cron.as_str() && self.zone == other.zone
    }
}

impl Calendar {
    /// Reads five cron fields and the name of a time zone; UTC where there is none.
    pub fn new(schedule: &str, zone: Option<&str>) -> Result<Self, CalendarError> {
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let is_cron = schedule.split_whitespace().count() == 5;
        let cron = parser.parse(schedule).ok().filter(|_| is_cron);
        let cron = cron.ok_or_else(|| CalendarError::Cron(schedule.to_owned()))?;
        let zone = match zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|_| CalendarError::Zone(name.to_owned()))?,
        };
        let this = Self { cron, zone };
        match this.next(Timestamp::UNIX_EPOCH) {
            Some(_) => Ok(this),
            None => Err(CalendarError::Never(schedule.to_owned())),
        }
    }

    fn next(&self, after: Timestamp) -> Option<Timestamp> {
        let next = self.cron.find_next_occurrence(&after.to_zoned(self.zone.clone()), false);
        next.ok().map(|next| next.timestamp())
    }
}

impl Schedule {
    /// When the run after one that ended at `last` is due. `spread` is the object's place within the jitter.
    #[must_use]
    pub fn next(&self, last: Timestamp, spread: f64) -> Timestamp {
        match self {
            Self::Interval(interval) => next_run(last, *interval, spread),
            Self::Calendar(calendar) => calendar.next(last).unwrap_or(Timestamp::MAX),
        }
    }
}

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
fn next_run(last: Timestamp, interval: Duration, spread: f64) -> Timestamp {
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
    fn calendars_know_time_zones_and_days_on_which_clocks_are_set() {
        for (schedule, zone, last, expected) in [
            ("0 3 * * *", None, "2027-01-01T03:00:00Z", "2027-01-02T03:00:00Z"),
            ("*/15 * * * *", None, "2027-01-01T03:07:10Z", "2027-01-01T03:15:00Z"),
            ("0 3 * * *", Some("Europe/Berlin"), "2027-01-01T00:00:00Z", "2027-01-01T02:00:00Z"),
            ("0 3 * * *", Some("Europe/Berlin"), "2027-07-01T00:00:00Z", "2027-07-01T01:00:00Z"),
            ("0 9 * * 1-5", Some("America/New_York"), "2027-01-01T15:00:00Z", "2027-01-04T14:00:00Z"),
            ("0 0 1 * 1", None, "2027-01-02T00:00:00Z", "2027-01-04T00:00:00Z"),
            ("0 0 29 2 *", None, "2027-01-01T00:00:00Z", "2028-02-29T00:00:00Z"),
            // 2:30 does not exist on the 28th of March, and exists twice on the 31st of October.
            ("30 2 * * *", Some("Europe/Berlin"), "2027-03-27T12:00:00Z", "2027-03-28T01:00:00Z"),
            ("30 2 * * *", Some("Europe/Berlin"), "2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"),
            ("30 2 * * *", Some("Europe/Berlin"), "2027-10-30T12:00:00Z", "2027-10-31T00:30:00Z"),
            ("30 2 * * *", Some("Europe/Berlin"), "2027-10-31T00:30:00Z", "2027-11-01T01:30:00Z"),
            ("0 * * * *", Some("Europe/Berlin"), "2027-10-31T00:00:00Z", "2027-10-31T01:00:00Z"),
        ] {
            let calendar = Calendar::new(schedule, zone).unwrap();
            let next = Schedule::Calendar(Box::new(calendar)).next(last.parse().unwrap(), 0.9);
            assert_eq!(next.to_string(), expected, "{schedule} {zone:?} after {last}");
        }
    }

    #[test]
    fn what_is_no_calendar_is_refused() {
        for (schedule, zone, what) in [
            ("0 3 * *", None, "no schedule"),
            ("0 0 3 * * *", None, "no schedule"),
            ("60 * * * *", None, "no schedule"),
            ("@daily", None, "no schedule"),
            ("0 0 31 2 *", None, "never comes"),
            ("0 3 * * *", Some("Mars/Olympus"), "no time zone"),
        ] {
            let error = Calendar::new(schedule, zone).unwrap_err().to_string();
            assert!(error.contains(what), "{schedule}: {error}");
        }
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
