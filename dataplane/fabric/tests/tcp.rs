//! TCP: what every fabric does, then what only a socket can do wrong.

mod conformance;

use cfs_fabric::tcp::{BYTES_MAX, TcpFabric};
use cfs_fabric::{Address, CALLS_MAX, FabricError};
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use cfs_wire::frame::{BulkSum, HEADER_BYTES, Header, Hello, Kind, VERSION_MAX, encode};
use conformance::{ECHO, Env, GATED, Pair, eventually, is_lost, message, pair};
use futures_util::future::{Either, select};
use futures_util::pin_mut;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

fn run<T: 'static, F: Future<Output = T> + 'static>(story: impl FnOnce(Rc<Ring>, Env) -> F) -> T {
    let ring = Ring::new(256).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let (server_handle, client_handle) = (executor.domain(), executor.domain());
    let env = Env {
        server: TcpFabric::new(ring.clone(), &server_handle, None),
        server_handle,
        client: TcpFabric::new(ring.clone(), &client_handle, None),
        client_handle,
        address: Address("127.0.0.1:0".to_owned()),
    };
    let main = executor.domain();
    let story = story(ring.clone(), env);
    let story = bounded(main.clone(), story);
    executor.run(&mut ring.driver(), Duration::ZERO, &main, story).unwrap()
}

async fn bounded<T>(handle: Handle, story: impl Future<Output = T>) -> T {
    handle.timeout(Duration::from_secs(30), story).await.expect("a story ends within 30 s")
}

fn run_story<F: Future<Output = ()> + 'static>(story: impl Fn(Env) -> F) {
    run(|_, env| story(env));
}

conformance!(run_story);

#[test]
fn only_loopback_is_served() {
    run(async |_, env| {
        let Pair { recorder, .. } = pair(&env).await;
        for address in ["0.0.0.0:0", "192.0.2.1:7400", "[::]:0"] {
            let address = Address(address.to_owned());
            let error = env.server.listen(&address, recorder.clone()).map(|_| ()).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, FabricError::Listen { .. }), "{text}");
            assert!(
                text.contains(&address.0) && text.contains("--identity") && text.contains("only loopback"),
                "{text}"
            );
            let error = env.client.connect(&address).await.map(|_| ()).unwrap_err();
            assert!(matches!(error, FabricError::Address { .. }) && !error.is_retryable(), "{error}");
        }
        let nonsense = Address("here".to_owned());
        let error = env.server.listen(&nonsense, recorder.clone()).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:7400"), "an example is given: {error}");
        for address in ["localhost:0", "[::1]:0"] {
            assert!(env.server.listen(&Address(address.to_owned()), recorder.clone()).is_ok(), "{address}");
        }
    });
}

#[test]
fn a_port_in_use_is_named_in_one_line() {
    run(async |_, env| {
        let Pair { listener, recorder, .. } = pair(&env).await;
        let address = listener.address();
        let text = env.client.listen(&address, recorder).map(|_| ()).unwrap_err().to_string();
        let expected = "the port is in use: stop the program that uses it, or choose another port";
        assert_eq!(text, format!("cannot listen on {address}: {expected}"));
    });
}

