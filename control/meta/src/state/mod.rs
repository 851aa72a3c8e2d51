//! The deterministic state machine of one metadata shard.
//!
//! [`apply`] takes what is stored (through [`Reader`]) and one [`LogEntry`], and answers with an
//! [`Outcome`]: the batch to write, the reply, what changed, and what the service must do next.
//! [`read`] answers the operations that change nothing. Both run on the same keys (see
//! [`keys`]), drawn in `docs/on-disk.md`.
//!
//! What spans shards goes through [`transaction`]: the source directory's shard begins it and
//! decides it, [`transaction::Driver`] says which entry to propose next, and any crash between
//! two entries leaves a state from which a new driver goes on or aborts.
//!
//! Start at [`entry`] for the inputs and outputs, then [`apply`](mod@apply) for the way through.

mod acl;
mod action;
pub mod apply;
mod attributes;
mod audit;
mod bounds;
mod directory;
pub mod entry;
mod file;
mod inode;
pub mod keys;
mod liveness;
mod lock;
pub mod memory;
mod namespace;
mod policy;
mod read;
pub mod records;
mod session;
#[cfg(test)]
mod tests;
pub mod transaction;
mod view;
mod xattr;

pub use apply::apply;
pub use bounds::{check_op, check_shard_op};
pub use entry::{
    Action, Answer, Change, ChangeKind, Facts, FollowUp, Init, LogEntry, Outcome, ReadReply, Refusal, Reply,
    ShardReadReply, Transaction, TxnId, Verdict,
};
pub use memory::MemoryState;
pub use read::{
    check_session, lease_holder, list_fenced, list_half_fenced, list_leases, list_orphans, list_sessions,
    list_transactions, parent_of, read, read_shard, shard_count, transaction_status,
};

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

/// What [`apply`] and [`read`] see of the ordered store: the state left by all entries before.
pub trait Reader {
    fn get<'a>(&'a self, key: &'a [u8]) -> LocalBoxFuture<'a, Result<Option<Bytes>, StateError>>;

    /// At most `max` pairs with `start <= key < end`, in key order.
    fn scan(
        &self,
        start: Vec<u8>,
        end: Vec<u8>,
        max: usize,
    ) -> LocalBoxFuture<'_, Result<Vec<(Bytes, Bytes)>, StateError>>;
}

/// Why an entry can't be applied at all. An operation's own failure is a reply, not this.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StateError {
    /// The store below failed: the replica stops applying.
    #[error("metadata store: {0}")]
    Storage(String),
    /// A stored record can't be understood.
    #[error("metadata record {key:02x?} is corrupt: {reason}")]
    Corrupt { key: Vec<u8>, reason: &'static str },
    /// A record of a format that this version doesn't know.
    #[error("metadata record {key:02x?} has format {format}, which this version does not know")]
    UnknownFormat { key: Vec<u8>, format: u8 },
    /// An entry before the shard's [`LogEntry::Init`].
    #[error("the shard was never initialised")]
    Uninitialised,
}

impl StateError {
    pub fn is_corruption(&self) -> bool {
        matches!(self, StateError::Corrupt { .. } | StateError::UnknownFormat { .. })
    }
}
