//! Reading: a consistent picture of memtables and runs at one batch.

use crate::bloom;
use crate::compaction::ENTRIES_PER_TURN;
use crate::cursor::{Merge, Reading, RunCursor, Source};
use crate::error::KvError;
use crate::memtable::{Memtable, MemtableCursor, Readers};
use crate::table::TableReader;
use crate::version::{self, Version};
use bytes::Bytes;
use std::ops::Bound;
use std::rc::Rc;

/// Pins what it shows: memtable versions, memtables, runs.
pub(crate) struct View {
    pub reader: Rc<TableReader>,
    /// Newest first.
    pub memtables: Vec<Rc<Memtable>>,
    pub version: Rc<Version>,
    pub sequence: u64,
    pub applied: Bytes,
    readers: Rc<Readers>,
}

impl View {
    pub fn new(
        reader: Rc<TableReader>,
        memtables: Vec<Rc<Memtable>>,
        version: Rc<Version>,
        sequence: u64,
        applied: Bytes,
        readers: Rc<Readers>,
    ) -> Rc<View> {
        readers.add(sequence);
        Rc::new(View { reader, memtables, version, sequence, applied, readers })
    }

    fn scan(self: &Rc<Self>, lower: Bound<Bytes>, upper: Bound<Bytes>) -> Scan {
        let mut sources = Vec::new();
        for memtable in &self.memtables {
            let cursor = MemtableCursor::new(memtable.clone(), self.sequence, lower.clone(), upper.clone());
            sources.push(Source::Memtable(cursor));
        }
        for run in self.version.runs() {
            let tables = version::overlapping(run, &lower, &upper).to_vec();
            if !tables.is_empty() {
                let (reader, lower, upper) = (self.reader.clone(), lower.clone(), upper.clone());
                sources.push(Source::Run(RunCursor::new(reader, Reading::Cached, tables, lower, upper)));
            }
        }
        Scan { merge: Merge::new(sources), entries: 0, view: self.clone() }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.readers.remove(self.sequence);
    }
}

/// What the first memtable that knows the key says.
pub(crate) fn get_from_memtables<'a>(
    newest_first: impl IntoIterator<Item = &'a Rc<Memtable>>,
    sequence: u64,
    key: &[u8],
) -> Option<Option<Bytes>> {
    newest_first.into_iter().find_map(|memtable| memtable.get(key, sequence))
}

/// What the newest run that knows the key says.
pub(crate) async fn get_from_runs(
    reader: &TableReader,
    version: &Version,
    key: &[u8],
) -> Result<Option<Bytes>, KvError> {
    let hash = bloom::hash(key);
    for run in version.runs() {
        let Some(table) = version::table_of(run, key) else { continue };
        if let Some(found) = reader.get(table, key, hash).await? {
            // A copy, so that a small value that is kept does not keep its whole block.
            return Ok(found.map(|value| Bytes::copy_from_slice(&value)));
        }
    }
    Ok(None)
}

/// The store as of one batch. Pins its runs until dropped.
pub struct KvSnapshot {
    view: Rc<View>,
}

impl KvSnapshot {
    pub(crate) fn new(view: Rc<View>) -> KvSnapshot {
        KvSnapshot { view }
    }

    /// The mark of the last batch it shows.
    pub fn applied(&self) -> Bytes {
        self.view.applied.clone()
    }

    pub async fn get(&self, key: &[u8]) -> Result<Option<Bytes>, KvError> {
        match get_from_memtables(&self.view.memtables, self.view.sequence, key) {
            Some(found) => Ok(found),
            None => get_from_runs(&self.view.reader, &self.view.version, key).await,
        }
    }

    pub fn scan(&self, range: (Bound<Bytes>, Bound<Bytes>)) -> Scan {
        self.view.scan(range.0, range.1)
    }
}

/// Entries in key order, as of the scan's creation. Values may share a block's memory: copy
/// what is kept for long.
pub struct Scan {
    merge: Merge,
    entries: usize,
    view: Rc<View>,
}

impl Scan {
    pub(crate) fn new(view: &Rc<View>, range: (Bound<Bytes>, Bound<Bytes>)) -> Scan {
        view.scan(range.0, range.1)
    }

    /// The next entry; `None` at the end. After an error, or when this future was dropped before
    /// its answer, the scan is of no more use.
    pub async fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, KvError> {
        while let Some(entry) = self.merge.next().await? {
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

    /// Everything that is left, for small ranges.
    pub async fn collect(mut self) -> Result<Vec<(Bytes, Bytes)>, KvError> {
        let mut entries = Vec::new();
        while let Some(entry) = self.next().await? {
            entries.push(entry);
        }
        Ok(entries)
    }
}
