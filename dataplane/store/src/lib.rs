//! The store: one target's immutable blobs in a log of zones.
//!
//! This crate owns what is on a device: the superblock, the division into zones, the headers
//! that make every append self-describing, the index rebuilt from them, tombstones, collection
//! of garbage, and the checks of every byte read. It knows nothing of files, volumes, keys or
//! other targets; it never answers a `put` or `delete` before it is durable, and never returns
//! bytes that do not match their checksums.
//!
//! Start at [`TargetStore`] (the verbs), then `layout` (the bytes; drawn in `docs/on-disk.md`),
//! `commit` (group commit), `recovery` and `judge` (opening, and telling torn from corrupt),
//! `collect` (the collector), `scrub` and `structures` (finding rot before it is needed), `state`
//! (the index and its transitions, free of I/O).
//!
//! Rules kept here (section 5 of the design), and where:
//! - an answer only after the flush, in the order of the zone: `commit`
//! - a header counts only with the right device, incarnation, zone, generation, offset and a
//!   rising sequence: `scan`
//! - copies and live tombstones durable → new generation durable → reuse: `collect`
//! - a tombstone beats every copy and lives until no zone can hold one: `state`, `recovery`
//! - damage below the durable mark is reported, only above it is there a torn tail: `judge`
//! - a full target still deletes and collects: `zones::Reserve`
#![forbid(unsafe_code)]

mod collect;
mod commit;
mod core;
mod error;
mod flush;
mod foreign;
mod format;
mod group;
mod judge;
pub mod layout;
mod prepare;
mod read;
mod recovery;
mod roster;
mod scan;
mod scrub;
pub mod segment;
mod state;
mod store;
mod structures;
mod transfer;
mod zones;

pub use error::StoreError;
pub use format::{DEVICE_BYTES_MIN, FormatOptions, format, probe};
pub use layout::roster::{Lacks, Member, Roster};
pub use layout::superblock::{Identity, Superblock};
pub use recovery::{CorruptRegion, Damage, RecoveryReport};
pub use roster::{inspect, write_roster};
pub use scrub::Scrubbed;
pub use state::ShardCursor;
pub use store::{Space, TargetStore};
pub use structures::{Flaw, Structure};

/// Bytes that are coded, checked or copied in one go. A fourth of what one poll of a task may do, so
/// that what is left of it is seldom too little for the next piece.
pub(crate) const WORK_PIECE_BYTES: usize = 64 << 10;
