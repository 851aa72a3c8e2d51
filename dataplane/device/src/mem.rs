//! A disk in memory with the failures of a real one, all drawn from a seed.
//!
//! [`MemDisk`] is the medium and outlives the node; [`MemDevice`] is the disk as one node opened
//! it. Operations take effect when they complete, after a seeded latency on the handle's timers,
//! so concurrent ones overtake each other. An operation whose future is dropped before it
//! completed takes effect wholly, partly or not at all, by the seed: at once or later, but before
//! the next node opens the disk.

mod disk;
mod medium;

pub use disk::{Faults, MemDisk};

use crate::{BlockDevice, DeviceError, DeviceGeometry, DeviceResult, Placement, check_range, check_write};
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use futures_util::future::LocalBoxFuture;
use medium::{Block, Change};
use std::rc::Rc;

/// Large enough for any blob with its header; only real devices have a reason for less.
const TRANSFER_MAX: u32 = 4 << 20;

/// What the trace hash is told of an operation.
#[derive(Clone, Copy)]
enum Traced {
    Read = 1,
    Write = 2,
    Flush = 3,
    Discard = 4,
    Dropped = 5,
    Settle = 6,
}

/// A [`MemDisk`] as one node opened it.
pub struct MemDevice {
    disk: Rc<MemDisk>,
    handle: Handle,
    power_up: u64,
}

/// A write or discard on its way: decides what became of it when nobody waits any more.
struct UnderWay<'a> {
    device: &'a MemDevice,
    operation: u64,
}

impl UnderWay<'_> {
    /// Takes the change out to apply it; `None` after a power cut.
    fn take(&self) -> Option<Change> {
        self.device.disk.state.borrow_mut().under_way.remove(&self.operation)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(change) = self.take() {
            self.device.handle.trace(Traced::Dropped as u64);
            self.device.disk.state.borrow_mut().abandon(change);
        }
    }
}

impl MemDevice {
    pub(crate) fn new(disk: Rc<MemDisk>, handle: Handle, power_up: u64) -> MemDevice {
        MemDevice { disk, handle, power_up }
    }

    pub fn disk(&self) -> &Rc<MemDisk> {
        &self.disk
    }

    fn trace(&self, what: Traced, offset: u64, length: u64) {
        self.handle.trace(what as u64);
        self.handle.trace(offset);
        self.handle.trace(length);
    }

    fn is_dead(&self) -> bool {
        let state = self.disk.state.borrow();
        state.halted || state.power_ups != self.power_up
    }

    fn check_present(&self) -> DeviceResult<()> {
        match self.disk.state.borrow().gone {
            true => Err(DeviceError::Gone { device: self.disk.name().to_owned() }),
            false => Ok(()),
        }
    }

    /// Waits as long as the disk takes; for ever once it is halted or lost power.
    async fn latency(&self) {
        if !self.is_dead() {
            let latency = self.disk.state.borrow_mut().latency();
            self.handle.sleep(latency).await;
        }
        if self.is_dead() {
            std::future::pending::<()>().await;
        }
        self.disk.state.borrow_mut().land(false);
    }

    fn io_error(&self, operation: &'static str, offset: u64, length: u64) -> DeviceError {
        let device = self.disk.name().to_owned();
        DeviceError::Io { device, operation, offset, length, detail: "injected fault".to_owned() }
    }

