//! `fallocate`: holes and sizes.

use crate::Client;
use crate::files::OpenFile;
use cfs_wire::Errno;
use cfs_wire::limits::FILE_BYTES_MAX;
use cfs_wire::meta::FileWrite;
use std::rc::Rc;

pub const FALLOC_KEEP_SIZE: i32 = 0x01;
pub const FALLOC_PUNCH_HOLE: i32 = 0x02;
pub const FALLOC_ZERO_RANGE: i32 = 0x10;

impl Client {
    /// `mode` is Linux's. Space is not set aside: every write goes to a new place anyway, so
    /// what it would promise (no ENOSPC later) cannot be had by reserving the old one.
    /// COLLAPSE, INSERT and UNSHARE are EOPNOTSUPP.
    pub async fn fallocate(
        self: &Rc<Self>,
        file: &OpenFile,
        mode: i32,
        offset: u64,
        length: u64,
        kill_privileges: bool,
    ) -> Result<(), Errno> {
        if length == 0 {
            return Err(Errno::EINVAL);
        }
        let end = offset.checked_add(length).filter(|end| *end <= FILE_BYTES_MAX).ok_or(Errno::EFBIG)?;
        let keep_size = mode & FALLOC_KEEP_SIZE != 0;
        let mut writes = Vec::new();
        match mode & !FALLOC_KEEP_SIZE {
            0 if keep_size => return Ok(()),
            0 => {}
            FALLOC_PUNCH_HOLE if keep_size => writes.push(FileWrite::Punch { offset, length }),
            FALLOC_ZERO_RANGE => writes.push(FileWrite::Punch { offset, length }),
            _ => return Err(Errno::EOPNOTSUPP),
        }
        if !keep_size {
            writes.push(FileWrite::Extend { size: end });
        }
        let inode = &file.inode;
        let _turn = inode.order.acquire(1).await;
        let _ = self.flush_in_turn(inode).await;
        let session = self.session().await?;
        let outcome = self.commit(&session, inode, writes, Some(self.handle.wall()), kill_privileges).await;
        let mut state = inode.state();
        state.extents.clear();
        self.pages.borrow_mut().drop_inode(inode.ino);
        if outcome.is_err() {
            state.attr = None;
        }
        outcome.map(|_| ()).map_err(|error| error.errno())
    }
}
