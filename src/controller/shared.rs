//! Answers of the Kubernetes API that many objects wait for: one of them asks, and the others take what it was told.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Mutex as AsyncMutex, time::Instant};

/// Namespace and name.
type Key = (String, String);
/// An answer and when it came. Locked while it is asked for.
type Slot<T> = Arc<AsyncMutex<Option<(Instant, T)>>>;

/// The last answers, by namespace and name.
pub(super) struct Shared<T> {
    slots: Mutex<HashMap<Key, Slot<T>>>,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self { slots: Mutex::default() }
    }
}

impl<T: Clone> Shared<T> {
    /// The last answer and its age, if that is fresh, else what `ask` says now. Who comes meanwhile waits for the same.
    pub(super) async fn get<E>(
        &self,
        namespace: &str,
        name: &str,
        is_fresh: impl Fn(Duration) -> bool,
        ask: impl AsyncFnOnce() -> Result<T, E>,
    ) -> Result<(T, Duration), E> {
        let slot = self.slot(namespace, name);
        let mut slot = slot.lock().await;
        if let Some((at, answer)) = slot.as_ref().filter(|(at, _)| is_fresh(at.elapsed())) {
            return Ok((answer.clone(), at.elapsed()));
        }
        let answer = ask().await?;
        *slot = Some((Instant::now(), answer.clone()));
        Ok((answer, Duration::ZERO))
    }

    /// An answer that somebody has got who did not ask for the last one.
    pub(super) fn put(&self, namespace: &str, name: &str, answer: T) {
        // Where somebody asks just now, theirs is as good.
        if let Ok(mut slot) = self.slot(namespace, name).try_lock() {
            *slot = Some((Instant::now(), answer));
        }
    }

    /// What was said of one name is not true any more. Who asks just now is told it still, and comes again.
    pub(super) fn forget(&self, namespace: &str, name: &str) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.remove(&(namespace.to_owned(), name.to_owned()));
    }

    /// The same of everything.
    pub(super) fn forget_all(&self) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn slot(&self, namespace: &str, name: &str) -> Slot<T> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= Self::MAX_SLOTS {
            // Nobody is refused for it: what is forgotten is asked for once more.
            slots.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        Arc::clone(slots.entry((namespace.to_owned(), name.to_owned())).or_default())
    }

    /// Each is some hundred bytes.
    const MAX_SLOTS: usize = 1 << 16;
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicU32, Ordering},
    };

    use futures::future::join_all;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn many_that_wait_for_one_answer_cause_one_question_at_a_time() {
        let (shared, asked) = (Shared::default(), AtomicU32::new(0));
        let ask = async || {
            tokio::time::sleep(Duration::from_millis(10)).await;
            Ok::<_, Infallible>(asked.fetch_add(1, Ordering::Relaxed) + 1)
        };
        let limit = Duration::from_secs(5);
        let get = |name: &'static str| shared.get("n", name, move |age| age < limit, ask);
        let all = join_all((0..100).map(|_| get("a"))).await;
        assert!(all.into_iter().all(|answer| answer.unwrap().0 == 1));
        assert_eq!(get("b").await.unwrap().0, 2, "another name is another question");
        tokio::time::advance(Duration::from_secs(4)).await;
        let (answer, age) = get("a").await.unwrap();
        assert!(answer == 1 && age >= Duration::from_secs(4));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(get("a").await.unwrap(), (3, Duration::ZERO));
        shared.put("n", "a", 7);
        assert_eq!(get("a").await.unwrap().0, 7);
        shared.forget("n", "b");
        assert_eq!((get("a").await.unwrap().0, get("b").await.unwrap().0), (7, 4));
        shared.forget_all();
        assert_eq!(get("a").await.unwrap().0, 5);
    }
}
