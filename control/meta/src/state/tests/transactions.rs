//! Operations that span shards: a driver that may die between any two entries, entries proposed
//! twice, and what is left compared with the model.

use super::super::entry::{AncestorWalk, Transaction};
use super::super::transaction::{Driver, TxnState, TxnStatus};
use super::super::{list_transactions, parent_of, transaction_status};
use super::check::check;
use super::model::Model;
use super::random::{Dice, comparable};
use super::*;
use cfs_reactor::clock::SplitMix64;
use std::collections::BTreeMap;

struct Cluster {
    shards: Vec<Shard>,
    /// One driver step in this many is its last; 0: none.
    crash_in: u64,
    dice: Dice,
    clock: i64,
    sequence: u64,
    begun: usize,
    crashes: usize,
}

/// Why an operation has no answer yet.
enum Pause {
    Blocked,
    Crashed,
}

impl Cluster {
    fn new(shards: u16, seed: u64, crash_in: u64) -> Cluster {
        Cluster {
            shards: (0..shards).map(|id| Shard::of(ShardId(id), shards)).collect(),
            crash_in,
            dice: Dice { rng: SplitMix64::new(seed), blob: 0 },
            clock: 2000,
            sequence: 1000,
            begun: 0,
            crashes: 0,
        }
    }

    fn shard(&mut self, id: ShardId) -> &mut Shard {
        &mut self.shards[usize::from(id.0)]
    }

    fn propose(&mut self, id: ShardId, entry: LogEntry) -> Outcome {
        let twice = self.crash_in > 0 && self.dice.below(5) == 0;
        let shard = self.shard(id);
        let outcome = shard.outcome(entry.clone());
        let follow_up = outcome.follow_up.clone();
        shard.reap();
        if twice && matches!(entry, LogEntry::Prepare { .. } | LogEntry::Decide { .. } | LogEntry::Commit { .. }) {
            let before = self.shard(id).state.clone();
            let again = self.shard(id).outcome(entry);
            assert!(self.shard(id).state == before, "{:?} changed something the second time", outcome.reply);
            // A refused transaction is forgotten at once; the stored reply is found by the request.
            if !matches!(outcome.reply, Reply::Decided { committed: false, .. }) {
                assert_eq!(again.reply, outcome.reply);
            }
        }
        Outcome { follow_up, ..outcome }
    }

    fn call(&mut self, session: SessionId, op: MetaOp) -> MetaCall {
        self.clock += 1;
        self.sequence += 1;
        let id = RequestId { session, sequence: self.sequence };
        let shard = op.home().map_or(ShardId(0), Ino::shard);
        MetaCall { id, lowest_unacknowledged: self.sequence, shard, op }
    }

    /// One attempt at a request, as the service makes it.
    fn attempt(&mut self, call: &MetaCall) -> Result<MetaResult, Pause> {
        let mut facts = Facts::default();
        let root = ROOT.shard();
        loop {
            let now = at(self.clock);
            let outcome = self.propose(call.shard, LogEntry::Client { call: call.clone(), now, facts });
            let reply = match outcome.reply {
                Reply::Meta(result) => Ok(result),
                Reply::Blocked { .. } => Err(Pause::Blocked),
                Reply::NeedTarget { dir, name } => {
                    let op = MetaOp::Lookup { dir, name };
                    facts.target = match now_or_never(read(&self.shard(dir.shard()).state, dir.shard(), ALICE, &op)) {
                        ReadReply::Meta(Ok(MetaReply::Entry(entry))) => Some(Some((entry.attr.ino, entry.attr.kind))),
                        ReadReply::Meta(Ok(MetaReply::Remote { ino, kind, .. })) => Some(Some((ino, kind))),
                        // That shard will say what is wrong with the directory.
                        ReadReply::Meta(_) => Some(None),
                        ReadReply::Blocked { .. } => return Err(Pause::Blocked),
                    };
                    continue;
                }
                Reply::NeedRenameLock { walks } => {
                    let take = LogEntry::TakeRenameLock { holder: call.id, steal: true };
                    let Reply::RenameLock { token: Some(token) } = self.propose(root, take).reply else {
                        return Err(Pause::Blocked);
                    };
                    facts.rename_token = Some(token);
                    match self.walk(&walks) {
                        Ok(None) => continue,
                        Ok(Some(errno)) => Ok(Err(errno.into())),
                        Err(pause) => Err(pause),
                    }
                }
                Reply::Begun { .. } => {
                    self.begun += 1;
                    let drive = outcome.follow_up.into_iter().find_map(|follow_up| match follow_up {
                        FollowUp::Drive(transaction) => Some(transaction),
                        _ => None,
                    });
                    self.drive(Driver::new(drive.expect("what begins is to be driven")))
                }
                other => panic!("{call:?}: {other:?}"),
            };
            if let Some(token) = facts.rename_token.filter(|_| !matches!(reply, Err(Pause::Crashed))) {
                self.propose(root, LogEntry::ReleaseRenameLock { token });
            }
            return reply;
        }
    }

