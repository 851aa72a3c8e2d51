//! The programs: each draws one operation after the other, runs it through its client, and
//! compares the answer with the model's.

use crate::draw::Mix;
use crate::history::{ActorId, History};
use crate::model::Answer;
use crate::op::{FileName, NodeId, Op};
use crate::report::Checker;
use crate::sideline::Grounds;
use crate::world::World;
use bytes::Bytes;
use cfs_client::{Client, OpenFile};
use cfs_reactor::Handle;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::meta::{Attr, FileKind};
use cfs_wire::{Errno, Ino};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Free bytes, redundancy taken off, above which nobody may be told that there is no space: what
/// one operation takes at most, with its holes' and its shards' rounding, three times over.
pub(crate) const FULL_BELOW: u64 = 4 << 20;

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
    pub grounds: Rc<Grounds>,
    pub mix: Mix,
    pub shared_one_in: u64,
    /// Of a hundred operations so many are games.
    pub games: u64,
    pub write_bytes_max: u64,
    pub think: Duration,
    pub random: RefCell<SplitMix64>,
    pub open: RefCell<BTreeMap<NodeId, Opened>>,
    /// The last write found no space.
    pub is_full: Cell<bool>,
}

/// An open file of one program.
#[derive(Clone)]
pub struct Opened {
    pub(crate) file: Rc<OpenFile>,
    /// Of the directories where all programs work: only used in turn.
    pub(crate) shared: bool,
}

/// What the real file system answered.
#[derive(Debug)]
pub(crate) enum Seen {
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
            if self.below(100) < self.games {
                self.play().await;
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

    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.random.borrow_mut().below(bound)
    }

    pub(crate) fn pick<T: Clone>(&self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    async fn step(&self, shared: bool) {
        let op = self.draw(shared);
        let context = format!("{}@{} {op:?}", self.id.0, self.client_index);
        self.history.pending.borrow_mut().insert(self.id, op.clone());
        let seen = self.perform(&op, shared).await;
        self.outlive().await;
        self.history.pending.borrow_mut().remove(&self.id);
        let may_be_refused = takes_space(&op) || adds_metadata(&op);
        if matches!(seen, Err(Errno::ENOSPC)) && may_be_refused && self.may_be_full() {
            // It did nothing, and the next look will tell.
            self.is_full.set(true);
            self.history.note(format!("{context}: ENOSPC"));
            self.history.fold(&format!("{context}: ENOSPC"));
            return;
        }
        self.is_full.set(self.is_full.get() && !takes_space(&op));
        if seen.is_ok() && matches!(op, Op::Fsync { .. } | Op::SyncAll | Op::Write { sync: true, .. }) {
            self.history.synced(self.id);
        }
        let expected = self.history.model.borrow_mut().apply(self.client_index, &op);
        let outcome = match (&expected, &seen) {
            (Ok(Answer::Place { .. }), _) => self.agree_place(&expected, &seen),
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
    pub(crate) async fn outlive(&self) {
        if self.history.is_dead(self.id) {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the disks are so full that what takes space may be refused. While the node is away nobody
    /// knows.
    pub(crate) fn may_be_full(&self) -> bool {
        if !self.world.is_serving() {
            return true;
        }
        let node = self.world.node();
        // What is reserved for one client is refused to the others.
        let reserved = node.store().reserved_bytes() * node.parameters().policy.data() as u64;
        node.usable_space().1 < FULL_BELOW + reserved
    }

    /// A seek need not find every hole, but what it skips as a hole reads as zeroes, and so does
    /// what it calls one.
    fn agree_place(&self, expected: &Result<Answer, Errno>, seen: &Result<Seen, Errno>) -> Result<(), String> {
        let Ok(Answer::Place { node, offset, data }) = expected else { return Ok(()) };
        let model = self.history.model.borrow();
        let bytes = model.node(*node).content.now();
        let zeroes = |from: u64, to: u64| bytes[from as usize..to as usize].iter().all(|byte| *byte == 0);
        let size = bytes.len() as u64;
        let right = match (data, seen) {
            (true, Err(Errno::ENXIO)) => zeroes(*offset, size),
            (true, Ok(Seen::Count(found))) => (*offset..size).contains(found) && zeroes(*offset, *found),
            (false, Ok(Seen::Count(found))) if *found < size => *found >= *offset && zeroes(*found, found + 1),
            (false, Ok(Seen::Count(found))) => *found == size,
            _ => false,
        };
        if right { Ok(()) } else { Err(format!("answered {}, of {size} bytes", brief(seen))) }
    }

    fn agree(&self, answer: &Answer, seen: &Seen) -> Result<(), String> {
        let mut model = self.history.model.borrow_mut();
        match (answer, seen) {
            (Answer::Done, Seen::Done) => Ok(()),
            (Answer::Node(id), Seen::Attr(attr)) => {
                model.check_attr(*id, attr)?;
                let node = model.node_mut(*id);
                node.ino = Some(attr.ino);
                node.learn_times(attr);
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
}

/// Whether an operation stores bytes.
fn takes_space(op: &Op) -> bool {
    matches!(op, Op::Write { .. } | Op::Append { .. } | Op::Copy { .. })
}

/// Whether an operation makes names, inodes or attributes, which a full node refuses too: what is
/// left then is for deleting.
fn adds_metadata(op: &Op) -> bool {
    use Op::*;
    matches!(op, Make { .. } | Tmpfile { .. } | Link { .. } | SetXattr { .. } | SetAcl { .. })
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
pub(crate) fn brief<T: std::fmt::Debug>(result: &Result<T, Errno>) -> String {
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

/// Removes everything beneath a directory.
pub async fn remove_all(client: &Rc<Client>, dir: Ino) -> Result<(), Errno> {
    for (name, ino) in list(client, dir).await? {
        if client.getattr(ino).await?.attr.kind == FileKind::Directory {
            Box::pin(remove_all(client, ino)).await?;
            client.rmdir(dir, &name).await?;
        } else {
            client.unlink(dir, &name).await?;
        }
    }
    Ok(())
}
