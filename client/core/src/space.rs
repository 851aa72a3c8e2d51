//! `fallocate`: holes and sizes.

use crate::Client;
use crate::calls::CallError;
use crate::files::OpenFile;
use crate::inode::Inode;
use crate::session::Session;
use cfs_wire::Errno;
use cfs_wire::limits::FILE_BYTES_MAX;
use cfs_wire::meta::FileWrite;
use std::ops::Range;
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
        let hole = match mode & !FALLOC_KEEP_SIZE {
            0 if keep_size => return Ok(()),
            0 => None,
            FALLOC_PUNCH_HOLE if keep_size => Some(offset..end),
            FALLOC_ZERO_RANGE => Some(offset..end),
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let size = (!keep_size).then_some(FileWrite::Extend { size: end });
        let inode = &file.inode;
        let _turn = inode.order.acquire(1).await;
        let _ = self.flush_in_turn(inode).await;
        let session = self.session().await?;
        inode.state().check_locks()?;
        let outcome = self.punch(&session, inode, hole, size, kill_privileges).await;
        let mut state = inode.state();
        state.extents.clear();
        self.pages.borrow_mut().drop_inode(inode.ino);
        if outcome.is_err() {
            state.attr = None;
        }
        outcome.map_err(|error| error.errno())
    }

    /// Commits a hole and, with the last of it, a write behind it. A piece that holds more extents
    /// than one commit may drop is halved; after one that does not, the next may be twice as long.
    async fn punch(
        self: &Rc<Self>,
        session: &Rc<Session>,
        inode: &Rc<Inode>,
        hole: Option<Range<u64>>,
        behind: Option<FileWrite>,
        kill_privileges: bool,
    ) -> Result<(), CallError> {
        let Range { start: mut offset, end } = hole.unwrap_or_default();
        let mut piece = end - offset;
        loop {
            let length = piece.min(end - offset);
            let is_last = offset + length == end;
            let punch = (length > 0).then_some(FileWrite::Punch { offset, length });
            let writes = punch.into_iter().chain(behind.clone().filter(|_| is_last)).collect();
            match self.commit(session, inode, writes, Some(self.handle.wall()), kill_privileges).await {
                Ok(_) if is_last => return Ok(()),
                Ok(_) => {
                    offset += length;
                    piece = piece.saturating_mul(2);
                }
                Err(CallError::Errno(Errno::E2BIG)) if length > 1 => piece = length / 2,
                Err(error) => return Err(error),
            }
        }
    }
}
