//! What programs do, in terms of the model's nodes.

use crate::access::Acl;
use bytes::Bytes;
use cfs_wire::Timestamp;
use cfs_wire::meta::FileKind;
use std::fmt;

/// A node of the model; never reused within a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct NodeId(pub u32);

/// A name in a directory.
pub type FileName = Vec<u8>;

/// Properties of a new node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Properties {
    pub kind: FileKind,
    pub mode: u32,
    pub umask: u32,
    pub uid: u32,
    pub gid: u32,
    /// Of a symlink.
    pub target: Vec<u8>,
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Opening {
    pub direct: bool,
    pub sync: bool,
    pub truncate: bool,
}

/// One operation of a program.
#[derive(Clone, PartialEq, Eq)]
pub enum Op {
    /// Makes a node; a regular file is opened too.
    Make {
        dir: NodeId,
        name: FileName,
        new: Properties,
    },
    Tmpfile {
        dir: NodeId,
        new: Properties,
    },
    Link {
        node: NodeId,
        dir: NodeId,
        name: FileName,
    },
    Unlink {
        dir: NodeId,
        name: FileName,
    },
    Rmdir {
        dir: NodeId,
        name: FileName,
    },
    Rename {
        dir: NodeId,
        name: FileName,
        to_dir: NodeId,
        to_name: FileName,
        flags: u32,
    },
    SetMode {
        node: NodeId,
        mode: u32,
    },
    SetOwner {
        node: NodeId,
        uid: u32,
        gid: u32,
    },
    SetSize {
        node: NodeId,
        size: u64,
    },
    SetMtime {
        node: NodeId,
        time: Timestamp,
    },
    SetXattr {
        node: NodeId,
        name: &'static [u8],
        value: Vec<u8>,
        flags: u32,
    },
    RemoveXattr {
        node: NodeId,
        name: &'static [u8],
    },
    /// Sets (or with `None` removes) the access list, or a directory's default list.
    SetAcl {
        node: NodeId,
        default: bool,
        acl: Option<Acl>,
    },
    Open {
        node: NodeId,
        how: Opening,
    },
    Close {
        node: NodeId,
    },
    /// `sync`: the file was opened with O_DSYNC.
    Write {
        node: NodeId,
        offset: u64,
        data: Bytes,
        sync: bool,
    },
    Append {
        node: NodeId,
        data: Bytes,
    },
    Punch {
        node: NodeId,
        offset: u64,
        length: u64,
    },
    /// FALLOC_FL_ZERO_RANGE.
    Zero {
        node: NodeId,
        offset: u64,
        length: u64,
        keep_size: bool,
    },
    Extend {
        node: NodeId,
        size: u64,
    },
    /// FALLOC_FL_KEEP_SIZE alone.
    Reserve {
        node: NodeId,
        offset: u64,
        length: u64,
    },
    Copy {
        from: NodeId,
        from_offset: u64,
        to: NodeId,
        to_offset: u64,
        length: u64,
    },
    Fsync {
        node: NodeId,
    },
    /// syncfs: everything this client wrote.
    SyncAll,
    Read {
        node: NodeId,
        offset: u64,
        length: u32,
    },
    /// lseek to the next data, or hole.
    Seek {
        node: NodeId,
        offset: u64,
        data: bool,
    },
    Stat {
        node: NodeId,
    },
    StatFs,
    Lookup {
        dir: NodeId,
        name: FileName,
    },
    List {
        dir: NodeId,
    },
    GetXattr {
        node: NodeId,
        name: &'static [u8],
    },
    ListXattrs {
        node: NodeId,
    },
    ReadLink {
        node: NodeId,
    },
}

impl Op {
    /// The nodes it works on.
    pub fn nodes(&self) -> Vec<NodeId> {
        match self {
            Op::SyncAll | Op::StatFs => vec![],
            Op::Make { dir, .. }
            | Op::Tmpfile { dir, .. }
            | Op::Unlink { dir, .. }
            | Op::Rmdir { dir, .. }
            | Op::Lookup { dir, .. }
            | Op::List { dir } => vec![*dir],
            Op::Link { node, dir, .. } => vec![*node, *dir],
            Op::Rename { dir, to_dir, .. } => vec![*dir, *to_dir],
            Op::Copy { from, to, .. } => vec![*from, *to],
            Op::SetMode { node, .. }
            | Op::SetOwner { node, .. }
            | Op::SetSize { node, .. }
            | Op::SetMtime { node, .. }
            | Op::SetXattr { node, .. }
            | Op::RemoveXattr { node, .. }
            | Op::SetAcl { node, .. }
            | Op::Open { node, .. }
            | Op::Close { node }
            | Op::Write { node, .. }
            | Op::Append { node, .. }
            | Op::Punch { node, .. }
            | Op::Zero { node, .. }
            | Op::Extend { node, .. }
            | Op::Reserve { node, .. }
            | Op::Fsync { node }
            | Op::Read { node, .. }
            | Op::Seek { node, .. }
            | Op::Stat { node }
            | Op::GetXattr { node, .. }
            | Op::ListXattrs { node }
            | Op::ReadLink { node } => vec![*node],
        }
    }
}

