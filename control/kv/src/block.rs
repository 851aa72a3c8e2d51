//! A data block: sorted entries with prefix-compressed keys and restart points.
//!
//! Each entry is: varint shared, varint suffix length, varint tag (0: deletion; n + 1: a value
//! of n bytes), key suffix, value. Every 16th entry shares nothing and its offset is listed, as
//! u32, after the last entry; the block ends with the u32 count of those offsets.

use crate::coding::{Reader, put_varint};
use crate::error::Malformed;
use bytes::Bytes;

/// A key, and its value or `None` for a deletion.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub key: Bytes,
    pub value: Option<Bytes>,
}

/// Entries between restart points: a binary search ends with 16 decoded keys at most.
const RESTART_INTERVAL: usize = 16;

#[derive(Default)]
pub struct BlockBuilder {
    bytes: Vec<u8>,
    restarts: Vec<u32>,
    last_key: Vec<u8>,
    count: usize,
}

impl BlockBuilder {
    /// Keys must ascend strictly.
    pub fn add(&mut self, key: &[u8], value: Option<&[u8]>) {
        let mut shared = 0;
        if self.count.is_multiple_of(RESTART_INTERVAL) {
            self.restarts.push(self.bytes.len() as u32);
        } else {
            shared = key.iter().zip(&self.last_key).take_while(|(new, last)| new == last).count();
        }
        put_varint(&mut self.bytes, shared as u64);
        put_varint(&mut self.bytes, (key.len() - shared) as u64);
        put_varint(&mut self.bytes, value.map_or(0, |value| value.len() as u64 + 1));
        self.bytes.extend_from_slice(&key[shared..]);
        self.bytes.extend_from_slice(value.unwrap_or_default());
        self.last_key.truncate(shared);
        self.last_key.extend_from_slice(&key[shared..]);
        self.count += 1;
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn last_key(&self) -> &[u8] {
        &self.last_key
    }

    /// Length of the finished block.
    pub fn length(&self) -> usize {
        self.bytes.len() + 4 * self.restarts.len() + 4
    }

    /// Appends the block to `out` and starts an empty one.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes);
        for restart in &self.restarts {
            out.extend_from_slice(&restart.to_le_bytes());
        }
        out.extend_from_slice(&(self.restarts.len() as u32).to_le_bytes());
        self.bytes.clear();
        self.restarts.clear();
        self.last_key.clear();
        self.count = 0;
    }
}

/// A block as read. Cheap to clone.
#[derive(Clone)]
pub struct Block {
    bytes: Bytes,
    entries_end: usize,
    restarts: usize,
}

impl Block {
    pub fn parse(bytes: Bytes) -> Result<Block, Malformed> {
        let tail = bytes.len().checked_sub(4).ok_or(Malformed("a block has no restart count"))?;
        let restarts = Reader::new(&bytes[tail..]).u32()? as usize;
        let entries_end = restarts.checked_mul(4).and_then(|length| tail.checked_sub(length));
        let entries_end = entries_end.ok_or(Malformed("a block's restart points exceed it"))?;
        if restarts == 0 || entries_end == 0 {
            return Err(Malformed("a block is empty"));
        }
        Ok(Block { bytes, entries_end, restarts })
    }

    fn restart(&self, index: usize) -> Result<usize, Malformed> {
        let at = self.entries_end + 4 * index;
        let tail = self.bytes.get(at..).ok_or(Malformed("a restart point is missing"))?;
        let offset = Reader::new(tail).u32()? as usize;
        if offset >= self.entries_end {
            return Err(Malformed("a restart point is outside its block"));
        }
        Ok(offset)
    }

    fn restart_key(&self, index: usize) -> Result<&[u8], Malformed> {
        let mut reader = Reader::new(&self.bytes[self.restart(index)?..self.entries_end]);
        let (shared, suffix, _tag) = (reader.length()?, reader.length()?, reader.length()?);
        if shared != 0 {
            return Err(Malformed("a restart entry shares a prefix"));
        }
        reader.take(suffix)
    }

    /// The value of exactly this key; `Some(None)` when the block holds its deletion.
    pub fn get(&self, key: &[u8]) -> Result<Option<Option<Bytes>>, Malformed> {
        let mut cursor = BlockCursor::new(self.clone());
        cursor.seek(key)?;
        Ok(cursor.next()?.filter(|entry| entry.key == key).map(|entry| entry.value))
    }
}

