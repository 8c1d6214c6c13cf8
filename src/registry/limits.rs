//! What everybody in the process shares of one host: requests in flight, large streams, and the time until which the
//! host has asked to be left alone.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};

/// The shared limits of one host.
pub(crate) struct HostLimits {
    requests: Arc<Semaphore>,
    streams: Arc<Semaphore>,
    closed_until: Mutex<Option<Instant>>,
}

/// A host that wants to be left alone for longer is not waited for inside a run.
const LONGEST_WAIT: Duration = Duration::from_mins(1);
/// No registry may stop us for longer than this, whatever it says.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

impl HostLimits {
    pub(crate) fn new(requests: usize, streams: usize) -> Self {
        Self {
            requests: Arc::new(Semaphore::new(requests.max(1))),
            streams: Arc::new(Semaphore::new(streams.max(1))),
            closed_until: Mutex::new(None),
        }
    }

    /// Waits until the host may be asked, then for a place among the requests in flight. Gate first, permit second:
    /// whoever waits for a closed host holds nothing.
    ///
    /// A host that is closed for longer than a minute is not waited for: the error says for how long it is.
    pub(crate) async fn request(&self) -> Result<Option<OwnedSemaphorePermit>, Duration> {
        loop {
            while let Some(until) = self.closed_until() {
                let pause = until.saturating_duration_since(Instant::now());
                if pause > LONGEST_WAIT {
                    return Err(pause);
                }
                sleep_until(until).await;
            }
            let permit = Arc::clone(&self.requests).acquire_owned().await.ok();
            if self.closed_until().is_none() {
                return Ok(permit);
            }
        }
    }

    /// Waits for a place among the large streams.
    pub(crate) async fn stream(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.streams).acquire_owned().await.ok()
    }

    /// Closes the host for everybody. A later end wins over an earlier one.
    pub(crate) fn close_for(&self, pause: Duration) {
        let until = Instant::now() + pause.min(LONGEST_PAUSE);
        let mut closed = self.closed_until.lock().unwrap_or_else(PoisonError::into_inner);
        *closed = Some(closed.map_or(until, |earlier| earlier.max(until)));
    }

    /// How long the host still wants to be left alone.
    pub(crate) fn closed_for(&self) -> Option<Duration> {
        self.closed_until().map(|until| until.saturating_duration_since(Instant::now()))
    }

    fn closed_until(&self) -> Option<Instant> {
        let closed = *self.closed_until.lock().unwrap_or_else(PoisonError::into_inner);
        closed.filter(|until| *until > Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_closed_host_is_left_alone_by_everybody_until_it_opens() {
        let limits = HostLimits::new(2, 1);
        limits.close_for(Duration::from_secs(59));
        limits.close_for(Duration::from_secs(10));
        let before = Instant::now();
        let _first = limits.request().await;
        let _second = limits.request().await;
        assert!(before.elapsed() >= Duration::from_secs(59));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_is_closed_for_long_is_not_waited_for() {
        let limits = HostLimits::new(1, 1);
        limits.close_for(Duration::from_mins(10));
        assert!(limits.request().await.is_err_and(|pause| pause > Duration::from_mins(9)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_never_longer_than_an_hour() {
        let limits = HostLimits::new(1, 1);
        limits.close_for(Duration::from_secs(1_000_000_000));
        assert!(limits.closed_for().unwrap() <= LONGEST_PAUSE);
    }
}
