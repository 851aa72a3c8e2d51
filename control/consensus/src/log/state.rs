//! The log in memory: what each group would find, what waits to be written, and which batch
//! still holds something alive.
//!
//! Every record that matters (an entry, the last vote, the last committed and purge marks) has
//! a [`Slot`] naming the batch that holds it, so a batch whose last such record moves or dies
//! can be cut.

use super::LogError;
use super::batch::{BatchWriter, Header, Record, record_bytes};
use crate::types::{Entry, LogId, Raft, Vote};
use bytes::Bytes;
use cfs_reactor::sync::OneshotSender;
use cfs_wire::ShardId;
use cfs_wire::ids::BlobId;
use cfs_wire::planted::{self, Bug};
use openraft::storage::IOFlushed;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A batch is one blob, and a blob is at most 1 MiB.
pub(super) const BATCH_BYTES_MAX: usize = cfs_wire::limits::BLOB_BYTES_MAX;
/// What a small batch costs on the device beyond its bytes: the store's header block and the
/// alignment of the payload, 4 KiB each.
const BATCH_OVERHEAD_BYTES: u64 = 8 << 10;

/// Where a record is held.
#[derive(Clone, Copy)]
struct Slot {
    /// Which pending record will place this one; a stale pending record places nothing.
    stamp: u64,
    /// Batch that holds it; 0 while it only waits to be written.
    batch: u64,
    bytes: u64,
}

struct Held<T> {
    value: T,
    slot: Slot,
}

/// Who is told when a record is durable.
pub(super) enum Waiter {
    Flushed(IOFlushed<Raft>),
    Signal(OneshotSender<Result<(), LogError>>),
}

impl Waiter {
    pub fn complete(self, result: Result<(), LogError>) {
        match self {
            Waiter::Flushed(callback) => callback.io_completed(result.map_err(std::io::Error::from)),
            // Whoever waited may be gone; the record is written all the same.
            Waiter::Signal(sender) => drop(sender.send(result)),
        }
    }
}

struct Pending {
    stamp: u64,
    group: ShardId,
    /// `None` only marks a place in the order.
    record: Option<Record>,
    waiter: Option<Waiter>,
}

#[derive(Default)]
pub(super) struct Group {
    vote: Option<Held<Vote>>,
    committed: Option<Held<LogId>>,
    purged: Option<Held<LogId>>,
    entries: BTreeMap<u64, Held<Entry>>,
    /// Bytes of the entries above the purge mark.
    pub unpurged: u64,
    /// How far the state machine is synced, once its owner has said so: the limit of a purge.
    pub synced: Option<Option<u64>>,
}

impl Group {
    pub fn vote(&self) -> Option<Vote> {
        self.vote.as_ref().map(|held| held.value)
    }

    pub fn committed(&self) -> Option<LogId> {
        self.committed.as_ref().map(|held| held.value)
    }

    pub fn purged(&self) -> Option<LogId> {
        self.purged.as_ref().map(|held| held.value)
    }

    pub fn last(&self) -> Option<LogId> {
        self.entries.last_key_value().map(|(_, held)| held.value.log_id).or_else(|| self.purged())
    }

    pub fn is_empty(&self) -> bool {
        self.vote.is_none() && self.purged.is_none() && self.entries.is_empty()
    }

    pub fn entry_count(&self) -> usize {
        self.entries.len()
    }

    pub fn entries(&self, range: impl std::ops::RangeBounds<u64>) -> impl Iterator<Item = (&Entry, u64)> {
        self.entries.range(range).map(|(_, held)| (&held.value, held.slot.bytes))
    }

    /// First index missing between the purge mark and the last entry.
    pub fn hole(&self) -> Option<u64> {
        let begin = self.purged.as_ref().map_or(0, |held| held.value.index + 1);
        let expected = begin..;
        expected.zip(self.entries.keys()).find(|(expected, index)| expected != *index).map(|(expected, _)| expected)
    }
}

pub(super) struct Batch {
    pub id: Option<BlobId>,
    /// What it takes on a device, about.
    pub stored: u64,
    live: u64,
    live_bytes: u64,
    done: bool,
    waiters: Vec<Waiter>,
}

