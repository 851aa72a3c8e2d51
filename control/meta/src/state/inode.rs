//! Inode records: loading under key locks, creation with inheritance, and removal once the last
//! link and the last hold are gone.

use super::acl::{self, Acl};
use super::entry::{ChangeKind, FollowUp};
use super::records::{Inode, XattrList};
use super::view::{Attempt, View, bad_key};
use super::{StateError, keys};
use cfs_wire::limits::SYMLINK_BYTES_MAX;
use cfs_wire::meta::{FileKind, NewNode};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, SessionId, Timestamp};
use smallvec::SmallVec;

/// Permission bits and setuid, setgid, sticky.
pub(crate) const MODE_MASK: u32 = 0o7777;
pub(crate) const S_ISUID: u32 = 0o4000;
pub(crate) const S_ISGID: u32 = 0o2000;
const S_IXGRP: u32 = 0o010;

/// Extents one entry releases of a removed file; a larger one takes several entries, so that
/// no entry holds the shard up for long.
pub(crate) const REAP_EXTENTS_MAX: usize = 512;

impl Inode {
    /// Marks a change of attributes at `now`.
    pub(crate) fn touch(&mut self, now: Timestamp) {
        self.ctime = now;
        self.version += 1;
    }

    /// Marks a change of content (or of a directory's names) at `now`.
    pub(crate) fn modify(&mut self, now: Timestamp) {
        self.mtime = now;
        self.touch(now);
    }

    pub(crate) fn kill_privileges(&mut self) {
        if self.is_dir() {
            return;
        }
        self.mode &= !S_ISUID;
        if self.mode & S_IXGRP != 0 {
            self.mode &= !S_ISGID;
        }
    }
}

/// When an inode without links goes that nobody holds any more.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unheld {
    /// In the same entry, or begins to.
    Goes,
    /// In an entry of its own: one session may have held any number.
    GoesLater,
}

