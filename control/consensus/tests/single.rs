//! A group of one replica: what today's single node runs.

mod common;

use bytes::Bytes;
use cfs_consensus::host::rpc::{AppendCall, SnapshotBegin, Status, Transfer};
use cfs_consensus::host::{HostConfig, HostError, ProposeError, RaftHost};
use cfs_consensus::types::{Command, Entry, LeaderId, LogId, Member, Membership, SnapshotMeta, Vote, log_id};
use cfs_consensus::{LogConfig, SharedLog};
use cfs_fabric::mem::MemNetwork;
use cfs_fabric::{Address, Message};
use cfs_reactor::Handle;
use cfs_wire::{NodeId, ShardId};
use common::blobs::Medium;
use common::machine::{Disk, List};
use common::simulate;
use openraft::EntryPayload;
use openraft::vote::RaftLeaderId;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

const GROUP: ShardId = ShardId(0);

/// One node's disks.
#[derive(Default)]
struct Disks {
    log: Option<Rc<Medium>>,
    states: Vec<Rc<Disk>>,
}

impl Disks {
    fn new(groups: usize) -> Disks {
        Disks { log: Some(Medium::new()), states: (0..groups).map(|_| Rc::default()).collect() }
    }

    fn log(&self) -> &Rc<Medium> {
        self.log.as_ref().expect("a log medium")
    }
}

struct Node {
    host: Rc<RaftHost>,
    log: Rc<SharedLog>,
    lists: Vec<Rc<List>>,
}

async fn start(disks: &Disks, handle: &Handle, config: LogConfig) -> Result<Node, HostError> {
    let (log, _) = SharedLog::open(disks.log().open(handle), handle.clone(), config).await?;
    let fabric = MemNetwork::new(1).endpoint("n1", handle);
    let host = RaftHost::new(NodeId(1), handle.clone(), fabric, log.clone(), HostConfig::default());
    let mut lists = Vec::new();
    for (number, state) in disks.states.iter().enumerate() {
        let list = List::open(state, handle);
        let members = vec![(NodeId(1), Address("n1".into()))];
        host.add_group(ShardId(number as u16), list.clone(), members, true).await?;
        lists.push(list);
    }
    Ok(Node { host, log, lists })
}

fn item(number: u64) -> Bytes {
    Bytes::from(format!("item {number}"))
}

/// Proposes many at once; answers the place of each in the list.
async fn propose_all(host: &Rc<RaftHost>, handle: &Handle, group: ShardId, numbers: std::ops::Range<u64>) -> Vec<u64> {
    let tasks: Vec<_> = numbers
        .map(|number| {
            let host = host.clone();
            handle.spawn(async move { host.propose(group, item(number)).await })
        })
        .collect();
    let mut places = Vec::new();
    for task in tasks {
        let reply = task.await.expect("not killed").expect("committed");
        places.push(u64::from_le_bytes(reply[..].try_into().expect("eight bytes")));
    }
    places
}

#[test]
fn a_thousand_proposals_at_once_share_batches_and_survive_a_restart() {
    simulate(11, |handle| async move {
        let disks = Disks::new(1);
        let node = handle.new_domain();
        let first = start(&disks, &node, LogConfig::default()).await.unwrap();
        assert!(first.host.is_leader(GROUP), "the only voter leads before add_group returns");
        let before = disks.log().puts.get();
        let places = propose_all(&first.host, &node, GROUP, 0..1000).await;
        let puts = disks.log().puts.get() - before;
        assert!(puts <= 40, "{puts} batches for 1000 concurrent proposals");
        let list = first.lists[0].list();
        assert_eq!(list.len(), 1000);
        for (number, place) in places.iter().enumerate() {
            assert_eq!(list[*place as usize], item(number as u64));
        }
        node.kill();
        drop(first);

        let node = handle.new_domain();
        let second = start(&disks, &node, LogConfig::default()).await.unwrap();
        second.host.read_barrier(GROUP).await.unwrap();
        assert_eq!(second.lists[0].list(), list, "after the barrier the restarted replica has all of it");
    });
}

