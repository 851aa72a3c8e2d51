//! Round trips of 64 bytes and streams of 1 MiB through the fabric, with TLS and without, beside the same
//! through plain TCP sockets: `fabric_bench [ROUNDS]`. Two threads on loopback, each an end; `scripts/bench
//! fabric` runs it. Both sides of the fabric check a CRC32C of all bytes, with TLS too.
//!
//! What TLS can reach is taken to be 1 / (1 / plain TCP + 1 / AES-256-GCM), all bytes going through both, one
//! after the other; the cipher is measured in the same rounds, by one thread on records of 16 KiB.
//!
//! Where libfabric is installed, the same goes through its provider `tcp`, beside its own `fi_pingpong` (package
//! libfabric-bin), which has one transfer under way at a time and never sleeps.
//!
//! A round runs every contender once; a figure is the median of its rounds and a ratio the median of
//! the rounds' ratios, so that a noisy neighbour hits both sides. Last come lines `ratio NAME VALUE`.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "two threads are two machines here")]

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use bytes::Bytes;
use cfs_fabric::identity::Identity;
use cfs_fabric::identity::authority::{self, Role};
use cfs_fabric::ofi::OfiFabric;
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Connection, Fabric, Message, Peer, Service};
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::executor::SPIN_DEFAULT;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join_all};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

const ECHO: u16 = 1;
/// Keeps the bulk bytes.
const SINK: u16 = 2;
/// Gives 1 MiB.
const SOURCE: u16 = 3;
const MIB: usize = 1 << 20;
/// What the plain server is told for round trips without sleep; the others are the number of the work.
const SPINNING: u8 = 3;
const PING_BYTES: usize = 64;
/// Content of a TLS record at most (RFC 8446 section 5.1).
const RECORD_BYTES: usize = 16 << 10;
/// Of each contender in a round: some 50 ms.
const PINGS: usize = 2000;
const STREAMED_MIB: usize = 128;
/// Calls of 1 MiB under way: a sender that always has the next one ready, as the plain one has.
const DEPTH: usize = 8;

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Ping,
    Write,
    Read,
}

const WORKS: [(&str, Work); 3] =
    [("64 B round trip", Work::Ping), ("1 MiB to the server", Work::Write), ("1 MiB from the server", Work::Read)];

struct Block {
    block: Bytes,
}

impl Service for Block {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        let reply = match request.opcode {
            SINK => Message::default(),
            SOURCE => Message { bulk: self.block.clone(), ..Message::default() },
            _ => request,
        };
        std::future::ready(reply).boxed_local()
    }
}

fn executor(main: impl AsyncFnOnce(Rc<Ring>, Handle) + 'static) {
    let ring = Ring::new(256).expect("io_uring works");
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let main = {
        let (ring, handle) = (ring.clone(), handle.clone());
        async move { main(ring, handle).await }
    };
    let run = executor.run(&mut ring.driver(), SPIN_DEFAULT, &handle, main);
    run.expect("the main task ends");
}

/// How long this work takes through the fabric.
async fn through_fabric(connection: &dyn Connection, block: &Bytes, work: Work) -> Duration {
    let (calls, depth, request) = match work {
        Work::Ping => (PINGS, 1, Message { opcode: ECHO, body: Bytes::from(vec![7; PING_BYTES]), bulk: Bytes::new() }),
        Work::Write => (STREAMED_MIB, DEPTH, Message { opcode: SINK, bulk: block.clone(), ..Message::default() }),
        Work::Read => (STREAMED_MIB, DEPTH, Message { opcode: SOURCE, ..Message::default() }),
    };
    let start = Instant::now();
    let lanes = (0..depth).map(|_| async {
        for _ in 0..calls / depth {
            connection.call(request.clone()).await.expect("the server lives");
        }
    });
    join_all(lanes).await;
    start.elapsed()
}

