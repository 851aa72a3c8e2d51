//! The medium that outlives its node, and the faults it can be told to have.

use super::MemDevice;
use super::medium::{Block, Change, Medium};
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};
use std::rc::Rc;
use std::time::Duration;

/// What can go wrong with one operation, each with a probability from 0 to 1.
#[derive(Clone, PartialEq, Debug)]
pub struct Faults {
    /// A read is answered with an I/O error.
    pub read_error: f64,
    /// A write is answered with an I/O error; some of its blocks may have been written.
    pub write_error: f64,
    /// Bytes from which on a write may be answered with an error.
    pub write_error_from: u64,
    /// A write is answered and nothing was written.
    pub lost_write: f64,
    /// A write is answered and went to another place of the disk.
    pub misdirected_write: f64,
    /// A write is answered and at least one of its blocks was not written.
    pub torn_write: f64,
    /// One bit of what a read returns is wrong; the medium is not changed.
    pub bit_flip_on_read: f64,
    /// How long an operation takes, drawn evenly: concurrent operations overtake each other.
    pub latency: RangeInclusive<Duration>,
}

impl Default for Faults {
    /// None, and up to 20 µs of latency: a fast NVMe device's.
    fn default() -> Faults {
        Faults {
            read_error: 0.0,
            write_error: 0.0,
            write_error_from: 0,
            lost_write: 0.0,
            misdirected_write: 0.0,
            torn_write: 0.0,
            bit_flip_on_read: 0.0,
            latency: Duration::ZERO..=Duration::from_micros(20),
        }
    }
}

struct Halt {
    /// Writes still let through, this one included when 1.
    remaining: u64,
    on_halt: Option<Box<dyn FnOnce()>>,
}

pub(super) struct State {
    pub medium: Medium,
    pub random: SplitMix64,
    pub faults: Faults,
    /// Writes and discards submitted and not completed.
    pub under_way: BTreeMap<u64, Change>,
    /// Writes nobody waits for any more that the device has not finished with.
    lingering: Vec<Change>,
    pub next_operation: u64,
    /// Counts power cuts: operations of an earlier power-up never complete.
    pub power_ups: u64,
    pub halted: bool,
    pub gone: bool,
    pub faults_injected: u64,
    /// Where writes that begin are lost.
    losing: Vec<Range<u64>>,
    /// Blocks that can't be read until they are written.
    pub bad_blocks: BTreeSet<u64>,
    halt: Option<Halt>,
    write_count: u64,
    /// Reads asked for, and their bytes.
    reads: (u64, u64),
    bytes_discarded: u64,
}

impl State {
    /// Draws whether a fault of this probability happens. No draw when it cannot.
    pub fn strikes(&mut self, probability: f64) -> bool {
        if probability <= 0.0 {
            return false;
        }
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let struck = draw < probability;
        self.faults_injected += u64::from(struck);
        struck
    }

    /// Whether a write that begins here is lost because somebody asked for that.
    pub fn loses(&mut self, offset: u64) -> bool {
        let lost = self.losing.iter().any(|range| range.contains(&offset));
        self.faults_injected += u64::from(lost);
        lost
    }

    pub fn latency(&mut self) -> Duration {
        let (least, most) = (*self.faults.latency.start(), *self.faults.latency.end());
        let spread = most.saturating_sub(least).as_nanos() as u64;
        least + Duration::from_nanos(self.random.below(spread + 1))
    }

    /// Applies each block of a change, or not, by the seed.
    pub fn apply_some(&mut self, change: &Change) {
        let quarters = self.random.below(5);
        let blocks: Vec<_> = change.blocks.iter().filter(|_| self.random.below(4) < quarters).cloned().collect();
        self.medium.apply(&Change { blocks, durable: change.durable });
    }

