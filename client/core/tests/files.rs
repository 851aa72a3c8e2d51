//! Files through the client: one client, then two, then with faults.

mod common;

use bytes::Bytes;
use cfs_client::{Caller, Client, OpenFlags, Whence, WriteFlags};
use cfs_reactor::clock::SplitMix64;
use cfs_wire::limits::PUNCH_EXTENTS_MAX;
use cfs_wire::meta::{AttrChanges, XATTR_CAPABILITY};
use cfs_wire::{Epoch, Errno};
use common::{ROOT, Server, create, open, pattern, read, seeds, simulate, write};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

#[test]
fn what_is_written_is_read_back_before_and_after_fsync_and_by_a_new_client() {
    simulate(1, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        let data = pattern(1 << 20, 1);
        write(&client, &file, 0, &data).await;
        assert_eq!(server.disk.stores.get(), 0, "kept under the lease, nothing sent");
        assert_eq!(read(&client, &file, 0, 1 << 20).await, data);
        assert_eq!(client.getattr(file.ino()).await.unwrap().attr.size, 1 << 20);
        client.fsync(&file, false).await.unwrap();
        assert_eq!(client.dirty_bytes(), 0);
        assert_eq!(server.disk.stores.get(), 1);
        assert_eq!(read(&client, &file, 0, 2 << 20).await, data, "short at the end of the file");

        let other = server.client("b").await;
        let file = open(&other, "f").await;
        assert_eq!(read(&other, &file, 100, 5000).await, data[100..5100]);
        assert_eq!(read(&other, &file, 1 << 20, 10).await, b"");
    });
}

#[test]
fn a_small_file_travels_in_its_commit_and_grows_out_of_it() {
    simulate(2, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "small").await;
        write(&client, &file, 0, b"hello").await;
        client.fsync(&file, true).await.unwrap();
        assert_eq!(server.disk.stores.get(), 0);
        let tail = pattern(10_000, 3);
        write(&client, &file, 5, &tail).await;
        client.fsync(&file, true).await.unwrap();
        let mut whole = b"hello".to_vec();
        whole.extend_from_slice(&tail);
        let other = server.client("b").await;
        let file = open(&other, "small").await;
        assert_eq!(read(&other, &file, 0, 1 << 20).await, whole);
    });
}

#[test]
fn a_hole_through_more_extents_than_one_commit_drops_is_made_in_pieces() {
    simulate(3, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "riddled").await;
        let extents = PUNCH_EXTENTS_MAX as u64 + 100;
        for index in 0..extents {
            write(&client, &file, index * 2, b"x").await;
        }
        client.fsync(&file, false).await.unwrap();
        let size = extents * 2 - 1;
        let mut expected = [b'x', 0].repeat(extents as usize);
        expected.truncate(size as usize);
        assert_eq!(read(&client, &file, 0, 1 << 20).await, expected);
        client.fallocate(&file, 0x03, 1, size - 2, false).await.unwrap();
        let other = server.client("b").await;
        let file = open(&other, "riddled").await;
        expected[1..size as usize - 1].fill(0);
        assert_eq!(read(&other, &file, 0, 1 << 20).await, expected);
    });
}

