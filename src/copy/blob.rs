//! One blob from source to target: a `POST` that finds it present or opens a session, a `GET`, a `PUT`.
//!
//! Small blobs are read whole, verified, then sent. Large ones stream: a download that breaks is continued where it
//! broke while the upload stays open; an upload that breaks has an unknown outcome, so the target is looked at before
//! the blob is sent again.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _, stream::try_unfold};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    CopyError,
    run::{Progress, Run},
};
use crate::{
    oci::{Descriptor, Digest},
    registry::{BlobStream, Error, ErrorKind, HoldBack, Repository, Started, StreamError, Upload},
};

/// Blobs up to this size are held in memory.
const SMALL: u64 = 1 << 20;
/// Sessions opened for one blob before it counts as failed.
const MAX_SESSIONS: u32 = 4;
/// Times a download may break without a new byte.
const MAX_BREAKS: u32 = 3;

/// Brings a blob to the target. `resend` is for a target that denied having what it said was present.
pub(super) async fn transfer(
    run: &Run,
    source: &Repository,
    target: &Repository,
    descriptor: &Descriptor,
    resend: bool,
) -> Result<(), CopyError> {
    let descriptor = with_size(source, descriptor).await?;
    run.progress().found(descriptor.size);
    let mut sessions = 0;
    let mut corrupt_before = false;
    loop {
        let mount = (!resend).then(|| target.mount_for(&descriptor));
        let started = target.start_upload(&descriptor.digest, mount.as_ref()).await.map_err(CopyError::target)?;
        let upload = match started {
            Started::Session(upload) => upload,
            there => {
                if matches!(there, Started::Mounted) {
                    run.count_mounted();
                } else {
                    run.count_present();
                }
                run.progress().moved(descriptor.size);
                target.holds(&descriptor);
                return Ok(());
            }
        };
        let session = run.open(upload.clone());
        sessions += 1;
        let error = match send(run, source, target, &descriptor, &upload).await {
            Ok(()) => {
                session.finish();
                run.count_copied(descriptor.size);
                target.holds(&descriptor);
                return Ok(());
            }
            Err(error) => error,
        };
        if is_outcome_unknown(&error) && target.has_blob(&descriptor.digest).await.unwrap_or(false) {
            session.finish();
            run.progress().moved(descriptor.size);
            run.count_copied(descriptor.size);
            return Ok(());
        }
        // Corrupt bytes may be one broken connection: once more, on a new one.
        let corrupt_once = error.is_integrity() && !std::mem::replace(&mut corrupt_before, true);
        if sessions == MAX_SESSIONS || !(corrupt_once || is_worth_another_session(&error)) {
            return Err(error);
        }
        tracing::debug!(%error, digest = %descriptor.digest, "sending a blob again");
        upload.cancel().await;
        session.finish();
        target.back_off(sessions - 1).await;
    }
}

/// Schema 1 manifests name no sizes: the source is asked.
async fn with_size(source: &Repository, descriptor: &Descriptor) -> Result<Descriptor, CopyError> {
    if descriptor.size != Descriptor::UNKNOWN_SIZE {
        return Ok(descriptor.clone());
    }
    let (size, _) = source.blob(descriptor, 0).await.map_err(CopyError::source)?;
    Ok(Descriptor { size, ..descriptor.clone() })
}

fn is_outcome_unknown(error: &CopyError) -> bool {
    let CopyError::Registry { side: crate::registry::Side::Target, error } = error else { return false };
    matches!(error.kind, ErrorKind::Interrupted | ErrorKind::TimedOut) || error.is_lost_session()
}

fn is_worth_another_session(error: &CopyError) -> bool {
    let CopyError::Registry { side: crate::registry::Side::Target, error } = error else { return false };
    // A token may have run out while the body was sent: the next POST fetches a fresh one.
    error.is_retryable() || error.status() == Some(http::StatusCode::UNAUTHORIZED)
}

async fn send(
    run: &Run,
    source: &Repository,
    target: &Repository,
    descriptor: &Descriptor,
    upload: &Upload,
) -> Result<(), CopyError> {
    let meter = Meter::new(run.progress());
    if descriptor.size <= SMALL {
        let _room = target.client().room_for_small(descriptor.size).await;
        let bytes = fetch_small(source, descriptor, &meter).await.map_err(CopyError::source)?;
        upload.put_bytes(bytes).await.map_err(CopyError::target)?;
    } else {
        let _streams = stream_permits(source, target).await;
        let (_, stream) = source.blob(descriptor, 0).await.map_err(CopyError::source)?;
        let body = HoldBack::new(descriptor, resuming(source.clone(), descriptor.clone(), stream, meter.clone()));
        upload.put_stream(body).await.map_err(|error| match error {
            StreamError::Body(error) => CopyError::source(error),
            StreamError::Upload(error) => CopyError::target(error),
        })?;
    }
    meter.keep();
    Ok(())
}

