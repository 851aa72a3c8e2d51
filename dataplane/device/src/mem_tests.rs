use super::*;
use crate::conformance::{self, pattern};
use cfs_reactor::Executor;
use cfs_reactor::clock::SimClock;
use std::cell::Cell;
use std::future::Future;
use std::time::Duration;

const BLOCK: usize = 4096;
const SIZE: u64 = 16 << 20;

fn disk(seed: u64) -> Rc<MemDisk> {
    MemDisk::new("mem0", SIZE, BLOCK as u32, seed)
}

/// Runs one node against a disk until its future ends; gives the trace hash too.
fn run<T: 'static, F: Future<Output = T> + 'static>(
    disk: &Rc<MemDisk>,
    seed: u64,
    body: impl FnOnce(Rc<MemDevice>, Handle) -> F,
) -> (T, u64) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let body = body(disk.open(&handle), handle.clone());
    let value = executor.run_simulated(&handle, body).unwrap().unwrap();
    (value, executor.trace_hash())
}

async fn put(device: &MemDevice, block: u64, seed: u64, fua: bool) -> DeviceResult<()> {
    device.write(block * BLOCK as u64, vec![pattern(seed, BLOCK)], Placement::Data, fua).await
}

/// Reads everything after the node is gone.
fn blocks(disk: &Rc<MemDisk>, count: usize) -> Vec<Vec<u8>> {
    let (bytes, _) = run(disk, 0, move |device, _| async move { device.read(0, count * BLOCK).await.unwrap() });
    bytes.chunks(BLOCK).map(<[u8]>::to_vec).collect()
}

#[test]
fn the_memory_disk_conforms() {
    for (seed, block) in [(1, 4096), (2, 512)] {
        let disk = MemDisk::new("mem0", SIZE, block, seed);
        run(&disk, seed, move |device, _| conformance::all(device, seed));
    }
}

#[test]
fn a_large_disk_costs_what_was_written() {
    let disk = MemDisk::new("large", 1 << 40, 4096, 1);
    run(&disk, 1, |device, _| async move { put(&device, (1 << 28) - 1, 7, true).await.unwrap() });
    assert_eq!(disk.blocks_held(), 1);
}

#[test]
fn a_power_cut_keeps_what_was_flushed_and_some_of_the_rest() {
    let mut kept_of_rest = Vec::new();
    for seed in 0..40 {
        let disk = disk(seed);
        run(&disk, seed, |device, _| async move {
            for block in 0..8 {
                put(&device, block, block, false).await.unwrap();
            }
            device.flush().await.unwrap();
            for block in 0..16 {
                put(&device, block, 100 + block, false).await.unwrap();
            }
            put(&device, 16, 16, true).await.unwrap();
        });
        disk.power_cut();
        let read = blocks(&disk, 17);
        let mut kept = 0;
        for (block, read) in read[..16].iter().enumerate() {
            let new = *read == pattern(100 + block as u64, BLOCK);
            let old = if block < 8 { pattern(block as u64, BLOCK) } else { vec![0; BLOCK].into() };
            assert!(new || *read == old, "seed {seed}: block {block} holds neither");
            kept += usize::from(new);
        }
        assert_eq!(read[16], pattern(16, BLOCK), "seed {seed}: a FUA write survives");
        kept_of_rest.push(kept);
    }
    assert!(kept_of_rest.contains(&0) && kept_of_rest.contains(&16), "{kept_of_rest:?}");
    assert!(kept_of_rest.iter().any(|kept| (1..16).contains(kept)), "{kept_of_rest:?}");
}

/// Of 40 seeds, in how many a power cut lost part of an answered write of four blocks.
fn losses(flush: bool) -> usize {
    let written = pattern(5, 4 * BLOCK);
    let lost = |seed: &u64| {
        let (disk, bytes) = (disk(*seed), written.clone());
        run(&disk, *seed, move |device, _| async move {
            device.write(0, vec![bytes], Placement::Log, false).await.unwrap();
            if flush {
                device.flush().await.unwrap();
            }
        });
        disk.power_cut();
        blocks(&disk, 4).concat() != written
    };
    (0..40).filter(lost).count()
}

