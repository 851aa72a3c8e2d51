//! Written data that cannot be stored: who hears of it, and what is kept.

mod common;

use bytes::Bytes;
use cfs_client::{Client, ClientConfig, OpenFile, OpenFlags};
use cfs_wire::Errno;
use cfs_wire::meta::{LockFamily, LockKind, LockRange, RENAME_EXCHANGE};
use common::{ROOT, Server, create, fenced_by_a_writer, open, pattern, read, simulate, write};
use std::rc::Rc;
use std::time::Duration;

#[test]
fn dirty_data_of_a_fenced_session_is_reported_once_on_each_open_file_and_never_committed() {
    simulate(7, |server| async move {
        server.start().await;
        let config = cfs_client::ClientConfig {
            write_back_after: std::time::Duration::from_secs(3600),
            ..cfs_client::ClientConfig::default()
        };
        let client = server.client_with("a", config).await;
        let file = create(&client, "f").await;
        let second = open(&client, "f").await;
        write(&client, &file, 0, b"safe").await;
        client.fsync(&file, false).await.unwrap();
        write(&client, &file, 0, b"lost").await;
        let (other, theirs) = fenced_by_a_writer(&server, "a", "f").await;
        assert_eq!(client.fsync(&file, false).await, Err(Errno::EIO));
        assert_eq!(client.fsync(&file, false).await, Ok(()));
        assert_eq!(client.flush(&second).await, Err(Errno::EIO));
        assert_eq!(client.flush(&second).await, Ok(()));
        assert_eq!(read(&client, &file, 0, 10).await, b"safe!");
        write(&client, &file, 0, b"more").await;
        client.fsync(&file, false).await.unwrap();
        assert_eq!(read(&other, &theirs, 0, 10).await, b"more!");
    });
}

#[test]
fn who_lost_a_lock_with_its_session_writes_nothing_before_it_has_given_it_up() {
    simulate(7, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        write(&client, &file, 0, b"safe").await;
        client.fsync(&file, false).await.unwrap();
        let (family, kind) = (LockFamily::Posix, LockKind::Write);
        let lock = LockRange { family, kind, start: 0, end: u64::MAX, owner: 7, pid: 1 };
        client.setlk(file.ino(), lock).await.unwrap();
        // The other one could have had the lock before it wrote.
        let (other, theirs) = fenced_by_a_writer(&server, "a", "f").await;
        let write_mine = || client.write(&file, 0, Bytes::from_static(b"mine"), false);
        assert_eq!(write_mine().await, Err(Errno::EIO));
        assert_eq!(client.fallocate(&file, 0, 0, 100, false).await, Err(Errno::EIO));
        assert_eq!(client.fsync(&file, false).await, Err(Errno::EIO));
        assert_eq!(client.fsync(&file, false).await, Ok(()));
        assert_eq!(write_mine().await, Err(Errno::EIO));
        assert_eq!(read(&other, &theirs, 0, 10).await, b"safe!");
        client.unlock(file.ino(), lock).await.unwrap();
        client.setlk(file.ino(), lock).await.unwrap();
        assert_eq!(write_mine().await, Ok(4));
        client.fsync(&file, false).await.unwrap();
        assert_eq!(read(&other, &theirs, 0, 10).await, b"mine!");
    });
}

/// Written and cut off: whether it will ever be in the file is not known, so it is not shown for what is.
#[test]
fn own_bytes_are_not_read_when_the_session_may_be_over_nor_laid_over_what_another_wrote() {
    simulate(7, |server| async move {
        server.start().await;
        let patient = Duration::from_secs(3600);
        let config = ClientConfig { write_back_after: patient, retry_window: patient, ..ClientConfig::default() };
        let client = server.client_with("a", config).await;
        let file = create(&client, "f").await;
        write(&client, &file, 0, b"safe").await;
        client.fsync(&file, false).await.unwrap();
        write(&client, &file, 0, b"mine").await;
        assert_eq!(read(&client, &file, 0, 4).await, b"mine");
        server.network.partition("a", "server", true);
        server.sleep(40_000).await;
        let other = server.client("b").await;
        let theirs = open(&other, "f").await;
        write(&other, &theirs, 4, b"!").await;
        other.fsync(&theirs, false).await.unwrap();
        let reads = [4, 10].map(|length| {
            let (client, file) = (client.clone(), file.clone());
            server.handle.spawn(async move { client.read(&file, 0, length).await.unwrap().to_vec() })
        });
        server.sleep(1000).await;
        assert!(reads.iter().all(|read| !read.is_finished()), "nobody could say what is in the file");
        server.network.heal();
        for (read, expected) in reads.into_iter().zip([&b"safe"[..], b"safe!"]) {
            assert_eq!(read.await.unwrap(), expected);
        }
    });
}

