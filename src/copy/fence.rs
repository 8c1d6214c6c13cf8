//! Whether tags may still be written. Blobs and manifests by digest are harmless whoever writes them; a tag is not, so
//! that an operator that may have lost its lease must not begin to move one.

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

/// Whether tags may still be written.
#[derive(Clone, Debug)]
pub enum Fence {
    /// There is no other writer of ours: the command line.
    Open,
    /// As long as there is a lease.
    Held {
        /// Until this instant of the monotonic clock, as long as there is one.
        until: watch::Receiver<Option<Instant>>,
        /// How much of it must be left when a write begins.
        margin: Duration,
    },
}

impl Fence {
    /// Waits until a write may begin: a renewal that is late is waited for. False once the lease is lost.
    pub async fn allows(&self) -> bool {
        let Self::Held { until, margin } = self else { return true };
        let mut held_until = until.clone();
        let is_decided = |until: &Option<Instant>| until.is_none_or(|until| until >= Instant::now() + *margin);
        held_until.wait_for(is_decided).await.is_ok_and(|until| until.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_write_begins_only_with_enough_of_the_lease_left() {
        let (sender, receiver) = watch::channel(None);
        let fence = Fence::Held { until: receiver, margin: Duration::from_secs(9) };
        assert!(!fence.allows().await);
        sender.send_replace(Some(Instant::now() + Duration::from_secs(10)));
        assert!(fence.allows().await);
        tokio::time::advance(Duration::from_secs(2)).await;
        // A late renewal is waited for, and so is the word that there will be none.
        for (renewed, expected) in [(Some(Instant::now() + Duration::from_secs(15)), true), (None, false)] {
            sender.send_replace(Some(Instant::now() + Duration::from_secs(8)));
            let (allowed, ()) = tokio::join!(fence.allows(), async {
                sender.send_replace(renewed);
            });
            assert_eq!(allowed, expected);
        }
    }
}
