//! Answers that are had one at a time for each key, and kept while they are good.
//!
//! Whoever asks while one is being had waits for it, and for its failure. What is being renewed, or could not be because
//! nobody answered, is good until its end.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Mutex as AsyncMutex;

/// When something is renewed, and when it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    renew_at: Instant,
    ends_at: Instant,
}

impl Term {
    /// Four fifths of a life that begins then are used.
    pub(crate) fn new(begin: Instant, life: Duration) -> Self {
        Self { renew_at: begin + life.mul_f64(0.8), ends_at: begin + life }
    }

    /// Whether it is not time to renew it.
    pub(crate) fn is_fresh(self) -> bool {
        Instant::now() < self.renew_at
    }

    fn is_over(self) -> bool {
        self.ends_at <= Instant::now()
    }

    /// To be renewed when a fifth of what is left is over.
    fn postponed(self) -> Self {
        let now = Instant::now();
        Self { renew_at: now + self.ends_at.saturating_duration_since(now).mul_f64(0.2), ..self }
    }

    #[cfg(test)]
    pub(super) fn renewed_after(self, begin: Instant) -> Duration {
        self.renew_at - begin
    }
}

struct Slot<V, E> {
    kept: Mutex<Option<(V, Term)>>,
    /// Held by whoever fetches; the failure of the last one who did.
    fetching: AsyncMutex<Option<(Instant, E)>>,
}

impl<V, E> Default for Slot<V, E> {
    fn default() -> Self {
        Self { kept: Mutex::default(), fetching: AsyncMutex::default() }
    }
}

impl<V: Clone, E> Slot<V, E> {
    fn kept(&self) -> Option<(V, Term)> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, value: &V, term: Term) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some((value.clone(), term));
    }
}

type Shared<V, E> = Arc<Slot<V, E>>;

/// Answers by key.
pub(crate) struct Slots<K, V, E> {
    slots: Mutex<HashMap<K, Shared<V, E>>>,
    may_pass: fn(&E) -> bool,
}

impl<K: Eq + Hash, V: Clone, E: Clone> Slots<K, V, E> {
    /// `may_pass` is whether a failure says nothing of what was asked for, so that asking again soon may succeed.
    pub(crate) fn new(may_pass: fn(&E) -> bool) -> Self {
        Self { slots: Mutex::default(), may_pass }
    }

    /// The answer that there is, if it is good and `accept` takes it, or the one that is fetched, with its term.
    ///
    /// A failure is the answer of whoever waited for it, and one that will not pass, from after `believed`, that of
    /// everybody. In place of one that may pass, what `accept` takes is given until its end.
    pub(crate) async fn get<F>(
        &self,
        key: K,
        believed: Instant,
        accept: impl Fn(&V) -> bool,
        fetch: impl FnOnce() -> F,
    ) -> Result<V, E>
    where
        F: Future<Output = Result<(V, Term), E>>,
    {
        let asked = Instant::now();
        let slot = self.slot(key);
        let usable = || slot.kept().filter(|(value, term)| !term.is_over() && accept(value));
        let is_fresh = |(_, term): &(V, Term)| term.is_fresh();
        if let Some((value, _)) = usable().filter(is_fresh) {
            return Ok(value);
        }
        let mut failed = match (slot.fetching.try_lock(), usable()) {
            (Ok(failed), _) => failed,
            // Somebody is renewing it.
            (Err(_), Some((value, _))) => return Ok(value),
            (Err(_), None) => slot.fetching.lock().await,
        };
        if let Some((value, _)) = usable().filter(is_fresh) {
            return Ok(value);
        }
        let is_answer = |(at, error): &&(Instant, E)| *at >= if (self.may_pass)(error) { asked } else { believed };
        if let Some((_, error)) = failed.as_ref().filter(is_answer) {
            return Err(error.clone());
        }
        match fetch().await {
            Ok((value, term)) => {
                slot.keep(&value, term);
                *failed = None;
                Ok(value)
            }
            Err(error) => match usable().filter(|_| (self.may_pass)(&error)) {
                Some((value, term)) => {
                    slot.keep(&value, term.postponed());
                    Ok(value)
                }
                None => {
                    *failed = Some((Instant::now(), error.clone()));
                    Err(error)
                }
            },
        }
    }

    /// The last answer.
    pub(crate) fn peek(&self, key: &K) -> Option<V> {
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()?;
        slot.kept().map(|(value, _)| value)
    }