impl View<'_> {
    /// An inode, whatever transactions are prepared.
    pub(crate) async fn inode_raw(&self, ino: Ino) -> Result<Option<Inode>, StateError> {
        self.get_versioned(&keys::inode(self.shard, ino)).await
    }

    pub(crate) async fn inode(&self, ino: Ino) -> Attempt<Inode> {
        self.unlocked(&keys::locked_inode(self.shard, ino)).await?;
        Ok(self.inode_raw(ino).await?.ok_or(Errno::ESTALE)?)
    }

    /// An inode that something may still be done to: one that waits for its last extents to be
    /// released is as good as gone.
    pub(crate) async fn live_inode(&self, ino: Ino) -> Attempt<Inode> {
        let inode = self.inode(ino).await?;
        if inode.nlink == 0 && !self.is_held(ino).await? {
            return Err(Errno::ESTALE.into());
        }
        Ok(inode)
    }

    /// A directory in which names are looked up or changed.
    pub(crate) async fn directory(&self, ino: Ino) -> Attempt<Inode> {
        self.unlocked(&keys::locked_inode(self.shard, ino)).await?;
        let inode = self.inode_raw(ino).await?.ok_or(Errno::ENOENT)?;
        if !inode.is_dir() {
            return Err(Errno::ENOTDIR.into());
        }
        if inode.nlink == 0 {
            return Err(Errno::ENOENT.into());
        }
        Ok(inode)
    }

    pub(crate) fn put_inode(&mut self, inode: &Inode, kind: ChangeKind) {
        self.changed(inode.ino, kind);
        self.put_versioned(keys::inode(self.shard, inode.ino), inode);
    }

    pub(crate) async fn is_held(&self, ino: Ino) -> Result<bool, StateError> {
        self.any(&keys::of_ino(self.shard, keys::HOLD, ino)).await
    }

    pub(crate) fn next_ino(&mut self) -> Attempt<Ino> {
        let counter = self.counters.next_ino;
        if counter > Ino::COUNTER_MAX {
            return Err(Errno::ENOSPC.into());
        }
        self.counters.next_ino += 1;
        Ok(Ino::new(self.shard, counter))
    }

    /// Builds (without storing) an inode as it is created in `parent`, with the xattrs it
    /// inherits. The number is the caller's to set.
    pub(crate) async fn new_inode(
        &self,
        parent: &Inode,
        node: &NewNode,
        now: Timestamp,
    ) -> Attempt<(Inode, XattrList)> {
        if (node.kind == FileKind::Symlink) == node.target.is_empty() {
            return Err(if node.target.is_empty() { Errno::ENOENT } else { Errno::EINVAL }.into());
        }
        if node.target.len() > SYMLINK_BYTES_MAX {
            return Err(Errno::ENAMETOOLONG.into());
        }
        let dir = node.kind == FileKind::Directory;
        let device = matches!(node.kind, FileKind::CharDevice | FileKind::BlockDevice);
        let mut inode = Inode {
            ino: parent.ino,
            kind: node.kind,
            mode: node.mode & MODE_MASK,
            nlink: if dir { 2 } else { 1 },
            uid: node.uid,
            gid: node.gid,
            rdev: if device { node.rdev } else { 0 },
            size: 0,
            mapped: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            version: 1,
            inline: node.target.clone(),
            parent: dir.then_some(parent.ino),
            entries: 0,
            xattrs: 0,
            xattr_list_bytes: 0,
            access_acl: false,
            default_acl: false,
            tmpfile: false,
            commits: Vec::new(),
            trim: None,
            commits_forgotten: false,
            policy: parent.policy,
        };
        if parent.mode & S_ISGID != 0 {
            inode.gid = parent.gid;
            if dir {
                inode.mode |= S_ISGID;
            }
        }
        let xattrs = self.inherit(parent, &mut inode, node.umask).await?;
        for (name, _) in &xattrs {
            inode.xattrs += 1;
            inode.xattr_list_bytes += name.len() as u32 + 1;
        }
        Ok((inode, xattrs))
    }

    /// Applies the parent's default ACL, or the umask where there is none.
    async fn inherit(&self, parent: &Inode, inode: &mut Inode, umask: u32) -> Attempt<XattrList> {
        if inode.kind == FileKind::Symlink {
            inode.mode = 0o777;
            return Ok(Vec::new());
        }
        let mut xattrs = Vec::new();
        if !parent.default_acl {
            inode.mode &= !(umask & 0o777);
            return Ok(xattrs);
        }
        let key = keys::xattr(self.shard, parent.ino, acl::DEFAULT);
        let value: Vec<u8> = self.get_versioned(&key).await?.ok_or_else(|| bad_key(&key))?;
        let default = Acl::parse(&value)?.ok_or_else(|| bad_key(&key))?;
        let (access, mode) = default.inherited(inode.mode);
        inode.mode = mode;
        if access.is_extended() {
            inode.access_acl = true;
            xattrs.push((SmallVec::from_slice(acl::ACCESS), access.encode()));
        }
        if inode.is_dir() {
            inode.default_acl = true;
            xattrs.push((SmallVec::from_slice(acl::DEFAULT), value));
        }
        Ok(xattrs)
    }

    /// Stores a new inode with its xattrs.
    pub(crate) fn add_inode(&mut self, inode: &Inode, xattrs: &XattrList) {
        self.counters.inodes += 1;
        self.put_inode(inode, ChangeKind::Created);
        for (name, value) in xattrs {
            self.put_versioned(keys::xattr(self.shard, inode.ino, name), value);
        }
    }

    pub(crate) fn add_hold(&mut self, ino: Ino, session: SessionId) {
        self.put(keys::hold(self.shard, ino, session), &());
        self.put(keys::session_ino(self.shard, keys::SESSION_HOLD, session, ino), &());
    }

    /// Drops a session's hold; the inode goes with the last one when it has no links.
    pub(crate) async fn drop_hold(&mut self, ino: Ino, session: SessionId, unheld: Unheld) -> Attempt<()> {
        let key = keys::hold(self.shard, ino, session);
        if !self.exists(&key).await? {
            return Ok(());
        }
        self.delete(key);
        self.delete(keys::session_ino(self.shard, keys::SESSION_HOLD, session, ino));
        match self.inode_raw(ino).await? {
            // A transaction is about to link it: what comes of that decides.
            Some(_) if self.exists(&keys::locked_inode(self.shard, ino)).await? => {
                self.follow_up.push(FollowUp::Reap { ino });
                Ok(())
            }
            Some(inode) if inode.nlink == 0 && unheld == Unheld::GoesLater => {
                self.follow_up.push(FollowUp::Reap { ino });
                Ok(())
            }
            Some(inode) if inode.nlink == 0 => self.unlinked(inode).await,
            _ => Ok(()),
        }
    }

    /// Stores an inode whose last link is gone: an orphan while it is held, else nothing.
    pub(crate) async fn unlinked(&mut self, inode: Inode) -> Attempt<()> {
        let ino = inode.ino;
        if !planted::is(Bug::MetaDropOrphan) {
            self.put(keys::orphan(self.shard, ino), &());
        }
        if self.is_held(ino).await? {
            self.put_inode(&inode, ChangeKind::Attributes);
            return Ok(());
        }
        if planted::is(Bug::MetaDropOrphan) {
            self.put_inode(&inode, ChangeKind::Attributes);
            return Ok(());
        }
        self.reap(inode).await
    }

    /// Releases a batch of an orphan's extents; with the last of them the inode goes.
    pub(crate) async fn reap(&mut self, mut inode: Inode) -> Attempt<()> {
        let ino = inode.ino;
        let whole = self.release_extents(&mut inode, REAP_EXTENTS_MAX).await?;
        if !whole {
            self.put_inode(&inode, ChangeKind::Attributes);
            self.follow_up.push(FollowUp::Reap { ino });
            return Ok(());
        }
        for table in [keys::XATTR, keys::HOLD] {
            for (key, _) in self.scan_all(&keys::of_ino(self.shard, table, ino)).await? {
                self.delete(key);
            }
        }
        self.drop_locks_of_inode(ino).await?;
        self.drop_lease_of_inode(ino).await?;
        self.delete(keys::orphan(self.shard, ino));
        if inode.trim.is_some() {
            self.delete(keys::trimming(self.shard, ino));
        }
        self.delete(keys::inode(self.shard, ino));
        if planted::is(Bug::MetaReuseInodeNumber) && ino.counter() + 1 == self.counters.next_ino {
            self.counters.next_ino -= 1;
        }
        self.counters.inodes = self.counters.inodes.saturating_sub(1);
        self.changed(ino, ChangeKind::Removed);
        Ok(())
    }

    /// `LogEntry::Reap`: nothing when there is nothing to release any more.
    pub(crate) async fn reap_orphan(&mut self, ino: Ino) -> Attempt<()> {
        self.unlocked(&keys::locked_inode(self.shard, ino)).await?;
        match self.inode_raw(ino).await? {
            Some(inode) if inode.nlink == 0 && !self.is_held(ino).await? => self.reap(inode).await,
            Some(inode) if inode.trim.is_some() => self.go_on_trimming(inode).await,
            _ => Ok(()),
        }
    }
}
