//! The manifest: the list of tables that are the store, as one blob or as the bytes that
//! [`crate::parts`] holds in several. Byte table in docs/on-disk.md.

use crate::coding::{Reader, crc32c, put_bytes, put_varint};
use crate::error::Malformed;
use crate::table::TableShape;
use crate::version::{LEVELS_MAX, Version};
use crate::{KEY_BYTES_MAX, MARK_BYTES_MAX};
use bytes::Bytes;
use cfs_wire::BlobId;

pub const MAGIC: u32 = u32::from_le_bytes(*b"CFSM");
const FORMAT: u16 = 1;
/// Versions, batches and runs are counted up from little: larger numbers were never counted, and
/// would leave no room to count on.
pub const NUMBER_MAX: u64 = u64::MAX >> 1;

/// What a checkpoint fixes beside the tables.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Header {
    pub group: u64,
    /// High half: which opening of the store wrote it; low half: counted within it.
    pub version: u64,
    /// Batches ever applied up to the mark.
    pub sequence: u64,
    pub next_run: u64,
    pub applied: Bytes,
}

/// One run as the manifest lists it: its level (0 for a recent one) and its tables.
pub type ListedRun = (u8, Vec<(BlobId, TableShape)>);

pub fn encode(header: &Header, version: &Version) -> Vec<u8> {
    let mut out = head(MAGIC, FORMAT, &[header.group, header.version, header.sequence, header.next_run]);
    put_bytes(&mut out, &header.applied);
    let recent = version.recent.iter().map(|run| (0, run));
    let levels = version.levels.iter().enumerate().map(|(index, run)| (index as u8 + 1, run));
    let runs: Vec<_> = recent.chain(levels).filter(|(_, run)| !run.is_empty()).collect();
    put_varint(&mut out, runs.len() as u64);
    let mut previous = Bytes::new();
    for (level, run) in runs {
        out.push(level);
        put_varint(&mut out, run.len() as u64);
        for table in run {
            out.extend_from_slice(&table.id.0.to_le_bytes());
            let shape = &table.shape;
            let numbers = [shape.run, shape.length.into(), shape.index_offset.into(), shape.entries.into()];
            numbers.into_iter().chain([shape.deletions.into()]).for_each(|number| put_varint(&mut out, number));
            put_shared(&mut out, &previous, &shape.first_key);
            put_shared(&mut out, &shape.first_key, &shape.last_key);
            previous = shape.last_key.clone();
        }
    }
    seal(&mut out);
    out
}

/// How a manifest, a root or a part begins.
pub fn head(magic: u32, format: u16, words: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&magic.to_le_bytes());
    out.extend_from_slice(&format.to_le_bytes());
    out.extend_from_slice(&0u16.to_le_bytes());
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    out
}

/// How it ends: the checksum of everything before.
pub fn seal(out: &mut Vec<u8>) {
    let crc = crc32c(out);
    out.extend_from_slice(&crc.to_le_bytes());
}

/// What lies between the right magic and format and the right checksum.
pub fn body(bytes: &[u8], magic: u32, format: u16) -> Result<Reader<'_>, Malformed> {
    let body = bytes.len().checked_sub(4).ok_or(Malformed("it ends too early"))?;
    let mut reader = Reader::new(&bytes[..body]);
    if reader.u32()? != magic {
        return Err(Malformed("its magic is wrong"));
    }
    if Reader::new(&bytes[body..]).u32()? != crc32c(&bytes[..body]) {
        return Err(Malformed("its checksum is wrong"));
    }
    if reader.u16()? != format {
        return Err(Malformed("its format version is unknown to this binary"));
    }
    reader.u16()?;
    Ok(reader)
}

/// A key as the length of what it shares with the one before, and the rest.
fn put_shared(out: &mut Vec<u8>, previous: &[u8], key: &[u8]) {
    let shared = key.iter().zip(previous).take_while(|(new, old)| new == old).count();
    put_varint(out, shared as u64);
    put_bytes(out, &key[shared..]);
}

fn read_shared(reader: &mut Reader<'_>, previous: &[u8]) -> Result<Bytes, Malformed> {
    let shared = reader.length()?;
    let prefix = previous.get(..shared).ok_or(Malformed("a key shares more than the key before it"))?;
    let suffix = reader.bytes()?;
    if shared + suffix.len() > KEY_BYTES_MAX {
        return Err(Malformed("a key is too long"));
    }
    Ok([prefix, suffix].concat().into())
}

pub fn decode(bytes: &[u8]) -> Result<(Header, Vec<ListedRun>), Malformed> {
    let mut reader = body(bytes, MAGIC, FORMAT)?;
    let (group, version, sequence, next_run) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
    if version.max(sequence).max(next_run) > NUMBER_MAX {
        return Err(Malformed("a number in its header is out of range"));
    }
    let applied = Bytes::copy_from_slice(reader.bytes()?);
    if applied.len() > MARK_BYTES_MAX {
        return Err(Malformed("its applied mark is too long"));
    }
    let mut runs = Vec::new();
    let mut previous = Bytes::new();
    for _ in 0..reader.varint()? {
        let level = reader.u8()?;
        if usize::from(level) > LEVELS_MAX {
            return Err(Malformed("a level is out of range"));
        }
        let mut tables = Vec::new();
        for _ in 0..reader.varint()? {
            tables.push(decode_table(&mut reader, &mut previous)?);
        }
        runs.push((level, tables));
    }
    if !reader.is_empty() {
        return Err(Malformed("it goes on after its end"));
    }
    Ok((Header { group, version, sequence, next_run, applied }, runs))
}

fn decode_table(reader: &mut Reader<'_>, previous: &mut Bytes) -> Result<(BlobId, TableShape), Malformed> {
    let narrow = |value: u64| u32::try_from(value).map_err(|_| Malformed("a table's length is out of range"));
    let id = BlobId(reader.u128()?);
    let run = reader.varint()?;
    if run > NUMBER_MAX {
        return Err(Malformed("a table's run is out of range"));
    }
    let (length, index_offset) = (narrow(reader.varint()?)?, narrow(reader.varint()?)?);
    let (entries, deletions) = (narrow(reader.varint()?)?, narrow(reader.varint()?)?);
    let first_key = read_shared(reader, previous)?;
    let last_key = read_shared(reader, &first_key)?;
    if index_offset >= length || first_key > last_key {
        return Err(Malformed("a table's bounds are reversed"));
    }
    *previous = last_key.clone();
    Ok((id, TableShape { run, length, index_offset, entries, deletions, first_key, last_key }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_checksum_does_not_make_a_number_possible() {
        let header = Header { group: 9, version: 3, sequence: 70, next_run: 8, applied: Bytes::from_static(b"mark") };
        let decoded = |header: &Header| decode(&encode(header, &Version::default())).map(|(header, _)| header);
        assert_eq!(decoded(&header), Ok(header.clone()));
        for wrong in [
            Header { version: u64::MAX, ..header.clone() },
            Header { sequence: u64::MAX, ..header.clone() },
            Header { next_run: u64::MAX, ..header.clone() },
        ] {
            assert_eq!(decoded(&wrong), Err(Malformed("a number in its header is out of range")));
        }
    }
}