/// openraft asserts some of it, and would write the rest to the log, which does not believe it when it
/// is read again.
#[test]
fn what_no_leader_can_have_sent_is_refused_and_the_node_goes_on() {
    simulate(13, |handle| async move {
        let disks = Disks::new(1);
        let node = handle.new_domain();
        let first = start(&disks, &node, LogConfig::default()).await.unwrap();
        first.host.propose(GROUP, item(1)).await.unwrap();
        let send = async |opcode: u16, body: Vec<u8>| {
            let message = Message { opcode, body: body.into(), bulk: Bytes::new() };
            first.host.handle_rpc(message).await
        };
        let vote = Vote { leader_id: LeaderId::new(99, 7), committed: true };
        let append = |prev_log_id, ids: &[LogId], payload: EntryPayload<Command, u64, Member>| {
            let entries = ids.iter().map(|log_id| Entry { log_id: *log_id, payload: payload.clone() }).collect();
            let call = AppendCall { vote, prev_log_id, entries, leader_commit: None };
            postcard::to_allocvec(&(GROUP.0, call)).unwrap()
        };
        let nobody = Membership::new(vec![], BTreeMap::new()).unwrap();
        let large = Command(Bytes::from(vec![0; 1 << 20]));
        for body in [
            append(None, &[log_id(98, 5)], EntryPayload::Blank),
            append(Some(log_id(98, 4)), &[log_id(98, 5), log_id(98, 7)], EntryPayload::Blank),
            append(Some(log_id(98, 4)), &[log_id(97, 5)], EntryPayload::Blank),
            append(Some(log_id(98, 4)), &[log_id(100, 5)], EntryPayload::Blank),
            append(None, &[log_id(98, 0)], EntryPayload::Membership(nobody)),
            append(None, &[log_id(98, 0)], EntryPayload::Normal(large)),
        ] {
            assert_eq!(send(0x0100, body).await.opcode, Status::Malformed as u16);
        }
        let begin = |last: LogId| {
            let meta = SnapshotMeta { last_log_id: Some(last), ..SnapshotMeta::default() };
            postcard::to_allocvec(&(GROUP.0, SnapshotBegin { vote, meta })).unwrap()
        };
        assert_eq!(send(0x0104, begin(log_id(100, 50))).await.opcode, Status::Malformed as u16);
        // Ahead of what is committed by its term, and behind it by its place.
        let begun = send(0x0104, begin(log_id(98, 1))).await;
        assert_eq!(begun.opcode, Status::Ok as u16);
        let id: u64 = postcard::from_bytes(&begun.body).unwrap();
        let finish = postcard::to_allocvec(&(GROUP.0, Transfer { id, number: 0 })).unwrap();
        assert_eq!(send(0x0106, finish).await.opcode, Status::Malformed as u16);

        first.host.propose(GROUP, item(2)).await.unwrap();
        node.kill();
        drop(first);
        let node = handle.new_domain();
        let second = start(&disks, &node, LogConfig::default()).await.unwrap();
        second.host.read_barrier(GROUP).await.unwrap();
        assert_eq!(second.lists[0].list(), [item(1), item(2)]);
    });
}

#[test]
fn a_lone_replicas_read_barrier_writes_nothing_and_waits_for_nothing() {
    simulate(12, |handle| async move {
        let disks = Disks::new(1);
        let node = start(&disks, &handle, LogConfig::default()).await.unwrap();
        node.host.propose(GROUP, item(1)).await.unwrap();
        node.host.read_barrier(GROUP).await.unwrap();
        let (puts, at) = (disks.log().puts.get(), handle.now());
        for _ in 0..100 {
            node.host.read_barrier(GROUP).await.unwrap();
        }
        assert_eq!((disks.log().puts.get(), handle.now()), (puts, at));
    });
}

