//! Leader election on one Lease, as client-go does it: every write names the resourceVersion it saw, and expiry is
//! counted on our own monotonic clock from the last change that we observed. Wall clocks of other machines, skewed or
//! not, play no part.
//!
//! `held_until` is when the lease may be taken over at the earliest: the instant at which the last successful renewal
//! was *sent*, plus the duration.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease as LeaseObject, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{Api, Client, api::PostParams, core::ObjectMeta};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::error::{Error, call};
use crate::telemetry::server::Gates;

const GATE: &str = "lease";

/// Which lease, who we are, and the times.
#[derive(Clone, Debug)]
pub(super) struct LeaseOptions {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) identity: String,
    pub(super) duration: Duration,
    pub(super) renew: Duration,
    pub(super) api_timeout: Duration,
}

/// Our side of the election.
pub(super) struct Lease {
    api: Api<LeaseObject>,
    options: LeaseOptions,
    held_until: watch::Sender<Option<Instant>>,
    gates: Gates,
    seen: Option<Seen>,
}

/// The lease as we last saw it, and since when it has looked like that.
struct Seen {
    object: LeaseObject,
    since: Instant,
}

/// Why the lease is kept no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeepEnd {
    /// It could not be renewed in time, or somebody else has it.
    Lost,
    /// We are stopping, and still hold it.
    Shutdown,
}

/// What to do about the lease as it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Take,
    Wait(Duration),
}

impl Lease {
    /// The election, and until when the lease is ours.
    pub(super) fn new(client: Client, options: LeaseOptions, gates: Gates) -> (Self, watch::Receiver<Option<Instant>>) {
        let api = Api::namespaced(client, &options.namespace);
        let (held_until, receiver) = watch::channel(None);
        (Self { api, options, held_until, gates, seen: None }, receiver)
    }

    /// Waits until the lease is ours. False if the shutdown came first.
    pub(super) async fn acquire(&mut self, shutdown: &CancellationToken) -> bool {
        let mut announced = None;
        loop {
            let wait = match self.try_acquire().await {
                Ok(true) => {
                    tracing::info!(identity = %self.options.identity, "leading");
                    return true;
                }
                Ok(false) => {
                    let holder = self.holder();
                    if announced != holder {
                        tracing::info!(holder = holder.as_deref().unwrap_or_default(), "standing by");
                        announced = holder;
                    }
                    self.jittered()
                }
                Err(error) => {
                    if self.seen.is_none() {
                        self.gates.close(GATE, &error.to_string());
                    }
                    tracing::warn!(%error, "the lease could not be looked at");
                    self.jittered()
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return false,
                () = sleep(wait) => {}
            }
        }
    }

    /// Renews the lease until it is lost or the shutdown comes. While it is lost or about to be, `held_until` says so.
    pub(super) async fn keep(&mut self, shutdown: &CancellationToken) -> KeepEnd {
        loop {
            let Some(held_until) = *self.held_until.borrow() else { return KeepEnd::Lost };
            tokio::select! {
                () = shutdown.cancelled() => return KeepEnd::Shutdown,
                () = sleep(self.options.renew) => {}
            }
            // A renewal that has not been answered when the lease runs out is of no use.
            let patience = held_until.saturating_duration_since(Instant::now());
            let renewed = match timeout(patience, self.renew()).await {
                Ok(Ok(renewed)) => renewed,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the lease could not be renewed");
                    Instant::now() < held_until
                }
                Err(_) => false,
            };
            if !renewed {
                tracing::warn!(identity = %self.options.identity, "no longer leading");
                self.held_until.send_replace(None);
                return KeepEnd::Lost;
            }
        }
    }

    /// Empties the lease so that another replica takes over at once. Best effort.
    pub(super) async fn release(&mut self) {
        self.held_until.send_replace(None);
        let Some(seen) = &self.seen else { return };
        let mut object = seen.object.clone();
        let spec = object.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(&self.options.identity) {
            return;
        }
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        match self.replace(&object).await {
            Ok(_) => tracing::info!("lease released"),
            Err(error) => tracing::warn!(%error, "the lease was left to expire"),
        }
    }

    async fn try_acquire(&mut self) -> Result<bool, Error> {
        let sent = Instant::now();
        let Some(object) =
            call("reading the lease", self.options.api_timeout, self.api.get_opt(&self.options.name)).await?
        else {
            return self.create(sent).await;
        };
        self.saw(object);
        let Some(seen) = &self.seen else { return Ok(false) };
        match decide(&seen.object, seen.since, Instant::now(), &self.options) {
            Step::Wait(_) => Ok(false),
            Step::Take => {
                let mut object = seen.object.clone();
                let spec = object.spec.get_or_insert_default();
                let is_ours = spec.holder_identity.as_deref() == Some(&self.options.identity);
                if !is_ours {
                    spec.lease_transitions = Some(spec.lease_transitions.unwrap_or_default().saturating_add(1));
                    spec.acquire_time = Some(MicroTime(Timestamp::now()));
                }
                self.hold(spec);
                self.write(object).await
            }
        }
    }

