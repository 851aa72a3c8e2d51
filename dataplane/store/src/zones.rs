//! The zones of a target in memory: state, what lives in each, and who may take a free one.

use crate::layout::append::{TAILS_MAX, Tail, ZoneUse};
use crate::layout::summary::Summary;
use crate::layout::{ZONE_FOOTER_BYTES, ZONE_HEADER_BYTES};
use cfs_device::Placement;
use cfs_reactor::clock::Instant;
use cfs_wire::blobs::BlobKind;
use cfs_wire::{BlobId, Generation};
use smallvec::SmallVec;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

/// A stream of appends of one expected lifetime, with an open zone of its own. The number is on
/// disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Stream {
    /// Raft log batches and tombstones: dead within minutes.
    Log = 0,
    /// Sorted runs and manifests.
    Meta = 1,
    Hot = 2,
    Data = 3,
    Parity = 4,
    /// What the collector moved: old, so likely to stay.
    Relocated = 5,
}

impl Stream {
    pub const ALL: [Stream; 6] =
        [Stream::Log, Stream::Meta, Stream::Hot, Stream::Data, Stream::Parity, Stream::Relocated];

    pub fn from_u8(raw: u8) -> Option<Stream> {
        Self::ALL.into_iter().find(|stream| *stream as u8 == raw)
    }

    pub fn placement(self) -> Placement {
        match self {
            Stream::Log => Placement::Log,
            Stream::Meta => Placement::Metadata,
            Stream::Hot => Placement::Hot,
            Stream::Data => Placement::Data,
            Stream::Parity => Placement::Parity,
            Stream::Relocated => Placement::Relocated,
        }
    }

    /// The stream for new blobs of a kind. With few zones an open one per stream would be a
    /// large part of the target, so streams are shared.
    pub fn of(kind: BlobKind, zones: u32) -> Stream {
        let shared = zones < ZONES_FOR_ALL_STREAMS;
        match kind {
            BlobKind::Log => Stream::Log,
            BlobKind::Run | BlobKind::Manifest if shared => Stream::Log,
            BlobKind::Run | BlobKind::Manifest => Stream::Meta,
            BlobKind::Hot | BlobKind::Data | BlobKind::Parity if shared => Stream::Data,
            BlobKind::Hot => Stream::Hot,
            BlobKind::Data => Stream::Data,
            BlobKind::Parity => Stream::Parity,
        }
    }

    /// Whether most appends are small, each with a flush of its own.
    pub fn is_small(self) -> bool {
        matches!(self, Stream::Log | Stream::Hot)
    }

    /// Who may use the space this stream takes.
    pub fn tier(self) -> Tier {
        match self {
            Stream::Log | Stream::Meta => Tier::Metadata,
            Stream::Hot | Stream::Data | Stream::Parity => Tier::Ordinary,
            Stream::Relocated => Tier::Collection,
        }
    }
}

/// From here on six open zones are at most a fifth of the target.
const ZONES_FOR_ALL_STREAMS: u32 = 32;

/// A zone of small appends is settled in pieces of this length, each when the appends have come
/// this near to the end of the last, and starting a gap behind them so that they need not wait.
const SETTLE_BYTES: u32 = 1 << 20;
const SETTLE_AHEAD: u32 = 512 << 10;
const SETTLE_GAP: u32 = 128 << 10;

/// Zones being sealed at once beyond the one that every stream may have: a header names every open
/// and every sealing zone.
const SEALING_SPARE: usize = TAILS_MAX - 2 * Stream::ALL.len();

/// Who asks for a free zone, in the order in which they are refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Tier {
    /// Hot, Data, Parity.
    Ordinary,
    /// Log, Run, Manifest.
    Metadata,
    /// Deletes: they make space, so they go deeper into the reserve than what takes it.
    Tombstone,
    /// The collector: to free a zone it may need one.
    Collection,
}

/// Zones kept back.
#[derive(Clone, Copy, Debug)]
pub struct Reserve {
    /// Those that can be written.
    zones: u32,
    /// Open zones that are not full.
    streams: u32,
}

/// One to copy into, and one more because the first may be half full of stuck copies.
const COLLECTION_ZONES: u32 = 2;
/// A zone holds thousands of deletes, and the collector packs their headers 70 to one.
const TOMBSTONE_ZONES: u32 = 1;

impl Reserve {
    /// `usable` of `zones` can be written.
    pub fn new(zones: u32, usable: u32) -> Reserve {
        let streams = if zones < ZONES_FOR_ALL_STREAMS { 3 } else { Stream::ALL.len() as u32 };
        Reserve { zones: usable, streams }
    }

