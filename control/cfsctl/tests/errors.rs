//! What goes wrong is said in one line, for people or for programs, and by the exit code.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

use std::net::TcpListener;
use std::process::{Command, Output};

fn cfsctl(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cfsctl")).args(arguments).output().unwrap()
}

#[test]
fn a_server_that_is_not_there_is_named_with_the_remedy() {
    // Bound and closed: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let failed = |arguments: &[&str]| {
        let output = cfsctl(&[&["--address", &address], arguments].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty(), "{output:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(line.lines().count(), 1, "{line}");
        line
    };
    for command in [&["status"][..], &["check"]] {
        let line = failed(command);
        assert!(line.starts_with("cfsctl: ") && line.contains(&address) && line.contains("Start one with"), "{line}");
        let line = failed(&[command, &["--json"]].concat());
        let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
        let why = parsed["error"].as_str().unwrap();
        assert!(why.contains(&address) && why.contains("Start one with"), "{line}");
    }
}

#[test]
fn an_address_that_is_none_is_not_taken_for_a_server_that_is_not_there() {
    for address in ["nowhere", "nowhere:7400", "10.0.0.1:7400"] {
        let output = cfsctl(&["--address", address, "status"]);
        assert_eq!(output.status.code(), Some(1));
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.starts_with(&format!("cfsctl: {address} is no address to connect to: ")), "{line}");
        assert!(line.contains("127.0.0.1") && !line.contains("Start one with"), "{line}");
    }
}

#[test]
fn a_misuse_is_told_to_programs_as_every_other_error_is() {
    for (arguments, says) in [
        (&["--json", "statu"][..], "unrecognized subcommand 'statu'; tip: some similar subcommands exist: 'stat', "),
        (&["stat", "--json"], "the following required arguments were not provided: <PATH>; Usage: cfsctl stat "),
        (&["status", "--address", "--json"], "a value is required for '--address <ADDRESS>' but none was supplied; "),
        (&["status", "extra", "--json"], "unexpected argument 'extra' found; Usage: cfsctl status "),
        (&["--json", "policy"], "a command is missing; "),
    ] {
        let output = cfsctl(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(line.lines().count(), 1, "{line}");
        let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
        let why = parsed["error"].as_str().unwrap();
        assert!(why.starts_with(says) && why.ends_with("For more information, try '--help'."), "{line}");
    }
    // The twins: to people it is a line too, and behind -- the word is a name.
    for arguments in [&["status", "extra"][..], &["stat", "--", "--json", "extra"]] {
        let output = cfsctl(arguments);
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.starts_with("cfsctl: unexpected argument 'extra' found; Usage: "), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    for (flag, says) in [("--help", "Control a ClaudeFS cluster\n\nUsage: "), ("--version", "cfsctl ")] {
        let output = cfsctl(&["--json", flag]);
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stderr.is_empty(), "{output:?}");
        assert!(String::from_utf8(output.stdout).unwrap().starts_with(says));
    }
}
