//! A manifest that outgrows one blob: its bytes in part blobs, and the root that lists them.
//! Byte tables in docs/on-disk.md.

use crate::coding::Reader;
use crate::error::Malformed;
use crate::manifest::{self, NUMBER_MAX};
use cfs_wire::BlobId;
use cfs_wire::limits::BLOB_BYTES_MAX;

const ROOT_FORMAT: u16 = 2;
const PART_MAGIC: u32 = u32::from_le_bytes(*b"CFSP");
const PART_FORMAT: u16 = 1;
/// A part's header and checksum.
pub const PART_FIXED_BYTES: usize = 32;
const ROOT_FIXED_BYTES: usize = 32;
const LISTED_BYTES: usize = 20;
/// With parts of 1 MiB some three million tables, 3 TiB of one group's metadata. Opening holds all
/// parts and what they say in memory at once, and every checkpoint writes them anew.
pub const PARTS_MAX: usize = 256;
/// Where a manifest is split at the earliest. The first of a store takes 46 bytes, so it has no
/// parts: where the parts of an unanswered root went, an older manifest is there to be opened.
pub const SPLIT_BYTES_MIN: usize = 64;

const _: () = assert!(PART_FIXED_BYTES < SPLIT_BYTES_MIN);
const _: () = assert!(ROOT_FIXED_BYTES + PARTS_MAX * LISTED_BYTES <= BLOB_BYTES_MAX);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListedPart {
    pub id: BlobId,
    pub length: u32,
}

/// Stands for the manifest whose bytes the parts hold, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Root {
    pub group: u64,
    pub version: u64,
    pub parts: Vec<ListedPart>,
}

/// Whose bytes a part holds, and which of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartHeader {
    pub group: u64,
    pub version: u64,
    /// From 0.
    pub index: u32,
}

/// Whether a blob that begins so is a part.
pub fn is_part(start: &[u8]) -> bool {
    start.starts_with(&PART_MAGIC.to_le_bytes())
}

/// Whether a manifest that begins so is a root.
pub fn is_root(start: &[u8]) -> bool {
    start.starts_with(&manifest::MAGIC.to_le_bytes()) && start.get(4..6) == Some(&ROOT_FORMAT.to_le_bytes())
}

pub fn encode_part(header: &PartHeader, payload: &[u8]) -> Vec<u8> {
    let mut out = manifest::head(PART_MAGIC, PART_FORMAT, &[header.group, header.version]);
    out.extend_from_slice(&header.index.to_le_bytes());
    out.extend_from_slice(payload);
    manifest::seal(&mut out);
    out
}

pub fn decode_part(bytes: &[u8]) -> Result<(PartHeader, &[u8]), Malformed> {
    let mut reader = manifest::body(bytes, PART_MAGIC, PART_FORMAT)?;
    let header = PartHeader { group: reader.u64()?, version: reader.u64()?, index: reader.u32()? };
    Ok((header, reader.rest()))
}

pub fn encode_root(root: &Root) -> Vec<u8> {
    let mut out = manifest::head(manifest::MAGIC, ROOT_FORMAT, &[root.group, root.version]);
    out.extend_from_slice(&(root.parts.len() as u32).to_le_bytes());
    for part in &root.parts {
        out.extend_from_slice(&part.id.0.to_le_bytes());
        out.extend_from_slice(&part.length.to_le_bytes());
    }
    manifest::seal(&mut out);
    out
}

pub fn decode_root(bytes: &[u8]) -> Result<Root, Malformed> {
    let mut reader = manifest::body(bytes, manifest::MAGIC, ROOT_FORMAT)?;
    let (group, version) = (reader.u64()?, reader.u64()?);
    if version > NUMBER_MAX {
        return Err(Malformed("a number in its header is out of range"));
    }
    let count = reader.u32()? as usize;
    if count == 0 || count > PARTS_MAX {
        return Err(Malformed("its number of parts is out of range"));
    }
    let parts = (0..count).map(|_| decode_listed(&mut reader)).collect::<Result<_, _>>()?;
    if !reader.is_empty() {
        return Err(Malformed("it goes on after its end"));
    }
    Ok(Root { group, version, parts })
}

fn decode_listed(reader: &mut Reader<'_>) -> Result<ListedPart, Malformed> {
    let (id, length) = (BlobId(reader.u128()?), reader.u32()?);
    if !(PART_FIXED_BYTES + 1..=BLOB_BYTES_MAX).contains(&(length as usize)) {
        return Err(Malformed("a part's length is out of range"));
    }
    Ok(ListedPart { id, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(lengths: impl IntoIterator<Item = u32>) -> Root {
        let parts = lengths.into_iter().enumerate();
        let parts = parts.map(|(number, length)| ListedPart { id: BlobId(number as u128), length }).collect();
        Root { group: 9, version: 3, parts }
    }

    /// Right but for the checksum that belongs to it.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        manifest::seal(&mut bytes);
        bytes
    }

    #[test]
    fn what_a_root_can_not_mean_is_refused_whatever_its_checksum_says() {
        let most = root([BLOB_BYTES_MAX as u32; PARTS_MAX]);
        assert_eq!(decode_root(&encode_root(&most)), Ok(most));
        let count = Malformed("its number of parts is out of range");
        let length = Malformed("a part's length is out of range");
        for (wrong, reason) in [
            (root([]), count),
            (root([33; PARTS_MAX + 1]), count),
            (root([33, 32]), length),
            (root([BLOB_BYTES_MAX as u32 + 1]), length),
            (Root { version: u64::MAX, ..root([33]) }, Malformed("a number in its header is out of range")),
        ] {
            assert_eq!(decode_root(&encode_root(&wrong)), Err(reason), "{wrong:?}");
        }
    }

    #[test]
    fn a_root_lists_as_many_parts_as_it_says() {
        let whole = encode_root(&root([33, 34]));
        let unsealed = &whole[..whole.len() - 4];
        assert_eq!(decode_root(&sealed(unsealed.to_vec())), Ok(root([33, 34])));
        let short = sealed(unsealed[..unsealed.len() - 1].to_vec());
        assert_eq!(decode_root(&short), Err(Malformed("it ends too early")));
        let long = sealed([unsealed, &[0]].concat());
        assert_eq!(decode_root(&long), Err(Malformed("it goes on after its end")));
        for length in 0..whole.len() {
            assert!(decode_root(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
    }

    #[test]
    fn a_part_cut_anywhere_is_refused() {
        let header = PartHeader { group: 9, version: 3, index: 7 };
        let whole = encode_part(&header, b"payload");
        assert_eq!(whole.len(), PART_FIXED_BYTES + 7);
        assert_eq!(decode_part(&whole), Ok((header, &b"payload"[..])));
        for length in 0..whole.len() {
            assert!(decode_part(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
        let headless = sealed(whole[..PART_FIXED_BYTES - 5].to_vec());
        assert_eq!(decode_part(&headless), Err(Malformed("it ends too early")));
    }

    #[test]
    fn a_root_is_no_manifest_and_a_part_is_neither() {
        let (root, part) =
            (encode_root(&root([33])), encode_part(&PartHeader { group: 9, version: 3, index: 0 }, b"x"));
        let whole = manifest::encode(&manifest::Header::default(), &crate::version::Version::default());
        assert_eq!(
            [&root, &part, &whole].map(|bytes| (is_root(bytes), is_part(bytes))),
            [(true, false), (false, true), (false, false)]
        );
        assert!(!is_root(b"CFSM\x02") && !is_part(b"CFS"));
    }
}