#[test]
fn nine_idle_groups_do_not_wake() {
    let executor = cfs_reactor::Executor::new(Rc::new(cfs_reactor::clock::SimClock::new(13)));
    let handle = executor.domain();
    let outer = handle.clone();
    let run = executor.run_simulated(&handle, async move {
        let disks = Disks::new(9);
        let node = start(&disks, &outer, LogConfig::default()).await.unwrap();
        outer.sleep(Duration::from_secs(10)).await;
        // Nobody sets a timer any more: waiting for what never comes stalls at once.
        std::future::pending::<()>().await;
        drop(node);
    });
    assert_eq!(run.map(drop), Err(cfs_reactor::executor::Stalled));
}

#[test]
fn a_proposal_beyond_the_limit_is_refused_and_the_largest_is_taken() {
    simulate(14, |handle| async move {
        let node = start(&Disks::new(1), &handle, LogConfig::default()).await.unwrap();
        let limit = cfs_consensus::host::PROPOSAL_BYTES_MAX;
        let refused = node.host.propose(GROUP, vec![7; limit + 1].into()).await;
        assert_eq!(refused, Err(ProposeError::TooLarge { length: limit + 1, limit }));
        node.host.propose(GROUP, vec![7; limit].into()).await.unwrap();
        assert_eq!(node.lists[0].list().len(), 1);
        let elsewhere = node.host.propose(ShardId(9), item(1)).await;
        assert_eq!(elsewhere, Err(ProposeError::UnknownGroup(ShardId(9))));
    });
}

#[test]
fn the_log_stays_short_while_groups_idle_and_others_write() {
    simulate(15, |handle| async move {
        let disks = Disks::new(9);
        let config = LogConfig {
            limit_bytes: 400_000,
            stored_bytes_max: 400_000,
            copy_bytes_max: 64 << 10,
            ..LogConfig::default()
        };
        let node = handle.new_domain();
        let first = start(&disks, &node, config.clone()).await.unwrap();
        // Group 8 leaves a short tail and idles; group 0 writes 3 MB.
        propose_all(&first.host, &node, ShardId(8), 0..3).await;
        let mut most = 0;
        for round in 0..300u64 {
            let filler = Bytes::from(vec![round as u8; 10_000]);
            first.host.propose(GROUP, filler).await.unwrap();
            most = most.max(first.log.bytes_stored());
        }
        assert!(most < 800_000, "the log grew to {most} bytes");
        assert!(disks.states[0].checkpoints.get() > 2);
        let metrics = first.host.metrics(GROUP).unwrap();
        assert!(metrics.purged_index <= metrics.synced_index && metrics.purged_index.is_some(), "{metrics:?}");
        node.kill();
        drop(first);

        let node = handle.new_domain();
        let second = start(&disks, &node, config).await.unwrap();
        for (group, expected) in [(0usize, 300), (8, 3), (5, 0)] {
            second.host.read_barrier(ShardId(group as u16)).await.unwrap();
            assert_eq!(second.lists[group].list().len(), expected, "group {group}");
        }
    });
}

/// Writes 300 KB into three groups, waits, and answers what the log still takes on a target.
/// The oldest batch that counts holds a mark only, and the next more than a cut copies forward.
#[test]
fn entries_behind_a_mark_do_not_keep_the_log_from_being_cut() {
    const STORED_MAX: u64 = 400_000;
    simulate(13, |handle| async move {
        let disks = Disks::new(2);
        let config = LogConfig { stored_bytes_max: STORED_MAX, copy_bytes_max: 4096, ..LogConfig::default() };
        let node = start(&disks, &handle, config).await.unwrap();
        let (host, log) = (&node.host, &node.log);
        host.checkpoint_all().await.unwrap();
        log.cut_at_rest().await.unwrap();
        assert_eq!(log.pinning(), []);
        propose_all(host, &handle, GROUP, 0..500).await;
        let mut number = 500;
        while log.bytes_stored() <= STORED_MAX {
            propose_all(host, &handle, GROUP, number..number + 1).await;
            number += 1;
        }
        assert_eq!(log.pinning(), [GROUP]);
        handle.sleep(Duration::from_secs(5)).await;
        assert!(log.bytes_stored() <= STORED_MAX, "{} bytes are stored", log.bytes_stored());
        host.shutdown().await;
    });
}