    /// Counts a write-like operation and registers its change as under way.
    fn submit(&self, change: Change) -> UnderWay<'_> {
        if self.is_dead() {
            // Never applied: the node died before it asked.
            return UnderWay { device: self, operation: u64::MAX };
        }
        let operation = {
            let mut state = self.disk.state.borrow_mut();
            let operation = state.next_operation;
            state.next_operation += 1;
            state.under_way.insert(operation, change);
            operation
        };
        let under_way = UnderWay { device: self, operation };
        if let Some(on_halt) = self.disk.count_write() {
            on_halt();
        }
        under_way
    }

    async fn read_blocks(&self, offset: u64, length: usize) -> DeviceResult<DmaBuf> {
        let geometry = self.geometry();
        check_range(self.name(), &geometry, "read", offset, length as u64)?;
        self.check_present()?;
        self.trace(Traced::Read, offset, length as u64);
        self.disk.count_read(length as u64);
        self.latency().await;
        self.check_present()?;
        let mut state = self.disk.state.borrow_mut();
        let state = &mut *state;
        let first = offset / u64::from(geometry.block);
        let end = first + length as u64 / u64::from(geometry.block);
        if state.bad_blocks.range(first..end).next().is_some() || state.strikes(state.faults.read_error) {
            return Err(self.io_error("read", offset, length as u64));
        }
        let mut buffer = DmaBuf::uninitialised(length);
        for (block, into) in (first..).zip(buffer.chunks_exact_mut(geometry.block as usize)) {
            state.medium.read(block, into);
        }
        if length > 0 && state.strikes(state.faults.bit_flip_on_read) {
            let bit = state.random.below(length as u64 * 8);
            buffer[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        Ok(buffer)
    }

    async fn write_blocks(&self, offset: u64, parts: Vec<Bytes>, fua: bool) -> DeviceResult<()> {
        let geometry = self.geometry();
        let length = check_write(self.name(), &geometry, offset, &parts)?;
        self.check_present()?;
        self.trace(Traced::Write, offset, length);
        let block_size = geometry.block as usize;
        let blocks = parts.iter().flat_map(|part| part.chunks_exact(block_size));
        let blocks = (offset / u64::from(geometry.block)..).zip(blocks.map(|data| {
            self.trace_data(data);
            Some(Block::from(data))
        }));
        let under_way = self.submit(Change { blocks: blocks.collect(), durable: fua });
        drop(parts);
        self.latency().await;
        self.check_present()?;
        match under_way.take() {
            Some(change) => self.complete_write(offset, length, change),
            None => Ok(()),
        }
    }

    /// A few words of each block: enough to see that two runs wrote different bytes.
    fn trace_data(&self, data: &[u8]) {
        for word in data.chunks_exact(8).take(8) {
            self.handle.trace(word.iter().fold(0, |sum, byte| (sum << 8) | u64::from(*byte)));
        }
    }

    fn complete_write(&self, offset: u64, length: u64, mut change: Change) -> DeviceResult<()> {
        let mut state = self.disk.state.borrow_mut();
        let state = &mut *state;
        if length >= state.faults.write_error_from && state.strikes(state.faults.write_error) {
            state.apply_some(&change);
            return Err(self.io_error("write", offset, length));
        }
        if state.loses(offset) || change.blocks.is_empty() || state.strikes(state.faults.lost_write) {
            return Ok(());
        }
        if state.strikes(state.faults.misdirected_write) {
            let room = self.disk.size() / u64::from(self.disk.block()) - change.blocks.len() as u64;
            let elsewhere = state.random.below(room + 1);
            for ((block, _), target) in change.blocks.iter_mut().zip(elsewhere..) {
                *block = target;
            }
        }
        if state.strikes(state.faults.torn_write) {
            let missing = state.random.below(change.blocks.len() as u64) as usize;
            change.blocks.remove(missing);
            state.apply_some(&change);
            return Ok(());
        }
        for (block, _) in &change.blocks {
            state.bad_blocks.remove(block);
        }
        state.medium.apply(&change);
        Ok(())
    }

    async fn flush_cache(&self) -> DeviceResult<()> {
        self.check_present()?;
        self.trace(Traced::Flush, 0, 0);
        let mark = self.disk.state.borrow().medium.mark();
        let under_way = self.submit(Change { blocks: Vec::new(), durable: false });
        self.latency().await;
        under_way.take();
        self.check_present()?;
        self.disk.state.borrow_mut().medium.flush(mark);
        Ok(())
    }

    /// Zeroes for every block that was never written.
    async fn settle_blocks(&self, offset: u64, length: u64) -> DeviceResult<()> {
        let geometry = self.geometry();
        check_range(self.name(), &geometry, "settling", offset, length)?;
        self.check_present()?;
        self.trace(Traced::Settle, offset, length);
        let (first, end) = (offset / u64::from(geometry.block), (offset + length) / u64::from(geometry.block));
        let blocks = {
            let written = self.disk.state.borrow().medium.written(first, end);
            let blank = Block::from(vec![0; geometry.block as usize]);
            (first..end)
                .filter(|block| written.binary_search(block).is_err())
                .map(|block| (block, Some(blank.clone())))
                .collect()
        };
        let under_way = self.submit(Change { blocks, durable: false });
        self.latency().await;
        self.check_present()?;
        match under_way.take() {
            Some(change) => self.complete_write(offset, length, change),
            None => Ok(()),
        }
    }

    async fn discard_blocks(&self, offset: u64, length: u64) -> DeviceResult<()> {
        let geometry = self.geometry();
        check_range(self.name(), &geometry, "discard", offset, length)?;
        self.check_present()?;
        self.trace(Traced::Discard, offset, length);
        let (first, end) = (offset / u64::from(geometry.block), (offset + length) / u64::from(geometry.block));
        let blocks = self.disk.state.borrow_mut().discarded(first, end, geometry.block as usize);
        self.disk.count_discard(length);
        let under_way = self.submit(Change { blocks, durable: false });
        self.latency().await;
        self.check_present()?;
        if let Some(change) = under_way.take() {
            self.disk.state.borrow_mut().medium.apply(&change);
        }
        Ok(())
    }
}

impl BlockDevice for MemDevice {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn geometry(&self) -> DeviceGeometry {
        DeviceGeometry {
            size: self.disk.size(),
            block: self.disk.block(),
            transfer_max: TRANSFER_MAX,
            volatile_cache: true,
            discards: true,
        }
    }

    fn read(&self, offset: u64, length: usize) -> LocalBoxFuture<'_, DeviceResult<DmaBuf>> {
        Box::pin(self.read_blocks(offset, length))
    }

    fn write(
        &self,
        offset: u64,
        parts: Vec<Bytes>,
        _placement: Placement,
        fua: bool,
    ) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.write_blocks(offset, parts, fua))
    }

    fn flush(&self) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.flush_cache())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.discard_blocks(offset, length))
    }

    fn settle(&self, offset: u64, length: u64) -> LocalBoxFuture<'_, DeviceResult<()>> {
        Box::pin(self.settle_blocks(offset, length))
    }
}

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;
