//! The spine: a client's bytes go through the fabric to stores on three targets, their reference
//! through a Raft group, and come back after a loss or a crash.

mod common;

use bytes::Bytes;
use cfs_client::OpenFlags;
use cfs_reactor::Handle;
use cfs_sim::world::{Death, Mounted, Shape, Started};
use common::{cluster, pattern, read_file, simulated, write_file};
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

/// Writes files of these lengths, during which the node dies at one device write, then looks at all
/// of them: with every target, and with each in turn lost. False if that write never came.
async fn crash_at(handle: &Handle, disk: usize, write: u64, death: Death, lengths: &[usize]) -> bool {
    let context = format!("{death:?} at write {write} of disk {disk}");
    let world = cluster(handle, Shape::default(), 100 + write).await;
    let writer = world.mount("writer").await.unwrap();
    let files: Vec<(Vec<u8>, Bytes)> = lengths
        .iter()
        .map(|length| (format!("file-{length}").into_bytes(), pattern(*length as u64, *length)))
        .collect();
    world.halt_disk_after(disk, write);
    let (client, written) = (writer.client.clone(), files.clone());
    let writing = writer.handle.spawn(async move {
        for (name, bytes) in written {
            write_file(&client, client.root(), &name, &bytes).await;
        }
    });
    let halted = handle.timeout(Duration::from_secs(3), world.halted()).await.is_some();
    world.crash_server(death);
    assert_eq!(world.start_server().await.unwrap(), Started::Serving, "{context}");
    // The client outlives the crash: its operations end well.
    writing.await.expect("the client lives");
    world.crash_server(death);
    for lost in [None, Some(0), Some(1), Some(2)] {
        let context = format!("{context}, then target {lost:?} lost");
        let world = world.copy();
        if let Some(lost) = lost {
            world.disk(lost).fail();
        }
        assert_eq!(world.start_server().await.unwrap(), Started::Serving, "{context}");
        let reader = world.mount("reader").await.unwrap();
        for (name, bytes) in &files {
            let damaged = format!("{context}: {} is damaged", String::from_utf8_lossy(name));
            assert!(read_by_name(&reader, name).await == *bytes, "{damaged}");
        }
        if lost.is_none() {
            let report = world.node().check(false, true).await;
            assert_eq!((report.problems, report.degraded), (Vec::new(), 0), "{context}");
        }
        reader.kill();
        world.crash_server(Death::Process);
    }
    halted
}

/// Every write to each target while files of these lengths are written, with both kinds of death.
fn crash_everywhere(lengths: &'static [usize]) {
    for disk in 0..3 {
        for death in [Death::Power, Death::Process] {
            let mut write = 1;
            while simulated(write, |handle| async move { crash_at(&handle, disk, write, death, lengths).await }) {
                write += 1;
            }
            assert!(write > 5, "only {write} writes to disk {disk}: nothing was crashed");
        }
    }
}

#[test]
fn acknowledged_bytes_survive_a_crash_at_every_device_write() {
    crash_everywhere(&[MIB, 300_000]);
}

/// The same with less in each write.
#[test]
fn acknowledged_small_files_survive_a_crash_at_every_device_write() {
    crash_everywhere(&[100_000, 20_000]);
}
