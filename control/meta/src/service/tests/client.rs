//! A client as small as can be: numbered requests repeated until answered, a long poll, a cache
//! of attributes under leases.

use super::cluster::Cluster;
use cfs_reactor::sync::{Mutex, Notify};
use cfs_reactor::{Instant, JoinHandle};
use cfs_wire::meta::{
    Attr, AttrChanges, Entry, Event, EventsCall, FileKind, LockFamily, LockKind, LockRange, MetaCall, MetaError,
    MetaOp, MetaReply, MetaResult, Name, NewNode,
};
use cfs_wire::{Errno, Ino, RequestId, SessionId, ShardId};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

/// A call unanswered for so long is repeated: longer than any recall takes in these tests.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

pub struct Client {
    pub cluster: Rc<Cluster>,
    pub session: SessionId,
    sequence: Cell<u64>,
    cache: RefCell<BTreeMap<Ino, (Attr, Instant)>>,
    /// Counts invalidations: a reply that one overtook is not cached.
    invalidations: Cell<u64>,
    /// Counts recalls of write leases: one may overtake the reply that granted the lease.
    pub recalls: Cell<u64>,
    pub events: RefCell<Vec<Event>>,
    pub happened: Rc<Notify>,
    /// Write leases held, for stories that write under them.
    leases: RefCell<BTreeSet<Ino>>,
    /// Recalls of write leases are heard and not followed.
    pub stubborn: Cell<bool>,
    /// Writes that went past the lease wait until what was dirty is committed.
    writing: Mutex<()>,
    /// Size to commit before a write lease is given back.
    pub dirty: RefCell<BTreeMap<Ino, u64>>,
    poll: RefCell<Option<JoinHandle<()>>>,
    pub fenced: Cell<bool>,
}

pub fn name(text: &str) -> Name {
    Name::from_slice(text.as_bytes())
}

pub fn node(kind: FileKind) -> NewNode {
    NewNode { kind, mode: 0o755, umask: 0o022, uid: 0, gid: 0, rdev: 0, target: Vec::new() }
}

pub fn write_lock(owner: u64, start: u64, end: u64) -> LockRange {
    LockRange { family: LockFamily::Posix, kind: LockKind::Write, start, end, owner, pid: 1 }
}

impl Client {
    /// A client with an open session in every shard.
    pub async fn open(cluster: &Rc<Cluster>, session: u64) -> Rc<Client> {
        Client::open_in(cluster, session, 0..super::cluster::SHARDS).await
    }

    /// A client with an open session in some shards.
    pub async fn open_in(cluster: &Rc<Cluster>, session: u64, shards: impl IntoIterator<Item = u16>) -> Rc<Client> {
        let client = Rc::new(Client {
            cluster: cluster.clone(),
            session: SessionId(session),
            sequence: Cell::new(1),
            cache: RefCell::default(),
            invalidations: Cell::new(0),
            recalls: Cell::new(0),
            events: RefCell::default(),
            happened: Notify::new(),
            leases: RefCell::default(),
            stubborn: Cell::new(false),
            writing: Mutex::new(()),
            dirty: RefCell::default(),
            poll: RefCell::new(None),
            fenced: Cell::new(false),
        });
        for shard in shards {
            let reply = client.call_in(ShardId(shard), MetaOp::OpenSession { client: format!("c{session}") }).await;
            assert_eq!(reply, Ok(MetaReply::Session { lease_ms: 20_000 }));
        }
        let polling = client.clone();
        *client.poll.borrow_mut() = Some(cluster.handle.spawn(async move { polling.poll_events().await }));
        client
    }

    /// The client is gone without a word.
    pub fn vanish(&self) {
        if let Some(poll) = self.poll.borrow_mut().take() {
            poll.abort();
        }
    }

    pub fn next_call(&self, op: MetaOp) -> MetaCall {
        let shard = op.home().map_or(ShardId(0), |ino| ino.shard());
        let sequence = self.sequence.get();
        self.sequence.set(sequence + 1);
        MetaCall { id: RequestId { session: self.session, sequence }, lowest_unacknowledged: 0, shard, op }
    }

