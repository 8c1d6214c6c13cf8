//! Bytes on their way from one registry to the other: the feed that hashes them and holds back the last ones until the
//! digest agrees, so that a corrupt blob can never be committed at the target, and the request body that sends a part
//! of it.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, future::poll_fn};
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use super::{backend::BlobOpener, error::Error};
use crate::oci::{Descriptor, Hasher};

/// The bytes of a blob as they arrive.
pub type BlobStream = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>;

/// Counts the bytes of one blob into sums that others add to, and takes them out again if the blob fails.
#[derive(Debug)]
pub struct Meter {
    sum: Arc<AtomicU64>,
    also: Option<Arc<AtomicU64>>,
    mine: AtomicU64,
}

impl Meter {
    /// A meter that adds to `sum`, and to `also`.
    #[must_use]
    pub fn new(sum: Arc<AtomicU64>, also: Option<Arc<AtomicU64>>) -> Self {
        Self { sum, also, mine: AtomicU64::new(0) }
    }

    /// So many bytes of the blob have moved by now.
    pub(super) fn set(&self, bytes: u64) {
        let before = self.mine.swap(bytes, Ordering::Relaxed);
        // Wraps to a subtraction where bytes have to be sent again.
        let change = bytes.wrapping_sub(before);
        self.sum.fetch_add(change, Ordering::Relaxed);
        if let Some(also) = &self.also {
            also.fetch_add(change, Ordering::Relaxed);
        }
    }

    /// The blob is there, whole.
    pub(super) fn finish(&self, bytes: u64) {
        self.set(bytes);
        self.mine.store(0, Ordering::Relaxed);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// States of the hash by how many bytes they cover: from there an upload can be continued without the bytes before.
#[derive(Default)]
pub(super) struct Marks {
    spacing: u64,
    states: Vec<(u64, Hasher)>,
}

impl Marks {
    /// Smaller blobs are sent again whole.
    pub(super) const WORTH_RESUMING: u64 = 8 << 20;
    const SPACING: u64 = 1 << 20;
    const MOST: u64 = 1024;

    /// For a blob of this size.
    pub(super) fn for_size(size: u64) -> Self {
        let spacing = if size < Self::WORTH_RESUMING { u64::MAX } else { Self::SPACING.max(size / Self::MOST) };
        Self { spacing, states: Vec::new() }
    }

    fn take(&mut self, offset: u64, hasher: &Hasher) {
        if offset.saturating_sub(self.last()) >= self.spacing {
            self.states.push((offset, hasher.clone()));
        }
    }

    /// How many bytes the last state covers.
    pub(super) fn last(&self) -> u64 {
        self.states.last().map_or(0, |(offset, _)| *offset)
    }

    /// The last state that covers at most `offset` bytes; none is the state before the first byte.
    fn before(&self, offset: u64) -> Option<(u64, Hasher)> {
        self.states.iter().rev().find(|(covered, _)| *covered <= offset).cloned()
    }
}

/// The bytes of a blob in their order, hashed as they pass.
pub(super) struct Feed {
    source: BlobOpener,
    stream: BlobStream,
    /// Of all bytes that came out of the stream; taken when the digest has been found to agree.
    hasher: Option<Hasher>,
    /// Bytes that came out of the stream, those before its beginning included.
    offset: u64,
    /// What came out of the stream and has not been handed out.
    rest: Bytes,
    marks: Marks,
    meter: Arc<Meter>,
}

impl Feed {
    /// Where a feed has to begin that is to hand out the bytes from `offset` on: the first byte to read, and the hash of
    /// those before it.
    pub(super) fn beginning(blob: &Descriptor, marks: &Marks, offset: u64) -> (u64, Hasher) {
        marks.before(offset).unwrap_or_else(|| (0, blob.digest.algorithm().hasher()))
    }

    /// The bytes that `stream` has from where `hasher` ends.
    pub(super) fn new(
        source: &BlobOpener,
        (offset, hasher): (u64, Hasher),
        stream: BlobStream,
        marks: Marks,
        meter: Arc<Meter>,
    ) -> Self {
        Self { source: source.clone(), stream, hasher: Some(hasher), offset, rest: Bytes::new(), marks, meter }
    }

    /// The next bytes; none after the last one.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.handed_out() < self.size() {
            return poll_fn(|context| self.poll(context, u64::MAX)).await.map(Some);
        }
        // Of an empty blob nothing has been checked yet.
        self.check_digest()?;
        Ok(None)
    }

    /// Reads and hashes without handing out, until the next byte is the one at `offset`.
    pub(super) async fn skip_to(&mut self, offset: u64) -> Result<(), Error> {
        while self.handed_out() < offset {
            let most = offset - self.handed_out();
            poll_fn(|context| self.poll(context, most)).await?;
        }
        Ok(())
    }

    /// The marks, for a feed that goes on in place of this one.
    pub(super) fn take_marks(&mut self) -> Marks {
        std::mem::take(&mut self.marks)
    }

