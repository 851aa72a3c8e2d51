//! The spine: a client's bytes go through the fabric to stores on three targets, their reference
//! through a Raft group, and come back after a loss or a crash.

mod common;

use cfs_client::OpenFlags;
use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use cfs_sim::world::{Death, Mounted, Shape, Started};
use common::{cluster, pattern, read_file, simulated, write_file};
use std::rc::Rc;
use std::time::Duration;

const MIB: usize = 1 << 20;

async fn read_by_name(mounted: &Mounted, name: &[u8]) -> Vec<u8> {
    read_file(&mounted.client, mounted.client.root(), name).await.unwrap()
}

#[test]
fn a_mebibyte_comes_back_with_any_one_target_lost() {
    for lost in 0..3 {
        simulated(11 + lost as u64, |handle| async move {
            let world = cluster(&handle, Shape::default(), 7).await;
            let writer = world.mount("writer").await.unwrap();
            let bytes = pattern(1, MIB);
            write_file(&writer.client, writer.client.root(), b"file", &bytes).await;
            world.disk(lost).fail();
            // A client that has cached nothing.
            let reader = world.mount("reader").await.unwrap();
            assert!(read_by_name(&reader, b"file").await == bytes, "target {lost} lost: other bytes");
            // And the cluster goes on taking writes.
            let more = pattern(2, MIB);
            write_file(&reader.client, reader.client.root(), b"more", &more).await;
            assert!(read_by_name(&writer, b"more").await == more, "target {lost} lost: new bytes are wrong");
        });
    }
}

#[test]
fn a_restarted_node_serves_the_same_bytes_from_two_of_three_targets() {
    simulated(21, |handle| async move {
        let world = cluster(&handle, Shape::default(), 8).await;
        let writer = world.mount("writer").await.unwrap();
        let bytes = pattern(3, MIB);
        write_file(&writer.client, writer.client.root(), b"file", &bytes).await;
        world.crash_server(Death::Power);
        world.disk(1).fail();
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        let reader = world.mount("reader").await.unwrap();
        assert!(read_by_name(&reader, b"file").await == bytes);
    });
}

#[test]
fn two_lost_targets_are_an_error_and_never_other_bytes() {
    simulated(22, |handle| async move {
        let world = cluster(&handle, Shape::default(), 9).await;
        let writer = world.mount("writer").await.unwrap();
        let ino = write_file(&writer.client, writer.client.root(), b"file", &pattern(4, MIB)).await;
        let reader = world.mount("reader").await.unwrap();
        let file = reader.client.open(ino, OpenFlags::default(), false).await.unwrap();
        world.disk(0).fail();
        world.disk(2).fail();
        let read = reader.client.read(&file, 0, 128 << 10).await;
        assert_eq!(read, Err(cfs_wire::Errno::EIO));
    });
}

/// Writes one file, then more with a crash of the node at one device write, and looks at all.
async fn crash_at(handle: &Handle, disk: usize, write: u64, death: Death) -> bool {
    let context = format!("{death:?} at write {write} of disk {disk}");
    let world = cluster(handle, Shape::default(), 100 + write).await;
    let writer = world.mount("writer").await.unwrap();
    let first = pattern(5, MIB);
    let later = [(b"second", pattern(6, 300_000)), (b"third.", pattern(7, 100_000)), (b"fourth", pattern(8, 20_000))];
    write_file(&writer.client, writer.client.root(), b"first", &first).await;
    world.halt_disk_after(disk, write);
    let client = writer.client.clone();
    let files = later.clone();
    let writing = writer.handle.spawn(async move {
        for (name, bytes) in files {
            write_file(&client, client.root(), name, &bytes).await;
        }
    });
    let halted = handle.timeout(Duration::from_secs(3), world.halted()).await.is_some();
    world.crash_server(death);
    assert_eq!(world.start_server().await.unwrap(), Started::Serving, "{context}");
    // The client outlives the crash: its operations end well.
    writing.await.expect("the client lives");
    world.crash_server(death);
    assert_eq!(world.start_server().await.unwrap(), Started::Serving, "{context}, again");
    let reader = world.mount("reader").await.unwrap();
    assert!(read_by_name(&reader, b"first").await == first, "{context}: the first file is damaged");
    for (name, bytes) in &later {
        let damaged = format!("{context}: {} is damaged", String::from_utf8_lossy(*name));
        assert!(read_by_name(&reader, *name).await == *bytes, "{damaged}");
    }
    let report = world.node().check(false, true).await;
    assert_eq!((report.problems, report.degraded), (Vec::new(), 0), "{context}");
    halted
}

#[test]
fn acknowledged_bytes_survive_a_crash_at_every_device_write() {
    for (disk, death) in [(0, Death::Power), (1, Death::Process)] {
        let mut write = 1;
        loop {
            let executor = Executor::new(Rc::new(SimClock::new(write)));
            let handle = executor.domain();
            let inner = handle.clone();
            let run = executor.run_simulated(&handle, async move { crash_at(&inner, disk, write, death).await });
            if !run.expect("it goes on").expect("it ends") {
                break;
            }
            write += 1;
        }
        assert!(write > 5, "only {write} writes: nothing was crashed");
    }
}
