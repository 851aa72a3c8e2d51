//! Checks what locates the data, and mends it: the copies of superblock and roster, the headers of
//! zones and of the appends in open ones, footers and summaries.
//!
//! A running store needs none of them, for the index is in memory: damage there would be found at
//! the next opening, when it has taken what it locates with it. While the store runs nothing is lost
//! yet. Copies are written again in place; a zone whose appends could not be found any more is left
//! by its stream, so that the summary names them, or emptied by the collector.

use crate::core::Core;
use crate::layout::roster::{self, Roster};
use crate::layout::stamp::{Role, Stamp};
use crate::layout::summary::ZoneFooter;
use crate::layout::superblock;
use crate::layout::{Invalid, PAGE_BYTES, ZONE_FOOTER_BYTES, ZONE_HEADER_BYTES};
use crate::read::READS_MAX;
use crate::scan::{Window, ZoneScan};
use crate::transfer;
use crate::zones::{Stream, Zone, ZoneState};
use bytes::Bytes;
use cfs_device::{DeviceResult, Placement};
use cfs_wire::limits::PAGE;
use cfs_wire::{Generation, ZoneNo};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// What a structure is there for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Structure {
    /// The device itself, or its end.
    Device,
    /// A copy of the superblock.
    Superblock,
    /// A copy of the roster.
    Roster,
    /// A copy of a zone's header.
    ZoneHeader,
    /// The header of an append that no summary names.
    Append,
    /// Footer or summary of a sealed zone.
    ZoneEnd,
}

/// A structure that does not verify, or can't be read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Flaw {
    pub structure: Structure,
    /// `None`: it is before the zones.
    pub zone: Option<ZoneNo>,
    /// What it was needed for is safe again.
    pub mended: bool,
}

/// A zone that is being looked at: what is read of it counts only if it is the same afterwards.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Looked {
    generation: Generation,
    state: ZoneState,
}

impl Looked {
    /// `None` while others write the structures of the zone, or when it has none.
    fn at(zone: &Zone) -> Option<Looked> {
        let settled = matches!(zone.state, ZoneState::Free { ready: true } | ZoneState::Open | ZoneState::Sealed);
        Some(Looked { generation: zone.generation.filter(|_| settled)?, state: zone.state })
    }
}

impl Core {
    /// Checks the structures of these zones, and with zone 0 those before all zones, at no more than
    /// so many bytes per second; hands over what is damaged, mended before if `mend` says so.
    pub async fn check_structures(
        self: &Rc<Self>,
        zones: Range<u32>,
        mend: bool,
        pace: &dyn Fn() -> u64,
        found: &dyn Fn(&Flaw),
    ) {
        let mend = || mend && self.check_writable().is_ok();
        if zones.contains(&0) {
            if self.detached() {
                found(&Flaw { structure: Structure::Device, zone: None, mended: false });
            }
            for structure in [Structure::Superblock, Structure::Roster] {
                let (damaged, page) = match structure {
                    Structure::Superblock => self.damaged_superblocks().await,
                    _ => self.damaged_rosters().await,
                };
                for copy in damaged {
                    let mended = match &page {
                        Some(page) if mend() => self.write_copy(copy, page.clone()).await.is_ok(),
                        _ => false,
                    };
                    found(&Flaw { structure, zone: None, mended });
                }
            }
        }
        for zone in zones.start..zones.end.min(self.superblock.zones) {
            let (structure, bytes) = self.check_zone(zone).await;
            if let Some((structure, looked)) = structure {
                let core = self.clone();
                // A task of its own: others wait for its end, which comes even if the caller goes away.
                let mending = async move { core.mend_zone(zone, looked, structure).await };
                let mended = mend() && self.handle.spawn(mending).await.unwrap_or(false);
                found(&Flaw { structure, zone: Some(ZoneNo(zone)), mended });
            }
            self.handle.sleep(Duration::from_secs_f64(f64::from(bytes) / pace().max(1) as f64)).await;
            self.handle.yield_now().await;
        }
    }

    /// Takes no more writes if the device, or a part of it, will not be there at the next opening.
    pub fn detached(&self) -> bool {
        self.device.attached().inspect_err(|error| self.fence(error)).is_err()
    }