    pub async fn call(&self, op: MetaOp) -> MetaResult {
        self.send(self.next_call(op)).await
    }

    pub async fn call_in(&self, shard: ShardId, op: MetaOp) -> MetaResult {
        let call = self.next_call(op);
        self.send(MetaCall { shard, ..call }).await
    }

    /// Repeats a call until it is answered.
    pub async fn send(&self, call: MetaCall) -> MetaResult {
        for attempt in 0.. {
            assert!(attempt < 1000, "seed {}: {call:?} is never answered", self.cluster.seed);
            let answer = match self.cluster.service() {
                Some(service) => {
                    let died = self.wait_for_death();
                    let work = service.call(call.clone());
                    futures_util::pin_mut!(died, work);
                    let either = futures_util::future::select(work, died);
                    match self.cluster.handle.timeout(CALL_TIMEOUT, either).await {
                        Some(futures_util::future::Either::Left((answer, _))) => Some(answer),
                        _ => None,
                    }
                }
                None => None,
            };
            match answer {
                Some(Err(MetaError::Unavailable(_) | MetaError::NotLeader { .. })) | None => {
                    self.cluster.handle.sleep(Duration::from_millis(20)).await;
                }
                Some(answer) => return answer,
            }
        }
        unreachable!("the loop has no end")
    }

    async fn wait_for_death(&self) {
        let starts = self.cluster.starts.get();
        while self.cluster.service().is_some() && self.cluster.starts.get() == starts {
            self.cluster.handle.sleep(Duration::from_millis(5)).await;
        }
    }

    async fn poll_events(self: Rc<Self>) {
        let mut acknowledged = 0;
        loop {
            let Some(service) = self.cluster.service() else {
                self.cluster.handle.sleep(Duration::from_millis(20)).await;
                continue;
            };
            let call = EventsCall { session: self.session, acknowledged, done: vec![], hold_ms: 3000 };
            let polled = self.cluster.handle.timeout(Duration::from_secs(8), service.events(call)).await;
            let Some(reply) = polled else { continue };
            if !reply.alive {
                self.fenced.set(true);
                return;
            }
            for (number, event) in reply.events {
                self.carry_out(&event).await;
                self.events.borrow_mut().push(event);
                self.happened.notify_all();
                acknowledged = number;
            }
        }
    }

    async fn carry_out(&self, event: &Event) {
        match event {
            Event::Invalidate { ino } | Event::InvalidateForPages { ino } => self.drop_cached(*ino),
            Event::RecallWrite { .. } if self.stubborn.get() => {}
            Event::RecallWrite { ino } => {
                self.recalls.set(self.recalls.get() + 1);
                let _writing = self.writing.lock().await;
                self.leases.borrow_mut().remove(ino);
                let dirty = self.dirty.borrow().get(ino).copied();
                if let Some(size) = dirty {
                    self.truncate(*ino, size).await.unwrap();
                    self.dirty.borrow_mut().remove(ino);
                }
                assert_eq!(self.call(MetaOp::ReturnLease { ino: *ino }).await, Ok(MetaReply::Done));
                self.drop_cached(*ino);
            }
        }
    }

    fn drop_cached(&self, ino: Ino) {
        self.invalidations.set(self.invalidations.get() + 1);
        self.cache.borrow_mut().remove(&ino);
    }

    pub fn is_cached(&self, ino: Ino) -> bool {
        self.cache.borrow().get(&ino).is_some_and(|(_, until)| *until > self.cluster.handle.now())
    }

    /// Attributes, from the cache while its lease lasts.
    pub async fn stat(&self, ino: Ino) -> Result<Attr, MetaError> {
        if self.is_cached(ino) {
            return Ok(self.cache.borrow()[&ino].0.clone());
        }
        let sent = self.cluster.handle.now();
        let before = self.invalidations.get();
        match self.call(MetaOp::GetAttr { ino }).await? {
            MetaReply::Attr { attr, grant } => {
                let until = sent + Duration::from_millis(grant.read_ms.into());
                if before == self.invalidations.get() {
                    self.cache.borrow_mut().insert(ino, (attr.clone(), until));
                }
                Ok(attr)
            }
            other => panic!("unexpected reply {other:?}"),
        }
    }

