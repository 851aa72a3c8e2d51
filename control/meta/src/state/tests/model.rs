//! A file system written plainly: nodes with names and bytes in maps, link counts found by
//! counting names. It answers the same operations, so that replies can be compared whole;
//! `version` and `allocated`, which it doesn't know, are 0.

use super::{ROOT, byte_at};
use cfs_wire::meta::{
    Attr, AttrChanges, Commit, Entry, FileKind, FileWrite, Grant, MetaOp, MetaReply, MetaResult, NewNode,
    RENAME_EXCHANGE, RENAME_NOREPLACE, SetTime, XATTR_CAPABILITY, XATTR_CREATE, XATTR_REPLACE,
};
use cfs_wire::{Errno, Ino, SessionId, ShardId, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone)]
struct Node {
    kind: FileKind,
    mode: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    target: Vec<u8>,
    bytes: Vec<u8>,
    atime: Timestamp,
    mtime: Timestamp,
    ctime: Timestamp,
    btime: Timestamp,
    names: BTreeMap<Vec<u8>, Ino>,
    parent: Ino,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    nameless: bool,
}

pub(crate) struct Model {
    nodes: BTreeMap<Ino, Node>,
    holds: BTreeSet<(Ino, SessionId)>,
    /// Write leases.
    leases: BTreeMap<Ino, SessionId>,
    next: u64,
    /// The number of the next inode, where it is not simply the next of shard 0.
    pub assigned: Option<Ino>,
}

type Outcome<T> = Result<T, Errno>;

impl Model {
    pub fn new(now: Timestamp) -> Model {
        let mut model =
            Model { nodes: BTreeMap::new(), holds: BTreeSet::new(), leases: BTreeMap::new(), next: 2, assigned: None };
        let new = NewNode { kind: FileKind::Directory, mode: 0o755, umask: 0, uid: 0, gid: 0, rdev: 0, target: vec![] };
        model.nodes.insert(ROOT, Model::node(&new, ROOT, now));
        model
    }

    fn node(new: &NewNode, parent: Ino, now: Timestamp) -> Node {
        let device = matches!(new.kind, FileKind::CharDevice | FileKind::BlockDevice);
        Node {
            kind: new.kind,
            mode: if new.kind == FileKind::Symlink { 0o777 } else { new.mode & !new.umask },
            uid: new.uid,
            gid: new.gid,
            rdev: if device { new.rdev } else { 0 },
            target: new.target.clone(),
            bytes: Vec::new(),
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            names: BTreeMap::new(),
            parent,
            xattrs: BTreeMap::new(),
            nameless: false,
        }
    }

    pub fn inodes(&self) -> Vec<Ino> {
        self.nodes.keys().copied().collect()
    }

    pub fn is_dir(&self, ino: Ino) -> bool {
        self.nodes.get(&ino).is_some_and(|node| node.kind == FileKind::Directory)
    }

    pub fn names(&self, ino: Ino) -> Vec<(Vec<u8>, Ino)> {
        self.nodes[&ino].names.iter().map(|(name, ino)| (name.clone(), *ino)).collect()
    }

    pub fn bytes(&self, ino: Ino) -> Option<&[u8]> {
        self.nodes.get(&ino).filter(|node| node.kind == FileKind::File).map(|node| node.bytes.as_slice())
    }

    pub fn xattrs(&self, ino: Ino) -> Vec<Vec<u8>> {
        self.nodes[&ino].xattrs.keys().cloned().collect()
    }

    fn nlink(&self, ino: Ino) -> u32 {
        let named = self.nodes.values().flat_map(|node| node.names.values()).filter(|named| **named == ino).count();
        if !self.is_dir(ino) {
            return named as u32;
        }
        if named == 0 && ino != ROOT {
            return 0;
        }
        2 + self.nodes[&ino].names.values().filter(|child| self.is_dir(**child)).count() as u32
    }

