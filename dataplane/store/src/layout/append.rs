//! The header of an append: one record per blob or tombstone of the group commit.

use super::stamp::{Role, STAMP_BYTES, Stamp, seal};
use super::{APPEND_HEADER_BYTES_MAX, Fields, Invalid, PAGE_BYTES, round_up};
use bytes::BufMut;
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner, ShardGeometry};
use cfs_wire::{BlobId, Generation};
use smallvec::SmallVec;
use std::rc::Rc;

/// Zones a header can name as open: two per stream (one filling, one being sealed) and four more
/// being sealed.
pub const TAILS_MAX: usize = 16;
const TAIL_BYTES: usize = 16;
const FIXED_BYTES: usize = STAMP_BYTES + TAILS_MAX * TAIL_BYTES;
const BLOB: u8 = 1;
const TOMBSTONE: u8 = 2;
const RECORD_VERSION: u8 = 1;

/// How far an open zone was durable when the header was written.
///
/// This is the durable mark in terms of places: a scan that breaks before `end` met corruption,
/// one that breaks at or after it a torn tail. (A broken record's own sequence can't be read.)
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tail {
    pub zone: u32,
    pub end: u32,
    pub generation: Generation,
}

/// A zone in one of its generations.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ZoneUse {
    pub zone: u32,
    pub generation: Generation,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    Blob(BlobRecord),
    Tombstone(TombstoneRecord),
}

/// Drawn: `type 1=1 | kind 1 | version 1 | k 1 | m 1 | index 1 | 0 2 | length 4 | start 4 |
/// id 16 | owner 8+8 | CRC32C 4 per page`, padded to 8 bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlobRecord {
    pub info: BlobInfo,
    /// Offset of the payload from the start of the append.
    pub start: u32,
    /// CRC32C of each 4 KiB of the payload; the last may cover less.
    pub checksums: Rc<[u32]>,
}

/// Drawn: `type 1=2 | 0 1 | version 1 | 0 1 | places 4 | 0 8 | id 16 | (zone 4, 0 4,
/// generation 8) per place`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TombstoneRecord {
    pub id: BlobId,
    /// Where copies of the blob were when it was deleted. Once all these zones have another
    /// generation the tombstone has done its work.
    pub places: SmallVec<[ZoneUse; 1]>,
}

pub fn blob_record_bytes(length: u32) -> usize {
    (48 + 4 * length.div_ceil(PAGE_BYTES) as usize).next_multiple_of(8)
}

pub fn tombstone_record_bytes(places: usize) -> usize {
    32 + 16 * places
}

/// Bytes of a header whose records take `records` bytes; `None` if they don't fit in one.
pub fn header_bytes(records: usize) -> Option<u32> {
    let bytes = round_up(u32::try_from(FIXED_BYTES + records).ok()?);
    (bytes <= APPEND_HEADER_BYTES_MAX).then_some(bytes)
}

impl Record {
    /// Bytes it takes in a header.
    pub fn bytes(&self) -> usize {
        match self {
            Record::Blob(blob) => blob_record_bytes(blob.info.length),
            Record::Tombstone(tombstone) => tombstone_record_bytes(tombstone.places.len()),
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Record::Blob(blob) => {
                let (info, geometry) = (&blob.info, &blob.info.geometry);
                out.put_slice(&[BLOB, info.kind as u8, RECORD_VERSION, geometry.data, geometry.parity, geometry.index]);
                out.put_u16_le(0);
                out.put_u32_le(info.length);
                out.put_u32_le(blob.start);
                out.put_u128_le(info.id.0);
                out.put_u64_le(info.owner.high);
                out.put_u64_le(info.owner.low);
                for crc in blob.checksums.iter() {
                    out.put_u32_le(*crc);
                }
                out.resize(out.len().next_multiple_of(8), 0);
            }
            Record::Tombstone(tombstone) => {
                out.put_slice(&[TOMBSTONE, 0, RECORD_VERSION, 0]);
                out.put_u32_le(tombstone.places.len() as u32);
                out.put_u64_le(0);
                out.put_u128_le(tombstone.id.0);
                for place in &tombstone.places {
                    out.put_u32_le(place.zone);
                    out.put_u32_le(0);
                    out.put_u64_le(place.generation.0);
                }
            }
        }
    }

    pub(crate) fn decode(fields: &mut Fields, stamp: &Stamp) -> Result<Record, Invalid> {
        let (kind, sub, version, data) = (fields.u8()?, fields.u8()?, fields.u8()?, fields.u8()?);
        if version != RECORD_VERSION {
            return Err(Invalid::Version(version.into()));
        }
        match kind {
            BLOB => {
                let kind = BlobKind::from_u8(sub).ok_or(Invalid::Field("blob kind"))?;
                let geometry = ShardGeometry { data, parity: fields.u8()?, index: fields.u8()? };
                fields.skip(2)?;
                decode_blob(fields, stamp, kind, geometry).map(Record::Blob)
            }
            TOMBSTONE => decode_tombstone(fields).map(Record::Tombstone),
            _ => Err(Invalid::Field("record type")),
        }
    }
}