    fn slot(&self, key: K) -> Shared<V, E> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= Self::MAX_SLOTS && !slots.contains_key(&key) {
            // Whoever waits for a slot keeps it alive by its Arc.
            let is_used = |slot: &Shared<V, E>| Arc::strong_count(slot) > 1;
            let is_fresh = |slot: &Shared<V, E>| slot.kept().is_some_and(|(_, term)| term.is_fresh());
            slots.retain(|_, slot| is_used(slot) || is_fresh(slot));
            // Too many that are good: rather had again than looked through at each request.
            if slots.len() > Self::MAX_SLOTS / 2 {
                slots.retain(|_, slot| is_used(slot));
            }
        }
        Arc::clone(slots.entry(key).or_default())
    }

    const MAX_SLOTS: usize = 4096;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;

    use super::*;

    /// Failures are whether they may pass.
    type Numbers = Slots<u32, u32, bool>;

    const HOUR: Duration = Duration::from_hours(1);

    fn given(value: u32, life: Duration) -> (u32, Term) {
        (value, Term::new(Instant::now(), life))
    }

    #[tokio::test]
    async fn a_failure_is_the_answer_of_all_that_waited_for_it() {
        for may_pass in [true, false] {
            let (slots, fetches) = (Numbers::new(|may_pass| *may_pass), AtomicUsize::new(0));
            let ask = || async {
                let fetch = || async {
                    fetches.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                    Err(may_pass)
                };
                slots.get(1, Instant::now(), |_| true, fetch).await
            };
            assert_eq!(join_all((0..32).map(|_| ask())).await, vec![Err(may_pass); 32]);
            assert_eq!(fetches.load(Ordering::Relaxed), 1);
            assert_eq!((ask().await, fetches.load(Ordering::Relaxed)), (Err(may_pass), 2), "who asks later asks anew");
        }
    }

    #[tokio::test]
    async fn a_failure_that_does_not_pass_is_believed_since_then() {
        let slots = Numbers::new(|may_pass| *may_pass);
        let began = Instant::now();
        let ask = async |answer| slots.get(1, began, |_| true, || async move { answer }).await;
        assert_eq!(ask(Err(true)).await, Err(true));
        assert_eq!(ask(Err(false)).await, Err(false), "the first one may have passed");
        assert_eq!(ask(Ok(given(7, HOUR))).await, Err(false));
        let later = slots.get(1, Instant::now(), |_| true, || async { Ok(given(7, HOUR)) }).await;
        assert_eq!((later, ask(Err(false)).await), (Ok(7), Ok(7)));
    }

    #[tokio::test]
    async fn what_cannot_be_renewed_for_a_while_is_good_until_its_end() {
        let slots = Numbers::new(|may_pass| *may_pass);
        let now = Instant::now();
        let due = Term { renew_at: now, ends_at: now + HOUR };
        let ask = async |accepted, answer| slots.get(1, now, |_| accepted, || async move { answer }).await;
        assert_eq!(ask(true, Ok((7, due))).await, Ok(7));
        assert_eq!(ask(true, Err(true)).await, Ok(7));
        assert_eq!(ask(true, Ok(given(8, HOUR))).await, Ok(7), "it is not tried again at once");
        assert_eq!(ask(false, Err(true)).await, Err(true), "what was refused is not given");
        assert_eq!(ask(false, Ok((9, due))).await, Ok(9));
        assert_eq!(ask(true, Err(false)).await, Err(false), "a refusal to renew is one");
        let over = Term { renew_at: now, ends_at: now };
        assert_eq!(slots.get(2, now, |_| true, || async { Ok((7, over)) }).await, Ok(7));
        assert_eq!(slots.get(2, now, |_| true, || async { Err(true) }).await, Err(true), "it is over");
    }

    #[tokio::test]
    async fn nobody_waits_for_what_is_being_renewed() {
        let slots = Numbers::new(|may_pass| *may_pass);
        let now = Instant::now();
        let due = Term { renew_at: now, ends_at: now + HOUR };
        let ask = async |answer| slots.get(1, now, |_| true, || async move { answer }).await;
        assert_eq!(ask(Ok((7, due))).await, Ok(7));
        let renews = slots.get(1, now, |_| true, std::future::pending::<Result<_, bool>>);
        tokio::pin!(renews);
        assert!(futures::poll!(&mut renews).is_pending());
        assert_eq!((ask(Err(false)).await, slots.peek(&1)), (Ok(7), Some(7)));
    }

    #[tokio::test]
    async fn there_is_a_bound() {
        let slots: Slots<usize, usize, ()> = Slots::new(|()| true);
        for key in 0..3 * Slots::<usize, usize, ()>::MAX_SLOTS {
            let term = Term::new(Instant::now(), HOUR);
            assert_eq!(slots.get(key, Instant::now(), |_| true, || async { Ok((key, term)) }).await, Ok(key));
            assert!(slots.slots.lock().unwrap().len() <= Slots::<usize, usize, ()>::MAX_SLOTS);
            assert_eq!(slots.peek(&key), Some(key));
        }
    }

    #[test]
    fn a_term_that_is_postponed_comes_again_before_its_end() {
        let now = Instant::now();
        let mut term = Term { renew_at: now, ends_at: now + HOUR };
        for _ in 0..16 {
            let next = term.postponed();
            assert!(next.renew_at > now && next.renew_at < next.ends_at && next.ends_at == term.ends_at);
            term = next;
        }
    }
}