#[test]
fn a_dropped_flush_loses_data_and_a_flush_does_not() {
    assert_eq!(losses(true), 0);
    assert!(losses(false) > 20);
}

#[test]
fn a_flush_keeps_only_what_was_answered_before_it_was_asked() {
    let lost = |seed: &u64| {
        let disk = disk(*seed);
        run(&disk, *seed, |device, _| async move {
            // Both under way together: the write may come last.
            let (written, flushed) = futures_util::future::join(put(&device, 0, 1, false), device.flush()).await;
            written.unwrap();
            flushed.unwrap();
        });
        disk.power_cut();
        blocks(&disk, 1)[0] != pattern(1, BLOCK)
    };
    assert!((0..40).any(|seed| lost(&seed)));
}

#[test]
fn an_older_cached_write_never_overtakes_a_fua_write() {
    for seed in 0..40 {
        let disk = disk(seed);
        run(&disk, seed, |device, _| async move {
            put(&device, 0, 1, false).await.unwrap();
            put(&device, 0, 2, true).await.unwrap();
        });
        disk.power_cut();
        assert_eq!(blocks(&disk, 1)[0], pattern(2, BLOCK), "seed {seed}");
    }
}

#[test]
fn a_write_under_way_at_a_power_cut_is_torn_and_never_answered() {
    let mut kept_counts = Vec::new();
    for seed in 0..40 {
        let disk = disk(seed);
        let medium = disk.clone();
        let (answered, _) = run(&disk, seed, move |device, handle| async move {
            let answered = Rc::new(Cell::new(false));
            let (set, writer) = (answered.clone(), device.clone());
            medium.set_faults(Faults {
                latency: Duration::from_micros(50)..=Duration::from_micros(50),
                ..Faults::default()
            });
            handle.spawn(async move {
                writer.write(0, vec![pattern(9, 8 * BLOCK)], Placement::Data, true).await.unwrap();
                set.set(true);
            });
            handle.sleep(Duration::from_micros(10)).await;
            medium.power_cut();
            handle.sleep(Duration::from_secs(1)).await;
            answered.get()
        });
        assert!(!answered, "seed {seed}");
        let written = pattern(9, 8 * BLOCK);
        let read = blocks(&disk, 8);
        let kept = read.iter().zip(written.chunks(BLOCK)).filter(|(read, written)| *read == written).count();
        let empty = read.iter().filter(|read| **read == vec![0; BLOCK]).count();
        assert_eq!(kept + empty, 8, "seed {seed}: blocks are whole");
        kept_counts.push(kept);
    }
    assert!(kept_counts.iter().any(|kept| (1..8).contains(kept)), "{kept_counts:?}");
}

#[test]
fn a_dropped_write_is_applied_in_whole_in_part_or_not_at_all() {
    let kept = |seed: u64| {
        let disk = disk(seed);
        run(&disk, seed, |device, handle| async move {
            let write = device.write(0, vec![pattern(9, 8 * BLOCK)], Placement::Data, false);
            device
                .disk()
                .set_faults(Faults { latency: Duration::from_secs(1)..=Duration::from_secs(1), ..Faults::default() });
            assert!(handle.timeout(Duration::from_micros(1), write).await.is_none());
            device.disk().set_faults(Faults::default());
        });
        blocks(&disk, 8).iter().filter(|read| **read != vec![0; BLOCK]).count()
    };
    let counts: Vec<usize> = (0..40).map(kept).collect();
    assert!(counts.contains(&0) && counts.contains(&8), "{counts:?}");
    assert!(counts.iter().any(|kept| (1..8).contains(kept)), "{counts:?}");
}

