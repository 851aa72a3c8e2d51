//! Group commit: what waits for a stream goes to its open zone as one append, is made durable
//! once, and is answered together.
//!
//! A [`Lane`] is one stream's queue. Its pump forms groups and hands each to a task of its own,
//! so that the write of the next overlaps the flush of the last. Answers are given in the order
//! of the zone: a scan after a crash stops at the first torn append, so an append is safe only
//! when all before it are.

use crate::core::Core;
use crate::error::StoreError;
use crate::group::{self, Group};
use crate::layout::append::TombstoneRecord;
use crate::layout::stamp::Stamp;
use crate::layout::{PAGE_BYTES, ZONE_FOOTER_BYTES, round_up};
use crate::state::{Entry, Place};
use crate::transfer;
use crate::zones::{Stream, Tier, Zone, ZoneState};
use bytes::Bytes;
use cfs_device::DeviceError;
use cfs_reactor::sync::OneshotSender;
use cfs_wire::BlobId;
use cfs_wire::blobs::BlobInfo;
use cfs_wire::planted::{self, Bug};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// Appends of one stream under way: enough that a device of 3 GB/s and 10 ms per write and flush
/// stays busy with groups of 1 MiB.
pub(crate) const FLIGHTS_MAX: usize = 32;
/// With an append under way, the next waits until so much has gathered: small puts share a
/// flush, large ones stream.
const GATHER_BYTES: u64 = 256 << 10;
/// Up to this size one FUA write is cheaper than a write and a flush.
const FUA_BYTES_MAX: u32 = 64 << 10;
/// Attempts to find a zone, each after the collector freed something.
const ZONE_ATTEMPTS_MAX: usize = 32;

/// A blob on its way to a zone.
#[derive(Clone)]
pub(crate) struct NewBlob {
    pub info: BlobInfo,
    pub checksums: Rc<[u32]>,
    pub payload: Bytes,
}

pub(crate) enum Item {
    Put(NewBlob),
    /// A copy made by the collector.
    Move(NewBlob, Place),
    Tombstone(BlobId),
}

impl Item {
    /// How much it counts towards [`GATHER_BYTES`]: a tombstone so much that a full append of
    /// them does not wait.
    fn weight(&self) -> u64 {
        match self {
            Item::Put(blob) | Item::Move(blob, _) => round_up(blob.info.length).into(),
            Item::Tombstone(_) => GATHER_BYTES / group::RECORDS_MAX as u64,
        }
    }
}

pub(crate) struct Request {
    pub item: Item,
    pub reply: OneshotSender<Result<(), StoreError>>,
}

/// What an append puts where, once it is durable.
pub(crate) enum Placed {
    Put(Entry),
    Move(Entry, Place),
    Tombstone(TombstoneRecord),
}

/// An append under way.
struct Flight {
    sequence: u64,
    zone: u32,
    end: u32,
    placed: Vec<Placed>,
    replies: Vec<OneshotSender<Result<(), StoreError>>>,
    outcome: Option<Result<(), DeviceError>>,
}

/// One stream's queue and appends under way.
pub(crate) struct Lane {
    pub(crate) queue: RefCell<VecDeque<Request>>,
    queued_weight: Cell<u64>,
    pumping: Cell<bool>,
    pub(crate) open: Cell<Option<u32>>,
    /// A zone that takes no more appends if it is still open.
    leaving: Cell<Option<u32>>,
    flights: RefCell<VecDeque<Flight>>,
}

impl Lane {
    pub fn new(open: Option<u32>) -> Lane {
        Lane {
            queue: RefCell::default(),
            queued_weight: Cell::new(0),
            pumping: Cell::new(false),
            open: Cell::new(open),
            leaving: Cell::new(None),
            flights: RefCell::default(),
        }
    }

    fn may_issue(&self) -> bool {
        let flights = self.flights.borrow().len();
        flights == 0 || (flights < FLIGHTS_MAX && self.queued_weight.get() >= GATHER_BYTES)
    }

    pub(crate) fn pop(&self) -> Option<Request> {
        let request = self.queue.borrow_mut().pop_front()?;
        self.queued_weight.set(self.queued_weight.get() - request.item.weight());
        Some(request)
    }

    /// Takes out the requests that need payload space.
    fn take_blobs(&self) -> Vec<Request> {
        let is_tombstone = |request: &Request| matches!(request.item, Item::Tombstone(_));
        let all = std::mem::take(&mut *self.queue.borrow_mut());
        let (tombstones, blobs): (Vec<Request>, Vec<Request>) = all.into_iter().partition(is_tombstone);
        self.queued_weight.set(tombstones.iter().map(|request| request.item.weight()).sum());
        *self.queue.borrow_mut() = tombstones.into();
        blobs
    }
}

