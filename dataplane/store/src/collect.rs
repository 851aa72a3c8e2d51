//! The collector: makes zones free again.
//!
//! Order, each step durable before the next: copies of what lives in the zone and its live
//! tombstones → the zone's header in a new generation → reuse. Before its reuse the device is told
//! that it may forget what follows the header.

use crate::commit::{Item, NewBlob, Request};
use crate::core::Core;
use crate::error::StoreError;
use crate::layout::{PAGE_BYTES, ZONE_FOOTER_BYTES, ZONE_HEADER_BYTES, round_up};
use crate::state::Entry;
use crate::zones::{GARBAGE_SHARE_AHEAD, Stream, Tier, Zone, ZoneState};
use cfs_reactor::Instant;
use cfs_reactor::sync::{OneshotReceiver, OneshotSender, oneshot};
use cfs_wire::blobs::BlobInfo;
use cfs_wire::planted::{self, Bug};
use cfs_wire::{BlobId, Generation};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Blobs and payload read before they are handed to the writer.
const BATCH_BLOBS: usize = 64;
const BATCH_BYTES: u64 = 1 << 20;
/// Tombstones handed over at once: a few header pages.
const BATCH_TOMBSTONES: usize = 256;
/// On demand, when there is nothing better, down to this part.
const GARBAGE_SHARE_URGENT: u64 = 32;

/// Tombstones of a target beyond which zones with many deleted copies are collected although space
/// is plenty: they take some 200 bytes of memory each. So many for each zone, that is one a MiB in
/// zones of 64 MiB, and no fewer than so many.
const TOMBSTONES_PER_ZONE: usize = 64;
const TOMBSTONES_MIN: usize = 64 << 10;
/// After a search for such a zone that found none: as many more before the next.
const TOMBSTONES_STEP: usize = 4096;

/// How long a zone in which something can't be read is left alone.
const STUCK_RETRY: Duration = Duration::from_secs(60);
/// Damaged blobs remembered: the next read, scrub or collection finds the rest.
const DAMAGED_MAX: usize = 1024;

#[derive(Default)]
pub(crate) struct Collector {
    running: Cell<bool>,
    /// No zone was worth collecting for its tombstones when there were so many, less a step.
    tombstones_futile: Cell<usize>,
    /// Writers without a zone; told whether one was freed.
    waiting: RefCell<Vec<OneshotSender<bool>>>,
    /// Zones freed since the target was opened.
    pub freed: Cell<u64>,
    /// Blobs that were found damaged or unreadable, for whoever repairs them.
    pub damaged: RefCell<BTreeMap<BlobId, BlobInfo>>,
    /// The device refused a discard: it is asked no more.
    no_discards: Cell<bool>,
}

impl Core {
    /// Frees one zone if any garbage is worth it; false when nothing can be gained.
    pub async fn reclaim(self: &Rc<Self>) -> bool {
        let (sender, receiver) = oneshot();
        self.collector.waiting.borrow_mut().push(sender);
        self.start_collector();
        receiver.await.unwrap_or(false)
    }

    /// Collects what is cheap, and more while free zones are few.
    pub fn collect_in_background(self: &Rc<Self>) {
        // One that runs looks for the next zone itself, and at all of them each time.
        let runs = self.collector.running.get();
        if !runs && self.check_writable().is_ok() && self.victim(false, self.handle.now_coarse()).is_some() {
            self.start_collector();
        }
    }

    fn start_collector(self: &Rc<Self>) {
        if !self.collector.running.replace(true) {
            let core = self.clone();
            self.handle.spawn(async move { core.collect_while_useful().await });
        }
    }

    async fn collect_while_useful(self: &Rc<Self>) {
        loop {
            let waiting = std::mem::take(&mut *self.collector.waiting.borrow_mut());
            let urgent = !waiting.is_empty();
            let freed = match self.check_writable() {
                Ok(()) => self.collect_one(urgent).await,
                Err(_) => false,
            };
            let sealing = self.state.borrow().zones.any_sealing();
            if !freed && urgent && sealing && self.check_writable().is_ok() {
                // A zone that is being sealed may be what the writers wait for.
                self.collector.waiting.borrow_mut().extend(waiting);
                self.changed.notified().await;
                continue;
            }
            for sender in waiting {
                // A writer that stopped waiting needs no answer.
                let _ = sender.send(freed);
            }
            if !freed && self.collector.waiting.borrow().is_empty() {
                self.collector.running.set(false);
                self.changed.notify_all();
                return;
            }
            self.handle.yield_now().await;
        }
    }

    async fn collect_one(self: &Rc<Self>, urgent: bool) -> bool {
        // One time for all: each zone that turns out to be stuck is tried once, however long that takes.
        let now = self.handle.now();
        while let Some(zone) = self.victim(urgent, now) {
            if self.collect(zone, urgent).await {
                return true;
            }
            if !self.state.borrow().zones.get(zone).is_stuck(now) || self.check_writable().is_err() {
                return false;
            }
        }
        false
    }

