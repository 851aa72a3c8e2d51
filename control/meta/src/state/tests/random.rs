//! Random operations of two sessions on one shard, each reply compared with the model's, the
//! whole tree now and then, replay and repetition at the end.

use super::super::directory::collide;
use super::check::check;
use super::model::Model;
use super::*;
use cfs_reactor::clock::SplitMix64;
use cfs_wire::meta::{Entry, SetTime, XATTR_CAPABILITY};
use std::collections::BTreeMap;

const NAMES: [&[u8]; 9] = [b"a", b"b", b"c", b"dd", b"e-\xff\xfe", b"f", b"g", b"h", b"i"];

pub(super) struct Dice {
    pub rng: SplitMix64,
    pub blob: u128,
}

impl Dice {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.rng.below(bound)
    }

    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }

    fn name(&mut self) -> Name {
        SmallVec::from_slice(self.pick(&NAMES))
    }

    /// Mostly a name that is there.
    fn name_in(&mut self, model: &Model, dir: Ino) -> Name {
        let names = if model.is_dir(dir) { model.names(dir) } else { Vec::new() };
        if names.is_empty() || self.below(3) == 0 { self.name() } else { SmallVec::from_vec(self.pick(&names).0) }
    }

    fn inode(&mut self, model: &Model) -> Ino {
        if self.below(40) == 0 {
            return Ino::new(ShardId(0), self.below(500) + 1);
        }
        self.pick(&model.inodes())
    }

    fn dir(&mut self, model: &Model) -> Ino {
        let dirs: Vec<Ino> = model.inodes().into_iter().filter(|ino| model.is_dir(*ino)).collect();
        if self.below(20) == 0 { self.inode(model) } else { self.pick(&dirs) }
    }

    fn node(&mut self, kind: FileKind) -> NewNode {
        let target = if kind == FileKind::Symlink { vec![b't'; 1 + self.below(50) as usize] } else { Vec::new() };
        NewNode {
            kind,
            mode: self.below(0o10000) as u32,
            umask: self.pick(&[0o022, 0, 0o077]),
            uid: self.below(5) as u32,
            gid: self.below(5) as u32,
            rdev: 7,
            target,
        }
    }

    fn location(&mut self) -> Location {
        self.blob += 1;
        // Some share a blob, as deduplicated chunks do.
        let blob = if self.below(4) == 0 { u128::from(self.below(5)) + 1 } else { self.blob + 100 };
        hot(blob, self.below(100) as u32)
    }

    fn write(&mut self) -> FileWrite {
        let big = self.below(3) == 0;
        let offset = self.below(if big { 20_000 } else { 5000 });
        let length = 1 + self.below(if big { 8000 } else { 900 });
        let bytes = vec![self.below(256) as u8; self.below(600) as usize];
        let epoch = Epoch(0);
        match self.below(11) {
            0..3 => FileWrite::Data { offset, length: length as u32, location: self.location(), epoch },
            3 => FileWrite::Append { length: length as u32, location: self.location(), epoch },
            4..6 => FileWrite::Inline { offset: self.below(1200), bytes },
            6 => FileWrite::AppendInline { bytes },
            7 => FileWrite::Punch { offset, length },
            8 => FileWrite::Truncate { size: self.below(6000) },
            9 => FileWrite::DropCapability,
            _ => FileWrite::Extend { size: self.below(9000) },
        }
    }

    fn changes(&mut self, now: i64) -> AttrChanges {
        let mut some = |bound: u64| if self.rng.below(3) == 0 { Some(self.rng.below(bound)) } else { None };
        let time = |secs: Option<u64>| secs.map(|secs| if secs == 0 { SetTime::Now } else { SetTime::At(at(now - 9)) });
        AttrChanges {
            mode: some(0o10000).map(|mode| mode as u32),
            uid: some(5).map(|uid| uid as u32),
            gid: some(5).map(|gid| gid as u32),
            size: some(9000),
            atime: time(some(2)),
            mtime: time(some(2)),
            ctime: None,
            kill_privileges: some(2) == Some(1),
        }
    }

    pub fn op(&mut self, model: &Model, now: i64) -> MetaOp {
        use FileKind::*;
        let (dir, name) = (self.dir(model), self.name());
        let there = self.name_in(model, dir);
        match self.below(32) {
            0..6 => {
                let kind = self.pick(&[File, File, Directory, Directory, Symlink, Fifo, CharDevice]);
                MetaOp::Create { dir, name, node: self.node(kind), hold: kind == File && self.below(4) == 0 }
            }
            6 => MetaOp::Tmpfile { dir, node: self.node(File) },
            7..9 => MetaOp::Link { ino: self.inode(model), dir, name },
            9..12 => MetaOp::Unlink { dir, name: there },
            12..14 => MetaOp::Rmdir { dir, name: there },
            14..19 => {
                let flags = self.pick(&[0, 0, 0, 1, 2, 2, 3, 4]);
                let to_dir = self.dir(model);
                let to_name = if self.below(2) == 0 { self.name() } else { self.name_in(model, to_dir) };
                MetaOp::Rename { dir, name: there, to_dir, to_name, flags }
            }
            19..22 => MetaOp::SetAttr { ino: self.inode(model), changes: self.changes(now) },
            22 => {
                let (value, flags) = (vec![9; self.below(20) as usize], self.below(3) as u32);
                let name =
                    SmallVec::from_slice(self.pick(&[b"user.x".as_slice(), b"user.x", b"user.y", XATTR_CAPABILITY]));
                MetaOp::SetXattr { ino: self.inode(model), name, value, flags }
            }
            23 => {
                let name = SmallVec::from_slice(self.pick(&[b"user.x".as_slice(), XATTR_CAPABILITY]));
                MetaOp::RemoveXattr { ino: self.inode(model), name }
            }
            24..30 => {
                let writes = (0..1 + self.below(4)).map(|_| self.write()).collect();
                let kill_privileges = self.below(8) == 0;
                MetaOp::Commit(Commit { ino: self.inode(model), sequence: 1, writes, mtime: None, kill_privileges })
            }
            30 => MetaOp::Open { ino: self.inode(model) },
            _ => {
                let ino = self.inode(model);
                let neighbour = Ino::from_u64(ino.as_u64() + 1);
                MetaOp::Release { inos: vec![ino, neighbour] }
            }
        }
    }
}

