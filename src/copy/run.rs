//! What the copies of one sync share: which digests are where, memory for small blobs, open sessions, progress.

use std::{
    collections::{HashMap, HashSet},
    ops::Add,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex as AsyncMutex, OnceCell};

use super::Fence;
use crate::{
    oci::{Digest, RawManifest, Tag},
    registry::{Memory, Meter, Sessions, Source, Stored, Target},
};

/// Larger manifests are not kept while their blobs are copied.
const WORTH_HOLDING: u64 = 64 << 10;

/// A digest in a repository, named by host and path.
type Place = (String, Digest);
/// Set once the digest is there.
type Cell = Arc<OnceCell<()>>;

/// What the copies of one sync share, as one of its images sees it.
pub struct Run {
    shared: Arc<Shared>,
    /// Counts the bytes of the image that this is for, where somebody wants to see them.
    image: Option<Arc<Counter>>,
}

struct Shared {
    progress: Arc<Progress>,
    fence: Fence,
    done: Mutex<HashMap<Place, Cell>>,
    memory: Memory,
    sessions: Sessions,
    source_tags: Mutex<HashMap<String, Arc<OnceCell<Arc<SourceTags>>>>>,
    fallback_locks: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
    bytes_copied: AtomicU64,
    blobs_copied: AtomicU64,
    blobs_mounted: AtomicU64,
    blobs_present: AtomicU64,
}

/// How many bytes have moved. What several images share is counted for the one that copies it.
#[derive(Debug, Default)]
pub struct Counter {
    done: Arc<AtomicU64>,
    total: AtomicU64,
}

impl Counter {
    /// Bytes that are at the target or need not be sent.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Bytes of all blobs found so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Takes a blob of so many bytes in, and gives the sum that it is to be added to.
    fn found(&self, bytes: u64) -> Arc<AtomicU64> {
        self.total.fetch_add(bytes, Ordering::Relaxed);
        Arc::clone(&self.done)
    }
}

/// How far a run is. Written by the engine, read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: Counter,
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

impl Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes_copied: self.bytes_copied + other.bytes_copied,
            blobs_copied: self.blobs_copied + other.blobs_copied,
            blobs_mounted: self.blobs_mounted + other.blobs_mounted,
            blobs_present: self.blobs_present + other.blobs_present,
        }
    }
}

impl Progress {
    /// How far the run is now.
    #[must_use]
    pub fn snapshot(&self) -> ProgressSnapshot {
        ProgressSnapshot {
            bytes_done: self.bytes.done(),
            bytes_total: self.bytes.total(),
            images_done: self.images_done.load(Ordering::Relaxed),
            images_total: self.images_total.load(Ordering::Relaxed),
        }
    }

    /// How many images are looked at from here on.
    pub fn expect_images(&self, count: u64) {
        let done = self.images_done.load(Ordering::Relaxed);
        self.images_total.fetch_max(done.saturating_add(count), Ordering::Relaxed);
    }

    /// So many images that were finished are looked at again.
    pub fn images_again(&self, count: u64) {
        let done = self.images_done.load(Ordering::Relaxed);
        self.images_done.store(done.saturating_sub(count), Ordering::Relaxed);
    }

    /// One image is finished.
    pub fn image_done(&self) {
        self.images_done.fetch_add(1, Ordering::Relaxed);
    }
}

