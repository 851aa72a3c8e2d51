//! What a leader can have sent. openraft takes its own messages to be right: it asserts it, or writes
//! to the log what can't be read again. So what is not is refused before.

use super::rpc::{AppendCall, SnapshotBegin};
use crate::log::{ENTRY_BYTES_MAX, entry_bytes};
use crate::types::{LogId, Membership, Vote, decode_membership, encode_membership};
use openraft::EntryPayload;

/// Entries follow on what is before them and on one another, none is of a later leader than the one
/// that sends them, and each can be written and read.
pub(super) fn is_append(call: &AppendCall) -> bool {
    let mut before = call.prev_log_id;
    let follows = call.entries.iter().all(|entry| {
        let id = entry.log_id;
        let consecutive = id.index == before.map_or(0, |before| before.index + 1);
        let in_order = before.is_none_or(|before| before.leader_id <= id.leader_id) && is_of(&id, &call.vote);
        before = Some(id);
        consecutive && in_order
    });
    let readable = |payload: &EntryPayload<_, _, _>| match payload {
        EntryPayload::Membership(membership) => is_membership(membership),
        EntryPayload::Blank | EntryPayload::Normal(_) => true,
    };
    call.vote.committed
        && follows
        && call.entries.iter().all(|entry| readable(&entry.payload) && entry_bytes(entry) <= ENTRY_BYTES_MAX)
}

/// It ends in an entry of no later leader, and the members are those of an entry in it.
pub(super) fn is_snapshot(begin: &SnapshotBegin) -> bool {
    let (last, members) = (begin.meta.last_log_id, &begin.meta.last_membership);
    begin.vote.committed
        && last.is_none_or(|last| is_of(&last, &begin.vote))
        && members.log_id().is_none_or(|id| Some(id) <= last)
        && (members.log_id().is_none() || is_membership(members.membership()))
}

/// Whether the leader of this vote, or one before it, can have made the entry.
fn is_of(id: &LogId, vote: &Vote) -> bool {
    id.leader_id.term <= vote.leader_id.term
}

/// Somebody votes, and the log reads it as what it is.
fn is_membership(membership: &Membership) -> bool {
    membership.voter_ids().next().is_some()
        && decode_membership(&encode_membership(membership)).as_ref() == Some(membership)
}
