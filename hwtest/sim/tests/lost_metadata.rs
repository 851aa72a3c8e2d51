//! Targets that have lost everything are not taken for those of a new file system.

mod common;

use bytes::Bytes;
use cfs_device::{BlockDevice, Placement};
use cfs_sim::report::Checker;
use cfs_sim::world::{Shape, Started, World};
use common::{cluster, pattern, simulated, write_file};

/// Superblocks and rosters lie before the first zone.
const ZONES_AT: u64 = 1 << 20;

/// Zeroes in the place of everything in all zones, without a trace of what was there.
async fn erase_zones(world: &World) {
    let domain = world.handle.new_domain();
    let zeroes = Bytes::from(vec![0u8; 1 << 20]);
    for disk in world.disks() {
        let device = disk.open(&domain);
        for offset in (ZONES_AT..disk.size()).step_by(zeroes.len()) {
            let length = (disk.size() - offset).min(zeroes.len() as u64) as usize;
            device.write(offset, vec![zeroes.slice(..length)], Placement::Log, false).await.unwrap();
        }
        device.flush().await.unwrap();
    }
    domain.kill();
}

#[test]
fn a_file_system_whose_metadata_is_gone_from_all_targets_is_not_begun_anew() {
    simulated(41, |handle| async move {
        let world = cluster(&handle, Shape::default(), 41).await;
        let writer = world.mount("writer").await.unwrap();
        write_file(&writer.client, writer.client.root(), b"kept", &pattern(1, 100_000)).await;
        writer.kill();
        world.stop_server().await;
        erase_zones(&world).await;
        // Asked again it says the same: the refusal has not begun anything.
        for _ in 0..2 {
            let refused = world.start_server().await.expect_err("there is nothing to serve");
            assert_eq!(refused.checker, Checker::Restart);
            assert!(refused.detail.contains("the metadata of shard s0 is lost"), "{}", refused.detail);
            world.stop_server().await;
        }
    });
}

#[test]
fn a_file_system_that_was_never_started_is_begun_on_empty_zones() {
    simulated(42, |handle| async move {
        let world = World::new(&handle, Shape::default(), 42);
        world.format().await.unwrap();
        erase_zones(&world).await;
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
    });
}
