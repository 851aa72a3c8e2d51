//! Carries operations out, on the client's executor.

use crate::operation::{Answer, Asked, Handle, Opened, Operation, Outcome};
use cfs_client::{Caller, Client, LocatedEntry, NewFile, OpenFile, OpenFlags};
use cfs_wire::meta::{AttrChanges, DirEntry, FileKind, Name, XATTR_CLEAR_SGID};
use cfs_wire::{Errno, Ino};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Entries asked of the server at once; the kernel takes some 100 of them per request.
const ENTRIES_PER_CALL: u32 = 512;
/// Where `.` and `..` stand in a directory. A real cookie this small would need a name whose
/// 52-bit hash is 0.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;
/// A copy in one request: the kernel's caller gets a short count and goes on.
const COPY_BYTES_MAX: u64 = 1 << 30;

/// A directory that is being listed.
struct Listing {
    ino: Ino,
    /// What was fetched and perhaps not yet taken, with the place it was fetched from.
    entries: Vec<DirEntry>,
    from: u64,
    end: bool,
}

pub(crate) struct Performer {
    client: Rc<Client>,
    files: RefCell<BTreeMap<Handle, Rc<OpenFile>>>,
    listings: RefCell<BTreeMap<Handle, Rc<RefCell<Listing>>>>,
    next_handle: Cell<u64>,
}

impl Performer {
    pub fn new(client: Rc<Client>) -> Performer {
        Performer { client, files: RefCell::default(), listings: RefCell::default(), next_handle: Cell::new(1) }
    }

    pub async fn perform(&self, asked: Asked) -> Outcome {
        let Asked { caller, operation } = asked;
        match operation {
            Operation::Lookup { .. }
            | Operation::MkNod { .. }
            | Operation::MkDir { .. }
            | Operation::Symlink { .. }
            | Operation::Create { .. }
            | Operation::Link { .. }
            | Operation::Unlink { .. }
            | Operation::RmDir { .. }
            | Operation::Rename { .. } => self.name_operation(caller, operation).await,
            Operation::Open { .. }
            | Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Flush { .. }
            | Operation::Fsync { .. }
            | Operation::Release { .. }
            | Operation::Fallocate { .. }
            | Operation::Seek { .. }
            | Operation::CopyRange { .. } => self.file_operation(caller, operation).await,
            other => self.inode_operation(caller, other).await,
        }
    }

