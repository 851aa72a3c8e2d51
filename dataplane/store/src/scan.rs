//! Reads one zone: its header, footer, and its summary or the chain of append headers.
//!
//! A scan hops from header to header. Where the chain breaks it only says so; whether that is
//! the end, a torn tail or corruption needs the marks of the whole target and is decided in
//! [`crate::judge`], which may then ask the scan to look for the next valid header.

use crate::commit::FLIGHTS_MAX;
use crate::group::PAYLOAD_BYTES_MAX;
use crate::layout::append::AppendHeader;
use crate::layout::stamp::{Role, Stamp};
use crate::layout::summary::ZoneFooter;
use crate::layout::superblock::Superblock;
use crate::layout::{APPEND_HEADER_BYTES_MAX, Invalid, PAGE_BYTES, ZONE_FOOTER_BYTES, ZONE_HEADER_BYTES};
use crate::transfer;
use bytes::Bytes;
use cfs_device::{BlockDevice, DeviceError};
use cfs_reactor::Handle;
use cfs_wire::Generation;
use cfs_wire::limits::PAGE;
use cfs_wire::planted::{self, Bug};

/// First read of a chain, and again after a hop out of the window.
const WINDOW_BYTES_MIN: u32 = 16 << 10;
/// Where headers follow each other closely, larger reads pay.
const WINDOW_BYTES_MAX: u32 = 1 << 20;
/// How far behind a break in an unsealed zone headers are looked for: all appends of a stream
/// that can be under way at once.
const BEYOND_BYTES_MAX: u32 = FLIGHTS_MAX as u32 * (PAYLOAD_BYTES_MAX + APPEND_HEADER_BYTES_MAX);
/// Pages looked at between two yields while searching for a header.
const PAGES_PER_YIELD: u32 = 256;

/// What the copies of a zone's header say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Header {
    /// The zone's generation is known. `stale_copy`: some copy must be written anew. `lost`: the
    /// first two must, for something else told the generation.
    Valid {
        stale_copy: bool,
        lost: bool,
    },
    /// Never used since the format, or damaged beyond recognition.
    Void,
    /// The zone was used, but no copy verifies any more, and no footer.
    Damaged,
    Unreadable,
}

/// Why a chain went no further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Break {
    /// The zone's end, or what its footer says is the end.
    End,
    /// Zeroes, or a header older than what precedes it: nothing was written here in this
    /// generation.
    Untouched,
    /// A header was begun but does not verify.
    Started,
    /// Something else: payload of the past, or damage.
    Invalid,
    /// The device refused to read.
    Unreadable,
}

/// How a sealed zone's summary was met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SummaryFound {
    /// None was written.
    Absent,
    /// `appends` are from it.
    Read,
    /// It does not verify, or can't be read: the headers were read.
    Damaged,
}

pub(crate) struct ZoneScan {
    pub zone: u32,
    pub header: Header,
    pub generation: Option<Generation>,
    /// There if the zone was sealed.
    pub footer: Option<ZoneFooter>,
    pub summary: SummaryFound,
    pub appends: Vec<AppendHeader>,
    /// Headers found behind the break of an unsealed zone. What they say of durable ends
    /// decides whether the break is damage; alone they count for nothing.
    pub beyond: Vec<AppendHeader>,
    /// Where the chain broke.
    pub position: u32,
    pub reason: Break,
    pub sequence_max: u64,
}

/// Bytes of a zone, read in windows.
pub(crate) struct Window<'a> {
    device: &'a dyn BlockDevice,
    superblock: &'a Superblock,
    zone: u32,
    start: u32,
    bytes: Bytes,
    size: u32,
}

