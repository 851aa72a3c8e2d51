//! Opening after something went wrong on the targets.

mod common;

use bytes::Bytes;
use cfs_kv::testing::MemMedium;
use cfs_kv::{Batch, Inventory, Kv, KvError};
use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use cfs_wire::blobs::{BlobKind, MirroredBlobs, Owner};
use common::{GROUP, config, mark};
use std::ops::Bound;
use std::rc::Rc;
use std::time::Duration;

fn simulate(story: impl AsyncFnOnce(Rc<MemMedium>, Handle) + 'static) {
    let executor = Executor::new(Rc::new(SimClock::new(7)));
    let handle = executor.domain();
    let node = handle.clone();
    executor.run_simulated(&handle, async move { story(MemMedium::new(7), node).await }).unwrap().unwrap();
}

async fn open(medium: &Rc<MemMedium>, node: &Handle) -> Result<Rc<Kv>, KvError> {
    Kv::open(medium.open(node), node, GROUP, config()).await
}

async fn put(kv: &Kv, key: &'static str, value: &'static str, number: u64) {
    let mut batch = Batch::new();
    batch.put(key, value);
    kv.write(batch, mark(number));
    assert_eq!(kv.checkpoint().await.unwrap(), mark(number));
}

async fn one_checkpoint(medium: &Rc<MemMedium>, node: &Handle) {
    let kv = open(medium, node).await.unwrap();
    put(&kv, "key", "value", 1).await;
    kv.settle().await;
    kv.close().await;
}

#[test]
fn every_flipped_bit_of_a_manifest_is_an_error_that_names_it() {
    simulate(async |medium, node| {
        one_checkpoint(&medium, &node).await;
        let manifest = medium.list(BlobKind::Manifest)[0];
        for bit in 0..manifest.length as usize * 8 {
            medium.flip_bit(manifest.id, bit);
            let error = open(&medium, &node).await.err().unwrap();
            assert!(error.is_corrupt(), "bit {bit}: {error}");
            assert!(error.to_string().contains(&manifest.id.to_string()), "bit {bit}: {error}");
            medium.flip_bit(manifest.id, bit);
        }
        let kv = open(&medium, &node).await.unwrap();
        assert_eq!(kv.get(b"key").await.unwrap(), Some("value".into()));
    });
}

#[test]
fn flipped_bits_of_a_table_are_errors_or_harmless_but_never_a_panic() {
    simulate(async |medium, node| {
        one_checkpoint(&medium, &node).await;
        let table = medium.list(BlobKind::Run)[0];
        let mut refused = 0;
        for bit in 0..table.length as usize * 8 {
            medium.flip_bit(table.id, bit);
            let kv = open(&medium, &node).await.unwrap();
            let found = kv.get(b"key").await;
            let scanned = kv.scan((Bound::Unbounded, Bound::Unbounded)).collect().await;
            if let Err(error) = &scanned {
                assert!(error.is_corrupt() && error.to_string().contains(&table.id.to_string()), "{error}");
                refused += 1;
            }
            drop((found, kv));
            medium.flip_bit(table.id, bit);
        }
        // The block's own bits are covered by the store's page checksums, all others by ours.
        assert!(refused > table.length as usize * 8 / 2, "{refused} of {} bytes", table.length);
    });
}

#[test]
fn a_manifest_whose_copies_find_no_room_opens_and_gets_them_once_there_is_some() {
    simulate(async |medium, node| {
        one_checkpoint(&medium, &node).await;
        let manifest = medium.list(BlobKind::Manifest)[0];
        medium.refuse_heals(true);
        let kv = open(&medium, &node).await.unwrap();
        assert_eq!(kv.get(b"key").await.unwrap(), Some("value".into()));
        node.sleep(Duration::from_secs(3)).await;
        assert!(!medium.is_healed(manifest.id));
        medium.refuse_heals(false);
        node.sleep(Duration::from_secs(3)).await;
        assert!(medium.is_healed(manifest.id));
    });
}

#[test]
fn a_missing_run_refuses_to_open_and_comes_back() {
    simulate(async |medium, node| {
        one_checkpoint(&medium, &node).await;
        let table = medium.list(BlobKind::Run)[0];
        let away = medium.take_away(table.id).unwrap();
        let error = open(&medium, &node).await.err().unwrap();
        assert!(error.is_corrupt() && error.to_string().contains(&table.id.to_string()), "{error}");
        assert_eq!(medium.list(BlobKind::Manifest).len(), 1, "refusing deletes nothing");
        medium.bring_back(away);
        let kv = open(&medium, &node).await.unwrap();
        assert_eq!(kv.get(b"key").await.unwrap(), Some("value".into()));
    });
}

/// A manifest whose put was not answered is on a target that is away while the store goes on.
#[test]
fn an_unanswered_manifest_that_comes_back_late_is_not_taken() {
    simulate(async |medium, node| {
        let kv = open(&medium, &node).await.unwrap();
        put(&kv, "key", "first", 1).await;
        kv.settle().await;
        // The second checkpoint removes the key's entry only from the manifest's point of view:
        // an empty batch makes no run, so the manifest is complete whatever happens to runs.
        kv.write(Batch::new(), mark(2));
        kv.checkpoint().await.unwrap();
        kv.settle().await;
        kv.close().await;
        let late = medium.list(BlobKind::Manifest)[0];
        let away = medium.take_away(late.id).unwrap();
        // The opening sees the first manifest instead, as if the second had never been answered.
        let first = first_manifest_again(&medium, &node, late.id).await;
        let kv = open(&medium, &node).await.unwrap();
        assert_eq!(kv.applied(), mark(1));
        put(&kv, "key", "second", 3).await;
        kv.settle().await;
        kv.close().await;
        medium.bring_back(away);
        let kv = open(&medium, &node).await.unwrap();
        assert_eq!((kv.applied(), kv.get(b"key").await.unwrap()), (mark(3), Some("second".into())));
        kv.settle().await;
        assert_eq!(medium.list(BlobKind::Manifest).len(), 1, "the late ones are gone: {first} {}", late.id);
    });
}

