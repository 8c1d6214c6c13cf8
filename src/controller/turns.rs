//! Whose run is next: so many at a time, and namespaces take turns. A namespace that has no run under way gets a place
//! beyond these, so that one whose runs take long, or never end, does not keep the others from theirs.

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
    namespace: String,
}

struct State {
    places: usize,
    under_way: usize,
    /// How many of these are whose. None is zero.
    running: HashMap<String, usize>,
    /// Who waits, by namespace, in the order of arrival. No queue is empty.
    waiting: HashMap<String, VecDeque<oneshot::Sender<Turn>>>,
    /// The namespaces that wait, in the order of their turns.
    order: VecDeque<String>,
}

impl Turns {
    /// So many places, and as many beyond them for namespaces that have none.
    pub(super) fn new(places: usize) -> Self {
        let (running, waiting, order) = Default::default();
        let state = State { places, under_way: 0, running, waiting, order };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Waits for a place. Whoever stops waiting gives up only its own turn.
    pub(super) async fn take(&self, namespace: &str) -> Option<Turn> {
        let waiting = {
            let mut state = self.state();
            if state.may_start(namespace) {
                return Some(self.turn(&mut state, namespace.to_owned()));
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

    fn turn(&self, state: &mut State, namespace: String) -> Turn {
        state.under_way += 1;
        *state.running.entry(namespace.clone()).or_default() += 1;
        Turn { turns: self.clone(), namespace }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn may_start(&self, namespace: &str) -> bool {
        let beyond = if self.running.contains_key(namespace) { 0 } else { self.places };
        self.under_way < self.places + beyond
    }

    fn ended(&mut self, namespace: &str) {
        self.under_way -= 1;
        if let Some(running) = self.running.get_mut(namespace) {
            *running -= 1;
            if *running == 0 {
                self.running.remove(namespace);
            }
        }
    }

    /// The next that waits and may start: its namespace goes to the end of the order if it has more.
    fn next(&mut self) -> Option<(String, oneshot::Sender<Turn>)> {
        let at = self.order.iter().position(|namespace| self.may_start(namespace))?;
        let namespace = self.order.remove(at)?;
        let queue = self.waiting.get_mut(&namespace)?;
        let next = queue.pop_front()?;
        if queue.is_empty() {
            self.waiting.remove(&namespace);
        } else {
            self.order.push_back(namespace.clone());
        }
        Some((namespace, next))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let next = {
            let mut state = self.turns.state();
            state.ended(&self.namespace);
            state.next().map(|(namespace, next)| (next, self.turns.turn(&mut state, namespace)))
        };
        if let Some((next, turn)) = next {
            // One that has stopped waiting gives the place back at once, which makes the next one's turn.
            let _ = next.send(turn);
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
    async fn who_has_no_run_gets_a_place_beyond_those_that_others_hold() {
        let turns = Turns::new(2);
        let busy = [turns.take("busy").await.unwrap(), turns.take("busy").await.unwrap()];
        let more = wait(&turns, "busy");
        let first = turns.take("a").now_or_never().flatten().unwrap();
        let _second = turns.take("b").now_or_never().flatten().unwrap();
        let third = wait(&turns, "c");
        drop(first);
        assert!(third.now_or_never().flatten().is_some(), "there are as many again, and it had none");
        drop(busy);
        assert!(more.now_or_never().flatten().is_some(), "two are under way and one is back");
    }

    #[tokio::test]
    async fn namespaces_that_wait_take_turns() {
        let turns = Turns::new(1);
        let mut running = [turns.take("a").await.unwrap(), turns.take("b").await.unwrap()].map(Some);
        let mut busy: Vec<_> = (0..50).map(|_| wait(&turns, "a")).collect();
        let newcomer = wait(&turns, "c");
        // The first place that is given back is the newcomer's: the others have runs under way.
        running[1] = None;
        let newcomer = newcomer.now_or_never().flatten().unwrap();
        let other = wait(&turns, "b");
        running[0] = None;
        drop(newcomer);
        let next = other.now_or_never().flatten();
        let ours = busy.remove(0).now_or_never().flatten();
        assert!(next.is_some() || ours.is_some());
        assert!(busy.remove(0).now_or_never().is_none(), "not two of those that came first");
    }

    #[tokio::test]
    async fn who_stops_waiting_takes_nobodys_place() {
        let turns = Turns::new(1);
        let running = turns.take("a").await.unwrap();
        let (gone, stays) = (wait(&turns, "a"), wait(&turns, "a"));
        drop(gone);
        drop(running);
        let stays = stays.now_or_never().flatten().unwrap();
        drop(stays);
        assert!(turns.take("c").now_or_never().is_some(), "the place was given back");
    }
}