    /// Whether deletions have made more tombstones than memory is to be spent on.
    pub fn has_many_tombstones(&self) -> bool {
        let most = TOMBSTONES_MIN.max(TOMBSTONES_PER_ZONE * self.superblock.zones as usize);
        self.state.borrow().tombstones.len() > most.max(self.collector.tombstones_futile.get())
    }

    /// The zone whose collection pays most.
    fn victim(&self, urgent: bool, now: Instant) -> Option<u32> {
        if let Some(nearly_empty) = self.state.borrow().zones.first_nearly_empty(now) {
            return Some(nearly_empty);
        }
        let is_low = self.state.borrow().zones.is_low();
        let most_garbage = if urgent || is_low { self.victim_for_space(urgent, now) } else { None };
        most_garbage.or_else(|| self.has_many_tombstones().then(|| self.victim_for_tombstones(now)).flatten())
    }

    fn victim_for_space(&self, urgent: bool, now: Instant) -> Option<u32> {
        let state = self.state.borrow();
        let zone_bytes = u64::from(self.superblock.zone_bytes);
        let newest = state.sequences.newest();
        let share = if urgent { GARBAGE_SHARE_URGENT } else { GARBAGE_SHARE_AHEAD };
        // Ahead of demand, benefit × age ÷ cost (Rosenblum and Ousterhout 1992): a young zone
        // will soon have more garbage. On demand only the gain counts.
        state.zones.best_sealed(now, |zone| {
            let garbage = u128::from(zone.garbage());
            let age = u128::from(newest.saturating_sub(zone.last_sequence)) + 1;
            match zone.garbage() >= (zone_bytes / share).max(1) {
                false => None,
                true if urgent => Some(garbage),
                true => Some(garbage * age / u128::from(zone_bytes + zone.live)),
            }
        })
    }

    /// The zone that ends most tombstones for what has to be moved. Where there are more of them than
    /// [`TOMBSTONES_PER_ZONE`] some zone has as many.
    fn victim_for_tombstones(&self, now: Instant) -> Option<u32> {
        let state = self.state.borrow();
        let gain = |zone: &Zone| {
            let ended = zone.deleted.len();
            let cost = zone.live + u64::from(ZONE_HEADER_BYTES);
            (ended >= TOMBSTONES_PER_ZONE).then(|| ((ended as u128) << 32) / u128::from(cost))
        };
        let victim = state.zones.best_sealed(now, gain);
        let futile = if victim.is_some() { 0 } else { state.tombstones.len() + TOMBSTONES_STEP };
        self.collector.tombstones_futile.set(futile);
        victim
    }

    /// Empties a sealed zone whatever lives there, unless that has happened meanwhile; false when it
    /// can't be done now.
    pub async fn empty(self: &Rc<Self>, zone: u32, generation: Generation) -> bool {
        loop {
            let changed = self.changed.notified();
            if self.check_writable().is_err() {
                return false;
            }
            if !self.collector.running.get() {
                break;
            }
            changed.await;
        }
        let (now, state, room) = {
            let state = self.state.borrow();
            let now = state.zones.get(zone);
            // The collector needs what is below that for zones that bring space.
            (now.generation, now.state, state.zones.may_take(Tier::Tombstone))
        };
        if now != Some(generation) || state != ZoneState::Sealed || !room {
            return now != Some(generation);
        }
        self.collector.running.set(true);
        let emptied = self.collect(zone, false).await;
        self.collector.running.set(false);
        self.changed.notify_all();
        match self.collector.waiting.borrow().is_empty() {
            true => self.collect_in_background(),
            false => self.start_collector(),
        }
        emptied
    }

    /// Empties a zone and gives it back with a new generation.
    async fn collect(self: &Rc<Self>, zone: u32, urgent: bool) -> bool {
        self.state.borrow_mut().zones.set_state(zone, ZoneState::Collecting);
        let emptied = self.move_out(zone).await;
        let reset = match emptied {
            Ok(()) => self.write_generation(zone).await,
            Err(error) => Err(error),
        };
        match reset {
            Ok(generation) => {
                self.state.borrow_mut().zone_reset(zone, generation);
                // Someone waits for the zone and will overwrite it: that tells the device as much.
                if !urgent {
                    self.discard_free(zone).await;
                }
                self.state.borrow_mut().zones.give_back(zone);
                self.collector.freed.set(self.collector.freed.get() + 1);
                self.changed.notify_all();
                true
            }
            Err(error) => {
                tracing::warn!(zone, %error, "zone could not be collected");
                let mut state = self.state.borrow_mut();
                state.zones.set_state(zone, ZoneState::Sealed);
                state.zones.not_emptied(zone);
                false
            }
        }
    }