    /// What the written blocks of a discarded range hold then is the device's own affair: all keep
    /// what they held, read as zeroes, or as something else; or each does as it likes.
    pub fn discarded(&mut self, first: u64, end: u64, block_size: usize) -> Vec<(u64, Option<Block>)> {
        let mut bytes = vec![0; block_size];
        bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&self.random.next_u64().to_le_bytes()));
        let garbage = Block::from(bytes);
        let for_all = self.random.below(4);
        let mut blocks = Vec::new();
        for block in self.medium.written(first, end) {
            let choice = if for_all < 3 { for_all } else { self.random.below(3) };
            match choice {
                0 => {}
                1 => blocks.push((block, None)),
                _ => blocks.push((block, Some(garbage.clone()))),
            }
        }
        blocks
    }

    /// What becomes of a change whose future was dropped: it may also land later, over what is
    /// written in between.
    pub fn abandon(&mut self, change: Change) {
        match self.random.one_in(2) {
            true => self.apply_some(&change),
            false => self.lingering.push(change),
        }
    }

    /// Some abandoned writes land; all of them when the next node opens the disk.
    pub fn land(&mut self, all: bool) {
        for change in std::mem::take(&mut self.lingering) {
            match all || self.random.one_in(4) {
                true => self.apply_some(&change),
                false => self.lingering.push(change),
            }
        }
    }
}

/// The medium: survives the death of the node that opened it.
pub struct MemDisk {
    name: String,
    size: u64,
    block: u32,
    pub(super) state: RefCell<State>,
}

impl MemDisk {
    /// A disk of zeroes.
    ///
    /// # Panics
    /// If `block` is not a power of two from 512 to 4096 or `size` not a multiple of it.
    pub fn new(name: &str, size: u64, block: u32, seed: u64) -> Rc<MemDisk> {
        assert!(block.is_power_of_two() && (512..=4096).contains(&block), "block size {block}");
        assert!(size.is_multiple_of(block.into()), "size {size} is no multiple of {block}");
        let state = State {
            medium: Medium::default(),
            random: SplitMix64::new(seed),
            faults: Faults::default(),
            under_way: BTreeMap::new(),
            lingering: Vec::new(),
            next_operation: 0,
            power_ups: 0,
            halted: false,
            gone: false,
            faults_injected: 0,
            losing: Vec::new(),
            bad_blocks: BTreeSet::new(),
            halt: None,
            write_count: 0,
            reads: (0, 0),
            bytes_discarded: 0,
        };
        Rc::new(MemDisk { name: name.to_owned(), size, block, state: RefCell::new(state) })
    }

    /// The disk as one node sees it until the next power cut.
    pub fn open(self: &Rc<Self>, handle: &Handle) -> Rc<MemDevice> {
        let mut state = self.state.borrow_mut();
        // The kernel finishes a dead process's operations before it gives up the lock.
        state.land(true);
        let power_up = state.power_ups;
        Rc::new(MemDevice::new(self.clone(), handle.clone(), power_up))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn block(&self) -> u32 {
        self.block
    }

    /// Keeps what was flushed (or written with `fua`) and a seeded random subset of all other
    /// blocks. Operations under way, and all later ones of devices opened so far, never
    /// complete. A halt is over.
    pub fn power_cut(&self) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let under_way = std::mem::take(&mut state.under_way).into_values();
        let under_way = under_way.chain(std::mem::take(&mut state.lingering)).collect();
        state.medium.power_cut(under_way, &mut state.random);
        state.power_ups += 1;
        state.halted = false;
        state.halt = None;
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state.borrow_mut().faults = faults;
    }

    /// From now on writes that begin in these ranges, and no others, are answered and lost.
    pub fn lose_writes(&self, ranges: Vec<Range<u64>>) {
        self.state.borrow_mut().losing = ranges;
    }

    /// Medium errors: reads of any block of the range are answered with an error until it is written.
    pub fn refuse_reads(&self, range: Range<u64>) {
        let block = u64::from(self.block);
        self.state.borrow_mut().bad_blocks.extend(range.start / block..range.end.div_ceil(block));
    }

    /// Faults that struck so far: a test that injects them asserts that some did.
    pub fn faults_injected(&self) -> u64 {
        self.state.borrow().faults_injected
    }

    /// Writes, flushes and discards submitted so far.
    pub fn write_count(&self) -> u64 {
        self.state.borrow().write_count
    }

