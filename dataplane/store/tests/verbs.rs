//! The verbs on a healthy device, and what they refuse.

mod common;

use cfs_device::BlockDevice;
use cfs_store::{FormatOptions, Identity, Scrubbed, StoreError, TargetStore, format, probe};
use cfs_wire::blobs::{BlobKind, Owner, ShardGeometry};
use cfs_wire::{BlobId, TargetId};
use common::*;

#[test]
fn a_blob_comes_back_whole_and_in_ranges_before_and_after_a_restart() {
    run(1, |handle| async move {
        let disk = formatted(&handle, 16, 1).await;
        let store = open(&disk, &handle).await;
        let lengths = [1, 511, 4095, 4096, 4097, 70_000, 131_072];
        for (id, length) in (1..).zip(lengths) {
            put(&store, id, BlobKind::Data, length).await.unwrap();
        }
        for round in ["before", "after"] {
            let store = if round == "before" { store.clone() } else { open(&disk, &handle).await };
            for (id, length) in (1..).zip(lengths) {
                expect_blob(&store, id, length, round).await;
                assert_eq!(store.stat(BlobId(id)), Some(info(id, BlobKind::Data, length)));
                let (from, to) = (length / 3, length - length / 4);
                let part = store.get(BlobId(id), from as u32, (to - from) as u32).await.unwrap();
                assert_eq!(part, payload(id, length).slice(from..to), "{round} {id}");
            }
            assert_eq!(store.get(BlobId(1), 0, 0).await.unwrap().len(), 0);
            let beyond = StoreError::OutOfRange { id: BlobId(2), offset: 500, length: 12, size: 511 };
            assert_eq!(store.get(BlobId(2), 500, 12).await, Err(beyond));
            let overflow = StoreError::OutOfRange { id: BlobId(2), offset: u32::MAX, length: 2, size: 511 };
            assert_eq!(store.get(BlobId(2), u32::MAX, 2).await, Err(overflow));
            let mut expected: Vec<_> =
                (1..).zip(lengths).map(|(id, length)| info(id, BlobKind::Data, length)).collect();
            expected.sort_by_key(|blob| (blob.owner, blob.id));
            assert_eq!(store.list(BlobKind::Data), expected, "{round}");
            assert_eq!(store.list(BlobKind::Log), vec![]);
        }
    });
}

#[test]
fn an_id_takes_equal_bytes_again_and_refuses_others() {
    run(2, |handle| async move {
        let disk = formatted(&handle, 16, 2).await;
        let store = open(&disk, &handle).await;
        put(&store, 5, BlobKind::Hot, 5000).await.unwrap();
        put(&store, 5, BlobKind::Hot, 5000).await.unwrap();
        let other = store.put(BlobId(5), BlobKind::Hot, owner(5), ShardGeometry::NONE, payload(6, 5000)).await;
        assert_eq!(other, Err(StoreError::Conflict(BlobId(5))));
        let owner = store.put(BlobId(5), BlobKind::Hot, Owner::default(), ShardGeometry::NONE, payload(5, 5000)).await;
        assert_eq!(owner, Err(StoreError::Conflict(BlobId(5))));
        assert_eq!(put(&store, 5, BlobKind::Hot, 4999).await, Err(StoreError::Conflict(BlobId(5))));
        expect_blob(&store, 5, 5000, "after conflicts").await;
        // Two at once: one stores, the other finds it stored.
        let both =
            futures_util::future::join(put(&store, 7, BlobKind::Hot, 100), put(&store, 7, BlobKind::Hot, 100)).await;
        assert_eq!(both, (Ok(()), Ok(())));
        for length in [0, 131_073] {
            let refused = put(&store, 8, BlobKind::Hot, length).await;
            assert_eq!(refused, Err(StoreError::PayloadLength { length, max: 131_072 }));
        }
        store.close();
        assert_eq!(put(&store, 9, BlobKind::Hot, 1).await, Err(StoreError::Closed));
    });
}

#[test]
fn a_deleted_blob_stays_deleted_and_its_id_is_refused() {
    run(3, |handle| async move {
        let disk = formatted(&handle, 16, 3).await;
        let store = open(&disk, &handle).await;
        put(&store, 1, BlobKind::Log, 100).await.unwrap();
        put(&store, 2, BlobKind::Log, 100).await.unwrap();
        delete(&store, &[1, 99]).await.unwrap();
        delete(&store, &[1]).await.unwrap();
        for round in ["before", "after"] {
            let store = if round == "before" { store.clone() } else { open(&disk, &handle).await };
            expect_absent(&store, 1, round).await;
            expect_blob(&store, 2, 100, round).await;
            assert_eq!(put(&store, 1, BlobKind::Log, 100).await, Err(StoreError::Deleted(BlobId(1))), "{round}");
            assert_eq!(store.list(BlobKind::Log), vec![info(2, BlobKind::Log, 100)]);
        }
    });
}

