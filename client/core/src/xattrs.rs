//! Attributes that are set, and extended attributes.

use crate::Client;
use crate::cache::{Located, unexpected};
use crate::nodes::name;
use cfs_wire::limits::{FILE_BYTES_MAX, XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX};
use cfs_wire::meta::{AttrChanges, MetaOp, MetaReply, Name, XATTR_CAPABILITY, XATTR_POLICY};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino};
use std::rc::Rc;

impl Client {
    /// Changes attributes after everything written before is committed: a size then cuts what
    /// it should, and a time that is set is not overtaken by an earlier write's.
    pub async fn setattr(self: &Rc<Self>, ino: Ino, changes: AttrChanges) -> Result<Located, Errno> {
        if changes.size.is_some_and(|size| size > FILE_BYTES_MAX) {
            return Err(Errno::EFBIG);
        }
        let inode = self.inode(ino);
        let _turn = inode.order.acquire(1).await;
        if !(changes.size.is_some() && planted::is(Bug::ClientTruncateEarly)) {
            // A failure is the open files' to report; the change itself goes on.
            let _ = self.flush_in_turn(&inode).await;
        }
        let resized = changes.size.is_some();
        let outcome = self.change(MetaOp::SetAttr { ino, changes }).await;
        let untouched = outcome.as_ref().is_ok_and(|answer| self.stamps.unchanged_since(ino, answer.stamp));
        self.stamps.changed(ino);
        if resized {
            inode.state().extents.clear();
            self.pages.borrow_mut().drop_inode(ino);
        }
        let mut answer = outcome.inspect_err(|_| inode.state().attr = None)?;
        if untouched {
            // Only our own change happened meanwhile, and this is its outcome.
            answer.stamp = self.stamps.now();
        } else {
            // What was known before is void, and what is answered is not kept.
            inode.state().attr = None;
        }
        match &answer.reply {
            MetaReply::Attr { attr, grant } => Ok(self.take_attr(attr, *grant, &answer)),
            other => Err(unexpected(other)),
        }
    }

    pub async fn getxattr(self: &Rc<Self>, ino: Ino, attr_name: &[u8]) -> Result<Vec<u8>, Errno> {
        let attr_name = xattr_name(attr_name)?;
        // The policy is there without being set.
        if attr_name.as_slice() != XATTR_POLICY && self.cached_attr(ino).is_some_and(|located| !located.attr.has_xattrs)
        {
            return Err(Errno::ENODATA);
        }
        if attr_name.as_slice() == XATTR_CAPABILITY && self.drops_capability(ino) {
            return Err(Errno::ENODATA);
        }
        match self.read_call(MetaOp::GetXattr { ino, name: attr_name }).await?.reply {
            MetaReply::Value(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    pub async fn listxattr(self: &Rc<Self>, ino: Ino) -> Result<Vec<Name>, Errno> {
        if self.cached_attr(ino).is_some_and(|located| !located.attr.has_xattrs) {
            return Ok(Vec::new());
        }
        match self.read_call(MetaOp::ListXattr { ino }).await?.reply {
            MetaReply::Names(mut names) => {
                if self.drops_capability(ino) {
                    names.retain(|name| name.as_slice() != XATTR_CAPABILITY);
                }
                Ok(names)
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Whether what is dirty takes the capabilities away when it is committed.
    fn drops_capability(&self, ino: Ino) -> bool {
        self.known_inode(ino).is_some_and(|inode| inode.state().written.drop_capability)
    }

    /// `flags`: `cfs_wire::meta::XATTR_*`.
    pub async fn setxattr(self: &Rc<Self>, ino: Ino, attr_name: &[u8], value: &[u8], flags: u32) -> Result<(), Errno> {
        let attr_name = xattr_name(attr_name)?;
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(Errno::E2BIG);
        }
        let op = MetaOp::SetXattr { ino, name: attr_name, value: value.to_vec(), flags };
        self.change_attributes(ino, op).await
    }

    pub async fn removexattr(self: &Rc<Self>, ino: Ino, attr_name: &[u8]) -> Result<(), Errno> {
        let op = MetaOp::RemoveXattr { ino, name: xattr_name(attr_name)? };
        self.change_attributes(ino, op).await
    }

    async fn change_attributes(self: &Rc<Self>, ino: Ino, op: MetaOp) -> Result<(), Errno> {
        let inode = self.inode(ino);
        let _turn = inode.order.acquire(1).await;
        let _ = self.flush_in_turn(&inode).await;
        let outcome = self.change(op).await;
        self.attr_changed(ino);
        outcome.map(|_| ())
    }
}

fn xattr_name(bytes: &[u8]) -> Result<Name, Errno> {
    if bytes.len() > XATTR_NAME_BYTES_MAX {
        return Err(Errno::ERANGE);
    }
    // Unlike a file's name it may hold slashes.
    if bytes.contains(&b'/') {
        return if bytes.contains(&0) { Err(Errno::EINVAL) } else { Ok(Name::from_slice(bytes)) };
    }
    name(bytes)
}
