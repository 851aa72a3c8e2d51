//! How fast one target is on a file or block device: sequential 1 MiB puts, then random 4 KiB
//! reads, checksums on, and 4 KiB puts that are durable when they are answered, at the depth and one at a
//! time; then how long it takes to open. `store_bench PATH SIZE_MIB DEPTH [BLOB_KIB]`; PATH is erased.
//! BLOB_KIB: puts of this size instead of 1 MiB.
//!
//! Prints `NAME RATE UNIT cpu MICROSECONDS-PER-OPERATION`, and for writes how many of them one
//! flush covered, so that a yardstick can flush as often.

use bytes::Bytes;
use cfs_device::uring::{OpenOptions, UringDevice};
use cfs_device::{BlockDevice, DeviceGeometry, DeviceResult, Placement};
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::clock::{KernelClock, SplitMix64};
use cfs_reactor::executor::SPIN_DEFAULT;
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use cfs_store::{FormatOptions, Identity, StoreError, TargetStore, format};
use cfs_wire::blobs::{BlobKind, Owner, ShardGeometry};
use cfs_wire::cluster::ClusterParameters;
use cfs_wire::{BlobId, ClusterId, DeviceId, NodeId, Policy, TargetId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::time::{ClockId, clock_gettime};
use std::cell::Cell;
use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;

/// Counts how often the store makes a device durable, by flush or by FUA, and what it reads.
struct Counting {
    device: Rc<dyn BlockDevice>,
    flushes: Cell<u64>,
    reads: Cell<u64>,
    bytes_read: Cell<u64>,
}

impl BlockDevice for Counting {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn geometry(&self) -> DeviceGeometry {
        self.device.geometry()
    }

    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        self.reads.set(self.reads.get() + 1);
        self.bytes_read.set(self.bytes_read.get() + length as u64);
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
        self.device.discard(offset, length).boxed_local()
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.device.settle(offset, length)
    }
}

/// Processor time of this process, user and system.
/// Of the whole process, the kernel's io_uring workers too.
fn cpu_seconds() -> f64 {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

const READS: u64 = 200_000;
const SMALL_PUTS: u64 = 16_384;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, size, depth, blob_kib) = match arguments.as_slice() {
        [path, size, depth] => (path, size, depth, "1024"),
        [path, size, depth, blob_kib] => (path, size, depth, blob_kib.as_str()),
        _ => {
            eprintln!("usage: store_bench PATH SIZE_MIB DEPTH [BLOB_KIB]");
            std::process::exit(2);
        }
    };
    let blob = blob_kib.parse::<usize>().expect("BLOB_KIB is a number") << 10;
    let (path, size) = (PathBuf::from(path), size.parse::<u64>().expect("SIZE_MIB is a number") << 20);
    let depth: u64 = depth.parse().expect("DEPTH is a number");
    let ring = Ring::new(1024).expect("io_uring");
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let story = {
        let (ring, handle) = (ring.clone(), handle.clone());
        async move {
            let options = OpenOptions { create_size: (!path.exists()).then_some(size), ..OpenOptions::default() };
            let device = UringDevice::open(&path, &ring, &handle, options).expect("opens");
            let identity =
                Identity { cluster: ClusterId(1), node: NodeId(1), target: TargetId(1), device: DeviceId(1) };
            let policy = Policy::new(1, 0).expect("1+0 is a policy");
            let parameters = ClusterParameters {
                format: ClusterParameters::FORMAT,
                shards: 1,
                policy,
                tolerated: 0,
                targets: 1,
                name_key: [0; 32],
            };
            let options = FormatOptions { identity, parameters, zone_bytes: None, force: true };
            format(&*device, &options).await.expect("formats");
            let device =
                Rc::new(Counting { device, flushes: Cell::new(0), reads: Cell::new(0), bytes_read: Cell::new(0) });
            let store = TargetStore::open(device.clone(), &handle, None).await.expect("opens");
            let count = store.space().free * 8 / 10 / (blob as u64 + 4096);
            let name = if blob == 1 << 20 { "seqwrite1m".to_owned() } else { format!("seqwrite{}k", blob >> 10) };
            write(&store, &handle, 0..count, depth, &device, (blob, &name)).await;
            // A header page each, at most, when it is alone.
            let small = SMALL_PUTS.min(store.space().free / 2 / 8192);
            let (first, last) = (count..count + small, count + small..count + small + small / 16);
            write(&store, &handle, first, depth, &device, (4096, "write4k_durable")).await;
            write(&store, &handle, last, 1, &device, (4096, "write4k_alone")).await;
            read(&store, &handle, count, depth, blob).await;
            drop(store);
            reopen(&handle, &device).await;
        }
    };
    executor.run(&mut ring.driver(), SPIN_DEFAULT, &handle, story).expect("runs to its end");
}