    fn handed_out(&self) -> u64 {
        self.offset - self.rest.len() as u64
    }

    /// The next bytes, at most `most` and at least one.
    fn poll(&mut self, context: &mut Context<'_>, most: u64) -> Poll<Result<Bytes, Error>> {
        if self.rest.is_empty() {
            let chunk = match ready!(self.stream.poll_next_unpin(context)) {
                Some(chunk) => chunk?,
                None => {
                    let missing = self.size() - self.offset;
                    return Poll::Ready(Err(self.source.corrupt(&format!("the blob ended {missing} bytes early"))));
                }
            };
            self.take_in(&chunk)?;
            self.rest = chunk;
        }
        let next = self.rest.split_to(usize::try_from(most).unwrap_or(usize::MAX).min(self.rest.len()));
        self.meter.set(self.handed_out());
        Poll::Ready(Ok(next))
    }

    /// Hashes a chunk. The one that completes the size is handed out only if the digest agrees.
    fn take_in(&mut self, chunk: &Bytes) -> Result<(), Error> {
        if chunk.len() as u64 > self.size() - self.offset {
            return Err(self.source.corrupt("the blob is longer than its descriptor says"));
        }
        self.offset += chunk.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(chunk);
            self.marks.take(self.offset, hasher);
        }
        if self.offset == self.size() { self.check_digest() } else { Ok(()) }
    }

    fn check_digest(&mut self) -> Result<(), Error> {
        match self.hasher.take().map(Hasher::finish) {
            Some(digest) if digest != self.source.descriptor().digest => {
                Err(self.source.corrupt(&format!("the bytes received have the digest {digest}")))
            }
            _ => Ok(()),
        }
    }

    fn size(&self) -> u64 {
        self.source.descriptor().size
    }
}

/// A feed that one request body after another takes from.
pub(super) type SharedFeed = Arc<Mutex<Feed>>;

pub(super) fn lock(feed: &SharedFeed) -> MutexGuard<'_, Feed> {
    feed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request body with the next bytes of a feed, of an exact size.
pub(super) struct FeedBody {
    feed: SharedFeed,
    remaining: u64,
    state: Arc<BodyState>,
}

/// What is known of a body from outside while it is being sent.
pub(super) struct BodyState {
    started: Instant,
    last_byte_ms: AtomicU64,
    remaining: AtomicU64,
    /// Since when it is the source that everybody waits for, and how long it was before.
    source_wait: Mutex<(Option<Instant>, Duration)>,
    failure: Mutex<Option<Error>>,
}

/// What hyper is told when a body fails; the cause is kept beside it.
#[derive(Debug, thiserror::Error)]
#[error("the blob could not be read to its end")]
pub(super) struct BodyFailed;

impl FeedBody {
    /// The next `len` bytes of the feed.
    pub(super) fn new(feed: &SharedFeed, len: u64) -> Self {
        let state = BodyState {
            started: Instant::now(),
            last_byte_ms: AtomicU64::new(0),
            remaining: AtomicU64::new(len),
            source_wait: Mutex::default(),
            failure: Mutex::new(None),
        };
        Self { feed: Arc::clone(feed), remaining: len, state: Arc::new(state) }
    }

    pub(super) fn state(&self) -> Arc<BodyState> {
        Arc::clone(&self.state)
    }
}

impl BodyState {
    /// When the last byte moved.
    pub(super) fn last_byte(&self) -> Instant {
        self.started + Duration::from_millis(self.last_byte_ms.load(Ordering::Relaxed))
    }

    /// The request goes out now: time spent waiting for a turn does not count.
    pub(super) fn begin(&self) {
        self.moved(self.remaining.load(Ordering::Relaxed));
    }

    /// Whether it is the source that everybody waits for.
    pub(super) fn is_waiting_for_source(&self) -> bool {
        self.source_wait().0.is_some()
    }

    /// How long it was not the source that everybody waited for, and how many bytes have not been handed over.
    pub(super) fn of_target(&self) -> (Duration, u64) {
        let (since, before) = *self.source_wait();
        let source = before + since.map_or(Duration::ZERO, |since| since.elapsed());
        (self.started.elapsed().saturating_sub(source), self.remaining.load(Ordering::Relaxed))
    }

    /// Whether every byte has been handed over.
    pub(super) fn is_sent(&self) -> bool {
        self.remaining.load(Ordering::Relaxed) == 0
    }

    /// Why the body failed, if it did.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn waits_for_source(&self, waits: bool) {
        let (since, before) = &mut *self.source_wait();
        if waits {
            since.get_or_insert_with(Instant::now);
        } else {
            *before += since.take().map_or(Duration::ZERO, |since| since.elapsed());
        }
    }

    fn source_wait(&self) -> MutexGuard<'_, (Option<Instant>, Duration)> {
        self.source_wait.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self, remaining: u64) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_byte_ms.store(now, Ordering::Relaxed);
        self.remaining.store(remaining, Ordering::Relaxed);
    }
}

