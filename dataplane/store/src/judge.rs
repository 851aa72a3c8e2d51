//! Torn or corrupt: decides what the breaks in the zones' chains mean.
//!
//! Every append carries how far each open zone was durable when it was written. The largest
//! such mark over the whole target (headers found behind a break included) rules: a chain that
//! breaks before it, or before the end that the zone's footer states, met corruption; one that
//! breaks at or behind it has a torn tail, which nobody was ever told is durable.

use crate::layout::append::{AppendHeader, Record, Tail};
use crate::layout::superblock::Superblock;
use crate::layout::{PAGE_BYTES, ZONE_FOOTER_BYTES, ZONE_HEADER_BYTES};
use crate::read::verify;
use crate::recovery::{CorruptRegion, Damage, RecoveryReport};
use crate::scan::{Break, Header, SummaryFound, Window, ZoneScan};
use crate::state::{Entry, Place};
use crate::transfer;
use cfs_device::BlockDevice;
use cfs_reactor::Handle;
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Generation, ZoneNo};
use std::collections::BTreeMap;

/// What becomes of a zone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Free,
    Sealed,
    /// Was open when the target went down; may be continued.
    Unsealed,
    /// Must not be continued: damaged, or it has leftovers of a torn append and no stream.
    ToSeal,
    Unusable,
}

pub(crate) struct Judged {
    pub scan: ZoneScan,
    pub verdict: Verdict,
    /// Where valid appends end.
    pub end: u32,
}

/// What all valid headers of the target together say.
#[derive(Default)]
struct Marks {
    /// How far each zone was durable, in its present generation.
    durable: BTreeMap<u32, u32>,
    /// Generations above that of the zone's own header: it was lost.
    newer: BTreeMap<u32, Generation>,
    /// Zones that were not sealed when the newest header or footer was written.
    open: Vec<u32>,
    /// Its sequence.
    newest: u64,
}

/// What a zone's headers and footer say of zones that were not sealed, each with its sequence.
fn tails(scan: &ZoneScan) -> impl Iterator<Item = (u64, &[Tail])> {
    // Appends from a summary say nothing of tails: what they said is older than its footer.
    let read = scan.summary != SummaryFound::Read;
    let appends = scan.appends.iter().chain(&scan.beyond).filter(move |_| read);
    let footer = scan.footer.iter().map(|footer| (footer.stamp.sequence, &footer.tails[..]));
    appends.map(|append| (append.stamp.sequence, &append.tails[..])).chain(footer)
}

fn marks(scans: &[ZoneScan], superblock: &Superblock) -> Marks {
    let mut marks = Marks::default();
    let mut newest: Option<(u64, &[Tail])> = None;
    for (sequence, tails) in scans.iter().flat_map(tails) {
        for tail in tails {
            let current = scans.get(tail.zone as usize).and_then(|scan| scan.generation);
            // Who appends to a zone has its header durable in that generation.
            if current.is_some_and(|current| current < tail.generation) {
                let newer = marks.newer.entry(tail.zone).or_default();
                *newer = tail.generation.max(*newer);
            }
            // Where no append can end, none did.
            let possible = tail.end.is_multiple_of(PAGE_BYTES) && tail.end <= superblock.zone_bytes - ZONE_FOOTER_BYTES;
            if current == Some(tail.generation) && possible {
                let mark = marks.durable.entry(tail.zone).or_default();
                *mark = tail.end.max(*mark);
            }
        }
        if newest.is_none_or(|(newest, _)| newest < sequence) {
            newest = Some((sequence, tails));
        }
    }
    marks.newest = newest.map_or(0, |(sequence, _)| sequence);
    marks.open = newest.iter().flat_map(|(_, tails)| *tails).map(|tail| tail.zone).collect();
    marks
}

impl Marks {
    fn durable(&self, zone: u32) -> u32 {
        self.durable.get(&zone).copied().unwrap_or(ZONE_HEADER_BYTES)
    }

