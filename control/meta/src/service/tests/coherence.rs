//! Two clients: what one was told is what the other sees.

use super::client::{Client, errno, name, node, write_lock};
use super::cluster::{Cluster, SHARDS, seeds, simulate};
use cfs_wire::meta::{Commit, Event, EventsCall, FileKind, FileWrite, MetaCall, MetaError, MetaOp, MetaReply};
use cfs_wire::{Errno, Ino, ShardId};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

#[test]
pub fn nobody_reads_stale_attributes_after_a_change_was_answered() {
    for seed in seeds(20) {
        simulate(seed, move |cluster| async move {
            cluster.start().await;
            let a = Client::open(&cluster, 1).await;
            let b = Client::open(&cluster, 2).await;
            let file = a.create(Ino::ROOT, "file").await.unwrap();
            let reader = b.clone();
            let reading = cluster.handle.spawn(async move {
                for _ in 0..200 {
                    reader.stat(file).await.unwrap();
                    reader.cluster.handle.sleep(Duration::from_micros(300)).await;
                }
            });
            for mode in 1..=20 {
                a.chmod(file, mode).await.unwrap();
                assert_eq!(b.stat(file).await.unwrap().mode, mode, "seed {seed}");
            }
            reading.await.unwrap();
            assert!(b.events.borrow().contains(&Event::Invalidate { ino: file }), "seed {seed}");
        });
    }
}

#[test]
pub fn a_name_that_is_gone_takes_its_cached_attributes_along() {
    simulate(1, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.link(file, Ino::ROOT, "second").await.unwrap();
        assert_eq!(b.stat(file).await.unwrap().nlink, 2);
        assert!(b.is_cached(file));
        a.unlink(Ino::ROOT, "second").await.unwrap();
        assert_eq!(b.stat(file).await.unwrap().nlink, 1);
        assert!(!b.events.borrow().is_empty());
    });
}

#[test]
pub fn a_change_waits_for_a_silent_reader_no_longer_than_its_lease() {
    simulate(2, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        b.stat(file).await.unwrap();
        b.vanish();
        let started = cluster.handle.now();
        a.chmod(file, 0o600).await.unwrap();
        let waited = cluster.handle.now() - started;
        assert!(!b.is_cached(file), "B may still serve the old mode after {waited:?}");
        assert!(waited <= Duration::from_millis(10_300), "waited {waited:?}");
        // The second change finds nobody.
        let started = cluster.handle.now();
        a.chmod(file, 0o400).await.unwrap();
        assert!(cluster.handle.now() - started < Duration::from_millis(10));
    });
}

#[test]
pub fn a_new_leader_takes_every_session_for_a_reader() {
    simulate(3, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        b.stat(file).await.unwrap();
        cluster.restart();
        assert!(b.is_cached(file), "B has heard nothing yet");
        a.chmod(file, 0o600).await.unwrap();
        assert!(!b.is_cached(file));
        assert_eq!(b.stat(file).await.unwrap().mode, 0o600);
    });
}

#[test]
pub fn a_read_recalls_the_writers_size() {
    simulate(4, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert!(a.acquire(file).await);
        a.dirty.borrow_mut().insert(file, 4096);
        assert_eq!(b.stat(file).await.unwrap().size, 4096);
        assert_eq!(*a.events.borrow(), [Event::RecallWrite { ino: file }]);
        // Reading is not writing: A may have its lease back.
        assert!(a.acquire(file).await);
        assert!(!b.is_cached(file), "whoever may write changes the size unseen");
    });
}

#[test]
pub fn a_grant_that_is_renewed_outlasts_a_lease_and_ends_with_the_next_change() {
    simulate(4, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        let version = b.stat(file).await.unwrap().version;
        let renew = async |client: &Client| match client.call(MetaOp::Renew { inos: vec![Ino::ROOT, file] }).await {
            Ok(MetaReply::Renewed(renewals)) => renewals[1],
            reply => panic!("{reply:?}"),
        };
        for _ in 0..4 {
            cluster.handle.sleep(Duration::from_secs(5)).await;
            let renewed = renew(&b).await;
            assert_eq!((renewed.version, renewed.grant.read_ms), (version, 10_000));
        }
        cluster.handle.sleep(Duration::from_secs(5)).await;
        a.chmod(file, 0o600).await.unwrap();
        assert_eq!(*b.events.borrow(), [Event::Invalidate { ino: file }]);
        // Whoever may write changes it unseen: nothing is granted, and nobody is recalled.
        assert!(a.acquire(file).await);
        assert_eq!((renew(&b).await.version, renew(&b).await.grant.read_ms), (0, 0));
        assert!(a.events.borrow().is_empty());
        assert_eq!(renew(&a).await.version, version + 1);
        let gone = b.call(MetaOp::Renew { inos: vec![Ino::new(ShardId(0), 12345)] }).await;
        assert!(matches!(&gone, Ok(MetaReply::Renewed(renewals)) if renewals[0].version == 0), "{gone:?}");
        let elsewhere = vec![Ino::ROOT, Ino::new(ShardId(1), 7)];
        assert!(matches!(b.call(MetaOp::Renew { inos: elsewhere }).await, Err(MetaError::Malformed(_))));
    });
}

