//! What the disk holds: the durable image, the image that reads see, and between the two the
//! ordered list of blocks not flushed yet. Blocks never written take no memory.

use cfs_reactor::clock::SplitMix64;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// One block's bytes, shared between the images. `None` in a list means zeroes.
pub(super) type Block = Rc<[u8]>;
type Image = BTreeMap<u64, Block>;

#[derive(Clone)]
struct Unflushed {
    serial: u64,
    block: u64,
    data: Option<Block>,
}

/// The blocks of one write or discard, in ascending order.
#[derive(Clone)]
pub(super) struct Change {
    pub blocks: Vec<(u64, Option<Block>)>,
    /// Durable as soon as applied (a write with `fua`).
    pub durable: bool,
}

#[derive(Clone, Default)]
pub(super) struct Medium {
    durable: Image,
    visible: Image,
    unflushed: VecDeque<Unflushed>,
    next_serial: u64,
}

fn put(image: &mut Image, block: u64, data: Option<Block>) {
    match data {
        Some(data) => image.insert(block, data),
        None => image.remove(&block),
    };
}

impl Medium {
    pub fn read(&self, block: u64, into: &mut [u8]) {
        match self.visible.get(&block) {
            Some(data) => into.copy_from_slice(data),
            None => into.fill(0),
        }
    }

    pub fn apply(&mut self, change: &Change) {
        if change.durable && !self.unflushed.is_empty() {
            // What the cache still holds of these blocks is older and must never overtake.
            let blocks = &change.blocks;
            self.unflushed.retain(|entry| blocks.binary_search_by_key(&entry.block, |(block, _)| *block).is_err());
        }
        for (block, data) in &change.blocks {
            put(&mut self.visible, *block, data.clone());
            if change.durable {
                put(&mut self.durable, *block, data.clone());
            } else {
                self.unflushed.push_back(Unflushed { serial: self.next_serial, block: *block, data: data.clone() });
                self.next_serial += 1;
            }
        }
    }

    /// Everything applied before this mark is what a flush called now must keep.
    pub fn mark(&self) -> u64 {
        self.next_serial
    }

    pub fn flush(&mut self, mark: u64) {
        while self.unflushed.front().is_some_and(|entry| entry.serial < mark) {
            let Some(entry) = self.unflushed.pop_front() else { return };
            put(&mut self.durable, entry.block, entry.data);
        }
    }

    /// Loses the cache: each unflushed block had reached the medium, or not, by the seed.
    pub fn power_cut(&mut self, under_way: Vec<Change>, random: &mut SplitMix64) {
        // Whole cuts that keep nothing or everything are as likely as the mixed ones.
        let quarters = random.below(5);
        for entry in std::mem::take(&mut self.unflushed) {
            if random.below(4) < quarters {
                put(&mut self.durable, entry.block, entry.data);
            }
        }
        for (block, data) in under_way.into_iter().flat_map(|change| change.blocks) {
            if random.below(4) < quarters {
                put(&mut self.durable, block, data);
            }
        }
        self.visible = self.durable.clone();
    }

    /// The blocks of a range that hold anything.
    pub fn written(&self, first: u64, end: u64) -> Vec<u64> {
        self.visible.range(first..end).map(|(block, _)| *block).collect()
    }

    /// Bytes not zero-filled by default, for bounds on a simulation's memory.
    pub fn blocks_held(&self) -> usize {
        self.visible.len() + self.unflushed.len()
    }

    /// Exclusive-ors `mask` into a block wherever it lies, starting at `start` within it.
    pub fn scramble(&mut self, block: u64, start: usize, mask: &[u8], block_size: usize) {
        let scrambled = |data: Option<&Block>| -> Block {
            let mut bytes = data.map_or_else(|| vec![0; block_size], |data| data.to_vec());
            bytes[start..start + mask.len()].iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
            bytes.into()
        };
        for image in [&mut self.durable, &mut self.visible] {
            let data = scrambled(image.get(&block));
            image.insert(block, data);
        }
        for entry in self.unflushed.iter_mut().filter(|entry| entry.block == block) {
            entry.data = Some(scrambled(entry.data.as_ref()));
        }
    }
}
