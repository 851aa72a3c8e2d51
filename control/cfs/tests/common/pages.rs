//! Whether a program's completions and man pages are generated and name every command.

use std::process::Command;

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("it starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// As `--help` lists them.
fn commands(program: &str) -> Vec<String> {
    let help = output(program, &["--help"]);
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = listed.map(|line| line.split_whitespace().next().unwrap().to_owned()).filter(|name| name != "help");
    names.collect()
}

/// `program`: its path; `name`: what it is called.
pub fn name_every_command(program: &str, name: &str) {
    let commands = commands(program);
    assert!(commands.len() >= 7 && commands.iter().any(|name| name == "completions"), "{commands:?}");
    let dir = tempfile::tempdir().unwrap();
    output(program, &["man", dir.path().to_str().unwrap()]);
    let pages = std::fs::read_to_string(dir.path().join(format!("{name}.1"))).unwrap();
    let scripts = ["bash", "zsh", "fish"].map(|shell| output(program, &["completions", shell]));
    for command in &commands {
        assert!(pages.contains(&format!("{name}\\-{command}(1)")), "the man page lacks {command}: {pages}");
        let page = std::fs::read_to_string(dir.path().join(format!("{name}-{command}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{command}: {page}");
        for script in &scripts {
            assert!(script.contains(command.as_str()), "a completion script lacks {command}");
        }
    }
    assert!(!scripts[0].contains("nonesuch"));
}
