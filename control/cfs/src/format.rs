//! Creating a cluster, and putting an empty target in the place of a lost one.

use crate::membership::{Candidate, MembershipError, first_roster, judge, with_replacement};
use cfs_device::BlockDevice;
use cfs_reactor::Handle;
use cfs_store::layout::roster::MEMBERS_MAX;
use cfs_store::{FormatOptions, Identity, Lacks, StoreError, format, inspect, probe, write_roster};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::limits::BLOB_BYTES_MAX;
use cfs_wire::{ClusterId, DeviceId, NodeId, Policy, TargetId};
use std::collections::BTreeSet;
use std::rc::Rc;

/// A target's largest payload is half a zone, and segments, the log and the ordered store count on
/// whole blobs.
/// Of so many groups all that may have to be in one batch of the Raft log fits into one.
const SHARDS_MAX: u16 = 16_384;
const ZONE_BYTES_MIN: u32 = 2 * BLOB_BYTES_MAX as u32;

/// What a new cluster is to be.
#[derive(Clone, Debug)]
pub struct FormatSpec {
    pub policy: Policy,
    /// Lost targets that the metadata survives, the most that any directory's policy may promise;
    /// `None`: what `policy` promises.
    pub tolerate: Option<u8>,
    pub shards: u16,
    /// Zone size of the targets; `None`: by the device's size.
    pub zone_bytes: Option<u32>,
    /// Erase whatever the devices hold.
    pub force: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error(
        "policy {policy} needs {needed} targets to keep what it promises, {given} were given: give more, or choose a \
         smaller k or m"
    )]
    TooFewTargets { policy: Policy, needed: usize, given: usize },
    #[error("--tolerate {tolerate} is less than the {promised} lost targets that policy {policy} promises to survive")]
    Tolerate { tolerate: u8, policy: Policy, promised: usize },
    #[error(
        "policy {policy} with metadata that survives {tolerate} lost targets needs {needed} targets (those that are \
         left must still take all copies of what is written), {given} were given: give more, or choose a smaller m \
         or --tolerate"
    )]
    TooFewForMetadata { policy: Policy, tolerate: u8, needed: usize, given: usize },
    #[error("a node has at most {MEMBERS_MAX} targets, {0} were given")]
    TooManyTargets(usize),
    #[error("1 to {SHARDS_MAX} metadata shards are possible, {0} were asked for")]
    Shards(u16),
    #[error("zones of {0} bytes cannot hold two of the largest blobs; use at least {ZONE_BYTES_MIN}")]
    ZoneBytes(u32),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a target is not replaced. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    #[error("no other target of the cluster can be read")]
    NoSurvivor,
    #[error("the cluster has targets t0 to t{last}, not {target}")]
    Unknown { target: TargetId, last: usize },
    #[error("target {target} is not lost: it is at {label}")]
    NotLost { target: TargetId, label: String },
    #[error(
        "replacing {target} now would lose data: {short} targets would be empty, missing or not refilled, and \
         redundancy bridges {tolerated}; bring the others back, or let the server refill them first (cfsctl status)"
    )]
    StillNeeded { target: TargetId, short: usize, tolerated: usize },
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Formats `devices` as the targets of a new one-node cluster.
pub async fn format_cluster(
    handle: &Handle,
    devices: &[Rc<dyn BlockDevice>],
    spec: &FormatSpec,
) -> Result<ClusterId, FormatError> {
    let needed = spec.policy.total();
    if devices.len() < needed {
        return Err(FormatError::TooFewTargets { policy: spec.policy, needed, given: devices.len() });
    }
    let tolerate = spec.tolerate.unwrap_or(spec.policy.parity() as u8);
    if usize::from(tolerate) < spec.policy.parity() {
        return Err(FormatError::Tolerate { tolerate, policy: spec.policy, promised: spec.policy.parity() });
    }
    // The log is written in tolerate+1 copies, also by a start with so many targets lost.
    let needed = 2 * usize::from(tolerate) + 1;
    if devices.len() < needed {
        return Err(FormatError::TooFewForMetadata { policy: spec.policy, tolerate, needed, given: devices.len() });
    }
    if devices.len() > MEMBERS_MAX {
        return Err(FormatError::TooManyTargets(devices.len()));
    }
    if !(1..=SHARDS_MAX).contains(&spec.shards) {
        return Err(FormatError::Shards(spec.shards));
    }
    if let Some(zone_bytes) = spec.zone_bytes.filter(|zone_bytes| *zone_bytes < ZONE_BYTES_MIN) {
        return Err(FormatError::ZoneBytes(zone_bytes));
    }
    if !spec.force {
        // All are looked at before the first is written.
        for device in devices {
            if let Some(found) = probe(&**device).await? {
                let device = device.name().to_owned();
                return Err(StoreError::AlreadyFormatted { device, owner: found.identity }.into());
            }
        }
    }
    let cluster = ClusterId(handle.random_u128());
    let mut name_key = [0; 32];
    for word in name_key.chunks_mut(8) {
        word.copy_from_slice(&handle.random_u64().to_le_bytes());
    }
    let parameters = ClusterParameters {
        format: ClusterParameters::FORMAT,
        shards: spec.shards,
        policy: spec.policy,
        tolerated: tolerate,
        targets: devices.len() as u16,
        name_key,
    };
    let mut identities = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let identity = Identity {
            cluster,
            node: NodeId(0),
            target: TargetId(index as u32),
            device: DeviceId(handle.random_u128()),
        };
        let options = FormatOptions { identity, parameters, zone_bytes: spec.zone_bytes, force: spec.force };
        format(&**device, &options).await?;
        identities.push(identity);
    }
    let roster = first_roster(identities.iter().map(|identity| identity.device));
    for (device, identity) in devices.iter().zip(&identities) {
        write_roster(&**device, identity, &roster).await?;
    }
    Ok(cluster)
}

