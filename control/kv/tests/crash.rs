//! A crash at every put and delete: what opens afterwards is exactly the state at one applied
//! mark, at or above the last checkpoint that was answered, and nothing is left over.

mod common;

use bytes::Bytes;
use cfs_kv::testing::MemMedium;
use cfs_kv::{Kv, KvConfig, KvError};
use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use cfs_wire::blobs::BlobKind;
use common::{GROUP, History, check_state, config, mark, mark_number, restore, split_config};
use futures_util::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

type Config = fn() -> KvConfig;

/// What the world outside knows when the node dies.
struct Witness {
    history: RefCell<History>,
    /// The highest mark a checkpoint has answered.
    synced: Cell<u64>,
    /// How large a manifest was opened.
    manifest_blobs_max: Cell<usize>,
}

impl Witness {
    fn new(seed: u64) -> Rc<Witness> {
        let history = RefCell::new(History::new(seed));
        Rc::new(Witness { history, synced: Cell::new(0), manifest_blobs_max: Cell::new(0) })
    }
}

/// Batches with checkpoints, a restore in the middle, and merges all along.
async fn workload(kv: Rc<Kv>, handle: Handle, witness: Rc<Witness>, batches: u64, restore_at: Option<u64>) {
    let mut checkpoints = Vec::new();
    for _ in 0..batches {
        let written = witness.history.borrow().written();
        if Some(written) == restore_at {
            for checkpoint in std::mem::take(&mut checkpoints) {
                let _: Result<_, _> = checkpoint_done(checkpoint).await;
            }
            let (mark, entries) = witness.history.borrow_mut().restore_step();
            restore(&kv, mark.clone(), entries).await.unwrap();
            witness.synced.set(mark_number(&mark));
            continue;
        }
        let (batch, mark) = witness.history.borrow_mut().step();
        kv.write(batch, mark);
        if kv.should_checkpoint() || written % 7 == 6 {
            let (kv, witness) = (kv.clone(), witness.clone());
            checkpoints.push(handle.spawn(async move {
                let synced = mark_number(&kv.checkpoint().await.unwrap());
                witness.synced.set(witness.synced.get().max(synced));
            }));
        }
        kv.admit().await.unwrap();
        handle.sleep(std::time::Duration::from_micros(20)).await;
    }
    for checkpoint in checkpoints {
        let _: Result<_, _> = checkpoint_done(checkpoint).await;
    }
    kv.settle().await;
}

async fn checkpoint_done(join: cfs_reactor::JoinHandle<()>) -> Result<(), cfs_reactor::executor::Cancelled> {
    join.await
}

/// Runs the workload on a fresh medium and kills the node at a change; answers whether it got
/// that far. Then reopens, checks, goes on a little, and reopens once more.
fn crash_at(config: Config, seed: u64, change: u64, witness: &Rc<Witness>) -> Result<bool, String> {
    let executor = Executor::new(Rc::new(SimClock::new(seed ^ change << 32)));
    let (outside, first, second, third) = (executor.domain(), executor.domain(), executor.domain(), executor.domain());
    let medium = MemMedium::new(seed.wrapping_add(change));
    let witness = witness.clone();
    let main = async move {
        medium.halt_after(change);
        let (node, blobs, seen) = (first.clone(), medium.open(&first), witness.clone());
        medium.halt_after(change);
        let run = first.spawn(async move {
            let kv = Kv::open(blobs, &node, GROUP, config()).await.unwrap();
            workload(kv, node, seen, 70, Some(40)).await;
        });
        let halted = match select(Box::pin(medium.halted()), run).await {
            Either::Left(_) => true,
            Either::Right((ended, _)) => {
                ended.map_err(|_| "the workload panicked".to_string())?;
                false
            }
        };
        first.kill();

        let reopened = reopen(config, &medium, &second, &witness).await?;
        let more = witness.clone();
        workload(reopened, second.clone(), more, 12, None).await;
        second.kill();
        reopen(config, &medium, &third, &witness).await?;
        Ok(halted)
    };
    executor.run_simulated(&outside, main).expect("does not stall").expect("is not cancelled")
}

async fn reopen(config: Config, medium: &Rc<MemMedium>, node: &Handle, witness: &Witness) -> Result<Rc<Kv>, String> {
    let kv = Kv::open(medium.open(node), node, GROUP, config()).await.map_err(|error| error.to_string())?;
    let applied = mark_number(&kv.applied());
    let (synced, written) = (witness.synced.get(), witness.history.borrow().written());
    if applied < synced || applied > written {
        return Err(format!("opened at mark {applied}, answered {synced}, written {written}"));
    }
    if kv.synced() != kv.applied() {
        return Err("what was recovered is not all durable".to_string());
    }
    let expected = witness.history.borrow().at(applied).clone();
    check_state(&kv, &expected).await.map_err(|error| format!("at mark {applied}: {error}"))?;
    kv.settle().await;
    let found = (medium.list(BlobKind::Run).len(), medium.list(BlobKind::Manifest).len());
    let named = (kv.stats().tables, kv.stats().manifest_blobs);
    if found != named {
        return Err(format!("{found:?} tables and manifest blobs for {named:?} named"));
    }
    witness.manifest_blobs_max.set(witness.manifest_blobs_max.get().max(named.1));
    witness.history.borrow_mut().go_back_to(applied);
    witness.synced.set(applied);
    Ok(kv)
}

