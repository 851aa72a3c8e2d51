//! A table: one blob of sorted data blocks, a filter, an index and a footer. A sorted run is one
//! or more tables that do not overlap. Byte tables are in docs/on-disk.md.

use crate::block::Block;
use crate::bloom;
use crate::cache::{BlockCache, Cached};
use crate::coding::{Reader, crc32c, put_bytes, put_varint};
use crate::error::{KvError, Malformed};
use crate::trash::Trash;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_wire::BlobId;
use cfs_wire::blobs::MirroredBlobs;
use std::cell::Cell;
use std::rc::Rc;

const MAGIC: u32 = u32::from_le_bytes(*b"CFSR");
const VERSION: u16 = 1;
pub const FOOTER_BYTES: usize = 48;

/// What the manifest says of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableShape {
    /// The run this table is part of; higher numbers were written later.
    pub run: u64,
    pub length: u32,
    /// Where filter, index and footer begin.
    pub index_offset: u32,
    pub entries: u32,
    /// How many of the entries are deletions.
    pub deletions: u32,
    pub first_key: Bytes,
    pub last_key: Bytes,
}

/// A table on the targets. Its blob is deleted when nobody uses it any more and no durable
/// manifest names it.
pub struct Table {
    pub id: BlobId,
    pub shape: TableShape,
    /// Not named by the durable manifest: not yet, or no longer.
    unnamed: Cell<bool>,
    trash: Rc<Trash>,
}

impl Table {
    pub fn new(id: BlobId, shape: TableShape, unnamed: bool, trash: Rc<Trash>) -> Rc<Table> {
        Rc::new(Table { id, shape, unnamed: Cell::new(unnamed), trash })
    }

    pub fn set_unnamed(&self, unnamed: bool) {
        self.unnamed.set(unnamed);
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if self.unnamed.get() {
            self.trash.add([self.id]);
        }
    }
}

/// One block as the index lists it.
pub struct BlockRef {
    pub last_key: Bytes,
    pub offset: u32,
    pub length: u32,
}

/// A table's filter and index, read at first use and cached.
pub struct TableIndex {
    filter: Bytes,
    probes: u32,
    pub blocks: Vec<BlockRef>,
}

impl TableIndex {
    /// Decodes what lies from `index_offset` to the end of the blob.
    fn decode(bytes: &Bytes, group: u64, shape: &TableShape) -> Result<TableIndex, Malformed> {
        let body = bytes.len().checked_sub(FOOTER_BYTES).ok_or(Malformed("a table is shorter than its footer"))?;
        let mut footer = Reader::new(&bytes[body..]);
        if footer.u32()? != MAGIC {
            return Err(Malformed("a table's magic is wrong"));
        }
        if footer.u16()? != VERSION {
            return Err(Malformed("a table's format version is unknown to this binary"));
        }
        footer.u16()?;
        let named = (footer.u64()?, footer.u64()?, footer.u32()?);
        let (filter, index, count, probes) = (footer.u32()?, footer.u32()?, footer.u32()?, footer.u32()?);
        if footer.u32()? != crc32c(&bytes[..bytes.len() - 4]) {
            return Err(Malformed("a table's checksum is wrong"));
        }
        if probes > bloom::PROBES_MAX {
            return Err(Malformed("a table's filter asks for too many probes"));
        }
        if named != (group, shape.run, shape.entries) {
            return Err(Malformed("a table is not the one its manifest names"));
        }
        if u64::from(filter) + u64::from(index) != body as u64 {
            return Err(Malformed("a table's index does not fill its place"));
        }
        let filter = bytes.slice(..filter as usize);
        let entries = bytes.slice(filter.len()..body);
        let mut reader = Reader::new(&entries);
        let mut blocks: Vec<BlockRef> = Vec::new();
        let mut end = 0;
        for _ in 0..count {
            let last_key = entries.slice_ref(reader.bytes()?);
            let (offset, length) = (reader.varint()?, reader.varint()?);
            let ascends = blocks.last().is_none_or(|before| before.last_key < last_key);
            if offset != end || !ascends || offset.saturating_add(length) > u64::from(shape.index_offset) {
                return Err(Malformed("a table's index is out of order"));
            }
            end = offset + length;
            blocks.push(BlockRef { last_key, offset: offset as u32, length: length as u32 });
        }
        if blocks.is_empty() || end != u64::from(shape.index_offset) || !reader.is_empty() {
            return Err(Malformed("a table's index is incomplete"));
        }
        Ok(TableIndex { filter, probes, blocks })
    }

