//! What goes wrong is said in one line, for people or for programs, and by the exit code.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

use std::net::TcpListener;
use std::process::Command;

#[test]
fn a_server_that_is_not_there_is_named_with_the_remedy() {
    // Bound and closed: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let failed = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_cfsctl")).args(["--address", &address]).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty(), "{output:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(line.lines().count(), 1, "{line}");
        line
    };
    for command in [&["status"][..], &["check"]] {
        let line = failed(command);
        assert!(line.starts_with("cfsctl: ") && line.contains(&address) && line.contains("start one with"), "{line}");
        let line = failed(&[command, &["--json"]].concat());
        let parsed: serde_json::Value = serde_json::from_str(&line).unwrap();
        let why = parsed["error"].as_str().unwrap();
        assert!(why.contains(&address) && why.contains("start one with"), "{line}");
    }
}
