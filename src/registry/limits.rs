//! What everybody in the process shares of one host: how many requests are in flight, how many large streams, how many
//! begin in a second, and the time until which the host has asked to be left alone.
//!
//! Requests in flight begin at half of what is allowed, grow with success and halve when the host says that it is too
//! much. A `429` is the matter of one credential, a `503` that of the host.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::Method;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};

use super::{
    client::Timing,
    counters::{HostCounters, Sent},
    spacing::{Quota, Quotas, Spacing},
};
use crate::oci::Digest;

/// The credential that a request is sent with, by its fingerprint; anonymous is one too.
pub(super) type Identity = Option<Digest>;

/// The shared limits of one host.
pub(crate) struct HostLimits {
    requests: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    rate: Option<Duration>,
    pauses: Pauses,
    state: Mutex<State>,
    counters: Option<Arc<HostCounters>>,
}

struct State {
    /// Requests that may be in flight now, and at most.
    limit: usize,
    most: usize,
    /// Permits to take out of the semaphore as they come back.
    debt: usize,
    /// Answers since the limit last grew. Below `calm` each lets it grow, above only as many as it is high.
    answers: usize,
    calm: usize,
    /// Counts the times that it was halved: what was sent before one does not cause another.
    epoch: u64,
    /// `429`s in a row without a word of how long.
    refusals: u32,
    closed: HashMap<Gate, Instant>,
    /// Where the rate is limited.
    spacing: Spacing,
    quotas: Quotas,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Gate {
    Host,
    Identity(Identity),
}

/// A place among the requests in flight of a host.
pub(crate) struct Permit {
    limits: Arc<HostLimits>,
    inner: Option<OwnedSemaphorePermit>,
    identity: Identity,
    epoch: u64,
}

/// What an answer says of how the host is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It keeps up.
    Fine,
    /// Too many requests with this credential; for how long, where it says so.
    TooMany(Option<Duration>),
    /// It is overloaded; for how long, where it says so.
    Overloaded(Option<Duration>),
}

/// A host that is to be left alone, for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shut {
    /// For longer than who asks can wait, who may come again.
    ForNow(Duration),
    /// For longer than anybody waits.
    ForLong(Duration),
}

/// How long a host is left alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pauses {
    /// After a first refusal without a word of how long; later ones double it.
    pub(crate) first: Duration,
    /// At most, whatever the host says.
    pub(crate) most: Duration,
    /// One that is to be left alone for longer is not waited for inside a run.
    pub(crate) waited_for: Duration,
}

impl From<&Timing> for Pauses {
    fn from(timing: &Timing) -> Self {
        Self { first: timing.rate_pause, most: timing.rate_pause_max, waited_for: timing.rate_wait_max }
    }
}

/// Refusals in a row that do not say for how long, after which nobody waits any more.
const MAX_REFUSALS: u32 = 3;

impl HostLimits {
    /// `per_second` is how many requests may begin in a second; `None` is as many as the others allow.
    pub(crate) fn new(requests: usize, streams: usize, per_second: Option<u32>, pauses: Pauses) -> Self {
        let most = requests.max(1);
        let limit = most.div_ceil(2);
        let state = State {
            limit,
            most,
            debt: 0,
            answers: 0,
            calm: most,
            epoch: 0,
            refusals: 0,
            closed: HashMap::new(),
            spacing: Spacing::default(),
            quotas: Quotas::default(),
        };
        Self {
            requests: Arc::new(Semaphore::new(limit)),
            streams: Arc::new(Semaphore::new(streams.max(1))),
            rate: per_second.map(|rate| Duration::from_secs(1) / rate.max(1)),
            pauses,
            state: Mutex::new(state),
            counters: None,
        }
    }

    /// With a place where it is counted what is asked of the host.
    pub(crate) fn counted(self, counters: Option<Arc<HostCounters>>) -> Self {
        Self { counters, ..self }
    }

    /// Waits until the host may be asked with this credential, then for a place among the requests in flight. Gate
    /// first, permit second: whoever waits for a closed host holds nothing.
    ///
    /// A host that is closed for longer than `patience`, or than anybody waits, is not waited for. `is_pull` says whether
    /// the request counts where a host has a quota.
    pub(super) async fn request(
        self: &Arc<Self>,
        identity: &Identity,
        is_pull: bool,
        patience: Duration,
    ) -> Result<Permit, Shut> {
        let mut wait = Wait { counters: self.counters.as_deref(), since: None };
        loop {
            while let Some(until) = self.closed_until(identity) {
                let pause = until.saturating_duration_since(Instant::now());
                if pause > self.pauses.waited_for || self.state().refusals > MAX_REFUSALS {
                    return Err(Shut::ForLong(pause));
                }
                if pause > patience {
                    return Err(Shut::ForNow(pause));
                }
                wait.begins();
                sleep_until(until).await;
            }
            if let Some(turn) = self.next_turn(identity) {
                wait.begins();
                sleep_until(turn).await;
            }
            let inner = match Arc::clone(&self.requests).try_acquire_owned() {
                Ok(permit) => Some(permit),
                Err(_) => {
                    wait.begins();
                    Arc::clone(&self.requests).acquire_owned().await.ok()
                }
            };
            if self.closed_until(identity).is_some() {
                continue;
            }
            // Those before us may just have learned that little is left.
            match self.quota_turn(identity, is_pull) {
                None => {
                    let epoch = self.state().epoch;
                    return Ok(Permit { limits: Arc::clone(self), inner, identity: identity.clone(), epoch });
                }
                Some(turn) => {
                    drop(inner);
                    let pause = turn.saturating_duration_since(Instant::now());
                    if pause > self.pauses.waited_for {
                        return Err(Shut::ForLong(pause));
                    }
                    wait.begins();
                    sleep_until(turn).await;
                }
            }
        }
    }

