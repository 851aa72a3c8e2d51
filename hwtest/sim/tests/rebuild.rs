//! What a lost target held is rebuilt without being asked: on its replacement, or on the targets
//! that are left. So is what is found damaged.

mod common;

use cfs_api::{AdminError, CheckLost, CheckReport};
use cfs_device::BlockDevice;
use cfs_movers::rebuild::RebuildConfig;
use cfs_reactor::Handle;
use cfs_sim::ledger::Trust;
use cfs_sim::tuning::Tuning;
use cfs_sim::world::{Death, Shape, Started, World};
use cfs_store::segment::BlobTarget;
use cfs_wire::blobs::BlobKind;
use common::{degraded, expect_files, fill, filled_cluster, refilled, simulated, write_length};
use std::rc::Rc;
use std::time::Duration;

/// About one segment of 300,000 bytes in a second.
fn slowly() -> RebuildConfig {
    RebuildConfig { bytes_per_second: 200_000, ..RebuildConfig::default() }
}

#[test]
fn a_replacement_is_refilled_unasked_and_then_any_other_target_may_go() {
    simulated(31, |handle| async move {
        let world = filled_cluster(&handle, Shape::default(), 31).await;
        world.stop_server().await;
        world.replace_disk(1).await.unwrap();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        refilled(&world).await;
        let progress = world.node().movers().rebuild.progress();
        assert!(progress.repaired > 0 && progress.bytes > 1_000_000, "{progress:?}");
        assert_eq!((progress.waiting, progress.lost), (0, 0), "{progress:?}");
        assert_eq!(degraded(&world).await, 0);
        for lost in [0, 2] {
            world.crash_server(Death::Power);
            world.disk(lost).fail();
            assert_eq!(world.start_server().await.unwrap(), Started::Serving);
            expect_files(&world, &format!("disk {lost} lost after the refill")).await;
            world.crash_server(Death::Power);
            world.disk(lost).restore();
            assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        }
    });
}

#[test]
fn a_crash_in_the_middle_of_refilling_is_no_harm_and_it_goes_on() {
    simulated(32, |handle| async move {
        let world = filled_cluster(&handle, Shape { rebuild: slowly(), ..Shape::default() }, 32).await;
        let writer = world.mount("more").await.unwrap();
        for more in 1..=15 {
            write_length(&writer.client, 300_000 + more).await;
        }
        writer.kill();
        world.stop_server().await;
        world.replace_disk(2).await.unwrap();
        for _ in 0..3 {
            assert_eq!(world.start_server().await.unwrap(), Started::Serving);
            handle.sleep(Duration::from_secs(4)).await;
            let progress = world.node().movers().rebuild.progress();
            assert_eq!(progress.refilling, [2], "too fast for this test: {progress:?}");
            assert!(progress.repaired > 0, "nothing done before the crash: {progress:?}");
            world.crash_server(Death::Power);
        }
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        refilled(&world).await;
        assert_eq!(degraded(&world).await, 0);
        expect_files(&world, "after the refill").await;
    });
}

#[test]
fn nothing_else_may_be_missing_or_replaced_before_a_replacement_is_refilled() {
    simulated(33, |handle| async move {
        let world = filled_cluster(&handle, Shape::default(), 33).await;
        world.stop_server().await;
        world.replace_disk(1).await.unwrap();
        let refusal = world.replace_disk(0).await.unwrap_err().detail;
        assert!(refusal.contains("would lose data"), "{refusal}");
        world.disk(0).fail();
        let refusal = world.start_server().await.unwrap_err().detail;
        assert!(refusal.contains("the replacement t1 was not refilled yet"), "{refusal}");
        // The twin: with it back, and some time, both may happen.
        world.crash_server(Death::Process);
        world.disk(0).restore();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        refilled(&world).await;
        world.stop_server().await;
        world.replace_disk(0).await.unwrap();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        refilled(&world).await;
        assert_eq!(degraded(&world).await, 0);
        expect_files(&world, "two replaced, one after the other").await;
    });
}

/// What is beyond repair can't be brought back to it, and must not keep it from being a full target.
#[test]
fn a_replacement_counts_as_refilled_although_something_is_lost() {
    simulated(39, |handle| async move {
        let world = filled_cluster(&handle, Shape::default(), 39).await;
        handle.sleep(Duration::from_secs(30)).await;
        let shards =
            |target: &Rc<dyn BlobTarget>| [target.list(BlobKind::Data), target.list(BlobKind::Parity)].concat();
        let targets = world.node().pool().readable();
        let segment = shards(&targets[1])[0].owner;
        for target in &targets[1..] {
            world.distrust(target.id().0 as usize, Trust::Faulty);
            let of_it = shards(target).into_iter().filter(|info| info.owner == segment);
            target.delete(of_it.map(|info| info.id).collect()).await.unwrap();
        }
        drop(targets);
        world.stop_server().await;
        world.replace_disk(0).await.unwrap();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        refilled(&world).await;
        assert_eq!(world.node().movers().rebuild.progress().lost, 1);
    });
}

