//! How ranges become commands, and what memory these work on.

use crate::nvme::spec::{Command, io};
use bytes::Bytes;
use cfs_reactor::buffer::{DmaBuf, is_page_aligned};
use std::ops::Range;
use std::rc::Rc;

/// Bytes of one range of a deallocation.
const RANGE_BYTES: usize = 16;
/// What is larger is not copied: a command of its own costs less.
const DIRECT_BYTES_MIN: usize = 16 << 10;
/// Blocks of one range: what its field holds, in pages.
const RANGE_BLOCKS_MAX: u32 = !0xFFF;

/// What a command does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Order {
    Read { offset: u64 },
    Write { offset: u64, fua: bool },
    Flush,
    Deallocate { ranges: u32 },
}

impl Order {
    /// The command for so many bytes of data, in blocks of 1 << `block_shift` bytes.
    pub fn command(self, namespace: u32, block_shift: u32, bytes: usize) -> Command {
        let blocks = |opcode: u8, offset: u64, flags: u32| {
            let count = bytes >> block_shift;
            assert!((1..=1 << 16).contains(&count) && count << block_shift == bytes, "{bytes} bytes in one command");
            Command::new(opcode, namespace).with_blocks(offset >> block_shift, count as u32, flags)
        };
        match self {
            Order::Read { offset } => blocks(io::READ, offset, 0),
            Order::Write { offset, fua } => blocks(io::WRITE, offset, if fua { io::FUA } else { 0 }),
            Order::Flush => Command::new(io::FLUSH, namespace),
            Order::Deallocate { ranges } => {
                assert!(ranges as usize * RANGE_BYTES <= bytes, "{ranges} ranges in {bytes} bytes");
                Command::new(io::DATASET_MANAGEMENT, namespace).with(10, ranges - 1).with(11, io::DEALLOCATE)
            }
        }
    }
}

/// The memory that a command works on, owned.
#[derive(Clone)]
pub(super) enum Data {
    None,
    /// Read into: all of a buffer, or a piece of it.
    Into {
        start: *mut u8,
        bytes: usize,
        buffer: Rc<DmaBuf>,
    },
    /// Written from: begins with a page.
    From(Bytes),
}

impl Data {
    pub fn into(mut buffer: DmaBuf) -> Data {
        let (start, bytes) = (buffer.as_mut_ptr(), buffer.len());
        Data::Into { start, bytes, buffer: Rc::new(buffer) }
    }

    /// A part of what is read into.
    pub fn piece(&self, range: Range<usize>) -> Data {
        let Data::Into { start, bytes, buffer } = self else { unreachable!("only what is read into has pieces") };
        assert!(range.start <= range.end && range.end <= *bytes, "{range:?} of {bytes} bytes");
        Data::Into { start: start.wrapping_add(range.start), bytes: range.len(), buffer: buffer.clone() }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Data::None => 0,
            Data::Into { bytes, .. } => *bytes,
            Data::From(bytes) => bytes.len(),
        }
    }

    /// What was read.
    pub fn into_buffer(self) -> DmaBuf {
        let Data::Into { buffer, .. } = self else { unreachable!("only what is read into is a buffer") };
        Rc::into_inner(buffer).expect("all that read into it have ended")
    }
}

/// The transfers of a length.
pub(super) fn pieces(length: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    (0..length).step_by(most).map(move |start| start..length.min(start + most))
}

/// The transfers of a write, one after the other: each of at most `most` bytes, a multiple of a page, and in
/// one run that begins with a page. Large parts are written from where they are, small neighbours from a copy.
///
/// A command that names several runs would not need that, but is not safe: when it has to wait, as during a
/// reset, a thread of the kernel reads the list of runs later, and on x86 that thread may take the list for
/// one of a 32-bit program (in_compat_syscall() by the registers of an interrupt; seen on 6.12.117 as EFAULT).
pub(super) fn runs(parts: Vec<Bytes>, most: usize) -> Vec<Bytes> {
    let mut runs = Vec::new();
    let mut small = Small { parts: Vec::new(), bytes: 0 };
    for mut part in parts {
        let direct = part.len() >= DIRECT_BYTES_MIN && is_page_aligned(&part);
        if direct {
            small.end(&mut runs);
        }
        while !part.is_empty() {
            let piece = part.split_to(part.len().min(most - small.bytes));
            small.bytes += piece.len();
            small.parts.push(piece);
            if direct || small.bytes == most {
                small.end(&mut runs);
            }
        }
    }
    small.end(&mut runs);
    runs
}

