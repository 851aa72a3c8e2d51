//! The FUSE adapter: a mount point whose requests are carried out by [`cfs_client::Client`].
//!
//! Three layers: `abi` is the kernel's protocol, bytes and numbers only; `operation` says what a
//! kernel may ask and be answered, without its types, and `perform` carries that out on the
//! client's executor. Between them, `connection` mounts, `reader` takes requests off /dev/fuse on
//! that same executor, `translate` and `reply` turn them into operations and answers into bytes.
//! `invalidate` drops the kernel's copies, and `page_drops` its pages, by threads beside the
//! client's. Nothing is cached in this crate.
//!
//! What the kernel keeps: attributes, entries and absences for no longer than the client's grant (of
//! entries and absences nothing before Linux 6.16, which is the first that can drop them in time);
//! pages as long as the file's version is known not to change elsewhere, and until they are
//! invalidated (FUSE_AUTO_INVAL_DATA is a second net). It never keeps unwritten pages of `write`
//! (no FUSE_WRITEBACK_CACHE).
//!
//! Locks of programs are the inode's shard's (`locks`), and what waits for one can be interrupted
//! (`interrupts`).
//!
//! Start at [`spawn_mount`] or [`run_mount`].
#![forbid(unsafe_code)]

mod abi;
mod attributes;
mod connection;
mod error;
mod interrupts;
mod invalidate;
mod listing;
mod locks;
mod mount;
mod notify;
mod operation;
mod options;
mod page_drops;
mod perform;
mod reader;
mod reply;
mod translate;

pub use connection::{is_mounted, remount};
pub use error::MountError;
pub use mount::{MountHandle, Unmounter, run_mount, spawn_mount};
pub use options::{MountConfig, MountOptions};
