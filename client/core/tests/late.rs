//! Answers that come late: what they tell was so when they were given.

mod common;

use cfs_client::{Caller, ClientConfig, NewFile, OpenFlags};
use cfs_fabric::mem::Faults;
use cfs_reactor::sync::Notify;
use cfs_wire::Errno;
use cfs_wire::meta::{LockFamily, LockKind, LockRange};
use common::{ROOT, create, open, read, seeds, simulate, write};
use std::time::Duration;

#[test]
fn a_commit_that_is_answered_after_a_later_unlink_does_not_bring_the_link_back() {
    for seed in seeds(0, 60) {
        simulate(seed, |server| async move {
            server.start().await;
            let client = server.client("a").await;
            let file = create(&client, "f").await;
            client.link(file.ino(), ROOT, b"g").await.unwrap();
            // Messages overtake each other.
            let delay = (Duration::from_micros(10), Duration::from_millis(5));
            server.network.set_faults(Faults { delay, ..Faults::default() });
            write(&client, &file, 0, b"bytes").await;
            let syncing = {
                let (client, file) = (client.clone(), file.clone());
                server.handle.spawn(async move { client.fsync(&file, false).await })
            };
            server.handle.sleep(Duration::from_micros(150 * seed)).await;
            client.unlink(ROOT, b"g").await.unwrap();
            syncing.await.unwrap().unwrap();
            let attr = client.getattr(file.ino()).await.unwrap().attr;
            assert_eq!((attr.nlink, attr.size), (1, 5), "seed {seed}");
        });
    }
}

#[test]
fn a_commit_of_a_session_that_was_given_up_before_it_was_answered_does_not_count_in_the_next() {
    for seed in seeds(0, 60) {
        simulate(seed, |server| async move {
            server.start().await;
            let client = server.client("a").await;
            let file = create(&client, "f").await;
            write(&client, &file, 0, b"first").await;
            client.fsync(&file, false).await.unwrap();
            // A poll from before the session was opened anywhere is held, whatever happens.
            server.sleep(5000).await;
            let delay = (Duration::from_micros(10), Duration::from_millis(5));
            server.network.set_faults(Faults { delay, ..Faults::default() });
            write(&client, &file, 0, b"other").await;
            let syncing = {
                let (client, file) = (client.clone(), file.clone());
                server.handle.spawn(async move { client.fsync(&file, false).await })
            };
            server.handle.sleep(Duration::from_micros(150 * seed)).await;
            server.fence("a").await;
            let synced = syncing.await.unwrap();
            assert!(matches!(synced, Ok(()) | Err(Errno::EIO)), "seed {seed}: {synced:?}");
            // By then it has heard of it, and tells what is lost.
            server.sleep(100).await;
            let _ = client.fsync(&file, false).await;
            write(&client, &file, 0, b"later").await;
            let synced = server.handle.timeout(Duration::from_secs(5), client.fsync(&file, false)).await;
            assert_eq!(synced, Some(Ok(())), "seed {seed}");
        });
    }
}

#[test]
fn what_a_program_wrote_is_in_its_files_size_whatever_is_answered_meanwhile() {
    for seed in seeds(0, 60) {
        simulate(seed, |server| async move {
            server.start().await;
            let client = server.client("a").await;
            let file = create(&client, "f").await;
            for name in ["g", "h", "i"] {
                client.link(file.ino(), ROOT, name.as_bytes()).await.unwrap();
            }
            let delay = (Duration::from_micros(10), Duration::from_millis(5));
            server.network.set_faults(Faults { delay, ..Faults::default() });
            server.disk.proposal_micros_max.set(3000);
            write(&client, &file, 0, b"bytes").await;
            let (syncer, synced) = (client.clone(), file.clone());
            let syncing = server.handle.spawn(async move { syncer.fsync(&synced, false).await });
            let unlinker = client.clone();
            let unlinking = server.handle.spawn(async move {
                for name in ["g", "h", "i"] {
                    unlinker.unlink(ROOT, name.as_bytes()).await.unwrap();
                }
            });
            let looks = (0..40).map(|number| {
                let (client, handle, ino) = (client.clone(), server.handle.clone(), file.ino());
                server.handle.spawn(async move {
                    handle.sleep(Duration::from_micros(250 * number)).await;
                    match number % 2 {
                        0 => client.getattr(ino).await.unwrap().attr.size,
                        _ => client.lookup(ROOT, b"f").await.unwrap().attr.size,
                    }
                })
            });
            for look in looks.collect::<Vec<_>>() {
                assert_eq!(look.await.unwrap(), 5, "seed {seed}");
            }
            syncing.await.unwrap().unwrap();
            unlinking.await.unwrap();
        });
    }
}