fn decode_blob(
    fields: &mut Fields,
    stamp: &Stamp,
    kind: BlobKind,
    geometry: ShardGeometry,
) -> Result<BlobRecord, Invalid> {
    let (length, start) = (fields.u32()?, fields.u32()?);
    let id = BlobId(fields.u128()?);
    let owner = Owner { high: fields.u64()?, low: fields.u64()? };
    let end = u64::from(start) + u64::from(length).next_multiple_of(PAGE_BYTES.into());
    let inside = length > 0 && start >= stamp.bytes && start.is_multiple_of(PAGE_BYTES) && end <= stamp.extent.into();
    if !inside {
        return Err(Invalid::Field("payload range"));
    }
    let pages = length.div_ceil(PAGE_BYTES) as usize;
    let checksums = (0..pages).map(|_| fields.u32()).collect::<Result<Rc<[u32]>, Invalid>>()?;
    fields.skip(blob_record_bytes(length) - 48 - 4 * pages)?;
    Ok(BlobRecord { info: BlobInfo { id, kind, owner, geometry, length }, start, checksums })
}

fn decode_tombstone(fields: &mut Fields) -> Result<TombstoneRecord, Invalid> {
    let count = fields.u32()?;
    fields.skip(8)?;
    let id = BlobId(fields.u128()?);
    let mut places = SmallVec::new();
    for _ in 0..count {
        let zone = fields.u32()?;
        fields.skip(4)?;
        places.push(ZoneUse { zone, generation: Generation(fields.u64()?) });
    }
    Ok(TombstoneRecord { id, places })
}

/// Tails, padded to their full number.
pub(crate) fn put_tails(tails: &[Tail], out: &mut Vec<u8>) {
    let end = out.len() + TAILS_MAX * TAIL_BYTES;
    for tail in tails.iter().take(TAILS_MAX) {
        out.put_u32_le(tail.zone);
        out.put_u32_le(tail.end);
        out.put_u64_le(tail.generation.0);
    }
    out.resize(end, 0);
}

pub(crate) fn take_tails(fields: &mut Fields, count: u32) -> Result<SmallVec<[Tail; TAILS_MAX]>, Invalid> {
    let padding = TAILS_MAX.checked_sub(count as usize).ok_or(Invalid::Field("tails"))?;
    let mut tails = SmallVec::new();
    for _ in 0..count {
        tails.push(Tail { zone: fields.u32()?, end: fields.u32()?, generation: Generation(fields.u64()?) });
    }
    fields.skip(padding * TAIL_BYTES)?;
    Ok(tails)
}

/// A decoded header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AppendHeader {
    pub stamp: Stamp,
    pub tails: SmallVec<[Tail; TAILS_MAX]>,
    pub records: Vec<Record>,
}

impl AppendHeader {
    /// The stamp's counts are taken from the vectors; its length must be what
    /// [`header_bytes`] said.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.stamp.bytes as usize);
        let tails = &self.tails[..self.tails.len().min(TAILS_MAX)];
        let counted = Stamp { records: self.records.len() as u32, tails: tails.len() as u32, ..self.stamp };
        counted.encode(Role::Append, &mut out);
        put_tails(tails, &mut out);
        for record in &self.records {
            record.encode(&mut out);
        }
        assert!(out.len() <= self.stamp.bytes as usize, "records exceed the header they were measured for");
        out.resize(self.stamp.bytes as usize, 0);
        seal(&mut out);
        out
    }

    /// The records within this header as [`AppendHeader::encode`] gave it.
    pub(crate) fn encoded_records<'a>(&self, encoded: &'a [u8]) -> &'a [u8] {
        let length: usize = self.records.iter().map(Record::bytes).sum();
        &encoded[FIXED_BYTES..FIXED_BYTES + length]
    }

    pub fn decode(structure: &[u8]) -> Result<AppendHeader, Invalid> {
        let stamp = Stamp::decode(Role::Append, structure)?;
        let mut fields = Fields(structure);
        fields.skip(STAMP_BYTES)?;
        let tails = take_tails(&mut fields, stamp.tails)?;
        let mut records = Vec::new();
        for _ in 0..stamp.records {
            records.push(Record::decode(&mut fields, &stamp)?);
        }
        Ok(AppendHeader { stamp, tails, records })
    }
}