    async fn name_operation(&self, caller: Caller, operation: Operation) -> Outcome {
        let client = &self.client;
        match operation {
            // Asked by inode number alone (FUSE_EXPORT_SUPPORT): a file handle is being opened.
            Operation::Lookup { dir, name } if name == b"." => self.by_number(dir).await,
            Operation::Lookup { dir, name } if name == b".." => {
                let parent = client.readdir(dir, 0, 1, false).await?.parent;
                self.by_number(parent).await
            }
            Operation::Lookup { dir, name } => match client.lookup(dir, &name).await {
                Ok(found) => Ok(entry(found)),
                Err(Ok(negative)) => Ok(Answer::Absent { valid: negative.valid }),
                Err(Err(errno)) => Err(errno),
            },
            Operation::MkNod { dir, name, kind, mode, umask, rdev } => {
                client.mknod(caller, dir, &name, NewFile { kind, mode, umask, rdev }).await.map(entry)
            }
            Operation::MkDir { dir, name, mode, umask } => {
                client.mkdir(caller, dir, &name, mode, umask).await.map(entry)
            }
            Operation::Symlink { dir, name, target } => client.symlink(caller, dir, &name, &target).await.map(entry),
            Operation::Create { dir, name, mode, umask, flags } => {
                let flags = OpenFlags { truncate: false, ..OpenFlags::from_bits(flags) };
                let new = NewFile::regular(mode, umask);
                let (made, file) = client.create(caller, dir, &name, new, flags).await?;
                let opened = self.keep(file);
                // The kernel takes one time for attributes and entry alike.
                let valid = made.attr_valid.min(made.entry_valid);
                Ok(Answer::Created { attr: made.attr, valid, opened })
            }
            Operation::Link { ino, dir, name } => client.link(ino, dir, &name).await.map(entry),
            Operation::Unlink { dir, name } => client.unlink(dir, &name).await.map(done),
            Operation::RmDir { dir, name } => client.rmdir(dir, &name).await.map(done),
            Operation::Rename { dir, name, to_dir, to_name, flags } => {
                client.rename(dir, &name, to_dir, &to_name, flags).await.map(done)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    async fn by_number(&self, ino: Ino) -> Outcome {
        let found = self.client.getattr(ino).await.map_err(|errno| match errno {
            Errno::ENOENT => Errno::ESTALE,
            other => other,
        })?;
        Ok(Answer::Entry { attr: found.attr, attr_valid: found.valid, entry_valid: Duration::ZERO })
    }

    async fn file_operation(&self, caller: Caller, operation: Operation) -> Outcome {
        let client = &self.client;
        let unprivileged = caller.uid != 0;
        match operation {
            Operation::Open { ino, flags } => {
                let file = client.open(ino, OpenFlags::from_bits(flags), unprivileged).await?;
                Ok(Answer::Opened(self.keep(file)))
            }
            Operation::Read { handle, offset, length } => {
                client.read(&*self.file(handle)?, offset, length).await.map(Answer::Bytes)
            }
            Operation::Write { handle, offset, data, kill_privileges } => {
                client.write(&*self.file(handle)?, offset, data, kill_privileges).await.map(Answer::Written)
            }
            Operation::Flush { handle } => client.flush(&*self.file(handle)?).await.map(done),
            Operation::Fsync { handle, datasync } => client.fsync(&*self.file(handle)?, datasync).await.map(done),
            Operation::Release { handle } => {
                let file = self.files.borrow_mut().remove(&handle).ok_or(Errno::EBADF)?;
                client.release(&file);
                Ok(Answer::Done)
            }
            Operation::Fallocate { handle, offset, length, mode } => {
                client.fallocate(&*self.file(handle)?, mode, offset, length, unprivileged).await.map(done)
            }
            Operation::Seek { handle, offset, whence } => {
                client.lseek(&*self.file(handle)?, offset, whence).await.map(Answer::Offset)
            }
            Operation::CopyRange { from, from_offset, to, to_offset, length } => {
                let (from, to) = (self.file(from)?, self.file(to)?);
                let length = length.min(COPY_BYTES_MAX);
                let copied = client.copy_file_range(&from, from_offset, &to, to_offset, length, unprivileged).await?;
                Ok(Answer::Written(copied as u32))
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    async fn inode_operation(&self, caller: Caller, operation: Operation) -> Outcome {
        let client = &self.client;
        match operation {
            Operation::GetAttr { ino } => attributes(client.getattr(ino).await),
            Operation::SetAttr { ino, changes } => {
                let changes = self.with_privileges_killed(caller, ino, changes).await?;
                attributes(client.setattr(ino, changes).await)
            }
            Operation::ReadLink { ino } => client.readlink(ino).await.map(|target| Answer::Bytes(target.into())),
            Operation::OpenDir { ino } => {
                client.opendir(ino).await?;
                let listing = Listing { ino, entries: Vec::new(), from: 0, end: false };
                let handle = self.new_handle();
                self.listings.borrow_mut().insert(handle, Rc::new(RefCell::new(listing)));
                Ok(Answer::Opened(Opened { handle, direct: false }))
            }
            Operation::ReadDir { ino, handle, after } => self.list(ino, handle, after).await.map(Answer::Entries),
            Operation::ReleaseDir { handle } => {
                self.listings.borrow_mut().remove(&handle);
                Ok(Answer::Done)
            }
            Operation::FsyncDir { ino } => client.fsyncdir(ino).await.map(done),
            Operation::StatFs => client.statfs().await.map(Answer::StatFs),
            Operation::SetXattr { ino, name, value, flags } => {
                let flags = flags | self.clears_setgid(caller, ino, &name).await?;
                client.setxattr(ino, &name, &value, flags).await.map(done)
            }
            Operation::GetXattr { ino, name } => {
                client.getxattr(ino, &name).await.map(|value| Answer::Bytes(value.into()))
            }
            Operation::ListXattr { ino } => {
                let mut list = Vec::new();
                for name in client.listxattr(ino).await? {
                    list.extend_from_slice(&name);
                    list.push(0);
                }
                Ok(Answer::Names(list))
            }
            Operation::RemoveXattr { ino, name } => client.removexattr(ino, &name).await.map(done),
            _ => Err(Errno::ENOSYS),
        }
    }

    /// FUSE_HANDLE_KILLPRIV_V2 leaves setuid and setgid to us: they go with a change of owner,
    /// and with a new size unless root sets it. A request that changes nothing is how the kernel
    /// says that they must go (chown to -1:-1, fallocate).
    async fn with_privileges_killed(
        &self,
        caller: Caller,
        ino: Ino,
        changes: AttrChanges,
    ) -> Result<AttrChanges, Errno> {
        let owner = changes.uid.is_some() || changes.gid.is_some();
        let nothing = changes == AttrChanges::default();
        let truncated = changes.size.is_some() && caller.uid != 0;
        let kill_privileges =
            if owner || nothing { self.client.getattr(ino).await?.attr.kind != FileKind::Directory } else { truncated };
        Ok(AttrChanges { kill_privileges, ..changes })
    }

    /// Whoever sets an access ACL without being in the file's group loses its setgid bit. The
    /// kernel's own word on that (FUSE_SETXATTR_EXT) does not get through `fuser`.
    async fn clears_setgid(&self, caller: Caller, ino: Ino, name: &[u8]) -> Result<u32, Errno> {
        if name != b"system.posix_acl_access" || caller.uid == 0 {
            return Ok(0);
        }
        let attr = self.client.getattr(ino).await?.attr;
        let in_group = attr.gid == caller.gid || supplementary_groups(caller.pid).contains(&attr.gid);
        Ok(if attr.mode & 0o2000 != 0 && !in_group { XATTR_CLEAR_SGID } else { 0 })
    }

    fn new_handle(&self) -> Handle {
        let handle = self.next_handle.get();
        self.next_handle.set(handle + 1);
        Handle(handle)
    }

    fn keep(&self, file: Rc<OpenFile>) -> Opened {
        let opened = Opened { handle: self.new_handle(), direct: file.flags.direct };
        self.files.borrow_mut().insert(opened.handle, file);
        opened
    }

    fn file(&self, handle: Handle) -> Result<Rc<OpenFile>, Errno> {
        self.files.borrow().get(&handle).cloned().ok_or(Errno::EBADF)
    }

    /// Entries behind a cookie, from what was fetched before where that goes on there.
    async fn list(&self, ino: Ino, handle: Handle, after: u64) -> Result<Vec<DirEntry>, Errno> {
        let listing = self.listings.borrow().get(&handle).cloned().ok_or(Errno::EBADF)?;
        if let Some(entries) = listing.borrow().behind(after) {
            return Ok(entries);
        }
        // 0 is also what `rewinddir` asks for: the directory is then read anew.
        let cookie = if after <= DOT_DOT { 0 } else { after };
        let fetched = self.client.readdir(ino, cookie, ENTRIES_PER_CALL, false).await?;
        let mut entries = Vec::new();
        if after == 0 {
            entries.push(dot(b".", ino, DOT));
        }
        if after <= DOT {
            entries.push(dot(b"..", fetched.parent, DOT_DOT));
        }
        entries.extend(fetched.entries);
        let mut listing = listing.borrow_mut();
        *listing = Listing { ino: listing.ino, entries: entries.clone(), from: after, end: fetched.end };
        Ok(entries)
    }
}

impl Listing {
    /// What is already here behind a cookie; `None` if it has to be fetched.
    fn behind(&self, after: u64) -> Option<Vec<DirEntry>> {
        if after == 0 || after == self.from {
            return None;
        }
        let at = self.entries.iter().position(|entry| entry.cookie == after)?;
        let rest = &self.entries[at + 1..];
        (!rest.is_empty() || self.end).then(|| rest.to_vec())
    }
}

fn dot(name: &[u8], ino: Ino, cookie: u64) -> DirEntry {
    DirEntry { name: Name::from_slice(name), ino, kind: FileKind::Directory, cookie, attr: None }
}

fn entry(found: LocatedEntry) -> Answer {
    Answer::Entry { attr: found.attr, attr_valid: found.attr_valid, entry_valid: found.entry_valid }
}

fn done((): ()) -> Answer {
    Answer::Done
}

fn attributes(located: Result<cfs_client::Located, Errno>) -> Outcome {
    located.map(|located| Answer::Attr { attr: located.attr, valid: located.valid })
}

/// A process's further groups, as the kernel shows them; none if it is gone.
fn supplementary_groups(pid: u32) -> Vec<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    line.split_whitespace().filter_map(|group| group.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_goes_on_behind_each_cookie_and_is_fetched_anew_from_the_start() {
        let entries = vec![dot(b"a", Ino::ROOT, 10), dot(b"b", Ino::ROOT, 20), dot(b"c", Ino::ROOT, 30)];
        let mut listing = Listing { ino: Ino::ROOT, entries, from: 0, end: false };
        let cookies = |entries: Vec<DirEntry>| entries.iter().map(|entry| entry.cookie).collect::<Vec<_>>();
        assert_eq!(listing.behind(10).map(cookies), Some(vec![20, 30]));
        assert_eq!(listing.behind(0), None);
        assert_eq!(listing.behind(15), None, "an unknown cookie is the server's to find");
        assert_eq!(listing.behind(30), None, "more may follow");
        listing.end = true;
        assert_eq!(listing.behind(30).map(cookies), Some(vec![]));
    }
}
