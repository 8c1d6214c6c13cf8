//! A body on its way through the proxy: in pieces, at the line's pace, counted, and damaged as a rule says.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body as _, Frame};

use super::action::Close;
use super::line::Control;
use super::log::{Done, Entry};
use crate::pace::{PIECE, Pace};

/// All bodies come from a connection; those that we make ourselves cannot fail.
pub(super) type Body = UnsyncBoxBody<Bytes, hyper::Error>;

#[derive(Clone, Copy, Debug)]
pub(super) enum Direction {
    Up,
    Down,
}

/// What happens when so many bytes are through.
pub(super) enum Stop {
    Cut(Close),
    Stall,
    /// The body is over.
    End,
}

/// A body with everything that happens to it.
pub(super) struct Flow {
    pub(super) direction: Direction,
    pub(super) pace: Arc<Pace>,
    pub(super) entry: Entry,
    /// Of the connection that the body goes out on.
    pub(super) outgoing: Arc<Control>,
    /// Of the client's connection; it ends everything, the upstream's connection too.
    pub(super) client: Arc<Control>,
    pub(super) stop: Option<(u64, Stop)>,
    pub(super) flip: Option<u64>,
    /// With the answer's body the exchange is over.
    #[expect(dead_code, reason = "is there to be dropped")]
    pub(super) done: Option<Done>,
}

impl Flow {
    pub(super) fn of(self, body: Body) -> Body {
        // Not a stream: hyper knows the length of an empty body, and writes no chunks.
        if body.is_end_stream() {
            return body;
        }
        let state = State { flow: self, body, rest: Bytes::new(), passed: 0 };
        let stream = futures::stream::unfold(state, |mut state| async {
            let frame = state.next().await?;
            Some((frame, state))
        });
        StreamBody::new(stream).boxed_unsync()
    }
}

struct State {
    flow: Flow,
    body: Body,
    rest: Bytes,
    passed: u64,
}

impl State {
    async fn next(&mut self) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        if let Some((after, stop)) = &self.flow.stop
            && self.passed >= *after
        {
            if matches!(stop, Stop::End) {
                return None;
            }
            self.flow.outgoing.flushed().await;
            if let Stop::Cut(close) = stop {
                self.flow.outgoing.end(*close);
                self.flow.client.end(*close);
            }
            // The connection's owner drops us, or it stalls for good.
            return std::future::pending().await;
        }
        while self.rest.is_empty() {
            match self.body.frame().await? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Some(Ok(trailers)),
                },
                Err(error) => {
                    // Half a body must not look like a whole one.
                    self.flow.client.end(Close::Fin);
                    return Some(Err(error));
                }
            }
        }
        let mut size = self.rest.len().min(PIECE);
        if let Some((after, _)) = self.flow.stop {
            size = size.min(usize::try_from(after - self.passed).unwrap_or(usize::MAX));
        }
        let mut piece = self.rest.split_to(size);
        self.flow.pace.take(piece.len()).await;
        if let Some(at) = self.flow.flip
            && let Some(position) = at.checked_sub(self.passed).and_then(|position| usize::try_from(position).ok())
            && position < piece.len()
        {
            let mut bytes = piece.to_vec();
            bytes[position] ^= 1;
            piece = bytes.into();
        }
        let count = piece.len() as u64;
        self.passed += count;
        let direction = self.flow.direction;
        self.flow.entry.change(|exchange| match direction {
            Direction::Up => exchange.request_bytes += count,
            Direction::Down => exchange.response_bytes += count,
        });
        Some(Ok(Frame::data(piece)))
    }
}
