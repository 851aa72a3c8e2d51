//! The connection to the kernel: mounting, by ourselves or through fusermount3, and the first
//! words. There is one descriptor of the device; when the process has closed it, the kernel
//! answers every program that waits.

use crate::abi::{self, Features, InHeader, InitIn, InitOut, OutHeader, Refusal};
use crate::error::MountError;
use crate::options::MountOptions;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags, IoSliceMut};
use rustix::mount::MountFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};
use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How long the kernel may take to say its first word; it does so when it mounts.
const INIT_WAIT_SECS: i64 = 10;
/// Shown as the type of the file system, behind `fuse.`.
const SUBTYPE: &str = "cfs";

/// A mounted device, ready to be read from. It does not block.
pub(crate) struct Session {
    pub device: OwnedFd,
    pub features: Features,
}

/// Mounts on a directory and agrees with the kernel on how to talk.
pub(crate) fn connect(mountpoint: &Path, source: &str, options: &MountOptions) -> Result<Session, MountError> {
    let device = match mount_directly(mountpoint, source, options) {
        Err(Errno::PERM | Errno::ACCESS) => mount_with_fusermount(mountpoint, source, options)?,
        other => other.map_err(|errno| mount_error(mountpoint, errno.into()))?,
    };
    let features = shake_hands(&device).map_err(|error| {
        let _ = rustix::mount::unmount(mountpoint, rustix::mount::UnmountFlags::DETACH);
        mount_error(mountpoint, error)
    })?;
    Ok(Session { device, features })
}

fn mount_error(path: &Path, error: io::Error) -> MountError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => MountError::NotPermitted { path: path.to_owned() },
        _ => MountError::Mount { path: path.to_owned(), error },
    }
}

/// Whether everybody may use a mount.
fn allows_other(options: &MountOptions) -> bool {
    options.allow_other.unwrap_or(rustix::process::geteuid().is_root())
}

fn mount_directly(mountpoint: &Path, source: &str, options: &MountOptions) -> Result<OwnedFd, Errno> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mut data = format!("fd={},rootmode=40000,user_id={uid},group_id={gid},default_permissions", device.as_raw_fd());
    if allows_other(options) {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount(source, mountpoint, format!("fuse.{SUBTYPE}"), flags(options), data.as_c_str())?;
    Ok(device)
}

fn flags(options: &MountOptions) -> MountFlags {
    let flags = [
        (options.read_only, MountFlags::RDONLY),
        (!options.suid, MountFlags::NOSUID),
        (!options.dev, MountFlags::NODEV),
        (!options.exec, MountFlags::NOEXEC),
        (options.noatime, MountFlags::NOATIME),
    ];
    flags.into_iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| flag).collect()
}

/// Gives a mount that there is other options, of those that the kernel keeps: read-only, no
/// set-user-id programs, no device files, no programs, no access times. The others stay.
///
/// # Errors
/// Nothing is mounted there, it is not permitted, or files are open for writing and it is to be
/// read-only.
pub fn remount(mountpoint: &Path, options: &MountOptions) -> Result<(), MountError> {
    if !is_mounted(mountpoint) {
        let detail = "no cfs file system is mounted there".to_owned();
        return Err(MountError::Mountpoint { path: mountpoint.to_owned(), detail });
    }
    rustix::mount::mount_remount(mountpoint, flags(options), c"").map_err(|errno| match errno {
        Errno::INVAL => {
            MountError::Mountpoint { path: mountpoint.to_owned(), detail: "nothing is mounted there".to_owned() }
        }
        errno => mount_error(mountpoint, errno.into()),
    })
}

/// A name within fusermount3's list of options.
fn escaped(name: &str) -> String {
    name.replace('\\', "\\\\").replace(',', "\\,")
}

fn fusermount_options(source: &str, options: &MountOptions) -> String {
    let mut list = vec![
        if options.read_only { "ro".to_owned() } else { "rw".to_owned() },
        "default_permissions".to_owned(),
        format!("fsname={}", escaped(source)),
        format!("subtype={SUBTYPE}"),
    ];
    let further = [(!options.exec, "noexec"), (options.noatime, "noatime"), (allows_other(options), "allow_other")];
    list.extend(further.into_iter().filter(|(wanted, _)| *wanted).map(|(_, name)| name.to_owned()));
    list.join(",")
}

