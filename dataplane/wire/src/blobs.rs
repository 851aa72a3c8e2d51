//! The contract between the store and those who keep their state in it (the Raft log, the
//! ordered store, segments): kinds and owners of blobs, and the node's mirrored-blob verbs.

use crate::ids::{BlobId, TargetId};
use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

/// What a blob holds. The number is on disk; an unknown one is an error.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum BlobKind {
    /// A batch of the node's shared Raft log. Owner: (0, batch sequence).
    Log = 1,
    /// A sorted run of the ordered store. Owner: (group, run number).
    Run = 2,
    /// A manifest of the ordered store. Owner: (group, manifest version).
    Manifest = 3,
    /// A replicated small write. Owner: (volume, inode).
    Hot = 4,
    /// A data shard of a segment. Owner: high and low half of the segment id.
    Data = 5,
    /// A parity shard of a segment. Owner: high and low half of the segment id.
    Parity = 6,
}

impl BlobKind {
    pub const ALL: [BlobKind; 6] =
        [BlobKind::Log, BlobKind::Run, BlobKind::Manifest, BlobKind::Hot, BlobKind::Data, BlobKind::Parity];

    pub fn from_u8(raw: u8) -> Option<BlobKind> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == raw)
    }
}

/// Whom a blob belongs to; the meaning of the two words is per [`BlobKind`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Owner {
    pub high: u64,
    pub low: u64,
}

/// Erasure geometry of a segment's shard, as its header records it; `NONE` for whole copies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct ShardGeometry {
    pub data: u8,
    pub parity: u8,
    /// This shard's index: data shards first.
    pub index: u8,
}

impl ShardGeometry {
    pub const NONE: ShardGeometry = ShardGeometry { data: 0, parity: 0, index: 0 };
}

/// What `list` and `stat` tell of a blob.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct BlobInfo {
    pub id: BlobId,
    pub kind: BlobKind,
    pub owner: Owner,
    pub geometry: ShardGeometry,
    /// Payload length in bytes.
    pub length: u32,
}

/// Why a mirrored verb failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BlobError {
    #[error("blob {0} is on no reachable target")]
    NotFound(BlobId),
    #[error("blob {id}: every copy is unreadable ({detail})")]
    Unreadable { id: BlobId, detail: String },
    #[error("no space: {needed} bytes wanted for {kind:?}")]
    NoSpace { kind: BlobKind, needed: u64 },
    #[error("{up} targets are up, {needed} distinct ones are needed")]
    TooFewTargets { up: usize, needed: usize },
    #[error("range {offset}+{length} is outside blob {id} of {size} bytes")]
    OutOfRange { id: BlobId, offset: u32, length: u32, size: u32 },
    #[error("target {target}: {detail}")]
    Device { target: TargetId, detail: String },
    #[error("the store is shutting down")]
    Closed,
}

impl BlobError {
    /// Whether waiting (for space, for a target to come back) can help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, BlobError::NoSpace { .. } | BlobError::TooFewTargets { .. })
    }
}

/// A node's own state (Raft log, ordered store), each blob copied to m+1 of the node's targets.
///
/// The copies of one blob have one id. `put` answers when all copies are durable; a failed
/// target is replaced by another before the answer. A crash may leave a blob that was never
/// answered on some of its targets: `list` may show it, and the caller must judge it.
pub trait MirroredBlobs: 'static {
    /// Stores `payload` (1 byte to 1 MiB) under a fresh random id.
    fn put(&self, kind: BlobKind, owner: Owner, payload: Bytes) -> LocalBoxFuture<'_, Result<BlobId, BlobError>>;

    /// Reads a range of a blob; a copy that fails its checksum is passed over for another.
    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, BlobError>>;

    /// Deletes all copies that targets in use hold; durable when answered. Unknown ids are no error.
    /// Works on full targets: `NoSpace` only where what is kept for deletions is used up too, and then
    /// some copies may be gone; the same call may go through later.
    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), BlobError>>;

    /// Every blob of a kind on any reachable target, each id once, sorted by owner then id.
    fn list(&self, kind: BlobKind) -> LocalBoxFuture<'_, Result<Vec<BlobInfo>, BlobError>>;

    /// Puts missing copies of a blob back (after a target was lost); durable when answered.
    fn heal(&self, id: BlobId) -> LocalBoxFuture<'_, Result<(), BlobError>>;
}