#[test]
fn a_target_that_stays_away_is_rebuilt_on_the_others_and_one_that_comes_back_is_not() {
    simulated(34, |handle| async move {
        let lost_after = Duration::from_secs(60);
        let rebuild = RebuildConfig { lost_after, ..RebuildConfig::default() };
        let world = filled_cluster(&handle, Shape { targets: 5, rebuild, ..Shape::default() }, 34).await;
        let rebuilt = || world.node().movers().rebuild.progress().repaired;
        let shards = |target: &Rc<dyn BlobTarget>| target.list(BlobKind::Data).len();
        let fullest = world.node().pool().readable().into_iter().max_by_key(shards).unwrap().id().0 as usize;
        world.crash_server(Death::Power);
        world.disk(fullest).fail();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        handle.sleep(lost_after / 2).await;
        assert_eq!(rebuilt(), 0, "it may come back yet");
        assert!(degraded(&world).await > 0, "the lost target held nothing: the test proves nothing");
        handle.sleep(lost_after * 2).await;
        assert!(rebuilt() > 0, "{:?}", world.node().movers().rebuild.progress());
        assert_eq!(degraded(&world).await, 0);
        // While it is still away another one goes.
        world.disk((fullest + 1) % 5).fail();
        expect_files(&world, "a second target lost after the first was rebuilt").await;
    });
}

#[test]
fn what_found_no_room_when_its_target_was_lost_is_rebuilt_once_there_is_some() {
    simulated(35, |handle| async move {
        let lost_after = Duration::from_secs(60);
        let rebuild = RebuildConfig { lost_after, ..RebuildConfig::default() };
        // Small, so that it is filled quickly.
        let shape = Shape { targets: 4, disk_bytes: 31 << 20, rebuild, ..Shape::default() };
        let world = filled_cluster(&handle, shape, 35).await;
        let mounted = world.mount("filler").await.unwrap();
        let (file, full) = fill(&mounted.client, "filler", usize::MAX).await;
        assert!(full);
        mounted.client.release(&file);
        mounted.kill();
        world.crash_server(Death::Power);
        world.disk(3).fail();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        let progress = || world.node().movers().rebuild.progress();
        handle.sleep(lost_after * 2).await;
        let full = progress();
        assert!(full.phase == "done" && full.waiting > 0, "there is room: the test proves nothing: {full:?}");
        assert!(degraded(&world).await > 0);
        let mounted = world.mount("emptier").await.unwrap();
        mounted.client.unlink(mounted.client.root(), b"filler").await.unwrap();
        handle.sleep(lost_after * 3).await;
        assert_eq!(degraded(&world).await, 0, "{:?}", progress());
        assert_eq!(progress().waiting, 0);
        expect_files(&world, "after the second search").await;
    });
}

/// All copies of the headers of all zones of a disk, or the footer in the place of the last, in the
/// default layout of a target: 1 MiB before the first.
fn damage_zone_headers(world: &World, index: usize, zones: u32) {
    let disk = world.disk(index);
    let zone_bytes = disk.size() / (u64::from(zones) + 1);
    assert!(zone_bytes.is_power_of_two());
    for zone in 0..u64::from(zones) {
        disk.corrupt((1 << 20) + zone * zone_bytes, 8192, 1 + zone);
        disk.corrupt((1 << 20) + (zone + 1) * zone_bytes - 4096, 4096, 1 + zone);
    }
}

#[test]
fn what_an_opening_finds_lost_is_rebuilt_unasked() {
    simulated(36, |handle| async move {
        let world = filled_cluster(&handle, Shape::default(), 36).await;
        let zones = world.node().pool().readable()[1].space().zones_total;
        world.stop_server().await;
        damage_zone_headers(&world, 1, zones);
        world.distrust(1, Trust::Faulty);
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        assert!(degraded(&world).await > 0, "it lost nothing: the test proves nothing");
        handle.sleep(Duration::from_secs(60)).await;
        assert!(world.node().movers().rebuild.progress().repaired > 0);
        assert_eq!(degraded(&world).await, 0);
        world.crash_server(Death::Power);
        world.disk(0).fail();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        expect_files(&world, "another disk lost after that").await;
    });
}

/// Lets the headers of all appends on a disk rot.
async fn damage_append_headers(world: &World, index: usize) {
    const PAGE: usize = 4096;
    let disk = world.disk(index);
    let device = disk.open(&world.handle);
    for offset in (0..disk.size()).step_by(1 << 20) {
        let bytes = device.read(offset, (1 << 20).min((disk.size() - offset) as usize)).await.unwrap();
        let headers =
            (offset..).step_by(PAGE).zip(bytes.chunks(PAGE)).filter(|(_, page)| page.starts_with(b"CFSAPPND"));
        headers.for_each(|(header, _)| disk.corrupt(header + 40, 4, 1));
    }
}