/// One file against a byte array, with everything that changes bytes.
async fn random_operations(server: &Server, client: &Rc<Client>, seed: u64, steps: u32, tolerate: bool) {
    const SPACE: u64 = 300_000;
    let mut random = SplitMix64::new(seed);
    let mut file = create(client, "f").await;
    let mut oracle: Vec<u8> = Vec::new();
    let extend = |oracle: &mut Vec<u8>, end: u64| {
        if oracle.len() < end as usize {
            oracle.resize(end as usize, 0);
        }
    };
    for step in 0..steps {
        let label = format!("seed {seed}, step {step}");
        let offset = random.below(SPACE);
        let length = if random.one_in(4) { 1 + random.below(100_000) } else { 1 + random.below(3000) };
        match random.below(14) {
            0..=5 => {
                let data = pattern(length as usize, random.next_u64());
                write(client, &file, offset, &data).await;
                extend(&mut oracle, offset + length);
                oracle[offset as usize..(offset + length) as usize].copy_from_slice(&data);
            }
            6 => {
                let size = random.below(SPACE);
                let changes = AttrChanges { size: Some(size), ..AttrChanges::default() };
                let located = client.setattr(file.ino(), changes).await.unwrap();
                assert_eq!(located.attr.size, size, "{label}");
                oracle.resize(size as usize, 0);
            }
            7 => {
                client.fallocate(&file, 0x03, offset, length, false).await.unwrap();
                let end = (offset + length).min(oracle.len() as u64);
                if offset < end {
                    oracle[offset as usize..end as usize].fill(0);
                }
            }
            8 => {
                client.fallocate(&file, 0x10, offset, length, false).await.unwrap();
                extend(&mut oracle, offset + length);
                oracle[offset as usize..(offset + length) as usize].fill(0);
            }
            9 => {
                let flags = OpenFlags { append: true, ..OpenFlags::default() };
                let appending = client.open(file.ino(), flags, false).await.unwrap();
                let data = pattern(length as usize, random.next_u64());
                write(client, &appending, 0, &data).await;
                client.release(&appending);
                oracle.extend_from_slice(&data);
            }
            10 => client.fsync(&file, false).await.unwrap(),
            11 => {
                client.flush(&file).await.unwrap();
                client.release(&file);
                if random.one_in(3) {
                    server.sleep(4000).await;
                }
                file = open(client, "f").await;
            }
            12 if !oracle.is_empty() => {
                let from = random.below(oracle.len() as u64);
                let step = length.min(oracle.len() as u64 - from);
                let to = SPACE + random.below(SPACE);
                if to >= from + step {
                    let copied = client.copy_file_range(&file, from, &file, to, step, false).await.unwrap();
                    assert_eq!(copied, step, "{label}");
                    extend(&mut oracle, to + step);
                    oracle.copy_within(from as usize..(from + step) as usize, to as usize);
                }
            }
            _ => server.sleep(random.below(1500)).await,
        }
        if tolerate && random.one_in(30) {
            server.restart();
        }
        let (from, length) = (random.below(SPACE), 1 + random.below(120_000) as u32);
        let expected = oracle.get(from as usize..).unwrap_or_default();
        let expected = &expected[..expected.len().min(length as usize)];
        let seen = read(client, &file, from, length).await;
        assert!(seen == expected, "{label}: {} bytes at {from}, {} expected", seen.len(), expected.len());
        assert_eq!(client.getattr(file.ino()).await.unwrap().attr.size, oracle.len() as u64, "{label}");
    }
    client.fsync(&file, false).await.unwrap();
    let other = server.client("reader").await;
    let file = open(&other, "f").await;
    let mut at = 0;
    while at < oracle.len() {
        let seen = read(&other, &file, at as u64, 1 << 20).await;
        assert!(!seen.is_empty() && seen == oracle[at..at + seen.len()], "seed {seed}: the second client at {at}");
        at += seen.len();
    }
}

#[test]
fn random_operations_agree_with_a_byte_array() {
    for seed in seeds(100, 12) {
        simulate(seed, |server| async move {
            server.start().await;
            let client = server.client("a").await;
            random_operations(&server, &client, seed, 120, false).await;
        });
    }
}

#[test]
fn lost_calls_and_restarts_of_the_server_change_nothing() {
    for seed in seeds(100_000, 10) {
        simulate(seed, |server| async move {
            server.start().await;
            let faults = cfs_fabric::mem::Faults {
                request_loss: 20_000,
                reply_loss: 20_000,
                reset: 5_000,
                ..cfs_fabric::mem::Faults::default()
            };
            server.network.set_faults(faults);
            let client = server.client("a").await;
            random_operations(&server, &client, seed, 80, true).await;
        });
    }
}

#[test]
fn a_lost_reply_is_not_a_second_execution() {
    for seed in 300..306 {
        simulate(seed, |server| async move {
            server.start().await;
            let client = server.client("a").await;
            client.getattr(ROOT).await.unwrap();
            let faults = cfs_fabric::mem::Faults { reply_loss: 400_000, ..cfs_fabric::mem::Faults::default() };
            server.network.set_faults(faults);
            for number in 0..20 {
                let name = format!("d{number}");
                client.mkdir(Caller::default(), ROOT, name.as_bytes(), 0o755, 0).await.unwrap();
                client.rename(ROOT, name.as_bytes(), ROOT, b"moved", 0).await.unwrap();
                client.rmdir(ROOT, b"moved").await.unwrap();
                assert_eq!(client.rmdir(ROOT, b"moved").await, Err(Errno::ENOENT), "seed {seed}");
            }
        });
    }
}

