//! Writing what a file system has allocated but not written.
//!
//! ext4 and xfs remember of preallocated blocks that they hold nothing. The first write to each
//! changes that, and a flush then has to commit the change to the journal: two or three flushes
//! of the disk instead of one, for every small append. Zeroes written ahead in large pieces pay
//! that once.

use super::UringDevice;
use crate::{BlockDevice, DeviceResult, Placement, check_range};
use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use rustix::fs::{SeekFrom, seek};
use std::os::fd::AsFd;

/// Zeroes written at once.
const PIECE: usize = 256 << 10;

impl UringDevice {
    pub(super) async fn settle_unwritten(&self, offset: u64, length: u64) -> DeviceResult<()> {
        check_range(&self.name, &self.geometry, "settling", offset, length)?;
        self.check_writable()?;
        let (mut at, end) = (offset, offset + length);
        let mut zeroes: Option<Bytes> = None;
        while self.unwritten_extents && at < end {
            let written_from = self.boundary(SeekFrom::Data(at), end);
            if written_from <= at {
                at = self.boundary(SeekFrom::Hole(at), end);
                continue;
            }
            let zeroes = zeroes.get_or_insert_with(|| DmaBuf::zeroed(PIECE).freeze());
            let piece = (written_from - at).min(PIECE as u64);
            self.write(at, vec![zeroes.slice(..piece as usize)], Placement::Log, false).await?;
            at += piece;
        }
        Ok(())
    }

    /// Where written or unwritten blocks start from a place on, at most `end`. A file system that
    /// can't tell counts as written.
    fn boundary(&self, from: SeekFrom, end: u64) -> u64 {
        let block = u64::from(self.geometry.block);
        match (seek(self.file.as_fd(), from), from) {
            // A block that is written in part is written.
            (Ok(found), SeekFrom::Data(_)) => found.min(end) / block * block,
            (Ok(found), _) => found.min(end).next_multiple_of(block),
            // No data behind this place.
            (Err(rustix::io::Errno::NXIO), SeekFrom::Data(_)) => end,
            (Err(_), SeekFrom::Data(at)) => at,
            (Err(_), _) => end,
        }
    }
}
