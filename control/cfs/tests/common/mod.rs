//! Set-up shared by the tests of the program: a formatted cluster of files, a server that runs,
//! and what a refusal looks like.
#![allow(dead_code, reason = "each test binary uses its own part")]

use cfs_api::{AdminCall, AdminReply, Status, client};
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric};
use cfs_reactor::{Executor, clock::KernelClock, uring::Ring};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::rc::Rc;
use std::time::Duration;

pub const CFS: &str = env!("CARGO_BIN_EXE_cfs");

pub fn cfs(arguments: &[&str]) -> Output {
    Command::new(CFS).args(arguments).output().expect("cfs starts")
}

/// Asserts a refusal and gives its one line, the only one on stderr.
pub fn refused(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !is_progress(line)).collect();
    assert!(!output.status.success(), "it was accepted; stderr: {text}");
    assert!(lines.len() == 1 && lines[0].starts_with("cfs: "), "one line was expected: {text}");
    lines[0].to_owned()
}

/// What comes once a second of work, where the machine is slow: "formatting 3 targets, 1 s".
fn is_progress(line: &str) -> bool {
    let seconds = line.strip_suffix(" s").and_then(|line| line.rsplit_once(", "));
    seconds.is_some_and(|(what, seconds)| {
        (what.starts_with("formatting ") || what.starts_with("starting: ")) && seconds.parse::<u64>().is_ok()
    })
}

/// Says that what the caller tests can't be tested here; scripts/test repeats it at its end.
#[track_caller]
pub fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
    let Some(log) = std::env::var_os("CFS_SKIPPED_LOG") else { return };
    let mut log = fs::OpenOptions::new().create(true).append(true).open(log).expect("the log of scripts/test");
    // In one write, since tests run side by side.
    log.write_all(format!("{}: {why}\n", std::panic::Location::caller().file()).as_bytes()).unwrap();
}

pub struct Cluster {
    pub dir: tempfile::TempDir,
}

impl Cluster {
    /// Three formatted targets of 64 MiB.
    pub fn new() -> Cluster {
        let cluster = Cluster { dir: tempfile::tempdir().unwrap() };
        let targets = cluster.targets();
        let mut arguments = vec!["format", "--size", "64M", "--shards", "2"];
        arguments.extend(targets.iter().map(String::as_str));
        let output = cfs(&arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        cluster
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn targets(&self) -> Vec<String> {
        (0..3).map(|index| self.path(&format!("t{index}")).display().to_string()).collect()
    }

    pub fn server_arguments(&self, listen: &str) -> Vec<String> {
        let mut arguments = vec!["server".into(), "--listen".into(), listen.into()];
        arguments.extend(self.targets().into_iter().flat_map(|target| ["--target".into(), target]));
        arguments
    }

    pub fn server(&self, listen: &str) -> Output {
        Command::new(CFS).args(self.server_arguments(listen)).output().expect("cfs starts")
    }
}

/// A server that runs; ended when dropped.
pub struct Running {
    child: Child,
    pub address: String,
}

impl Running {
    pub fn start(cluster: &Cluster) -> Running {
        Running::start_with(cluster, &[])
    }

    pub fn start_with(cluster: &Cluster, flags: &[&str]) -> Running {
        let mut child = Command::new(CFS)
            .args(cluster.server_arguments("127.0.0.1:0"))
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .expect("cfs starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("serving on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        Running { child, address }
    }

    /// What `cfsctl status` shows.
    pub fn status(&self) -> Status {
        let ring = Ring::new(32).unwrap();
        let executor = Executor::new(Rc::new(KernelClock::new()));
        let handle = executor.domain();
        let (fabric, address) = (TcpFabric::new(ring.clone(), &handle, None), Address(self.address.clone()));
        let reply = executor.run(&mut ring.driver(), Duration::ZERO, &handle, async move {
            let connection = fabric.connect(&address).await.unwrap();
            client::call(&*connection, &AdminCall::Status).await.unwrap()
        });
        match reply.unwrap() {
            AdminReply::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn fingerprint(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}