#[test]
fn a_reader_sees_what_a_writer_holds_back_and_both_go_on_coherently() {
    simulate(4, |server| async move {
        server.start().await;
        let (writer, reader) = (server.client("w").await, server.client("r").await);
        let file = create(&writer, "f").await;
        write(&writer, &file, 0, b"first version").await;
        assert!(writer.dirty_bytes() > 0);
        let seen = open(&reader, "f").await;
        assert_eq!(reader.getattr(seen.ino()).await.unwrap().attr.size, 13, "the size is recalled");
        assert_eq!(read(&reader, &seen, 0, 100).await, b"first version");
        assert_eq!(writer.dirty_bytes(), 0);
        for round in 0..20u8 {
            write(&writer, &file, 0, &[round; 13]).await;
            assert_eq!(read(&reader, &seen, 0, 100).await, [round; 13], "round {round}");
            write(&reader, &seen, 3, b"x").await;
            assert_eq!(read(&writer, &file, 3, 1).await, b"x", "round {round}");
        }
    });
}

#[test]
fn names_are_cached_under_a_grant_and_dropped_when_another_client_changes_them() {
    simulate(5, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        create(&a, "f").await;
        let first = b.lookup(ROOT, b"f").await.unwrap();
        assert!(!first.entry_valid.is_zero() && !first.attr_valid.is_zero());
        assert!(matches!(b.lookup(ROOT, b"g").await, Err(Ok(_))));
        let reads = server.disk.reads.get();
        for _ in 0..10 {
            b.lookup(ROOT, b"f").await.unwrap();
            assert!(matches!(b.lookup(ROOT, b"g").await, Err(Ok(negative)) if !negative.valid.is_zero()));
        }
        assert_eq!(server.disk.reads.get(), reads, "served from the cache");
        a.rename(ROOT, b"f", ROOT, b"g", 0).await.unwrap();
        assert!(matches!(b.lookup(ROOT, b"f").await, Err(Ok(_))));
        assert_eq!(b.lookup(ROOT, b"g").await.unwrap().attr.ino, first.attr.ino);
        let changes = AttrChanges { mode: Some(0o600), ..AttrChanges::default() };
        a.setattr(first.attr.ino, changes).await.unwrap();
        assert_eq!(b.getattr(first.attr.ino).await.unwrap().attr.mode, 0o600);
    });
}

#[test]
fn a_rename_drops_what_is_cached_of_its_inode_though_the_entry_is_not_cached_any_more() {
    simulate(5, |server| async move {
        server.start().await;
        let (a, b) = (server.client("a").await, server.client("b").await);
        let ino = create(&a, "f").await.ino();
        create(&b, "other").await;
        let before = a.getattr(ino).await.unwrap();
        assert!(!before.valid.is_zero(), "cached, while the directory's entries are not");
        a.rename(ROOT, b"f", ROOT, b"g", 0).await.unwrap();
        let after = a.getattr(ino).await.unwrap().attr.ctime;
        assert_ne!(after, before.attr.ctime);
        assert_eq!(after, b.getattr(ino).await.unwrap().attr.ctime);
    });
}

#[test]
fn bytes_that_moved_are_found_again_and_stale_references_are_stored_anew() {
    simulate(6, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        let data = pattern(200_000, 9);
        write(&client, &file, 0, &data).await;
        server.disk.stale_commits.set(2);
        client.fsync(&file, false).await.unwrap();
        assert_eq!(server.disk.stores.get(), 3);
        server.disk.gone_fetches.set(3);
        assert_eq!(read(&client, &file, 0, 200_000).await, data);
        assert!(server.disk.fetches.get() >= 4);
    });
}

#[test]
fn a_writer_that_never_pauses_gives_its_lease_back_when_it_is_recalled() {
    simulate(13, |server| async move {
        server.start().await;
        server.disk.proposal_micros_max.set(5000);
        let (a, b) = (server.client("a").await, server.client("b").await);
        let file = create(&a, "f").await;
        write(&a, &file, 0, &pattern(100_000, 1)).await;
        let asked = Rc::new(Cell::new(false));
        let (writer, busy, answered) = (a.clone(), server.clone(), asked.clone());
        let writing = server.handle.spawn(async move {
            for part in (1..).take_while(|_| !answered.get()) {
                write(&writer, &file, part % 100 * 5000, &pattern(5000, part)).await;
                busy.handle.sleep(Duration::from_micros(20)).await;
            }
            writer.fsync(&file, false).await
        });
        let begun = server.handle.now();
        let size = b.lookup(ROOT, b"f").await.unwrap().attr.size;
        asked.set(true);
        assert!(size >= 100_000);
        let took = server.handle.now() - begun;
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert_eq!(writing.await.unwrap(), Ok(()));
    });
}

