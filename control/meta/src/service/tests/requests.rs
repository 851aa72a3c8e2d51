//! One client: what it asks for happens once, whatever is lost on the way.

use super::client::{Client, errno, name};
use super::cluster::{SHARDS, simulate};
use cfs_wire::meta::{MetaCall, MetaError, MetaOp, MetaReply};
use cfs_wire::{Errno, Ino, SessionId, ShardId};
use std::time::Duration;

#[test]
pub fn a_single_client_creates_finds_renames_and_waits_for_nobody() {
    simulate(1, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert_eq!(a.lookup(Ino::ROOT, "file").await, Ok(file));
        assert_eq!(a.create(Ino::ROOT, "file").await, Err(errno(Errno::EEXIST)));
        let renamed = a.rename(Ino::ROOT, "file", Ino::ROOT, "other").await;
        assert_eq!(renamed, Ok(MetaReply::Renamed { moved: vec![file], replaced: None }));
        assert_eq!(a.lookup(Ino::ROOT, "file").await, Err(errno(Errno::ENOENT)));
        assert_eq!(a.lookup(Ino::ROOT, "other").await, Ok(file));
        assert_eq!(a.stat(file).await.unwrap().nlink, 1);
        assert!(a.is_cached(file));
        assert!(a.acquire(file).await);
        assert_eq!(a.unlink(Ino::ROOT, "other").await, Ok(MetaReply::Removed { ino: file, nlink: 0 }));
        assert_eq!(a.events.borrow().len(), 0, "nobody else is there");
    });
}

#[test]
pub fn a_repeated_request_is_answered_from_the_stored_reply() {
    simulate(2, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        a.create(Ino::ROOT, "file").await.unwrap();
        let unlink = a.next_call(MetaOp::Unlink { dir: Ino::ROOT, name: name("file") });
        let first = a.send(unlink.clone()).await;
        assert!(matches!(first, Ok(MetaReply::Removed { nlink: 0, .. })), "{first:?}");
        assert_eq!(a.send(unlink.clone()).await, first);
        cluster.restart();
        assert_eq!(a.send(unlink.clone()).await, first);
        // The same under a new number is another request.
        assert_eq!(a.unlink(Ino::ROOT, "file").await, Err(errno(Errno::ENOENT)));
    });
}

#[test]
pub fn a_repetition_joins_the_call_that_still_runs() {
    simulate(3, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        let before = cluster.entries();
        let call = a.next_call(MetaOp::Link { ino: file, dir: Ino::ROOT, name: name("second") });
        let service = cluster.service().unwrap();
        let (one, two) = futures_util::future::join(service.call(call.clone()), service.call(call)).await;
        assert_eq!(one, two);
        assert_eq!(cluster.entries() - before, 1, "proposed once");
        assert_eq!(a.stat(file).await.unwrap().nlink, 2);
    });
}

#[test]
pub fn a_lost_reply_is_found_whatever_entry_the_node_dies_at() {
    for die_after in 1..12 {
        simulate(100 + die_after, move |cluster| async move {
            cluster.start().await;
            let a = Client::open(&cluster, 1).await;
            cluster.die_after(Some(die_after));
            cluster.keep_alive();
            let file = a.create(Ino::ROOT, "file").await.unwrap();
            assert_eq!(a.link(file, Ino::ROOT, "second").await, Ok(2));
            let renamed = a.rename(Ino::ROOT, "file", Ino::ROOT, "third").await;
            assert_eq!(renamed, Ok(MetaReply::Renamed { moved: vec![file], replaced: None }));
            assert_eq!(a.unlink(Ino::ROOT, "second").await, Ok(MetaReply::Removed { ino: file, nlink: 1 }));
            assert_eq!(a.lookup(Ino::ROOT, "third").await, Ok(file));
        });
    }
}

#[test]
pub fn a_call_for_the_wrong_shard_or_an_unknown_session_is_refused() {
    simulate(4, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let call = a.next_call(MetaOp::GetAttr { ino: Ino::ROOT });
        let wrong = MetaCall { shard: ShardId(2), ..call.clone() };
        assert!(matches!(a.send(wrong).await, Err(MetaError::Malformed(_))));
        let mut stranger = call;
        stranger.id.session = SessionId(99);
        assert_eq!(a.send(stranger).await, Err(MetaError::SessionUnknown));
        let reply = a.call(MetaOp::StatFs { count_inodes: false }).await;
        let Ok(MetaReply::StatFs(space)) = reply else { panic!("{reply:?}") };
        assert_eq!((space.bytes_total, space.bytes_free, space.inodes_used), (1 << 40, 1 << 39, 1));
    });
}

#[test]
pub fn the_inodes_of_all_shards_are_counted_where_that_is_asked_for() {
    simulate(6, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let mut shards = std::collections::BTreeSet::from([Ino::ROOT.shard()]);
        for name in 0..20 {
            let dir = a.mkdir(Ino::ROOT, &format!("directory {name}")).await.unwrap();
            a.create(dir, "file").await.unwrap();
            shards.insert(dir.shard());
        }
        assert_eq!(shards.len(), usize::from(SHARDS), "a shard has no directory");
        let count = async |count_inodes| match a.call(MetaOp::StatFs { count_inodes }).await {
            Ok(MetaReply::StatFs(stat)) => stat.inodes_used,
            other => panic!("{other:?}"),
        };
        assert_eq!(count(true).await, 41);
        assert!((2..41).contains(&count(false).await));
    });
}

#[test]
pub fn an_unlinked_file_is_reaped_when_nobody_holds_it() {
    simulate(5, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.call(MetaOp::Open { ino: file }).await.unwrap();
        a.unlink(Ino::ROOT, "file").await.unwrap();
        assert_eq!(a.call(MetaOp::GetAttr { ino: file }).await.map(|_| ()), Ok(()), "held open");
        a.vanish();
        // The session is fenced, its hold goes, the orphan is reaped.
        cluster.handle.sleep(Duration::from_secs(40)).await;
        let b = Client::open(&cluster, 2).await;
        let gone = b.call(MetaOp::GetAttr { ino: file }).await;
        assert!(matches!(gone, Err(MetaError::Errno(Errno::ENOENT | Errno::ESTALE))), "{gone:?}");
    });
}