pub(super) struct State {
    pub groups: BTreeMap<ShardId, Group>,
    /// Batches written or being written, by sequence.
    pub batches: BTreeMap<u64, Batch>,
    pending: VecDeque<Pending>,
    /// Groups whose committed mark has moved since it was last written.
    committed_moved: BTreeSet<ShardId>,
    pub next_sequence: u64,
    pub durable: u64,
    pub first: u64,
    pub incarnation: u64,
    next_stamp: u64,
    pub stored: u64,
    pub in_flight: usize,
    pub failed: Option<LogError>,
}

/// A batch ready to be put.
pub(super) struct Formed {
    pub sequence: u64,
    pub bytes: Bytes,
}

impl State {
    pub fn new() -> State {
        State {
            groups: BTreeMap::new(),
            batches: BTreeMap::new(),
            pending: VecDeque::new(),
            committed_moved: BTreeSet::new(),
            next_sequence: 1,
            durable: 0,
            first: 1,
            incarnation: 0,
            next_stamp: 1,
            stored: 0,
            in_flight: 0,
            failed: None,
        }
    }

    pub fn unpurged(&self) -> u64 {
        self.groups.values().map(|group| group.unpurged).sum()
    }

    pub fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.in_flight == 0
    }

    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Takes a record into memory and queues it. `waiter` is told when it is durable.
    pub fn push(&mut self, group: ShardId, record: Record, waiter: Option<Waiter>) {
        let stamp = self.stamp();
        if let Record::Committed(id) = record {
            // Rides with the next batch, whoever causes it: losing it costs nothing.
            self.take(group, Record::Committed(id), stamp, 0);
            self.committed_moved.insert(group);
            return;
        }
        self.take(group, record.clone(), stamp, 0);
        self.pending.push_back(Pending { stamp, group, record: Some(record), waiter });
    }

    /// Queues a place in the order; it forces a batch even when nothing else waits.
    pub fn push_marker(&mut self, waiter: Waiter) {
        let stamp = self.stamp();
        self.pending.push_back(Pending { stamp, group: ShardId(0), record: None, waiter: Some(waiter) });
    }

    /// Takes a record found in `batch` at recovery.
    pub fn replay(&mut self, group: ShardId, record: Record, batch: u64) {
        let stamp = self.stamp();
        self.take(group, record, stamp, batch);
    }

    pub fn recovered(&mut self, sequence: u64, id: BlobId, length: usize) {
        let stored = length as u64 + BATCH_OVERHEAD_BYTES;
        self.stored += stored;
        let batch = Batch { id: Some(id), stored, live: 0, live_bytes: 0, done: true, waiters: Vec::new() };
        self.batches.insert(sequence, batch);
    }

    /// Makes the next batch from what waits; `None` when nothing does.
    pub fn form(&mut self) -> Option<Formed> {
        if self.pending.is_empty() || self.failed.is_some() {
            return None;
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let batch = Batch { id: None, stored: 0, live: 0, live_bytes: 0, done: false, waiters: Vec::new() };
        self.batches.insert(sequence, batch);
        let mut writer = BatchWriter::new();
        for group in std::mem::take(&mut self.committed_moved) {
            self.write_committed(&mut writer, group, sequence);
        }
        let mut waiters = Vec::new();
        while let Some(next) = self.pending.front() {
            let length = next.record.as_ref().map_or(0, record_bytes);
            if writer.len() + length > BATCH_BYTES_MAX {
                break;
            }
            let Some(next) = self.pending.pop_front() else { break };
            if let Some(record) = &next.record {
                writer.push(next.group, record);
                self.place(next.group, record, next.stamp, sequence);
            }
            waiters.extend(next.waiter);
        }
        let header = Header { sequence, durable: self.durable, first: self.first, incarnation: self.incarnation };
        let bytes = writer.seal(header);
        let stored = bytes.len() as u64 + BATCH_OVERHEAD_BYTES;
        self.stored += stored;
        if let Some(batch) = self.batches.get_mut(&sequence) {
            batch.stored = stored;
            batch.waiters = waiters;
        }
        self.in_flight += 1;
        Some(Formed { sequence, bytes })
    }

    /// A batch is on its targets: returns whom to tell, in order. A batch counts as durable
    /// only when all earlier ones are.
    pub fn completed(&mut self, sequence: u64, id: BlobId) -> Vec<Waiter> {
        self.in_flight -= 1;
        if let Some(batch) = self.batches.get_mut(&sequence) {
            batch.id = Some(id);
            batch.done = true;
        }
        let mut told = Vec::new();
        if planted::is(Bug::LogAckOutOfOrder) {
            told = self.waiters_of(sequence);
        }
        while let Some(batch) = self.batches.get_mut(&(self.durable + 1)) {
            if !batch.done {
                break;
            }
            self.durable += 1;
            told.append(&mut batch.waiters);
        }
        told
    }

    /// Everyone still waiting; nothing will be written any more.
    pub fn fail(&mut self, error: LogError) -> Vec<Waiter> {
        self.failed.get_or_insert(error);
        let mut told: Vec<Waiter> =
            self.batches.values_mut().flat_map(|batch| std::mem::take(&mut batch.waiters)).collect();
        told.extend(std::mem::take(&mut self.pending).into_iter().filter_map(|pending| pending.waiter));
        told
    }

    /// Takes the waiters of a batch before it is durable: only the planted bug does that.
    pub fn waiters_of(&mut self, sequence: u64) -> Vec<Waiter> {
        self.batches.get_mut(&sequence).map(|batch| std::mem::take(&mut batch.waiters)).unwrap_or_default()
    }

    /// The lowest sequence that would have to stay if up to `copy_bytes` of the oldest live
    /// records were copied forward. Batches below it are durable, and cutting them frees
    /// clearly more than the copies and the batches of the cut itself take: else a log full of
    /// live entries would be moved for ever.
    pub fn cut_point(&self, copy_bytes: u64) -> u64 {
        let (mut copied, mut freed) = (0, 0);
        let mut point = self.first;
        for (sequence, batch) in self.batches.range(self.first..self.first.max(self.durable + 1)) {
            copied += batch.live_bytes;
            freed += batch.stored;
            if copied > copy_bytes {
                break;
            }
            let own_batches = if copied > 0 { 4 } else { 2 };
            if freed >= 4 * copied + own_batches * BATCH_OVERHEAD_BYTES {
                point = sequence + 1;
            }
        }
        point
    }

    /// Queues again what is alive below `point`.
    pub fn copy_forward(&mut self, point: u64) {
        let old = |slot: &Slot| slot.batch != 0 && slot.batch < point;
        let mut copies = Vec::new();
        for (id, group) in &self.groups {
            copies.extend(
                group.purged.iter().filter(|held| old(&held.slot)).map(|held| (*id, Record::Purge(held.value))),
            );
            copies.extend(group.vote.iter().filter(|held| old(&held.slot)).map(|held| (*id, Record::Vote(held.value))));
            let entries = group.entries.values().filter(|held| old(&held.slot));
            copies.extend(entries.map(|held| (*id, Record::Entry(held.value.clone()))));
            if group.committed.as_ref().is_some_and(|held| old(&held.slot)) {
                self.committed_moved.insert(*id);
            }
        }
        for (group, record) in copies {
            let stamp = self.stamp();
            if let Some(slot) = self.slot_of(group, &record) {
                slot.stamp = stamp;
            }
            self.pending.push_back(Pending { stamp, group, record: Some(record), waiter: None });
        }
    }

    /// Drops the batches below the first one that counts; their blobs may be deleted.
    pub fn forget_cut(&mut self) -> Vec<BlobId> {
        let kept = self.batches.split_off(&self.first);
        let cut = std::mem::replace(&mut self.batches, kept);
        self.stored -= cut.values().map(|batch| batch.stored).sum::<u64>();
        cut.into_values().filter_map(|batch| batch.id).collect()
    }

    /// Groups with entries in the oldest batch that has any. What older ones hold alive, votes and
    /// marks, is copied forward by a cut, which may still end before a batch full of entries.
    pub fn pinning(&self) -> Vec<ShardId> {
        let oldest_of =
            |group: &Group| group.entries.values().map(|held| held.slot.batch).filter(|batch| *batch > 0).min();
        let oldest: Vec<(ShardId, u64)> =
            self.groups.iter().filter_map(|(id, group)| Some((*id, oldest_of(group)?))).collect();
        let first = oldest.iter().map(|(_, batch)| *batch).min();
        oldest.into_iter().filter(|(_, batch)| Some(*batch) == first).map(|(id, _)| id).collect()
    }

    fn stamp(&mut self) -> u64 {
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        stamp
    }

    fn write_committed(&mut self, writer: &mut BatchWriter, group: ShardId, sequence: u64) {
        let Some(held) = self.groups.get(&group).and_then(|group| group.committed.as_ref()) else { return };
        let (record, stamp) = (Record::Committed(held.value), held.slot.stamp);
        writer.push(group, &record);
        self.place(group, &record, stamp, sequence);
    }

    /// Applies a record to the group's state.
    fn take(&mut self, id: ShardId, record: Record, stamp: u64, batch: u64) {
        let bytes = record_bytes(&record) as u64;
        let slot = Slot { stamp, batch, bytes };
        if !matches!(record, Record::TruncateAfter(_)) {
            self.hold(slot);
        }
        let group = self.groups.entry(id).or_default();
        let mut gone: Vec<Slot> = Vec::new();
        match record {
            Record::Vote(value) => gone.extend(group.vote.replace(Held { value, slot }).map(|held| held.slot)),
            Record::Committed(value) => {
                gone.extend(group.committed.replace(Held { value, slot }).map(|held| held.slot))
            }
            Record::Entry(value) => {
                group.unpurged += bytes;
                let before = group.entries.insert(value.log_id.index, Held { value, slot });
                group.unpurged -= before.as_ref().map_or(0, |held| held.slot.bytes);
                gone.extend(before.map(|held| held.slot));
            }
            Record::TruncateAfter(last) => {
                let dead = group.entries.split_off(&last.map_or(0, |id| id.index + 1));
                gone.extend(dead.values().map(|held| held.slot));
                group.unpurged -= dead.values().map(|held| held.slot.bytes).sum::<u64>();
            }
            Record::Purge(value) => {
                let kept = group.entries.split_off(&(value.index + 1));
                let dead = std::mem::replace(&mut group.entries, kept);
                gone.extend(dead.values().map(|held| held.slot));
                group.unpurged -= dead.values().map(|held| held.slot.bytes).sum::<u64>();
                gone.extend(group.purged.replace(Held { value, slot }).map(|held| held.slot));
            }
        }
        gone.into_iter().for_each(|slot| self.release(slot));
    }

    fn slot_of(&mut self, group: ShardId, record: &Record) -> Option<&mut Slot> {
        let group = self.groups.get_mut(&group)?;
        match record {
            Record::Entry(entry) => group.entries.get_mut(&entry.log_id.index).map(|held| &mut held.slot),
            Record::Vote(_) => group.vote.as_mut().map(|held| &mut held.slot),
            Record::Committed(_) => group.committed.as_mut().map(|held| &mut held.slot),
            Record::Purge(_) => group.purged.as_mut().map(|held| &mut held.slot),
            Record::TruncateAfter(_) => None,
        }
    }

    /// A pending record went into a batch: that is where its value is held from now on.
    fn place(&mut self, group: ShardId, record: &Record, stamp: u64, batch: u64) {
        let Some(slot) = self.slot_of(group, record).filter(|slot| slot.stamp == stamp) else { return };
        let before = *slot;
        slot.batch = batch;
        let after = *slot;
        self.release(before);
        self.hold(after);
    }

    fn hold(&mut self, slot: Slot) {
        if let Some(batch) = self.batches.get_mut(&slot.batch) {
            batch.live += 1;
            batch.live_bytes += slot.bytes;
        }
    }

    fn release(&mut self, slot: Slot) {
        if let Some(batch) = self.batches.get_mut(&slot.batch) {
            batch.live -= 1;
            batch.live_bytes -= slot.bytes;
        }
    }
}