    /// Free zones that stay untouched by this tier.
    pub fn floor(self, tier: Tier) -> u32 {
        // Metadata's share: a 64th, but two zones, so that the log turns over on small targets.
        let metadata = (self.zones / 64).max(2);
        match tier {
            Tier::Ordinary => COLLECTION_ZONES + TOMBSTONE_ZONES + metadata,
            Tier::Metadata => COLLECTION_ZONES + TOMBSTONE_ZONES,
            Tier::Tombstone => COLLECTION_ZONES,
            Tier::Collection => 0,
        }
    }

    /// Free zones below which the collector works ahead of demand.
    pub fn low_water(self) -> u32 {
        self.floor(Tier::Ordinary) + (self.zones / 64).max(2)
    }

    /// Zones that can be full of live blobs while the tier may still write: all but its floor
    /// and an open zone per stream.
    pub fn fillable(self, tier: Tier) -> u32 {
        self.zones.saturating_sub(self.floor(tier) + self.streams)
    }
}

/// A zone with this part of it alive is collected at once: written bytes grow by no more.
const NEARLY_EMPTY_SHARE: u64 = 64;
/// Ahead of demand a zone is taken when this part of it is garbage.
pub const GARBAGE_SHARE_AHEAD: u64 = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZoneState {
    /// Holds nothing that counts. `ready`: its header is durable and nothing follows it.
    Free { ready: bool },
    /// A stream appends to it.
    Open,
    /// Full; the footer waits for the appends under way.
    Sealing,
    /// Full and durable: the collector may take it.
    Sealed,
    /// The collector is emptying it.
    Collecting,
    /// The device refuses to read its header, or appends in it: what it holds is not known, so it is
    /// neither written nor reused. What is known of it is read.
    Unusable,
}

#[derive(Debug)]
pub struct Zone {
    pub state: ZoneState,
    /// `None` while no valid header is on the device.
    pub generation: Option<Generation>,
    pub stream: Stream,
    /// Where the next append goes.
    pub end: u32,
    /// Appends before this are durable.
    pub durable_end: u32,
    /// Appends written but not answered.
    pub under_way: u32,
    /// The device has been asked to get everything before this ready for small writes, and is
    /// doing so with this range: nothing is appended there meanwhile.
    pub settled: u32,
    pub settling: Option<Range<u32>>,
    /// Bytes of live blobs and tombstones, records included.
    pub live: u64,
    /// What its footer will say, while it takes appends and all before are known.
    pub summary: Option<Summary>,
    /// What the summary takes of a sealed zone.
    pub summary_bytes: u32,
    pub last_sequence: u64,
    /// A live blob in it can't be read, so it is not collected before this time: it may be readable
    /// again, or have been put anew elsewhere.
    pub stuck_until: Option<Instant>,
    /// Blobs appended here; those that have left since are recognised by their index entry.
    pub blobs: Vec<BlobId>,
    /// Tombstones whose record is here, likewise.
    pub tombstones: Vec<BlobId>,
    /// Deleted blobs of which a copy is here.
    pub deleted: Vec<BlobId>,
}

impl Zone {
    pub fn free(generation: Option<Generation>, ready: bool) -> Zone {
        Zone {
            state: ZoneState::Free { ready },
            generation,
            stream: Stream::Log,
            end: ZONE_HEADER_BYTES,
            durable_end: ZONE_HEADER_BYTES,
            under_way: 0,
            settled: ZONE_HEADER_BYTES,
            settling: None,
            live: 0,
            summary: Some(Summary::default()),
            summary_bytes: 0,
            last_sequence: 0,
            stuck_until: None,
            blobs: Vec::new(),
            tombstones: Vec::new(),
            deleted: Vec::new(),
        }
    }

    pub fn is_stuck(&self, now: Instant) -> bool {
        self.stuck_until.is_some_and(|until| now < until)
    }

    /// Bytes a collection would give back, not counting the unused end of the zone: that may
    /// be lost again in the next one.
    pub fn garbage(&self) -> u64 {
        u64::from(self.end - ZONE_HEADER_BYTES + self.summary_bytes).saturating_sub(self.live)
    }
}

/// All zones of a target.
pub struct ZoneTable {
    pub zones: Vec<Zone>,
    /// Reused in the order they became free: even wear.
    free: VecDeque<u32>,
    /// A free zone whose header is being written, so that nobody takes it meanwhile.
    preparing: Option<u32>,
    /// Open and sealing zones: at most [`TAILS_MAX`].
    unsealed: BTreeSet<u32>,
    /// Sealed zones in which nothing lives: free for the writing of a header.
    empty: BTreeSet<u32>,
    /// Sealed zones that cost little more, for something lives there.
    nearly_empty: BTreeSet<u32>,
    pub reserve: Reserve,
    /// Bytes of blobs in zones that can't be written: they take no room of the others.
    pub stranded: u64,
    zone_bytes: u32,
}

