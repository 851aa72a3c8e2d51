//! What codes segments is chosen when a server starts, and the server says what it is.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

mod common;

use cfs_api::{AdminCall, AdminReply, client};
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric};
use cfs_reactor::{Executor, clock::KernelClock, uring::Ring};
use common::{Cluster, Running};
use std::rc::Rc;
use std::time::Duration;

/// As `cfsctl status` shows it.
fn codec_of(server: &Running) -> String {
    let ring = Ring::new(32).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let (fabric, address) = (TcpFabric::new(ring.clone(), &handle), Address(server.address.clone()));
    let reply = executor.run(&mut ring.driver(), Duration::ZERO, &handle, async move {
        let connection = fabric.connect(&address).await.unwrap();
        client::call(&*connection, &AdminCall::Status).await.unwrap()
    });
    match reply.unwrap() {
        AdminReply::Status(status) => status.codec,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_server_codes_by_what_it_was_told_and_says_so() {
    let cluster = Cluster::new();
    assert_eq!(codec_of(&Running::start_with(&cluster, &["--codec", "portable"])), "scalar");
    #[cfg(target_arch = "x86_64")]
    assert_eq!(codec_of(&Running::start(&cluster)), "simd");
}

#[cfg(feature = "isal")]
#[test]
fn a_build_with_isa_l_uses_it_when_told() {
    let cluster = Cluster::new();
    assert_eq!(codec_of(&Running::start_with(&cluster, &["--codec", "isal"])), "isa-l");
}

#[cfg(not(feature = "isal"))]
#[test]
fn a_build_without_isa_l_says_how_to_get_it() {
    let cluster = Cluster::new();
    let mut arguments = cluster.server_arguments("127.0.0.1:0");
    arguments.extend(["--codec".into(), "isal".into()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let line = common::refused(&common::cfs(&arguments));
    assert!(line.contains("codec = isal is not in this build") && line.contains("--features cfs/isal"), "{line}");
}