    /// The first block that can hold keys at or above this one.
    pub fn block_at(&self, key: &[u8]) -> usize {
        self.blocks.partition_point(|block| block.last_key < key)
    }

    fn bytes(&self) -> usize {
        self.filter.len() + self.blocks.iter().map(|block| block.last_key.len() + size_of::<BlockRef>()).sum::<usize>()
    }
}

/// The index part of a table, encoded.
pub struct IndexBuilder {
    entries: Vec<u8>,
    count: u32,
    hashes: Vec<u64>,
}

impl IndexBuilder {
    pub fn new() -> IndexBuilder {
        IndexBuilder { entries: Vec::new(), count: 0, hashes: Vec::new() }
    }

    pub fn add_key(&mut self, key: &[u8]) {
        self.hashes.push(bloom::hash(key));
    }

    pub fn add_block(&mut self, last_key: &[u8], offset: usize, length: usize) {
        put_bytes(&mut self.entries, last_key);
        put_varint(&mut self.entries, offset as u64);
        put_varint(&mut self.entries, length as u64);
        self.count += 1;
    }

    pub fn keys(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// At least the length `finish` appends, with room for one more block of this last key.
    pub fn length_max(&self, last_key: &[u8]) -> usize {
        self.entries.len() + last_key.len() + 30 + (self.hashes.len() + 1) * 10 / 8 + 16 + FOOTER_BYTES
    }

    pub fn finish(self, group: u64, run: u64, out: &mut Vec<u8>) {
        let start = out.len();
        let filter = bloom::build(&self.hashes);
        out.extend_from_slice(&filter);
        out.extend_from_slice(&self.entries);
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&group.to_le_bytes());
        out.extend_from_slice(&run.to_le_bytes());
        out.extend_from_slice(&(self.hashes.len() as u32).to_le_bytes());
        out.extend_from_slice(&(filter.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&bloom::PROBES.to_le_bytes());
        let crc = crc32c(&out[start..]);
        out.extend_from_slice(&crc.to_le_bytes());
    }
}

/// What is cached in memory of its own: a device's buffer is up to sixteen times as large, is pooled,
/// and may be one of the few that rings have registered.
fn own(read: &Bytes) -> Bytes {
    Bytes::copy_from_slice(read)
}

/// Reads tables of one group through the cache.
pub struct TableReader {
    pub blobs: Rc<dyn MirroredBlobs>,
    pub cache: Rc<BlockCache>,
    pub handle: Handle,
    pub group: u64,
}

impl TableReader {
    fn malformed(&self, table: &Table, reason: Malformed) -> KvError {
        KvError::Run { group: self.group, blob: table.id, reason }
    }

    pub fn check<T>(&self, table: &Table, result: Result<T, Malformed>) -> Result<T, KvError> {
        result.map_err(|reason| self.malformed(table, reason))
    }

    pub async fn index(&self, table: &Table) -> Result<Rc<TableIndex>, KvError> {
        let offset = table.shape.index_offset;
        if let Some(Cached::Index(index)) = self.cache.get(table.id, offset) {
            return Ok(index);
        }
        let length = table.shape.length.saturating_sub(offset);
        let bytes = own(&self.blobs.get(table.id, offset, length).await?);
        let index = Rc::new(self.check(table, TableIndex::decode(&bytes, self.group, &table.shape))?);
        self.cache.insert(table.id, offset, Cached::Index(index.clone()), index.bytes());
        Ok(index)
    }

    pub async fn block(&self, table: &Table, at: &BlockRef) -> Result<Block, KvError> {
        if let Some(Cached::Block(block)) = self.cache.get(table.id, at.offset) {
            return Ok(block);
        }
        let bytes = own(&self.blobs.get(table.id, at.offset, at.length).await?);
        let length = bytes.len();
        let block = self.check(table, Block::parse(bytes))?;
        self.cache.insert(table.id, at.offset, Cached::Block(block.clone()), length);
        Ok(block)
    }

    /// What the table says of a key: nothing, a deletion or a value.
    pub async fn get(&self, table: &Table, key: &[u8], hash: u64) -> Result<Option<Option<Bytes>>, KvError> {
        let index = self.index(table).await?;
        if !bloom::may_contain(&index.filter, index.probes, hash) {
            return Ok(None);
        }
        let Some(at) = index.blocks.get(index.block_at(key)) else { return Ok(None) };
        let block = self.block(table, at).await?;
        self.check(table, block.get(key))
    }
}
