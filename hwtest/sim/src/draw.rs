//! What the programs do next, drawn.

use crate::access::Acl;
use crate::model::Model;
use crate::op::{FileName, NodeId, Op, Opening, Properties};
use crate::workload::Actor;
use bytes::Bytes;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::Timestamp;
use cfs_wire::meta::FileKind;

/// Few, so that they collide.
const NAMES: [&[u8]; 9] = [b"a", b"b", b"c", b"d", b"e", b"f-\xff\xfe", b"g", b"hh", &[b'n'; 255]];
const XATTRS: [&[u8]; 5] = [b"user.a", b"user.b", b"user.long-name", b"trusted.t", b"security.s"];
/// Beyond it a file is synced, so that a crash has a bounded number of legal outcomes.
const PENDING_MAX: usize = 40;
const FILE_BYTES_MAX: u64 = 3 << 20;
const OPEN_MAX: usize = 6;
const NODES_MAX: usize = 40;

/// How often operations of each kind are drawn; a program keeps to one mix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mix {
    pub make: u64,
    pub remove: u64,
    pub rename: u64,
    pub link: u64,
    pub attributes: u64,
    pub look: u64,
    pub data: u64,
}

impl Mix {
    /// Every kind sometimes, some of them often.
    pub fn draw(random: &mut SplitMix64) -> Mix {
        let mut weight = || [1, 2, 6, 12][random.below(4) as usize];
        let (make, remove, rename, link) = (4 + weight(), 1 + weight(), weight(), weight());
        let (attributes, look, data) = (weight(), weight(), 4 * weight());
        Mix { make, remove, rename, link, attributes, look, data }
    }
}

impl Actor {
    fn name(&self) -> FileName {
        self.pick(&NAMES).to_vec()
    }

    fn properties(&self, kind: FileKind) -> Properties {
        let target = if kind == FileKind::Symlink { vec![b't'; 1 + self.below(60) as usize] } else { Vec::new() };
        let mode = if kind == FileKind::Symlink { 0o777 } else { self.mode() };
        let umask = self.pick(&[0, 0o022, 0o077]);
        Properties { kind, mode, umask, uid: self.below(4) as u32, gid: self.below(4) as u32, target }
    }

    /// Now and then with setuid, setgid, sticky.
    fn mode(&self) -> u32 {
        self.below(if self.below(4) == 0 { 0o10000 } else { 0o1000 }) as u32
    }

    fn data(&self) -> Bytes {
        let length = match self.below(10) {
            0..5 => 1 + self.below(600),
            5..8 => 1 + self.below(9000),
            _ => 1 + self.below(self.write_bytes_max),
        };
        let mut random = SplitMix64::new(self.below(u64::MAX));
        (0..length.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).take(length as usize).collect()
    }

    fn offset(&self, size: u64) -> u64 {
        match self.below(8) {
            0 => size,
            1 => self.below(self.write_bytes_max * 2),
            2..4 => self.below(5) * 4096,
            4 => 0,
            _ => self.below(size + 1000),
        }
        .min(FILE_BYTES_MAX)
    }

    /// A name of a file that was written and not synced, as that of a new version of another one is.
    fn written_name(&self, model: &Model, dirs: &[NodeId]) -> Option<(NodeId, FileName)> {
        let names = dirs.iter().flat_map(|dir| model.node(*dir).names.iter().map(|(name, node)| (*dir, name, *node)));
        let is_written = |node: NodeId| model.node(node).content.is_pending_of(self.client_index);
        let written: Vec<_> = names.filter(|(_, _, node)| is_written(*node)).collect();
        let (dir, name, _) = *written.get(self.below(written.len().max(1) as u64) as usize)?;
        Some((dir, name.clone()))
    }

