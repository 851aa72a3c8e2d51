//! What servers and movers ask of a shard: segment registrations, and the freeze that decides
//! whether stored bytes are dead (section 7 of the design, "liveness").

use super::records::{FrozenRecord, ReleasedRecord, decode};
use super::view::{Fail, View, bad_key};
use super::{StateError, keys};
use cfs_wire::data::{Referent, Registration};
use cfs_wire::meta::{ShardOp, ShardReply};
use cfs_wire::{Epoch, Ino, SegmentId};

/// Rows in one reply; registrations are up to about 10 KiB each, so these have a bound of
/// their own that keeps a reply below the body limit.
pub(crate) const ROWS_MAX: u32 = 4096;
const REGISTRATIONS_MAX: u32 = 64;
/// The last epoch that a shard's record may say, as of all that is counted up.
const EPOCH_MAX: u64 = u64::MAX >> 1;
/// Freezes that one entry looks at: its apply stays short however many there are.
const FORGOTTEN_AT_ONCE: usize = 1024;

impl View<'_> {
    pub(crate) async fn shard_op(&mut self, op: &ShardOp) -> Result<ShardReply, StateError> {
        if let Some(reply) = self.shard_read(op).await? {
            return Ok(reply);
        }
        match op {
            ShardOp::Register(registration) => self.register(registration).await,
            ShardOp::Replace { old, new } => self.replace(old, new).await,
            ShardOp::Deregister(segment) => {
                self.delete(keys::registration(self.shard, *segment));
                self.delete(keys::dead_slots(self.shard, *segment));
                Ok(ShardReply::Done)
            }
            ShardOp::Freeze { referents, epoch } => self.freeze(referents, *epoch).await,
            ShardOp::Thaw { referents } => self.thaw(referents).await,
            ShardOp::Resolve { referents } => self.resolve(referents).await,
            ShardOp::MarkDead { slots } => self.mark_dead(slots).await,
            ShardOp::Swap { ino, swaps } => {
                let mark = self.mark();
                match self.swap(*ino, swaps).await {
                    Ok(swapped) => Ok(ShardReply::Swapped(swapped)),
                    Err(Fail::Storage(error)) => Err(error),
                    // A mover asks again later, or finds the old extents gone.
                    Err(_) => {
                        self.back_to(mark);
                        Ok(ShardReply::Refused)
                    }
                }
            }
            // Never counted: there would be none to hand out above it.
            ShardOp::AdvanceEpoch { minimum, .. } if minimum.0 > EPOCH_MAX => Ok(ShardReply::Refused),
            ShardOp::AdvanceEpoch { minimum, after } => {
                self.counters.minimum_epoch = self.counters.minimum_epoch.max(*minimum);
                self.forget_frozen(after.as_deref()).await
            }
            // Answered as a read above.
            _ => Ok(ShardReply::Refused),
        }
    }

    /// The reply to an operation that changes nothing; `None` for the others.
    pub(crate) async fn shard_read(&self, op: &ShardOp) -> Result<Option<ShardReply>, StateError> {
        let reply = match op {
            ShardOp::GetRegistration(segment) => {
                ShardReply::Registration(self.get(&keys::registration(self.shard, *segment)).await?)
            }
            ShardOp::ListRegistrations { after, max } => self.list_registrations(*after, *max).await?,
            ShardOp::ListReleased { max } => self.list_released(*max).await?,
            ShardOp::Holders { referent } => self.holders(referent).await?,
            ShardOp::ListReferenced { after, max } => self.list_referenced(after.as_ref(), *max).await?,
            ShardOp::Audit { after, max } => self.audit(after.as_deref(), *max).await?,
            ShardOp::GetEpoch => ShardReply::Epoch(self.counters.minimum_epoch),
            ShardOp::Extents { ino, offset, length, max } => {
                let end = offset.saturating_add(*length);
                let extents = self.extents(*ino, *offset, end, (*max).clamp(1, ROWS_MAX) as usize).await?;
                let own = self.inode_raw(*ino).await?.and_then(|inode| inode.policy);
                ShardReply::Extents { extents, policy: own.unwrap_or(self.config.policy) }
            }
            _ => return Ok(None),
        };
        Ok(Some(reply))
    }

    async fn register(&mut self, registration: &Registration) -> Result<ShardReply, StateError> {
        let key = keys::registration(self.shard, registration.segment);
        match self.get::<Registration>(&key).await? {
            Some(stored) if stored == *registration => return Ok(ShardReply::Done),
            Some(_) => return Ok(ShardReply::Refused),
            None => {}
        }
        // No reference to it could be accepted: the writer stores again.
        if registration.epoch < self.counters.minimum_epoch {
            return Ok(ShardReply::Refused);
        }
        self.put(key, registration);
        Ok(ShardReply::Done)
    }

    async fn replace(&mut self, old: &Registration, new: &Registration) -> Result<ShardReply, StateError> {
        let key = keys::registration(self.shard, old.segment);
        let stored: Option<Registration> = self.get(&key).await?;
        if stored.as_ref() == Some(new) {
            return Ok(ShardReply::Done);
        }
        if stored.as_ref() != Some(old) || old.segment != new.segment {
            return Ok(ShardReply::Refused);
        }
        self.put(key, new);
        Ok(ShardReply::Done)
    }

    async fn list_registrations(&self, after: Option<SegmentId>, max: u32) -> Result<ShardReply, StateError> {
        let max = max.clamp(1, REGISTRATIONS_MAX) as usize;
        let table = keys::table(self.shard, keys::REGISTRATION);
        let start = match after {
            Some(segment) => [keys::registration(self.shard, segment).as_slice(), &[0]].concat(),
            None => table.clone(),
        };
        let rows = self.scan(start, &keys::after_prefix(&table), max + 1).await?;
        let end = rows.len() <= max;
        let mut list = Vec::new();
        for (key, value) in rows.into_iter().take(max) {
            let registration: Registration = decode(&key, &value)?;
            let dead = self.dead_slots(registration.segment).await?;
            list.push((registration, dead));
        }
        Ok(ShardReply::Registrations { list, end })
    }

    pub(crate) async fn dead_slots(&self, segment: SegmentId) -> Result<Vec<u16>, StateError> {
        let bitmap: Vec<u8> = self.get(&keys::dead_slots(self.shard, segment)).await?.unwrap_or_default();
        Ok((0..=u16::MAX).take(bitmap.len() * 8).filter(|slot| bit(&bitmap, *slot)).collect())
    }

    async fn list_released(&self, max: u32) -> Result<ShardReply, StateError> {
        let table = keys::table(self.shard, keys::RELEASED);
        let max = max.clamp(1, ROWS_MAX) as usize;
        let mut list = Vec::new();
        for (key, value) in self.scan(table.clone(), &keys::after_prefix(&table), max).await? {
            let referent = keys::referent_at(&key, keys::FIELDS).ok_or_else(|| bad_key(&key))?;
            let record: ReleasedRecord = decode(&key, &value)?;
            list.push((referent, Some(record.location)));
        }
        Ok(ShardReply::Released(list))
    }

    async fn holders(&self, referent: &Referent) -> Result<ShardReply, StateError> {
        let mut holders = Vec::new();
        for (key, _) in self.scan_all(&keys::references(self.shard, referent)).await? {
            let at = keys::FIELDS + keys::REFERENT_BYTES;
            let ino = keys::u64_at(&key, at).ok_or_else(|| bad_key(&key))?;
            let offset = keys::u64_at(&key, at + 8).ok_or_else(|| bad_key(&key))?;
            holders.push((Ino::from_u64(ino), offset));
        }
        Ok(ShardReply::Holders(holders))
    }

    async fn list_referenced(&self, after: Option<&Referent>, max: u32) -> Result<ShardReply, StateError> {
        let table = keys::table(self.shard, keys::REFERENCE);
        let start = match after {
            Some(referent) => keys::after_prefix(&keys::references(self.shard, referent)),
            None => table.clone(),
        };
        let max = max.clamp(1, ROWS_MAX) as usize;
        let rows = self.scan(start, &keys::after_prefix(&table), max).await?;
        let mut list = Vec::new();
        for (key, _) in &rows {
            let referent = keys::referent_at(key, keys::FIELDS).ok_or_else(|| bad_key(key))?;
            if list.last() != Some(&referent) {
                list.push(referent);
            }
        }
        Ok(ShardReply::Referenced { list, end: rows.len() < max })
    }

    async fn freeze(&mut self, referents: &[Referent], epoch: Epoch) -> Result<ShardReply, StateError> {
        // It was long under way, and would be forgotten before what was handed out since is refused.
        if epoch < self.handed_out_epoch() {
            return Ok(ShardReply::Refused);
        }
        let mut held = Vec::with_capacity(referents.len());
        for referent in referents {
            held.push(self.any(&keys::references(self.shard, referent)).await?);
            self.mark_frozen(referent, epoch).await?;
            let key = keys::released(self.shard, referent);
            if let Some(mut record) = self.get::<ReleasedRecord>(&key).await? {
                record.seen = true;
                self.put(key, &record);
            }
        }
        Ok(ShardReply::Held(held))
    }

    async fn mark_frozen(&mut self, referent: &Referent, epoch: Epoch) -> Result<(), StateError> {
        let key = keys::frozen(self.shard, referent);
        let mut record = self.get::<FrozenRecord>(&key).await?.unwrap_or_default();
        record.epoch = record.epoch.max(epoch);
        if let Referent::Slot(_, slot) = referent {
            let bytes = usize::from(slot / 8) + 1;
            record.slots.resize(record.slots.len().max(bytes), 0);
            record.slots[bytes - 1] |= 1 << (slot % 8);
        }
        self.put(key, &record);
        Ok(())
    }

    async fn thaw(&mut self, referents: &[Referent]) -> Result<ShardReply, StateError> {
        for referent in referents {
            let key = keys::frozen(self.shard, referent);
            let Some(mut record) = self.get::<FrozenRecord>(&key).await? else { continue };
            if let Referent::Slot(_, slot) = referent
                && let Some(byte) = record.slots.get_mut(usize::from(slot / 8))
            {
                *byte &= !(1 << (slot % 8));
            }
            if record.slots.iter().all(|byte| *byte == 0) {
                self.delete(key);
            } else {
                self.put(key, &record);
            }
        }
        Ok(ShardReply::Done)
    }

    /// Whether new references to it are refused.
    pub(crate) async fn is_frozen(&self, referent: &Referent) -> Result<bool, StateError> {
        let record: Option<FrozenRecord> = self.get(&keys::frozen(self.shard, referent)).await?;
        // Below the minimum no reference that it could meet is accepted any more.
        let Some(record) = record.filter(|record| record.epoch >= self.counters.minimum_epoch) else {
            return Ok(false);
        };
        Ok(match referent {
            Referent::Hot(_) => true,
            Referent::Slot(_, slot) => bit(&record.slots, *slot),
        })
    }

    /// Takes off the list what a freeze looked at; what was released again since stays.
    async fn resolve(&mut self, referents: &[Referent]) -> Result<ShardReply, StateError> {
        for referent in referents {
            let key = keys::released(self.shard, referent);
            if self.get::<ReleasedRecord>(&key).await?.is_some_and(|record| record.seen) {
                self.delete(key);
            }
        }
        Ok(ShardReply::Done)
    }

    async fn mark_dead(&mut self, slots: &[(SegmentId, u16)]) -> Result<ShardReply, StateError> {
        let mut dead = Vec::new();
        for (segment, slot) in slots {
            let stored = self.get::<Registration>(&keys::registration(self.shard, *segment)).await?;
            let Some(registration) = stored.filter(|stored| usize::from(*slot) < stored.slots.len()) else {
                continue;
            };
            let key = keys::dead_slots(self.shard, *segment);
            let mut bitmap: Vec<u8> = self.get(&key).await?.unwrap_or_default();
            bitmap.resize(registration.slots.len().div_ceil(8), 0);
            if let Some(byte) = bitmap.get_mut(usize::from(*slot / 8)) {
                *byte |= 1 << (slot % 8);
            }
            let all = (0..registration.slots.len()).all(|slot| bit(&bitmap, slot as u16));
            self.put(key, &bitmap);
            if all && !dead.contains(segment) {
                dead.push(*segment);
            }
        }
        Ok(ShardReply::Dead(dead))
    }

    /// Deletes freezes that no accepted reference can meet, of some that follow `after`.
    async fn forget_frozen(&mut self, after: Option<&[u8]>) -> Result<ShardReply, StateError> {
        let table = keys::table(self.shard, keys::FROZEN);
        let start = match after {
            Some(key) if key.starts_with(&table) => [key, &[0]].concat(),
            _ => table.clone(),
        };
        let rows = self.scan(start, &keys::after_prefix(&table), FORGOTTEN_AT_ONCE).await?;
        let full = rows.len() == FORGOTTEN_AT_ONCE;
        let next = rows.last().filter(|_| full).map(|(key, _)| key.to_vec());
        for (key, value) in rows {
            if decode::<FrozenRecord>(&key, &value)?.epoch < self.counters.minimum_epoch {
                self.delete(key);
            }
        }
        Ok(ShardReply::Forgotten { next })
    }
}

fn bit(bitmap: &[u8], slot: u16) -> bool {
    bitmap.get(usize::from(slot / 8)).is_some_and(|byte| byte >> (slot % 8) & 1 == 1)
}