/// Has the set-user-id program of the fuse3 package mount, and hand the device over a socket.
fn mount_with_fusermount(mountpoint: &Path, source: &str, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let failed = |error: Errno| mount_error(mountpoint, error.into());
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    // Theirs has to outlive the exec.
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(failed)?;
    let mut command = Command::new("fusermount3");
    command.arg("-o").arg(fusermount_options(source, options)).arg("--").arg(mountpoint);
    command.env("_FUSE_COMMFD", theirs.as_raw_fd().to_string()).stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|_| MountError::NotPermitted { path: mountpoint.to_owned() })?;
    // Ours is then at its end as soon as the program is.
    drop(theirs);
    let device = receive_device(&ours);
    let mut complaint = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut complaint);
    }
    let _ = child.wait();
    match device {
        Ok(Some(device)) => Ok(device),
        Ok(None) => {
            Err(MountError::Mountpoint { path: mountpoint.to_owned(), detail: complaint.trim().replace('\n', "; ") })
        }
        Err(errno) => Err(failed(errno)),
    }
}

/// The descriptor that comes with a message; `None` at the end of the stream.
fn receive_device(socket: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut byte)];
        match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut devices = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(devices.next())
}

/// Answers the kernel's INIT; from then on the device does not block.
fn shake_hands(device: &OwnedFd) -> io::Result<Features> {
    let mut request = vec![0; abi::REQUEST_BYTES_MAX];
    loop {
        let mut waiting = [PollFd::new(device, PollFlags::IN)];
        let patience = rustix::time::Timespec { tv_sec: INIT_WAIT_SECS, tv_nsec: 0 };
        match poll(&mut waiting, Some(&patience)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel does not begin to talk")),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let length = match rustix::io::read(device, &mut request) {
            Ok(length) => length,
            Err(Errno::INTR | Errno::AGAIN) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let (header, offer) = first_words(&request[..length])?;
        match abi::negotiate(&offer) {
            Ok((answer, features)) => {
                send_init(device, header.unique, &answer)?;
                let flags = rustix::fs::fcntl_getfl(device)?;
                rustix::fs::fcntl_setfl(device, flags | OFlags::NONBLOCK)?;
                return Ok(features);
            }
            Err(Refusal::Newer) => {
                let ours = InitOut { major: abi::MAJOR, minor: abi::MINOR, ..InitOut::default() };
                send_init(device, header.unique, &ours)?;
            }
            Err(Refusal::Older { major, minor }) => {
                let detail = format!(
                    "the kernel speaks FUSE {major}.{minor}, {}.{} (Linux 5.17) is needed",
                    abi::MAJOR,
                    abi::MINOR_MIN
                );
                return Err(io::Error::new(io::ErrorKind::Unsupported, detail));
            }
        }
    }
}

fn first_words(bytes: &[u8]) -> io::Result<(InHeader, InitIn)> {
    match abi::Request::decode(bytes, Features::default()) {
        Ok(abi::Request { header, call: abi::Call::Init(offer) }) => Ok((header, offer)),
        _ => {
            let detail = "the kernel does not begin with the INIT of FUSE 7.36 (Linux 5.17) or later";
            Err(io::Error::new(io::ErrorKind::InvalidData, detail))
        }
    }
}

fn send_init(device: &OwnedFd, unique: u64, answer: &InitOut) -> io::Result<()> {
    let len = (size_of::<OutHeader>() + size_of::<InitOut>()) as u32;
    let header = OutHeader { len, error: 0, unique };
    rustix::io::write(device, &[bytemuck::bytes_of(&header), bytemuck::bytes_of(answer)].concat())?;
    Ok(())
}

/// A line of the kernel's table of mounts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct MountEntry {
    /// The mount's anonymous device number; of a FUSE mount the connection's in
    /// /sys/fs/fuse/connections too.
    pub minor: u32,
    pub point: PathBuf,
    pub kind: Vec<u8>,
}

/// All mounts of this process's namespace, without a request to any of them: there may be nobody
/// who answers. Of several on one point the last is the one seen.
pub(crate) fn mounts() -> io::Result<Vec<MountEntry>> {
    Ok(parse_mounts(&fs::read("/proc/self/mountinfo")?))
}

/// What is seen on a directory, if it is a mount point.
pub(crate) fn mounted_on(mountpoint: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rev().find(|entry| entry.point == mountpoint))
}