/// A reply without what the model doesn't know.
pub(super) fn comparable(result: MetaResult) -> MetaResult {
    let plain = |attr: Attr| Attr { version: 0, allocated: 0, ..attr };
    result.map(|reply| match reply {
        MetaReply::Entry(entry) => MetaReply::Entry(Entry { attr: plain(entry.attr), ..entry }),
        MetaReply::Attr { attr, grant } => MetaReply::Attr { attr: plain(attr), grant },
        MetaReply::Committed { attr, append_offset } => MetaReply::Committed { attr: plain(attr), append_offset },
        other => other,
    })
}

fn compare_all(shard: &Shard, model: &Model, context: &str) {
    for ino in model.inodes() {
        let attr = comparable(shard.read(MetaOp::GetAttr { ino }));
        assert_eq!(attr, Ok(model.seen_by(ALICE, ino)), "{context}");
        if let Some(bytes) = model.bytes(ino) {
            assert!(shard.content(ino) == bytes, "{context}: content of {ino} differs");
        }
        if model.is_dir(ino) {
            let (entries, end) = shard.list(ino, 0, 1000).unwrap();
            let mut listed: Vec<_> = entries.iter().map(|entry| (entry.name.to_vec(), entry.ino)).collect();
            listed.sort();
            assert_eq!((listed, end), (model.names(ino), true), "{context}");
        }
        match shard.read(MetaOp::ListXattr { ino }) {
            Ok(MetaReply::Names(names)) => {
                assert_eq!(names.iter().map(|name| name.to_vec()).collect::<Vec<_>>(), model.xattrs(ino), "{context}");
            }
            other => panic!("{context}: {other:?}"),
        }
    }
    if let Err(wrong) = check(&[(shard.id, &shard.state)]) {
        panic!("{context}: {wrong}");
    }
}

