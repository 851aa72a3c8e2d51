//! The seam below the driver: a PCI function's registers, and memory that the function reaches.
//! Behind it are a real device through VFIO ([`super::vfio`]) and a model ([`super::model`]).

use super::memory::Memory;
use crate::DeviceResult;
use std::any::Any;
use std::ptr::NonNull;

/// One NVMe controller as the bus shows it. Registers and memory are of one thread.
pub trait Bus: 'static {
    /// A name for messages: the PCI address.
    fn name(&self) -> &str;

    /// Length of BAR 0 in bytes.
    fn register_bytes(&self) -> usize;

    /// A register of BAR 0; what it reads when the device is gone is all ones.
    fn read32(&self, offset: usize) -> u32;

    /// Everything written to memory before is there for the device when it sees the value.
    fn write32(&self, offset: usize, value: u32);

    /// Zeroed memory for queues, of whole pages, that the device reaches for as long as the bus is
    /// open.
    fn allocate(&self, bytes: usize) -> DeviceResult<SharedMemory>;

    /// Where the device finds these bytes, if it reaches them: so with memory of the arena.
    fn device_address(&self, bytes: &[u8]) -> Option<u64>;

    /// Ends the device's access to memory, for good: it may not even answer.
    fn cut_off(&self);

    /// Whether the device is to be taken away: whoever wants that waits until it was given up.
    fn is_wanted_back(&self) -> bool {
        false
    }

    /// Lets go of a device that was cut off, for good: its registers read all ones from then on.
    fn give_up(&self) {}

    fn read64(&self, offset: usize) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    fn write64(&self, offset: usize, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// Memory that a device reads and writes too, so that nothing of it is ever borrowed: it is copied
/// in and out, each access checked to lie inside.
pub struct SharedMemory {
    memory: Memory,
    bytes: usize,
    device_address: u64,
    /// Keeps the memory.
    _owner: Box<dyn Any>,
}

impl SharedMemory {
    /// # Safety
    /// `bytes` bytes at `start`, aligned to a page, stay valid for reads and writes while `owner` lives, each
    /// with a value, and are reached through pointers only: there are no references to them.
    pub unsafe fn new(start: NonNull<u8>, bytes: usize, device_address: u64, owner: Box<dyn Any>) -> SharedMemory {
        SharedMemory { memory: Memory::new(start, bytes), bytes, device_address, _owner: owner }
    }

    /// Where the device finds the byte at `offset`.
    #[inline]
    pub fn device_address(&self, offset: usize) -> u64 {
        assert!(offset < self.bytes, "{offset} lies outside of {} bytes", self.bytes);
        self.device_address + offset as u64
    }

    #[inline]
    fn check<T>(&self, offset: usize) {
        // The memory begins on a page, and nothing is aligned to more.
        const { assert!(align_of::<T>() <= 4096) };
        let inside = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.bytes);
        assert!(inside && offset.is_multiple_of(align_of::<T>()), "{offset} does not fit into {} bytes", self.bytes);
    }

    /// For values without padding, which would be no value to the device.
    #[inline]
    pub fn write<T: bytemuck::NoUninit>(&self, offset: usize, value: T) {
        self.check::<T>(offset);
        // SAFETY: inside and aligned, as just checked; the rest is what `new` was promised.
        unsafe { self.memory.write(offset, value) }
    }

    /// For values of which every pattern of bits is one.
    #[inline]
    pub fn read<T: bytemuck::AnyBitPattern>(&self, offset: usize) -> T {
        self.check::<T>(offset);
        // SAFETY: inside and aligned, as just checked; the rest is what `new` was promised.
        unsafe { self.memory.read(offset) }
    }

    #[inline]
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        let inside = offset.checked_add(from.len()).is_some_and(|end| end <= self.bytes);
        assert!(inside, "{} bytes at {offset} do not fit into {}", from.len(), self.bytes);
        // SAFETY: inside, as just checked; the rest is what `new` was promised.
        unsafe { self.memory.copy_in(offset, from) }
    }

    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let inside = offset.checked_add(into.len()).is_some_and(|end| end <= self.bytes);
        assert!(inside, "{} bytes at {offset} do not fit into {}", into.len(), self.bytes);
        // SAFETY: inside, as just checked; the rest is what `new` was promised.
        unsafe { self.memory.copy_out(offset, into) }
    }

    pub fn clear(&self) {
        // SAFETY: all of the memory; the rest is what `new` was promised.
        unsafe { self.memory.clear(self.bytes) }
    }

    /// What the device's side of a model reads and writes.
    #[cfg(all(test, feature = "loom"))]
    pub(super) fn words(&self) -> super::memory::Words {
        self.memory.words()
    }
}