    /// Whether the zone was used in its generation.
    fn knows(&self, scan: &ZoneScan) -> bool {
        let found = !scan.appends.is_empty() || !scan.beyond.is_empty() || scan.footer.is_some();
        found || self.durable.contains_key(&scan.zone)
    }

    /// Whether the zone's summary was durable although it does not verify: a later header knew
    /// the zone as sealed. Otherwise the crash may have come while it was written.
    fn lost_summary(&self, scan: &ZoneScan) -> bool {
        let footer = scan.footer.as_ref().filter(|_| scan.summary == SummaryFound::Damaged);
        footer.is_some_and(|footer| footer.stamp.sequence < self.newest && !self.open.contains(&scan.zone))
    }

    /// Whether the zone was sealed although no valid footer is there: it holds appends, yet
    /// the newest header does not count it among the open ones.
    fn lost_footer(&self, scan: &ZoneScan) -> bool {
        scan.footer.is_none() && !scan.appends.is_empty() && !self.open.contains(&scan.zone)
    }
}

pub(crate) async fn judge(
    device: &dyn BlockDevice,
    superblock: &Superblock,
    handle: &Handle,
    mut scans: Vec<ZoneScan>,
    report: &mut RecoveryReport,
) -> Vec<Judged> {
    let mut damaged = vec![false; scans.len()];
    let marks = loop {
        let marks = marks(&scans, superblock);
        let mut found = false;
        if !planted::is(Bug::StoreIgnoreNewerGeneration) {
            for (zone, generation) in &marks.newer {
                let mut window = Window::new(device, superblock, *zone);
                scans[*zone as usize].read_as(*generation, &mut window, handle).await;
                found = true;
            }
        }
        // What was said by a generation that has passed counts no more.
        if found {
            continue;
        }
        for scan in &mut scans {
            found |= pass_damage(device, superblock, handle, scan, &marks, &mut damaged, report).await;
        }
        // A header found behind damage may carry later marks, which may turn what looked
        // like another zone's end into damage.
        if !found {
            break marks;
        }
    };
    let mut judged = Vec::new();
    for mut scan in scans {
        let damaged = damaged[scan.zone as usize];
        let verdict = verdict(device, superblock, &mut scan, &marks, damaged, report).await;
        let end = scan.position.clamp(ZONE_HEADER_BYTES, superblock.zone_bytes - ZONE_FOOTER_BYTES);
        judged.push(Judged { scan, verdict, end });
    }
    report.corrupt.sort_unstable();
    judged
}

/// Goes past damage before the zone's durable end; true when there was any.
async fn pass_damage(
    device: &dyn BlockDevice,
    superblock: &Superblock,
    handle: &Handle,
    scan: &mut ZoneScan,
    marks: &Marks,
    damaged: &mut [bool],
    report: &mut RecoveryReport,
) -> bool {
    if scan.generation.is_none() || planted::is(Bug::StoreCorruptionAsTornTail) {
        return false;
    }
    let known_end = scan.footer_end().unwrap_or_else(|| marks.durable(scan.zone));
    let unreadable = scan.reason == Break::Unreadable;
    let searched_before = damaged[scan.zone as usize] && scan.position >= known_end;
    let suspect = scan.position < known_end || unreadable || (marks.lost_footer(scan) && scan.reason != Break::End);
    if !suspect || searched_before {
        return false;
    }
    damaged[scan.zone as usize] = true;
    let start = scan.position;
    let mut window = Window::new(device, superblock, scan.zone);
    let found = scan.resync(&mut window, handle).await;
    if !found {
        scan.position = scan.position.max(known_end);
    }
    let damage = match (unreadable, found || start < known_end) {
        (true, _) => Damage::Unreadable,
        (false, true) => Damage::Appends,
        (false, false) => Damage::ZoneFooter,
    };
    let length = scan.position - start;
    report.corrupt.push(CorruptRegion { zone: ZoneNo(scan.zone), offset: start, length, damage });
    if found {
        scan.walk(&mut window).await;
    }
    true
}

