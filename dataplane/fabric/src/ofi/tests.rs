//! Peers that break the protocol, made of bare endpoints.

use super::domain::{Domain, Exposed, Network};
use super::endpoint::{Completion, Endpoint, Event};
use super::info::{End, Info};
use super::passive::PassiveEndpoint;
use super::*;
use crate::{Message, Peer, Service};
use bytes::Bytes;
use cfs_reactor::Executor;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::KernelClock;
use cfs_wire::frame::{BulkSum, Hello};
use cfs_wire::packet::{Kind, PACKET_BYTES_MAX, PACKETS_MAX, Packet, Part, Place, Region};
use std::cell::Cell;
use std::collections::VecDeque;
use std::future::Future;

/// Runs a story with a ring and the functions of libfabric, unless that is missing: tests/ofi.rs says so.
fn run<F: Future<Output = ()> + 'static>(story: impl FnOnce(Stage) -> F) {
    let Ok(functions) = super::info::functions() else { return };
    let ring = Ring::new(256).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let story = story(Stage { ring: ring.clone(), handle: handle.clone(), functions });
    let bounded = {
        let handle = handle.clone();
        async move { handle.timeout(Duration::from_secs(30), story).await.expect("a story ends within 30 s") }
    };
    executor.run(&mut ring.driver(), Duration::ZERO, &handle, bounded).unwrap();
}

struct Stage {
    ring: Rc<Ring>,
    handle: Handle,
    functions: &'static Functions,
}

/// Echoes; counts what it was asked.
#[derive(Default)]
struct Echo {
    asked: Cell<usize>,
    /// Answers with so many bytes of bulk instead.
    bulk: Cell<usize>,
    never: Cell<bool>,
}

impl Service for Echo {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        self.asked.set(self.asked.get() + 1);
        let reply = match self.bulk.get() {
            0 => request,
            bulk => Message { bulk: Bytes::from(vec![7; bulk]), ..request },
        };
        if self.never.get() { std::future::pending().boxed_local() } else { std::future::ready(reply).boxed_local() }
    }
}

/// One end of a connection that does nothing by itself.
struct Bare {
    handle: Handle,
    endpoint: Endpoint,
    is_connected: bool,
    /// It keeps its receives, if it was told to.
    keeps: bool,
    came: VecDeque<Came>,
}

/// What comes of a wait.
enum Came {
    Packet(Packet),
    Transfer,
    End,
}

impl Bare {
    fn new(handle: &Handle, endpoint: Endpoint) -> Bare {
        Bare { handle: handle.clone(), endpoint, is_connected: false, keeps: false, came: VecDeque::new() }
    }

    async fn until_connected(&mut self) {
        while !self.is_connected {
            self.is_connected = matches!(self.endpoint.event().unwrap(), Some(Event::Connected));
            self.handle.yield_now().await;
        }
    }

    fn send(&mut self, parts: &[&[u8]]) {
        self.endpoint.send(&parts.concat()).expect("there is a place");
    }

    fn packet(&mut self, packet: Packet) {
        self.send(&[&packet.encode()]);
    }

    /// Says HELLO and hears one.
    async fn greet(&mut self) {
        self.until_connected().await;
        let body = Hello::OURS.encode();
        let part = Part { length: body.len(), crc: BulkSum::of(&body).crc(), place: Place::Inline };
        self.send(&[&Packet { body: part, ..Packet::bare(Kind::Hello, 0) }.encode(), &body]);
        let Came::Packet(hello) = self.next().await else { panic!("there is a HELLO") };
        assert_eq!(hello.kind, Kind::Hello);
    }