    pub fn attr(&self, ino: Ino) -> Outcome<Attr> {
        let node = self.nodes.get(&ino).ok_or(Errno::ESTALE)?;
        let size = match node.kind {
            FileKind::File => node.bytes.len() as u64,
            FileKind::Directory => 4096,
            FileKind::Symlink => node.target.len() as u64,
            _ => 0,
        };
        Ok(Attr {
            ino,
            kind: node.kind,
            mode: node.mode,
            nlink: self.nlink(ino),
            uid: node.uid,
            gid: node.gid,
            rdev: node.rdev,
            size,
            allocated: 0,
            atime: node.atime,
            mtime: node.mtime,
            ctime: node.ctime,
            btime: node.btime,
            version: 0,
            has_xattrs: !node.xattrs.is_empty(),
            policy: cfs_wire::Policy::new(2, 1).unwrap(),
        })
    }

    fn alive_dir(&self, dir: Ino) -> Outcome<&Node> {
        let node = self.nodes.get(&dir).ok_or(Errno::ENOENT)?;
        if node.kind != FileKind::Directory {
            return Err(Errno::ENOTDIR);
        }
        if self.nlink(dir) == 0 {
            return Err(Errno::ENOENT);
        }
        Ok(node)
    }

    fn names_change(&mut self, dir: Ino, now: Timestamp) {
        let node = self.nodes.get_mut(&dir).unwrap();
        node.mtime = now;
        node.ctime = now;
    }

    fn entry(&self, ino: Ino) -> Outcome<MetaReply> {
        let grant = Grant::default();
        Ok(MetaReply::Entry(Entry { attr: self.attr(ino)?, grant, dir_grant: grant }))
    }

    /// Runs an operation and drops what neither a name nor a hold keeps.
    pub fn run(&mut self, session: SessionId, op: &MetaOp, now: Timestamp) -> MetaResult {
        let content = match op {
            MetaOp::Commit(commit) => Some(commit.ino),
            MetaOp::SetAttr { ino, changes } if changes.size.is_some() => Some(*ino),
            _ => None,
        };
        if content.and_then(|ino| self.leases.get(&ino)).is_some_and(|holder| *holder != session) {
            return Err(cfs_wire::meta::MetaError::Unavailable("another session holds the write lease".to_owned()));
        }
        let result = self.operation(session, op, now);
        loop {
            let gone: Vec<Ino> = self.nodes.keys().copied().filter(|ino| self.is_gone(*ino)).collect();
            if gone.is_empty() {
                return Ok(result?);
            }
            for ino in gone {
                self.nodes.remove(&ino);
                self.leases.remove(&ino);
            }
        }
    }

    fn is_gone(&self, ino: Ino) -> bool {
        self.nlink(ino) == 0 && !self.holds.iter().any(|(held, _)| *held == ino)
    }

