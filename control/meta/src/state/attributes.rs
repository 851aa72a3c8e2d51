//! Changes of an inode's attributes (chmod, chown, truncate, utimensat).

use super::entry::ChangeKind;
use super::inode::MODE_MASK;
use super::view::{Attempt, View};
use cfs_wire::meta::{AttrChanges, FileKind, Grant, MetaReply, SetTime};
use cfs_wire::{Errno, Ino, SessionId, Timestamp};

impl View<'_> {
    /// Sets attributes in the order Linux does: owner and mode, size, times.
    pub(crate) async fn set_attr(
        &mut self,
        session: SessionId,
        ino: Ino,
        changes: &AttrChanges,
        now: Timestamp,
    ) -> Attempt<MetaReply> {
        let mut inode = self.live_inode(ino).await?;
        let at = |set: SetTime| match set {
            SetTime::Now => now,
            SetTime::At(time) => time,
        };
        inode.uid = changes.uid.unwrap_or(inode.uid);
        inode.gid = changes.gid.unwrap_or(inode.gid);
        if changes.kill_privileges {
            inode.kill_privileges();
        }
        if let Some(mode) = changes.mode {
            inode.mode = mode & MODE_MASK;
            self.acl_follows_mode(&inode).await?;
        }
        if let Some(size) = changes.size {
            match inode.kind {
                FileKind::File => {}
                FileKind::Directory => return Err(Errno::EISDIR.into()),
                _ => return Err(Errno::EINVAL.into()),
            }
            self.check_lease(ino, session).await?;
            self.truncate(&mut inode, size).await?;
            inode.mtime = now;
        }
        if let Some(atime) = changes.atime {
            inode.atime = at(atime);
        }
        if let Some(mtime) = changes.mtime {
            inode.mtime = at(mtime);
        }
        inode.touch(changes.ctime.unwrap_or(now));
        let kind = if changes.size.is_some() { ChangeKind::Content } else { ChangeKind::Attributes };
        self.put_inode(&inode, kind);
        Ok(MetaReply::Attr { attr: inode.attr(self.config.policy), grant: Grant::default() })
    }
}