/// Walks a block forwards.
pub struct BlockCursor {
    block: Block,
    offset: usize,
    key: Vec<u8>,
    /// Decoded by `seek`, not taken yet.
    found: Option<Option<Bytes>>,
}

impl BlockCursor {
    pub fn new(block: Block) -> BlockCursor {
        BlockCursor { block, offset: 0, key: Vec::new(), found: None }
    }

    /// Moves so that `next` gives the first entry at or above `target`.
    pub fn seek(&mut self, target: &[u8]) -> Result<(), Malformed> {
        let (mut low, mut high) = (0, self.block.restarts);
        // The last restart point below the target, or the first.
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.block.restart_key(middle)? < target {
                low = middle;
            } else {
                high = middle;
            }
        }
        self.offset = self.block.restart(low)?;
        self.key.clear();
        self.found = None;
        while let Some(value) = self.decode()? {
            if self.key.as_slice() >= target {
                self.found = Some(value);
                break;
            }
        }
        Ok(())
    }

    #[allow(clippy::should_implement_trait, reason = "fallible")]
    pub fn next(&mut self) -> Result<Option<Entry>, Malformed> {
        let value = match self.found.take() {
            Some(value) => Some(value),
            None => self.decode()?,
        };
        Ok(value.map(|value| Entry { key: Bytes::copy_from_slice(&self.key), value }))
    }

    /// Decodes the entry at `offset` into `key` and answers its value.
    fn decode(&mut self) -> Result<Option<Option<Bytes>>, Malformed> {
        if self.offset >= self.block.entries_end {
            return Ok(None);
        }
        let mut reader = Reader::new(&self.block.bytes[self.offset..self.block.entries_end]);
        let (shared, suffix, tag) = (reader.length()?, reader.length()?, reader.length()?);
        if shared > self.key.len() {
            return Err(Malformed("an entry shares more than the key before it"));
        }
        let suffix = reader.take(suffix)?;
        self.key.truncate(shared);
        self.key.extend_from_slice(suffix);
        let value = match tag.checked_sub(1) {
            None => None,
            Some(length) => {
                let start = self.offset + reader.position();
                reader.take(length)?;
                Some(self.block.bytes.slice(start..start + length))
            }
        };
        self.offset += reader.position();
        Ok(Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn build(entries: &BTreeMap<Vec<u8>, Option<Vec<u8>>>) -> Bytes {
        let mut builder = BlockBuilder::default();
        for (key, value) in entries {
            builder.add(key, value.as_deref());
        }
        let length = builder.length();
        let mut out = Vec::new();
        builder.finish(&mut out);
        assert_eq!(out.len(), length);
        out.into()
    }

    proptest! {
        #[test]
        fn a_block_gives_back_its_entries(
            entries in proptest::collection::btree_map(
                proptest::collection::vec(0u8..4, 0..6),
                proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
                1..120,
            ),
            probe in proptest::collection::vec(0u8..4, 0..6),
        ) {
            let block = Block::parse(build(&entries)).unwrap();
            let mut cursor = BlockCursor::new(block.clone());
            for (key, value) in &entries {
                let entry = cursor.next().unwrap().unwrap();
                prop_assert_eq!((&entry.key[..], entry.value.as_deref()), (&key[..], value.as_deref()));
            }
            prop_assert_eq!(cursor.next().unwrap(), None);
            cursor.seek(&probe).unwrap();
            let expected = entries.range(probe.clone()..).next().map(|(key, _)| Bytes::from(key.clone()));
            prop_assert_eq!(cursor.next().unwrap().map(|entry| entry.key), expected);
            let expected = entries.get(&probe).map(|value| value.clone().map(Bytes::from));
            prop_assert_eq!(block.get(&probe).unwrap(), expected);
        }

        #[test]
        fn arbitrary_bytes_are_an_error_or_entries_but_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(block) = Block::parse(bytes.into()) {
                let _ = block.get(b"key");
                let mut cursor = BlockCursor::new(block);
                while let Ok(Some(_)) = cursor.next() {}
            }
        }
    }
}
