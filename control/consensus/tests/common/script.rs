//! Groups that work on one shared log at once, each by its own script, and the oracle: after a
//! crash a group must find exactly the state after some prefix of its script, and no
//! acknowledged step may be missing from that prefix.

use super::blobs::{Medium, Torn};
use cfs_consensus::log::GroupLog;
use cfs_consensus::types::{Command, Entry, LeaderId, Raft, Vote, log_id};
use cfs_consensus::{LogConfig, LogError, RecoveryReport, SharedLog};
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_wire::ShardId;
use openraft::async_runtime::Oneshot;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::vote::RaftLeaderId;
use openraft::{AsyncRuntime, EntryPayload};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

#[derive(Clone, Debug)]
pub enum Step {
    Vote(u64),
    Append { term: u64, count: u64, bytes: usize },
    Truncate { keep: u64 },
    Purge { keep: u64 },
}

/// What a group should find.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Found {
    pub vote: Option<u64>,
    pub purged: Option<u64>,
    /// Index to (term, first byte, length).
    pub entries: BTreeMap<u64, (u64, u8, usize)>,
}

impl Found {
    fn next_index(&self) -> u64 {
        self.entries.keys().last().map_or(self.purged.map_or(0, |at| at + 1), |last| last + 1)
    }

    /// The state after a step, and the log ids the step names.
    fn step(&mut self, step: &Step) {
        match step {
            Step::Vote(term) => self.vote = Some(*term),
            Step::Append { term, count, bytes } => {
                for _ in 0..*count {
                    let index = self.next_index();
                    self.entries.insert(index, (*term, (index % 251) as u8, *bytes));
                }
            }
            Step::Truncate { keep } => {
                let last = self.cut_at(*keep);
                self.entries.retain(|index, _| Some(*index) <= last);
            }
            Step::Purge { keep } => {
                if let Some(upto) = self.cut_at(*keep) {
                    self.purged = Some(upto);
                    self.entries.retain(|index, _| *index > upto);
                }
            }
        }
    }

    /// The index so many entries before the end, if it is still there.
    fn cut_at(&self, from_end: u64) -> Option<u64> {
        let at = self.next_index().checked_sub(1 + from_end)?;
        if self.entries.contains_key(&at) { Some(at) } else { self.purged }
    }
}

/// A group's script: votes, appends of all sizes, truncations, purges. The last group is idle
/// but for its first two steps.
pub fn script(seed: u64, group: u64, length: usize) -> Vec<Step> {
    let mut random = SplitMix64::new(seed * 1000 + group);
    let mut term = 1;
    let mut steps = vec![Step::Vote(1), Step::Append { term: 1, count: 2, bytes: 40 }];
    if group == 2 {
        return steps;
    }
    while steps.len() < length {
        steps.push(match random.below(10) {
            0 => {
                term += 1;
                Step::Vote(term)
            }
            1 => Step::Truncate { keep: random.below(3) },
            2 | 3 => Step::Purge { keep: random.below(4) },
            _ => Step::Append { term, count: 1 + random.below(3), bytes: random.below(3000) as usize },
        });
    }
    steps
}

/// A group's progress, visible from outside the dying node.
#[derive(Default)]
pub struct Progress {
    pub acknowledged: Cell<usize>,
    pub issued: Cell<usize>,
}

pub struct Run {
    pub scripts: Vec<Vec<Step>>,
    pub progress: Vec<Rc<Progress>>,
}

pub fn config() -> LogConfig {
    LogConfig { limit_bytes: 80_000, stored_bytes_max: 80_000, copy_bytes_max: 8 << 10, ..LogConfig::default() }
}

async fn perform(log: &mut GroupLog, state: &mut Found, step: &Step) -> Option<impl Future<Output = bool> + use<>> {
    let before = state.clone();
    state.step(step);
    match step {
        Step::Vote(term) => {
            let vote = Vote { leader_id: LeaderId::new(*term, 1), committed: false };
            let saved = log.save_vote(&vote).await.is_ok();
            return Some(futures_util::future::Either::Left(async move { saved }));
        }
        Step::Append { .. } => {
            let fresh = state.entries.range(before.next_index()..);
            let entries: Vec<Entry> = fresh
                .map(|(index, (term, byte, length))| Entry {
                    log_id: log_id(*term, *index),
                    payload: EntryPayload::Normal(Command(vec![*byte; *length].into())),
                })
                .collect();
            let (sender, receiver) = <cfs_consensus::runtime::CfsRuntime as AsyncRuntime>::Oneshot::channel();
            log.append(entries, IOFlushed::<Raft>::signal(sender)).await.ok()?;
            return Some(futures_util::future::Either::Right(async move { matches!(receiver.await, Ok(Ok(()))) }));
        }
        Step::Truncate { keep } => {
            let last = before.cut_at(*keep);
            let last = last.map(|index| log_id(before.entries.get(&index).map_or(1, |entry| entry.0), index));
            log.truncate_after(last).await.ok()?;
        }
        Step::Purge { keep } => {
            if let Some(index) = before.cut_at(*keep) {
                log.purge(log_id(before.entries.get(&index).map_or(1, |entry| entry.0), index)).await.ok()?;
            }
        }
    }
    None
}

