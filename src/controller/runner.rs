//! Runs in the background: at most one for each object, at most so many at a time, each with an owner that waits for
//! it. A run that ends leaves its outcome here and wakes its object.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use super::{
    claims::{Claims, Scope},
    context::Identity,
    turns::Turns,
};
use crate::{
    api::ImageMirror,
    config::Config,
    copy::{Fence, Progress, ProgressSnapshot, Totals},
    mirror::{Prepared, Problem},
    oci::Digest,
    plan::Action,
    reason::{Reason, Retry},
    registry,
    sync::{Destination, Failure, ImageReport, SyncReport, SyncRequest, choose, sync},
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
    claims: Claims,
    /// How long a restored tag is remembered.
    restore_window: Duration,
}

/// The objects that have had a run, and those that are gone for good: a uid never comes back.
#[derive(Default)]
struct Slots {
    live: HashMap<String, Slot>,
    gone: HashSet<String>,
}

/// A tag that was restored so often within the window is left to whoever else writes it.
const MAX_RESTORES: usize = 3;
/// Objects that were deleted long ago are not reconciled any more.
const MAX_GONE: usize = 4096;

#[derive(Default)]
struct Slot {
    current: Option<Current>,
    ended: Option<Arc<Ended>>,
    last: Option<Arc<Ended>>,
    /// When which target tag was restored from what others had written there.
    restores: HashMap<String, Vec<Instant>>,
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
    pub(super) reread: Reread,
    /// When what is attached to the images was last looked at, once this run has ended.
    pub(super) attached: Timestamp,
    /// The outcome that this run completes, and what of it is due.
    pub(super) completes: Option<Completes>,
}

/// Reads the Secrets again and prepares the run with them, if they say something else than before.
pub(super) type Reread = Box<dyn FnOnce() -> BoxFuture<'static, Option<Prepared>> + Send + Sync>;

/// A run of what failed in an earlier one.
pub(super) struct Completes {
    /// The outcome that it completes.
    pub(super) earlier: Arc<Ended>,
    /// Which of what failed there it covers.
    pub(super) retry: Retry,
    /// The same by their targets; those of repositories are of all images that are chosen there.
    pub(super) due: BTreeSet<String>,
}

/// Whether a target tag is among what is due.
fn is_due(due: &BTreeSet<String>, target: &str) -> bool {
    let repository = target.rsplit_once(':').map_or(target, |(repository, _)| repository);
    due.contains(target) || due.contains(repository)
}

/// Whether any tag of a repository at the target is.
fn is_any_due(due: &BTreeSet<String>, repository: &str) -> bool {
    due.iter().any(|due| due == repository || due.rsplit_once(':').is_some_and(|(due, _)| due == repository))
}

