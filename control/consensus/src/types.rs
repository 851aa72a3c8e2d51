//! The types openraft is instantiated with, and [`Mark`], the position a state machine stores.

use crate::runtime::CfsRuntime;
use bytes::Bytes;
use openraft::type_config::alias::{CommittedLeaderIdOf, LogIdOf, StoredMembershipOf, VoteOf};
use openraft::vote::RaftLeaderId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A member of a group: where its node listens.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Member {
    pub address: String,
}

/// A proposal's bytes, opaque to this crate.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Command(pub Bytes);

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

openraft::declare_raft_types!(
    /// Node ids are `cfs_wire::NodeId` widened: openraft's storage suite draws them from u64.
    pub Raft:
        D = Command,
        R = Bytes,
        NodeId = u64,
        Node = Member,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = CfsRuntime,
);

pub type LogId = LogIdOf<Raft>;
pub type Vote = VoteOf<Raft>;
pub type Entry = openraft::type_config::alias::EntryOf<Raft>;
pub type Membership = openraft::Membership<u64, Member>;
pub type StoredMembership = StoredMembershipOf<Raft>;
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<Raft>;
pub type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;

/// Terms, indices, sequences and incarnations are counted up from little: larger ones were never
/// counted, and would leave no room to count on.
pub(crate) const NUMBER_MAX: u64 = u64::MAX >> 1;

/// A log id from its two numbers: with one leader a term, the term alone names the leader.
pub fn log_id(term: u64, index: u64) -> LogId {
    let leader: CommittedLeaderIdOf<Raft> = LeaderId::new(term, 0).to_committed();
    LogId { leader_id: leader, index }
}

/// How far a state machine has applied, and the membership in force there. The state machine
/// stores it, encoded, in the same atomic batch as the effects of the entry.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mark {
    pub applied: Option<LogId>,
    pub membership: StoredMembership,
}

/// Bytes that should have been a [`Mark`] are not.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the stored position of a state machine is unreadable")]
pub struct BadMark;

/// First byte of an encoded mark.
const MARK_VERSION: u8 = 1;

#[derive(Serialize, Deserialize)]
struct MarkFields {
    applied: Option<(u64, u64)>,
    membership_at: Option<(u64, u64)>,
    configs: Vec<Vec<u64>>,
    members: Vec<(u64, String)>,
}

fn parts(id: &LogId) -> (u64, u64) {
    (id.leader_id.term, id.index)
}

impl Mark {
    /// Index of the last applied entry, if any.
    pub fn index(&self) -> Option<u64> {
        self.applied.as_ref().map(|id| id.index)
    }

    pub fn encode(&self) -> Bytes {
        let membership = self.membership.membership();
        let fields = MarkFields {
            applied: self.applied.as_ref().map(parts),
            membership_at: self.membership.log_id().as_ref().map(parts),
            configs: membership.get_joint_config().iter().map(|set| set.iter().copied().collect()).collect(),
            members: membership.nodes().map(|(id, member)| (*id, member.address.clone())).collect(),
        };
        let mut out = vec![MARK_VERSION];
        out.extend(postcard::to_allocvec(&fields).expect("a mark of plain numbers and strings encodes"));
        Bytes::from(out)
    }

    pub fn decode(bytes: &[u8]) -> Result<Mark, BadMark> {
        let (&version, rest) = bytes.split_first().ok_or(BadMark)?;
        if version != MARK_VERSION {
            return Err(BadMark);
        }
        let fields: MarkFields = cfs_wire::body::decode_stored(rest).map_err(|_| BadMark)?;
        let counted = |(term, index): &(u64, u64)| *term.max(index) <= NUMBER_MAX;
        if !fields.applied.iter().chain(&fields.membership_at).all(counted) {
            return Err(BadMark);
        }
        Ok(Mark {
            applied: fields.applied.map(|(term, index)| log_id(term, index)),
            membership: StoredMembership::new(
                fields.membership_at.map(|(term, index)| log_id(term, index)),
                membership_from(fields.configs, fields.members).ok_or(BadMark)?,
            ),
        })
    }
}

fn membership_from(configs: Vec<Vec<u64>>, members: Vec<(u64, String)>) -> Option<Membership> {
    let configs: Vec<_> = configs.into_iter().map(|set| set.into_iter().collect()).collect();
    if configs.is_empty() && members.is_empty() {
        return Some(Membership::default());
    }
    let members = members.into_iter().map(|(id, address)| (id, Member { address }));
    Membership::new(configs, members.collect::<std::collections::BTreeMap<_, _>>()).ok()
}

/// A membership as a log entry carries it.
pub(crate) fn encode_membership(membership: &Membership) -> Vec<u8> {
    let configs: Vec<Vec<u64>> =
        membership.get_joint_config().iter().map(|set| set.iter().copied().collect()).collect();
    let members: Vec<(u64, String)> = membership.nodes().map(|(id, member)| (*id, member.address.clone())).collect();
    postcard::to_allocvec(&(configs, members)).expect("plain numbers and strings encode")
}

pub(crate) fn decode_membership(bytes: &[u8]) -> Option<Membership> {
    let (configs, members) = cfs_wire::body::decode_stored(bytes).ok()?;
    membership_from(configs, members)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_mark_survives_encoding_and_a_damaged_one_is_refused() {
        let members = BTreeMap::from([(1, Member { address: "a".into() }), (2, Member { address: "b".into() })]);
        let membership = Membership::new(vec![[1].into(), [1, 2].into()], members).unwrap();
        let mark =
            Mark { applied: Some(log_id(7, 99)), membership: StoredMembership::new(Some(log_id(3, 4)), membership) };
        let bytes = mark.encode();
        assert_eq!(Mark::decode(&bytes), Ok(mark));
        assert_eq!(Mark::decode(&Mark::default().encode()), Ok(Mark::default()));
        for length in 0..bytes.len() {
            assert_eq!(Mark::decode(&bytes[..length]), Err(BadMark), "cut to {length}");
        }
        assert_eq!(Mark::decode(&[&bytes[..], &[0]].concat()), Err(BadMark), "a byte is left over");
        let mut newer = bytes.to_vec();
        newer[0] = 2;
        assert_eq!(Mark::decode(&newer), Err(BadMark));
        for never_counted in [log_id(7, NUMBER_MAX + 1), log_id(NUMBER_MAX + 1, 99)] {
            let applied = Mark { applied: Some(never_counted), membership: StoredMembership::default() };
            let membership = StoredMembership::new(Some(never_counted), Membership::default());
            for mark in [applied, Mark { applied: None, membership }] {
                assert_eq!(Mark::decode(&mark.encode()), Err(BadMark), "{mark:?}");
            }
        }
        let mut golden = cfs_wire::golden::Golden::new(env!("CARGO_MANIFEST_DIR"), "mark");
        golden.bytes("mark", &bytes);
        golden.bytes("mark-of-nothing", &Mark::default().encode());
        golden.check();
    }
}
