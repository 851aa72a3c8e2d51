//! The FUSE adapter: a mount point whose requests are carried out by [`cfs_client::Client`].
//!
//! Three layers, so that the transport can be replaced: `operation` says what a kernel may ask
//! and be answered, without FUSE's types; `perform` carries that out on the client's executor;
//! `transport` is the crate `fuser`, whose threads turn requests into jobs for a bounded mailbox
//! and do nothing else. `invalidate` drops the kernel's copies from a thread of its own. Only this
//! crate starts threads; it caches nothing itself.
//!
//! What the kernel keeps: attributes, entries and absences for no longer than the client's grant;
//! pages as long as the file's times and size do not change (FUSE_AUTO_INVAL_DATA), and until they
//! are invalidated. It never keeps unwritten pages of `write` (no FUSE_WRITEBACK_CACHE).
//!
//! What `fuser` 0.18 cannot carry, and what happens instead: interrupts and lock flags (so flock
//! and fcntl locks are the kernel's own, valid on this machine only), O_TMPFILE (EOPNOTSUPP),
//! statx's birth time, and FUSE_SETXATTR_EXT (the caller's groups are looked up instead when an
//! ACL is set, to clear setgid).
//!
//! Start at [`spawn_mount`] or [`run_mount`].
#![forbid(unsafe_code)]

mod error;
mod invalidate;
mod mount;
mod operation;
mod options;
mod perform;
mod respond;
mod transport;

pub use error::MountError;
pub use mount::{MountHandle, Unmounter, run_mount, spawn_mount};
pub use options::{MountConfig, MountOptions};