/// Every change of a seed's run; the first violation, if any, else how many changes there were and
/// of how many blobs a manifest was at most.
fn sweep(config: Config, seed: u64) -> Result<(u64, usize), String> {
    let (mut change, mut manifest_blobs_max) = (0, 0);
    loop {
        let witness = Witness::new(seed);
        let halted = crash_at(config, seed, change, &witness);
        manifest_blobs_max = manifest_blobs_max.max(witness.manifest_blobs_max.get());
        if !halted.map_err(|error| format!("seed {seed}, change {change}: {error}"))? {
            return Ok((change, manifest_blobs_max));
        }
        change += 1;
    }
}

#[cfg(not(feature = "planted"))]
#[test]
fn a_crash_at_every_change_leaves_a_prefix() {
    for seed in 1..4 {
        let (changes, manifest_blobs_max) = sweep(config, seed).unwrap();
        assert!(changes > 60, "seed {seed}: only {changes} changes, the sweep proves little");
        assert_eq!(manifest_blobs_max, 1, "seed {seed}");
    }
}

#[cfg(not(feature = "planted"))]
#[test]
fn a_crash_at_every_change_leaves_a_prefix_when_manifests_have_parts() {
    for seed in 1..3 {
        let (changes, manifest_blobs_max) = sweep(split_config, seed).unwrap();
        assert!(changes > 120, "seed {seed}: only {changes} changes, the sweep proves little");
        assert!(manifest_blobs_max > 5, "seed {seed}: a root and its parts are {manifest_blobs_max} blobs");
    }
}

#[cfg(not(feature = "planted"))]
#[test]
fn the_sweep_finds_a_store_that_forgets() {
    // The twin: a witness told of a checkpoint that never was.
    let executor = Executor::new(Rc::new(SimClock::new(1)));
    let (outside, node) = (executor.domain(), executor.domain());
    let main = async move {
        let medium = MemMedium::new(1);
        let witness = Witness::new(1);
        witness.synced.set(5);
        reopen(config, &medium, &node, &witness).await.err()
    };
    let error = executor.run_simulated(&outside, main).unwrap().unwrap();
    assert_eq!(error.as_deref(), Some("opened at mark 0, answered 5, written 0"));
}

#[cfg(feature = "planted")]
#[test]
fn every_planted_bug_is_found() {
    use cfs_wire::planted::{Bug, activate};
    let bugs = [Bug::KvForgetApplied, Bug::KvDropDeletionEarly, Bug::KvDeleteRunsEarly, Bug::KvSyncedEarly];
    for bug in bugs {
        activate(Some(bug));
        let found = (1..6).find_map(|seed| {
            std::panic::catch_unwind(|| sweep(config, seed)).unwrap_or_else(|_| Err("a panic".to_string())).err()
        });
        activate(None);
        println!("{}: {found:?}", bug.name());
        assert!(found.is_some(), "{} went unnoticed", bug.name());
    }
}

#[test]
fn failed_puts_lose_nothing_and_block_nobody_for_ever() {
    for (seed, config) in (0..16).zip([config as Config, split_config].into_iter().cycle()) {
        let executor = Executor::new(Rc::new(SimClock::new(seed)));
        let (outside, first, second) = (executor.domain(), executor.domain(), executor.domain());
        let main = async move {
            let medium = MemMedium::new(seed);
            medium.fail_puts(Some(4));
            let witness = Witness::new(seed);
            let kv = Kv::open(medium.open(&first), &first, GROUP, config()).await.unwrap();
            let mut refused = 0;
            for _ in 0..80 {
                let (batch, mark) = witness.history.borrow_mut().step();
                kv.write(batch, mark);
                while let Err(error) = kv.admit().await {
                    assert!(error.is_retryable(), "{error}");
                    refused += 1;
                }
                if kv.should_checkpoint() {
                    match kv.checkpoint().await {
                        Ok(mark) => witness.synced.set(mark_number(&mark)),
                        Err(error) => {
                            assert!(matches!(error, KvError::Blob(_)), "{error}");
                            refused += 1;
                        }
                    }
                }
            }
            let expected = witness.history.borrow().at(80).clone();
            check_state(&kv, &expected).await.unwrap();
            first.kill();
            medium.fail_puts(None);
            reopen(config, &medium, &second, &witness).await.unwrap();
            refused
        };
        let refused = executor.run_simulated(&outside, main).unwrap().unwrap();
        assert!(refused > 0, "seed {seed}: no put failed");
    }
}

#[test]
fn an_empty_mark_is_the_mark_of_an_empty_store() {
    assert_eq!(mark_number(&Bytes::new()), 0);
    assert_eq!(mark_number(&mark(7)), 7);
}
