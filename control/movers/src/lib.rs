//! Background movers: what keeps space and redundancy right while nobody waits for it.
//!
//! - [`collector`] finds out what no inode references any more (by freezing it in every shard)
//!   and deletes it; [`orphans`] finds what was stored but never referenced.
//! - [`check`] compares all metadata with all blobs and restores redundancy.
//! - [`rebuild`] puts back what lost targets held, and repairs what was found damaged;
//!   [`scrub`] finds what nobody reads.
//! - [`packer`] turns cold hot blobs, and the living rest of mostly dead segments, into new
//!   segments.
//!
//! A mover holds no state that a restart would miss: each can be killed anywhere and run again.
//! It reaches metadata only through [`ShardCalls`], so that it works wherever a shard is led.
#![forbid(unsafe_code)]

pub mod check;
pub mod collector;
mod merged;
pub mod orphans;
pub mod packer;
pub mod rebuild;
pub mod scrub;

use cfs_wire::ShardId;
use cfs_wire::blobs::BlobKind;
use cfs_wire::meta::{MetaError, ShardOp, ShardReply};
use futures_util::future::LocalBoxFuture;

/// Operations on the state of metadata shards, wherever they are led.
pub trait ShardCalls: 'static {
    fn shards(&self) -> u16;
    fn shard_call(&self, shard: ShardId, op: ShardOp) -> LocalBoxFuture<'_, Result<ShardReply, MetaError>>;
}

/// Why a mover's round stopped early. It runs again later.
#[derive(Debug, thiserror::Error)]
pub enum MoverError {
    #[error("shard {shard}: {error}")]
    Shard { shard: ShardId, error: MetaError },
    #[error("shard {shard} gave an answer of the wrong kind to {op}")]
    Protocol { shard: ShardId, op: &'static str },
    #[error("shard {shard} has handed out a newer reference epoch than that of the freeze")]
    EpochPassed { shard: ShardId },
    #[error(transparent)]
    Data(#[from] cfs_wire::data::DataError),
}

pub(crate) async fn call(calls: &dyn ShardCalls, shard: ShardId, op: ShardOp) -> Result<ShardReply, MoverError> {
    calls.shard_call(shard, op).await.map_err(|error| MoverError::Shard { shard, error })
}

/// Copies that a blob has at least, whatever its own geometry says: all of the log and the ordered
/// stores is kept as often as the cluster promises.
pub(crate) fn least_copies(kind: BlobKind, metadata_copies: usize) -> usize {
    if kind == BlobKind::Hot { 0 } else { metadata_copies }
}

pub(crate) fn all_shards(calls: &dyn ShardCalls) -> impl Iterator<Item = ShardId> + use<> {
    (0..calls.shards()).map(ShardId)
}
