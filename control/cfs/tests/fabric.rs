//! What carries messages is chosen when a server starts, and the server says what it is.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests drive real processes")]

mod common;

use cfs_api::{AdminCall, AdminReply, client};
use cfs_fabric::network::{NetworkFabric, Transport};
use cfs_fabric::ofi::OfiFabric;
use cfs_fabric::{Address, Fabric};
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use common::{Cluster, Running};
use std::rc::Rc;
use std::time::Duration;

/// What carries a connection that was asked for like this, which a call goes through.
fn carrier(server: &Running, transport: Transport) -> String {
    let ring = Ring::new(64).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let fabric = NetworkFabric::new(ring.clone(), &handle, None, transport);
    let address = Address(server.address.clone());
    let story = async move {
        let connection = fabric.connect(&address).await.unwrap();
        let reply = client::call(&*connection, &AdminCall::Status).await.unwrap();
        assert!(matches!(reply, AdminReply::Status(status) if status.health == "ok"));
        connection.carrier()
    };
    executor.run(&mut ring.driver(), Duration::ZERO, &handle, story).unwrap()
}

#[test]
fn a_server_is_reached_by_what_it_was_told_and_says_so() {
    let cluster = Cluster::new();
    {
        let server = Running::start_with(&cluster, &["--fabric", "tcp"]);
        assert_eq!(server.status().fabric, "tcp");
        assert_eq!(carrier(&server, "ofi:tcp".parse().unwrap()), "tcp");
    }
    let ring = Ring::new(64).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    if let Err(missing) = OfiFabric::new(ring, &executor.domain(), "tcp") {
        return common::skipped(&missing);
    }
    let server = Running::start_with(&cluster, &["--fabric", "ofi:tcp"]);
    assert_eq!(server.status().fabric, "tcp, ofi:tcp");
    assert_eq!(carrier(&server, "ofi:tcp".parse().unwrap()), "ofi:tcp");
    assert_eq!(carrier(&server, Transport::Tcp), "tcp");
}
