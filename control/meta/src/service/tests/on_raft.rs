//! The same stories on what a server runs: Raft log and ordered store over blobs.

use super::client::{Client, write_lock};
use super::cluster::{init, simulate_on_raft};
use super::cross_shard::{check, wander};
use crate::service::ShardMachine;
use crate::service::applied::encode_entry;
use crate::state::LogEntry;
use bytes::Bytes;
use cfs_consensus::{AppliedEntry, StateMachine as _};
use cfs_kv::testing::MemMedium;
use cfs_kv::{Kv, KvConfig};
use cfs_reactor::Executor;
use cfs_reactor::clock::SimClock;
use cfs_wire::meta::{MetaError, MetaOp, MetaReply};
use cfs_wire::{Ino, SessionId, ShardId};
use std::rc::Rc;
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
fn a_request_too_large_to_be_stored_is_refused_and_the_shard_goes_on() {
    simulate_on_raft(2, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let name = "n".repeat(cfs_kv::VALUE_BYTES_MAX);
        let mut open = a.next_call(MetaOp::OpenSession { client: name });
        open.id.session = SessionId(2);
        let refused = a.send(open).await;
        assert!(matches!(refused, Err(MetaError::Malformed(_))), "{refused:?}");
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert_eq!(a.lookup(Ino::ROOT, "file").await, Ok(file));
    });
}

#[test]
fn a_replica_without_space_applies_again_when_there_is_some() {
    let executor = Executor::new(Rc::new(SimClock::new(3)));
    let handle = executor.domain();
    let node = handle.clone();
    let story = async move {
        let medium = MemMedium::new(3);
        let config = KvConfig { memtable_bytes_max: 8 << 10, ..KvConfig::default() };
        let kv = Kv::open(medium.open(&node), &node, 0, config).await.unwrap();
        let machine = ShardMachine::new(ShardId(0), kv, &node);
        medium.fail_puts(Some(1));
        let (again, clock) = (medium.clone(), node.clone());
        node.spawn(async move {
            clock.sleep(Duration::from_secs(5)).await;
            again.fail_puts(None);
        });
        let fence = |number| LogEntry::Fence { session: SessionId(number) };
        let entries = std::iter::once(LogEntry::Init(init(node.wall()))).chain((0..1000).map(fence));
        let entries = (0..).zip(entries).map(|(number, entry)| AppliedEntry {
            mark: Bytes::copy_from_slice(&u64::to_le_bytes(number)),
            payload: Some(encode_entry(number, &entry)),
        });
        let started = node.now();
        let replies = machine.apply(entries.collect()).await.unwrap();
        assert_eq!(replies.len(), 1001);
        let waited = node.now() - started;
        assert!(waited >= Duration::from_secs(5), "it never was without space: {waited:?}");
    };
    executor.run_simulated(&handle, story).unwrap().unwrap();
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