#[test]
fn concurrent_puts_share_appends_and_flushes() {
    const SEEDS: u64 = 40;
    let mut writes = 0;
    for seed in 0..SEEDS {
        writes += run(seed, move |handle| async move {
            let disk = formatted(&handle, 64, seed).await;
            let store = open(&disk, &handle).await;
            let before = disk.write_count();
            let puts = (0..200u128).map(|id| {
                let store = store.clone();
                handle.spawn(async move { put(&store, 1 + id, BlobKind::Hot, 300).await })
            });
            let puts: Vec<_> = puts.collect();
            for put in puts {
                put.await.unwrap().unwrap();
            }
            let writes = disk.write_count() - before;
            for id in 1..=200 {
                expect_blob(&store, id, 300, "grouped").await;
            }
            writes
        });
    }
    // 200 puts alone would be 200 FUA writes.
    assert!(writes < 30 * SEEDS, "{writes} device operations in {SEEDS} runs");
}

#[test]
fn formatting_refuses_what_it_would_destroy_and_names_the_remedy() {
    run(5, |handle| async move {
        let disk = disk(16, 5);
        let device = disk.open(&handle);
        assert_eq!(probe(&*device).await, Ok(None));
        let blank = try_open(&disk, &handle).await.err().unwrap();
        assert!(blank.to_string().starts_with("device test is blank: check the path"), "{blank}");
        // What is known by nothing is not erased either.
        let scrap = cfs_reactor::buffer::DmaBuf::copy_of(&[&[0; 4095][..], &[7]].concat()).freeze();
        for place in [4096, AREA / 2, AREA - 8192] {
            device.write(place, vec![scrap.clone()], cfs_device::Placement::Log, true).await.unwrap();
            let refused = format(&*device, &options()).await;
            assert_eq!(refused, Err(StoreError::Foreign { device: "test".into(), found: None }), "at {place}");
            let zeroes = cfs_reactor::buffer::DmaBuf::zeroed(4096).freeze();
            device.write(place, vec![zeroes], cfs_device::Placement::Log, true).await.unwrap();
        }
        let first = format(&*device, &options()).await.unwrap();
        assert_eq!(probe(&*device).await, Ok(Some(first)));
        assert_eq!((first.zones, first.zone_bytes, first.lanes), (16, ZONE, 64));
        let again = format(&*device, &options()).await;
        assert_eq!(again, Err(StoreError::AlreadyFormatted { device: "test".into(), owner: identity() }));
        // The twin: forced, and nothing of the old store is left, though the device id is the same.
        let store = open(&disk, &handle).await;
        put(&store, 1, BlobKind::Data, 9000).await.unwrap();
        drop(store);
        format(&*device, &FormatOptions { force: true, ..options() }).await.unwrap();
        let store = open(&disk, &handle).await;
        expect_absent(&store, 1, "reformatted").await;
        assert_eq!((store.recovery().blobs, store.recovery().corrupt.len()), (0, 0));
        let expected = Identity { target: TargetId(77), ..identity() };
        let wrong = TargetStore::open(device.clone(), &handle, Some(expected)).await.err().unwrap();
        assert_eq!(wrong, StoreError::WrongIdentity { device: "test".into(), found: identity(), expected });
    });
}

#[test]
fn foreign_newer_and_damaged_superblocks_are_told_apart() {
    run(6, |handle| async move {
        let disk = formatted(&handle, 16, 6).await;
        let device = disk.open(&handle);
        let page = device.read(0, 4096).await.unwrap().to_vec();
        let copies = [0, AREA - 4096];
        let write_both = async |page: &[u8]| {
            for copy in copies {
                let page = cfs_reactor::buffer::DmaBuf::copy_of(page).freeze();
                device.write(copy, vec![page], cfs_device::Placement::Log, true).await.unwrap();
            }
        };
        let mut newer = page.clone();
        newer[8] = 9;
        write_both(&newer).await;
        let error = probe(&*device).await.unwrap_err();
        assert_eq!(error, StoreError::NewerVersion { device: "test".into(), version: 9, supported: 1 });
        assert!(format(&*device, &options()).await.is_err(), "a newer target is not formatted unforced");
        write_both(&[0xEE; 4096]).await;
        assert_eq!(probe(&*device).await, Err(StoreError::Foreign { device: "test".into(), found: None }));
        write_both(&page).await;
        // One damaged copy is no matter, and is repaired; two are an error.
        disk.corrupt(100, 1, 1);
        assert!(probe(&*device).await.unwrap().is_some());
        assert_eq!(open(&disk, &handle).await.recovery().superblock_copies_repaired, 1);
        assert_eq!(device.read(0, 4096).await.unwrap().to_vec(), page);
        disk.corrupt(100, 1, 1);
        disk.corrupt(AREA - 4000, 1, 1);
        assert!(matches!(probe(&*device).await, Err(StoreError::SuperblockCorrupt { .. })));
    });
}

