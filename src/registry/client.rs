//! The one registry client of the process: pools, limits per host, tokens, what was learned of each host.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    counters::Counters,
    error::Error,
    known::Known,
    limits::HostLimits,
    memory::Memory,
    network::Networks,
    pace::Floor,
    quirks::Quirks,
    transport::{Pools, Transport, TransportError},
};
use crate::{
    auth::{Credential, NewRepository, TokenCache, slots::Slots},
    oci::{Digest, Host, RepositoryName},
};

/// How long the client waits for what. Every wait on the network has a bound here.
#[derive(Clone, Debug)]
pub struct Timing {
    /// For a connection, name resolution and TLS included.
    pub connect: Duration,
    /// For the head of the answer to a request without a body, or for a login.
    pub head: Duration,
    /// For the next byte, either way.
    pub idle: Duration,
    /// How fast bytes must move, either way.
    pub floor: Floor,
    /// How long an upload under way is held for a source that wants to be left alone.
    pub hold: Duration,
    /// For the answer after the last byte of an upload.
    pub answer: Duration,
    /// For giving up an upload.
    pub cancel: Duration,
    /// How long an unused connection is kept.
    pub pool_idle: Duration,
    /// The first wait before a failed request is repeated; later ones double.
    pub backoff_first: Duration,
    /// The longest wait between repetitions.
    pub backoff_max: Duration,
    /// How long a host is left alone after a first 429 that does not say for how long; later ones double.
    pub rate_pause: Duration,
    /// How long a host is left alone at most, whatever it says.
    pub rate_pause_max: Duration,
    /// A host that is to be left alone for longer is not waited for.
    pub rate_wait_max: Duration,
    /// For the write of a tag, so that it ends before another leader can begin.
    pub tag_write: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            head: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            floor: Floor::default(),
            hold: Duration::from_secs(15),
            answer: Duration::from_mins(10),
            cancel: Duration::from_secs(5),
            pool_idle: Duration::from_secs(20),
            backoff_first: Duration::from_secs(1),
            backoff_max: Duration::from_secs(30),
            rate_pause: Duration::from_secs(10),
            rate_pause_max: Duration::from_hours(1),
            rate_wait_max: Duration::from_mins(1),
            tag_write: Duration::from_secs(8),
        }
    }
}

/// What an administrator sets for one host.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Hosts beside the registry's own domain that may receive its credentials.
    pub auth_hosts: Vec<Host>,
    /// Hosts that the registry may have blobs sent to instead of itself, without its credentials.
    pub upload_hosts: Vec<Host>,
    /// Requests in flight at most.
    pub requests: usize,
    /// Blobs over 1 MiB under way at most.
    pub streams: usize,
    /// Requests that begin in a second at most; `None` is no bound.
    pub per_second: Option<u32>,
    /// What differs from what is known of the host; `None` is nothing.
    pub quirks: Option<Quirks>,
    /// How repositories are made that pushes need; `None` makes none.
    pub new_repositories: Option<NewRepository>,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            auth_hosts: Vec::new(),
            upload_hosts: Vec::new(),
            requests: 32,
            streams: 6,
            per_second: None,
            quirks: None,
            new_repositories: None,
        }
    }
}

/// What an administrator sets for the client.
#[derive(Clone, Debug, Default)]
pub struct ClientOptions {
    /// How long to wait for what.
    pub timing: Timing,
    /// The networks that no connection goes to.
    pub networks: Networks,
    /// Settings of single hosts; others have the default.
    pub hosts: HashMap<Host, HostOptions>,
    /// How hosts are reached that are no registries, such as those where logins are had.
    pub transports: HashMap<Host, Transport>,
    /// The same for hosts that are not among them.
    pub transport: Transport,
    /// The bytes of manifests and lists in memory at one time; `None` is [`Memory::DEFAULT`].
    pub memory: Option<u32>,
    /// Where it is counted what the client does.
    pub counters: Option<Arc<Counters>>,
}

/// The registry client of the process. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    options: ClientOptions,
    networks: Arc<Networks>,
    pools: Pools,
    /// Where no network is closed.
    open_pools: Pools,
    tokens: TokenCache<Error>,
    limits: Mutex<HashMap<String, Arc<HostLimits>>>,
    known: Mutex<HashMap<String, Arc<Known>>>,
    holders: Mutex<HashMap<Holding, RepositoryName>>,
    created: Slots<Creation, Instant, Error>,
    small_blobs: Semaphore,
    memory: Memory,
}

/// All small blobs that are in memory at one time, in bytes.
const SMALL_BLOBS_IN_MEMORY: u32 = 6 << 20;

/// A registry, the credential with which it makes a repository, and that one.
type Creation = (String, Digest, RepositoryName);

/// A registry with the credential that it is shown, and a blob: two tenants share what they know only if both are equal.
type Holding = ((String, Option<Digest>), Digest);

