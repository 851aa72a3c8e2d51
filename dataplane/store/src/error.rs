//! Why the store refuses or fails. Messages about a device say what to do.

use crate::layout::superblock::Identity;
use cfs_device::DeviceError;
use cfs_wire::BlobId;
use cfs_wire::blobs::BlobKind;

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("blob {0} is not on this target")]
    NotFound(BlobId),
    #[error("blob {0} was deleted; its id is never used again")]
    Deleted(BlobId),
    #[error("blob {0} exists with other contents")]
    Conflict(BlobId),
    #[error("range {offset}+{length} is outside blob {id} of {size} bytes")]
    OutOfRange { id: BlobId, offset: u32, length: u32, size: u32 },
    /// The bytes read do not match their checksum; `page` counts 4 KiB pages of the payload.
    #[error("blob {id}: page {page} in zone {zone} at {offset} does not match its checksum")]
    Corrupt { id: BlobId, page: u32, zone: u32, offset: u32 },
    #[error("a payload of {length} bytes was given; this target takes 1 to {max}")]
    PayloadLength { length: usize, max: u32 },
    #[error("no space: {needed} bytes wanted for {kind:?}")]
    NoSpace { kind: BlobKind, needed: u64 },
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A write or flush failed earlier, so what is durable is not known any more.
    #[error(
        "device {device} takes no writes since an earlier failure: {reason}; replace it, or restart after repairing it"
    )]
    Fenced { device: String, reason: String },
    #[error("the store is closed")]
    Closed,

    #[error("device {device} already belongs to {owner}; use --force to erase it")]
    AlreadyFormatted { device: String, owner: Identity },
    #[error("device {device} has format version {version}, this program knows up to {supported}: use a newer cfs")]
    NewerVersion { device: String, version: u32, supported: u32 },
    #[error("device {device} uses features {features:#x} that this program does not know: use a newer cfs")]
    UnknownFeatures { device: String, features: u64 },
    /// `found`: what it is, where its format is known.
    #[error(
        "device {device} holds {}, not a cfs target: check the path; only format with --force erases it",
        found.unwrap_or("something unknown")
    )]
    Foreign { device: String, found: Option<&'static str> },
    #[error("device {device} is blank: check the path; cfs format and cfs replace make targets of blank devices")]
    Blank { device: String },
    #[error(
        "device {device}: both superblock copies are damaged ({detail}); restore from redundancy: format it with --force and let repair fill it"
    )]
    SuperblockCorrupt { device: String, detail: String },
    #[error("device {device} belongs to {found}, expected was {expected}: check the configured device paths")]
    WrongIdentity { device: String, found: Identity, expected: Identity },
    #[error("device {device} has {size} bytes, {needed} are needed: use a larger one, or the whole of it")]
    TooSmall { device: String, size: u64, needed: u64 },
    #[error("a zone size of {zone_bytes} bytes is not a power of two between {min} and {max}")]
    ZoneSize { zone_bytes: u32, min: u32, max: u32 },
}

impl StoreError {
    /// Whether waiting (for deletes, for the collector) can help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::NoSpace { .. })
    }

    pub fn is_corrupt(&self) -> bool {
        matches!(self, StoreError::Corrupt { .. })
    }

    /// Whether the device holds what is not ours to use or to do without: a newer program's target, or
    /// something else altogether.
    pub fn is_anothers(&self) -> bool {
        matches!(
            self,
            StoreError::NewerVersion { .. }
                | StoreError::UnknownFeatures { .. }
                | StoreError::Foreign { found: Some(_), .. }
        )
    }

    /// Whether the device, not the request, is at fault.
    pub fn is_device_failure(&self) -> bool {
        matches!(self, StoreError::Device(_) | StoreError::Fenced { .. })
    }
}