#[test]
fn a_dropped_write_may_land_over_a_later_one_but_not_after_a_reopening() {
    let landed_late = |seed: &u64| {
        let disk = disk(*seed);
        let slow = Faults { latency: Duration::from_secs(1)..=Duration::from_secs(1), ..Faults::default() };
        disk.set_faults(slow);
        let (first, _) = run(&disk, *seed, |device, handle| async move {
            assert!(handle.timeout(Duration::from_micros(1), put(&device, 0, 1, false)).await.is_none());
            put(&device, 0, 2, false).await.unwrap();
            device.read(0, BLOCK).await.unwrap()
        });
        let again = blocks(&disk, 1);
        run(&disk, *seed, |device, _| async move { put(&device, 0, 3, false).await.unwrap() });
        assert_eq!(blocks(&disk, 1)[0], pattern(3, BLOCK), "seed {seed}");
        first[..] == pattern(1, BLOCK)[..] || again[0] == pattern(1, BLOCK)
    };
    let late = (0..40).filter(landed_late).count();
    assert!((1..40).contains(&late), "{late}");
}

#[test]
fn the_disk_halts_at_the_chosen_write_and_tells_so() {
    for halt_at in 1..=4u64 {
        let disk = disk(halt_at);
        let killed = Rc::new(Cell::new(0));
        let progress = Rc::new(Cell::new(0));
        let (counted, medium, done) = (killed.clone(), disk.clone(), progress.clone());
        run(&disk, 3, move |device, handle| async move {
            let domain = handle.new_domain();
            let victim = domain.clone();
            let on_halt = Box::new(move || {
                counted.set(counted.get() + 1);
                victim.kill();
            });
            medium.halt_after(Some(halt_at), Some(on_halt));
            domain.spawn(async move {
                for block in 0..4 {
                    put(&device, block, block, true).await.unwrap();
                    done.set(done.get() + 1);
                }
            });
            handle.sleep(Duration::from_millis(1)).await;
        });
        assert_eq!((killed.get(), progress.get()), (1, halt_at - 1));
        assert_eq!(disk.write_count(), halt_at);
        disk.power_cut();
        let read = blocks(&disk, 4);
        for block in 0..halt_at - 1 {
            assert_eq!(read[block as usize], pattern(block, BLOCK), "halt at {halt_at}: block {block}");
        }
        for block in halt_at..4 {
            assert_eq!(read[block as usize], vec![0; BLOCK], "halt at {halt_at}: block {block}");
        }
    }
}

#[test]
fn each_fault_does_what_it_says() {
    let attempt = |faults: Faults| {
        let disk = disk(11);
        let medium = disk.clone();
        let (results, _) = run(&disk, 11, move |device, _| async move {
            put(&device, 0, 1, true).await.unwrap();
            medium.set_faults(faults);
            let written = device.write(0, vec![pattern(2, 4 * BLOCK)], Placement::Data, true).await;
            let read = device.read(0, BLOCK).await;
            medium.set_faults(Faults::default());
            (written, read)
        });
        (results.0, results.1.map(|read| read.to_vec()), blocks(&disk, 4).concat(), disk)
    };
    let intended = pattern(2, 4 * BLOCK).to_vec();
    let before = [&pattern(1, BLOCK)[..], &vec![0; 3 * BLOCK]].concat();

    let (written, read, medium, disk) = attempt(Faults::default());
    assert_eq!((written, read, disk.faults_injected()), (Ok(()), Ok(intended[..BLOCK].to_vec()), 0));
    assert_eq!(medium, intended);

    let (written, _, _, _) = attempt(Faults { write_error: 1.0, ..Faults::default() });
    assert!(
        matches!(written, Err(DeviceError::Io { operation: "write", offset: 0, length: 16384, .. })),
        "{written:?}"
    );
    let (_, read, _, _) = attempt(Faults { read_error: 1.0, ..Faults::default() });
    assert!(matches!(read, Err(DeviceError::Io { operation: "read", .. })), "{read:?}");

    let (written, _, medium, disk) = attempt(Faults { lost_write: 1.0, ..Faults::default() });
    assert_eq!((written, medium, disk.faults_injected()), (Ok(()), before.clone(), 1));

    let (written, _, medium, disk) = attempt(Faults { misdirected_write: 1.0, ..Faults::default() });
    assert_eq!((written, medium), (Ok(()), before));
    let everything = blocks(&disk, (SIZE / BLOCK as u64) as usize).concat();
    assert_eq!(everything.chunks(BLOCK).filter(|block| **block == intended[..BLOCK]).count(), 1);

    let (written, _, medium, _) = attempt(Faults { torn_write: 1.0, ..Faults::default() });
    assert_eq!(written, Ok(()));
    assert_ne!(medium, intended);

    let (_, read, medium, _) = attempt(Faults { bit_flip_on_read: 1.0, ..Faults::default() });
    let flipped: u32 = read.unwrap().iter().zip(&intended).map(|(read, intended)| (read ^ intended).count_ones()).sum();
    assert_eq!((flipped, medium), (1, intended));
}

