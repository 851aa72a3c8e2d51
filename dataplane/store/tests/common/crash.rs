//! A random workload with a journal of what was answered, and what must hold after a crash.

use super::*;
use cfs_reactor::sync::Notify;
use std::cell::RefCell;
use std::collections::BTreeMap;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Known {
    Putting,
    Present,
    Deleting,
    Deleted,
}

/// Kind, length, and how far a blob got.
type Noted = (BlobKind, usize, Known);

/// What the workload was answered, by blob.
#[derive(Clone, Default)]
pub struct Journal(pub Rc<RefCell<BTreeMap<u128, Noted>>>);

impl Journal {
    pub fn set(&self, id: u128, known: Known) {
        self.0.borrow_mut().get_mut(&id).expect("journalled").2 = known;
    }

    fn present(&self, worker: u128) -> Vec<u128> {
        let journal = self.0.borrow();
        let here = journal.iter().filter(|(id, entry)| entry.2 == Known::Present && *id >> 64 == worker);
        here.map(|(id, _)| *id).collect()
    }

    pub fn live_bytes(&self) -> usize {
        self.0
            .borrow()
            .values()
            .filter(|entry| entry.2 == Known::Present)
            .map(|entry| entry.1.div_ceil(4096) * 4096)
            .sum()
    }
}

/// Puts and deletes by three workers at once, keeping about `fill` bytes alive.
pub async fn work(store: Rc<TargetStore>, handle: Handle, journal: Journal, seed: u64, steps: u32, fill: usize) {
    let workers = (0..3u128).map(|worker| {
        let (store, journal) = (store.clone(), journal.clone());
        let mut random = SplitMix64::new(seed.wrapping_add(worker as u64 * 1000));
        handle.spawn(async move {
            for step in 0..steps {
                let present = journal.present(worker);
                if present.len() > 2 && (journal.live_bytes() > fill || random.one_in(4)) {
                    let count = 1 + random.below(2) as usize;
                    let ids: Vec<u128> =
                        (0..count).map(|_| present[random.below(present.len() as u64) as usize]).collect();
                    ids.iter().for_each(|id| journal.set(*id, Known::Deleting));
                    delete(&store, &ids).await.expect("deletes");
                    ids.iter().for_each(|id| journal.set(*id, Known::Deleted));
                } else {
                    put_one(&store, &journal, &mut random, worker, seed, step).await;
                }
            }
        })
    });
    let workers: Vec<_> = workers.collect();
    for worker in workers {
        worker.await.expect("not cancelled");
    }
}

async fn put_one(store: &TargetStore, journal: &Journal, random: &mut SplitMix64, worker: u128, seed: u64, step: u32) {
    let id = (worker << 64) | (u128::from(seed as u32) << 32) | u128::from(step);
    let kind = BlobKind::ALL[random.below(6) as usize];
    let length = match random.below(3) {
        0 => 1 + random.below(4096),
        1 => 1 + random.below(20_000),
        _ => 1 + random.below(60_000),
    } as usize;
    journal.0.borrow_mut().insert(id, (kind, length, Known::Putting));
    match put(store, id, kind, length).await {
        Ok(()) => journal.set(id, Known::Present),
        Err(StoreError::NoSpace { .. }) => journal.set(id, Known::Deleted),
        Err(error) => panic!("put {id:x}: {error}"),
    }
}

/// Like [`work`] by one worker, until the first error: what was under way then is unknown.
pub async fn work_until_error(store: &TargetStore, journal: &Journal, seed: u64, steps: u32) -> Option<StoreError> {
    let mut random = SplitMix64::new(seed);
    for step in 0..steps {
        let id = (u128::from(seed) << 32) | u128::from(step);
        let (kind, length) = (BlobKind::ALL[random.below(6) as usize], 1 + random.below(30_000) as usize);
        journal.0.borrow_mut().insert(id, (kind, length, Known::Putting));
        match put(store, id, kind, length).await {
            Ok(()) => journal.set(id, Known::Present),
            Err(error) => return Some(error),
        }
        let present = journal.present(0);
        if present.len() > 8 {
            let victim = present[random.below(present.len() as u64) as usize];
            journal.set(victim, Known::Deleting);
            if let Err(error) = delete(store, &[victim]).await {
                return Some(error);
            }
            journal.set(victim, Known::Deleted);
        }
    }
    None
}

