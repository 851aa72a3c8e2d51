//! NVMe controllers driven from user space: our own driver, polled, without the kernel in the path.
//!
//! Start at [`NvmeDevice::open`], which takes a namespace of a controller. Below it are the
//! controller and its one pair of I/O queues ([`controller`]), what became of every command
//! ([`commands`]), which data goes together in the device ([`placement`]), the rings ([`queue`]) and the
//! format of it all ([`spec`]). The driver reaches the hardware through [`bus::Bus`] only: VFIO on a real
//! one, a model in tests.
//!
//! It knows no interrupts and takes no locks: a controller belongs to one executor. Data moves
//! between the device and memory of the arena without a copy; what lies elsewhere, or not on pages,
//! is copied there first.

pub mod bus;
mod commands;
mod controller;
mod error;
pub mod instant;
mod memory;
pub mod model;
mod placement;
mod queue;
pub mod spec;
mod unflushed;
pub mod vfio;

pub use error::NvmeError;

use crate::{
    BlockDevice, DeviceError, DeviceGeometry, DeviceHealth, DeviceResult, Placement, check_range, check_write,
};
use bus::Bus;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use commands::Outcome;
use controller::{BOUNCE_BYTES, Controller, Data, PAGE, TRANSFER_MAX};
use futures_util::future::{LocalBoxFuture, ready, try_join_all};
use placement::Placing;
use smallvec::SmallVec;
use spec::{Command, Status, io};
use std::rc::Rc;
use unflushed::Unflushed;

/// Addresses of pages; most transfers are of a page or a few.
type Pages = SmallVec<[u64; 8]>;

/// How often a command is sent again that the controller says may succeed then.
const RETRIES_MAX: u32 = 3;

/// A controller that is open as long as one of its namespaces is.
struct Opened<B: Bus> {
    controller: Rc<Controller<B>>,
    identity: spec::Controller,
}

impl<B: Bus> Drop for Opened<B> {
    fn drop(&mut self) {
        self.controller.close();
    }
}

/// A namespace of an NVMe controller.
pub struct NvmeDevice<B: Bus> {
    name: String,
    controller: Rc<Controller<B>>,
    opened: Rc<Opened<B>>,
    namespace: u32,
    geometry: DeviceGeometry,
    placing: Rc<Placing<B>>,
    unflushed: Unflushed,
    bus: Rc<B>,
}

/// What makes a command of a range.
#[derive(Clone, Copy)]
struct Transfer {
    opcode: u8,
    /// The upper half of dword 12.
    flags: u32,
    placement: Option<u16>,
}

const READ: Transfer = Transfer { opcode: io::READ, flags: 0, placement: None };

/// What an error speaks of.
#[derive(Clone, Copy)]
struct Request {
    operation: &'static str,
    offset: u64,
    length: u64,
}

impl<B: Bus> NvmeDevice<B> {
    /// Takes the controller over, whatever it was doing, and opens one of its namespaces.
    pub async fn open(bus: B, namespace: u32, handle: &Handle) -> Result<Rc<NvmeDevice<B>>, NvmeError> {
        let bus = Rc::new(bus);
        let controller = Controller::open(bus.clone(), handle).await?;
        let identity = match controller.identify().await {
            Ok(identity) => identity,
            Err(error) => {
                controller.close();
                return Err(error);
            }
        };
        NvmeDevice::of(Rc::new(Opened { controller, identity }), bus, namespace).await
    }

    /// Another namespace of the same controller, or the same once more.
    pub async fn sibling(&self, namespace: u32) -> Result<Rc<NvmeDevice<B>>, NvmeError> {
        NvmeDevice::of(self.opened.clone(), self.bus.clone(), namespace).await
    }

    async fn of(opened: Rc<Opened<B>>, bus: Rc<B>, namespace: u32) -> Result<Rc<NvmeDevice<B>>, NvmeError> {
        let (controller, identity) = (opened.controller.clone(), &opened.identity);
        let found = controller.namespace(namespace).await?;
        let spec::Controller { model, serial, firmware, .. } = identity;
        let name = format!("nvme:{}/{namespace}", bus.name());
        tracing::info!(device = name, model, serial, firmware, ?found, "NVMe controller is driven from user space");
        let transfer_max = identity.transfer_max.map_or(TRANSFER_MAX, |most| most.min(TRANSFER_MAX));
        let geometry = DeviceGeometry {
            size: found.blocks.saturating_mul(found.block_bytes.into()),
            block: found.block_bytes,
            transfer_max: transfer_max as u32,
            volatile_cache: identity.volatile_cache,
            discards: identity.deallocates,
        };
        let placing = Placing::of(name.clone(), controller.clone(), namespace).await;
        let unflushed = Unflushed::default();
        Ok(Rc::new(NvmeDevice { name, bus, controller, opened, namespace, geometry, placing, unflushed }))
    }

