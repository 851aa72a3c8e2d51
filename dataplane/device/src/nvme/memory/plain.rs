//! As it is: volatile accesses and copies.

use std::ptr::NonNull;
pub use std::sync::atomic::fence;

/// Where memory begins. It does not know where it ends: that and what else is asked of the unsafe calls is
/// for [`SharedMemory`](crate::nvme::bus::SharedMemory) to see to.
pub struct Memory(NonNull<u8>);

impl Memory {
    pub fn new(start: NonNull<u8>, _bytes: usize) -> Memory {
        Memory(start)
    }

    /// # Safety
    /// A `T` at `offset` lies inside memory that is valid for writes, and aligned; nobody has a reference to
    /// it.
    #[inline]
    pub unsafe fn write<T: bytemuck::NoUninit>(&self, offset: usize, value: T) {
        // SAFETY: inside and aligned, says the caller. Volatile, because the device reads it meanwhile.
        unsafe { self.0.as_ptr().add(offset).cast::<T>().write_volatile(value) }
    }

    /// # Safety
    /// A `T` at `offset` lies inside memory that is valid for reads, and aligned; its bytes have values, and
    /// nobody has a unique reference to it.
    #[inline]
    pub unsafe fn read<T: bytemuck::AnyBitPattern>(&self, offset: usize) -> T {
        // SAFETY: inside and aligned, says the caller; whatever the device wrote is a `T`. Volatile, because
        // it may write meanwhile.
        unsafe { self.0.as_ptr().add(offset).cast::<T>().read_volatile() }
    }

    /// # Safety
    /// As many bytes at `offset` lie inside memory that is valid for writes, and nobody has a reference to
    /// them.
    #[inline]
    pub unsafe fn copy_in(&self, offset: usize, from: &[u8]) {
        // SAFETY: inside, says the caller; and `from`, which is a reference, is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.0.as_ptr().add(offset), from.len()) }
    }

    /// # Safety
    /// As many bytes at `offset` lie inside memory that is valid for reads; they have values, and nobody has
    /// a reference to them.
    pub unsafe fn copy_out(&self, offset: usize, into: &mut [u8]) {
        // SAFETY: inside, says the caller; and `into`, which is a reference, is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr().add(offset), into.as_mut_ptr(), into.len()) }
    }

    /// # Safety
    /// The memory has as many bytes, is valid for writes, and nobody has a reference to it.
    pub unsafe fn clear(&self, bytes: usize) {
        // SAFETY: says the caller.
        unsafe { std::ptr::write_bytes(self.0.as_ptr(), 0, bytes) }
    }
}
