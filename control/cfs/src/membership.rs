//! Which devices are this node's targets: judged by the rosters that the devices carry, and kept
//! up to date on all of them.

use cfs_movers::rebuild::Refills;
use cfs_reactor::sync::Semaphore;
use cfs_store::{Identity, Lacks, Member, Roster, TargetStore};
use cfs_wire::{ClusterId, DeviceId, TargetId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// A formatted device that should be a target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// For people: the path.
    pub label: String,
    pub identity: Identity,
    /// What it knows of the others; `None` when both copies are damaged.
    pub roster: Option<Roster>,
}

/// Why the devices given are not the targets of one node.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("{label} belongs to {found}, the other targets to {expected}: check the configured paths")]
    Foreign { label: String, found: ClusterId, expected: ClusterId },
    #[error("none of the targets has a readable record of which devices belong together: restore one from a copy")]
    NoRoster,
    #[error(
        "{label} says it is target {target}, but the cluster has targets t0 to t{last}: check the configured paths"
    )]
    Unknown { label: String, target: TargetId, last: usize },
    #[error(
        "{label} is not target {target} any more: device {found} was replaced by device {current}; \
         give the path of the replacement instead"
    )]
    Superseded { label: String, target: TargetId, found: DeviceId, current: DeviceId },
    #[error("{label} and {other} are both target {target}: one is a copy of the other; remove it")]
    Duplicate { label: String, other: String, target: TargetId },
    #[error(
        "{label} (target {target}) was in use while the other targets were in use without it: start without it, \
         then replace it"
    )]
    Apart { label: String, target: TargetId },
}

/// The roster in force among `candidates`, all of which it names.
pub fn judge(candidates: &[Candidate]) -> Result<Roster, MembershipError> {
    let expected = expected_cluster(candidates);
    if let Some(foreign) = candidates.iter().find(|candidate| candidate.identity.cluster != expected) {
        let (label, found) = (foreign.label.clone(), foreign.identity.cluster);
        return Err(MembershipError::Foreign { label, found, expected });
    }
    let rosters = candidates.iter().filter_map(|candidate| candidate.roster.as_ref());
    let newest = rosters.max_by_key(|roster| roster.epoch).ok_or(MembershipError::NoRoster)?;
    let mut labels: BTreeMap<TargetId, &str> = BTreeMap::new();
    for candidate in candidates {
        check(candidate, newest)?;
        if let Some(other) = labels.insert(candidate.identity.target, &candidate.label) {
            let (label, target) = (candidate.label.clone(), candidate.identity.target);
            return Err(MembershipError::Duplicate { label, other: other.to_owned(), target });
        }
    }
    Ok(newest.clone())
}

/// The cluster of most of them, of equals the first.
fn expected_cluster(candidates: &[Candidate]) -> ClusterId {
    let count = |id: ClusterId| candidates.iter().filter(|candidate| candidate.identity.cluster == id).count();
    // `max_by_key` takes the last of equals.
    let ids = candidates.iter().rev().map(|candidate| candidate.identity.cluster);
    ids.max_by_key(|id| count(*id)).unwrap_or_default()
}

fn check(candidate: &Candidate, newest: &Roster) -> Result<(), MembershipError> {
    let (label, target) = (|| candidate.label.clone(), candidate.identity.target);
    let Some(member) = newest.member(target) else {
        return Err(MembershipError::Unknown { label: label(), target, last: newest.members.len().saturating_sub(1) });
    };
    let found = candidate.identity.device;
    if member.device != found {
        return Err(MembershipError::Superseded { label: label(), target, found, current: member.device });
    }
    // An older one than `seen` is left from a crash before anything was done under the newer;
    // one in between was made when this device ran without the others.
    let apart = candidate.roster.as_ref().is_some_and(|own| match own.epoch == newest.epoch {
        true => own != newest,
        false => own.epoch > member.seen,
    });
    if apart { Err(MembershipError::Apart { label: label(), target }) } else { Ok(()) }
}

/// The roster of a new cluster.
pub fn first_roster(devices: impl Iterator<Item = DeviceId>) -> Roster {
    let member = |device| Member { device, seen: 1, lacks: Lacks::NOTHING };
    Roster { epoch: 1, created: false, members: devices.map(member).collect() }
}

/// `roster` with `present` taking part; unchanged when they did before.
pub fn with_present(roster: &Roster, present: &BTreeSet<TargetId>) -> Roster {
    let takes_part = |index: usize| present.contains(&TargetId(index as u32));
    let same =
        roster.members.iter().enumerate().all(|(index, member)| (member.seen == roster.epoch) == takes_part(index));
    if same { roster.clone() } else { next(roster, present, |_, _| {}) }
}

