//! Runs in the background: at most one for each object, at most so many at a time, each with an owner that waits for
//! it. A run that ends leaves its outcome here and wakes its object.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use super::context::Identity;
use crate::{
    api::ImageMirror,
    copy::{Fence, Progress, ProgressSnapshot, Totals},
    mirror::{Prepared, Problem},
    oci::Digest,
    reason::Reason,
    registry,
    sync::{Failure, ImageReport, SyncReport, sync},
    telemetry::metrics::Metrics,
};

/// The runs of the process.
#[derive(Clone)]
pub(super) struct Runner {
    inner: Arc<Inner>,
}

struct Inner {
    slots: Mutex<HashMap<String, Slot>>,
    permits: Semaphore,
    registry: registry::Client,
    fence: Fence,
    wake: mpsc::Sender<ObjectRef<ImageMirror>>,
    tasks: TaskTracker,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Slot {
    current: Option<Current>,
    ended: Option<Arc<Ended>>,
    last: Option<Arc<Ended>>,
}

struct Current {
    number: u64,
    cancel: CancellationToken,
    spec_hash: String,
    progress: Arc<Progress>,
    since: Instant,
}

/// A run to start.
pub(super) struct Job {
    pub(super) id: Identity,
    pub(super) spec_hash: String,
    pub(super) generation: i64,
    pub(super) token: Option<String>,
    pub(super) prepared: Prepared,
    /// The outcome that this run completes, if it covers only what failed there.
    pub(super) completes: Option<Arc<Ended>>,
}

/// A run that has ended by itself.
pub(super) struct Ended {
    pub(super) spec_hash: String,
    pub(super) generation: i64,
    pub(super) token: Option<String>,
    pub(super) report: SyncReport,
    pub(super) problems: Vec<Problem>,
    pub(super) fingerprint: Digest,
}

/// A run as it is seen from outside.
pub(super) struct View {
    pub(super) spec_hash: String,
    pub(super) cancelled: bool,
    pub(super) since: Duration,
    pub(super) progress: ProgressSnapshot,
}

impl Runner {
    pub(super) fn new(
        runs: usize,
        registry: registry::Client,
        fence: Fence,
        wake: mpsc::Sender<ObjectRef<ImageMirror>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let inner = Inner {
            slots: Mutex::default(),
            permits: Semaphore::new(runs),
            registry,
            fence,
            wake,
            tasks: TaskTracker::new(),
            metrics,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Starts a run, unless one is there already.
    pub(super) fn start(&self, job: Job) {
        let cancel = CancellationToken::new();
        let progress = Arc::new(Progress::default());
        let number = fastrand::u64(..);
        {
            let mut slots = self.slots();
            let slot = slots.entry(job.id.uid.clone()).or_default();
            if slot.current.is_some() {
                return;
            }
            slot.current = Some(Current {
                number,
                cancel: cancel.clone(),
                spec_hash: job.spec_hash.clone(),
                progress: Arc::clone(&progress),
                since: Instant::now(),
            });
        }
        let this = self.clone();
        let span = tracing::info_span!(
            "run", namespace = %job.id.namespace, name = %job.id.name, id = %format_args!("{number:016x}")
        );
        let task = async move {
            let object = ObjectRef::new(&job.id.name).within(&job.id.namespace);
            let uid = job.id.uid.clone();
            let ended = this.run(job, progress, &cancel).await;
            this.finish(&uid, number, ended);
            // The receiver is gone only when the operator stops.
            let _ = this.inner.wake.send(object).await;
        };
        self.inner.tasks.spawn(task.instrument(span));
    }

    async fn run(&self, job: Job, progress: Arc<Progress>, cancel: &CancellationToken) -> Option<Ended> {
        let Job { spec_hash, generation, token, prepared, completes, .. } = job;
        let Prepared { request, registries, problems, fingerprint } = prepared;
        self.inner.metrics.add_queued(1);
        let permit = cancel.run_until_cancelled(self.inner.permits.acquire()).await;
        self.inner.metrics.add_queued(-1);
        let _permit = permit?.ok()?;
        let started_at = Timestamp::now();
        let sync = sync(&self.inner.registry, &request, &registries, self.inner.fence.clone(), progress, cancel);
        let report = match AssertUnwindSafe(sync).catch_unwind().await {
            Ok(report) => report?,
            Err(_) => {
                tracing::error!("a run panicked");
                let images = request.images.iter().map(|image| ImageReport {
                    source: format!("{}/{}", image.source.host, image.source.repository),
                    tag: image.source.tag.as_ref().map(ToString::to_string).unwrap_or_default(),
                    target: format!("{}/{}:{}", registries.target.host, image.target_repository, image.target_tag),
                    digest: None,
                    action: None,
                    failure: Some(Failure {
                        reason: Reason::InternalError,
                        message: "the run ended by a fault of ImageMirror; its log has the place".into(),
                    }),
                });
                let images = images.collect();
                SyncReport { started_at, finished_at: Timestamp::now(), images, totals: Totals::default() }
            }
        };
        let report = match completes {
            Some(earlier) => report.completing(&earlier.report),
            None => report,
        };
        Some(Ended { spec_hash, generation, token, report, problems, fingerprint })
    }

    fn finish(&self, uid: &str, number: u64, ended: Option<Ended>) {
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(uid) else { return };
        if slot.current.as_ref().is_some_and(|current| current.number == number) {
            slot.current = None;
            slot.ended = ended.map(Arc::new).or_else(|| slot.ended.take());
        }
    }

    /// The run of an object, if there is one.
    pub(super) fn view(&self, uid: &str) -> Option<View> {
        let slots = self.slots();
        let current = slots.get(uid)?.current.as_ref()?;
        Some(View {
            spec_hash: current.spec_hash.clone(),
            cancelled: current.cancel.is_cancelled(),
            since: current.since.elapsed(),
            progress: current.progress.snapshot(),
        })
    }

    /// The outcome of an object's last run, as long as it has not been [acknowledged](Self::acknowledge).
    pub(super) fn ended(&self, uid: &str) -> Option<Arc<Ended>> {
        self.slots().get(uid)?.ended.clone()
    }

    /// The outcome has been written to the object.
    pub(super) fn acknowledge(&self, uid: &str) {
        if let Some(slot) = self.slots().get_mut(uid)
            && let Some(ended) = slot.ended.take()
        {
            slot.last = Some(ended);
        }
    }

    /// The last outcome that was acknowledged.
    pub(super) fn last(&self, uid: &str) -> Option<Arc<Ended>> {
        self.slots().get(uid)?.last.clone()
    }

    /// Cancels the run of an object. It wakes its object when it has ended.
    pub(super) fn cancel(&self, uid: &str) {
        if let Some(current) = self.slots().get(uid).and_then(|slot| slot.current.as_ref()) {
            current.cancel.cancel();
        }
    }

    /// Cancels the run of an object that is gone, and forgets the object.
    pub(super) fn forget(&self, uid: &str) {
        if let Some(current) = self.slots().remove(uid).and_then(|slot| slot.current) {
            current.cancel.cancel();
        }
    }

    /// Cancels all runs and waits for them to give up what they opened, at most so long.
    pub(super) async fn stop(&self, patience: Duration) {
        for slot in self.slots().values() {
            if let Some(current) = &slot.current {
                current.cancel.cancel();
            }
        }
        self.inner.tasks.close();
        if timeout(patience, self.inner.tasks.wait()).await.is_err() {
            tracing::warn!("runs were still ending when the time for it was over");
        }
        self.inner.tasks.reopen();
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