    pub fn namespace(&self) -> u32 {
        self.namespace
    }

    /// How often the controller was reset because it did not answer.
    pub fn resets(&self) -> u64 {
        self.controller.resets()
    }

    fn failed(&self, request: Request, outcome: Outcome) -> DeviceError {
        let Request { operation, offset, length } = request;
        let device = self.name.clone();
        let detail = match outcome {
            Outcome::Gone => return DeviceError::Gone { device },
            Outcome::TimedOut => "it was not answered, also not after a reset".to_owned(),
            Outcome::Completed(status) => status.to_string(),
        };
        DeviceError::Io { device, operation, offset, length, detail }
    }

    /// One command to its end, again where the controller says that this may help.
    async fn run<K: 'static>(&self, request: Request, command: Command, data: Data<'_>, kept: K) -> DeviceResult<K> {
        let ended = self.controller.execute(command, data, kept).await;
        self.retry(request, command, data, ended).await
    }

    /// What became of a command, after as many more tries as help. They let the device choose where data
    /// goes: whether it still takes placement identifiers may have changed since.
    async fn retry<K: 'static>(
        &self,
        request: Request,
        mut command: Command,
        data: Data<'_>,
        mut ended: (Outcome, K),
    ) -> DeviceResult<K> {
        let mut retries = 0;
        loop {
            match ended {
                (Outcome::Completed(status), kept) if status.is_success() => return Ok(kept),
                // A hint must not cost the write.
                (Outcome::Completed(status), kept)
                    if status.code() == Status::INVALID_FIELD.code() && command.placement().is_some() =>
                {
                    self.placing.refused(status);
                    command = command.without_placement();
                    ended = self.controller.execute(command, data, kept).await;
                }
                (Outcome::Completed(status), kept) if status.may_be_retried() && retries < RETRIES_MAX => {
                    retries += 1;
                    command = command.without_placement();
                    ended = self.controller.execute(command, data, kept).await;
                }
                (outcome, _) => return Err(self.failed(request, outcome)),
            }
        }
    }

    /// Sends a transfer that is one command on memory that the device reaches, if there is a place for it:
    /// nearly every one. Else gives back what it was to work on.
    fn send<K: 'static, T: 'static>(
        &self,
        request: Request,
        how: Transfer,
        start: Option<u64>,
        kept: K,
        answer: fn(&Self, K) -> T,
    ) -> Result<LocalBoxFuture<'_, DeviceResult<T>>, K> {
        let bytes = request.length as usize;
        let Some(start) = start.filter(|start| start.is_multiple_of(PAGE as u64)) else { return Err(kept) };
        let fits = (1..=self.transfer_max()).contains(&bytes);
        let Some(place) = self.controller.place().filter(|_| fits) else { return Err(kept) };
        let (command, data) = (self.transfer(how, request.offset, bytes), Data::Run { start, bytes });
        let under_way = self.controller.send(place, command, data, kept)?;
        Ok(Box::pin(async move {
            let ended = under_way.await;
            match ended.0 {
                Outcome::Completed(status) if status.is_success() => Ok(answer(self, ended.1)),
                // Boxed: it seldom happens, and would make every future large.
                _ => {
                    let command = self.transfer(how, request.offset, bytes);
                    Box::pin(self.retry(request, command, data, ended)).await.map(|kept| answer(self, kept))
                }
            }
        }))
    }

    #[inline]
    fn transfer(&self, how: Transfer, offset: u64, length: usize) -> Command {
        // Blocks are a power of two: no divisions here, there is one of these for every few KiB.
        let shift = self.geometry.block.trailing_zeros();
        let command = Command::new(how.opcode, self.namespace);
        let command = command.with_blocks(offset >> shift, (length >> shift) as u32, how.flags);
        how.placement.map_or(command, |identifier| command.with_placement(identifier))
    }

    /// Where the device finds each page of these parts, if it reaches them all and pages describe them.
    fn pages_of<'a>(&self, parts: impl Iterator<Item = &'a [u8]>) -> Option<Pages> {
        let mut pages = Pages::new();
        let mut ended = false;
        for part in parts.filter(|part| !part.is_empty()) {
            let start = self.bus.device_address(part)?;
            if ended || !start.is_multiple_of(PAGE as u64) {
                return None;
            }
            pages.extend((0..part.len().div_ceil(PAGE)).map(|page| start + (page * PAGE) as u64));
            ended = !part.len().is_multiple_of(PAGE);
        }
        Some(pages)
    }

    /// The transfers of a range: how far each is from its beginning, and its length.
    fn pieces(&self, length: usize, most: usize) -> impl Iterator<Item = (usize, usize)> + use<B> {
        (0..length).step_by(most).map(move |start| (start, most.min(length - start)))
    }

    fn transfer_max(&self) -> usize {
        self.geometry.transfer_max as usize
    }

    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        let request = Request { operation: "read", offset, length: length as u64 };
        if let Err(refused) = check_range(&self.name, &self.geometry, request.operation, offset, request.length) {
            return Box::pin(ready(Err(refused)));
        }
        let buffer = DmaBuf::uninitialised(length);
        let start = self.bus.device_address(&buffer);
        let sent = self.send(request, READ, start, buffer, |_, buffer| buffer);
        sent.unwrap_or_else(|buffer| Box::pin(self.read_in_pieces(request, buffer)))
    }

    /// What is too long for one command, what finds no place for one at once, and what the device does not
    /// reach.
    async fn read_in_pieces(&self, request: Request, mut buffer: DmaBuf) -> DeviceResult<DmaBuf> {
        let (offset, length) = (request.offset, buffer.len());
        if length == 0 {
            return Ok(buffer);
        }
        let Some(pages) = self.pages_of(std::iter::once(&buffer[..])) else {
            for (start, length) in self.pieces(length, BOUNCE_BYTES.min(self.transfer_max())) {
                let turn = self.controller.bouncing.acquire(1).await;
                let command = self.transfer(READ, offset + start as u64, length);
                let _turn = self.run(request, command, Data::Pages(&self.bounce_pages(length)), turn).await?;
                self.controller.bounce.copy_out(0, &mut buffer[start..start + length]);
            }
            return Ok(buffer);
        };
        if length <= self.transfer_max() {
            return self.run(request, self.transfer(READ, offset, length), Data::Pages(&pages), buffer).await;
        }
        let buffer = Rc::new(buffer);
        let reads = self.pieces(length, self.transfer_max()).map(|(start, length)| {
            let pages = &pages[start / PAGE..(start + length).div_ceil(PAGE)];
            let command = self.transfer(READ, offset + start as u64, length);
            self.run(request, command, Data::Pages(pages), buffer.clone())
        });
        drop(try_join_all(reads).await?);
        Ok(Rc::into_inner(buffer).expect("all that read into it have ended"))
    }

    fn write_at(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>> {
        let length = match check_write(&self.name, &self.geometry, offset, &parts) {
            Ok(length) => length,
            Err(refused) => return Box::pin(ready(Err(refused))),
        };
        let request = Request { operation: "write", offset, length };
        let cached = self.geometry.volatile_cache && !fua;
        let flags = if self.geometry.volatile_cache && fua { io::FUA } else { 0 };
        let how = Transfer { opcode: io::WRITE, flags, placement: self.placing.identifier(placement) };
        let start = match &parts[..] {
            [only] => self.bus.device_address(only),
            _ => None,
        };
        let answer = match cached {
            true => |device: &Self, _| device.unflushed.written(device.controller.failures()),
            false => |_: &Self, _| (),
        };
        let sent = self.send(request, how, start, parts, answer);
        sent.unwrap_or_else(|parts| {
            Box::pin(async move {
                self.write_in_pieces(request, parts, how).await?;
                answer(self, Vec::new());
                Ok(())
            })
        })
    }

    async fn write_in_pieces(&self, request: Request, parts: Vec<Bytes>, how: Transfer) -> DeviceResult<()> {
        let (offset, length) = (request.offset, request.length as usize);
        let Some(pages) = self.pages_of(parts.iter().map(|part| &part[..])) else {
            return self.write_copied(request, parts, how).await;
        };
        let writes = self.pieces(length, self.transfer_max()).map(|(start, length)| {
            let pages = &pages[start / PAGE..(start + length).div_ceil(PAGE)];
            let command = self.transfer(how, offset + start as u64, length);
            self.run(request, command, Data::Pages(pages), parts.clone())
        });
        try_join_all(writes).await.map(|_| ())
    }

    /// Parts that the device does not reach, or that pages do not describe.
    async fn write_copied(&self, request: Request, parts: Vec<Bytes>, how: Transfer) -> DeviceResult<()> {
        let mut parts = parts.into_iter();
        let mut part = Bytes::new();
        for (start, length) in self.pieces(request.length as usize, BOUNCE_BYTES.min(self.transfer_max())) {
            let turn = self.controller.bouncing.acquire(1).await;
            let mut filled = 0;
            while filled < length {
                if part.is_empty() {
                    part = parts.next().expect("the parts are as long as their sum");
                }
                let piece = part.split_to(part.len().min(length - filled));
                self.controller.bounce.copy_in(filled, &piece);
                filled += piece.len();
            }
            let command = self.transfer(how, request.offset + start as u64, length);
            let _turn = self.run(request, command, Data::Pages(&self.bounce_pages(length)), turn).await?;
        }
        Ok(())
    }

    fn bounce_pages(&self, length: usize) -> Pages {
        (0..length).step_by(PAGE).map(|page| self.controller.bounce.device_address(page)).collect()
    }

    async fn sync(&self) -> DeviceResult<()> {
        if !self.geometry.volatile_cache {
            return Ok(());
        }
        let request = Request { operation: "flush", offset: 0, length: 0 };
        let written = self.unflushed.flush_begins();
        self.run(request, Command::new(io::FLUSH, self.namespace), Data::None, ()).await?;
        if self.unflushed.flush_ended(written, self.controller.failures()) {
            return Ok(());
        }
        Err(DeviceError::Io {
            device: self.name.clone(),
            operation: request.operation,
            offset: request.offset,
            length: request.length,
            detail: "the controller has failed since, and what was in its volatile cache may be lost".to_owned(),
        })
    }

    async fn deallocate(&self, offset: u64, length: u64) -> DeviceResult<()> {
        let request = Request { operation: "discard", offset, length };
        check_range(&self.name, &self.geometry, request.operation, offset, length)?;
        if length == 0 || !self.geometry.discards {
            return Ok(());
        }
        let block = u64::from(self.geometry.block);
        let (first, blocks) = (offset / block, length / block);
        // Figure 43 of the command set: attributes, length and first block of each range.
        let ranges = (0..blocks).step_by(u32::MAX as usize).map(|start| {
            let count = (blocks - start).min(u32::MAX.into()) as u32;
            [&[0; 4][..], &count.to_le_bytes(), &(first + start).to_le_bytes()].concat()
        });
        let ranges: Vec<Vec<u8>> = ranges.collect();
        for ranges in ranges.chunks(io::RANGES_MAX) {
            let command = Command::new(io::DATASET_MANAGEMENT, self.namespace);
            let command = command.with(10, ranges.len() as u32 - 1).with(11, io::DEALLOCATE);
            self.run(request, command, Data::Inline(&ranges.concat()), ()).await?;
        }
        Ok(())
    }
}

impl<B: Bus> BlockDevice for NvmeDevice<B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    fn attached(&self) -> DeviceResult<()> {
        if self.controller.is_gone() { Err(DeviceError::Gone { device: self.name.clone() }) } else { Ok(()) }
    }

    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        self.read_at(offset, length)
    }

    fn write(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>> {
        self.write_at(offset, parts, placement, fua)
    }

    fn flush(&self) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.sync())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.deallocate(offset, length))
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(async move { check_range(&self.name, &self.geometry, "settle", offset, length) })
    }

    fn health(&self) -> LocalBoxFuture<'_, DeviceResult<Option<DeviceHealth>>> {
        Box::pin(async move {
            let told = self.controller.health().await;
            let told = told.map(|told| DeviceHealth { placement_handles: self.placing.handles(), ..told });
            self.attached()?;
            let failed = |error: NvmeError| DeviceError::Io {
                device: self.name.clone(),
                operation: "health log",
                offset: 0,
                length: 0,
                detail: error.to_string(),
            };
            told.map(Some).map_err(failed)
        })
    }

    /// Closes the controller, with all its namespaces.
    fn close(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(self.controller.closed())
    }
}

#[cfg(test)]
#[path = "nvme_tests.rs"]
mod tests;
