//! Keeps the books of every target beside its store: what was put, what was deleted, what was
//! answered. After every start the target is held to them, and so is every read.
//!
//! The contract is that of section 5 of the design: a put is durable when answered, a deleted
//! blob never comes back, an id is never reused for other bytes, a torn append leaves nothing,
//! damage is noticed. Nobody who draws ids at random reuses one, so the ledger tries to. Redundancy
//! would hide a target that breaks it until a second one fails; here each stands for itself.

use crate::report::{Checker, Violation};
use bytes::Bytes;
use cfs_reactor::{Handle, Instant};
use cfs_store::segment::{BlobTarget, LocalTarget};
use cfs_store::{Flaw, ShardCursor, Space, StoreError, TargetStore};
use cfs_wire::blobs::{BlobInfo, BlobKind, Owner, ShardGeometry};
use cfs_wire::{BlobId, TargetId};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// The newest appends of a damaged target may be lost without a word: what says that they were
/// durable comes with later ones, which may be damaged too.
const UNMARKED_APPENDS: u64 = 32;

/// After every so many answered appends somebody tries to reuse an id.
const REUSE_TRIED_EVERY: u64 = 16;

/// What a target's medium can be held to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Trust {
    /// To everything.
    Sound,
    /// Its bytes were changed: it may have lost blobs, and says so.
    Rotten,
    /// It lost writes and answered them: only what it reads must be right.
    Faulty,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    /// Asked for and not answered, or answered with an error: there or not.
    Putting,
    Held,
    /// As `Putting`, of a deletion.
    Deleting,
    Gone,
}

#[derive(Clone)]
struct Account {
    info: BlobInfo,
    /// Kept while the blob may be there.
    payload: Bytes,
    standing: Standing,
    /// The append it was answered by, counted by [`Books::appends`].
    since: u64,
}

/// One target's.
#[derive(Clone)]
struct Books {
    accounts: BTreeMap<BlobId, Account>,
    trust: Trust,
    /// Appends that were answered: answers of one moment count as one.
    appends: u64,
    answered: Instant,
}

impl Default for Books {
    fn default() -> Books {
        Books { accounts: BTreeMap::new(), trust: Trust::Sound, appends: 0, answered: Instant::default() }
    }
}

/// The books of all targets; outlives the node.
pub struct Ledger {
    handle: Handle,
    books: RefCell<BTreeMap<TargetId, Books>>,
    violation: RefCell<Option<Violation>>,
}

fn kinds() -> [BlobKind; 6] {
    [BlobKind::Log, BlobKind::Run, BlobKind::Manifest, BlobKind::Hot, BlobKind::Data, BlobKind::Parity]
}

impl Books {
    fn answer(&mut self, now: Instant) -> u64 {
        if self.answered != now {
            self.answered = now;
            self.appends += 1;
        }
        self.appends
    }

    /// What was being put when the node died, and is there.
    fn unanswered(&self, listed: &BTreeMap<BlobId, BlobInfo>) -> Vec<BlobInfo> {
        let found = |id: &BlobId| listed.get(id).copied();
        let putting = self.accounts.iter().filter(|(_, account)| account.standing == Standing::Putting);
        putting.filter_map(|(id, _)| found(id)).collect()
    }

    /// Compares with what a start has found; takes over what was open.
    fn audit(&mut self, listed: &BTreeMap<BlobId, BlobInfo>, damage_reported: bool) -> Result<(), String> {
        if let Some(stranger) = listed.keys().find(|id| !self.accounts.contains_key(id)) {
            return Err(format!("{:?} was never put", listed[stranger]));
        }
        let (trust, newest) = (self.trust, self.appends);
        let excused = |since: u64| match trust {
            Trust::Sound => false,
            Trust::Rotten => damage_reported || since + UNMARKED_APPENDS > newest,
            Trust::Faulty => true,
        };
        for (id, account) in &mut self.accounts {
            let found = listed.get(id);
            let wrong = match (account.standing, found) {
                (Standing::Held, None) => Some("was answered and is lost without a word"),
                (Standing::Gone, Some(_)) => Some("was deleted and is back without a word"),
                (_, Some(found)) if *found != account.info => {
                    return Err(format!("{found:?}, put as {:?}", account.info));
                }
                _ => None,
            };
            if let Some(wrong) = wrong.filter(|_| !excused(account.since)) {
                return Err(format!("{:?} {wrong}", account.info));
            }
            account.standing = if found.is_some() { Standing::Held } else { Standing::Gone };
            if account.standing == Standing::Gone {
                account.payload = Bytes::new();
            }
        }
        Ok(())
    }
}

