//! Power is cut before every single write of a workload, and again during the recovery.

mod common;

use cfs_reactor::clock::SplitMix64;
use common::crash::*;
use common::*;
use std::rc::Rc;

const ZONES: u32 = 14;
const FILL: usize = 250 << 10;

/// One life until the `halt`-th write, a power cut, perhaps another during recovery, then the
/// check, a second life, a plain process kill, and the check again. True if the first life crashed.
fn crash_at(seed: u64, halt: u64, steps: u32) -> bool {
    run(seed, move |handle| async move {
        let context = format!("seed {seed} halt {halt}");
        let disk = formatted(&handle, ZONES, seed ^ halt).await;
        let journal = Journal::default();
        let mut random = SplitMix64::new(seed ^ (halt << 20));
        let life = |journal: Journal, seed: u64, steps: u32| {
            let disk = disk.clone();
            move |node: cfs_reactor::Handle| async move {
                let store = open(&disk, &node).await;
                work(store.clone(), node, journal, seed, steps, FILL).await;
                assert!(steps < 60 || store.zones_collected() > 3, "{} zones collected", store.zones_collected());
            }
        };
        let crashed = live(&handle, &disk, Some(halt), life(journal.clone(), seed, steps)).await;
        disk.power_cut();
        if random.one_in(2) {
            let again = 1 + random.below(4);
            let reopen = { let disk = disk.clone(); move |node: cfs_reactor::Handle| async move { open(&disk, &node).await; } };
            live(&handle, &disk, Some(again), reopen).await;
            disk.power_cut();
        }
        let store = open(&disk, &handle).await;
        assert_eq!(store.recovery().corrupt, vec![], "{context}");
        check(&store, &journal, &context).await;
        let space = store.space();
        drop(store);
        // A second life of a few writes, ended by kill -9: what is in the device's cache stays.
        let halt = 1 + random.below(30);
        live(&handle, &disk, Some(halt), life(journal.clone(), seed + 500, 8)).await;
        disk.halt_after(None, None);
        if random.one_in(2) {
            disk.power_cut();
        }
        let store = open(&disk, &handle).await;
        assert_eq!(store.recovery().corrupt, vec![], "{context}, second life");
        check(&store, &journal, &format!("{context}, second life")).await;
        assert_eq!(store.space().capacity, space.capacity);
        crashed
    })
}

#[test]
fn whatever_was_answered_survives_a_power_cut_at_every_write() {
    for seed in [1, 2] {
        let mut halt = 1;
        while crash_at(seed, halt, 60) {
            halt += 1;
        }
        assert!(halt > 150, "the workload wrote {halt} times only");
        println!("seed {seed}: {halt} write boundaries");
    }
}

#[test]
#[ignore = "minutes: run by hand and by the torture script"]
fn whatever_was_answered_survives_a_power_cut_at_every_write_many_seeds() {
    for seed in 100..140 {
        let mut halt = 1;
        while crash_at(seed, halt, 60) {
            halt += 1 + seed % 3;
        }
        println!("seed {seed}: {halt} write boundaries");
    }
}

#[test]
fn the_same_seed_does_the_same_twice() {
    let trace = |seed: u64| {
        let executor = cfs_reactor::Executor::new(Rc::new(cfs_reactor::clock::SimClock::new(seed)));
        let handle = executor.domain();
        let main = handle.clone();
        let story = async move {
            let disk = formatted(&main, ZONES, seed).await;
            let store = open(&disk, &main).await;
            work(store, main.clone(), Journal::default(), seed, 40, FILL).await;
        };
        executor.run_simulated(&handle, story).unwrap().unwrap();
        executor.trace_hash()
    };
    assert_eq!(trace(11), trace(11));
    assert_ne!(trace(11), trace(12));
}
