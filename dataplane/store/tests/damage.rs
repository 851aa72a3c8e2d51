//! Torn or corrupt, lost and misdirected writes, damaged headers: reported, never wrong bytes.

mod common;

use cfs_device::mem::{Faults, MemDisk};
use cfs_reactor::clock::SplitMix64;
use cfs_store::{CorruptRegion, Damage, StoreError};
use cfs_wire::blobs::BlobKind;
use cfs_wire::{BlobId, ZoneNo};
use common::crash::{Journal, check, work_until_error};
use common::*;
use std::collections::BTreeMap;
use std::time::Duration;

/// The zone's header is damaged, and known from elsewhere.
fn mended_header(zone: u32) -> CorruptRegion {
    CorruptRegion { zone: ZoneNo(zone), offset: 0, length: FIRST, damage: Damage::ZoneHeader }
}

/// Damages all copies of a zone's header, or the first two and the footer.
fn destroy_header(disk: &MemDisk, zone: u32) {
    disk.corrupt(at(zone, 0), FIRST as usize, 1);
    disk.corrupt(at(zone, ZONE - PAGE) + 200, 4, 1);
}

#[test]
fn a_header_damaged_below_the_durable_mark_is_corruption_and_the_scan_goes_past_it() {
    run(1, |handle| async move {
        let disk = formatted(&handle, 16, 1).await;
        let store = open(&disk, &handle).await;
        for id in 1..=3 {
            put(&store, id, BlobKind::Data, 6000).await.unwrap();
        }
        let extent = 3 * PAGE;
        disk.corrupt(at(0, FIRST + extent + 40), 4, 1);
        let store = reopen(store, &disk, &handle).await;
        let (offset, length) = (FIRST + extent, extent);
        let expected = CorruptRegion { zone: ZoneNo(0), offset, length, damage: Damage::Appends };
        assert_eq!(store.recovery().corrupt, vec![expected]);
        assert_eq!(store.recovery().torn_tails, vec![]);
        expect_blob(&store, 1, 6000, "before the damage").await;
        expect_absent(&store, 2, "the damaged one").await;
        expect_blob(&store, 3, 6000, "behind the damage").await;
        // Written again from redundancy.
        put(&store, 2, BlobKind::Data, 6000).await.unwrap();
        let store = reopen(store, &disk, &handle).await;
        expect_blob(&store, 2, 6000, "repaired").await;
    });
}

#[test]
fn the_last_append_is_a_torn_tail_unless_a_later_mark_says_it_was_durable() {
    for later in [false, true] {
        run(2, move |handle| async move {
            let disk = formatted(&handle, 16, 2).await;
            let store = open(&disk, &handle).await;
            put(&store, 1, BlobKind::Data, 6000).await.unwrap();
            put(&store, 2, BlobKind::Data, 6000).await.unwrap();
            if later {
                // In another stream's zone: its header knows how far the data zone was durable.
                put(&store, 3, BlobKind::Log, 10).await.unwrap();
            }
            let (offset, length) = (FIRST + 3 * PAGE, 3 * PAGE);
            disk.corrupt(at(0, offset + 40), 4, 1);
            let store = reopen(store, &disk, &handle).await;
            let region = CorruptRegion { zone: ZoneNo(0), offset, length, damage: Damage::Appends };
            let report = store.recovery();
            assert_eq!(report.corrupt, if later { vec![region] } else { vec![] });
            assert_eq!(report.torn_tails, if later { vec![] } else { vec![(ZoneNo(0), offset)] });
            expect_blob(&store, 1, 6000, "before").await;
            expect_absent(&store, 2, "damaged").await;
            put(&store, 4, BlobKind::Data, 9000).await.unwrap();
            let store = reopen(store, &disk, &handle).await;
            expect_blob(&store, 4, 9000, "after").await;
            expect_absent(&store, 2, "damaged, second time").await;
        });
    }
}

