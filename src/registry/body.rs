//! Bytes on their way from one registry to the other: the stream that is read, and the request body that hashes it and
//! holds back its last frame until the digest agrees, so that a corrupt blob can never be committed at the target.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http_body::{Body, Frame, SizeHint};
use sync_wrapper::SyncWrapper;
use tokio::time::Instant;

use super::error::{Error, ErrorKind, Step};
use crate::oci::{Descriptor, Digest, Hasher};

/// The bytes of a blob as they arrive.
pub type BlobStream = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>;

/// A request body of an exact size that ends only if its bytes have the promised digest.
pub struct HoldBack {
    stream: SyncWrapper<BlobStream>,
    hasher: Option<Hasher>,
    expected: Digest,
    remaining: u64,
    state: Arc<BodyState>,
}

/// What is known of a body from outside while it is being sent.
pub(super) struct BodyState {
    started: Instant,
    last_byte_ms: AtomicU64,
    remaining: AtomicU64,
    waits_for_source: AtomicBool,
    failure: Mutex<Option<Error>>,
}

/// What hyper is told when a body fails; the cause is kept beside it.
#[derive(Debug, thiserror::Error)]
#[error("the blob could not be read to its end")]
pub struct BodyFailed;

impl HoldBack {
    /// A body that sends `stream` and expects it to be what `descriptor` says.
    #[must_use]
    pub fn new(descriptor: &Descriptor, stream: BlobStream) -> Self {
        let state = BodyState {
            started: Instant::now(),
            last_byte_ms: AtomicU64::new(0),
            remaining: AtomicU64::new(descriptor.size),
            waits_for_source: AtomicBool::new(false),
            failure: Mutex::new(None),
        };
        Self {
            stream: SyncWrapper::new(stream),
            hasher: Some(descriptor.digest.algorithm().hasher()),
            expected: descriptor.digest.clone(),
            remaining: descriptor.size,
            state: Arc::new(state),
        }
    }

    pub(super) fn state(&self) -> Arc<BodyState> {
        Arc::clone(&self.state)
    }

    fn fail(&mut self, error: Error) -> Poll<Option<Result<Frame<Bytes>, BodyFailed>>> {
        *self.state.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        Poll::Ready(Some(Err(BodyFailed)))
    }

    fn integrity(&self, what: String) -> Error {
        Error::new(ErrorKind::Integrity(what), Step::GetBlob, "the source", &self.expected.to_string())
    }
}

impl BodyState {
    /// When the last byte moved.
    pub(super) fn last_byte(&self) -> Instant {
        self.started + std::time::Duration::from_millis(self.last_byte_ms.load(Ordering::Relaxed))
    }

    /// The request goes out now: time spent waiting for a turn does not count.
    pub(super) fn begin(&self) {
        self.moved(self.remaining.load(Ordering::Relaxed));
    }

    /// Whether it is the source that everybody waits for.
    pub(super) fn is_waiting_for_source(&self) -> bool {
        self.waits_for_source.load(Ordering::Relaxed)
    }

    /// Whether every byte has been handed over.
    pub(super) fn is_sent(&self) -> bool {
        self.remaining.load(Ordering::Relaxed) == 0
    }

    /// Why the body failed, if it did.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn moved(&self, remaining: u64) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_byte_ms.store(now, Ordering::Relaxed);
        self.remaining.store(remaining, Ordering::Relaxed);
    }
}

impl Body for HoldBack {
    type Data = Bytes;
    type Error = BodyFailed;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyFailed>>> {
        let this = &mut *self;
        if this.remaining == 0 {
            return Poll::Ready(None);
        }
        let polled = this.stream.get_mut().poll_next_unpin(context);
        this.state.waits_for_source.store(polled.is_pending(), Ordering::Relaxed);
        let chunk = match ready!(polled) {
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) => return this.fail(error),
            None => {
                let error = this.integrity(format!("the blob ended {} bytes early", this.remaining));
                return this.fail(error);
            }
        };
        let len = chunk.len() as u64;
        if len > this.remaining {
            let error = this.integrity("the blob is longer than its descriptor says".to_owned());
            return this.fail(error);
        }
        this.remaining -= len;
        if let Some(hasher) = &mut this.hasher {
            hasher.update(&chunk);
        }
        if this.remaining == 0 {
            let digest = this.hasher.take().map(Hasher::finish);
            if digest.as_ref() != Some(&this.expected) {
                let found = digest.map(|digest| digest.to_string()).unwrap_or_default();
                let error = this.integrity(format!("the bytes received have the digest {found}"));
                return this.fail(error);
            }
        }
        this.state.moved(this.remaining);
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.remaining == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn body(parts: &[&'static str], promised: &str, size: u64) -> HoldBack {
        let parts: Vec<_> = parts.iter().map(|part| Ok(Bytes::from_static(part.as_bytes()))).collect();
        let digest = Digest::sha256(promised.as_bytes());
        let descriptor = Descriptor { media_type: String::new(), digest, size, urls: Vec::new() };
        HoldBack::new(&descriptor, futures::stream::iter(parts).boxed())
    }

    async fn sent(mut body: HoldBack) -> (usize, Option<Error>) {
        let state = body.state();
        let mut sent = 0;
        while let Some(Ok(frame)) = body.frame().await {
            sent += frame.into_data().map_or(0, |data| data.len());
        }
        (sent, state.take_failure())
    }

    #[tokio::test]
    async fn good_bytes_pass_whole() {
        let (sent, failure) = sent(body(&["hello ", "world"], "hello world", 11)).await;
        assert_eq!(sent, 11);
        assert!(failure.is_none());
    }

    #[tokio::test]
    async fn the_last_frame_of_bad_bytes_is_never_sent() {
        for (parts, size) in [(&["hello ", "worle"][..], 11), (&["hello "], 11), (&["hello ", "world!"], 11)] {
            let (sent, failure) = sent(body(parts, "hello world", size)).await;
            assert_eq!(sent, 6, "{parts:?}");
            assert!(matches!(failure.unwrap().kind, ErrorKind::Integrity(_)));
        }
    }
}
