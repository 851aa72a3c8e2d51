//! A handful of fixed seeds through everything, and the same seed in two processes.

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

/// Each seed ends with a power cut of a node that has nothing left to do: it shows nothing of a cut
/// in the middle of work, and is not counted as one.
#[test]
fn the_power_cut_that_ends_a_seed_is_not_counted_as_one_of_a_node_at_work() {
    let mut at_work = 0;
    for seed in 1..=5 {
        let toll = scenario::run(seed).expect("seeds 1 to 5 end clean").toll;
        assert!(toll.power_cuts_at_work < toll.power_cuts, "seed {seed}: {toll}");
        at_work += toll.power_cuts_at_work;
    }
    assert!(at_work > 0, "no power cut hit a node at work");
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
