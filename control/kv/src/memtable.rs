//! What has been applied and is not in runs yet. Several versions of a key are kept only while
//! a reader can still see the older ones.

use crate::batch::Batch;
use crate::block::Entry;
use bytes::Bytes;
use smallvec::{SmallVec, smallvec};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::rc::Rc;

/// What an entry costs beside its key and value: the version list and the tree's node share.
const ENTRY_OVERHEAD: usize = 96;

/// A key's versions, oldest first: the batch's sequence and the value or a deletion.
type Versions = SmallVec<[(u64, Option<Bytes>); 1]>;

#[derive(Default)]
pub struct Memtable {
    entries: RefCell<BTreeMap<Bytes, Versions>>,
    bytes: Cell<usize>,
    /// Of the last batch, including batches without changes.
    sequence: Cell<u64>,
    applied: RefCell<Bytes>,
}

impl Memtable {
    pub fn new(sequence: u64, applied: Bytes) -> Rc<Memtable> {
        let memtable = Memtable::default();
        memtable.sequence.set(sequence);
        memtable.applied.replace(applied);
        Rc::new(memtable)
    }

    pub fn bytes(&self) -> usize {
        self.bytes.get()
    }

    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.borrow().is_empty()
    }

    pub fn sequence(&self) -> u64 {
        self.sequence.get()
    }

    pub fn applied(&self) -> Bytes {
        self.applied.borrow().clone()
    }

    /// Versions no reader in `readers` can see are dropped on the way.
    pub fn write(&self, batch: Batch, sequence: u64, applied: Bytes, readers: &Readers) {
        let newest_reader = readers.newest();
        let mut entries = self.entries.borrow_mut();
        let mut bytes = self.bytes.get();
        for (key, value) in batch.changes {
            bytes += value.as_ref().map_or(0, Bytes::len);
            match entries.get_mut(&key[..]) {
                Some(versions) => {
                    while let Some((older, _)) = versions.last() {
                        if newest_reader.is_some_and(|reader| reader >= *older) {
                            break;
                        }
                        let superseded = versions.pop().and_then(|(_, value)| value);
                        bytes -= superseded.map_or(0, |value| value.len());
                    }
                    versions.push((sequence, value));
                }
                None => {
                    bytes += key.len() + ENTRY_OVERHEAD;
                    entries.insert(key, smallvec![(sequence, value)]);
                }
            }
        }
        self.bytes.set(bytes);
        self.sequence.set(sequence);
        self.applied.replace(applied);
    }

    /// Frees up to `count` entries; true when none is left.
    pub fn shed(&mut self, count: usize) -> bool {
        let entries = self.entries.get_mut();
        (0..count).any(|_| entries.pop_first().is_none())
    }

    /// The version visible at `sequence`: `Some(None)` is a deletion.
    pub fn get(&self, key: &[u8], sequence: u64) -> Option<Option<Bytes>> {
        visible(self.entries.borrow().get(key)?, sequence)
    }
}

fn visible(versions: &Versions, sequence: u64) -> Option<Option<Bytes>> {
    versions.iter().rev().find(|(written, _)| *written <= sequence).map(|(_, value)| value.clone())
}

/// The sequences at which views are held.
#[derive(Default)]
pub struct Readers(RefCell<BTreeMap<u64, usize>>);

impl Readers {
    fn newest(&self) -> Option<u64> {
        self.0.borrow().last_key_value().map(|(sequence, _)| *sequence)
    }

    pub fn add(&self, sequence: u64) {
        *self.0.borrow_mut().entry(sequence).or_default() += 1;
    }

    pub fn remove(&self, sequence: u64) {
        let mut readers = self.0.borrow_mut();
        if let Some(count) = readers.get_mut(&sequence) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&sequence);
            }
        }
    }
}

/// Whether no key can lie between the bounds (`BTreeMap::range` panics on some such).
pub fn is_empty_range(lower: &Bound<Bytes>, upper: &Bound<Bytes>) -> bool {
    match (lower, upper) {
        (Bound::Included(low), Bound::Included(high)) => low > high,
        (Bound::Included(low) | Bound::Excluded(low), Bound::Included(high) | Bound::Excluded(high)) => low >= high,
        _ => false,
    }
}