/// A client that keeps 50,000 bytes of the file "f", for which the server has no room any more although
/// it had reserved it, as when a target fails; and the room that there was.
async fn kept_without_room(server: &Rc<Server>) -> (Rc<Client>, Rc<OpenFile>, u64) {
    let client = server.client("a").await;
    let file = create(&client, "f").await;
    let other = create(&client, "asks for room").await;
    write(&client, &other, 0, b"small").await;
    let room = server.disk.room.replace(0);
    write(&client, &file, 0, &pattern(50_000, 1)).await;
    (client, file, room)
}

#[test]
fn a_full_store_is_reported_by_fsync_and_the_next_write_succeeds_again() {
    simulate(8, |server| async move {
        server.start().await;
        let (client, file, room) = kept_without_room(&server).await;
        assert_eq!(client.fsync(&file, false).await, Err(Errno::ENOSPC));
        assert_eq!(client.getattr(file.ino()).await.unwrap().attr.size, 0);
        server.disk.room.set(room);
        write(&client, &file, 0, &pattern(50_000, 1)).await;
        assert_eq!(client.fsync(&file, false).await, Ok(()));
        assert_eq!(read(&client, &file, 0, 50_000).await, pattern(50_000, 1));
    });
}

#[test]
fn an_unmount_tells_of_the_loss_that_no_open_file_has_told_of() {
    for told in [false, true] {
        simulate(8, move |server| async move {
            server.start().await;
            let (client, file, room) = kept_without_room(&server).await;
            if told {
                assert_eq!(client.fsync(&file, false).await, Err(Errno::ENOSPC));
            } else {
                client.release(&file);
                server.sleep(5000).await;
                assert_eq!(client.syncfs().await, Ok(()), "what was kept went in the background");
            }
            server.disk.room.set(room);
            assert_eq!(client.shutdown().await, if told { Ok(()) } else { Err(Errno::ENOSPC) });
        });
    }
}

#[test]
fn a_copy_that_fails_halfway_says_how_far_it_came_and_the_next_one_why() {
    const LENGTH: u64 = 5 << 20;
    simulate(9, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let from = create(&client, "from").await;
        // Bytes in the inode are not shared: the copy is made of bytes.
        write(&client, &from, 0, &pattern(100, 1)).await;
        client.fsync(&from, false).await.unwrap();
        write(&client, &from, 1 << 20, &pattern(4 << 20, 2)).await;
        client.fsync(&from, false).await.unwrap();
        let ino = create(&client, "to").await.ino();
        let to = client.open(ino, OpenFlags { sync: true, ..OpenFlags::default() }, false).await.unwrap();
        server.disk.room.set(5 << 19);
        let copied = client.copy_file_range(&from, 0, &to, 0, LENGTH, false).await.unwrap();
        assert!(copied > 0 && copied < LENGTH, "{copied} copied");
        let step = copied as u32;
        assert_eq!(read(&client, &to, 0, step).await, read(&client, &from, 0, step).await);
        assert_eq!(client.copy_file_range(&from, copied, &to, copied, LENGTH, false).await, Err(Errno::ENOSPC));
    });
}

#[test]
fn a_failure_that_no_open_file_reported_is_the_next_ones_to_report_once() {
    simulate(8, |server| async move {
        server.start().await;
        let (client, file, room) = kept_without_room(&server).await;
        client.flush(&file).await.unwrap();
        client.release(&file);
        server.sleep(5000).await;
        server.disk.room.set(room);
        let again = open(&client, "f").await;
        assert_eq!(client.fsync(&again, false).await, Err(Errno::ENOSPC));
        assert_eq!(client.fsync(&again, false).await, Ok(()));
        let later = open(&client, "f").await;
        assert_eq!(client.fsync(&later, false).await, Ok(()));
    });
}

#[test]
fn a_server_that_is_busy_for_minutes_loses_no_write() {
    simulate(8, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        write(&client, &file, 0, b"kept").await;
        let began = server.handle.now();
        server.disk.busy_commits.set(1000);
        assert_eq!(client.fsync(&file, false).await, Ok(()));
        assert_eq!(server.disk.busy_commits.get(), 0);
        let waited = server.handle.now() - began;
        assert!(waited > 2 * ClientConfig::default().retry_window, "{waited:?}");
        let other = server.client("b").await;
        let theirs = open(&other, "f").await;
        assert_eq!(read(&other, &theirs, 0, 4).await, b"kept");
    });
}

/// A client that has made the file `f`, with the durable content `old`.
async fn with_old_file(server: &Rc<Server>) -> Rc<Client> {
    let client = server.client("a").await;
    let old = create(&client, "f").await;
    write(&client, &old, 0, b"old").await;
    client.fsync(&old, false).await.unwrap();
    client
}

