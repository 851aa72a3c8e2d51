//! Notifications: what is said to the kernel without being asked. The kernel may wait for a
//! request's answer before it takes one: only `invalidate`'s thread sends the first two.

use crate::abi::{self, NotifyInvalEntry, NotifyInvalInode, OutHeader};
use cfs_wire::Ino;
use rustix::io::{Errno, writev};
use std::io::IoSlice;
use std::os::fd::OwnedFd;

pub(crate) struct Notifier {
    device: OwnedFd,
}

impl Notifier {
    pub fn new(device: OwnedFd) -> Notifier {
        Notifier { device }
    }

    /// Has the kernel forget attributes and all pages of an inode. Ends when they are gone.
    pub fn inval_inode(&self, ino: Ino) -> Result<(), Errno> {
        let body = NotifyInvalInode { ino: ino.as_u64(), off: 0, len: 0 };
        self.send(abi::NOTIFY_INVAL_INODE, bytemuck::bytes_of(&body), &[])
    }

    /// Has the kernel forget what a name stands for, and its absence.
    pub fn inval_entry(&self, dir: Ino, name: &[u8]) -> Result<(), Errno> {
        let body = NotifyInvalEntry { parent: dir.as_u64(), namelen: name.len() as u32, flags: 0 };
        let name = [name, &[0]].concat();
        self.send(abi::NOTIFY_INVAL_ENTRY, bytemuck::bytes_of(&body), &name)
    }

    fn send(&self, code: i32, body: &[u8], name: &[u8]) -> Result<(), Errno> {
        let len = (size_of::<OutHeader>() + body.len() + name.len()) as u32;
        let header = OutHeader { len, error: code, unique: 0 };
        let parts = [IoSlice::new(bytemuck::bytes_of(&header)), IoSlice::new(body), IoSlice::new(name)];
        match writev(&self.device, &parts) {
            // The kernel does not know it.
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_entry_notification_names_its_directory_and_ends_in_a_zero_that_does_not_count() {
        let (device, mut kernel) = UnixStream::pair().unwrap();
        Notifier::new(device.into()).inval_entry(Ino::from_u64(9), b"name").unwrap();
        let mut bytes = Vec::new();
        kernel.read_to_end(&mut bytes).unwrap();
        let header: OutHeader = bytemuck::pod_read_unaligned(&bytes[..16]);
        assert_eq!(header, OutHeader { len: 37, error: 3, unique: 0 });
        let body: NotifyInvalEntry = bytemuck::pod_read_unaligned(&bytes[16..32]);
        assert_eq!(body, NotifyInvalEntry { parent: 9, namelen: 4, flags: 0 });
        assert_eq!(bytes[32..], *b"name\0");
    }
}