    /// The next packet or end of a transfer, or the end of the connection.
    async fn next(&mut self) -> Came {
        let mut completions = Vec::new();
        loop {
            if let Some(came) = self.came.pop_front() {
                return came;
            }
            if self.endpoint.completions(&mut completions).is_err() {
                return Came::End;
            }
            for completion in completions.drain(..) {
                let came = match completion {
                    Completion::Sent => continue,
                    Completion::Read { .. } | Completion::Written { .. } => Came::Transfer,
                    Completion::Received { slot, length } => {
                        let (packet, ..) = Packet::decode(self.endpoint.received(slot, length)).unwrap();
                        if !self.keeps {
                            self.endpoint.receive(slot).unwrap();
                        }
                        Came::Packet(packet)
                    }
                };
                self.came.push_back(came);
            }
            if !self.came.is_empty() {
                continue;
            }
            match self.endpoint.event() {
                Ok(Some(Event::Shutdown)) | Err(_) => return Came::End,
                _ => self.handle.yield_now().await,
            }
        }
    }

    /// Waits for the end, whatever comes before.
    async fn until_end(&mut self) {
        while !matches!(self.next().await, Came::End) {}
    }
}

/// A request whose body lies apart, at a place that is nowhere.
fn request(request_id: u64, length: usize, region: Region) -> Packet {
    let body = Part { length, crc: 0, place: Place::Apart(region) };
    Packet { body, ..Packet::bare(Kind::Request, request_id) }
}

impl Stage {
    fn serve(&self, service: Rc<Echo>) -> Box<dyn Listener> {
        let fabric = OfiFabric::new(self.ring.clone(), &self.handle, "tcp").unwrap();
        fabric.listen(&Address("127.0.0.1:0".to_owned()), service).unwrap()
    }

    /// A client that does nothing by itself.
    fn client(&self, address: &Address) -> Bare {
        let info = Info::find(self.functions, "tcp", address.0.parse().unwrap(), End::Connecting).unwrap();
        let domain = Domain::open(&Network::open(&info).unwrap(), &info).unwrap();
        let mut endpoint = Endpoint::open(&domain, &info, self.handle.random_u64()).unwrap();
        endpoint.connect(&info).unwrap();
        Bare::new(&self.handle, endpoint)
    }

    async fn connection(&self, address: &Address) -> Result<Rc<dyn Connection>, FabricError> {
        OfiFabric::new(self.ring.clone(), &self.handle, "tcp").unwrap().connect(address).await
    }

    /// That the server lives: it serves another client.
    async fn assert_serves(&self, listener: &dyn Listener) {
        let connection = self.connection(&listener.address()).await.unwrap();
        let request = Message { opcode: 3, body: Bytes::from_static(b"still there"), bulk: Bytes::new() };
        assert_eq!(connection.call(request.clone()).await, Ok(request));
    }

    /// A server that does nothing by itself, for one connection, and what connects to it.
    async fn bare_server(&self) -> (Bare, Rc<dyn Connection>) {
        let any = "127.0.0.1:0".parse().unwrap();
        let info = Info::find(self.functions, "tcp", any, End::Listening).unwrap();
        let network = Network::open(&info).unwrap();
        let mut passive = PassiveEndpoint::listen(&network, &info).unwrap();
        let address = Address(passive.address().unwrap().to_string());
        let fabric = OfiFabric::new(self.ring.clone(), &self.handle, "tcp").unwrap();
        let connecting = self.handle.spawn(async move { fabric.connect(&address).await });
        let request = loop {
            match passive.request().unwrap() {
                Some(request) => break request,
                None => self.handle.yield_now().await,
            }
        };
        let domain = Domain::open(&network, &request).unwrap();
        let mut endpoint = Endpoint::open(&domain, &request, self.handle.random_u64()).unwrap();
        endpoint.accept().unwrap();
        let mut bare = Bare::new(&self.handle, endpoint);
        bare.greet().await;
        (bare, connecting.await.unwrap().unwrap())
    }
}

