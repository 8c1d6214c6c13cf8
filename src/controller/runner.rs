//! Runs in the background: at most one for each object, at most so many at a time, each with an owner that waits for
//! it. A run that ends leaves its outcome here and wakes its object.

use std::{
    collections::{HashMap, HashSet},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use super::{context::Identity, turns::Turns};
use crate::{
    api::ImageMirror,
    copy::{Fence, Progress, ProgressSnapshot, Totals},
    mirror::{Prepared, Problem},
    oci::Digest,
    reason::{Reason, Retry},
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
    slots: Mutex<Slots>,
    turns: Turns,
    registry: registry::Client,
    fence: Fence,
    wake: mpsc::Sender<ObjectRef<ImageMirror>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    metrics: Arc<Metrics>,
}

/// The objects that have had a run, and those that are gone for good: a uid never comes back.
#[derive(Default)]
struct Slots {
    live: HashMap<String, Slot>,
    gone: HashSet<String>,
}

/// Objects that were deleted long ago are not reconciled any more.
const MAX_GONE: usize = 4096;

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
    token: Option<String>,
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
    /// When what is attached to the images was last looked at, once this run has ended.
    pub(super) attached: Timestamp,
    /// The outcome that this run completes, and which of what failed there it covers.
    pub(super) completes: Option<(Arc<Ended>, Retry)>,
}

/// A run that has ended by itself.
pub(super) struct Ended {
    pub(super) spec_hash: String,
    pub(super) generation: i64,
    pub(super) token: Option<String>,
    pub(super) report: SyncReport,
    pub(super) problems: Vec<Problem>,
    pub(super) fingerprint: Digest,
    pub(super) times: Times,
}

/// When images were last looked at, which retries of single ones do not change for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Times {
    /// All of them.
    pub(super) all: Timestamp,
    /// Those that a registry or a Secret kept us from.
    pub(super) authentication: Timestamp,
    /// What is attached to all of them.
    pub(super) attached: Timestamp,
}

/// A run as it is seen from outside.
pub(super) struct View {
    pub(super) spec_hash: String,
    /// The token that it answers.
    pub(super) token: Option<String>,
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
            turns: Turns::new(runs),
            registry,
            fence,
            wake,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            metrics,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Starts a run, unless one is there already.
    pub(super) fn start(&self, job: Job) {
        let cancel = self.inner.stop.child_token();
        let progress = Arc::new(Progress::default());
        let number = fastrand::u64(..);
        {
            let mut slots = self.slots();
            // The object may have been deleted, or the lease lost, while its Secrets were read.
            if self.inner.stop.is_cancelled() || slots.gone.contains(&job.id.uid) {
                return;
            }
            let slot = slots.live.entry(job.id.uid.clone()).or_default();
            if slot.current.is_some() {
                return;
            }
            slot.current = Some(Current {
                number,
                cancel: cancel.clone(),
                spec_hash: job.spec_hash.clone(),
                token: job.token.clone(),
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
        let Job { id, spec_hash, generation, token, prepared, attached, completes } = job;
        let Prepared { request, registries, problems, fingerprint } = prepared;
        self.inner.metrics.add_queued(1);
        let turn = cancel.run_until_cancelled(self.inner.turns.take(&id.namespace)).await;
        self.inner.metrics.add_queued(-1);
        let _turn = turn??;
        let started_at = Timestamp::now();
        let sync = sync(&self.inner.registry, &request, &registries, self.inner.fence.clone(), progress, cancel);
        let report = match AssertUnwindSafe(sync).catch_unwind().await {
            Ok(report) => report?,
            Err(_) => {
                tracing::error!("a run panicked");
                let message = "the run ended by a fault of ImageMirror; its log has the place";
                let images = request.images.iter().map(|image| ImageReport {
                    failure: Some(Failure::new(Reason::InternalError, message)),
                    ..ImageReport::of(image, &registries.target)
                });
                let images = images.collect();
                SyncReport { started_at, finished_at: Timestamp::now(), images, totals: Totals::default() }
            }
        };
        let now = report.finished_at;
        let (report, times) = match completes {
            None => (report, Times { all: now, authentication: now, attached }),
            Some((earlier, retry)) => {
                let authentication = if retry == Retry::Authentication { now } else { earlier.times.authentication };
                (report.completing(&earlier.report), Times { authentication, ..earlier.times })
            }
        };
        Some(Ended { spec_hash, generation, token, report, problems, fingerprint, times })
    }

    fn finish(&self, uid: &str, number: u64, ended: Option<Ended>) {
        let mut slots = self.slots();
        let Some(slot) = slots.live.get_mut(uid) else { return };
        if slot.current.as_ref().is_some_and(|current| current.number == number) {
            slot.current = None;
            slot.ended = ended.map(Arc::new).or_else(|| slot.ended.take());
        }
    }

    /// The run of an object, if there is one.
    pub(super) fn view(&self, uid: &str) -> Option<View> {
        let slots = self.slots();
        let current = slots.live.get(uid)?.current.as_ref()?;
        Some(View {
            spec_hash: current.spec_hash.clone(),
            token: current.token.clone(),
            cancelled: current.cancel.is_cancelled(),
            since: current.since.elapsed(),
            progress: current.progress.snapshot(),
        })
    }

    /// The outcome of an object's last run, as long as it has not been [acknowledged](Self::acknowledge).
    pub(super) fn ended(&self, uid: &str) -> Option<Arc<Ended>> {
        self.slots().live.get(uid)?.ended.clone()
    }

    /// The outcome has been written to the object.
    pub(super) fn acknowledge(&self, uid: &str) {
        if let Some(slot) = self.slots().live.get_mut(uid)
            && let Some(ended) = slot.ended.take()
        {
            slot.last = Some(ended);
        }
    }

    /// The last outcome that was acknowledged.
    pub(super) fn last(&self, uid: &str) -> Option<Arc<Ended>> {
        self.slots().live.get(uid)?.last.clone()
    }

    /// Cancels the run of an object. It wakes its object when it has ended.
    pub(super) fn cancel(&self, uid: &str) {
        if let Some(current) = self.slots().live.get(uid).and_then(|slot| slot.current.as_ref()) {
            current.cancel.cancel();
        }
    }

    /// Cancels the run of an object that is gone, and forgets the object.
    pub(super) fn forget(&self, uid: &str) {
        let mut slots = self.slots();
        if slots.gone.len() >= MAX_GONE {
            slots.gone.clear();
        }
        slots.gone.insert(uid.to_owned());
        if let Some(current) = slots.live.remove(uid).and_then(|slot| slot.current) {
            current.cancel.cancel();
        }
    }

    /// Cancels all runs for good, and waits for them to give up what they opened, at most so long.
    pub(super) async fn stop(&self, patience: Duration) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        if timeout(patience, self.inner.tasks.wait()).await.is_err() {
            tracing::warn!("runs were still ending when the time for it was over");
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
