//! Set-up shared by the store's tests: a simulated executor, small formatted disks, blobs whose
//! bytes follow from their id.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod crash;

use bytes::Bytes;
use cfs_device::BlockDevice;
use cfs_device::mem::MemDisk;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_store::{FormatOptions, Identity, StoreError, TargetStore};
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner, ShardGeometry};
use cfs_wire::{BlobId, ClusterId, DeviceId, NodeId, TargetId};
use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;

pub const AREA: u64 = 1 << 20;
pub const ZONE: u32 = 256 << 10;
pub const PAGE: u32 = 4096;
/// Where appends start in a zone.
pub const FIRST: u32 = 2 * PAGE;

/// A place in a zone, on the device.
pub fn at(zone: u32, offset: u32) -> u64 {
    AREA + u64::from(zone) * u64::from(ZONE) + u64::from(offset)
}

/// The first two copies of a zone's header.
pub fn header_range(zone: u32) -> Range<u64> {
    at(zone, 0)..at(zone, FIRST)
}

/// A zone's footer, or the third copy of its header.
pub fn footer_range(zone: u32) -> Range<u64> {
    at(zone, ZONE - PAGE)..at(zone + 1, 0)
}

/// Runs one story to its end on virtual time.
pub fn run<T: 'static, F: Future<Output = T> + 'static>(seed: u64, story: impl FnOnce(Handle) -> F) -> T {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let main = story(handle.clone());
    executor.run_simulated(&handle, main).expect("no deadlock").expect("not cancelled")
}

pub fn identity() -> Identity {
    Identity { cluster: ClusterId(0xC1), node: NodeId(1), target: TargetId(2), device: DeviceId(0xDE) }
}

pub fn parameters() -> cfs_wire::cluster::ClusterParameters {
    cfs_wire::cluster::ClusterParameters {
        format: cfs_wire::cluster::ClusterParameters::FORMAT,
        shards: 8,
        policy: cfs_wire::Policy::new(2, 1).unwrap(),
        tolerated: 1,
        targets: 3,
        name_key: [5; 32],
    }
}

pub fn options() -> FormatOptions {
    FormatOptions { identity: identity(), parameters: parameters(), zone_bytes: Some(ZONE), force: false }
}

pub fn disk(zones: u32, seed: u64) -> Rc<MemDisk> {
    MemDisk::new("test", AREA + u64::from(zones) * u64::from(ZONE), 512, seed)
}

pub async fn formatted(handle: &Handle, zones: u32, seed: u64) -> Rc<MemDisk> {
    let disk = disk(zones, seed);
    cfs_store::format(&*disk.open(handle), &options()).await.expect("formats");
    disk
}

pub async fn open(disk: &Rc<MemDisk>, handle: &Handle) -> Rc<TargetStore> {
    try_open(disk, handle).await.expect("opens")
}

/// Closes the store, lets what is under way end, and opens it again.
pub async fn reopen(store: Rc<TargetStore>, disk: &Rc<MemDisk>, handle: &Handle) -> Rc<TargetStore> {
    drop(store);
    handle.sleep(std::time::Duration::from_secs(1)).await;
    open(disk, handle).await
}

pub async fn try_open(disk: &Rc<MemDisk>, handle: &Handle) -> Result<Rc<TargetStore>, StoreError> {
    TargetStore::open(disk.open(handle), handle, Some(identity())).await
}

/// Bytes that follow from the id, so that wrong ones are noticed anywhere.
pub fn payload(id: u128, length: usize) -> Bytes {
    let mut random = SplitMix64::new(id as u64 ^ 0xB10B);
    let mut buffer = DmaBuf::uninitialised(length);
    for chunk in buffer.chunks_mut(8) {
        chunk.copy_from_slice(&random.next_u64().to_le_bytes()[..chunk.len()]);
    }
    buffer.freeze()
}

pub fn owner(id: u128) -> Owner {
    Owner { high: (id % 7) as u64, low: (id % 1000) as u64 }
}

pub fn info(id: u128, kind: BlobKind, length: usize) -> BlobInfo {
    BlobInfo { id: BlobId(id), kind, owner: owner(id), geometry: ShardGeometry::NONE, length: length as u32 }
}

pub async fn put(store: &TargetStore, id: u128, kind: BlobKind, length: usize) -> Result<(), StoreError> {
    store.put(BlobId(id), kind, owner(id), ShardGeometry::NONE, payload(id, length)).await
}

pub async fn delete(store: &TargetStore, ids: &[u128]) -> Result<(), StoreError> {
    store.delete(ids.iter().copied().map(BlobId).collect()).await
}

/// Fills zone 0 of an empty store with blobs 1 to 3, deletes them, and loses the writes in `lost`
/// while the zone is emptied; then puts blobs of 60,000 bytes until two are in the zone: which.
pub async fn use_zone_0_again(
    store: &TargetStore,
    disk: &Rc<MemDisk>,
    handle: &Handle,
    lost: Vec<Range<u64>>,
) -> [u128; 2] {
    for id in 1..=4 {
        put(store, id, BlobKind::Data, 60_000).await.unwrap();
    }
    let faults = disk.faults_injected() + lost.len() as u64;
    disk.lose_writes(lost);
    delete(store, &[1, 2, 3]).await.unwrap();
    handle.sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!((store.zones_collected(), disk.faults_injected()), (1, faults));
    disk.lose_writes(vec![]);
    let device = disk.open(handle);
    let before = device.read(at(0, FIRST), PAGE as usize).await.unwrap();
    for id in 10..100 {
        put(store, id, BlobKind::Data, 60_000).await.unwrap();
        if device.read(at(0, FIRST), PAGE as usize).await.unwrap()[..] != before[..] {
            put(store, id + 1, BlobKind::Data, 60_000).await.unwrap();
            return [id, id + 1];
        }
        delete(store, &[id]).await.unwrap();
    }
    panic!("zone 0 is not used again");
}

/// What a scrub finds damaged.
pub async fn scrubbed(store: &TargetStore) -> Vec<BlobInfo> {
    let found = RefCell::new(Vec::new());
    let scrubbed = store.scrub(0..u32::MAX, &|| u64::MAX, &|info| found.borrow_mut().push(*info)).await;
    let found = found.take();
    assert_eq!(scrubbed.damaged, found.len() as u64);
    found
}

/// The whole blob must be there and equal.
pub async fn expect_blob(store: &TargetStore, id: u128, length: usize, context: &str) {
    let bytes = store.get(BlobId(id), 0, length as u32).await;
    let bytes = bytes.unwrap_or_else(|error| panic!("{context}: blob {id:x}: {error}"));
    assert!(bytes == payload(id, length), "{context}: blob {id:x} has other bytes");
}

pub async fn expect_absent(store: &TargetStore, id: u128, context: &str) {
    assert_eq!(store.stat(BlobId(id)), None, "{context}: blob {id:x}");
    assert_eq!(store.get(BlobId(id), 0, 1).await, Err(StoreError::NotFound(BlobId(id))), "{context}");
}
