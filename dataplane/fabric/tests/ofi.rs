//! libfabric by its provider `tcp`: what every fabric does, then what only remote memory can do wrong.

mod conformance;

use cfs_fabric::ofi::OfiFabric;
use cfs_fabric::{Address, Fabric};
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use conformance::{ECHO, Env, Recorder, is_lost, message, pair};
use rustix::time::{ClockId, clock_gettime};
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

/// Runs a story with this provider in two domains, unless libfabric is missing.
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

/// Moments of an exchange at which an end is killed.
const MOMENTS: usize = 100;

/// Kills the server or the client of an exchange of 4 MiB each way after so many turns of the executor, or else
/// at its end: how many those were, and whether the end was reached.
async fn killed(ring: Rc<Ring>, env: &Env, turns_max: usize, is_server: bool) -> (usize, bool) {
    let (main, doomed) = (Handle::current(), env.server_handle.new_domain());
    let fabric = |handle: &Handle| OfiFabric::new(ring.clone(), handle, PROVIDER).unwrap();
    let (server, client) = if is_server { (&doomed, &main) } else { (&main, &doomed) };
    let recorder = Recorder::new(server);
    let listener = fabric(server).listen(&env.address, recorder.clone()).unwrap();
    let connection = fabric(client).connect(&listener.address()).await.unwrap();
    let request = message(ECHO, &[1; 100_000], &[7; 4 << 20]);
    let calling = {
        let (connection, request) = (connection.clone(), request.clone());
        main.spawn(async move { connection.call(request).await })
    };
    let mut turns = 0;
    while turns < turns_max && !calling.is_finished() {
        main.yield_now().await;
        turns += 1;
    }
    let was_done = calling.is_finished();
    doomed.kill();
    if !is_server {
        drop((calling, connection));
        // The server is left for others.
        let connection = fabric(&main).connect(&listener.address()).await.unwrap();
        assert_eq!(connection.call(message(ECHO, b"x", b"")).await, Ok(message(ECHO + 100, b"x", b"")));
        return (turns, was_done);
    }
    drop(listener);
    let outcome = calling.await.unwrap();
    match &outcome {
        // It may have been on its way.
        Ok(reply) => assert!(reply.body == request.body && reply.bulk == request.bulk),
        Err(_) => assert!(is_lost(&outcome) && !was_done, "{outcome:?}"),
    }
    (turns, was_done)
}

#[test]
fn an_end_that_dies_at_any_moment_of_an_exchange_takes_nothing_along() {
    run(async |ring, env| {
        for is_server in [true, false] {
            let (turns, was_done) = killed(ring.clone(), &env, usize::MAX, is_server).await;
            assert!(was_done);
            let mut done = 0;
            for moment in 0..MOMENTS {
                done += usize::from(killed(ring.clone(), &env, turns * moment / MOMENTS, is_server).await.1);
            }
            // The number of turns varies.
            assert!(done < MOMENTS / 2, "{done} of {MOMENTS} exchanges of some {turns} turns were over");
        }
    });
}

#[test]
fn a_connection_without_calls_costs_nothing() {
    run(async |_, env| {
        let pair = pair(&env).await;
        let reply = pair.connection.call(message(ECHO, b"x", &[1; 100_000])).await;
        assert!(reply.is_ok());
        env.client_handle.sleep(Duration::from_millis(50)).await;
        let before = clock_gettime(ClockId::ThreadCPUTime);
        env.client_handle.sleep(Duration::from_millis(500)).await;
        let used = clock_gettime(ClockId::ThreadCPUTime) - before;
        assert!(used.tv_sec == 0 && used.tv_nsec < 2_000_000, "{} µs of 500 ms", used.tv_nsec / 1000);
        // And it is there at once.
        let reply = pair.connection.call(message(ECHO, b"x", b"")).await;
        assert_eq!(reply, Ok(message(ECHO + 100, b"x", b"")));
    });
}

#[test]
fn what_is_not_served_is_refused_with_its_reason() {
    run(async |ring, env| {
        let handle = env.client_handle.clone();
        let error = OfiFabric::new(ring, &handle, "carrier-pigeon").map(|_| ()).unwrap_err();
        assert!(error.contains("carrier-pigeon") && error.contains("fi_info"), "{error}");
        let elsewhere = Address("192.0.2.1:7400".to_owned());
        let error = env.server.listen(&elsewhere, Recorder::new(&handle)).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("only loopback"), "{error}");
        let error = env.client.connect(&elsewhere).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("only loopback") && !error.is_retryable(), "{error}");
        let nobody = Address("127.0.0.1:1".to_owned());
        let error = env.client.connect(&nobody).await.map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("is the server running?") && error.is_retryable(), "{error}");
    });
}

/// Signals that this process has handlers for, as the kernel tells.
fn signals_caught() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find(|line| line.starts_with("SigCgt:")).unwrap().to_owned()
}

#[test]
fn signals_remain_whose_they_were() {
    let before = signals_caught();
    run(async move |_, env| {
        let pair = pair(&env).await;
        assert!(pair.connection.call(message(ECHO, b"x", b"")).await.is_ok());
        assert_eq!(signals_caught(), before);
    });
}

#[test]
fn a_reply_comes_whole_whatever_room_there_was_for_it() {
    run(async |_, env| {
        let pair = pair(&env).await;
        let sizes = [0, 1, 3000, 4096, 100_000, 1 << 20];
        for bulk in sizes {
            for (room, body) in sizes.into_iter().chain([usize::MAX]).flat_map(|room| [(room, 5), (room, 10_000)]) {
                let (body, bulk) = (vec![3; body], vec![5; bulk]);
                let reply = pair.connection.call_with_room(message(ECHO, &body, &bulk), room).await.unwrap();
                assert!(reply == message(ECHO + 100, &body, &bulk), "{} bytes with room for {room}", bulk.len());
            }
        }
    });
}
