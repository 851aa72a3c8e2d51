//! What every back end must do, on NVMe controllers bound to vfio-pci: `nvme_conformance PCI-ADDRESS...`.
//! Their first namespaces are overwritten. `scripts/hwtest` runs it in its guest.

use cfs_device::conformance;
use cfs_device::nvme::NvmeDevice;
use cfs_device::nvme::vfio::VfioBus;
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::executor::SPIN_DEFAULT;
use cfs_reactor::uring::Ring;
use std::process::ExitCode;
use std::rc::Rc;

fn main() -> ExitCode {
    let ring = Ring::new(64).expect("io_uring");
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let story = {
        let handle = handle.clone();
        async move {
            for (seed, address) in (1..).zip(std::env::args().skip(1)) {
                let address = address.parse().map_err(|error| format!("{error}"))?;
                let bus = VfioBus::open(&address).map_err(|error| error.to_string())?;
                let device = NvmeDevice::open(bus, 1, &handle).await.map_err(|error| error.to_string())?;
                conformance::all(device.clone(), seed).await;
                println!("{address}: conforms, {} resets", device.resets());
            }
            Ok::<(), String>(())
        }
    };
    match executor.run(&mut ring.driver(), SPIN_DEFAULT, &handle, story).expect("runs to its end") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nvme_conformance: {error}");
            ExitCode::FAILURE
        }
    }
}