impl<'a> Window<'a> {
    pub fn new(device: &'a dyn BlockDevice, superblock: &'a Superblock, zone: u32) -> Window<'a> {
        Window { device, superblock, zone, start: 0, bytes: Bytes::new(), size: WINDOW_BYTES_MIN }
    }

    fn covers(&self, offset: u32, length: u32) -> bool {
        offset >= self.start && (offset + length) as usize <= self.start as usize + self.bytes.len()
    }

    /// `length` bytes at `offset`, both in the zone.
    pub async fn read(&mut self, offset: u32, length: u32) -> Result<Bytes, DeviceError> {
        if !self.covers(offset, length) {
            let follows = offset <= self.start.saturating_add(self.bytes.len() as u32) && !self.bytes.is_empty();
            self.size = if follows { (self.size * 2).min(WINDOW_BYTES_MAX) } else { WINDOW_BYTES_MIN };
            let wanted = self.size.max(length).min(self.superblock.zone_bytes - offset);
            let place = self.superblock.zone_offset(self.zone) + u64::from(offset);
            self.bytes = match transfer::read(self.device, place, wanted as usize).await {
                Ok(bytes) => bytes,
                // The fault may be elsewhere in the window.
                Err(_) => transfer::read(self.device, place, length as usize).await?,
            };
            self.start = offset;
        }
        let from = (offset - self.start) as usize;
        Ok(self.bytes.slice(from..from + length as usize))
    }
}

/// Reads a zone up to where its chain first breaks.
pub(crate) async fn scan(device: &dyn BlockDevice, superblock: &Superblock, handle: &Handle, zone: u32) -> ZoneScan {
    let mut scan = ZoneScan::of(zone, None);
    let mut window = Window::new(device, superblock, zone);
    scan.read_header(&mut window).await;
    if scan.generation.is_some() {
        scan.read_summary(device, superblock).await;
        scan.read_appends(&mut window, handle).await;
    }
    scan
}

impl ZoneScan {
    /// Of a zone of which nothing has been read.
    pub fn of(zone: u32, generation: Option<Generation>) -> ZoneScan {
        ZoneScan {
            zone,
            header: Header::Void,
            generation,
            footer: None,
            summary: SummaryFound::Absent,
            appends: Vec::new(),
            beyond: Vec::new(),
            position: ZONE_HEADER_BYTES,
            reason: Break::Untouched,
            sequence_max: 0,
        }
    }

    /// The zone's generation is the newest that anything tells which was written after a header of it
    /// had been durable: a copy of the header, the footer, the zone's first append.
    async fn read_header(&mut self, window: &mut Window<'_>) {
        // Each on its own: one bad page is not to hide the other.
        let zeroth = window.read(0, PAGE_BYTES).await.ok();
        let first = window.read(PAGE_BYTES, PAGE_BYTES).await.ok();
        let last_offset = window.superblock.zone_bytes - ZONE_FOOTER_BYTES;
        let place = window.superblock.zone_offset(self.zone) + u64::from(last_offset);
        // What can't be read may be read another time: it is not taken for a stale copy.
        let last = transfer::read(window.device, place, PAGE).await.ok();
        let copies = [
            self.header_copy(window.superblock, 0, zeroth.as_deref().unwrap_or_default()),
            self.header_copy(window.superblock, PAGE_BYTES, first.as_deref().unwrap_or_default()),
            self.header_copy(window.superblock, last_offset, last.as_deref().unwrap_or_default()),
        ];
        let footer = self.decode_footer(window.superblock, last_offset, last.as_deref().unwrap_or_default());
        let known = copies.iter().flatten().map(|stamp| stamp.generation);
        let known = known.chain(footer.iter().map(|footer| footer.stamp.generation)).max();
        let append = self.first_append(window).await;
        let stamps = copies.iter().flatten().chain(footer.iter().map(|footer| &footer.stamp)).chain(&append);
        self.sequence_max = stamps.map(|stamp| stamp.sequence).max().unwrap_or(0);
        let Some(known) = known else {
            if zeroth.is_none() || first.is_none() {
                self.header = Header::Unreadable;
                return;
            }
            // Without a header an append may be of the past.
            let used = append.is_some()
                || copies.contains(&Err(Invalid::Checksum))
                || footer.is_err_and(|error| error == Invalid::Checksum);
            self.header = if used { Header::Damaged } else { Header::Void };
            return;
        };
        let append = append.filter(|_| !planted::is(Bug::StoreIgnoreNewerGeneration));
        let generation = append.map_or(known, |append| append.generation.max(known));
        self.generation = Some(generation);
        self.footer = footer.ok().filter(|footer| footer.stamp.is_generation(generation));
        let is_newest = |copy: &Result<Stamp, Invalid>| matches!(copy, Ok(stamp) if stamp.generation == generation);
        let [zeroth, first, third] = copies.each_ref().map(is_newest);
        let stale_copy = !zeroth || !first || !(third || self.footer.is_some() || last.is_none());
        self.header = Header::Valid { stale_copy, lost: !zeroth && !first };
    }