/// Formats `device` to take the place of target `target` among `survivors`, which are told. The
/// server fills it when it runs again.
///
/// Refused while the cluster needs what the target held: when with it more would be missing than
/// redundancy bridges.
pub async fn format_replacement(
    handle: &Handle,
    device: &dyn BlockDevice,
    survivors: &[(String, Rc<dyn BlockDevice>)],
    target: TargetId,
    force: bool,
) -> Result<(), ReplaceError> {
    let mut candidates = Vec::new();
    let mut superblocks = Vec::new();
    for (label, survivor) in survivors {
        let (superblock, roster) = match inspect(&**survivor).await {
            Ok(found) => found,
            // Not lost: what is asked for may be wrong.
            Err(error) if error.is_anothers() => return Err(error.into()),
            Err(_) => continue,
        };
        candidates.push(Candidate { label: label.clone(), identity: superblock.identity, roster });
        superblocks.push((superblock, survivor));
    }
    let Some((pattern, _)) = superblocks.first() else { return Err(ReplaceError::NoSurvivor) };
    let roster = judge(&candidates)?;
    if roster.member(target).is_none() {
        return Err(ReplaceError::Unknown { target, last: roster.members.len().saturating_sub(1) });
    }
    if let Some(held) = candidates.iter().find(|candidate| candidate.identity.target == target) {
        return Err(ReplaceError::NotLost { target, label: held.label.clone() });
    }
    let present: BTreeSet<TargetId> = candidates.iter().map(|candidate| candidate.identity.target).collect();
    let whole = |id: &&TargetId| roster.member(**id).is_some_and(|member| member.lacks == Lacks::NOTHING);
    let short = roster.members.len() - present.iter().filter(whole).count();
    let tolerated = usize::from(pattern.parameters.tolerated);
    if short > tolerated {
        return Err(ReplaceError::StillNeeded { target, short, tolerated });
    }
    let identity = Identity { target, device: DeviceId(handle.random_u128()), ..pattern.identity };
    let options =
        FormatOptions { identity, parameters: pattern.parameters, zone_bytes: Some(pattern.zone_bytes), force };
    format(device, &options).await?;
    let roster = with_replacement(&roster, &present, target, identity.device);
    // The new device first: as long as it does not know that it is one, nobody does.
    write_roster(device, &identity, &roster).await?;
    for (superblock, survivor) in superblocks {
        // The next start tells those that could not be told.
        if let Err(error) = write_roster(&**survivor, &superblock.identity, &roster).await {
            tracing::warn!(target = %superblock.identity.target, %error, "a target was not told of the replacement");
        }
    }
    Ok(())
}