/// What a deep check finds, with or without repairing it.
async fn checked(world: &World, repair: bool) -> CheckReport {
    let begun = world.node().start_check(repair, true).unwrap();
    while world.node().check_state().running {
        world.handle.sleep(Duration::from_millis(100)).await;
    }
    world.node().check_state().result_of(begun.id).unwrap().cloned().unwrap()
}

#[test]
fn a_deep_check_finds_rot_in_what_locates_data_and_mends_it_before_a_start_needs_it() {
    for repair in [true, false] {
        simulated(40, move |handle| async move {
            let world = filled_cluster(&handle, Shape::default(), 40).await;
            assert_eq!(checked(&world, false).await.degraded, 0);
            damage_append_headers(&world, 1).await;
            world.distrust(1, Trust::Rotten);
            let found = checked(&world, false).await;
            assert!(found.degraded > 0 && found.repaired == 0 && found.problems.is_empty(), "{found:?}");
            if repair {
                let mended = checked(&world, true).await;
                assert!(mended.is_clean() && mended.repaired > 0, "{mended:?}");
                assert_eq!(checked(&world, false).await.degraded, 0);
            }
            world.crash_server(Death::Process);
            assert_eq!(world.start_server().await.unwrap(), Started::Serving);
            // The twin: too late, which redundancy bridges while it is there.
            assert_eq!(degraded(&world).await == 0, repair);
            if repair {
                world.crash_server(Death::Power);
                world.disk(0).fail();
                assert_eq!(world.start_server().await.unwrap(), Started::Serving);
                expect_files(&world, "another disk lost after that").await;
            }
        });
    }
}

/// As after an opening that found a damaged zone, whose search was cut short: used again, the zone
/// looks like any other.
#[test]
fn what_no_index_names_any_more_is_rebuilt_after_the_next_start_or_scrub() {
    simulated(38, |handle| async move {
        let world = filled_cluster(&handle, Shape::default(), 38).await;
        handle.sleep(Duration::from_secs(30)).await;
        world.distrust(1, Trust::Faulty);
        let lose = async || {
            let target = world.node().pool().readable()[1].clone();
            let shards = target.list(BlobKind::Data);
            target.delete(shards.iter().map(|info| info.id).collect()).await.unwrap();
            assert_eq!(degraded(&world).await, shards.len() as u64);
            handle.sleep(Duration::from_secs(60)).await;
            assert!(degraded(&world).await > 0, "nobody looked yet");
        };
        lose().await;
        world.crash_server(Death::Power);
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        handle.sleep(Duration::from_secs(60)).await;
        assert_eq!(degraded(&world).await, 0);
        lose().await;
        world.node().movers().rebuild.search_again();
        handle.sleep(Duration::from_secs(60)).await;
        assert_eq!(degraded(&world).await, 0);
        expect_files(&world, "lost twice").await;
    });
}

/// With everything read once in `scrub`: what is degraded some minutes after bytes of one disk rotted
/// in the middle of being used, which nobody reads.
async fn rot(handle: Handle, scrub: Duration) -> u64 {
    let mut tuning = Tuning::default();
    tuning.movers.scrub = scrub;
    let world = filled_cluster(&handle, Shape { tuning, ..Shape::default() }, 37).await;
    handle.sleep(Duration::from_secs(30)).await;
    assert!(world.disk(2).corrupt_written(200, 5) > 50);
    world.distrust(2, Trust::Faulty);
    handle.sleep(Duration::from_secs(180)).await;
    degraded(&world).await
}

#[test]
fn the_scrub_finds_what_rots_unread() {
    let hour = Duration::from_secs(3600);
    assert_eq!(simulated(37, |handle| rot(handle, Duration::from_secs(60))), 0);
    assert!(simulated(37, move |handle| rot(handle, hour)) > 0, "nothing rotted: the test proves nothing");
}

#[test]
fn a_check_is_not_taken_for_one_with_other_options_nor_for_one_before_a_crash() {
    simulated(35, |handle| async move {
        let world = filled_cluster(&handle, Shape::default(), 35).await;
        let begun = world.node().start_check(false, true).unwrap();
        assert_eq!(begun.result_of(begun.id), Ok(None));
        assert_eq!(world.node().start_check(false, true).unwrap().id, begun.id, "the same options join it");
        let refused = world.node().start_check(true, true).unwrap_err();
        assert_eq!(refused, AdminError::CheckRunning { repair: false, deep: true });
        assert_eq!(refused.to_string(), "a check runs already, with --deep and without --repair; wait for its end");
        while world.node().check_state().running {
            handle.sleep(Duration::from_millis(100)).await;
        }
        let ended = world.node().check_state();
        assert!(ended.result_of(begun.id).unwrap().is_some_and(|report| report.is_clean() && report.segments > 0));
        let repairing = world.node().start_check(true, false).unwrap();
        world.crash_server(Death::Process);
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        assert_eq!(world.node().check_state().result_of(repairing.id), Err(CheckLost { replaced: false }));
    });
}
