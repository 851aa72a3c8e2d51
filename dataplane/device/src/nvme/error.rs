//! What keeps a controller from being used.

use super::spec::{NamespaceError, Status};
use crate::DeviceError;

/// Why a controller can't be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NvmeError {
    #[error("NVMe controller {device} is gone from the bus")]
    Gone { device: String },
    #[error("NVMe controller {device} was reset by others while it was brought up")]
    Undone { device: String },
    #[error("NVMe controller {device} does not become {state} within {seconds} s (status register {status:#x})")]
    NotReady { device: String, state: &'static str, seconds: u64, status: u32 },
    #[error("NVMe controller {device} has failed (status register {status:#x}); power-cycle it")]
    Fatal { device: String, status: u32 },
    #[error("NVMe controller {device} {what}, which this driver does not support")]
    Unsupported { device: String, what: &'static str },
    #[error("NVMe controller {device} refuses to {what}: {status}")]
    Refused { device: String, what: &'static str, status: Status },
    #[error("NVMe controller {device} does not answer when asked to {what}")]
    Silent { device: String, what: &'static str },
    #[error("namespace {namespace} of NVMe controller {device} can't be used: {why}")]
    Namespace { device: String, namespace: u32, why: NamespaceError },
    #[error(transparent)]
    Bus(#[from] DeviceError),
}
