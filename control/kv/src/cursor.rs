//! Ordered walks over memtables and runs, and their merge.

use crate::block::{Block, BlockCursor, Entry};
use crate::error::KvError;
use crate::memtable::MemtableCursor;
use crate::table::{Table, TableIndex, TableReader};
use bytes::Bytes;
use std::ops::Bound;
use std::rc::Rc;

/// How a run is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Block by block through the cache (scans of users).
    Cached,
    /// Many blocks at once past the cache (merges, which would only push useful blocks out).
    Ahead,
}

/// One read of a merge: its ten inputs take little over 1 MiB together.
const READ_AHEAD_BYTES: u32 = 128 << 10;

struct OpenTable {
    table: Rc<Table>,
    index: Rc<TableIndex>,
    next_block: usize,
    /// Read ahead: where it begins in the blob, and its bytes.
    chunk: (u32, Bytes),
    block: Option<BlockCursor>,
}

/// Walks one sorted run, deletions included. Pins its tables.
pub struct RunCursor {
    reader: Rc<TableReader>,
    reading: Reading,
    /// In key order, the next one first.
    tables: std::vec::IntoIter<Rc<Table>>,
    open: Option<OpenTable>,
    /// Skips below it; `Unbounded` once passed.
    lower: Bound<Bytes>,
    upper: Bound<Bytes>,
}

impl RunCursor {
    pub fn new(
        reader: Rc<TableReader>,
        reading: Reading,
        tables: Vec<Rc<Table>>,
        lower: Bound<Bytes>,
        upper: Bound<Bytes>,
    ) -> RunCursor {
        RunCursor { reader, reading, tables: tables.into_iter(), open: None, lower, upper }
    }

    pub async fn next(&mut self) -> Result<Option<Entry>, KvError> {
        loop {
            let Some(open) = &mut self.open else {
                let Some(table) = self.tables.next() else { return Ok(None) };
                self.open(table).await?;
                continue;
            };
            if let Some(block) = &mut open.block {
                let entry = self.reader.check(&open.table, block.next())?;
                if let Some(entry) = entry {
                    if matches!(&self.lower, Bound::Excluded(low) if entry.key == low) {
                        continue;
                    }
                    self.lower = Bound::Unbounded;
                    return Ok(self.within(entry));
                }
                open.block = None;
            }
            if open.next_block >= open.index.blocks.len() {
                self.open = None;
                continue;
            }
            let block = Self::load(&self.reader, self.reading, open).await?;
            let mut cursor = BlockCursor::new(block);
            if let Bound::Included(low) | Bound::Excluded(low) = &self.lower {
                self.reader.check(&open.table, cursor.seek(low))?;
            }
            open.block = Some(cursor);
        }
    }

    async fn open(&mut self, table: Rc<Table>) -> Result<(), KvError> {
        let index = self.reader.index(&table).await?;
        let next_block = match &self.lower {
            Bound::Included(low) | Bound::Excluded(low) => index.block_at(low),
            Bound::Unbounded => 0,
        };
        self.open = Some(OpenTable { table, index, next_block, chunk: (0, Bytes::new()), block: None });
        Ok(())
    }

    /// The entry, or the end when it is above the upper bound.
    fn within(&mut self, entry: Entry) -> Option<Entry> {
        let inside = match &self.upper {
            Bound::Included(high) => entry.key <= high,
            Bound::Excluded(high) => entry.key < high,
            Bound::Unbounded => true,
        };
        if inside {
            return Some(entry);
        }
        self.open = None;
        self.tables = Vec::new().into_iter();
        None
    }

    async fn load(reader: &TableReader, reading: Reading, open: &mut OpenTable) -> Result<Block, KvError> {
        let at = &open.index.blocks[open.next_block];
        open.next_block += 1;
        if reading == Reading::Cached {
            return reader.block(&open.table, at).await;
        }
        let end = at.offset + at.length;
        let (start, chunk) = &open.chunk;
        if at.offset < *start || u64::from(end) > u64::from(*start) + chunk.len() as u64 {
            let blocks = &open.index.blocks[open.next_block..];
            let ends = blocks.iter().map(|block| block.offset + block.length);
            let end = ends.take_while(|end| end - at.offset <= READ_AHEAD_BYTES).last().unwrap_or(end);
            let bytes = reader.blobs.get(open.table.id, at.offset, end - at.offset).await?;
            open.chunk = (at.offset, bytes);
        }
        let (start, chunk) = &open.chunk;
        let from = (at.offset - start) as usize;
        let bytes = chunk.get(from..from + at.length as usize).map(|block| chunk.slice_ref(block));
        let bytes = bytes.ok_or(crate::error::Malformed("a read was short"));
        let bytes = reader.check(&open.table, bytes)?;
        reader.check(&open.table, Block::parse(bytes))
    }
}

pub enum Source {
    Memtable(MemtableCursor),
    Run(RunCursor),
}

impl Source {
    async fn next(&mut self) -> Result<Option<Entry>, KvError> {
        match self {
            Source::Memtable(cursor) => Ok(cursor.next()),
            Source::Run(cursor) => cursor.next().await,
        }
    }
}

/// The newest version of every key of several sources, deletions included.
pub struct Merge {
    /// Newest first.
    sources: Vec<Source>,
    heads: Vec<Option<Entry>>,
}

impl Merge {
    /// `sources`: newest first.
    pub fn new(sources: Vec<Source>) -> Merge {
        Merge { sources, heads: Vec::new() }
    }

    pub async fn next(&mut self) -> Result<Option<Entry>, KvError> {
        while let Some(source) = self.sources.get_mut(self.heads.len()) {
            let head = source.next().await?;
            self.heads.push(head);
        }
        let mut first: Option<(usize, &Bytes)> = None;
        for (index, head) in self.heads.iter().enumerate() {
            if let Some(entry) = head
                && first.is_none_or(|(_, key)| entry.key < key)
            {
                first = Some((index, &entry.key));
            }
        }
        let Some((first, _)) = first else { return Ok(None) };
        let next = self.sources[first].next().await?;
        let entry = std::mem::replace(&mut self.heads[first], next);
        let Some(entry) = entry else { return Ok(None) };
        // Only older sources can hold the same key: the first of equals was chosen.
        for index in first + 1..self.heads.len() {
            if self.heads[index].as_ref().is_some_and(|head| head.key == entry.key) {
                self.heads[index] = self.sources[index].next().await?;
            }
        }
        Ok(Some(entry))
    }
}