    /// Offsets of copies that do not say what they should, and what they should say.
    async fn damaged_superblocks(&self) -> (Vec<u64>, Option<Bytes>) {
        let page = transfer::aligned(&self.superblock.encode());
        let mut damaged = Vec::new();
        for copy in superblock::COPIES {
            let sound = |read: &[u8]| read == &page[..];
            if self.read_sound(copy, PAGE, sound).await.is_none() {
                damaged.push(copy);
            }
        }
        (damaged, Some(page))
    }

    /// The same of the roster, which others write: a copy is right when it verifies and is not older than
    /// the one that is known, and a damaged one is to say what the other says, or that one. Written
    /// over a newer one meanwhile it does no harm, for that is in the other place too. A target of which
    /// nobody has written a roster has none.
    async fn damaged_rosters(&self) -> (Vec<u64>, Option<Bytes>) {
        let holder = &self.superblock.identity;
        let known = self.roster.borrow().clone();
        let least = known.as_ref().map_or(0, |known| known.epoch);
        let is_sound = |read: &[u8]| Roster::decode(read, holder).is_ok_and(|roster| roster.epoch >= least);
        let (mut damaged, mut page) = (Vec::new(), None);
        for copy in roster::COPIES {
            match self.read_sound(copy, PAGE, is_sound).await {
                Some(read) => page = Some(read),
                None => damaged.push(copy),
            }
        }
        if page.is_none() && known.is_none() && self.holds_zeroes(&roster::COPIES).await {
            damaged.clear();
        }
        // The newest by now: reading took its time.
        let known = self.roster.borrow().as_ref().map(|known| transfer::aligned(&known.encode(holder)));
        (damaged, page.or(known))
    }

    async fn holds_zeroes(&self, copies: &[u64]) -> bool {
        for copy in copies {
            let blank = |read: &[u8]| read.iter().all(|byte| *byte == 0);
            if self.read_sound(*copy, PAGE, blank).await.is_none() {
                return false;
            }
        }
        true
    }

    async fn write_copy(self: &Rc<Self>, offset: u64, page: Bytes) -> DeviceResult<()> {
        let written = self.device.write(offset, vec![page], Placement::Log, false).await;
        self.fenced(match written {
            Ok(()) => self.flush().await,
            Err(error) => Err(error),
        })
    }

    fn fenced(&self, outcome: DeviceResult<()>) -> DeviceResult<()> {
        outcome.inspect_err(|error| self.fence(error))
    }

    /// Bytes that are right, read again if the first were not: the damage may have been on the way.
    async fn read_sound(&self, offset: u64, length: usize, is_sound: impl Fn(&[u8]) -> bool) -> Option<Bytes> {
        for _ in 0..READS_MAX {
            match transfer::read(&*self.device, offset, length).await {
                Ok(bytes) if is_sound(&bytes) => return Some(bytes),
                _ => {}
            }
        }
        None
    }

    /// The worst that is wrong with a zone, and bytes read.
    async fn check_zone(&self, number: u32) -> (Option<(Structure, Looked)>, u32) {
        let (looked, end) = {
            let state = self.state.borrow();
            let zone = state.zones.get(number);
            (Looked::at(zone), zone.durable_end)
        };
        let Some(looked) = looked else { return (None, 0) };
        let mut read = ZONE_HEADER_BYTES + ZONE_FOOTER_BYTES;
        let mut damaged = None;
        let last = self.superblock.zone_bytes - ZONE_FOOTER_BYTES;
        let mut copies = vec![0, PAGE_BYTES];
        let mut named = false;
        if looked.state == ZoneState::Sealed {
            match self.sound_footer(number, looked.generation, end).await {
                Some(footer) if footer.length > 0 => {
                    read += footer.length;
                    named = self.is_summary_sound(number, &footer).await;
                    damaged = (!named).then_some(Structure::ZoneEnd);
                }
                // It was damaged when it was sealed: there are only the headers.
                Some(_) => {}
                None => damaged = Some(Structure::ZoneEnd),
            }
        } else {
            copies.push(last);
        }
        if damaged.is_none() && !named && !self.is_chain_whole(number, looked.generation, end).await {
            damaged = Some(Structure::Append);
        }
        for copy in copies {
            if damaged.is_none() && !self.is_header_sound(number, looked.generation, copy).await {
                damaged = Some(Structure::ZoneHeader);
            }
        }
        let same = Looked::at(self.state.borrow().zones.get(number)) == Some(looked);
        (damaged.filter(|_| same).map(|structure| (structure, looked)), read)
    }

