//! Sizes, and what the store tells of itself.

use crate::cache::BlockCache;
use cfs_reactor::sync::Semaphore;
use cfs_wire::limits::BLOB_BYTES_MAX;
use std::rc::Rc;

/// Enough that one group's wait for the device does not idle the others.
const MERGES_MAX_DEFAULT: usize = 4;

#[derive(Clone)]
pub struct KvConfig {
    /// The memtable is due for a checkpoint beyond this. 8 MiB makes runs of eight full blobs.
    pub memtable_bytes_max: usize,
    /// A data block is cut at the first entry beyond this: the unit of reading and caching.
    pub block_bytes: usize,
    /// A table (one blob) is cut below this.
    pub table_bytes_max: usize,
    /// A manifest beyond this is put in parts of at most this. A test's parts may be as small as
    /// 64 bytes; with less than a blob, fewer tables fit in all.
    pub manifest_blob_bytes_max: usize,
    /// Runs straight from memtables before they are merged into level 1.
    pub recent_runs_max: usize,
    /// [`crate::Kv::admit`] waits at this many of them: bounds what a point get looks at.
    pub recent_runs_stop: usize,
    /// Level 1 is merged downwards beyond this; every further level holds `level_factor` times more.
    pub level_bytes: u64,
    pub level_factor: u64,
    /// Runs are merged early when their deletions, or entries that may be replaced, hold back at
    /// least this. 64 KiB: 256 groups in two copies keep at most 32 MiB that nobody needs.
    pub garbage_bytes_min: u64,
    /// Shared by all groups of a node, as a clone of this configuration does.
    pub cache: Rc<BlockCache>,
    /// Merges under way at once on a node: each takes some 6 MiB and a good part of the core.
    pub merges: Rc<Semaphore>,
}

impl Default for KvConfig {
    fn default() -> KvConfig {
        KvConfig {
            memtable_bytes_max: 8 << 20,
            block_bytes: 16 << 10,
            table_bytes_max: BLOB_BYTES_MAX,
            manifest_blob_bytes_max: BLOB_BYTES_MAX,
            recent_runs_max: 8,
            recent_runs_stop: 24,
            level_bytes: 64 << 20,
            level_factor: 8,
            garbage_bytes_min: 64 << 10,
            cache: BlockCache::new(BlockCache::BYTES_MAX_DEFAULT),
            merges: Semaphore::new(MERGES_MAX_DEFAULT),
        }
    }
}

/// What a store holds now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KvStats {
    /// Entries in all runs and memtables: an upper bound of the keys, for superseded versions and
    /// deletions count until merged away.
    pub entries: u64,
    pub tables: usize,
    /// Of the durable manifest: none before the first, 1, or a root and its parts.
    pub manifest_blobs: usize,
    /// Runs straight from memtables.
    pub recent_runs: usize,
    /// Bytes per level below those, level 1 first.
    pub level_bytes: Vec<u64>,
    /// Bytes of all runs.
    pub run_bytes: u64,
    /// Of the active and the frozen memtables.
    pub memtable_bytes: usize,
    pub frozen_memtables: usize,
    pub checkpoints: u64,
    pub compactions: u64,
    /// Run bytes written since open: with what users wrote, the write amplification.
    pub written_bytes: u64,
}
