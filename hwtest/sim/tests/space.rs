//! Space comes back after deletes, however often, and also when what was deleted lay between what
//! stays.

mod common;

use cfs_client::{Caller, Client, NewFile, OpenFlags};
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_sim::checker::file_blobs;
use cfs_sim::tuning::Tuning;
use cfs_sim::world::{Death, Shape, Started};
use cfs_wire::data::Referent;
use cfs_wire::meta::{ShardOp, ShardReply};
use cfs_wire::{Epoch, Errno, ShardId};
use common::{cluster, fill, pattern, read_file, simulated, write_file};
use std::rc::Rc;
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

/// Of a small file: it is written as a hot blob, and packed with others.
const SMALL: usize = 40_000;
const TRIES: usize = 20;

/// Makes a small file; false when there is no room for it.
async fn small_file(client: &Rc<Client>, number: u64) -> bool {
    let name = number.to_string();
    let new = NewFile::regular(0o644, 0o022);
    let made = client.create(Caller::default(), client.root(), name.as_bytes(), new, OpenFlags::default()).await;
    let file = match made {
        Ok((_, file)) => file,
        Err(Errno::ENOSPC) => return false,
        Err(error) => panic!("{name}: {error}"),
    };
    let written = client.write(&file, 0, pattern(number, SMALL), false).await;
    let synced = client.fsync(&file, false).await;
    client.release(&file);
    match written.and(synced) {
        Ok(()) => true,
        Err(Errno::ENOSPC) => {
            client.unlink(client.root(), name.as_bytes()).await.unwrap();
            false
        }
        Err(error) => panic!("{name}: {error}"),
    }
}

/// Fills the file system with small files and lets them be packed, deletes `part` of a hundred of
/// them, and asks again for room for a tenth as many; how many of those could be made.
async fn refill(handle: Handle, part: u64) -> (usize, usize) {
    let mut tuning = Tuning { hot_percent_max: 60, ..Tuning::default() };
    tuning.movers.pack = Duration::from_secs(5);
    let world = cluster(&handle, Shape { disk_bytes: 31 << 20, tuning, ..Shape::default() }, 6).await;
    let mounted = world.mount("writer").await.unwrap();
    let client = &mounted.client;
    let (mut files, mut next, mut refused) = (Vec::new(), 0, 0);
    while refused < TRIES {
        next += 1;
        match small_file(client, next).await {
            true => files.push(next),
            // Packed they take less.
            false => {
                refused += 1;
                handle.sleep(Duration::from_secs(5)).await;
            }
        }
    }
    let mut random = SplitMix64::new(7);
    let (gone, stay): (Vec<u64>, Vec<u64>) = files.iter().partition(|_| random.below(100) < part);
    for number in gone {
        client.unlink(client.root(), number.to_string().as_bytes()).await.unwrap();
    }
    let wanted = files.len() / 10;
    let mut made = 0;
    for _ in 0..TRIES + wanted {
        next += 1;
        match made < wanted && small_file(client, next).await {
            true => made += 1,
            false => handle.sleep(Duration::from_secs(5)).await,
        }
    }
    for number in stay {
        let bytes = read_file(client, client.root(), number.to_string().as_bytes()).await.unwrap();
        assert!(bytes == pattern(number, SMALL), "file {number}");
    }
    (made, wanted)
}

#[test]
fn a_third_of_all_small_files_leaves_room_for_others_although_no_segment_is_mostly_dead() {
    let (made, wanted) = simulated(32, |handle| refill(handle, 33));
    assert!(wanted > 15, "{wanted} is a test of nothing");
    assert_eq!(made, wanted);
}

/// The twin: with everything alive there is nothing to be had.
#[test]
fn without_deletes_there_is_no_room() {
    let (made, wanted) = simulated(32, |handle| refill(handle, 0));
    assert!(made < wanted / 4, "{made} of {wanted}");
}

/// A segment of which every slot is marked dead, and the node died before it removed it.
#[test]
fn a_segment_that_was_marked_dead_and_not_removed_goes_with_the_orphans() {
    simulated(33, |handle| async move {
        let mut tuning = Tuning::default();
        (tuning.movers.collect, tuning.movers.orphans) = (Duration::from_secs(3600), Duration::from_secs(30));
        let world = cluster(&handle, Shape { shards: 1, tuning, ..Shape::default() }, 8).await;
        let mounted = world.mount("writer").await.unwrap();
        let client = &mounted.client;
        write_file(client, client.root(), b"f", &pattern(1, 300_000)).await;
        client.unlink(client.root(), b"f").await.unwrap();
        handle.sleep(Duration::from_secs(2)).await;
        assert!(file_blobs(&world) > 0, "nothing was collected yet");
        // What the collector does, up to where it dies.
        let meta = |op| {
            let world = world.clone();
            async move { world.node().meta().shard_call(ShardId(0), op).await.unwrap() }
        };
        let ShardReply::Released(released) = meta(ShardOp::ListReleased { max: 100 }).await else { panic!() };
        let referents: Vec<Referent> = released.into_iter().map(|(referent, _)| referent).collect();
        let slot = |referent: &Referent| match referent {
            Referent::Slot(segment, slot) => (*segment, *slot),
            Referent::Hot(blob) => panic!("{blob} is no segment"),
        };
        let ShardReply::Epoch(minimum) = meta(ShardOp::GetEpoch).await else { panic!() };
        let freeze = ShardOp::Freeze { referents: referents.clone(), epoch: Epoch(minimum.0 + 2) };
        let ShardReply::Held(held) = meta(freeze).await else { panic!() };
        assert!(!held.is_empty() && !held.contains(&true));
        meta(ShardOp::MarkDead { slots: referents.iter().map(slot).collect() }).await;
        meta(ShardOp::Resolve { referents }).await;
        world.crash_server(Death::Power);
        assert_eq!(world.start_server().await.unwrap(), Started::Serving);
        handle.sleep(Duration::from_secs(100)).await;
        assert_eq!(file_blobs(&world), 0);
    });
}