impl Core {
    /// Queues a request on a stream.
    pub fn submit(self: &Rc<Self>, stream: Stream, request: Request) {
        let lane = self.lane(stream);
        if let Item::Tombstone(id) = request.item {
            self.state.borrow_mut().deletion_begins(id);
        }
        lane.queued_weight.set(lane.queued_weight.get() + request.item.weight());
        lane.queue.borrow_mut().push_back(request);
        self.kick(stream);
    }

    fn kick(self: &Rc<Self>, stream: Stream) {
        let lane = self.lane(stream);
        let idle = lane.queue.borrow().is_empty() && lane.leaving.get().is_none();
        if idle || lane.pumping.replace(true) {
            return;
        }
        let core = self.clone();
        self.handle.spawn(async move { core.pump(stream).await });
    }

    async fn pump(self: &Rc<Self>, stream: Stream) {
        let lane = self.lane(stream);
        loop {
            let leaving = lane.leaving.take().filter(|zone| lane.open.get() == Some(*zone));
            if leaving.is_none() && (lane.queue.borrow().is_empty() || !lane.may_issue()) {
                break;
            }
            if let Err(error) = self.check_writable() {
                self.refuse_queue(stream, &error);
                break;
            }
            if let Some(zone) = leaving {
                if let Err(error) = self.leave_open_zone(stream, zone).await {
                    self.refuse_queue(stream, &error);
                    break;
                }
                continue;
            }
            match self.zone_with_room(stream).await {
                Ok(Some(zone)) => {
                    if let Some(group) = group::form(self, lane, zone) {
                        self.launch(stream, zone, group);
                    }
                }
                Ok(None) => self.refuse_for_space(stream),
                Err(error) => self.refuse_queue(stream, &error),
            }
        }
        lane.pumping.set(false);
    }

    fn refuse_queue(&self, stream: Stream, error: &StoreError) {
        while let Some(request) = self.lane(stream).pop() {
            self.refuse(request, error.clone());
        }
    }

    /// No zone is to be had: blobs are refused. Tombstones stay queued only if the reserve kept
    /// for them is not used up either.
    fn refuse_for_space(&self, stream: Stream) {
        let blobs = self.lane(stream).take_blobs();
        if blobs.is_empty() {
            while let Some(request) = self.lane(stream).pop() {
                let kind = cfs_wire::blobs::BlobKind::Log;
                self.refuse(request, StoreError::NoSpace { kind, needed: PAGE_BYTES.into() });
            }
        }
        for request in blobs {
            if let Item::Put(blob) | Item::Move(blob, _) = &request.item {
                let (kind, needed) = (blob.info.kind, blob.info.length.into());
                self.refuse(request, StoreError::NoSpace { kind, needed });
            }
        }
    }

    fn refuse(&self, request: Request, error: StoreError) {
        match &request.item {
            Item::Put(blob) => self.put_ended(blob.info.id, Some(blob.info.length)),
            Item::Tombstone(id) => self.state.borrow_mut().deletion_ended(*id),
            Item::Move(..) => {}
        }
        // A caller that stopped waiting needs no answer.
        let _ = request.reply.send(Err(error));
    }

