//! A flag beats the environment, the environment beats the file. Each value is one that is refused
//! and named, so that the refusal tells which of the three counted: of spin_us nothing is refused,
//! and of repair_mib_s only one value.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

mod common;

use common::{CFS, Cluster, refused};
use std::fs;
use std::process::Command;

/// A setting's key in the file, its flag, three refused values, and what names one of them.
struct Setting {
    key: &'static str,
    flag: &'static str,
    values: [&'static str; 3],
    named: fn(&str) -> String,
}

const SETTINGS: [Setting; 7] = [
    Setting {
        key: "session_lease_ms",
        flag: "--session-lease-ms",
        values: ["1", "2", "3"],
        named: |value| format!("session_lease_ms = {value} is out of range"),
    },
    Setting {
        key: "read_lease_ms",
        flag: "--read-lease-ms",
        values: ["900001", "900002", "900003"],
        named: |value| format!("read_lease_ms = {value} is out of range"),
    },
    Setting {
        key: "codec",
        flag: "--codec",
        values: ["a", "b", "c"],
        named: |value| format!("codec = {value} is not known; give auto, isal or portable"),
    },
    Setting {
        key: "fabric",
        flag: "--fabric",
        values: ["a", "ofi", "ofi:shm"],
        named: |value| format!("fabric = {value} is not known; give auto, tcp, ofi:verbs or ofi:tcp"),
    },
    Setting {
        key: "log",
        flag: "--log",
        values: ["a=b=c", "a=b=d", "a=b=e"],
        named: |value| format!("log filter '{value}' is not understood"),
    },
    Setting {
        key: "targets",
        flag: "--target",
        values: ["/nonexistent/1", "/nonexistent/2", "/nonexistent/3"],
        named: |value| format!("cannot open {value}:"),
    },
    Setting {
        key: "listen",
        flag: "--listen",
        values: ["192.0.2.1:7400", "192.0.2.2:7400", "192.0.2.3:7400"],
        named: |value| value.to_owned(),
    },
];

#[test]
fn a_flag_beats_the_environment_and_that_the_file() {
    let cluster = Cluster::new();
    let config = cluster.path("cfs.toml");
    for Setting { key, flag, values: [file, environment, given], named } in SETTINGS {
        let mut text = match file.parse::<u32>() {
            Ok(number) => format!("{key} = {number}\n"),
            Err(_) if key == "targets" => format!("targets = [\"{file}\"]\n"),
            Err(_) => format!("{key} = \"{file}\"\n"),
        };
        if key != "targets" {
            text += &format!("targets = {:?}\n", cluster.targets());
        }
        if key != "listen" {
            text += "listen = \"127.0.0.1:0\"\n";
        }
        fs::write(&config, text).unwrap();
        let variable = format!("CFS_{}", key.to_uppercase());
        let started = |environment: &[(&str, &str)], flags: &[&str]| {
            let mut command = Command::new(CFS);
            command.args(["server", "--config"]).arg(&config).args(flags);
            refused(&command.envs(environment.iter().copied()).output().unwrap())
        };
        let by_file = started(&[], &[]);
        assert!(by_file.contains(&named(file)), "{by_file}");
        let by_environment = started(&[(&variable, environment)], &[]);
        assert!(by_environment.contains(&named(environment)), "{by_environment}");
        let by_flag = started(&[(&variable, environment)], &[flag, given]);
        assert!(by_flag.contains(&named(given)), "{by_flag}");
    }
}
