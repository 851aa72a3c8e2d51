//! The bytes on a target. Everything is little-endian; every structure has a magic, a version
//! and a CRC32C. `docs/on-disk.md` draws them; the golden files in `tests/golden` pin them.
//!
//! Decoders take bytes they do not trust and answer with an error, never a panic.

pub mod append;
pub mod roster;
pub mod stamp;
pub mod summary;
pub mod superblock;

use bytes::Buf;
use cfs_wire::limits::PAGE;

/// Everything on a target is aligned to this; logical blocks are never larger.
pub const PAGE_BYTES: u32 = PAGE as u32;
/// What precedes the zones: the superblocks, and room for structures of later versions.
pub const AREA_BYTES: u64 = 1 << 20;
/// A zone's header is written twice, in its first two pages, so that one bad page neither loses
/// the zone nor brings an older generation back. A third copy, where the footer will be, does the
/// same for one bad range, or one lost write: until the zone is sealed; then the footer does.
pub const ZONE_HEADER_BYTES: u32 = 2 * PAGE_BYTES;
/// The last page of a zone: a copy of its header, and its footer once it is sealed.
pub const ZONE_FOOTER_BYTES: u32 = PAGE_BYTES;
/// The header of one append at most: 256 records of small blobs, or 60 of 1 MiB.
pub const APPEND_HEADER_BYTES_MAX: u32 = 16 * PAGE_BYTES;

/// Why bytes are not the structure that was looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invalid {
    /// The magic is not there: something else, or nothing, was written.
    NoMagic,
    Version(u32),
    Checksum,
    /// A field has no meaning; with a right checksum, our own bug or a newer format's.
    Field(&'static str),
}

pub(crate) fn round_up(bytes: u32) -> u32 {
    bytes.next_multiple_of(PAGE_BYTES)
}

/// The CRC32C of `bytes` with the four bytes at `at` taken as zero.
pub(crate) fn checksum_without(bytes: &[u8], at: usize) -> u32 {
    let (before, rest) = bytes.split_at(at.min(bytes.len()));
    let after = rest.get(4..).unwrap_or_default();
    let crc = cfs_codec::crc32c::crc32c(before);
    let crc = cfs_codec::crc32c::crc32c_append(crc, &[0; 4]);
    cfs_codec::crc32c::crc32c_append(crc, after)
}

/// Reads fields off untrusted bytes.
pub(crate) struct Fields<'a>(pub &'a [u8]);

const SHORT: Invalid = Invalid::Field("length");

impl Fields<'_> {
    pub fn u8(&mut self) -> Result<u8, Invalid> {
        self.0.try_get_u8().map_err(|_| SHORT)
    }

    pub fn u16(&mut self) -> Result<u16, Invalid> {
        self.0.try_get_u16_le().map_err(|_| SHORT)
    }

    pub fn u32(&mut self) -> Result<u32, Invalid> {
        self.0.try_get_u32_le().map_err(|_| SHORT)
    }

    pub fn u64(&mut self) -> Result<u64, Invalid> {
        self.0.try_get_u64_le().map_err(|_| SHORT)
    }

    pub fn u128(&mut self) -> Result<u128, Invalid> {
        self.0.try_get_u128_le().map_err(|_| SHORT)
    }

    pub fn skip(&mut self, bytes: usize) -> Result<(), Invalid> {
        self.0 = self.0.get(bytes..).ok_or(SHORT)?;
        Ok(())
    }

    pub fn magic(&mut self, magic: &[u8; 8]) -> Result<(), Invalid> {
        if self.0.get(..8) != Some(magic) {
            return Err(Invalid::NoMagic);
        }
        self.skip(8)
    }
}
