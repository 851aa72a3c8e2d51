//! The programs: each draws one operation after the other, runs it through its client, and
//! compares the answer with the model's.

use crate::history::{ActorId, History};
use crate::model::{Answer, Model};
use crate::op::{FileName, NodeId, Op, Properties};
use crate::report::Checker;
use crate::sideline::RACE_NAMES;
use crate::world::World;
use bytes::Bytes;
use cfs_client::{Caller, Client, LocatedEntry, LockRequest, NewFile, OpenFile, OpenFlags};
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::meta::{Attr, AttrChanges, FileKind, LockFamily, LockKind, SetTime};
use cfs_wire::{Errno, Ino, Timestamp};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Few, so that they collide.
const NAMES: [&[u8]; 9] = [b"a", b"b", b"c", b"d", b"e", b"f-\xff\xfe", b"g", b"hh", &[b'n'; 255]];
const XATTRS: [&[u8]; 3] = [b"user.a", b"user.b", b"user.long-name"];
/// Beyond it a file is synced, so that a crash has a bounded number of legal outcomes.
const PENDING_MAX: usize = 40;
const FILE_BYTES_MAX: u64 = 3 << 20;
const OPEN_MAX: usize = 6;
const NODES_MAX: usize = 40;
/// Linux's falloc.h.
const FALLOC_KEEP_SIZE: i32 = 0x01;
const FALLOC_PUNCH_HOLE: i32 = 0x02;

/// The files beside the model; see [`crate::sideline`].
#[derive(Clone, Copy)]
pub struct SidelineFiles {
    pub dir: Ino,
    pub log: Ino,
    pub lock: Ino,
}

/// One program.
pub struct Actor {
    pub id: ActorId,
    pub client_index: usize,
    pub client: Rc<Client>,
    pub handle: Handle,
    pub history: Rc<History>,
    pub world: Rc<World>,
    /// Directories only this program works in, on different shards.
    pub own: Vec<NodeId>,
    /// Directories all programs work in.
    pub shared: Vec<NodeId>,
    pub sideline: SidelineFiles,
    pub shared_one_in: u64,
    pub write_bytes_max: u64,
    pub think: Duration,
    pub random: RefCell<SplitMix64>,
    pub open: RefCell<BTreeMap<NodeId, Opened>>,
}

/// An open file of one program.
#[derive(Clone)]
pub struct Opened {
    file: Rc<OpenFile>,
    /// Of the directories where all programs work: only used in turn.
    shared: bool,
}

/// What the real file system answered.
#[derive(Debug)]
enum Seen {
    Done,
    Attr(Box<Attr>),
    Bytes(Bytes),
    Count(u64),
    Names(Vec<(FileName, Ino)>),
    AttributeNames(Vec<Vec<u8>>),
}

impl Actor {
    /// Works until its domain dies.
    pub async fn run(self: Rc<Self>) {
        loop {
            self.history.enter(self.id).await;
            let die = self.below(100);
            if die < 4 {
                self.sideline_step().await;
            } else if self.random.borrow_mut().one_in(self.shared_one_in) {
                // Somebody may have died in his turn: what he did has to be found out first.
                if let Some(turn) = self.history.take_turn(self.id).await {
                    self.step(true).await;
                    self.history.end_turn(turn);
                }
            } else {
                self.step(false).await;
            }
            self.history.leave(self.id);
            if !self.think.is_zero() {
                let micros = self.below(self.think.as_micros() as u64 + 1);
                self.handle.sleep(Duration::from_micros(micros)).await;
            }
        }
    }

    fn below(&self, bound: u64) -> u64 {
        self.random.borrow_mut().below(bound)
    }