#[test]
fn what_is_no_packet_ends_the_connection_and_the_server_lives() {
    run(async |stage| {
        let echo = Rc::new(Echo::default());
        let listener = stage.serve(echo.clone());
        let garbage: Vec<u8> = (0..PACKET_BYTES_MAX).map(|at| (at * 31) as u8).collect();
        let zeroes = [0; 96];
        for message in [&garbage[..], &garbage[..7], &zeroes, b"CP"] {
            let mut before = stage.client(&listener.address());
            before.until_connected().await;
            before.send(&[message]);
            before.until_end().await;
            let mut after = stage.client(&listener.address());
            after.greet().await;
            after.send(&[message]);
            after.until_end().await;
        }
        stage.assert_serves(&*listener).await;
        assert_eq!(echo.asked.get(), 1, "nothing else was executed");
    });
}

#[test]
fn a_client_that_breaks_the_rules_is_sent_away() {
    run(async |stage| {
        let echo = Rc::new(Echo::default());
        let listener = stage.serve(echo.clone());
        let nowhere = Region { address: 4096, key: 77 };
        let offer = Packet { body: request(5, 9, nowhere).body, ..Packet::bare(Kind::Offer, 5) };
        let wrong = [
            // Longer than a body may be.
            request(1, RPC_BODY_BYTES_MAX + 1, nowhere),
            request(1, u32::MAX as usize, nowhere),
            // Memory that is not there: the read fails.
            request(1, 100_000, nowhere),
            request(1, 100_000, Region { address: u64::MAX, key: u64::MAX }),
            // Memory that nobody asked for, and what servers say.
            offer,
            Packet::bare(Kind::Reply, 1),
            Packet::bare(Kind::Refusal, 1),
            // A second HELLO is none.
            Packet::bare(Kind::Hello, 0),
            // More credits than there is memory for.
            Packet { credits: 200, ..Packet::bare(Kind::Credit, 0) },
        ];
        for packet in wrong {
            let mut client = stage.client(&listener.address());
            client.greet().await;
            client.packet(packet);
            client.until_end().await;
        }
        stage.assert_serves(&*listener).await;
        assert_eq!(echo.asked.get(), 1, "nothing else was executed");
    });
}

#[test]
fn what_was_read_is_checked() {
    run(async |stage| {
        let echo = Rc::new(Echo::default());
        let listener = stage.serve(echo.clone());
        let bytes = Bytes::from(vec![9; 100_000]);
        let mut client = stage.client(&listener.address());
        client.greet().await;
        let (_, remote) = client.endpoint.expose(Exposed::Read(bytes.clone()), 1).unwrap();
        let region = Region { address: remote.address, key: remote.key };
        let mut packet = request(1, bytes.len(), region);
        packet.body.crc = BulkSum::of(&bytes).crc();
        client.packet(packet);
        let Came::Packet(waits) = client.next().await else { panic!("the reply waits for memory") };
        assert_eq!((waits.kind, waits.body.length), (Kind::Waits, bytes.len()));
        packet.body.crc ^= 1;
        packet.request_id = 2;
        client.packet(packet);
        client.until_end().await;
        assert_eq!(echo.asked.get(), 1);
        // More than was exposed.
        let mut client = stage.client(&listener.address());
        client.greet().await;
        let (_, remote) = client.endpoint.expose(Exposed::Read(bytes.clone()), 1).unwrap();
        client.packet(request(1, bytes.len() + 1, Region { address: remote.address, key: remote.key }));
        client.until_end().await;
        assert_eq!(echo.asked.get(), 1);
        stage.assert_serves(&*listener).await;
    });
}

#[test]
fn no_more_calls_run_than_may() {
    run(async |stage| {
        let echo = Rc::new(Echo::default());
        echo.never.set(true);
        let listener = stage.serve(echo.clone());
        let mut client = stage.client(&listener.address());
        client.greet().await;
        let (mut credits, mut sent) = (PACKETS_MAX, 1);
        while sent <= crate::CALLS_MAX {
            if credits > 2 {
                client.packet(Packet::bare(Kind::Request, sent as u64));
                (credits, sent) = (credits - 1, sent + 1);
                continue;
            }
            let Came::Packet(credit) = client.next().await else { panic!("all of these may run") };
            assert_eq!(credit.kind, Kind::Credit);
            credits += usize::from(credit.credits);
        }
        while echo.asked.get() < crate::CALLS_MAX {
            stage.handle.yield_now().await;
        }
        client.packet(Packet::bare(Kind::Request, 9999));
        client.until_end().await;
        assert_eq!(echo.asked.get(), crate::CALLS_MAX);
    });
}