/// One permit for each distinct host, in the order of their names: two copies in opposite directions cannot block
/// each other.
async fn stream_permits(source: &Repository, target: &Repository) -> Vec<Option<OwnedSemaphorePermit>> {
    let mut hosts = [source.endpoint(), target.endpoint()].to_vec();
    hosts.sort();
    hosts.dedup();
    let mut permits = Vec::new();
    for host in hosts {
        permits.push(source.client().limits(&host).stream().await);
    }
    permits
}

async fn fetch_small(source: &Repository, descriptor: &Descriptor, meter: &Meter) -> Result<Bytes, Error> {
    let mut bytes = BytesMut::new();
    // An empty blob cannot be ranged, and there is nothing to fetch.
    if descriptor.size > 0 {
        let (_, stream) = source.blob(descriptor, 0).await?;
        let mut stream = resuming(source.clone(), descriptor.clone(), stream, meter.clone());
        while let Some(chunk) = stream.try_next().await? {
            if (bytes.len() + chunk.len()) as u64 > descriptor.size {
                return Err(source.corrupt(descriptor, "the blob is longer than its descriptor says"));
            }
            bytes.extend_from_slice(&chunk);
        }
    }
    let found = Digest::of(descriptor.digest.algorithm(), &bytes);
    if found != descriptor.digest {
        return Err(source.corrupt(descriptor, &format!("the bytes received have the digest {found}")));
    }
    Ok(bytes.freeze())
}

struct Resuming {
    source: Repository,
    descriptor: Descriptor,
    stream: Option<BlobStream>,
    offset: u64,
    breaks: u32,
    meter: Meter,
}

/// The bytes of a blob, continued where the connection broke. The registry is asked again, never the place it
/// redirected to: signed addresses run out.
fn resuming(source: Repository, descriptor: Descriptor, stream: BlobStream, meter: Meter) -> BlobStream {
    let state = Resuming { source, descriptor, stream: Some(stream), offset: 0, breaks: 0, meter };
    try_unfold(state, |mut state| async move {
        loop {
            if state.stream.is_none() {
                match state.source.blob(&state.descriptor, state.offset).await {
                    Ok((_, stream)) => state.stream = Some(stream),
                    Err(error) => {
                        state.broke(error).await?;
                        continue;
                    }
                }
            }
            let Some(stream) = &mut state.stream else { continue };
            match stream.next().await {
                Some(Ok(chunk)) => {
                    state.offset += chunk.len() as u64;
                    state.breaks = 0;
                    state.meter.moved(chunk.len() as u64);
                    return Ok(Some((chunk, state)));
                }
                Some(Err(error)) => state.broke(error).await?,
                None if state.offset >= state.descriptor.size => return Ok(None),
                None => {
                    let error = state.source.corrupt(&state.descriptor, "the blob ended early");
                    return Err(error);
                }
            }
        }
    })
    .boxed()
}

impl Resuming {
    /// Waits before the next attempt, or gives the error back when there were too many.
    async fn broke(&mut self, error: Error) -> Result<(), Error> {
        self.stream = None;
        self.breaks += 1;
        if self.breaks > MAX_BREAKS || !error.is_retryable() {
            return Err(error);
        }
        tracing::debug!(%error, offset = self.offset, "continuing a download");
        if self.breaks > 1 {
            self.source.back_off(self.breaks - 1).await;
        }
        Ok(())
    }
}

/// Counts the bytes of one attempt, and takes them back if it fails.
#[derive(Clone)]
struct Meter(Arc<MeterInner>);

struct MeterInner {
    progress: Arc<Progress>,
    moved: std::sync::atomic::AtomicU64,
}

impl Meter {
    fn new(progress: &Arc<Progress>) -> Self {
        Self(Arc::new(MeterInner { progress: Arc::clone(progress), moved: 0.into() }))
    }

    fn moved(&self, bytes: u64) {
        self.0.moved.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        self.0.progress.moved(bytes);
    }

    fn keep(&self) {
        self.0.moved.store(0, std::sync::atomic::Ordering::Relaxed);
    }
}

impl Drop for MeterInner {
    fn drop(&mut self) {
        self.progress.lost(*self.moved.get_mut());
    }
}