    fn pick<T: Clone>(&self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    async fn step(&self, shared: bool) {
        let op = self.draw(shared);
        let context = format!("{}@{} {op:?}", self.id.0, self.client_index);
        self.history.pending.borrow_mut().insert(self.id, op.clone());
        let seen = self.perform(&op, shared).await;
        self.outlive().await;
        self.history.pending.borrow_mut().remove(&self.id);
        let expected = self.history.model.borrow_mut().apply(self.client_index, &op);
        let outcome = match (&expected, &seen) {
            (Err(expected), Err(seen)) if expected == seen => Ok(()),
            (Ok(answer), Ok(seen)) => self.agree(answer, seen),
            (expected, seen) => Err(format!("answered {}, not {}", brief(seen), brief(expected))),
        };
        let shown = brief(&seen);
        self.history.note(format!("{context}: {shown}"));
        self.history.fold(&format!("{context}: {shown}"));
        if let Err(wrong) = outcome {
            let mut checker = Checker::Reply;
            if let Op::Read { node, .. } = &op {
                checker = Checker::Contents;
                let extents = self.world.extents_text(self.ino(*node)).await;
                self.history.note(format!("node {} at its shard: {extents}", node.0));
            }
            self.history.fail_with(checker, format!("{context}: {wrong}"));
        }
    }

    /// Ends here if the client was cut off: nobody is interested in its answers any more.
    async fn outlive(&self) {
        if self.history.is_dead(self.id) {
            std::future::pending::<()>().await;
        }
    }

    fn agree(&self, answer: &Answer, seen: &Seen) -> Result<(), String> {
        let mut model = self.history.model.borrow_mut();
        match (answer, seen) {
            (Answer::Done, Seen::Done) => Ok(()),
            (Answer::Node(id), Seen::Attr(attr)) => {
                model.check_attr(*id, attr)?;
                model.node_mut(*id).ino = Some(attr.ino);
                Ok(())
            }
            (Answer::Bytes(expected), Seen::Bytes(found)) if expected == found => Ok(()),
            (Answer::Bytes(expected), Seen::Bytes(found)) => Err(crate::content::difference(expected, found)),
            (Answer::Count(expected), Seen::Count(found)) if expected == found => Ok(()),
            (Answer::Names(expected), Seen::Names(found)) => {
                let expected: Vec<_> = expected.iter().map(|(name, id)| (name.clone(), model.node(*id).ino)).collect();
                let found: Vec<_> = found.iter().map(|(name, ino)| (name.clone(), Some(*ino))).collect();
                if expected == found { Ok(()) } else { Err(format!("lists {found:?}, not {expected:?}")) }
            }
            (Answer::AttributeNames(expected), Seen::AttributeNames(found)) if expected == found => Ok(()),
            (expected, found) => Err(format!("answered {found:?}, not {expected:?}")),
        }
    }

    // Drawing.

    fn name(&self) -> FileName {
        self.pick(&NAMES).to_vec()
    }

    fn properties(&self, kind: FileKind) -> Properties {
        let target = if kind == FileKind::Symlink { vec![b't'; 1 + self.below(60) as usize] } else { Vec::new() };
        let mode = if kind == FileKind::Symlink { 0o777 } else { self.below(0o1000) as u32 };
        Properties { kind, mode, uid: self.below(4) as u32, gid: self.below(4) as u32, target }
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
            0..2 => size,
            2 => self.below(self.write_bytes_max * 2),
            3 => self.below(5) * 4096,
            4 => 0,
            _ => self.below(size + 1000),
        }
        .min(FILE_BYTES_MAX)
    }

    fn draw(&self, shared: bool) -> Op {
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
        match self.below(100) {
            0..12 if nodes.len() < NODES_MAX => {
                use FileKind::*;
                let kind = self.pick(&[File, File, File, Directory, Directory, Symlink, Fifo]);
                Op::Make { dir, name, new: self.properties(kind) }
            }
            12..14 if self.may_open() => Op::Tmpfile { dir, new: self.properties(FileKind::File) },
            14..17 if any != dir || !inner.is_empty() => Op::Link { node: any, dir, name },
            17..22 => Op::Unlink { dir, name: existing },
            22..24 => Op::Rmdir { dir, name: existing },
            24..32 => {
                let flags = self.pick(&[0, 0, 0, 1, 2, 2, 3]);
                Op::Rename { dir, name: existing, to_dir: self.pick(&dirs), to_name: self.name(), flags }
            }
            32..36 => self.draw_attribute(&model, any),
            36..40 => self.draw_xattr(any),
            40..46 => self.draw_look(&model, dir, any, existing),
            _ => match self.draw_file_target(&files, shared) {
                Ok(node) => self.draw_data(&model, node, shared),
                Err(op) => op,
            },
        }
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
        if self.open.borrow().contains_key(&node) { Ok(node) } else { Err(Op::Open { node }) }
    }