#[test]
fn a_write_does_as_its_own_flags_say_whatever_its_file_was_opened_for() {
    simulate(14, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        write(&client, &file, 0, b"first").await;
        let flags = OpenFlags { append: true, ..OpenFlags::default() };
        let appending = client.open(file.ino(), flags, false).await.unwrap();
        write(&client, &appending, 0, b" second").await;
        // A page of a mapping.
        client.write_with(&appending, 0, Bytes::from_static(b"F"), WriteFlags::default()).await.unwrap();
        assert_eq!(read(&client, &file, 0, 100).await, b"First second");
        let append = WriteFlags { append: true, sync: true, ..WriteFlags::default() };
        client.write_with(&file, 0, Bytes::from_static(b" third"), append).await.unwrap();
        assert_eq!(client.dirty_bytes(), 0);
        assert_eq!(read(&client, &file, 0, 100).await, b"First second third");
    });
}

#[test]
fn a_write_takes_away_the_capabilities_that_were_there_before_it() {
    simulate(5, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        let kept = async || client.getxattr(file.ino(), XATTR_CAPABILITY).await == Ok(b"some".to_vec());
        // What is written before stays behind it, also when it is kept for a while.
        write(&client, &file, 0, b"program").await;
        client.setxattr(file.ino(), XATTR_CAPABILITY, b"some", 0).await.unwrap();
        client.fsync(&file, false).await.unwrap();
        assert!(kept().await);
        let mapped = WriteFlags { mapped: true, ..WriteFlags::default() };
        client.write_with(&file, 0, Bytes::from_static(b"page"), mapped).await.unwrap();
        client.fsync(&file, false).await.unwrap();
        assert!(kept().await);
        write(&client, &file, 0, b"other program").await;
        // Also before the write is committed, for whoever asks.
        let other = server.client("b").await;
        for client in [&client, &other, &client] {
            assert_eq!(client.getxattr(file.ino(), XATTR_CAPABILITY).await, Err(Errno::ENODATA));
            assert_eq!(client.listxattr(file.ino()).await.unwrap().len(), 0);
        }
    });
}

#[test]
fn a_copy_shares_what_is_stored() {
    simulate(14, |server| async move {
        server.start().await;
        let client = server.client("writer").await;
        let (from, to) = (create(&client, "from").await, create(&client, "to").await);
        let content = pattern(3 << 20, 1);
        write(&client, &from, 0, &content).await;
        client.fsync(&from, false).await.unwrap();
        let stores = server.disk.stores.get();
        assert_eq!(client.copy_file_range(&from, 0, &to, 0, 3 << 20, false).await, Ok(3 << 20));
        client.fsync(&to, false).await.unwrap();
        assert_eq!(server.disk.stores.get(), stores, "bytes were stored anew");
        assert!(read(&client, &to, 0, 3 << 20).await == content);
        // Long after it was stored, also what was itself shared.
        server.advance_epoch(Epoch(9)).await;
        assert_eq!(client.copy_file_range(&to, 0, &from, 4 << 20, 3 << 20, false).await, Ok(3 << 20));
        client.fsync(&from, false).await.unwrap();
        assert_eq!(server.disk.stores.get(), stores, "old bytes were stored anew");
        assert!(read(&client, &from, 4 << 20, 3 << 20).await == content);
    });
}

const STEPS: u64 = 64;
const STEP_BYTES: u64 = 64 << 10;

/// Reads a file of so many steps in the order that `place` says; how many fetches that took.
async fn fetches(server: &Server, name: &str, content: &[u8], place: fn(u64) -> u64) -> u32 {
    let reader = server.client(name).await;
    let file = open(&reader, "file").await;
    let before = server.disk.fetches.get();
    for step in 0..STEPS {
        let offset = place(step) * STEP_BYTES;
        let found = read(&reader, &file, offset, STEP_BYTES as u32).await;
        assert!(found == content[offset as usize..][..STEP_BYTES as usize], "{name}: {offset}");
    }
    server.disk.fetches.get() - before
}

#[test]
fn a_sequential_reader_finds_what_was_read_ahead_and_for_another_nothing_is() {
    simulate(15, |server| async move {
        server.start().await;
        let client = server.client("writer").await;
        let file = create(&client, "file").await;
        let content = pattern((STEPS * STEP_BYTES) as usize, 1);
        write(&client, &file, 0, &content).await;
        client.fsync(&file, false).await.unwrap();
        let in_order = fetches(&server, "sequential", &content, |step| step).await;
        let scattered = fetches(&server, "scattered", &content, |step| step * 27 % STEPS).await;
        // Pages that lie side by side come in one fetch in either case.
        assert!(in_order <= 8, "{in_order} fetches: nothing was read ahead");
        assert!((20..=STEPS as u32).contains(&scattered), "{scattered} fetches for {STEPS} reads");
    });
}