/// Reads without ever sleeping: what a core given up to it can reach.
fn spin_read(socket: &mut TcpStream, mut into: &mut [u8]) -> std::io::Result<()> {
    while !into.is_empty() {
        match socket.read(into) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => into = &mut into[length..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How long the round trips take between two threads that never sleep.
fn spinning(socket: &mut TcpStream, block: &mut [u8]) -> std::io::Result<Duration> {
    let start = Instant::now();
    socket.write_all(&[SPINNING])?;
    socket.set_nonblocking(true)?;
    for _ in 0..PINGS {
        socket.write_all(&block[..PING_BYTES])?;
        spin_read(socket, &mut block[..PING_BYTES])?;
    }
    socket.set_nonblocking(false)?;
    Ok(start.elapsed())
}

/// The other end of [`through_sockets`]: told by one byte what comes.
fn plain_server(mut socket: TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut block = vec![0; MIB];
    let mut order = [0];
    while socket.read(&mut order)? > 0 {
        match order[0] {
            SPINNING => {
                socket.set_nonblocking(true)?;
                for _ in 0..PINGS {
                    spin_read(&mut socket, &mut block[..PING_BYTES])?;
                    socket.write_all(&block[..PING_BYTES])?;
                }
                socket.set_nonblocking(false)?;
            }
            0 => {
                for _ in 0..PINGS {
                    socket.read_exact(&mut block[..PING_BYTES])?;
                    socket.write_all(&block[..PING_BYTES])?;
                }
            }
            1 => {
                for _ in 0..STREAMED_MIB {
                    socket.read_exact(&mut block)?;
                }
                socket.write_all(&order)?;
            }
            _ => {
                for _ in 0..STREAMED_MIB {
                    socket.write_all(&block)?;
                }
            }
        }
    }
    Ok(())
}

/// How long this work takes through a plain socket.
fn through_sockets(socket: &mut TcpStream, block: &mut [u8], work: Work) -> std::io::Result<Duration> {
    let start = Instant::now();
    socket.write_all(&[work as u8])?;
    match work {
        Work::Ping => {
            for _ in 0..PINGS {
                socket.write_all(&block[..PING_BYTES])?;
                socket.read_exact(&mut block[..PING_BYTES])?;
            }
        }
        Work::Write => {
            for _ in 0..STREAMED_MIB {
                socket.write_all(block)?;
            }
            socket.read_exact(&mut block[..1])?;
        }
        Work::Read => {
            for _ in 0..STREAMED_MIB {
                socket.read_exact(block)?;
            }
        }
    }
    Ok(start.elapsed())
}

/// How long the cipher takes for the bytes of a stream.
fn cipher(key: &LessSafeKey, block: &[u8], sealed: &mut [u8]) -> Duration {
    let start = Instant::now();
    let mut number = 0u64;
    for _ in 0..STREAMED_MIB {
        for content in block.chunks(RECORD_BYTES) {
            let mut nonce = [0; 12];
            nonce[4..].copy_from_slice(&number.to_be_bytes());
            number += 1;
            let (out, tag) = sealed.split_at_mut(content.len());
            let nonce = Nonce::assume_unique_for_key(nonce);
            key.seal_out_of_place_scatter(nonce, Aad::empty(), content, out, &[], tag).expect("the lengths fit");
        }
    }
    start.elapsed()
}

/// Of fi_pingpong's 1 MiB transfers in a round.
const PINGPONG_MIB: usize = 64;

/// Seconds that one transfer of fi_pingpong takes, one way. It listens on a port below those the system gives.
fn pingpong(bytes: usize, transfers: usize, port: u16) -> Option<f64> {
    let ours = |flag: &str| {
        let mut command = Command::new("fi_pingpong");
        command.args(["-p", "tcp", "-e", "msg", "-I", &transfers.to_string(), "-S", &bytes.to_string()]);
        command.args([flag, &port.to_string()]).stderr(Stdio::null());
        command
    };
    let mut server = ours("-B").stdout(Stdio::null()).spawn().ok()?;
    // It says nothing when it listens.
    thread::sleep(Duration::from_millis(1200));
    let output = ours("-P").arg("127.0.0.1").output().ok();
    let _ = server.kill();
    let _ = server.wait();
    let text = String::from_utf8(output?.stdout).ok()?;
    // bytes, #sent, #ack, total, time, MB/sec, usec/xfer, Mxfers/sec
    let micros: f64 = text.lines().last()?.split_whitespace().nth(6)?.parse().ok()?;
    Some(micros / 1e6)
}

/// Through libfabric, beside fi_pingpong and our own TCP.
async fn beside_libfabric(ofi: &dyn Connection, tcp: &dyn Connection, block: &Bytes, rounds: usize) {
    let seconds = |duration: Duration| duration.as_secs_f64();
    let mut took = Vec::new();
    for round in 0..=rounds {
        let port = 20_000 + 4 * (round % 1000) as u16;
        let ping = seconds(through_fabric(ofi, block, Work::Ping).await) / PINGS as f64;
        let write = seconds(through_fabric(ofi, block, Work::Write).await) / STREAMED_MIB as f64;
        let read = seconds(through_fabric(ofi, block, Work::Read).await) / STREAMED_MIB as f64;
        let tcp_ping = seconds(through_fabric(tcp, block, Work::Ping).await) / PINGS as f64;
        let tcp_write = seconds(through_fabric(tcp, block, Work::Write).await) / STREAMED_MIB as f64;
        let of_64 = pingpong(PING_BYTES, PINGS, port).map(|one_way| 2.0 * one_way);
        let (Some(of_64), Some(of_mib)) = (of_64, pingpong(MIB, PINGPONG_MIB, port + 2)) else {
            println!("through libfabric: fi_pingpong does not run here (apt-get install libfabric-bin)");
            return;
        };
        // The first round is to warm up.
        if round > 0 {
            took.push([ping, write, read, tcp_ping, tcp_write, of_64, of_mib]);
        }
    }
    let of = |index: usize| median(took.iter().map(|round| round[index]).collect());
    let ratio = |one: usize, other: usize| median(took.iter().map(|round| round[one] / round[other]).collect());
    let rate = |seconds: f64| MIB as f64 / seconds / 1e9;
    println!(
        "through libfabric (tcp): 64 B round trip {:.2} µs, fi_pingpong {:.2} µs; 1 MiB to the server {:.2} GB/s, \
         from it {:.2} GB/s, fi_pingpong {:.2} GB/s",
        of(0) * 1e6,
        of(5) * 1e6,
        rate(of(1)),
        rate(of(2)),
        rate(of(6))
    );
    // Of times for round trips, of rates for streams.
    println!("ratio ofi_rtt64_to_tcp {:.3}", ratio(0, 3));
    println!("ratio ofi_stream1m_to_tcp {:.3}", ratio(4, 1));
    println!("ratio ofi_rtt64 {:.3}", ratio(0, 5));
    println!("ratio ofi_stream1m {:.3}", ratio(6, 1));
    println!("ratio ofi_stream1m_read {:.3}", ratio(6, 2));
}

/// A server's and a client's identity.
fn identities() -> [Arc<Identity>; 2] {
    let home = tempfile::tempdir().expect("a temporary directory");
    let ca = home.path().join("ca");
    authority::create(&ca).expect("an authority");
    [("server", Role::Server), ("client", Role::Client)].map(|(name, role)| {
        let directory = home.path().join(name);
        authority::issue(&ca, role, name, &directory).expect("an identity");
        Arc::new(Identity::load(&directory).expect("it is one"))
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn figure(work: Work, seconds: f64) -> String {
    match work {
        Work::Ping => format!("{:.2} µs", seconds * 1e6 / PINGS as f64),
        Work::Write | Work::Read => format!("{:.2} GB/s", (STREAMED_MIB * MIB) as f64 / seconds / 1e9),
    }
}

/// Seconds of one round.
struct Round {
    plain_fabric: f64,
    tls_fabric: f64,
    sockets: f64,
    /// Of round trips only.
    spinning: f64,
    /// Of streams only.
    cipher: f64,
}

fn main() {
    let rounds = std::env::args().nth(1).map_or(21, |text| text.parse::<usize>().expect("a number of rounds"));
    let [server_identity, client_identity] = identities();
    let (tell, told) = mpsc::channel::<([String; 2], Option<String>)>();
    let (stop, stopped) = cfs_reactor::mailbox::mailbox::<()>(1);
    let server = thread::spawn(move || {
        executor(async move |ring, handle| {
            let mut stopped = stopped;
            let listeners = [None, Some(server_identity)].map(|identity| {
                let service = Rc::new(Block { block: DmaBuf::zeroed(MIB).freeze() });
                let fabric = TcpFabric::new(ring.clone(), &handle, identity);
                fabric.listen(&Address("127.0.0.1:0".to_owned()), service).expect("a free port")
            });
            let beside = OfiFabric::new(ring.clone(), &handle, "tcp").map(|fabric| {
                let service = Rc::new(Block { block: DmaBuf::zeroed(MIB).freeze() });
                fabric.listen(&Address("127.0.0.1:0".to_owned()), service).expect("a free port")
            });
            let beside_address = match &beside {
                Ok(listener) => Some(listener.address().0),
                Err(missing) => {
                    println!("through libfabric: {missing}");
                    None
                }
            };
            let addresses = listeners.each_ref().map(|listener| listener.address().0);
            tell.send((addresses, beside_address)).expect("the client waits");
            stopped.recv().await;
        });
    });
    let (addresses, beside_address) = told.recv().expect("the server listens");
    let [plain_address, tls_address] = addresses.map(Address);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let mut socket = TcpStream::connect(listener.local_addr().expect("is bound")).expect("connects");
    socket.set_nodelay(true).expect("a TCP socket");
    let accepted = listener.accept().expect("connected").0;
    let sockets = thread::spawn(move || plain_server(accepted));
    executor(async move |ring, handle| {
        let plain = TcpFabric::new(ring.clone(), &handle, None).connect(&plain_address).await;
        let tls = TcpFabric::new(ring.clone(), &handle, Some(client_identity)).connect(&tls_address).await;
        let (plain, tls) = (plain.expect("the server listens"), tls.expect("it knows us"));
        let block = DmaBuf::zeroed(MIB).freeze();
        let mut socket_block = vec![0; MIB];
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32]).expect("a key of its length"));
        let mut sealed = vec![0; RECORD_BYTES + AES_256_GCM.tag_len()];
        let (mut ratios, mut spinning_ratio) = (Vec::new(), 0.0);
        for (name, work) in WORKS {
            let mut took = Vec::new();
            // The first round is to warm up.
            for round in 0..=rounds {
                let this = Round {
                    plain_fabric: through_fabric(&*plain, &block, work).await.as_secs_f64(),
                    tls_fabric: through_fabric(&*tls, &block, work).await.as_secs_f64(),
                    sockets: through_sockets(&mut socket, &mut socket_block, work)
                        .expect("the server lives")
                        .as_secs_f64(),
                    spinning: match work {
                        Work::Ping => spinning(&mut socket, &mut socket_block).expect("the server lives").as_secs_f64(),
                        Work::Write | Work::Read => 0.0,
                    },
                    cipher: match work {
                        Work::Ping => 0.0,
                        Work::Write | Work::Read => cipher(&key, &block, &mut sealed).as_secs_f64(),
                    },
                };
                if round > 0 {
                    took.push(this);
                }
            }
            let of = |side: fn(&Round) -> f64| median(took.iter().map(side).collect());
            ratios.push((
                of(|round| round.tls_fabric / (round.sockets + round.cipher)),
                of(|round| round.plain_fabric / round.sockets),
            ));
            let shown = |side| figure(work, of(side));
            let beside = match work {
                Work::Ping => format!(", plain TCP that never sleeps {}", shown(|round| round.spinning)),
                Work::Write | Work::Read => format!(", AES-256-GCM {}", shown(|round| round.cipher)),
            };
            if work == Work::Ping {
                spinning_ratio = of(|round| round.tls_fabric / round.spinning);
            }
            println!(
                "{name}: fabric with TLS {}, without {}, plain TCP {}{beside}",
                shown(|round| round.tls_fabric),
                shown(|round| round.plain_fabric),
                shown(|round| round.sockets)
            );
        }
        drop(socket);
        if let Some(address) = beside_address {
            let fabric = OfiFabric::new(ring, &handle, "tcp").expect("the server has it");
            let ofi = fabric.connect(&Address(address)).await.expect("the server listens");
            // fi_pingpong takes seconds to begin.
            beside_libfabric(&*ofi, &*plain, &block, rounds.min(5)).await;
        }
        // Of times for round trips, of rates for streams.
        let [ping, write, read] = ratios[..] else { unreachable!("three works") };
        println!("ratio rtt64_without_tls {:.3}", ping.1);
        println!("ratio stream1m_without_tls {:.3}", 1.0 / write.1);
        println!("ratio stream1m_read_without_tls {:.3}", 1.0 / read.1);
        println!("ratio rtt64_spinning {spinning_ratio:.3}");
        println!("ratio rtt64 {:.3}", ping.0);
        println!("ratio stream1m {:.3}", 1.0 / write.0);
        println!("ratio stream1m_read {:.3}", 1.0 / read.0);
    });
    sockets.join().expect("the plain server ends").expect("its client closed");
    drop(stop);
    server.join().expect("the server ends");
}
