//! Extended attributes (xattr(7)), and the two of them that are ACLs.

use super::acl::{self, Acl};
use super::entry::ChangeKind;
use super::inode::S_ISGID;
use super::keys;
use super::records::Inode;
use super::view::{Attempt, View};
use cfs_wire::limits::{XATTR_LIST_BYTES_MAX, XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX};
use cfs_wire::meta::{FileKind, MetaReply, Name, XATTR_CLEAR_SGID, XATTR_CREATE, XATTR_POLICY, XATTR_REPLACE};
use cfs_wire::{Errno, Ino, Timestamp};
use smallvec::SmallVec;

fn is_acl(name: &[u8]) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}

/// Whether an attribute of this name can be on such an inode at all.
fn check_name(inode: &Inode, name: &[u8]) -> Result<(), Errno> {
    if name.is_empty() || name.len() > XATTR_NAME_BYTES_MAX || name.contains(&0) {
        return Err(Errno::ERANGE);
    }
    if is_acl(name) {
        return if inode.kind == FileKind::Symlink { Err(Errno::EOPNOTSUPP) } else { Ok(()) };
    }
    for prefix in [b"user.".as_slice(), b"trusted.", b"security."] {
        match name.strip_prefix(prefix) {
            Some([]) => return Err(Errno::EINVAL),
            Some(_) if prefix != b"user." => return Ok(()),
            Some(_) if matches!(inode.kind, FileKind::File | FileKind::Directory) => return Ok(()),
            // Anyone may write to a fifo or device node, or through a symlink.
            Some(_) => return Err(Errno::EPERM),
            None => {}
        }
    }
    Err(Errno::EOPNOTSUPP)
}

