//! TCP with identities: what every fabric does, then who is let in, and what is seen on the way.

mod conformance;

use bytes::Bytes;
use cfs_fabric::identity::authority::{self, Role};
use cfs_fabric::identity::{Identity, SERVER_NAME};
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Fabric, FabricError, Message, Peer, Service};
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use cfs_wire::frame::{BulkSum, Header, Hello, Kind, VERSION_MAX, encode};
use conformance::{ECHO, Env, eventually, is_lost, message, pair};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::cell::RefCell;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// Two clusters' authorities and what they issued.
struct Issued {
    home: TempDir,
}

impl Issued {
    fn new() -> Issued {
        let issued = Issued { home: tempfile::tempdir().unwrap() };
        for cluster in ["ours", "theirs"] {
            let ca = issued.home.path().join(cluster);
            authority::create(&ca).unwrap();
            for (name, role) in [("server", Role::Server), ("client", Role::Client)] {
                authority::issue(&ca, role, name, &issued.directory(cluster, name)).unwrap();
            }
        }
        issued
    }

    fn directory(&self, cluster: &str, name: &str) -> PathBuf {
        self.home.path().join(format!("{cluster}-{name}"))
    }

    fn identity(&self, cluster: &str, name: &str) -> Option<Arc<Identity>> {
        Some(Arc::new(Identity::load(&self.directory(cluster, name)).unwrap()))
    }
}

struct Stage {
    ring: Rc<Ring>,
    issued: Issued,
    handle: Handle,
    env: Env,
}

impl Stage {
    fn fabric(&self, identity: Option<Arc<Identity>>) -> Rc<TcpFabric> {
        TcpFabric::new(self.ring.clone(), &self.handle, identity)
    }
}

fn run<F: Future<Output = ()> + 'static>(story: impl FnOnce(Stage) -> F) {
    let ring = Ring::new(256).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let (server_handle, client_handle, handle) = (executor.domain(), executor.domain(), executor.domain());
    let issued = Issued::new();
    let env = Env {
        server: TcpFabric::new(ring.clone(), &server_handle, issued.identity("ours", "server")),
        server_handle,
        client: TcpFabric::new(ring.clone(), &client_handle, issued.identity("ours", "client")),
        client_handle,
        address: Address("127.0.0.1:0".to_owned()),
    };
    let story = story(Stage { ring: ring.clone(), issued, handle: handle.clone(), env });
    let bounded = {
        let handle = handle.clone();
        async move { handle.timeout(Duration::from_secs(30), story).await.expect("a story ends within 30 s") }
    };
    executor.run(&mut ring.driver(), Duration::ZERO, &handle, bounded).unwrap();
}

fn run_story<F: Future<Output = ()> + 'static>(story: impl Fn(Env) -> F) {
    run(|stage| {
        let Stage { issued, env, .. } = stage;
        let story = story(env);
        async move {
            story.await;
            drop(issued);
        }
    });
}

conformance!(run_story);

/// Remembers who asked.
#[derive(Default)]
struct Asked {
    by: RefCell<Vec<Peer>>,
}

impl Service for Asked {
    fn handle(&self, peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        self.by.borrow_mut().push(peer);
        std::future::ready(request).boxed_local()
    }
}

#[test]
fn a_server_knows_who_asks_and_serves_any_address() {
    run(async |stage| {
        let asked = Rc::new(Asked::default());
        let listener = stage.env.server.listen(&Address("0.0.0.0:0".to_owned()), asked.clone()).unwrap();
        let port = listener.address().0.rsplit_once(':').unwrap().1.to_owned();
        let address = Address(format!("127.0.0.1:{port}"));
        let connection = stage.env.client.connect(&address).await.unwrap();
        connection.call(message(ECHO, b"", b"")).await.unwrap();
        // Servers call each other.
        let connection = stage.env.server.connect(&address).await.unwrap();
        connection.call(message(ECHO, b"", b"")).await.unwrap();
        let expected = ["client", "server"].map(|name| Peer::Certified(name.to_owned()));
        assert_eq!(*asked.by.borrow(), expected);
    });
}

