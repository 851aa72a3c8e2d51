//! TCP and libfabric's provider `tcp` beside it: what every fabric does, then what the choice between them is.

mod conformance;

use bytes::Bytes;
use cfs_fabric::identity::Identity;
use cfs_fabric::identity::authority::{self, Role};
use cfs_fabric::network::{NetworkFabric, Transport};
use cfs_fabric::ofi::OfiFabric;
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric, FabricError, Message, Peer, Service};
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use conformance::{ECHO, Env, message};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn beside() -> Transport {
    "ofi:tcp".parse().unwrap()
}

/// Runs a story, unless libfabric is missing: tests/ofi.rs says so.
fn run<F: Future<Output = ()> + 'static>(story: impl FnOnce(Rc<Ring>, Handle) -> F) {
    let ring = Ring::new(256).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let main = executor.domain();
    if OfiFabric::new(ring.clone(), &main, "tcp").is_err() {
        return;
    }
    let story = story(ring.clone(), main.clone());
    let bounded = {
        let main = main.clone();
        async move { main.timeout(Duration::from_secs(30), story).await.expect("a story ends within 30 s") }
    };
    executor.run(&mut ring.driver(), Duration::ZERO, &main, bounded).unwrap();
}

fn run_story<F: Future<Output = ()> + 'static>(story: impl Fn(Env) -> F) {
    run(|ring, main| {
        let (server_handle, client_handle) = (main.new_domain(), main.new_domain());
        let fabric = |handle: &Handle| NetworkFabric::new(ring.clone(), handle, None, beside());
        let (server, client) = (fabric(&server_handle), fabric(&client_handle));
        story(Env { server, server_handle, client, client_handle, address: Address("127.0.0.1:0".to_owned()) })
    });
}

conformance!(run_story);

/// Answers who asked.
struct Whom;

impl Service for Whom {
    fn handle(&self, peer: Peer, _request: Message) -> LocalBoxFuture<'_, Message> {
        let body = Bytes::from(format!("{peer:?}"));
        std::future::ready(Message { body, ..Message::default() }).boxed_local()
    }
}

fn any_port() -> Address {
    Address("127.0.0.1:0".to_owned())
}

/// A server's and a client's identity.
fn identities() -> [Arc<Identity>; 2] {
    let home = tempfile::tempdir().unwrap();
    let ca = home.path().join("ca");
    authority::create(&ca).unwrap();
    [("server", Role::Server), ("laptop", Role::Client)].map(|(name, role)| {
        authority::issue(&ca, role, name, &home.path().join(name)).unwrap();
        Arc::new(Identity::load(&home.path().join(name)).unwrap())
    })
}

#[test]
fn who_both_have_a_provider_use_it_and_all_others_tcp() {
    let choices = [
        (beside(), beside(), "ofi:tcp"),
        (beside(), Transport::Tcp, "tcp"),
        (Transport::Tcp, beside(), "tcp"),
        // Where there is no device, as here.
        (beside(), Transport::Auto, "tcp"),
        (Transport::Auto, beside(), "tcp"),
        (Transport::Auto, Transport::Auto, "tcp"),
    ];
    run(async move |ring, main| {
        for (servers, clients, carrier) in choices {
            let server = NetworkFabric::new(ring.clone(), &main, None, servers.clone());
            let listener = server.listen(&any_port(), Rc::new(Whom)).unwrap();
            let offered = if servers == beside() { vec!["ofi:tcp"] } else { vec![] };
            assert_eq!(listener.offers(), offered);
            let client = NetworkFabric::new(ring.clone(), &main, None, clients);
            let connection = client.connect(&listener.address()).await.unwrap();
            assert_eq!(connection.carrier(), carrier);
            let reply = connection.call(message(ECHO, b"", b"")).await.unwrap();
            assert_eq!(reply.body, "Local");
        }
        // Whose fabric asks for nothing is told of nothing.
        let server = NetworkFabric::new(ring.clone(), &main, None, beside());
        let listener = server.listen(&any_port(), Rc::new(Whom)).unwrap();
        let connection = TcpFabric::new(ring, &main, None).connect(&listener.address()).await.unwrap();
        assert_eq!(connection.carrier(), "tcp");
        assert_eq!(connection.call(message(ECHO, b"", b"")).await.unwrap().body, "Local");
    });
}

