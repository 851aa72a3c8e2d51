//! Power is cut before every single write of a workload, and again during the recovery.

mod common;

use common::crash::*;
use common::*;
use std::rc::Rc;

#[test]
fn whatever_was_answered_survives_a_power_cut_at_every_write() {
    // Every boundary of one seed, every fifth of another.
    for (seed, step) in [(1, 1), (2, 5)] {
        let mut halt = 1;
        while crash_at(seed, halt, 60) {
            halt += step;
        }
        assert!(halt > 150, "the workload wrote {halt} times only");
        println!("seed {seed}: {halt} write boundaries");
    }
}

#[test]
fn a_target_with_a_zone_for_every_stream_survives_power_cuts_too() {
    let (mut halt, mut runs) = (1, 0);
    while crash_on(34, 1500 << 10, 3, halt, 150) {
        halt += 19;
        runs += 1;
    }
    assert!(runs > 10, "{runs} crashes only");
}

#[test]
#[ignore = "minutes: run by hand"]
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
            work(store.clone(), main.clone(), Journal::default(), seed, 60, FILL).await;
            assert!(store.zones_collected() > 3, "the workload of these tests must make the collector work");
        };
        executor.run_simulated(&handle, story).unwrap().unwrap();
        executor.trace_hash()
    };
    assert_eq!(trace(11), trace(11));
    assert_ne!(trace(11), trace(12));
}