    async fn create(&mut self, sent: Instant) -> Result<bool, Error> {
        let mut spec = LeaseSpec { acquire_time: Some(MicroTime(Timestamp::now())), ..LeaseSpec::default() };
        self.hold(&mut spec);
        let metadata = ObjectMeta { name: Some(self.options.name.clone()), ..ObjectMeta::default() };
        let object = LeaseObject { metadata, spec: Some(spec) };
        let params = PostParams::default();
        match call("creating the lease", self.options.api_timeout, self.api.create(&params, &object)).await {
            Ok(object) => {
                self.saw(object);
                self.held_until.send_replace(Some(sent + self.options.duration));
                Ok(true)
            }
            // Somebody else was faster.
            Err(error) if error.is_conflict() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// True if the lease is still ours. An answer that never came is looked into before anything is written again.
    async fn renew(&mut self) -> Result<bool, Error> {
        let Some(seen) = &self.seen else { return Ok(false) };
        let mut object = seen.object.clone();
        self.hold(object.spec.get_or_insert_default());
        if self.write(object).await? {
            return Ok(true);
        }
        let object = call("reading the lease", self.options.api_timeout, self.api.get(&self.options.name)).await?;
        self.saw(object.clone());
        if self.holder().as_deref() != Some(&self.options.identity) {
            return Ok(false);
        }
        let mut object = object;
        self.hold(object.spec.get_or_insert_default());
        self.write(object).await
    }

    /// Writes the lease if nobody else has. False if somebody has.
    async fn write(&mut self, object: LeaseObject) -> Result<bool, Error> {
        let sent = Instant::now();
        match self.replace(&object).await {
            Ok(object) => {
                self.saw(object);
                self.held_until.send_replace(Some(sent + self.options.duration));
                Ok(true)
            }
            Err(error) if error.is_conflict() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn replace(&self, object: &LeaseObject) -> Result<LeaseObject, Error> {
        let params = PostParams::default();
        let write = self.api.replace(&self.options.name, &params, object);
        call("writing the lease", self.options.api_timeout, write).await
    }

    fn hold(&self, spec: &mut LeaseSpec) {
        spec.holder_identity = Some(self.options.identity.clone());
        spec.lease_duration_seconds = Some(i32::try_from(self.options.duration.as_secs().max(1)).unwrap_or(i32::MAX));
        spec.renew_time = Some(MicroTime(Timestamp::now()));
    }

    /// Notes the lease as it is. What has not changed has been like that since we first saw it so.
    fn saw(&mut self, object: LeaseObject) {
        self.gates.open(GATE);
        let version = |object: &LeaseObject| object.metadata.resource_version.clone();
        let is_same = self.seen.as_ref().is_some_and(|seen| version(&seen.object) == version(&object));
        if !is_same {
            self.seen = Some(Seen { object, since: Instant::now() });
        }
    }

    fn holder(&self) -> Option<String> {
        self.seen.as_ref()?.object.spec.as_ref()?.holder_identity.clone()
    }

    fn jittered(&self) -> Duration {
        self.options.renew.mul_f64(0.8 + 0.4 * fastrand::f64())
    }
}

/// Decides. The lease is free if nobody holds it, if we do, or if it has not changed for as long as its holder asked
/// for. Its own times are not looked at: they are from another clock.
fn decide(object: &LeaseObject, since: Instant, now: Instant, options: &LeaseOptions) -> Step {
    let Some(spec) = &object.spec else { return Step::Take };
    let holder = spec.holder_identity.as_deref().unwrap_or_default();
    if holder.is_empty() || holder == options.identity {
        return Step::Take;
    }
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let duration = seconds.map_or(options.duration, Duration::from_secs).max(options.duration);
    let expires = since + duration;
    if expires <= now { Step::Take } else { Step::Wait(expires - now) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> LeaseOptions {
        LeaseOptions {
            namespace: "n".into(),
            name: "l".into(),
            identity: "us".into(),
            duration: Duration::from_secs(15),
            renew: Duration::from_secs(3),
            api_timeout: Duration::from_secs(10),
        }
    }

    fn lease(holder: &str, renewed: Timestamp) -> LeaseObject {
        let spec = LeaseSpec {
            holder_identity: Some(holder.into()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(renewed)),
            ..LeaseSpec::default()
        };
        LeaseObject { spec: Some(spec), ..LeaseObject::default() }
    }

    #[test]
    fn expiry_is_counted_from_what_we_saw_and_not_from_their_clock() {
        let since = Instant::now();
        for renewed in [Timestamp::MIN, Timestamp::UNIX_EPOCH, Timestamp::MAX] {
            let theirs = lease("them", renewed);
            let at = |seconds| decide(&theirs, since, since + Duration::from_secs(seconds), &options());
            assert_eq!(at(0), Step::Wait(Duration::from_secs(15)));
            assert_eq!(at(14), Step::Wait(Duration::from_secs(1)));
            assert_eq!(at(15), Step::Take);
        }
    }

    #[test]
    fn a_released_lease_and_our_own_are_taken_at_once() {
        let now = Instant::now();
        assert_eq!(decide(&lease("", Timestamp::UNIX_EPOCH), now, now, &options()), Step::Take);
        assert_eq!(decide(&lease("us", Timestamp::UNIX_EPOCH), now, now, &options()), Step::Take);
        assert_eq!(decide(&LeaseObject::default(), now, now, &options()), Step::Take);
    }
}
