//! The shared log under crashes at every step, torn tails and damage.

mod common;

use cfs_consensus::log::BadBatch;
use cfs_consensus::{LogConfig, LogError, SharedLog};
use cfs_reactor::Handle;
use cfs_wire::blobs::Owner;
use cfs_wire::{BlobId, ShardId};
use common::blobs::{Content, Medium};
use common::script::{self, Found};
use common::simulate;
use std::rc::Rc;

#[test]
fn a_crash_at_any_step_loses_nothing_acknowledged() {
    for seed in 1..=2 {
        let steps = script::sweep(seed).unwrap_or_else(|failure| panic!("{failure}"));
        assert!(steps > 25, "seed {seed}: only {steps} steps, the sweep tells little");
    }
}

/// A log with some batches, written by the script and closed cleanly.
async fn written(outer: &Handle) -> (Rc<Medium>, script::Run) {
    let medium = Medium::new();
    let run = script::run(outer, &medium, 5).await;
    (medium, run)
}

async fn open(medium: &Rc<Medium>, outer: &Handle) -> Result<(Rc<SharedLog>, cfs_consensus::RecoveryReport), LogError> {
    let node = outer.new_domain();
    SharedLog::open(medium.open(&node), node, LogConfig::default()).await
}

#[test]
fn a_damaged_last_batch_is_a_torn_tail() {
    simulate(3, |outer| async move {
        let (medium, run) = written(&outer).await;
        let last = medium.batches().last().unwrap().0;
        // Beyond what was acknowledged: one more batch, torn.
        let torn = (Owner { high: 0, low: last + 1 }, Content::Damaged(500));
        medium.blobs.borrow_mut().insert(cfs_wire::ids::BlobId(77), torn);
        let (log, report) = open(&medium, &outer).await.unwrap();
        assert_eq!(report.torn, vec![last + 1]);
        assert_eq!(report.range.unwrap().1, last);
        script::check(&log, &run, "torn tail").await.unwrap();
        assert!(!medium.blobs.borrow().contains_key(&cfs_wire::ids::BlobId(77)), "the torn batch is deleted");
    });
}

#[test]
fn a_damaged_or_missing_durable_batch_is_corruption_by_name() {
    let (count, _) = simulate(3, |outer| async move { written(&outer).await.0.batches().len() });
    assert!(count > 3, "{count} batches");
    for which in 0..count - 2 {
        for missing in [false, true] {
            simulate(3, |outer| async move {
                let (medium, _) = written(&outer).await;
                let (sequence, id) = medium.batches()[which];
                if missing {
                    medium.blobs.borrow_mut().remove(&id);
                } else {
                    medium.damage(id);
                }
                let before = medium.blobs.borrow().len();
                let error = open(&medium, &outer).await.map(|(_, report)| report).unwrap_err();
                assert!(matches!(error, LogError::Corrupt { sequence: named, .. } if named == sequence), "{error}");
                assert!(error.is_corruption() && error.to_string().contains("damaged"), "{error}");
                assert_eq!(medium.blobs.borrow().len(), before, "nothing is deleted from a damaged log");
            });
        }
    }
}

#[test]
fn a_lone_torn_first_batch_is_a_new_log_and_several_are_not() {
    simulate(4, |outer| async move {
        let medium = Medium::new();
        let torn = |low| (Owner { high: 0, low }, Content::Damaged(100));
        medium.blobs.borrow_mut().insert(cfs_wire::ids::BlobId(1), torn(1));
        let (_, report) = open(&medium, &outer).await.unwrap();
        assert_eq!((report.range, report.torn), (None, vec![1]));

        let medium = Medium::new();
        medium.blobs.borrow_mut().insert(cfs_wire::ids::BlobId(1), torn(1));
        medium.blobs.borrow_mut().insert(cfs_wire::ids::BlobId(2), torn(2));
        let error = open(&medium, &outer).await.map(drop).unwrap_err();
        assert!(matches!(error, LogError::Corrupt { sequence: 1, .. }), "{error}");
    });
}

#[test]
fn a_batch_of_a_newer_program_is_refused_untouched() {
    simulate(4, |outer| async move {
        let (medium, _) = written(&outer).await;
        let (sequence, id) = *medium.batches().last().unwrap();
        let Some((owner, Content::Good(bytes))) = medium.blobs.borrow().get(&id).cloned() else { panic!() };
        let mut newer = bytes.to_vec();
        newer[4] = 2;
        medium.blobs.borrow_mut().insert(id, (owner, Content::Good(newer.into())));
        let error = open(&medium, &outer).await.map(drop).unwrap_err();
        assert_eq!(error, LogError::Format { sequence, cause: BadBatch::Version(2) });
    });
}

