//! Whether tags may still be written. Blobs and manifests by digest are harmless whoever writes them; a tag is not, so
//! that an operator that may have lost its lease must not begin to move one.

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

/// Whether tags may still be written.
#[derive(Clone, Debug)]
pub enum Fence {
    /// There is no other writer of ours: the command line.
    Open,
    /// Until this instant of the monotonic clock, as long as there is one.
    Until(watch::Receiver<Option<Instant>>),
}

impl Fence {
    /// Whether a write that takes up to `margin` may begin now.
    #[must_use]
    pub fn allows(&self, margin: Duration) -> bool {
        match self {
            Self::Open => true,
            Self::Until(held_until) => held_until.borrow().is_some_and(|until| until >= Instant::now() + margin),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_write_begins_only_with_enough_of_the_lease_left() {
        let (sender, receiver) = watch::channel(None);
        let fence = Fence::Until(receiver);
        assert!(!fence.allows(Duration::ZERO));
        sender.send_replace(Some(Instant::now() + Duration::from_secs(10)));
        assert!(fence.allows(Duration::from_secs(9)));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(!fence.allows(Duration::from_secs(9)));
    }
}
