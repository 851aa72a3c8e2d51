//! Opens a target: reads the summaries of sealed zones and the headers of the others, and rebuilds
//! the index.
//!
//! In order: read superblocks and flush (what is read from here on must not be lost later) →
//! scan every zone → judge where chains broke → check payloads written after the last mark →
//! apply all blobs, then all tombstones (a tombstone beats every copy whatever its sequence) →
//! repair headers, close zones that are not continued.

use crate::collect::Collector;
use crate::commit::Lane;
use crate::core::Core;
use crate::error::StoreError;
use crate::flush::Flusher;
use crate::format::read_copies;
use crate::judge::{self, Judged, Verdict};
use crate::layout::append::{Record, TombstoneRecord};
use crate::layout::round_up;
use crate::layout::summary::Summary;
use crate::layout::superblock::{Identity, Superblock};
use crate::scan::{self, Header, SummaryFound};
use crate::state::{Entry, Place, State};
use crate::transfer;
use crate::zones::{Stream, Zone, ZoneState, ZoneTable};
use cfs_device::{BlockDevice, Placement};
use cfs_reactor::Handle;
use cfs_reactor::sync::Notify;
use cfs_wire::ZoneNo;
use futures_util::StreamExt;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Zones scanned at once: enough to keep a device busy, little memory.
const SCANS_AT_ONCE: usize = 16;
/// Left out after the highest sequence seen, so that a record which could not be read this time
/// never shares its number with a later one, and stays behind it.
const SEQUENCE_GAP: u64 = 1 << 20;
/// Records applied between two yields.
const RECORDS_PER_YIELD: usize = 512;

/// Which structure is damaged.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Damage {
    /// A zone's header: nothing in the zone is believed. Where the range is no longer than the first
    /// copies, the zone is known without them, and nothing is lost.
    ZoneHeader,
    /// Headers of appends that were durable; what they held is lost here.
    Appends,
    /// A footer; nothing is lost.
    ZoneFooter,
    /// A zone's summary; nothing is lost.
    Summary,
    /// The device refused to read; the zone is left alone.
    Unreadable,
}

/// A damaged range that had been durable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct CorruptRegion {
    pub zone: ZoneNo,
    pub offset: u32,
    pub length: u32,
    pub damage: Damage,
}

/// What opening a target found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    pub blobs: u64,
    pub tombstones: u64,
    /// Appends that were under way when the target went down, and where they started.
    pub torn_tails: Vec<(ZoneNo, u32)>,
    /// To be repaired from redundancy: blobs in these ranges are missing from the index.
    pub corrupt: Vec<CorruptRegion>,
    pub superblock_copies_repaired: u32,
    /// Sealed zones that were known from their summaries, without reading their headers.
    pub summaries: u32,
}

pub(crate) async fn open(
    device: Rc<dyn BlockDevice>,
    handle: &Handle,
    expected: Option<Identity>,
) -> Result<(Rc<Core>, RecoveryReport), StoreError> {
    let name = || device.name().to_owned();
    let Some((superblock, stale_copies)) = read_copies(&*device).await? else {
        return Err(StoreError::Blank { device: name() });
    };
    if let Some(expected) = expected.filter(|expected| *expected != superblock.identity) {
        return Err(StoreError::WrongIdentity { device: name(), found: superblock.identity, expected });
    }
    let page = transfer::aligned(&superblock.encode());
    for copy in &stale_copies {
        device.write(*copy, vec![page.clone()], Placement::Log, false).await?;
    }
    device.flush().await?;

    let scans = futures_util::stream::iter(0..superblock.zones)
        .map(|zone| scan::scan(&*device, &superblock, handle, zone))
        .buffered(SCANS_AT_ONCE);
    let scans = scans.collect::<Vec<_>>().await;
    let mut report =
        RecoveryReport { superblock_copies_repaired: stale_copies.len() as u32, ..RecoveryReport::default() };
    let judged = judge::judge(&*device, &superblock, handle, scans, &mut report).await;

    let mut state = State::new(zone_table(&superblock, &judged), next_sequence(&judged));
    apply(&mut state, &judged, handle).await;
    report.summaries = judged.iter().filter(|zone| zone.scan.summary == SummaryFound::Read).count() as u32;
    report.blobs = state.index.len() as u64;
    report.tombstones = state.tombstones.len() as u64;
    let resumed = resume(&mut state, &judged);
    let lanes = resumed.into_iter().map(Lane::new).collect();
    let core = Core {
        device,
        handle: handle.clone(),
        superblock,
        state: RefCell::new(state),
        lanes,
        flusher: Flusher::default(),
        collector: Collector::default(),
        preparing: Cell::new(false),
        mending: Cell::new(None),
        roster: RefCell::new(None),
        changed: Notify::new(),
        failed: RefCell::new(None),
        closed: Cell::new(false),
    };
    let core = Rc::new(core);
    repair(&core, &judged).await?;
    if !report.corrupt.is_empty() {
        tracing::warn!(device = core.device.name(), regions = report.corrupt.len(), "damage below the durable mark");
    }
    Ok((core, report))
}

