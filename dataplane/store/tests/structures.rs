//! Rot in what locates blobs is found and mended while the store that knows it better still runs.

mod common;

use cfs_device::BlockDevice;
use cfs_device::mem::MemDisk;
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_store::{Flaw, Lacks, Member, Roster, Structure, TargetStore};
use cfs_wire::blobs::BlobKind;
use cfs_wire::{DeviceId, ZoneNo};
use common::crash::{FILL, Journal, check, work};
use common::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

async fn flaws(store: &TargetStore, mend: bool) -> Vec<Flaw> {
    let found = RefCell::new(Vec::new());
    store.check_structures(0..u32::MAX, mend, &|| u64::MAX, &|flaw| found.borrow_mut().push(*flaw)).await;
    found.take()
}

fn roster() -> Roster {
    let member = |device| Member { device: DeviceId(device), seen: 3, lacks: Lacks::NOTHING };
    Roster { epoch: 3, created: true, members: vec![member(1), member(2), member(0xDE)] }
}

/// Zone 0 is sealed with blobs 1 to 3; blob 7 is in a zone that is open: in which.
async fn filled(handle: &Handle, seed: u64) -> (Rc<MemDisk>, Rc<TargetStore>, u32) {
    let disk = formatted(handle, 20, seed).await;
    cfs_store::write_roster(&*disk.open(handle), &identity(), &roster()).await.unwrap();
    let store = open(&disk, handle).await;
    for id in 1..=7 {
        put(&store, id, BlobKind::Data, 60_000).await.unwrap();
    }
    handle.sleep(Duration::from_secs(1)).await;
    let device = disk.open(handle);
    for zone in 1..20 {
        let starts_with =
            async |offset, magic: &[u8]| device.read(at(zone, offset), PAGE as usize).await.unwrap().starts_with(magic);
        if starts_with(FIRST, b"CFSAPPND").await && starts_with(ZONE - PAGE, b"CFSZHEAD").await {
            return (disk, store, zone);
        }
    }
    panic!("no zone is open");
}

async fn expect_everything(store: &TargetStore, context: &str) {
    assert_eq!(store.recovery().corrupt, vec![], "{context}");
    assert_eq!(store.recovery().superblock_copies_repaired, 0, "{context}");
    for id in 1..=7 {
        expect_blob(store, id, 60_000, context).await;
    }
}

/// A zone of [`filled`].
#[derive(Clone, Copy, Debug)]
enum In {
    Sealed,
    Open,
}

/// What locates data, one page each: what it is, and where in a zone or before all of them.
const PLACES: [(Structure, Option<In>, u32); 12] = [
    (Structure::Superblock, None, 0),
    (Structure::Superblock, None, AREA as u32 - PAGE),
    (Structure::Roster, None, PAGE),
    (Structure::Roster, None, AREA as u32 - 2 * PAGE),
    (Structure::ZoneHeader, Some(In::Sealed), 0),
    (Structure::ZoneHeader, Some(In::Sealed), PAGE),
    (Structure::ZoneHeader, Some(In::Open), 0),
    (Structure::ZoneHeader, Some(In::Open), PAGE),
    (Structure::ZoneHeader, Some(In::Open), ZONE - PAGE),
    (Structure::Append, Some(In::Open), FIRST),
    (Structure::ZoneEnd, Some(In::Sealed), ZONE - PAGE),
    (Structure::ZoneEnd, Some(In::Sealed), ZONE - 2 * PAGE),
];

#[test]
fn damage_to_what_locates_data_is_found_and_mended_before_an_opening_needs_it() {
    for (seed, (structure, place, offset)) in (1..).zip(PLACES) {
        run(seed, move |handle| async move {
            let context = format!("{structure:?} at {offset:#x} of {place:?}");
            let (disk, store, open_zone) = filled(&handle, seed).await;
            assert_eq!(flaws(&store, true).await, vec![], "{context}: nothing is damaged yet");
            let zone = place.map(|zone| if let In::Open = zone { open_zone } else { 0 });
            disk.corrupt(zone.map_or(offset.into(), |zone| at(zone, offset)) + 40, 4, 1);
            let flaw = |mended| vec![Flaw { structure, zone: zone.map(ZoneNo), mended }];
            assert_eq!(flaws(&store, false).await, flaw(false), "{context}");
            assert_eq!(flaws(&store, true).await, flaw(true), "{context}");
            assert_eq!(flaws(&store, true).await, vec![], "{context}: it is mended");
            put(&store, 8, BlobKind::Data, 60_000).await.unwrap();
            let store = reopen(store, &disk, &handle).await;
            expect_everything(&store, &context).await;
            expect_blob(&store, 8, 60_000, &context).await;
            // Each copy of the roster is as good as the other again.
            for copy in [u64::from(PAGE), AREA - 2 * u64::from(PAGE)] {
                let spoilt = disk.snapshot();
                spoilt.corrupt(copy + 40, 4, 2);
                let (_, found) = cfs_store::inspect(&*spoilt.open(&handle)).await.unwrap();
                assert_eq!(found, Some(roster()), "{context}");
            }
        });
    }
}