#[test]
fn a_name_that_another_client_made_since_is_not_hidden_by_the_late_answer_to_an_unlink() {
    for seed in seeds(0, 60) {
        simulate(seed, |server| async move {
            server.start().await;
            let patient = || ClientConfig { retry_window: Duration::from_secs(300), ..ClientConfig::default() };
            let (a, b) = (server.client_with("a", patient()).await, server.client_with("b", patient()).await);
            create(&a, "f").await;
            a.lookup(ROOT, b"f").await.unwrap();
            // It is carried out, and its answer lost.
            server.network.partition_one_way("server", "a", true);
            let unlinking = {
                let a = a.clone();
                server.handle.spawn(async move { a.unlink(ROOT, b"f").await })
            };
            server.sleep(100).await;
            // This waits until what was granted to the first client has run out.
            let new = NewFile::regular(0o644, 0o022);
            let made = b.create(Caller::default(), ROOT, b"f", new, OpenFlags::default()).await.unwrap().0.attr.ino;
            server.network.reset("server");
            server.sleep(25 * seed).await;
            server.network.heal();
            let looking = {
                let (a, handle) = (a.clone(), server.handle.clone());
                server.handle.spawn(async move {
                    for _ in 0..400 {
                        match a.lookup(ROOT, b"f").await {
                            Ok(entry) => assert_eq!(entry.attr.ino, made, "seed {seed}"),
                            Err(refused) => panic!("seed {seed}: {refused:?}"),
                        }
                        handle.sleep(Duration::from_millis(10)).await;
                    }
                })
            };
            looking.await.unwrap();
            // Where it was fenced meanwhile it does not know.
            let unlinked = unlinking.await.unwrap();
            assert!(matches!(unlinked, Ok(()) | Err(Errno::EIO)), "seed {seed}: {unlinked:?}");
        });
    }
}

#[test]
fn a_commit_that_was_given_up_is_not_carried_out_behind_a_later_one_while_a_lock_is_waited_for() {
    simulate(9, |server| async move {
        server.start().await;
        let impatient = ClientConfig {
            retry_window: Duration::from_secs(15),
            call_timeout: Duration::from_secs(3),
            ..ClientConfig::default()
        };
        let (a, b) = (server.client_with("a", impatient).await, server.client("b").await);
        let locked = create(&b, "locked").await.ino();
        let whole = |owner| LockRange {
            family: LockFamily::Posix,
            kind: LockKind::Write,
            start: 0,
            end: u64::MAX,
            owner,
            pid: 1,
        };
        b.setlk(locked, whole(1)).await.unwrap();
        let waiting = {
            let a = a.clone();
            server.handle.spawn(async move { a.setlkw(locked, whole(2)).await })
        };
        let file = create(&a, "f").await;
        write(&a, &file, 0, b"first").await;
        a.fsync(&file, false).await.unwrap();
        let held = Notify::new();
        server.disk.held_commits.replace(Some(held.clone()));
        write(&a, &file, 0, b"older").await;
        assert_eq!(a.fsync(&file, false).await, Err(Errno::EIO));
        server.disk.held_commits.replace(None);
        write(&a, &file, 0, b"newer").await;
        assert_eq!(a.fsync(&file, false).await, Ok(()));
        held.notify_all();
        server.sleep(1000).await;
        a.release(&file);
        let theirs = open(&b, "f").await;
        assert_eq!(read(&b, &theirs, 0, 5).await, b"newer");
        assert!(!waiting.is_finished());
        b.unlock(locked, whole(1)).await.unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(()));
    });
}