fn stored_after_rest(rest_bytes: u64) -> u64 {
    let (stored, _) = simulate(21, move |handle| async move {
        let disks = Disks::new(3);
        let config = LogConfig { rest_bytes, ..LogConfig::default() };
        let node = handle.new_domain();
        let first = start(&disks, &node, config.clone()).await.unwrap();
        // Not at rest: an append every three seconds.
        for round in 0..10u64 {
            for group in 0..3 {
                let filler = Bytes::from(vec![round as u8; 10_000]);
                first.host.propose(ShardId(group), filler).await.unwrap();
            }
            handle.sleep(Duration::from_secs(3)).await;
        }
        assert_eq!(disks.states[0].checkpoints.get(), 0, "checkpointed under load");
        assert!(first.log.bytes_stored() > 300_000);
        handle.sleep(Duration::from_secs(10)).await;
        let stored = first.log.bytes_stored();
        let checkpoints = disks.states[0].checkpoints.get();
        handle.sleep(Duration::from_secs(60)).await;
        assert_eq!(disks.states[0].checkpoints.get(), checkpoints, "it goes on although nothing is appended");
        node.kill();
        drop(first);
        let second = start(&disks, &handle, config).await.unwrap();
        for group in 0..3u16 {
            second.host.read_barrier(ShardId(group)).await.unwrap();
            assert_eq!(second.lists[usize::from(group)].list().len(), 10, "group {group}");
        }
        stored
    });
    stored
}

#[test]
fn a_log_at_rest_is_checkpointed_and_cut_down() {
    let stored = stored_after_rest(100_000);
    assert!(stored < 50_000, "{stored} bytes are left");
    assert!(stored_after_rest(u64::MAX) > 300_000, "it is cut down anyway: the test proves nothing");
}

#[test]
fn a_group_that_stopped_keeps_no_other_from_its_checkpoint_nor_the_log_from_being_cut() {
    simulate(21, |handle| async move {
        let disks = Disks::new(2);
        let node = start(&disks, &handle, LogConfig::default()).await.unwrap();
        let (stopped, sound) = (ShardId(0), ShardId(1));
        propose_all(&node.host, &handle, sound, 0..50).await;
        disks.states[0].damaged.set(true);
        let answer = node.host.propose(stopped, item(0)).await;
        assert!(matches!(answer, Err(ProposeError::Stopped { .. })), "{answer:?}");
        assert_eq!((node.host.is_leader(stopped), node.host.is_leader(sound)), (false, true));
        assert_eq!(node.host.metrics(sound).unwrap().purged_index, None);
        let outcome = node.host.checkpoint_all().await;
        assert!(matches!(outcome, Err(HostError::Stopped { group, .. }) if group == stopped), "{outcome:?}");
        let metrics = node.host.metrics(sound).unwrap();
        assert_eq!((metrics.synced_index, metrics.purged_index), (metrics.last_log_index, metrics.last_log_index));
    });
}

#[test]
fn state_without_its_log_is_refused() {
    simulate(16, |handle| async move {
        let mut disks = Disks::new(1);
        let node = handle.new_domain();
        let first = start(&disks, &node, LogConfig::default()).await.unwrap();
        first.host.propose(GROUP, item(1)).await.unwrap();
        first.host.checkpoint_all().await.unwrap();
        first.host.shutdown().await;
        node.kill();
        disks.log = Some(Medium::new());
        let lost = start(&disks, &handle.new_domain(), LogConfig::default()).await;
        assert_eq!(lost.err(), Some(HostError::LogLost(GROUP)));
    });
}