    pub(crate) fn draw(&self, shared: bool) -> Op {
        let model = self.history.model.borrow();
        let area = if shared { &self.shared } else { &self.own };
        let nodes = model.beneath(area);
        if let Some(op) = self.upkeep(&model, shared) {
            return op;
        }
        let dirs: Vec<NodeId> = nodes.iter().copied().filter(|id| model.is_dir(*id)).collect();
        let (dir, name) = (self.pick(&dirs), self.name());
        // Mostly names that exist.
        let names: Vec<FileName> = model.node(dir).names.keys().cloned().collect();
        let existing = if names.is_empty() || self.below(6) == 0 { name.clone() } else { self.pick(&names) };
        let files: Vec<NodeId> = nodes.iter().copied().filter(|id| model.kind(*id) == FileKind::File).collect();
        let inner: Vec<NodeId> = nodes.iter().copied().filter(|id| !area.contains(id)).collect();
        let any = if inner.is_empty() { dir } else { self.pick(&inner) };
        let Mix { make, remove, rename, link, attributes, look, data } = self.mix;
        let kinds = [make, remove, rename, link, attributes, look, data];
        let mut drawn = self.below(kinds.iter().sum());
        // When a disk is full programs delete.
        let kind = if self.is_full.get() && self.below(2) == 0 {
            1
        } else {
            kinds
                .iter()
                .take_while(|weight| {
                    drawn >= **weight && {
                        drawn -= **weight;
                        true
                    }
                })
                .count()
        };
        match kind {
            0 if nodes.len() < NODES_MAX => self.draw_make(dir, name),
            1 if self.below(3) == 0 => Op::Rmdir { dir, name: existing },
            1 => Op::Unlink { dir, name: existing },
            2 => {
                let flags = self.pick(&[0, 0, 0, 1, 2, 2, 3]);
                let written = self.written_name(&model, &dirs).filter(|_| self.below(2) == 0);
                let (dir, name) = written.unwrap_or((dir, existing));
                Op::Rename { dir, name, to_dir: self.pick(&dirs), to_name: self.name(), flags }
            }
            3 if !inner.is_empty() => Op::Link { node: any, dir, name },
            4 => match self.below(4) {
                0 => self.draw_acl(any),
                1 => self.draw_xattr(any),
                _ => self.draw_attribute(&model, any),
            },
            5 => self.draw_look(&model, dir, any, existing),
            _ => match self.draw_file_target(&files, shared) {
                Ok(node) => self.draw_data(&model, node, shared),
                Err(op) => op,
            },
        }
    }

    fn draw_make(&self, dir: NodeId, name: FileName) -> Op {
        use FileKind::*;
        if self.below(8) == 0 && self.may_open() {
            return Op::Tmpfile { dir, new: self.properties(File) };
        }
        let kind = self.pick(&[File, File, File, Directory, Directory, Symlink, Fifo]);
        Op::Make { dir, name, new: self.properties(kind) }
    }

    fn may_open(&self) -> bool {
        self.open.borrow().len() < OPEN_MAX
    }

    fn open_files(&self, shared: bool) -> Vec<NodeId> {
        self.open.borrow().iter().filter(|(_, opened)| opened.shared == shared).map(|(id, _)| *id).collect()
    }

    /// Closes a file when too many are open, syncs one with too much pending.
    fn upkeep(&self, model: &Model, shared: bool) -> Option<Op> {
        let open = self.open_files(shared);
        if !open.is_empty() && (!self.may_open() || self.below(20) == 0) {
            return Some(Op::Close { node: self.pick(&open) });
        }
        let pressing = |node: &&NodeId| model.node(**node).content.pending() > PENDING_MAX;
        open.iter().find(pressing).map(|node| Op::Fsync { node: *node })
    }

