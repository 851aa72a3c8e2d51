//! Reads and writes of any aligned length over a device whose single transfers are bounded.

use bytes::Bytes;
use cfs_device::{BlockDevice, DeviceResult, Placement};
use cfs_reactor::buffer::DmaBuf;
use cfs_wire::limits::PAGE;
use futures_util::future::try_join_all;

/// The device's largest transfer in whole pages.
fn transfer_max(device: &dyn BlockDevice) -> usize {
    (device.geometry().transfer_max as usize / PAGE * PAGE).max(PAGE)
}

pub(crate) async fn read(device: &dyn BlockDevice, offset: u64, length: usize) -> DeviceResult<Bytes> {
    let limit = transfer_max(device);
    if length <= limit {
        return Ok(device.read(offset, length).await?.freeze());
    }
    let reads = (0..length).step_by(limit).map(|at| device.read(offset + at as u64, limit.min(length - at)));
    let pieces = try_join_all(reads).await?;
    let mut whole = DmaBuf::uninitialised(length);
    for (piece, into) in pieces.iter().zip(whole.chunks_mut(limit)) {
        into.copy_from_slice(piece);
    }
    Ok(whole.freeze())
}

pub(crate) async fn write(
    device: &dyn BlockDevice,
    offset: u64,
    parts: Vec<Bytes>,
    placement: Placement,
    fua: bool,
) -> DeviceResult<()> {
    let limit = transfer_max(device);
    if parts.iter().map(Bytes::len).sum::<usize>() <= limit {
        return device.write(offset, parts, placement, fua).await;
    }
    let mut writes = Vec::new();
    let (mut start, mut batch, mut batched) = (offset, Vec::new(), 0);
    for mut part in parts {
        while !part.is_empty() {
            let taken = part.split_to(part.len().min(limit - batched));
            batched += taken.len();
            batch.push(taken);
            if batched == limit {
                writes.push(device.write(start, std::mem::take(&mut batch), placement, fua));
                start += limit as u64;
                batched = 0;
            }
        }
    }
    if !batch.is_empty() {
        writes.push(device.write(start, batch, placement, fua));
    }
    try_join_all(writes).await.map(|_| ())
}

/// `bytes` as device-aligned memory.
pub(crate) fn aligned(bytes: &[u8]) -> Bytes {
    DmaBuf::copy_of(bytes).freeze()
}

/// A payload as parts of whole pages: its full pages as they are, its tail in a padded page.
pub(crate) fn padded_parts(payload: &Bytes, parts: &mut Vec<Bytes>) {
    let whole = payload.len() / PAGE * PAGE;
    if whole > 0 {
        parts.push(payload.slice(..whole));
    }
    let tail = payload.slice(whole..);
    if !tail.is_empty() {
        let mut page = DmaBuf::zeroed(PAGE);
        page[..tail.len()].copy_from_slice(&tail);
        parts.push(page.freeze());
    }
}
