//! Two clients: what one was told is what the other sees.

use super::client::{Client, errno};
use super::cluster::simulate;
use cfs_wire::meta::{Event, MetaError, MetaOp, MetaReply};
use cfs_wire::{Errno, Ino};
use std::time::Duration;

#[test]
pub fn nobody_reads_stale_attributes_after_a_change_was_answered() {
    for seed in 0..20 {
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
        assert!(waited <= Duration::from_millis(10_100), "waited {waited:?}");
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
        let call = cfs_wire::meta::EventsCall { session: a.session, acknowledged: 0, hold_ms: 1000 };
        assert!(!cluster.service().unwrap().events(call).await.alive);
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
