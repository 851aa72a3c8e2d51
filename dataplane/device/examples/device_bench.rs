//! Random reads and writes per second of a target, by block length and queue depth:
//! `cargo run --release -p cfs-device --example device_bench -- PATH [SECONDS]`.
//! Creates the file (256 MiB) if it is not there, and overwrites what is in it.

use cfs_device::uring::{OpenOptions, UringDevice};
use cfs_device::{BlockDevice, Placement, conformance::pattern};
use cfs_reactor::clock::{KernelClock, SplitMix64};
use cfs_reactor::uring::Ring;
use cfs_reactor::{Executor, Handle};
use futures_util::future::join_all;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 256 << 20;

async fn measure(device: Rc<UringDevice>, handle: Handle, write: bool, length: usize, depth: u64, time: Duration) {
    let start = handle.now();
    let workers = (0..depth).map(async |worker| {
        let mut random = SplitMix64::new(worker);
        let bytes = pattern(worker, length);
        let mut count = 0u64;
        while handle.now() - start < time {
            let offset = random.below(device.geometry().size / length as u64) * length as u64;
            match write {
                true => device.write(offset, vec![bytes.clone()], Placement::Data, false).await.unwrap(),
                false => drop(device.read(offset, length).await.unwrap()),
            }
            count += 1;
        }
        count
    });
    let count: u64 = join_all(workers).await.into_iter().sum();
    let seconds = (handle.now() - start).as_secs_f64();
    let (rate, bandwidth) = (count as f64 / seconds, (count * length as u64) as f64 / seconds / 1e6);
    let what = if write { "write" } else { "read" };
    println!("{what:5} {:5} KiB depth {depth:3}: {rate:9.0}/s {bandwidth:7.0} MB/s", length >> 10);
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().expect("usage: device_bench PATH [SECONDS]"));
    let seconds = arguments.next().map_or(1.0, |text| text.parse().expect("SECONDS is a number"));
    let ring = Ring::new(256).expect("io_uring");
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let (main_ring, main_handle) = (ring.clone(), handle.clone());
    let main = async move {
        let create_size = (!path.exists()).then_some(SIZE);
        let options = OpenOptions { create_size, ..OpenOptions::default() };
        let device = UringDevice::open(&path, &main_ring, &main_handle, options).unwrap();
        for (length, depth) in [(4096, 1), (4096, 32), (64 << 10, 8), (1 << 20, 4)] {
            for write in [true, false] {
                let time = Duration::from_secs_f64(seconds);
                measure(device.clone(), main_handle.clone(), write, length, depth, time).await;
            }
        }
    };
    executor.run(&mut ring.driver(), Duration::from_micros(50), &handle, main).unwrap();
}
