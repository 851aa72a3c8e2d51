//! The fuzzer finds decoders that fail, whatever way they fail, and says which seed replays it.

use std::process::{Command, Output};

/// Far more than it takes.
const ROUNDS: &str = "500";
/// So that a hanging round does not hold the test up for long.
const CPU_LIMIT: [&str; 2] = ["--round-cpu-seconds", "1"];

/// Whether it found nothing, and what it said.
fn fuzz(arguments: &[&str]) -> (bool, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_fuzz")).args(arguments).args(CPU_LIMIT).output().expect("it starts");
    (status.success(), format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)))
}

fn line<'a>(told: &'a str, prefix: &str) -> &'a str {
    told.lines().find_map(|line| line.strip_prefix(prefix)).unwrap_or_else(|| panic!("no '{prefix}' in:\n{told}"))
}

/// Finds the failure, replays it alone, and finds nothing in the rounds before it.
fn finds(target: &str, reason: &str) {
    let (clean, told) = fuzz(&["--target", target, "--rounds", ROUNDS, "--seed", "1"]);
    assert!(!clean, "{told}");
    let (failed, input) = (format!("{target}: FAILED: "), format!("{target}: input list, "));
    assert!(line(&told, &failed).contains(reason), "{told}");
    let replay: Vec<&str> = line(&told, "replay: scripts/fuzz ").split(' ').collect();
    let (clean, again) = fuzz(&replay);
    assert!(!clean, "{again}");
    assert_eq!(line(&again, &failed), line(&told, &failed));
    assert_eq!(line(&again, &input), line(&told, &input));
    let seed: u64 = line(&told, &format!("replay: scripts/fuzz --target {target} --rounds 1 --seed ")).parse().unwrap();
    if seed > 1 {
        let (clean, told) = fuzz(&["--target", target, "--rounds", &(seed - 1).to_string(), "--seed", "1"]);
        assert!(clean, "{told}");
    }
}

#[test]
fn a_panic_is_found() {
    finds("planted-panic", "index out of bounds");
}

#[test]
fn a_loop_without_end_is_found() {
    finds("planted-hang", "no end after 1 CPU s");
}

#[test]
fn memory_taken_on_the_word_of_the_input_is_found() {
    finds("planted-memory", "took all memory or stack");
}

#[test]
fn a_descent_on_the_word_of_the_input_is_found() {
    finds("planted-stack", "took all memory or stack");
}

#[test]
fn a_value_that_is_written_as_another_is_found() {
    finds("planted-meaning", "is written as");
}

#[test]
fn what_is_planted_is_not_fuzzed_unasked() {
    let (clean, told) = fuzz(&["--target", "unknown"]);
    assert!(!clean && told.contains("there are frame, bodies, "), "{told}");
    assert!(!told.contains("planted"), "{told}");
}