/// Puts a copy of the manifest `of` that says mark 1 and the version before.
async fn first_manifest_again(medium: &Rc<MemMedium>, node: &Handle, of: cfs_wire::BlobId) -> cfs_wire::BlobId {
    // Built by a second store of the same contents, for the encoder is the crate's own.
    let other = MemMedium::new(99);
    one_checkpoint(&other, node).await;
    let model = other.list(BlobKind::Manifest)[0];
    let bytes = other.open(node).get(model.id, 0, model.length).await.unwrap();
    let blobs = medium.open(node);
    let table = other.list(BlobKind::Run)[0];
    let run = other.open(node).get(table.id, 0, table.length).await.unwrap();
    let id = blobs.put(BlobKind::Run, table.owner, run).await.unwrap();
    let mut bytes = bytes.to_vec();
    let at = bytes.windows(16).position(|window| window == table.id.0.to_le_bytes()).unwrap();
    bytes[at..at + 16].copy_from_slice(&id.0.to_le_bytes());
    let body = bytes.len() - 4;
    let crc = crc_fast::crc32_iscsi(&bytes[..body]);
    bytes[body..].copy_from_slice(&crc.to_le_bytes());
    assert_ne!(of, id);
    blobs.put(BlobKind::Manifest, Owner { high: GROUP, low: model.owner.low }, bytes.into()).await.unwrap()
}

#[test]
fn groups_share_the_targets_without_seeing_each_other() {
    simulate(async |medium, node| {
        let blobs = medium.open(&node);
        for group in 0..5u64 {
            let kv = Kv::open(blobs.clone(), &node, group, config()).await.unwrap();
            let mut batch = Batch::new();
            batch.put("key", format!("of {group}"));
            kv.write(batch, mark(group + 1));
            kv.checkpoint().await.unwrap();
            kv.settle().await;
            kv.close().await;
        }
        let inventory = Inventory::load(&*blobs).await.unwrap();
        assert_eq!(inventory.groups().collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        for group in 0..5u64 {
            let kv = Kv::open_listed(blobs.clone(), &node, group, config(), &inventory).await.unwrap();
            assert_eq!(kv.get(b"key").await.unwrap(), Some(format!("of {group}").into()));
            kv.close().await;
        }
    });
}

#[test]
fn large_values_and_long_keys_survive() {
    simulate(async |medium, node| {
        let kv = Kv::open(medium.open(&node), &node, GROUP, cfs_kv::KvConfig::default()).await.unwrap();
        let value = |number: usize| Bytes::from(vec![number as u8; 128 << 10]);
        let key = |number: usize| Bytes::from(vec![number as u8; if number.is_multiple_of(2) { 1 } else { 4096 }]);
        for number in 0..30 {
            let mut batch = Batch::new();
            batch.put(key(number), value(number));
            batch.put(format!("largest {number}"), vec![1u8; cfs_kv::VALUE_BYTES_MAX]);
            kv.write(batch, mark(number as u64));
        }
        kv.checkpoint().await.unwrap();
        kv.close().await;
        let kv = Kv::open(medium.open(&node), &node, GROUP, cfs_kv::KvConfig::default()).await.unwrap();
        for number in 0..30 {
            assert_eq!(kv.get(&key(number)).await.unwrap(), Some(value(number)));
        }
        let largest = (Bound::Included(Bytes::from("largest")), Bound::Excluded(Bytes::from("largesu")));
        assert_eq!(kv.scan(largest).collect().await.unwrap().len(), 30);
    });
}

#[test]
fn a_restore_refuses_keys_out_of_order_and_an_abandoned_one_changes_nothing() {
    simulate(async |medium, node| {
        one_checkpoint(&medium, &node).await;
        let kv = open(&medium, &node).await.unwrap();
        let mut restore = kv.begin_restore();
        for number in 0..200 {
            restore.push(format!("{number:04}").into(), vec![0u8; 100].into()).await.unwrap();
        }
        assert_eq!(restore.push("0100".into(), "x".into()).await, Err(KvError::Unsorted));
        drop(restore);
        node.sleep(std::time::Duration::from_millis(1)).await;
        kv.settle().await;
        assert_eq!((kv.applied(), kv.get(b"key").await.unwrap()), (mark(1), Some("value".into())));
        assert_eq!(medium.list(BlobKind::Run).len(), 1, "what was written for it is deleted");
    });
}

#[test]
fn who_waits_for_a_checkpoint_that_fails_hears_of_it_and_is_admitted_once_there_is_space() {
    simulate(async |medium, node| {
        let kv = open(&medium, &node).await.unwrap();
        let full = || {
            let mut batch = Batch::new();
            batch.put("key", vec![b'x'; config().memtable_bytes_max]);
            batch
        };
        medium.fail_puts(Some(1));
        kv.write(full(), mark(1));
        let flushing = node.spawn({
            let kv = kv.clone();
            async move { kv.checkpoint().await }
        });
        node.yield_now().await;
        kv.write(full(), mark(2));
        let refused = kv.admit().await.unwrap_err();
        assert!(refused.is_retryable(), "{refused}");
        let failed = flushing.await.unwrap().unwrap_err();
        assert!(failed.is_retryable(), "{failed}");
        medium.fail_puts(None);
        kv.admit().await.unwrap();
        assert_eq!(kv.checkpoint().await.unwrap(), mark(2));
    });
}
