//! Metrics in the OpenMetrics format. Labels are bounded: namespaces and names of objects, never of images.

use std::{sync::atomic::AtomicU64, time::Duration};

use jiff::Timestamp;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::Registry,
};

use crate::api::v1alpha1::Summary;

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
    copied_bytes: Counter,
    queue_depth: Gauge,
    reconcile_errors: Family<ByReason, Counter>,
    leader: Gauge,
}

/// The condition types that are exported, and the statuses each may have.
const TYPES: [&str; 5] = ["Ready", "Reconciling", "Stalled", "CredentialsResolved", "TargetInSync"];
const STATUSES: [&str; 3] = ["True", "False", "Unknown"];
const STATES: [&str; 4] = ["synced", "pending", "failed", "skipped"];

impl Metrics {
    /// The metrics, and the registry to serve them from.
    #[must_use]
    pub fn new() -> (Self, Registry) {
        // From a no-op of few images to many large ones.
        let buckets = [0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 21600.0];
        let metrics = Self {
            images: Family::default(),
            condition: Family::default(),
            sync_duration: Histogram::new(buckets),
            last_success: Family::default(),
            copied_bytes: Counter::default(),
            queue_depth: Gauge::default(),
            reconcile_errors: Family::default(),
            leader: Gauge::default(),
        };
        let mut registry = Registry::with_prefix("imagemirror");
        registry.register("images", "Images of an object by state", metrics.images.clone());
        registry.register(
            "condition",
            "Conditions of an object, 1 for the status that holds",
            metrics.condition.clone(),
        );
        registry.register("sync_duration_seconds", "Duration of runs", metrics.sync_duration.clone());
        registry.register(
            "last_success_timestamp_seconds",
            "When the last run without a failure ended, in seconds since 1970",
            metrics.last_success.clone(),
        );
        registry.register("copied_bytes", "Bytes of blobs sent to targets", metrics.copied_bytes.clone());
        registry.register("queue_depth", "Runs that wait for their turn", metrics.queue_depth.clone());
        registry.register("reconcile_errors", "Reconciles that failed, by reason", metrics.reconcile_errors.clone());
        registry.register("leader", "Whether this replica is the leader", metrics.leader.clone());
        registry.register("build", "The running version", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
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
    pub fn observe_sync(&self, duration: Duration, bytes_copied: u64) {
        self.sync_duration.observe(duration.as_secs_f64());
        self.copied_bytes.inc_by(bytes_copied);
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
        let (metrics, registry) = Metrics::new();
        let summary = Summary { total: 3, synced: 2, pending: 0, failed: 1, skipped: 0 };
        metrics.observe_status("n", "a", &summary, &[("Ready", "False")]);
        metrics.observe_sync(Duration::from_secs(1), 7);
        metrics.observe_success("n", "a", Timestamp::UNIX_EPOCH);
        let seen = text(&registry);
        for line in [
            r#"imagemirror_images{namespace="n",name="a",state="failed"} 1"#,
            r#"imagemirror_condition{namespace="n",name="a",type="Ready",status="False"} 1"#,
            r#"imagemirror_condition{namespace="n",name="a",type="Ready",status="True"} 0"#,
            "imagemirror_copied_bytes_total 7",
            "imagemirror_build_info",
        ] {
            assert!(seen.contains(line), "{line} is not in\n{seen}");
        }
        metrics.forget("n", "a");
        assert!(!text(&registry).contains(r#"name="a""#));
    }
}
