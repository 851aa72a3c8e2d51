//! A server that has little room left: what a write was answered for is never dropped.

mod common;

use bytes::Bytes;
use cfs_client::{Client, ClientConfig, OpenFile};
use cfs_reactor::clock::SplitMix64;
use cfs_wire::Errno;
use common::{Server, create, open, pattern, read, seeds, simulate, write};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const CLIENTS: u64 = 3;
const FILES: u64 = 4;
const ROOM: u64 = 50 << 20;
/// Each client writes so much at least if nothing is refused: together more than there is room for.
const EACH: u64 = 17 << 20;

/// What became of the writes.
#[derive(Default)]
struct Seen {
    refused: Cell<u64>,
    /// The most bytes that were kept unwritten at once.
    kept: Cell<u64>,
}

/// A file, and what was written to it with success.
struct Written {
    name: String,
    bytes: Vec<u8>,
}

/// Writes the files, one after the other; close says nothing but that all is well.
async fn write_files(
    client: Rc<Client>,
    files: Vec<(String, Rc<OpenFile>)>,
    seed: u64,
    seen: Rc<Seen>,
) -> Vec<Written> {
    let mut random = SplitMix64::new(seed);
    let mut written = Vec::new();
    for (name, file) in files {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < EACH / FILES {
            let part = pattern(1 + random.below(1 << 20) as usize, random.next_u64());
            match client.write(&file, bytes.len() as u64, Bytes::from(part.clone()), false).await {
                Ok(count) => {
                    assert_eq!(count as usize, part.len());
                    bytes.extend_from_slice(&part);
                }
                Err(Errno::ENOSPC) => {
                    seen.refused.set(seen.refused.get() + 1);
                    break;
                }
                Err(error) => panic!("seed {seed}: {name}: {error}"),
            }
            seen.kept.set(seen.kept.get().max(client.dirty_bytes() as u64));
        }
        assert_eq!(client.flush(&file).await, Ok(()), "seed {seed}: close of {name}");
        client.release(&file);
        written.push(Written { name, bytes });
    }
    written
}

/// Three mounts write at once what does not fit; then another one looks.
async fn crowd(server: Rc<Server>, restart: bool) {
    server.start().await;
    let seen = Rc::new(Seen::default());
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let name = format!("client {number}");
        let client = server.client(&name).await;
        let mut files = Vec::new();
        for file in 0..FILES {
            let name = format!("{number}-{file}");
            files.push((name.clone(), create(&client, &name).await));
        }
        clients.push((client, files));
    }
    // What a predecessor might have promised is over.
    server.sleep(25_000).await;
    server.disk.room.set(ROOM);
    let tasks: Vec<_> = clients
        .into_iter()
        .zip(server.seed * 100..)
        .map(|((client, files), seed)| {
            let writing = write_files(client.clone(), files, seed, seen.clone());
            let task = server.handle.spawn(writing);
            (client, task)
        })
        .collect();
    if restart {
        server.sleep(20 + server.seed % 50).await;
        server.restart();
    }
    let mut written = Vec::new();
    for (client, task) in tasks {
        written.extend(task.await.unwrap());
        assert_eq!(client.syncfs().await, Ok(()));
    }
    let other = server.client("other").await;
    for Written { name, bytes } in &written {
        let file = open(&other, name).await;
        let mut found = Vec::new();
        while let part = read(&other, &file, found.len() as u64, 1 << 20).await
            && !part.is_empty()
        {
            found.extend_from_slice(&part);
        }
        let same = found.iter().zip(bytes).take_while(|(found, written)| found == written).count();
        assert!(found == *bytes, "{name}: {same} of {} bytes are there", bytes.len());
    }
    assert!(seen.refused.get() > 0, "there was room for all");
    if !restart {
        let total: usize = written.iter().map(|written| written.bytes.len()).sum();
        assert!(total as u64 > ROOM / 4 * 3, "{total} bytes found room");
        assert!(seen.kept.get() > 4 << 20, "{} bytes were kept: nothing was written behind", seen.kept.get());
    }
}

#[test]
fn what_several_mounts_were_answered_for_on_a_nearly_full_server_is_there() {
    for seed in seeds(1, 8) {
        simulate(seed, |server| crowd(server, false));
    }
}

#[test]
fn so_it_is_when_the_server_is_started_anew_meanwhile() {
    for seed in seeds(100, 8) {
        simulate(seed, |server| crowd(server, true));
    }
}

#[test]
fn where_there_is_room_a_write_waits_for_no_call() {
    simulate(1, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        write(&client, &file, 0, b"reserves").await;
        for page in 0..600 {
            server.sleep(100).await;
            let began = server.handle.now();
            write(&client, &file, page * 4096, &[1; 4096]).await;
            assert_eq!(server.handle.now(), began, "page {page}");
        }
        // One for each third of the time that a reservation lasts.
        let asked = server.disk.reserves.get();
        assert!((2..12).contains(&asked), "asked {asked} times");
    });
}

#[test]
fn room_that_a_mount_needs_no_more_is_soon_there_for_another() {
    for (waits, expected) in [(0, Err(Errno::ENOSPC)), (3000, Ok(900_000))] {
        simulate(1, move |server| async move {
            server.start().await;
            let (a, b) = (server.client("a").await, server.client("b").await);
            let (ours, theirs) = (create(&a, "ours").await, create(&b, "theirs").await);
            server.sleep(25_000).await;
            server.disk.room.set(1 << 20);
            write(&a, &ours, 0, &[1; 10_000]).await;
            a.fsync(&ours, false).await.unwrap();
            server.sleep(waits).await;
            let written = b.write(&theirs, 0, Bytes::from(pattern(900_000, 1)), false).await;
            assert_eq!(written, expected, "after {waits} ms");
        });
    }
}

#[test]
fn what_is_kept_for_long_stays_reserved() {
    simulate(1, |server| async move {
        server.start().await;
        let patient = ClientConfig { write_back_after: Duration::from_secs(3600), ..ClientConfig::default() };
        let (a, b) = (server.client_with("a", patient).await, server.client("b").await);
        let (ours, theirs) = (create(&a, "ours").await, create(&b, "theirs").await);
        server.sleep(25_000).await;
        server.disk.room.set(4 << 20);
        write(&a, &ours, 0, &pattern(500_000, 1)).await;
        // Kept for longer than a reservation lasts.
        server.sleep(150_000).await;
        assert_eq!(a.dirty_bytes(), 500_000);
        for part in 0..64 {
            let _ = b.write(&theirs, part << 16, Bytes::from(pattern(1 << 16, part)), true).await;
        }
        assert_eq!(a.fsync(&ours, false).await, Ok(()));
    });
}