fn next_sequence(judged: &[Judged]) -> u64 {
    let seen = judged.iter().map(|zone| {
        let generation = zone.scan.generation.unwrap_or_default();
        zone.scan.sequence_max.max(generation.0)
    });
    seen.max().unwrap_or(0) + 1 + SEQUENCE_GAP
}

fn zone_table(superblock: &Superblock, judged: &[Judged]) -> ZoneTable {
    let zones = judged.iter().map(|judged| {
        let scan = &judged.scan;
        let ready = scan.generation.is_some();
        let mut zone = Zone::free(scan.generation, ready);
        zone.end = judged.end;
        zone.durable_end = judged.end;
        if let Some(last) = scan.appends.last() {
            zone.last_sequence = last.stamp.sequence;
            zone.stream = Stream::from_u8(last.stamp.stream).unwrap_or(Stream::Relocated);
        }
        zone.state = match judged.verdict {
            Verdict::Free => ZoneState::Free { ready },
            Verdict::Unusable => ZoneState::Unusable,
            Verdict::Sealed => ZoneState::Sealed,
            // Continued or closed before anything else is written; until then every header says
            // that they were not closed.
            Verdict::Unsealed | Verdict::ToSeal => ZoneState::Sealing,
        };
        zone.summary = match zone.state {
            ZoneState::Sealing => Summary::of(&scan.appends, judged.end),
            ZoneState::Free { .. } => Some(Summary::default()),
            _ => None,
        };
        let footer = scan.footer.as_ref().filter(|_| zone.state == ZoneState::Sealed);
        zone.summary_bytes = footer.map_or(0, |footer| round_up(footer.length.min(superblock.zone_bytes)));
        zone
    });
    ZoneTable::new(zones.collect(), superblock.zone_bytes)
}

/// All blobs in the order they were written, then all tombstones.
async fn apply(state: &mut State, judged: &[Judged], handle: &Handle) {
    let mut appends: Vec<_> = judged.iter().flat_map(|zone| &zone.scan.appends).collect();
    appends.sort_unstable_by_key(|append| append.stamp.sequence);
    let mut tombstones: Vec<(&TombstoneRecord, u32)> = Vec::new();
    let mut applied = 0;
    for append in appends {
        let stamp = &append.stamp;
        for record in &append.records {
            match record {
                Record::Blob(blob) => {
                    let offset = stamp.offset + blob.start;
                    let place = Place { zone: stamp.zone.0, generation: stamp.generation, offset };
                    state.blob_arrived(Entry { info: blob.info, place, checksums: blob.checksums.clone() });
                }
                Record::Tombstone(tombstone) => tombstones.push((tombstone, stamp.zone.0)),
            }
        }
        applied += append.records.len();
        if applied >= RECORDS_PER_YIELD {
            applied = 0;
            handle.yield_now().await;
        }
    }
    for (count, (tombstone, home)) in tombstones.into_iter().enumerate() {
        state.tombstone_arrived(tombstone, home);
        if count.is_multiple_of(RECORDS_PER_YIELD) {
            handle.yield_now().await;
        }
    }
    state.used = state.index.values().map(Entry::footprint).sum();
    for zone in 0..judged.len() as u32 {
        // Zones were put in their state before anything lived in them.
        let now = state.zones.get(zone).state;
        state.zones.set_state(zone, now);
    }
}

/// Continues, per stream, the unsealed zone with most room.
fn resume(state: &mut State, judged: &[Judged]) -> [Option<u32>; Stream::ALL.len()] {
    let mut resumed = [None; Stream::ALL.len()];
    for zone in judged.iter().filter(|judged| judged.verdict == Verdict::Unsealed) {
        let number = zone.scan.zone;
        if state.zones.get(number).summary.is_none() {
            // Not all of it is known: it is closed.
            continue;
        }
        let best = &mut resumed[state.zones.get(number).stream as usize];
        if best.is_none_or(|best| state.zones.room(number, 0) > state.zones.room(best, 0)) {
            *best = Some(number);
        }
    }
    for zone in resumed.into_iter().flatten() {
        state.zones.set_state(zone, ZoneState::Open);
    }
    resumed
}

/// Writes what must be in order before the first append: all copies of every zone's header,
/// and footers of zones that are not continued, or whose summary is damaged.
async fn repair(core: &Rc<Core>, judged: &[Judged]) -> Result<(), StoreError> {
    for zone in judged {
        let number = zone.scan.zone;
        let stale = matches!(zone.scan.header, Header::Valid { stale_copy: true, .. });
        let Some(generation) = zone.scan.generation.filter(|_| stale) else { continue };
        if zone.verdict != Verdict::Unusable {
            core.write_header(number, generation, zone.scan.footer.is_none(), false).await?;
        }
    }
    let open: Vec<u32> = core.lanes.iter().filter_map(|lane| lane.open.get()).collect();
    for zone in judged {
        let number = zone.scan.zone;
        let unsealed = matches!(zone.verdict, Verdict::Unsealed | Verdict::ToSeal);
        if unsealed && !open.contains(&number) {
            let stream = core.state.borrow().zones.get(number).stream;
            core.write_footer(stream, number).await?;
            core.state.borrow_mut().zones.set_state(number, ZoneState::Sealed);
        }
    }
    core.flush().await?;
    Ok(())
}
