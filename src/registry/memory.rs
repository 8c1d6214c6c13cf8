//! How many bytes of manifests and lists are in memory at one time, counted for the whole process: registries choose how
//! large they are, and many may be read side by side.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// The room that there is. Clones are the same room.
#[derive(Clone, Debug)]
pub struct Memory {
    free: Arc<Semaphore>,
    total: u32,
}

/// A part of the room, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Room(OwnedSemaphorePermit);

impl Memory {
    /// So much unless something else is configured, in bytes: enough for four of the largest manifests.
    pub const DEFAULT: u32 = 16 << 20;

    /// Room for so many bytes.
    #[must_use]
    pub fn new(bytes: u32) -> Self {
        Self { free: Arc::new(Semaphore::new(bytes as usize)), total: bytes }
    }

    /// Waits for room, at most this long: who waits may hold some already, and so may those that are waited for.
    pub(super) async fn take(&self, bytes: u64, patience: Duration) -> Option<Room> {
        let wait = Arc::clone(&self.free).acquire_many_owned(self.counted(bytes));
        timeout(patience, wait).await.ok()?.ok().map(Room)
    }

    /// Room, if there is some now.
    pub(crate) fn try_take(&self, bytes: u64) -> Option<Room> {
        Arc::clone(&self.free).try_acquire_many_owned(self.counted(bytes)).ok().map(Room)
    }

    /// One that is larger than all the room takes all of it.
    fn counted(&self, bytes: u64) -> u32 {
        u32::try_from(bytes).unwrap_or(u32::MAX).min(self.total)
    }
}

impl Room {
    /// Gives back what is not needed.
    pub(super) fn shrink(&mut self, bytes: usize) {
        if let Some(surplus) = self.0.num_permits().checked_sub(bytes) {
            drop(self.0.split(surplus));
        }
    }

    /// Both as one.
    pub(super) fn merge(&mut self, other: Self) {
        self.0.merge(other.0);
    }

    /// The bytes that the room is for: it is given back when the last of them is dropped.
    pub(crate) fn around(self, bytes: Bytes) -> Bytes {
        Bytes::from_owner(Held { bytes, _room: self })
    }
}

struct Held {
    bytes: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn room_is_given_back_with_the_last_of_the_bytes() {
        let memory = Memory::new(100);
        let mut room = memory.take(80, Duration::ZERO).await.unwrap();
        assert!(memory.try_take(21).is_none());
        room.shrink(60);
        assert!(memory.try_take(40).is_some());
        let bytes = room.around(Bytes::from_static(b"abc"));
        let part = bytes.slice(1..);
        drop(bytes);
        assert!(memory.take(41, Duration::from_secs(1)).await.is_none(), "a part of them is there");
        assert_eq!(part, b"bc"[..]);
        drop(part);
        assert!(memory.try_take(1000).is_some(), "what is larger than all the room takes all of it");
    }
}
