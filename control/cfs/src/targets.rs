//! Opening a node's targets: who they are is judged before anything is written, then each is
//! recovered, then all record who takes part.

use crate::membership::{Candidate, Membership, judge};
use crate::node::{Attach, DeviceSlot, StartError};
use cfs_device::BlockDevice;
use cfs_reactor::Handle;
use cfs_store::segment::TargetPool;
use cfs_store::{Identity, Roster, Superblock, TargetStore, inspect};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::{ClusterId, NodeId, TargetId};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// The targets of a node and what their superblocks agree on.
pub(crate) struct Targets {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub parameters: ClusterParameters,
    pub pool: Rc<TargetPool>,
    pub labels: BTreeMap<TargetId, String>,
    pub membership: Rc<Membership>,
}

/// A device that says it is a target.
struct Found {
    label: String,
    device: Rc<dyn BlockDevice>,
    superblock: Superblock,
    roster: Option<Roster>,
}

/// Devices that can't be used, and why.
type Unusable = Vec<(String, String)>;

/// Opens every slot, checks that all belong together, and fills the pool.
pub(crate) async fn open(handle: &Handle, slots: Vec<DeviceSlot>, attach: &Attach) -> Result<Targets, StartError> {
    if slots.is_empty() {
        return Err(StartError::NoTargets);
    }
    let (found, mut unusable) = inspect_all(slots).await?;
    let Some(first) = found.first() else {
        return Err(StartError::NoneUsable(listed(&unusable)));
    };
    let (identity, parameters) = (first.superblock.identity, first.superblock.parameters);
    let candidate = |found: &Found| Candidate {
        label: found.label.clone(),
        identity: found.superblock.identity,
        roster: found.roster.clone(),
    };
    let roster = judge(&found.iter().map(candidate).collect::<Vec<_>>())?;
    // Before anything is written.
    check_enough(
        &found.iter().map(|found| found.superblock.identity.target).collect(),
        &roster,
        &parameters,
        &unusable,
    )?;

    let current: BTreeMap<TargetId, Roster> =
        found.iter().filter_map(|found| Some((found.superblock.identity.target, found.roster.clone()?))).collect();
    let mut open = recover_all(handle, found, &mut unusable).await;
    let membership = loop {
        check_enough(&open.keys().copied().collect(), &roster, &parameters, &unusable)?;
        let stores = open.iter().map(|(id, target)| (*id, target.store.clone())).collect();
        let failed = match Membership::take_in(stores, &current, &roster).await {
            Ok(membership) => break Rc::new(membership),
            Err(failed) => failed,
        };
        for (id, reason) in failed {
            let label = open.remove(&id).map(|target| target.label).unwrap_or_default();
            unusable.push((label, reason));
        }
    };

    let pool = TargetPool::new(handle);
    let mut labels = BTreeMap::new();
    for (id, target) in open {
        labels.insert(id, target.label);
        pool.add(attach(target.store));
    }
    add_absent(&pool, &mut labels, &parameters, unusable);
    Ok(Targets { cluster: identity.cluster, node: identity.node, parameters, pool, labels, membership })
}

/// Reads who the devices are. One on which nothing can be recognised counts as lost. One that a newer
/// program wrote is not lost, and a start without it would make it lag behind; and where another
/// format is recognised the path is wrong, and the target somewhere else.
async fn inspect_all(slots: Vec<DeviceSlot>) -> Result<(Vec<Found>, Unusable), StartError> {
    let inspections = slots.into_iter().map(|slot| async move {
        let DeviceSlot { label, device } = slot;
        let device = match device {
            Ok(device) => device,
            Err(reason) => return Ok(Err((label, reason))),
        };
        match inspect(&*device).await {
            Ok((superblock, roster)) => Ok(Ok(Found { label, device, superblock, roster })),
            Err(error) if error.is_anothers() => Err(StartError::NotOurs(error.to_string())),
            Err(error) => Ok(Err((label, error.to_string()))),
        }
    });
    let (mut found, mut unusable) = (Vec::new(), Vec::new());
    for outcome in futures_util::future::join_all(inspections).await {
        match outcome? {
            Ok(device) => found.push(device),
            Err(refusal) => unusable.push(refusal),
        }
    }
    Ok((found, unusable))
}

struct Open {
    label: String,
    identity: Identity,
    store: Rc<TargetStore>,
}

