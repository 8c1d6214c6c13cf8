//! Answers that are had one at a time for each key, and kept while they are good.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::Mutex as AsyncMutex;

type Slot<V> = Arc<AsyncMutex<Option<V>>>;

/// Answers by key.
pub(super) struct Slots<K, V> {
    slots: Mutex<HashMap<K, Slot<V>>>,
    is_good: fn(&V) -> bool,
}

impl<K: Eq + Hash, V: Clone> Slots<K, V> {
    /// `is_good` is whether an answer can be given again.
    pub(super) fn new(is_good: fn(&V) -> bool) -> Self {
        Self { slots: Mutex::default(), is_good }
    }

    /// The answer that there is, if it is good and `accept` takes it, or the one that is fetched. Whoever asks meanwhile
    /// waits for the same fetch.
    pub(super) async fn get<F, E>(&self, key: K, accept: impl Fn(&V) -> bool, fetch: impl FnOnce() -> F) -> Result<V, E>
    where
        F: Future<Output = Result<V, E>>,
    {
        let slot = self.slot(key);
        let mut slot = slot.lock().await;
        if let Some(found) = slot.as_ref().filter(|found| (self.is_good)(found) && accept(found)) {
            return Ok(found.clone());
        }
        *slot = None;
        let found = fetch().await?;
        *slot = Some(found.clone());
        Ok(found)
    }

    /// The answer that there is, unless one is being fetched.
    pub(super) fn peek(&self, key: &K) -> Option<V> {
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()?;
        slot.try_lock().ok()?.clone()
    }

    fn slot(&self, key: K) -> Slot<V> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= Self::MAX_SLOTS {
            // Whoever waits for a slot keeps it alive by its Arc.
            slots.retain(|_, slot| {
                Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|v| v.as_ref().is_some_and(self.is_good))
            });
        }
        Arc::clone(slots.entry(key).or_default())
    }

    const MAX_SLOTS: usize = 4096;
}
