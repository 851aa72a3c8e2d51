//! What `scripts/bench neighbours` runs, each for SECONDS and alone or beside others as the script has it:
//!
//! - `neighbours_bench fill PATH SIZE_MIB`: formats a target and fills it for `read`.
//! - `neighbours_bench read PATH DEPTH SECONDS`: 4 KiB random reads of it.
//! - `neighbours_bench write PATH SIZE_MIB DEPTH SECONDS`: 4 KiB puts, durable when they are answered, into a
//!   target made anew, all read back afterwards.
//! - `neighbours_bench fabric SECONDS` and `sockets SECONDS`: round trips of 64 bytes between two threads,
//!   through the fabric and through plain blocking sockets.
//! - `neighbours_bench burn FILE`: a neighbour. Burns its core until it is killed, and writes down in FILE
//!   how often it went round.
//!
//! All but `fill` and `burn` print `RATE CORES`, how many a second and how much of the processors they took,
//! and `write` how many puts one flush covered besides. Whatever is read is compared with what was written: a
//! difference or an error is a panic.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "two threads are two machines here")]

use bytes::Bytes;
use cfs_device::uring::{OpenOptions, UringDevice};
use cfs_device::{BlockDevice, DeviceGeometry, DeviceResult, Placement};
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Connection, Fabric, Message, Peer, Service};
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::{KernelClock, SplitMix64};
use cfs_reactor::executor::SPIN_DEFAULT;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use cfs_store::{FormatOptions, Identity, TargetStore, format};
use cfs_wire::blobs::{BlobKind, Owner, ShardGeometry};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::{BlobId, ClusterId, DeviceId, NodeId, Policy, TargetId};
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join_all};
use rustix::time::{ClockId, clock_gettime};
use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const BLOB: usize = 1 << 20;
const PING: usize = 64;
/// Rounds of a neighbour between two looks at the clock: some microseconds.
const BURNT: u64 = 10_000;
/// How often a neighbour writes its count down: a thousandth of the shortest measurement.
const NOTED: Duration = Duration::from_millis(1);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["fill", path, size] => on_reactor(fill(path.into(), number(size))),
        ["read", path, depth, seconds] => on_reactor(read(path.into(), number(depth), span(seconds))),
        ["write", path, size, depth, seconds] => {
            on_reactor(write(path.into(), number(size), number(depth), span(seconds)));
        }
        ["fabric", seconds] => fabric(span(seconds)),
        ["sockets", seconds] => sockets(span(seconds)).expect("loopback works"),
        ["burn", path] => burn(Path::new(path)).expect("the file can be written"),
        _ => {
            eprintln!("usage: neighbours_bench fill | read | write | fabric | sockets | burn ...");
            std::process::exit(2);
        }
    }
}

fn number(text: &str) -> u64 {
    text.parse().expect("a number")
}

fn span(text: &str) -> Duration {
    Duration::from_secs_f64(text.parse().expect("a number of seconds"))
}

/// Processor time of the whole process, the kernel's io_uring workers too.
fn cpu_seconds() -> f64 {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

/// A measurement under way.
struct Measured {
    start: Instant,
    cpu: f64,
    span: Duration,
}

impl Measured {
    fn begin(span: Duration) -> Measured {
        Measured { start: Instant::now(), cpu: cpu_seconds(), span }
    }

    fn goes_on(&self) -> bool {
        self.start.elapsed() < self.span
    }

    /// `RATE CORES`.
    fn end(&self, count: u64) -> String {
        let seconds = self.start.elapsed().as_secs_f64();
        format!("{:.1} {:.3}", count as f64 / seconds, (cpu_seconds() - self.cpu) / seconds)
    }
}

fn on_reactor(main: impl AsyncFnOnce(Rc<Ring>, Handle) + 'static) {
    let ring = Ring::new(1024).expect("io_uring works");
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let main = {
        let (ring, handle) = (ring.clone(), handle.clone());
        async move { main(ring, handle).await }
    };
    executor.run(&mut ring.driver(), SPIN_DEFAULT, &handle, main).expect("the main task ends");
}

/// Counts how often the store makes a device durable, by flush or by FUA.
struct Counting {
    device: Rc<dyn BlockDevice>,
    flushes: Cell<u64>,
}

impl BlockDevice for Counting {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn geometry(&self) -> DeviceGeometry {
        self.device.geometry()
    }

    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        self.device.read(offset, length)
    }

    fn write(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.flushes.set(self.flushes.get() + u64::from(fua));
        self.device.write(offset, parts, placement, fua)
    }

    fn flush(&self) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.flushes.set(self.flushes.get() + 1);
        self.device.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.discard(offset, length)
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.settle(offset, length)
    }
}