    fn walk(&mut self, walks: &[AncestorWalk]) -> Result<Option<Errno>, Pause> {
        for walk in walks {
            let mut at = walk.from;
            while at != ROOT {
                if at == walk.avoid {
                    return Ok(Some(walk.errno));
                }
                at = match now_or_never(parent_of(&self.shard(at.shard()).state, at.shard(), at)) {
                    Ok(Some(parent)) => parent,
                    Ok(None) => break,
                    Err(_) => return Err(Pause::Blocked),
                };
            }
        }
        Ok(None)
    }

    fn drive(&mut self, mut driver: Driver) -> Result<MetaResult, Pause> {
        while let Some((shard, entry)) = driver.next(at(self.clock)) {
            if self.crash_in > 0 && self.dice.below(self.crash_in) == 0 {
                self.crashes += 1;
                return Err(Pause::Crashed);
            }
            let reply = self.propose(shard, entry).reply;
            driver.on_reply(&reply);
        }
        match driver.outcome() {
            Some(Some(result)) => Ok(result.clone()),
            _ => Err(Pause::Blocked),
        }
    }

    /// What new leaders do: go on with or abort what they coordinate, ask about the rest.
    fn recover(&mut self) {
        for pass in 0..2 {
            for id in (0..self.shards.len() as u16).map(ShardId) {
                for txn in now_or_never(list_transactions(&self.shard(id).state, id)) {
                    match txn {
                        TxnState::Coordinating { transaction, decided } if pass == 0 => {
                            let _ = self.drive(Driver::resume(transaction, decided));
                        }
                        TxnState::Participating { txn, committed } => self.ask(id, txn, committed),
                        TxnState::Coordinating { .. } => {}
                    }
                }
            }
        }
    }

    fn ask(&mut self, id: ShardId, txn: super::super::TxnId, committed: bool) {
        let home = txn.coordinator;
        let status = now_or_never(transaction_status(&self.shard(home).state, home, txn));
        let entry = match (status, committed) {
            (TxnStatus::Undecided, _) | (TxnStatus::Committed, true) => return,
            (TxnStatus::Committed, false) => LogEntry::Commit { txn },
            (TxnStatus::Unknown, false) => LogEntry::Abort { txn },
            (TxnStatus::Unknown, true) => LogEntry::Forget { txn },
        };
        self.propose(id, entry);
    }

    /// Recovers until nothing is left to do.
    fn settle(&mut self) {
        let crash_in = std::mem::take(&mut self.crash_in);
        self.recover();
        self.crash_in = crash_in;
    }

    /// A request, repeated until it has its answer.
    fn request(&mut self, session: SessionId, op: MetaOp) -> MetaResult {
        let call = self.call(session, op);
        for _ in 0..200 {
            match self.attempt(&call) {
                Ok(result) => return result,
                Err(Pause::Blocked | Pause::Crashed) => self.recover(),
            }
        }
        panic!("no answer to {call:?}");
    }

    fn create(&mut self, dir: Ino, called: &str, node: NewNode) -> Ino {
        match self.request(ALICE, MetaOp::Create { dir, name: name(called), node, hold: false }) {
            Ok(MetaReply::Entry(entry)) => entry.attr.ino,
            other => panic!("{other:?}"),
        }
    }

    fn check(&self) -> Result<(), String> {
        let states: Vec<_> = self.shards.iter().map(|shard| (shard.id, &shard.state)).collect();
        check(&states)
    }

    fn attr(&self, ino: Ino) -> MetaResult {
        self.shards[usize::from(ino.shard().0)].read(MetaOp::GetAttr { ino })
    }

