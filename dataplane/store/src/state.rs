//! What one target knows in memory: which blobs it holds and where, which were deleted, and
//! which sequences are durable. All of it is rebuilt from the device when the target is opened.
//!
//! These are plain data structures; nothing here waits. The transitions (a blob arrives, moves,
//! dies; a zone is reset) are methods, so that recovery and the running store share them.

use crate::layout::append::{TombstoneRecord, ZoneUse, blob_record_bytes, tombstone_record_bytes};
use crate::layout::{PAGE_BYTES, round_up};
use crate::zones::ZoneTable;
use cfs_reactor::collections::{HashMap, HashSet};
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner};
use cfs_wire::{BlobId, Generation};
use smallvec::SmallVec;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Where a copy of a blob's payload is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    pub zone: u32,
    pub generation: Generation,
    /// Of the payload, from the start of the zone.
    pub offset: u32,
}

impl Place {
    pub fn zone_use(self) -> ZoneUse {
        ZoneUse { zone: self.zone, generation: self.generation }
    }
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub info: BlobInfo,
    pub place: Place,
    pub checksums: Rc<[u32]>,
}

impl Entry {
    /// What the blob takes of its zone: payload, and its record in header and summary.
    pub fn footprint(&self) -> u64 {
        footprint(self.info.length)
    }
}

fn is_shard(kind: BlobKind) -> bool {
    matches!(kind, BlobKind::Data | BlobKind::Parity)
}

pub fn footprint(length: u32) -> u64 {
    u64::from(round_up(length)) + 2 * blob_record_bytes(length) as u64
}

/// Memory the index needs for blobs with so many bytes of payload together, at most. A hash map that
/// just grew is 7/16 full; a blob's checksums are an allocation of their own, of two counters and
/// four bytes a page; the zone that holds the blob lists it, and so does, unless it is a shard, its
/// kind, in nodes of a tree that are two thirds full.
pub fn index_bytes(blobs: u64, payload: u64) -> u64 {
    const ENTRY: u64 = size_of::<(BlobId, Entry)>() as u64 * 16 / 7;
    const CHECKSUMS: u64 = 32;
    const LISTED: u64 = 2 * size_of::<BlobId>() as u64 + size_of::<(Owner, BlobId)>() as u64 * 3 / 2;
    let pages = payload / u64::from(PAGE_BYTES) + blobs;
    blobs * (ENTRY + CHECKSUMS + LISTED) + pages * size_of::<u32>() as u64
}

/// Blobs and zones looked at for one page of shards: each a look-up in memory that is in no cache,
/// some 100 ns.
const SHARDS_PAGE: u32 = 512;

/// Where a look through the shards of a target goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ShardCursor {
    zone: u32,
    /// Among the blobs of the zone.
    at: usize,
}

/// A deletion that must outlive every copy of its blob.
#[derive(Clone, Debug)]
pub struct Tombstone {
    /// Zones that may hold a copy.
    pub places: SmallVec<[ZoneUse; 1]>,
    /// The zone that holds the tombstone's record.
    pub home: u32,
    /// What it counts among what lives there: see [`carried_bytes`].
    bytes: u64,
}

/// What a tombstone's record takes, in header and summary, of a zone that can't be given back
/// before it is carried elsewhere: nothing once all copies are in that zone too, for they go
/// together. (Nothing arrives later that it would have to guard against: a put of a deleted id is
/// refused, a deletion waits for the put under way, and the collector moves nothing out of a zone
/// that still takes tombstones.)
fn carried_bytes(places: &[ZoneUse], home: u32) -> u64 {
    match places.iter().all(|place| place.zone == home) {
        true => 0,
        false => 2 * tombstone_record_bytes(places.len()) as u64,
    }
}

/// Numbers every structure written to zones and knows up to where all are durable.
pub struct Sequences {
    next: u64,
    outstanding: BTreeSet<u64>,
}

impl Sequences {
    pub fn new(next: u64) -> Sequences {
        Sequences { next, outstanding: BTreeSet::new() }
    }

    pub fn take(&mut self) -> u64 {
        let sequence = self.next;
        self.next += 1;
        self.outstanding.insert(sequence);
        sequence
    }

    /// This one is durable.
    pub fn settle(&mut self, sequence: u64) {
        self.outstanding.remove(&sequence);
    }

    /// All up to this one are durable.
    pub fn mark(&self) -> u64 {
        self.outstanding.first().copied().unwrap_or(self.next) - 1
    }

    pub fn newest(&self) -> u64 {
        self.next - 1
    }
}

