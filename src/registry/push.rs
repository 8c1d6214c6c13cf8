//! Writing a blob: found present, mounted, or sent; and sent once, as far as the registry allows. An upload that breaks
//! has an unknown outcome, so the target is looked at before anything is sent again, and a large blob goes on where the
//! target says that it broke.

use std::sync::{Arc, Mutex};

use tokio::{sync::OwnedSemaphorePermit, time::sleep};

use super::{
    backend::BlobOpener,
    body::{Feed, FeedBody, Marks, Meter, SharedFeed, lock},
    error::{Error, ErrorKind},
    quirks::UploadStrategy,
    repository::Repository,
    upload::{MountFrom, PutError, Sessions, Started, Upload},
};
use crate::oci::Descriptor;

/// Blobs up to this size are held in memory.
const SMALL: u64 = 1 << 20;
/// Sessions opened for one blob before it counts as failed.
const MAX_SESSIONS: u32 = 4;
/// Times a registry is asked what has arrived, the first one aside, until it says the same twice.
const MAX_LOOKS: u32 = 4;
/// Times a source that wants to be left alone is waited for.
const MAX_PAUSES: u32 = 4;
/// Less than this is not worth another request.
const WORTH_KEEPING: u64 = 1 << 20;

/// How a blob got to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// The target had it.
    Present,
    /// The target took it from another of its repositories.
    Mounted,
    /// It was sent.
    Copied,
}

/// What every blob of a run is sent with.
pub struct PutOptions<'a> {
    /// The uploads that are open.
    pub sessions: &'a Sessions,
    /// Counts the bytes that have moved.
    pub meter: Arc<Meter>,
    /// Send it also if the target says that it has it: it has denied having it since.
    pub resend: bool,
}

impl Repository {
    /// Brings a blob here. Its size must be known.
    pub(super) async fn put_blob(&self, source: &BlobOpener, options: &PutOptions<'_>) -> Result<Stored, PutError> {
        let blob = source.descriptor();
        let mut push = Push {
            target: self,
            source,
            blob,
            options,
            marks: Marks::for_size(blob.size),
            was_too_early: false,
            instead: self.known().loses_whole().then_some(UploadStrategy::Patch),
            pauses: 0,
        };
        let stored = push.run().await?;
        options.meter.finish(blob.size);
        self.holds(blob);
        Ok(stored)
    }
}

struct Push<'a> {
    target: &'a Repository,
    source: &'a BlobOpener,
    blob: &'a Descriptor,
    options: &'a PutOptions<'a>,
    marks: Marks,
    /// A continuation was refused because more had arrived meanwhile.
    was_too_early: bool,
    /// How to send this blob, where it was lost with the request that brought it whole.
    instead: Option<UploadStrategy>,
    /// Times the source was waited for.
    pauses: u32,
}

