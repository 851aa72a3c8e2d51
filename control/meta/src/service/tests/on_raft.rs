//! The same stories on what a server runs: Raft log and ordered store over blobs.

use super::client::{Client, write_lock};
use super::cluster::simulate_on_raft;
use super::cross_shard::{check, wander};
use cfs_wire::Ino;
use cfs_wire::meta::{MetaOp, MetaReply};
use std::time::Duration;

#[test]
fn what_was_answered_survives_a_restart_on_the_real_store() {
    simulate_on_raft(1, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.truncate(file, 4096).await.unwrap();
        assert_eq!(b.stat(file).await.unwrap().size, 4096);
        assert_eq!(a.lock(file, write_lock(1, 0, 9), false).await, Ok(MetaReply::Done));
        let link = a.next_call(MetaOp::Link { ino: file, dir: Ino::ROOT, name: super::client::name("second") });
        let linked = a.send(link.clone()).await;
        b.stat(file).await.unwrap();
        cluster.restart();
        cluster.handle.sleep(Duration::from_millis(500)).await;
        assert!(b.is_cached(file));
        a.chmod(file, 0o600).await.unwrap();
        assert_eq!(b.stat(file).await.map(|attr| (attr.size, attr.mode, attr.nlink)), Ok((4096, 0o600, 2)));
        let refused = b.lock(file, write_lock(2, 0, 9), false).await;
        assert_eq!(refused, Ok(MetaReply::Conflict(Some(write_lock(1, 0, 9)))));
        let Ok(MetaReply::Entry(before)) = linked else { panic!("{linked:?}") };
        let Ok(MetaReply::Entry(after)) = a.send(link).await else { panic!("not an entry") };
        assert_eq!(before.attr, after.attr, "the stored reply, not a second link");
        check(&cluster).await;
    });
}

#[test]
fn names_and_inodes_agree_whichever_blob_the_node_dies_at() {
    for die_after in (1..120).step_by(9) {
        simulate_on_raft(die_after, move |cluster| async move {
            cluster.start().await;
            let client = Client::open(&cluster, 1).await;
            cluster.die_after(Some(die_after));
            cluster.keep_alive();
            wander(&client).await;
            check(&cluster).await;
        });
    }
}
