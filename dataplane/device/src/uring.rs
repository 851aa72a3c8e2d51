//! Regular files and block devices through the executor's io_uring, with O_DIRECT.
//!
//! Start at [`UringDevice::open`]. A device is locked while open: a second server on the same
//! file or disk would destroy it. Writes go past the page cache; `fua` is RWF_DSYNC, a flush is
//! fdatasync, a discard punches a hole. A file would then share its free space with the file system,
//! and a later write there could find it full, so a file's geometry says that it is not to be
//! discarded.
//!
//! The file and the buffers are registered with the ring where the kernel allows it.
//!
//! Where the device has poll queues, reads and writes go through the executor's polled ring
//! ([`polled`]); flushes and FUA writes, which no device polls for, go through the other.

mod open;
mod polled;
mod settle;

pub use open::OpenOptions;
pub(crate) use open::open_block_device;
pub(crate) use polled::queue_is_polled;

use open::Opened;
use polled::Polled;

use crate::{BlockDevice, DeviceError, DeviceGeometry, DeviceResult, Placement, check_range, check_write};
use bytes::{Buf, Bytes};
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::uring::{Errno, PARTS_MAX, Ring, RingFile};
use cfs_reactor::{Handle, Instant};
use cfs_wire::limits::{BLOB_BYTES_MAX, PAGE};
use futures_util::future::LocalBoxFuture;
use rustix::fs::{AtFlags, FallocateFlags, FileType, StatxFlags, statx};
use rustix::io::ReadWriteFlags;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// The largest blob with a header of one page. Only appends of many blobs are longer: they go in two
/// transfers.
const TRANSFER_MAX: usize = BLOB_BYTES_MAX + PAGE;

/// An operation that takes longer is logged: the disk is failing or overloaded.
const SLOW: Duration = Duration::from_secs(5);

/// An open file or block device.
pub struct UringDevice {
    name: String,
    file: Rc<RingFile>,
    ring: Rc<Ring>,
    polled: RefCell<Option<Polled>>,
    handle: Handle,
    geometry: DeviceGeometry,
    /// What the addresses of buffers must be multiples of.
    memory_align: usize,
    read_only: bool,
    unwritten_extents: bool,
}

/// The operation an error or a log line speaks of.
#[derive(Clone, Copy)]
struct Request {
    operation: &'static str,
    offset: u64,
    length: u64,
}

impl UringDevice {
    /// Opens and locks a regular file or block device. It stays locked until this is dropped.
    pub fn open(path: &Path, ring: &Rc<Ring>, handle: &Handle, options: OpenOptions) -> DeviceResult<Rc<UringDevice>> {
        let opened = open::open(path, &options)?;
        let polled = match polled::probe(ring, &opened.file) {
            Ok(polled) => Some(polled),
            Err(reason) => {
                tracing::info!(device = %path.display(), reason, "completions of this target are not polled for");
                None
            }
        };
        Ok(UringDevice::assemble(path, ring, handle, options, opened, polled))
    }

    fn assemble(
        path: &Path,
        ring: &Rc<Ring>,
        handle: &Handle,
        options: OpenOptions,
        opened: Opened,
        polled: Option<Polled>,
    ) -> Rc<UringDevice> {
        Rc::new(UringDevice {
            name: path.display().to_string(),
            file: ring.file(opened.file),
            ring: ring.clone(),
            polled: RefCell::new(polled),
            handle: handle.clone(),
            geometry: DeviceGeometry {
                size: opened.size,
                block: opened.block,
                transfer_max: TRANSFER_MAX as u32,
                volatile_cache: true,
                discards: opened.is_block_device,
            },
            memory_align: opened.memory_align as usize,
            read_only: options.read_only,
            unwritten_extents: opened.unwritten_extents,
        })
    }

    /// Where reads, and writes that need not be durable, go.
    fn transfers(&self) -> (Rc<Ring>, Rc<RingFile>) {
        match &*self.polled.borrow() {
            Some(polled) => (polled.ring.clone(), polled.file.clone()),
            None => self.announced(),
        }
    }

    fn announced(&self) -> (Rc<Ring>, Rc<RingFile>) {
        (self.ring.clone(), self.file.clone())
    }

    /// Whether a refused transfer is to be tried again, because it was a polled one.
    fn stops_polling(&self, ring: &Rc<Ring>) -> bool {
        if Rc::ptr_eq(ring, &self.ring) {
            return false;
        }
        if self.polled.take().is_some() {
            tracing::info!(device = self.name, "a polled transfer was refused: completions are not polled for");
        }
        true
    }

    fn failed(&self, request: Request, errno: Errno) -> DeviceError {
        let Request { operation, offset, length } = request;
        let device = self.name.clone();
        match errno {
            Errno::NXIO | Errno::NODEV => DeviceError::Gone { device },
            _ => DeviceError::Io { device, operation, offset, length, detail: errno.to_string() },
        }
    }

    fn ended_early(&self, request: Request) -> DeviceError {
        let Request { operation, offset, length } = request;
        let detail = "nothing was transferred: the file became shorter".to_owned();
        DeviceError::Io { device: self.name.clone(), operation, offset, length, detail }
    }

    fn check_writable(&self) -> DeviceResult<()> {
        match self.read_only {
            true => {
                Err(DeviceError::Unsupported { device: self.name.clone(), what: "writing: it was opened read-only" })
            }
            false => Ok(()),
        }
    }