    fn list(&self, dir: Ino) -> Vec<(Vec<u8>, Ino)> {
        let (entries, _) = self.shards[usize::from(dir.shard().0)].list(dir, 0, 1000).unwrap();
        let mut names: Vec<_> = entries.into_iter().map(|entry| (entry.name.to_vec(), entry.ino)).collect();
        names.sort();
        names
    }
}

fn against_the_model(seed: u64, crash_in: u64) -> Cluster {
    let mut cluster = Cluster::new(4, seed, crash_in);
    let mut model = Model::new(at(1000));
    for step in 0..350 {
        let session = cluster.dice.pick(&[ALICE, BOB]);
        let clock = cluster.clock;
        let op = cluster.dice.op(&model, clock);
        let context = format!("seed {seed} step {step} {op:?}");
        // What another shard does not have is a stale name only a damaged client sends.
        let inos = [op.home(), link_source(&op)];
        let file_as_dir = matches!(&op, MetaOp::Rename { to_dir, .. } if !model.is_dir(*to_dir));
        if file_as_dir || inos.into_iter().flatten().any(|ino| model.attr(ino).is_err()) {
            continue;
        }
        let result = cluster.request(session, op.clone());
        if let (MetaOp::Create { .. } | MetaOp::Tmpfile { .. }, Ok(MetaReply::Entry(entry))) = (&op, &result) {
            model.assigned = Some(entry.attr.ino);
        }
        let expected = model.run(session, &op, at(cluster.clock));
        assert_eq!(comparable(result), expected, "{context}");
        cluster.settle();
        if step % 50 == 49 {
            cluster.check().unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
            for ino in model.inodes() {
                assert_eq!(comparable(cluster.attr(ino)), Ok(model.seen_by(ALICE, ino)), "{context}");
                if model.is_dir(ino) {
                    assert_eq!(cluster.list(ino), model.names(ino), "{context}");
                }
            }
        }
    }
    cluster
}

fn link_source(op: &MetaOp) -> Option<Ino> {
    match op {
        MetaOp::Link { ino, .. } => Some(*ino),
        MetaOp::Rename { to_dir, .. } => Some(*to_dir),
        _ => None,
    }
}

#[test]
pub(super) fn operations_across_shards_equal_the_models() {
    let begun: usize = (1..=7).map(|seed| against_the_model(seed, 0).begun).sum();
    assert!(begun > 100, "only {begun} spanned shards");
}

#[test]
fn a_driver_that_dies_at_any_step_leaves_what_recovery_finishes() {
    let crashes: usize = (11..=15).map(|seed| against_the_model(seed, 4).crashes).sum();
    assert!(crashes > 100, "only {crashes} crashes");
}

#[test]
pub(super) fn interleaved_transactions_leave_every_record_consistent() {
    let (mut begun_in_all, mut most) = (0, 0);
    for seed in 21..=24 {
        let mut cluster = Cluster::new(3, seed, 0);
        let mut model = Model::new(at(1000));
        let mut open: Vec<Driver> = Vec::new();
        for _ in 0..500 {
            // The model only supplies inodes that exist or existed.
            let clock = cluster.clock;
            let op = cluster.dice.op(&model, clock);
            if matches!(op, MetaOp::Rename { flags, .. } if flags > 2) {
                continue;
            }
            let call = cluster.call(ALICE, op.clone());
            let entry = LogEntry::Client { call: call.clone(), now: at(cluster.clock), facts: Facts::default() };
            let outcome = cluster.propose(call.shard, entry);
            let begun = outcome.follow_up.into_iter().filter_map(|follow_up| match follow_up {
                FollowUp::Drive(transaction) => Some(Driver::new(transaction)),
                _ => None,
            });
            let waiting = open.len();
            open.extend(begun);
            cluster.begun += open.len() - waiting;
            most = most.max(open.len());
            if let Reply::Meta(Ok(MetaReply::Entry(entry))) = &outcome.reply {
                model.assigned = Some(entry.attr.ino);
                let _ = model.run(ALICE, &op, at(cluster.clock));
            }
            for _ in 0..1 {
                if open.is_empty() {
                    break;
                }
                let at_random = cluster.dice.below(open.len() as u64) as usize;
                let mut driver = open.swap_remove(at_random);
                // Slow drivers, so that several are under way at once.
                if cluster.dice.below(3) != 0 {
                    open.push(driver);
                    continue;
                }
                if let Some((shard, entry)) = driver.next(at(cluster.clock)) {
                    let reply = cluster.propose(shard, entry).reply;
                    driver.on_reply(&reply);
                    open.push(driver);
                }
            }
        }
        for driver in open {
            let _ = cluster.drive(driver);
        }
        cluster.settle();
        cluster.check().unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        begun_in_all += cluster.begun;
    }
    assert!(begun_in_all >= 40 && most >= 3, "{begun_in_all} begun, {most} at once");
}