#[test]
fn a_payload_torn_above_the_mark_is_dropped_and_below_it_kept_and_reported_by_reads() {
    for later in [false, true] {
        run(3, move |handle| async move {
            let disk = formatted(&handle, 16, 3).await;
            let store = open(&disk, &handle).await;
            put(&store, 1, BlobKind::Data, 6000).await.unwrap();
            if later {
                put(&store, 2, BlobKind::Data, 10).await.unwrap();
            }
            disk.corrupt(at(0, FIRST + PAGE + 5), 1, 1);
            let store = reopen(store, &disk, &handle).await;
            assert_eq!(store.recovery().corrupt, vec![]);
            if later {
                assert!(matches!(store.get(BlobId(1), 0, 6000).await, Err(StoreError::Corrupt { page: 0, .. })));
                assert_eq!(store.get(BlobId(1), 4096, 100).await.unwrap(), payload(1, 6000).slice(4096..4196));
            } else {
                assert_eq!(store.recovery().torn_tails, vec![(ZoneNo(0), FIRST)]);
                expect_absent(&store, 1, "torn").await;
                // The leftover header is not taken for a durable one once there are later marks.
                put(&store, 7, BlobKind::Log, 10).await.unwrap();
                let store = reopen(store, &disk, &handle).await;
                expect_absent(&store, 1, "torn, second time").await;
            }
        });
    }
}

#[test]
fn a_torn_append_is_dropped_also_from_a_zone_that_has_damage_before_it() {
    run(10, |handle| async move {
        let disk = formatted(&handle, 16, 10).await;
        let store = open(&disk, &handle).await;
        put(&store, 1, BlobKind::Data, 6000).await.unwrap();
        put(&store, 2, BlobKind::Data, 6000).await.unwrap();
        // In another stream's zone: its header knows that both are durable.
        put(&store, 3, BlobKind::Log, 10).await.unwrap();
        put(&store, 4, BlobKind::Data, 6000).await.unwrap();
        let extent = 3 * PAGE;
        disk.corrupt(at(0, FIRST + 40), 4, 1);
        let torn = FIRST + 2 * extent;
        disk.corrupt(at(0, torn + PAGE + 5), 1, 1);
        let mut store = reopen(store, &disk, &handle).await;
        let region = CorruptRegion { zone: ZoneNo(0), offset: FIRST, length: extent, damage: Damage::Appends };
        assert_eq!(store.recovery().corrupt, vec![region]);
        assert_eq!(store.recovery().torn_tails, vec![(ZoneNo(0), torn)]);
        for context in ["first time", "second time"] {
            expect_absent(&store, 1, context).await;
            expect_blob(&store, 2, 6000, context).await;
            expect_blob(&store, 3, 10, context).await;
            expect_absent(&store, 4, context).await;
            store = reopen(store, &disk, &handle).await;
        }
    });
}

#[test]
fn a_deletion_is_forgotten_with_the_generation_it_guarded_against_also_where_the_header_was_lost() {
    run(11, |handle| async move {
        let disk = formatted(&handle, 16, 11).await;
        let store = open(&disk, &handle).await;
        put(&store, 1, BlobKind::Data, 6000).await.unwrap();
        put(&store, 2, BlobKind::Data, 6000).await.unwrap();
        delete(&store, &[1]).await.unwrap();
        destroy_header(&disk, 0);
        let store = reopen(store, &disk, &handle).await;
        // What the zone holds is not believed, but could be if its header came back.
        assert_eq!(store.space().tombstones, 1);
        let mut next = 10;
        while store.space().tombstones > 0 && put(&store, next, BlobKind::Data, 60_000).await.is_ok() {
            next += 1;
        }
        assert_eq!(store.space().tombstones, 0, "the zone has a new generation, or the target is full");
        let store = reopen(store, &disk, &handle).await;
        expect_absent(&store, 1, "deleted").await;
    });
}

#[test]
fn a_sealed_zone_whose_beginning_is_lost_is_damaged_and_not_empty() {
    run(12, |handle| async move {
        let disk = formatted(&handle, 20, 12).await;
        let store = open(&disk, &handle).await;
        for id in 1..=6 {
            put(&store, id, BlobKind::Data, 60_000).await.unwrap();
        }
        handle.sleep(std::time::Duration::from_secs(1)).await;
        // The newest header does not count the zone among the open ones.
        put(&store, 7, BlobKind::Data, 10).await.unwrap();
        destroy_header(&disk, 0);
        disk.corrupt(at(0, FIRST), PAGE as usize, 1);
        let store = reopen(store, &disk, &handle).await;
        let region = CorruptRegion { zone: ZoneNo(0), offset: 0, length: ZONE, damage: Damage::ZoneHeader };
        assert_eq!(store.recovery().corrupt, vec![region]);
        expect_absent(&store, 1, "voided").await;
        expect_blob(&store, 6, 60_000, "another zone").await;
    });
}

