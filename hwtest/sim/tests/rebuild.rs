//! What a lost target held is rebuilt without being asked: on its replacement, or on the targets
//! that are left.

use bytes::Bytes;
use cfs_client::{Caller, Client, NewFile, OpenFlags};
use cfs_movers::rebuild::RebuildConfig;
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_sim::world::{Death, Shape, Started, World};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// Some that go to segments, some to replicated blobs.
const LENGTHS: [usize; 6] = [900_000, 20_000, 300_000, 30_000, 2_000_000, 5000];

fn simulated<F: Future<Output = ()> + 'static>(seed: u64, body: impl FnOnce(Handle) -> F) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    executor.run_simulated(&handle, body(handle.clone())).expect("it goes on").expect("it ends");
}

fn pattern(length: usize) -> Bytes {
    let mut random = SplitMix64::new(length as u64);
    (0..length.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).take(length).collect()
}

async fn write_file(client: &Rc<Client>, length: usize) {
    let (new, name) = (NewFile::regular(0o644, 0o022), length.to_string());
    let (_, file) =
        client.create(Caller::default(), client.root(), name.as_bytes(), new, OpenFlags::default()).await.unwrap();
    for (index, part) in pattern(length).chunks(128 << 10).enumerate() {
        let offset = (index * (128 << 10)) as u64;
        client.write(&file, offset, Bytes::copy_from_slice(part), false).await.unwrap();
    }
    client.fsync(&file, false).await.unwrap();
    client.release(&file);
}

/// A cluster with a file of each length.
async fn cluster(handle: &Handle, shape: Shape, seed: u64) -> Rc<World> {
    let world = World::new(handle, shape, seed);
    world.format().await.unwrap();
    assert_eq!(world.start_server().await.unwrap(), Started::Serving);
    let writer = world.mount("writer").await.unwrap();
    for length in LENGTHS {
        write_file(&writer.client, length).await;
    }
    writer.kill();
    world
}

async fn expect_files(world: &World, context: &str) {
    let reader = world.mount("reader").await.unwrap();
    let client = &reader.client;
    for length in LENGTHS {
        let entry = client.lookup(client.root(), length.to_string().as_bytes()).await.unwrap();
        let file = client.open(entry.attr.ino, OpenFlags::default(), false).await.unwrap();
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let part = client.read(&file, bytes.len() as u64, 256 << 10).await;
            bytes.extend_from_slice(&part.unwrap_or_else(|error| panic!("{context}: file {length}: {error:?}")));
        }
        assert!(bytes == pattern(length), "{context}: file {length} has other bytes");
        client.release(&file);
    }
    reader.kill();
}

/// Waits until nothing is being rebuilt and no replacement lacks anything.
async fn refilled(world: &World) {
    for _ in 0..600 {
        let progress = world.node().movers().rebuild.progress();
        if !progress.running && progress.refilling.is_empty() && progress.phase == "done" {
            return;
        }
        world.handle.sleep(Duration::from_secs(1)).await;
    }
    panic!("it is not refilled after ten minutes: {:?}", world.node().movers().rebuild.progress());
}

async fn degraded(world: &World) -> u64 {
    let report = world.node().check(false, true).await;
    assert_eq!(report.problems, Vec::<String>::new());
    report.degraded
}

/// About one segment of 300,000 bytes in a second.
fn slowly() -> RebuildConfig {
    RebuildConfig { bytes_per_second: 200_000, ..RebuildConfig::default() }
}

#[test]
fn a_replacement_is_refilled_unasked_and_then_any_other_target_may_go() {
    simulated(31, |handle| async move {
        let world = cluster(&handle, Shape::default(), 31).await;
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
        let world = cluster(&handle, Shape { rebuild: slowly(), ..Shape::default() }, 32).await;
        let writer = world.mount("more").await.unwrap();
        for more in 1..=15 {
            write_file(&writer.client, 300_000 + more).await;
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
        let world = cluster(&handle, Shape::default(), 33).await;
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

#[test]
fn a_target_that_stays_away_is_rebuilt_on_the_others_and_one_that_comes_back_is_not() {
    simulated(34, |handle| async move {
        let lost_after = Duration::from_secs(60);
        let rebuild = RebuildConfig { lost_after, ..RebuildConfig::default() };
        let world = cluster(&handle, Shape { targets: 5, rebuild, ..Shape::default() }, 34).await;
        let rebuilt = || world.node().movers().rebuild.progress().repaired;
        world.crash_server(Death::Power);
        world.disk(3).fail();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        handle.sleep(lost_after / 2).await;
        assert_eq!(rebuilt(), 0, "it may come back yet");
        assert!(degraded(&world).await > 0, "the lost target held nothing: the test proves nothing");
        handle.sleep(lost_after * 2).await;
        assert!(rebuilt() > 0, "{:?}", world.node().movers().rebuild.progress());
        assert_eq!(degraded(&world).await, 0);
        // While it is still away another one goes.
        world.disk(0).fail();
        expect_files(&world, "a second target lost after the first was rebuilt").await;
    });
}