impl Push<'_> {
    async fn run(&mut self) -> Result<Stored, PutError> {
        let mut sessions = 0;
        let (mut was_corrupt, mut was_slow, mut was_lost) = (false, 0, false);
        let mut broken: Option<(Upload, u64)> = None;
        loop {
            let (upload, from) = match broken.take() {
                Some(broken) => broken,
                None => match self.start().await.map_err(PutError::Target)? {
                    Started::Present => return Ok(Stored::Present),
                    Started::Mounted => return Ok(Stored::Mounted),
                    Started::Session(upload) => {
                        sessions += 1;
                        (upload, 0)
                    }
                },
            };
            let session = self.options.sessions.open(upload.clone());
            let strategy = self.strategy();
            let error = match self.send(&upload, from, strategy).await {
                Ok(()) => {
                    session.finish();
                    match strategy {
                        UploadStrategy::Put => self.target.known().took_whole(),
                        _ if was_lost => self.target.known().lost_whole(),
                        _ => {}
                    }
                    return Ok(Stored::Copied);
                }
                Err(error) => error,
            };
            // As with sessions: who takes a byte now and then is not served for ever.
            was_slow += u32::from(error.inner().kind == ErrorKind::TooSlow);
            if was_slow == MAX_SESSIONS {
                return Err(error);
            }
            let digest = &self.blob.digest;
            if is_outcome_unknown(&error) && self.target.has_blob(digest).await.unwrap_or(false) {
                session.finish();
                return Ok(Stored::Copied);
            }
            if let Some(stored) = self.stored(&upload, &error, from).await {
                tracing::debug!(host = %error.inner().host, error = %error.inner(), %digest, stored, "continuing an upload");
                session.finish();
                broken = Some((upload, stored));
                continue;
            }
            let is_too_much = is_too_much(&error) && self.refused(strategy);
            // Corrupt bytes may be one broken connection: once more, on a new one.
            let corrupt_once = is_corrupt(&error, from) && !std::mem::replace(&mut was_corrupt, true);
            if is_too_much {
                sessions -= 1;
            } else if sessions == MAX_SESSIONS || !(corrupt_once || is_worth_another_session(&error)) {
                return Err(error);
            }
            let is_lost = matches!(&error, PutError::Target(error) if error.is_lost_session());
            if is_lost && strategy == UploadStrategy::Put {
                self.instead = Some(UploadStrategy::Patch);
                was_lost = true;
            }
            tracing::debug!(host = %error.inner().host, error = %error.inner(), %digest, "sending a blob again");
            upload.cancel().await;
            session.finish();
            self.target.back_off(sessions).await;
        }
    }

    fn strategy(&self) -> UploadStrategy {
        let known = if self.is_small() { UploadStrategy::Put } else { self.target.known().strategy() };
        self.instead.filter(|_| known == UploadStrategy::Put).unwrap_or(known)
    }

    /// What was sent so was too much at once. False if there is no other way to try.
    fn refused(&mut self, strategy: UploadStrategy) -> bool {
        // How large blobs are sent is the registry's matter; what is small, or was lost, is this blob's.
        if !self.is_small() && self.instead != Some(strategy) {
            return self.target.known().strategy_refused(strategy);
        }
        self.instead = strategy.after_refusal();
        self.instead.is_some()
    }

    fn is_small(&self) -> bool {
        self.blob.size <= SMALL
    }

    async fn start(&self) -> Result<Started, Error> {
        let digest = &self.blob.digest;
        let mount = (!self.options.resend).then(|| self.target.mount_for(self.blob));
        let known = self.target.known();
        if mount == Some(MountFrom::Itself) && !known.self_mounts() && self.target.has_blob(digest).await? {
            return Ok(Started::Present);
        }
        let started = self.target.start_upload(digest, mount.as_ref()).await?;
        if matches!(started, Started::Session(_)) && mount.is_some() && self.target.is_holder(self.blob) {
            // It was brought here by this process, and the registry did not say so.
            known.self_mounts_useless();
        }
        Ok(started)
    }

    async fn send(&mut self, upload: &Upload, from: u64, strategy: UploadStrategy) -> Result<(), PutError> {
        if self.is_small() {
            return self.send_small(upload, strategy).await;
        }
        let beginning = Feed::beginning(self.blob, &self.marks, from);
        let (_streams, stream) = loop {
            let streams = stream_permits(self.source, self.target).await;
            match self.source.open(beginning.0).await {
                Ok(stream) => break (streams, stream),
                Err(error) => {
                    drop(streams);
                    self.pause(error).await?;
                }
            }
        };
        let marks = std::mem::take(&mut self.marks);
        let mut feed = Feed::new(self.source, beginning, stream, marks, Arc::clone(&self.options.meter));
        feed.skip_to(from).await.map_err(PutError::Source)?;
        let feed = Arc::new(Mutex::new(feed));
        let result = send_large(upload, &feed, from, self.blob.size, strategy).await;
        self.marks = lock(&feed).take_marks();
        result
    }

    async fn send_small(&mut self, upload: &Upload, strategy: UploadStrategy) -> Result<(), PutError> {
        let (_room, bytes) = loop {
            let room = self.target.client().room_for_small(self.blob.size).await;
            match self.source.read().await {
                Ok(bytes) => break (room, bytes),
                Err(error) => {
                    drop(room);
                    self.pause(error).await?;
                }
            }
        };
        let sent = match strategy {
            UploadStrategy::Put => upload.put_bytes(bytes).await,
            UploadStrategy::Patch | UploadStrategy::Chunks(_) => upload.patch_bytes(bytes).await,
        };
        sent.map_err(PutError::Target)
    }

    /// Waits for a source that wants to be left alone. Nothing is held meanwhile.
    async fn pause(&mut self, error: Error) -> Result<(), PutError> {
        match error.kind {
            ErrorKind::Paused(pause) if self.pauses < MAX_PAUSES => {
                self.pauses += 1;
                sleep(pause).await;
                Ok(())
            }
            _ => Err(PutError::Source(error)),
        }
    }

    /// How much of a broken upload the registry holds, once it says the same twice: it may be taking in still what was
    /// under way when the connection broke.
    async fn settled(&self, upload: &Upload) -> Option<u64> {
        let mut stored = upload.stored().await;
        for attempt in 1..=MAX_LOOKS {
            self.target.back_off(attempt).await;
            let again = upload.stored().await;
            if again == stored {
                break;
            }
            stored = again;
        }
        stored
    }

    /// How much of a broken upload is at the target and can be built upon.
    async fn stored(&mut self, upload: &Upload, error: &PutError, from: u64) -> Option<u64> {
        let known = self.target.known();
        if self.blob.size < Marks::WORTH_RESUMING || !known.resumes() || !leaves_a_session(error) {
            return None;
        }
        let stored = self.settled(upload).await;
        // What does not get further would not end. One that began before the registry had taken in the rest of what was
        // sent to it gets as far as that the second time.
        let is_too_early =
            matches!(error, PutError::Target(error) if error.status_code() == 416) && !self.was_too_early;
        let least = if is_too_early { WORTH_KEEPING } else { from + WORTH_KEEPING };
        self.was_too_early |= is_too_early;
        let stored = stored.filter(|stored| (least..=self.blob.size).contains(stored));
        let sent = self.marks.last();
        if stored.is_none() && matches!(error, PutError::Target(_)) && sent > from + Marks::WORTH_RESUMING {
            known.does_not_resume();
        }
        stored
    }
}