async fn refusal(fabric: &TcpFabric, address: &Address) -> String {
    let error = fabric.connect(address).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, FabricError::Distrust { .. }) && !error.is_retryable(), "{error}");
    error.to_string()
}

#[test]
fn only_who_the_authority_issued_an_identity_for_is_let_in_and_believed() {
    run(async |stage| {
        let asked = Rc::new(Asked::default());
        let listen = |fabric: &TcpFabric| fabric.listen(&Address("127.0.0.1:0".to_owned()), asked.clone()).unwrap();
        let (issued, ours) = (&stage.issued, stage.fabric(stage.issued.identity("ours", "client")));
        let server = listen(&stage.fabric(issued.identity("ours", "server")));
        let theirs = stage.fabric(issued.identity("theirs", "client"));
        let text = refusal(&theirs, &server.address()).await;
        assert!(text.contains("it is of another cluster's authority than this identity"), "{text}");
        let nobody = stage.fabric(None);
        let text = refusal(&nobody, &server.address()).await;
        assert!(text.contains("--identity"), "{text}");

        let impostor = listen(&stage.fabric(issued.identity("theirs", "server")));
        let text = refusal(&ours, &impostor.address()).await;
        assert!(text.contains("another cluster's authority"), "{text}");
        let client_as_server = listen(&stage.fabric(issued.identity("ours", "client")));
        let text = refusal(&ours, &client_as_server.address()).await;
        assert!(text.contains("TLS: invalid peer certificate"), "{text}");
        let plain = listen(&nobody);
        // It may also just have been stopped.
        let error = ours.connect(&plain.address()).await.map(|_| ()).unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("has no identity"), "{error}");
        assert!(asked.by.borrow().is_empty(), "nothing was executed");
    });
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    run(async |stage| {
        let asked = Rc::new(Asked::default());
        let listener = stage.env.server.listen(&Address("127.0.0.1:0".to_owned()), asked.clone()).unwrap();
        let address = listener.address();
        let config = rustls_client(&stage.issued, false);
        let heard = elsewhere(&stage.handle, move || {
            let mut stream = rustls_stream(config, &address);
            stream.write_all(&hello()).unwrap();
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).map(|_| heard).map_err(|error| error.to_string())
        });
        let error = heard.await.unwrap_err();
        assert!(error.contains("CertificateRequired"), "{error}");
        assert!(asked.by.borrow().is_empty());
    });
}

fn hello() -> Vec<u8> {
    let body = Hello::OURS.encode();
    [encode(VERSION_MAX, Kind::Hello, 0, 0, &body, &BulkSum::default()).unwrap().as_ref(), &body].concat()
}

/// rustls as it is, from end to end: the oracle of our record layer.
fn rustls_client(issued: &Issued, with_certificate: bool) -> ClientConfig {
    let directory = issued.directory("ours", "client");
    let pem = |name: &str| std::fs::read(directory.join(name)).unwrap();
    let certificates = |name: &str| CertificateDer::pem_slice_iter(&pem(name)).map(Result::unwrap).collect::<Vec<_>>();
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca.pem") {
        roots.add(certificate).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
    let builder = builder.unwrap().with_root_certificates(roots);
    if !with_certificate {
        return builder.with_no_client_auth();
    }
    let key = PrivateKeyDer::from_pem_slice(&pem("key.pem")).unwrap();
    builder.with_client_auth_cert(certificates("cert.pem"), key).unwrap()
}

fn rustls_stream(config: ClientConfig, address: &Address) -> StreamOwned<ClientConnection, TcpStream> {
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(&address.0).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    StreamOwned::new(connection, socket)
}

/// Runs what blocks on a thread of its own.
#[allow(clippy::disallowed_methods, reason = "the peer is a program of its own")]
async fn elsewhere<T: Send + 'static>(handle: &Handle, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(work()).unwrap());
    loop {
        match told.try_recv() {
            Ok(value) => return value,
            Err(mpsc::TryRecvError::Empty) => handle.sleep(Duration::from_millis(1)).await,
            Err(error) => panic!("the thread ended: {error}"),
        }
    }
}

