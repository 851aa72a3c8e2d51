//! For loom: memory is words of 32 bits that it keeps the history of, and real memory is not touched.

use loom::sync::atomic::{AtomicU32, Ordering};
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;

thread_local! {
    /// The driver's fences of this kind are left out: loom has to find what that does. (Its threads are all
    /// of one thread.)
    pub static LEFT_OUT: Cell<Option<Ordering>> = const { Cell::new(None) };
}

pub fn fence(order: Ordering) {
    if LEFT_OUT.get() != Some(order) {
        loom::sync::atomic::fence(order);
    }
}

const WORD: usize = size_of::<u32>();

/// What two threads of a model share.
pub type Words = Arc<[AtomicU32]>;

pub struct Memory(Words);

impl Memory {
    /// As many bytes, zero. They are not those at `start`.
    pub fn new(_start: NonNull<u8>, bytes: usize) -> Memory {
        let words: Vec<AtomicU32> = (0..bytes / WORD).map(|_| AtomicU32::new(0)).collect();
        Memory(words.into())
    }

    #[cfg(test)]
    pub fn words(&self) -> Words {
        self.0.clone()
    }

    /// # Safety
    /// None is asked for here.
    pub unsafe fn write<T: bytemuck::NoUninit>(&self, offset: usize, value: T) {
        self.store(offset, bytemuck::bytes_of(&value));
    }

    /// # Safety
    /// None is asked for here.
    pub unsafe fn read<T: bytemuck::AnyBitPattern>(&self, offset: usize) -> T {
        let mut bytes = vec![0; size_of::<T>()];
        self.load(offset, &mut bytes);
        bytemuck::pod_read_unaligned(&bytes)
    }

    /// # Safety
    /// None is asked for here.
    pub unsafe fn copy_in(&self, offset: usize, from: &[u8]) {
        self.store(offset, from);
    }

    /// # Safety
    /// None is asked for here.
    pub unsafe fn copy_out(&self, offset: usize, into: &mut [u8]) {
        self.load(offset, into);
    }

    /// # Safety
    /// None is asked for here.
    pub unsafe fn clear(&self, bytes: usize) {
        self.store(0, &vec![0; bytes]);
    }

    fn store(&self, offset: usize, bytes: &[u8]) {
        for (index, word) in whole_words(offset, bytes.len()).zip(bytes.chunks_exact(WORD)) {
            let word = u32::from_ne_bytes(word.try_into().expect("chunks of a word"));
            self.0[index].store(word, Ordering::Relaxed);
        }
    }

    fn load(&self, offset: usize, bytes: &mut [u8]) {
        for (index, word) in whole_words(offset, bytes.len()).zip(bytes.chunks_exact_mut(WORD)) {
            word.copy_from_slice(&self.0[index].load(Ordering::Relaxed).to_ne_bytes());
        }
    }
}

fn whole_words(offset: usize, bytes: usize) -> std::ops::Range<usize> {
    assert!(offset.is_multiple_of(WORD) && bytes.is_multiple_of(WORD), "{bytes} bytes at {offset} are not words");
    offset / WORD..(offset + bytes) / WORD
}
