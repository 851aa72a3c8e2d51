use super::*;
use cfs_reactor::Executor;
use cfs_reactor::clock::KernelClock;
use cfs_reactor::uring::Ring;
use futures_util::FutureExt;
use futures_util::future::join_all;
use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver as StdReceiver, RecvTimeoutError};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Far longer than anything takes that is not held up.
const PATIENCE: Duration = Duration::from_secs(10);

/// A kernel with locked pages.
#[derive(Default)]
struct Kernel {
    state: Mutex<KernelState>,
    changed: Condvar,
}

#[derive(Default)]
struct KernelState {
    /// Inodes with locked pages, and how many drops may go on all the same.
    locked: BTreeMap<Ino, usize>,
    /// In the order of their beginning.
    begun: Vec<Ino>,
    ended: Vec<Ino>,
}

impl KernelState {
    fn begun_of(&self, ino: Ino) -> usize {
        self.begun.iter().filter(|begun| **begun == ino).count()
    }
}

impl Kernel {
    fn lock(&self, ino: Ino) {
        self.state.lock().unwrap().locked.insert(ino, 0);
    }

    /// Lets one drop go on.
    fn release(&self, ino: Ino) {
        *self.state.lock().unwrap().locked.get_mut(&ino).unwrap() += 1;
        self.changed.notify_all();
    }

    fn drop_pages(&self, ino: Ino) {
        self.state.lock().unwrap().begun.push(ino);
        self.changed.notify_all();
        let mut state = self.when(|state| state.locked.get(&ino) != Some(&0));
        if let Some(free) = state.locked.get_mut(&ino) {
            *free -= 1;
        }
        state.ended.push(ino);
    }

    fn when(&self, is: impl Fn(&KernelState) -> bool) -> MutexGuard<'_, KernelState> {
        let state = self.state.lock().unwrap();
        let (state, waited) = self.changed.wait_timeout_while(state, PATIENCE, |state| !is(state)).unwrap();
        assert!(!waited.timed_out(), "something was held up: {:?} were begun", state.begun);
        state
    }
}

/// Runs a story with a kernel and drops of its pages. Answers with what is at its end when the last
/// thread is gone.
fn run<F: Future<Output = ()> + 'static>(story: impl FnOnce(Arc<Kernel>, PageDrops) -> F) -> StdReceiver<()> {
    let kernel = Arc::new(Kernel::default());
    let (alive, gone) = sync_channel(0);
    let theirs = kernel.clone();
    let threads = PageThreads::that(Arc::new(move |ino| {
        let _alive = &alive;
        theirs.drop_pages(ino);
    }));
    let ring = Ring::new(8).unwrap();
    let executor = Executor::new(Rc::new(KernelClock::new()));
    let handle = executor.domain();
    let story = story(kernel, PageDrops::new(&handle, threads.unwrap()));
    let timed = handle.clone();
    let story = async move { timed.timeout(PATIENCE, story).await };
    let outcome = executor.run(&mut ring.driver(), Duration::ZERO, &handle, story);
    assert_eq!(outcome, Ok(Some(())), "something was held up");
    gone
}

fn inos(numbers: std::ops::Range<u64>) -> impl Iterator<Item = Ino> + Clone {
    numbers.map(Ino::from_u64)
}

#[test]
fn locked_pages_of_one_inode_do_not_hold_up_the_others() {
    run(|kernel, drops| async move {
        let locked = Ino::from_u64(7);
        kernel.lock(locked);
        let mut held_up = drops.drop_pages(locked).boxed_local();
        join_all(inos(100..400).map(|ino| drops.drop_pages(ino))).await;
        let ended = kernel.state.lock().unwrap().ended.clone();
        assert_eq!(ended.into_iter().collect::<BTreeSet<_>>(), inos(100..400).collect());
        assert!((&mut held_up).now_or_never().is_none(), "answered before its pages were gone");
        kernel.release(locked);
        held_up.await;
        assert_eq!(kernel.state.lock().unwrap().ended.last(), Some(&locked));
    });
}