    /// Waits for a place among the large streams.
    pub(super) async fn stream(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.streams).acquire_owned().await.ok()
    }

    /// Whether somebody is to leave the host alone.
    pub(super) fn is_closed(&self) -> bool {
        let now = Instant::now();
        self.state().closed.values().any(|until| *until > now)
    }

    /// When the next request may begin, where the rate is limited: a second's worth of them may begin at once.
    fn next_turn(&self, identity: &Identity) -> Option<Instant> {
        let distance = self.rate?;
        let turn = self.state().spacing.turn(identity, distance, Duration::from_secs(1));
        (turn > Instant::now()).then_some(turn)
    }

    /// When a request that counts may begin, if that is not now.
    fn quota_turn(&self, identity: &Identity, is_pull: bool) -> Option<Instant> {
        if is_pull { self.state().quotas.turn(identity) } else { None }
    }

    fn closed_until(&self, identity: &Identity) -> Option<Instant> {
        let state = self.state();
        let until = |gate| state.closed.get(&gate).copied();
        let until = until(Gate::Host).max(until(Gate::Identity(identity.clone())));
        until.filter(|until| *until > Instant::now())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time that a request waits for its turn, also if it is given up meanwhile.
struct Wait<'a> {
    counters: Option<&'a HostCounters>,
    since: Option<Instant>,
}

impl Wait<'_> {
    fn begins(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let (Some(counters), Some(since)) = (self.counters, self.since) {
            counters.count_wait(since.elapsed());
        }
    }
}

impl State {
    /// A later end wins over an earlier one.
    fn close(&mut self, gate: Gate, pause: Duration) {
        let now = Instant::now();
        let until = now + pause;
        self.closed.retain(|_, until| *until > now);
        let closed = self.closed.entry(gate).or_insert(until);
        *closed = until.max(*closed);
    }

    /// Lets one more request through, if it is time. True if a permit is to be added.
    fn grow(&mut self) -> bool {
        self.answers += 1;
        if self.limit == self.most || (self.limit >= self.calm && self.answers < self.limit) {
            return false;
        }
        self.answers = 0;
        self.limit += 1;
        if self.debt > 0 {
            self.debt -= 1;
            return false;
        }
        true
    }

    /// Halves the limit, once for all that was sent under it. The number of permits to take away.
    fn halve(&mut self, epoch: u64) -> usize {
        if epoch != self.epoch {
            return 0;
        }
        self.epoch += 1;
        let halved = self.limit.div_ceil(2);
        let less = self.limit - halved;
        (self.limit, self.calm, self.answers) = (halved, halved, 0);
        less
    }
}

impl Permit {
    /// The request goes out.
    pub(super) fn sent(&self, method: &Method) -> Sent {
        Sent::new(self.limits.counters.as_ref(), method)
    }

    /// Takes in what the host says is left of a quota.
    pub(super) fn learn_quota(&self, quota: Quota) {
        self.limits.state().quotas.learn(&self.identity, quota);
        if let Some(counters) = &self.limits.counters {
            counters.set_quota(quota.left);
        }
    }