impl ZoneTable {
    pub fn new(zones: Vec<Zone>, zone_bytes: u32) -> ZoneTable {
        let is_free = |zone: &Zone| matches!(zone.state, ZoneState::Free { .. });
        let free = (0..).zip(&zones).filter(|(_, zone)| is_free(zone)).map(|(number, _)| number).collect();
        // What can't be written is no room, also not for what is kept back.
        let usable = zones.iter().filter(|zone| zone.state != ZoneState::Unusable).count();
        let reserve = Reserve::new(zones.len() as u32, usable as u32);
        ZoneTable {
            zones,
            free,
            preparing: None,
            unsealed: BTreeSet::new(),
            empty: BTreeSet::new(),
            nearly_empty: BTreeSet::new(),
            reserve,
            stranded: 0,
            zone_bytes,
        }
    }

    pub fn set_state(&mut self, zone: u32, state: ZoneState) {
        self.get_mut(zone).state = state;
        match state {
            ZoneState::Open | ZoneState::Sealing => self.unsealed.insert(zone),
            _ => self.unsealed.remove(&zone),
        };
        self.note_nearly_empty(zone);
    }

    /// Something lives in the zone that did not.
    pub fn charge(&mut self, zone: u32, bytes: u64) {
        self.get_mut(zone).live += bytes;
        self.note_nearly_empty(zone);
    }

    /// Something that lived in the zone does no more.
    pub fn release(&mut self, zone: u32, bytes: u64) {
        let live = &mut self.get_mut(zone).live;
        *live = live.saturating_sub(bytes);
        self.note_nearly_empty(zone);
    }

    /// As [`ZoneTable::charge`], of a blob, which counts against the capacity.
    pub fn charge_blob(&mut self, zone: u32, bytes: u64) {
        if self.get(zone).state == ZoneState::Unusable {
            self.stranded += bytes;
        }
        self.charge(zone, bytes);
    }

    /// As [`ZoneTable::release`], of a blob.
    pub fn release_blob(&mut self, zone: u32, bytes: u64) {
        if self.get(zone).state == ZoneState::Unusable {
            self.stranded = self.stranded.saturating_sub(bytes);
        }
        self.release(zone, bytes);
    }

    fn note_nearly_empty(&mut self, number: u32) {
        let zone_bytes = u64::from(self.zone_bytes);
        let zone = self.get(number);
        let cheap = zone.live <= zone_bytes / NEARLY_EMPTY_SHARE
            && zone.garbage() >= zone_bytes / GARBAGE_SHARE_AHEAD
            && zone.stuck_until.is_none();
        let (sealed, lives) = (zone.state == ZoneState::Sealed, zone.live > 0);
        for (set, belongs) in [(&mut self.empty, !lives), (&mut self.nearly_empty, lives && cheap)] {
            match sealed && belongs {
                true => set.insert(number),
                false => set.remove(&number),
            };
        }
    }

    /// What lives in the zone found no place: it counts as nearly empty again once less lives there.
    pub fn not_emptied(&mut self, zone: u32) {
        self.nearly_empty.remove(&zone);
    }

    /// A sealed zone in which nothing lives, or so little that it is not worth waiting for its end:
    /// the memory and the opening time that all the dead in it cost are worth more. First those whose
    /// collection needs no room.
    pub fn first_nearly_empty(&self, now: Instant) -> Option<u32> {
        let mut cheap = self.empty.iter().chain(&self.nearly_empty).copied();
        cheap.find(|zone| !self.get(*zone).is_stuck(now))
    }

    /// Of the sealed zones that can be emptied the one with the highest score, the first of equals.
    pub fn best_sealed(&self, now: Instant, score: impl Fn(&Zone) -> Option<u128>) -> Option<u32> {
        let can_be_emptied = |zone: &Zone| zone.state == ZoneState::Sealed && !zone.is_stuck(now);
        let sealed = (0u32..).zip(&self.zones).filter(|(_, zone)| can_be_emptied(zone));
        let scored = sealed.filter_map(|(number, zone)| Some((score(zone)?, std::cmp::Reverse(number))));
        scored.max().map(|(_, std::cmp::Reverse(number))| number)
    }

    pub fn is_low(&self) -> bool {
        self.free_count() <= self.reserve.low_water()
    }

    pub fn get(&self, zone: u32) -> &Zone {
        &self.zones[zone as usize]
    }

    pub fn get_mut(&mut self, zone: u32) -> &mut Zone {
        &mut self.zones[zone as usize]
    }

    pub fn free_count(&self) -> u32 {
        self.free.len() as u32
    }