/// A target that was away comes back with a batch that had been discarded as torn.
#[test]
fn a_tail_discarded_once_does_not_come_back() {
    simulate(6, |outer| async move {
        let (medium, run) = written(&outer).await;
        let (last, id) = *medium.batches().last().unwrap();
        // What the missing target holds: a batch of a later opening that was never answered.
        let (log, _) = open(&medium, &outer).await.unwrap();
        log.flush().await.unwrap();
        let stale: Vec<_> = {
            let blobs = medium.blobs.borrow();
            blobs.iter().filter(|(_, (owner, _))| owner.low > last).map(|(id, blob)| (*id, blob.clone())).collect()
        };
        assert!(!stale.is_empty());
        for (id, _) in &stale {
            medium.blobs.borrow_mut().remove(id);
        }
        // Meanwhile the log goes on without them...
        outer.sleep(std::time::Duration::from_secs(5)).await;
        let (log, report) = open(&medium, &outer).await.unwrap();
        assert_eq!(report.range.unwrap().1, last);
        let newer = medium.batch(last + 1);
        drop(log);
        // ...and then they are back.
        medium.blobs.borrow_mut().extend(stale.clone());
        let (log, _) = open(&medium, &outer).await.unwrap();
        assert!(log.blob_ids().contains(&newer) && log.blob_ids().contains(&id));
        assert!(stale.iter().all(|(id, _)| !medium.blobs.borrow().contains_key(id)), "they are deleted now");
        script::check(&log, &run, "stale tail").await.unwrap();
    });
}

#[test]
fn a_tail_that_was_never_answered_gets_all_its_copies() {
    simulate(7, |outer| async move {
        let (medium, _) = written(&outer).await;
        let last = medium.batches().last().unwrap().1;
        open(&medium, &outer).await.unwrap();
        let heals = medium.heals.borrow().clone();
        assert!(heals.last() == Some(&last) && heals.len() <= 2, "only what may have been in flight: {heals:?}");
    });
}

/// A put that reached one target only was repeated: which of the two blobs has all its copies can't
/// be told.
#[test]
fn of_two_equal_batches_none_goes_before_the_other_has_all_copies() {
    simulate(8, |outer| async move {
        let (medium, run) = written(&outer).await;
        let batches = medium.batches();
        let (sequence, id) = batches[batches.len() / 2];
        let twin = BlobId(id.0 + 1);
        let content = medium.blobs.borrow()[&id].clone();
        medium.blobs.borrow_mut().insert(twin, content);
        let there = |medium: &Medium| medium.batches().iter().filter(|(at, _)| *at == sequence).count();
        medium.refuses_heals.set(true);
        let (log, report) = open(&medium, &outer).await.unwrap();
        assert!(report.unhealed.contains(&id) || report.unhealed.contains(&twin));
        assert_eq!(there(&medium), 2);
        script::check(&log, &run, "twins").await.unwrap();
        drop(log);
        medium.refuses_heals.set(false);
        let (log, report) = open(&medium, &outer).await.unwrap();
        assert_eq!((report.unhealed, there(&medium)), (vec![], 1));
        let kept = medium.batch(sequence);
        assert!(log.blob_ids().contains(&kept) && medium.heals.borrow().contains(&kept));
        script::check(&log, &run, "one of the twins").await.unwrap();
    });
}

#[test]
fn a_tail_whose_copies_find_no_room_opens_and_gets_them_once_there_is_some() {
    simulate(11, |outer| async move {
        let (medium, run) = written(&outer).await;
        let last = medium.batches().last().unwrap().1;
        medium.refuses_heals.set(true);
        let (log, report) = open(&medium, &outer).await.unwrap();
        assert_eq!(report.unhealed.last(), Some(&last));
        script::check(&log, &run, "one copy less").await.unwrap();
        outer.sleep(std::time::Duration::from_secs(3)).await;
        assert!(medium.heals.borrow().is_empty());
        medium.refuses_heals.set(false);
        outer.sleep(std::time::Duration::from_secs(3)).await;
        assert_eq!(*medium.heals.borrow(), report.unhealed);
    });
}

#[test]
fn a_purge_above_the_synced_mark_is_refused() {
    use cfs_consensus::types::{Entry, Raft, log_id};
    use openraft::storage::{IOFlushed, RaftLogStorage};
    simulate(8, |outer| async move {
        let (log, _) = open(&Medium::new(), &outer).await.unwrap();
        let mut group = log.group(ShardId(4));
        let entries: Vec<Entry> =
            (0..4).map(|index| Entry { log_id: log_id(1, index), payload: openraft::EntryPayload::Blank }).collect();
        group.append(entries, IOFlushed::<Raft>::noop()).await.unwrap();
        log.set_synced(ShardId(4), Some(2));
        group.purge(log_id(1, 2)).await.unwrap();
        let refused = group.purge(log_id(1, 3)).await.unwrap_err();
        let inner = refused.get_ref().and_then(|error| error.downcast_ref::<LogError>()).cloned();
        assert_eq!(inner, Some(LogError::CutAboveSynced { group: ShardId(4), index: 3, synced: Some(2) }));
        assert_eq!(group.get_log_state().await.unwrap().last_purged_log_id, Some(log_id(1, 2)));
    });
}