async fn write(
    store: &Rc<TargetStore>,
    handle: &Handle,
    ids: Range<u64>,
    depth: u64,
    device: &Counting,
    (blob, name): (usize, &str),
) {
    let count = ids.end - ids.start;
    let mut random = SplitMix64::new(1);
    let mut buffer = DmaBuf::uninitialised(blob);
    buffer.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.next_u64().to_le_bytes()));
    let payload: Bytes = buffer.freeze();
    let (start, cpu, flushes) = (handle.now(), cpu_seconds(), device.flushes.get());
    let workers = (0..depth).map(|worker| {
        let (store, payload, ids) = (store.clone(), payload.clone(), ids.clone());
        handle.spawn(async move {
            for id in ids.skip(worker as usize).step_by(depth as usize) {
                let owner = Owner { high: 0, low: id };
                let id = BlobId(u128::from(id));
                store.put(id, BlobKind::Data, owner, ShardGeometry::NONE, payload.clone()).await?;
            }
            Ok::<(), StoreError>(())
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.expect("not cancelled").expect("puts");
    }
    let seconds = (handle.now() - start).as_secs_f64();
    let per_flush = count as f64 / (device.flushes.get() - flushes).max(1) as f64;
    let cpu = (cpu_seconds() - cpu) * 1e6 / count as f64;
    let mib_per_second = (count * blob as u64) as f64 / (1 << 20) as f64 / seconds;
    println!("{name} {mib_per_second:.0} MiB/s cpu {cpu:.1} per_flush {per_flush:.1}");
}

async fn read(store: &Rc<TargetStore>, handle: &Handle, count: u64, depth: u64, blob: usize) {
    let (start, cpu) = (handle.now(), cpu_seconds());
    let workers = (0..depth).map(|worker| {
        let store = store.clone();
        handle.spawn(async move {
            let mut random = SplitMix64::new(worker + 7);
            for _ in 0..READS / depth {
                let offset = random.below(blob as u64 / 4096) as u32 * 4096;
                store.get(BlobId(random.below(count).into()), offset, 4096).await?;
            }
            Ok::<(), StoreError>(())
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.expect("not cancelled").expect("gets");
    }
    let seconds = (handle.now() - start).as_secs_f64();
    let cpu = (cpu_seconds() - cpu) * 1e6 / READS as f64;
    println!("randread4k {:.0} IOPS cpu {cpu:.1}", READS as f64 / seconds);
}

async fn reopen(handle: &Handle, device: &Rc<Counting>) {
    let (start, cpu) = (handle.now(), cpu_seconds());
    let before = (device.reads.get(), device.bytes_read.get());
    let store = TargetStore::open(device.clone(), handle, None).await.expect("opens");
    let (seconds, cpu) = ((handle.now() - start).as_secs_f64(), cpu_seconds() - cpu);
    let reads = device.reads.get() - before.0;
    let mib = (device.bytes_read.get() - before.1) >> 20;
    println!("open {seconds:.3} s cpu {cpu:.2} blobs {} reads {reads} MiB {mib}", store.recovery().blobs);
}