    fn operation(&mut self, session: SessionId, op: &MetaOp, now: Timestamp) -> Outcome<MetaReply> {
        match op {
            MetaOp::Create { dir, name, node, hold } => self.create(session, *dir, name, node, *hold, now),
            MetaOp::Tmpfile { dir, node } => {
                self.alive_dir(*dir)?;
                let ino = self.add(*dir, node, now);
                self.nodes.get_mut(&ino).unwrap().nameless = true;
                self.opened(ino, session)
            }
            MetaOp::Link { ino, dir, name } => self.link(session, *ino, *dir, name, now),
            MetaOp::Unlink { dir, name } => self.remove(*dir, name, false, now),
            MetaOp::Rmdir { dir, name } => self.remove(*dir, name, true, now),
            MetaOp::Rename { dir, name, to_dir, to_name, flags } => {
                self.rename((*dir, name), (*to_dir, to_name), *flags, now)
            }
            MetaOp::SetAttr { ino, changes } => self.set_attr(*ino, changes, now),
            MetaOp::SetXattr { ino, name, value, flags } => {
                let node = self.nodes.get_mut(ino).ok_or(Errno::ESTALE)?;
                check_xattr_kind(node.kind, name)?;
                match node.xattrs.contains_key(name.as_slice()) {
                    true if flags & XATTR_CREATE != 0 => return Err(Errno::EEXIST),
                    false if flags & XATTR_REPLACE != 0 => return Err(Errno::ENODATA),
                    _ => {}
                }
                node.xattrs.insert(name.to_vec(), value.clone());
                node.ctime = now;
                Ok(MetaReply::Done)
            }
            MetaOp::RemoveXattr { ino, name } => {
                let node = self.nodes.get_mut(ino).ok_or(Errno::ESTALE)?;
                check_xattr_kind(node.kind, name)?;
                node.xattrs.remove(name.as_slice()).ok_or(Errno::ENODATA)?;
                node.ctime = now;
                Ok(MetaReply::Done)
            }
            MetaOp::Commit(commit) => self.commit(commit, now),
            MetaOp::Open { ino } => {
                let attr = self.attr(*ino)?;
                self.holds.insert((*ino, session));
                Ok(MetaReply::Attr { attr, grant: Grant::default() })
            }
            MetaOp::Release { inos } => {
                self.holds.retain(|(ino, holder)| *holder != session || !inos.contains(ino));
                self.leases.retain(|ino, holder| *holder != session || !inos.contains(ino));
                Ok(MetaReply::Done)
            }
            other => panic!("the model does not do {other:?}"),
        }
    }

    fn add(&mut self, parent: Ino, new: &NewNode, now: Timestamp) -> Ino {
        let ino = self.assigned.unwrap_or(Ino::new(ShardId(0), self.next));
        self.next += 1;
        let mut node = Model::node(new, parent, now);
        let above = &self.nodes[&parent];
        if above.mode & 0o2000 != 0 {
            node.gid = above.gid;
            if new.kind == FileKind::Directory {
                node.mode |= 0o2000;
            }
        }
        self.nodes.insert(ino, node);
        ino
    }

    fn create(
        &mut self,
        session: SessionId,
        dir: Ino,
        name: &[u8],
        new: &NewNode,
        hold: bool,
        now: Timestamp,
    ) -> Outcome<MetaReply> {
        if self.alive_dir(dir)?.names.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        let ino = self.add(dir, new, now);
        self.nodes.get_mut(&dir).unwrap().names.insert(name.to_vec(), ino);
        self.names_change(dir, now);
        if hold { self.opened(ino, session) } else { self.entry(ino) }
    }

    /// What GetAttr answers.
    pub fn seen_by(&self, session: SessionId, ino: Ino) -> MetaReply {
        let grant = Grant { read_ms: 0, write: self.leases.get(&ino) == Some(&session) };
        MetaReply::Attr { attr: self.attr(ino).unwrap(), grant }
    }

    fn opened(&mut self, ino: Ino, session: SessionId) -> Outcome<MetaReply> {
        self.holds.insert((ino, session));
        self.leases.insert(ino, session);
        let grant = Grant { read_ms: 0, write: true };
        Ok(MetaReply::Entry(Entry { attr: self.attr(ino)?, grant, dir_grant: Grant::default() }))
    }

    fn link(&mut self, session: SessionId, ino: Ino, dir: Ino, name: &[u8], now: Timestamp) -> Outcome<MetaReply> {
        if self.alive_dir(dir)?.names.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        let node = self.nodes.get(&ino).ok_or(Errno::ESTALE)?;
        if node.kind == FileKind::Directory {
            return Err(Errno::EPERM);
        }
        if self.nlink(ino) == 0 && !(node.nameless && self.holds.contains(&(ino, session))) {
            return Err(Errno::ENOENT);
        }
        let node = self.nodes.get_mut(&ino).unwrap();
        node.nameless = false;
        node.ctime = now;
        self.nodes.get_mut(&dir).unwrap().names.insert(name.to_vec(), ino);
        self.names_change(dir, now);
        self.entry(ino)
    }

