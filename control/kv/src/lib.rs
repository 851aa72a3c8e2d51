//! The ordered store of one Raft group: a log-structured merge tree without a log of its own,
//! for the Raft log is its log.
//!
//! It owns the group's `Run` and `Manifest` blobs and nothing else. Every applied entry is one
//! atomic [`Batch`] with the group's applied mark; [`Kv::checkpoint`] makes all batches up to a
//! mark durable; after a crash [`Kv::open`] shows exactly the batches up to one mark at or above
//! the last answered checkpoint, and the host replays its log from there.
//!
//! It never interprets keys, values or marks, never versions keys for its user, never reads a
//! clock, and never touches a device but through [`cfs_wire::blobs::MirroredBlobs`].
//!
//! Start at [`Kv`]. Below it: `memtable` (what is not durable yet), `table` and `block` (the run
//! format), `version`, `manifest` and `parts` (which runs are the store), `publish` (the only place where
//! the durable state changes), `flush` and `compaction` (which feed it; `pick` says what is merged when), `recovery` (choosing at
//! open).
#![forbid(unsafe_code)]

mod batch;
mod block;
mod bloom;
mod cache;
mod coding;
mod compaction;
mod config;
mod cursor;
mod error;
mod flush;
#[cfg(test)]
mod golden_tests;
mod kv;
mod manifest;
mod memtable;
mod parts;
mod pick;
mod publish;
mod recovery;
mod restore;
mod table;
#[doc(hidden)]
pub mod testing;
mod trash;
mod version;
mod view;
mod writer;

pub use batch::Batch;
pub use cache::BlockCache;
pub use config::{KvConfig, KvStats};
pub use error::KvError;
pub use kv::Kv;
pub use recovery::Inventory;
pub use restore::Restore;
pub use view::{KvSnapshot, Scan};

/// A key at most: a name (255) or an attribute name with its prefixes, with room to spare.
pub const KEY_BYTES_MAX: usize = 4096;
/// A value at most: a run's table is one blob of at most 1 MiB and must hold any single entry.
pub const VALUE_BYTES_MAX: usize = 512 << 10;
/// The applied mark at most: a Raft log id and a membership reference fit many times.
pub const MARK_BYTES_MAX: usize = 256;

// An entry is in its table once in full, and its key once more in the index; the rest is filter,
// lengths and footer.
const _: () = assert!(VALUE_BYTES_MAX + 3 * KEY_BYTES_MAX + 4096 <= cfs_wire::limits::BLOB_BYTES_MAX);
