//! NVMe namespaces through the kernel's character devices `/dev/ngXnY`: commands as the controller takes
//! them, by io_uring, without the kernel's block layer in the path.
//!
//! Start at [`PassthruDevice::open`]. What the namespace is, the controller says ([`identify`]); whether
//! somebody else uses it, its block device `/dev/nvmeXnY` does, which is held exclusively meanwhile
//! ([`open`]). Whether it can be reached now, its controllers' states do ([`paths`]). How a range becomes
//! commands is in [`transfer`]. Queues, time-outs and resets stay the kernel's.
//!
//! Where the device has poll queues, reads and writes are polled for. Flushes and deallocations, which may
//! take long, are announced by an interrupt.

mod identify;
mod open;
mod paths;
mod transfer;

pub use open::is_character_device;

use crate::nvme::spec::{self, Status};
use crate::uring::OpenOptions;
use crate::{BlockDevice, DeviceError, DeviceGeometry, DeviceResult, Placement, check_range, check_write};
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::uring::{Errno, NvmeCommand, NvmeData, Operation, Ring, RingFile, Wide};
use futures_util::future::{LocalBoxFuture, try_join_all};
use open::{NOT_TAKEN, Opened};
use paths::{Paths, Reach};
use std::cell::{Cell, RefCell};
use std::future::ready;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use transfer::{Data, Order};

/// How long after a command that may succeed then is sent again.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How often one is that the controller says so of.
const RETRIES_BY_CONTROLLER: u32 = 3;
/// How often one is that was under way when the controller was reset, which the kernel does when it was not
/// answered for half a minute.
const RETRIES_BY_RESET: u32 = 5;
/// How often one is that did not come to the controller, though one is live: for ten seconds. The kernel
/// takes commands only a moment after it calls it live.
const RETRIES_ON_THE_WAY: u32 = 100;
/// How often one is while no controller is live and one may become so: for two minutes. What a controller may
/// take to become ready, two thirds of that at most, it says itself (CAP.TO).
const RETRIES_COMING: u32 = 1200;

/// A way to the namespace through one ring.
#[derive(Clone)]
struct Way {
    ring: Rc<Ring<Wide>>,
    file: Rc<RingFile<Wide>>,
}

/// An NVMe namespace.
pub struct PassthruDevice {
    name: String,
    announced: Way,
    polled: RefCell<Option<Way>>,
    /// Whether commands name registered memory as such.
    registered: Cell<bool>,
    /// The block device, which nobody else can take meanwhile. Each command holds it, too.
    held: Rc<OwnedFd>,
    paths: Paths,
    /// Whether a command waits for a controller to become live, which is said once.
    waits: Cell<bool>,
    handle: Handle,
    namespace: u32,
    geometry: DeviceGeometry,
    /// Of the blocks that commands count in.
    block_shift: u32,
    read_only: bool,
}

/// What an error speaks of.
#[derive(Clone, Copy)]
struct Request {
    operation: &'static str,
    offset: u64,
    length: u64,
}

/// How a command ended that did not succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failure {
    Status(Status),
    Refused(Errno),
}

impl Failure {
    /// Of a completion's result.
    fn of(result: Result<usize, Errno>) -> Result<(), Failure> {
        match result {
            Ok(status) if Status(status as u16).is_success() => Ok(()),
            Ok(status) => Err(Failure::Status(Status(status as u16))),
            Err(errno) => Err(Failure::Refused(errno)),
        }
    }

    /// Whether the command may not have come to a controller. EINVAL is a wrong command otherwise.
    fn is_on_the_way(self) -> bool {
        match self {
            // Path related: the kernel itself says so.
            Failure::Status(status) => status.may_be_retried() && status.code().0 == 3,
            Failure::Refused(errno) => matches!(errno, Errno::AGAIN | Errno::INVAL),
        }
    }

    /// How often the same command is sent again to a live controller, since it may succeed then.
    fn retries_max(self) -> u32 {
        match self {
            _ if self.is_on_the_way() => RETRIES_ON_THE_WAY,
            Failure::Status(status) if status.may_be_retried() => RETRIES_BY_CONTROLLER,
            Failure::Refused(Errno::INTR) => RETRIES_BY_RESET,
            _ => 0,
        }
    }

    fn told(self, device: &str, request: Request) -> DeviceError {
        let Request { operation, offset, length } = request;
        let device = device.to_owned();
        let detail = match self {
            Failure::Refused(Errno::NXIO | Errno::NODEV) => return DeviceError::Gone { device },
            Failure::Refused(Errno::INTR) => "it was not answered, also not after a reset".to_owned(),
            Failure::Refused(errno) => errno.to_string(),
            Failure::Status(status) => status.to_string(),
        };
        DeviceError::Io { device, operation, offset, length, detail }
    }
}

