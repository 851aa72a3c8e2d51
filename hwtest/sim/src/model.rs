//! A file system written plainly: nodes with names and bytes in maps, link counts found by
//! counting names. It answers what POSIX asks of the operations that programs here do.

use crate::access::{ACCESS, Acl, DEFAULT};
use crate::content::{Content, Edit};
use crate::op::{FileName, NodeId, Op, Opening, Properties};
use bytes::Bytes;
use cfs_wire::meta::{Attr, FileKind, RENAME_EXCHANGE, RENAME_NOREPLACE, XATTR_CREATE, XATTR_REPLACE};
use cfs_wire::{Errno, Ino, Timestamp};
use std::collections::BTreeMap;

/// The root directory.
pub const ROOT: NodeId = NodeId(0);

/// One file, directory, symlink or special file.
#[derive(Clone, Debug)]
pub struct Node {
    pub new: Properties,
    pub parent: NodeId,
    pub names: BTreeMap<FileName, NodeId>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    access: Option<Acl>,
    default: Option<Acl>,
    pub content: Content,
    /// The real inode; unknown while nobody has looked.
    pub ino: Option<Ino>,
    mtime: Time,
    ctime: Time,
    /// When it was made, as first seen: nothing changes it.
    btime: Option<Timestamp>,
    /// What is inside is not compared: the sideline's files.
    pub opaque: bool,
}

const S_ISGID: u32 = 0o2000;

/// A time as far as it is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Time {
    /// It was set, or was seen and nothing has changed it since.
    Is(Timestamp),
    /// It must have changed since.
    IsNot(Timestamp),
    Unknown,
}

impl Time {
    fn change(&mut self) {
        *self = match *self {
            Time::Is(time) | Time::IsNot(time) => Time::IsNot(time),
            Time::Unknown => Time::Unknown,
        };
    }

    fn allows(self, time: Timestamp) -> bool {
        match self {
            Time::Is(known) => known == time,
            Time::IsNot(old) => old != time,
            Time::Unknown => true,
        }
    }
}

impl Node {
    /// All extended attributes, the lists included.
    pub fn all_xattrs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let lists = [(ACCESS, &self.access), (DEFAULT, &self.default)];
        let lists = lists.into_iter().filter_map(|(name, acl)| Some((name.to_vec(), acl.as_ref()?.bytes())));
        self.xattrs.clone().into_iter().chain(lists).collect()
    }

    /// What else than its bytes changed.
    fn touch(&mut self) {
        self.ctime.change();
    }

    /// Its bytes or names changed.
    fn modify(&mut self) {
        self.mtime.change();
        self.touch();
    }

    /// A client gave it a name, which never stands for less than that client wrote before.
    fn named(&mut self, client: usize) {
        self.content.synced_by(client);
        self.touch();
    }

    /// It may have changed, or not.
    fn forget_times(&mut self) {
        (self.mtime, self.ctime) = (Time::Unknown, Time::Unknown);
    }

    /// Takes over what a look has shown.
    pub fn learn_times(&mut self, attr: &Attr) {
        self.btime.get_or_insert(attr.btime);
        // What is not committed gets its change time with the commit.
        if self.content.pending() == 0 {
            (self.mtime, self.ctime) = (Time::Is(attr.mtime), Time::Is(attr.ctime));
        }
    }

    /// A crash left these bytes.
    pub fn adopt(&mut self, bytes: &[u8]) {
        self.content.adopt(bytes);
        self.forget_times();
    }
}

/// What the model answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    Done,
    /// The operation names or made this node.
    Node(NodeId),
    Bytes(Bytes),
    Count(u64),
    /// A seek in this node from this offset.
    Place {
        node: NodeId,
        offset: u64,
        data: bool,
    },
    Names(Vec<(FileName, NodeId)>),
    AttributeNames(Vec<Vec<u8>>),
}

/// The file system as all programs together see it.
#[derive(Clone)]
pub struct Model {
    nodes: BTreeMap<NodeId, Node>,
    next: u32,
    /// Open files by client and node.
    opens: BTreeMap<(usize, NodeId), u32>,
}

fn directory(mode: u32) -> Properties {
    Properties { kind: FileKind::Directory, mode, umask: 0, uid: 0, gid: 0, target: Vec::new() }
}

