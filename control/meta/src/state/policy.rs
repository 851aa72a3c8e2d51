//! Redundancy policies of directories: given to what is created in them, and never changed in a
//! file, whose stored bytes all keep one promise.

use super::entry::ChangeKind;
use super::records::Inode;
use super::view::{Attempt, View};
use cfs_wire::meta::{XATTR_CREATE, XATTR_REPLACE};
use cfs_wire::{Errno, Ino, Policy, Timestamp};

impl View<'_> {
    pub(crate) fn effective_policy(&self, inode: &Inode) -> Policy {
        inode.policy.unwrap_or(self.config.policy)
    }

    /// Sets or takes away a directory's own policy. ENOTDIR for anything else, EOPNOTSUPP for
    /// one that the cluster cannot keep.
    pub(crate) async fn set_policy(&mut self, ino: Ino, policy: Option<Policy>, now: Timestamp) -> Attempt<()> {
        let mut inode = self.directory(ino).await?;
        if let Some(policy) = policy {
            let kept = policy.check_kept(self.config.tolerated, self.config.targets);
            kept.map_err(|_| Errno::EOPNOTSUPP)?;
        }
        if inode.policy != policy {
            inode.policy = policy;
            inode.touch(now);
            self.put_inode(&inode, ChangeKind::Attributes);
        }
        Ok(())
    }

    /// `set_policy` as setxattr(2) asks for it.
    pub(crate) async fn set_policy_xattr(&mut self, ino: Ino, value: &[u8], flags: u32, now: Timestamp) -> Attempt<()> {
        let own = self.directory(ino).await?.policy;
        if flags & XATTR_CREATE != 0 && own.is_some() {
            return Err(Errno::EEXIST.into());
        }
        if flags & XATTR_REPLACE != 0 && own.is_none() {
            return Err(Errno::ENODATA.into());
        }
        let text = std::str::from_utf8(value).map_err(|_| Errno::EINVAL)?;
        let policy = text.trim_end_matches('\0').parse().map_err(|_| Errno::EINVAL)?;
        self.set_policy(ino, Some(policy), now).await
    }

    pub(crate) async fn remove_policy_xattr(&mut self, ino: Ino, now: Timestamp) -> Attempt<()> {
        if self.live_inode(ino).await?.policy.is_none() {
            return Err(Errno::ENODATA.into());
        }
        self.set_policy(ino, None, now).await
    }
}
