//! What the copies of one sync share: which digests are where, memory for small blobs, open sessions, progress.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::OnceCell, time::timeout};

use super::Fence;
use crate::{
    oci::Digest,
    registry::{Repository, Upload},
};

/// All manifests of a run that are in memory at one time.
const MAX_MANIFEST_BYTES: u64 = 32 << 20;
/// Cancelling sessions is best effort and never holds up the end of a run.
const CLEAN_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// A digest in a repository, named by host and path.
type Place = (String, Digest);
/// Set once the digest is there.
type Cell = Arc<OnceCell<()>>;

/// What the copies of one sync share.
pub struct Run {
    progress: Arc<Progress>,
    fence: Fence,
    done: Mutex<HashMap<Place, Cell>>,
    manifest_bytes: AtomicU64,
    abandoned: Mutex<Vec<Upload>>,
    bytes_copied: AtomicU64,
    blobs_copied: AtomicU64,
    blobs_mounted: AtomicU64,
    blobs_present: AtomicU64,
}

/// How far a run is. Written by the engine, read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    bytes_done: AtomicU64,
    bytes_total: AtomicU64,
    images_done: AtomicU64,
    images_total: AtomicU64,
}

/// How far a run was when it was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgressSnapshot {
    /// Bytes that are at the target or need not be sent.
    pub bytes_done: u64,
    /// Bytes of all blobs found so far.
    pub bytes_total: u64,
    /// Images finished, well or not.
    pub images_done: u64,
    /// Images of the run.
    pub images_total: u64,
}

/// What a run moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Bytes of blobs sent to the target.
    pub bytes_copied: u64,
    /// Blobs sent to the target.
    pub blobs_copied: u64,
    /// Blobs that the target took from another of its repositories.
    pub blobs_mounted: u64,
    /// Blobs that the target had.
    pub blobs_present: u64,
}

impl Progress {
    /// How far the run is now.
    #[must_use]
    pub fn snapshot(&self) -> ProgressSnapshot {
        ProgressSnapshot {
            bytes_done: self.bytes_done.load(Ordering::Relaxed),
            bytes_total: self.bytes_total.load(Ordering::Relaxed),
            images_done: self.images_done.load(Ordering::Relaxed),
            images_total: self.images_total.load(Ordering::Relaxed),
        }
    }

    pub(super) fn found(&self, bytes: u64) {
        self.bytes_total.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn moved(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that have to be sent again.
    pub(super) fn lost(&self, bytes: u64) {
        self.bytes_done.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// How many images there are.
    pub fn expect_images(&self, count: u64) {
        self.images_total.store(count, Ordering::Relaxed);
    }

    /// One image is finished.
    pub fn image_done(&self) {
        self.images_done.fetch_add(1, Ordering::Relaxed);
    }
}

impl Run {
    /// A run that reports to `progress` and writes tags while `fence` allows it.
    #[must_use]
    pub fn new(progress: Arc<Progress>, fence: Fence) -> Self {
        Self {
            progress,
            fence,
            done: Mutex::default(),
            manifest_bytes: AtomicU64::new(0),
            abandoned: Mutex::default(),
            bytes_copied: AtomicU64::new(0),
            blobs_copied: AtomicU64::new(0),
            blobs_mounted: AtomicU64::new(0),
            blobs_present: AtomicU64::new(0),
        }
    }

    /// What has been moved so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            bytes_copied: self.bytes_copied.load(Ordering::Relaxed),
            blobs_copied: self.blobs_copied.load(Ordering::Relaxed),
            blobs_mounted: self.blobs_mounted.load(Ordering::Relaxed),
            blobs_present: self.blobs_present.load(Ordering::Relaxed),
        }
    }

    /// Cancels the upload sessions that were left open by copies that failed or were dropped.
    pub async fn clean_up(&self) {
        let abandoned = std::mem::take(&mut *self.abandoned.lock().unwrap_or_else(PoisonError::into_inner));
        let cancels = futures::future::join_all(abandoned.iter().map(Upload::cancel));
        let _ = timeout(CLEAN_UP_TIMEOUT, cancels).await;
    }

    pub(super) fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    pub(super) fn fence(&self) -> &Fence {
        &self.fence
    }

    /// The cell that is set once this digest is in this repository. Who finds it empty fills it; who waits takes over
    /// with its own source when that fails.
    pub(super) fn cell(&self, target: &Repository, digest: &Digest) -> Cell {
        let key = (format!("{}/{}", target.host(), target.name()), digest.clone());
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(done.entry(key).or_default())
    }

    /// Forgets that this digest is in this repository.
    pub(super) fn forget(&self, target: &Repository, digest: &Digest) {
        let key = (format!("{}/{}", target.host(), target.name()), digest.clone());
        self.done.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Counts a manifest as held in memory until the guard is dropped. `None` if that would be too much: no image has
    /// so many, or such large ones.
    pub(super) fn hold_manifest(&self, bytes: u64) -> Option<HeldManifest<'_>> {
        let held = self.manifest_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let guard = HeldManifest { run: self, bytes };
        (held <= MAX_MANIFEST_BYTES).then_some(guard)
    }

    pub(super) fn count_copied(&self, bytes: u64) {
        self.bytes_copied.fetch_add(bytes, Ordering::Relaxed);
        self.blobs_copied.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_mounted(&self) {
        self.blobs_mounted.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_present(&self) {
        self.blobs_present.fetch_add(1, Ordering::Relaxed);
    }

    /// Remembers an open session until it is finished: one that is dropped is cancelled by [`clean_up`](Self::clean_up).
    pub(super) fn open(&self, upload: Upload) -> OpenSession<'_> {
        OpenSession { run: self, upload: Some(upload) }
    }
}

/// A manifest that is in memory.
pub(super) struct HeldManifest<'a> {
    run: &'a Run,
    bytes: u64,
}

impl Drop for HeldManifest<'_> {
    fn drop(&mut self) {
        self.run.manifest_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// An open session at the target.
pub(super) struct OpenSession<'a> {
    run: &'a Run,
    upload: Option<Upload>,
}

impl OpenSession<'_> {
    /// The blob is committed, or the registry has forgotten the session.
    pub(super) fn finish(mut self) {
        self.upload = None;
    }
}

impl Drop for OpenSession<'_> {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            self.run.abandoned.lock().unwrap_or_else(PoisonError::into_inner).push(upload);
        }
    }
}