#[test]
pub fn readers_are_told_whether_pages_of_mappings_are_what_changes() {
    simulate(4, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let ino = a.create(Ino::ROOT, "file").await.unwrap();
        let bytes = || FileWrite::Inline { offset: 0, bytes: b"bytes".to_vec() };
        let kinds = [
            (vec![bytes()], Event::InvalidateForPages { ino }),
            (vec![bytes(), FileWrite::DropCapability], Event::Invalidate { ino }),
            (vec![bytes(), FileWrite::Extend { size: 9 }], Event::Invalidate { ino }),
            (vec![], Event::Invalidate { ino }),
        ];
        for (sequence, (writes, told)) in (1..).zip(kinds) {
            b.stat(ino).await.unwrap();
            b.events.borrow_mut().clear();
            let commit = Commit { ino, sequence, writes, mtime: None, kill_privileges: false };
            a.call(MetaOp::Commit(commit)).await.unwrap();
            assert_eq!(*b.events.borrow(), [told]);
        }
    });
}

#[test]
pub fn who_has_given_a_write_lease_back_is_told_of_the_next_change() {
    simulate(4, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        cluster.handle.sleep(Duration::from_secs(11)).await;
        assert!(a.acquire(file).await);
        cluster.handle.sleep(Duration::from_secs(11)).await;
        b.chmod(file, 0o600).await.unwrap();
        // What it served under the lease, to programs that have mapped the file, is to be gone by then.
        assert_eq!(*a.events.borrow(), [Event::RecallWrite { ino: file }, Event::Invalidate { ino: file }]);
    });
}

#[test]
pub fn two_writers_share_and_neither_gets_the_lease() {
    simulate(5, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert!(a.acquire(file).await);
        a.dirty.borrow_mut().insert(file, 100);
        assert!(!b.acquire(file).await);
        assert!(!a.acquire(file).await);
        assert_eq!(b.stat(file).await.unwrap().size, 100, "what A wrote was committed first");
        a.truncate(file, 200).await.unwrap();
        assert_eq!(b.stat(file).await.unwrap().size, 200);
        // Once the conflict is over a single writer gets it again.
        cluster.handle.sleep(Duration::from_secs(6)).await;
        assert!(b.acquire(file).await);
    });
}

#[test]
pub fn a_silent_writer_is_fenced_before_its_lease_is_given_away() {
    simulate(6, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert!(a.acquire(file).await);
        a.vanish();
        let started = cluster.handle.now();
        b.truncate(file, 7).await.unwrap();
        let waited = cluster.handle.now() - started;
        let lease = Duration::from_secs(20);
        assert!(waited > lease - Duration::from_secs(4) && waited < lease + Duration::from_secs(5), "{waited:?}");
        // A comes back too late: its commit must not land on B's.
        assert_eq!(a.truncate(file, 100).await, Err(MetaError::Fenced));
        assert_eq!(b.stat(file).await.unwrap().size, 7);
        let call = cfs_wire::meta::EventsCall { session: a.session, acknowledged: 0, done: vec![], hold_ms: 1000 };
        assert!(!cluster.service().unwrap().events(call).await.alive);
    });
}

/// A file's write lease is with the first of two clients, and is recalled for at most so long.
async fn holder_and_asker(cluster: &Rc<Cluster>, recall_max: Duration) -> (Rc<Client>, Rc<Client>, Ino) {
    cluster.config.borrow_mut().write_recall_max = recall_max;
    cluster.start().await;
    let a = Client::open(cluster, 1).await;
    let b = Client::open(cluster, 2).await;
    let file = a.create(Ino::ROOT, "file").await.unwrap();
    assert!(a.acquire(file).await);
    (a, b, file)
}

