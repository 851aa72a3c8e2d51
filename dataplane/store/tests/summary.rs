//! Sealed zones are known from their summaries; a summary that can't be believed costs a scan.

mod common;

use cfs_device::mem::MemDisk;
use cfs_device::{BlockDevice, Placement};
use cfs_reactor::Handle;
use cfs_store::layout::summary::ZoneFooter;
use cfs_store::{Damage, FormatOptions, TargetStore};
use cfs_wire::ZoneNo;
use cfs_wire::blobs::BlobKind;
use common::*;
use std::rc::Rc;
use std::time::Duration;

const PAGE: usize = 4096;
/// Four fill a zone of the tests.
const LENGTH: usize = 50_000;
/// Header page and payload of one of them.
const EXTENT: u64 = 14 * PAGE as u64;
/// A summary of four such records takes one page before the footer.
const SUMMARY: u64 = ZONE as u64 - 2 * PAGE as u64;

/// Byte offset of a place in a zone.
fn at(zone: u64, offset: u64) -> u64 {
    AREA + zone * u64::from(ZONE) + offset
}

/// Zones 0 and 1 sealed, zone 2 open; blobs 1 to 10 in order.
async fn filled(handle: &Handle, seed: u64) -> (Rc<MemDisk>, Rc<TargetStore>) {
    let disk = formatted(handle, 16, seed).await;
    let store = open(&disk, handle).await;
    for id in 1..=10 {
        put(&store, id, BlobKind::Data, LENGTH).await.unwrap();
    }
    handle.sleep(Duration::from_secs(1)).await;
    (disk, store)
}

async fn expect_all(store: &TargetStore, context: &str) {
    for id in 1..=10 {
        expect_blob(store, id, LENGTH, context).await;
    }
}

#[test]
fn a_sealed_zone_is_known_without_its_headers() {
    run(1, |handle| async move {
        let (disk, store) = filled(&handle, 1).await;
        // The headers of the first two appends of zone 0.
        disk.corrupt(at(0, 2 * PAGE as u64), PAGE, 1);
        disk.corrupt(at(0, 2 * PAGE as u64 + EXTENT), PAGE, 2);
        let store = reopen(store, &disk, &handle).await;
        assert_eq!((store.recovery().summaries, &store.recovery().corrupt), (2, &vec![]));
        expect_all(&store, "headers gone").await;
    });
}

#[test]
fn a_damaged_summary_is_reported_costs_a_scan_and_is_written_again() {
    run(2, |handle| async move {
        let (disk, store) = filled(&handle, 2).await;
        disk.corrupt(at(0, SUMMARY + 60), 1, 1);
        let store = reopen(store, &disk, &handle).await;
        let damage: Vec<_> = store.recovery().corrupt.iter().map(|region| (region.zone, region.damage)).collect();
        assert_eq!((store.recovery().summaries, damage), (1, vec![(ZoneNo(0), Damage::Summary)]));
        expect_all(&store, "summary gone").await;
        let store = reopen(store, &disk, &handle).await;
        assert_eq!((store.recovery().summaries, &store.recovery().corrupt), (2, &vec![]));
        expect_all(&store, "written again").await;
    });
}

/// The footer of a zone, if one is there.
async fn footer(disk: &Rc<MemDisk>, handle: &Handle, zone: u64) -> Option<ZoneFooter> {
    let page = disk.open(handle).read(at(zone, SUMMARY) + PAGE as u64, PAGE).await.unwrap();
    ZoneFooter::decode(&page).ok()
}

/// Nobody was told yet that the summary is durable, so it may be torn: nothing is damaged.
#[test]
fn a_summary_torn_by_a_power_cut_is_no_damage_and_is_written_again() {
    let mut torn = 0;
    for seed in 0..120 {
        torn += run(seed, move |handle| async move {
            let disk = formatted(&handle, 16, seed).await;
            let life = |node: Handle| {
                let disk = disk.clone();
                async move {
                    let store = open(&disk, &node).await;
                    for id in 1..=4 {
                        put(&store, id, BlobKind::Data, LENGTH).await.unwrap();
                    }
                    let halt = 1 + seed % 4;
                    disk.halt_after(Some(halt), None);
                    put(&store, 5, BlobKind::Data, LENGTH).await.unwrap();
                }
            };
            let node = handle.new_domain();
            node.spawn(life(node.clone()));
            handle.sleep(Duration::from_secs(1)).await;
            node.kill();
            disk.power_cut();
            let summary = disk.open(&handle).read(at(0, SUMMARY), PAGE).await.unwrap();
            let footer = footer(&disk, &handle, 0).await;
            let torn = footer.is_some_and(|footer| footer.decode_summary(&summary).is_err());
            for _ in 0..2 {
                let store = open(&disk, &handle).await;
                assert_eq!(store.recovery().corrupt, vec![], "seed {seed}");
                for id in 1..=4 {
                    expect_blob(&store, id, LENGTH, &format!("seed {seed}")).await;
                }
            }
            let store = open(&disk, &handle).await;
            assert!(!torn || store.recovery().summaries == 1, "seed {seed}");
            u32::from(torn)
        });
    }
    assert!(torn > 0, "no footer without its summary was seen");
}