    async fn entry(&self, op: MetaOp) -> Result<Entry, MetaError> {
        match self.call(op).await? {
            MetaReply::Entry(entry) => Ok(entry),
            other => panic!("unexpected reply {other:?}"),
        }
    }

    pub async fn create(&self, dir: Ino, text: &str) -> Result<Ino, MetaError> {
        let op = MetaOp::Create { dir, name: name(text), node: node(FileKind::File), hold: false };
        Ok(self.entry(op).await?.attr.ino)
    }

    pub async fn mkdir(&self, dir: Ino, text: &str) -> Result<Ino, MetaError> {
        let op = MetaOp::Create { dir, name: name(text), node: node(FileKind::Directory), hold: false };
        Ok(self.entry(op).await?.attr.ino)
    }

    pub async fn link(&self, ino: Ino, dir: Ino, text: &str) -> Result<u32, MetaError> {
        Ok(self.entry(MetaOp::Link { ino, dir, name: name(text) }).await?.attr.nlink)
    }

    pub async fn unlink(&self, dir: Ino, text: &str) -> MetaResult {
        self.call(MetaOp::Unlink { dir, name: name(text) }).await
    }

    pub async fn rename(&self, dir: Ino, from: &str, to_dir: Ino, to: &str) -> MetaResult {
        self.call(MetaOp::Rename { dir, name: name(from), to_dir, to_name: name(to), flags: 0 }).await
    }

    /// What a name stands for.
    pub async fn lookup(&self, dir: Ino, text: &str) -> Result<Ino, MetaError> {
        match self.call(MetaOp::Lookup { dir, name: name(text) }).await? {
            MetaReply::Entry(entry) => Ok(entry.attr.ino),
            MetaReply::Remote { ino, .. } => Ok(ino),
            other => panic!("unexpected reply {other:?}"),
        }
    }

    pub async fn chmod(&self, ino: Ino, mode: u32) -> MetaResult {
        let changes = AttrChanges { mode: Some(mode), ..AttrChanges::default() };
        self.call(MetaOp::SetAttr { ino, changes }).await
    }

    pub async fn truncate(&self, ino: Ino, size: u64) -> MetaResult {
        let changes = AttrChanges { size: Some(size), ..AttrChanges::default() };
        let answer = self.call(MetaOp::SetAttr { ino, changes }).await;
        // One's own change ends what one has cached; nobody else says so.
        self.drop_cached(ino);
        answer
    }

    /// A program's write: under the lease it only changes what is dirty, else it is committed.
    pub async fn write_size(&self, ino: Ino, size: u64) {
        let _writing = self.writing.lock().await;
        if !self.leases.borrow().contains(&ino) {
            let recalls = self.recalls.get();
            if !self.acquire(ino).await || self.recalls.get() != recalls {
                self.truncate(ino, size).await.unwrap();
                return;
            }
            self.leases.borrow_mut().insert(ino);
        }
        self.dirty.borrow_mut().insert(ino, size);
    }

    /// The size as a program on this client sees it.
    pub async fn size(&self, ino: Ino) -> u64 {
        let dirty = self.dirty.borrow().get(&ino).copied();
        match dirty {
            Some(size) => size,
            None => self.stat(ino).await.unwrap().size,
        }
    }

    /// Whether the write lease was granted.
    pub async fn acquire(&self, ino: Ino) -> bool {
        match self.call(MetaOp::AcquireLease { ino }).await {
            Ok(MetaReply::Lease { granted, .. }) => granted,
            other => panic!("unexpected reply {other:?}"),
        }
    }

    pub async fn lock(&self, ino: Ino, lock: LockRange, wait: bool) -> MetaResult {
        self.call(MetaOp::Lock { ino, lock, wait }).await
    }
}

/// The error a program sees.
pub const fn errno(errno: Errno) -> MetaError {
    MetaError::Errno(errno)
}