/// A raw socket to the server, past its handshake.
fn stranger(address: &Address) -> TcpStream {
    let stream = TcpStream::connect(address.0.parse::<SocketAddr>().unwrap()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn hello_frame(hello: Hello) -> Vec<u8> {
    let body = hello.encode();
    [encode(VERSION_MAX, Kind::Hello, 0, 0, &body, &BulkSum::default()).unwrap().as_ref(), &body].concat()
}

/// Sends `bytes` and gives what the server says until it closes.
async fn say(ring: &Rc<Ring>, address: &Address, bytes: Vec<u8>) -> Vec<u8> {
    let mut stream = stranger(address);
    stream.write_all(&bytes).unwrap();
    let socket = Rc::new(OwnedFd::from(stream));
    let mut heard = Vec::new();
    loop {
        let (received, buffer) = ring.recv(&socket, DmaBuf::uninitialised(4096)).await;
        match received {
            Ok(0) | Err(_) => return heard,
            Ok(length) => heard.extend_from_slice(&buffer[..length]),
        }
    }
}

#[test]
fn a_bad_frame_closes_its_connection_and_no_other() {
    run(async |ring, env| {
        let Pair { listener, recorder, connection } = pair(&env).await;
        let address = listener.address();
        let ours = hello_frame(Hello::OURS);
        let request =
            [encode(VERSION_MAX, Kind::Request, ECHO, 1, b"body", &BulkSum::default()).unwrap().as_ref(), b"body"]
                .concat();
        let reply = encode(VERSION_MAX, Kind::Reply, ECHO, 1, &[], &BulkSum::default()).unwrap();
        let mut flipped = request.clone();
        flipped[HEADER_BYTES] ^= 1;
        let mut endless = request.clone();
        endless[16..20].fill(0xFF);

        assert_eq!(say(&ring, &address, b"GET / HTTP/1.1\r\n\r\n".to_vec()).await, b"", "a stranger hears nothing");
        assert_eq!(say(&ring, &address, request.clone()).await, b"", "a request before HELLO");
        for bad in [flipped, endless, reply.as_ref().to_vec(), ours.clone()] {
            let heard = say(&ring, &address, [ours.clone(), bad].concat()).await;
            assert_eq!(heard, ours, "HELLO and nothing more");
        }
        assert!(recorder.asked.borrow().is_empty(), "none was executed");
        assert_eq!(connection.call(message(ECHO, b"x", b"")).await, Ok(message(ECHO + 100, b"x", b"")));
    });
}

#[test]
fn a_newer_client_hears_which_versions_this_server_speaks() {
    run(async |ring, env| {
        let Pair { listener, recorder, .. } = pair(&env).await;
        let newer = Hello { version_min: 8, version_max: 9, features: u64::MAX };
        let heard = say(&ring, &listener.address(), hello_frame(newer)).await;
        let header = Header::decode(VERSION_MAX, &heard).unwrap().unwrap();
        assert_eq!((header.kind, heard.len()), (Kind::Hello, header.frame_length()));
        assert_eq!(Hello::decode(&heard[HEADER_BYTES..]), Ok(Hello::OURS));
        assert!(recorder.asked.borrow().is_empty());
    });
}

#[test]
fn a_server_stops_reading_from_a_client_that_asks_too_much() {
    run(async |_, env| {
        let Pair { listener, recorder, .. } = pair(&env).await;
        let mut stream = stranger(&listener.address());
        let mut bytes = hello_frame(Hello::OURS);
        for id in 0..CALLS_MAX as u64 + 50 {
            let request = encode(VERSION_MAX, Kind::Request, GATED, id, &[], &BulkSum::default()).unwrap();
            bytes.extend_from_slice(request.as_ref());
        }
        stream.write_all(&bytes).unwrap();
        eventually(&env.client_handle, "as many run as may", || recorder.running.get() == CALLS_MAX).await;
        env.client_handle.sleep(Duration::from_millis(20)).await;
        assert_eq!(recorder.asked.borrow().len(), CALLS_MAX);
        recorder.open.set(true);
        recorder.gate.notify_all();
        eventually(&env.client_handle, "the rest follows", || recorder.finished.get() == CALLS_MAX + 50).await;
        assert_eq!(recorder.running_max.get(), CALLS_MAX);
    });
}

#[test]
fn bytes_under_way_are_bounded() {
    run(async |_, env| {
        let Pair { connection, recorder, listener: _listening } = pair(&env).await;
        let request = message(GATED, b"", &vec![3; 4 << 20]);
        const CALLS: usize = 16;
        let calls = (0..CALLS).map(|_| {
            let (connection, request) = (connection.clone(), request.clone());
            env.client_handle.spawn(async move { connection.call(request).await.map(|reply| reply.bulk.len()) })
        });
        let calls: Vec<_> = calls.collect();
        const FIT: usize = BYTES_MAX / (4 << 20);
        const _: () = assert!(FIT < CALLS);
        eventually(&env.client_handle, "as many run as may", || recorder.running.get() == FIT).await;
        env.client_handle.sleep(Duration::from_millis(20)).await;
        assert_eq!(recorder.running.get(), FIT);
        recorder.open.set(true);
        recorder.gate.notify_all();
        for call in calls {
            assert_eq!(call.await.unwrap(), Ok(4 << 20));
        }
    });
}

/// A server made of bytes: reads a HELLO, answers `bytes`, waits for the client to close.
#[allow(clippy::disallowed_methods, reason = "the peer is a program of its own")]
fn impostor(bytes: Vec<u8>) -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address(listener.local_addr().unwrap().to_string());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = vec![0; hello_frame(Hello::OURS).len()];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(hello, hello_frame(Hello::OURS));
        stream.write_all(&bytes).unwrap();
        let _ = stream.read_to_end(&mut hello);
    });
    address
}

