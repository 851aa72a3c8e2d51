//! What every back end must do, as checks that panic: run [`all`] on an open device of at least
//! [`SIZE_MIN`] bytes whose contents do not matter.

use crate::{BlockDevice, DeviceError, Placement};
use bytes::Bytes;
use cfs_reactor::buffer::{DmaBuf, is_page_aligned};
use cfs_reactor::clock::SplitMix64;
use futures_util::future::join_all;
use std::rc::Rc;

/// The smallest device the checks fit on.
pub const SIZE_MIN: u64 = 8 << 20;

/// Every check. `seed` chooses places and contents.
pub async fn all(device: Rc<dyn BlockDevice>, seed: u64) {
    let geometry = device.geometry();
    assert!(geometry.size >= SIZE_MIN, "a device of {} bytes is too small", geometry.size);
    assert!(geometry.block.is_power_of_two() && (512..=4096).contains(&geometry.block));
    assert!(geometry.size.is_multiple_of(geometry.block.into()));
    both_edges_read_back(&*device, seed).await;
    parts_are_written_one_after_the_other(&*device, seed).await;
    parts_of_any_memory_are_written(&*device, seed).await;
    transfers_longer_than_the_largest_are_split(&*device, seed).await;
    concurrent_operations_do_not_mix(&*device, seed).await;
    random_writes_match_an_oracle(&*device, seed).await;
    unaligned_ranges_are_refused(&*device).await;
    ranges_beyond_the_end_are_refused(&*device).await;
    a_discard_spares_its_neighbours(&*device, seed).await;
    empty_transfers_are_answered(&*device).await;
    settling_a_range_spares_its_neighbours(&*device, seed).await;
}

/// `length` seeded bytes in page-aligned memory.
pub fn pattern(seed: u64, length: usize) -> Bytes {
    let mut random = SplitMix64::new(seed);
    let mut buffer = DmaBuf::uninitialised(length);
    for chunk in buffer.chunks_mut(8) {
        chunk.copy_from_slice(&random.next_u64().to_le_bytes()[..chunk.len()]);
    }
    buffer.freeze()
}

async fn write(device: &dyn BlockDevice, offset: u64, bytes: Bytes) {
    device.write(offset, vec![bytes], Placement::Data, false).await.unwrap();
}

async fn expect(device: &dyn BlockDevice, offset: u64, bytes: &[u8], what: &str) {
    let read = device.read(offset, bytes.len()).await.unwrap();
    assert!(is_page_aligned(&read), "{what}: a read's memory is page-aligned");
    assert_eq!(read.len(), bytes.len(), "{what}: length");
    let wrong = read.iter().zip(bytes).position(|(read, written)| read != written);
    assert_eq!(wrong, None, "{what}: {} bytes at {offset} differ at this byte", bytes.len());
}

pub async fn both_edges_read_back(device: &dyn BlockDevice, seed: u64) {
    let geometry = device.geometry();
    let block = u64::from(geometry.block);
    for (offset, blocks, fua) in [
        (0, 1, false),
        (0, 3, true),
        (block, 1, false),
        (geometry.size - block, 1, true),
        (geometry.size - 3 * block, 3, false),
    ] {
        let bytes = pattern(seed ^ offset ^ blocks, (blocks * block) as usize);
        device.write(offset, vec![bytes.clone()], Placement::Data, fua).await.unwrap();
        device.flush().await.unwrap();
        expect(device, offset, &bytes, "an edge").await;
    }
}

pub async fn parts_are_written_one_after_the_other(device: &dyn BlockDevice, seed: u64) {
    let block = device.geometry().block as usize;
    let parts: Vec<Bytes> = [1, 3, 1, 2].iter().map(|blocks| pattern(seed ^ *blocks as u64, blocks * block)).collect();
    device.write(block as u64, parts.clone(), Placement::Hot, false).await.unwrap();
    expect(device, block as u64, &parts.concat(), "four parts").await;
    // More parts than one system call takes (IOV_MAX is 1024).
    let many: Vec<Bytes> = (0..1030).map(|index| pattern(seed ^ index, block)).collect();
    device.write(0, many.clone(), Placement::Data, false).await.unwrap();
    expect(device, 0, &many.concat(), "1030 parts").await;
}

pub async fn parts_of_any_memory_are_written(device: &dyn BlockDevice, seed: u64) {
    let block = device.geometry().block as usize;
    let memory = pattern(seed, 4 * block + 1);
    let unaligned = memory.slice(1..1 + 2 * block);
    let parts = vec![memory.slice(..block), unaligned.clone(), memory.slice(block..2 * block)];
    device.write(0, parts.clone(), Placement::Data, false).await.unwrap();
    expect(device, 0, &parts.concat(), "aligned, unaligned, aligned").await;
}

pub async fn transfers_longer_than_the_largest_are_split(device: &dyn BlockDevice, seed: u64) {
    let geometry = device.geometry();
    let length = u64::from(geometry.transfer_max) + 3 * u64::from(geometry.block);
    let length = length.min(geometry.size / 2);
    let bytes = pattern(seed, length as usize);
    write(device, 0, bytes.clone()).await;
    expect(device, 0, &bytes, "a long transfer").await;
    device.write(0, vec![bytes.clone(), bytes.clone()], Placement::Data, true).await.unwrap();
    expect(device, length, &bytes, "the second of two long parts").await;
}

