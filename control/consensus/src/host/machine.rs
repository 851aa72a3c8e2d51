//! What a group's state machine must offer: apply, checkpoint, snapshots out and in.

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

/// Largest chunk of a snapshot: it travels as the bulk of one message.
pub const SNAPSHOT_CHUNK_BYTES_MAX: usize = 1 << 20;

/// A committed entry on its way into the state machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AppliedEntry {
    /// The position after this entry: an encoded [`crate::Mark`], to be stored in the same
    /// atomic batch as the entry's effects.
    pub mark: Bytes,
    /// The proposal; `None` for Raft's own entries, of which only the mark is stored.
    pub payload: Option<Bytes>,
}

/// Why a state machine could not go on. Its group stops: a replica that skipped an entry would
/// differ from the others for ever.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StateError {
    #[error("the state's store failed: {0}")]
    Store(#[from] cfs_wire::blobs::BlobError),
    #[error("the state is damaged: {detail}")]
    Corrupt { detail: String },
    #[error("entry {index} is of a feature level or kind this program does not know: upgrade it")]
    Unknown { index: u64 },
    #[error("the snapshot can't be taken in: {detail}")]
    BadSnapshot { detail: String },
    #[error("the state machine was closed")]
    Closed,
}

impl StateError {
    /// Whether waiting for space or for a target can help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StateError::Store(error) if error.is_retryable())
    }
}

/// A replica's state. Calls come from one task in order: `apply`, `snapshot` and `restore`
/// never overlap with each other; `checkpoint` may run beside `apply`.
pub trait StateMachine: 'static {
    /// Mark of the last applied entry; `None` before the first. After a restart this is what
    /// the recovered state holds.
    fn applied(&self) -> Option<Bytes>;

    /// Applies entries in order and answers one reply for each (empty for those without
    /// payload). Deterministic: time and randomness are in the payload.
    fn apply(&self, entries: Vec<AppliedEntry>) -> LocalBoxFuture<'_, Result<Vec<Bytes>, StateError>>;

    /// Makes the state durable and answers the mark it then has. The log is cut up to there.
    fn checkpoint(&self) -> LocalBoxFuture<'_, Result<Bytes, StateError>>;

    /// Mark of the last checkpoint, or of the recovered state.
    fn synced(&self) -> Option<Bytes>;

    /// A consistent view of the whole state, read chunk by chunk while applies go on.
    fn snapshot(&self) -> LocalBoxFuture<'_, Result<Box<dyn SnapshotSource>, StateError>>;

    /// Begins to take in another replica's state beside the present one.
    fn restore(&self) -> LocalBoxFuture<'_, Result<Box<dyn SnapshotSink>, StateError>>;
}

/// A state being read out.
pub trait SnapshotSource: 'static {
    /// Mark of the view.
    fn mark(&self) -> Bytes;

    /// The next chunk, of at most [`SNAPSHOT_CHUNK_BYTES_MAX`]; `None` at the end.
    fn next(&mut self) -> LocalBoxFuture<'_, Result<Option<Bytes>, StateError>>;
}

/// A state being taken in. Dropped unfinished, it leaves the present state as it was.
pub trait SnapshotSink: 'static {
    fn push(&mut self, chunk: Bytes) -> LocalBoxFuture<'_, Result<(), StateError>>;

    /// Replaces the present state, atomically and durably: afterwards `applied` and `synced`
    /// both answer `mark`.
    fn finish(self: Box<Self>, mark: Bytes) -> LocalBoxFuture<'static, Result<(), StateError>>;
}
