//! Why there is no mount: one line each, with what to do.

use cfs_client::ConnectError;
use cfs_reactor::uring::RingError;
use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("/dev/fuse is missing: load the kernel module (modprobe fuse), or give the container --device /dev/fuse")]
    NoDevice,
    #[error(
        "/dev/fuse cannot be opened: {0}: run as root, or in a container with --device /dev/fuse --cap-add SYS_ADMIN"
    )]
    Device(io::Error),
    #[error("cannot mount on {path}: {detail}")]
    Mountpoint { path: PathBuf, detail: String },
    #[error("mounting on {path} is not permitted: run as root, or install fusermount3 (apt-get install fuse3)")]
    NotPermitted { path: PathBuf },
    #[error("mounting on {path} failed: {error}")]
    Mount { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("a thread cannot be started: {0}")]
    Thread(io::Error),
    #[error("the mount's client has died; the log says why")]
    ClientDied,
    #[error("data written through the mount was lost: {0}")]
    DataLost(cfs_wire::Errno),
    #[error("cannot unmount {path}: {detail}")]
    Unmount { path: PathBuf, detail: String },
}
