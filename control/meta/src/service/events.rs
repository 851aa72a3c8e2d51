//! What the server wants of its clients: one numbered queue per session, emptied by the
//! client's long poll and acknowledged by its next one.
//!
//! A queue lives in memory only. After a restart the leader treats every session as a possible
//! reader, so nothing that was queued before is missed.

use cfs_reactor::sync::Notify;
use cfs_reactor::{Handle, Instant};
use cfs_wire::SessionId;
use cfs_wire::limits::RENEWALS_MAX;
use cfs_wire::meta::{Event, EventsCall, EventsReply};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// Events in one reply: 1024 of some 12 bytes stay far below the RPC body limit.
const EVENTS_PER_REPLY_MAX: usize = 1024;
/// What no queue counts up to: an acknowledgement above was made up.
const NUMBER_MAX: u64 = u64::MAX >> 1;
/// A poll that comes back without an acknowledgement of what the last reply carried either lost
/// that reply or is still carrying it out: it gets the same events again, but no faster than this.
const RESEND: Duration = Duration::from_millis(500);

/// Whether a client has carried an event out.
pub struct Ticket {
    acknowledged: Cell<bool>,
    changed: Rc<Notify>,
}

impl Ticket {
    pub fn is_acknowledged(&self) -> bool {
        self.acknowledged.get()
    }

    /// Waits for the acknowledgement; false when `deadline` passes first.
    pub async fn acknowledged_by(&self, handle: &Handle, deadline: Instant) -> bool {
        loop {
            let changed = self.changed.notified();
            if self.acknowledged.get() {
                return true;
            }
            let left = deadline.saturating_since(handle.now());
            if left.is_zero() || handle.timeout(left, changed).await.is_none() {
                return self.acknowledged.get();
            }
        }
    }
}

struct Queued {
    number: u64,
    event: Event,
    ticket: Rc<Ticket>,
}

struct Queue {
    unacknowledged: VecDeque<Queued>,
    next: u64,
    /// Events up to here were in some reply.
    sent: u64,
    sent_at: Instant,
    /// Counts polls: a newer one ends the older.
    polls: u64,
    changed: Rc<Notify>,
}

/// The event queues of all sessions that talk to this node.
pub struct Events {
    handle: Handle,
    /// The first number of every queue: above whatever an earlier life of this node gave out.
    first: u64,
    queues: RefCell<BTreeMap<SessionId, Queue>>,
}

impl Events {
    pub fn new(handle: &Handle) -> Events {
        // Microseconds of wall-clock time grow faster than events can be numbered. Should the
        // clock have been set back, the first poll moves the queue above its acknowledgement.
        let wall = handle.wall();
        let first = u64::try_from(wall.secs).unwrap_or(0).saturating_mul(1_000_000) + u64::from(wall.nanos / 1000);
        Events { handle: handle.clone(), first, queues: RefCell::new(BTreeMap::new()) }
    }

    /// Queues an event for a session.
    pub fn push(&self, session: SessionId, event: Event) -> Rc<Ticket> {
        let mut queues = self.queues.borrow_mut();
        let queue = self.queue(&mut queues, session);
        let unsent = queue.unacknowledged.iter().rev().take_while(|queued| queued.number > queue.sent);
        if let Some(same) = unsent.into_iter().find(|queued| queued.event == event) {
            return same.ticket.clone();
        }
        let ticket = Rc::new(Ticket { acknowledged: Cell::new(false), changed: Notify::new() });
        queue.unacknowledged.push_back(Queued { number: queue.next, event, ticket: ticket.clone() });
        queue.next += 1;
        queue.changed.notify_all();
        ticket
    }

    /// Whether the session has not yet acknowledged such an event.
    pub fn is_under_way(&self, session: SessionId, event: &Event) -> bool {
        let queues = self.queues.borrow();
        queues.get(&session).is_some_and(|queue| queue.unacknowledged.iter().any(|queued| queued.event == *event))
    }

