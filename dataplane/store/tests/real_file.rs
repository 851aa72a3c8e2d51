//! The same verbs on a real file, through io_uring and O_DIRECT.

mod common;

use cfs_device::BlockDevice;
use cfs_device::uring::{OpenOptions, UringDevice};
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_store::{FormatOptions, TargetStore, format};
use cfs_wire::blobs::BlobKind;
use common::*;
use std::os::unix::fs::MetadataExt;
use std::rc::Rc;
use std::time::Duration;

#[test]
fn blobs_written_to_a_file_are_there_when_it_is_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("target");
    for life in 0..3u128 {
        let ring = Ring::new(64).unwrap();
        let executor = Executor::new(Rc::new(KernelClock::new()));
        let handle = executor.domain();
        let main = handle.clone();
        let (path, ring_of_story) = (path.clone(), ring.clone());
        let story = async move {
            let create_size = (life == 0).then_some(64 << 20);
            let opening = OpenOptions { create_size, ..OpenOptions::default() };
            let device = UringDevice::open(&path, &ring_of_story, &main, opening).unwrap();
            if life == 0 {
                let formatting = FormatOptions { zone_bytes: Some(4 << 20), ..options() };
                format(&*device, &formatting).await.unwrap();
            }
            let store = TargetStore::open(device, &main, Some(identity())).await.unwrap();
            assert_eq!(store.recovery().corrupt, vec![]);
            for id in 1..=life * 12 {
                expect_blob(&store, id, 1 + id as usize * 25_000, "earlier life").await;
            }
            let puts = (life * 12 + 1..=life * 12 + 12).map(|id| {
                let store = store.clone();
                main.spawn(async move { put(&store, id, BlobKind::Data, 1 + id as usize * 25_000).await })
            });
            for put in puts.collect::<Vec<_>>() {
                put.await.unwrap().unwrap();
            }
            assert_eq!(scrubbed(&store).await, vec![]);
        };
        executor.run(&mut ring.driver(), Duration::ZERO, &handle, story).unwrap();
    }
}

/// Holes in the file would be anybody's space, and a write there could find the disk full.
#[test]
fn a_collected_zone_of_a_file_keeps_its_place_on_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("target");
    let ring = Ring::new(64).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let main = handle.clone();
    let ring_of_story = ring.clone();
    let story = async move {
        let size = AREA + 16 * u64::from(ZONE);
        let allocated = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let opening = OpenOptions { create_size: Some(size), ..OpenOptions::default() };
        let device = UringDevice::open(&path, &ring_of_story, &main, opening).unwrap();
        format(&*device, &options()).await.unwrap();
        let store = TargetStore::open(device.clone(), &main, Some(identity())).await.unwrap();
        for id in 1..=10 {
            put(&store, id, BlobKind::Data, 50_000).await.unwrap();
        }
        delete(&store, &[1, 2, 3, 4]).await.unwrap();
        while store.zones_collected() == 0 {
            main.yield_now().await;
        }
        assert!(allocated() >= size);
        // The twin: it would be noticed.
        device.discard(AREA, ZONE.into()).await.unwrap();
        assert!(allocated() < size);
    };
    executor.run(&mut ring.driver(), Duration::ZERO, &handle, story).unwrap();
}