/// Works through a script with a few appends in flight.
async fn work(handle: Handle, mut log: GroupLog, steps: Vec<Step>, progress: Rc<Progress>) {
    let mut state = Found::default();
    for (number, step) in steps.iter().enumerate() {
        progress.issued.set(number + 1);
        let Some(durable) = perform(&mut log, &mut state, step).await else { continue };
        let progress = progress.clone();
        let told = handle.spawn(async move {
            if durable.await {
                progress.acknowledged.set(progress.acknowledged.get().max(number + 1));
            }
        });
        if number % 3 == 2 {
            let _ = told.await;
        }
    }
}

/// Runs the scripts until they end or the medium halts; the node is dead afterwards.
pub async fn run(outer: &Handle, medium: &Rc<Medium>, seed: u64) -> Run {
    let scripts: Vec<Vec<Step>> = (0..3).map(|group| script(seed, group, 40)).collect();
    let progress: Vec<Rc<Progress>> = (0..3).map(|_| Rc::default()).collect();
    let node = outer.new_domain();
    let halted = medium.halted.notified();
    let (blobs, inner) = (medium.open(&node), node.clone());
    let (steps, seen) = (scripts.clone(), progress.clone());
    let working = node.spawn(async move {
        let Ok((log, _)) = SharedLog::open(blobs, inner.clone(), config()).await else { return };
        let mut tasks = Vec::new();
        for (group, (steps, progress)) in steps.into_iter().zip(seen).enumerate() {
            tasks.push(inner.spawn(work(inner.clone(), log.group(ShardId(group as u16)), steps, progress)));
        }
        let cutter = log.clone();
        let clock = inner.clone();
        let cutting = inner.spawn(async move {
            loop {
                clock.sleep(Duration::from_micros(700)).await;
                if cutter.cut().await.is_err() {
                    return;
                }
            }
        });
        for task in tasks {
            let _ = task.await;
        }
        drop(log.flush().await);
        cutting.abort();
    });
    futures_util::future::select(working, halted).await;
    // Acknowledgements on their way may still arrive: they count.
    outer.sleep(Duration::from_millis(1)).await;
    node.kill();
    Run { scripts, progress }
}

pub async fn find(log: &Rc<SharedLog>, group: u16) -> Found {
    let mut log = log.group(ShardId(group));
    let state = log.get_log_state().await.expect("in memory");
    let entries = log.try_get_log_entries(..).await.expect("in memory");
    let of = |entry: Entry| match entry.payload {
        EntryPayload::Normal(command) => {
            let byte = (entry.log_id.index % 251) as u8;
            assert!(command.0.iter().all(|found| *found == byte), "entry {} has other bytes", entry.log_id.index);
            (entry.log_id.index, (entry.log_id.leader_id.term, byte, command.0.len()))
        }
        other => panic!("an entry nobody wrote: {other:?}"),
    };
    Found {
        vote: log.read_vote().await.expect("in memory").map(|vote| vote.leader_id.term),
        purged: state.last_purged_log_id.map(|id| id.index),
        entries: entries.into_iter().map(of).collect(),
    }
}

/// Compares what every group finds with the oracle.
pub async fn check(log: &Rc<SharedLog>, run: &Run, context: &str) -> Result<(), String> {
    for (group, (steps, progress)) in run.scripts.iter().zip(&run.progress).enumerate() {
        let found = find(log, group as u16).await;
        let mut state = Found::default();
        let mut matched = progress.acknowledged.get() == 0 && state == found;
        for (number, step) in steps.iter().enumerate().take(progress.issued.get()) {
            state.step(step);
            matched |= number + 1 >= progress.acknowledged.get() && state == found;
        }
        if !matched {
            return Err(format!(
                "{context}: group {group} after {} acknowledged and {} issued steps found {found:?}",
                progress.acknowledged.get(),
                progress.issued.get()
            ));
        }
    }
    Ok(())
}

/// One crash at one step, then recovery; answers what went wrong.
pub fn crash_at(seed: u64, step: Option<u64>, torn: Torn) -> Result<(u64, RecoveryReport), String> {
    let context = format!("seed {seed}, crash at step {step:?} leaving {torn:?}");
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let outer = executor.domain();
    let handle = outer.clone();
    let story = async move {
        let medium = Medium::new();
        medium.halt_at(step, torn);
        let run = run(&outer, &medium, seed).await;
        let steps = medium.steps.get();
        // A crash during recovery too, then a recovery that ends.
        medium.halt_at(step.map(|step| 1 + step % 3), torn);
        let first = outer.new_domain();
        let opening = first.spawn(SharedLog::open(medium.open(&first), first.clone(), config()));
        let halted = medium.halted.notified();
        futures_util::future::select(opening, halted).await;
        first.kill();
        medium.halt_at(None, torn);
        let second = outer.new_domain();
        let opened: Result<_, LogError> = SharedLog::open(medium.open(&second), second.clone(), config()).await;
        let (log, report) = opened.map_err(|error| format!("{context}: {error}"))?;
        check(&log, &run, &context).await?;
        second.kill();
        Ok((steps, report))
    };
    executor.run_simulated(&handle, story).expect("no deadlock").expect("alive")
}

/// Every crash point of the script; answers the first failure.
pub fn sweep(seed: u64) -> Result<u64, String> {
    let (steps, _) = crash_at(seed, None, Torn::Nothing)?;
    for step in 1..=steps {
        for torn in [Torn::Nothing, Torn::Damaged, Torn::Whole] {
            crash_at(seed, Some(step), torn)?;
        }
    }
    Ok(steps)
}