fn way(ring: Rc<Ring<Wide>>, file: &OwnedFd) -> std::io::Result<Way> {
    let file = ring.file(file.try_clone()?);
    Ok(Way { ring, file })
}

impl PassthruDevice {
    /// Opens the namespace of a character device `/dev/ngXnY`, and takes its block device. It stays taken
    /// until this is dropped. The first calls block: a server opens its targets before it serves.
    pub async fn open(
        path: &Path,
        ring: &Rc<Ring>,
        handle: &Handle,
        options: OpenOptions,
    ) -> DeviceResult<Rc<PassthruDevice>> {
        let opened = open::open(path, &options)?;
        let not_permitted =
            |why: &dyn std::fmt::Display| DeviceError::NotPermitted(format!("cannot open {}: {why}", path.display()));
        let commands = ring.commands().map_err(|error| not_permitted(&error))?;
        let announced = way(commands, &opened.file).map_err(|error| not_permitted(&error))?;
        let device = PassthruDevice::assemble(path, announced, handle, options, &opened);
        device.probe(&device.announced).await.map_err(|errno| opened.not_taken(path, errno))?;
        match device.polled_way(ring, &opened).await {
            Ok(polled) => *device.polled.borrow_mut() = Some(polled),
            Err(reason) => {
                tracing::info!(device = device.name, reason, "completions of this target are not polled for");
            }
        }
        let spec::Controller { model, serial, firmware, .. } = &opened.controller;
        let (geometry, polled) = (device.geometry, device.polled.borrow().is_some());
        tracing::info!(
            device = device.name,
            model,
            serial,
            firmware,
            ?geometry,
            polled,
            "NVMe commands go through the kernel"
        );
        Ok(Rc::new(device))
    }

    /// Whether reads and writes are polled for.
    pub fn is_polled(&self) -> bool {
        self.polled.borrow().is_some()
    }

    /// Whether commands on memory of the arena run without pinning it.
    pub fn has_registered_buffers(&self) -> bool {
        self.registered.get() && self.announced.ring.has_registered_buffers()
    }

    fn assemble(path: &Path, announced: Way, handle: &Handle, options: OpenOptions, opened: &Opened) -> PassthruDevice {
        PassthruDevice {
            name: path.display().to_string(),
            announced,
            polled: RefCell::new(None),
            registered: Cell::new(true),
            held: opened.held.clone(),
            paths: opened.paths.clone(),
            waits: Cell::new(false),
            handle: handle.clone(),
            namespace: opened.number,
            geometry: opened.geometry(),
            block_shift: opened.namespace.block_bytes.trailing_zeros(),
            read_only: options.read_only,
        }
    }

    /// The way through the polled ring, if the device has queues for it and the kernel takes commands there.
    async fn polled_way(&self, ring: &Ring, opened: &Opened) -> Result<Way, String> {
        opened.has_poll_queues()?;
        let ring = ring.polled_commands().map_err(|error| error.to_string())?;
        let polled = way(ring, &opened.file).map_err(|error| error.to_string())?;
        self.probe(&polled).await.map_err(|errno| errno.to_string())?;
        Ok(polled)
    }

    /// Whether the kernel takes commands this way, seen with a read of the first block. What the controller
    /// makes of it does not matter here.
    async fn probe(&self, way: &Way) -> Result<(), Errno> {
        let block = 1 << self.block_shift;
        let data = Data::into(DmaBuf::uninitialised(block)).piece(0..block);
        loop {
            let (result, _) = self.send(way, Order::Read { offset: 0 }, data.clone(), self.registered.get()).await;
            match result {
                Err(Errno::INVAL) if self.registered.get() => self.stop_registered(),
                Err(errno) if NOT_TAKEN.contains(&errno) => return Err(errno),
                _ => return Ok(()),
            }
        }
    }

    /// Kernels before 6.12 refuse what is a part of the registered memory only.
    fn stop_registered(&self) {
        self.registered.set(false);
        tracing::info!(
            device = self.name,
            "the kernel does not take registered I/O buffers for commands: some speed is lost"
        );
    }

    fn send(&self, way: &Way, order: Order, data: Data, registered: bool) -> Operation<(Data, Rc<OwnedFd>), Wide> {
        let command = order.command(self.namespace, self.block_shift, data.bytes());
        let command = NvmeCommand {
            opcode: command.opcode(),
            namespace: command.namespace(),
            dwords: std::array::from_fn(|index| command.dword(10 + index)),
        };
        let memory = match &data {
            Data::None => NvmeData::None,
            Data::Into { start, bytes, .. } => NvmeData::Run { start: *start, bytes: *bytes },
            Data::From(bytes) => NvmeData::Run { start: bytes.as_ptr(), bytes: bytes.len() },
        };
        let kept = (data, self.held.clone());
        // SAFETY: the data is kept, and owns its memory, on the heap. An order moves data into memory only
        // with `Data::Into`, which nothing else looks at until all its pieces are given back, and only as many
        // bytes as the data has (`Order::command`).
        unsafe { way.ring.nvme(&way.file, command, memory, registered, kept) }
    }