/// What becomes one run.
struct Small {
    parts: Vec<Bytes>,
    bytes: usize,
}

impl Small {
    fn end(&mut self, runs: &mut Vec<Bytes>) {
        let parts = std::mem::take(&mut self.parts);
        match &parts[..] {
            [] => {}
            [only] if is_page_aligned(only) => runs.push(only.clone()),
            parts => {
                let mut copy = DmaBuf::uninitialised(self.bytes);
                let mut at = 0;
                for part in parts {
                    copy[at..at + part.len()].copy_from_slice(part);
                    at += part.len();
                }
                runs.push(copy.freeze());
            }
        }
        self.bytes = 0;
    }
}

/// The lists of ranges, each with its number of them, that deallocate blocks: for one command each. A list
/// has its full length, since there are controllers that always read all of it.
pub(super) fn ranges(first: u64, blocks: u64) -> Vec<(Bytes, u32)> {
    // Figure 43 of the command set: attributes, length and first block of each range.
    let ranges: Vec<(u64, u32)> = (0..blocks)
        .step_by(RANGE_BLOCKS_MAX as usize)
        .map(|start| (first + start, (blocks - start).min(RANGE_BLOCKS_MAX.into()) as u32))
        .collect();
    let lists = ranges.chunks(io::RANGES_MAX).map(|ranges| {
        let mut list = DmaBuf::zeroed(io::RANGES_MAX * RANGE_BYTES);
        for ((start, count), entry) in ranges.iter().zip(list.chunks_mut(RANGE_BYTES)) {
            entry[4..8].copy_from_slice(&count.to_le_bytes());
            entry[8..16].copy_from_slice(&start.to_le_bytes());
        }
        (list.freeze(), ranges.len() as u32)
    });
    lists.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::pattern;
    use cfs_reactor::clock::SplitMix64;
    use cfs_wire::limits::PAGE;

    #[test]
    fn an_order_is_a_command_of_the_nvm_command_set() {
        let dwords = |command: Command| (10..16).map(|dword| command.dword(dword)).collect::<Vec<u32>>();
        let read = Order::Read { offset: 0x1_2345_6789 << 12 }.command(3, 12, 8 << 12);
        assert_eq!((read.opcode(), read.namespace()), (0x02, 3));
        assert_eq!(dwords(read), [0x2345_6789, 1, 7, 0, 0, 0]);
        let write = |fua| Order::Write { offset: 4096, fua }.command(1, 9, 512);
        assert_eq!((write(false).opcode(), dwords(write(false))), (0x01, vec![8, 0, 0, 0, 0, 0]));
        assert_eq!(dwords(write(true)), [8, 0, 1 << 30, 0, 0, 0]);
        let flush = Order::Flush.command(1, 12, 0);
        assert_eq!((flush.opcode(), dwords(flush)), (0x00, vec![0; 6]));
        let deallocate = Order::Deallocate { ranges: 256 }.command(1, 12, 4096);
        assert_eq!((deallocate.opcode(), dwords(deallocate)), (0x09, vec![255, 4, 0, 0, 0, 0]));
    }

    #[test]
    #[should_panic(expected = "in one command")]
    fn more_blocks_than_a_command_can_name_are_never_sent() {
        Order::Read { offset: 0 }.command(1, 9, (1 << 16 << 9) + 512);
    }

    #[test]
    fn a_length_is_cut_where_the_largest_transfer_ends() {
        let cut = |length| pieces(length, 8192).map(|piece| (piece.start, piece.end)).collect::<Vec<_>>();
        assert_eq!(cut(0), []);
        assert_eq!(cut(8192), [(0, 8192)]);
        assert_eq!(cut(16896), [(0, 8192), (8192, 16384), (16384, 16896)]);
    }

    fn places(runs: &[Bytes]) -> Vec<(*const u8, usize)> {
        runs.iter().map(|run| (run.as_ptr(), run.len())).collect()
    }

    #[test]
    fn large_parts_are_written_from_where_they_are_and_small_neighbours_from_one_copy() {
        let memory = pattern(1, 32 * PAGE);
        let (header, large, tail) =
            (memory.slice(..PAGE), memory.slice(2 * PAGE..10 * PAGE), memory.slice(12 * PAGE..13 * PAGE));
        // Alone, a small one needs no copy either.
        let parts = vec![header.clone(), Bytes::new(), large.clone(), tail.clone()];
        assert_eq!(places(&runs(parts.clone(), 64 * PAGE)), places(&[header.clone(), large.clone(), tail.clone()]));
        // A large one is cut where the largest transfer ends.
        let cut = runs(parts, 6 * PAGE);
        assert_eq!(
            places(&cut),
            places(&[header.clone(), large.slice(..6 * PAGE), large.slice(6 * PAGE..), tail.clone()])
        );
        let together = runs(vec![header.clone(), tail.clone(), header.clone()], 2 * PAGE);
        assert_eq!(together.iter().map(Bytes::len).collect::<Vec<_>>(), [2 * PAGE, PAGE]);
        assert_eq!(together.concat(), [header.clone(), tail, header.clone()].concat());
        // What begins inside a page is copied, whatever its length.
        let odd = memory.slice(512..512 + 8 * PAGE);
        let copied = runs(vec![header, odd.clone()], 64 * PAGE);
        assert_eq!((copied.len(), is_page_aligned(&copied[0])), (1, true));
        assert_eq!(copied[0][PAGE..], odd);
        assert_eq!(runs(vec![Bytes::new()], PAGE), Vec::<Bytes>::new());
    }

    #[test]
    fn every_run_is_one_transfer_and_together_they_are_the_write() {
        for seed in 0..200 {
            let mut random = SplitMix64::new(seed);
            let most = PAGE << random.below(6);
            let memory = pattern(seed, 64 * PAGE);
            let parts: Vec<Bytes> = (0..random.below(12))
                .map(|_| {
                    let block = if random.one_in(2) { 512 } else { PAGE };
                    let start = random.below((32 * PAGE / block) as u64) as usize * block;
                    memory.slice(start..start + random.below((16 * PAGE / block) as u64) as usize * block)
                })
                .collect();
            let runs = runs(parts.clone(), most);
            assert_eq!(runs.concat(), parts.concat(), "seed {seed}");
            for run in &runs {
                assert!((1..=most).contains(&run.len()) && is_page_aligned(run), "seed {seed}");
                assert!(run.len().is_multiple_of(512), "seed {seed}");
            }
        }
    }

    #[test]
    fn a_deallocation_names_each_range_once() {
        assert_eq!(ranges(5, 0), []);
        let one = ranges(5, 7);
        assert_eq!((one.len(), one[0].1, one[0].0.len()), (1, 1, 4096));
        assert_eq!(one[0].0[..16], [0, 0, 0, 0, 7, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert!(one[0].0[16..].iter().all(|byte| *byte == 0));
        let many = ranges(1, 300 * u64::from(RANGE_BLOCKS_MAX) + 9);
        assert_eq!(many.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [256, 45]);
        assert_eq!(many[1].0[44 * 16 + 4..][..4], [9, 0, 0, 0]);
        assert_eq!(many[1].0[44 * 16 + 8..][..8], (300 * u64::from(RANGE_BLOCKS_MAX) + 1).to_le_bytes());
    }

    #[test]
    fn pieces_of_a_buffer_lie_in_it_and_it_comes_back_whole() {
        let whole = Data::into(DmaBuf::zeroed(3 * PAGE));
        let Data::Into { start: beginning, .. } = whole else { unreachable!() };
        let piece = whole.piece(PAGE..2 * PAGE);
        let Data::Into { start, bytes, .. } = &piece else { unreachable!() };
        assert_eq!((*start as usize - beginning as usize, *bytes, piece.bytes()), (PAGE, PAGE, PAGE));
        drop(piece);
        assert_eq!(whole.into_buffer().len(), 3 * PAGE);
    }
}