#[test]
fn a_client_says_which_side_is_older() {
    run(async |_, env| {
        for (version_min, version_max, theirs) in [(7, 9, 7), (0, 0, 0)] {
            let address = impostor(hello_frame(Hello { version_min, version_max, features: 0 }));
            let error = env.client.connect(&address).await.map(|_| ()).unwrap_err();
            assert_eq!(error, FabricError::Version { address, theirs, ours: 1 });
            assert!(!error.is_retryable());
        }
    });
}

#[test]
fn a_server_that_talks_nonsense_loses_the_calls() {
    run(async |_, env| {
        let address = impostor(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec());
        let error = env.client.connect(&address).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, FabricError::Connect { .. }), "{error}");

        let unasked = encode(VERSION_MAX, Kind::Reply, 0, 77, &[], &BulkSum::default()).unwrap();
        let address = impostor([&hello_frame(Hello::OURS), unasked.as_ref()].concat());
        let connection = env.client.connect(&address).await.unwrap();
        let outcome = connection.call(message(ECHO, b"", b"")).await;
        assert!(is_lost(&outcome), "{outcome:?}");
        assert!(connection.is_closed());
    });
}

#[test]
fn dropped_connections_leave_nothing_behind() {
    run(async |ring, env| {
        let Pair { listener, connection, recorder } = pair(&env).await;
        drop(connection);
        for _ in 0..20 {
            let connection = env.client.connect(&listener.address()).await.unwrap();
            assert!(connection.call(message(ECHO, b"", &[1; 5000])).await.is_ok());
        }
        let handle = env.client_handle.clone();
        eventually(&handle, "tasks end", || env.client_handle.task_count() == 0 && env.server_handle.task_count() == 1)
            .await;
        drop(listener);
        eventually(&handle, "operations end", || ring.in_flight() == 0).await;
        assert_eq!(Rc::strong_count(&recorder), 1);
    });
}

/// The sockets of this process that are bound to an address, as links of /proc/self/fd name them.
fn sockets_of(address: &Address) -> Vec<String> {
    let port = address.0.rsplit_once(':').unwrap().1.parse::<u16>().unwrap();
    let wanted = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[1].ends_with(&wanted)).map(|row| format!("socket:[{}]", row[9])).collect()
}

/// How many of these this process has open: a socket that is shut down is in no table any more.
fn still_open(sockets: &[String]) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.ok()?.path().read_link().ok());
    open.filter(|target| sockets.iter().any(|socket| target.as_os_str() == socket.as_str())).count()
}

#[test]
fn a_call_that_is_never_answered_keeps_no_socket_when_its_client_is_gone() {
    run(async |_, env| {
        let Pair { listener, connection, recorder } = pair(&env).await;
        let address = listener.address();
        drop(connection);
        for number in 1..=5 {
            let connection = env.client.connect(&address).await.unwrap();
            let (sockets, handle) = {
                let call = connection.call(message(GATED, b"", b""));
                let runs = eventually(&env.client_handle, "it runs", || recorder.running.get() == number);
                pin_mut!(call, runs);
                assert!(matches!(select(call, runs).await, Either::Right(_)));
                (sockets_of(&address), env.client_handle.clone())
            };
            assert!(still_open(&sockets) >= 2, "the listener's and the connection's");
            drop(connection);
            eventually(&handle, "the socket goes", || still_open(&sockets) == 1).await;
        }
        assert_eq!(recorder.running.get(), 5, "they run on");
    });
}