pub struct State {
    pub zones: ZoneTable,
    pub sequences: Sequences,
    pub index: HashMap<BlobId, Entry>,
    pub tombstones: HashMap<BlobId, Tombstone>,
    /// Further copies of indexed blobs: left by a crash or by the collector until the old zone
    /// is reset, or by a put that healed a damaged copy.
    pub duplicates: BTreeMap<BlobId, Vec<Place>>,
    /// Ids whose put is under way.
    pub pending: HashSet<BlobId>,
    /// Ids whose deletion is under way, and how many of them.
    dying: HashMap<BlobId, u32>,
    /// Payload bytes of live blobs per kind, in the order of `BlobKind::ALL`.
    pub live_by_kind: [u64; 6],
    /// Live blobs per kind.
    pub blobs_by_kind: [u64; 6],
    /// Live blobs of the kinds of which there are few, for who lists them often: all but shards.
    few: BTreeMap<BlobKind, BTreeSet<(Owner, BlobId)>>,
    /// Footprints of live blobs and of puts under way: what space admission counts.
    pub used: u64,
}

impl State {
    pub fn new(zones: ZoneTable, next_sequence: u64) -> State {
        State {
            zones,
            sequences: Sequences::new(next_sequence),
            index: HashMap::default(),
            tombstones: HashMap::default(),
            duplicates: BTreeMap::new(),
            pending: HashSet::default(),
            dying: HashMap::default(),
            live_by_kind: [0; 6],
            blobs_by_kind: [0; 6],
            few: BTreeMap::new(),
            used: 0,
        }
    }

    /// A blob was written, maybe in the place of copies that could not be read, for which their zones
    /// could not be collected.
    pub fn blob_put(&mut self, entry: Entry) {
        let older = self.index.get(&entry.info.id).map(|older| older.place);
        for place in older.into_iter().chain(self.duplicates.get(&entry.info.id).into_iter().flatten().copied()) {
            self.zones.get_mut(place.zone).stuck_until = None;
        }
        self.blob_arrived(entry);
    }

    /// A durable copy of a blob. The newest one becomes the primary. `used` is not touched.
    pub fn blob_arrived(&mut self, entry: Entry) {
        let (id, place, footprint) = (entry.info.id, entry.place, entry.footprint());
        self.zones.get_mut(place.zone).blobs.push(id);
        if let Some(tombstone) = self.tombstones.get_mut(&id) {
            // A copy that arrived after the delete: the tombstone must outlive it too.
            if !tombstone.places.contains(&place.zone_use()) {
                tombstone.places.push(place.zone_use());
            }
            self.zones.get_mut(place.zone).deleted.push(id);
            self.weigh_tombstone(id);
            return;
        }
        let info = entry.info;
        if let Some(older) = self.index.insert(id, entry) {
            self.zones.release_blob(older.place.zone, older.footprint());
            self.duplicates.entry(id).or_default().push(older.place);
            // Copies of one blob say the same of it; on a disk that lies they need not.
            self.uncount(&older.info);
        }
        self.count(&info);
        self.zones.charge_blob(place.zone, footprint);
    }

    fn count(&mut self, info: &BlobInfo) {
        let kind = info.kind as usize - 1;
        self.live_by_kind[kind] += u64::from(info.length);
        self.blobs_by_kind[kind] += 1;
        if !is_shard(info.kind) {
            self.few.entry(info.kind).or_default().insert((info.owner, info.id));
        }
    }

    fn uncount(&mut self, info: &BlobInfo) {
        let kind = info.kind as usize - 1;
        self.live_by_kind[kind] -= u64::from(info.length);
        self.blobs_by_kind[kind] -= 1;
        if let Some(few) = self.few.get_mut(&info.kind) {
            few.remove(&(info.owner, info.id));
        }
    }

    /// The collector's copy of a blob is durable.
    pub fn blob_moved(&mut self, entry: Entry, from: Place) {
        let (id, place) = (entry.info.id, entry.place);
        let current = self.index.get(&id).map(|entry| entry.place);
        if current.is_none_or(|current| current == from) {
            return self.blob_arrived(entry);
        }
        // A put has healed the blob meanwhile: its copy is the one that surely verifies.
        self.zones.get_mut(place.zone).blobs.push(id);
        self.duplicates.entry(id).or_default().push(place);
    }

    pub fn deletion_begins(&mut self, id: BlobId) {
        *self.dying.entry(id).or_default() += 1;
    }

    pub fn deletion_ended(&mut self, id: BlobId) {
        let Some(under_way) = self.dying.get_mut(&id) else { return };
        *under_way -= 1;
        if *under_way == 0 {
            self.dying.remove(&id);
        }
    }

    pub fn is_being_deleted(&self, id: BlobId) -> bool {
        self.dying.contains_key(&id)
    }