    fn draw_attribute(&self, model: &Model, node: NodeId) -> Op {
        match self.below(4) {
            0 if model.kind(node) != FileKind::Symlink => Op::SetMode { node, mode: self.below(0o1000) as u32 },
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
        match self.below(6) {
            0 => Op::List { dir },
            1 => Op::ListXattrs { node: any },
            2 if model.kind(any) == FileKind::Symlink => Op::ReadLink { node: any },
            3 => Op::Stat { node: any },
            _ => Op::Lookup { dir, name },
        }
    }

    fn draw_data(&self, model: &Model, node: NodeId, shared: bool) -> Op {
        let size = model.size(node);
        let room = size < FILE_BYTES_MAX;
        match self.below(40) {
            0..14 if room => Op::Write { node, offset: self.offset(size), data: self.data() },
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
            _ => Op::Read { node, offset: self.below(size + 1), length: 1 + self.below(size + 4096) as u32 },
        }
    }

    // Performing.

    fn ino(&self, node: NodeId) -> Ino {
        self.history.model.borrow().node(node).ino.expect("every node an operation names has been seen")
    }

    fn file(&self, node: NodeId) -> Rc<OpenFile> {
        self.open.borrow().get(&node).expect("the file is open").file.clone()
    }

    async fn perform(&self, op: &Op, shared: bool) -> Result<Seen, Errno> {
        let client = &self.client;
        match op {
            Op::Make { .. } | Op::Tmpfile { .. } | Op::Open { .. } | Op::Close { .. } => {
                self.perform_open(op, shared).await
            }
            Op::Link { node, dir, name } => {
                client.link(self.ino(*node), self.ino(*dir), name).await.map(|entry| attr(entry.attr))
            }
            Op::Unlink { dir, name } => client.unlink(self.ino(*dir), name).await.map(|()| Seen::Done),
            Op::Rmdir { dir, name } => client.rmdir(self.ino(*dir), name).await.map(|()| Seen::Done),
            Op::Rename { dir, name, to_dir, to_name, flags } => {
                client.rename(self.ino(*dir), name, self.ino(*to_dir), to_name, *flags).await.map(|()| Seen::Done)
            }
            Op::Lookup { dir, name } => match client.lookup(self.ino(*dir), name).await {
                Ok(entry) => Ok(attr(entry.attr)),
                Err(Ok(_)) => Err(Errno::ENOENT),
                Err(Err(errno)) => Err(errno),
            },
            Op::List { dir } => list(client, self.ino(*dir)).await.map(Seen::Names),
            Op::Stat { node } => client.getattr(self.ino(*node)).await.map(|located| attr(located.attr)),
            Op::ReadLink { node } => client.readlink(self.ino(*node)).await.map(|target| Seen::Bytes(target.into())),
            Op::SetXattr { node, name, value, flags } => {
                client.setxattr(self.ino(*node), name, value, *flags).await.map(|()| Seen::Done)
            }
            Op::RemoveXattr { node, name } => client.removexattr(self.ino(*node), name).await.map(|()| Seen::Done),
            Op::GetXattr { node, name } => {
                client.getxattr(self.ino(*node), name).await.map(|value| Seen::Bytes(value.into()))
            }
            Op::ListXattrs { node } => {
                let names = client.listxattr(self.ino(*node)).await?;
                Ok(Seen::AttributeNames(names.iter().map(|name| name.to_vec()).collect()))
            }
            Op::SetMode { node, .. }
            | Op::SetOwner { node, .. }
            | Op::SetSize { node, .. }
            | Op::SetMtime { node, .. } => {
                client.setattr(self.ino(*node), changes(op)).await.map(|located| attr(located.attr))
            }
            _ => self.perform_data(op).await,
        }
    }

    async fn perform_open(&self, op: &Op, shared: bool) -> Result<Seen, Errno> {
        let client = &self.client;
        let flags = OpenFlags::default();
        match op {
            Op::Make { dir, name, new } => {
                let caller = Caller { uid: new.uid, gid: new.gid, pid: 1 };
                let dir = self.ino(*dir);
                let node = NewFile { kind: new.kind, mode: new.mode, umask: 0, rdev: 0 };
                let made: Result<LocatedEntry, Errno> = match new.kind {
                    FileKind::Directory => client.mkdir(caller, dir, name, new.mode, 0).await,
                    FileKind::Symlink => client.symlink(caller, dir, name, &new.target).await,
                    FileKind::File => client.create(caller, dir, name, node, flags).await.map(|(entry, file)| {
                        self.opened_new(file, shared);
                        entry
                    }),
                    _ => client.mknod(caller, dir, name, node).await,
                };
                made.map(|entry| attr(entry.attr))
            }
            Op::Tmpfile { dir, new } => {
                let caller = Caller { uid: new.uid, gid: new.gid, pid: 1 };
                let node = NewFile { kind: new.kind, mode: new.mode, umask: 0, rdev: 0 };
                let (entry, file) = client.tmpfile(caller, self.ino(*dir), node, flags).await?;
                self.opened_new(file, shared);
                Ok(attr(entry.attr))
            }
            Op::Open { node } => {
                let file = client.open(self.ino(*node), flags, false).await?;
                self.open.borrow_mut().insert(*node, Opened { file, shared });
                Ok(Seen::Done)
            }
            Op::Close { node } => {
                let file = self.open.borrow_mut().remove(node).expect("only open files are closed").file;
                let closed = client.flush(&file).await;
                client.release(&file);
                closed.map(|()| Seen::Done)
            }
            other => unreachable!("{other:?} opens nothing"),
        }
    }

    /// A file that was just made gets the number that the model is about to give it.
    fn opened_new(&self, file: Rc<OpenFile>, shared: bool) {
        let id = self.history.model.borrow().next_id();
        self.open.borrow_mut().insert(id, Opened { file, shared });
    }

    async fn perform_data(&self, op: &Op) -> Result<Seen, Errno> {
        let client = &self.client;
        match op {
            Op::Write { node, offset, data } => {
                let written = client.write(&self.file(*node), *offset, data.clone(), false).await?;
                Ok(Seen::Count(written.into()))
            }
            Op::Append { node, data } => {
                // A second open file, as a program that appends would have.
                let flags = OpenFlags { append: true, ..OpenFlags::default() };
                let file = client.open(self.ino(*node), flags, false).await?;
                let written = client.write(&file, 0, data.clone(), false).await;
                let closed = client.flush(&file).await;
                client.release(&file);
                closed?;
                Ok(Seen::Count(written?.into()))
            }
            Op::Punch { node, offset, length } => {
                let mode = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE;
                client.fallocate(&self.file(*node), mode, *offset, *length, false).await.map(|()| Seen::Done)
            }
            Op::Extend { node, size } => {
                client.fallocate(&self.file(*node), 0, 0, *size, false).await.map(|()| Seen::Done)
            }
            Op::Copy { from, from_offset, to, to_offset, length } => {
                let (from, to) = (self.file(*from), self.file(*to));
                let copied = client.copy_file_range(&from, *from_offset, &to, *to_offset, *length, false).await?;
                Ok(Seen::Count(copied))
            }
            Op::Fsync { node } => client.fsync(&self.file(*node), false).await.map(|()| Seen::Done),
            Op::Read { node, offset, length } => {
                client.read(&self.file(*node), *offset, *length).await.map(Seen::Bytes)
            }
            other => unreachable!("{other:?} touches no data"),
        }
    }

    // The sideline.

    async fn sideline_step(&self) {
        let outcome = match self.below(3) {
            0 => self.append_record().await,
            1 => self.hold_lock().await,
            _ => self.race().await,
        };
        self.outlive().await;
        if let Err(detail) = outcome {
            self.history.fail_with(Checker::Reply, format!("{}@{} {detail}", self.id.0, self.client_index));
        }
    }

    async fn append_record(&self) -> Result<(), String> {
        let error = |errno: Errno| format!("append to the common log: {errno}");
        let flags = OpenFlags { append: true, ..OpenFlags::default() };
        let file = self.client.open(self.sideline.log, flags, false).await.map_err(error)?;
        let (number, record) = self.history.sideline.next_record(self.id);
        let written = self.client.write(&file, 0, record, false).await;
        let synced = self.client.fsync(&file, false).await;
        self.client.release(&file);
        written.map_err(error)?;
        synced.map_err(error)?;
        self.history.sideline.record_synced(self.id, number);
        self.history.note(format!("{}@{} record {number} synced", self.id.0, self.client_index));
        Ok(())
    }

    async fn hold_lock(&self) -> Result<(), String> {
        let owner = self.id.0 as u64 + 1;
        let (family, kind) = (LockFamily::Flock, LockKind::Write);
        let lock = LockRequest { family, kind, start: 0, end: u64::MAX, owner, pid: owner as u32 };
        let wait = self.below(2) == 0;
        let locked = match wait {
            true => self.client.setlkw(self.sideline.lock, lock).await,
            false => self.client.setlk(self.sideline.lock, lock).await,
        };
        match locked {
            Err(Errno::EAGAIN) if !wait => return Ok(()),
            Err(errno) => return Err(format!("lock: {errno}")),
            Ok(()) => {}
        }
        self.outlive().await;
        if let Err(violation) = self.history.sideline.locked(self.id) {
            self.history.fail(violation);
        }
        self.handle.sleep(Duration::from_micros(self.below(3000))).await;
        self.history.sideline.unlocking();
        self.client.unlock(self.sideline.lock, lock).await.map_err(|errno| format!("unlock: {errno}"))
    }

    async fn race(&self) -> Result<(), String> {
        let number = self.below(RACE_NAMES);
        let name = format!("race{number}").into_bytes();
        let dir = self.sideline.dir;
        if self.history.sideline.owner(number) == Some(self.id) {
            self.history.sideline.removing(number);
            let removed = self.client.unlink(dir, &name).await;
            return removed.map_err(|errno| format!("unlink of its own name {number}: {errno}"));
        }
        let new = NewFile { kind: FileKind::Fifo, mode: 0o600, umask: 0, rdev: 0 };
        let made = self.client.mknod(Caller::default(), dir, &name, new).await;
        self.outlive().await;
        match made {
            Err(Errno::EEXIST) => Ok(()),
            Err(errno) => Err(format!("create of name {number}: {errno}")),
            Ok(_) => {
                if let Err(violation) = self.history.sideline.created(self.id, number) {
                    self.history.fail(violation);
                }
                Ok(())
            }
        }
    }
}

fn attr(attr: Attr) -> Seen {
    Seen::Attr(Box::new(attr))
}

fn changes(op: &Op) -> AttrChanges {
    let none = AttrChanges::default();
    match op {
        Op::SetMode { mode, .. } => AttrChanges { mode: Some(*mode), ..none },
        Op::SetOwner { uid, gid, .. } => AttrChanges { uid: Some(*uid), gid: Some(*gid), ..none },
        Op::SetSize { size, .. } => AttrChanges { size: Some(*size), ..none },
        Op::SetMtime { time, .. } => AttrChanges { mtime: Some(SetTime::At(*time)), ..none },
        _ => none,
    }
}

/// All entries of a directory by name, listed a few at a time.
pub async fn list(client: &Rc<Client>, dir: Ino) -> Result<Vec<(FileName, Ino)>, Errno> {
    const AT_ONCE: u32 = 5;
    let mut found = Vec::new();
    let mut after = 0;
    loop {
        let part = client.readdir(dir, after, AT_ONCE, true).await?;
        after = part.entries.last().map_or(after, |entry| entry.cookie);
        found.extend(part.entries.iter().map(|entry| (entry.name.to_vec(), entry.ino)));
        if part.end {
            found.sort();
            return Ok(found);
        }
    }
}

/// A result without its bytes.
fn brief<T: std::fmt::Debug>(result: &Result<T, Errno>) -> String {
    match result {
        Err(errno) => errno.name().to_owned(),
        Ok(value) => {
            let text = format!("{value:?}");
            if let Some(found) = text.find("ino: ") {
                return text[found..].split(',').next().unwrap_or_default().to_owned();
            }
            if text.chars().count() > 60 { format!("ok, {} bytes of text", text.len()) } else { text }
        }
    }
}