    async fn is_header_sound(&self, zone: u32, generation: Generation, offset: u32) -> bool {
        let is_sound = |page: &[u8]| {
            let stamp = Stamp::decode(Role::ZoneHeader, page);
            stamp.is_ok_and(|stamp| stamp.is_of(&self.superblock, zone, offset) && stamp.generation == generation)
        };
        let place = self.superblock.zone_offset(zone) + u64::from(offset);
        self.read_sound(place, PAGE, is_sound).await.is_some()
    }

    async fn sound_footer(&self, zone: u32, generation: Generation, end: u32) -> Option<ZoneFooter> {
        let offset = self.superblock.zone_bytes - ZONE_FOOTER_BYTES;
        let decoded = |page: &[u8]| {
            let footer = ZoneFooter::decode(page)?;
            let stamp = &footer.stamp;
            let right = stamp.is_of(&self.superblock, zone, offset) && stamp.generation == generation;
            if right && stamp.extent == end { Ok(footer) } else { Err(Invalid::Field("stamp")) }
        };
        let place = self.superblock.zone_offset(zone) + u64::from(offset);
        let page = self.read_sound(place, PAGE, |page| decoded(page).is_ok()).await?;
        decoded(&page).ok()
    }

    async fn is_summary_sound(&self, zone: u32, footer: &ZoneFooter) -> bool {
        let Some((offset, length)) = footer.summary_range(self.superblock.zone_bytes) else { return false };
        let place = self.superblock.zone_offset(zone) + u64::from(offset);
        let is_sound = |bytes: &[u8]| footer.decode_summary(bytes).is_ok();
        self.read_sound(place, length as usize, is_sound).await.is_some()
    }

    /// Whether a scan would find all appends before `end`.
    async fn is_chain_whole(&self, zone: u32, generation: Generation, end: u32) -> bool {
        for _ in 0..READS_MAX {
            if end <= ZONE_HEADER_BYTES {
                return true;
            }
            let mut scan = ZoneScan::of(zone, Some(generation));
            scan.walk(&mut Window::new(&*self.device, &self.superblock, zone)).await;
            if scan.position >= end {
                return true;
            }
        }
        false
    }

    /// Mends what was wrong with a zone when it was looked at, if nobody has begun to do something
    /// else with it since.
    async fn mend_zone(self: &Rc<Self>, number: u32, looked: Looked, structure: Structure) -> bool {
        // The scrub and a check may be at it at the same time.
        while self.mending.get().is_some() {
            self.changed.notified().await;
        }
        if Looked::at(self.state.borrow().zones.get(number)) != Some(looked) {
            return false;
        }
        match (structure, looked.state) {
            (Structure::ZoneHeader, state) => {
                self.mending.set(Some(number));
                let last = state != ZoneState::Sealed;
                let written = self.write_header(number, looked.generation, last, false).await;
                let outcome = match written {
                    Ok(()) => self.flush().await,
                    Err(error) => Err(error),
                };
                self.mending.set(None);
                self.changed.notify_all();
                self.fenced(outcome).is_ok()
            }
            (_, ZoneState::Open) => self.seal_early(number).await,
            (_, ZoneState::Sealed) => self.empty(number, looked.generation).await,
            _ => false,
        }
    }

    /// Has its stream leave an open zone, and waits until it is sealed.
    async fn seal_early(self: &Rc<Self>, number: u32) -> bool {
        let Some(stream) = Stream::ALL.into_iter().find(|stream| self.lane(*stream).open.get() == Some(number)) else {
            return false;
        };
        self.leave(stream, number);
        let unsealed = || {
            let state = self.state.borrow().zones.get(number).state;
            matches!(state, ZoneState::Open | ZoneState::Sealing)
        };
        while unsealed() {
            let changed = self.changed.notified();
            if self.check_writable().is_err() {
                return false;
            }
            changed.await;
        }
        true
    }
}
