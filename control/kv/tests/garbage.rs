//! What is deleted gives its bytes back, however often and from whichever level.

mod common;

use bytes::Bytes;
use cfs_kv::testing::MemMedium;
use cfs_kv::{Batch, BlockCache, Kv, KvConfig};
use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use common::{GROUP, mark};
use std::rc::Rc;

const ROWS: u64 = 400;
const VALUE_BYTES: usize = 1000;

fn simulate(story: impl AsyncFnOnce(Rc<MemMedium>, Handle) + 'static) {
    let executor = Executor::new(Rc::new(SimClock::new(7)));
    let handle = executor.domain();
    let node = handle.clone();
    executor.run_simulated(&handle, async move { story(MemMedium::new(7), node).await }).unwrap().unwrap();
}

/// A hundredth of the default sizes. `garbage_bytes_min` of `u64::MAX` is the store that merges
/// only because of sizes: the twin.
fn config(garbage_bytes_min: u64) -> KvConfig {
    KvConfig {
        memtable_bytes_max: 80 << 10,
        table_bytes_max: 16 << 10,
        level_bytes: 640 << 10,
        garbage_bytes_min,
        cache: BlockCache::new(1 << 20),
        ..KvConfig::default()
    }
}

async fn change(kv: &Kv, number: &mut u64, batch: Batch) {
    *number += 1;
    kv.write(batch, mark(*number));
    kv.admit().await.unwrap();
    if kv.should_checkpoint() {
        kv.checkpoint().await.unwrap();
    }
}

/// Writes and deletes all rows; answers the bytes on the medium when they are gone.
async fn round(kv: &Kv, medium: &MemMedium, number: &mut u64) -> u64 {
    for row in 0..ROWS {
        let mut batch = Batch::new();
        batch.put(format!("row/{row}"), Bytes::from(vec![row as u8; VALUE_BYTES]));
        change(kv, number, batch).await;
    }
    for row in 0..ROWS {
        let mut batch = Batch::new();
        batch.delete(format!("row/{row}"));
        change(kv, number, batch).await;
    }
    kv.checkpoint().await.unwrap();
    kv.settle().await;
    medium.bytes()
}

async fn rounds(medium: Rc<MemMedium>, node: &Handle, garbage_bytes_min: u64, count: usize) -> Vec<u64> {
    let kv = Kv::open(medium.open(node), node, GROUP, config(garbage_bytes_min)).await.unwrap();
    let mut left = Vec::new();
    let mut number = 0;
    for _ in 0..count {
        left.push(round(&kv, &medium, &mut number).await);
    }
    kv.close().await;
    left
}

#[test]
fn twenty_rounds_of_filling_and_emptying_leave_no_more_than_the_first() {
    simulate(async |medium, node| {
        let left = rounds(medium, &node, 650, 20).await;
        // Only the manifest: no table is left.
        assert!(left.iter().all(|bytes| *bytes < 100), "{left:?}");
    });
}

#[test]
fn a_store_that_merges_only_by_number_and_size_keeps_what_was_deleted() {
    simulate(async |medium, node| {
        let left = rounds(medium, &node, u64::MAX, 3).await;
        assert!(left[0] > ROWS * VALUE_BYTES as u64 / 4, "{left:?}");
    });
}

/// Fills level 2, then deletes everything.
async fn emptied_from_below(medium: Rc<MemMedium>, node: &Handle, garbage_bytes_min: u64) -> (u64, u64) {
    let kv = Kv::open(medium.open(node), node, GROUP, config(garbage_bytes_min)).await.unwrap();
    let mut number = 0;
    for row in 0..3000 {
        let mut batch = Batch::new();
        batch.put(format!("row/{row}"), Bytes::from(vec![row as u8; VALUE_BYTES]));
        change(&kv, &mut number, batch).await;
    }
    kv.checkpoint().await.unwrap();
    kv.settle().await;
    assert!(kv.stats().level_bytes.len() > 1, "{:?}", kv.stats());
    let full = medium.bytes();
    for row in 0..3000 {
        let mut batch = Batch::new();
        batch.delete(format!("row/{row}"));
        change(&kv, &mut number, batch).await;
    }
    kv.checkpoint().await.unwrap();
    kv.settle().await;
    kv.close().await;
    (full, medium.bytes())
}

#[test]
fn deletions_in_an_upper_level_reach_the_rows_below() {
    simulate(async |medium, node| {
        let (full, empty) = emptied_from_below(medium, &node, 650).await;
        assert!(full > 3000 * VALUE_BYTES as u64 && empty < 2000, "{empty} of {full} bytes left");
    });
}

#[test]
fn without_that_rule_the_rows_stay_below() {
    simulate(async |medium, node| {
        let (full, empty) = emptied_from_below(medium, &node, u64::MAX).await;
        assert!(empty > full / 2, "{empty} of {full} bytes left: the test above proves nothing");
    });
}