#[test]
fn who_somebody_is_goes_over_from_tcp() {
    let [server, client] = identities();
    run(async move |ring, main| {
        let server = NetworkFabric::new(ring.clone(), &main, Some(server), beside());
        let listener = server.listen(&any_port(), Rc::new(Whom)).unwrap();
        let client = NetworkFabric::new(ring.clone(), &main, Some(client), beside());
        let connection = client.connect(&listener.address()).await.unwrap();
        assert_eq!(connection.carrier(), "ofi:tcp");
        let reply = connection.call(message(ECHO, b"", b"")).await.unwrap();
        assert_eq!(reply.body, "Certified(\"laptop\")");
        // Who has no identity gets in neither way.
        let stranger = NetworkFabric::new(ring, &main, None, beside());
        let refused = stranger.connect(&listener.address()).await.err();
        assert!(matches!(refused, Some(FabricError::Distrust { .. })), "{refused:?}");
    });
}

/// What went by, and whether to change it.
#[derive(Default)]
struct Wire {
    seen: Mutex<Vec<u8>>,
    flip: Mutex<bool>,
}

/// Passes bytes on between a client and this address, both ways: where it is to be reached.
#[allow(clippy::disallowed_methods, reason = "what is on the way is no part of the program")]
fn wire(to: String) -> (String, Arc<Wire>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let wire = Arc::new(Wire::default());
    let watched = wire.clone();
    std::thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            let far = TcpStream::connect(&to).unwrap();
            for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                let wire = watched.clone();
                std::thread::spawn(move || {
                    let mut bytes = [0; 9000];
                    while let Ok(length @ 1..) = from.read(&mut bytes) {
                        wire.seen.lock().unwrap().extend_from_slice(&bytes[..length]);
                        if *wire.flip.lock().unwrap() {
                            // Behind what libfabric says of a message itself.
                            bytes[length - 20] ^= 1;
                        }
                        if to.write_all(&bytes[..length]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    (address, wire)
}

#[test]
fn a_token_opens_once_and_packets_are_secret_and_authentic() {
    run(async |ring, main| {
        let server = NetworkFabric::new(ring.clone(), &main, None, beside());
        let recorder = conformance::Recorder::new(&main);
        let listener = server.listen(&any_port(), recorder.clone()).unwrap();
        // As a client asks, and then connects by way of somebody who watches.
        let (tcp, offers) = cfs_fabric::network::offers_of(ring.clone(), &main, &listener.address()).await.unwrap();
        let (via, wire) = wire(offers.offers[0].address.clone());
        let connect = |address: &str| {
            cfs_fabric::network::use_session(ring.clone(), &main, "tcp", Address(address.to_owned()), offers.clone())
        };
        let connection = connect(&via).await.unwrap();
        let secret = b"what nobody else is to know";
        assert_eq!(connection.call(message(ECHO, secret, b"")).await, Ok(message(ECHO + 100, secret, b"")));
        {
            let seen = wire.seen.lock().unwrap();
            assert!(seen.len() > 2 * secret.len() && seen.windows(32).any(|window| window == offers.token));
            assert!(!seen.windows(secret.len()).any(|window| window == secret), "it is nowhere to be read");
        }
        // Who saw the token on the wire can't use it again, nor one that was never given.
        for address in [&via, &offers.offers[0].address] {
            let refused = connect(address).await.err();
            assert!(matches!(refused, Some(FabricError::Connect { .. })), "{refused:?}");
        }
        let asked = recorder.asked.borrow().len();
        *wire.flip.lock().unwrap() = true;
        let outcome = connection.call(message(ECHO, secret, b"")).await;
        assert!(conformance::is_lost(&outcome), "{outcome:?}");
        assert_eq!(recorder.asked.borrow().len(), asked, "what was changed is not executed");
        assert!(tcp.call(message(ECHO, b"x", b"")).await.is_ok(), "the way in stays");
    });
}

#[test]
fn a_choice_is_read_as_it_is_written() {
    for text in ["auto", "tcp", "ofi:tcp", "ofi:verbs"] {
        assert_eq!(text.parse::<Transport>().unwrap().to_string(), text);
    }
    for text in ["", "ofi", "ofi:", "ofi:shm", "TCP", "verbs"] {
        let error = text.parse::<Transport>().unwrap_err().to_string();
        assert!(error.contains("ofi:verbs") && error.contains(text), "{error}");
    }
}
