//! Whose run is next: so many at a time, and namespaces take turns, so that one with many objects does not keep
//! another's first run waiting for longer than there are places.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// The places for runs. All clones are the same places.
#[derive(Clone)]
pub(super) struct Turns {
    state: Arc<Mutex<State>>,
}

/// A place, given back when it is dropped.
pub(super) struct Turn {
    turns: Turns,
}

struct State {
    free: usize,
    /// Who waits, by namespace, in the order of arrival. No queue is empty.
    waiting: HashMap<String, VecDeque<oneshot::Sender<Turn>>>,
    /// The namespaces that wait, in the order of their turns.
    order: VecDeque<String>,
}

impl Turns {
    /// So many places.
    pub(super) fn new(places: usize) -> Self {
        let state = State { free: places, waiting: HashMap::new(), order: VecDeque::new() };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Waits for a place. Whoever stops waiting gives up only its own turn.
    pub(super) async fn take(&self, namespace: &str) -> Option<Turn> {
        let waiting = {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Some(Turn { turns: self.clone() });
            }
            let (sender, receiver) = oneshot::channel();
            if !state.waiting.contains_key(namespace) {
                state.order.push_back(namespace.to_owned());
            }
            state.waiting.entry(namespace.to_owned()).or_default().push_back(sender);
            receiver
        };
        waiting.await.ok()
    }

    /// The next that waits: the namespace goes to the end of the order if it has more.
    fn next(&self) -> Option<oneshot::Sender<Turn>> {
        let mut state = self.state();
        let Some(namespace) = state.order.pop_front() else {
            state.free += 1;
            return None;
        };
        let queue = state.waiting.get_mut(&namespace)?;
        let next = queue.pop_front();
        if queue.is_empty() {
            state.waiting.remove(&namespace);
        } else {
            state.order.push_back(namespace);
        }
        next
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(next) = self.turns.next() {
            // One that has stopped waiting gives the place back at once, which makes the next one's turn.
            let _ = next.send(Turn { turns: self.turns.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, future::BoxFuture};

    use super::*;

    fn wait<'a>(turns: &'a Turns, namespace: &'a str) -> BoxFuture<'a, Option<Turn>> {
        let mut waiting = turns.take(namespace).boxed();
        assert!((&mut waiting).now_or_never().is_none(), "{namespace} did not have to wait");
        waiting
    }

    #[tokio::test]
    async fn a_newcomer_waits_for_no_more_runs_than_there_are_places() {
        let turns = Turns::new(2);
        let mut running = vec![turns.take("busy").await.unwrap(), turns.take("busy").await.unwrap()];
        let mut busy: Vec<_> = (0..50).map(|_| wait(&turns, "busy")).collect();
        let newcomer = wait(&turns, "newcomer");
        // The first place that is free goes to who came first, the second to the other namespace.
        running.remove(0);
        running.push(busy.remove(0).await.unwrap());
        running.remove(0);
        assert!(newcomer.now_or_never().is_some());
    }

    #[tokio::test]
    async fn who_stops_waiting_takes_nobodys_place() {
        let turns = Turns::new(1);
        let running = turns.take("a").await.unwrap();
        let (gone, stays) = (wait(&turns, "a"), wait(&turns, "b"));
        drop(gone);
        drop(running);
        assert!(stays.now_or_never().flatten().is_some());
        assert!(turns.take("c").now_or_never().is_some(), "the place was given back");
    }
}