/// `roster` with `device`, empty, in the place of `target`.
pub fn with_replacement(roster: &Roster, present: &BTreeSet<TargetId>, target: TargetId, device: DeviceId) -> Roster {
    let mut present = present.clone();
    present.insert(target);
    next(roster, &present, |id, member| {
        if id == target {
            (member.device, member.lacks) = (device, Lacks::ALL);
        }
    })
}

/// The next epoch, with `present` taking part.
fn next(roster: &Roster, present: &BTreeSet<TargetId>, change: impl Fn(TargetId, &mut Member)) -> Roster {
    let epoch = roster.epoch + 1;
    let mut members = roster.members.clone();
    for (index, member) in members.iter_mut().enumerate() {
        let id = TargetId(index as u32);
        change(id, member);
        if present.contains(&id) {
            member.seen = epoch;
        }
    }
    Roster { epoch, created: roster.created, members }
}

/// The roster in force while the node runs, on every target that takes part.
pub struct Membership {
    stores: BTreeMap<TargetId, Rc<TargetStore>>,
    roster: RefCell<Roster>,
    /// One change at a time.
    turn: Rc<Semaphore>,
}

impl Membership {
    /// Puts `roster`, with exactly `stores` taking part, on all of them. The error names the
    /// targets that did not take it: nothing may be done until it is on all that take part.
    pub async fn take_in(
        stores: BTreeMap<TargetId, Rc<TargetStore>>,
        current: &BTreeMap<TargetId, Roster>,
        newest: &Roster,
    ) -> Result<Membership, BTreeMap<TargetId, String>> {
        let roster = with_present(newest, &stores.keys().copied().collect());
        let behind = stores.iter().filter(|(id, _)| current.get(id) != Some(&roster));
        let failed = write_to(behind, &roster).await;
        if !failed.is_empty() {
            return Err(failed);
        }
        for store in stores.values() {
            store.know_roster(&roster);
        }
        Ok(Membership { stores, roster: RefCell::new(roster), turn: Semaphore::new(1) })
    }

    /// Whether every shard has had its first entry.
    pub fn created(&self) -> bool {
        self.roster.borrow().created
    }

    /// Every shard has its first entry now.
    pub async fn record_created(&self) {
        let _turn = self.turn.acquire(1).await;
        let after = Roster { created: true, ..self.successor(|_, _| {}) };
        self.record(after, "that the file system was created").await;
    }

    async fn record_filled(&self, targets: &BTreeSet<TargetId>, sorts: Lacks) {
        let _turn = self.turn.acquire(1).await;
        let after = self.successor(|id, member| {
            if targets.contains(&id) {
                member.lacks.metadata &= !sorts.metadata;
                member.lacks.data &= !sorts.data;
            }
        });
        let lacks = |roster: &Roster| roster.members.iter().map(|member| member.lacks).collect::<Vec<_>>();
        if lacks(&after) != lacks(&self.roster.borrow()) {
            self.record(after, "what was refilled").await;
        }
    }

    /// The next roster, with those that take part now.
    fn successor(&self, change: impl Fn(TargetId, &mut Member)) -> Roster {
        let present = self.stores.keys().copied().collect();
        next(&self.roster.borrow(), &present, change)
    }

    /// Puts a roster on all targets. When none keeps it, it is to be told again: after the next
    /// start, or by the next search for what is lacking.
    async fn record(&self, after: Roster, what: &str) {
        let failed = write_to(self.stores.iter(), &after).await;
        for (target, error) in &failed {
            tracing::warn!(%target, %error, "a target did not take the record of {what}");
        }
        if failed.len() < self.stores.len() {
            *self.roster.borrow_mut() = after;
        }
    }
}

impl Refills for Membership {
    fn lacking(&self) -> BTreeMap<TargetId, Lacks> {
        let roster = self.roster.borrow();
        let lacks = self.stores.keys().filter_map(|id| Some((*id, roster.member(*id)?.lacks)));
        lacks.filter(|(_, lacks)| *lacks != Lacks::NOTHING).collect()
    }

    fn filled(&self, targets: BTreeSet<TargetId>, sorts: Lacks) -> LocalBoxFuture<'_, ()> {
        async move { self.record_filled(&targets, sorts).await }.boxed_local()
    }
}