    /// Takes in what the answer to this request says.
    pub(super) fn answered(&self, verdict: Verdict) {
        let pauses = self.limits.pauses;
        let mut state = self.limits.state();
        let less = match verdict {
            Verdict::Fine => {
                state.refusals = 0;
                if state.grow() {
                    self.limits.requests.add_permits(1);
                }
                0
            }
            Verdict::TooMany(pause) => {
                let pause = pause.unwrap_or_else(|| {
                    state.refusals = (state.refusals + 1).min(16);
                    pauses.first.saturating_mul(1 << (state.refusals - 1))
                });
                state.close(Gate::Identity(self.identity.clone()), pause.min(pauses.most));
                state.halve(self.epoch)
            }
            Verdict::Overloaded(pause) => {
                if let Some(pause) = pause {
                    state.close(Gate::Host, pause.min(pauses.most));
                }
                state.halve(self.epoch)
            }
        };
        state.debt += less - self.limits.requests.forget_permits(less);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.limits.state();
        if state.debt > 0
            && let Some(inner) = self.inner.take()
        {
            state.debt -= 1;
            inner.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    /// As long as anybody is waited for.
    const PATIENCE: Duration = Duration::MAX;

    fn pauses() -> Pauses {
        (&Timing::default()).into()
    }

    fn limits(requests: usize) -> Arc<HostLimits> {
        Arc::new(HostLimits::new(requests, 1, None, pauses()))
    }

    /// All that can be had without waiting.
    fn all(limits: &Arc<HostLimits>) -> Vec<Permit> {
        std::iter::from_fn(|| limits.request(&None, false, PATIENCE).now_or_never()).map(Result::unwrap).collect()
    }

    fn all_answered(permits: &[Permit], verdict: Verdict) {
        for permit in permits {
            permit.answered(verdict);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_host_is_left_alone_by_everybody_until_it_opens() {
        let limits = limits(4);
        let permit = limits.request(&None, false, PATIENCE).await.unwrap();
        permit.answered(Verdict::Overloaded(Some(Duration::from_secs(59))));
        permit.answered(Verdict::Overloaded(Some(Duration::from_secs(10))));
        drop(permit);
        let before = Instant::now();
        let _first = limits.request(&Some(Digest::sha256(b"one")), false, PATIENCE).await;
        assert!(before.elapsed() >= Duration::from_secs(59));
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_requests_are_the_matter_of_one_credential() {
        let limits = limits(4);
        let one = Some(Digest::sha256(b"one"));
        limits.request(&one, false, PATIENCE).await.unwrap().answered(Verdict::TooMany(Some(Duration::from_mins(10))));
        let shut = limits.request(&one, false, PATIENCE).await.err();
        assert!(matches!(shut, Some(Shut::ForLong(pause)) if pause > Duration::from_mins(9)), "{shut:?}");
        assert!(limits.request(&None, false, PATIENCE).now_or_never().is_some_and(|permit| permit.is_ok()));
        assert!(limits.is_closed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_names_no_time_closes_for_longer_each_time() {
        let limits = limits(4);
        let before = Instant::now();
        let mut permit = limits.request(&None, false, PATIENCE).await.unwrap();
        for expected in [10, 30, 70] {
            permit.answered(Verdict::TooMany(None));
            drop(permit);
            permit = limits.request(&None, false, PATIENCE).await.unwrap();
            assert_eq!(before.elapsed().as_secs(), expected);
        }
        permit.answered(Verdict::TooMany(None));
        assert!(limits.request(&None, false, PATIENCE).await.is_err(), "the fourth time nobody waits");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_never_longer_than_an_hour() {
        let limits = limits(1);
        let pause = Some(Duration::from_secs(1_000_000_000));
        limits.request(&None, false, PATIENCE).await.unwrap().answered(Verdict::Overloaded(pause));
        let shut = limits.request(&None, false, PATIENCE).await.err();
        assert!(matches!(shut, Some(Shut::ForLong(pause)) if pause <= Duration::from_hours(1)), "{shut:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn how_long_a_host_is_left_alone_and_waited_for_can_be_set() {
        let (most, waited_for) = (Duration::from_secs(20), Duration::from_secs(5));
        let limits = Arc::new(HostLimits::new(4, 1, None, Pauses { most, waited_for, ..pauses() }));
        let pause = Some(Duration::from_mins(10));
        limits.request(&None, false, PATIENCE).await.unwrap().answered(Verdict::TooMany(pause));
        assert_eq!(limits.request(&None, false, PATIENCE).await.err(), Some(Shut::ForLong(most)));
        tokio::time::advance(Duration::from_secs(16)).await;
        assert!(limits.request(&None, false, PATIENCE).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn requests_in_flight_grow_with_success_and_halve_when_they_are_too_many() {
        let limits = limits(32);
        let permits = all(&limits);
        assert_eq!(permits.len(), 16);
        all_answered(&permits, Verdict::Fine);
        drop(permits);
        let permits = all(&limits);
        assert_eq!(permits.len(), 32);

        all_answered(&permits, Verdict::Overloaded(None));
        drop(permits);
        assert_eq!(all(&limits).len(), 16, "halved once for all that were in flight");
        for round in 0..2 {
            let permits = all(&limits);
            all_answered(&permits, Verdict::Fine);
            assert_eq!(permits.len(), 16 + round);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_request_always_remains() {
        let limits = limits(2);
        for _ in 0..5 {
            limits.request(&None, false, PATIENCE).await.unwrap().answered(Verdict::Overloaded(None));
        }
        assert_eq!(all(&limits).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_lets_a_second_of_requests_go_at_once_and_then_spreads_them() {
        let limits = Arc::new(HostLimits::new(32, 1, Some(10), pauses()));
        tokio::time::advance(Duration::from_mins(1)).await;
        let before = Instant::now();
        for _ in 0..30 {
            limits.request(&None, false, PATIENCE).await.unwrap();
        }
        let took = before.elapsed();
        assert!((1900..=2100).contains(&took.as_millis()), "{took:?}");
    }
}
