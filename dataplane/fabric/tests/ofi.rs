//! libfabric by its provider `tcp`: what every fabric does, then what only remote memory can do wrong.

mod conformance;

use cfs_fabric::Address;
use cfs_fabric::ofi::OfiFabric;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use conformance::Env;
use std::future::Future;
use std::io::Write;
use std::rc::Rc;
use std::time::Duration;

const PROVIDER: &str = "tcp";

/// Says that libfabric is missing here; scripts/test repeats it at its end.
fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
    let Some(log) = std::env::var_os("CFS_SKIPPED_LOG") else { return };
    let mut log = std::fs::OpenOptions::new().create(true).append(true).open(log).expect("the log of scripts/test");
    // In one write, since tests run side by side.
    log.write_all(format!("{}: {why}\n", file!()).as_bytes()).unwrap();
}

/// Runs a story, unless libfabric is missing.
fn run<F: Future<Output = ()> + 'static>(story: impl FnOnce(Rc<Ring>, Env) -> F) {
    let ring = Ring::new(256).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let (server_handle, client_handle) = (executor.domain(), executor.domain());
    let fabric = |handle: &Handle| OfiFabric::new(ring.clone(), handle, PROVIDER);
    let (server, client) = match (fabric(&server_handle), fabric(&client_handle)) {
        (Ok(server), Ok(client)) => (server, client),
        (Err(missing), _) | (_, Err(missing)) => {
            assert!(missing.contains("apt-get install libfabric1"), "{missing}");
            return skipped(&missing);
        }
    };
    let address = Address("127.0.0.1:0".to_owned());
    let env = Env { server, server_handle, client, client_handle, address };
    let main = executor.domain();
    let story = bounded(main.clone(), story(ring.clone(), env));
    executor.run(&mut ring.driver(), Duration::ZERO, &main, story).unwrap()
}

async fn bounded<T>(handle: Handle, story: impl Future<Output = T>) -> T {
    handle.timeout(Duration::from_secs(30), story).await.expect("a story ends within 30 s")
}

fn run_story<F: Future<Output = ()> + 'static>(story: impl Fn(Env) -> F) {
    run(|_, env| story(env));
}

conformance!(run_story);
