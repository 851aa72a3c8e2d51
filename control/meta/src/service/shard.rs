//! What the leader of a shard keeps in memory, all of it rebuilt when leading begins.

use super::applied::Applied;
use super::config::ShardHandle;
use super::locks::LockQueues;
use super::names::Names;
use super::readers::{Readers, Recall};
use crate::state::{Reader, TxnId};
use cfs_reactor::Instant;
use cfs_reactor::sync::Notify;
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Ino, SessionId, ShardId};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

pub(super) struct Shard {
    pub id: ShardId,
    view: Rc<dyn Fn() -> Rc<dyn Reader>>,
    pub applied: Rc<Applied>,
    /// The term for which all below was built; `None` while not ready to serve.
    pub serving: Cell<Option<u64>>,
    pub serving_changed: Rc<Notify>,
    /// Somebody wants the shard taken up.
    pub wanted: Rc<Notify>,
    /// Sessions with a live record.
    pub known: RefCell<BTreeSet<SessionId>>,
    pub fenced: RefCell<BTreeSet<SessionId>>,
    /// Those of the fenced from which not everything has been taken.
    pub dispossessing: RefCell<BTreeSet<SessionId>>,
    pub names: Rc<Names>,
    pub locks: LockQueues,
    /// Inodes in shared mode, and until when.
    pub contended: RefCell<BTreeMap<Ino, Instant>>,
    /// Write leases being asked for, and by whom.
    pub acquiring: RefCell<BTreeMap<Ino, SessionId>>,
    /// Recalls that last from a prepare to the transaction's end.
    pub prepared: RefCell<BTreeMap<TxnId, Recall>>,
    /// When the last sweep was.
    pub swept: Cell<Instant>,
    pub reaping: RefCell<BTreeSet<Ino>>,
}

impl Shard {
    pub fn new(handle: ShardHandle) -> Shard {
        Shard {
            id: handle.shard,
            view: handle.view,
            applied: handle.applied,
            serving: Cell::new(None),
            serving_changed: Notify::new(),
            wanted: Notify::new(),
            known: RefCell::default(),
            fenced: RefCell::default(),
            dispossessing: RefCell::default(),
            names: Names::new(),
            locks: LockQueues::default(),
            contended: RefCell::default(),
            acquiring: RefCell::default(),
            prepared: RefCell::default(),
            swept: Cell::default(),
            reaping: RefCell::default(),
        }
    }

    /// The applied state as it is now; it stays so while it is looked at.
    pub fn view(&self) -> Rc<dyn Reader> {
        (self.view)()
    }

    pub fn readers(&self) -> &Readers {
        self.applied.readers()
    }

    pub fn knows(&self, session: SessionId) -> bool {
        let fenced = || self.fenced.borrow().contains(&session);
        self.known.borrow().contains(&session) || (fenced() && planted::is(Bug::MetaSkipFencing))
    }

    /// Whether there is anything of a session here that fencing takes.
    pub fn is_concerned(&self, session: SessionId) -> bool {
        self.knows(session) || self.dispossessing.borrow().contains(&session)
    }

    /// Whether nobody but this session talks to the shard, or may still serve what it was given
    /// by it: then nothing needs recalling.
    pub fn is_alone(&self, session: SessionId) -> bool {
        let known = self.known.borrow();
        let one = known.len() == 1 && known.contains(&session);
        one && self.dispossessing.borrow().is_empty() && !self.readers().has_other(session)
    }

    /// The session is gone for good, its record closed or fenced.
    pub fn forget(&self, session: SessionId) {
        self.shut_out(session);
        self.readers().forget(session);
    }

    /// The session was fenced and does not know: its read leases go on until they are over.
    pub fn shut_out(&self, session: SessionId) {
        self.known.borrow_mut().remove(&session);
        self.locks.forget(session);
    }
}