#[test]
fn who_asks_while_pages_are_being_dropped_is_answered_after_one_further_drop_for_all() {
    run(|kernel, drops| async move {
        let ino = Ino::from_u64(7);
        kernel.lock(ino);
        let first = drops.drop_pages(ino);
        drop(kernel.when(|state| state.begun_of(ino) == 1));
        let mut later = join_all((0..1000).map(|_| drops.drop_pages(ino))).boxed_local();
        {
            let queue = drops.0.borrow();
            assert_eq!((queue.under_way.len(), queue.waiting.len(), queue.turns.len()), (1, 1, 0));
            assert_eq!(queue.threads.orders.len(), 1, "the inode's drops go one after the other");
        }
        kernel.release(ino);
        first.await;
        drop(kernel.when(|state| state.begun_of(ino) == 2));
        assert!((&mut later).now_or_never().is_none(), "answered before its pages were gone");
        kernel.release(ino);
        later.await;
        assert_eq!(kernel.state.lock().unwrap().ended, [ino; 2]);
        let queue = drops.0.borrow();
        assert_eq!((queue.under_way.len(), queue.waiting.len()), (0, 0), "nothing is kept of what is done");
    });
}

#[test]
fn drops_that_wait_for_a_thread_are_one_for_each_inode_and_begin_in_the_order_of_their_asking() {
    const LOCKED: u64 = THREADS_MAX as u64;
    run(|kernel, drops| async move {
        inos(0..LOCKED).for_each(|ino| kernel.lock(ino));
        let mut held_up: VecDeque<_> = inos(0..LOCKED).map(|ino| drops.drop_pages(ino)).collect();
        drop(kernel.when(|state| state.begun.len() == THREADS_MAX));
        let waiting: Vec<_> = (0..50).flat_map(|_| inos(100..120)).map(|ino| drops.drop_pages(ino)).collect();
        assert_eq!(drops.0.borrow().threads.orders.len(), THREADS_MAX);
        assert_eq!(drops.0.borrow().waiting.len(), 20);
        kernel.release(Ino::from_u64(0));
        held_up.pop_front().unwrap().await;
        join_all(waiting).await;
        assert!(kernel.state.lock().unwrap().begun[THREADS_MAX..].iter().copied().eq(inos(100..120)));
        inos(1..LOCKED).for_each(|ino| kernel.release(ino));
        join_all(held_up).await;
    });
}

#[test]
fn one_thread_suffices_for_what_is_not_held_up() {
    run(|_, drops| async move {
        for ino in inos(0..50) {
            drops.drop_pages(ino).await;
        }
        assert_eq!(drops.0.borrow().threads.orders.len(), 1);
    });
}

#[test]
fn a_mount_ends_while_a_drop_is_held_up_and_its_threads_when_that_is_over() {
    let held_up = Ino::from_u64(0);
    let (tell, told) = sync_channel(1);
    let gone = run(move |kernel, drops| async move {
        inos(0..THREADS_MAX as u64).for_each(|ino| kernel.lock(ino));
        // Those of the last never begin.
        let asked: Vec<_> = inos(0..THREADS_MAX as u64 + 1).map(|ino| drops.drop_pages(ino)).collect();
        drop(kernel.when(|state| state.begun.len() == THREADS_MAX));
        inos(1..THREADS_MAX as u64).for_each(|ino| kernel.release(ino));
        drop((asked, drops));
        tell.send(kernel).unwrap();
    });
    let kernel = told.recv().unwrap();
    assert_eq!(gone.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
    kernel.release(held_up);
    assert_eq!(gone.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
    let begun = &kernel.state.lock().unwrap().begun;
    assert_eq!(begun.len(), THREADS_MAX, "{begun:?}");
}
