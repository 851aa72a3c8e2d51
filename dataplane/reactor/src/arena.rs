//! Memory that a ring can register with the kernel once, so that an operation on it need not
//! look up and pin its pages each time.
//!
//! One arena per process, made by the first ring that opens a device, never given back. It is
//! cut into blocks of a few lengths once and for all. A thread keeps some blocks for itself; of the
//! others, taking and returning one is a queue operation, and which thread does it does not matter.
//! When a length runs out, buffers come from the heap and their operations are ordinary ones.

use crate::buffer::{CLASSES, Page};
use cfs_wire::limits::PAGE;
use crossbeam_queue::ArrayQueue;
#[cfg(not(miri))]
use rustix::mm::{Advice, madvise};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::OnceLock;

/// Whole huge pages, so that the kernel keeps few and large pieces.
const HUGE_PAGE: usize = 2 << 20;
pub(crate) const ARENA_BYTES: usize = 16 * HUGE_PAGE;
/// Blocks of each length in `CLASSES`; single pages get what is left. Reads and headers take
/// single pages, segment shards and puts the 1 MiB blocks; a call's whole bulk stays on the heap.
const BLOCKS: [usize; CLASSES.len()] = {
    let mut blocks = [0, 128, 120, 16, 0];
    let mut left = ARENA_BYTES / PAGE;
    let mut class = 1;
    while class < CLASSES.len() {
        left -= blocks[class] * CLASSES[class];
        class += 1;
    }
    blocks[0] = left;
    blocks
};

static ARENA: OnceLock<Option<Arena>> = OnceLock::new();

struct Arena {
    start: NonNull<Page>,
    /// First page of each free block, by length.
    free: [ArrayQueue<u32>; CLASSES.len()],
}

// SAFETY: the pages are reached only through blocks, each of which one owner took from a queue.
unsafe impl Send for Arena {}
// SAFETY: as above; the queues are made for sharing.
unsafe impl Sync for Arena {}

impl Arena {
    fn map() -> Option<Arena> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // A huge page more than needed, to start at a multiple of one.
        // SAFETY: a new anonymous mapping at a place of the kernel's choice.
        let mapped =
            unsafe { mmap_anonymous(std::ptr::null_mut(), ARENA_BYTES + HUGE_PAGE, protection, MapFlags::PRIVATE) };
        let mapped = mapped.ok()?.cast::<u8>();
        let skip = mapped.align_offset(HUGE_PAGE);
        // SAFETY: less than the huge page that was mapped in excess.
        let start = unsafe { mapped.add(skip) };
        // Advice only: without huge pages everything works. Miri can't give it.
        #[cfg(not(miri))]
        // SAFETY: inside the mapping.
        let _ = unsafe { madvise(start.cast(), ARENA_BYTES, Advice::LinuxHugepage) };
        let free = BLOCKS.map(|count| ArrayQueue::new(count.max(1)));
        let mut page = 0;
        for (class, queue) in free.iter().enumerate() {
            for _ in 0..BLOCKS[class] {
                let _ = queue.push(page as u32);
                page += CLASSES[class];
            }
        }
        Some(Arena { start: NonNull::new(start.cast())?, free })
    }
}

/// Makes the arena if need be; its range, or `None` if there is no memory for it.
pub(crate) fn establish() -> Option<(*mut u8, usize)> {
    let arena = ARENA.get_or_init(Arena::map).as_ref()?;
    Some((arena.start.as_ptr().cast(), ARENA_BYTES))
}

/// Whether memory lies in the arena.
pub(crate) fn contains(bytes: &[u8]) -> bool {
    contains_range(bytes.as_ptr(), bytes.len())
}

/// The same of memory that is named only.
pub(crate) fn contains_range(from: *const u8, bytes: usize) -> bool {
    let Some(Some(arena)) = ARENA.get() else { return false };
    let start = arena.start.as_ptr() as usize;
    (from as usize).checked_sub(start).is_some_and(|at| at + bytes <= ARENA_BYTES)
}

