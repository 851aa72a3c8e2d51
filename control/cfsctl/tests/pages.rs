//! Completions and man pages are generated and name every command.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cfsctl");

fn output(arguments: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(arguments).output().expect("cfsctl starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// As `--help` lists them.
fn commands() -> Vec<String> {
    let help = output(&["--help"]);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = listed.map(|line| line.split_whitespace().next().unwrap().to_owned()).filter(|name| name != "help");
    names.collect()
}

#[test]
fn completions_and_man_pages_name_every_command() {
    let commands = commands();
    assert!(commands.len() >= 7 && commands.iter().any(|name| name == "completions"), "{commands:?}");
    let dir = tempfile::tempdir().unwrap();
    output(&["man", dir.path().to_str().unwrap()]);
    let pages = std::fs::read_to_string(dir.path().join("cfsctl.1")).unwrap();
    let scripts = ["bash", "zsh", "fish"].map(|shell| output(&["completions", shell]));
    for name in &commands {
        assert!(pages.contains(&format!("cfsctl\\-{name}(1)")), "the man page lacks {name}: {pages}");
        let page = std::fs::read_to_string(dir.path().join(format!("cfsctl-{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{name}: {page}");
        for script in &scripts {
            assert!(script.contains(name.as_str()), "a completion script lacks {name}");
        }
    }
    assert!(!scripts[0].contains("nonesuch"));
}