    /// Tells the device that a zone with a durable new generation holds nothing between the copies of
    /// its header, and nobody has it yet. What is read there from then on, old appends or anything else, is of
    /// no generation that counts, so a crash needs no care.
    async fn discard_free(&self, zone: u32) {
        if !self.device.geometry().discards || self.collector.no_discards.get() {
            return;
        }
        let start = self.superblock.zone_offset(zone) + u64::from(ZONE_HEADER_BYTES);
        let length = self.superblock.zone_bytes - ZONE_HEADER_BYTES - ZONE_FOOTER_BYTES;
        if let Err(error) = self.device.discard(start, length.into()).await {
            tracing::warn!(device = self.device.name(), %error, "free zones are not discarded any more");
            self.collector.no_discards.set(true);
        }
    }

    /// Copies what lives in the zone elsewhere; durable when answered.
    async fn move_out(self: &Rc<Self>, zone: u32) -> Result<(), StoreError> {
        // In the order they were appended; a sealed zone gets no more.
        let ids = self.state.borrow().zones.get(zone).blobs.clone();
        for ids in ids.chunks(BATCH_BLOBS) {
            let mut living = self.state.borrow().living_in(zone, ids);
            let spare = self.state.borrow().spare_in(zone, ids);
            for entry in spare {
                if self.needs_spare(zone, &entry).await? {
                    living.push(entry);
                }
            }
            let mut rest = living.as_slice();
            while !rest.is_empty() {
                let (mut count, mut bytes) = (0, 0);
                while count < rest.len() && (count == 0 || bytes < BATCH_BYTES) {
                    bytes += rest[count].footprint();
                    count += 1;
                }
                let (batch, after) = rest.split_at(count);
                self.move_blobs(zone, batch).await?;
                rest = after;
            }
            self.handle.yield_now().await;
        }
        if planted::is(Bug::StoreForgetTombstoneAtCollection) {
            return Ok(());
        }
        let tombstones = self.state.borrow().live_tombstones(zone);
        for batch in tombstones.chunks(BATCH_TOMBSTONES) {
            self.write_tombstones(Stream::Relocated, batch).await?;
        }
        Ok(())
    }

    /// Whether a blob's primary copy does not verify, but another does: that may be all there is of
    /// it, and is in a zone that is to be emptied.
    ///
    /// # Errors
    /// None verifies, and not all can be read: the one that can't may be sound.
    async fn needs_spare(&self, zone: u32, entry: &Entry) -> Result<bool, StoreError> {
        let pages = 0..round_up(entry.info.length) / PAGE_BYTES;
        if self.read_pages(entry, entry.place, pages.clone()).await.is_ok() {
            return Ok(false);
        }
        match self.read_any_copy(entry, pages).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_corrupt() => Ok(false),
            Err(error) => {
                self.note_stuck(zone, entry);
                Err(error)
            }
        }
    }

    /// A blob in the zone can't be read, of which there may be another copy on another target.
    fn note_stuck(&self, zone: u32, entry: &Entry) {
        self.state.borrow_mut().zones.get_mut(zone).stuck_until = Some(self.handle.now_coarse() + STUCK_RETRY);
        self.note_damage(&entry.info);
    }

    pub fn note_damage(&self, info: &BlobInfo) {
        let mut damaged = self.collector.damaged.borrow_mut();
        if damaged.len() < DAMAGED_MAX {
            damaged.insert(info.id, *info);
        }
    }

    async fn move_blobs(self: &Rc<Self>, zone: u32, batch: &[Entry]) -> Result<(), StoreError> {
        let (mut answers, mut unread) = (Vec::new(), Ok(()));
        for entry in batch {
            let payload = match self.read_for_move(entry).await {
                Ok(payload) => payload,
                Err(error) => {
                    self.note_stuck(zone, entry);
                    unread = Err(error);
                    break;
                }
            };
            let still_there = self.state.borrow().index.get(&entry.info.id).is_some_and(|now| now.place == entry.place);
            if still_there {
                let blob = NewBlob { info: entry.info, checksums: entry.checksums.clone(), payload };
                let (reply, answer) = oneshot();
                answers.push(answer);
                self.submit(Stream::Relocated, Request { item: Item::Move(blob, entry.place), reply });
            }
        }
        all_of(answers).await.and(unread)
    }

    /// Writes tombstones on a stream; durable when answered.
    pub async fn write_tombstones(self: &Rc<Self>, stream: Stream, ids: &[BlobId]) -> Result<(), StoreError> {
        let mut answers = Vec::new();
        for id in ids {
            let (reply, answer) = oneshot();
            answers.push(answer);
            self.submit(stream, Request { item: Item::Tombstone(*id), reply });
        }
        all_of(answers).await
    }
}

/// Waits until nothing that was submitted is under way any more, also behind a failure: a move that
/// lands after its zone was given back would bring a blob back that was deleted between.
async fn all_of(answers: Vec<OneshotReceiver<Result<(), StoreError>>>) -> Result<(), StoreError> {
    let mut outcome = Ok(());
    for answer in answers {
        let answer = answer.await.unwrap_or(Err(StoreError::Closed));
        outcome = outcome.and(answer);
    }
    outcome
}
