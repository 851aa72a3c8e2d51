//! What takes longer than a second says so on stderr once a second; stdout stays what was asked for.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

use cfs_api::{AdminCall, AdminError, AdminReply, CheckReport, CheckState, OP_ADMIN};
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric, Message, Peer, Service};
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_wire::body;
use std::cell::Cell;
use std::net::TcpListener;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

fn spawn(address: &str, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cfsctl"));
    command.args(["--address", address]).args(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_server_that_does_not_answer_is_visibly_waited_for() {
    // What is connected to it waits to be accepted.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let calls = [&["status", "--json"][..], &["check", "--json"]].map(|arguments| spawn(&address, arguments));
    for call in calls {
        let output = call.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty(), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let [waited @ .., error] = &lines[..] else { panic!("nothing was said") };
        let counted = (1..).map(|seconds| format!("waiting for {address} to answer, {seconds} s"));
        assert!(waited.len() >= 2, "{text}");
        assert_eq!(waited, counted.take(waited.len()).collect::<Vec<_>>());
        assert!(serde_json::from_str::<serde_json::Value>(error).unwrap()["error"].is_string(), "{text}");
    }
}

/// A check that is done when its state was asked for so often.
struct SlowCheck {
    polls_left: Cell<u32>,
}

/// Two seconds, at the five polls a second that `cfsctl` makes.
const POLLS: u32 = 10;

impl SlowCheck {
    fn state(&self) -> CheckState {
        let report = CheckReport { inodes: 12, ..CheckReport::default() };
        let state = CheckState { id: 7, repair: true, done: 3, total: 5, report, ..CheckState::default() };
        match self.polls_left.get() {
            0 => CheckState { phase: "done".into(), ..state },
            _ => CheckState { running: true, phase: "segments".into(), ..state },
        }
    }
}

impl Service for SlowCheck {
    fn handle(&self, _peer: Peer, request: Message) -> Pin<Box<dyn Future<Output = Message> + '_>> {
        assert_eq!(request.opcode, OP_ADMIN);
        match body::decode::<AdminCall>(&request.body).unwrap() {
            AdminCall::CheckStart { repair: true, .. } => self.polls_left.set(POLLS),
            AdminCall::CheckPoll => self.polls_left.set(self.polls_left.get() - 1),
            other => panic!("{other:?}"),
        }
        let reply: Result<AdminReply, AdminError> = Ok(AdminReply::Check(self.state()));
        Box::pin(async move { Message { body: body::encode(&reply).unwrap(), ..Message::default() } })
    }
}

/// Serves on a thread that ends with the test; gives the address.
fn slow_check() -> String {
    let (bound, address) = mpsc::channel();
    thread::spawn(move || {
        let ring = Ring::new(32).unwrap();
        let executor = Executor::new(Rc::new(KernelClock::new()));
        let handle = executor.domain();
        let fabric = TcpFabric::new(ring.clone(), &handle, None);
        executor.run(&mut ring.driver(), Duration::ZERO, &handle, async move {
            let service = Rc::new(SlowCheck { polls_left: Cell::new(0) });
            let listener = fabric.listen(&Address("127.0.0.1:0".into()), service).unwrap();
            bound.send(listener.address().0).unwrap();
            std::future::pending::<()>().await;
        })
    });
    address.recv().unwrap()
}

#[test]
fn a_long_check_tells_how_far_it_is() {
    let address = slow_check();
    for (arguments, ends) in [
        (&["check", "--repair", "--json"][..], "}\n"),
        (&["check", "--repair"], "\nclean; bytes were not read (--deep reads them)\n"),
        (&["check", "--repair", "--deep"], "\nclean\n"),
    ] {
        let output = spawn(&address, arguments).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let lines = String::from_utf8(output.stderr).unwrap();
        assert!(lines.lines().any(|line| line.starts_with("checking segments: 3/5, ")), "{lines}");
        let told = String::from_utf8(output.stdout).unwrap();
        assert!(told.ends_with(ends), "{told}");
        if ends.starts_with('}') {
            assert_eq!(serde_json::from_str::<serde_json::Value>(&told).unwrap()["inodes"], 12);
        }
    }
}