/// The names of a rename or exchange flag, as `renameat2` has them.
fn flag_names(flags: u32) -> &'static str {
    match flags {
        0 => "",
        1 => " NOREPLACE",
        2 => " EXCHANGE",
        _ => " (invalid flags)",
    }
}

impl fmt::Debug for Op {
    /// Short: bytes by their number, names as text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |dir: &NodeId, name: &[u8]| format!("{}/{}", dir.0, shown(name));
        match self {
            Op::Make { dir, name, new } => {
                write!(f, "make {:?} {} mode {:o} umask {:o}", new.kind, at(dir, name), new.mode, new.umask)
            }
            Op::Tmpfile { dir, .. } => write!(f, "tmpfile in {}", dir.0),
            Op::Link { node, dir, name } => write!(f, "link {} as {}", node.0, at(dir, name)),
            Op::Unlink { dir, name } => write!(f, "unlink {}", at(dir, name)),
            Op::Rmdir { dir, name } => write!(f, "rmdir {}", at(dir, name)),
            Op::Rename { dir, name, to_dir, to_name, flags } => {
                write!(f, "rename {} to {}{}", at(dir, name), at(to_dir, to_name), flag_names(*flags))
            }
            Op::SetMode { node, mode } => write!(f, "chmod {} {mode:o}", node.0),
            Op::SetOwner { node, uid, gid } => write!(f, "chown {} {uid}:{gid}", node.0),
            Op::SetSize { node, size } => write!(f, "truncate {} to {size}", node.0),
            Op::SetMtime { node, time } => write!(f, "set mtime of {} to {}", node.0, time.secs),
            Op::SetXattr { node, name, value, flags } => {
                write!(f, "setxattr {} {} {} bytes flags {flags}", node.0, shown(name), value.len())
            }
            Op::RemoveXattr { node, name } => write!(f, "removexattr {} {}", node.0, shown(name)),
            Op::SetAcl { node, default, acl } => {
                let which = if *default { "default" } else { "access" };
                write!(f, "set {which} ACL of {} to {acl:?}", node.0)
            }
            Op::Open { node, how } => {
                let flag = |set, name| if set { name } else { "" };
                let flags = [flag(how.direct, " direct"), flag(how.sync, " dsync"), flag(how.truncate, " trunc")];
                write!(f, "open {}{}", node.0, flags.concat())
            }
            Op::Close { node } => write!(f, "close {}", node.0),
            Op::Write { node, offset, data, sync } => {
                let durably = if *sync { " durably" } else { "" };
                write!(f, "write {} at {offset} {} bytes{durably}", node.0, data.len())
            }
            Op::Append { node, data } => write!(f, "append to {} {} bytes", node.0, data.len()),
            Op::Punch { node, offset, length } => write!(f, "punch {} at {offset} {length} bytes", node.0),
            Op::Zero { node, offset, length, keep_size } => {
                let keep = if *keep_size { " keeping the size" } else { "" };
                write!(f, "zero {} at {offset} {length} bytes{keep}", node.0)
            }
            Op::Reserve { node, offset, length } => write!(f, "reserve {} at {offset} {length} bytes", node.0),
            Op::SyncAll => f.write_str("syncfs"),
            Op::StatFs => f.write_str("statfs"),
            Op::Seek { node, offset, data } => {
                write!(f, "seek {} from {offset} to the next {}", node.0, if *data { "data" } else { "hole" })
            }
            Op::Extend { node, size } => write!(f, "fallocate {} to {size}", node.0),
            Op::Copy { from, from_offset, to, to_offset, length } => {
                write!(f, "copy {length} bytes of {} at {from_offset} to {} at {to_offset}", from.0, to.0)
            }
            Op::Fsync { node } => write!(f, "fsync {}", node.0),
            Op::Read { node, offset, length } => write!(f, "read {} at {offset} {length} bytes", node.0),
            Op::Stat { node } => write!(f, "stat {}", node.0),
            Op::Lookup { dir, name } => write!(f, "lookup {}", at(dir, name)),
            Op::List { dir } => write!(f, "readdir {}", dir.0),
            Op::GetXattr { node, name } => write!(f, "getxattr {} {}", node.0, shown(name)),
            Op::ListXattrs { node } => write!(f, "listxattr {}", node.0),
            Op::ReadLink { node } => write!(f, "readlink {}", node.0),
        }
    }
}

/// A name for people.
pub fn shown(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    if text.len() > 20 { format!("{}..({} bytes)", &text[..12], name.len()) } else { text.into_owned() }
}
