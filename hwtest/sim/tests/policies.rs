//! Directories with policies of their own beside each other in one volume.

use bytes::Bytes;
use cfs_client::{Caller, Client, NewFile, OpenFlags};
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_sim::world::{Shape, Started, World};
use cfs_wire::meta::XATTR_POLICY;
use cfs_wire::{Errno, Ino};
use std::future::Future;
use std::rc::Rc;

/// Directory and how many lost targets it survives.
const POLICIES: [(&str, usize); 4] = [("1+0", 0), ("2+1", 1), ("2x", 1), ("3x", 2)];
/// One that goes to a segment, one that goes to a replicated blob, one that lives in its inode.
const LENGTHS: [usize; 3] = [700_000, 20_000, 100];

fn simulated<F: Future<Output = ()> + 'static>(seed: u64, body: impl FnOnce(Handle) -> F) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    executor.run_simulated(&handle, body(handle.clone())).expect("it goes on").expect("it ends");
}

fn pattern(seed: u64, length: usize) -> Bytes {
    let mut random = SplitMix64::new(seed);
    (0..length.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).take(length).collect()
}

/// Five targets, 2+1 by default, metadata that survives the loss of two.
async fn cluster(handle: &Handle, seed: u64) -> Rc<World> {
    let shape = Shape { targets: 5, tolerate: Some(2), ..Shape::default() };
    let world = World::new(handle, shape, seed);
    world.format().await.unwrap();
    assert_eq!(world.start_server().await.unwrap(), Started::Serving);
    world
}

async fn write_file(client: &Rc<Client>, dir: Ino, name: &str, bytes: &Bytes) {
    let new = NewFile::regular(0o644, 0o022);
    let (_, file) = client.create(Caller::default(), dir, name.as_bytes(), new, OpenFlags::default()).await.unwrap();
    for (index, part) in bytes.chunks(128 << 10).enumerate() {
        let offset = (index * (128 << 10)) as u64;
        client.write(&file, offset, Bytes::copy_from_slice(part), false).await.unwrap();
    }
    client.fsync(&file, false).await.unwrap();
    client.release(&file);
}

async fn read_file(client: &Rc<Client>, dir: Ino, name: &str) -> Result<Vec<u8>, Errno> {
    let ino = client.lookup(dir, name.as_bytes()).await.expect("the name is there").attr.ino;
    let file = client.open(ino, OpenFlags::default(), false).await?;
    let mut bytes = Vec::new();
    let outcome = loop {
        match client.read(&file, bytes.len() as u64, 256 << 10).await {
            Ok(part) if part.is_empty() => break Ok(bytes),
            Ok(part) => bytes.extend_from_slice(&part),
            Err(error) => break Err(error),
        }
    };
    client.release(&file);
    outcome
}

async fn populate(client: &Rc<Client>) {
    for (index, (policy, _)) in POLICIES.iter().enumerate() {
        let entry = client.mkdir(Caller::default(), client.root(), policy.as_bytes(), 0o755, 0).await.unwrap();
        client.setxattr(entry.attr.ino, XATTR_POLICY, policy.as_bytes(), 0).await.unwrap();
        for length in LENGTHS {
            let bytes = pattern((index * 10 + length) as u64, length);
            write_file(client, entry.attr.ino, &length.to_string(), &bytes).await;
        }
    }
}

/// Reads everything: what its policy promises must be there, the rest may be EIO, and no byte is
/// ever another.
async fn verify(client: &Rc<Client>, lost: usize) -> usize {
    let mut unreadable = 0;
    for (index, (policy, survives)) in POLICIES.iter().enumerate() {
        let dir = client.lookup(client.root(), policy.as_bytes()).await.unwrap().attr.ino;
        for length in LENGTHS {
            match read_file(client, dir, &length.to_string()).await {
                Ok(bytes) => assert!(
                    bytes == pattern((index * 10 + length) as u64, length),
                    "{policy} with {lost} lost: other bytes"
                ),
                Err(error) => {
                    assert!(lost > *survives, "{policy} with {lost} lost: {error:?}");
                    assert_eq!(error, Errno::EIO);
                    unreadable += 1;
                }
            }
        }
    }
    unreadable
}

#[test]
fn each_directory_survives_what_its_policy_promises() {
    let mut unreadable = 0;
    for (seed, pair) in [[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]].into_iter().enumerate() {
        let counted = Rc::new(std::cell::Cell::new(0));
        let total = counted.clone();
        simulated(40 + seed as u64, move |handle| async move {
            let world = cluster(&handle, 50 + seed as u64).await;
            let writer = world.mount("writer").await.unwrap();
            populate(&writer.client).await;
            for (index, disk) in pair.into_iter().enumerate() {
                world.disk(disk).fail();
                let reader = world.mount(&format!("reader {index}")).await.unwrap();
                total.set(total.get() + verify(&reader.client, index + 1).await);
            }
            // With two gone every policy goes on taking writes: k shrinks, m stays.
            let late = world.mount("late").await.unwrap();
            for (policy, _) in POLICIES {
                let dir = late.client.lookup(late.client.root(), policy.as_bytes()).await.unwrap().attr.ino;
                let bytes = pattern(99, 300_000);
                write_file(&late.client, dir, "late", &bytes).await;
                assert!(read_file(&late.client, dir, "late").await.unwrap() == bytes);
            }
        });
        unreadable += counted.get();
    }
    // The twin: what promises nothing does lose something, so the losses were real.
    assert!(unreadable > 0, "nothing was ever lost, even without redundancy");
}