/// A directory under the root that is placed on `home`.
fn directory_on(cluster: &mut Cluster, home: ShardId) -> Ino {
    for number in 0..100 {
        let called = format!("on-{}-{number}", home.0);
        let placed = super::super::directory::placement(&[7; 32], called.as_bytes(), cluster.shards.len() as u16);
        if placed == home {
            return cluster.create(ROOT, &called, dir());
        }
    }
    panic!("no name is placed on {home}");
}

#[test]
fn a_directory_under_the_root_lives_where_its_name_says_and_its_children_beside_it() {
    let mut cluster = Cluster::new(3, 1, 0);
    let home = directory_on(&mut cluster, ShardId(2));
    assert_eq!(home.shard(), ShardId(2));
    let child = cluster.create(home, "child", dir());
    assert_eq!(child.shard(), ShardId(2));
    assert_eq!(cluster.begun, 1);
    cluster.check().unwrap();
}

#[test]
fn a_prepared_key_makes_readers_and_writers_wait_and_frees_them_by_decision() {
    let mut cluster = Cluster::new(2, 1, 0);
    let (here, there) = (directory_on(&mut cluster, ShardId(0)), directory_on(&mut cluster, ShardId(1)));
    let file = cluster.create(there, "file", file());
    let call = cluster.call(ALICE, MetaOp::Link { ino: file, dir: here, name: name("link") });
    let outcome = cluster.propose(ShardId(0), LogEntry::Client { call, now: at(9000), facts: Facts::default() });
    let [FollowUp::Drive(transaction)] = outcome.follow_up.as_slice() else { panic!("{outcome:?}") };
    let mut driver = Driver::new(transaction.clone());
    let (shard, prepare) = driver.next(at(9000)).unwrap();
    let prepared = cluster.propose(shard, prepare).reply;
    driver.on_reply(&prepared);
    let txn = transaction.id;
    let blocked = |cluster: &Cluster, shard: usize, op: MetaOp| {
        now_or_never(read(&cluster.shards[shard].state, ShardId(shard as u16), ALICE, &op))
    };
    assert_eq!(blocked(&cluster, 1, MetaOp::GetAttr { ino: file }), ReadReply::Blocked { txn });
    assert_eq!(blocked(&cluster, 0, MetaOp::Lookup { dir: here, name: name("link") }), ReadReply::Blocked { txn });
    let chmod = MetaOp::SetAttr { ino: file, changes: AttrChanges { mode: Some(0o600), ..Default::default() } };
    let call = cluster.call(BOB, chmod);
    let entry = LogEntry::Client { call, now: at(9001), facts: Facts::default() };
    let waiting = cluster.propose(ShardId(1), entry.clone());
    assert_eq!((waiting.reply, waiting.batch.len()), (Reply::Blocked { txn }, 0));
    // The directory can't go while a name is about to appear in it.
    let rmdir = cluster.call(BOB, MetaOp::Rmdir { dir: ROOT, name: name("on-0-0") });
    let named = cluster.list(ROOT).into_iter().find(|(_, ino)| *ino == here).unwrap().0;
    let rmdir = MetaCall { op: MetaOp::Rmdir { dir: ROOT, name: SmallVec::from_slice(&named) }, ..rmdir };
    let refused = cluster.propose(ShardId(0), LogEntry::Client { call: rmdir, now: at(9001), facts: Facts::default() });
    assert_eq!(refused.reply, Reply::Blocked { txn });
    let linked = cluster.drive(driver).ok().unwrap();
    assert!(matches!(linked, Ok(MetaReply::Entry(ref entry)) if entry.attr.nlink == 2), "{linked:?}");
    assert!(matches!(cluster.propose(ShardId(1), entry).reply, Reply::Meta(Ok(_))));
    cluster.check().unwrap();
}

