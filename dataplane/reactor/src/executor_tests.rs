use super::*;
use crate::clock::SimClock;
use crate::sync;

fn simulated(seed: u64) -> (Executor, Handle) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    (executor, handle)
}

#[test]
fn virtual_time_jumps_to_each_deadline_in_order() {
    let (executor, handle) = simulated(1);
    let order = Rc::new(RefCell::new(Vec::new()));
    let start = handle.now();
    for millis in [30u64, 10, 20] {
        let (inner, order) = (handle.clone(), order.clone());
        handle.spawn(async move {
            inner.sleep(Duration::from_millis(millis)).await;
            order.borrow_mut().push(millis);
        });
    }
    let waiter = handle.clone();
    executor.run_simulated(&handle, async move { waiter.sleep(Duration::from_millis(40)).await }).unwrap().unwrap();
    assert_eq!(*order.borrow(), [10, 20, 30]);
    assert_eq!(handle.now() - start, Duration::from_millis(40));
}

/// A clock that goes on by a microsecond each time it is read.
#[derive(Default)]
struct ReadClock(Cell<u64>);

impl Clock for ReadClock {
    fn now(&self) -> Instant {
        self.0.set(self.0.get() + 1000);
        Instant::from_nanos(self.0.get())
    }

    fn wall(&self) -> Timestamp {
        Timestamp::from_nanos(0)
    }

    fn random(&self) -> u64 {
        0
    }

    fn advance_to(&self, _deadline: Instant) -> bool {
        false
    }
}

/// Nothing happens outside.
struct Quiet;

impl Unpark for Quiet {
    fn unpark(&self) {}
}

impl Driver for Quiet {
    fn poll(&mut self) -> bool {
        false
    }

    fn park(&mut self, _timeout: Option<Duration>) {}

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(Quiet)
    }
}

#[test]
fn a_timer_fires_although_another_task_is_always_ready() {
    const YIELDS_MAX: usize = 1_000_000;
    let executor = Executor::new(Rc::new(ReadClock::default()));
    let handle = executor.domain();
    let sleeper = {
        let handle = handle.clone();
        handle.clone().spawn(async move { handle.sleep(Duration::from_millis(1)).await })
    };
    let inner = handle.clone();
    let yields = executor.run(&mut Quiet, Duration::ZERO, &handle, async move {
        let mut yields = 0;
        while !sleeper.is_finished() && yields < YIELDS_MAX {
            inner.yield_now().await;
            yields += 1;
        }
        yields
    });
    // A turn polls the batch and reads the clock once; a millisecond is a thousand turns.
    let yields = yields.unwrap();
    assert!(yields <= 1100 * POLL_BATCH, "the sleeper slept through {yields} yields");
}

/// Gives out one event at a time: when it was polled so often since the last, or when it is parked.
struct Scripted {
    event: Rc<sync::Notify>,
    /// An event comes with this poll; `None`: only a sleep ends with one.
    found_at: Option<usize>,
    looks: usize,
    polls: Rc<Cell<usize>>,
    parks: Rc<Cell<usize>>,
}

impl Driver for Scripted {
    fn poll(&mut self) -> bool {
        self.polls.set(self.polls.get() + 1);
        self.looks += 1;
        let found = self.found_at == Some(self.looks);
        if found {
            self.looks = 0;
            self.event.notify_all();
        }
        found
    }

    fn park(&mut self, _timeout: Option<Duration>) {
        self.parks.set(self.parks.get() + 1);
        self.looks = 0;
        self.event.notify_all();
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(Quiet)
    }
}

/// Waits for `events` on a clock that goes on by a microsecond in each idle turn; polls and parks.
fn waited(spin: Duration, found_at: Option<usize>, events: usize) -> (usize, usize) {
    let executor = Executor::new(Rc::new(ReadClock::default()));
    let handle = executor.domain();
    let (polls, parks): (Rc<Cell<usize>>, Rc<Cell<usize>>) = Default::default();
    let event = sync::Notify::new();
    let mut driver = Scripted { event: event.clone(), found_at, looks: 0, polls: polls.clone(), parks: parks.clone() };
    let waited = executor.run(&mut driver, spin, &handle, async move {
        for _ in 0..events {
            event.notified().await;
        }
    });
    waited.unwrap();
    (polls.get(), parks.get())
}

#[test]
fn what_comes_while_the_executor_polls_is_found_without_a_sleep() {
    let spin = Duration::from_micros(20);
    assert_eq!(waited(spin, Some(5), 100), (500, 0));
    assert_eq!(waited(Duration::ZERO, Some(5), 100), (0, 100), "told not to poll it sleeps at once");
}

#[test]
fn when_nothing_comes_the_executor_sleeps_after_its_spin_and_soon_without_one() {
    let spin = Duration::from_micros(20);
    assert_eq!(waited(spin, None, 1), (20, 1));
    assert_eq!(waited(spin, Some(21), 1), (20, 1), "a poll too late");
    assert_eq!(waited(spin, Some(20), 1), (20, 0));
    // Three times in vain, then not for the next 64 sleeps.
    assert_eq!(waited(spin, None, 3 + 64), (60, 67));
    assert_eq!(waited(spin, None, 3 + 64 + 1), (80, 68));
}

