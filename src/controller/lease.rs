//! Leader election on one Lease (coordination.k8s.io/v1), as client-go's `leaderelection` does it.
//!
//! Whether another holder's lease has run out is counted on our own monotonic clock, from when we last saw its record
//! change: the times inside the record are for people, and clocks that differ do no harm. Every write carries the
//! resourceVersion of what it is based on, so that of two candidates one gets a conflict. How long the lease is ours
//! is counted from when the request was *sent*: others cannot have seen it earlier.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease as Object, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::telemetry::server::Gates;

/// Opens when the lease was seen for the first time, whoever holds it: a standby is ready.
pub(super) const GATE: &str = "lease";
const MANAGER: &str = "imagemirror";
/// Giving up the lease is best effort and does not hold up the end of the process: with `timing.shutdown` before it, it
/// is part of the 25 s that are promised for that.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);

/// Which lease, for whom, and how fast.
#[derive(Clone, Debug)]
pub(super) struct LeaseOptions {
    /// The namespace of the Lease.
    pub(super) namespace: String,
    /// The name of the Lease.
    pub(super) name: String,
    /// Who we are; must differ between replicas and not be empty.
    pub(super) identity: String,
    /// A holder that was not heard of for this long may be replaced.
    pub(super) duration: Duration,
    /// How often the holder renews. Others look twice as often: what they see late, they take over late.
    pub(super) renew: Duration,
    /// The deadline of one attempt. Shorter where the lease would run out before.
    pub(super) api_timeout: Duration,
}

/// Why [`Lease::keep`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeepEnd {
    /// The lease is not ours any more, or could not be renewed in time.
    Lost,
    /// The shutdown came. The lease is still ours: [`Lease::release`] gives it up.
    Shutdown,
}

/// Our part in the election. Give it a client without retries: they would hide the deadlines.
pub(super) struct Lease {
    api: Api<Object>,
    options: LeaseOptions,
    gates: Gates,
    held_until: watch::Sender<Option<Instant>>,
    /// The object as it was last read or written, and when its spec was first seen as it is.
    observed: Option<(Object, Instant)>,
    /// Whether somebody may have written the object since.
    stale: bool,
    /// When the last request that made or kept the lease ours was sent.
    renewed: Option<Instant>,
    complaint: String,
}

/// What to do about a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// Nobody holds it, or its holder was not heard of for too long.
    Acquire,
    /// It is ours.
    Renew,
    /// Somebody else's, for this long if nothing more is heard of them.
    Wait(Duration),
}

enum Attempt {
    Held,
    HeldByOther(Duration),
    /// Somebody else wrote at the same time.
    Conflict,
    Failed,
}

impl Lease {
    /// Takes part in an election. The receiver says until when the lease is ours, by the monotonic clock.
    #[must_use]
    pub(super) fn new(client: Client, options: LeaseOptions, gates: Gates) -> (Self, watch::Receiver<Option<Instant>>) {
        let (held_until, receiver) = watch::channel(None);
        gates.close(GATE, &format!("the Lease {}/{} to be read", options.namespace, options.name));
        let api = Api::namespaced(client, &options.namespace);
        let complaint = String::new();
        let lease = Self { api, options, gates, held_until, observed: None, stale: true, renewed: None, complaint };
        (lease, receiver)
    }

    /// Waits until the lease is ours. False if the shutdown came first.
    pub(super) async fn acquire(&mut self, shutdown: &CancellationToken) -> bool {
        let mut seen_holder = None;
        loop {
            let attempt = tokio::select! {
                biased;
                () = shutdown.cancelled() => {
                    // What was being sent may have made it ours.
                    self.release().await;
                    return false;
                }
                attempt = self.attempt(self.options.api_timeout.min(self.options.duration)) => attempt,
            };
            let wait = match attempt {
                Attempt::Held => {
                    tracing::info!(lease = %self.options.name, identity = %self.options.identity, "leading");
                    return true;
                }
                Attempt::HeldByOther(left) => left.min(self.options.renew / 2),
                Attempt::Conflict | Attempt::Failed => self.options.renew,
            };
            let holder = self.holder();
            if seen_holder != holder {
                tracing::info!(lease = %self.options.name, holder = holder.as_deref().unwrap_or("nobody"), "standing by");
                seen_holder = holder;
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return false,
                () = sleep(wait + jitter(self.options.renew)) => {}
            }
        }
    }

