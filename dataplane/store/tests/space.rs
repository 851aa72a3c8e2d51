//! Full devices, the reserve, and space that comes back.

mod common;

use cfs_device::mem::MemDisk;
use cfs_reactor::clock::SplitMix64;
use cfs_store::{FormatOptions, StoreError, TargetStore};
use cfs_wire::blobs::BlobKind;
use common::*;
use std::collections::BTreeMap;

/// Puts until there is no space; what was stored.
async fn fill(store: &TargetStore, kind: BlobKind, length: usize, next: &mut u128) -> Vec<u128> {
    let mut stored = Vec::new();
    loop {
        *next += 1;
        match put(store, *next, kind, length).await {
            Ok(()) => stored.push(*next),
            Err(StoreError::NoSpace { kind: refused, .. }) => {
                assert_eq!(refused, kind);
                return stored;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_full_store_keeps_its_blobs_deletes_and_takes_writes_again() {
    for (seed, length) in [(1, 3000), (2, 4096), (3, 50_000), (4, 131_072)] {
        run(seed, move |handle| async move {
            let disk = formatted(&handle, 16, seed).await;
            let store = open(&disk, &handle).await;
            let mut next = 0;
            let data = fill(&store, BlobKind::Data, length, &mut next).await;
            let space = store.space();
            assert!(space.free < 2 * (length as u64 + 4096), "{space:?}");
            let payload_bytes = data.len() as u64 * (length as u64).next_multiple_of(4096);
            assert!(payload_bytes * 10 > space.capacity * 8, "{payload_bytes} of {space:?}");
            // Metadata goes on into its reserve, until that is full too.
            let log = fill(&store, BlobKind::Log, length, &mut next).await;
            assert!(!log.is_empty());
            let store = reopen(store, &disk, &handle).await;
            assert_eq!(store.recovery().corrupt, vec![]);
            for id in data.iter().chain(&log) {
                expect_blob(&store, *id, length, "full").await;
            }
            // Deletes one at a time are the most expensive way; each must go through.
            for id in data.iter().step_by(2).chain(&log) {
                delete(&store, &[*id]).await.unwrap();
            }
            let again = fill(&store, BlobKind::Data, length, &mut next).await;
            let freed = data.len().div_ceil(2);
            assert!(again.len() + 1 >= freed, "{} of {freed} taken again, length {length}", again.len());
            let store = reopen(store, &disk, &handle).await;
            for id in data.iter().skip(1).step_by(2).chain(&again) {
                expect_blob(&store, *id, length, "refilled").await;
            }
            for id in data.iter().step_by(2).chain(&log) {
                expect_absent(&store, *id, "deleted").await;
            }
        });
    }
}

#[test]
fn twenty_times_full_and_empty_ends_with_the_space_of_the_first_time() {
    run(5, |handle| async move {
        let disk = formatted(&handle, 16, 5).await;
        let mut store = open(&disk, &handle).await;
        let empty = store.space();
        let mut next = 0;
        let mut counts = Vec::new();
        for round in 0..20 {
            let kind = BlobKind::ALL[3 + round % 3];
            let stored = fill(&store, kind, 30_000, &mut next).await;
            counts.push(stored.len());
            for ids in stored.chunks(7) {
                delete(&store, ids).await.unwrap();
            }
            if round % 5 == 4 {
                store = reopen(store, &disk, &handle).await;
            }
            assert_eq!(store.space().free, empty.free, "round {round}");
        }
        assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");
        handle.sleep(std::time::Duration::from_secs(1)).await;
        // All zones but those that are open, and those whose tombstones still guard, are free.
        let space = store.space();
        assert!(space.zones_free + 6 >= space.zones_total, "{space:?}");
        for id in 1..=next {
            expect_absent(&store, id, "empty").await;
        }
    });
}

#[test]
fn the_collector_loses_nothing_under_random_load_close_to_full() {
    for seed in 10..16 {
        run(seed, move |handle| async move {
            let disk = formatted(&handle, 20, seed).await;
            let mut store = open(&disk, &handle).await;
            let mut random = SplitMix64::new(seed);
            let mut alive: BTreeMap<u128, usize> = BTreeMap::new();
            let mut dead = Vec::new();
            let mut collected = 0;
            for step in 1..=600u128 {
                let kind = BlobKind::ALL[random.below(6) as usize];
                let length = 1 + random.below(40_000) as usize;
                match put(&store, step, kind, length).await {
                    Ok(()) => {
                        alive.insert(step, length);
                    }
                    Err(StoreError::NoSpace { .. }) => {}
                    Err(error) => panic!("seed {seed}: {error}"),
                }
                if store.space().free < 150_000 || random.one_in(6) {
                    let index = random.below(alive.len() as u64) as usize;
                    let id = *alive.keys().nth(index).unwrap();
                    delete(&store, &[id]).await.unwrap();
                    alive.remove(&id);
                    dead.push(id);
                }
                if random.one_in(150) {
                    collected += store.zones_collected();
                    store = reopen(store, &disk, &handle).await;
                    assert_eq!(store.recovery().corrupt, vec![], "seed {seed}");
                }
            }
            assert!(collected + store.zones_collected() > 5, "seed {seed}");
            for (id, length) in &alive {
                expect_blob(&store, *id, *length, &format!("seed {seed}")).await;
            }
            for id in dead {
                expect_absent(&store, id, &format!("seed {seed}")).await;
            }
            assert_eq!(scrubbed(&store).await, vec![], "seed {seed}");
        });
    }
}

#[test]
fn a_log_that_turns_over_leaves_no_trail_of_deletions_although_space_is_plenty() {
    run(21, |handle| async move {
        let disk = formatted(&handle, 64, 21).await;
        let store = open(&disk, &handle).await;
        // What outlives the log in a zone of its own, and one beside it whose deletion has to be
        // remembered as long: its record is in a zone of the log.
        put(&store, 1, BlobKind::Data, 50_000).await.unwrap();
        put(&store, 2, BlobKind::Data, 50_000).await.unwrap();
        delete(&store, &[2]).await.unwrap();
        const KEPT: u128 = 40;
        for id in 100..3000 {
            put(&store, id, BlobKind::Log, 3000).await.unwrap();
            if id >= 100 + KEPT {
                delete(&store, &[id - KEPT]).await.unwrap();
            }
            let space = store.space();
            // A zone holds some twenty of the log and as many deletions: three full ones may wait.
            assert!(space.tombstones <= 2 * KEPT as u64, "{id}: {space:?}");
            assert!(space.zones_free + 10 >= space.zones_total, "{id}: {space:?}");
        }
        assert!(store.zones_collected() > 100);
        let store = reopen(store, &disk, &handle).await;
        expect_blob(&store, 1, 50_000, "beside the log").await;
        expect_absent(&store, 2, "beside the log").await;
        for id in 100..3000 - KEPT {
            expect_absent(&store, id, "cut").await;
        }
        for id in 3000 - KEPT..3000 {
            expect_blob(&store, id, 3000, "log").await;
        }
    });
}

#[test]
fn deletions_take_bounded_memory_although_every_zone_holds_something_alive() {
    /// What is remembered of a target with so few zones.
    const TOMBSTONES_MAX: u64 = 64 << 10;
    const BLOBS: u128 = 72_000;
    run(22, |handle| async move {
        let zone_bytes = 4 << 20;
        let disk = MemDisk::new("test", AREA + 140 * u64::from(zone_bytes), 512, 22);
        let options = FormatOptions { zone_bytes: Some(zone_bytes), ..options() };
        cfs_store::format(&*disk.open(&handle), &options).await.unwrap();
        let store = open(&disk, &handle).await;
        let is_kept = |id: &u128| id.is_multiple_of(20);
        for first in (0..BLOBS).step_by(500) {
            let puts = (first..first + 500).map(|id| put(&store, id, BlobKind::Data, 100));
            futures_util::future::try_join_all(puts).await.unwrap();
        }
        let mut most = 0;
        for first in (0..BLOBS).step_by(500) {
            let ids: Vec<u128> = (first..first + 500).filter(|id| !is_kept(id)).collect();
            delete(&store, &ids).await.unwrap();
            most = most.max(store.space().tombstones);
        }
        handle.sleep(std::time::Duration::from_secs(1)).await;
        assert!(most > TOMBSTONES_MAX, "{most}: the bound was not met");
        let space = store.space();
        assert!(space.tombstones <= TOMBSTONES_MAX, "{space:?}");
        assert!(most < TOMBSTONES_MAX + 4000, "{most}: the collector did not keep up");
        let store = reopen(store, &disk, &handle).await;
        for id in (0..BLOBS).filter(is_kept) {
            expect_blob(&store, id, 100, "kept").await;
        }
        assert_eq!(store.space().blobs.iter().sum::<u64>(), BLOBS as u64 / 20);
    });
}
