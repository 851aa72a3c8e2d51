//! `cfs mount`, and `mount.cfs` as `mount -t cfs` and fstab call it.

use crate::cli::MountArgs;
use crate::signals::Signals;
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Under the name `mount.cfs` the arguments are `ADDRESS MOUNTPOINT [-sfnv] [-o OPTIONS]`.
pub fn helper_arguments(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.first().map(|program| Path::new(program).file_name().unwrap_or_default().to_owned());
    if name.is_some_and(|name| name == "mount.cfs") {
        arguments.retain(|argument| !["-s", "-n", "-v"].iter().any(|flag| argument == flag));
        arguments.insert(1, "mount".into());
    }
    arguments
}

/// Refuses early, with one line, what FUSE would refuse late.
pub fn check_mountpoint(mountpoint: &Path) -> Result<()> {
    if !Path::new("/dev/fuse").exists() {
        bail!("/dev/fuse is missing; load the kernel module with: modprobe fuse");
    }
    match std::fs::metadata(mountpoint) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => bail!("mountpoint {} is not a directory", mountpoint.display()),
        Err(error) => bail!("mountpoint {}: {error}; create it or unmount what is left there", mountpoint.display()),
    }
}