    /// Zones that hold a copy of a blob.
    pub fn places_of(&self, id: BlobId) -> SmallVec<[ZoneUse; 1]> {
        let mut places: SmallVec<[ZoneUse; 1]> = SmallVec::new();
        if let Some(tombstone) = self.tombstones.get(&id) {
            return tombstone.places.clone();
        }
        let primary = self.index.get(&id).map(|entry| entry.place);
        let others = self.duplicates.get(&id).into_iter().flatten().copied();
        for place in primary.into_iter().chain(others) {
            if !places.contains(&place.zone_use()) {
                places.push(place.zone_use());
            }
        }
        places
    }

    /// A durable tombstone record in `home`: the blob is gone for good.
    pub fn tombstone_arrived(&mut self, record: &TombstoneRecord, home: u32) {
        let id = record.id;
        let mut listed: SmallVec<[ZoneUse; 1]> = SmallVec::new();
        if let Some(existing) = self.tombstones.get_mut(&id) {
            // Carried forward, or found twice: the newer record counts.
            listed = std::mem::take(&mut existing.places);
            let (old_home, bytes) = (existing.home, existing.bytes);
            self.zones.release(old_home, bytes);
        }
        let mut places = self.places_of(id);
        places.extend(listed.iter().copied());
        places.extend(record.places.iter().copied());
        places.sort_unstable();
        places.dedup();
        places.retain(|place| !self.zones.is_gone(place));
        self.forget_blob(id);
        self.tombstones.remove(&id);
        if places.is_empty() {
            return;
        }
        for place in places.iter().filter(|place| !listed.contains(place)) {
            if let Some(zone) = self.zones.zones.get_mut(place.zone as usize) {
                zone.deleted.push(id);
            }
        }
        self.zones.get_mut(home).tombstones.push(id);
        self.tombstones.insert(id, Tombstone { places, home, bytes: 0 });
        self.weigh_tombstone(id);
    }

    /// Counts a tombstone anew in the zone of its record, after its places have changed.
    fn weigh_tombstone(&mut self, id: BlobId) {
        let Some(tombstone) = self.tombstones.get_mut(&id) else { return };
        let bytes = carried_bytes(&tombstone.places, tombstone.home);
        let before = std::mem::replace(&mut tombstone.bytes, bytes);
        self.zones.charge(tombstone.home, bytes);
        self.zones.release(tombstone.home, before);
    }

    pub fn forget_blob(&mut self, id: BlobId) {
        self.duplicates.remove(&id);
        let Some(entry) = self.index.remove(&id) else { return };
        // What kept the zone from being collected may have been this blob.
        self.zones.get_mut(entry.place.zone).stuck_until = None;
        self.zones.release_blob(entry.place.zone, entry.footprint());
        self.uncount(&entry.info);
        self.used = self.used.saturating_sub(entry.footprint());
    }

    /// Shards in the order of the zones they lie in, a page at a time, and where the next begins. One
    /// that moves between two pages may be in both or in neither.
    pub fn shards(&self, from: ShardCursor) -> (Vec<BlobInfo>, Option<ShardCursor>) {
        let ShardCursor { mut zone, mut at } = from;
        let mut found = Vec::new();
        for _ in 0..SHARDS_PAGE {
            let Some(blobs) = self.zones.zones.get(zone as usize).map(|zone| &zone.blobs) else {
                return (found, None);
            };
            let Some(id) = blobs.get(at) else {
                (zone, at) = (zone + 1, 0);
                continue;
            };
            at += 1;
            let entry = self.index.get(id).filter(|entry| entry.place.zone == zone && is_shard(entry.info.kind));
            found.extend(entry.map(|entry| entry.info));
        }
        (found, Some(ShardCursor { zone, at }))
    }

    /// Every blob of a kind, sorted by owner, then id. Of shards there may be millions, and they are
    /// looked for among everything: who does not stop the world for them has [`State::shards`].
    pub fn list(&self, kind: BlobKind) -> Vec<BlobInfo> {
        if !is_shard(kind) {
            let ids = self.few.get(&kind).into_iter().flatten();
            return ids.filter_map(|(_, id)| self.index.get(id)).map(|entry| entry.info).collect();
        }
        let of_kind = self.index.values().filter(|entry| entry.info.kind == kind);
        let mut blobs: Vec<BlobInfo> = of_kind.map(|entry| entry.info).collect();
        blobs.sort_unstable_by_key(|blob| (blob.owner, blob.id));
        blobs
    }

    /// A zone has a new durable generation: its copies are gone, and with them the work of
    /// tombstones that guarded against them. Whoever gives it back may do with its bytes as he
    /// likes first.
    pub fn zone_reset(&mut self, number: u32, generation: Generation) {
        let old = std::mem::replace(self.zones.get_mut(number), crate::zones::Zone::free(Some(generation), true));
        for id in old.blobs {
            let Some(places) = self.duplicates.get_mut(&id) else { continue };
            places.retain(|place| place.zone != number);
            if places.is_empty() {
                self.duplicates.remove(&id);
            }
        }
        for id in old.deleted {
            let Some(tombstone) = self.tombstones.get_mut(&id) else { continue };
            tombstone.places.retain(|place| place.zone != number || place.generation == generation);
            if tombstone.places.is_empty() {
                let (home, bytes) = (tombstone.home, tombstone.bytes);
                self.tombstones.remove(&id);
                // The reset zone was just counted anew.
                if home != number {
                    self.zones.release(home, bytes);
                }
            } else if tombstone.home != number {
                self.weigh_tombstone(id);
            }
        }
    }