#[test]
fn a_session_fenced_before_the_decision_has_no_effect() {
    let mut cluster = Cluster::new(2, 1, 0);
    let there = directory_on(&mut cluster, ShardId(1));
    let file = cluster.create(there, "file", file());
    let call = cluster.call(BOB, MetaOp::Link { ino: file, dir: ROOT, name: name("link") });
    let outcome = cluster.propose(ShardId(0), LogEntry::Client { call, now: at(9000), facts: Facts::default() });
    let [FollowUp::Drive(transaction)] = outcome.follow_up.as_slice() else { panic!("{outcome:?}") };
    cluster.propose(ShardId(0), LogEntry::Fence { session: BOB });
    let result = cluster.drive(Driver::new(transaction.clone())).ok();
    assert_eq!(result, Some(Err(MetaError::Fenced)));
    assert!(matches!(cluster.attr(file), Ok(MetaReply::Attr { attr, .. }) if attr.nlink == 1));
    cluster.check().unwrap();
}

#[test]
fn the_rename_lock_is_fenced_by_its_token() {
    let mut cluster = Cluster::new(2, 1, 0);
    let holder = |sequence| RequestId { session: ALICE, sequence };
    let mut take = |sequence, steal| match cluster
        .propose(ShardId(0), LogEntry::TakeRenameLock { holder: holder(sequence), steal })
        .reply
    {
        Reply::RenameLock { token } => token,
        other => panic!("{other:?}"),
    };
    let first = take(1, false);
    assert_eq!((take(1, false), take(2, false)), (first, None));
    let second = take(2, true);
    assert!(second > first);
    // The first holder, presumed dead, comes back with a plan made under its old token.
    let there = directory_on(&mut cluster, ShardId(1));
    let sub = cluster.create(there, "sub", dir());
    let other = directory_on(&mut cluster, ShardId(0));
    let rename = MetaOp::Rename { dir: there, name: name("sub"), to_dir: other, to_name: name("sub"), flags: 0 };
    let call = cluster.call(ALICE, rename);
    let facts = Facts { target: Some(None), rename_token: first, full: false };
    let outcome = cluster.propose(ShardId(1), LogEntry::Client { call, now: at(9000), facts });
    let [FollowUp::Drive(transaction)] = outcome.follow_up.as_slice() else { panic!("{outcome:?}") };
    let mut driver = Driver::new(transaction.clone());
    while let Some((shard, entry)) = driver.next(at(9000)) {
        let reply = cluster.propose(shard, entry).reply;
        driver.on_reply(&reply);
    }
    assert_eq!(driver.outcome(), Some(&None));
    assert!(cluster.list(there).iter().any(|(_, ino)| *ino == sub));
    cluster.check().unwrap();
}

/// Transactions keep their parts in shard order, whatever the plan's.
#[test]
fn participants_come_in_shard_order() {
    let mut cluster = Cluster::new(4, 1, 0);
    let dirs: BTreeMap<u16, Ino> = (1..4).map(|home| (home, directory_on(&mut cluster, ShardId(home)))).collect();
    let moved = cluster.create(dirs[&3], "file", file());
    cluster
        .request(
            ALICE,
            MetaOp::Rename { dir: dirs[&3], name: name("file"), to_dir: dirs[&2], to_name: name("f"), flags: 0 },
        )
        .unwrap();
    let rename = MetaOp::Rename { dir: dirs[&2], name: name("f"), to_dir: dirs[&1], to_name: name("f"), flags: 0 };
    let call = cluster.call(ALICE, rename);
    let facts = Facts { target: Some(None), rename_token: None, full: false };
    let outcome = cluster.propose(ShardId(2), LogEntry::Client { call, now: at(9000), facts });
    let [FollowUp::Drive(Transaction { participants, .. })] = outcome.follow_up.as_slice() else {
        panic!("{outcome:?}")
    };
    assert_eq!(participants.iter().map(|(shard, _)| shard.0).collect::<Vec<_>>(), [1, 3]);
    cluster.settle();
    assert!(cluster.list(dirs[&2]).iter().any(|(_, ino)| *ino == moved));
    cluster.check().unwrap();
}