#[test]
pub fn a_recall_ends_with_the_leadership_it_began_under() {
    simulate(10, |cluster| async move {
        let (a, b, file) = holder_and_asker(&cluster, Duration::from_secs(3)).await;
        a.stubborn.set(true);
        let service = cluster.service().unwrap();
        let stat = b.next_call(MetaOp::GetAttr { ino: file });
        let asked = cluster.handle.spawn(async move { service.call(stat).await });
        cluster.handle.sleep(Duration::from_secs(2)).await;
        assert!(!asked.is_finished(), "A has not given the lease back");
        cluster.disk.deposed.set(true);
        let answer = cluster.handle.timeout(Duration::from_secs(3), asked).await;
        assert_eq!(answer.expect("nobody here can fence A").unwrap(), Err(MetaError::NotLeader { hint: None }));
        cluster.disk.deposed.set(false);
        assert_eq!(b.stat(file).await.unwrap().size, 0);
        assert_eq!(a.truncate(file, 7).await, Err(MetaError::Fenced));
    });
}

#[test]
pub fn a_writer_whose_commit_waits_for_the_log_is_not_fenced_for_that() {
    simulate(12, |cluster| async move {
        let (a, b, file) = holder_and_asker(&cluster, Duration::from_secs(3)).await;
        a.dirty.borrow_mut().insert(file, 4096);
        let usual = cluster.disk.delay_micros_max.replace(15_000_000);
        let started = cluster.handle.now();
        assert_eq!(b.stat(file).await.unwrap().size, 4096);
        let waited = cluster.handle.now() - started;
        assert!(waited > Duration::from_secs(6), "{waited:?}: the log was quick, this proves nothing");
        cluster.disk.delay_micros_max.set(usual);
        a.truncate(file, 7).await.unwrap();
    });
}

#[test]
pub fn a_client_fenced_while_it_lives_counts_as_a_reader_until_its_leases_are_over() {
    simulate(11, |cluster| async move {
        cluster.config.borrow_mut().write_recall_max = Duration::from_secs(3);
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "written").await.unwrap();
        let read = a.create(Ino::ROOT, "read").await.unwrap();
        assert!(a.acquire(file).await);
        a.stat(read).await.unwrap();
        a.stubborn.set(true);
        let started = cluster.handle.now();
        assert_eq!(b.stat(file).await.unwrap().size, 0);
        assert!(cluster.handle.now() - started < Duration::from_secs(5), "A was fenced by force");
        // A is not told: its connection is gone.
        a.vanish();
        assert!(a.is_cached(read));
        b.chmod(read, 0o600).await.unwrap();
        assert!(!a.is_cached(read), "A may still serve the old mode");
        // What A wrote it serves for as long as it thinks that it has the write lease.
        b.truncate(file, 7).await.unwrap();
        let waited = cluster.handle.now() - started;
        assert!(waited > Duration::from_secs(18) && waited < Duration::from_secs(25), "{waited:?}");
        let started = cluster.handle.now();
        b.truncate(file, 8).await.unwrap();
        assert!(cluster.handle.now() - started < Duration::from_millis(10), "nobody is left to wait for");
    });
}

#[test]
pub fn whoever_is_fenced_by_two_at_once_is_waited_for_on_all_that_it_may_serve() {
    simulate(14, |cluster| async move {
        cluster.config.borrow_mut().write_recall_max = Duration::from_secs(3);
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let askers = [Client::open(&cluster, 2).await, Client::open(&cluster, 3).await];
        // More than one entry takes.
        let mut files = Vec::new();
        let acknowledging = |op| {
            let call = a.next_call(op);
            MetaCall { lowest_unacknowledged: call.id.sequence, ..call }
        };
        for number in 0..1200 {
            let create = MetaOp::Create {
                dir: Ino::ROOT,
                name: name(&number.to_string()),
                node: node(FileKind::File),
                hold: true,
            };
            match a.send(acknowledging(create)).await {
                Ok(MetaReply::Entry(made)) if made.grant.write => files.push(made.attr.ino),
                other => panic!("{other:?}"),
            }
        }
        a.stubborn.set(true);
        let started = cluster.handle.now();
        let asking: Vec<_> = askers.iter().zip(&files).map(|(asker, file)| asker.stat(*file)).collect();
        futures_util::future::join_all(asking).await.into_iter().for_each(|answer| assert_eq!(answer.unwrap().size, 0));
        assert!(cluster.handle.now() - started < Duration::from_secs(5), "A was fenced by force");
        a.vanish();
        // Of the first and of the last that were taken.
        let change = async |file| {
            askers[0].truncate(file, 7).await.unwrap();
            cluster.handle.now() - started
        };
        let changes = [files[5], files[1199]].map(change);
        for waited in futures_util::future::join_all(changes).await {
            assert!(waited > Duration::from_secs(18), "A may serve it still, after {waited:?}");
        }
    });
}

