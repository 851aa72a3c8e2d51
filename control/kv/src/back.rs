//! Descending scans: the same sources as forward ones, walked from their ends. Meant for short
//! walks, above all for the entry at or before a key.

use crate::block::{BlockCursor, Entry};
use crate::compaction::ENTRIES_PER_TURN;
use crate::error::KvError;
use crate::memtable::MemtableBackCursor;
use crate::table::{Table, TableIndex, TableReader};
use crate::version;
use crate::view::View;
use bytes::Bytes;
use std::ops::Bound;
use std::rc::Rc;

fn is_above(key: &[u8], upper: &Bound<Bytes>) -> bool {
    match upper {
        Bound::Included(high) => key > high,
        Bound::Excluded(high) => key >= high,
        Bound::Unbounded => false,
    }
}

fn is_below(key: &[u8], lower: &Bound<Bytes>) -> bool {
    match lower {
        Bound::Included(low) => key < low,
        Bound::Excluded(low) => key <= low,
        Bound::Unbounded => false,
    }
}

/// Walks one sorted run downwards, deletions included. Pins its tables.
struct RunBackCursor {
    reader: Rc<TableReader>,
    /// In key order; the last is next.
    tables: Vec<Rc<Table>>,
    /// The table being walked and how many of its blocks are left.
    open: Option<(Rc<Table>, Rc<TableIndex>, usize)>,
    /// Of the block being walked, in key order; the last is next.
    entries: Vec<Entry>,
    lower: Bound<Bytes>,
    upper: Bound<Bytes>,
}

impl RunBackCursor {
    async fn next(&mut self) -> Result<Option<Entry>, KvError> {
        loop {
            if let Some(entry) = self.entries.pop() {
                if is_above(&entry.key, &self.upper) {
                    continue;
                }
                if is_below(&entry.key, &self.lower) {
                    (self.open, self.tables, self.entries) = (None, Vec::new(), Vec::new());
                    return Ok(None);
                }
                return Ok(Some(entry));
            }
            match &mut self.open {
                Some((table, index, left)) if *left > 0 => {
                    *left -= 1;
                    let block = self.reader.block(table, &index.blocks[*left]).await?;
                    let mut cursor = BlockCursor::new(block);
                    while let Some(entry) = self.reader.check(table, cursor.next())? {
                        self.entries.push(entry);
                    }
                }
                _ => {
                    let Some(table) = self.tables.pop() else { return Ok(None) };
                    let index = self.reader.index(&table).await?;
                    let left = match &self.upper {
                        Bound::Included(high) | Bound::Excluded(high) => index.block_at(high) + 1,
                        Bound::Unbounded => index.blocks.len(),
                    };
                    let left = left.min(index.blocks.len());
                    self.open = Some((table, index, left));
                }
            }
        }
    }
}

enum Source {
    Memtable(MemtableBackCursor),
    Run(RunBackCursor),
}

impl Source {
    async fn next(&mut self) -> Result<Option<Entry>, KvError> {
        match self {
            Source::Memtable(cursor) => Ok(cursor.next()),
            Source::Run(cursor) => cursor.next().await,
        }
    }
}

/// Entries in descending key order, as of the scan's creation.
pub struct ScanBack {
    /// Newest first.
    sources: Vec<Source>,
    heads: Vec<Option<Entry>>,
    entries: usize,
    view: Rc<View>,
}

impl ScanBack {
    pub(crate) fn new(view: Rc<View>, (lower, upper): (Bound<Bytes>, Bound<Bytes>)) -> ScanBack {
        let mut sources = Vec::new();
        for memtable in &view.memtables {
            let cursor = MemtableBackCursor::new(memtable.clone(), view.sequence, lower.clone(), upper.clone());
            sources.push(Source::Memtable(cursor));
        }
        for run in view.version.runs() {
            let tables = version::overlapping(run, &lower, &upper).to_vec();
            if !tables.is_empty() {
                let (reader, lower, upper) = (view.reader.clone(), lower.clone(), upper.clone());
                sources.push(Source::Run(RunBackCursor {
                    reader,
                    tables,
                    open: None,
                    entries: Vec::new(),
                    lower,
                    upper,
                }));
            }
        }
        ScanBack { sources, heads: Vec::new(), entries: 0, view }
    }

    /// The next lower entry; `None` at the end. After an error, or when this future was dropped
    /// before its answer, the scan is of no more use.
    pub async fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, KvError> {
        while let Some(entry) = self.next_version().await? {
            self.entries += 1;
            if self.entries.is_multiple_of(ENTRIES_PER_TURN) {
                self.view.reader.handle.yield_now().await;
            }
            if let Some(value) = entry.value {
                return Ok(Some((entry.key, value)));
            }
        }
        Ok(None)
    }

    /// The newest version of the next lower key, which may be a deletion.
    async fn next_version(&mut self) -> Result<Option<Entry>, KvError> {
        while let Some(source) = self.sources.get_mut(self.heads.len()) {
            let head = source.next().await?;
            self.heads.push(head);
        }
        let mut last: Option<(usize, &Bytes)> = None;
        for (index, head) in self.heads.iter().enumerate() {
            if let Some(entry) = head
                && last.is_none_or(|(_, key)| entry.key > key)
            {
                last = Some((index, &entry.key));
            }
        }
        let Some((last, _)) = last else { return Ok(None) };
        let next = self.sources[last].next().await?;
        let Some(entry) = std::mem::replace(&mut self.heads[last], next) else { return Ok(None) };
        for index in last + 1..self.heads.len() {
            if self.heads[index].as_ref().is_some_and(|head| head.key == entry.key) {
                self.heads[index] = self.sources[index].next().await?;
            }
        }
        Ok(Some(entry))
    }
}
