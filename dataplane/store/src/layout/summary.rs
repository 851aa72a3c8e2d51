//! The end of a sealed zone: its footer, and before it the summary, which repeats what the
//! headers of all the zone's appends say. Who opens the target reads one range instead of
//! hopping from header to header.

use super::append::{AppendHeader, Record, TAILS_MAX, Tail, put_tails, take_tails};
use super::stamp::{Role, STAMP_BYTES, Stamp, seal};
use super::{Fields, Invalid, PAGE_BYTES, ZONE_FOOTER_BYTES, ZONE_HEADER_BYTES, round_up};
use bytes::BufMut;
use cfs_codec::crc32c::{crc32c, crc32c_append};
use smallvec::SmallVec;

/// What a summary says of an append before its records.
const APPEND_BYTES: usize = 24;

/// A zone's last page. Drawn: `stamp 96 | tails 16 × 16 | length of the summary 4 | appends in it
/// 4 | its CRC32C 4 | 0 to the end of the page`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneFooter {
    /// `extent`: where the zone's appends end.
    pub stamp: Stamp,
    /// The zones that were not sealed when this was written; this one does not count.
    pub tails: SmallVec<[Tail; TAILS_MAX]>,
    /// Bytes of the summary, without padding; 0: the zone has none, its headers are read.
    pub length: u32,
    pub appends: u32,
    pub crc: u32,
}

impl ZoneFooter {
    pub fn encode_page(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_BYTES as usize);
        Stamp { tails: self.tails.len() as u32, ..self.stamp }.encode(Role::ZoneFooter, &mut page);
        put_tails(&self.tails, &mut page);
        page.put_u32_le(self.length);
        page.put_u32_le(self.appends);
        page.put_u32_le(self.crc);
        page.resize(PAGE_BYTES as usize, 0);
        seal(&mut page);
        page
    }

    pub fn decode(page: &[u8]) -> Result<ZoneFooter, Invalid> {
        let stamp = Stamp::decode(Role::ZoneFooter, page)?;
        let mut fields = Fields(page);
        fields.skip(STAMP_BYTES)?;
        let tails = take_tails(&mut fields, stamp.tails)?;
        Ok(ZoneFooter { stamp, tails, length: fields.u32()?, appends: fields.u32()?, crc: fields.u32()? })
    }

    /// Where in a zone of this size the summary lies; `None` if there is no room for it, or none
    /// is there.
    pub fn summary_range(&self, zone_bytes: u32) -> Option<(u32, u32)> {
        let length = (self.length > 0 && self.length < zone_bytes).then(|| round_up(self.length))?;
        let offset = (zone_bytes - ZONE_FOOTER_BYTES).checked_sub(length)?;
        (offset >= self.stamp.extent).then_some((offset, length))
    }

    /// The headers that `summary` repeats, without their tails, in the order of the zone. It must
    /// be whole, its appends of the footer's generation and without gaps up to where the footer
    /// says that they end.
    pub fn decode_summary(&self, summary: &[u8]) -> Result<Vec<AppendHeader>, Invalid> {
        let bytes = summary.get(..self.length as usize).ok_or(Invalid::Field("length"))?;
        if crc32c(bytes) != self.crc {
            return Err(Invalid::Checksum);
        }
        let mut fields = Fields(bytes);
        let mut headers = Vec::new();
        // Whatever is written in a generation has a sequence above that of the zone's header.
        let (mut end, mut last) = (ZONE_HEADER_BYTES, self.stamp.generation.0);
        for _ in 0..self.appends {
            let (offset, bytes, extent, records) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
            let sequence = fields.u64()?;
            let stamp = Stamp { offset, bytes, extent, records, sequence, tails: 0, ..self.stamp };
            if offset != end || extent < bytes || !extent.is_multiple_of(PAGE_BYTES) || sequence <= last {
                return Err(Invalid::Field("append"));
            }
            let records = (0..records).map(|_| Record::decode(&mut fields, &stamp)).collect::<Result<_, _>>()?;
            headers.push(AppendHeader { stamp, tails: SmallVec::new(), records });
            end = offset.checked_add(extent).ok_or(Invalid::Field("append"))?;
            last = sequence;
        }
        let whole = fields.0.is_empty() && end == self.stamp.extent && last < self.stamp.sequence;
        if whole { Ok(headers) } else { Err(Invalid::Field("appends")) }
    }
}

/// The summary of a zone that is being filled.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    bytes: Vec<u8>,
    appends: u32,
    crc: u32,
}

impl Summary {
    /// Bytes at the end of the zone that it will take if an append with so many bytes of records
    /// is added.
    pub fn padded_with(&self, records: usize) -> u32 {
        round_up((self.bytes.len() + APPEND_BYTES + records) as u32)
    }

    /// Bytes it takes at the end of the zone.
    pub fn padded(&self) -> u32 {
        round_up(self.bytes.len() as u32)
    }

    /// Adds an append, given its header as it goes to the device.
    pub fn add(&mut self, header: &AppendHeader, encoded: &[u8]) {
        let stamp = &header.stamp;
        let from = self.bytes.len();
        for field in [stamp.offset, stamp.bytes, stamp.extent, header.records.len() as u32] {
            self.bytes.put_u32_le(field);
        }
        self.bytes.put_u64_le(stamp.sequence);
        self.bytes.put_slice(header.encoded_records(encoded));
        self.crc = crc32c_append(self.crc, &self.bytes[from..]);
        self.appends += 1;
    }

    /// The summary of appends that were read from the device; `None` if some are missing between
    /// the zone's header and `end`.
    pub fn of(appends: &[AppendHeader], end: u32) -> Option<Summary> {
        let mut summary = Summary::default();
        let mut expected = ZONE_HEADER_BYTES;
        for header in appends {
            if header.stamp.offset != expected {
                return None;
            }
            summary.add(header, &header.encode());
            expected += header.stamp.extent;
        }
        (expected == end).then_some(summary)
    }

    /// The footer that names this summary, and the summary padded to whole pages.
    pub fn finish(self, stamp: Stamp, tails: SmallVec<[Tail; TAILS_MAX]>) -> (ZoneFooter, Vec<u8>) {
        let Summary { mut bytes, appends, crc } = self;
        let footer = ZoneFooter { stamp, tails, length: bytes.len() as u32, appends, crc };
        bytes.resize(round_up(footer.length) as usize, 0);
        (footer, bytes)
    }
}
