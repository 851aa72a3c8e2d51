//! What can go wrong.

use cfs_wire::BlobId;
use cfs_wire::blobs::BlobError;

/// Bytes that do not decode; says which rule they break.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KvError {
    #[error(transparent)]
    Blob(#[from] BlobError),

    /// Going back to an older manifest could lose applied entries that the Raft log no longer
    /// holds, so this is never done silently.
    #[error(
        "group {group}: manifest {blob} (version {version:#x}) can't be used: {reason}. Bring back the targets \
         that held it; if they are lost, remove this replica and let it rejoin from its peers"
    )]
    Manifest { group: u64, blob: BlobId, version: u64, reason: String },

    /// A run that verified below does not decode.
    #[error("group {group}: run {blob}: {reason}; remove this replica and let it rejoin from its peers")]
    Run { group: u64, blob: BlobId, reason: Malformed },

    #[error("group {group}: a manifest of {bytes} bytes has more parts than a root lists")]
    ManifestFull { group: u64, bytes: usize },

    #[error("restored keys must ascend strictly")]
    Unsorted,

    #[error("the ordered store is closed")]
    Closed,
}

impl KvError {
    /// Whether waiting (for space, for a target to come back) can help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, KvError::Blob(error) if error.is_retryable())
    }

    /// Whether what is on the targets does not decode or is incomplete.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, KvError::Manifest { .. } | KvError::Run { .. } | KvError::Blob(BlobError::Unreadable { .. }))
    }
}