impl Run {
    /// A run that reports to `progress`, writes tags while `fence` allows it, and keeps manifests where there is room.
    #[must_use]
    pub fn new(progress: Arc<Progress>, fence: Fence, memory: Memory) -> Self {
        let shared = Shared {
            progress,
            fence,
            done: Mutex::default(),
            memory,
            sessions: Sessions::default(),
            source_tags: Mutex::default(),
            fallback_locks: Mutex::default(),
            bytes_copied: AtomicU64::new(0),
            blobs_copied: AtomicU64::new(0),
            blobs_mounted: AtomicU64::new(0),
            blobs_present: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared), image: None }
    }

    /// The same run for one of its images, whose bytes `counter` counts.
    #[must_use]
    pub fn of_image(&self, counter: Option<Arc<Counter>>) -> Self {
        Self { shared: Arc::clone(&self.shared), image: counter }
    }

    /// What has been moved so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            bytes_copied: self.shared.bytes_copied.load(Ordering::Relaxed),
            blobs_copied: self.shared.blobs_copied.load(Ordering::Relaxed),
            blobs_mounted: self.shared.blobs_mounted.load(Ordering::Relaxed),
            blobs_present: self.shared.blobs_present.load(Ordering::Relaxed),
        }
    }

    /// Cancels the upload sessions that were left open by copies that failed or were dropped.
    pub async fn clean_up(&self) {
        self.shared.sessions.clean_up().await;
    }

    pub(super) fn sessions(&self) -> &Sessions {
        &self.shared.sessions
    }

    /// A meter for a blob of so many bytes.
    pub(super) fn meter(&self, bytes: u64) -> Meter {
        let of_image = self.image.as_ref().map(|image| image.found(bytes));
        Meter::new(self.shared.progress.bytes.found(bytes), of_image)
    }

    pub(super) fn fence(&self) -> &Fence {
        &self.shared.fence
    }

    /// The cell that is set once this digest is in this repository. Who finds it empty fills it; who waits takes over
    /// with its own source when that fails.
    pub(super) fn cell(&self, target: &Target, digest: &Digest) -> Cell {
        let key = (target.place(), digest.clone());
        let mut done = self.shared.done.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(done.entry(key).or_default())
    }

    /// Forgets that this digest is in this repository.
    pub(super) fn forget(&self, target: &Target, digest: &Digest) {
        let key = (target.place(), digest.clone());
        self.shared.done.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Keeps a manifest while there is room for it, which comes back with its bytes. One that is large, or one too many,
    /// is given up: it is fetched again when it is its turn to be written.
    pub(super) fn hold_manifest(&self, manifest: RawManifest) -> Option<RawManifest> {
        let size = manifest.bytes.len() as u64;
        let room = if size <= WORTH_HOLDING { self.shared.memory.try_take(size) } else { None };
        room.map(|room| RawManifest { bytes: room.around(manifest.bytes), ..manifest })
    }

    /// The tags of a source repository that are about digests, read once in a run.
    pub(super) fn source_tags(&self, source: &Source) -> Arc<OnceCell<Arc<SourceTags>>> {
        let mut lists = self.shared.source_tags.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(lists.entry(source.place()).or_default())
    }

    /// Held while a tag at the target is read, changed and written.
    pub(super) fn fallback_lock(&self, target: &Target, tag: &str) -> Arc<AsyncMutex<()>> {
        let mut locks = self.shared.fallback_locks.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(locks.entry(format!("{}:{tag}", target.place())).or_default())
    }

    /// Counts a blob of so many bytes.
    pub(super) fn count(&self, stored: Stored, bytes: u64) {
        let blobs = match stored {
            Stored::Present => &self.shared.blobs_present,
            Stored::Mounted => &self.shared.blobs_mounted,
            Stored::Copied => {
                self.shared.bytes_copied.fetch_add(bytes, Ordering::Relaxed);
                &self.shared.blobs_copied
            }
        };
        blobs.fetch_add(1, Ordering::Relaxed);
    }
}

/// The tags of a source repository that are about digests.
pub(super) enum SourceTags {
    /// All that there are.
    All(HashSet<Tag>),
    /// They cannot be listed, or there are too many tags to look through.
    Unknown,
}

impl SourceTags {
    /// There is none.
    pub(super) fn are_none(&self) -> bool {
        matches!(self, Self::All(tags) if tags.is_empty())
    }

    /// Whether it is worth asking for this tag.
    pub(super) fn may_have(&self, tag: &str) -> bool {
        match self {
            Self::All(tags) => tag.parse::<Tag>().is_ok_and(|tag| tags.contains(&tag)),
            Self::Unknown => true,
        }
    }
}