    fn remove(&mut self, dir: Ino, name: &[u8], directory: bool, now: Timestamp) -> Outcome<MetaReply> {
        let ino = *self.alive_dir(dir)?.names.get(name).ok_or(Errno::ENOENT)?;
        match (self.is_dir(ino), directory) {
            (true, false) => return Err(Errno::EISDIR),
            (false, true) => return Err(Errno::ENOTDIR),
            (true, true) if !self.nodes[&ino].names.is_empty() => return Err(Errno::ENOTEMPTY),
            _ => {}
        }
        self.nodes.get_mut(&dir).unwrap().names.remove(name);
        self.names_change(dir, now);
        self.nodes.get_mut(&ino).unwrap().ctime = now;
        Ok(MetaReply::Removed { ino, nlink: self.nlink(ino) })
    }

    fn is_beneath(&self, mut ino: Ino, above: Ino) -> bool {
        while ino != above && ino != ROOT {
            ino = self.nodes[&ino].parent;
        }
        ino == above
    }

    fn rename(
        &mut self,
        (dir, name): (Ino, &[u8]),
        (to_dir, to_name): (Ino, &[u8]),
        flags: u32,
        now: Timestamp,
    ) -> Outcome<MetaReply> {
        let exchange = flags & RENAME_EXCHANGE != 0;
        if !matches!(flags, 0 | RENAME_EXCHANGE | RENAME_NOREPLACE) {
            return Err(Errno::EINVAL);
        }
        self.alive_dir(dir)?;
        self.alive_dir(to_dir)?;
        let ino = *self.nodes[&dir].names.get(name).ok_or(Errno::ENOENT)?;
        let target = self.nodes[&to_dir].names.get(to_name).copied();
        match target {
            None if exchange => return Err(Errno::ENOENT),
            Some(_) if flags == RENAME_NOREPLACE => return Err(Errno::EEXIST),
            Some(target) if target == ino => return Ok(MetaReply::Done),
            _ => {}
        }
        if dir != to_dir {
            let cycle = self.is_dir(ino) && self.is_beneath(to_dir, ino);
            let back = exchange && target.is_some_and(|target| self.is_dir(target) && self.is_beneath(dir, target));
            if cycle || back {
                return Err(Errno::EINVAL);
            }
        }
        let mut replaced = None;
        if let Some(target) = target.filter(|_| !exchange) {
            match (self.is_dir(ino), self.is_dir(target)) {
                (true, false) => return Err(Errno::ENOTDIR),
                (false, true) => return Err(Errno::EISDIR),
                (true, true) if !self.nodes[&target].names.is_empty() => return Err(Errno::ENOTEMPTY),
                _ => {}
            }
            self.nodes.get_mut(&to_dir).unwrap().names.remove(to_name);
            self.nodes.get_mut(&target).unwrap().ctime = now;
            replaced = Some((target, self.nlink(target)));
        }
        self.nodes.get_mut(&dir).unwrap().names.remove(name);
        self.nodes.get_mut(&to_dir).unwrap().names.insert(to_name.to_vec(), ino);
        self.nodes.get_mut(&ino).unwrap().parent = to_dir;
        self.nodes.get_mut(&ino).unwrap().ctime = now;
        if let Some(target) = target.filter(|_| exchange) {
            self.nodes.get_mut(&dir).unwrap().names.insert(name.to_vec(), target);
            self.nodes.get_mut(&target).unwrap().parent = dir;
            self.nodes.get_mut(&target).unwrap().ctime = now;
        }
        self.names_change(dir, now);
        self.names_change(to_dir, now);
        let mut moved: Vec<Ino> = [Some(ino), target.filter(|_| exchange)].into_iter().flatten().collect();
        moved.sort();
        Ok(MetaReply::Renamed { moved, replaced })
    }