    /// Takes one of the next `ahead` free zones whose header is still to be written, while free
    /// zones are plenty: nobody is to be refused because of it.
    pub fn take_unready(&mut self, ahead: usize) -> Option<u32> {
        if self.is_low() || self.preparing.is_some() {
            return None;
        }
        let unready = |zone: &u32| self.zones[*zone as usize].state == (ZoneState::Free { ready: false });
        let position = self.free.iter().take(ahead).position(unready)?;
        self.preparing = self.free.remove(position);
        self.preparing
    }

    /// Gives back what [`ZoneTable::take_unready`] gave: as the next to be taken.
    pub fn prepared(&mut self) {
        let Some(zone) = self.preparing.take() else { return };
        self.free.push_front(zone);
    }

    pub fn any_preparing(&self) -> bool {
        self.preparing.is_some()
    }

    /// Takes a free zone if the tier may have one. It stays in state `Free` until opened.
    pub fn take_free(&mut self, tier: Tier) -> Option<u32> {
        if !self.may_take(tier) {
            return None;
        }
        self.free.pop_front()
    }

    pub fn may_take(&self, tier: Tier) -> bool {
        self.free_count() > self.reserve.floor(tier)
    }

    pub fn give_back(&mut self, zone: u32) {
        self.free.push_back(zone);
    }

    /// Bytes left in an open zone for an append whose records take `records` bytes.
    pub fn room(&self, number: u32, records: usize) -> u32 {
        let zone = self.get(number);
        let summary = zone.summary.as_ref().map_or(0, |summary| summary.padded_with(records));
        self.zone_bytes.saturating_sub(ZONE_FOOTER_BYTES + summary).saturating_sub(zone.end)
    }

    /// Of [`ZoneTable::room`] what can be appended to at once.
    pub fn room_now(&self, number: u32, records: usize) -> u32 {
        let zone = self.get(number);
        let settling = zone.settling.as_ref().map(|range| range.start - zone.end);
        self.room(number, records).min(settling.unwrap_or(u32::MAX))
    }

    /// The next range of an open zone to settle, if appends have come near it.
    pub fn take_unsettled(&mut self, zone: u32) -> Option<Range<u32>> {
        let limit = self.zone_bytes - ZONE_FOOTER_BYTES;
        let zone = self.get_mut(zone);
        let near = zone.state == ZoneState::Open && zone.settling.is_none() && zone.settled < zone.end + SETTLE_AHEAD;
        let start = zone.settled.max(zone.end + SETTLE_GAP);
        let range = start..limit.min(start + SETTLE_BYTES);
        if !near || range.is_empty() {
            return None;
        }
        zone.settling = Some(range.clone());
        Some(range)
    }

    pub fn settled(&mut self, zone: u32, range: &Range<u32>) {
        let zone = self.get_mut(zone);
        zone.settling = None;
        zone.settled = range.end;
    }

    /// What a header written now says of the zones that are not sealed. (Only recovery can meet
    /// more of them than fit, when many footers are damaged: the open ones come first.)
    pub fn tails(&self) -> SmallVec<[Tail; TAILS_MAX]> {
        let tail = |number: &u32| {
            let zone = self.get(*number);
            Some(Tail { zone: *number, end: zone.durable_end, generation: zone.generation? })
        };
        let is_open = |number: &&u32| self.get(**number).state == ZoneState::Open;
        let open = self.unsealed.iter().filter(is_open);
        let closing = self.unsealed.iter().filter(|number| !is_open(number));
        open.chain(closing).filter_map(tail).take(TAILS_MAX).collect()
    }

    /// Whether a copy written to this zone in this generation can't come back any more.
    pub fn is_gone(&self, place: &ZoneUse) -> bool {
        match self.zones.get(place.zone as usize) {
            Some(zone) => zone.generation.is_some_and(|generation| generation != place.generation),
            None => true,
        }
    }

    /// Whether a stream may leave its open zone to be sealed and open the next. Sealing takes a
    /// flush after the last append's, in which a fast stream fills a small zone.
    pub fn may_seal_another(&self, stream: Stream) -> bool {
        let sealing = |stream: Stream| {
            let zones = self.unsealed.iter().map(|zone| self.get(*zone));
            zones.filter(|zone| zone.state == ZoneState::Sealing && zone.stream == stream).count()
        };
        let spare_used: usize = Stream::ALL.into_iter().map(|stream| sealing(stream).saturating_sub(1)).sum();
        sealing(stream) == 0 || spare_used < SEALING_SPARE
    }

    /// Whether some zone will be sealed without anybody's doing.
    pub fn any_sealing(&self) -> bool {
        self.unsealed.iter().any(|zone| self.get(*zone).state == ZoneState::Sealing)
    }
}
