//! Hot blobs are limited, and the packer comes when the limit is met.

mod common;

use cfs_client::OpenFlags;
use cfs_reactor::Handle;
use cfs_sim::tuning::Tuning;
use cfs_sim::world::{Shape, World};
use cfs_wire::blobs::BlobKind;
use common::{cluster, pattern, read_file, simulated, write_file};
use std::time::Duration;

const FILES: usize = 110;
const LENGTH: usize = 20_000;

/// What hot blobs take of the target that holds most of them, in bytes.
fn hot(world: &World) -> u64 {
    let targets = world.node().pool().readable();
    targets.iter().map(|target| target.space().taken_by(BlobKind::Hot)).max().unwrap()
}

/// Writes small files with a packer that by itself comes once an hour; what hot blobs took at most,
/// and what they take ten seconds later.
async fn write_small_files(handle: Handle, hot_percent_max: u64) -> (u64, u64) {
    let mut tuning = Tuning { hot_percent_max, ..Tuning::default() };
    tuning.movers.pack = Duration::from_secs(3600);
    let world = cluster(&handle, Shape { tuning, ..Shape::default() }, 5).await;
    let mounted = world.mount("writer").await.unwrap();
    let client = &mounted.client;
    let mut most = 0;
    for index in 0..FILES {
        let bytes = pattern(index as u64, LENGTH);
        write_file(client, client.root(), format!("file {index}").as_bytes(), &bytes).await;
        most = most.max(hot(&world));
    }
    handle.sleep(Duration::from_secs(10)).await;
    for index in 0..FILES {
        let bytes = read_file(client, client.root(), format!("file {index}").as_bytes()).await.unwrap();
        assert!(bytes == pattern(index as u64, LENGTH), "file {index}");
    }
    (most, hot(&world))
}

#[test]
fn beyond_two_hundredths_of_a_target_hot_blobs_are_packed_at_once() {
    const LIMIT: u64 = (64 << 20) / 100 * 2;
    let (most, later) = simulated(61, |handle| write_small_files(handle, 2));
    // One writer: at most one blob was under way when the limit was met.
    let one = LENGTH as u64 + 4096;
    assert!(most >= LIMIT - one && most < LIMIT + one, "{most} of {LIMIT}");
    assert!(later < LIMIT / 2, "{later} of {LIMIT} are left");
}

/// A file that shares another's bytes is not the owner of the blobs: they are packed for it too, while
/// the other is there and when it is gone.
#[test]
fn hot_blobs_that_another_file_shares_are_packed_for_that_file() {
    simulated(62, |handle| async move {
        let mut tuning = Tuning::default();
        tuning.movers.pack = Duration::from_secs(3600);
        let world = cluster(&handle, Shape { tuning, ..Shape::default() }, 6).await;
        let mounted = world.mount("writer").await.unwrap();
        let (client, root) = (&mounted.client, mounted.client.root());
        for index in 0..4 {
            let [name, copy] = ["file", "copy"].map(|name| format!("{name} {index}"));
            write_file(client, root, name.as_bytes(), &pattern(index, LENGTH)).await;
            write_file(client, root, copy.as_bytes(), &pattern(9, 1)).await;
            let mut open = Vec::new();
            for name in [&name, &copy] {
                let ino = client.lookup(root, name.as_bytes()).await.unwrap().attr.ino;
                open.push(client.open(ino, OpenFlags::default(), false).await.unwrap());
            }
            let copied = client.copy_file_range(&open[0], 0, &open[1], 0, LENGTH as u64, false).await;
            assert_eq!(copied, Ok(LENGTH as u64));
            open.iter().for_each(|file| client.release(file));
            if index % 2 == 0 {
                client.unlink(root, name.as_bytes()).await.unwrap();
            }
        }
        // The inodes that were unlinked go when the server has heard that they are closed.
        handle.sleep(Duration::from_secs(5)).await;
        let node = world.node();
        let packer = &node.movers().packer;
        assert!(hot(&world) > 2 * LENGTH as u64);
        // The owners first; a second round has the rest.
        for extents in [2, 4, 0] {
            assert_eq!(packer.round(true).await.unwrap().extents, extents);
            handle.sleep(Duration::from_secs(15)).await;
        }
        assert_eq!(hot(&world), 0, "hot blobs are left");
        for index in 0..4 {
            let bytes = read_file(client, root, format!("copy {index}").as_bytes()).await.unwrap();
            assert!(bytes == pattern(index, LENGTH), "copy {index}");
        }
    });
}

/// The twin: without the limit they stay until the packer comes by itself.
#[test]
fn below_their_limit_hot_blobs_wait_for_the_packer() {
    let (most, later) = simulated(61, |handle| write_small_files(handle, 50));
    assert!(later == most && most > 3 * FILES as u64 * LENGTH as u64 / 5, "{later} of {most}");
}