    fn header_copy(&self, superblock: &Superblock, offset: u32, page: &[u8]) -> Result<Stamp, Invalid> {
        let stamp = Stamp::decode(Role::ZoneHeader, page)?;
        if stamp.is_of(superblock, self.zone, offset) { Ok(stamp) } else { Err(Invalid::NoMagic) }
    }

    /// The stamp of whatever append was last written at the beginning of the zone.
    async fn first_append(&self, window: &mut Window<'_>) -> Option<Stamp> {
        let page = window.read(ZONE_HEADER_BYTES, PAGE_BYTES).await.ok()?;
        let length = Stamp::peek_bytes(Role::Append, &page).ok()?;
        let structure = window.read(ZONE_HEADER_BYTES, length).await.ok()?;
        let stamp = Stamp::decode(Role::Append, &structure).ok()?;
        stamp.is_of(window.superblock, self.zone, ZONE_HEADER_BYTES).then_some(stamp)
    }

    fn decode_footer(&self, superblock: &Superblock, offset: u32, page: &[u8]) -> Result<ZoneFooter, Invalid> {
        let footer = ZoneFooter::decode(page)?;
        let stamp = &footer.stamp;
        let sane = (ZONE_HEADER_BYTES..=offset).contains(&stamp.extent) && stamp.extent.is_multiple_of(PAGE_BYTES);
        if sane && stamp.is_of(superblock, self.zone, offset) { Ok(footer) } else { Err(Invalid::NoMagic) }
    }

    /// Reads the zone again in a newer generation, which headers in other zones know it to have.
    pub async fn read_as(&mut self, generation: Generation, window: &mut Window<'_>, handle: &Handle) {
        self.generation = Some(generation);
        self.header = Header::Valid { stale_copy: true, lost: true };
        (self.footer, self.summary) = (None, SummaryFound::Absent);
        self.appends.clear();
        self.beyond.clear();
        self.position = ZONE_HEADER_BYTES;
        self.read_appends(window, handle).await;
    }

    async fn read_appends(&mut self, window: &mut Window<'_>, handle: &Handle) {
        self.walk(window).await;
        if self.footer.is_none() {
            self.look_beyond(window, handle).await;
        }
    }

    /// Takes the appends from the zone's summary; when it is damaged they are left to the walk.
    async fn read_summary(&mut self, device: &dyn BlockDevice, superblock: &Superblock) {
        let Some(footer) = self.footer.as_ref().filter(|footer| footer.length > 0) else { return };
        self.summary = SummaryFound::Damaged;
        let Some((offset, length)) = footer.summary_range(superblock.zone_bytes) else { return };
        let place = superblock.zone_offset(self.zone) + u64::from(offset);
        let Ok(bytes) = transfer::read(device, place, length as usize).await else { return };
        let Ok(appends) = footer.decode_summary(&bytes) else { return };
        self.summary = SummaryFound::Read;
        self.position = footer.stamp.extent;
        self.appends = appends;
    }

    /// Where the appends end, if the zone was sealed.
    pub fn footer_end(&self) -> Option<u32> {
        self.footer.as_ref().map(|footer| footer.stamp.extent)
    }

