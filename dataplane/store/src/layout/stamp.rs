//! The 96 bytes that open every structure in a zone and say where and when it was written.

use super::{APPEND_HEADER_BYTES_MAX, Fields, Invalid, PAGE_BYTES, ZONE_FOOTER_BYTES, checksum_without};
use crate::layout::superblock::Superblock;
use bytes::BufMut;
use cfs_wire::planted::{self, Bug};
use cfs_wire::{DeviceId, Generation, ZoneNo};

pub const VERSION: u16 = 1;
pub const STAMP_BYTES: usize = 96;
const CHECKSUM_AT: usize = 12;
/// Sequences (and with them generations) are counted up from 1: larger ones were never counted,
/// and would leave no room to count on.
const SEQUENCE_MAX: u64 = u64::MAX >> 1;

/// Which structure it is; each has its own magic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Opens a generation of a zone.
    ZoneHeader,
    /// Opens one group commit.
    Append,
    /// Closes a full zone.
    ZoneFooter,
}

impl Role {
    fn magic(self) -> &'static [u8; 8] {
        match self {
            Role::ZoneHeader => b"CFSZHEAD",
            Role::Append => b"CFSAPPND",
            Role::ZoneFooter => b"CFSZFOOT",
        }
    }
}

/// Drawn (little-endian):
///
/// ```text
///  0  8  magic                       48  4  zone
///  8  2  version                     52  4  offset in the zone
/// 10  1  stream (lifetime class)     56  8  sequence
/// 11  1  0                           64  8  durable mark
/// 12  4  CRC32C of the structure     72  4  bytes of this structure
/// 16 16  device                      76  4  extent (see `extent`)
/// 32  8  incarnation                 80  4  records
/// 40  8  generation                  84  4  tails
///                                    88  8  0
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub stream: u8,
    pub device: DeviceId,
    pub incarnation: u64,
    pub generation: Generation,
    pub zone: ZoneNo,
    /// Where in the zone this structure starts.
    pub offset: u32,
    /// Counts every header and footer written to the target.
    pub sequence: u64,
    /// All sequences up to this one were durable when this was written.
    pub durable: u64,
    /// Length of this structure, the part the checksum covers: whole pages.
    pub bytes: u32,
    /// Append: header and payloads together. Footer: where the appends end. Zone header: 0.
    pub extent: u32,
    pub records: u32,
    pub tails: u32,
}

impl Stamp {
    pub fn encode(&self, role: Role, out: &mut Vec<u8>) {
        out.put_slice(role.magic());
        out.put_u16_le(VERSION);
        out.put_u8(self.stream);
        out.put_u8(0);
        out.put_u32_le(0);
        out.put_u128_le(self.device.0);
        out.put_u64_le(self.incarnation);
        out.put_u64_le(self.generation.0);
        out.put_u32_le(self.zone.0);
        out.put_u32_le(self.offset);
        out.put_u64_le(self.sequence);
        out.put_u64_le(self.durable);
        out.put_u32_le(self.bytes);
        out.put_u32_le(self.extent);
        out.put_u32_le(self.records);
        out.put_u32_le(self.tails);
        out.put_u64_le(0);
    }

    /// A whole page that is nothing but this stamp: a zone's header or footer.
    pub fn encode_page(&self, role: Role) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_BYTES as usize);
        self.encode(role, &mut page);
        page.resize(PAGE_BYTES as usize, 0);
        seal(&mut page);
        page
    }

    /// How long the structure that starts with `page` says it is, without believing it.
    pub fn peek_bytes(role: Role, page: &[u8]) -> Result<u32, Invalid> {
        let mut fields = Fields(page);
        fields.magic(role.magic())?;
        let version = fields.u16()?;
        if version != VERSION {
            return Err(Invalid::Version(version.into()));
        }
        fields.skip(72 - 10)?;
        let bytes = fields.u32()?;
        let sane = bytes > 0 && bytes <= APPEND_HEADER_BYTES_MAX && bytes.is_multiple_of(PAGE_BYTES);
        if sane { Ok(bytes) } else { Err(Invalid::Field("length")) }
    }

    /// Decodes and verifies `structure`, which must be exactly as long as it says.
    pub fn decode(role: Role, structure: &[u8]) -> Result<Stamp, Invalid> {
        let bytes = Stamp::peek_bytes(role, structure)?;
        if structure.len() != bytes as usize {
            return Err(Invalid::Field("length"));
        }
        let mut fields = Fields(structure);
        fields.skip(10)?;
        let stream = fields.u8()?;
        fields.skip(1)?;
        if fields.u32()? != checksum_without(structure, CHECKSUM_AT) {
            return Err(Invalid::Checksum);
        }
        let stamp = Stamp {
            stream,
            device: DeviceId(fields.u128()?),
            incarnation: fields.u64()?,
            generation: Generation(fields.u64()?),
            zone: ZoneNo(fields.u32()?),
            offset: fields.u32()?,
            sequence: fields.u64()?,
            durable: fields.u64()?,
            bytes: fields.u32()?,
            extent: fields.u32()?,
            records: fields.u32()?,
            tails: fields.u32()?,
        };
        if stamp.sequence.max(stamp.generation.0) > SEQUENCE_MAX {
            return Err(Invalid::Field("sequence"));
        }
        Ok(stamp)
    }

    /// Whether this was written to this place of this target since it was formatted.
    pub fn is_of(&self, superblock: &Superblock, zone: u32, offset: u32) -> bool {
        self.device == superblock.identity.device
            && self.incarnation == superblock.incarnation
            && self.zone.0 == zone
            && self.offset == offset
    }

    pub fn is_generation(&self, generation: Generation) -> bool {
        self.generation == generation || planted::is(Bug::StoreIgnoreGeneration)
    }

    /// Whether an append of this extent ends before the zone's footer.
    pub fn fits(&self, superblock: &Superblock) -> bool {
        let room = superblock.zone_bytes - ZONE_FOOTER_BYTES;
        self.extent >= self.bytes
            && self.extent.is_multiple_of(PAGE_BYTES)
            && self.offset.checked_add(self.extent).is_some_and(|end| end <= room)
    }
}

/// Writes the checksum of a whole structure into it.
pub(crate) fn seal(structure: &mut [u8]) {
    let crc = checksum_without(structure, CHECKSUM_AT);
    structure[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_checksum_does_not_make_a_sequence_possible() {
        let stamp = Stamp {
            stream: 0,
            device: DeviceId(0xDE),
            incarnation: 5,
            generation: Generation(7),
            zone: ZoneNo(3),
            offset: 0,
            sequence: 9,
            durable: 8,
            bytes: PAGE_BYTES,
            extent: 0,
            records: 0,
            tails: 0,
        };
        let decoded = |stamp: Stamp| Stamp::decode(Role::ZoneHeader, &stamp.encode_page(Role::ZoneHeader));
        assert_eq!(decoded(stamp), Ok(stamp));
        for wrong in [Stamp { sequence: u64::MAX, ..stamp }, Stamp { generation: Generation(u64::MAX), ..stamp }] {
            assert_eq!(decoded(wrong), Err(Invalid::Field("sequence")));
        }
    }
}