#[test]
fn a_zone_header_is_mended_from_any_copy_and_without_any_the_zone_is_void() {
    run(4, |handle| async move {
        let disk = formatted(&handle, 16, 4).await;
        let store = open(&disk, &handle).await;
        put(&store, 1, BlobKind::Data, 6000).await.unwrap();
        put(&store, 2, BlobKind::Log, 6000).await.unwrap();
        for copy in [0, PAGE, ZONE - PAGE] {
            disk.corrupt(at(0, copy + 50), 1, 1);
            let store = open(&disk, &handle).await;
            assert_eq!(store.recovery().corrupt, vec![]);
            expect_blob(&store, 1, 6000, "one copy damaged").await;
        }
        for expected in [vec![mended_header(0)], vec![]] {
            if !expected.is_empty() {
                disk.corrupt(at(0, 0), FIRST as usize, 1);
            }
            let store = open(&disk, &handle).await;
            assert_eq!(store.recovery().corrupt, expected);
            expect_blob(&store, 1, 6000, "known from the last copy").await;
        }
        destroy_header(&disk, 0);
        let store = reopen(store, &disk, &handle).await;
        let region = CorruptRegion { zone: ZoneNo(0), offset: 0, length: ZONE, damage: Damage::ZoneHeader };
        assert_eq!(store.recovery().corrupt, vec![region]);
        expect_absent(&store, 1, "voided").await;
        expect_blob(&store, 2, 6000, "another zone").await;
        put(&store, 1, BlobKind::Data, 6000).await.unwrap();
        let store = reopen(store, &disk, &handle).await;
        expect_blob(&store, 1, 6000, "stored again").await;
    });
}

#[test]
fn a_damaged_footer_loses_nothing() {
    run(5, |handle| async move {
        let disk = formatted(&handle, 20, 5).await;
        let store = open(&disk, &handle).await;
        for id in 1..=6 {
            put(&store, id, BlobKind::Data, 60_000).await.unwrap();
        }
        handle.sleep(std::time::Duration::from_secs(1)).await;
        // The newest header knows the zone as sealed.
        put(&store, 7, BlobKind::Data, 10).await.unwrap();
        disk.corrupt(at(0, ZONE - PAGE), 100, 1);
        let store = reopen(store, &disk, &handle).await;
        let damage: Vec<_> = store.recovery().corrupt.iter().map(|region| (region.zone, region.damage)).collect();
        assert_eq!(damage, vec![(ZoneNo(0), Damage::ZoneFooter)]);
        for id in 1..=6 {
            expect_blob(&store, id, 60_000, "footer lost").await;
        }
        let store = reopen(store, &disk, &handle).await;
        assert_eq!(store.recovery().corrupt, vec![], "the footer was written again");
    });
}

#[test]
fn a_zone_that_was_reset_never_shows_its_past_even_without_its_header() {
    run(6, |handle| async move {
        let disk = formatted(&handle, 16, 6).await;
        let store = open(&disk, &handle).await;
        let ids: Vec<u128> = (1..=8).collect();
        for id in &ids {
            put(&store, *id, BlobKind::Data, 60_000).await.unwrap();
        }
        delete(&store, &ids).await.unwrap();
        handle.sleep(std::time::Duration::from_secs(1)).await;
        assert!(store.zones_collected() > 0);
        disk.corrupt(at(0, 0), FIRST as usize, 1);
        let store = reopen(store, &disk, &handle).await;
        ids.iter().for_each(|id| assert_eq!(store.stat(BlobId(*id)), None, "two copies lost"));
        destroy_header(&disk, 0);
        let store = reopen(store, &disk, &handle).await;
        for id in ids {
            expect_absent(&store, id, "reset").await;
        }
    });
}

