//! Committed bytes kept for reading again and ahead: whole blocks, bounded in bytes, oldest out
//! first.

use bytes::Bytes;
use cfs_reactor::sync::Notify;
use cfs_wire::Ino;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// What is kept and read ahead in one piece: large enough that a call's cost does not count.
pub(crate) const BLOCK_BYTES: u64 = 256 << 10;

type Key = (Ino, u64);

enum Slot {
    /// Being fetched; `token` tells a later fetch of the same block from this one.
    Loading { token: u64, done: Rc<Notify> },
    /// `token` is its fetch's: the block's place in the order.
    Kept { token: u64, bytes: Bytes },
}

/// What a reader finds at a block.
pub(crate) enum Found {
    Bytes(Bytes),
    Loading(cfs_reactor::sync::Notified),
    Nothing,
}

pub(crate) struct Pages {
    slots: BTreeMap<Key, Slot>,
    /// Blocks with the fetch that brought them, oldest first. Of some only another fetch's bytes are
    /// kept any more, or none.
    order: VecDeque<(Key, u64)>,
    bytes: usize,
    bytes_max: usize,
    next_token: u64,
    /// Since the last [`Pages::drop_unused`].
    used: Cell<bool>,
    /// Calls of that in a row in which nothing was.
    idle: u32,
}

