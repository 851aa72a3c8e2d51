//! How large what a request asks to be stored may be. The service refuses more before it reaches
//! the log; `apply` refuses it as well, for an entry may come from elsewhere.

use super::entry::LogEntry;
use cfs_kv::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use cfs_wire::data::{Extent, Location, Registration};
use cfs_wire::limits::{
    CLIENT_NAME_BYTES_MAX, COMMIT_WRITES_MAX, DATA_SHARDS_MAX, HOT_COPIES_MAX, PARITY_SHARDS_MAX, RENEWALS_MAX,
    SEGMENT_SLOTS_MAX,
};
use cfs_wire::meta::{FileWrite, MetaError, MetaOp, ShardOp};

/// Refuses a client's operation that says more than a shard keeps.
pub fn check_op(op: &MetaOp) -> Result<(), MetaError> {
    match op {
        MetaOp::OpenSession { client } => at_most("bytes in a client's name", client.len(), CLIENT_NAME_BYTES_MAX),
        MetaOp::Commit(commit) => {
            at_most("writes in one commit", commit.writes.len(), COMMIT_WRITES_MAX)?;
            commit.writes.iter().try_for_each(|write| match write {
                FileWrite::Data { location, .. } | FileWrite::Append { location, .. } => check_location(location),
                _ => Ok(()),
            })
        }
        MetaOp::Renew { inos } => at_most("inodes in one renewal", inos.len(), RENEWALS_MAX),
        _ => Ok(()),
    }
}

/// The same for what servers and movers ask.
pub fn check_shard_op(op: &ShardOp) -> Result<(), MetaError> {
    match op {
        ShardOp::Register(registration) => check_registration(registration),
        // The old one is compared, not stored.
        ShardOp::Replace { new, .. } => check_registration(new),
        ShardOp::Swap { swaps, .. } => {
            let mut places = swaps.iter().flat_map(|(_, new)| new);
            places.try_for_each(|Extent { location, .. }| check_location(location))
        }
        _ => Ok(()),
    }
}

/// The same for an entry that a client or a server asked for.
pub(super) fn check_entry(entry: &LogEntry) -> Result<(), MetaError> {
    match entry {
        LogEntry::Client { call, .. } => check_op(&call.op),
        LogEntry::Shard { op, .. } => check_shard_op(op),
        _ => Ok(()),
    }
}

/// Refuses a row that the ordered store does not take: no request within the bounds above
/// makes one.
pub(super) fn check_row(key: &[u8], value_bytes: usize) -> Result<(), MetaError> {
    at_most("bytes in a key", key.len(), KEY_BYTES_MAX)?;
    at_most("bytes in a record", value_bytes, VALUE_BYTES_MAX)
}

fn check_location(location: &Location) -> Result<(), MetaError> {
    match location {
        Location::Hot { targets, .. } => at_most("copies of a hot blob", targets.len(), HOT_COPIES_MAX),
        Location::Chunk { .. } => Ok(()),
    }
}

fn check_registration(registration: &Registration) -> Result<(), MetaError> {
    at_most("shards of a segment", registration.shards.len(), DATA_SHARDS_MAX + PARITY_SHARDS_MAX)?;
    at_most("slots of a segment", registration.slots.len(), SEGMENT_SLOTS_MAX)
}

fn at_most(what: &str, found: usize, limit: usize) -> Result<(), MetaError> {
    match found <= limit {
        true => Ok(()),
        false => Err(MetaError::Malformed(format!("{found} {what}; at most {limit} are kept"))),
    }
}
