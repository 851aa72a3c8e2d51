//! Each deliberate bug must be found by the ordinary checks: run with `--features planted`.
#![cfg(feature = "planted")]

mod common;

use cfs_store::StoreError;
use cfs_wire::BlobId;
use cfs_wire::blobs::BlobKind;
use cfs_wire::planted::{self, Bug};
use common::crash::crash_at;
use common::*;
use std::panic::catch_unwind;

/// One of many crash tests: the workload writes about 180 times.
fn crash_once(run: u64) {
    crash_at(1000 + run / 40, 1 + (run * 7) % 180, 60);
}

/// Whether some run of the crash test fails with the bug, within `runs`.
fn found_by_crashes(bug: Bug, runs: u64) -> Option<u64> {
    planted::activate(Some(bug));
    let failed = (0..runs).find(|run| catch_unwind(|| crash_once(*run)).is_err());
    planted::activate(None);
    failed
}

/// Rots one byte of a durable header or payload and asks that it be noticed.
fn rot_is_noticed(seed: u64) {
    run(seed, move |handle| async move {
        let disk = formatted(&handle, 16, seed).await;
        let store = open(&disk, &handle).await;
        for id in 1..=9 {
            put(&store, id, BlobKind::Data, 6000).await.unwrap();
        }
        let append = AREA + 2 * 4096 + (seed % 8) * 3 * 4096;
        disk.corrupt(append + (seed / 8 % 2) * 4096 + 33, 1, seed);
        let store = reopen(store, &disk, &handle).await;
        for id in 1..=9 {
            match store.get(BlobId(id), 0, 6000).await {
                Ok(bytes) => assert!(bytes == payload(id, 6000), "wrong bytes"),
                Err(StoreError::NotFound(_)) => assert!(!store.recovery().corrupt.is_empty(), "lost without a report"),
                Err(error) => assert!(error.is_corrupt(), "{error}"),
            }
        }
    });
}

fn found_by_rot(bug: Bug) -> Option<u64> {
    planted::activate(Some(bug));
    let failed = (0..16).find(|seed| catch_unwind(|| rot_is_noticed(*seed)).is_err());
    planted::activate(None);
    failed
}

/// Puts other bytes under an id that exists.
fn an_id_stands_for_one_blob() {
    run(1, |handle| async move {
        let disk = formatted(&handle, 16, 1).await;
        let store = open(&disk, &handle).await;
        put(&store, 1, BlobKind::Data, 6000).await.unwrap();
        assert_eq!(put(&store, 1, BlobKind::Data, 5999).await, Err(StoreError::Conflict(BlobId(1))));
        assert!(store.get(BlobId(1), 0, 6000).await.unwrap() == payload(1, 6000));
    });
}

/// Loses what is written to a zone's header when the zone is emptied, and asks for what was put there
/// afterwards.
fn a_lost_header_loses_nothing_else() {
    run(1, |handle| async move {
        let disk = formatted(&handle, 16, 1).await;
        let store = open(&disk, &handle).await;
        let lost = vec![header_range(0), footer_range(0)];
        let reused = use_zone_0_again(&store, &disk, &handle, lost).await;
        let store = reopen(store, &disk, &handle).await;
        for id in reused {
            expect_blob(&store, id, 60_000, "put into the zone").await;
        }
        for id in [1, 2, 3] {
            expect_absent(&store, id, "deleted").await;
        }
    });
}

fn found_by_lost_header(bug: Bug) -> Option<u64> {
    planted::activate(Some(bug));
    let failed = catch_unwind(a_lost_header_loses_nothing_else).is_err();
    planted::activate(None);
    failed.then_some(0)
}

fn found_by_reuse(bug: Bug) -> Option<u64> {
    planted::activate(Some(bug));
    let failed = catch_unwind(an_id_stands_for_one_blob).is_err();
    planted::activate(None);
    failed.then_some(0)
}

#[test]
fn every_planted_bug_of_the_store_is_found() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for bug in Bug::ALL.iter().copied().filter(|bug| bug.name().starts_with("Store")) {
        let found = match bug {
            Bug::StoreSkipChecksum | Bug::StoreCorruptionAsTornTail => found_by_rot(bug),
            Bug::StoreReuseId => found_by_reuse(bug),
            Bug::StoreIgnoreNewerGeneration => found_by_lost_header(bug),
            _ => found_by_crashes(bug, 2000),
        };
        println!("{}: {found:?}", bug.name());
        if found.is_none() {
            missed.push(bug.name());
        }
    }
    let _ = std::panic::take_hook();
    assert_eq!(missed, Vec::<&str>::new());
    // The twin: without a bug the same checks find nothing.
    (0..16).for_each(rot_is_noticed);
    an_id_stands_for_one_blob();
    a_lost_header_loses_nothing_else();
    (0..200).for_each(crash_once);
}
