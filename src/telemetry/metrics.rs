//! Metrics in the OpenMetrics format; `docs/reference/metrics.md` has them all, in the words of their help. Labels are bounded: namespaces and names of
//! objects and so many hosts, never anything of images.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
        info::Info,
    },
    registry::Registry,
};

use crate::{api::v1alpha1::Summary, registry::Counters};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Object {
    namespace: String,
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Images {
    namespace: String,
    name: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConditionOf {
    namespace: String,
    name: String,
    r#type: &'static str,
    status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

/// The metrics of the operator.
pub struct Metrics {
    images: Family<Images, Gauge>,
    condition: Family<ConditionOf, Gauge>,
    sync_duration: Histogram,
    last_success: Family<Object, Gauge<f64, AtomicU64>>,
    queue_depth: Gauge,
    reconcile_errors: Family<ByReason, Counter>,
    leader: Gauge,
}

/// The condition types that are exported, and the statuses each may have.
const TYPES: [&str; 5] = ["Ready", "Reconciling", "Stalled", "CredentialsResolved", "TargetInSync"];
const STATUSES: [&str; 3] = ["True", "False", "Unknown"];
const STATES: [&str; 4] = ["synced", "pending", "failed", "skipped"];

impl Metrics {
    /// The metrics, and the registry to serve them from. `counters` are those of the client for registries.
    #[must_use]
    pub fn new(counters: &Arc<Counters>) -> (Self, Registry) {
        // From a no-op of few images to many large ones.
        let buckets = [0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 21600.0];
        let metrics = Self {
            images: Family::default(),
            condition: Family::default(),
            sync_duration: Histogram::new(buckets),
            last_success: Family::default(),
            queue_depth: Gauge::default(),
            reconcile_errors: Family::default(),
            leader: Gauge::default(),
        };
        let mut registry = Registry::with_prefix("imagemirror");
        registry.register(
            "images",
            "Images of an object by state: synced, pending, failed, skipped",
            metrics.images.clone(),
        );
        registry.register(
            "condition",
            "1 for the status that a condition of an object has, else 0",
            metrics.condition.clone(),
        );
        registry.register("sync_duration_seconds", "Runs by how long they took", metrics.sync_duration.clone());
        registry.register(
            "last_success_timestamp_seconds",
            "When the last run without a failure ended, in seconds since 1970",
            metrics.last_success.clone(),
        );
        registry.register("queue_depth", "Runs that wait for their turn", metrics.queue_depth.clone());
        registry.register("reconcile_errors", "Reconciles that failed", metrics.reconcile_errors.clone());
        registry.register("leader", "Whether this replica leads: 1, else 0", metrics.leader.clone());
        registry.register("build", "The running version", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        registry.register_collector(Box::new(OfRegistries(Arc::clone(counters))));
        (metrics, registry)
    }

    /// A status has been written.
    pub fn observe_status(&self, namespace: &str, name: &str, summary: &Summary, conditions: &[(&str, &str)]) {
        for state in STATES {
            let count = match state {
                "synced" => summary.synced,
                "pending" => summary.pending,
                "failed" => summary.failed,
                _ => summary.skipped,
            };
            let labels = Images { namespace: namespace.into(), name: name.into(), state };
            self.images.get_or_create(&labels).set(count);
        }
        for kind in TYPES {
            for status in STATUSES {
                let labels = ConditionOf { namespace: namespace.into(), name: name.into(), r#type: kind, status };
                let holds = conditions.contains(&(kind, status));
                self.condition.get_or_create(&labels).set(i64::from(holds));
            }
        }
    }

    /// A run has ended.
    pub fn observe_sync(&self, duration: Duration) {
        self.sync_duration.observe(duration.as_secs_f64());
    }

    /// The last run of an object ended without a failure.
    pub fn observe_success(&self, namespace: &str, name: &str, at: Timestamp) {
        let labels = Object { namespace: namespace.into(), name: name.into() };
        let seconds = at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64();
        self.last_success.get_or_create(&labels).set(seconds);
    }

    /// This replica knows nothing of the objects any more: another one leads.
    pub fn forget_all(&self) {
        self.images.clear();
        self.condition.clear();
        self.last_success.clear();
    }

    /// An object is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        for state in STATES {
            self.images.remove(&Images { namespace: namespace.into(), name: name.into(), state });
        }
        for kind in TYPES {
            for status in STATUSES {
                let labels = ConditionOf { namespace: namespace.into(), name: name.into(), r#type: kind, status };
                self.condition.remove(&labels);
            }
        }
        self.last_success.remove(&Object { namespace: namespace.into(), name: name.into() });
    }

    /// A reconcile has failed.
    pub fn reconcile_error(&self, reason: &'static str) {
        self.reconcile_errors.get_or_create(&ByReason { reason }).inc();
    }

    /// A run waits for its turn (1), or does so no more (-1).
    pub fn add_queued(&self, change: i64) {
        self.queue_depth.inc_by(change);
    }

    /// Whether this replica is the leader.
    pub fn set_leader(&self, is_leader: bool) {
        self.leader.set(i64::from(is_leader));
    }
}

/// What the client for registries has counted. It outlives leadership.
#[derive(Debug)]
struct OfRegistries(Arc<Counters>);

impl Collector for OfRegistries {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let hosts = self.0.hosts();
        let copied = self.0.copied().into_iter();
        let copied = copied
            .map(|((source, target), bytes)| (vec![("source_host", source), ("target_host", target)], counter(bytes)));
        family(&mut encoder, "copied_bytes", "Bytes of blobs sent to targets; hosts as images name them", copied)?;
        let blobs = self.0.blobs().into_iter();
        let blobs = blobs.map(|(result, blobs)| (vec![("result", result.to_owned())], counter(blobs)));
        family(
            &mut encoder,
            "blobs",
            "Blobs by how they came to targets: copied, mounted from another repository, present before",
            blobs,
        )?;
        let requests = hosts.iter().flat_map(|(host, of_host)| {
            of_host.requests().into_iter().map(|((method, code), count)| {
                let method = ("method", method.to_owned());
                (vec![("host", host.clone()), method, ("code", code.to_string())], counter(count))
            })
        });
        let help = "Requests to registries, token servers and where they redirect to; the code is the HTTP status (other for one \
                    that is not registered), or timeout, error (no connection, or one that broke), cancelled";
        family(&mut encoder, "registry_requests", help, requests)?;
        let throttled = hosts.iter().map(|(host, of_host)| {
            (vec![("host", host.clone())], ConstCounter::new(of_host.throttled().as_secs_f64()))
        });
        let help = "Time that requests have waited, added up over all of them: for a host that closed itself by 429 or \
                    Retry-After, or for a place within its limits";
        family(&mut encoder, "registry_throttled_seconds", help, throttled)?;
        let quotas = hosts.iter().filter_map(|(host, of_host)| {
            let left = i64::try_from(of_host.quota()?).unwrap_or(i64::MAX);
            Some((vec![("host", host.clone())], ConstGauge::new(left)))
        });
        family(
            &mut encoder,
            "rate_limit_remaining",
            "Requests that are left of a quota, as the host last said (RateLimit-Remaining of Docker Hub)",
            quotas,
        )
    }
}

fn counter(value: u64) -> ConstCounter<u64> {
    ConstCounter::new(value)
}

type Labels = Vec<(&'static str, String)>;

/// Writes a metric with its series. One without series keeps its name and help.
fn family<M: EncodeMetric + Default>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    series: impl Iterator<Item = (Labels, M)>,
) -> fmt::Result {
    let mut encoder = encoder.encode_descriptor(name, help, None, M::default().metric_type())?;
    for (labels, metric) in series {
        metric.encode(encoder.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn an_object_is_seen_and_forgotten() {
        let (metrics, registry) = Metrics::new(&Arc::default());
        let summary = Summary { total: 3, synced: 2, pending: 0, failed: 1, skipped: 0 };
        metrics.observe_status("n", "a", &summary, &[("Ready", "False")]);
        metrics.observe_sync(Duration::from_secs(1));
        metrics.observe_success("n", "a", Timestamp::UNIX_EPOCH);
        let seen = text(&registry);
        for line in [
            r#"imagemirror_images{namespace="n",name="a",state="failed"} 1"#,
            r#"imagemirror_condition{namespace="n",name="a",type="Ready",status="False"} 1"#,
            r#"imagemirror_condition{namespace="n",name="a",type="Ready",status="True"} 0"#,
            "imagemirror_sync_duration_seconds_sum 1.0",
            "imagemirror_build_info",
        ] {
            assert!(seen.contains(line), "{line} is not in\n{seen}");
        }
        metrics.forget("n", "a");
        assert!(!text(&registry).contains(r#"name="a""#));
    }
}