    /// An open file, or what opens one.
    fn draw_file_target(&self, files: &[NodeId], shared: bool) -> Result<NodeId, Op> {
        let open = self.open_files(shared);
        if !open.is_empty() && (files.is_empty() || self.below(4) > 0) {
            return Ok(self.pick(&open));
        }
        if files.is_empty() {
            let area = if shared { &self.shared } else { &self.own };
            return Err(Op::Make { dir: self.pick(area), name: self.name(), new: self.properties(FileKind::File) });
        }
        let node = self.pick(files);
        if self.open.borrow().contains_key(&node) {
            return Ok(node);
        }
        let how = Opening { direct: self.below(4) == 0, sync: self.below(6) == 0, truncate: self.below(12) == 0 };
        Err(Op::Open { node, how })
    }

    fn draw_acl(&self, node: NodeId) -> Op {
        let acl = Acl::draw(&mut self.random.borrow_mut());
        Op::SetAcl { node, default: self.below(2) == 0, acl: (self.below(4) > 0).then_some(acl) }
    }

    fn draw_attribute(&self, model: &Model, node: NodeId) -> Op {
        match self.below(4) {
            0 if model.kind(node) != FileKind::Symlink => Op::SetMode { node, mode: self.mode() },
            1 => {
                let secs = 1_000_000 + self.below(1_000_000) as i64;
                Op::SetMtime { node, time: Timestamp { secs, nanos: self.below(1_000_000_000) as u32 } }
            }
            2 => Op::SetSize { node, size: self.offset(model.size(node)) },
            _ => Op::SetOwner { node, uid: self.below(4) as u32, gid: self.below(4) as u32 },
        }
    }

    fn draw_xattr(&self, node: NodeId) -> Op {
        let name = self.pick(&XATTRS);
        match self.below(4) {
            0 => Op::RemoveXattr { node, name },
            1 => Op::GetXattr { node, name },
            _ => {
                let value =
                    vec![self.below(256) as u8; self.below(if self.below(10) == 0 { 3000 } else { 40 }) as usize];
                Op::SetXattr { node, name, value, flags: self.pick(&[0, 0, 1, 2]) }
            }
        }
    }

    fn draw_look(&self, model: &Model, dir: NodeId, any: NodeId, name: FileName) -> Op {
        match self.below(7) {
            0 => Op::List { dir },
            6 if self.below(3) == 0 => Op::StatFs,
            1 => Op::ListXattrs { node: any },
            2 if model.kind(any) == FileKind::Symlink => Op::ReadLink { node: any },
            3 => Op::Stat { node: any },
            _ => Op::Lookup { dir, name },
        }
    }

    fn draw_data(&self, model: &Model, node: NodeId, shared: bool) -> Op {
        let size = model.size(node);
        let room = size < FILE_BYTES_MAX;
        match self.below(44) {
            0..14 if room => {
                let sync = self.is_sync(node);
                Op::Write { node, offset: self.offset(size), data: self.data(), sync }
            }
            14..17 if room => Op::Append { node, data: self.data() },
            17..19 => Op::Punch { node, offset: self.offset(size), length: 1 + self.below(20_000) },
            19 if room => Op::Extend { node, size: self.offset(size) + 1 },
            20..22 => Op::SetSize { node, size: self.offset(size) },
            22..25 if room => {
                let from = self.pick(&self.open_files(shared));
                let from_offset = self.below(model.size(from) + 1);
                let length = 1 + self.below(self.write_bytes_max);
                Op::Copy { from, from_offset, to: node, to_offset: self.offset(size), length }
            }
            25..29 => Op::Fsync { node },
            29 => Op::Stat { node },
            30 if room => {
                let (length, keep_size) = (1 + self.below(20_000), self.below(2) == 0);
                Op::Zero { node, offset: self.offset(size), length, keep_size }
            }
            31 if self.below(2) == 0 => Op::Reserve { node, offset: self.offset(size), length: 1 + self.below(9000) },
            31 => Op::SyncAll,
            32..34 => Op::Seek { node, offset: self.below(size + 1), data: self.below(2) == 0 },
            _ => Op::Read { node, offset: self.below(size + 1), length: 1 + self.below(size + 4096) as u32 },
        }
    }
}