/// Links that are followed to a mount point: as many as the kernel follows (path_resolution(7)).
const LINKS_MAX: usize = 40;

/// Whether one of ours is mounted on a directory, or on what a link leads to. What is not known counts
/// as no.
pub fn is_mounted(directory: &Path) -> bool {
    let mut directory = directory.to_path_buf();
    for _ in 0..=LINKS_MAX {
        // Not through the directory itself: it may be a mount that nobody answers for.
        let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (Ok(parent), Some(name)) = (parent.canonicalize(), directory.file_name()) else { return false };
        match mounted_on(&parent.join(name)) {
            Ok(Some(entry)) => return entry.is_ours(),
            Ok(None) => {}
            Err(_) => return false,
        }
        // It is no mount, so that asking whether it is a link waits for nobody.
        let Ok(target) = directory.read_link() else { return false };
        directory = parent.join(target);
    }
    false
}

impl MountEntry {
    fn is_ours(&self) -> bool {
        self.kind == format!("fuse.{SUBTYPE}").as_bytes()
    }
}

fn parse_mounts(table: &[u8]) -> Vec<MountEntry> {
    table.split(|byte| *byte == b'\n').filter_map(parse_mount).collect()
}

/// proc_pid_mountinfo(5): fields 3 and 5 are device and mount point; the type is behind a dash.
fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = str::from_utf8(fields.nth(2)?).ok()?;
    let minor = device.split_once(':')?.1.parse().ok()?;
    let point = PathBuf::from(OsString::from_vec(unescaped(fields.nth(1)?)));
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?.to_vec();
    Some(MountEntry { minor, point, kind })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescaped(mut text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    while let Some((&byte, rest)) = text.split_first() {
        let digits = rest.get(..3).and_then(|digits| str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| byte == b'\\') {
            Some(escaped) => {
                plain.push(escaped);
                text = &rest[3..];
            }
            None => {
                plain.push(byte);
                text = rest;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_table_of_mounts_is_read_whatever_is_in_it() {
        let table = b"22 1 0:20 / /proc rw,nosuid shared:5 - proc proc rw\n\
            77 22 0:51 / /mnt/a\\040b\\134\\012\xff rw,nosuid - fuse.cfs 127.0.0.1:7400 rw\n\
            78 22 8:1 / /mnt/x rw shared:1 master:2 - ext4 /dev/sda1 rw\n\
            no mount\n\n79 22 0:9 / /mnt/\\04 rw - tmpfs";
        let entry = |minor, point: &[u8], kind: &[u8]| MountEntry {
            minor,
            point: PathBuf::from(OsString::from_vec(point.to_vec())),
            kind: kind.to_vec(),
        };
        assert_eq!(
            parse_mounts(table),
            [
                entry(20, b"/proc", b"proc"),
                entry(51, b"/mnt/a b\\\n\xff", b"fuse.cfs"),
                entry(1, b"/mnt/x", b"ext4"),
                entry(9, b"/mnt/\\04", b"tmpfs"),
            ]
        );
    }

    #[test]
    fn links_that_lead_in_a_circle_or_nowhere_lead_to_no_mount() {
        let dir = tempfile::tempdir().unwrap();
        for (link, target) in [("a", "b"), ("b", "a"), ("nowhere", "gone/x"), ("up", ".."), ("root", "/")] {
            std::os::unix::fs::symlink(target, dir.path().join(link)).unwrap();
            assert!(!is_mounted(&dir.path().join(link)), "{link}");
        }
        // Both are there now.
        assert!(!is_mounted(&dir.path().join("a")));
    }

    #[test]
    fn fusermount_gets_a_source_with_commas_as_one_option() {
        let options =
            MountOptions { read_only: true, exec: false, allow_other: Some(false), ..MountOptions::default() };
        let list = fusermount_options("a,b\\c", &options);
        assert_eq!(list, "ro,default_permissions,fsname=a\\,b\\\\c,subtype=cfs,noexec");
    }

    #[test]
    fn the_device_comes_with_a_message_and_an_end_without_one_is_none() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = OwnedFd::from(ours);
        let (passed, _kept) = UnixStream::pair().unwrap();
        let descriptors = [passed.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&theirs, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(receive_device(&ours).unwrap().is_some());
        drop(theirs);
        assert!(receive_device(&ours).unwrap().is_none());
    }
}
