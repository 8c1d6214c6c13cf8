//! What the proxy does to a request instead of just passing it on, and the rules that say when.

use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::sync::watch;

use super::key::{Key, Matcher};

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// The other side reads an end of file. If it is still sending, the kernel follows up with a reset.
    Fin,
    /// The other side's next read or write fails.
    Reset,
}

/// One thing to do. Several in a rule are done together.
#[derive(Clone, Debug)]
pub enum Action {
    // Before the request goes on, in the order given:
    /// Wait first.
    Delay(Duration),
    /// Hold the request until the test opens the gate.
    Gate(Gate),
    /// Read the whole body of the request and drop it. What follows in the list answers: the request does not go on.
    DiscardRequestBody,
    /// Answer never. The connection stays until the client gives up.
    Stall,
    /// Answer this; the upstream does not see the request.
    Respond {
        status: u16,
        headers: Vec<(String, String)>,
        body: Bytes,
    },
    /// Close the client's connection; the upstream does not see the request.
    CloseBefore(Close),
    // On the way to the upstream:
    /// Replace or add a header of the request.
    SetRequestHeader {
        name: String,
        value: String,
    },
    /// Without `Range`, a registry answers 200 instead of 206.
    RemoveRequestHeader(String),
    /// Without `mount`, a mount starts an upload session.
    RemoveQuery(String),
    /// Invert a bit of the byte at this offset of the request's body.
    FlipRequestByte {
        at: u64,
    },
    /// Read nothing more after so many bytes of the request's body are at the upstream; that the client goes away
    /// then is not noticed either.
    StallRequestBody {
        after: u64,
    },
    /// Close both connections when so many bytes of the request's body are at the upstream.
    CutRequestBody {
        after: u64,
        close: Close,
    },
    // On the way back:
    /// Close the client's connection when the upstream has answered, without passing on anything.
    CloseAfterAnswer(Close),
    /// Hold the answer until the test opens the gate: the upstream has done its work, the client does not know.
    GateAnswer(Gate),
    /// Hold the answer so long.
    DelayAnswer(Duration),
    /// Say another status; headers and body stay.
    SetStatus(u16),
    /// Send this body instead. `Content-Length` says so, as with the next two; of a HEAD's answer only that changes.
    ReplaceBody(Bytes),
    /// Send this after the body.
    AppendBody(Bytes),
    /// End the body after so many bytes, as if there were no more.
    TruncateBody {
        after: u64,
    },
    /// Leave out the lines of the answer's body that contain this: events of a watch.
    DropLines(String),
    /// Put this (`https://HOST:PORT`) before the path and query of the answer's `Location`.
    MoveLocation(String),
    /// Replace or add a header of the answer, after everything above. For a body that is shorter than its
    /// `Content-Length`, cut it.
    SetHeader {
        name: String,
        value: String,
    },
    RemoveHeader(String),
    /// Invert a bit of the byte at this offset of the answer's body.
    FlipByte {
        at: u64,
    },
    /// Close the client's connection when so many bytes of the answer's body are with the client.
    CutResponseBody {
        after: u64,
        close: Close,
    },
    /// Send nothing more after so many bytes of the answer's body.
    StallResponseBody {
        after: u64,
    },
    // Both ways:
    /// Limit the bytes of the bodies per second, for this exchange alone, instead of the proxy's own limits.
    Throttle {
        bytes_per_second: u64,
    },
}

impl Action {
    /// Without a body; see [`Action::header`].
    #[must_use]
    pub fn respond(status: u16) -> Self {
        Self::Respond { status, headers: Vec::new(), body: Bytes::new() }
    }

    /// Adds a header to an answer of our own.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        if let Self::Respond { headers, .. } = &mut self {
            headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    /// Sets the body of an answer of our own.
    #[must_use]
    pub fn body(mut self, text: impl Into<Bytes>) -> Self {
        if let Self::Respond { body, .. } = &mut self {
            *body = text.into();
        }
        self
    }

    #[must_use]
    pub fn set_header(name: &str, value: &str) -> Self {
        Self::SetHeader { name: name.to_owned(), value: value.to_owned() }
    }

    #[must_use]
    pub fn set_request_header(name: &str, value: &str) -> Self {
        Self::SetRequestHeader { name: name.to_owned(), value: value.to_owned() }
    }

    #[must_use]
    pub fn replace_body(bytes: impl Into<Bytes>) -> Self {
        Self::ReplaceBody(bytes.into())
    }

    #[must_use]
    pub fn append_body(bytes: impl Into<Bytes>) -> Self {
        Self::AppendBody(bytes.into())
    }
}

impl From<Action> for Vec<Action> {
    fn from(action: Action) -> Self {
        vec![action]
    }
}

/// Holds requests until a test lets them go. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate {
    open: watch::Sender<bool>,
    held: watch::Sender<usize>,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// Closed.
    #[must_use]
    pub fn new() -> Self {
        Self { open: watch::Sender::new(false), held: watch::Sender::new(0) }
    }

    /// Lets all requests go that are held, and all later ones.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Waits until so many requests have come to the gate, at most 30 s.
    pub async fn arrived(&self, count: usize) -> Result<()> {
        let mut held = self.held.subscribe();
        let wait = held.wait_for(|held| *held >= count);
        tokio::time::timeout(Duration::from_secs(30), wait).await.context("nothing came to the gate")??;
        Ok(())
    }

    pub(super) async fn pass(&self) {
        self.held.send_modify(|held| *held += 1);
        // The sender is ours, so this ends only by opening.
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }
}

/// Rules in the order in which they were given; the first that matches is applied.
#[derive(Debug, Default)]
pub(super) struct Rules(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    matcher: Matcher,
    actions: Vec<Action>,
    matched: u32,
}

impl Rules {
    pub(super) fn add(&mut self, matcher: Matcher, actions: Vec<Action>) {
        self.0.push(Rule { matcher, actions, matched: 0 });
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn actions_for(&mut self, key: &Key, path: &str) -> Vec<Action> {
        for rule in self.0.iter_mut().filter(|rule| rule.matcher.matches(key, path)) {
            rule.matched += 1;
            let position = rule.matched.saturating_sub(rule.matcher.skip);
            if position >= 1 && rule.matcher.times.is_none_or(|times| position <= times) {
                return rule.actions.clone();
            }
        }
        Vec::new()
    }
}
