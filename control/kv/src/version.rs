//! Which tables are the store: an immutable picture that readers hold while newer ones are made.

use crate::memtable::is_empty_range;
use crate::table::Table;
use bytes::Bytes;
use cfs_wire::BlobId;
use std::collections::BTreeSet;
use std::ops::Bound;
use std::rc::Rc;

/// Tables in key order that do not overlap.
pub type Run = Vec<Rc<Table>>;

/// Levels below the recent runs at most: 64 MiB times 8 to the 6th is 16 TiB.
pub const LEVELS_MAX: usize = 7;

#[derive(Clone, Default)]
pub struct Version {
    /// Straight from memtables, newest first; they may overlap each other.
    pub recent: Vec<Run>,
    /// Level 1 first. Every level is one run, older than all above it.
    pub levels: Vec<Run>,
}

/// A change of the set of tables.
#[derive(Default)]
pub struct Edit {
    /// Everything else goes first (a restore).
    pub replace: bool,
    pub remove: Vec<Rc<Table>>,
    /// Becomes the newest recent run, if not empty.
    pub recent: Run,
    /// Go to this level (1 is the first), between what is there.
    pub level: usize,
    pub tables: Run,
}

impl Edit {
    pub fn added(&self) -> impl Iterator<Item = &Rc<Table>> {
        self.recent.iter().chain(&self.tables)
    }
}

impl Version {
    /// Newest first.
    pub fn runs(&self) -> impl Iterator<Item = &Run> {
        self.recent.iter().chain(&self.levels)
    }

    pub fn tables(&self) -> impl Iterator<Item = &Rc<Table>> {
        self.runs().flatten()
    }

    pub fn apply(&self, edit: &Edit) -> Version {
        let mut next = if edit.replace { Version::default() } else { self.clone() };
        let removed: BTreeSet<BlobId> = edit.remove.iter().map(|table| table.id).collect();
        for run in next.recent.iter_mut().chain(&mut next.levels) {
            run.retain(|table| !removed.contains(&table.id));
        }
        next.recent.retain(|run| !run.is_empty());
        if !edit.recent.is_empty() {
            next.recent.insert(0, edit.recent.clone());
        }
        if !edit.tables.is_empty() {
            while next.levels.len() < edit.level {
                next.levels.push(Run::new());
            }
            let run = &mut next.levels[edit.level - 1];
            run.extend(edit.tables.iter().cloned());
            run.sort_by(|one, other| one.shape.first_key.cmp(&other.shape.first_key));
        }
        while next.levels.last().is_some_and(Run::is_empty) {
            next.levels.pop();
        }
        debug_assert!(next.runs().all(|run| is_run(run)), "tables of a run overlap");
        next
    }
}

/// Whether the tables ascend without overlap.
pub fn is_run(tables: &[Rc<Table>]) -> bool {
    tables.iter().all(|table| table.shape.first_key <= table.shape.last_key)
        && tables.windows(2).all(|pair| pair[0].shape.last_key < pair[1].shape.first_key)
}

pub fn bytes(run: &[Rc<Table>]) -> u64 {
    run.iter().map(|table| u64::from(table.shape.length)).sum()
}

/// The table of a run that may hold this key.
pub fn table_of<'a>(run: &'a [Rc<Table>], key: &[u8]) -> Option<&'a Rc<Table>> {
    let index = run.partition_point(|table| table.shape.last_key < key);
    run.get(index).filter(|table| table.shape.first_key <= key)
}

/// The tables of a run that may hold keys between the bounds.
pub fn overlapping<'a>(run: &'a [Rc<Table>], lower: &Bound<Bytes>, upper: &Bound<Bytes>) -> &'a [Rc<Table>] {
    if is_empty_range(lower, upper) {
        return &[];
    }
    let start = run.partition_point(|table| match lower {
        Bound::Included(low) => table.shape.last_key < low,
        Bound::Excluded(low) => table.shape.last_key <= low,
        Bound::Unbounded => false,
    });
    let end = run.partition_point(|table| match upper {
        Bound::Included(high) => table.shape.first_key <= high,
        Bound::Excluded(high) => table.shape.first_key < high,
        Bound::Unbounded => true,
    });
    run.get(start..end).unwrap_or_default()
}