#[test]
fn ranges_are_neither_cut_out_nor_inserted() {
    simulate(16, |server| async move {
        server.start().await;
        const COLLAPSE: i32 = 0x08;
        const INSERT: i32 = 0x20;
        const UNSHARE: i32 = 0x40;
        let client = server.client("writer").await;
        let file = create(&client, "file").await;
        write(&client, &file, 0, &pattern(20_000, 1)).await;
        for mode in [COLLAPSE, INSERT, UNSHARE] {
            assert_eq!(client.fallocate(&file, mode, 0, 4096, false).await, Err(Errno::EOPNOTSUPP), "{mode:#x}");
        }
        assert!(read(&client, &file, 0, 30_000).await == pattern(20_000, 1));
    });
}

#[test]
fn a_hole_of_exabytes_is_sought_through_in_one_call() {
    simulate(15, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        write(&client, &file, 0, &pattern(100_000, 1)).await;
        let changes = AttrChanges { size: Some(7 << 60), ..AttrChanges::default() };
        client.setattr(file.ino(), changes).await.unwrap();
        let reads = server.disk.reads.get();
        assert_eq!(client.lseek(&file, 100_000, Whence::Data).await, Err(Errno::ENXIO));
        assert_eq!(client.lseek(&file, 0, Whence::Hole).await, Ok(100_000));
        assert!(server.disk.reads.get() - reads <= 4);
        assert_eq!(client.lseek(&file, 7 << 60, Whence::Hole).await, Err(Errno::ENXIO));
        assert_eq!(client.lseek(&file, u64::MAX, Whence::Data).await, Err(Errno::ENXIO));
    });
}

#[test]
fn old_dirty_data_is_written_back_by_itself_and_a_stream_is_bounded() {
    simulate(9, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        write(&client, &file, 0, b"left alone").await;
        server.sleep(3000).await;
        assert_eq!(client.dirty_bytes(), 0);
        let block = pattern(1 << 20, 5);
        for number in 0..100u64 {
            write(&client, &file, number << 20, &block).await;
            assert!(client.dirty_bytes() <= (24 << 20), "write {number}");
        }
        client.fsync(&file, false).await.unwrap();
        for number in [0, 57, 99u64] {
            assert_eq!(read(&client, &file, number << 20, 1 << 20).await, block, "block {number}");
        }
        client.shutdown().await.unwrap();
    });
}

#[test]
fn a_small_new_file_costs_its_creation_its_commit_and_a_share_of_a_release() {
    simulate(11, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let before = server.disk.entries.get();
        for index in 0..100 {
            let file = create(&client, &format!("f{index}")).await;
            write(&client, &file, 0, b"small").await;
            client.fsync(&file, false).await.unwrap();
            client.release(&file);
        }
        server.handle.sleep(std::time::Duration::from_secs(10)).await;
        // Two releases of up to 64, and the session that is made known to the shard.
        assert_eq!(server.disk.entries.get() - before, 203);
        let other = server.client("b").await;
        let file = open(&other, "f7").await;
        assert_eq!(read(&other, &file, 0, 10).await, b"small");
        write(&other, &file, 5, b"er").await;
        other.fsync(&file, false).await.unwrap();
        let file = open(&client, "f7").await;
        assert_eq!(read(&client, &file, 0, 10).await, b"smaller");
    });
}

#[test]
fn data_and_holes_are_told_apart_and_an_unlinked_file_lives_until_closed() {
    simulate(10, |server| async move {
        server.start().await;
        let client = server.client("a").await;
        let file = create(&client, "f").await;
        write(&client, &file, 1 << 20, &pattern(100_000, 2)).await;
        assert_eq!(client.lseek(&file, 0, Whence::Data).await, Ok(1 << 20));
        assert_eq!(client.lseek(&file, 0, Whence::Hole).await, Ok(0));
        assert_eq!(client.lseek(&file, 1 << 20, Whence::Hole).await, Ok((1 << 20) + 100_000));
        assert_eq!(client.lseek(&file, (1 << 20) + 100_000, Whence::Data).await, Err(Errno::ENXIO));
        client.unlink(ROOT, b"f").await.unwrap();
        assert!(matches!(client.lookup(ROOT, b"f").await, Err(Ok(_))));
        let other = server.client("b").await;
        assert_eq!(read(&client, &file, 1 << 20, 100_000).await, pattern(100_000, 2));
        write(&client, &file, 0, b"still there").await;
        client.fsync(&file, false).await.unwrap();
        assert_eq!(read(&client, &file, 0, 11).await, b"still there");
        client.release(&file);
        server.sleep(10_000).await;
        let gone = other.getattr(file.ino()).await;
        assert!(matches!(gone, Err(Errno::ENOENT | Errno::ESTALE)), "{gone:?}");
    });
}