#[test]
fn rustls_understands_our_records_and_we_its_also_with_new_keys() {
    run(async |stage| {
        let asked = Rc::new(Asked::default());
        let listener = stage.env.server.listen(&Address("127.0.0.1:0".to_owned()), asked.clone()).unwrap();
        let address = listener.address();
        let config = rustls_client(&stage.issued, true);
        let talk = move || {
            let mut stream = rustls_stream(config, &address);
            stream.write_all(&hello()).unwrap();
            let mut heard = vec![0; hello().len()];
            stream.read_exact(&mut heard).unwrap();
            assert_eq!(heard, hello());
            for (id, length) in [1usize, 4096, 16_384, 16_385, 70_001, 1 << 20].into_iter().enumerate() {
                let bulk: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
                let mut sum = BulkSum::default();
                sum.update(&bulk);
                let head = encode(VERSION_MAX, Kind::Request, ECHO, id as u64, b"body", &sum).unwrap();
                stream.write_all(head.as_ref()).unwrap();
                stream.write_all(b"body").unwrap();
                // In the middle of a message, and the peer is to do the same.
                let (one, other) = bulk.split_at(length / 2);
                stream.write_all(one).unwrap();
                stream.conn.refresh_traffic_keys().unwrap();
                stream.write_all(other).unwrap();
                let mut reply = vec![0; head.as_ref().len() + 4 + length];
                stream.read_exact(&mut reply).unwrap();
                let header = Header::decode(VERSION_MAX, &reply).unwrap().unwrap();
                assert_eq!((header.kind, header.request_id), (Kind::Reply, id as u64));
                assert!(reply[head.as_ref().len() + 4..] == bulk, "{length} bytes come back");
            }
        };
        elsewhere(&stage.handle, talk).await;
        assert_eq!(*asked.by.borrow(), vec![Peer::Certified("client".to_owned()); 6]);
    });
}

/// A stretch of network: forwards both ways, keeps what it saw, and flips a bit of what the client says from
/// a place on when told to.
#[derive(Default)]
struct Wire {
    seen: Mutex<Vec<u8>>,
    flip: Mutex<bool>,
}

#[allow(clippy::disallowed_methods, reason = "the network is no task of the executor")]
fn wire(to: Address) -> (Address, Arc<Wire>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address(listener.local_addr().unwrap().to_string());
    let wire = Arc::new(Wire::default());
    let shared = wire.clone();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            let server = TcpStream::connect(&to.0).unwrap();
            for (mut from, mut to, is_client) in
                [(client.try_clone().unwrap(), server.try_clone().unwrap(), true), (server, client, false)]
            {
                let wire = shared.clone();
                std::thread::spawn(move || {
                    let mut buffer = [0; 4096];
                    while let Ok(length @ 1..) = from.read(&mut buffer) {
                        if is_client && *wire.flip.lock().unwrap() {
                            buffer[length - 1] ^= 1;
                        }
                        wire.seen.lock().unwrap().extend_from_slice(&buffer[..length]);
                        if to.write_all(&buffer[..length]).is_err() {
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
fn nobody_on_the_way_reads_or_changes_anything() {
    run(async |stage| {
        let pair = pair(&stage.env).await;
        let (address, wire) = wire(pair.listener.address());
        let connection = stage.env.client.connect(&address).await.unwrap();
        let secret = b"what nobody else is to know";
        let bulk = Bytes::from(secret.repeat(1000));
        let reply = connection.call(message(ECHO, secret, &bulk)).await.unwrap();
        assert!(reply.body == secret[..] && reply.bulk == bulk);
        {
            let seen = wire.seen.lock().unwrap();
            assert!(seen.len() > 2 * bulk.len(), "both ways");
            assert!(!seen.windows(secret.len()).any(|window| window == secret), "it is nowhere to be read");
        }
        let asked = pair.recorder.asked.borrow().len();
        *wire.flip.lock().unwrap() = true;
        let outcome = connection.call(message(ECHO, secret, b"")).await;
        assert!(is_lost(&outcome), "{outcome:?}");
        eventually(&stage.handle, "it ends", || connection.is_closed()).await;
        assert_eq!(pair.recorder.asked.borrow().len(), asked, "what was changed is not executed");
    });
}
