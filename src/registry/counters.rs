//! What the client has done, in plain numbers for whoever shows them. The engine knows nothing of metrics.
//!
//! Hosts come from the objects of tenants and from what registries redirect to, so that only the first
//! [`Counters::MAX_HOSTS`] of them are told apart; the rest is counted as `other`.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{Method, StatusCode};

use super::{
    error::{Error, ErrorKind},
    push::Stored,
};

/// What stands for everything that is not told apart.
const OTHER: &str = "other";

/// What all requests and copies of a client have come to.
#[derive(Debug, Default)]
pub struct Counters {
    hosts: Mutex<BTreeMap<String, Arc<HostCounters>>>,
    copied: Mutex<BTreeMap<(String, String), u64>>,
    blobs: [AtomicU64; 3],
}

/// What all requests to one host have come to.
#[derive(Debug, Default)]
pub struct HostCounters {
    requests: Mutex<BTreeMap<(&'static str, Code), u64>>,
    throttled_nanos: AtomicU64,
    quota: Mutex<Option<u64>>,
}

/// What a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Code {
    /// An answer with a status that is registered.
    Status(u16),
    /// An answer with another status.
    Other,
    /// No answer, or no progress, in time.
    Timeout,
    /// No connection, or one that broke.
    Error,
    /// Nobody wanted the answer any more.
    Cancelled,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "{status}"),
            Self::Other => f.write_str(OTHER),
            Self::Timeout => f.write_str("timeout"),
            Self::Error => f.write_str("error"),
            Self::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl Code {
    fn of(answer: &Result<reqwest::Response, Error>) -> Self {
        match answer {
            // A registry may answer with any of 900 numbers, each of which would be a series of its own.
            Ok(response) if response.status().canonical_reason().is_none() => Self::Other,
            Ok(response) => Self::Status(StatusCode::as_u16(&response.status())),
            Err(error) if matches!(error.kind, ErrorKind::TimedOut | ErrorKind::TooSlow) => Self::Timeout,
            Err(_) => Self::Error,
        }
    }
}

impl Counters {
    /// Hosts that are told apart, and so are pairs of hosts.
    pub const MAX_HOSTS: usize = 100;

    /// The hosts by name, `host[:port]` as they are dialled.
    #[must_use]
    pub fn hosts(&self) -> Vec<(String, Arc<HostCounters>)> {
        lock(&self.hosts).iter().map(|(host, counters)| (host.clone(), Arc::clone(counters))).collect()
    }

    /// Bytes of blobs copied, by source and target as images name them.
    #[must_use]
    pub fn copied(&self) -> Vec<((String, String), u64)> {
        lock(&self.copied).iter().map(|(hosts, bytes)| (hosts.clone(), *bytes)).collect()
    }

    /// Blobs by what they came to.
    #[must_use]
    pub fn blobs(&self) -> [(&'static str, u64); 3] {
        let [copied, mounted, present] = &self.blobs;
        [("copied", copied), ("mounted", mounted), ("present", present)]
            .map(|(result, blobs)| (result, blobs.load(Ordering::Relaxed)))
    }

    pub(super) fn host(&self, host: &str) -> Arc<HostCounters> {
        let mut hosts = lock(&self.hosts);
        let is_known = hosts.contains_key(host) || hosts.len() < Self::MAX_HOSTS;
        Arc::clone(hosts.entry(if is_known { host } else { OTHER }.to_owned()).or_default())
    }

    pub(super) fn count_blob(&self, source: &str, target: &str, stored: Stored, bytes: u64) {
        let [copied, mounted, present] = &self.blobs;
        let blobs = match stored {
            Stored::Copied => copied,
            Stored::Mounted => mounted,
            Stored::Present => present,
        };
        blobs.fetch_add(1, Ordering::Relaxed);
        if stored == Stored::Copied {
            let mut copied = lock(&self.copied);
            let hosts = (source.to_owned(), target.to_owned());
            let is_known = copied.contains_key(&hosts) || copied.len() < Self::MAX_HOSTS;
            *copied.entry(if is_known { hosts } else { (OTHER.into(), OTHER.into()) }).or_default() += bytes;
        }
    }
}

impl HostCounters {
    /// Requests by method and what they came to.
    #[must_use]
    pub fn requests(&self) -> Vec<((&'static str, Code), u64)> {
        lock(&self.requests).iter().map(|(key, count)| (*key, *count)).collect()
    }

    /// How long requests have waited because the host wanted to be left alone, or for a place within its limits.
    #[must_use]
    pub fn throttled(&self) -> Duration {
        Duration::from_nanos(self.throttled_nanos.load(Ordering::Relaxed))
    }

    /// What the host last said is left of a quota.
    #[must_use]
    pub fn quota(&self) -> Option<u64> {
        *lock(&self.quota)
    }

    pub(super) fn count_wait(&self, wait: Duration) {
        let nanos = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        self.throttled_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(super) fn set_quota(&self, left: u64) {
        *lock(&self.quota) = Some(left);
    }
}

/// A request that has been sent. Counted when it is dropped, with what it came to until then.
pub(super) struct Sent {
    counters: Option<Arc<HostCounters>>,
    method: &'static str,
    code: Code,
}

impl Sent {
    pub(super) fn new(counters: Option<&Arc<HostCounters>>, method: &Method) -> Self {
        let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"];
        let method = known.into_iter().find(|known| method == known).unwrap_or(OTHER);
        Self { counters: counters.cloned(), method, code: Code::Cancelled }
    }

    pub(super) fn came_to(mut self, answer: &Result<reqwest::Response, Error>) {
        self.code = Code::of(answer);
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        if let Some(counters) = &self.counters {
            *lock(&counters.requests).entry((self.method, self.code)).or_default() += 1;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_pairs_beyond_the_bound_are_one() {
        let counters = Counters::default();
        for number in 0..300 {
            counters.host(&format!("h{number}")).count_wait(Duration::from_secs(1));
            counters.count_blob(&format!("h{number}"), "target", Stored::Copied, 7);
            counters.count_blob("h0", "target", Stored::Mounted, 7);
        }
        let hosts = counters.hosts();
        assert_eq!(hosts.len(), Counters::MAX_HOSTS + 1);
        assert_eq!(counters.host(OTHER).throttled(), Duration::from_secs(200));
        assert_eq!(hosts.iter().map(|(_, host)| host.throttled().as_secs()).sum::<u64>(), 300);
        assert_eq!(counters.copied().len(), Counters::MAX_HOSTS + 1);
        assert_eq!(counters.copied().iter().map(|(_, bytes)| bytes).sum::<u64>(), 2100);
        assert_eq!(counters.blobs(), [("copied", 300), ("mounted", 300), ("present", 0)]);
    }

    #[test]
    fn a_request_that_nobody_waits_for_is_counted_too() {
        let host = Arc::default();
        drop(Sent::new(Some(&host), &Method::GET));
        drop(Sent::new(Some(&host), &Method::from_bytes(b"BREW").unwrap()));
        assert_eq!(host.requests(), [(("GET", Code::Cancelled), 1), ((OTHER, Code::Cancelled), 1)]);
    }
}