#[test]
fn two_clients_that_take_turns_see_one_file() {
    for seed in seeds(500, 8) {
        simulate(seed, |server| async move {
            server.start().await;
            // Reads overtake changes that are on their way.
            server.disk.proposal_micros_max.set(5000);
            let clients = [server.client("a").await, server.client("b").await];
            let first = create(&clients[0], "f").await;
            let files = [first, open(&clients[1], "f").await];
            let mut random = SplitMix64::new(seed);
            let mut oracle: Vec<u8> = Vec::new();
            for step in 0..150 {
                // Runs of one client's operations let it get the lease and lose it again.
                let at = if random.one_in(4) { 1 } else { (step / 10) % 2 };
                let (client, file) = (&clients[at], &files[at]);
                let (offset, length) = (random.below(60_000), 1 + random.below(9000));
                match random.below(6) {
                    0..=2 => {
                        let data = pattern(length as usize, random.next_u64());
                        write(client, file, offset, &data).await;
                        oracle.resize(oracle.len().max((offset + length) as usize), 0);
                        oracle[offset as usize..(offset + length) as usize].copy_from_slice(&data);
                    }
                    3 => {
                        let changes = AttrChanges { size: Some(offset), ..AttrChanges::default() };
                        client.setattr(file.ino(), changes).await.unwrap();
                        oracle.resize(offset as usize, 0);
                    }
                    4 => server.sleep(random.below(3000)).await,
                    _ => client.fsync(file, false).await.unwrap(),
                }
                let reader = random.below(2) as usize;
                let seen = read(&clients[reader], &files[reader], 0, 1 << 20).await;
                assert!(seen == oracle, "seed {seed}, step {step}: client {reader} after client {at}");
                let size = clients[1 - reader].getattr(files[0].ino()).await.unwrap().attr.size;
                assert_eq!(size, oracle.len() as u64, "seed {seed}, step {step}");
            }
        });
    }
}

#[test]
fn two_clients_that_write_one_file_at_once_both_see_all_of_it() {
    const ROUNDS: u64 = 60;
    const RECORD: u64 = 100;
    for seed in seeds(100, 10) {
        simulate(seed, |server| async move {
            server.start().await;
            // Reads overtake changes that are on their way.
            server.disk.proposal_micros_max.set(5000);
            let clients = [server.client("a").await, server.client("b").await];
            let first = create(&clients[0], "f").await;
            write(&clients[0], &first, 0, &vec![0; (2 * ROUNDS * RECORD) as usize]).await;
            let side = async |client: &Rc<Client>, side: u64| {
                let file = open(client, "f").await;
                for round in 0..ROUNDS {
                    let at = (2 * round + side) * RECORD;
                    write(client, &file, at, &[side as u8 + 1; RECORD as usize]).await;
                    client.getattr(file.ino()).await.unwrap();
                    let half = (at + RECORD) / 2;
                    let reads = (read(client, &file, 0, half as u32), read(client, &file, half, half as u32));
                    futures_util::future::join3(reads.0, reads.1, client.getattr(file.ino())).await.2.unwrap();
                }
                client.flush(&file).await.unwrap();
                client.release(&file);
            };
            futures_util::future::join(side(&clients[0], 0), side(&clients[1], 1)).await;
            let expected: Vec<u8> =
                (0..2 * ROUNDS).flat_map(|record| [(record % 2) as u8 + 1; RECORD as usize]).collect();
            for (at, client) in clients.iter().enumerate() {
                let file = open(client, "f").await;
                let seen = read(client, &file, 0, expected.len() as u32).await;
                let wrong: Vec<_> = (0..2 * ROUNDS)
                    .filter(|record| seen[(record * RECORD) as usize] != expected[(record * RECORD) as usize])
                    .collect();
                assert!(wrong.is_empty(), "seed {seed}, client {at} does not see {wrong:?}");
            }
        });
    }
}