pub async fn concurrent_operations_do_not_mix(device: &dyn BlockDevice, seed: u64) {
    const EXTENT_BLOCKS: u64 = 4;
    let block = u64::from(device.geometry().block);
    let extent = EXTENT_BLOCKS * block;
    let bytes = |index: u64| pattern(seed ^ index, extent as usize);
    join_all((0..64).map(|index| write(device, index * extent, bytes(index)))).await;
    let overwrites = (0..64).step_by(2).map(|index| write(device, index * extent, bytes(index + 1000)));
    let reads =
        (1..64).step_by(2).map(async |index| expect(device, index * extent, &bytes(index), "a neighbour").await);
    futures_util::future::join(join_all(overwrites), join_all(reads)).await;
    for index in (0..64).step_by(2) {
        expect(device, index * extent, &bytes(index + 1000), "an overwritten extent").await;
    }
}

pub async fn random_writes_match_an_oracle(device: &dyn BlockDevice, seed: u64) {
    const BLOCKS: u64 = 64;
    let block = device.geometry().block as usize;
    let mut random = SplitMix64::new(seed);
    let mut oracle = pattern(seed, BLOCKS as usize * block).to_vec();
    write(device, 0, Bytes::copy_from_slice(&oracle)).await;
    for step in 0..60 {
        let first = random.below(BLOCKS);
        let count = 1 + random.below((BLOCKS - first).min(9));
        let range = first as usize * block..(first + count) as usize * block;
        match random.below(4) {
            0 => expect(device, range.start as u64, &oracle[range], &format!("seed {seed} step {step}")).await,
            1 => device.flush().await.unwrap(),
            _ => {
                let bytes = pattern(random.next_u64(), range.len());
                oracle[range.clone()].copy_from_slice(&bytes);
                device.write(range.start as u64, vec![bytes], Placement::Log, random.one_in(3)).await.unwrap();
            }
        }
    }
    expect(device, 0, &oracle, &format!("seed {seed} at the end")).await;
}

fn is_invalid<T>(result: Result<T, DeviceError>) -> bool {
    matches!(result, Err(DeviceError::Invalid { .. }))
}

pub async fn unaligned_ranges_are_refused(device: &dyn BlockDevice) {
    let block = u64::from(device.geometry().block);
    let bytes = pattern(0, 2 * block as usize);
    for (offset, length) in [(1, block), (block / 2, block), (0, block - 1), (0, 1), (block, block + block / 2)] {
        let part = bytes.slice(..length as usize);
        assert!(is_invalid(device.read(offset, length as usize).await), "read of {length} at {offset}");
        let written = device.write(offset, vec![part], Placement::Data, false).await;
        assert!(is_invalid(written), "write of {length} at {offset}");
        assert!(is_invalid(device.discard(offset, length).await), "discard of {length} at {offset}");
    }
    // Parts that only add up to a whole block.
    let halves = vec![bytes.slice(..block as usize / 2), bytes.slice(block as usize / 2..block as usize)];
    assert!(is_invalid(device.write(0, halves, Placement::Data, false).await), "two halves of a block");
}

pub async fn ranges_beyond_the_end_are_refused(device: &dyn BlockDevice) {
    let geometry = device.geometry();
    let block = u64::from(geometry.block);
    let last = u64::MAX - block + 1;
    for (offset, length) in [(geometry.size, block), (geometry.size - block, 2 * block), (last, block)] {
        let bytes = pattern(0, length as usize);
        assert!(is_invalid(device.read(offset, length as usize).await), "read of {length} at {offset}");
        let written = device.write(offset, vec![bytes], Placement::Data, false).await;
        assert!(is_invalid(written), "write of {length} at {offset}");
        assert!(is_invalid(device.discard(offset, length).await), "discard of {length} at {offset}");
    }
}

pub async fn a_discard_spares_its_neighbours(device: &dyn BlockDevice, seed: u64) {
    // Large enough that no device rounds it down to nothing.
    const DISCARDED: usize = 1 << 20;
    let block = device.geometry().block as usize;
    let bytes = pattern(seed, DISCARDED + 2 * block);
    write(device, 0, bytes.clone()).await;
    device.discard(block as u64, DISCARDED as u64).await.unwrap();
    expect(device, 0, &bytes[..block], "before a discard").await;
    expect(device, (block + DISCARDED) as u64, &bytes[block + DISCARDED..], "after a discard").await;
    let again = pattern(!seed, DISCARDED);
    write(device, block as u64, again.clone()).await;
    expect(device, block as u64, &again, "rewritten after a discard").await;
}

pub async fn empty_transfers_are_answered(device: &dyn BlockDevice) {
    assert_eq!(device.read(0, 0).await.unwrap().len(), 0);
    device.write(0, Vec::new(), Placement::Data, false).await.unwrap();
    device.discard(0, 0).await.unwrap();
}

/// What was settled takes writes; what the range holds before them is nobody's business.
pub async fn settling_a_range_spares_its_neighbours(device: &dyn BlockDevice, seed: u64) {
    let block = u64::from(device.geometry().block);
    let (start, length) = (16 * block, 32 * block);
    let before = pattern(seed, (64 * block) as usize);
    write(device, 0, before.clone()).await;
    device.settle(start, length).await.unwrap();
    expect(device, 0, &before[..start as usize], "before a settled range").await;
    expect(device, start + length, &before[(start + length) as usize..], "behind a settled range").await;
    let after = pattern(seed + 1, length as usize);
    write(device, start, after.clone()).await;
    device.settle(start, 0).await.unwrap();
    expect(device, start, &after, "written after settling").await;
    let beyond = device.settle(device.geometry().size, block).await;
    assert!(matches!(beyond, Err(DeviceError::Invalid { .. })), "{beyond:?}");
}