impl Model {
    pub fn new(root: Ino) -> Model {
        let mut model = Model { nodes: BTreeMap::new(), next: 1, opens: BTreeMap::new() };
        // The root's mode is the formatter's affair: taken over when first seen.
        let node = model.blank(directory(0o755), ROOT);
        model.nodes.insert(ROOT, Node { ino: Some(root), ..node });
        model
    }

    fn blank(&self, new: Properties, parent: NodeId) -> Node {
        Node {
            new,
            parent,
            names: BTreeMap::new(),
            xattrs: BTreeMap::new(),
            access: None,
            default: None,
            content: Content::default(),
            ino: None,
            mtime: Time::Unknown,
            ctime: Time::Unknown,
            btime: None,
            opaque: false,
        }
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[&id]
    }

    pub fn holds(&self, id: NodeId) -> bool {
        self.nodes.contains_key(&id)
    }

    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes.get_mut(&id).expect("the model holds every node an operation names")
    }

    pub fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    /// The number that the next node will get.
    pub fn next_id(&self) -> NodeId {
        NodeId(self.next)
    }

    pub fn kind(&self, id: NodeId) -> FileKind {
        self.nodes[&id].new.kind
    }

    pub fn is_dir(&self, id: NodeId) -> bool {
        self.kind(id) == FileKind::Directory
    }

    pub fn is_open(&self, client: usize, id: NodeId) -> bool {
        self.opens.contains_key(&(client, id))
    }

    /// Everything beneath some directories, these included, in a fixed order.
    pub fn beneath(&self, roots: &[NodeId]) -> Vec<NodeId> {
        let mut found: Vec<NodeId> = roots.to_vec();
        let mut next = 0;
        while next < found.len() {
            for child in self.nodes[&found[next]].names.values() {
                if !found.contains(child) {
                    found.push(*child);
                }
            }
            next += 1;
        }
        found
    }

    pub fn nlink(&self, id: NodeId) -> u32 {
        let named = self.nodes.values().flat_map(|node| node.names.values()).filter(|named| **named == id).count();
        if !self.is_dir(id) {
            return named as u32;
        }
        if named == 0 && id != ROOT {
            return 0;
        }
        2 + self.nodes[&id].names.values().filter(|child| self.is_dir(**child)).count() as u32
    }

    pub fn size(&self, id: NodeId) -> u64 {
        let node = &self.nodes[&id];
        match node.new.kind {
            FileKind::File => node.content.now().len() as u64,
            FileKind::Symlink => node.new.target.len() as u64,
            _ => 0,
        }
    }

    /// Compares what does not depend on a clock.
    pub fn check_attr(&self, id: NodeId, attr: &Attr) -> Result<(), String> {
        let node = &self.nodes[&id];
        let mut wrong = Vec::new();
        let mut differ = |what: &str, expected: String, found: String| {
            if expected != found {
                wrong.push(format!("{what} {found} instead of {expected}"));
            }
        };
        differ("kind", format!("{:?}", node.new.kind), format!("{:?}", attr.kind));
        if id != ROOT {
            differ("mode", format!("{:o}", node.new.mode), format!("{:o}", attr.mode));
        }
        differ("uid", node.new.uid.to_string(), attr.uid.to_string());
        differ("gid", node.new.gid.to_string(), attr.gid.to_string());
        differ("nlink", self.nlink(id).to_string(), attr.nlink.to_string());
        if !self.is_dir(id) {
            differ("size", self.size(id).to_string(), attr.size.to_string());
        }
        if let Some(ino) = node.ino {
            differ("inode", ino.to_string(), attr.ino.to_string());
        }
        if let Some(made) = node.btime {
            differ("btime", format!("{made:?}"), format!("{:?}", attr.btime));
        }
        for (what, known, found) in [("mtime", node.mtime, attr.mtime), ("ctime", node.ctime, attr.ctime)] {
            if !known.allows(found) {
                differ(what, format!("{known:?}"), format!("{found:?}"));
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join(", ")) }
    }

    /// A client died: what only it had open and nobody names is gone.
    pub fn client_died(&mut self, client: usize) {
        self.opens.retain(|(of, _), _| *of != client);
        self.sweep();
    }

    /// What these clients had not committed may be undone, and its times with it.
    pub fn forget_times_of(&mut self, clients: &[usize]) {
        for node in self.nodes.values_mut() {
            if clients.iter().any(|client| node.content.is_pending_of(*client)) {
                node.forget_times();
            }
        }
    }

    fn sweep(&mut self) {
        loop {
            let held = |id: &NodeId| self.opens.keys().any(|(_, open)| open == id);
            let gone: Vec<NodeId> = self.nodes.keys().copied().filter(|id| self.nlink(*id) == 0 && !held(id)).collect();
            if gone.is_empty() {
                return;
            }
            for id in gone {
                self.nodes.remove(&id);
            }
        }
    }

    /// Runs an operation of a client.
    pub fn apply(&mut self, client: usize, op: &Op) -> Result<Answer, Errno> {
        let answer = self.operation(client, op);
        self.sweep();
        answer
    }

    fn operation(&mut self, client: usize, op: &Op) -> Result<Answer, Errno> {
        match op {
            Op::Make { dir, name, new } => self.make(client, *dir, name, new),
            Op::Tmpfile { dir, new } => {
                self.alive_dir(*dir)?;
                Ok(Answer::Node(self.add(client, *dir, new)))
            }
            Op::Link { node, dir, name } => self.link(client, *node, *dir, name),
            Op::Unlink { dir, name } => self.remove(*dir, name, false),
            Op::Rmdir { dir, name } => self.remove(*dir, name, true),
            Op::Rename { dir, name, to_dir, to_name, flags } => {
                self.rename(client, (*dir, name), (*to_dir, to_name), *flags)
            }
            Op::Open { node, how: Opening { truncate, .. } } => {
                *self.opens.entry((client, *node)).or_default() += 1;
                if *truncate {
                    self.set_attributes(client, &Op::SetSize { node: *node, size: 0 })?;
                }
                Ok(Answer::Done)
            }
            Op::Close { node } => {
                let count = self.opens.get_mut(&(client, *node)).expect("only open files are closed");
                *count -= 1;
                if *count == 0 {
                    self.opens.remove(&(client, *node));
                }
                Ok(Answer::Done)
            }
            Op::SetMode { .. } | Op::SetOwner { .. } | Op::SetSize { .. } | Op::SetMtime { .. } => {
                self.set_attributes(client, op)
            }
            Op::SetXattr { .. } | Op::RemoveXattr { .. } | Op::GetXattr { .. } | Op::ListXattrs { .. } => {
                self.extended(op)
            }
            Op::SetAcl { node, default, acl } => self.set_acl(*node, *default, acl.clone()),
            Op::StatFs => Ok(Answer::Done),
            Op::SyncAll => {
                self.nodes.values_mut().for_each(|node| node.content.synced_by(client));
                Ok(Answer::Done)
            }
            Op::Lookup { dir, name } => Ok(Answer::Node(*self.alive_dir(*dir)?.names.get(name).ok_or(Errno::ENOENT)?)),
            Op::List { dir } => {
                let names = &self.alive_dir(*dir)?.names;
                Ok(Answer::Names(names.iter().map(|(name, id)| (name.clone(), *id)).collect()))
            }
            Op::Stat { node } => {
                self.seen(client, *node);
                Ok(Answer::Node(*node))
            }
            Op::ReadLink { node } => match self.kind(*node) {
                FileKind::Symlink => Ok(Answer::Bytes(self.nodes[node].new.target.clone().into())),
                _ => Err(Errno::EINVAL),
            },
            _ => self.file_operation(client, op),
        }
    }

    fn alive_dir(&self, dir: NodeId) -> Result<&Node, Errno> {
        let node = self.nodes.get(&dir).ok_or(Errno::ENOENT)?;
        if node.new.kind != FileKind::Directory {
            return Err(Errno::ENOTDIR);
        }
        if self.nlink(dir) == 0 {
            return Err(Errno::ENOENT);
        }
        Ok(node)
    }

    fn names_change(&mut self, dir: NodeId) {
        self.node_mut(dir).modify();
    }

    /// What a new node inherits: group and setgid bit, and a default list in the place of the umask.
    fn inherit(&self, parent: NodeId, new: &Properties) -> Node {
        let mut node = self.blank(new.clone(), parent);
        let above = &self.nodes[&parent];
        let directory = new.kind == FileKind::Directory;
        if above.new.mode & S_ISGID != 0 {
            node.new.gid = above.new.gid;
            node.new.mode |= if directory { S_ISGID } else { 0 };
        }
        match &above.default {
            _ if new.kind == FileKind::Symlink => {}
            None => node.new.mode &= !new.umask,
            Some(list) => {
                let (access, mode) = list.inherited(node.new.mode);
                node.new.mode = mode;
                node.access = Some(access).filter(Acl::is_more_than_mode);
                node.default = directory.then(|| list.clone());
            }
        }
        node
    }

    fn add(&mut self, client: usize, parent: NodeId, new: &Properties) -> NodeId {
        let id = NodeId(self.next);
        self.next += 1;
        let node = self.inherit(parent, new);
        self.nodes.insert(id, node);
        if new.kind == FileKind::File {
            self.opens.insert((client, id), 1);
        }
        id
    }

    fn make(&mut self, client: usize, dir: NodeId, name: &[u8], new: &Properties) -> Result<Answer, Errno> {
        if self.alive_dir(dir)?.names.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        let id = self.add(client, dir, new);
        self.node_mut(dir).names.insert(name.to_vec(), id);
        self.names_change(dir);
        Ok(Answer::Node(id))
    }

    fn link(&mut self, client: usize, id: NodeId, dir: NodeId, name: &[u8]) -> Result<Answer, Errno> {
        if self.alive_dir(dir)?.names.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        if self.is_dir(id) {
            return Err(Errno::EPERM);
        }
        self.node_mut(dir).names.insert(name.to_vec(), id);
        self.names_change(dir);
        self.node_mut(id).named(client);
        Ok(Answer::Node(id))
    }

    fn remove(&mut self, dir: NodeId, name: &[u8], directory: bool) -> Result<Answer, Errno> {
        let id = *self.alive_dir(dir)?.names.get(name).ok_or(Errno::ENOENT)?;
        match (self.is_dir(id), directory) {
            (true, false) => return Err(Errno::EISDIR),
            (false, true) => return Err(Errno::ENOTDIR),
            (true, true) if !self.nodes[&id].names.is_empty() => return Err(Errno::ENOTEMPTY),
            _ => {}
        }
        self.node_mut(dir).names.remove(name);
        self.names_change(dir);
        self.node_mut(id).touch();
        Ok(Answer::Done)
    }

    fn is_beneath(&self, mut id: NodeId, above: NodeId) -> bool {
        while id != above && id != ROOT {
            id = self.nodes[&id].parent;
        }
        id == above
    }

    fn rename(
        &mut self,
        client: usize,
        (dir, name): (NodeId, &[u8]),
        (to_dir, to_name): (NodeId, &[u8]),
        flags: u32,
    ) -> Result<Answer, Errno> {
        let exchange = flags & RENAME_EXCHANGE != 0;
        if !matches!(flags, 0 | RENAME_EXCHANGE | RENAME_NOREPLACE) {
            return Err(Errno::EINVAL);
        }
        self.alive_dir(dir)?;
        self.alive_dir(to_dir)?;
        let id = *self.nodes[&dir].names.get(name).ok_or(Errno::ENOENT)?;
        let target = self.nodes[&to_dir].names.get(to_name).copied();
        match target {
            None if exchange => return Err(Errno::ENOENT),
            Some(_) if flags == RENAME_NOREPLACE => return Err(Errno::EEXIST),
            Some(target) if target == id => return Ok(Answer::Done),
            _ => {}
        }
        self.check_rename(id, dir, target, to_dir, exchange)?;
        self.node_mut(dir).names.remove(name);
        self.node_mut(to_dir).names.insert(to_name.to_vec(), id);
        self.node_mut(id).parent = to_dir;
        if let Some(target) = target.filter(|_| exchange) {
            self.node_mut(dir).names.insert(name.to_vec(), target);
            self.node_mut(target).parent = dir;
        }
        self.names_change(dir);
        self.names_change(to_dir);
        self.node_mut(id).named(client);
        match target {
            Some(target) if exchange => self.node_mut(target).named(client),
            Some(target) => self.node_mut(target).touch(),
            None => {}
        }
        Ok(Answer::Done)
    }

    fn check_rename(
        &self,
        id: NodeId,
        dir: NodeId,
        target: Option<NodeId>,
        to_dir: NodeId,
        exchange: bool,
    ) -> Result<(), Errno> {
        if dir != to_dir {
            let cycle = self.is_dir(id) && self.is_beneath(to_dir, id);
            let back = exchange && target.is_some_and(|target| self.is_dir(target) && self.is_beneath(dir, target));
            if cycle || back {
                return Err(Errno::EINVAL);
            }
        }
        if let Some(target) = target.filter(|_| !exchange) {
            match (self.is_dir(id), self.is_dir(target)) {
                (true, false) => return Err(Errno::ENOTDIR),
                (false, true) => return Err(Errno::EISDIR),
                (true, true) if !self.nodes[&target].names.is_empty() => return Err(Errno::ENOTEMPTY),
                _ => {}
            }
        }
        Ok(())
    }

    fn set_attributes(&mut self, client: usize, op: &Op) -> Result<Answer, Errno> {
        let id = match op {
            Op::SetMode { node, mode } => {
                let node_mut = self.node_mut(*node);
                node_mut.new.mode = *mode;
                if let Some(list) = &mut node_mut.access {
                    list.change_mode(*mode);
                }
                *node
            }
            Op::SetOwner { node, uid, gid } => {
                let new = &mut self.node_mut(*node).new;
                (new.uid, new.gid) = (*uid, *gid);
                *node
            }
            Op::SetMtime { node, time } => {
                self.node_mut(*node).mtime = Time::Is(*time);
                *node
            }
            Op::SetSize { node, size } => {
                match self.kind(*node) {
                    FileKind::File => {}
                    FileKind::Directory => return Err(Errno::EISDIR),
                    _ => return Err(Errno::EINVAL),
                }
                self.edit(client, *node, Edit::Truncate { size: *size });
                *node
            }
            other => unreachable!("{other:?} sets no attribute"),
        };
        // A change of attributes first commits what was written, and is durable itself.
        self.node_mut(id).content.settle();
        self.node_mut(id).touch();
        Ok(Answer::Node(id))
    }

    fn extended(&mut self, op: &Op) -> Result<Answer, Errno> {
        // Anyone may write to a fifo or through a symlink, so users' attributes are not for these.
        let allowed =
            |kind, name: &[u8]| matches!(kind, FileKind::File | FileKind::Directory) || !name.starts_with(b"user.");
        match op {
            Op::SetXattr { node, name, value, flags } => {
                if !allowed(self.kind(*node), name) {
                    return Err(Errno::EPERM);
                }
                let xattrs = &mut self.node_mut(*node).xattrs;
                match xattrs.contains_key(*name) {
                    true if flags & XATTR_CREATE != 0 => return Err(Errno::EEXIST),
                    false if flags & XATTR_REPLACE != 0 => return Err(Errno::ENODATA),
                    _ => {}
                }
                xattrs.insert(name.to_vec(), value.clone());
                self.attributes_change(*node);
                Ok(Answer::Done)
            }
            Op::RemoveXattr { node, name } => {
                if !allowed(self.kind(*node), name) {
                    return Err(Errno::EPERM);
                }
                self.node_mut(*node).xattrs.remove(*name).ok_or(Errno::ENODATA)?;
                self.attributes_change(*node);
                Ok(Answer::Done)
            }
            Op::GetXattr { node, name } => {
                let value = self.nodes[node].xattrs.get(*name).ok_or(Errno::ENODATA)?;
                Ok(Answer::Bytes(value.clone().into()))
            }
            Op::ListXattrs { node } => Ok(Answer::AttributeNames(self.nodes[node].all_xattrs().into_keys().collect())),
            other => unreachable!("{other:?} has nothing to do with extended attributes"),
        }
    }

    /// Extended attributes changed: what was written before is committed first.
    fn attributes_change(&mut self, id: NodeId) {
        self.node_mut(id).touch();
    }

    fn set_acl(&mut self, id: NodeId, default: bool, acl: Option<Acl>) -> Result<Answer, Errno> {
        match self.kind(id) {
            FileKind::Symlink => return Err(Errno::EOPNOTSUPP),
            FileKind::Directory => {}
            _ if default && acl.is_some() => return Err(Errno::EACCES),
            _ if default => return Ok(Answer::Done),
            _ => {}
        }
        let node = self.node_mut(id);
        let before = (node.access.clone(), node.default.clone(), node.new.mode);
        match (default, acl) {
            (true, acl) => node.default = acl,
            (false, None) => node.access = None,
            (false, Some(acl)) => {
                node.new.mode = acl.mode(node.new.mode);
                node.access = Some(acl).filter(Acl::is_more_than_mode);
            }
        }
        // Removing what is not there changes nothing; setting what is there is nobody's concern.
        match before == (node.access.clone(), node.default.clone(), node.new.mode) {
            true => node.forget_times(),
            false => node.touch(),
        }
        Ok(Answer::Done)
    }

    fn seen(&mut self, client: usize, id: NodeId) {
        self.node_mut(id).content.seen_by(client);
    }

    fn edit(&mut self, client: usize, id: NodeId, edit: Edit) {
        let node = self.node_mut(id);
        let same_bytes = !matches!(edit, Edit::Write { .. } | Edit::Copy { .. });
        node.content.edit(client, edit);
        match same_bytes {
            // Whether a change that changes nothing counts is the file system's affair.
            true => node.forget_times(),
            false => node.modify(),
        }
    }

    /// Up to `length` bytes from `offset`.
    fn slice(&self, id: NodeId, offset: u64, length: u64) -> Bytes {
        let bytes = self.nodes[&id].content.now();
        let start = bytes.len().min(offset as usize);
        let end = bytes.len().min(offset.saturating_add(length) as usize);
        Bytes::copy_from_slice(&bytes[start..end])
    }

    /// Operations on regular files that are open.
    fn file_operation(&mut self, client: usize, op: &Op) -> Result<Answer, Errno> {
        match op {
            Op::Write { node, offset, data, sync } => {
                self.edit(client, *node, Edit::Write { offset: *offset, data: data.clone() });
                if *sync {
                    self.node_mut(*node).content.settle();
                }
                Ok(Answer::Count(data.len() as u64))
            }
            Op::Append { node, data } => {
                let offset = self.size(*node);
                self.edit(client, *node, Edit::Write { offset, data: data.clone() });
                Ok(Answer::Count(data.len() as u64))
            }
            Op::Punch { node, offset, length } => {
                self.edit(client, *node, Edit::Zero { offset: *offset, length: *length });
                Ok(Answer::Done)
            }
            Op::Zero { node, offset, length, keep_size } => {
                self.edit(client, *node, Edit::Zero { offset: *offset, length: *length });
                if !keep_size {
                    self.edit(client, *node, Edit::Extend { size: offset + length });
                }
                Ok(Answer::Done)
            }
            Op::Reserve { .. } => Ok(Answer::Done),
            Op::Seek { node, offset, data } => {
                self.seen(client, *node);
                let bytes = self.nodes[node].content.now();
                let rest = bytes.get(*offset as usize..).unwrap_or_default();
                if rest.is_empty() {
                    return Err(Errno::ENXIO);
                }
                Ok(Answer::Place { node: *node, offset: *offset, data: *data })
            }
            Op::Extend { node, size } => {
                self.edit(client, *node, Edit::Extend { size: *size });
                Ok(Answer::Done)
            }
            Op::Copy { from, from_offset, to, to_offset, length } => {
                let data = self.slice(*from, *from_offset, *length);
                let count = data.len() as u64;
                // As Linux has it: the length is cut at the source's end before overlap is looked at.
                if from == to && *from_offset < to_offset + count && *to_offset < from_offset + count {
                    return Err(Errno::EINVAL);
                }
                self.seen(client, *from);
                if count > 0 {
                    self.edit(client, *to, Edit::Copy { offset: *to_offset, data });
                }
                Ok(Answer::Count(count))
            }
            Op::Fsync { node } => {
                self.node_mut(*node).content.synced_by(client);
                Ok(Answer::Done)
            }
            Op::Read { node, offset, length } => {
                self.seen(client, *node);
                Ok(Answer::Bytes(self.slice(*node, *offset, (*length).into())))
            }
            other => unreachable!("{other:?} is no file operation"),
        }
    }
}