    /// Reads asked for so far, and their bytes.
    pub fn reads(&self) -> (u64, u64) {
        self.state.borrow().reads
    }

    /// Bytes discarded so far.
    pub fn bytes_discarded(&self) -> u64 {
        self.state.borrow().bytes_discarded
    }

    /// Blocks that take memory.
    pub fn blocks_held(&self) -> usize {
        self.state.borrow().medium.blocks_held()
    }

    /// At the `writes`-th further write, flush or discard (the next one is 1): that operation
    /// and everything after it never completes, reads and operations already under way
    /// included, and `on_halt` is called. `None` takes an earlier call back; so does a power cut.
    pub fn halt_after(&self, writes: Option<u64>, on_halt: Option<Box<dyn FnOnce()>>) {
        let halt = writes.map(|writes| Halt { remaining: writes.max(1), on_halt });
        let before = {
            let mut state = self.state.borrow_mut();
            state.halted = false;
            std::mem::replace(&mut state.halt, halt)
        };
        drop(before);
    }

    pub(super) fn count_read(&self, bytes: u64) {
        let reads = &mut self.state.borrow_mut().reads;
        *reads = (reads.0 + 1, reads.1 + bytes);
    }

    pub(super) fn count_discard(&self, bytes: u64) {
        self.state.borrow_mut().bytes_discarded += bytes;
    }

    /// Counts one write-like operation; at a halt gives back what to call once no borrow is held.
    pub(super) fn count_write(&self) -> Option<Box<dyn FnOnce()>> {
        let mut state = self.state.borrow_mut();
        state.write_count += 1;
        let halt = state.halt.as_mut()?;
        halt.remaining -= 1;
        if halt.remaining > 0 {
            return None;
        }
        state.halted = true;
        state.halt.take().and_then(|halt| halt.on_halt)
    }

    /// Bit rot: changes every byte of the range, wherever the disk keeps it.
    ///
    /// # Panics
    /// If the range lies beyond the end.
    pub fn corrupt(&self, offset: u64, length: usize, seed: u64) {
        assert!(offset + length as u64 <= self.size, "range beyond the end of {}", self.name);
        let mut random = SplitMix64::new(seed);
        let block_size = self.block as usize;
        let mut state = self.state.borrow_mut();
        let (mut position, end) = (offset, offset + length as u64);
        while position < end {
            let start = (position % u64::from(self.block)) as usize;
            let count = (block_size - start).min((end - position) as usize);
            // Never zero: every byte changes.
            let mask: Vec<u8> = (0..count).map(|_| 1 + random.below(255) as u8).collect();
            state.medium.scramble(position / u64::from(self.block), start, &mask, block_size);
            position += count as u64;
        }
    }

    /// Bit rot all over: changes about `per_mille` in a thousand of the blocks ever written; answers
    /// how many.
    pub fn corrupt_written(&self, per_mille: u64, seed: u64) -> u64 {
        let mut random = SplitMix64::new(seed);
        let written = self.state.borrow().medium.written(0, self.size / u64::from(self.block));
        let chosen = written.into_iter().filter(|_| random.below(1000) < per_mille);
        let chosen: Vec<u64> = chosen.collect();
        for block in &chosen {
            let start = random.below(u64::from(self.block));
            let length = 1 + random.below(u64::from(self.block) - start);
            self.corrupt(block * u64::from(self.block) + start, length as usize, random.next_u64());
        }
        chosen.len() as u64
    }

    /// The device is gone: every operation is answered so, those under way included.
    pub fn fail(&self) {
        self.state.borrow_mut().gone = true;
    }

    /// The device is back, with what it held.
    pub fn restore(&self) {
        self.state.borrow_mut().gone = false;
    }

    /// An independent copy of the disk and its cache, without operations under way, halts or
    /// faults.
    pub fn snapshot(&self) -> Rc<MemDisk> {
        let copy = MemDisk::new(&self.name, self.size, self.block, 0);
        {
            let (ours, mut theirs) = (self.state.borrow(), copy.state.borrow_mut());
            theirs.medium = ours.medium.clone();
            theirs.random = ours.random.clone();
        }
        copy
    }
}