async fn write_to<'a>(
    stores: impl Iterator<Item = (&'a TargetId, &'a Rc<TargetStore>)>,
    roster: &Roster,
) -> BTreeMap<TargetId, String> {
    let writes = stores.map(|(id, store)| async move {
        let written = store.write_roster(roster).await;
        written.err().map(|error| (*id, error.to_string()))
    });
    futures_util::future::join_all(writes).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_wire::NodeId;

    const CLUSTER: ClusterId = ClusterId(7);

    fn device(target: u32) -> DeviceId {
        DeviceId(u128::from(target) + 100)
    }

    fn ids(targets: &[u32]) -> BTreeSet<TargetId> {
        targets.iter().copied().map(TargetId).collect()
    }

    fn candidate(target: u32, device: DeviceId, roster: &Roster) -> Candidate {
        let identity = Identity { cluster: CLUSTER, node: NodeId(0), target: TargetId(target), device };
        Candidate { label: format!("/dev/{device}"), identity, roster: Some(roster.clone()) }
    }

    fn first() -> Roster {
        first_roster((0..3).map(device))
    }

    fn all(roster: &Roster) -> Vec<Candidate> {
        (0..3).map(|target| candidate(target, device(target), roster)).collect()
    }

    #[test]
    fn devices_are_known_by_their_ids_whatever_their_order_and_one_lost_record_is_no_harm() {
        let mut given = all(&first());
        given.reverse();
        given[1].roster = None;
        assert_eq!(judge(&given), Ok(first()));
        given.iter_mut().for_each(|candidate| candidate.roster = None);
        assert_eq!(judge(&given), Err(MembershipError::NoRoster));
    }

    #[test]
    fn a_replaced_device_is_refused_beside_or_instead_of_its_replacement() {
        let new = DeviceId(900);
        let replaced = with_replacement(&first(), &ids(&[0, 2]), TargetId(1), new);
        assert_eq!(replaced.members[1], Member { device: new, seen: 2, lacks: Lacks::ALL });
        let mut given = all(&replaced);
        given[1] = candidate(1, new, &replaced);
        assert_eq!(judge(&given), Ok(replaced.clone()));
        // The old one, which knows nothing of it.
        given[1] = candidate(1, device(1), &first());
        let refusal = judge(&given).unwrap_err();
        assert!(
            matches!(&refusal, MembershipError::Superseded { target: TargetId(1), current, .. } if *current == new)
        );
        given.push(candidate(1, new, &replaced));
        assert_eq!(judge(&given), Err(refusal));
    }

    #[test]
    fn a_replacement_counts_from_the_moment_that_one_target_knows_of_it() {
        let new = DeviceId(900);
        let replaced = with_replacement(&first(), &ids(&[0, 2]), TargetId(1), new);
        // Crashed before the others were told.
        let given =
            [candidate(0, device(0), &first()), candidate(1, new, &replaced), candidate(2, device(2), &first())];
        assert_eq!(judge(&given), Ok(replaced));
    }

    #[test]
    fn a_target_that_was_away_comes_back_and_targets_that_ran_apart_do_not() {
        let without_one = with_present(&first(), &ids(&[0, 2]));
        assert_eq!(without_one.epoch, 2);
        assert_eq!(with_present(&without_one, &ids(&[0, 2])), without_one, "no change, no new epoch");
        let back = [candidate(0, device(0), &without_one), candidate(1, device(1), &first())];
        assert_eq!(judge(&back), Ok(without_one.clone()));

        // The same, but target 1 was started alone meanwhile.
        let alone = with_present(&first(), &ids(&[1]));
        let apart = |given: &[Candidate]| matches!(judge(given), Err(MembershipError::Apart { .. }));
        assert!(apart(&[candidate(0, device(0), &without_one), candidate(1, device(1), &alone)]));
        // Also when one side has gone further.
        let further = with_present(&without_one, &ids(&[0]));
        assert!(apart(&[candidate(0, device(0), &further), candidate(1, device(1), &alone)]));
    }

    #[test]
    fn a_crash_while_the_record_is_written_is_no_harm() {
        let returned = with_present(&with_present(&first(), &ids(&[0, 2])), &ids(&[0, 1, 2]));
        let older = with_present(&first(), &ids(&[0, 2]));
        let given =
            [candidate(0, device(0), &returned), candidate(1, device(1), &first()), candidate(2, device(2), &older)];
        assert_eq!(judge(&given), Ok(returned));
    }

    #[test]
    fn strangers_and_copies_are_named() {
        let mut given = all(&first());
        given[0].identity.cluster = ClusterId(8);
        let foreign = judge(&given).unwrap_err();
        assert_eq!(
            foreign,
            MembershipError::Foreign { label: given[0].label.clone(), found: ClusterId(8), expected: CLUSTER }
        );
        let mut given = all(&first());
        given.push(given[2].clone());
        assert!(matches!(judge(&given), Err(MembershipError::Duplicate { target: TargetId(2), .. })));
        let given = [candidate(3, device(3), &first())];
        assert!(matches!(judge(&given), Err(MembershipError::Unknown { target: TargetId(3), last: 2, .. })));
    }
}