/// Just restarted, the state runs ahead of any checkpoint: the purge must follow the checkpoint.
#[test]
fn the_first_checkpoint_after_a_restart_purges_what_it_holds_and_no_more() {
    simulate(20, |handle| async move {
        let disks = Disks::new(1);
        let node = handle.new_domain();
        let first = start(&disks, &node, LogConfig::default()).await.unwrap();
        propose_all(&first.host, &node, GROUP, 0..10).await;
        first.host.propose(GROUP, item(10)).await.unwrap();
        node.kill();
        let node = handle.new_domain();
        let second = start(&disks, &node, LogConfig::default()).await.unwrap();
        assert_eq!(second.host.metrics(GROUP).unwrap().purged_index, None);
        second.host.checkpoint_all().await.unwrap();
        let metrics = second.host.metrics(GROUP).unwrap();
        assert!(metrics.running && metrics.purged_index.is_some(), "{metrics:?}");
        assert_eq!(metrics.purged_index, metrics.synced_index);
        node.kill();
        let third = start(&disks, &handle, LogConfig::default()).await.unwrap();
        third.host.read_barrier(GROUP).await.unwrap();
        assert_eq!(third.lists[0].list().len(), 11);
    });
}

#[test]
fn state_older_than_the_logs_beginning_is_refused() {
    simulate(19, |handle| async move {
        let mut disks = Disks::new(1);
        let node = handle.new_domain();
        let first = start(&disks, &node, LogConfig::default()).await.unwrap();
        first.host.propose(GROUP, item(1)).await.unwrap();
        first.host.checkpoint_all().await.unwrap();
        let purged = first.host.metrics(GROUP).unwrap().purged_index.unwrap();
        first.log.flush().await.unwrap();
        node.kill();
        disks.states = vec![Rc::default()];
        let behind = start(&disks, &handle.new_domain(), LogConfig::default()).await;
        assert_eq!(behind.err(), Some(HostError::StateBehindLog { group: GROUP, applied: None, purged }));
    });
}

#[test]
fn shutdown_ends_what_waits() {
    simulate(17, |handle| async move {
        let disks = Disks::new(1);
        let node = start(&disks, &handle, LogConfig::default()).await.unwrap();
        disks.log().halt_at(Some(1), common::blobs::Torn::Nothing);
        let host = node.host.clone();
        let waiting = handle.spawn(async move { host.propose(GROUP, item(1)).await });
        handle.sleep(Duration::from_millis(10)).await;
        assert!(!waiting.is_finished(), "nothing is answered before it is durable");
        handle.timeout(Duration::from_secs(5), node.host.shutdown()).await.expect("shutdown ends");
        let answer = waiting.await.unwrap();
        assert!(matches!(answer, Err(ProposeError::Stopped { .. })), "{answer:?}");
    });
}

/// A purge above the checkpoint is noticed after the next crash: the state has a hole.
#[cfg(feature = "planted")]
#[test]
fn a_log_cut_early_as_planted_is_found() {
    use cfs_wire::planted::{Bug, activate};
    let lost = |bug| {
        activate(bug);
        let (outcome, _) = simulate(18, |handle| async move {
            let disks = Disks::new(1);
            let node = handle.new_domain();
            let first = start(&disks, &node, LogConfig::default()).await.unwrap();
            propose_all(&first.host, &node, GROUP, 0..20).await;
            first.host.checkpoint(GROUP).await.unwrap();
            first.log.flush().await.unwrap();
            node.kill();
            match start(&disks, &handle.new_domain(), LogConfig::default()).await {
                Ok(second) => {
                    second.host.read_barrier(GROUP).await.unwrap();
                    second.lists[0].list().len() != 20
                }
                Err(_) => true,
            }
        });
        activate(None);
        outcome
    };
    assert!(!lost(None));
    assert!(lost(Some(Bug::LogCutEarly)), "LogCutEarly went unnoticed");
}