/// The file as a device; of this size in MiB if it is not there yet.
fn open(path: &str, size_mib: u64, ring: &Rc<Ring>, handle: &Handle) -> Rc<Counting> {
    let create_size = (!Path::new(path).exists()).then_some(size_mib << 20);
    let options = OpenOptions { create_size, ..OpenOptions::default() };
    let device = UringDevice::open(Path::new(path), ring, handle, options).expect("opens");
    Rc::new(Counting { device, flushes: Cell::new(0) })
}

async fn format_and_open(device: &Rc<Counting>, handle: &Handle) -> Rc<TargetStore> {
    let identity = Identity { cluster: ClusterId(1), node: NodeId(1), target: TargetId(1), device: DeviceId(1) };
    let parameters = ClusterParameters {
        format: ClusterParameters::FORMAT,
        shards: 1,
        policy: Policy::new(1, 0).expect("1+0 is a policy"),
        tolerated: 0,
        targets: 1,
        name_key: [0; 32],
    };
    let options = FormatOptions { identity, parameters, zone_bytes: None, force: true };
    format(&**device, &options).await.expect("formats");
    TargetStore::open(device.clone(), handle, None).await.expect("opens")
}

/// The content of a page: no two pages have the same.
fn word(blob: u64, page: usize) -> [u8; 8] {
    ((blob << 16) | page as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()
}

fn content(blob: u64, length: usize) -> Bytes {
    let mut buffer = DmaBuf::uninitialised(length);
    for (page, bytes) in buffer.chunks_mut(PAGE).enumerate() {
        bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&word(blob, page)));
    }
    buffer.freeze()
}

async fn put(store: &TargetStore, blob: u64, length: usize) {
    let owner = Owner { high: 0, low: blob };
    let (id, payload) = (BlobId(blob.into()), content(blob, length));
    store.put(id, BlobKind::Data, owner, ShardGeometry::NONE, payload).await.expect("puts");
}

/// Reads a page and compares it.
async fn check(store: &TargetStore, blob: u64, page: usize) {
    let bytes = store.get(BlobId(blob.into()), (page * PAGE) as u32, PAGE as u32).await.expect("gets");
    let expected = word(blob, page);
    let same = bytes.len() == PAGE && bytes.chunks(8).all(|chunk| chunk == expected);
    assert!(same, "page {page} of blob {blob} is not what was written");
}

fn fill(path: String, size_mib: u64) -> impl AsyncFnOnce(Rc<Ring>, Handle) {
    async move |ring: Rc<Ring>, handle: Handle| {
        let store = format_and_open(&open(&path, size_mib, &ring, &handle), &handle).await;
        for blob in 0..store.space().free * 8 / 10 / (BLOB + PAGE) as u64 {
            put(&store, blob, BLOB).await;
        }
    }
}

fn read(path: String, depth: u64, span: Duration) -> impl AsyncFnOnce(Rc<Ring>, Handle) {
    async move |ring: Rc<Ring>, handle: Handle| {
        let store = TargetStore::open(open(&path, 0, &ring, &handle), &handle, None).await.expect("opens");
        let blobs = store.list(BlobKind::Data).len() as u64;
        let measured = Measured::begin(span);
        let readers = (0..depth).map(|reader| {
            let (store, measured) = (&store, &measured);
            async move {
                let mut random = SplitMix64::new(reader + 7);
                let mut count = 0;
                while measured.goes_on() {
                    check(store, random.below(blobs), random.below((BLOB / PAGE) as u64) as usize).await;
                    count += 1;
                }
                count
            }
        });
        let count = join_all(readers).await.iter().sum::<u64>();
        println!("{}", measured.end(count));
    }
}