/// A run that has ended by itself.
pub(super) struct Ended {
    pub(super) number: u64,
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

/// What every line of a run's log carries, whatever the level.
pub(super) fn run_span(id: &Identity, number: u64) -> tracing::Span {
    tracing::error_span!("run", object = %id, run = %format_args!("{number:016x}"))
}

impl Runner {
    pub(super) fn new(
        config: &Config,
        registry: registry::Client,
        fence: Fence,
        wake: mpsc::Sender<ObjectRef<ImageMirror>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let inner = Inner {
            slots: Mutex::default(),
            turns: Turns::new(config.limits.runs),
            registry,
            fence,
            wake,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            metrics,
            claims: Claims::new(),
            restore_window: config.timing.restore_window,
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
        let span = run_span(&job.id, number);
        let task = async move {
            let object = ObjectRef::new(&job.id.name).within(&job.id.namespace);
            let uid = job.id.uid.clone();
            let ended = this.run(job, number, progress, &cancel).await;
            this.finish(&uid, number, ended);
            // The receiver is gone only when the operator stops.
            let _ = this.inner.wake.send(object).await;
        };
        self.inner.tasks.spawn(task.instrument(span));
    }

    async fn run(
        &self,
        mut job: Job,
        number: u64,
        progress: Arc<Progress>,
        cancel: &CancellationToken,
    ) -> Option<Ended> {
        self.inner.metrics.add_queued(1);
        let turn = cancel.run_until_cancelled(self.inner.turns.take(&job.id.namespace)).await;
        self.inner.metrics.add_queued(-1);
        let _turn = turn??;
        let started_at = Timestamp::now();
        let report = match AssertUnwindSafe(self.carry_out(&mut job, progress, cancel)).catch_unwind().await {
            Ok(report) => report?,
            Err(_) => {
                tracing::error!("a run panicked");
                let message = "the run ended by a fault of ImageMirror; its log has the place";
                let prepared = &job.prepared;
                let images = prepared.request.images.iter().map(|image| ImageReport {
                    failure: Some(Failure::new(Reason::InternalError, message)),
                    ..ImageReport::of(image, &prepared.registries.target)
                });
                let images = images.collect();
                SyncReport { started_at, finished_at: Timestamp::now(), images, totals: Totals::default() }
            }
        };
        self.remember_restores(&job.id.uid, &report);
        let now = report.finished_at;
        let (report, times) = match &job.completes {
            None => (report, Times { all: now, authentication: now, attached: job.attached }),
            Some(Completes { earlier, retry, due }) => {
                let authentication = if *retry == Retry::Authentication { now } else { earlier.times.authentication };
                (report.completing(&earlier.report, due), Times { authentication, ..earlier.times })
            }
        };
        let Job { spec_hash, generation, token, prepared: Prepared { problems, fingerprint, .. }, .. } = job;
        Some(Ended { number, spec_hash, generation, token, report, problems, fingerprint, times })
    }

    /// Brings the images in step; those that a registry refused once more, if their credentials have been replaced.
    async fn carry_out(
        &self,
        job: &mut Job,
        progress: Arc<Progress>,
        cancel: &CancellationToken,
    ) -> Option<SyncReport> {
        let began = Instant::now();
        let due = job.completes.as_ref().map(|completes| &completes.due);
        let report = self.pass(&job.id.uid, &job.prepared, due, Arc::clone(&progress), cancel).await?;
        let refused = report.failed().filter(|(_, failure)| failure.reason == Reason::AuthenticationFailed);
        let refused: BTreeSet<String> = refused.map(|(image, _)| image.target.clone()).collect();
        if refused.is_empty() {
            return Some(report);
        }
        let reread = std::mem::replace(&mut job.reread, Box::new(|| std::future::ready(None).boxed()));
        let Some(mut prepared) = cancel.run_until_cancelled(reread()).await? else { return Some(report) };
        tracing::info!(images = refused.len(), "Secrets have changed: what was refused is tried again");
        progress.images_again(refused.len() as u64);
        prepared.request.timeout = prepared.request.timeout.saturating_sub(began.elapsed());
        let again = self.pass(&job.id.uid, &prepared, Some(&refused), progress, cancel).await?;
        job.prepared = prepared;
        Some(report.followed_by(again, &refused))
    }

    /// Chooses the images, or those that are due, gives up those that another object keeps, and brings the rest in step.
    async fn pass(
        &self,
        uid: &str,
        prepared: &Prepared,
        due: Option<&BTreeSet<String>>,
        progress: Arc<Progress>,
        cancel: &CancellationToken,
    ) -> Option<SyncReport> {
        let Prepared { request, selections, registries, .. } = prepared;
        let (client, target) = (&self.inner.registry, &registries.target);
        let mut selections = selections.clone();
        if let Some(due) = due {
            selections.retain(|selection| is_any_due(due, &selection.target_of(registries)));
        }
        let mut request = choose(client, request.clone(), &selections, registries, cancel).await?;
        let scope = if due.is_some() { Scope::Some } else { Scope::All };
        if let Some(due) = due {
            request.images.retain(|image| is_due(due, &target.target_of(image)));
        }
        cancel.run_until_cancelled(self.inner.claims.known()).await?;
        self.inner.claims.settle(uid, &mut request, target, scope);
        self.mark_contested(uid, &mut request, target);
        sync(client, &request, registries, self.inner.fence.clone(), progress, cancel).await
    }

    /// Which object wants which target tag.
    pub(super) fn claims(&self) -> &Claims {
        &self.inner.claims
    }

    fn mark_contested(&self, uid: &str, request: &mut SyncRequest, target: &Destination) {
        let slots = self.slots();
        let Some(slot) = slots.live.get(uid).filter(|slot| !slot.restores.is_empty()) else { return };
        for image in &mut request.images {
            let restores = slot.restores.get(&target.target_of(image)).map(Vec::as_slice).unwrap_or_default();
            let recent = restores.iter().filter(|at| at.elapsed() < self.inner.restore_window).count();
            image.is_contested = recent >= MAX_RESTORES;
        }
    }

    fn remember_restores(&self, uid: &str, report: &SyncReport) {
        let mut slots = self.slots();
        let Some(slot) = slots.live.get_mut(uid) else { return };
        for image in &report.images {
            if image.action != Some(Action::Restore) || image.replaced.is_none() {
                continue;
            }
            let restores = slot.restores.entry(image.target.clone()).or_default();
            restores.retain(|at| at.elapsed() < self.inner.restore_window);
            restores.push(Instant::now());
        }
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
        self.inner.claims.forget(uid);
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
