//! What the NVMe driver costs: 4 KiB reads at depth 128 from a controller that answers at once.
//! `nvme_bench` prints TSC cycles of a read, with what the controller takes by itself measured in the
//! same run and subtracted. `nvme_bench driver|controller READS` only does so many, for who counts
//! their instructions.

use cfs_device::BlockDevice;
use cfs_device::nvme::NvmeDevice;
use cfs_device::nvme::instant::Instant;
use cfs_device::nvme::model::ModelOptions;
use cfs_reactor::clock::{Clock, KernelClock};
use cfs_reactor::executor::{Driver, Unpark};
use cfs_reactor::{Executor, Handle};
use cfs_wire::Timestamp;
use futures_util::future::join_all;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const BLOCK: usize = 4096;
const DEPTH: u64 = 128;
/// Of each side, alternating; enough that a median says something on a machine that does other things.
const ROUNDS: usize = 31;
const READS_PER_ROUND: u64 = DEPTH * 1500;

/// Nothing comes from outside.
struct Nothing;

impl Driver for Nothing {
    fn poll(&mut self) -> bool {
        false
    }

    fn park(&mut self, _timeout: Option<Duration>) {}

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(Nothing)
    }
}

impl Unpark for Nothing {
    fn unpark(&self) {}
}

/// Steps with each look, so that every run is the same; and valgrind knows no vDSO.
struct Steps(Cell<u64>);

impl Clock for Steps {
    fn now(&self) -> cfs_reactor::Instant {
        self.0.set(self.0.get() + 100);
        cfs_reactor::Instant::from_nanos(self.0.get())
    }

    fn wall(&self) -> Timestamp {
        Timestamp::default()
    }

    fn random(&self) -> u64 {
        self.0.get()
    }

    fn advance_to(&self, _deadline: cfs_reactor::Instant) -> bool {
        false
    }
}

struct Bench {
    handle: Handle,
    device: Rc<NvmeDevice<Rc<Instant>>>,
    controller: Rc<Instant>,
    /// Another one, whose driver does nothing more.
    alone: Rc<Instant>,
    _idle: Rc<NvmeDevice<Rc<Instant>>>,
    /// Commands that the driver rings the doorbell for at once, on average.
    lot: u16,
}

impl Bench {
    async fn new(handle: Handle) -> Bench {
        let (controller, device) = open(&handle).await;
        let (alone, idle) = open(&handle).await;
        let mut bench = Bench { handle, device, controller, alone, _idle: idle, lot: 1 };
        bench.driver(READS_PER_ROUND).await;
        let (commands, doorbells) = bench.controller.counts();
        // Half of the doorbells, about, give entries of completions back; to the controller those are nothing.
        bench.lot = (2 * commands / doorbells).max(1) as u16;
        bench
    }

    async fn driver(&self, reads: u64) {
        let workers = (0..DEPTH).map(|worker| {
            let device = self.device.clone();
            let blocks = device.geometry().size / BLOCK as u64;
            self.handle.spawn(async move {
                for read in 0..reads / DEPTH {
                    // Scattered, and cheaper than random numbers: a prime.
                    let offset = ((worker + read * 1009) & (blocks - 1)) * BLOCK as u64;
                    drop(device.read(offset, BLOCK).await.expect("the controller answers every read"));
                }
            })
        });
        for ended in join_all(workers).await {
            ended.expect("nobody ends a worker");
        }
    }

    fn controller(&self, reads: u64) {
        self.alone.answer_alone(reads, self.lot);
    }
}

async fn open(handle: &Handle) -> (Rc<Instant>, Rc<NvmeDevice<Rc<Instant>>>) {
    let controller = Instant::new(ModelOptions::default(), handle);
    let device = NvmeDevice::open(controller.clone(), 1, handle).await.expect("the model is a usable controller");
    controller.begin();
    (controller, device)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(target_arch = "x86_64")]
async fn cycles(bench: &Bench) {
    use std::arch::x86_64::_rdtsc;
    #[allow(unsafe_code, reason = "reads the time-stamp counter")]
    // SAFETY: every x86-64 has it.
    let now = || unsafe { _rdtsc() };
    let (mut driver, mut controller) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = now();
        bench.driver(READS_PER_ROUND).await;
        driver.push((now() - begun) as f64 / READS_PER_ROUND as f64);
        let begun = now();
        bench.controller(READS_PER_ROUND);
        controller.push((now() - begun) as f64 / READS_PER_ROUND as f64);
    }
    let (driver, controller) = (median(driver), median(controller));
    println!("{ROUNDS} rounds of {READS_PER_ROUND} reads, medians, TSC cycles of a 4 KiB read at depth {DEPTH}:");
    println!("driver and controller {driver:.1}, the controller alone {controller:.1}");
    println!("cycles {:.1}", driver - controller);
}

#[cfg(not(target_arch = "x86_64"))]
async fn cycles(_bench: &Bench) {
    println!("cycles: this processor has no time-stamp counter that can be compared");
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let clock: Rc<dyn Clock> =
        if arguments.is_empty() { Rc::new(KernelClock::new()) } else { Rc::new(Steps(Cell::new(0))) };
    let executor = Executor::new(clock);
    let handle = executor.domain();
    let bench = Bench::new(handle.clone());
    let main = async move {
        let bench = bench.await;
        match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            [] => cycles(&bench).await,
            [side @ ("driver" | "controller"), reads] => {
                let reads = reads.parse().expect("READS is a number");
                if side == "driver" { bench.driver(reads).await } else { bench.controller(reads) }
            }
            _ => panic!("usage: nvme_bench [driver|controller READS]"),
        }
    };
    executor.run(&mut Nothing, Duration::ZERO, &handle, main).expect("nothing ends the executor");
}