fn run(seed: u64, operations: usize, succeeded: &mut BTreeMap<String, usize>) -> Shard {
    let mut dice = Dice { rng: SplitMix64::new(seed), blob: 0 };
    let mut shard = Shard::new();
    let mut model = Model::new(at(1000));
    for step in 0..operations {
        let session = dice.pick(&[ALICE, BOB]);
        let op = dice.op(&model, shard.clock);
        let context = format!("seed {seed} step {step} {op:?}");
        let entry = shard.next_call(session, op.clone());
        let reply = shard.entry(entry.clone());
        let Reply::Meta(result) = reply.clone() else { panic!("{context}: {reply:?}") };
        shard.reap();
        let expected = model.run(session, &op, at(shard.clock));
        if expected.is_ok() {
            let kind = format!("{op:?}");
            *succeeded.entry(kind[..kind.find([' ', '(']).unwrap()].to_owned()).or_default() += 1;
        }
        assert_eq!(comparable(result), expected, "{context}");
        if step % 97 == 0 {
            compare_all(&shard, &model, &context);
        }
        if step % 13 == 0 {
            // The reply was lost: the client asks again.
            let before = shard.state.clone();
            assert_eq!(shard.entry(entry), reply, "{context}, repeated");
            assert_eq!(shard.state, before, "{context}, repeated");
        }
    }
    compare_all(&shard, &model, &format!("seed {seed} at the end"));
    shard
}

#[test]
pub(super) fn replies_and_trees_equal_the_models() {
    let mut succeeded = BTreeMap::new();
    for seed in 1..=8 {
        run(seed, 700, &mut succeeded);
    }
    assert!(succeeded.len() == 12 && succeeded.values().all(|count| *count >= 10), "too few succeeded: {succeeded:?}");
}

#[test]
fn colliding_name_hashes_change_nothing_but_cookies() {
    collide::set_mask(1);
    for seed in 101..=103 {
        run(seed, 500, &mut BTreeMap::new());
    }
    collide::set_mask(u64::MAX);
}

#[test]
fn the_same_entries_give_the_same_bytes() {
    let first = run(7, 600, &mut BTreeMap::new());
    let mut again = MemoryState::default();
    for entry in &first.log {
        let outcome = now_or_never(apply(&again, first.id, entry));
        again.write(&outcome);
    }
    assert_eq!(again, first.state);
}

#[test]
fn every_entry_survives_its_encoding() {
    for entry in run(8, 200, &mut BTreeMap::new()).log {
        let bytes = postcard::to_stdvec(&entry).unwrap();
        assert_eq!(postcard::from_bytes::<LogEntry>(&bytes), Ok(entry));
    }
}

/// The store's checksums make this unlikely; a bug there must not take the server down.
#[test]
fn damaged_records_are_errors_and_never_panics() {
    let sound = run(9, 250, &mut BTreeMap::new());
    let mut dice = Dice { rng: SplitMix64::new(77), blob: 0 };
    let keys: Vec<_> = sound.state.map.keys().cloned().collect();
    let model = Model::new(at(1000));
    let mut refused = 0;
    for _ in 0..3000 {
        let mut state = sound.state.clone();
        let key = dice.pick(&keys);
        let mut value = state.map[&key].to_vec();
        let at_byte = dice.below(value.len() as u64) as usize;
        match dice.below(3) {
            0 => value.truncate(at_byte),
            _ => value[at_byte] ^= 1 << dice.below(8),
        }
        // Mostly the inode that was hit.
        let hit = super::super::keys::u64_at(&key, 3).filter(|_| (0x10..0x14).contains(&key[2]));
        let ino = hit.map_or(ROOT, Ino::from_u64);
        state.map.insert(key, value.into());
        let writes = vec![dice.write(), dice.write()];
        let op = match dice.below(8) {
            4 => MetaOp::Commit(Commit { ino, sequence: 1, writes, mtime: None, kill_privileges: false }),
            5 => MetaOp::SetAttr { ino, changes: dice.changes(5000) },
            6 => MetaOp::ListXattr { ino },
            0 => MetaOp::ReadDir { dir: ROOT, after: 0, entries_max: 100, with_attrs: true },
            1 => MetaOp::GetExtents { ino, offset: 0, length: u64::MAX, extents_max: 100 },
            2 => MetaOp::GetAttr { ino },
            3 => MetaOp::Lookup { dir: ROOT, name: dice.name() },
            _ => dice.op(&model, 1),
        };
        if op.is_read() {
            refused += usize::from(read(&state, sound.id, ALICE, &op).now_or_never().unwrap().is_err());
            continue;
        }
        let id = RequestId { session: ALICE, sequence: 1 << 40 };
        let call = MetaCall { id, lowest_unacknowledged: 1 << 40, shard: sound.id, op };
        let entry = LogEntry::Client { call, now: at(5000), facts: Facts::default() };
        refused += usize::from(apply(&state, sound.id, &entry).now_or_never().unwrap().is_err());
    }
    assert!(refused > 300, "only {refused} noticed");
}
