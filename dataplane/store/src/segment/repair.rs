//! Putting redundancy back: missing or damaged shards and copies are rebuilt on other targets.

use super::write::{InFlight, segment_owner, shard_geometry};
use super::{SegmentStore, copies};
use bytes::Bytes;
use cfs_wire::blobs::{BlobInfo, BlobKind};
use cfs_wire::data::{DataError, Registration, ShardPlace};
use cfs_wire::{BlobId, TargetId};

/// What a repair found and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Repaired {
    pub checked: u64,
    pub rebuilt: u64,
    /// Payload bytes of what was rebuilt.
    pub bytes: u64,
}

impl SegmentStore {
    /// Shards of a segment that are not soundly on their target. `deep` reads every byte.
    pub async fn missing_shards(&self, registration: &Registration, deep: bool) -> Vec<ShardPlace> {
        let mut missing = Vec::new();
        for place in &registration.shards {
            let present = self.pool.get(place.target).is_some_and(|target| {
                target.failure().is_none() && target.stat(place.blob).is_some_and(|info| info.length == place.length)
            });
            let sound = present && (!deep || self.read_place(place, 0, place.length).await.is_ok());
            if !sound {
                missing.push(*place);
            }
        }
        missing
    }

    /// Rebuilds what [`Self::missing_shards`] finds, on targets that hold no other shard of the
    /// segment, then swaps the registration. A segment that was repaired or collected since
    /// `registration` was read is looked at as it is now.
    pub async fn repair_segment(&self, registration: &Registration, deep: bool) -> Result<Repaired, DataError> {
        let _turn = self.repairs.acquire(1).await;
        let mut report = Repaired { checked: 1, ..Repaired::default() };
        let Some(current) = self.registrar.lookup(registration.segment).await? else { return Ok(report) };
        let registration = &current;
        let missing = self.missing_shards(registration, deep).await;
        if missing.is_empty() {
            // Who found something missing may have looked by a registration that is no more.
            self.forget(registration.segment);
            return Ok(report);
        }
        // Until the new registration stands, the rebuilt shards look like orphans.
        let _in_flight = InFlight::new(self, registration.segment);
        let mut repaired = registration.clone();
        let mut failure = None;
        for place in &missing {
            let payload = self.rebuild_range(registration, place.index, 0, place.length, "shard missing").await?;
            let fresh = match self.place_rebuilt(&repaired, place, payload).await {
                Ok(fresh) => fresh,
                Err(error) => {
                    failure = Some(error);
                    continue;
                }
            };
            for slot in &mut repaired.shards {
                if slot.index == place.index {
                    *slot = fresh;
                }
            }
            report.rebuilt += 1;
            report.bytes += u64::from(place.length);
        }
        // Where not all find a target, those that did count all the same.
        if report.rebuilt > 0 {
            let replaced = self.registrar.replace(registration.clone(), repaired.clone()).await;
            self.forget(registration.segment);
            replaced?;
        }
        for place in missing.iter().filter(|place| !repaired.shards.contains(place)) {
            if let Some(target) = self.pool.get(place.target)
                && let Err(error) = target.delete(vec![place.blob]).await
            {
                tracing::warn!(blob = %place.blob, target = %place.target, %error, "a replaced shard stays until collected");
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        Ok(report)
    }

    async fn place_rebuilt(
        &self,
        registration: &Registration,
        lost: &ShardPlace,
        payload: Bytes,
    ) -> Result<ShardPlace, DataError> {
        let mut exclude: Vec<TargetId> = registration.shards.iter().map(|place| place.target).collect();
        // The target that lost only this shard may take it again.
        if self.pool.get(lost.target).is_some_and(|target| target.failure().is_none()) {
            exclude.retain(|target| *target != lost.target);
        }
        let kind = if lost.index < registration.data { BlobKind::Data } else { BlobKind::Parity };
        let owner = segment_owner(registration.segment);
        let geometry = shard_geometry(registration, lost.index);
        loop {
            let Some(target) = self.pool.pick(1, &exclude).pop() else {
                let needed = registration.shards.len() as u32;
                return Err(DataError::TooFewTargets { up: self.pool.writable().len() as u32, needed });
            };
            exclude.push(target.id());
            let blob = BlobId(self.handle.random_u128());
            match target.put(blob, kind, owner, geometry, payload.clone()).await {
                Ok(()) => {
                    return Ok(ShardPlace { index: lost.index, target: target.id(), blob, length: lost.length });
                }
                Err(error) => {
                    tracing::warn!(target = %target.id(), %error, "a rebuilt shard was not written");
                }
            }
        }
    }

    /// Brings a replicated blob (hot, log, ordered store) back to its number of copies.
    /// `None`: no sound copy is left, or the missing ones find no target. `least`: as in
    /// [`Self::missing_copies`].
    pub async fn repair_copies(&self, info: &BlobInfo, least: usize, deep: bool) -> Option<Repaired> {
        copies::restore(&self.pool, info, wanted_copies(info, least), deep).await.ok()
    }

    /// Copies of a replicated blob that are missing of those it was put with, and of the `least`
    /// that there must be whatever its header says. `deep` reads every byte.
    pub async fn missing_copies(&self, info: &BlobInfo, least: usize, deep: bool) -> usize {
        copies::missing(&self.pool, info, wanted_copies(info, least), deep).await
    }
}

fn wanted_copies(info: &BlobInfo, least: usize) -> usize {
    least.max(usize::from(info.geometry.parity) + 1)
}
