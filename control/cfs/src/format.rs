//! Creating a cluster, and putting an empty target in the place of a lost one.

use cfs_device::BlockDevice;
use cfs_reactor::Handle;
use cfs_store::{FormatOptions, Identity, StoreError, Superblock, format, probe};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::limits::BLOB_BYTES_MAX;
use cfs_wire::{ClusterId, DeviceId, NodeId, Policy, TargetId};
use std::rc::Rc;

/// A target's largest payload is half a zone, and segments, the log and the ordered store count on
/// whole blobs.
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
    #[error("policy {policy} needs {needed} targets to keep what it promises, {given} were given")]
    TooFewTargets { policy: Policy, needed: usize, given: usize },
    #[error("--tolerate {tolerate} is less than the {promised} lost targets that policy {policy} promises to survive")]
    Tolerate { tolerate: u8, policy: Policy, promised: usize },
    #[error("metadata that survives {tolerate} lost targets needs {needed} targets, {given} were given")]
    TooFewForMetadata { tolerate: u8, needed: usize, given: usize },
    #[error("1 to 65535 metadata shards are possible, {0} were asked for")]
    Shards(u16),
    #[error("zones of {0} bytes cannot hold two of the largest blobs; use at least {ZONE_BYTES_MIN}")]
    ZoneBytes(u32),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Formats `devices` as the targets of a new one-node cluster.
pub async fn format_cluster(
    handle: &Handle,
    devices: &[Rc<dyn BlockDevice>],
    spec: &FormatSpec,
) -> Result<ClusterId, FormatError> {
    // With m targets lost, m+1 must be left to write to.
    let needed = spec.policy.total().max(spec.policy.copies());
    if devices.len() < needed {
        return Err(FormatError::TooFewTargets { policy: spec.policy, needed, given: devices.len() });
    }
    let tolerate = spec.tolerate.unwrap_or(spec.policy.parity() as u8);
    if usize::from(tolerate) < spec.policy.parity() {
        return Err(FormatError::Tolerate { tolerate, policy: spec.policy, promised: spec.policy.parity() });
    }
    if devices.len() < usize::from(tolerate) + 1 {
        let needed = usize::from(tolerate) + 1;
        return Err(FormatError::TooFewForMetadata { tolerate, needed, given: devices.len() });
    }
    if spec.shards == 0 {
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
    for (index, device) in devices.iter().enumerate() {
        let identity = Identity {
            cluster,
            node: NodeId(0),
            target: TargetId(index as u32),
            device: DeviceId(handle.random_u128()),
        };
        let options = FormatOptions { identity, parameters, zone_bytes: spec.zone_bytes, force: spec.force };
        format(&**device, &options).await?;
    }
    Ok(cluster)
}

/// Formats `device` to take the place of target `target`; `survivor` is the superblock of
/// another target of the cluster. Repair fills it.
pub async fn format_replacement(
    handle: &Handle,
    device: &dyn BlockDevice,
    survivor: &Superblock,
    target: TargetId,
    force: bool,
) -> Result<(), StoreError> {
    let identity = Identity { target, device: DeviceId(handle.random_u128()), ..survivor.identity };
    let parameters = survivor.parameters;
    let options = FormatOptions { identity, parameters, zone_bytes: Some(survivor.zone_bytes), force };
    format(device, &options).await.map(|_| ())
}