#[test]
fn an_opening_reads_of_a_sealed_zone_its_two_ends_only() {
    run(6, |handle| async move {
        let (disk, store) = filled(&handle, 6).await;
        drop(store);
        handle.sleep(Duration::from_secs(1)).await;
        let reads_to_open = async |disk: Rc<MemDisk>| {
            let before = disk.reads().0;
            let store = open(&disk, &handle).await;
            expect_all(&store, "opened").await;
            disk.reads().0 - before
        };
        let damaged = disk.snapshot();
        for zone in 0..16 {
            if footer(&damaged, &handle, zone).await.is_some() {
                damaged.corrupt(at(zone, SUMMARY), 1, 1);
            }
        }
        // The read of a zone's header covers the header of its first append, of four.
        assert_eq!(reads_to_open(damaged).await - reads_to_open(disk).await, 2 * 3);
    });
}

/// The end of a zone of many small appends, page by page.
#[test]
fn damage_in_any_page_of_a_long_summary_costs_a_scan_that_finds_the_same() {
    const ZONE: u32 = 4 << 20;
    const COUNT: u128 = 600;
    run(7, |handle| async move {
        let disk = MemDisk::new("test", AREA + 12 * u64::from(ZONE), 512, 7);
        let options = FormatOptions { zone_bytes: Some(ZONE), ..options() };
        cfs_store::format(&*disk.open(&handle), &options).await.unwrap();
        let store = open(&disk, &handle).await;
        for id in 1..=COUNT {
            put(&store, id, BlobKind::Data, 4000).await.unwrap();
        }
        delete(&store, &[3, 300]).await.unwrap();
        drop(store);
        handle.sleep(Duration::from_secs(1)).await;

        let footer = AREA + u64::from(ZONE) - PAGE as u64;
        let page = disk.open(&handle).read(footer, PAGE).await.unwrap();
        let pages = ZoneFooter::decode(&page).unwrap().length.div_ceil(PAGE as u32);
        assert!(pages >= 10, "{pages} pages");
        let before = disk.reads().1;
        let store = open(&disk, &handle).await;
        let (blobs, clean) = (store.list(BlobKind::Data), disk.reads().1 - before);
        assert_eq!((blobs.len() as u128, store.recovery().summaries), (COUNT - 2, 1));
        drop(store);
        // 0 is the footer itself.
        for back in 0..=u64::from(pages) {
            let disk = disk.snapshot();
            disk.corrupt(footer - back * PAGE as u64 + 100, 1, back);
            let before = disk.reads().1;
            let store = open(&disk, &handle).await;
            let more = disk.reads().1 - before - clean;
            assert!(more > u64::from(ZONE) / 4 * 3, "page {back} before the footer: {more} bytes more");
            let damage: Vec<Damage> = store.recovery().corrupt.iter().map(|region| region.damage).collect();
            let expected = if back == 0 { Damage::ZoneFooter } else { Damage::Summary };
            assert_eq!((damage, store.recovery().summaries), (vec![expected], 0), "page {back} before the footer");
            assert!(store.list(BlobKind::Data) == blobs, "page {back} before the footer: another index");
            for id in [1, 2, 4, 299, 301, COUNT] {
                expect_blob(&store, id, 4000, "scanned").await;
            }
        }
    });
}

/// The twin of the first test: without the summary the headers are all there is.
#[test]
fn with_summary_and_header_gone_the_blob_is_missing_and_said_to_be_at_every_opening() {
    run(3, |handle| async move {
        let (disk, mut store) = filled(&handle, 3).await;
        disk.corrupt(at(0, SUMMARY + 60), 1, 1);
        disk.corrupt(at(0, 2 * PAGE as u64 + EXTENT), PAGE, 2);
        for _ in 0..2 {
            store = reopen(store, &disk, &handle).await;
            let found = |damage| store.recovery().corrupt.iter().any(|region| region.damage == damage);
            assert!(found(Damage::Appends), "{:?}", store.recovery());
            expect_absent(&store, 2, "lost").await;
            expect_blob(&store, 1, LENGTH, "before it").await;
            expect_blob(&store, 3, LENGTH, "behind it").await;
        }
    });
}

#[test]
fn a_summary_of_an_earlier_generation_is_not_believed() {
    run(4, |handle| async move {
        let (disk, store) = filled(&handle, 4).await;
        let device = disk.open(&handle);
        let old = device.read(at(0, SUMMARY), 2 * PAGE).await.unwrap().freeze();
        delete(&store, &[1, 2, 3, 4]).await.unwrap();
        handle.sleep(Duration::from_secs(1)).await;
        assert!(store.zones_collected() > 0, "zone 0 was reset");
        drop(store);
        handle.sleep(Duration::from_secs(1)).await;
        // As if the end of the zone had never been overwritten, which it need not be.
        device.write(at(0, SUMMARY), vec![old], Placement::Data, true).await.unwrap();
        let store = open(&disk, &handle).await;
        assert_eq!(store.recovery().corrupt, vec![]);
        for id in 1..=4 {
            expect_absent(&store, id, "of the earlier generation").await;
        }
        for id in 5..=10 {
            expect_blob(&store, id, LENGTH, "still there").await;
        }
    });
}
