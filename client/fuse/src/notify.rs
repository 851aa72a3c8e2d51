//! Notifications: what is said to the kernel without being asked.

use crate::abi::{self, NotifyInvalInode, OutHeader};
use cfs_wire::Ino;
use rustix::io::{Errno, writev};
use std::io::IoSlice;
use std::os::fd::AsFd;

/// Has the kernel forget attributes and all pages of an inode. Ends when they are gone, which for
/// pages that are being read or written is when those requests are answered: only the threads of
/// `page_drops` may wait for that.
pub(crate) fn inval_inode(device: impl AsFd, ino: Ino) -> Result<(), Errno> {
    let body = NotifyInvalInode { ino: ino.as_u64(), off: 0, len: 0 };
    send(device, abi::NOTIFY_INVAL_INODE, bytemuck::bytes_of(&body))
}

/// Has the kernel forget attributes of an inode and no page, which it takes from `off` being negative.
/// It does not wait for anything.
pub(crate) fn inval_attributes(device: impl AsFd, ino: Ino) -> Result<(), Errno> {
    let body = NotifyInvalInode { ino: ino.as_u64(), off: -1, len: 0 };
    send(device, abi::NOTIFY_INVAL_INODE, bytemuck::bytes_of(&body))
}

/// Has the kernel look every name up again, also those it is being told in answer to a request
/// that it has made before. It takes no lock for that and does not wait.
pub(crate) fn inc_epoch(device: impl AsFd) -> Result<(), Errno> {
    send(device, abi::NOTIFY_INC_EPOCH, &[])
}

fn send(device: impl AsFd, code: i32, body: &[u8]) -> Result<(), Errno> {
    let header = OutHeader { len: (size_of::<OutHeader>() + body.len()) as u32, error: code, unique: 0 };
    let parts = [IoSlice::new(bytemuck::bytes_of(&header)), IoSlice::new(body)];
    match writev(device, &parts) {
        // The kernel does not know the inode.
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Logs what the kernel did not take.
pub(crate) fn report(ino: Ino, outcome: Result<(), Errno>) {
    if let Err(errno) = outcome {
        // Once the mount is gone there is nothing left to drop.
        tracing::debug!(%errno, %ino, "the kernel refused an invalidation");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_inode_notification_names_its_inode_and_all_or_none_of_its_pages_and_an_epoch_nothing() {
        let (device, mut kernel) = UnixStream::pair().unwrap();
        inval_inode(&device, Ino::from_u64(9)).unwrap();
        inc_epoch(&device).unwrap();
        inval_attributes(&device, Ino::from_u64(9)).unwrap();
        drop(device);
        let mut bytes = Vec::new();
        kernel.read_to_end(&mut bytes).unwrap();
        let header: OutHeader = bytemuck::pod_read_unaligned(&bytes[..16]);
        assert_eq!(header, OutHeader { len: 40, error: 2, unique: 0 });
        let body: NotifyInvalInode = bytemuck::pod_read_unaligned(&bytes[16..40]);
        assert_eq!(body, NotifyInvalInode { ino: 9, off: 0, len: 0 });
        let header: OutHeader = bytemuck::pod_read_unaligned(&bytes[40..56]);
        assert_eq!(header, OutHeader { len: 16, error: 8, unique: 0 });
        let body: NotifyInvalInode = bytemuck::pod_read_unaligned(&bytes[72..]);
        assert_eq!(body, NotifyInvalInode { ino: 9, off: -1, len: 0 });
    }
}
