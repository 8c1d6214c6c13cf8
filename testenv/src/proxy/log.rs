//! The record of everything that went through the proxy, and waiting for something to be in it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail};
use http::HeaderMap;
use tokio::sync::watch;

use super::action::Action;
use super::key::Key;

/// A request and its answer.
#[derive(Clone, Debug)]
pub struct Exchange {
    pub key: Key,
    /// With the query.
    pub path: String,
    /// Of the request.
    pub headers: HeaderMap,
    pub user_agent: String,
    /// Whether the client sent credentials.
    pub authorized: bool,
    /// The `Range` header.
    pub range: Option<String>,
    /// Of the answer that the client got, or would have got; none as long as there is none.
    pub status: Option<u16>,
    /// Bytes of the bodies that have gone through.
    pub request_bytes: u64,
    pub response_bytes: u64,
    /// What a rule did to it.
    pub actions: Vec<Action>,
    /// Whether it is over: answered completely, or cut.
    pub done: bool,
}

#[derive(Debug, Default)]
struct State {
    exchanges: Vec<Exchange>,
    violations: Vec<String>,
    /// Entries that were forgotten; numbers of entries stay valid.
    forgotten: usize,
    /// The keys of forgotten entries still count for `nth`.
    keys: Vec<Key>,
}

/// Clones are the same log.
#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<()>,
}

impl Log {
    /// Adds an exchange that begins; its key gets the right `nth`.
    pub(super) fn begin(&self, mut exchange: Exchange, actions: impl FnOnce(&Key, &str) -> Vec<Action>) -> Entry {
        let mut state = self.state();
        let before = state.keys.iter().filter(|key| key.is_same_but_nth(&exchange.key)).count();
        exchange.key.nth = u32::try_from(before).unwrap_or(u32::MAX).saturating_add(1);
        exchange.actions = actions(&exchange.key, &exchange.path);
        state.keys.push(exchange.key.clone());
        state.exchanges.push(exchange);
        let number = state.forgotten + state.exchanges.len() - 1;
        drop(state);
        self.changed.send_replace(());
        Entry { log: self.clone(), number }
    }

    pub(super) fn exchanges(&self) -> Vec<Exchange> {
        self.state().exchanges.clone()
    }

    pub(super) fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    pub(super) fn violation(&self, text: String) {
        self.state().violations.push(text);
        self.changed.send_replace(());
    }

    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.forgotten += state.exchanges.len();
        state.exchanges.clear();
    }

    pub(super) async fn wait_for(&self, is_true: impl Fn(&[Exchange]) -> bool, deadline: Duration) -> Result<()> {
        // Before the first look, so that no change is missed.
        let mut changed = self.changed.subscribe();
        let wait = async {
            while !is_true(&self.state().exchanges) {
                changed.changed().await?;
            }
            anyhow::Ok(())
        };
        if let Ok(result) = tokio::time::timeout(deadline, wait).await {
            return result;
        }
        let seen: Vec<String> = self
            .exchanges()
            .iter()
            .map(|exchange| format!("{} {:?} done: {}", exchange.key, exchange.status, exchange.done))
            .collect();
        bail!("not seen within {deadline:?}; what was seen:\n{}", seen.join("\n"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One exchange in the log. Clones are the same exchange.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    log: Log,
    number: usize,
}

impl Entry {
    pub(super) fn change(&self, change: impl FnOnce(&mut Exchange)) {
        let mut state = self.log.state();
        let position = self.number.checked_sub(state.forgotten);
        if let Some(exchange) = position.and_then(|position| state.exchanges.get_mut(position)) {
            change(exchange);
        }
        drop(state);
        self.log.changed.send_replace(());
    }
}

/// Marks the exchange as done when it is dropped, whichever way that comes.
#[derive(Debug)]
pub(super) struct Done(pub(super) Entry);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.change(|exchange| exchange.done = true);
    }
}