/// Entries taken from the tree at once: one descent for each such batch.
const CURSOR_BATCH: usize = 64;

/// Walks what is visible at a sequence, deletions included.
pub struct MemtableCursor {
    memtable: Rc<Memtable>,
    sequence: u64,
    lower: Bound<Bytes>,
    upper: Bound<Bytes>,
    buffer: VecDeque<Entry>,
    exhausted: bool,
}

impl MemtableCursor {
    pub fn new(memtable: Rc<Memtable>, sequence: u64, lower: Bound<Bytes>, upper: Bound<Bytes>) -> MemtableCursor {
        let exhausted = is_empty_range(&lower, &upper);
        MemtableCursor { memtable, sequence, lower, upper, buffer: VecDeque::new(), exhausted }
    }

    #[allow(clippy::should_implement_trait, reason = "a cursor beside fallible ones of the same shape")]
    pub fn next(&mut self) -> Option<Entry> {
        if self.buffer.is_empty() && !self.exhausted {
            self.refill();
        }
        self.buffer.pop_front()
    }

    fn refill(&mut self) {
        let entries = self.memtable.entries.borrow();
        let bounds = (self.lower.as_ref().map(|key| &key[..]), self.upper.as_ref().map(|key| &key[..]));
        let mut last = None;
        for (key, versions) in entries.range::<[u8], _>(bounds) {
            if let Some(value) = visible(versions, self.sequence) {
                self.buffer.push_back(Entry { key: key.clone(), value });
            }
            if self.buffer.len() >= CURSOR_BATCH {
                last = Some(key.clone());
                break;
            }
        }
        match last {
            Some(key) => self.lower = Bound::Excluded(key),
            None => self.exhausted = true,
        }
        self.exhausted |= is_empty_range(&self.lower, &self.upper);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &'static str, value: &'static str) -> Batch {
        let mut batch = Batch::new();
        batch.put(key, value);
        batch
    }

    #[test]
    fn a_reader_keeps_the_version_it_can_see_and_nothing_else() {
        let (memtable, readers) = (Memtable::new(0, Bytes::new()), Readers::default());
        memtable.write(put("k", "one"), 1, Bytes::new(), &readers);
        let alone = memtable.bytes();
        memtable.write(put("k", "two"), 2, Bytes::new(), &readers);
        assert_eq!(memtable.bytes(), alone, "no reader: the old version is gone");
        readers.add(2);
        memtable.write(put("k", "six"), 3, Bytes::new(), &readers);
        memtable.write(put("k", "ten"), 4, Bytes::new(), &readers);
        assert_eq!(memtable.get(b"k", 2), Some(Some("two".into())));
        assert_eq!(memtable.get(b"k", 9), Some(Some("ten".into())));
        assert_eq!(memtable.get(b"k", 1), None);
        assert_eq!(memtable.bytes(), alone + 3, "versions 2 and 4");
        readers.remove(2);
        memtable.write(put("k", "new"), 5, Bytes::new(), &readers);
        assert_eq!(memtable.bytes(), alone);
    }

    #[test]
    fn reversed_and_point_free_ranges_are_empty() {
        let memtable = Memtable::new(0, Bytes::new());
        memtable.write(put("k", "v"), 1, Bytes::new(), &Readers::default());
        let key = || Bytes::from("k");
        let count = |lower, upper| {
            let mut cursor = MemtableCursor::new(memtable.clone(), 1, lower, upper);
            std::iter::from_fn(|| cursor.next()).count()
        };
        assert_eq!(count(Bound::Excluded(key()), Bound::Excluded(key())), 0);
        assert_eq!(count(Bound::Included("z".into()), Bound::Included(key())), 0);
        assert_eq!(count(Bound::Included(key()), Bound::Included(key())), 1);
        assert_eq!(count(Bound::Unbounded, Bound::Unbounded), 1);
    }
}