    fn warn_if_slow(&self, request: Request, start: Instant) {
        let took = self.handle.now_coarse() - start;
        if took >= SLOW {
            let Request { operation, offset, length } = request;
            tracing::warn!(device = self.name, operation, offset, length, ?took, "slow device");
        }
    }

    async fn read_whole(&self, offset: u64, length: usize) -> DeviceResult<DmaBuf> {
        let request = Request { operation: "read", offset, length: length as u64 };
        check_range(&self.name, &self.geometry, request.operation, offset, request.length)?;
        let start = self.handle.now_coarse();
        let mut buffer = DmaBuf::uninitialised(length);
        let mut done = 0;
        while done < length {
            let end = length.min(done + TRANSFER_MAX);
            let (ring, file) = self.transfers();
            let (read, back) = ring.read_range_at(&file, buffer, done..end, offset + done as u64).await;
            buffer = back;
            match read {
                Ok(0) => return Err(self.ended_early(request)),
                Ok(read) => done += read,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::OPNOTSUPP) if self.stops_polling(&ring) => {}
                Err(errno) => return Err(self.failed(request, errno)),
            }
        }
        self.warn_if_slow(request, start);
        Ok(buffer)
    }

    async fn write_whole(&self, offset: u64, parts: Vec<Bytes>, fua: bool) -> DeviceResult<()> {
        let length = check_write(&self.name, &self.geometry, offset, &parts)?;
        let request = Request { operation: "write", offset, length };
        self.check_writable()?;
        let start = self.handle.now_coarse();
        let flags = if fua { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
        let mut position = offset;
        for batch in self.batches(parts) {
            let mut left = batch;
            while !left.is_empty() {
                let (ring, file) = if fua { self.announced() } else { self.transfers() };
                let (written, back) = ring.write_at(&file, left, position, flags).await;
                left = back;
                match written {
                    Ok(0) => return Err(self.ended_early(request)),
                    Ok(written) => {
                        position += written as u64;
                        advance(&mut left, written);
                    }
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    Err(Errno::OPNOTSUPP) if self.stops_polling(&ring) => {}
                    Err(errno) => return Err(self.failed(request, errno)),
                }
            }
        }
        self.warn_if_slow(request, start);
        Ok(())
    }

    /// Parts in aligned memory, grouped so that each group is one transfer.
    fn batches(&self, parts: Vec<Bytes>) -> Vec<Vec<Bytes>> {
        let mut batches = Vec::new();
        let mut batch: Vec<Bytes> = Vec::with_capacity(parts.len().min(PARTS_MAX));
        let mut room = TRANSFER_MAX;
        for mut part in parts {
            while !part.is_empty() {
                if room == 0 || batch.len() == PARTS_MAX {
                    batches.push(std::mem::take(&mut batch));
                    room = TRANSFER_MAX;
                }
                let piece = part.split_to(part.len().min(room));
                room -= piece.len();
                batch.push(self.aligned(piece));
            }
        }
        batches.push(batch);
        batches
    }

    fn aligned(&self, part: Bytes) -> Bytes {
        match (part.as_ptr() as usize).is_multiple_of(self.memory_align) {
            true => part,
            false => DmaBuf::copy_of(&part).freeze(),
        }
    }

    async fn sync(&self) -> DeviceResult<()> {
        let request = Request { operation: "flush", offset: 0, length: 0 };
        let start = self.handle.now_coarse();
        // Never tried again: the kernel reports lost data once.
        self.ring.sync(&self.file, true).await.map_err(|errno| self.failed(request, errno))?;
        self.warn_if_slow(request, start);
        Ok(())
    }

    async fn punch(&self, offset: u64, length: u64) -> DeviceResult<()> {
        let request = Request { operation: "discard", offset, length };
        check_range(&self.name, &self.geometry, request.operation, offset, length)?;
        self.check_writable()?;
        if length == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self.ring.fallocate(&self.file, mode, offset, length).await {
            Ok(_) => Ok(()),
            // The device or file system has no such command, which changes nothing.
            Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(self.failed(request, errno)),
        }
    }
}

/// Drops the first `count` bytes.
fn advance(parts: &mut Vec<Bytes>, mut count: usize) {
    let whole = parts.iter().take_while(|part| {
        let within = part.len() <= count;
        if within {
            count -= part.len();
        }
        within
    });
    let whole = whole.count();
    parts.drain(..whole);
    if let Some(first) = parts.first_mut() {
        first.advance(count);
    }
}

impl BlockDevice for UringDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    fn attached(&self) -> DeviceResult<()> {
        let detached = |why| Err(DeviceError::Detached { device: self.name.clone(), why });
        // What the kernel knows: a file system that would have to ask somebody is not waited for.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let wanted = StatxFlags::TYPE | StatxFlags::NLINK | StatxFlags::SIZE;
        match statx(&*self.file, "", flags, wanted) {
            Ok(stat) if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::RegularFile => Ok(()),
            Ok(stat) if stat.stx_nlink == 0 => detached("was deleted".to_owned()),
            Ok(stat) if stat.stx_size < self.geometry.size => {
                detached(format!("was cut off at {} of {} bytes", stat.stx_size, self.geometry.size))
            }
            // What can't be looked at may be there all the same.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        Box::pin(self.read_whole(offset, length))
    }

    fn write(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        _placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.write_whole(offset, parts, fua))
    }

    fn flush(&self) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.sync())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.punch(offset, length))
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.settle_unwritten(offset, length))
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
