//! Bodies of the data-plane endpoint: `store` makes bytes durable and says where they are,
//! `fetch` gives them back, `reserve` keeps room for bytes that are to come.

use crate::ids::{BlobId, Epoch, Ino, SegmentId, SessionId, TargetId, VolumeId};
use crate::policy::Policy;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// `store`: bulk bytes in, [`StoreReply`] out.
pub const OP_STORE: u16 = 0x0200;
/// `fetch`: [`FetchCall`] in, bulk bytes out.
pub const OP_FETCH: u16 = 0x0201;

/// `reserve`: [`ReserveCall`] in, [`ReserveReply`] out.
pub const OP_RESERVE: u16 = 0x0202;

/// Where a run of file bytes lives. Offsets are into the plain bytes of a blob or chunk.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Location {
    /// A replicated blob: the same id on each of `targets`.
    Hot { blob: BlobId, targets: SmallVec<[TargetId; 4]>, offset: u32 },
    /// A chunk of a segment, found without the segment's slot table: `stored` bytes from
    /// `start` in data shard `shard`. The chunk is read whole; the run starts at `offset` in it.
    Chunk { segment: SegmentId, slot: u16, shard: u8, start: u32, stored: u32, offset: u32 },
}

/// What the collector counts references to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Referent {
    Hot(BlobId),
    Slot(SegmentId, u16),
}

impl Location {
    pub fn referent(&self) -> Referent {
        match self {
            Location::Hot { blob, .. } => Referent::Hot(*blob),
            Location::Chunk { segment, slot, .. } => Referent::Slot(*segment, *slot),
        }
    }

    /// The same run, its first `bytes` left out.
    pub fn skip(&self, bytes: u32) -> Location {
        let mut shifted = self.clone();
        match &mut shifted {
            Location::Hot { offset, .. } | Location::Chunk { offset, .. } => *offset = offset.saturating_add(bytes),
        }
        shifted
    }
}

/// A run of file bytes with its place in the file. Extents of a file never overlap; what no
/// extent covers reads as zero.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Extent {
    pub offset: u64,
    pub length: u32,
    pub location: Location,
    /// The reference epoch at which the location was handed out: by `store`, or with the extents of
    /// a file.
    pub epoch: Epoch,
}

/// Asks an endpoint to make the bulk bytes durable (1 byte to `STORE_BYTES_MAX`).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreCall {
    pub volume: VolumeId,
    /// The file the bytes are for: recorded as owner of hot blobs, so that the packer finds
    /// the reference. No access check hangs on it.
    pub ino: Ino,
    pub policy: Policy,
    pub claim: Claim,
}

/// What a `store` may take of the room that is reserved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Claim {
    pub session: SessionId,
    /// So much of the session's reservation is used up once the bytes are stored.
    pub reserved: u64,
    /// A program was told that its write succeeded: all room that there is may be taken.
    pub answered: bool,
}

/// Asks for room that is kept free for bytes which a client keeps unwritten. A reserved byte is one on
/// every target that a piece may go to, whatever its policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReserveCall {
    pub session: SessionId,
    /// Grows with each call of the session: of two, the server goes by the later.
    pub number: u64,
    /// The widest that the bytes are stored under.
    pub policy: Policy,
    /// What the client has reserved and still counts on: what it has beyond that, it gives back.
    pub held: u64,
    /// What it would like to have.
    pub wanted: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReserveReply {
    /// On top of what was held.
    pub granted: u64,
    /// All of it lasts so long, counted by the client from when it sent the call.
    pub lifetime_ms: u32,
}

/// The stored bytes, in order: lengths add up to the bulk length of the call.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreReply {
    pub epoch: Epoch,
    pub pieces: Vec<Piece>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Piece {
    pub length: u32,
    pub location: Location,
}

/// Asks for runs of bytes, at most `FETCH_PIECES_MAX` and none of them empty; the reply's bulk is
/// their concatenation (at most `RPC_BULK_BYTES_MAX`).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FetchCall {
    pub pieces: Vec<Piece>,
}

/// Why the data plane refused.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum DataError {
    /// What was asked for is gone: read the extents again.
    #[error("the stored bytes are gone; the extents have changed")]
    Gone,
    #[error("no space")]
    NoSpace,
    #[error("{up} targets are up, the policy needs {needed}")]
    TooFewTargets { up: u32, needed: u32 },
    /// More was lost than redundancy repairs.
    #[error("unreadable: {0}")]
    Unreadable(String),
    #[error("malformed request: {0}")]
    Malformed(String),
    #[error("the server is shutting down")]
    Closed,
    /// The room that is left may have been promised before the server started: that is known soon.
    #[error("the server has just started and does not know yet what room is reserved")]
    Starting,
}

impl DataError {
    pub fn is_retryable(&self) -> bool {
        matches!(self, DataError::TooFewTargets { .. } | DataError::Closed | DataError::Starting)
    }
}

/// A segment as its registration shard records it: what is needed to read, repair and delete.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Registration {
    pub segment: SegmentId,
    pub volume: VolumeId,
    pub epoch: Epoch,
    pub data: u8,
    pub parity: u8,
    /// One per stored shard, data first; an empty data shard is not stored.
    pub shards: Vec<ShardPlace>,
    /// The chunks, in slot order.
    pub slots: Vec<Slot>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShardPlace {
    pub index: u8,
    pub target: TargetId,
    pub blob: BlobId,
    pub length: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Slot {
    pub shard: u8,
    pub start: u32,
    pub stored: u32,
    /// Length of the plain bytes.
    pub length: u32,
}
