//! Space comes back after deletes, however often.

mod common;

use cfs_reactor::Handle;
use cfs_sim::world::Shape;
use common::{cluster, fill, simulated};
use std::time::Duration;

const ROUNDS: usize = 20;
/// What the free space of one target may lie below that after the first round: the log at rest
/// (256 KiB) and, of each of the shards' ordered stores, what is not worth merging (64 KiB).
const SLACK_BYTES: u64 = (256 << 10) + 4 * (64 << 10);

/// Fills and empties the file system; answers the free bytes of the fullest target after each
/// round. `keep`: a small file of each round stays.
async fn rounds(handle: Handle, count: usize, keep: bool) -> Vec<u64> {
    // Small, so that it is filled quickly: 15 zones.
    let shape = Shape { disk_bytes: 31 << 20, ..Shape::default() };
    let world = cluster(&handle, shape, 5).await;
    let mounted = world.mount("writer").await.unwrap();
    let client = &mounted.client;
    let mut free = Vec::new();
    for round in 0..count {
        let mut names = Vec::new();
        if keep {
            let (file, full) = fill(client, &format!("kept-{round}"), 1 << 20).await;
            assert!(!full);
            client.release(&file);
        }
        // Half of it in one file, then small ones, then whatever is left.
        for (name, most) in [("half".to_owned(), 4 << 20)]
            .into_iter()
            .chain((0..10).map(|index| (format!("small-{index}"), 3000 + 1500 * index)))
            .chain([("rest".to_owned(), usize::MAX)])
        {
            let (file, full) = fill(client, &name, most).await;
            client.release(&file);
            assert_eq!(full, name == "rest", "round {round}: {name}");
            names.push(name);
        }
        for name in names {
            client.unlink(client.root(), name.as_bytes()).await.unwrap();
        }
        handle.sleep(Duration::from_secs(15)).await;
        free.push(world.node().pool().readable().iter().map(|target| target.free()).min().unwrap());
    }
    free
}

fn run(count: usize, keep: bool) -> Vec<u64> {
    simulated(31, |handle| rounds(handle, count, keep))
}

fn lost(free: &[u64]) -> Option<usize> {
    free.iter().position(|now| now + SLACK_BYTES < free[0])
}

#[test]
fn twenty_rounds_of_filling_and_emptying_end_with_the_space_of_the_first() {
    let free = run(ROUNDS, false);
    assert_eq!(lost(&free), None, "{free:?}");
}

#[test]
fn a_small_file_that_stays_each_round_is_noticed() {
    let free = run(4, true);
    assert!(lost(&free).is_some(), "{free:?}");
}
