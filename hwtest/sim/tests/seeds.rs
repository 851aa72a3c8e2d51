//! A handful of fixed seeds through everything, the same seed in two processes, and a planted
//! bug that must be found.

use cfs_sim::scenario;
use std::process::Command;

#[test]
fn fixed_seeds_end_clean() {
    for seed in 1..=5 {
        if let Err(failure) = scenario::run(seed) {
            panic!("{}\n{failure}\nreplay: scripts/torture --seeds 1 --seed {seed}", failure.history.join("\n"));
        }
    }
}

/// What a process of its own prints for these seeds.
fn traces(seed: u64, seeds: u64) -> String {
    let mut torture = Command::new(env!("CARGO_BIN_EXE_torture"));
    torture.args(["--seed", &seed.to_string(), "--seeds", &seeds.to_string(), "--trace"]);
    let output = torture.output().expect("torture runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "seeds from {seed} fail:\n{text}");
    text
}

#[test]
fn a_seed_replays_exactly_in_another_process() {
    let first = traces(3, 2);
    assert_eq!(first.lines().filter(|line| line.contains(" trace ")).count(), 2, "{first}");
    assert_eq!(first, traces(3, 2));
    // The twin: another seed leaves another trace.
    let hashes =
        |text: &str| text.lines().next().and_then(|line| line.split_once(" trace ")).map(|(_, hash)| hash.to_owned());
    assert_ne!(hashes(&first), hashes(&traces(4, 1)));
}

#[cfg(feature = "planted")]
#[test]
fn a_planted_bug_is_found_and_the_same_seed_is_clean_without_it() {
    use cfs_wire::planted::Bug;
    let found = cfs_sim::planted::hunt(Bug::ClientFsyncEarly, 1, std::time::Duration::from_secs(60));
    let (seed, checker) = found.expect("fsync that returns early loses data within a minute of seeds");
    println!("found at seed {seed} by {checker}");
    assert!(scenario::run(seed).is_ok());
}