impl Client {
    /// A client with these options.
    #[must_use]
    pub fn new(options: ClientOptions) -> Self {
        let inner = Inner {
            networks: Arc::new(options.networks.clone()),
            memory: Memory::new(options.memory.unwrap_or(Memory::DEFAULT)),
            options,
            pools: Pools::default(),
            open_pools: Pools::default(),
            tokens: TokenCache::new(Error::may_pass),
            limits: Mutex::default(),
            known: Mutex::default(),
            holders: Mutex::default(),
            created: Slots::new(Error::may_pass),
            small_blobs: Semaphore::new(SMALL_BLOBS_IN_MEMORY as usize),
        };
        Self { inner: Arc::new(inner) }
    }

    /// How long this client waits for what.
    #[must_use]
    pub fn timing(&self) -> &Timing {
        &self.inner.options.timing
    }

    pub(super) fn http(
        &self,
        transport: &Transport,
        credentials: &[Arc<Credential>],
    ) -> Result<reqwest::Client, TransportError> {
        self.inner.pools.get(transport, credentials, self.timing(), &self.inner.networks)
    }

    /// The same with no network closed, for what nobody but the administrator has a say in.
    pub(super) fn http_to_metadata(&self, transport: &Transport) -> Result<reqwest::Client, TransportError> {
        self.inner.open_pools.get(transport, &[], self.timing(), &Arc::default())
    }

    /// How a host is reached that is no registry.
    pub(super) fn transport(&self, host: &str) -> Transport {
        let Inner { options, .. } = &*self.inner;
        let set = host.parse::<Host>().ok().and_then(|host| options.transports.get(&host));
        set.unwrap_or(&options.transport).clone()
    }

    pub(super) fn counters(&self) -> Option<&Counters> {
        self.inner.options.counters.as_deref()
    }

    pub(super) fn networks(&self) -> &Networks {
        &self.inner.networks
    }

    /// The room for manifests and lists.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.inner.memory
    }

    pub(super) fn tokens(&self) -> &TokenCache<Error> {
        &self.inner.tokens
    }

    pub(super) fn auth_hosts(&self, host: &Host) -> &[Host] {
        self.inner.options.hosts.get(host).map_or(&[], |options| &options.auth_hosts)
    }

    pub(super) fn upload_hosts(&self, host: &Host) -> &[Host] {
        self.inner.options.hosts.get(host).map_or(&[], |options| &options.upload_hosts)
    }

    pub(super) fn new_repository(&self, host: &Host) -> Option<&NewRepository> {
        self.inner.options.hosts.get(host)?.new_repositories.as_ref()
    }

    /// The repositories that were made, by registry, and when.
    pub(super) fn created(&self) -> &Slots<Creation, Instant, Error> {
        &self.inner.created
    }

    /// The limits of a host, by its `host[:port]` as it is dialled.
    pub(super) fn limits(&self, host: &str) -> Arc<HostLimits> {
        let mut limits = self.inner.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if limits.len() >= Self::MAX_HOSTS {
            limits.retain(|_, host| Arc::strong_count(host) > 1 || host.is_closed());
        }
        Arc::clone(limits.entry(host.to_owned()).or_insert_with(|| {
            let options = host.parse::<Host>().ok().and_then(|host| self.inner.options.hosts.get(&host).cloned());
            let options = options.unwrap_or_default();
            let counters = self.counters().map(|counters| counters.host(host));
            let pauses = self.timing().into();
            Arc::new(HostLimits::new(options.requests, options.streams, options.per_second, pauses).counted(counters))
        }))
    }

    /// What is known of a registry, shared by all its repositories that are reached in one way.
    pub(super) fn known(&self, host: &Host, registry_key: &str) -> Arc<Known> {
        let mut known = self.inner.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= Self::MAX_HOSTS {
            known.clear();
        }
        let new = || {
            let set = self.inner.options.hosts.get(host).and_then(|options| options.quirks);
            Arc::new(Known::new(&set.unwrap_or_else(|| Quirks::of(host))))
        };
        Arc::clone(known.entry(registry_key.to_owned()).or_insert_with(new))
    }

    /// A repository that this process has brought a blob to.
    pub(super) fn holder(&self, login: (String, Option<Digest>), digest: &Digest) -> Option<RepositoryName> {
        let holders = self.inner.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.get(&(login, digest.clone())).cloned()
    }

    /// Waits for room in memory for a small blob.
    pub(super) async fn room_for_small(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(SMALL_BLOBS_IN_MEMORY);
        self.inner.small_blobs.acquire_many(bytes).await.ok()
    }

    /// The blob is in this repository now. It may be gone when it is wanted: a mount then opens an upload instead.
    pub(super) fn remember_holder(&self, login: (String, Option<Digest>), digest: &Digest, name: &RepositoryName) {
        let mut holders = self.inner.holders.lock().unwrap_or_else(PoisonError::into_inner);
        if holders.len() >= Self::MAX_HOLDERS {
            holders.clear();
        }
        holders.insert((login, digest.clone()), name.clone());
    }

    /// About 16 MiB of memory.
    const MAX_HOLDERS: usize = 1 << 16;
    /// Redirects lead to hosts that a registry chooses, so that what is kept by host needs a bound.
    const MAX_HOSTS: usize = 1024;
}
