//! Hot blobs are limited, and the packer comes when the limit is met.

mod common;

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

/// The twin: without the limit they stay until the packer comes by itself.
#[test]
fn below_their_limit_hot_blobs_wait_for_the_packer() {
    let (most, later) = simulated(61, |handle| write_small_files(handle, 50));
    assert!(later == most && most > 3 * FILES as u64 * LENGTH as u64 / 5, "{later} of {most}");
}