impl Ledger {
    pub fn new(handle: &Handle) -> Rc<Ledger> {
        Rc::new(Ledger { handle: handle.clone(), books: RefCell::default(), violation: RefCell::default() })
    }

    /// For copies of the disks that go on apart from them.
    pub fn copy(&self) -> Rc<Ledger> {
        let (handle, books) = (self.handle.clone(), self.books.clone());
        Rc::new(Ledger { handle, books, violation: RefCell::default() })
    }

    /// The first breach so far.
    pub fn verdict(&self) -> Result<(), Violation> {
        self.violation.borrow().clone().map_or(Ok(()), Err)
    }

    /// An empty disk took the target's place.
    pub fn replaced(&self, target: TargetId) {
        self.books.borrow_mut().remove(&target);
    }

    /// What the target's disk does from now on is not the target's fault.
    pub fn distrust(&self, target: TargetId, trust: Trust) {
        let mut books = self.books.borrow_mut();
        let books = books.entry(target).or_default();
        books.trust = books.trust.max(trust);
    }

    /// Holds a target that was just opened to its books; what is returned keeps them. `node` is the
    /// domain of whoever opened it.
    pub fn attach(self: &Rc<Self>, node: &Handle, store: Rc<TargetStore>) -> Rc<dyn BlobTarget> {
        let damage_reported = !store.recovery().corrupt.is_empty();
        let target = LocalTarget(store);
        let infos = kinds().into_iter().flat_map(|kind| target.list(kind));
        let listed = infos.map(|info| (info.id, info)).collect();
        let unanswered = self.with(target.id(), |books| books.unanswered(&listed));
        let audited = self.with(target.id(), |books| books.audit(&listed, damage_reported));
        if let Err(detail) = audited {
            self.breach(target.id(), &format!("after a start: {detail}"));
        }
        let watched = Rc::new(Watched { target, ledger: self.clone() });
        let found = watched.clone();
        node.spawn(async move { found.look_at(unanswered).await });
        watched
    }

    fn breach(&self, target: TargetId, detail: &str) {
        let violation = Violation::new(Checker::Store, format!("target {target}: {detail}"));
        self.violation.borrow_mut().get_or_insert(violation);
    }

    fn with<T>(&self, target: TargetId, change: impl FnOnce(&mut Books) -> T) -> T {
        change(self.books.borrow_mut().entry(target).or_default())
    }

    fn putting(&self, target: TargetId, info: BlobInfo, payload: &Bytes) {
        self.with(target, |books| {
            let asked = Account { info, payload: payload.clone(), standing: Standing::Putting, since: 0 };
            let account = books.accounts.entry(info.id).or_insert(asked);
            if account.standing == Standing::Gone {
                (account.standing, account.payload) = (Standing::Putting, payload.clone());
            }
        });
    }

    fn settled(&self, target: TargetId, ids: &[BlobId], standing: Standing) {
        let now = self.handle.now();
        self.with(target, |books| {
            let since = books.answer(now);
            for id in ids {
                let Some(account) = books.accounts.get_mut(id) else { continue };
                (account.standing, account.since) = (standing, since);
                if standing == Standing::Gone {
                    account.payload = Bytes::new();
                }
            }
        });
    }

    fn deleting(&self, target: TargetId, ids: &[BlobId]) {
        self.with(target, |books| {
            for id in ids {
                match books.accounts.get_mut(id) {
                    Some(account) if account.standing != Standing::Gone => account.standing = Standing::Deleting,
                    _ => {}
                }
            }
        });
    }

    fn read(&self, target: TargetId, id: BlobId, offset: u32, found: &Bytes) {
        let wrong = self.with(target, |books| {
            let account = books.accounts.get(&id)?;
            let expected = account.payload.get(offset as usize..offset as usize + found.len())?;
            (expected != &found[..]).then(|| crate::content::difference(expected, found))
        });
        if let Some(wrong) = wrong {
            self.breach(target, &format!("blob {id} at {offset} reads wrong: {wrong}"));
        }
    }
}

