//! Round trips of 64 bytes and streams of 1 MiB over TCP on loopback, between two threads.
//! For tuning: `cargo run --release -p cfs-fabric --example pingpong`.
#![allow(clippy::disallowed_methods, reason = "two threads are two machines here")]

use bytes::Bytes;
use cfs_fabric::tcp::TcpFabric;
use cfs_fabric::{Address, Connection, Fabric, Message, Peer, Service};
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, join_all};
use std::rc::Rc;
use std::time::Duration;

const ECHO: u16 = 1;
/// Keeps the bulk bytes.
const SINK: u16 = 2;
/// Gives 1 MiB.
const SOURCE: u16 = 3;
const MIB: usize = 1 << 20;

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

fn executor(spin: Duration, main: impl AsyncFnOnce(Rc<TcpFabric>, Handle) + 'static) {
    let ring = Ring::new(256).expect("io_uring works");
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let fabric = TcpFabric::new(ring.clone(), &handle);
    let main_handle = handle.clone();
    let run = executor.run(&mut ring.driver(), spin, &handle, async move { main(fabric, main_handle).await });
    run.expect("the main task ends");
}

async fn measure(
    handle: &Handle,
    connection: &dyn Connection,
    calls: usize,
    depth: usize,
    request: Message,
) -> Duration {
    let start = handle.now();
    let lanes = (0..depth).map(|_| async {
        for _ in 0..calls / depth {
            connection.call(request.clone()).await.expect("the server lives");
        }
    });
    join_all(lanes).await;
    handle.now() - start
}

async fn client(connection: Rc<dyn Connection>, handle: Handle) {
    let message = |opcode, length| Message { opcode, body: Bytes::new(), bulk: DmaBuf::zeroed(length).freeze() };
    let small = Message { opcode: ECHO, body: Bytes::from(vec![7; 64]), bulk: Bytes::new() };
    for depth in [1, 16, 64] {
        let calls = 20_000;
        measure(&handle, &*connection, calls / 10, depth, small.clone()).await;
        let took = measure(&handle, &*connection, calls, depth, small.clone()).await;
        let micros = took.as_secs_f64() * 1e6 / calls as f64;
        println!("  64 B echo, depth {depth:2}: {micros:7.2} µs per call");
    }
    for (name, request) in [("write", message(SINK, MIB)), ("read", message(SOURCE, 0))] {
        for depth in [1, 8] {
            let calls = 1_000;
            let took = measure(&handle, &*connection, calls, depth, request.clone()).await;
            let rate = (calls * MIB) as f64 / took.as_secs_f64() / 1e9;
            println!("  1 MiB {name:5}, depth {depth}: {rate:5.2} GB/s");
        }
    }
}

fn main() {
    for spin in [Duration::ZERO, Duration::from_micros(50)] {
        println!("spinning {spin:?} before sleeping:");
        let (tell, told) = std::sync::mpsc::channel::<String>();
        let (stop, stopped) = cfs_reactor::mailbox::mailbox::<()>(1);
        let server = std::thread::spawn(move || {
            executor(spin, async move |fabric, _| {
                let mut stopped = stopped;
                let service = Rc::new(Block { block: DmaBuf::zeroed(MIB).freeze() });
                let listener = fabric.listen(&Address("127.0.0.1:0".to_owned()), service).expect("a free port");
                tell.send(listener.address().0).expect("the client waits");
                stopped.recv().await;
            });
        });
        let address = Address(told.recv().expect("the server listens"));
        executor(spin, async move |fabric, handle| {
            let connection = fabric.connect(&address).await.expect("the server listens");
            client(connection, handle).await;
        });
        drop(stop);
        server.join().expect("the server ends");
    }
}