/// Blocks of each length that a thread keeps for itself, newest on top.
const KEPT: [usize; CLASSES.len()] = [64, 16, 8, 2, 0];

/// What a thread gave back last, it takes first: that memory is in its cache, and no other thread is
/// asked. Given back to all when the thread ends.
struct Kept([Vec<u32>; CLASSES.len()]);

impl Drop for Kept {
    fn drop(&mut self) {
        let Some(Some(arena)) = ARENA.get() else { return };
        for (queue, pages) in arena.free.iter().zip(&self.0) {
            for page in pages {
                let _ = queue.push(*page);
            }
        }
    }
}

thread_local! {
    static KEPT_HERE: RefCell<Kept> = const { RefCell::new(Kept([const { Vec::new() }; CLASSES.len()])) };
}

/// A block of the arena, owned; it goes back when dropped.
pub(crate) struct Block {
    class: usize,
    page: u32,
}

impl Block {
    /// A free block of a length, if there is an arena and it has one.
    pub fn take(class: usize) -> Option<Block> {
        let arena = ARENA.get()?.as_ref()?;
        let kept = KEPT_HERE.try_with(|kept| kept.borrow_mut().0[class].pop()).ok().flatten();
        kept.or_else(|| arena.free[class].pop()).map(|page| Block { class, page })
    }

    fn start(&self) -> NonNull<Page> {
        let arena = ARENA.get().and_then(Option::as_ref).expect("a block comes from the arena");
        // SAFETY: every block lies in the arena.
        unsafe { arena.start.add(self.page as usize) }
    }

    pub fn pages(&self) -> &[Page] {
        // SAFETY: the block is ours alone, mapped for ever, zero or written since, and any bytes
        // are a page.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), CLASSES[self.class]) }
    }

    pub fn pages_mut(&mut self) -> &mut [Page] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), CLASSES[self.class]) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let (class, page) = (self.class, self.page);
        // A thread that is ending keeps nothing.
        let kept = KEPT_HERE.try_with(|kept| {
            let pages = &mut kept.borrow_mut().0[class];
            let room = pages.len() < KEPT[class];
            if room {
                pages.push(page);
            }
            room
        });
        if kept != Ok(true)
            && let Some(Some(arena)) = ARENA.get()
        {
            // Never full: it had room for every block when this one was taken.
            let _ = arena.free[class].push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods, reason = "what a thread does at its end is tested")]
    fn blocks_of_every_length_lie_in_the_arena_overlap_nowhere_and_outlive_threads() {
        establish().expect("there is memory");
        let mut blocks = Vec::new();
        for class in 0..CLASSES.len() {
            while let Some(block) = Block::take(class) {
                blocks.push(block);
            }
        }
        let mut owned = vec![false; ARENA_BYTES / PAGE];
        for block in &mut blocks {
            assert!(contains(bytemuck::cast_slice(block.pages())));
            let first = block.page as usize;
            let pages = first..first + block.pages_mut().len();
            assert!(owned[pages.clone()].iter().all(|owned| !owned), "pages {pages:?} belong to two blocks");
            owned[pages].fill(true);
        }
        assert!(!contains(&[0; 8]));
        drop(blocks);
        // Other tests of this process may hold some.
        assert!(Block::take(0).is_some());
        // More threads than there are blocks, if one were lost with each.
        for _ in 0..BLOCKS[3] {
            std::thread::spawn(|| takes_what_it_gave_back_last(3)).join().expect("it asserts");
        }
    }

    fn takes_what_it_gave_back_last(class: usize) {
        let blocks: Vec<Block> = (0..KEPT[class] + 2).map(|_| Block::take(class).expect("there is one")).collect();
        let pages: Vec<u32> = blocks.iter().map(|block| block.page).collect();
        // In this order: the first ones are kept.
        drop(blocks);
        assert_eq!(Block::take(class).map(|block| block.page), Some(pages[KEPT[class] - 1]));
    }
}