    /// Answers one long poll. `alive` is asked again at the end: a fence ends the poll.
    pub async fn poll(&self, call: &EventsCall, hold: Duration, alive: impl Fn() -> bool) -> EventsReply {
        let deadline = self.handle.now() + hold;
        let poll = self.acknowledge(call);
        loop {
            let (events, changed, wake) = {
                let mut queues = self.queues.borrow_mut();
                // Closed or fenced while the poll was held.
                let Some(queue) = queues.get_mut(&call.session) else {
                    return EventsReply { events: Vec::new(), alive: alive() };
                };
                let superseded = queue.polls != poll;
                let events = if superseded { Vec::new() } else { queue.take_due(self.handle.now()) };
                let over = superseded || self.handle.now() >= deadline || !alive();
                if over || !events.is_empty() {
                    return EventsReply { events, alive: alive() };
                }
                let resend = (!queue.unacknowledged.is_empty()).then(|| queue.sent_at + RESEND);
                (events, queue.changed.notified(), resend.map_or(deadline, |at| at.min(deadline)))
            };
            debug_assert!(events.is_empty());
            let _ = self.handle.timeout(wake.saturating_since(self.handle.now()), changed).await;
        }
    }

    /// Ends the session's held poll so that it looks at `alive` again.
    pub fn wake(&self, session: SessionId) {
        if let Some(queue) = self.queues.borrow().get(&session) {
            queue.changed.notify_all();
        }
    }

    /// Forgets a session that was closed or fenced: whoever waits for it waits no longer.
    pub fn forget(&self, session: SessionId) {
        let queue = self.queues.borrow_mut().remove(&session);
        let Some(queue) = queue else { return };
        for queued in &queue.unacknowledged {
            queued.ticket.acknowledged.set(true);
            queued.ticket.changed.notify_all();
        }
        queue.changed.notify_all();
    }

    /// Takes note of an acknowledgement; answers the number of this poll.
    fn acknowledge(&self, call: &EventsCall) -> u64 {
        let mut queues = self.queues.borrow_mut();
        let queue = self.queue(&mut queues, call.session);
        let done = &call.done[..call.done.len().min(RENEWALS_MAX)];
        let highest = done.iter().copied().fold(call.acknowledged, u64::max);
        if queue.polls == 0 && (queue.next..=NUMBER_MAX).contains(&highest) {
            queue.renumber(highest + 1);
        }
        queue.polls += 1;
        // A number that was never sent here belongs to an earlier life of this node.
        let sent = queue.sent;
        let is_done = |number| number <= sent && (number <= call.acknowledged || done.contains(&number));
        queue.unacknowledged.retain(|queued| {
            if is_done(queued.number) {
                queued.ticket.acknowledged.set(true);
                queued.ticket.changed.notify_all();
            }
            !is_done(queued.number)
        });
        queue.changed.notify_all();
        queue.polls
    }

    fn queue<'a>(&self, queues: &'a mut BTreeMap<SessionId, Queue>, session: SessionId) -> &'a mut Queue {
        queues.entry(session).or_insert_with(|| Queue {
            unacknowledged: VecDeque::new(),
            next: self.first,
            sent: 0,
            sent_at: Instant::default(),
            polls: 0,
            changed: Notify::new(),
        })
    }
}

impl Queue {
    /// What a poll gets now: everything, if there is news or the last reply seems lost.
    fn take_due(&mut self, now: Instant) -> Vec<(u64, Event)> {
        let news = self.unacknowledged.back().is_some_and(|last| last.number > self.sent);
        if !news && now < self.sent_at + RESEND {
            return Vec::new();
        }
        let due: Vec<(u64, Event)> = self
            .unacknowledged
            .iter()
            .take(EVENTS_PER_REPLY_MAX)
            .map(|queued| (queued.number, queued.event.clone()))
            .collect();
        if let Some((last, _)) = due.last() {
            self.sent = self.sent.max(*last);
            self.sent_at = now;
        }
        due
    }