    /// A put is no longer under way; a failed one gives its space back.
    pub(crate) fn put_ended(&self, id: BlobId, failed_length: Option<u32>) {
        let mut state = self.state.borrow_mut();
        state.pending.remove(&id);
        if let Some(length) = failed_length {
            state.used = state.used.saturating_sub(crate::state::footprint(length));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The stream's open zone if the next request fits, else a new one; `None` if there is none.
    async fn zone_with_room(self: &Rc<Self>, stream: Stream) -> Result<Option<u32>, StoreError> {
        let lane = self.lane(stream);
        if let Some(open) = lane.open.get() {
            let (records, needed) = group::first_sizes(self, lane);
            while needed <= self.state.borrow().zones.room(open, records) {
                if needed <= self.state.borrow().zones.room_now(open, records) {
                    return Ok(Some(open));
                }
                self.changed.notified().await;
                self.check_writable()?;
            }
            self.leave_open_zone(stream, open).await?;
        }
        let mut opened = self.open_zone(stream, stream.tier()).await?;
        // What collects may take the last zone there is: for its tombstones there is no further one, and
        // it would wait for itself.
        let deepest = stream.tier() == Tier::Collection;
        let has_tombstone = || lane.queue.borrow().iter().any(|request| matches!(request.item, Item::Tombstone(_)));
        if opened.is_none() && !deepest && has_tombstone() {
            for request in lane.take_blobs() {
                if let Item::Put(blob) | Item::Move(blob, _) = &request.item {
                    let (kind, needed) = (blob.info.kind, blob.info.length.into());
                    self.refuse(request, StoreError::NoSpace { kind, needed });
                }
            }
            opened = self.open_zone(stream, Tier::Tombstone).await?;
        }
        lane.open.set(opened);
        Ok(opened)
    }

    async fn leave_open_zone(self: &Rc<Self>, stream: Stream, open: u32) -> Result<(), StoreError> {
        while !self.state.borrow().zones.may_seal_another(stream) {
            self.changed.notified().await;
            self.check_writable()?;
        }
        self.lane(stream).open.set(None);
        self.state.borrow_mut().zones.set_state(open, ZoneState::Sealing);
        let core = self.clone();
        self.handle.spawn(async move { core.seal(stream, open).await });
        Ok(())
    }

    /// Has a stream leave this zone, if it is open, before it is full.
    pub fn leave(self: &Rc<Self>, stream: Stream, zone: u32) {
        self.lane(stream).leaving.set(Some(zone));
        self.kick(stream);
    }

    async fn open_zone(self: &Rc<Self>, stream: Stream, tier: Tier) -> Result<Option<u32>, StoreError> {
        for _ in 0..ZONE_ATTEMPTS_MAX {
            let taken = self.state.borrow_mut().zones.take_free(tier);
            let Some(zone) = taken else {
                if self.state.borrow().zones.any_preparing() {
                    self.changed.notified().await;
                    self.check_writable()?;
                    continue;
                }
                // The collector can't wait for itself. What it was at when it was asked may have
                // freed a zone although it then found nothing more.
                let hopeless = tier == Tier::Collection || !self.reclaim().await;
                if hopeless && !self.state.borrow().zones.may_take(tier) {
                    return Ok(None);
                }
                self.check_writable()?;
                continue;
            };
            let ready = self.state.borrow().zones.get(zone).state == ZoneState::Free { ready: true };
            if !ready {
                let generation = self.write_generation(zone).await?;
                self.state.borrow_mut().zone_reset(zone, generation);
            }
            let mut state = self.state.borrow_mut();
            state.zones.get_mut(zone).stream = stream;
            state.zones.set_state(zone, ZoneState::Open);
            drop(state);
            self.collect_in_background();
            self.prepare_in_background();
            return Ok(Some(zone));
        }
        Ok(None)
    }

    /// Waits until every append of a full zone is durable, then writes its footer.
    async fn seal(self: &Rc<Self>, stream: Stream, zone: u32) {
        let busy = |zone: &Zone| zone.under_way > 0 || zone.settling.is_some();
        while busy(self.state.borrow().zones.get(zone)) {
            self.changed.notified().await;
        }
        let written = self.write_footer(stream, zone).await;
        if written.is_ok() {
            self.state.borrow_mut().zones.set_state(zone, ZoneState::Sealed);
            self.collect_in_background();
        }
        self.changed.notify_all();
    }

    /// Says durably where the zone's appends end, and what they hold.
    pub async fn write_footer(self: &Rc<Self>, stream: Stream, zone: u32) -> Result<(), StoreError> {
        self.check_writable()?;
        self.mended(zone).await;
        let footer_offset = self.superblock.zone_bytes - ZONE_FOOTER_BYTES;
        let (sequence, generation, end, tails, summary) = {
            let mut state = self.state.borrow_mut();
            let sequence = state.sequences.take();
            let mut tails = state.zones.tails();
            tails.retain(|tail| tail.zone != zone);
            let zone = state.zones.get_mut(zone);
            let summary = zone.summary.take().filter(|summary| zone.end + summary.padded() <= footer_offset);
            let summary = summary.unwrap_or_default();
            zone.summary_bytes = summary.padded();
            (sequence, zone.generation.unwrap_or_default(), zone.end, tails, summary)
        };
        let stamp = Stamp { extent: end, ..self.stamp(stream, zone, generation, footer_offset, sequence) };
        let (footer, summary) = summary.finish(stamp, tails);
        let place = self.superblock.zone_offset(zone) + u64::from(footer_offset) - summary.len() as u64;
        let mut parts = vec![transfer::aligned(&footer.encode_page())];
        if !summary.is_empty() {
            parts.insert(0, transfer::aligned(&summary));
        }
        let written = transfer::write(&*self.device, place, parts, stream.placement(), false).await;
        let result = match written {
            Ok(()) => self.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.fence(&error);
            return Err(error.into());
        }
        self.state.borrow_mut().sequences.settle(sequence);
        Ok(())
    }

    fn launch(self: &Rc<Self>, stream: Stream, zone: u32, group: Group) {
        let lane = self.lane(stream);
        let alone = lane.flights.borrow().is_empty();
        let fua = alone && group.end - group.offset <= FUA_BYTES_MAX;
        let Group { sequence, offset, end, parts, placed, replies } = group;
        lane.flights.borrow_mut().push_back(Flight { sequence, zone, end, placed, replies, outcome: None });
        let core = self.clone();
        let place = self.superblock.zone_offset(zone) + u64::from(offset);
        self.handle.spawn(async move {
            let skip = planted::is(Bug::StoreSkipFlush)
                || (stream == Stream::Relocated && planted::is(Bug::StoreResetBeforeCopiesDurable));
            let fua = fua && !skip;
            let written = transfer::write(&*core.device, place, parts, stream.placement(), fua).await;
            let outcome = match written {
                Ok(()) if !fua && !skip => core.flush().await,
                other => other,
            };
            core.landed(stream, sequence, outcome);
        });
        if stream.is_small() {
            self.settle_in_background(zone);
        }
    }

    /// An append's write and flush ended; answers it, and those after it that waited for it.
    fn landed(self: &Rc<Self>, stream: Stream, sequence: u64, outcome: Result<(), DeviceError>) {
        let lane = self.lane(stream);
        if let Err(error) = &outcome {
            self.fence(error);
        }
        if let Some(flight) = lane.flights.borrow_mut().iter_mut().find(|flight| flight.sequence == sequence) {
            flight.outcome = Some(outcome);
        }
        loop {
            let flight = {
                let mut flights = lane.flights.borrow_mut();
                if flights.front().is_none_or(|flight| flight.outcome.is_none()) {
                    break;
                }
                flights.pop_front()
            };
            let Some(flight) = flight else { break };
            self.finish(flight);
        }
        self.changed.notify_all();
        self.kick(stream);
    }

    fn finish(self: &Rc<Self>, flight: Flight) {
        // An append behind a failed one may be unreachable for a scan.
        let answer = match flight.outcome {
            Some(Err(error)) => Err(StoreError::Device(error)),
            _ => self.check_not_fenced(),
        };
        let mut state = self.state.borrow_mut();
        let deletes = flight.placed.iter().any(|placed| matches!(placed, Placed::Tombstone(_)));
        state.zones.get_mut(flight.zone).under_way -= 1;
        for placed in flight.placed {
            if let Placed::Tombstone(record) = &placed {
                state.deletion_ended(record.id);
            }
            match (placed, &answer) {
                (Placed::Put(entry), Ok(())) => {
                    state.pending.remove(&entry.info.id);
                    if state.index.contains_key(&entry.info.id) || state.tombstones.contains_key(&entry.info.id) {
                        // It healed a damaged copy, whose space was counted already.
                        state.used = state.used.saturating_sub(entry.footprint());
                    }
                    state.blob_put(entry);
                }
                (Placed::Move(entry, from), Ok(())) => state.blob_moved(entry, from),
                (Placed::Tombstone(record), Ok(())) => state.tombstone_arrived(&record, flight.zone),
                (Placed::Put(entry), Err(_)) => {
                    state.pending.remove(&entry.info.id);
                    state.used = state.used.saturating_sub(entry.footprint());
                }
                (Placed::Move(..) | Placed::Tombstone(_), Err(_)) => {}
            }
        }
        if answer.is_ok() {
            let zone = state.zones.get_mut(flight.zone);
            zone.durable_end = flight.end;
            zone.last_sequence = flight.sequence;
            state.sequences.settle(flight.sequence);
        }
        let nearly_empty = state.zones.first_nearly_empty(self.handle.now_coarse()).is_some();
        let is_low = state.zones.is_low();
        drop(state);
        if nearly_empty || (deletes && (is_low || self.has_many_tombstones())) {
            self.collect_in_background();
        }
        for reply in flight.replies {
            // A caller that stopped waiting needs no answer.
            let _ = reply.send(answer.clone());
        }
    }

    fn check_not_fenced(&self) -> Result<(), StoreError> {
        match &*self.failed.borrow() {
            Some(reason) => Err(StoreError::Fenced { device: self.device.name().to_owned(), reason: reason.clone() }),
            None => Ok(()),
        }
    }
}