/// Recovers every target; those that fail are unusable.
async fn recover_all(handle: &Handle, found: Vec<Found>, unusable: &mut Unusable) -> BTreeMap<TargetId, Open> {
    let recoveries = found.into_iter().map(|found| async move {
        let Found { label, device, superblock, .. } = found;
        let identity = superblock.identity;
        match TargetStore::open(device, handle, Some(identity)).await {
            Ok(store) => Ok(Open { label, identity, store }),
            Err(error) => Err((label, error.to_string())),
        }
    });
    let mut open = BTreeMap::new();
    for outcome in futures_util::future::join_all(recoveries).await {
        match outcome {
            Ok(target) => {
                report_recovery(&target.label, &target.store);
                open.insert(target.identity.target, target);
            }
            Err(refusal) => unusable.push(refusal),
        }
    }
    open
}

/// Refuses a start in which more targets are missing than redundancy bridges, or fewer are there than
/// the log has copies: it would wait for ever. One that was replaced and has not got its share of the
/// log and the ordered store back counts as missing: it is in the place of a target that did hold
/// them, and can be written to all the same.
fn check_enough(
    present: &BTreeSet<TargetId>,
    roster: &Roster,
    parameters: &ClusterParameters,
    unusable: &Unusable,
) -> Result<(), StartError> {
    let total = usize::from(parameters.targets);
    let tolerated = usize::from(parameters.tolerated);
    let empty: Vec<TargetId> =
        present.iter().copied().filter(|id| roster.member(*id).is_some_and(|member| member.lacks.metadata)).collect();
    let missing = total.saturating_sub(present.len());
    let mut detail = listed(unusable);
    let unnamed = missing.saturating_sub(unusable.len());
    if unnamed > 0 {
        let separator = if detail.is_empty() { "" } else { "; " };
        detail.push_str(&format!("{separator}no path was given for {unnamed} of them"));
    }
    if missing + empty.len() <= tolerated {
        let (present, needed) = (present.len(), tolerated + 1);
        return match present < needed {
            true => Err(StartError::TooFewToWrite { present, total, needed, detail }),
            false => Ok(()),
        };
    }
    if missing == 0 || empty.is_empty() {
        return Err(StartError::TooManyMissing { missing, total, tolerated, detail });
    }
    let empty = empty.iter().map(TargetId::to_string).collect::<Vec<_>>().join(", ");
    Err(StartError::NotRefilled { missing, total, empty, tolerated, detail })
}

/// The slots that could not be used stand for the targets that are missing: which is which can't
/// be known.
fn add_absent(
    pool: &TargetPool,
    labels: &mut BTreeMap<TargetId, String>,
    parameters: &ClusterParameters,
    unusable: Unusable,
) {
    for (label, reason) in &unusable {
        tracing::warn!(target = %label, %reason, "a target can't be used; bring it back, or replace it");
    }
    let mut unusable = unusable.into_iter();
    for id in (0..u32::from(parameters.targets)).map(TargetId) {
        if labels.contains_key(&id) {
            continue;
        }
        let (label, reason) = unusable.next().unwrap_or_else(|| ("(no device given)".into(), "missing".into()));
        labels.insert(id, label);
        pool.add_absent(id, reason);
    }
}

fn listed(unusable: &Unusable) -> String {
    unusable.iter().map(|(label, reason)| format!("{label}: {reason}")).collect::<Vec<_>>().join("; ")
}

fn report_recovery(label: &str, store: &TargetStore) {
    let recovery = store.recovery();
    if recovery.corrupt.is_empty() {
        tracing::info!(target = %label, ?recovery, "target opened");
    } else {
        tracing::warn!(target = %label, ?recovery, "target opened with damage; what it lost is rebuilt in the background");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::first_roster;
    use cfs_wire::{DeviceId, Policy};

    fn start_with(present: u32, targets: u16, tolerated: u8) -> Result<(), String> {
        let parameters = ClusterParameters {
            format: ClusterParameters::FORMAT,
            shards: 2,
            policy: Policy::new(1, tolerated).unwrap(),
            tolerated,
            targets,
            name_key: [0; 32],
        };
        let roster = first_roster((0..targets).map(|index| DeviceId(index.into())));
        let unusable = vec![("t9".to_owned(), "it is gone".to_owned())];
        check_enough(&(0..present).map(TargetId).collect(), &roster, &parameters, &unusable)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_start_that_could_not_write_its_log_is_refused() {
        assert_eq!(start_with(2, 3, 1), Ok(()));
        assert_eq!(start_with(3, 5, 2), Ok(()));
        // Made before `format` refused so few.
        assert_eq!(
            start_with(2, 3, 2).unwrap_err(),
            "2 of 3 targets can be used and the metadata is written to 3: t9: it is gone; bring more of them back"
        );
        assert_eq!(start_with(3, 3, 2), Ok(()));
        assert!(start_with(1, 2, 1).unwrap_err().starts_with("1 of 2 targets can be used"));
        assert!(start_with(1, 3, 1).unwrap_err().starts_with("2 of 3 targets are missing"));
    }
}
