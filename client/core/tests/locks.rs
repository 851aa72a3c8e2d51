//! Locks, appends and names without files, between two clients.

mod common;

use bytes::Bytes;
use cfs_client::{Caller, NewFile, OpenFlags};
use cfs_fabric::CALLS_MAX;
use cfs_wire::Errno;
use cfs_wire::meta::{LockFamily, LockKind, LockRange};
use common::{ROOT, simulate};
use std::time::Duration;

fn write_lock(owner: u64, start: u64, end: u64) -> LockRange {
    LockRange { family: LockFamily::Posix, kind: LockKind::Write, start, end, owner, pid: 7 }
}

#[test]
fn a_lock_keeps_the_other_client_out_until_unlocked_and_a_wait_can_be_cancelled() {
    simulate(20, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let new = NewFile::regular(0o644, 0);
        let (entry, _file) = a.create(Caller::default(), ROOT, b"f", new, OpenFlags::default()).await.unwrap();
        let ino = entry.attr.ino;
        a.setlk(ino, write_lock(1, 0, 99)).await.unwrap();
        assert_eq!(b.setlk(ino, write_lock(2, 50, 60)).await, Err(Errno::EAGAIN));
        assert_eq!(b.setlk(ino, write_lock(2, 100, 200)).await, Ok(()), "another range");
        let conflict = b.getlk(ino, write_lock(2, 0, 10)).await.unwrap().unwrap();
        assert_eq!((conflict.start, conflict.end, conflict.pid), (0, 99, 7));

        let started = server.handle.now();
        let waiter = b.clone();
        let waiting = server.handle.spawn(async move { waiter.setlkw(ino, write_lock(2, 0, 10)).await });
        server.sleep(500).await;
        assert!(!waiting.is_finished());
        a.unlock(ino, write_lock(1, 0, 99)).await.unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(()));
        assert!(server.handle.now() - started < Duration::from_secs(5));

        // Given up after a while, and at once: the cancellation may then overtake the lock's call.
        for patience in [500, 0] {
            let given_up = server.handle.sleep(Duration::from_millis(patience));
            assert_eq!(a.setlkw_until(ino, write_lock(1, 0, 10), given_up).await, Err(Errno::EINTR));
        }
        b.unlock_owner(ino, LockFamily::Posix, 2).await.unwrap();
        assert_eq!(a.setlk(ino, write_lock(1, 0, 300)).await, Ok(()));
    });
}

#[test]
fn a_lock_wait_that_holds_up_a_thousand_changes_asks_anew_and_is_granted_in_the_end() {
    simulate(21, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let new = NewFile::regular(0o644, 0);
        let (entry, _file) = a.create(Caller::default(), ROOT, b"f", new, OpenFlags::default()).await.unwrap();
        let ino = entry.attr.ino;
        a.setlk(ino, write_lock(1, 0, 99)).await.unwrap();
        let waiter = b.clone();
        let waiting = server.handle.spawn(async move { waiter.setlkw(ino, write_lock(2, 0, 10)).await });
        for number in 0..1200 {
            let name = format!("d{number}");
            b.mkdir(Caller::default(), ROOT, name.as_bytes(), 0o755, 0).await.unwrap();
        }
        assert!(!waiting.is_finished());
        a.unlock(ino, write_lock(1, 0, 99)).await.unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(()));
    });
}

#[test]
fn more_waits_than_a_connection_has_places_leave_room_for_the_unlock() {
    simulate(22, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let new = NewFile::regular(0o644, 0);
        let (entry, _file) = client.create(Caller::default(), ROOT, b"f", new, OpenFlags::default()).await.unwrap();
        let ino = entry.attr.ino;
        client.setlk(ino, write_lock(1, 0, 99)).await.unwrap();
        let wait = |owner: u64| {
            let client = client.clone();
            server.handle.spawn(async move {
                client.setlkw(ino, write_lock(owner, 0, 99)).await?;
                client.unlock(ino, write_lock(owner, 0, 99)).await
            })
        };
        let waiting: Vec<_> = (2..CALLS_MAX as u64 + 100).map(wait).collect();
        server.sleep(1000).await;
        let begun = server.handle.now();
        client.unlock(ino, write_lock(1, 0, 99)).await.unwrap();
        let took = server.handle.now() - begun;
        assert!(took < Duration::from_millis(100), "{took:?}");
        for wait in waiting {
            assert_eq!(wait.await.unwrap(), Ok(()));
        }
    });
}

#[test]
fn appends_of_two_clients_never_overwrite_each_other() {
    for seed in 30..34 {
        simulate(seed, |server| async move {
            server.start().await;
            let (a, b) = (server.client("a").await, server.client("b").await);
            let flags = OpenFlags { append: true, ..OpenFlags::default() };
            let new = NewFile::regular(0o644, 0);
            let (entry, file) = a.create(Caller::default(), ROOT, b"log", new, flags).await.unwrap();
            let other = b.open(entry.attr.ino, flags, false).await.unwrap();
            let mut tasks = Vec::new();
            for (client, file, mark) in [(a.clone(), file.clone(), b'a'), (b.clone(), other, b'b')] {
                tasks.push(server.handle.spawn(async move {
                    for _ in 0..100 {
                        client.write(&file, 0, Bytes::from(vec![mark; 100]), false).await.unwrap();
                    }
                    client.fsync(&file, false).await.unwrap();
                }));
            }
            for task in tasks {
                task.await.unwrap();
            }
            let content = a.read(&file, 0, 1 << 20).await.unwrap();
            assert_eq!(content.len(), 20_000, "seed {seed}");
            let whole = content.chunks(100).filter(|record| record.iter().all(|byte| *byte == record[0]));
            assert_eq!(whole.count(), 200, "seed {seed}: each record stands whole");
            assert_eq!(content.iter().filter(|byte| **byte == b'a').count(), 10_000, "seed {seed}");
        });
    }
}

#[test]
fn a_nameless_file_gets_a_name_and_a_dead_server_is_only_a_pause() {
    simulate(22, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let new = NewFile::regular(0o600, 0);
        let (entry, file) = client.tmpfile(Caller::default(), ROOT, new, OpenFlags::default()).await.unwrap();
        client.write(&file, 0, Bytes::from_static(b"content"), false).await.unwrap();
        client.link(entry.attr.ino, ROOT, b"named").await.unwrap();
        server.kill();
        let (writer, written) = (client.clone(), file.clone());
        let syncing = server.handle.spawn(async move {
            writer.write(&written, 7, Bytes::from_static(b" more"), false).await.unwrap();
            writer.fsync(&written, false).await
        });
        server.sleep(8_000).await;
        assert!(!syncing.is_finished());
        server.restart();
        assert_eq!(syncing.await.unwrap(), Ok(()));
        let other = server.client("b").await;
        let found = other.lookup(ROOT, b"named").await.unwrap();
        let theirs = other.open(found.attr.ino, OpenFlags::default(), false).await.unwrap();
        assert_eq!(other.read(&theirs, 0, 100).await.unwrap(), "content more");
    });
}