impl View<'_> {
    pub(crate) async fn get_xattr(&self, ino: Ino, name: &[u8]) -> Attempt<Vec<u8>> {
        let inode = self.inode(ino).await?;
        if name == XATTR_POLICY {
            return Ok(self.effective_policy(&inode).to_string().into_bytes());
        }
        match check_name(&inode, name) {
            // What can't be set on it isn't there.
            Err(Errno::EPERM) => return Err(Errno::ENODATA.into()),
            other => other?,
        }
        Ok(self.get_versioned(&keys::xattr(self.shard, ino, name)).await?.ok_or(Errno::ENODATA)?)
    }

    pub(crate) async fn list_xattrs(&self, ino: Ino) -> Attempt<Vec<Name>> {
        let inode = self.inode(ino).await?;
        if inode.xattrs == 0 {
            return Ok(Vec::new());
        }
        let prefix = keys::of_ino(self.shard, keys::XATTR, ino);
        let rows = self.scan_all(&prefix).await?;
        Ok(rows.iter().map(|(key, _)| SmallVec::from_slice(key.get(prefix.len()..).unwrap_or_default())).collect())
    }

    /// Stores or replaces without touching times; counts are kept in `inode`.
    async fn store_xattr(&mut self, inode: &mut Inode, name: &[u8], value: &[u8]) -> Attempt<()> {
        let key = keys::xattr(self.shard, inode.ino, name);
        if !self.exists(&key).await? {
            let listed = inode.xattr_list_bytes + name.len() as u32 + 1;
            if listed as usize > XATTR_LIST_BYTES_MAX {
                return Err(Errno::ENOSPC.into());
            }
            inode.xattr_list_bytes = listed;
            inode.xattrs += 1;
        }
        self.put_versioned(key, &value);
        Ok(())
    }

    /// Whether there was one.
    pub(crate) async fn erase_xattr(&mut self, inode: &mut Inode, name: &[u8]) -> Attempt<bool> {
        if inode.xattrs == 0 {
            return Ok(false);
        }
        let key = keys::xattr(self.shard, inode.ino, name);
        if !self.exists(&key).await? {
            return Ok(false);
        }
        self.delete(key);
        inode.xattrs = inode.xattrs.saturating_sub(1);
        inode.xattr_list_bytes = inode.xattr_list_bytes.saturating_sub(name.len() as u32 + 1);
        Ok(true)
    }

    pub(crate) async fn set_xattr(
        &mut self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        flags: u32,
        now: Timestamp,
    ) -> Attempt<MetaReply> {
        if flags & !(XATTR_CREATE | XATTR_REPLACE | XATTR_CLEAR_SGID) != 0 {
            return Err(Errno::EINVAL.into());
        }
        if name == XATTR_POLICY {
            self.set_policy_xattr(ino, value, flags, now).await?;
            return Ok(MetaReply::Done);
        }
        let mut inode = self.live_inode(ino).await?;
        check_name(&inode, name)?;
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(Errno::E2BIG.into());
        }
        let exists = self.exists(&keys::xattr(self.shard, ino, name)).await?;
        if flags & XATTR_CREATE != 0 && exists {
            return Err(Errno::EEXIST.into());
        }
        if flags & XATTR_REPLACE != 0 && !exists {
            return Err(Errno::ENODATA.into());
        }
        if name == acl::ACCESS {
            self.set_access_acl(&mut inode, value, flags).await?;
        } else if name == acl::DEFAULT {
            self.set_default_acl(&mut inode, value).await?;
        } else {
            self.store_xattr(&mut inode, name, value).await?;
        }
        inode.touch(now);
        self.put_inode(&inode, ChangeKind::Attributes);
        Ok(MetaReply::Done)
    }

    async fn set_access_acl(&mut self, inode: &mut Inode, value: &[u8], flags: u32) -> Attempt<()> {
        let acl = if value.is_empty() { None } else { Acl::parse(value)? };
        if let Some(acl) = &acl {
            inode.mode = acl.mode(inode.mode);
            if flags & XATTR_CLEAR_SGID != 0 {
                inode.mode &= !S_ISGID;
            }
        }
        // One that says what the mode bits say is not kept.
        match acl.filter(Acl::is_extended) {
            Some(acl) => {
                self.store_xattr(inode, acl::ACCESS, &acl.encode()).await?;
                inode.access_acl = true;
            }
            None => {
                self.erase_xattr(inode, acl::ACCESS).await?;
                inode.access_acl = false;
            }
        }
        Ok(())
    }

    async fn set_default_acl(&mut self, inode: &mut Inode, value: &[u8]) -> Attempt<()> {
        let acl = if value.is_empty() { None } else { Acl::parse(value)? };
        if !inode.is_dir() {
            return if acl.is_some() { Err(Errno::EACCES.into()) } else { Ok(()) };
        }
        inode.default_acl = acl.is_some();
        match acl {
            Some(acl) => self.store_xattr(inode, acl::DEFAULT, &acl.encode()).await?,
            None => {
                self.erase_xattr(inode, acl::DEFAULT).await?;
            }
        }
        Ok(())
    }

    /// The mode bits changed: the access ACL follows.
    pub(crate) async fn acl_follows_mode(&mut self, inode: &Inode) -> Attempt<()> {
        if !inode.access_acl {
            return Ok(());
        }
        let key = keys::xattr(self.shard, inode.ino, acl::ACCESS);
        let value: Option<Vec<u8>> = self.get_versioned(&key).await?;
        if let Some(acl) = Acl::parse(&value.unwrap_or_default())? {
            self.put_versioned(key, &acl.with_mode(inode.mode).encode());
        }
        Ok(())
    }

    pub(crate) async fn remove_xattr(&mut self, ino: Ino, name: &[u8], now: Timestamp) -> Attempt<MetaReply> {
        if name == XATTR_POLICY {
            self.remove_policy_xattr(ino, now).await?;
            return Ok(MetaReply::Done);
        }
        let mut inode = self.live_inode(ino).await?;
        check_name(&inode, name)?;
        let existed = self.erase_xattr(&mut inode, name).await?;
        if !existed && !is_acl(name) {
            return Err(Errno::ENODATA.into());
        }
        if existed {
            inode.access_acl &= name != acl::ACCESS;
            inode.default_acl &= name != acl::DEFAULT;
            inode.touch(now);
            self.put_inode(&inode, ChangeKind::Attributes);
        }
        Ok(MetaReply::Done)
    }
}