async fn send_large(
    upload: &Upload,
    feed: &SharedFeed,
    from: u64,
    size: u64,
    strategy: UploadStrategy,
) -> Result<(), PutError> {
    match strategy {
        UploadStrategy::Put => return upload.put(FeedBody::new(feed, size - from)).await,
        UploadStrategy::Patch if from < size => upload.patch(FeedBody::new(feed, size - from), from, false).await?,
        UploadStrategy::Patch => {}
        UploadStrategy::Chunks(len) => {
            let len = len.max(upload.chunk_min);
            let mut offset = from;
            while offset < size {
                let next = len.min(size - offset);
                upload.patch(FeedBody::new(feed, next), offset, true).await?;
                offset += next;
            }
        }
    }
    upload.close().await.map_err(PutError::Target)
}

/// One permit for each distinct host, in the order of their names: two copies in opposite directions cannot block
/// each other.
async fn stream_permits(source: &BlobOpener, target: &Repository) -> Vec<Option<OwnedSemaphorePermit>> {
    let mut hosts: Vec<String> = source.endpoint().into_iter().chain([target.endpoint()]).collect();
    hosts.sort();
    hosts.dedup();
    let mut permits = Vec::new();
    for host in hosts {
        permits.push(target.client().limits(&host).stream().await);
    }
    permits
}

impl PutError {
    /// What went wrong, whichever side it was.
    #[must_use]
    pub fn inner(&self) -> &Error {
        match self {
            Self::Source(error) | Self::Target(error) => error,
        }
    }
}

fn is_outcome_unknown(error: &PutError) -> bool {
    let PutError::Target(error) = error else { return false };
    matches!(error.kind, ErrorKind::Interrupted | ErrorKind::TimedOut) || error.is_lost_session()
}

/// Whether what was sent before this may be at the target still.
fn leaves_a_session(error: &PutError) -> bool {
    match error {
        PutError::Source(error) => is_paused(error) || error.is_retryable(),
        PutError::Target(error) => match &error.kind {
            ErrorKind::Interrupted | ErrorKind::TimedOut | ErrorKind::TooSlow => true,
            ErrorKind::Status { status, code, .. } => {
                status.is_server_error()
                    || ((matches!(status.as_u16(), 408 | 416 | 429) || error.is_unauthorized())
                        && code.as_deref() != Some("BLOB_UPLOAD_UNKNOWN"))
            }
            _ => false,
        },
    }
}

fn is_worth_another_session(error: &PutError) -> bool {
    match error {
        // A source that fails has been asked again and again.
        PutError::Source(error) => is_paused(error),
        // A token may have run out while the body was sent: the next POST fetches a fresh one.
        PutError::Target(error) => error.is_unauthorized() || error.is_retryable(),
    }
}

/// Whether the source wants to be left alone for a while.
fn is_paused(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::Paused(_))
}

/// What the source sent is not what it promised, or what was put together of two halves is not.
fn is_corrupt(error: &PutError, from: u64) -> bool {
    match error {
        PutError::Source(error) => matches!(error.kind, ErrorKind::Integrity(_)),
        PutError::Target(error) => from > 0 && error.code() == Some("DIGEST_INVALID"),
    }
}

/// Whether the registry does not take so much at once.
fn is_too_much(error: &PutError) -> bool {
    let PutError::Target(error) = error else { return false };
    matches!(error.status_code(), 405 | 413 | 501)
}