#[test]
fn cutting_frees_the_blobs_and_keeps_what_lives() {
    use openraft::storage::RaftLogStorage;
    simulate(9, |outer| async move {
        let (medium, run) = written(&outer).await;
        let config = LogConfig { limit_bytes: 1, stored_bytes_max: 1, ..script::config() };
        let (log, _) = SharedLog::open(medium.open(&outer), outer.clone(), config).await.unwrap();
        script::check(&log, &run, "before the cut").await.unwrap();
        for group in [0, 1] {
            let mut group = log.group(ShardId(group));
            let last = group.get_log_state().await.unwrap().last_log_id.unwrap();
            group.purge(last).await.unwrap();
        }
        let expected = [script::find(&log, 0).await, script::find(&log, 1).await, script::find(&log, 2).await];
        log.flush().await.unwrap();
        let mut rounds = 0;
        while log.cut().await.unwrap() > 0 {
            rounds += 1;
            assert!(rounds < 20, "the log is moved for ever");
        }
        let left = medium.batches().len();
        assert!(left <= 5, "{left} batches are left, {rounds} cuts");
        log.close();
        let (log, _) = open(&medium, &outer).await.unwrap();
        for (group, expected) in expected.iter().enumerate() {
            assert_eq!(&script::find(&log, group as u16).await, expected, "group {group}");
        }
        assert_eq!((expected[2].vote, expected[2].entries.len()), (Some(1), 2), "the idle group's tail moved along");
        assert_ne!(expected[0], Found::default());
    });
}

#[test]
fn batches_that_full_targets_keep_are_deleted_later_and_never_believed_again() {
    use openraft::storage::RaftLogStorage;
    simulate(10, |outer| async move {
        let (medium, run) = written(&outer).await;
        // A start that can't discard what a crash left behind the end.
        medium.refuses_deletes.set(true);
        let (last, id) = *medium.batches().last().unwrap();
        let Some(blob) = medium.blobs.borrow().get(&id).cloned() else { panic!() };
        let torn = Owner { low: last + 2, ..blob.0 };
        medium.blobs.borrow_mut().insert(BlobId(77), (torn, Content::Damaged(100)));
        let config = LogConfig { limit_bytes: 1, stored_bytes_max: 1, ..script::config() };
        let (log, report) = SharedLog::open(medium.open(&outer), outer.clone(), config).await.unwrap();
        assert_eq!(report.torn, vec![last + 2]);
        script::check(&log, &run, "not discarded").await.unwrap();

        for group in [0, 1] {
            let mut group = log.group(ShardId(group));
            let last = group.get_log_state().await.unwrap().last_log_id.unwrap();
            group.purge(last).await.unwrap();
        }
        log.flush().await.unwrap();
        let expected = [script::find(&log, 0).await, script::find(&log, 1).await, script::find(&log, 2).await];
        let refused = log.cut().await.unwrap_err();
        assert!(refused.is_retryable(), "{refused}");
        let kept = medium.batches().len();
        medium.refuses_deletes.set(false);
        while log.cut().await.unwrap() > 0 {}
        let counted = log.blob_ids().len();
        assert!(kept > counted + 5, "{kept} batches were kept, {counted} count");
        // The torn batch is nobody's until the next start.
        assert_eq!(medium.batches().len(), counted + 1);
        log.close();
        let (log, _) = open(&medium, &outer).await.unwrap();
        assert!(!medium.blobs.borrow().contains_key(&BlobId(77)));
        for (group, expected) in expected.iter().enumerate() {
            assert_eq!(&script::find(&log, group as u16).await, expected, "group {group}");
        }
    });
}

/// The sweep must be able to fail: each deliberate bug is found by it or by the damage test.
#[cfg(feature = "planted")]
#[test]
fn planted_bugs_are_found() {
    use cfs_wire::planted::{Bug, activate};
    for bug in [Bug::LogAckEarly, Bug::LogAckOutOfOrder, Bug::LogForgetVote, Bug::LogCutBeforeCopy] {
        activate(Some(bug));
        let outcome = (1..=4).find_map(|seed| script::sweep(seed).err());
        activate(None);
        let failure = outcome.unwrap_or_else(|| panic!("{} went unnoticed", bug.name()));
        println!("{}: {failure}", bug.name());
    }
    activate(Some(Bug::LogCorruptionAsTornTail));
    let (lost, _) = simulate(3, |outer| async move {
        let (medium, run) = written(&outer).await;
        let (_, id) = medium.batches()[medium.batches().len() - 3];
        medium.damage(id);
        match open(&medium, &outer).await {
            Ok((log, _)) => script::check(&log, &run, "damage").await.is_err(),
            Err(_) => false,
        }
    });
    activate(None);
    assert!(lost, "LogCorruptionAsTornTail went unnoticed");
}

/// As many seeds as one likes, with SEED and SEEDS.
#[test]
#[ignore = "minutes"]
fn soak_log() {
    let number = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let from: u64 = number("SEED", 1000);
    for seed in from..from + number("SEEDS", 20) {
        script::sweep(seed).unwrap_or_else(|failure| panic!("{failure}"));
    }
}