#[test]
fn nothing_is_sent_that_the_peer_has_no_memory_for() {
    run(async |stage| {
        let echo = Rc::new(Echo::default());
        let listener = stage.serve(echo.clone());
        let mut client = stage.client(&listener.address());
        client.greet().await;
        // HELLO took one.
        client.keeps = true;
        let mut sent = 0;
        let mut came = 1;
        let mut credits = PACKETS_MAX - 1;
        // It gives no credits back, though it keeps to its own.
        while came < PACKETS_MAX - 1 {
            while credits > 1 && sent < 200 {
                sent += 1;
                credits -= 1;
                client.packet(Packet::bare(Kind::Request, sent));
            }
            let Came::Packet(packet) = client.next().await else { panic!("it lives") };
            assert_eq!(packet.kind, Kind::Reply);
            credits += usize::from(packet.credits);
            came += 1;
        }
        // What it has executed since has no credit to be answered with, but for telling of credits.
        let quiet = stage.handle.timeout(Duration::from_millis(100), client.next()).await;
        match quiet {
            None => {}
            Some(Came::Packet(packet)) => assert_eq!(packet.kind, Kind::Credit, "the last one is for this"),
            Some(_) => panic!("it lives"),
        }
        let quiet = stage.handle.timeout(Duration::from_millis(100), client.next()).await;
        assert!(quiet.is_none(), "not one more");
        // With credits it goes on.
        client.keeps = false;
        assert!(echo.asked.get() > PACKETS_MAX, "there were more to answer");
        stage.assert_serves(&*listener).await;
    });
}

#[test]
fn a_reply_waits_for_memory_and_no_other_than_it_asked_for_will_do() {
    run(async |stage| {
        let echo = Rc::new(Echo::default());
        echo.bulk.set(100_000);
        let listener = stage.serve(echo.clone());
        for length in [100_000, 99_999, 100_001] {
            let mut client = stage.client(&listener.address());
            client.greet().await;
            client.packet(Packet::bare(Kind::Request, 1));
            let Came::Packet(waits) = client.next().await else { panic!("the reply waits for memory") };
            assert_eq!((waits.kind, waits.bulk.length), (Kind::Waits, 100_000));
            let room = Exposed::Write(DmaBuf::zeroed(100_001));
            let (number, remote) = client.endpoint.expose(room, 1).unwrap();
            let place = Place::Apart(Region { address: remote.address, key: remote.key });
            client.packet(Packet { bulk: Part { length, crc: 0, place }, ..Packet::bare(Kind::Offer, 1) });
            if length != 100_000 {
                client.until_end().await;
                continue;
            }
            let Came::Packet(reply) = client.next().await else { panic!("there is a reply") };
            assert_eq!(reply.kind, Kind::Reply);
            let Some(Exposed::Write(buffer)) = client.endpoint.withdraw(number) else { panic!("it was exposed") };
            assert!(buffer[..length].iter().all(|byte| *byte == 7) && buffer[length] == 0);
            assert!(reply.bulk.verify(&BulkSum::of(&buffer[..length])).is_ok());
        }
    });
}

