//! Collected zones are discarded, and what the device makes of that never matters.

mod common;

use bytes::Bytes;
use cfs_device::mem::MemDisk;
use cfs_device::{BlockDevice, DeviceError, DeviceGeometry, DeviceResult, Placement};
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_store::TargetStore;
use cfs_wire::blobs::BlobKind;
use common::crash::live;
use common::*;
use futures_util::future::LocalBoxFuture;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// Four fill a zone of the tests.
const LENGTH: usize = 50_000;
/// A zone without the copies of its header.
const DISCARDED: u64 = ZONE as u64 - 3 * 4096;

async fn put_all(store: &TargetStore, ids: std::ops::RangeInclusive<u128>) {
    for id in ids {
        put(store, id, BlobKind::Data, LENGTH).await.unwrap();
    }
}

/// Blobs 5 to 10 are there and 1 to 4 are not.
async fn expect_the_living(store: &TargetStore, context: &str) {
    assert_eq!(store.recovery().corrupt, vec![], "{context}");
    for id in 1..=4 {
        expect_absent(store, id, context).await;
    }
    for id in 5..=10 {
        expect_blob(store, id, LENGTH, context).await;
    }
}

/// Fills two zones and part of a third, and deletes all of the first.
async fn empty_one_zone(store: &TargetStore, handle: &Handle) {
    put_all(store, 1..=10).await;
    delete(store, &[1, 2, 3, 4]).await.unwrap();
    handle.sleep(Duration::from_secs(1)).await;
    assert_eq!(store.zones_collected(), 1);
}

/// Takes every free zone in turn: each is filled and emptied. Blobs 500 to 504 stay.
async fn turn_over(store: &TargetStore) {
    let before = store.zones_collected();
    for round in 1..=20u128 {
        let first = 20 + 4 * round;
        put_all(store, first..=first + 3).await;
        delete(store, &[first, first + 1, first + 2, first + 3]).await.unwrap();
    }
    assert!(store.zones_collected() - before >= 16, "all were taken");
    put_all(store, 500..=504).await;
}

#[test]
fn a_collected_zone_is_discarded_but_for_its_header_and_nothing_of_it_comes_back() {
    // By the seed the device keeps the bytes, reads zeroes, reads something else, or mixes them.
    for seed in 0..8 {
        run(seed, move |handle| async move {
            let disk = formatted(&handle, 16, seed).await;
            let store = open(&disk, &handle).await;
            empty_one_zone(&store, &handle).await;
            assert_eq!(disk.bytes_discarded(), DISCARDED, "seed {seed}");
            let store = reopen(store, &disk, &handle).await;
            expect_the_living(&store, &format!("seed {seed}")).await;
            turn_over(&store).await;
            let store = reopen(store, &disk, &handle).await;
            expect_the_living(&store, &format!("seed {seed}, reused")).await;
            for id in 500..=504 {
                expect_blob(&store, id, LENGTH, &format!("seed {seed}, reused")).await;
            }
        });
    }
}

#[test]
fn power_is_cut_before_every_write_around_a_discard() {
    let mut after_discard = 0;
    for seed in 0..4 {
        let mut halt = 1;
        loop {
            let (crashed, discarded) = cut_at(seed, halt);
            if !crashed {
                break;
            }
            after_discard += u32::from(discarded);
            halt += 1;
        }
        assert!(halt > 15, "{halt} writes only");
    }
    assert!(after_discard > 10, "{after_discard} cuts after a discard only");
}

/// Whether power was cut, and whether the zone was being discarded or had been.
fn cut_at(seed: u64, halt: u64) -> (bool, bool) {
    run(seed, move |handle| async move {
        let context = format!("seed {seed} halt {halt}");
        let disk = formatted(&handle, 16, seed + 100 * halt).await;
        let store = open(&disk, &handle).await;
        put_all(&store, 1..=10).await;
        drop(store);
        handle.sleep(Duration::from_secs(1)).await;
        let deleted = Rc::new(Cell::new(false));
        let life = {
            let (disk, deleted) = (disk.clone(), deleted.clone());
            move |node: Handle| async move {
                let store = open(&disk, &node).await;
                delete(&store, &[1, 2, 3, 4]).await.unwrap();
                deleted.set(true);
                put_all(&store, 11..=16).await;
            }
        };
        let crashed = live(&handle, &disk, Some(halt), life).await;
        disk.power_cut();
        let discarded = disk.bytes_discarded() > 0;
        for opening in 1..=2 {
            let store = open(&disk, &handle).await;
            if deleted.get() {
                expect_the_living(&store, &context).await;
            }
            assert_eq!(store.recovery().corrupt, vec![], "{context}");
            for id in (1..=16).filter(|id| store.stat(cfs_wire::BlobId(*id)).is_some()) {
                expect_blob(&store, id, LENGTH, &format!("{context}, opening {opening}")).await;
            }
        }
        (crashed, discarded)
    })
}

/// A disk that is not to be discarded, or refuses it when asked.
struct Keeping {
    device: Rc<dyn BlockDevice>,
    discards: bool,
    asked: Cell<u32>,
}

impl BlockDevice for Keeping {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn geometry(&self) -> DeviceGeometry {
        DeviceGeometry { discards: self.discards, ..self.device.geometry() }
    }

    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        self.device.read(offset, length)
    }

    fn write(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.write(offset, parts, placement, fua)
    }

    fn flush(&self) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.asked.set(self.asked.get() + 1);
        let (device, detail) = (self.name().to_owned(), "refused".to_owned());
        Box::pin(async move { Err(DeviceError::Io { device, operation: "discard", offset, length, detail }) })
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.settle(offset, length)
    }
}

/// The twin of the first test, and a device that lies about what it can do: it is asked once, and
/// everything else goes on.
#[test]
fn a_device_that_is_not_to_be_discarded_is_not_and_one_that_refuses_is_asked_once() {
    for discards in [false, true] {
        run(1, move |handle| async move {
            let disk: Rc<MemDisk> = formatted(&handle, 16, 1).await;
            let device = Rc::new(Keeping { device: disk.open(&handle), discards, asked: Cell::new(0) });
            let store = TargetStore::open(device.clone(), &handle, Some(identity())).await.unwrap();
            empty_one_zone(&store, &handle).await;
            turn_over(&store).await;
            assert_eq!((device.asked.get(), disk.bytes_discarded()), (u32::from(discards), 0));
            expect_the_living(&store, "not discarded").await;
        });
    }
}
