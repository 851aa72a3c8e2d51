//! What every back end must do, on NVMe namespaces through the kernel: `passthru_conformance /dev/ngXnY...`.
//! They are overwritten. `scripts/hwtest` runs it in its guest.

use cfs_device::conformance;
use cfs_device::passthru::PassthruDevice;
use cfs_device::uring::OpenOptions;
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::executor::SPIN_DEFAULT;
use cfs_reactor::uring::Ring;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

fn main() -> ExitCode {
    let ring = Ring::new(64).expect("io_uring");
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let story = {
        let (ring, handle) = (ring.clone(), handle.clone());
        async move {
            for (seed, path) in (1..).zip(std::env::args_os().skip(1)) {
                let path = PathBuf::from(path);
                let device = PassthruDevice::open(&path, &ring, &handle, OpenOptions::default()).await;
                let device = device.map_err(|error| error.to_string())?;
                conformance::all(device.clone(), seed).await;
                let polled = if device.is_polled() { "polled" } else { "by interrupts" };
                let memory = if device.has_registered_buffers() { "registered" } else { "ordinary" };
                println!("{}: conforms, completions {polled}, buffers {memory}", path.display());
            }
            Ok::<(), String>(())
        }
    };
    match executor.run(&mut ring.driver(), SPIN_DEFAULT, &handle, story).expect("runs to its end") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("passthru_conformance: {error}");
            ExitCode::FAILURE
        }
    }
}