    fn renumber(&mut self, first: u64) {
        self.next = first;
        for queued in &mut self.unacknowledged {
            queued.number = self.next;
            self.next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_reactor::Executor;
    use cfs_reactor::clock::SimClock;
    use cfs_wire::Ino;

    const SESSION: SessionId = SessionId(7);

    fn invalidate(counter: u64) -> Event {
        Event::Invalidate { ino: Ino::from_u64(counter) }
    }

    fn call(acknowledged: u64) -> EventsCall {
        EventsCall { session: SESSION, acknowledged, done: vec![], hold_ms: 0 }
    }

    fn simulate<F: Future<Output = ()> + 'static>(story: impl FnOnce(Handle) -> F) {
        let executor = Executor::new(Rc::new(SimClock::new(1)));
        let handle = executor.domain();
        let future = story(handle.clone());
        executor.run_simulated(&handle, future).unwrap().unwrap();
    }

    #[test]
    fn an_event_is_repeated_until_a_poll_acknowledges_it() {
        simulate(|handle| async move {
            let events = Events::new(&handle);
            let ticket = events.push(SESSION, invalidate(5));
            let hold = Duration::from_secs(2);
            let first = events.poll(&call(0), hold, || true).await;
            let number = first.events[0].0;
            assert_eq!(first.events, [(number, invalidate(5))]);
            // The reply was lost: the client asks again and gets the same event.
            assert_eq!(events.poll(&call(0), hold, || true).await, first);
            assert!(!ticket.is_acknowledged());
            let last = events.poll(&call(number), hold, || true).await;
            assert_eq!(last, EventsReply { events: vec![], alive: true });
            assert!(ticket.is_acknowledged());
        });
    }

    #[test]
    fn an_event_is_under_way_from_its_queueing_to_its_acknowledgement() {
        simulate(|handle| async move {
            let events = Events::new(&handle);
            let is_under_way = || [5, 6].map(|counter| events.is_under_way(SESSION, &invalidate(counter)));
            assert_eq!(is_under_way(), [false, false]);
            events.push(SESSION, invalidate(5));
            assert_eq!(is_under_way(), [true, false]);
            let number = events.poll(&call(0), Duration::ZERO, || true).await.events[0].0;
            assert_eq!(is_under_way(), [true, false], "it was sent");
            events.poll(&call(number), Duration::ZERO, || true).await;
            assert_eq!(is_under_way(), [false, false]);
        });
    }

    #[test]
    fn what_was_carried_out_before_an_older_event_is_acknowledged_alone() {
        simulate(|handle| async move {
            let events = Events::new(&handle);
            let tickets = [5, 6, 7].map(|counter| events.push(SESSION, invalidate(counter)));
            let first = events.poll(&call(0), Duration::ZERO, || true).await.events[0].0;
            // One that was never sent is not done.
            let done = vec![first + 1, first + 3];
            let poll = EventsCall { done, ..call(0) };
            handle.sleep(RESEND).await;
            let reply = events.poll(&poll, Duration::ZERO, || true).await;
            assert_eq!(reply.events, [(first, invalidate(5)), (first + 2, invalidate(7))]);
            assert_eq!(tickets.each_ref().map(|ticket| ticket.is_acknowledged()), [false, true, false]);
            let later = events.push(SESSION, invalidate(8));
            events.poll(&poll, Duration::ZERO, || true).await;
            assert!(!later.is_acknowledged());
            events.poll(&call(first + 2), Duration::ZERO, || true).await;
            assert!(tickets.iter().all(|ticket| ticket.is_acknowledged()) && !later.is_acknowledged());
        });
    }

    #[test]
    fn a_poll_held_for_a_session_that_is_forgotten_ends_and_leaves_nothing_behind() {
        simulate(|handle| async move {
            let events = Rc::new(Events::new(&handle));
            let held = events.clone();
            let poll = handle.spawn(async move { held.poll(&call(0), Duration::from_secs(5), || false).await });
            handle.sleep(Duration::from_millis(1)).await;
            assert_eq!(events.queues.borrow().len(), 1);
            let at = handle.now();
            events.forget(SESSION);
            assert_eq!(poll.await.unwrap(), EventsReply { events: vec![], alive: false });
            assert_eq!((handle.now(), events.queues.borrow().len()), (at, 0));
        });
    }

    #[test]
    fn an_acknowledgement_from_before_a_restart_confirms_nothing() {
        simulate(|handle| async move {
            let events = Events::new(&handle);
            let ticket = events.push(SESSION, invalidate(5));
            let reply = events.poll(&call(u64::MAX / 2), Duration::ZERO, || true).await;
            assert_eq!(reply.events, [(u64::MAX / 2 + 1, invalidate(5))]);
            assert!(!ticket.is_acknowledged());
            let deadline = handle.now() + Duration::from_secs(1);
            assert!(!ticket.acknowledged_by(&handle, deadline).await);
        });
    }

    #[test]
    fn an_acknowledgement_that_nobody_can_have_counted_to_is_ignored() {
        simulate(|handle| async move {
            for forged in [u64::MAX, u64::MAX - 1, NUMBER_MAX + 1] {
                let events = Events::new(&handle);
                let ticket = events.push(SESSION, invalidate(5));
                let reply = events.poll(&call(forged), Duration::ZERO, || true).await;
                assert_eq!(reply.events, [(events.first, invalidate(5))]);
                assert!(!ticket.is_acknowledged());
                events.push(SESSION, invalidate(6));
            }
        });
    }
}