    fn end(&self, superblock: &Superblock) -> u32 {
        self.footer_end().unwrap_or(superblock.zone_bytes - ZONE_FOOTER_BYTES)
    }

    /// Follows the chain from `position`.
    pub async fn walk(&mut self, window: &mut Window<'_>) {
        let end = self.end(window.superblock);
        while self.position < end {
            let last = self.appends.last().map_or(0, |append| append.stamp.sequence);
            match self.read_append(window, self.position, last).await {
                Ok(append) => {
                    self.position += append.stamp.extent;
                    self.sequence_max = self.sequence_max.max(append.stamp.sequence);
                    self.appends.push(append);
                }
                Err(reason) => {
                    self.reason = reason;
                    return;
                }
            }
        }
        self.reason = Break::End;
    }

    /// The append that starts at `offset`, if it belongs there and follows sequence `last`.
    async fn read_append(&self, window: &mut Window<'_>, offset: u32, last: u64) -> Result<AppendHeader, Break> {
        let page = window.read(offset, PAGE_BYTES).await.map_err(|_| Break::Unreadable)?;
        let nothing = if page.iter().all(|byte| *byte == 0) { Break::Untouched } else { Break::Invalid };
        let length = Stamp::peek_bytes(Role::Append, &page).map_err(|_| nothing)?;
        if length > self.end(window.superblock) - offset {
            return Err(Break::Invalid);
        }
        let structure = window.read(offset, length).await.map_err(|_| Break::Unreadable)?;
        let Ok(append) = AppendHeader::decode(&structure) else { return Err(Break::Started) };
        let stamp = &append.stamp;
        let generation = self.generation.unwrap_or_default();
        if !stamp.is_of(window.superblock, self.zone, offset) {
            return Err(Break::Invalid);
        }
        if !stamp.is_generation(generation) || stamp.sequence <= last {
            return Err(if stamp.sequence < generation.0.max(last) { Break::Untouched } else { Break::Invalid });
        }
        if stamp.fits(window.superblock) { Ok(append) } else { Err(Break::Invalid) }
    }

    /// Looks for the next valid header behind a break; true when found, with `position` there.
    pub async fn resync(&mut self, window: &mut Window<'_>, handle: &Handle) -> bool {
        let last = self.appends.last().map_or(0, |append| append.stamp.sequence);
        let end = self.end(window.superblock);
        match self.find(window, handle, self.position + PAGE_BYTES, end, last).await {
            Some(append) => {
                self.position = append.stamp.offset;
                true
            }
            None => false,
        }
    }

    /// Collects the headers behind the break, unless nothing was ever written there.
    async fn look_beyond(&mut self, window: &mut Window<'_>, handle: &Handle) {
        let untouched = self.appends.is_empty() && self.reason == Break::Untouched;
        if untouched || self.reason == Break::End {
            return;
        }
        let end = self.end(window.superblock).min(self.position.saturating_add(BEYOND_BYTES_MAX));
        let mut last = self.appends.last().map_or(0, |append| append.stamp.sequence);
        let mut offset = self.position + PAGE_BYTES;
        while let Some(append) = self.find(window, handle, offset, end, last).await {
            offset = append.stamp.offset + append.stamp.extent;
            last = append.stamp.sequence;
            self.sequence_max = self.sequence_max.max(last);
            self.beyond.push(append);
        }
    }

    async fn find(
        &self,
        window: &mut Window<'_>,
        handle: &Handle,
        from: u32,
        end: u32,
        last: u64,
    ) -> Option<AppendHeader> {
        for offset in (from..end).step_by(PAGE) {
            if let Ok(append) = self.read_append(window, offset, last).await {
                return Some(append);
            }
            if (offset / PAGE_BYTES).is_multiple_of(PAGES_PER_YIELD) {
                handle.yield_now().await;
            }
        }
        None
    }
}
