//! What a target's path stands for: a file or block device, used through io_uring; the character device
//! `/dev/ngXnY` of an NVMe namespace, to which commands go through io_uring; or `nvme:PCI-ADDRESS[/NAMESPACE]`,
//! a controller that is given to vfio-pci and driven by this process.

use cfs_device::nvme::vfio::{PciAddress, VfioBus};
use cfs_device::nvme::{NvmeDevice, NvmeError};
use cfs_device::passthru::{PassthruDevice, is_character_device};
use cfs_device::uring::{OpenOptions, UringDevice};
use cfs_device::{BlockDevice, DeviceError, DeviceResult};
use cfs_reactor::Handle;
use cfs_reactor::uring::Ring;
use futures_util::future::join_all;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

const DRIVEN: &str = "nvme:";

/// Whether it is a device of its own and no path in the file system.
pub fn is_driven(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(DRIVEN))
}

/// What a process has open, from one reactor.
pub struct Devices {
    pub ring: Rc<Ring>,
    handle: Handle,
    driven: RefCell<BTreeMap<PciAddress, Vec<Rc<NvmeDevice<VfioBus>>>>>,
}

impl Devices {
    /// `handle`: of a domain that outlives whoever uses the devices.
    pub fn new(ring: &Rc<Ring>, handle: &Handle) -> Rc<Devices> {
        Rc::new(Devices { ring: ring.clone(), handle: handle.clone(), driven: RefCell::default() })
    }

    /// Opens it for this process alone.
    pub async fn open(&self, path: &Path, options: OpenOptions) -> DeviceResult<Rc<dyn BlockDevice>> {
        let Some(place) = path.to_str().and_then(|path| path.strip_prefix(DRIVEN)) else {
            if is_character_device(path) {
                return Ok(PassthruDevice::open(path, &self.ring, &self.handle, options).await?);
            }
            return Ok(UringDevice::open(path, &self.ring, &self.handle, options)?);
        };
        let (address, namespace) =
            place_of(place).map_err(|why| DeviceError::NotPermitted(format!("target {}: {why}", path.display())))?;
        let others = self.driven.borrow().get(&address).cloned().unwrap_or_default();
        if others.iter().any(|other| other.namespace() == namespace) {
            let name = path.display();
            return Err(DeviceError::InUse(format!("{name}: this namespace is given twice: give it once")));
        }
        let opened = match others.first() {
            Some(other) => other.sibling(namespace).await,
            None => NvmeDevice::open(VfioBus::open(&address)?, namespace, &self.handle).await,
        };
        let device = opened.map_err(|error| match error {
            NvmeError::Bus(error) => error,
            NvmeError::Gone { device } => DeviceError::Gone { device },
            other => DeviceError::Open(other.to_string()),
        })?;
        self.driven.borrow_mut().entry(address).or_default().push(device.clone());
        Ok(device)
    }

    /// Ends in order what asks for it.
    pub async fn close(&self) {
        let driven: Vec<_> = self.driven.take().into_values().flatten().collect();
        join_all(driven.iter().map(|device| device.close())).await;
    }
}

/// The controller, and the namespace, the first if none is named.
fn place_of(place: &str) -> Result<(PciAddress, u32), String> {
    let (address, namespace) = place.split_once('/').unwrap_or((place, "1"));
    let address = address.parse().map_err(|error| format!("{error}"))?;
    match namespace.parse() {
        Ok(namespace @ 1..=0xFFFF_FFFE) => Ok((address, namespace)),
        _ => Err(format!("'{namespace}' is no namespace; give a number from 1 on, as in nvme:{address}/1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_pci_address_and_a_namespace() {
        let place = |text| place_of(text).map(|(address, namespace)| (address.to_string(), namespace));
        assert_eq!(place("0000:01:00.0"), Ok(("0000:01:00.0".to_owned(), 1)));
        assert_eq!(place("01:00.0/7"), Ok(("0000:01:00.0".to_owned(), 7)));
        for wrong in ["01:00.0/0", "01:00.0/x", "01:00.0/4294967295", "01:00.0/"] {
            assert!(place(wrong).unwrap_err().contains("is no namespace"), "{wrong}");
        }
        assert!(place("sda").unwrap_err().contains("is no PCI address"));
        assert!(is_driven(Path::new("nvme:sda")) && !is_driven(Path::new("/dev/nvme0n1")));
    }
}
