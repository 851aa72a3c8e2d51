//! What spans shards happens wholly or not at all, whenever the node dies.

use super::client::{Client, errno, name};
use super::cluster::{Cluster, SHARDS, seeds, simulate};
use crate::state::transaction::TxnState;
use crate::state::{self};
use cfs_wire::meta::{AuditRecord, FileKind, MetaError, MetaOp, MetaReply, ShardOp, ShardReply};
use cfs_wire::{Errno, Ino, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

/// Every record of every shard, through the service.
async fn audit(cluster: &Cluster) -> Vec<AuditRecord> {
    let service = cluster.service().expect("the node lives");
    let mut all = Vec::new();
    for shard in (0..SHARDS).map(ShardId) {
        let mut after = None;
        loop {
            let reply = service.shard_call(shard, ShardOp::Audit { after, max: 64 }).await;
            let Ok(ShardReply::Audit { records, next }) = reply else { panic!("not an audit: {reply:?}") };
            all.extend(records);
            if next.is_none() {
                break;
            }
            after = next;
        }
    }
    all
}

/// Names, link counts and parents agree. Answers the names below the root.
pub async fn check(cluster: &Cluster) -> BTreeMap<(Ino, String), Ino> {
    cluster.settle().await;
    let records = audit(cluster).await;
    let seed = cluster.seed;
    let mut entries = BTreeMap::new();
    let mut links: BTreeMap<Ino, u32> = BTreeMap::new();
    let mut parents = BTreeMap::new();
    let orphans: BTreeSet<Ino> =
        records.iter().filter_map(|r| if let AuditRecord::Orphan { ino } = r { Some(*ino) } else { None }).collect();
    for record in &records {
        if let AuditRecord::Entry { dir, name, ino, kind } = record {
            entries.insert((*dir, String::from_utf8(name.to_vec()).unwrap()), *ino);
            *links.entry(*ino).or_default() += 1;
            if *kind == FileKind::Directory {
                *links.entry(*dir).or_default() += 1;
                assert_eq!(parents.insert(*ino, *dir), None, "seed {seed}: {ino} is named twice");
            }
        }
    }
    let mut there = BTreeSet::new();
    for record in &records {
        let AuditRecord::Inode { ino, kind, nlink, parent, .. } = record else { continue };
        there.insert(*ino);
        let mut expected = links.get(ino).copied().unwrap_or(0);
        if *kind == FileKind::Directory && !orphans.contains(ino) {
            // Its own `.`; the root is also its own `..`.
            expected += if *ino == Ino::ROOT { 2 } else { 1 };
            if *ino != Ino::ROOT {
                assert_eq!(parent.as_ref(), parents.get(ino), "seed {seed}: parent of {ino}");
            }
        }
        assert_eq!(*nlink, expected, "seed {seed}: links of {ino} {kind:?}");
        assert_eq!(*nlink == 0, orphans.contains(ino), "seed {seed}: orphan {ino}");
    }
    for ino in links.keys() {
        assert!(there.contains(ino), "seed {seed}: {ino} is named and not there");
    }
    entries
}

/// Directories below the root in as many shards.
async fn directories(client: &Client) -> BTreeMap<ShardId, Ino> {
    let mut by_shard = BTreeMap::new();
    for number in 0..64 {
        let dir = client.mkdir(Ino::ROOT, &format!("dir{number}")).await.unwrap();
        by_shard.entry(dir.shard()).or_insert(dir);
        if by_shard.len() == usize::from(SHARDS) {
            return by_shard;
        }
    }
    panic!("64 names fall into {} of {SHARDS} shards", by_shard.len());
}

/// A story that crosses shards with every step.
pub async fn wander(client: &Client) {
    let dirs = directories(client).await;
    let (one, two, three) = (dirs[&ShardId(1)], dirs[&ShardId(2)], dirs[&ShardId(3)]);
    let file = client.create(one, "file").await.unwrap();
    assert_eq!(client.link(file, two, "link").await, Ok(2));
    let renamed = |moved: Ino, replaced| Ok(MetaReply::Renamed { moved: vec![moved], replaced });
    assert_eq!(client.rename(one, "file", three, "moved").await, renamed(file, None));
    assert_eq!(client.lookup(three, "moved").await, Ok(file));
    assert_eq!(client.lookup(one, "file").await, Err(errno(Errno::ENOENT)));
    let victim = client.create(three, "victim").await.unwrap();
    let replaced = client.rename(two, "link", three, "victim").await;
    assert_eq!(replaced, renamed(file, Some((victim, 0))));
    assert_eq!(client.unlink(three, "moved").await, Ok(MetaReply::Removed { ino: file, nlink: 1 }));
    let sub = client.mkdir(one, "sub").await.unwrap();
    assert_eq!(client.rename(one, "sub", two, "sub").await, renamed(sub, None));
    assert_eq!(client.create(sub, "inside").await.map(|ino| ino.shard()), Ok(sub.shard()));
    let full = client.call(MetaOp::Rmdir { dir: two, name: name("sub") }).await;
    assert_eq!(full, Err(errno(Errno::ENOTEMPTY)));
    client.unlink(sub, "inside").await.unwrap();
    let removed = client.call(MetaOp::Rmdir { dir: two, name: name("sub") }).await;
    assert_eq!(removed, Ok(MetaReply::Removed { ino: sub, nlink: 0 }));
    assert_eq!(client.stat(two).await.unwrap().nlink, 2);
}

#[test]
pub fn names_and_inodes_agree_whatever_entry_the_node_dies_at() {
    let mut entries = 0;
    simulate_counting(&mut entries);
    assert!(entries > 60, "the story takes {entries} entries");
    for die_after in 1..=entries {
        simulate(die_after, move |cluster| async move {
            cluster.start().await;
            let client = Client::open(&cluster, 1).await;
            cluster.die_after(Some(die_after));
            cluster.keep_alive();
            wander(&client).await;
            check(&cluster).await;
        });
    }
}

/// How many entries the story takes when nothing dies.
fn simulate_counting(entries: &mut u64) {
    let counted = Rc::new(std::cell::Cell::new(0));
    let counter = counted.clone();
    simulate(0, move |cluster| async move {
        cluster.start().await;
        let client = Client::open(&cluster, 1).await;
        let before = cluster.entries();
        wander(&client).await;
        cluster.settle().await;
        counter.set(cluster.entries() - before);
        check(&cluster).await;
    });
    *entries = counted.get();
}

#[test]
pub fn a_directory_does_not_move_into_itself_across_shards() {
    simulate(1, |cluster| async move {
        cluster.start().await;
        let client = Client::open(&cluster, 1).await;
        let dirs = directories(&client).await;
        let (one, two) = (dirs[&ShardId(1)], dirs[&ShardId(2)]);
        let outer = client.mkdir(one, "outer").await.unwrap();
        client.rename(one, "outer", two, "outer").await.unwrap();
        let inner = client.mkdir(outer, "inner").await.unwrap();
        assert_eq!(client.rename(two, "outer", inner, "loop").await, Err(errno(Errno::EINVAL)));
        assert_eq!(client.lookup(two, "outer").await, Ok(outer));
        // The rename lock is free again.
        client.rename(two, "outer", one, "back").await.unwrap();
        check(&cluster).await;
    });
}

#[test]
pub fn opposite_renames_neither_deadlock_nor_close_a_loop() {
    for seed in seeds(40) {
        simulate(seed, move |cluster| async move {
            cluster.start().await;
            let a = Client::open(&cluster, 1).await;
            let b = Client::open(&cluster, 2).await;
            let dirs = directories(&a).await;
            let (one, two) = (dirs[&ShardId(1)], dirs[&ShardId(2)]);
            let x = a.mkdir(one, "x").await.unwrap();
            let y = a.mkdir(two, "y").await.unwrap();
            // x into y and y into x: at most one can be.
            let (left, right) = (a.clone(), b.clone());
            let left = cluster.handle.spawn(async move { left.rename(one, "x", y, "x").await });
            let right = cluster.handle.spawn(async move { right.rename(two, "y", x, "y").await });
            let (left, right) = (left.await.unwrap(), right.await.unwrap());
            let refused = |result: &cfs_wire::meta::MetaResult| *result == Err(errno(Errno::EINVAL));
            assert_eq!([&left, &right].iter().filter(|result| result.is_ok()).count(), 1, "seed {seed}");
            assert_eq!([&left, &right].iter().filter(|result| refused(result)).count(), 1, "seed {seed}");
            check(&cluster).await;
        });
    }
}

#[test]
pub fn clients_that_fight_over_names_in_all_shards_leave_a_sound_volume() {
    for seed in seeds(15) {
        simulate(seed, move |cluster| async move {
            cluster.start().await;
            let first = Client::open(&cluster, 1).await;
            let dirs: Vec<Ino> = directories(&first).await.into_values().collect();
            cluster.die_after(Some(40 + seed * 7));
            cluster.keep_alive();
            let mut fighting = Vec::new();
            for session in 2..5 {
                let (cluster, dirs) = (cluster.clone(), dirs.clone());
                fighting.push(cluster.handle.clone().spawn(async move {
                    let client = Client::open(&cluster, session).await;
                    for _ in 0..25 {
                        fight(&client, &dirs).await;
                    }
                }));
            }
            for task in fighting {
                task.await.unwrap();
            }
            check(&cluster).await;
        });
    }
}

/// One random operation on few names; every answer must be one that a program may see.
async fn fight(client: &Client, dirs: &[Ino]) {
    let random = |bound: usize| (client.cluster.handle.random_u64() % bound as u64) as usize;
    let (from, to) = (dirs[random(dirs.len())], dirs[random(dirs.len())]);
    let (one, other) = (["p", "q"][random(2)], ["p", "q"][random(2)]);
    let op = random(6);
    let result = match op {
        0 => client.create(from, one).await.map(|_| ()),
        1 => client.mkdir(from, one).await.map(|_| ()),
        2 => client.unlink(from, one).await.map(|_| ()),
        3 => client.call(MetaOp::Rmdir { dir: from, name: name(one) }).await.map(|_| ()),
        4 => match client.lookup(from, one).await {
            // Gone since it was looked up.
            Ok(ino) => match client.link(ino, to, other).await {
                Err(MetaError::Errno(Errno::ESTALE)) => Ok(()),
                linked => linked.map(|_| ()),
            },
            Err(error) => Err(error),
        },
        _ => client.rename(from, one, to, other).await.map(|_| ()),
    };
    let seed = client.cluster.seed;
    let usual =
        [Errno::ENOENT, Errno::EEXIST, Errno::EISDIR, Errno::ENOTDIR, Errno::ENOTEMPTY, Errno::EPERM, Errno::EINVAL];
    if let Err(error) = &result {
        assert!(usual.iter().any(|usual| *error == errno(*usual)), "seed {seed}: operation {op} answered {error:?}");
    }
}

#[test]
pub fn an_answered_rename_is_seen_in_both_shards_at_once() {
    for seed in seeds(10) {
        simulate(seed, move |cluster| async move {
            cluster.start().await;
            let a = Client::open(&cluster, 1).await;
            let b = Client::open(&cluster, 2).await;
            let dirs = directories(&a).await;
            let (one, two) = (dirs[&ShardId(1)], dirs[&ShardId(2)]);
            a.mkdir(one, "sub").await.unwrap();
            // B caches both directories' attributes.
            assert_eq!((b.stat(one).await.unwrap().nlink, b.stat(two).await.unwrap().nlink), (3, 2));
            a.rename(one, "sub", two, "sub").await.unwrap();
            assert_eq!((b.stat(one).await.unwrap().nlink, b.stat(two).await.unwrap().nlink), (2, 3), "seed {seed}");
        });
    }
}

#[test]
pub fn a_participant_whose_coordinator_knows_nothing_gives_up() {
    simulate(2, |cluster| async move {
        cluster.start().await;
        let client = Client::open(&cluster, 1).await;
        let dirs = directories(&client).await;
        let two = dirs[&ShardId(2)];
        // A prepare that was sent before its coordinator aborted, and arrives after.
        let txn = state::TxnId { coordinator: ShardId(1), number: 999 };
        let action = state::Action::Insert {
            dir: two,
            name: name("ghost"),
            ino: Some(dirs[&ShardId(1)]),
            kind: FileKind::Directory,
            replaces: None,
            links: 1,
            now: cluster.handle.wall(),
        };
        let prepare = crate::service::PeerCall::Prepare {
            txn,
            session: client.session,
            actions: vec![action],
            now: cluster.handle.wall(),
        };
        cluster.service().unwrap().peer_call(ShardId(2), prepare).await.unwrap();
        let listed = state::list_transactions(&*cluster.state(ShardId(2)), ShardId(2)).await.unwrap();
        assert!(matches!(listed[..], [TxnState::Participating { committed: false, .. }]), "{listed:?}");
        let started = cluster.handle.now();
        assert_eq!(client.lookup(two, "ghost").await, Err(errno(Errno::ENOENT)), "waits for the transaction's end");
        assert!(cluster.handle.now() - started < Duration::from_secs(10));
        check(&cluster).await;
    });
}

#[test]
fn one_seed_tells_one_story() {
    let tell = |seed| {
        simulate(seed, |cluster| async move {
            cluster.start().await;
            let client = Client::open(&cluster, 1).await;
            cluster.die_after(Some(30));
            cluster.keep_alive();
            wander(&client).await;
        })
    };
    assert_eq!(tell(7), tell(7));
    assert_ne!(tell(7), tell(8));
}
