//! `cfsctl doctor` on the machine that the tests run on, whatever it is.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

use std::collections::BTreeSet;
use std::process::{Command, Output};

fn doctor(arguments: &[&str]) -> Output {
    // Nobody is there: it needs no server.
    let address = ["--address", "127.0.0.1:1", "doctor"];
    Command::new(env!("CARGO_BIN_EXE_cfsctl")).args(address).args(arguments).output().unwrap()
}

#[test]
fn its_json_says_of_each_subject_what_is_there_what_is_used_and_what_improves_it() {
    let output = doctor(&["--json"]);
    assert!(output.stderr.is_empty(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(keys(&report), ["findings", "reasons", "runs"].map(String::from).into());
    let runs = report["runs"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if runs { 0 } else { 3 }));
    assert_eq!(report["reasons"].as_array().unwrap().is_empty(), runs);

    let mut subjects = BTreeSet::new();
    for finding in report["findings"].as_array().unwrap() {
        let expected = ["found", "improve", "state", "subject", "used"];
        assert_eq!(keys(finding), expected.map(String::from).into(), "{finding}");
        let state = finding["state"].as_str().unwrap();
        assert!(["good", "improvable", "unused", "unknown", "prevents"].contains(&state), "{finding}");
        assert!(!finding["found"].as_str().unwrap().is_empty() && !finding["used"].as_str().unwrap().is_empty());
        assert!(finding["improve"].is_null() || ["improvable", "prevents"].contains(&state), "{finding}");
        subjects.insert(finding["subject"].as_str().unwrap().to_owned());
    }
    for subject in ["kernel", "io_uring", "FUSE", "memory", "locked memory", "open files", "huge pages", "RDMA"] {
        assert!(subjects.contains(subject), "{subject} is missing: {subjects:?}");
    }
    // The kernel runs these tests, so what it is called can be read.
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(report["findings"][0]["found"].as_str().unwrap().contains(kernel.trim()), "{report}");
}

#[test]
fn its_last_line_is_the_verdict() {
    let output = doctor(&[]);
    let text = String::from_utf8(output.stdout).unwrap();
    let last = text.lines().last().unwrap();
    match output.status.code() {
        Some(0) => assert!(last.starts_with("ClaudeFS can run here"), "{text}"),
        Some(3) => assert!(last.starts_with("ClaudeFS cannot run here: "), "{text}"),
        other => panic!("{other:?}: {text}"),
    }
}