    /// Those of `ids` whose primary copy is in a zone.
    pub fn living_in(&self, number: u32, ids: &[BlobId]) -> Vec<Entry> {
        let entries = ids.iter().filter_map(|id| self.index.get(id));
        entries.filter(|entry| entry.place.zone == number).cloned().collect()
    }

    /// Those of `ids` of which a zone holds a further copy.
    pub fn spare_in(&self, number: u32, ids: &[BlobId]) -> Vec<Entry> {
        let has_spare = |id: &&BlobId| {
            let spare = self.duplicates.get(id);
            spare.is_some_and(|places| places.iter().any(|place| place.zone == number))
        };
        let entries = ids.iter().filter(has_spare).filter_map(|id| self.index.get(id));
        entries.filter(|entry| entry.place.zone != number).cloned().collect()
    }

    /// Tombstones whose record is in a zone and that guard against copies elsewhere.
    pub fn live_tombstones(&self, number: u32) -> Vec<BlobId> {
        let ids = self.zones.get(number).tombstones.iter();
        let lives_here = |tombstone: &Tombstone| tombstone.home == number && tombstone.bytes > 0;
        let here = |id: &&BlobId| self.tombstones.get(id).is_some_and(lives_here);
        let mut ids: Vec<BlobId> = ids.filter(here).copied().collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zones::Zone;
    use cfs_wire::blobs::ShardGeometry;

    #[test]
    fn records_that_say_different_things_of_one_blob_are_counted_as_the_newest_says() {
        let zones = (0..2).map(|_| Zone::free(Some(Generation(1)), true)).collect();
        let mut state = State::new(ZoneTable::new(zones, 256 << 10), 1);
        let entry = |kind, length, zone| {
            let info = BlobInfo {
                id: BlobId(5),
                kind,
                owner: Owner { high: 1, low: 2 },
                geometry: ShardGeometry::NONE,
                length,
            };
            let place = Place { zone, generation: Generation(1), offset: 8192 };
            Entry { info, place, checksums: Rc::new([0; 4]) }
        };
        state.blob_arrived(entry(BlobKind::Log, 100, 0));
        state.blob_arrived(entry(BlobKind::Data, 9000, 1));
        assert_eq!((state.blobs_by_kind, state.live_by_kind), ([0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 9000, 0]));
        assert_eq!((state.list(BlobKind::Log).len(), state.zones.get(0).live), (0, 0));
        state.forget_blob(BlobId(5));
        assert_eq!((state.blobs_by_kind, state.live_by_kind), ([0; 6], [0; 6]));
    }

    #[test]
    fn shards_come_in_pages_each_once_and_only_where_they_lie_now() {
        const ZONES: u32 = 4;
        let zones = (0..ZONES).map(|_| Zone::free(Some(Generation(1)), true)).collect();
        let mut state = State::new(ZoneTable::new(zones, 256 << 10), 1);
        let entry = |id: u128, kind, zone| {
            let (owner, geometry) = (Owner { high: 1, low: 2 }, ShardGeometry::NONE);
            let info = BlobInfo { id: BlobId(id), kind, owner, geometry, length: 1 };
            let place = Place { zone, generation: Generation(1), offset: 8192 };
            Entry { info, place, checksums: Rc::new([0]) }
        };
        let kinds = [BlobKind::Data, BlobKind::Parity, BlobKind::Hot, BlobKind::Log];
        // Zone 1 is empty.
        for id in 0..3000u128 {
            state.blob_arrived(entry(id, kinds[(id % 4) as usize], [0, 2, 3][(id % 3) as usize]));
        }
        // Known of two zones, at home in the second.
        state.blob_arrived(entry(0, BlobKind::Data, 3));
        state.forget_blob(BlobId(4));
        let (mut found, mut pages, mut next) = (Vec::new(), 0, Some(ShardCursor::default()));
        while let Some(cursor) = next {
            let (page, more) = state.shards(cursor);
            assert!(page.len() <= SHARDS_PAGE as usize, "{}", page.len());
            (pages, next) = (pages + 1, more);
            found.extend(page.into_iter().map(|info| info.id.0));
        }
        assert_eq!(pages, 3001 / SHARDS_PAGE + 1);
        found.sort_unstable();
        let expected: Vec<u128> = (0..3000).filter(|id| id % 4 < 2 && *id != 4).collect();
        assert_eq!(found, expected);
    }
}