fn write(path: String, size_mib: u64, depth: u64, span: Duration) -> impl AsyncFnOnce(Rc<Ring>, Handle) {
    async move |ring: Rc<Ring>, handle: Handle| {
        let device = open(&path, size_mib, &ring, &handle);
        let store = format_and_open(&device, &handle).await;
        // Where the time allows more than there is room for, it ends sooner.
        let room = store.space().free / 8;
        let next = Cell::new(0);
        let take = || next.replace(next.get() + 1);
        let flushes = device.flushes.get();
        let measured = Measured::begin(span);
        join_all((0..depth).map(|_| async {
            while store.space().free > room && measured.goes_on() {
                put(&store, take(), PAGE).await;
            }
        }))
        .await;
        let count = next.replace(0);
        let line = measured.end(count);
        let per_flush = count as f64 / (device.flushes.get() - flushes).max(1) as f64;
        join_all((0..depth).map(|_| async {
            while next.get() < count {
                check(&store, take(), 0).await;
            }
        }))
        .await;
        println!("{line} {per_flush:.1}");
    }
}

struct Echo;

impl Service for Echo {
    fn handle(&self, _peer: Peer, request: Message) -> LocalBoxFuture<'_, Message> {
        std::future::ready(request).boxed_local()
    }
}

/// What the round trip of this number carries.
fn ping(number: u64) -> [u8; PING] {
    let mut bytes = [7; PING];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

async fn round_trips(connection: &dyn Connection, span: Duration) -> String {
    let measured = Measured::begin(span);
    let mut count = 0;
    while measured.goes_on() {
        let sent = ping(count);
        let request = Message { opcode: 1, body: Bytes::copy_from_slice(&sent), bulk: Bytes::new() };
        let reply = connection.call(request).await.expect("the server lives");
        assert_eq!(reply.body, sent.as_slice(), "the echo is another");
        count += 1;
    }
    measured.end(count)
}

fn fabric(span: Duration) {
    let (tell, told) = mpsc::channel::<Address>();
    let (stop, mut stopped) = cfs_reactor::mailbox::mailbox::<()>(1);
    let server = thread::spawn(move || {
        on_reactor(async move |ring, handle| {
            let fabric = TcpFabric::new(ring, &handle, None);
            let listener = fabric.listen(&Address("127.0.0.1:0".to_owned()), Rc::new(Echo)).expect("a free port");
            tell.send(listener.address()).expect("the client waits");
            stopped.recv().await;
        });
    });
    let address = told.recv().expect("the server listens");
    on_reactor(async move |ring, handle| {
        let connection = TcpFabric::new(ring, &handle, None).connect(&address).await.expect("the server listens");
        println!("{}", round_trips(&*connection, span).await);
    });
    drop(stop);
    server.join().expect("the server ends");
}

fn sockets(span: Duration) -> std::io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut accepted, _) = listener.accept()?;
    client.set_nodelay(true)?;
    accepted.set_nodelay(true)?;
    let server = thread::spawn(move || {
        let mut bytes = [0; PING];
        while accepted.read_exact(&mut bytes).is_ok() && accepted.write_all(&bytes).is_ok() {}
    });
    let measured = Measured::begin(span);
    let (mut count, mut bytes) = (0, [0; PING]);
    while measured.goes_on() {
        client.write_all(&ping(count))?;
        client.read_exact(&mut bytes)?;
        assert_eq!(bytes, ping(count), "the echo is another");
        count += 1;
    }
    println!("{}", measured.end(count));
    drop(client);
    server.join().expect("the server ends");
    Ok(())
}

/// Writes `NANOSECONDS ROUNDS` over and over: when it was, and how many rounds had been by then.
fn burn(path: &Path) -> std::io::Result<()> {
    let file = File::create(path)?;
    let start = Instant::now();
    let (mut rounds, mut noted) = (0u64, Duration::ZERO);
    let mut state = 1u64;
    loop {
        for _ in 0..BURNT {
            state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
        rounds += BURNT;
        let now = start.elapsed();
        if now - noted >= NOTED {
            noted = now;
            // Of one length, so that who reads it meanwhile gets the whole of one.
            file.write_all_at(format!("{:020} {rounds:020}\n", now.as_nanos()).as_bytes(), 0)?;
        }
    }
}