/// What it held in one shard is somebody else's, who goes by that in another.
#[test]
pub fn a_fenced_session_can_do_nothing_in_a_shard_that_never_knew_it() {
    simulate(15, |cluster| async move {
        cluster.start().await;
        let a = Client::open_in(&cluster, 1, [0]).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.lock(file, write_lock(1, 0, 9), false).await.unwrap();
        a.vanish();
        b.lock(file, write_lock(2, 0, 9), true).await.unwrap();
        let open = a.call_in(ShardId(2), MetaOp::OpenSession { client: "c1".into() }).await;
        assert_eq!(open, Err(MetaError::Fenced));
        let read = a.call_in(ShardId(2), MetaOp::StatFs { count_inodes: false }).await;
        assert_eq!(read, Err(MetaError::Fenced));
    });
}

/// A client falls silent, and the node dies with the first entry of its fencing written; it is back.
async fn die_while_fencing(cluster: &Rc<Cluster>, silent: &Client) {
    silent.vanish();
    cluster.handle.sleep(Duration::from_secs(15)).await;
    cluster.die_after(Some(1));
    cluster.handle.sleep(Duration::from_secs(10)).await;
    assert!(cluster.service().is_none(), "nothing was written: nobody was fenced");
    cluster.die_after(None);
    cluster.restart();
}

#[test]
pub fn a_session_fenced_in_some_shards_when_the_node_died_is_fenced_in_all_before_it_is_heard() {
    simulate(12, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        // In the other shards it is not.
        die_while_fencing(&cluster, &a).await;
        cluster.handle.sleep(Duration::from_millis(100)).await;
        let service = cluster.service().unwrap();
        let call = EventsCall { session: a.session, acknowledged: 0, done: vec![], hold_ms: 1000 };
        assert!(!service.events(call).await.alive);
        for shard in (0..SHARDS).map(ShardId) {
            let read = MetaCall { shard, ..a.next_call(MetaOp::StatFs { count_inodes: false }) };
            assert_eq!(service.call(read).await, Err(MetaError::Fenced), "{shard}");
        }
    });
}

#[test]
pub fn what_a_half_fenced_session_held_when_the_node_died_is_taken_from_it() {
    simulate(13, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert_eq!(file.shard(), ShardId(0), "the first to be fenced");
        assert!(a.acquire(file).await);
        // A is shut out; nothing has been taken from it.
        die_while_fencing(&cluster, &a).await;
        // A may live, for all that the new leader knows: it is waited for as long as its leases last.
        let granted = cluster.handle.timeout(Duration::from_secs(30), b.acquire(file)).await;
        assert_eq!(granted, Some(true), "nobody gives A's lease back");
    });
}

#[test]
pub fn a_client_that_heartbeats_is_never_fenced() {
    simulate(7, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        assert!(a.acquire(file).await);
        cluster.handle.sleep(Duration::from_secs(300)).await;
        assert!(!a.fenced.get());
        a.truncate(file, 5).await.unwrap();
        cluster.restart();
        cluster.handle.sleep(Duration::from_secs(300)).await;
        assert!(!a.fenced.get());
        a.truncate(file, 6).await.unwrap();
    });
}

#[test]
pub fn sessions_that_do_not_come_back_after_a_restart_are_fenced() {
    simulate(8, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        a.vanish();
        cluster.restart();
        cluster.handle.sleep(Duration::from_secs(30)).await;
        assert_eq!(a.truncate(file, 100).await, Err(MetaError::Fenced));
    });
}

#[test]
pub fn nobody_is_silent_to_a_node_that_does_not_listen_yet() {
    simulate(8, |cluster| async move {
        cluster.start().await;
        let (a, gone) = (Client::open(&cluster, 1).await, Client::open(&cluster, 2).await);
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        gone.stat(file).await.unwrap();
        a.vanish();
        gone.vanish();
        cluster.restart();
        let service = cluster.service().unwrap();
        service.deafen();
        // Longer than any lease: a start that waits for something.
        cluster.handle.sleep(Duration::from_secs(30)).await;
        service.hear();
        a.truncate(file, 100).await.expect("it was not fenced before it could be heard");
        // Who stays silent when he could be heard is fenced all the same.
        cluster.handle.sleep(Duration::from_secs(30)).await;
        assert_eq!(gone.truncate(file, 200).await, Err(MetaError::Fenced));
    });
}

