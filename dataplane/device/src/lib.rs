//! The block device seam: what the store writes to, and its back ends.
//!
//! A [`BlockDevice`] reads and writes aligned ranges, flushes its volatile cache, and discards.
//! Back ends: [`uring`] (regular files and block devices, O_DIRECT), [`nvme`] (NVMe controllers
//! driven from user space), [`passthru`] (NVMe commands through the kernel's driver) and [`mem`] (in
//! memory, seeded, with every fault a device can have). A device belongs to one executor. What every
//! back end must do is written down as tests in [`conformance`].
//!
//! It knows nothing of zones, blobs or checksums; those are the store's.

pub mod conformance;
pub mod mem;
#[allow(unsafe_code, reason = "shares memory with devices")]
pub mod nvme;
#[allow(unsafe_code, reason = "asks the kernel for what has no safe call, and hands memory to devices")]
pub mod passthru;
pub mod uring;

use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use futures_util::future::LocalBoxFuture;

/// What a device is and asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceGeometry {
    /// Capacity in bytes, a multiple of `block`.
    pub size: u64,
    /// Offsets, lengths and buffer addresses are multiples of this (512 to 4096; a power of two).
    pub block: u32,
    /// Largest single transfer in bytes; the device splits what is longer.
    pub transfer_max: u32,
    /// Whether acknowledged writes may sit in a volatile cache until a flush.
    pub volatile_cache: bool,
    /// Whether it is good to discard what holds nothing any more. Not so where the space would
    /// then be anybody's, and a later write could find it taken: in a file.
    pub discards: bool,
}

/// What a device says of its own state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceHealth {
    pub warnings: HealthWarnings,
    /// Of the whole device, in degrees Celsius.
    pub temperature_c: i32,
    /// Of the spare capacity, and below what it warns.
    pub spare_percent: u8,
    pub spare_percent_min: u8,
    /// Of the life its maker expects; may exceed 100.
    pub used_percent: u8,
    /// Bytes that it could not bring back as they were written, in events.
    pub media_errors: u64,
    pub unsafe_shutdowns: u64,
    pub power_on_hours: u64,
    /// Reclaim unit handles by which it keeps apart what dies at different times; 0 if that is not used.
    pub placement_handles: u16,
}

/// What it warns of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HealthWarnings {
    pub spare_is_low: bool,
    pub temperature: bool,
    pub unreliable: bool,
    pub read_only: bool,
    pub backup_failed: bool,
}

/// What dies together, from what dies soonest on: the hint given to FDP or ZNS. Others ignore it. The store
/// has one for each of its streams of appends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Placement {
    /// Cut off at its end all the time.
    Log = 0,
    /// Small writes, until they are packed.
    Hot = 1,
    /// Runs of the ordered store, until they are merged.
    Metadata = 2,
    Data = 3,
    Parity = 4,
    /// What has outlived others of its kind already.
    Relocated = 5,
}

impl Placement {
    pub const ALL: [Placement; 6] =
        [Placement::Log, Placement::Hot, Placement::Metadata, Placement::Data, Placement::Parity, Placement::Relocated];
}

/// Whether a range is aligned and lies on the device.
#[inline]
pub(crate) fn check_range(
    device: &str,
    geometry: &DeviceGeometry,
    operation: &'static str,
    offset: u64,
    length: u64,
) -> DeviceResult<()> {
    // A power of two.
    let aligned = (offset | length) & (u64::from(geometry.block) - 1) == 0;
    if aligned && offset.checked_add(length).is_some_and(|end| end <= geometry.size) {
        return Ok(());
    }
    Err(DeviceError::Invalid { device: device.to_owned(), operation, offset, length, block: geometry.block })
}

/// As [`check_range`] for each part of a write and for their sum, which it returns.
pub(crate) fn check_write(device: &str, geometry: &DeviceGeometry, offset: u64, parts: &[Bytes]) -> DeviceResult<u64> {
    let mut end = offset;
    for part in parts {
        check_range(device, geometry, "write", end, part.len() as u64)?;
        end += part.len() as u64;
    }
    check_range(device, geometry, "write", offset, end - offset)?;
    Ok(end - offset)
}

/// Why a device operation failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("device {device}: {operation} of {length} bytes at {offset} failed: {detail}")]
    Io { device: String, operation: &'static str, offset: u64, length: u64, detail: String },
    #[error("device {device}: {operation} of {length} bytes at {offset} is not aligned to {block} or beyond its end")]
    Invalid { device: String, operation: &'static str, offset: u64, length: u64, block: u32 },
    #[error("device {device} is gone")]
    Gone { device: String },
    /// It is there for us only, or not all of it.
    #[error(
        "device {device} {why}: let the others take over what it holds (cfsctl check --repair), then stop the server \
         and replace it"
    )]
    Detached { device: String, why: String },
    #[error("device {device} does not support {what}")]
    Unsupported { device: String, what: &'static str },
    #[error("{0}")]
    Open(String),
    /// Somebody else has it open, and writes to it perhaps.
    #[error("{0}")]
    InUse(String),
    /// It is there, but this user may not write to it, or nobody may: it is not lost.
    #[error("{0}")]
    NotPermitted(String),
}

impl DeviceError {
    /// Whether the whole device is lost, not just a range of it.
    pub fn is_gone(&self) -> bool {
        matches!(self, DeviceError::Gone { .. })
    }
}

pub type DeviceResult<T> = Result<T, DeviceError>;

/// A device of fixed size, written in aligned blocks.
///
/// A write that was answered is readable, but survives a power cut only once a later `flush`
/// was answered (or if it was written with `fua`). Writes under way at a power cut may be
/// wholly, partly or not applied, block by block.
///
/// An operation may begin when it is asked for, and takes a place on the device until its future ends: who
/// has several polls all of them.
pub trait BlockDevice: 'static {
    /// A name for messages: a path, a PCI address.
    fn name(&self) -> &str;

    fn geometry(&self) -> DeviceGeometry;

    /// Whether all of what was opened is still there. A file that was deleted serves whoever has it open,
    /// and is gone with the process. A device that can't lose itself that way answers Ok.
    fn attached(&self) -> DeviceResult<()> {
        Ok(())
    }

    /// Reads `length` bytes at `offset`, both multiples of the block size.
    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>>;

    /// Writes `parts` one after the other at `offset`. Every part's length is a multiple of the
    /// block size; a part whose memory is not page-aligned is copied first. With `fua` the data
    /// is durable when answered.
    fn write(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>>;

    /// Makes every write answered before this call durable.
    fn flush(&self) -> LocalBoxFuture<'_, DeviceResult<()>>;

    /// Tells the device that a range holds nothing any more. What it reads afterwards is
    /// unspecified. A device without the command answers Ok.
    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>>;

    /// Gets a range ready that holds nothing and will soon be written in small durable pieces. In
    /// a file, blocks that are allocated but were never written cost the flush after their first
    /// write a commit of the file system's journal; this writes them once, in large pieces. What
    /// the range reads afterwards is unspecified, and nobody may write to it meanwhile. A device
    /// that gains nothing answers Ok.
    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>>;

    /// What the device says of its own state; `None` if it does not tell.
    fn health(&self) -> LocalBoxFuture<'_, DeviceResult<Option<DeviceHealth>>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Ends in order, as a device asks for before its power may go: what is under way is waited for, for
    /// some seconds at most. Nothing can be done with it afterwards.
    fn close(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}
