//! How to mount.

use cfs_client::ClientConfig;
use cfs_fabric::Address;
use cfs_fabric::identity::Identity;
use cfs_fabric::network::Transport;
use std::path::PathBuf;
use std::sync::Arc;

/// What is mounted where, and how.
#[derive(Clone, Debug)]
pub struct MountConfig {
    pub mountpoint: PathBuf,
    pub address: Address,
    /// Proves to the server who this is; without one only loopback is called.
    pub identity: Option<Arc<Identity>>,
    /// What carries messages.
    pub transport: Transport,
    pub client: ClientConfig,
    pub options: MountOptions,
}

impl MountConfig {
    pub fn new(mountpoint: impl Into<PathBuf>, address: Address) -> MountConfig {
        MountConfig {
            mountpoint: mountpoint.into(),
            address,
            identity: None,
            transport: Transport::default(),
            client: ClientConfig::default(),
            options: MountOptions::default(),
        }
    }
}

/// Options of the mount itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountOptions {
    /// Other users may use the mount. Off by default only for users other than root, for whom
    /// /etc/fuse.conf must allow it.
    pub allow_other: Option<bool>,
    pub read_only: bool,
    /// Set-user-id programs and device files work. Root only.
    pub suid: bool,
    pub dev: bool,
    pub exec: bool,
    pub noatime: bool,
    /// What the kernel reads ahead, in KiB; its default of 128 is too little for 1 MiB requests.
    pub read_ahead_kib: u32,
    /// What `mount` and `df` show as the source.
    pub source: Option<String>,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            allow_other: None,
            read_only: false,
            suid: true,
            dev: true,
            exec: true,
            noatime: false,
            read_ahead_kib: 4096,
            source: None,
        }
    }
}