#[test]
fn a_request_that_has_room_gets_its_reply_at_once() {
    run(async |stage| {
        let echo = Rc::new(Echo::default());
        echo.bulk.set(100_000);
        let listener = stage.serve(echo.clone());
        for (length, kind) in [(100_000, Kind::Reply), (200_000, Kind::Reply), (99_999, Kind::Waits)] {
            let mut client = stage.client(&listener.address());
            client.greet().await;
            let (number, remote) = client.endpoint.expose(Exposed::Write(DmaBuf::zeroed(length)), 1).unwrap();
            let room = Some((Region { address: remote.address, key: remote.key }, length));
            client.packet(Packet { room, ..Packet::bare(Kind::Request, 1) });
            let Came::Packet(packet) = client.next().await else { panic!("there is an answer") };
            assert_eq!((packet.kind, packet.bulk.length), (kind, 100_000));
            let Some(Exposed::Write(buffer)) = client.endpoint.withdraw(number) else { panic!("it was exposed") };
            let written = if kind == Kind::Reply { 100_000 } else { 0 };
            assert!(buffer[..written].iter().all(|byte| *byte == 7) && buffer[written..].iter().all(|byte| *byte == 0));
        }
        // Room that is not there.
        let mut client = stage.client(&listener.address());
        client.greet().await;
        let room = Some((Region { address: 4096, key: 77 }, 100_000));
        client.packet(Packet { room, ..Packet::bare(Kind::Request, 1) });
        client.until_end().await;
        echo.bulk.set(0);
        stage.assert_serves(&*listener).await;
    });
}

/// What a client makes of a server that answers a call with these packets.
async fn answered(stage: &Stage, packets: impl Fn(u64) -> Vec<Packet>) -> FabricError {
    let (mut server, connection) = stage.bare_server().await;
    let calling = {
        let connection = connection.clone();
        stage.handle.spawn(async move { connection.call(Message::default()).await })
    };
    let Came::Packet(request) = server.next().await else { panic!("there is a request") };
    assert_eq!(request.kind, Kind::Request);
    let mut waits = false;
    for packet in packets(request.request_id) {
        if waits && packet.kind == Kind::Reply {
            let Came::Packet(offer) = server.next().await else { panic!("there is memory") };
            assert_eq!(offer.kind, Kind::Offer);
        }
        waits = packet.kind == Kind::Waits;
        server.packet(packet);
    }
    let outcome = calling.await.unwrap().unwrap_err();
    assert!(connection.is_closed());
    outcome
}

#[test]
fn a_server_that_breaks_the_rules_loses_its_client() {
    run(async |stage| {
        let apart = |length| Part { length, crc: 1, place: Place::Apart(Region::default()) };
        let waits = move |id| Packet { bulk: apart(100_000), ..Packet::bare(Kind::Waits, id) };
        type Answer = Box<dyn Fn(u64) -> Vec<Packet>>;
        let stories: [(&str, Answer); 8] = [
            ("no sense", Box::new(|id| vec![Packet::bare(Kind::Reply, id + 1)])),
            ("no sense", Box::new(|_| vec![Packet::bare(Kind::Request, 1)])),
            ("no sense", Box::new(move |id| vec![waits(id), waits(id)])),
            ("no sense", Box::new(move |id| vec![Packet { bulk: apart(5), ..Packet::bare(Kind::Reply, id) }])),
            ("malformed", Box::new(|id| vec![Packet::bare(Kind::Refusal, id)])),
            (
                "exceeds",
                Box::new(move |id| {
                    vec![Packet { bulk: apart(RPC_BULK_BYTES_MAX + 1), ..Packet::bare(Kind::Waits, id) }]
                }),
            ),
            ("keep count", Box::new(|_| vec![Packet { credits: 3, ..Packet::bare(Kind::Credit, 0) }])),
            // It says that it wrote, and did not.
            (
                "corrupt",
                Box::new(move |id| vec![waits(id), Packet { bulk: apart(100_000), ..Packet::bare(Kind::Reply, id) }]),
            ),
        ];
        for (told, packets) in stories {
            let error = answered(&stage, packets).await;
            assert!(matches!(&error, FabricError::Lost { detail, .. } if detail.contains(told)), "{told}: {error}");
        }
    });
}