#[test]
fn polls_are_recorded_when_asked_for_and_the_long_ones_counted() {
    let executor = Executor::new(Rc::new(ReadClock::default()));
    let handle = executor.domain();
    // Of a clock that goes on by a microsecond with each look.
    let looks = |count: usize| {
        let inner = handle.clone();
        let looks = async move { (0..count).for_each(|_| _ = inner.now()) };
        executor.run(&mut Quiet, Duration::ZERO, &handle, looks).unwrap();
    };
    looks(500);
    assert_eq!(executor.poll_record(), None);
    executor.record_polls();
    looks(100);
    let micros = Duration::from_micros;
    assert_eq!(executor.poll_record(), Some(PollRecord { polls: 1, longest: micros(101), too_long: 0 }));
    looks(200);
    looks(10);
    assert_eq!(executor.poll_record(), Some(PollRecord { polls: 3, longest: micros(201), too_long: 1 }));
}

/// How often a future is polled until it ends.
async fn polls_of(future: impl Future<Output = ()>) -> usize {
    let mut polls = 0;
    futures_util::pin_mut!(future);
    std::future::poll_fn(|context| {
        polls += 1;
        future.as_mut().poll(context)
    })
    .await;
    polls
}

#[test]
fn work_on_many_bytes_takes_many_polls_however_it_is_joined() {
    const PIECE: usize = WORK_BYTES_MAX / 4;
    let (executor, handle) = simulated(6);
    let inner = handle.clone();
    let polls = executor.run_simulated(&handle, async move {
        let work = |pieces: usize| {
            let inner = &inner;
            async move {
                for _ in 0..pieces {
                    inner.work(PIECE).await;
                }
            }
        };
        inner.yield_now().await;
        let alone = polls_of(work(16)).await;
        inner.yield_now().await;
        let joined = polls_of(async {
            futures_util::future::join_all((0..4).map(|_| work(4))).await;
        });
        let joined = joined.await;
        inner.yield_now().await;
        let large = polls_of(async {
            inner.work(10 * WORK_BYTES_MAX).await;
            inner.work(1).await;
        });
        (alone, joined, large.await)
    });
    assert_eq!(polls.unwrap().unwrap(), (4, 4, 2));
}

#[test]
fn a_killed_domain_drops_its_tasks_and_their_graph_and_spawns_no_more() {
    let (executor, handle) = simulated(2);
    let doomed = executor.domain();
    let token = Rc::new(());
    let held = token.clone();
    let join = doomed.spawn(async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    let (killer, sleeper) = (doomed.clone(), handle.clone());
    executor
        .run_simulated(&handle, async move {
            sleeper.sleep(Duration::from_millis(1)).await;
            killer.kill();
        })
        .unwrap()
        .unwrap();
    assert_eq!(Rc::strong_count(&token), 1);
    assert_eq!(executor.run_simulated(&handle, join).unwrap(), Ok(Err(Cancelled)));
    let late = doomed.spawn(async {});
    assert_eq!(executor.run_simulated(&handle, late).unwrap(), Ok(Err(Cancelled)));
}

#[test]
fn a_task_that_nothing_can_wake_is_reported_as_stalled() {
    let (executor, handle) = simulated(3);
    assert_eq!(executor.run_simulated(&handle, std::future::pending::<()>()), Err(Stalled));
}

#[test]
fn one_seed_gives_one_trace_and_another_seed_another() {
    let trace = |seed| {
        let (executor, handle) = simulated(seed);
        let main = handle.clone();
        executor
            .run_simulated(&handle, async move {
                let (sender, receiver) = sync::channel::<u64>(4);
                for id in 0..8 {
                    let (sender, inner) = (sender.clone(), main.clone());
                    main.spawn(async move {
                        inner.sleep(Duration::from_micros(inner.random_u64() % 100)).await;
                        sender.send(id).await.unwrap();
                    });
                }
                drop(sender);
                while receiver.recv().await.is_some() {}
            })
            .unwrap()
            .unwrap();
        executor.trace_hash()
    };
    assert_eq!(trace(7), trace(7));
    assert_ne!(trace(7), trace(8));
}

#[test]
fn a_timeout_gives_none_and_a_value_in_time_is_kept() {
    let (executor, handle) = simulated(4);
    let inner = handle.clone();
    let outcome = executor
        .run_simulated(&handle, async move {
            let late = inner.timeout(Duration::from_secs(1), std::future::pending::<u8>()).await;
            let early = inner.timeout(Duration::from_secs(1), async { 5u8 }).await;
            (late, early)
        })
        .unwrap();
    assert_eq!(outcome, Ok((None, Some(5))));
}

#[test]
fn semaphore_permits_are_granted_in_order_and_a_dropped_waiter_is_skipped() {
    let (executor, handle) = simulated(5);
    let inner = handle.clone();
    let order = executor
        .run_simulated(&handle, async move {
            let semaphore = sync::Semaphore::new(2);
            let order = Rc::new(RefCell::new(Vec::new()));
            let held = semaphore.acquire(2).await;
            let mut joins = Vec::new();
            for (id, count) in [(0, 2), (1, 1), (2, 1)] {
                let (semaphore, order) = (semaphore.clone(), order.clone());
                joins.push(inner.spawn(async move {
                    let _permit = semaphore.acquire(count).await;
                    order.borrow_mut().push(id);
                }));
                // Each asks before the next: with a seeded scheduler spawn order is not run order.
                inner.sleep(Duration::from_micros(1)).await;
            }
            joins[0].abort();
            drop(held);
            for join in joins {
                let _ = join.await;
            }
            assert_eq!(semaphore.available(), 2);
            order.take()
        })
        .unwrap()
        .unwrap();
    assert_eq!(order, [1, 2]);
}