/// A target whose books are kept.
struct Watched {
    target: LocalTarget,
    ledger: Rc<Ledger>,
}

impl Watched {
    /// What the node did not live to see answered is there whole or not at all.
    async fn look_at(&self, unanswered: Vec<BlobInfo>) {
        for info in unanswered {
            let read = self.get(info.id, 0, info.length).await;
            let sound = self.ledger.with(self.id(), |books| books.trust == Trust::Sound);
            if sound && read.is_err_and(|error| error.is_corrupt()) {
                self.ledger.breach(self.id(), &format!("{info:?} was being put at the crash and is there in part"));
            }
        }
    }

    /// Puts other bytes under an id that was put just now: that must be refused.
    async fn try_reuse(&self, info: &BlobInfo) {
        let other = Bytes::from_static(b"other bytes");
        let reused = self.target.put(info.id, info.kind, info.owner, info.geometry, other).await;
        if reused.is_ok() {
            self.ledger.breach(self.id(), &format!("{info:?} was put, and then other bytes under its id"));
        }
    }
}

impl BlobTarget for Watched {
    fn id(&self) -> TargetId {
        self.target.id()
    }

    fn put(
        &self,
        id: BlobId,
        kind: BlobKind,
        owner: Owner,
        geometry: ShardGeometry,
        payload: Bytes,
    ) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        async move {
            let info = BlobInfo { id, kind, owner, geometry, length: payload.len() as u32 };
            self.ledger.putting(self.id(), info, &payload);
            let outcome = self.target.put(id, kind, owner, geometry, payload).await;
            if outcome.is_ok() {
                self.ledger.settled(self.id(), &[id], Standing::Held);
                let due = self.ledger.with(self.id(), |books| books.appends.is_multiple_of(REUSE_TRIED_EVERY));
                if due && self.target.stat(id).is_some() {
                    self.try_reuse(&info).await;
                }
            }
            outcome
        }
        .boxed_local()
    }

    fn get(&self, id: BlobId, offset: u32, length: u32) -> LocalBoxFuture<'_, Result<Bytes, StoreError>> {
        async move {
            let outcome = self.target.get(id, offset, length).await;
            if let Ok(found) = &outcome {
                self.ledger.read(self.id(), id, offset, found);
            }
            outcome
        }
        .boxed_local()
    }

    fn delete(&self, ids: Vec<BlobId>) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        async move {
            self.ledger.deleting(self.id(), &ids);
            let outcome = self.target.delete(ids.clone()).await;
            if outcome.is_ok() {
                self.ledger.settled(self.id(), &ids, Standing::Gone);
            }
            outcome
        }
        .boxed_local()
    }

    fn stat(&self, id: BlobId) -> Option<BlobInfo> {
        self.target.stat(id)
    }

    fn is_being_deleted(&self, id: BlobId) -> bool {
        self.target.is_being_deleted(id)
    }

    fn list(&self, kind: BlobKind) -> Vec<BlobInfo> {
        self.target.list(kind)
    }

    fn shards(&self, from: ShardCursor) -> (Vec<BlobInfo>, Option<ShardCursor>) {
        self.target.shards(from)
    }

    fn free(&self) -> u64 {
        self.target.free()
    }

    fn space(&self) -> Space {
        self.target.space()
    }

    fn failure(&self) -> Option<String> {
        self.target.failure()
    }

    fn look_at_device(&self) {
        self.target.look_at_device();
    }

    fn take_damaged(&self) -> Vec<BlobInfo> {
        self.target.take_damaged()
    }

    fn scrub<'a>(
        &'a self,
        zones: Range<u32>,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&BlobInfo),
    ) -> LocalBoxFuture<'a, ()> {
        self.target.scrub(zones, pace, found)
    }

    fn check_structures<'a>(
        &'a self,
        zones: Range<u32>,
        mend: bool,
        pace: &'a dyn Fn() -> u64,
        found: &'a dyn Fn(&Flaw),
    ) -> LocalBoxFuture<'a, ()> {
        self.target.check_structures(zones, mend, pace, found)
    }
}