#[test]
fn what_others_formatted_is_recognised_also_behind_blank_superblocks() {
    run(8, |handle| async move {
        for (at, magic, what) in [
            (0x438, &[0x53, 0xEF][..], "an ext2, ext3 or ext4 file system"),
            (0x1_0040, b"_BHRfS_M", "a Btrfs file system"),
            (0x200, b"LABELONE", "an LVM physical volume"),
            (0x2_0000, &[0x0C, 0xB1, 0xBA, 0], "a ZFS pool member"),
        ] {
            let disk = disk(16, 8);
            let device = disk.open(&handle);
            let page = at / 4096 * 4096;
            let mut bytes = vec![0; 4096];
            bytes[at - page..][..magic.len()].copy_from_slice(magic);
            let bytes = cfs_reactor::buffer::DmaBuf::copy_of(&bytes).freeze();
            device.write(page as u64, vec![bytes], cfs_device::Placement::Log, true).await.unwrap();
            let foreign = StoreError::Foreign { device: "test".into(), found: Some(what) };
            assert_eq!(probe(&*device).await, Err(foreign.clone()));
            assert_eq!(format(&*device, &options()).await, Err(foreign));
            format(&*device, &FormatOptions { force: true, ..options() }).await.unwrap();
            assert!(probe(&*device).await.unwrap().is_some());
            if page > 0 {
                let left = device.read(page as u64, 4096).await.unwrap();
                assert!(left.iter().all(|byte| *byte == 0), "{what} would still be found");
            }
        }
    });
}

#[test]
fn scrub_and_reads_find_rot_and_a_put_of_the_same_bytes_heals_it() {
    run(7, |handle| async move {
        let disk = formatted(&handle, 16, 7).await;
        let store = open(&disk, &handle).await;
        for id in 1..=3 {
            put(&store, id, BlobKind::Data, 20_000).await.unwrap();
        }
        let started = handle.now();
        let clean = store.scrub(0..u32::MAX, &|| 20_000, &|info| panic!("{info:?} is sound")).await;
        assert_eq!(clean, Scrubbed { blobs: 3, bytes: 60_000, damaged: 0 });
        assert_eq!((handle.now() - started).as_secs(), 3, "at 20,000 bytes per second");
        let space = store.space();
        // Blob 2 is the second append of the first data zone: header, payload of five pages.
        let page = AREA + 2 * 4096 + 6 * 4096 + 4096 + 2 * 4096;
        disk.corrupt(page + 7, 1, 9);
        let error = store.get(BlobId(2), 8192, 10).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { id: BlobId(2), page: 2, .. }), "{error}");
        // A range read verifies only what it touches.
        assert_eq!(store.get(BlobId(2), 0, 8192).await.unwrap(), payload(2, 20_000).slice(..8192));
        assert_eq!(scrubbed(&store).await, vec![info(2, BlobKind::Data, 20_000)]);
        put(&store, 2, BlobKind::Data, 20_000).await.unwrap();
        expect_blob(&store, 2, 20_000, "healed").await;
        assert_eq!(scrubbed(&store).await, vec![]);
        assert_eq!(store.space(), space, "healing takes no space for good");
        let store = open(&disk, &handle).await;
        expect_blob(&store, 2, 20_000, "healed and reopened").await;
    });
}

#[test]
fn what_a_device_fails_to_delete_is_not_shown_any_more_lest_somebody_copies_it_back() {
    run(8, |handle| async move {
        let disk = formatted(&handle, 16, 8).await;
        let store = open(&disk, &handle).await;
        for id in 1..=3 {
            put(&store, id, BlobKind::Data, 5000).await.unwrap();
        }
        disk.set_faults(cfs_device::mem::Faults { write_error: 1.0, ..Default::default() });
        assert!(matches!(delete(&store, &[1, 2]).await, Err(StoreError::Device(_))));
        disk.set_faults(Default::default());
        expect_absent(&store, 1, "deleted").await;
        expect_absent(&store, 2, "deleted").await;
        assert_eq!(store.list(BlobKind::Data), [info(3, BlobKind::Data, 5000)]);
    });
}

#[test]
fn a_device_that_fails_a_write_is_fenced_but_still_read() {
    run(8, |handle| async move {
        let disk = formatted(&handle, 16, 8).await;
        let store = open(&disk, &handle).await;
        put(&store, 1, BlobKind::Data, 5000).await.unwrap();
        assert_eq!(store.is_failed(), None);
        disk.set_faults(cfs_device::mem::Faults { write_error: 1.0, ..Default::default() });
        assert!(matches!(put(&store, 2, BlobKind::Data, 5000).await, Err(StoreError::Device(_))));
        disk.set_faults(Default::default());
        assert!(store.is_failed().is_some());
        for _ in 0..2 {
            assert!(matches!(put(&store, 3, BlobKind::Data, 5000).await, Err(StoreError::Fenced { .. })));
            expect_blob(&store, 1, 5000, "fenced").await;
        }
        // What is deleted is not named any more, although the device can't be told.
        assert!(matches!(delete(&store, &[1]).await, Err(StoreError::Fenced { .. })));
        expect_absent(&store, 1, "deleted").await;
        assert_eq!(store.list(BlobKind::Data), []);
        // Opened anew, what was answered is there and writes are taken again.
        let store = open(&disk, &handle).await;
        expect_blob(&store, 1, 5000, "reopened").await;
        put(&store, 4, BlobKind::Data, 5000).await.unwrap();
    });
}