#[test]
fn a_sealed_zone_whose_header_is_lost_is_known_by_its_footer() {
    run(13, |handle| async move {
        let disk = formatted(&handle, 20, 13).await;
        let store = open(&disk, &handle).await;
        for id in 1..=7 {
            put(&store, id, BlobKind::Data, 60_000).await.unwrap();
        }
        delete(&store, &[2]).await.unwrap();
        disk.corrupt(at(0, 0), FIRST as usize, 1);
        let mut store = reopen(store, &disk, &handle).await;
        assert_eq!((store.recovery().corrupt.clone(), store.recovery().summaries), (vec![mended_header(0)], 2));
        for context in ["first time", "second time"] {
            for id in [1, 3, 4, 5, 6, 7] {
                expect_blob(&store, id, 60_000, context).await;
            }
            expect_absent(&store, 2, context).await;
            store = reopen(store, &disk, &handle).await;
            assert_eq!(store.recovery().corrupt, vec![], "the header was written again");
        }
    });
}

/// A zone is used again although all or some of what said so was lost.
#[test]
fn a_zone_whose_new_header_was_lost_shows_what_was_put_since_and_nothing_older() {
    // By the seed what was in the zone stays, or is discarded.
    for seed in 0..8 {
        for lost in [vec![header_range(0)], vec![header_range(0), footer_range(0)]] {
            run(seed, move |handle| async move {
                let context = format!("seed {seed}, {} lost", lost.len());
                let disk = formatted(&handle, 16, seed).await;
                let store = open(&disk, &handle).await;
                let reused = use_zone_0_again(&store, &disk, &handle, lost).await;
                let mut store = reopen(store, &disk, &handle).await;
                assert_eq!(store.recovery().corrupt, vec![mended_header(0)], "{context}");
                for _ in 0..2 {
                    for id in [1, 2, 3] {
                        expect_absent(&store, id, &context).await;
                    }
                    for id in reused {
                        expect_blob(&store, id, 60_000, &context).await;
                    }
                    put(&store, 900, BlobKind::Data, 60_000).await.unwrap();
                    store = reopen(store, &disk, &handle).await;
                    assert_eq!(store.recovery().corrupt, vec![], "{context}: the header was written again");
                }
                expect_blob(&store, 900, 60_000, &context).await;
            });
        }
    }
}

#[test]
fn other_zones_tell_that_a_zone_has_a_newer_generation_than_its_header_and_its_first_append() {
    for seed in 0..8 {
        run(seed, move |handle| async move {
            let context = format!("seed {seed}");
            let disk = formatted(&handle, 16, seed).await;
            let store = open(&disk, &handle).await;
            let lost = vec![header_range(0), footer_range(0)];
            let [first, second] = use_zone_0_again(&store, &disk, &handle, lost).await;
            // In another stream's zone: its header knows how far zone 0 was durable.
            put(&store, 901, BlobKind::Log, 10).await.unwrap();
            disk.corrupt(at(0, FIRST + 40), 4, 1);
            let store = reopen(store, &disk, &handle).await;
            let length = 64 << 10;
            let lost = CorruptRegion { zone: ZoneNo(0), offset: FIRST, length, damage: Damage::Appends };
            assert_eq!(store.recovery().corrupt, vec![mended_header(0), lost], "{context}");
            for id in [1, 2, 3, first] {
                expect_absent(&store, id, &context).await;
            }
            expect_blob(&store, second, 60_000, &context).await;
            put(&store, first, BlobKind::Data, 60_000).await.unwrap();
            let store = reopen(store, &disk, &handle).await;
            assert_eq!(store.recovery().corrupt, vec![lost], "{context}: the header was written again");
            for id in [first, second] {
                expect_blob(&store, id, 60_000, &context).await;
            }
        });
    }
}

#[test]
fn what_a_device_refuses_to_read_is_left_alone_and_comes_back_with_it() {
    run(7, |handle| async move {
        let disk = formatted(&handle, 16, 7).await;
        let store = open(&disk, &handle).await;
        for id in 1..=20 {
            put(&store, id, BlobKind::Data, 20_000).await.unwrap();
        }
        drop(store);
        handle.sleep(std::time::Duration::from_secs(1)).await;
        let mut hidden = 0;
        for _ in 0..20 {
            disk.set_faults(Faults { read_error: 0.1, ..Faults::default() });
            let Ok(store) = try_open(&disk, &handle).await else { continue };
            disk.set_faults(Faults::default());
            for id in 1..=20 {
                match store.stat(BlobId(id)) {
                    Some(_) => expect_blob(&store, id, 20_000, "readable").await,
                    None => {
                        hidden += 1;
                        assert!(!store.recovery().corrupt.is_empty(), "missing without a report");
                    }
                }
            }
        }
        assert!(hidden > 0, "no read fault struck");
        let store = open(&disk, &handle).await;
        for id in 1..=20 {
            expect_blob(&store, id, 20_000, "faults gone").await;
        }
    });
}

