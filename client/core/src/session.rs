//! A session as the client sees it: its request numbers, which of them are unanswered, and until
//! when what it granted may be used.

use cfs_reactor::sync::Notify;
use cfs_reactor::{Handle, Instant};
use cfs_wire::limits::SESSION_REPLIES_MAX;
use cfs_wire::meta::MountReply;
use cfs_wire::{Ino, Policy, RequestId, SessionId, ShardId, VolumeId};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// Request numbers between the oldest unanswered one and the newest. A shard keeps a reply for
/// each; half its bound leaves room for what the server has not heard about yet.
const WINDOW: u64 = (SESSION_REPLIES_MAX / 2) as u64;

pub(crate) struct Session {
    pub id: SessionId,
    pub volume: VolumeId,
    pub root: Ino,
    pub shards: u16,
    pub policy: Policy,
    pub lease: Duration,
    handle: Handle,
    next: Cell<u64>,
    outstanding: RefCell<BTreeSet<u64>>,
    /// The newest request that was given up and may still be carried out: until a shard hears that all
    /// up to it are acknowledged.
    abandoned: Cell<u64>,
    /// A request was answered or given up.
    ended: Rc<Notify>,
    /// A request waits because an old one is unanswered: whoever holds such a one open for long
    /// (a lock wait) gives it up and asks anew.
    pressed: Rc<Notify>,
    expires: Cell<Instant>,
    fenced: Cell<bool>,
    /// Shards that know the session.
    opened: RefCell<BTreeSet<ShardId>>,
}

/// A request number in use. Dropped once the request is settled or given up.
pub(crate) struct Sequence {
    session: Rc<Session>,
    number: u64,
    settled: Cell<bool>,
}

impl Session {
    /// `sent`: when the call that opened it was sent.
    pub fn new(handle: &Handle, reply: &MountReply, sent: Instant) -> Rc<Session> {
        let lease = Duration::from_millis(reply.lease_ms.max(1).into());
        Rc::new(Session {
            id: reply.session,
            volume: reply.volume,
            root: reply.root,
            shards: reply.shards,
            policy: reply.policy,
            lease,
            handle: handle.clone(),
            next: Cell::new(1),
            outstanding: RefCell::new(BTreeSet::new()),
            abandoned: Cell::new(0),
            ended: Notify::new(),
            pressed: Notify::new(),
            expires: Cell::new(sent + lease),
            fenced: Cell::new(false),
            opened: RefCell::new(BTreeSet::new()),
        })
    }

    /// A number for a request that changes something; waits while the window is full, and while a shard
    /// that carries this request out could still carry out an abandoned one behind it. `urgent`: one that
    /// makes room and so can't wait for it.
    pub async fn sequence(self: &Rc<Self>, urgent: bool) -> Sequence {
        loop {
            let ended = self.ended.notified();
            let (number, lowest) = (self.next.get(), self.lowest_unacknowledged());
            if urgent || (number < lowest + WINDOW && self.abandoned.get() < lowest) {
                self.next.set(number + 1);
                self.outstanding.borrow_mut().insert(number);
                return Sequence { session: self.clone(), number, settled: Cell::new(false) };
            }
            self.pressed.notify_all();
            ended.await;
        }
    }

    /// The number a read carries. Its reply is not kept by anyone.
    pub fn read_id(&self) -> RequestId {
        RequestId { session: self.id, sequence: 0 }
    }

    pub fn lowest_unacknowledged(&self) -> u64 {
        self.outstanding.borrow().first().copied().unwrap_or(self.next.get())
    }

    pub fn pressed(&self) -> cfs_reactor::sync::Notified {
        self.pressed.notified()
    }

    /// The server answered a heartbeat that was sent then.
    pub fn renewed(&self, sent: Instant) {
        self.expires.set(self.expires.get().max(sent + self.lease));
    }

    pub fn expires(&self) -> Instant {
        self.expires.get()
    }

    /// Whether what was granted to this session may be relied on, by our own clock.
    pub fn is_live(&self) -> bool {
        let on_time = self.handle.now() < self.expires.get();
        !self.fenced.get() && (on_time || cfs_wire::planted::is(cfs_wire::planted::Bug::ClientIgnoreExpiry))
    }

    pub fn is_fenced(&self) -> bool {
        self.fenced.get()
    }

    pub fn set_known(&self, shard: ShardId) {
        self.opened.borrow_mut().insert(shard);
    }

    pub fn knows(&self, shard: ShardId) -> bool {
        self.opened.borrow().contains(&shard)
    }

    /// True the first time.
    pub fn set_fenced(&self) -> bool {
        !self.fenced.replace(true)
    }
}

impl Sequence {
    pub fn request_id(&self) -> RequestId {
        RequestId { session: self.session.id, sequence: self.number }
    }

    /// Nothing that comes later can be undone by it: it was answered, or never sent.
    pub fn settle(&self) {
        self.settled.set(true);
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        let session = &self.session;
        session.outstanding.borrow_mut().remove(&self.number);
        if !self.settled.get() {
            session.abandoned.set(session.abandoned.get().max(self.number));
        }
        session.ended.notify_all();
    }
}
