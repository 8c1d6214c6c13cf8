//! How fast a body must move: who sends a byte now and then would hold a place among the streams of a host for hours.
//!
//! Time counts only while it is this peer that is waited for. A source is not slow because the target takes what it has
//! sent slowly, nor the other way round.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// A body that moves more slowly is broken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor {
    /// Bytes in a second, on average over the window; 0 is no floor.
    pub per_second: u64,
    /// How long a body is looked at.
    pub window: Duration,
}

impl Default for Floor {
    fn default() -> Self {
        Self { per_second: 16 << 10, window: Duration::from_mins(1) }
    }
}

/// How a peer keeps to the floor, over all its connections for one body.
pub(super) struct Pace {
    floor: Floor,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waited: Duration,
    bytes: u64,
    slow: u32,
}

impl Pace {
    pub(super) fn new(floor: Floor) -> Self {
        Self { floor, state: Mutex::default() }
    }

    /// The peer was waited for so long, and so many bytes moved. True if a window ends with this that had too few.
    pub(super) fn is_too_slow(&self, waited: Duration, bytes: u64) -> bool {
        let mut state = self.state();
        state.waited += waited;
        state.bytes += bytes;
        if state.waited < self.floor.window {
            return false;
        }
        let least = u128::from(self.floor.per_second) * state.waited.as_millis() / 1000;
        let is_slow = u128::from(state.bytes) < least;
        *state = State { slow: if is_slow { state.slow + 1 } else { 0 }, ..State::default() };
        is_slow
    }

    /// How many windows in a row had too few.
    pub(super) fn slow_windows(&self) -> u32 {
        self.state().slow
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_window_with_too_few_bytes_is_slow() {
        let second = Duration::from_secs(1);
        let pace = |per_second| Pace::new(Floor { per_second, window: 10 * second });
        let slow = pace(100);
        assert!((0..9).all(|_| !slow.is_too_slow(second, 99)), "the window is not over");
        assert!(slow.is_too_slow(second, 99));
        assert!(!slow.is_too_slow(9 * second, 0) && slow.is_too_slow(second, 999));
        assert_eq!(slow.slow_windows(), 2);
        assert!(!slow.is_too_slow(10 * second, 1000), "as many as it takes");
        assert_eq!(slow.slow_windows(), 0);
        assert!(slow.is_too_slow(30 * second, 2999), "the longer the wait, the more");
        assert!(!pace(0).is_too_slow(1000 * second, 0), "no floor");
        assert!((0..100).all(|_| !slow.is_too_slow(Duration::ZERO, 1)), "while nobody waits for it no time passes");
    }
}