#[test]
fn lost_misdirected_and_torn_writes_and_flipped_bits_never_give_wrong_bytes() {
    let mut refused = 0;
    for seed in 1..=40u64 {
        refused += run(seed, move |handle| async move {
            let disk = formatted(&handle, 16, seed).await;
            let mut store = open(&disk, &handle).await;
            let fault = |bad: u64| if seed % 4 == bad { 0.05 } else { 0.0 };
            let faults = Faults {
                lost_write: fault(0),
                misdirected_write: fault(1),
                torn_write: fault(2),
                bit_flip_on_read: fault(3),
                ..Faults::default()
            };
            let mut random = SplitMix64::new(seed);
            let mut lengths = BTreeMap::new();
            let mut refused = 0;
            for id in 1..=120u128 {
                let length = 1 + random.below(30_000) as usize;
                disk.set_faults(faults.clone());
                match put(&store, id, BlobKind::ALL[random.below(6) as usize], length).await {
                    Ok(()) => _ = lengths.insert(id, length),
                    Err(error) => assert!(matches!(error, StoreError::NoSpace { .. }), "seed {seed}: {error}"),
                }
                if random.one_in(3) && !lengths.is_empty() {
                    let victim = *lengths.keys().nth(random.below(lengths.len() as u64) as usize).unwrap();
                    delete(&store, &[victim]).await.unwrap();
                    lengths.remove(&victim);
                }
                if random.one_in(40) {
                    disk.set_faults(Faults::default());
                    drop(store);
                    handle.sleep(std::time::Duration::from_secs(1)).await;
                    store = match try_open(&disk, &handle).await {
                        Ok(store) => store,
                        // Both superblocks may have been hit by a misdirected write.
                        Err(StoreError::SuperblockCorrupt { .. } | StoreError::Foreign { .. }) => return refused + 1,
                        Err(error) => panic!("seed {seed}: {error}"),
                    };
                }
            }
            for (id, length) in &lengths {
                match store.get(BlobId(*id), 0, *length as u32).await {
                    Ok(bytes) => assert!(bytes == payload(*id, *length), "seed {seed}: wrong bytes in {id}"),
                    Err(StoreError::Corrupt { .. } | StoreError::NotFound(_)) => refused += 1,
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            }
            refused
        });
    }
    assert!(refused > 20, "the faults hardly struck: {refused}");
}

#[test]
fn after_a_failed_write_nothing_answered_is_lost_and_nothing_more_is_taken() {
    let mut fenced = 0;
    for seed in 1..=40u64 {
        fenced += run(seed, move |handle| async move {
            let disk = formatted(&handle, 16, seed).await;
            let journal = Journal::default();
            let mut fenced = 0;
            for life in 0..3 {
                let store = open(&disk, &handle).await;
                check(&store, &journal, &format!("seed {seed} life {life}")).await;
                disk.set_faults(Faults { write_error: 0.02, ..Faults::default() });
                if let Some(error) = work_until_error(&store, &journal, seed + 1000 * life, 40).await {
                    assert!(error.is_device_failure(), "seed {seed}: {error}");
                    assert!(store.is_failed().is_some(), "seed {seed}");
                    fenced += 1;
                }
                disk.set_faults(Faults::default());
                drop(store);
                handle.sleep(std::time::Duration::from_secs(1)).await;
                disk.power_cut();
            }
            let store = open(&disk, &handle).await;
            assert_eq!(store.recovery().corrupt, vec![], "seed {seed}");
            check(&store, &journal, &format!("seed {seed} at the end")).await;
            fenced
        });
    }
    assert!(fenced > 20, "{fenced}");
}

#[test]
fn a_damaged_blob_is_moved_by_the_collector_and_stays_recognisable() {
    run(9, |handle| async move {
        let disk = formatted(&handle, 16, 9).await;
        let store = open(&disk, &handle).await;
        let ids: Vec<u128> = (1..=20).collect();
        for id in &ids {
            put(&store, *id, BlobKind::Data, 20_000).await.unwrap();
        }
        // A damaged blob is moved as it is and stays recognisable; the others are sound.
        disk.corrupt(at(0, FIRST + PAGE + 5), 1, 1);
        // All of the first zone but three blobs dies; one in ten of the later ones stays, so
        // that no zone is empty and free ones become few.
        delete(&store, &ids[2..9]).await.unwrap();
        for round in 0..15 {
            let filler: Vec<u128> = (0..10).map(|index| 100 + round * 10 + index).collect();
            for id in &filler {
                put(&store, *id, BlobKind::Data, 20_000).await.unwrap();
            }
            delete(&store, &filler[1..]).await.unwrap();
        }
        assert!(store.zones_collected() > 0);
        assert!(
            matches!(store.get(BlobId(1), 0, 20_000).await, Err(StoreError::Corrupt { page: 0, zone, .. }) if zone != 0)
        );
        assert_eq!(store.get(BlobId(1), 4096, 5000).await.unwrap(), payload(1, 20_000).slice(4096..9096));
        expect_blob(&store, 2, 20_000, "neighbour").await;
        assert_eq!(scrubbed(&store).await, vec![info(1, BlobKind::Data, 20_000)]);
    });
}

#[test]
fn what_the_collector_cannot_read_is_reported_and_its_zone_is_collected_once_it_can_be_read() {
    run(17, |handle| async move {
        let disk = formatted(&handle, 32, 17).await;
        let store = open(&disk, &handle).await;
        // One in ten stays, so that no zone is empty.
        let churn = async |first: u128, rounds: u128| {
            for first in (0..rounds).map(|round| first + round * 10) {
                for id in first..first + 10 {
                    put(&store, id, BlobKind::Data, 20_000).await?;
                }
                delete(&store, &(first + 1..first + 10).collect::<Vec<_>>()).await?;
            }
            Ok::<_, StoreError>(())
        };
        disk.set_faults(Faults { read_error: 1.0, ..Faults::default() });
        let refused = churn(1, 60).await.expect_err("nothing can be collected");
        assert!(matches!(refused, StoreError::NoSpace { .. }), "{refused}");
        let mut damaged = store.take_damaged();
        damaged.sort_unstable_by_key(|info| info.id);
        damaged.dedup();
        assert!(damaged.len() > 3, "{damaged:?}");
        assert!(damaged.iter().all(|found| *found == info(found.id.0, BlobKind::Data, 20_000)), "{damaged:?}");
        assert_eq!(store.zones_collected(), 0);

        disk.set_faults(Faults::default());
        handle.sleep(Duration::from_secs(61)).await;
        churn(1001, 30).await.expect("zones are collected again");
        assert!(store.zones_collected() > 10);
        assert_eq!(store.take_damaged(), vec![]);
        for found in damaged {
            if store.stat(found.id).is_some() {
                expect_blob(&store, found.id.0, 20_000, "moved").await;
            }
        }
    });
}

#[test]
fn zones_that_cannot_be_written_are_no_room() {
    run(19, |handle| async move {
        let disk = formatted(&handle, 20, 19).await;
        let store = open(&disk, &handle).await;
        let before = store.space().capacity;
        for zone in [3, 9, 15, 16] {
            for copy in [header_range(zone), footer_range(zone)] {
                disk.refuse_reads(copy);
            }
        }
        let store = reopen(store, &disk, &handle).await;
        let space = store.space();
        assert_eq!((before - space.capacity) % 4, 0);
        assert!(space.capacity < before && space.zones_free == 16, "{space:?} of {before}");
        // All of it can be filled, and emptied again.
        let length = 20_000;
        let mut put_so_far = 0;
        while store.space().free > 32_768 {
            put_so_far += 1;
            put(&store, put_so_far, BlobKind::Data, length).await.expect("there is room");
        }
        delete(&store, &(1..=put_so_far).collect::<Vec<_>>()).await.unwrap();
        assert_eq!(store.space().live, 0);
    });
}

#[test]
fn what_lives_in_zones_that_cannot_be_written_takes_no_room_of_the_others() {
    const EXTENT: u32 = 6 * PAGE;
    run(21, |handle| async move {
        let disk = formatted(&handle, 20, 21).await;
        let store = open(&disk, &handle).await;
        for id in 1..=30 {
            put(&store, id, BlobKind::Data, 20_000).await.unwrap();
        }
        let before = store.space();
        // The header of one append, and what would say the same of it.
        let header = at(0, FIRST + 3 * EXTENT);
        disk.refuse_reads(header..header + u64::from(PAGE));
        disk.refuse_reads(at(0, FIRST + 10 * EXTENT)..at(1, 0));
        let store = reopen(store, &disk, &handle).await;
        let after = store.space();
        assert_eq!((1..=30).filter(|id| store.stat(BlobId(*id)).is_some()).count(), 29);
        assert!(after.free >= before.free, "{before:?}, then {after:?}");
        delete(&store, &(1..=30).collect::<Vec<_>>()).await.unwrap();
        assert_eq!(store.space().live, 0);
        assert!(store.space().capacity < before.capacity, "the zone is no room");
    });
}

#[test]
fn what_can_be_read_nowhere_keeps_the_collector_busy_once_a_minute_only() {
    run(23, |handle| async move {
        let disk = formatted(&handle, 16, 23).await;
        let store = open(&disk, &handle).await;
        // Two copies of one blob, the older in a zone in which nothing else lives.
        let ids: Vec<u128> = (1..=12).collect();
        for id in &ids {
            put(&store, *id, BlobKind::Data, 20_000).await.unwrap();
        }
        disk.corrupt(at(0, FIRST + PAGE + 5), 1, 1);
        put(&store, 1, BlobKind::Data, 20_000).await.unwrap();
        disk.set_faults(Faults { read_error: 1.0, ..Faults::default() });
        delete(&store, &ids[1..]).await.unwrap();
        for _ in 0..3 {
            handle.sleep(Duration::from_secs(20)).await;
        }
        let (reads, _) = disk.reads();
        handle.sleep(Duration::from_secs(30)).await;
        put(&store, 100, BlobKind::Data, 20_000).await.unwrap();
        delete(&store, &[100]).await.unwrap();
        assert!(disk.reads().0 - reads < 100, "{} reads", disk.reads().0 - reads);
        assert_eq!(store.zones_collected(), 0);
        assert_eq!(store.take_damaged(), vec![info(1, BlobKind::Data, 20_000)]);
        disk.set_faults(Faults::default());
        handle.sleep(Duration::from_secs(61)).await;
        put(&store, 101, BlobKind::Data, 20_000).await.unwrap();
        delete(&store, &[101]).await.unwrap();
        handle.sleep(Duration::from_secs(1)).await;
        assert!(store.zones_collected() > 0);
        expect_blob(&store, 1, 20_000, "the newer copy").await;
    });
}

#[test]
fn a_further_copy_is_kept_when_its_zone_is_collected_while_the_newer_one_is_damaged() {
    const EXTENT: u32 = 6 * PAGE;
    run(13, |handle| async move {
        let disk = formatted(&handle, 16, 13).await;
        let store = open(&disk, &handle).await;
        let ids: Vec<u128> = (1..=12).collect();
        for id in &ids {
            put(&store, *id, BlobKind::Data, 20_000).await.unwrap();
        }
        // Damaged, healed by a second copy, and then sound again: doing the same damage twice undoes it.
        let old = || disk.corrupt(at(0, FIRST + PAGE + 5), 1, 1);
        old();
        put(&store, 1, BlobKind::Data, 20_000).await.unwrap();
        expect_blob(&store, 1, 20_000, "healed").await;
        let places = (1..4).flat_map(|zone| (0..10).map(move |append| at(zone, FIRST + append * EXTENT + PAGE + 5)));
        let mut newer = 0;
        for place in places {
            disk.corrupt(place, 1, 2);
            if store.get(BlobId(1), 0, 20_000).await.is_err() {
                newer += 1;
                break;
            }
            disk.corrupt(place, 1, 2);
        }
        assert_eq!(newer, 1, "the second copy is not where it was looked for");
        old();
        expect_blob(&store, 1, 20_000, "from the first copy").await;
        delete(&store, &ids[1..]).await.unwrap();
        handle.sleep(std::time::Duration::from_secs(1)).await;
        assert!(store.zones_collected() > 0);
        expect_blob(&store, 1, 20_000, "its zone was collected").await;
        let store = reopen(store, &disk, &handle).await;
        expect_blob(&store, 1, 20_000, "opened again").await;
    });
}