async fn verdict(
    device: &dyn BlockDevice,
    superblock: &Superblock,
    scan: &mut ZoneScan,
    marks: &Marks,
    damaged: bool,
    report: &mut RecoveryReport,
) -> Verdict {
    let whole = |damage| CorruptRegion { zone: ZoneNo(scan.zone), offset: 0, length: superblock.zone_bytes, damage };
    match scan.header {
        Header::Unreadable => {
            report.corrupt.push(whole(Damage::Unreadable));
            return Verdict::Unusable;
        }
        Header::Damaged => {
            report.corrupt.push(whole(Damage::ZoneHeader));
            return Verdict::Free;
        }
        Header::Void => {
            if marks.open.contains(&scan.zone) {
                report.corrupt.push(whole(Damage::ZoneHeader));
            }
            return Verdict::Free;
        }
        // After a crash while it was written, a header may be lost in which the zone was not used.
        Header::Valid { lost: true, .. } if marks.knows(scan) => {
            report.corrupt.push(CorruptRegion { length: ZONE_HEADER_BYTES, ..whole(Damage::ZoneHeader) });
        }
        Header::Valid { .. } => {}
    }
    let refused = |region: &CorruptRegion| region.zone.0 == scan.zone && region.damage == Damage::Unreadable;
    if report.corrupt.iter().any(refused) {
        return Verdict::Unusable;
    }
    if let Some(footer) = &scan.footer {
        if marks.lost_summary(scan) {
            let (offset, length) = footer.summary_range(superblock.zone_bytes).unwrap_or_default();
            let (zone, damage) = (ZoneNo(scan.zone), Damage::Summary);
            report.corrupt.push(CorruptRegion { zone, offset, length, damage });
        }
        let resealed = scan.summary == SummaryFound::Damaged && !damaged;
        return if resealed { Verdict::ToSeal } else { Verdict::Sealed };
    }
    if marks.lost_footer(scan) {
        // It was sealed: all of it was durable, whatever a payload looks like now.
        return Verdict::ToSeal;
    }
    let torn = cut_torn_tail(device, superblock, scan, marks.durable(scan.zone)).await;
    if torn || (scan.reason == Break::Started && !damaged) {
        report.torn_tails.push((ZoneNo(scan.zone), scan.position));
    }
    if damaged {
        return Verdict::ToSeal;
    }
    match (scan.appends.is_empty(), torn) {
        (true, false) => Verdict::Free,
        // Its leftover header must not be taken for a durable one next time: the footer says
        // that nothing is here.
        (true, true) => Verdict::ToSeal,
        (false, _) => Verdict::Unsealed,
    }
}

/// Drops appends behind the mark from the first whose payload is not wholly there; true when
/// there was one.
async fn cut_torn_tail(
    device: &dyn BlockDevice,
    superblock: &Superblock,
    scan: &mut ZoneScan,
    durable_end: u32,
) -> bool {
    let mut whole = scan.appends.iter().take_while(|append| append.stamp.offset < durable_end).count();
    while let Some(append) = scan.appends.get(whole) {
        if !is_whole(device, superblock, append).await && !planted::is(Bug::StoreKeepTornTail) {
            scan.position = append.stamp.offset;
            scan.appends.truncate(whole);
            return true;
        }
        whole += 1;
    }
    false
}

/// Whether every payload of an append matches its checksums. A payload that can't be read
/// is given the benefit of the doubt: reads of it will say so.
async fn is_whole(device: &dyn BlockDevice, superblock: &Superblock, append: &AppendHeader) -> bool {
    let stamp = &append.stamp;
    for record in &append.records {
        let Record::Blob(blob) = record else { continue };
        let offset = stamp.offset + blob.start;
        let place = Place { zone: stamp.zone.0, generation: stamp.generation, offset };
        let entry = Entry { info: blob.info, place, checksums: blob.checksums.clone() };
        let start = superblock.zone_offset(place.zone) + u64::from(offset);
        let length = crate::layout::round_up(blob.info.length) as usize;
        let Ok(bytes) = transfer::read(device, start, length).await else { continue };
        if verify(&entry, place, 0, &bytes).is_err() {
            return false;
        }
    }
    true
}
