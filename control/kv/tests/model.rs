//! Random operations against a map: writes, checkpoints, scans and snapshots held across merges,
//! restores, reopening.

mod common;

use bytes::Bytes;
use cfs_kv::testing::MemMedium;
use cfs_kv::{Kv, KvConfig, KvError, KvSnapshot, Scan};
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use cfs_wire::blobs::BlobKind;
use common::{Contents, GROUP, History, check_state, config, mark, mark_number, restore, split_config};
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Bound;
use std::rc::Rc;

struct HeldScan {
    scan: Scan,
    left: VecDeque<(Bytes, Bytes)>,
}

impl HeldScan {
    /// What the scan gives next and what it should.
    async fn next(&mut self) -> (Option<(Bytes, Bytes)>, Option<(Bytes, Bytes)>) {
        (self.scan.next().await.unwrap(), self.left.pop_front())
    }
}

struct World {
    medium: Rc<MemMedium>,
    handle: Handle,
    config: fn() -> KvConfig,
    kv: Rc<Kv>,
    history: Rc<RefCell<History>>,
    random: SplitMix64,
    snapshots: Vec<(KvSnapshot, u64)>,
    scans: Vec<HeldScan>,
}

impl World {
    fn bound(&mut self) -> Bound<Bytes> {
        let key = Bytes::from(format!("key/{:03}", self.random.below(150)));
        match self.random.below(3) {
            0 => Bound::Included(key),
            1 => Bound::Excluded(key),
            _ => Bound::Unbounded,
        }
    }

    fn range_of(state: &Contents, range: &(Bound<Bytes>, Bound<Bytes>)) -> VecDeque<(Bytes, Bytes)> {
        use std::ops::RangeBounds;
        state.iter().filter(|(key, _)| range.contains(*key)).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    async fn step(&mut self) {
        match self.random.below(100) {
            0..50 => {
                let (batch, mark) = self.history.borrow_mut().step();
                self.kv.write(batch, mark);
                self.kv.admit().await.unwrap();
            }
            50..60 => self.checkpoint().await,
            60..64 if self.snapshots.len() < 4 => {
                self.snapshots.push((self.kv.snapshot(), self.history.borrow().written()));
            }
            64..72 => self.start_scan(),
            72..84 => self.go_on_scanning().await,
            84..92 => self.look_at_a_snapshot().await,
            92..94 => {
                let (mark, entries) = self.history.borrow_mut().restore_step();
                restore(&self.kv, mark, entries).await.unwrap();
            }
            94..96 => {
                let written = self.history.borrow().written();
                let expected = self.history.borrow().at(written).clone();
                check_state(&self.kv, &expected).await.unwrap();
            }
            96 => self.reopen().await,
            97 => self.kv.settle().await,
            _ => {
                let key = self.history.borrow_mut().key();
                let expected = self.history.borrow().now().get(&key).cloned();
                assert_eq!(self.kv.get(&key).await.unwrap(), expected, "{key:?}");
            }
        }
    }

    /// Sometimes with writes going on beside it.
    async fn checkpoint(&mut self) {
        let before = self.history.borrow().written();
        let checkpoint = {
            let kv = self.kv.clone();
            self.handle.spawn(async move { kv.checkpoint().await })
        };
        for _ in 0..self.random.below(3) {
            let (batch, mark) = self.history.borrow_mut().step();
            self.kv.write(batch, mark);
            self.handle.yield_now().await;
        }
        let synced = mark_number(&checkpoint.await.unwrap().unwrap());
        assert!(synced >= before && synced <= self.history.borrow().written());
        assert_eq!(mark_number(&self.kv.synced()), synced);
    }

    fn start_scan(&mut self) {
        let range = (self.bound(), self.bound());
        let (scan, state) = match self.snapshots.last().filter(|_| self.random.one_in(2)) {
            None => (self.kv.scan(range.clone()), self.history.borrow().now().clone()),
            Some((snapshot, number)) => (snapshot.scan(range.clone()), self.history.borrow().at(*number).clone()),
        };
        let left = World::range_of(&state, &range);
        self.scans.push(HeldScan { scan, left });
    }

    async fn go_on_scanning(&mut self) {
        if self.scans.is_empty() {
            return;
        }
        let index = self.random.below(self.scans.len() as u64) as usize;
        for _ in 0..self.random.below(40) {
            let (found, expected) = self.scans[index].next().await;
            assert_eq!(found, expected);
            if found.is_none() {
                self.scans.swap_remove(index);
                return;
            }
        }
    }

    async fn look_at_a_snapshot(&mut self) {
        if self.snapshots.is_empty() {
            return;
        }
        let index = self.random.below(self.snapshots.len() as u64) as usize;
        let (snapshot, number) = &self.snapshots[index];
        assert_eq!(snapshot.applied(), if *number == 0 { Bytes::new() } else { mark(*number) });
        let expected = self.history.borrow().at(*number).clone();
        let found = snapshot.scan((Bound::Unbounded, Bound::Unbounded)).collect().await.unwrap();
        assert!(found.iter().map(|(key, value)| (key, value)).eq(expected.iter()));
        let key = self.history.borrow_mut().key();
        assert_eq!(snapshot.get(&key).await.unwrap().as_ref(), expected.get(&key));
        if self.random.one_in(2) {
            self.snapshots.swap_remove(index);
        }
    }

    async fn reopen(&mut self) {
        self.snapshots.clear();
        self.scans.clear();
        if self.random.one_in(2) {
            self.kv.checkpoint().await.unwrap();
        }
        let synced = mark_number(&self.kv.synced());
        self.kv.close().await;
        assert_eq!(self.kv.checkpoint().await, Err(KvError::Closed));
        self.kv = Kv::open(self.medium.open(&self.handle), &self.handle, GROUP, (self.config)()).await.unwrap();
        assert_eq!(mark_number(&self.kv.applied()), synced, "a clean close reopens at its last checkpoint");
        self.history.borrow_mut().go_back_to(synced);
    }
}

fn run(seed: u64, steps: usize) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let (handle, medium) = (executor.domain(), MemMedium::new(seed));
    let outside = executor.domain();
    let main = async move {
        let config = if seed.is_multiple_of(2) { config } else { split_config };
        let kv = Kv::open(medium.open(&handle), &handle, GROUP, config()).await.unwrap();
        let (history, random) = (Rc::new(RefCell::new(History::new(seed))), SplitMix64::new(!seed));
        let mut world = World {
            medium: medium.clone(),
            handle,
            config,
            kv,
            history,
            random,
            snapshots: Vec::new(),
            scans: Vec::new(),
        };
        for _ in 0..steps {
            world.step().await;
        }
        let expected = world.history.borrow().now().clone();
        check_state(&world.kv, &expected).await.unwrap();
        world.snapshots.clear();
        world.scans.clear();
        world.kv.checkpoint().await.unwrap();
        world.kv.settle().await;
        let found = (medium.list(BlobKind::Run).len(), medium.list(BlobKind::Manifest).len());
        let stats = world.kv.stats();
        assert_eq!(found, (stats.tables, stats.manifest_blobs), "nothing is left over");
    };
    executor.run_simulated(&outside, main).expect("does not stall").expect("is not cancelled");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn the_store_equals_a_map(seed: u64) {
        run(seed, 400);
    }
}