    /// Renews until the lease is lost or the shutdown comes. Lost is published at once.
    pub(super) async fn keep(&mut self, shutdown: &CancellationToken) -> KeepEnd {
        let mut pause = self.options.renew;
        loop {
            // To its end, not client-go's two thirds of it: an API server that is away for ten seconds must not cost the
            // runs. What may not be written late, tags, keeps a margin of its own.
            let Some(renewed) = self.renewed else { return self.lost("not held") };
            let renew_by = renewed + self.options.duration;
            let next = Instant::now() + pause;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return KeepEnd::Shutdown,
                () = sleep_until(next.min(renew_by)) => {}
            }
            let left = renew_by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return self.lost("not renewed in time");
            }
            // Short enough that one request which gets no answer leaves time for another.
            let limit = self.options.api_timeout.min(self.options.duration / 3).min(left);
            let attempt = tokio::select! {
                biased;
                () = shutdown.cancelled() => {
                    self.stale = true;
                    return KeepEnd::Shutdown;
                }
                attempt = self.attempt(limit) => attempt,
            };
            pause = match attempt {
                Attempt::Held => self.options.renew,
                Attempt::HeldByOther(_) => return self.lost("held by another"),
                Attempt::Conflict => jitter(self.options.renew),
                Attempt::Failed => self.options.renew / 4 + jitter(self.options.renew),
            };
        }
    }

    /// Gives the lease up, so that a standby takes over at once. Does nothing if it is not ours; gives up after three
    /// seconds.
    pub(super) async fn release(&mut self) {
        self.held_until.send_replace(None);
        self.renewed = None;
        let limit = self.options.api_timeout.min(RELEASE_TIMEOUT);
        match timeout(limit, self.try_release()).await {
            Ok(Ok(true)) => tracing::info!(lease = %self.options.name, "lease given up"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => tracing::warn!(lease = %self.options.name, %error, "the lease was not given up"),
            Err(_) => tracing::warn!(lease = %self.options.name, "the lease was not given up in time"),
        }
    }

    async fn try_release(&mut self) -> Result<bool, kube::Error> {
        self.observe().await?;
        let Some((object, _)) = self.observed.take() else { return Ok(false) };
        self.stale = true;
        let spec = object.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(&self.options.identity) {
            return Ok(false);
        }
        let object = Object { spec: Some(released(spec, Timestamp::now())), ..object };
        self.api.replace(&self.options.name, &parameters(), &object).await?;
        Ok(true)
    }

    /// One try to make or keep the lease ours, within `limit`.
    async fn attempt(&mut self, limit: Duration) -> Attempt {
        let outcome = timeout(limit, self.try_hold()).await;
        if !matches!(outcome, Ok(Ok(Attempt::Held))) {
            // Whatever was sent may have been carried out: the next try reads first.
            self.stale = true;
        }
        let error = match outcome {
            Ok(Ok(attempt)) => {
                self.complaint.clear();
                return attempt;
            }
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => return Attempt::Conflict,
            Ok(Err(error)) => brief(&error),
            Err(_) => format!("no answer within {limit:?}"),
        };
        if self.observed.is_none() {
            let LeaseOptions { namespace, name, .. } = &self.options;
            self.gates.close(GATE, &format!("the Lease {namespace}/{name} to be read: {error}"));
        }
        if self.complaint != error {
            tracing::warn!(lease = %self.options.name, %error, "the lease cannot be read or written");
            self.complaint = error;
        }
        Attempt::Failed
    }

    async fn try_hold(&mut self) -> Result<Attempt, kube::Error> {
        if self.stale {
            self.observe().await?;
        }
        let (object, since) = self.observed.clone().unwrap_or_else(|| (Object::default(), Instant::now()));
        let spec = object.spec.unwrap_or_default();
        let LeaseOptions { name, identity, duration, .. } = &self.options;
        let decision = decide(&spec, since, Instant::now(), identity, *duration);
        if let Decision::Wait(left) = decision {
            return Ok(Attempt::HeldByOther(left));
        }
        let spec = held(spec, identity, *duration, decision == Decision::Acquire, Timestamp::now());
        let sent = Instant::now();
        let written = if object.metadata.resource_version.is_some() {
            let object = Object { metadata: object.metadata, spec: Some(spec) };
            self.api.replace(name, &parameters(), &object).await?
        } else {
            let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
            self.api.create(&parameters(), &Object { metadata, spec: Some(spec) }).await?
        };
        self.observed = Some((written, Instant::now()));
        self.stale = false;
        self.renewed = Some(sent);
        self.held_until.send_replace(Some(sent + *duration));
        self.gates.open(GATE);
        Ok(Attempt::Held)
    }

    /// Reads the object. A record that did not change keeps the time at which it was first seen.
    async fn observe(&mut self) -> Result<(), kube::Error> {
        let Some(object) = self.api.get_opt(&self.options.name).await? else {
            self.observed = None;
            return Ok(());
        };
        let since = match &self.observed {
            Some((before, since)) if before.spec == object.spec => *since,
            _ => Instant::now(),
        };
        self.observed = Some((object, since));
        self.gates.open(GATE);
        Ok(())
    }

    fn holder(&self) -> Option<String> {
        let (object, _) = self.observed.as_ref()?;
        object.spec.as_ref()?.holder_identity.clone().filter(|holder| !holder.is_empty())
    }

    fn lost(&mut self, why: &str) -> KeepEnd {
        self.held_until.send_replace(None);
        self.renewed = None;
        self.stale = true;
        tracing::warn!(lease = %self.options.name, holder = self.holder(), why, "lease lost");
        KeepEnd::Lost
    }
}

