//! One target, opened: the verbs of the store.

use crate::WORK_PIECE_BYTES;
use crate::commit::{Item, NewBlob, Request};
use crate::core::Core;
use crate::error::StoreError;
use crate::layout::PAGE_BYTES;
use crate::layout::roster::Roster;
use crate::layout::superblock::{Identity, Superblock};
use crate::recovery::{self, RecoveryReport};
use crate::roster::write_roster;
use crate::scrub::Scrubbed;
use crate::state::{ShardCursor, footprint, index_bytes};
use crate::structures::Flaw;
use crate::zones::{Stream, Tier};
use bytes::Bytes;
use cfs_codec::crc32c::crc32c_pages;
use cfs_device::{BlockDevice, DeviceHealth};
use cfs_reactor::Handle;
use cfs_reactor::sync::oneshot;
use cfs_wire::BlobId;
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner, ShardGeometry};
use cfs_wire::limits::PAGE;
use cfs_wire::planted::{self, Bug};
use std::ops::Range;
use std::rc::Rc;

/// One target's blobs. Used as `Rc<TargetStore>`; everything runs on the reactor that opened it,
/// which in this version is dealt all of the target's lanes.
pub struct TargetStore {
    core: Rc<Core>,
    recovery: RecoveryReport,
}

/// Space of a target in bytes. `capacity`, `live` and `free` count payloads with what they need
/// around them, so `free` is what ordinary writers can still put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    pub capacity: u64,
    /// Live blobs and puts under way.
    pub live: u64,
    pub free: u64,
    /// The rest of the device: zones kept for collection, tombstones and metadata, headers, and
    /// the slack that keeps collection cheap.
    pub reserved: u64,
    /// Payload bytes of live blobs per kind, in the order of [`BlobKind::ALL`].
    pub payload: [u64; 6],
    /// Live blobs per kind, in the same order.
    pub blobs: [u64; 6],
    /// Deletions that still guard against a copy of their blob.
    pub tombstones: u64,
    pub zones_total: u32,
    pub zones_free: u32,
}

impl Space {
    /// Payload bytes of live blobs of a kind.
    pub fn payload_of(&self, kind: BlobKind) -> u64 {
        self.payload[kind as usize - 1]
    }

    /// The whole device.
    pub fn device(&self) -> u64 {
        self.capacity + self.reserved
    }

    /// Bytes of the device that live blobs of a kind take, at most: a payload is padded to pages.
    pub fn taken_by(&self, kind: BlobKind) -> u64 {
        self.payload_of(kind) + self.blobs[kind as usize - 1] * u64::from(PAGE_BYTES)
    }

    /// Bytes of memory that the index needs for live blobs of a kind, at most.
    pub fn index_bytes_of(&self, kind: BlobKind) -> u64 {
        index_bytes(self.blobs[kind as usize - 1], self.payload_of(kind))
    }
}

impl TargetStore {
    /// Opens a formatted target and rebuilds its index from the device.
    pub async fn open(
        device: Rc<dyn BlockDevice>,
        handle: &Handle,
        expected: Option<Identity>,
    ) -> Result<Rc<TargetStore>, StoreError> {
        let (core, recovery) = recovery::open(device, handle, expected).await?;
        core.collect_in_background();
        Ok(Rc::new(TargetStore { core, recovery }))
    }

    pub fn superblock(&self) -> &Superblock {
        &self.core.superblock
    }