impl Pages {
    pub fn new(bytes_max: usize) -> Pages {
        Pages {
            slots: BTreeMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            bytes_max,
            next_token: 0,
            used: Cell::new(false),
            idle: 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Drops all that is kept if nothing was looked for during so many calls; whether it did.
    pub fn drop_unused(&mut self, calls: u32) -> bool {
        self.idle = if self.used.replace(false) { 0 } else { self.idle + 1 };
        if self.idle < calls || self.is_empty() {
            return false;
        }
        self.slots.retain(|_, slot| matches!(slot, Slot::Loading { .. }));
        self.order = VecDeque::new();
        self.bytes = 0;
        true
    }

    pub fn find(&self, ino: Ino, block: u64) -> Found {
        self.used.set(true);
        match self.slots.get(&(ino, block)) {
            Some(Slot::Kept { bytes, .. }) => Found::Bytes(bytes.clone()),
            Some(Slot::Loading { done, .. }) => Found::Loading(done.notified()),
            None => Found::Nothing,
        }
    }

    /// Announces a fetch; `None` if the block is there or on its way.
    pub fn begin(&mut self, ino: Ino, block: u64) -> Option<u64> {
        if self.slots.contains_key(&(ino, block)) {
            return None;
        }
        self.next_token += 1;
        self.slots.insert((ino, block), Slot::Loading { token: self.next_token, done: Notify::new() });
        Some(self.next_token)
    }

    /// Ends a fetch. What was dropped meanwhile is not brought back.
    pub fn end(&mut self, ino: Ino, block: u64, token: u64, bytes: Option<Bytes>) {
        let key = (ino, block);
        let done = match self.slots.get(&key) {
            Some(Slot::Loading { token: current, done }) if *current == token => done.clone(),
            _ => return,
        };
        self.slots.remove(&key);
        self.used.set(true);
        if let Some(bytes) = bytes {
            self.bytes += bytes.len();
            self.slots.insert(key, Slot::Kept { token, bytes });
            self.order.push_back((key, token));
            self.shrink();
        }
        done.notify_all();
    }

    /// Drops what overlaps a range.
    pub fn drop_range(&mut self, ino: Ino, offset: u64, end: u64) {
        if offset >= end {
            return;
        }
        let (first, last) = (offset / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        let keys: Vec<Key> = self.slots.range((ino, first)..=(ino, last)).map(|(key, _)| *key).collect();
        for key in keys {
            match self.slots.remove(&key) {
                Some(Slot::Kept { bytes, .. }) => self.bytes -= bytes.len(),
                Some(Slot::Loading { done, .. }) => done.notify_all(),
                None => {}
            }
        }
    }

    pub fn drop_inode(&mut self, ino: Ino) {
        self.drop_range(ino, 0, u64::MAX);
    }

    fn shrink(&mut self) {
        while self.bytes > self.bytes_max {
            let Some((key, fetch)) = self.order.pop_front() else { return };
            if is_kept(&self.slots, &key, fetch)
                && let Some(Slot::Kept { bytes, .. }) = self.slots.remove(&key)
            {
                self.bytes -= bytes.len();
            }
        }
        // What was dropped otherwise stays behind in the order: at most one place of a block counts.
        if self.order.len() > 2 * self.slots.len() + 64 {
            let slots = &self.slots;
            self.order.retain(|(key, fetch)| is_kept(slots, key, *fetch));
        }
    }
}

/// Whether what this fetch brought is still there.
fn is_kept(slots: &BTreeMap<Key, Slot>, key: &Key, fetch: u64) -> bool {
    matches!(slots.get(key), Some(Slot::Kept { token, .. }) if *token == fetch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fetch_that_was_overtaken_by_a_change_is_not_kept() {
        let mut pages = Pages::new(1 << 20);
        let ino = Ino::from_u64(5);
        let token = pages.begin(ino, 0).unwrap();
        assert!(pages.begin(ino, 0).is_none(), "one fetch at a time");
        pages.drop_range(ino, 10, 20);
        let second = pages.begin(ino, 0).unwrap();
        pages.end(ino, 0, token, Some(Bytes::from_static(b"old")));
        assert!(matches!(pages.find(ino, 0), Found::Loading(_)));
        pages.end(ino, 0, second, Some(Bytes::from_static(b"new")));
        assert!(matches!(pages.find(ino, 0), Found::Bytes(bytes) if bytes == "new"));
    }

    #[test]
    fn the_oldest_blocks_make_room() {
        let mut pages = Pages::new(10);
        let ino = Ino::from_u64(5);
        for block in 0..4 {
            let token = pages.begin(ino, block).unwrap();
            pages.end(ino, block, token, Some(Bytes::from_static(b"1234")));
        }
        assert!(matches!(pages.find(ino, 1), Found::Nothing));
        assert!(matches!(pages.find(ino, 3), Found::Bytes(_)));
        assert_eq!(pages.bytes, 8);
    }

    #[test]
    fn what_nobody_looks_for_is_dropped_and_what_is_on_its_way_is_not() {
        let (mut pages, ino) = (Pages::new(16), Ino::from_u64(5));
        fetch(&mut pages, ino, 0);
        let token = pages.begin(ino, 1).unwrap();
        let drop_unused = |pages: &mut Pages| pages.drop_unused(2);
        assert!(!drop_unused(&mut pages), "it has just come");
        assert!(!drop_unused(&mut pages), "once is not enough");
        assert!(matches!(pages.find(ino, 0), Found::Bytes(_)));
        assert!(!drop_unused(&mut pages) && !drop_unused(&mut pages), "it was looked for");
        assert!(drop_unused(&mut pages));
        assert!(matches!(pages.find(ino, 0), Found::Nothing));
        assert!(pages.is_empty() && !drop_unused(&mut pages));
        pages.end(ino, 1, token, Some(Bytes::from_static(b"1234")));
        assert!(matches!(pages.find(ino, 1), Found::Bytes(bytes) if bytes == "1234"));
    }

    fn fetch(pages: &mut Pages, ino: Ino, block: u64) {
        let token = pages.begin(ino, block).unwrap();
        pages.end(ino, block, token, Some(Bytes::from_static(b"1234")));
    }

    #[test]
    fn a_block_dropped_and_fetched_again_and_again_has_one_place_in_the_order() {
        let mut pages = Pages::new(16);
        let ino = Ino::from_u64(5);
        for _ in 0..10_000 {
            pages.drop_range(ino, 0, 1);
            fetch(&mut pages, ino, 0);
        }
        assert!(pages.order.len() <= 2 + 64, "{} places for one block", pages.order.len());
        // And the newest of them counts: it is younger than these.
        for block in 1..4 {
            fetch(&mut pages, ino, block);
        }
        pages.drop_range(ino, 0, 1);
        fetch(&mut pages, ino, 0);
        fetch(&mut pages, ino, 4);
        assert!(matches!(pages.find(ino, 1), Found::Nothing));
        assert!(matches!(pages.find(ino, 0), Found::Bytes(_)));
    }
}