#[test]
fn one_seed_gives_one_history_of_faults_and_another_seed_another() {
    let history = |seed| {
        let disk = disk(seed);
        disk.set_faults(Faults { write_error: 0.3, read_error: 0.3, lost_write: 0.2, ..Faults::default() });
        run(&disk, seed, |device, _| async move {
            let writes = futures_util::future::join_all((0..40).map(|block| put(&device, block, block, false))).await;
            let mut failed: Vec<bool> = writes.iter().map(Result::is_err).collect();
            for block in 0..40 {
                failed.push(device.read(block * BLOCK as u64, BLOCK).await.is_err());
            }
            failed
        })
    };
    assert_eq!(history(21), history(21));
    assert_ne!(history(21).0, history(22).0);
    assert_ne!(history(21).1, history(22).1);
}

#[test]
fn the_trace_sees_what_was_written() {
    let trace = |contents| run(&disk(1), 1, move |device, _| async move { put(&device, 0, contents, false).await }).1;
    assert_eq!(trace(1), trace(1));
    assert_ne!(trace(1), trace(2));
}

#[test]
fn corruption_changes_every_byte_of_its_range_and_no_other() {
    let disk = disk(1);
    run(&disk, 1, |device, _| async move {
        put(&device, 0, 1, true).await.unwrap();
        put(&device, 1, 2, false).await.unwrap();
    });
    let before = blocks(&disk, 3).concat();
    disk.corrupt(4000, 4500, 77);
    let check = |what: &str| {
        let after = blocks(&disk, 3).concat();
        let changed: Vec<usize> = (0..before.len()).filter(|at| before[*at] != after[*at]).collect();
        assert_eq!(changed, (4000..8500).collect::<Vec<_>>(), "{what}");
    };
    check("at once");
    run(&disk, 2, |device, _| async move { device.flush().await.unwrap() });
    disk.power_cut();
    check("a flush heals nothing");
}

#[test]
fn a_failed_disk_is_gone_until_restored() {
    let disk = disk(1);
    let medium = disk.clone();
    run(&disk, 1, move |device, _| async move {
        put(&device, 0, 1, true).await.unwrap();
        medium.fail();
        let gone = DeviceError::Gone { device: "mem0".to_owned() };
        assert_eq!(put(&device, 0, 2, true).await, Err(gone.clone()));
        assert_eq!(device.read(0, BLOCK).await.map(|read| read.len()), Err(gone.clone()));
        assert_eq!(device.flush().await, Err(gone.clone()));
        assert_eq!(device.discard(0, BLOCK as u64).await, Err(gone));
        medium.restore();
        assert_eq!(device.read(0, BLOCK).await.unwrap()[..], pattern(1, BLOCK)[..]);
    });
}

#[test]
fn a_snapshot_shares_nothing_with_its_origin() {
    let disk = disk(1);
    run(&disk, 1, |device, _| async move { put(&device, 0, 1, true).await.unwrap() });
    let copy = disk.snapshot();
    run(&disk, 2, |device, _| async move { put(&device, 0, 2, true).await.unwrap() });
    assert_eq!(blocks(&copy, 1)[0], pattern(1, BLOCK));
    assert_eq!(blocks(&disk, 1)[0], pattern(2, BLOCK));
}
