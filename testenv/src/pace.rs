//! A limit on bytes per second, shared by everything that goes over one line.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The most that is let through in one piece, so that a slow line flows instead of jumping.
pub(crate) const PIECE: usize = 16 * 1024;

/// Gives out time on a line of fixed bandwidth. Exact on average: each piece is due when all before it are through, so
/// the timer's coarseness does not add up.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl Pace {
    /// Without a number there is no limit.
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` are through.
    pub(crate) async fn take(&self, bytes: usize) {
        let Some(rate) = self.bytes_per_second else { return };
        let through = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let nanoseconds = (bytes as u64).saturating_mul(1_000_000_000) / rate.max(1);
            *free_at = Instant::now().max(*free_at) + Duration::from_nanos(nanoseconds);
            *free_at
        };
        tokio::time::sleep_until(through).await;
    }
}