#[test]
pub fn a_closed_session_is_waited_for_by_nobody() {
    simulate(9, |cluster| async move {
        cluster.start().await;
        let a = Client::open(&cluster, 1).await;
        let b = Client::open(&cluster, 2).await;
        let file = a.create(Ino::ROOT, "file").await.unwrap();
        b.stat(file).await.unwrap();
        assert_eq!(b.call(MetaOp::CloseSession).await, Ok(MetaReply::Done));
        b.vanish();
        let started = cluster.handle.now();
        a.chmod(file, 0o600).await.unwrap();
        assert!(cluster.handle.now() - started < Duration::from_millis(10));
        assert_eq!(b.lookup(Ino::ROOT, "file").await, Err(MetaError::SessionUnknown));
        assert_eq!(a.lookup(Ino::ROOT, "none").await, Err(errno(Errno::ENOENT)));
    });
}

#[test]
pub fn readers_never_go_back_in_time_while_the_node_dies_again_and_again() {
    for seed in seeds(12) {
        simulate(seed, move |cluster| async move {
            cluster.start().await;
            cluster.config.borrow_mut().read_lease = Duration::from_millis(800);
            cluster.restart();
            cluster.keep_alive();
            let writer = Client::open(&cluster, 1).await;
            let file = writer.create(Ino::ROOT, "file").await.unwrap();
            writer.chmod(file, 0).await.unwrap();
            // What was answered to the writer, and what any reader has seen.
            let newest = Rc::new(Cell::new(0));
            let mut readers = Vec::new();
            for session in 2..5 {
                let reader = Client::open(&cluster, session).await;
                let newest = newest.clone();
                readers.push(cluster.handle.spawn(async move {
                    for _ in 0..400 {
                        let before = newest.get();
                        let mode = reader.stat(file).await.unwrap().mode;
                        assert!(mode >= before, "seed {seed}: read {mode} after {before} was known");
                        newest.set(newest.get().max(mode));
                        let pause = reader.cluster.handle.random_u64() % 20_000;
                        reader.cluster.handle.sleep(Duration::from_micros(pause)).await;
                    }
                }));
            }
            for mode in 1..=60 {
                if mode % 13 == 0 {
                    cluster.die_after(Some(2));
                } else if mode % 7 == 0 {
                    // While readers hold leases: the next leader must tell them all the same.
                    cluster.restart();
                }
                writer.chmod(file, mode).await.unwrap();
                newest.set(newest.get().max(mode));
                cluster.handle.sleep(Duration::from_millis(30)).await;
            }
            for reader in readers {
                reader.await.unwrap();
            }
        });
    }
}

#[test]
pub fn a_write_lease_passes_from_hand_to_hand_and_no_size_is_missed() {
    for seed in seeds(12) {
        simulate(seed, move |cluster| async move {
            cluster.config.borrow_mut().shared_mode = Duration::from_millis(100);
            cluster.start().await;
            let mut clients = Vec::new();
            for session in 1..4 {
                clients.push(Client::open(&cluster, session).await);
            }
            let file = clients[0].create(Ino::ROOT, "file").await.unwrap();
            let newest = Rc::new(Cell::new(0));
            let mut readers = Vec::new();
            for reader in clients.clone() {
                let newest = newest.clone();
                readers.push(cluster.handle.spawn(async move {
                    for _ in 0..150 {
                        let before = newest.get();
                        let size = reader.size(file).await;
                        assert!(size >= before, "seed {seed}: read {size} after {before} was written");
                        let pause = reader.cluster.handle.random_u64() % 30_000;
                        reader.cluster.handle.sleep(Duration::from_micros(pause)).await;
                    }
                }));
            }
            for size in 1..=100 {
                let writer = &clients[(cluster.handle.random_u64() % 3) as usize];
                writer.write_size(file, size).await;
                newest.set(size);
                let pause = cluster.handle.random_u64() % 40_000;
                cluster.handle.sleep(Duration::from_micros(pause)).await;
            }
            for reader in readers {
                reader.await.unwrap();
            }
            let granted = clients.iter().map(|client| client.recalls.get()).sum::<u64>();
            assert!(granted > 3, "seed {seed}: the lease was recalled {granted} times only");
        });
    }
}