#[test]
fn what_cannot_be_written_is_not_renamed_over_what_is_there() {
    simulate(8, |server| async move {
        server.start().await;
        let client = with_old_file(&server).await;
        let new = create(&client, "new").await;
        let room = server.disk.room.replace(0);
        write(&client, &new, 0, &pattern(50_000, 1)).await;
        assert_eq!(client.rename(ROOT, b"new", ROOT, b"f", 0).await, Err(Errno::ENOSPC));
        server.disk.room.set(room);
        let again = open(&client, "f").await;
        assert_eq!(read(&client, &again, 0, 10).await, b"old");
        write(&client, &new, 0, b"new").await;
        client.rename(ROOT, b"new", ROOT, b"f", 0).await.unwrap();
        let again = open(&client, "f").await;
        assert_eq!(read(&client, &again, 0, 10).await, b"new");
    });
}

#[test]
fn what_was_lost_before_a_rename_or_link_is_not_put_in_the_place_of_what_is_there() {
    // Lost by the flush of a close that the rename waits for, by one long before it, or by a fence.
    for (seed, loss) in (8..).zip(["close", "before", "fence"]) {
        simulate(seed, move |server| async move {
            server.start().await;
            let client = with_old_file(&server).await;
            // Two fences would say no more than one.
            let others: &[&str] = if loss == "fence" { &["new"] } else { &["new", "linked"] };
            for &other in others {
                let new = create(&client, other).await;
                let ino = new.ino();
                let room = server.disk.room.get();
                write(&client, &new, 0, &pattern(50_000, 1)).await;
                let expected = match loss {
                    "fence" => {
                        fenced_by_a_writer(&server, "a", other).await;
                        Errno::EIO
                    }
                    _ => {
                        server.disk.room.set(0);
                        client.flush(&new).await.unwrap();
                        Errno::ENOSPC
                    }
                };
                client.release(&new);
                if loss == "before" {
                    server.sleep(5000).await;
                }
                let put = match other {
                    "new" => client.rename(ROOT, b"new", ROOT, b"f", 0).await,
                    _ => client.link(ino, ROOT, b"second").await.map(drop),
                };
                assert_eq!(put, Err(expected), "{loss}, {other}");
                server.disk.room.set(room);
                // It has been told.
                if other == "linked" {
                    client.link(ino, ROOT, b"second").await.unwrap();
                }
            }
            let again = open(&client, "f").await;
            assert_eq!(read(&client, &again, 0, 10).await, b"old", "{loss}");
        });
    }
}

#[test]
fn an_exchange_puts_a_name_over_another_only_when_both_files_are_written() {
    // Whichever of the two names comes first.
    for (from, to) in [("f", "new"), ("new", "f")] {
        simulate(8, move |server| async move {
            server.start().await;
            let client = with_old_file(&server).await;
            let exchange = || client.rename(ROOT, from.as_bytes(), ROOT, to.as_bytes(), RENAME_EXCHANGE);
            let new = create(&client, "new").await;
            let room = server.disk.room.replace(0);
            write(&client, &new, 0, &pattern(50_000, 1)).await;
            assert_eq!(exchange().await, Err(Errno::ENOSPC), "{from} and {to}");
            server.disk.room.set(room);
            let again = open(&client, "f").await;
            assert_eq!(read(&client, &again, 0, 10).await, b"old");
            write(&client, &new, 0, b"new").await;
            exchange().await.unwrap();
            for (name, bytes) in [("f", b"new"), ("new", b"old")] {
                let again = open(&client, name).await;
                assert_eq!(read(&client, &again, 0, 10).await, bytes);
            }
        });
    }
}

#[test]
fn small_files_are_stored_as_data_where_the_server_makes_no_inode_larger() {
    simulate(8, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        // Less than the 256th that is kept for deleting, and more than a client wants left.
        server.disk.room.set(2 << 30);
        write(&client, &file, 0, b"small").await;
        assert_eq!(client.dirty_bytes(), 5);
        client.fsync(&file, false).await.unwrap();
        assert_eq!(server.disk.stores.get(), 1);
        server.disk.room.set(1 << 39);
        let other = server.client("b").await;
        let theirs = open(&other, "f").await;
        assert_eq!(read(&other, &theirs, 0, 10).await, b"small");
    });
}

#[test]
fn a_write_without_room_is_refused_alone_and_nobody_else_hears_of_it() {
    simulate(12, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        let second = open(&client, "f").await;
        server.sleep(25_000).await;
        // A quarter of it may be reserved: that is enough for the first write, not for the second too.
        server.disk.room.set(600_000);
        write(&client, &file, 0, &pattern(100_000, 1)).await;
        assert_eq!(client.dirty_bytes(), 100_000);
        server.disk.room.set(150_000);
        let refused = client.write(&second, 100_000, Bytes::from(pattern(100_000, 2)), false).await;
        assert_eq!(refused, Err(Errno::ENOSPC));
        assert_eq!(client.fsync(&second, false).await, Ok(()));
        assert_eq!(client.fsync(&file, false).await, Ok(()));
        assert_eq!(read(&client, &file, 0, 300_000).await, pattern(100_000, 1));
        let other = server.client("b").await;
        let theirs = open(&other, "f").await;
        assert_eq!(read(&other, &theirs, 0, 300_000).await, pattern(100_000, 1));
    });
}
