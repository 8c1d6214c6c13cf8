//! What is known of one registry, shared by all its repositories: how it wants to be logged in to, and what it has
//! turned out to do and not to do. Learned from its answers, kept as long as the process runs.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU8, Ordering},
};

use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};

use super::quirks::{Quirks, UploadStrategy};
use crate::auth::Challenge;

/// What is known of one registry.
pub(super) struct Known {
    first: AsyncMutex<()>,
    asked: Mutex<Option<Vec<Challenge>>>,
    strategy: Mutex<UploadStrategy>,
    /// Taking a blob from another repository works, or has not been refused.
    mounts: AtomicBool,
    /// Naming the target repository as the place to mount from tells whether it has the blob, or has not failed to.
    self_mounts: AtomicBool,
    /// An upload that broke can be continued, or has not turned out to be thrown away.
    resumes: AtomicBool,
    /// Blobs that were lost when they came whole with the end of their upload, and taken when they came before it; since one
    /// was last taken whole.
    lost_whole: AtomicU8,
    /// The referrers API is there, or is not; `None` as long as nobody has asked.
    referrers: Mutex<Option<bool>>,
    first_referrers: AsyncMutex<()>,
    /// 403 may mean that a manifest is not there.
    absent_is_forbidden: bool,
    /// Somebody has said so who should know.
    is_told: bool,
    /// It did not say of what it took that it lists it under its subject.
    ignores_subjects: AtomicBool,
}

impl Known {
    pub(super) fn new(quirks: &Quirks) -> Self {
        Self {
            first: AsyncMutex::default(),
            asked: Mutex::default(),
            strategy: Mutex::new(quirks.upload),
            mounts: AtomicBool::new(quirks.mounts),
            self_mounts: AtomicBool::new(quirks.mounts),
            resumes: AtomicBool::new(quirks.resumes_uploads),
            lost_whole: AtomicU8::new(0),
            referrers: Mutex::new(quirks.referrers_api),
            first_referrers: AsyncMutex::default(),
            absent_is_forbidden: quirks.absent_is_forbidden,
            is_told: quirks.referrers_api.is_some(),
            ignores_subjects: AtomicBool::new(false),
        }
    }

    /// Lets one request go ahead where nothing is known yet, so that many at once cost one 401. `None`: go ahead all.
    pub(super) async fn first_contact(&self) -> Option<AsyncMutexGuard<'_, ()>> {
        if self.asked().is_some() {
            return None;
        }
        let guard = self.first.lock().await;
        if self.asked().is_some() { None } else { Some(guard) }
    }

    /// What the registry asks for.
    pub(super) fn challenges(&self) -> Vec<Challenge> {
        self.asked().clone().unwrap_or_default()
    }

    /// There has been an exchange, which may have ended before the registry asked for anything.
    pub(super) fn contacted(&self) {
        self.asked().get_or_insert_default();
    }

    /// The registry has asked for this. True if that is news.
    pub(super) fn learn(&self, challenges: Vec<Challenge>) -> bool {
        let mut asked = self.asked();
        let is_news = !challenges.is_empty() && asked.as_ref() != Some(&challenges);
        if is_news {
            *asked = Some(challenges);
        }
        is_news
    }

    /// Whether a blob can be taken from another repository, as far as is known.
    pub(super) fn mounts(&self) -> bool {
        self.mounts.load(Ordering::Relaxed)
    }

    /// Mounting from another repository has been refused and is not tried again.
    pub(super) fn mounts_refused(&self) {
        self.mounts.store(false, Ordering::Relaxed);
    }

    /// Whether the request that opens an upload also tells that the blob is there.
    pub(super) fn self_mounts(&self) -> bool {
        self.self_mounts.load(Ordering::Relaxed)
    }

    /// It was there and the registry opened an upload all the same, or it refused the form of the request.
    pub(super) fn self_mounts_useless(&self) {
        self.self_mounts.store(false, Ordering::Relaxed);
    }

    /// How blobs are sent.
    pub(super) fn strategy(&self) -> UploadStrategy {
        *self.strategy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registry did not take a blob that was sent as `tried`. False if there is no other way to try.
    pub(super) fn strategy_refused(&self, tried: UploadStrategy) -> bool {
        let mut strategy = self.strategy.lock().unwrap_or_else(PoisonError::into_inner);
        // Another blob may have taught it meanwhile.
        if *strategy != tried {
            return true;
        }
        let Some(next) = tried.after_refusal() else { return false };
        *strategy = next;
        true
    }

    /// Whether blobs are sent before the end of their uploads, be they ever so small.
    pub(super) fn loses_whole(&self) -> bool {
        self.lost_whole.load(Ordering::Relaxed) >= Self::LOST_ENOUGH
    }

    /// It took a blob with the end of its upload.
    pub(super) fn took_whole(&self) {
        self.lost_whole.store(0, Ordering::Relaxed);
    }

    /// It lost a blob so, and took it before the end. One loss is an accident.
    pub(super) fn lost_whole(&self) {
        let more = |lost: u8| Some(lost.saturating_add(1));
        let _ = self.lost_whole.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    const LOST_ENOUGH: u8 = 3;

    /// Whether an upload that broke is worth asking about.
    pub(super) fn resumes(&self) -> bool {
        self.resumes.load(Ordering::Relaxed)
    }

    /// What had arrived of an upload was thrown away.
    pub(super) fn does_not_resume(&self) {
        self.resumes.store(false, Ordering::Relaxed);
    }

    /// Whether there is a referrers API; `None` if nobody has asked yet.
    pub(super) fn referrers_api(&self) -> Option<bool> {
        *self.referrers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether 403 may mean that a manifest is not there.
    pub(super) fn absent_is_forbidden(&self) -> bool {
        self.absent_is_forbidden
    }

    /// Lets one request find out whether there is a referrers API. `None`: it is known.
    pub(super) async fn first_referrers(&self) -> Option<AsyncMutexGuard<'_, ()>> {
        if self.referrers_api().is_some() {
            return None;
        }
        let guard = self.first_referrers.lock().await;
        if self.referrers_api().is_some() { None } else { Some(guard) }
    }

    /// There is a referrers API, or there is none.
    pub(super) fn learn_referrers_api(&self, exists: bool) {
        *self.referrers.lock().unwrap_or_else(PoisonError::into_inner) = Some(exists);
    }

    /// The registry has taken something that has a subject, and lists it under that or does not say so. An API that
    /// answers is not enough: what it does not list has to be found by a tag (distribution-spec, "Pushing Manifests with
    /// Subject").
    pub(super) fn took_with_subject(&self, is_listed: bool) {
        self.referrers.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(is_listed);
        self.ignores_subjects.store(!is_listed && !self.is_told, Ordering::Relaxed);
    }

    /// Whether the registry did not say of what it took last that it lists it under its subject.
    pub(super) fn ignores_subjects(&self) -> bool {
        self.ignores_subjects.load(Ordering::Relaxed)
    }

    fn asked(&self) -> MutexGuard<'_, Option<Vec<Challenge>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
