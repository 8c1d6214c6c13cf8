//! Requests that begin at distances: at the rate that an administrator sets for a host, or because little is left of a
//! quota that the host counts. Each credential has its own; anonymous is one too.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::limits::Identity;

/// What a host says of a quota: so many requests in a window, and how many of them are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// How many are left.
    pub left: u64,
    /// How many there are in a window, and how long that is.
    pub whole: Option<(u64, Duration)>,
}

/// Of a quota, this part is used as fast as we can: one in so many is kept for going slowly.
const KEPT: u64 = 10;
/// Credentials that are remembered of a host.
const MAX_IDENTITIES: usize = 1024;
/// As many as an image of several platforms takes may begin at once even then.
const BURST: u32 = 5;

impl Quota {
    /// How far apart requests must be so that the quota, of which little is left, lasts for ever.
    pub(super) fn distance(&self) -> Option<Duration> {
        let (limit, window) = self.whole.filter(|(limit, _)| *limit > 0)?;
        let is_little = self.left.saturating_mul(KEPT) < limit;
        is_little.then(|| window / u32::try_from(limit).unwrap_or(u32::MAX))
    }
}

/// When the next request of each credential may begin.
#[derive(Debug, Default)]
pub(super) struct Spacing {
    next: HashMap<Identity, Instant>,
}

impl Spacing {
    /// When a request may begin. As many as fit into `burst` may begin at once, the others at equal distances.
    pub(super) fn turn(&mut self, identity: &Identity, distance: Duration, burst: Duration) -> Instant {
        let turn = self.next(identity, burst);
        self.next.insert(identity.clone(), turn + distance);
        turn
    }

    fn next(&mut self, identity: &Identity, burst: Duration) -> Instant {
        let now = Instant::now();
        let earliest = now.checked_sub(burst).unwrap_or(now);
        self.next.retain(|_, next| *next > earliest);
        self.next.get(identity).copied().unwrap_or(earliest)
    }
}

/// Those that are told to go slowly, because little is left of their quota.
#[derive(Debug, Default)]
pub(super) struct Quotas {
    distances: HashMap<Identity, Duration>,
    spacing: Spacing,
}

impl Quotas {
    /// Takes in what the host says of the quota of a credential.
    pub(super) fn learn(&mut self, identity: &Identity, quota: Quota) {
        // Credentials come and go; who is forgotten here is told again.
        if self.distances.len() >= MAX_IDENTITIES {
            self.distances.clear();
        }
        match quota.distance() {
            Some(distance) => self.distances.insert(identity.clone(), distance),
            None => self.distances.remove(identity),
        };
    }

    /// When a request that counts may begin, if that is not now. Who is told to wait has taken no place.
    pub(super) fn turn(&mut self, identity: &Identity) -> Option<Instant> {
        let distance = *self.distances.get(identity)?;
        let burst = distance * (BURST - 1);
        let next = self.spacing.next(identity, burst);
        if next > Instant::now() {
            return Some(next);
        }
        self.spacing.turn(identity, distance, burst);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Digest;

    const HOURS: Duration = Duration::from_hours(6);

    #[test]
    fn a_quota_is_stretched_when_little_is_left_of_it() {
        let distance = |left, whole| Quota { left, whole }.distance();
        assert_eq!(distance(10, Some((100, HOURS))), None);
        assert_eq!(distance(9, Some((100, HOURS))), Some(Duration::from_secs(216)));
        assert_eq!(distance(0, Some((5000, Duration::from_hours(1)))), Some(Duration::from_millis(720)));
        for unknown in [None, Some((0, HOURS))] {
            assert_eq!(distance(0, unknown), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn some_begin_at_once_the_others_at_distances_and_each_credential_by_itself() {
        let (mut quotas, other) = (Quotas::default(), Some(Digest::sha256(b"other")));
        assert_eq!(quotas.turn(&None), None, "nothing is known of a quota");
        quotas.learn(&None, Quota { left: 9, whole: Some((100, HOURS)) });
        let now = Instant::now();
        for _ in 0..BURST {
            assert_eq!(quotas.turn(&None), None);
        }
        let next = now + Duration::from_secs(216);
        assert_eq!(quotas.turn(&None), Some(next));
        assert_eq!(quotas.turn(&None), Some(next), "who is told to wait takes no place");
        assert_eq!(quotas.turn(&other), None);
        tokio::time::advance(Duration::from_secs(216)).await;
        assert_eq!((quotas.turn(&None), quotas.turn(&None)), (None, Some(now + 2 * Duration::from_secs(216))));
        quotas.learn(&None, Quota { left: 90, whole: Some((100, HOURS)) });
        assert_eq!(quotas.turn(&None), None, "the quota is new");
    }
}