impl Body for FeedBody {
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
        let polled = lock(&this.feed).poll(context, this.remaining);
        this.state.waits_for_source(polled.is_pending());
        match ready!(polled) {
            Ok(chunk) => {
                this.remaining -= chunk.len() as u64;
                this.state.moved(this.remaining);
                Poll::Ready(Some(Ok(Frame::data(chunk))))
            }
            Err(error) => {
                *this.state.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Poll::Ready(Some(Err(BodyFailed)))
            }
        }
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
    use crate::{
        oci::Digest,
        registry::{ErrorKind, Layout, Source},
    };

    /// Where it comes from matters to messages alone.
    fn opener(blob: &Descriptor) -> BlobOpener {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let source = layout.repository("r.example".parse().unwrap(), "a".parse().unwrap());
        BlobOpener::new(&Source::Layout(source), blob.clone())
    }

    fn blob(promised: &[u8]) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest: Digest::sha256(promised),
            size: promised.len() as u64,
            urls: Vec::new(),
        }
    }

    fn stream(parts: Vec<Vec<u8>>) -> BlobStream {
        futures::stream::iter(parts.into_iter().map(|part| Ok(Bytes::from(part)))).boxed()
    }

    fn feed(blob: &Descriptor, parts: Vec<Vec<u8>>, sum: &Arc<AtomicU64>) -> SharedFeed {
        let marks = Marks::for_size(blob.size);
        let beginning = Feed::beginning(blob, &marks, 0);
        let meter = Arc::new(Meter::new(Arc::clone(sum), None));
        Arc::new(Mutex::new(Feed::new(&opener(blob), beginning, stream(parts), marks, meter)))
    }

    async fn sent(feed: &SharedFeed, len: u64) -> (Vec<u8>, Option<Error>) {
        let mut body = FeedBody::new(feed, len);
        let state = body.state();
        let mut sent = Vec::new();
        while let Some(Ok(frame)) = body.frame().await {
            sent.extend(frame.into_data().unwrap_or_default());
        }
        (sent, state.take_failure())
    }

    fn words(parts: &[&str]) -> Vec<Vec<u8>> {
        parts.iter().map(|part| part.as_bytes().to_vec()).collect()
    }

    #[tokio::test]
    async fn good_bytes_pass_whole_and_are_counted() {
        let sum = Arc::new(AtomicU64::new(0));
        let feed = feed(&blob(b"hello world"), words(&["hello ", "world"]), &sum);
        let (sent, failure) = sent(&feed, 11).await;
        assert_eq!((&sent[..], failure.is_none()), (&b"hello world"[..], true));
        assert_eq!(sum.load(Ordering::Relaxed), 11);
        drop(feed);
        assert_eq!(sum.load(Ordering::Relaxed), 0, "what nobody finished is taken out again");
    }

    #[tokio::test]
    async fn the_last_frame_of_bad_bytes_is_never_sent() {
        for parts in [&["hello ", "worle"][..], &["hello "], &["hello ", "world!"]] {
            let feed = feed(&blob(b"hello world"), words(parts), &Arc::default());
            let (sent, failure) = sent(&feed, 11).await;
            assert_eq!(sent, b"hello ", "{parts:?}");
            assert!(matches!(failure.unwrap().kind, ErrorKind::Integrity(_)));
        }
    }

    #[tokio::test]
    async fn a_blob_is_sent_in_pieces_that_frames_do_not_decide() {
        let feed = feed(&blob(b"hello world"), words(&["hello ", "world"]), &Arc::default());
        for expected in ["hel", "lo ", "wor", "ld"] {
            assert_eq!(sent(&feed, expected.len() as u64).await.0, expected.as_bytes());
        }
    }

    #[tokio::test]
    async fn a_feed_that_goes_on_reads_only_from_the_last_mark() {
        let content: Vec<u8> = (0..9 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
        let blob = blob(&content);
        let parts = |from: usize| content[from..].chunks(300_000).map(<[u8]>::to_vec).collect();
        let first = feed(&blob, parts(0), &Arc::default());
        sent(&first, 4_000_000).await;
        let marks = lock(&first).take_marks();

        let stored = 3_500_000;
        let (offset, hasher) = Feed::beginning(&blob, &marks, stored);
        assert!((2_000_000..=stored).contains(&offset), "begins at {offset}");
        let stream = stream(parts(usize::try_from(offset).unwrap()));
        let mut next =
            Feed::new(&opener(&blob), (offset, hasher), stream, marks, Arc::new(Meter::new(Arc::default(), None)));
        next.skip_to(stored).await.unwrap();
        let next = Arc::new(Mutex::new(next));
        let (sent, failure) = sent(&next, blob.size - stored).await;
        assert!(failure.is_none() && sent == content[3_500_000..]);
    }

    #[tokio::test]
    async fn small_blobs_leave_no_marks() {
        let content = vec![7; 100_000];
        let first = feed(&blob(&content), vec![content], &Arc::default());
        sent(&first, 100_000).await;
        assert!(lock(&first).take_marks().states.is_empty());
    }
}
