//! A bounded cache of data blocks and table indexes, shared by all groups of a node.

use crate::block::Block;
use crate::table::TableIndex;
use cfs_reactor::collections::HashMap;
use cfs_wire::BlobId;
use std::cell::RefCell;
use std::rc::Rc;

#[derive(Clone)]
pub(crate) enum Cached {
    Block(Block),
    Index(Rc<TableIndex>),
}

/// A blob and an offset in it.
type Key = (u128, u32);

struct Slot {
    key: Key,
    value: Cached,
    weight: usize,
    /// Second chance: used since the hand last passed.
    used: bool,
}

#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    places: HashMap<Key, usize>,
    hand: usize,
    bytes: usize,
}

/// Evicts by the clock algorithm (second chance): near LRU, one bit a slot.
pub struct BlockCache {
    bytes_max: usize,
    state: RefCell<State>,
}

/// What a slot costs beside its bytes: the slot, the map's entry, allocator slack.
const SLOT_OVERHEAD: usize = 160;

impl BlockCache {
    /// 64 MiB holds the indexes and filters of thirty million keys, or the hot blocks of fewer.
    pub const BYTES_MAX_DEFAULT: usize = 64 << 20;

    pub fn new(bytes_max: usize) -> Rc<BlockCache> {
        Rc::new(BlockCache { bytes_max, state: RefCell::default() })
    }

    pub fn bytes(&self) -> usize {
        self.state.borrow().bytes
    }

    pub(crate) fn get(&self, blob: BlobId, offset: u32) -> Option<Cached> {
        let mut state = self.state.borrow_mut();
        let place = state.places.get(&(blob.0, offset)).copied()?;
        let slot = &mut state.slots[place];
        slot.used = true;
        Some(slot.value.clone())
    }

    pub(crate) fn insert(&self, blob: BlobId, offset: u32, value: Cached, bytes: usize) {
        let weight = bytes + SLOT_OVERHEAD;
        let key = (blob.0, offset);
        let mut state = self.state.borrow_mut();
        // Larger than an eighth of the cache: not worth what it would push out.
        if weight > self.bytes_max / 8 || state.places.contains_key(&key) {
            return;
        }
        while state.bytes + weight > self.bytes_max {
            state.evict_one();
        }
        let place = state.slots.len();
        state.places.insert(key, place);
        state.bytes += weight;
        state.slots.push(Slot { key, value, weight, used: false });
    }
}

impl State {
    fn evict_one(&mut self) {
        loop {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let slot = &mut self.slots[self.hand];
            if slot.used {
                slot.used = false;
                self.hand += 1;
                continue;
            }
            let slot = self.slots.swap_remove(self.hand);
            self.places.remove(&slot.key);
            self.bytes -= slot.weight;
            if let Some(moved) = self.slots.get(self.hand) {
                self.places.insert(moved.key, self.hand);
            }
            self.hand += 1;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockBuilder;

    fn block() -> Cached {
        let mut builder = BlockBuilder::default();
        builder.add(b"key", Some(&[0; 100]));
        let mut out = Vec::new();
        builder.finish(&mut out);
        Cached::Block(Block::parse(out.into()).unwrap())
    }

    #[test]
    fn the_cache_stays_within_its_bound_and_keeps_what_is_used() {
        let cache = BlockCache::new(16 * (100 + SLOT_OVERHEAD));
        for blob in 0..200u128 {
            cache.insert(BlobId(blob), 0, block(), 100);
            assert!(cache.bytes() <= 16 * (100 + SLOT_OVERHEAD));
            assert!(cache.get(BlobId(0), 0).is_some(), "blob 0 is used every time");
        }
        assert!(cache.get(BlobId(100), 0).is_none());
        assert!(cache.get(BlobId(199), 0).is_some());
        let state = cache.state.borrow();
        assert!(state.places.iter().all(|(key, place)| state.slots[*place].key == *key));
        assert_eq!(state.places.len(), state.slots.len());
    }
}
