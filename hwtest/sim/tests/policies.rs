//! Directories with policies of their own beside each other in one volume.

mod common;

use cfs_client::{Caller, Client};
use cfs_sim::world::Shape;
use cfs_wire::Errno;
use cfs_wire::meta::XATTR_POLICY;
use common::{cluster, pattern, read_file, simulated, write_file};
use std::rc::Rc;

/// Directory and how many lost targets it survives.
const POLICIES: [(&str, usize); 4] = [("1+0", 0), ("2+1", 1), ("2x", 1), ("3x", 2)];
/// One that goes to a segment, one that goes to a replicated blob, one that lives in its inode.
const LENGTHS: [usize; 3] = [700_000, 20_000, 100];

async fn populate(client: &Rc<Client>) {
    for (index, (policy, _)) in POLICIES.iter().enumerate() {
        let entry = client.mkdir(Caller::default(), client.root(), policy.as_bytes(), 0o755, 0).await.unwrap();
        client.setxattr(entry.attr.ino, XATTR_POLICY, policy.as_bytes(), 0).await.unwrap();
        for length in LENGTHS {
            let bytes = pattern((index * 10 + length) as u64, length);
            write_file(client, entry.attr.ino, length.to_string().as_bytes(), &bytes).await;
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
            match read_file(client, dir, length.to_string().as_bytes()).await {
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
            // 2+1 by default, metadata that survives the loss of two.
            let shape = Shape { targets: 5, tolerate: Some(2), ..Shape::default() };
            let world = cluster(&handle, shape, 50 + seed as u64).await;
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
                write_file(&late.client, dir, b"late", &bytes).await;
                assert!(read_file(&late.client, dir, b"late").await.unwrap() == bytes);
            }
        });
        unreadable += counted.get();
    }
    // The twin: what promises nothing does lose something, so the losses were real.
    assert!(unreadable > 0, "nothing was ever lost, even without redundancy");
}