/// What to do about a record that has been as it is since `observed_at`. An absent one is the default. How long it
/// holds is what its holder wrote into it, and `duration` where that is missing.
fn decide(record: &LeaseSpec, observed_at: Instant, now: Instant, identity: &str, duration: Duration) -> Decision {
    match record.holder_identity.as_deref() {
        None | Some("") => return Decision::Acquire,
        Some(holder) if holder == identity => return Decision::Renew,
        Some(_) => {}
    }
    let written = record.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let lasts = written.filter(|seconds| *seconds > 0).map_or(duration, Duration::from_secs);
    match lasts.checked_sub(now.saturating_duration_since(observed_at)) {
        None | Some(Duration::ZERO) => Decision::Acquire,
        Some(left) => Decision::Wait(left),
    }
}

/// The record of a lease that is ours. `taken`: it was not before.
fn held(before: LeaseSpec, identity: &str, duration: Duration, taken: bool, now: Timestamp) -> LeaseSpec {
    let transitions = before.lease_transitions.unwrap_or_default();
    // Its first holder takes it from nobody.
    let counts = taken && before.renew_time.is_some();
    LeaseSpec {
        holder_identity: Some(identity.to_owned()),
        lease_duration_seconds: Some(whole_seconds(duration)),
        lease_transitions: Some(if counts { transitions.saturating_add(1) } else { transitions }),
        acquire_time: if taken { Some(MicroTime(now)) } else { before.acquire_time.clone() },
        renew_time: Some(MicroTime(now)),
        ..before
    }
}

/// The record of a lease that is nobody's, as client-go writes it.
fn released(before: LeaseSpec, now: Timestamp) -> LeaseSpec {
    LeaseSpec {
        holder_identity: Some(String::new()),
        lease_duration_seconds: Some(1),
        acquire_time: Some(MicroTime(now)),
        renew_time: Some(MicroTime(now)),
        ..before
    }
}

/// Rounded up: others wait rather too long than too short.
fn whole_seconds(duration: Duration) -> i32 {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    i32::try_from(seconds.max(1)).unwrap_or(i32::MAX)
}

/// Up to a fifth of `of`, so that replicas do not ask in step.
fn jitter(of: Duration) -> Duration {
    of.mul_f64(0.2 * fastrand::f64())
}

fn parameters() -> PostParams {
    PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() }
}

/// The API's own message, without the whole status that `Display` adds.
fn brief(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} {}", status.code, status.message),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests;