    /// What opening found.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.recovery
    }

    /// Stores a blob; durable when answered. Of an id that exists, equal bytes are no error
    /// (and heal a damaged copy), others are refused.
    pub async fn put(
        &self,
        id: BlobId,
        kind: BlobKind,
        owner: Owner,
        geometry: ShardGeometry,
        payload: Bytes,
    ) -> Result<(), StoreError> {
        let max = self.core.superblock.payload_max();
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if length == 0 || length > max {
            return Err(StoreError::PayloadLength { length: payload.len(), max });
        }
        let info = BlobInfo { id, kind, owner, geometry, length };
        if self.is_there(&info, &payload).await? {
            return Ok(());
        }
        let stream = Stream::of(kind, self.core.superblock.zones);
        // Under way from here on: a deletion that comes meanwhile waits for it.
        let admitted = self.admit(info, stream.tier())?;
        let checksums = self.checksums(&payload).await;
        let (reply, answer) = oneshot();
        admitted.submit(stream, Request { item: Item::Put(NewBlob { info, checksums, payload }), reply });
        answer.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Of each page of a payload.
    async fn checksums(&self, payload: &[u8]) -> Rc<[u32]> {
        let mut checksums = Vec::with_capacity(payload.len().div_ceil(PAGE));
        for piece in payload.chunks(WORK_PIECE_BYTES) {
            self.core.handle.work(piece.len()).await;
            crc32c_pages(piece, &mut checksums);
        }
        checksums.into()
    }

    /// Whether the blob is here already and verifies; an error if the id can't take it. When
    /// false, nothing waited since the id was seen to be free (or damaged).
    async fn is_there(&self, info: &BlobInfo, payload: &Bytes) -> Result<bool, StoreError> {
        let id = info.id;
        let mut damaged = None;
        let mut checksums = None;
        loop {
            self.core.check_writable()?;
            let existing = {
                let state = self.core.state.borrow();
                // A put behind a deletion could outlive it.
                if state.tombstones.contains_key(&id) || state.is_being_deleted(id) {
                    return Err(StoreError::Deleted(id));
                }
                match state.index.get(&id) {
                    _ if state.pending.contains(&id) => None,
                    None => return Ok(false),
                    Some(entry) if damaged == Some(entry.place) => return Ok(false),
                    Some(entry) => Some(entry.clone()),
                }
            };
            let Some(entry) = existing else {
                self.core.changed.notified().await;
                continue;
            };
            if planted::is(Bug::StoreReuseId) {
                return Ok(false);
            }
            let Some(checksums) = &checksums else {
                checksums = Some(self.checksums(payload).await);
                continue;
            };
            if entry.info != *info || entry.checksums != *checksums {
                return Err(StoreError::Conflict(id));
            }
            match self.core.get(id, 0, entry.info.length).await {
                Ok(bytes) if bytes == *payload => return Ok(true),
                Ok(_) => return Err(StoreError::Conflict(id)),
                Err(StoreError::NotFound(_)) => {}
                Err(_) => damaged = self.place_of(id),
            }
        }
    }

    fn place_of(&self, id: BlobId) -> Option<crate::state::Place> {
        self.core.state.borrow().index.get(&id).map(|entry| entry.place)
    }

    /// Reserves the space of a put, or refuses it.
    fn admit(&self, info: BlobInfo, tier: Tier) -> Result<Admitted<'_>, StoreError> {
        let capacity = self.core.capacity(tier);
        let mut state = self.core.state.borrow_mut();
        let needed = footprint(info.length);
        if state.used + needed > capacity {
            return Err(StoreError::NoSpace { kind: info.kind, needed });
        }
        state.used += needed;
        state.pending.insert(info.id);
        Ok(Admitted { core: &self.core, info, submitted: false })
    }

    /// A range of a blob. Only the 4 KiB pages it touches are read and verified.
    pub async fn get(&self, id: BlobId, offset: u32, length: u32) -> Result<Bytes, StoreError> {
        self.core.get(id, offset, length).await
    }

    /// Deletes blobs; durable when answered. Unknown ids are no error. Works on a full device. A device
    /// that failed answers so, but serves and lists them no more until it is opened again.
    pub async fn delete(&self, ids: Vec<BlobId>) -> Result<(), StoreError> {
        if let Err(failed) = self.core.check_writable() {
            ids.iter().for_each(|id| self.core.state.borrow_mut().forget_blob(*id));
            return Err(failed);
        }
        let mut present = Vec::new();
        let deleting = Deleting::new(&self.core, ids);
        for id in deleting.ids.iter().copied() {
            // A put that was abandoned by its caller may still be under way.
            while self.core.state.borrow().pending.contains(&id) {
                self.core.changed.notified().await;
                self.core.check_writable()?;
            }
            if self.core.state.borrow().index.contains_key(&id) {
                present.push(id);
            }
        }
        if planted::is(Bug::StoreDropTombstone) {
            present.drain(..).for_each(|id| self.core.state.borrow_mut().forget_blob(id));
        }
        let written = self.core.write_tombstones(Stream::Log, &present).await;
        if self.core.check_writable().is_err() {
            // It failed meanwhile: as above.
            present.iter().for_each(|id| self.core.state.borrow_mut().forget_blob(*id));
        }
        written
    }

    /// Whether a deletion of the blob is under way: it is there yet, and won't be soon.
    pub fn is_being_deleted(&self, id: BlobId) -> bool {
        self.core.state.borrow().is_being_deleted(id)
    }

    pub fn stat(&self, id: BlobId) -> Option<BlobInfo> {
        self.core.state.borrow().index.get(&id).map(|entry| entry.info)
    }

    /// Every blob of a kind, sorted by owner, then id.
    pub fn list(&self, kind: BlobKind) -> Vec<BlobInfo> {
        self.core.state.borrow().list(kind)
    }

    /// Some of the target's shards, and where to go on: a few at a time, for who looks at all of them
    /// while others work. What moves meanwhile may come twice or not at all.
    pub fn shards(&self, from: ShardCursor) -> (Vec<BlobInfo>, Option<ShardCursor>) {
        self.core.state.borrow().shards(from)
    }

    /// Reads and verifies everything live in these zones, yielding, at most as many bytes per second as `pace` says
    /// each time. Hands over what does not verify, or can't be read, as it is found.
    pub async fn scrub(&self, zones: Range<u32>, pace: &dyn Fn() -> u64, found: &dyn Fn(&BlobInfo)) -> Scrubbed {
        self.core.scrub(zones, pace, found).await
    }

    /// Checks what locates the blobs of these zones at the next opening, at no more than so many bytes
    /// per second, and mends it if `mend`. Hands over what was damaged.
    pub async fn check_structures(&self, zones: Range<u32>, mend: bool, pace: &dyn Fn() -> u64, found: &dyn Fn(&Flaw)) {
        self.core.check_structures(zones, mend, pace, found).await;
    }

    /// What the collector found damaged, or could not read, since the last call.
    pub fn take_damaged(&self) -> Vec<BlobInfo> {
        self.core.collector.damaged.take().into_values().collect()
    }

    pub fn space(&self) -> Space {
        let capacity = self.core.capacity(Tier::Ordinary);
        let state = self.core.state.borrow();
        let live = state.used;
        Space {
            capacity,
            live,
            free: capacity.saturating_sub(live),
            reserved: self.core.superblock.device_bytes.saturating_sub(capacity),
            payload: state.live_by_kind,
            blobs: state.blobs_by_kind,
            tombstones: state.tombstones.len() as u64,
            zones_total: self.core.superblock.zones,
            zones_free: state.zones.free_count(),
        }
    }

    /// Zones the collector has freed since the target was opened.
    pub fn zones_collected(&self) -> u64 {
        self.core.collector.freed.get()
    }

    /// Makes `roster` durable here, and keeps to it: copies that say less are mended.
    pub async fn write_roster(&self, roster: &Roster) -> Result<(), StoreError> {
        write_roster(&*self.core.device, &self.core.superblock.identity, roster).await?;
        self.know_roster(roster);
        Ok(())
    }

    /// This roster is here already.
    pub fn know_roster(&self, roster: &Roster) {
        *self.core.roster.borrow_mut() = Some(roster.clone());
    }

    /// What the device says of its own state, if it does.
    pub async fn device_health(&self) -> Option<DeviceHealth> {
        let device = self.core.device.clone();
        let told = device.health().await;
        told.inspect_err(|error| tracing::debug!(%error, "a device does not tell of its health")).ok().flatten()
    }

    /// Looks whether the device is still all there; one that is not takes no more writes.
    pub fn look_at_device(&self) {
        self.core.detached();
    }

    /// Why the device takes no more writes, if so. Reads go on.
    pub fn is_failed(&self) -> Option<String> {
        self.core.failed.borrow().clone()
    }

    /// Refuses new work. Nothing is required for safety: what was answered is durable.
    pub fn close(&self) {
        self.core.closed.set(true);
        self.core.changed.notify_all();
    }
}

/// A put that has its space, until it is queued: who stops waiting before that gives the space back.
struct Admitted<'a> {
    core: &'a Rc<Core>,
    info: BlobInfo,
    submitted: bool,
}

impl Admitted<'_> {
    fn submit(mut self, stream: Stream, request: Request) {
        self.submitted = true;
        self.core.submit(stream, request);
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        if !self.submitted {
            self.core.put_ended(self.info.id, Some(self.info.length));
        }
    }
}

/// A call to delete, from its beginning to its end.
struct Deleting<'a> {
    core: &'a Core,
    ids: Vec<BlobId>,
}

impl<'a> Deleting<'a> {
    fn new(core: &'a Core, ids: Vec<BlobId>) -> Deleting<'a> {
        let mut state = core.state.borrow_mut();
        ids.iter().for_each(|id| state.deletion_begins(*id));
        drop(state);
        Deleting { core, ids }
    }
}

impl Drop for Deleting<'_> {
    fn drop(&mut self) {
        let mut state = self.core.state.borrow_mut();
        self.ids.iter().for_each(|id| state.deletion_ended(*id));
    }
}

impl Drop for TargetStore {
    fn drop(&mut self) {
        self.close();
    }
}
