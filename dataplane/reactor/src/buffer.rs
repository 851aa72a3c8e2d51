//! Page-aligned memory for devices: what O_DIRECT and DMA ask for.
//!
//! A [`DmaBuf`] is written by its one owner and then frozen into `Bytes`, whose slices share
//! the memory and keep the alignment of their offset. Memory goes back to where it came from:
//! the arena that rings register with the kernel while it lasts, else a bounded pool.

use crate::arena::{self, Block};
use bytes::Bytes;
use cfs_wire::limits::PAGE;
use crossbeam_queue::ArrayQueue;
use std::ops::{Deref, DerefMut};
use std::sync::LazyLock;

/// One aligned page; the element type that makes a `Vec` page-aligned without unsafe code.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
pub(crate) struct Page([u8; PAGE]);

const ZERO_PAGE: Page = Page([0; PAGE]);

/// Size classes in pages (a page, a small write, a chunk, a blob with its header, a `store`
/// call's bulk) and how many buffers of each are kept: at most 52 MiB in all.
pub(crate) const CLASSES: [usize; 5] = [1, 4, 17, 257, 1025];
const POOLED: [usize; CLASSES.len()] = [256, 64, 64, 24, 6];

type Pool = [ArrayQueue<Box<[Page]>>; CLASSES.len()];
static POOL: LazyLock<Pool> = LazyLock::new(|| POOLED.map(ArrayQueue::new));

enum Memory {
    Arena(Block),
    Heap(Box<[Page]>),
}

impl Memory {
    fn of_class(class: usize) -> Memory {
        if let Some(block) = Block::take(class) {
            return Memory::Arena(block);
        }
        let pooled = POOL[class].pop();
        Memory::Heap(pooled.unwrap_or_else(|| vec![ZERO_PAGE; CLASSES[class]].into_boxed_slice()))
    }
}

/// Page-aligned, owned, writable memory of any length.
pub struct DmaBuf {
    memory: Memory,
    length: usize,
}

impl DmaBuf {
    /// `length` bytes; contents are zero or left from an earlier use.
    pub fn uninitialised(length: usize) -> DmaBuf {
        let pages = length.div_ceil(PAGE).max(1);
        let memory = match CLASSES.iter().position(|class| *class >= pages) {
            Some(class) => Memory::of_class(class),
            None => Memory::Heap(vec![ZERO_PAGE; pages].into_boxed_slice()),
        };
        DmaBuf { memory, length }
    }

    /// The same outside of the memory for devices: for what lives long and no device reaches.
    pub fn apart(length: usize) -> DmaBuf {
        DmaBuf { memory: Memory::Heap(vec![ZERO_PAGE; length.div_ceil(PAGE).max(1)].into_boxed_slice()), length }
    }

    pub fn zeroed(length: usize) -> DmaBuf {
        let mut buffer = DmaBuf::uninitialised(length);
        buffer.fill(0);
        buffer
    }

    pub fn copy_of(bytes: &[u8]) -> DmaBuf {
        let mut buffer = DmaBuf::uninitialised(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// Shortens the visible part.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Shares the memory; it returns to the pool with the last slice.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        let Memory::Heap(pages) = &mut self.memory else { return };
        if let Some(class) = CLASSES.iter().position(|class| *class == pages.len()) {
            // A full pool frees the memory.
            let _ = POOL[class].push(std::mem::take(pages));
        }
    }
}

impl Deref for DmaBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let pages = match &self.memory {
            Memory::Arena(block) => block.pages(),
            Memory::Heap(pages) => pages,
        };
        &bytemuck::cast_slice(pages)[..self.length]
    }
}

impl DerefMut for DmaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let pages = match &mut self.memory {
            Memory::Arena(block) => block.pages_mut(),
            Memory::Heap(pages) => pages,
        };
        &mut bytemuck::cast_slice_mut(pages)[..self.length]
    }
}

impl AsRef<[u8]> for DmaBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// Length of [`device_memory`]. Each ring and each device that has it locks as much.
pub const DEVICE_MEMORY_BYTES: usize = arena::ARENA_BYTES;

/// The memory that buffers come from first, for devices that are to reach it: where it begins, and its
/// length. It is made if need be and never given back; `None` if there is not enough.
pub fn device_memory() -> Option<(*mut u8, usize)> {
    arena::establish()
}

/// Gives memory that is not used back to the system: buffers that are kept for the next operations, and
/// what the allocator keeps. Takes milliseconds: for a process that has become idle.
pub fn give_back() {
    for queue in POOL.iter() {
        while queue.pop().is_some() {}
    }
    trim_heap();
}

#[cfg(target_env = "gnu")]
#[allow(unsafe_code, reason = "glibc gives nothing back of what other threads than the first freed, unless asked")]
fn trim_heap() {
    // SAFETY: it touches free memory only, and locks what it walks.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(target_env = "gnu"))]
fn trim_heap() {}

/// Whether this memory starts on a page boundary.
pub fn is_page_aligned(bytes: &[u8]) -> bool {
    (bytes.as_ptr() as usize).is_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_aligned_and_slices_keep_their_offset() {
        for length in [0, 1, PAGE - 1, PAGE, PAGE + 1, 17 * PAGE, 300 * PAGE] {
            let mut buffer = DmaBuf::zeroed(length);
            assert!(is_page_aligned(&buffer), "length {length}");
            assert_eq!(buffer.len(), length);
            buffer.fill(7);
            let frozen = buffer.freeze();
            assert!(frozen.iter().all(|byte| *byte == 7));
        }
        let frozen = DmaBuf::copy_of(&vec![1u8; 3 * PAGE]).freeze();
        assert!(is_page_aligned(&frozen.slice(PAGE..)));
        assert!(!is_page_aligned(&frozen.slice(1..)));
    }

    #[test]
    fn a_pooled_buffer_asked_for_zeroes_has_none_of_its_past() {
        drop(DmaBuf::copy_of(&[0xAA; PAGE]));
        assert_eq!(&DmaBuf::zeroed(PAGE)[..], &[0u8; PAGE]);
    }
}
