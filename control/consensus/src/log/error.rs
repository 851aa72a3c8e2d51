//! What can go wrong with the log.

use super::batch::BadBatch;
use cfs_wire::blobs::BlobError;

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LogError {
    /// A batch that had been durable is gone or unreadable on every target.
    #[error(
        "the Raft log is damaged: batch {sequence} was durable and is lost ({detail}). This node can't start \
         without it: bring the missing targets back, or restore the node from its peers"
    )]
    Corrupt { sequence: u64, detail: String },
    /// A batch of a format this program does not know.
    #[error("the Raft log holds batch {sequence}, unknown to this program: {cause}")]
    Format { sequence: u64, cause: BadBatch },
    #[error("a log entry of {length} bytes exceeds the limit of {limit}")]
    TooLarge { length: usize, limit: usize },
    /// The state machine has not stored what was to be cut away.
    #[error("refused to cut the log of {group} at {index}: the state machine is synced to {synced:?} only")]
    CutAboveSynced { group: cfs_wire::ShardId, index: u64, synced: Option<u64> },
    #[error("the Raft log can't be written: {0}")]
    Store(#[from] BlobError),
    #[error("the Raft log was closed")]
    Closed,
}

impl LogError {
    /// Whether the same call may succeed later without anybody's help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, LogError::Store(error) if error.is_retryable())
    }

    /// Whether data that had been acknowledged is lost.
    pub fn is_corruption(&self) -> bool {
        matches!(self, LogError::Corrupt { .. })
    }
}

impl From<LogError> for std::io::Error {
    fn from(error: LogError) -> Self {
        std::io::Error::other(error)
    }
}