/// Who runs the target knows what it should say.
#[test]
fn a_roster_of_which_no_copy_is_left_is_written_again_from_what_is_known() {
    for (seed, zeroes) in [(50, true), (51, false)] {
        run(seed, move |handle| async move {
            let (disk, store, _) = filled(&handle, seed).await;
            let copies = [u64::from(PAGE), AREA - 2 * u64::from(PAGE)];
            let device = disk.open(&handle);
            let spoil = async || {
                let spoilt = if zeroes { vec![0; PAGE as usize] } else { vec![0xD7; PAGE as usize] };
                let page = cfs_reactor::buffer::DmaBuf::copy_of(&spoilt).freeze();
                for copy in copies {
                    device.write(copy, vec![page.clone()], cfs_device::Placement::Log, true).await.unwrap();
                }
            };
            let flaw = |mended| Flaw { structure: Structure::Roster, zone: None, mended };
            spoil().await;
            // The twin: nobody says, and with zeroes there may never have been one.
            let unknown = if zeroes { vec![] } else { vec![flaw(false); 2] };
            assert_eq!(flaws(&store, true).await, unknown);
            store.know_roster(&roster());
            assert_eq!(flaws(&store, true).await, vec![flaw(true); 2]);
            assert_eq!(flaws(&store, true).await, vec![]);
            // An older one is damage too.
            let newer = Roster { epoch: roster().epoch + 1, ..roster() };
            store.know_roster(&newer);
            assert_eq!(flaws(&store, true).await, vec![flaw(true); 2]);
            let (_, found) = cfs_store::inspect(&*device).await.unwrap();
            assert_eq!(found, Some(newer));
        });
    }
}

/// The twin: with both ends of a zone, or the only header of an append, damaged it is too late.
#[test]
fn damage_that_nobody_mends_costs_the_next_opening_what_it_located() {
    for mend in [true, false] {
        run(40, move |handle| async move {
            let (disk, store, open_zone) = filled(&handle, 40).await;
            put(&store, 8, BlobKind::Data, 60_000).await.unwrap();
            disk.corrupt(at(open_zone, FIRST) + 40, 4, 1);
            disk.corrupt(at(0, ZONE - PAGE) + 40, 4, 1);
            flaws(&store, mend).await;
            disk.corrupt(at(0, 0), FIRST as usize, 1);
            let store = reopen(store, &disk, &handle).await;
            let there = (1..=8).filter(|id| store.stat(cfs_wire::BlobId(*id)).is_some()).collect::<Vec<_>>();
            let expected = if mend { vec![1, 2, 3, 4, 5, 6, 7, 8] } else { vec![4, 5, 6, 8] };
            assert_eq!(there, expected, "mended: {mend}");
        });
    }
}

/// Works while structures are checked again and again, `rot` strikes now and then, and power is cut at
/// the end.
fn checked_under_load(seed: u64, rot: bool) -> usize {
    run(seed, move |handle| async move {
        let context = format!("seed {seed}");
        let disk = formatted(&handle, 14, seed).await;
        let node = handle.new_domain();
        let store = open(&disk, &node).await;
        let (journal, ended) = (Journal::default(), Rc::new(Cell::new(false)));
        let working = {
            let (store, node, journal, ended) = (store.clone(), node.clone(), journal.clone(), ended.clone());
            async move {
                work(store, node, journal, seed, 300, FILL).await;
                ended.set(true);
            }
        };
        let working = node.spawn(working);
        let mut random = SplitMix64::new(seed);
        let (mut found, mut looks) = (0, 0);
        while !ended.get() {
            looks += 1;
            for _ in 0..if rot { 4 } else { 0 } {
                disk.corrupt(at(random.below(14) as u32, PAGE * (looks % 2)) + 40, 4, random.next_u64());
            }
            found += flaws(&store, true).await.len();
            handle.sleep(Duration::from_micros(random.below(2000))).await;
        }
        working.await.unwrap();
        handle.sleep(Duration::from_secs(1)).await;
        flaws(&store, true).await;
        assert_eq!(flaws(&store, true).await, vec![], "{context}");
        drop(store);
        node.kill();
        disk.power_cut();
        let store = open(&disk, &handle).await;
        assert_eq!(store.recovery().corrupt, vec![], "{context}");
        check(&store, &journal, &context).await;
        found
    })
}

#[test]
fn under_load_nothing_sound_is_called_damaged_and_mending_disturbs_nobody() {
    let mut mended = 0;
    for seed in 1..=4 {
        assert_eq!(checked_under_load(seed, false), 0, "seed {seed}");
        mended += checked_under_load(seed, true);
    }
    assert!(mended > 20, "rot hardly struck what counts: {mended}");
}

#[test]
fn a_page_that_cannot_be_read_hides_no_other_copy_of_a_zones_header_and_is_written_anew() {
    for page in [0, PAGE] {
        for open_zone in [false, true] {
            run(60, move |handle| async move {
                let (disk, store, open_one) = filled(&handle, 60).await;
                drop(store);
                handle.sleep(Duration::from_secs(1)).await;
                let bad = at(if open_zone { open_one } else { 0 }, page);
                disk.refuse_reads(bad..bad + u64::from(PAGE));
                let device = disk.open(&handle);
                assert!(device.read(bad, PAGE as usize).await.is_err());
                let context = format!("page {page} of the {} zone", if open_zone { "open" } else { "sealed" });
                let store = open(&disk, &handle).await;
                expect_everything(&store, &context).await;
                assert!(device.read(bad, PAGE as usize).await.is_ok(), "{context}: it was not written anew");
            });
        }
    }
}