    fn set_attr(&mut self, ino: Ino, changes: &AttrChanges, now: Timestamp) -> Outcome<MetaReply> {
        let node = self.nodes.get_mut(&ino).ok_or(Errno::ESTALE)?;
        if changes.size.is_some() && node.kind != FileKind::File {
            return Err(if node.kind == FileKind::Directory { Errno::EISDIR } else { Errno::EINVAL });
        }
        node.uid = changes.uid.unwrap_or(node.uid);
        node.gid = changes.gid.unwrap_or(node.gid);
        if changes.kill_privileges {
            node.kill();
        }
        node.mode = changes.mode.unwrap_or(node.mode);
        if let Some(size) = changes.size {
            node.bytes.resize(size as usize, 0);
            node.mtime = now;
        }
        let time = |set: SetTime| match set {
            SetTime::Now => now,
            SetTime::At(time) => time,
        };
        node.atime = changes.atime.map_or(node.atime, time);
        node.mtime = changes.mtime.map_or(node.mtime, time);
        node.ctime = now;
        Ok(MetaReply::Attr { attr: self.attr(ino)?, grant: Grant::default() })
    }

    fn commit(&mut self, commit: &Commit, now: Timestamp) -> Outcome<MetaReply> {
        let node = self.nodes.get_mut(&commit.ino).ok_or(Errno::ESTALE)?;
        match node.kind {
            FileKind::File => {}
            FileKind::Directory => return Err(Errno::EISDIR),
            _ => return Err(Errno::EINVAL),
        }
        let mut bytes = node.bytes.clone();
        let (mut append_offset, mut drop_capability) = (None, false);
        for write in &commit.writes {
            let end = bytes.len();
            match write {
                FileWrite::Data { offset, length, location, .. } => {
                    let fresh: Vec<u8> = (0..*length).map(|index| byte_at(&location.skip(index))).collect();
                    put(&mut bytes, *offset as usize, &fresh);
                }
                FileWrite::Append { length, location, .. } => {
                    append_offset.get_or_insert(end as u64);
                    bytes.extend((0..*length).map(|index| byte_at(&location.skip(index))));
                }
                FileWrite::Inline { offset, bytes: fresh } => {
                    if end.max(*offset as usize + fresh.len()) > 4096 {
                        return Err(Errno::EFBIG);
                    }
                    put(&mut bytes, *offset as usize, fresh);
                }
                FileWrite::AppendInline { bytes: fresh } => {
                    append_offset.get_or_insert(end as u64);
                    if end + fresh.len() > 4096 {
                        return Err(Errno::EFBIG);
                    }
                    bytes.extend(fresh);
                }
                FileWrite::Punch { offset, length } => {
                    let from = end.min(*offset as usize);
                    let to = end.min(offset.saturating_add(*length) as usize);
                    bytes[from..to.max(from)].fill(0);
                }
                FileWrite::Truncate { size } => bytes.resize(*size as usize, 0),
                FileWrite::Extend { size } => bytes.resize(end.max(*size as usize), 0),
                FileWrite::DropCapability => drop_capability = true,
            }
        }
        node.bytes = bytes;
        if drop_capability {
            node.xattrs.remove(XATTR_CAPABILITY);
        }
        if commit.kill_privileges {
            node.kill();
        }
        node.mtime = commit.mtime.unwrap_or(now);
        node.ctime = node.mtime.not_before(node.ctime);
        Ok(MetaReply::Committed { attr: self.attr(commit.ino)?, append_offset })
    }
}

impl Node {
    fn kill(&mut self) {
        if self.kind == FileKind::Directory {
            return;
        }
        self.mode &= !0o4000;
        if self.mode & 0o010 != 0 {
            self.mode &= !0o2000;
        }
    }
}

/// Only files and directories have attributes that any program may set.
fn check_xattr_kind(kind: FileKind, name: &[u8]) -> Result<(), Errno> {
    let refused = name.starts_with(b"user.") && !matches!(kind, FileKind::File | FileKind::Directory);
    if refused { Err(Errno::EPERM) } else { Ok(()) }
}

fn put(bytes: &mut Vec<u8>, offset: usize, fresh: &[u8]) {
    if fresh.is_empty() {
        return;
    }
    bytes.resize(bytes.len().max(offset + fresh.len()), 0);
    bytes[offset..offset + fresh.len()].copy_from_slice(fresh);
}