/// Everything answered is there or gone as answered; the rest is whole or absent. What is found
/// becomes the journal's new state.
pub async fn check(store: &TargetStore, journal: &Journal, context: &str) {
    let expected = journal.0.borrow().clone();
    for (id, (kind, length, known)) in &expected {
        let stat = store.stat(BlobId(*id));
        let present = match known {
            Known::Present => true,
            Known::Deleted => false,
            Known::Putting | Known::Deleting => stat.is_some(),
        };
        assert_eq!(stat, present.then(|| info(*id, *kind, *length)), "{context}: {id:x} is {known:?}");
        match present {
            true => expect_blob(store, *id, *length, context).await,
            false => expect_absent(store, *id, context).await,
        }
        journal.set(*id, if present { Known::Present } else { Known::Deleted });
    }
    for kind in BlobKind::ALL {
        for blob in store.list(kind) {
            assert!(expected.contains_key(&blob.id.0), "{context}: unknown blob {}", blob.id);
        }
    }
}

/// Runs `life` in a node of its own until it ends or the disk halts before its `halt`-th write;
/// true when it halted. The node is dead afterwards.
pub async fn live<F: Future<Output = ()> + 'static>(
    handle: &Handle,
    disk: &Rc<MemDisk>,
    halt: Option<u64>,
    life: impl FnOnce(Handle) -> F,
) -> bool {
    let halted = Notify::new();
    let on_halt = {
        let halted = halted.clone();
        Box::new(move || halted.notify_all())
    };
    let halt_seen = halted.notified();
    disk.halt_after(halt, Some(on_halt));
    let node = handle.new_domain();
    let ended = node.spawn(life(node.clone()));
    let outcome = futures_util::future::select(ended, halt_seen).await;
    let crashed = match outcome {
        futures_util::future::Either::Left((result, _)) => {
            result.expect("the workload runs to its end");
            false
        }
        futures_util::future::Either::Right(_) => true,
    };
    node.kill();
    crashed
}

pub const ZONES: u32 = 14;
pub const FILL: usize = 250 << 10;

/// One life until the `halt`-th write, a power cut, perhaps another during recovery, then the
/// check, a second life, a plain process kill, and the check again. True if the first life crashed.
pub fn crash_at(seed: u64, halt: u64, steps: u32) -> bool {
    crash_on(ZONES, FILL, seed, halt, steps)
}

/// [`crash_at`] on a target of so many zones.
pub fn crash_on(zones: u32, fill: usize, seed: u64, halt: u64, steps: u32) -> bool {
    run(seed, move |handle| async move {
        let context = format!("seed {seed} halt {halt}");
        let disk = formatted(&handle, zones, seed ^ halt).await;
        let journal = Journal::default();
        let mut random = SplitMix64::new(seed ^ (halt << 20));
        let life = |journal: Journal, seed: u64, steps: u32| {
            let disk = disk.clone();
            move |node: cfs_reactor::Handle| async move {
                let store = open(&disk, &node).await;
                work(store, node, journal, seed, steps, fill).await;
            }
        };
        let crashed = live(&handle, &disk, Some(halt), life(journal.clone(), seed, steps)).await;
        disk.power_cut();
        if random.one_in(2) {
            let again = 1 + random.below(4);
            let reopen = {
                let disk = disk.clone();
                move |node: cfs_reactor::Handle| async move {
                    open(&disk, &node).await;
                }
            };
            live(&handle, &disk, Some(again), reopen).await;
            disk.power_cut();
        }
        let store = open(&disk, &handle).await;
        assert_eq!(store.recovery().corrupt, vec![], "{context}");
        check(&store, &journal, &context).await;
        let space = store.space();
        drop(store);
        // A second life of a few writes, ended by kill -9: what is in the device's cache stays.
        let halt = 1 + random.below(30);
        live(&handle, &disk, Some(halt), life(journal.clone(), seed + 500, 8)).await;
        disk.halt_after(None, None);
        if random.one_in(2) {
            disk.power_cut();
        }
        let store = open(&disk, &handle).await;
        assert_eq!(store.recovery().corrupt, vec![], "{context}, second life");
        check(&store, &journal, &format!("{context}, second life")).await;
        drop(store);
        // What a restarted store showed must not be lost by a later power cut.
        disk.power_cut();
        let store = open(&disk, &handle).await;
        check(&store, &journal, &format!("{context}, shown before")).await;
        assert_eq!(store.space().capacity, space.capacity);
        crashed
    })
}