    /// One command to its end, again where that may help.
    async fn run(&self, request: Request, order: Order, mut data: Data) -> DeviceResult<()> {
        let (mut retries, mut waits) = (0, 0);
        let mut registered = self.registered.get();
        loop {
            let way = self.way_of(order);
            let (result, (back, _)) = self.send(&way, order, data, registered).await;
            data = back;
            let failure = match Failure::of(result) {
                Ok(()) => {
                    self.note_waiting(false);
                    return Ok(());
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Refused(Errno::OPNOTSUPP) if !Rc::ptr_eq(&way.ring, &self.announced.ring) => {
                    if self.polled.take().is_some() {
                        tracing::info!(
                            device = self.name,
                            "a polled command was refused: completions are not polled for"
                        );
                    }
                    continue;
                }
                // If it is not the way, it may be the memory, should the opening not have shown it.
                Failure::Refused(Errno::INVAL) => registered = false,
                _ => {}
            }
            let (count, most) = match failure.is_on_the_way().then(|| self.paths.reach()) {
                Some(Reach::Gone) => return Err(DeviceError::Gone { device: self.name.clone() }),
                Some(Reach::Coming) => {
                    self.note_waiting(true);
                    (&mut waits, RETRIES_COMING)
                }
                Some(Reach::Live) | None => (&mut retries, failure.retries_max()),
            };
            if *count == most {
                return Err(failure.told(&self.name, request));
            }
            *count += 1;
            self.handle.sleep(RETRY_AFTER).await;
        }
    }

    fn note_waiting(&self, waits: bool) {
        match (self.waits.replace(waits), waits) {
            (false, true) => tracing::warn!(device = self.name, "commands wait: no controller is live"),
            (true, false) => tracing::info!(device = self.name, "a controller takes commands again"),
            _ => {}
        }
    }

    fn way_of(&self, order: Order) -> Way {
        match (&*self.polled.borrow(), order) {
            (Some(polled), Order::Read { .. } | Order::Write { .. }) => polled.clone(),
            _ => self.announced.clone(),
        }
    }

    fn check_writable(&self) -> DeviceResult<()> {
        match self.read_only {
            true => {
                Err(DeviceError::Unsupported { device: self.name.clone(), what: "writing: it was opened read-only" })
            }
            false => Ok(()),
        }
    }

    async fn read_whole(&self, offset: u64, length: usize) -> DeviceResult<DmaBuf> {
        let request = Request { operation: "read", offset, length: length as u64 };
        check_range(&self.name, &self.geometry, request.operation, offset, request.length)?;
        let whole = Data::into(DmaBuf::uninitialised(length));
        let reads = transfer::pieces(length, self.geometry.transfer_max as usize).map(|range| {
            let order = Order::Read { offset: offset + range.start as u64 };
            self.run(request, order, whole.piece(range))
        });
        try_join_all(reads).await?;
        Ok(whole.into_buffer())
    }

    async fn write_whole(&self, offset: u64, parts: Vec<Bytes>, fua: bool) -> DeviceResult<()> {
        let length = check_write(&self.name, &self.geometry, offset, &parts)?;
        self.check_writable()?;
        let request = Request { operation: "write", offset, length };
        let fua = fua && self.geometry.volatile_cache;
        let mut at = offset;
        let writes = transfer::runs(parts, self.geometry.transfer_max as usize).into_iter().map(|run| {
            let data = Data::From(run);
            let order = Order::Write { offset: at, fua };
            at += data.bytes() as u64;
            self.run(request, order, data)
        });
        try_join_all(writes).await.map(|_| ())
    }

    async fn sync(&self) -> DeviceResult<()> {
        if !self.geometry.volatile_cache {
            return Ok(());
        }
        self.run(Request { operation: "flush", offset: 0, length: 0 }, Order::Flush, Data::None).await
    }

    async fn deallocate(&self, offset: u64, length: u64) -> DeviceResult<()> {
        let request = Request { operation: "discard", offset, length };
        check_range(&self.name, &self.geometry, request.operation, offset, length)?;
        self.check_writable()?;
        if length == 0 || !self.geometry.discards {
            return Ok(());
        }
        for (ranges, count) in transfer::ranges(offset >> self.block_shift, length >> self.block_shift) {
            self.run(request, Order::Deallocate { ranges: count }, Data::From(ranges)).await?;
        }
        Ok(())
    }
}

impl BlockDevice for PassthruDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> DeviceGeometry {
        self.geometry
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
        Box::pin(self.deallocate(offset, length))
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(ready(check_range(&self.name, &self.geometry, "settle", offset, length)))
    }
}

#[cfg(test)]
#[path = "passthru_tests.rs"]
mod tests;
