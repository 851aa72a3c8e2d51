//! One inode as this client knows it.

use crate::cache::Changed;
use crate::dirty::{DirtyMap, Frozen, frozen_bytes, frozen_end};
use crate::extents::ExtentCache;
use crate::stamps::Stamp;
use cfs_reactor::Instant;
use cfs_reactor::sync::Semaphore;
use cfs_wire::meta::{Attr, FileKind, LockFamily, Name};
use cfs_wire::{Errno, Ino, Policy, SessionId, Timestamp};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

pub(crate) struct Inode {
    pub ino: Ino,
    /// One permit: commits, truncations and other changes of the inode, one after the other.
    pub order: Rc<Semaphore>,
    /// One permit: `Open` and `Release`, one after the other.
    pub hold_order: Rc<Semaphore>,
    state: RefCell<InodeState>,
}

/// The write lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WriteLease {
    pub session: SessionId,
}

/// Failures to write back. Each file that was open reports the last one once, and so does the next
/// that is opened if none has: programs close a file and open it again to fsync it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Failures {
    pub count: u64,
    pub last: Option<Errno>,
    pub unseen: bool,
}

/// How the bytes were written that are not committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Written {
    /// The last of them.
    pub at: Option<Timestamp>,
    pub kill_privileges: bool,
    pub drop_capability: bool,
}

/// Whoever locks are granted to.
pub(crate) type LockOwner = (LockFamily, u64);

pub(crate) struct InodeState {
    /// The server's attributes; believed while granted or leased.
    pub attr: Option<Attr>,
    /// Until when attributes, extents, pages and (of a directory) entries may be used.
    pub granted_until: Instant,
    /// The call whose answer began the grant that has been renewed since without a gap: what was asked
    /// before it may have changed without our being told.
    pub granted_since: Stamp,
    /// For how long the grant was given last.
    pub granted_for: Duration,
    pub lease: Option<WriteLease>,
    /// Another client has it: don't ask again before this.
    pub lease_denied_until: Instant,
    pub dirty: DirtyMap,
    pub flushing: Option<Rc<Frozen>>,
    /// What `dirty` and `flushing` are charged for of what the client has reserved; nothing where the
    /// write is not answered before they are stored.
    pub dirty_charge: u64,
    pub flushing_charge: u64,
    pub dirty_since: Instant,
    pub written: Written,
    /// Of the last commit that was acknowledged.
    pub commit_sequence: u64,
    /// What that commit made of the inode: attributes of before it lack bytes that nobody here adds any
    /// more.
    pub committed_version: u64,
    /// Of a file; it never changes, so it outlives the attributes it came with.
    pub policy: Option<Policy>,
    pub extents: ExtentCache,
    /// Of which version the pages are that others (the kernel) keep of a file; `None` if some may be
    /// older than what is known here.
    pub pages_version: Option<u64>,
    /// Pages that others (the kernel) keep were stored to in a session that was fenced: they are not to be
    /// written back.
    pub pages_void: bool,
    /// Such pages were read without a grant since they were dropped last.
    pub ungranted_pages: bool,
    /// Such pages were read at all since then.
    pub pages_read: bool,
    /// How often they are just being dropped.
    pub page_drops: u32,
    /// It is being asked whether they are current.
    pub settling: bool,
    /// A directory's entries: `None` where a name is known to be absent.
    pub entries: BTreeMap<Name, Option<Ino>>,
    /// Until when others may keep entries that they were told.
    pub names_given_until: Instant,
    /// Another client changes the directory too: nobody else is to keep entries until then.
    pub contended_until: Instant,
    pub opens: u32,
    /// Those of them through which the file may be mapped and stored to.
    pub mappable: u32,
    /// Writes that were begun and not answered: whoever keeps pages has these locked.
    pub writes_under_way: u32,
    /// Those of them that write pages of mappings back.
    pub page_writes_under_way: u32,
    /// Who of this client's programs holds locks here.
    pub lock_owners: BTreeSet<LockOwner>,
    /// Whose locks went with a session that was fenced, until they are given up: others may have changed
    /// the file under theirs.
    pub locks_lost: BTreeSet<LockOwner>,
    /// The session that registered an open-file hold.
    pub held: Option<SessionId>,
    pub last_close: Instant,
    pub failures: Failures,
    /// A background flush is under way.
    pub flush_spawned: bool,
    /// The last name is gone: nothing needs to be written back once it is closed.
    pub unlinked: bool,
}

impl Inode {
    pub fn new(ino: Ino) -> Rc<Inode> {
        let state = InodeState {
            attr: None,
            granted_until: Instant::default(),
            granted_since: Stamp::default(),
            granted_for: Duration::ZERO,
            lease: None,
            lease_denied_until: Instant::default(),
            dirty: DirtyMap::default(),
            flushing: None,
            dirty_charge: 0,
            flushing_charge: 0,
            dirty_since: Instant::default(),
            written: Written::default(),
            commit_sequence: 0,
            committed_version: 0,
            policy: None,
            extents: ExtentCache::default(),
            pages_version: None,
            pages_void: false,
            ungranted_pages: false,
            pages_read: false,
            page_drops: 0,
            settling: false,
            entries: BTreeMap::new(),
            names_given_until: Instant::default(),
            contended_until: Instant::default(),
            opens: 0,
            mappable: 0,
            writes_under_way: 0,
            page_writes_under_way: 0,
            lock_owners: BTreeSet::new(),
            locks_lost: BTreeSet::new(),
            held: None,
            last_close: Instant::default(),
            failures: Failures::default(),
            flush_spawned: false,
            unlinked: false,
        };
        let inode = Inode { ino, order: Semaphore::new(1), hold_order: Semaphore::new(1), state: RefCell::new(state) };
        Rc::new(inode)
    }

    /// The state, for the length of one statement or block without an await.
    pub fn state(&self) -> std::cell::RefMut<'_, InodeState> {
        self.state.borrow_mut()
    }
}

impl InodeState {
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || self.flushing.is_some()
    }

    /// Bytes that wait for their commit.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty.bytes() + self.flushing.as_ref().map_or(0, |frozen| frozen_bytes(frozen))
    }

    /// Where written bytes end that are not committed.
    pub fn dirty_end(&self) -> u64 {
        self.dirty.end().max(self.flushing.as_ref().map_or(0, |frozen| frozen_end(frozen)))
    }

    /// The attributes with our own uncommitted writes.
    pub fn local_attr(&self) -> Option<Attr> {
        let mut attr = self.attr.clone()?;
        if self.is_dirty() {
            attr.size = attr.size.max(self.dirty_end());
            // What will be allocated is not known before the commit; too much is the safer
            // guess, since a file with too little looks sparse to programs.
            attr.allocated = attr.allocated.saturating_add(self.dirty_bytes() as u64);
            if let Some(time) = self.written.at {
                attr.mtime = time;
                // As the commit will set it.
                attr.ctime = time.not_before(attr.ctime);
            }
            if self.written.kill_privileges {
                attr.mode = without_privileges(attr.mode);
            }
        }
        Some(attr)
    }

    /// Takes the server's attributes unless newer ones are here.
    pub fn learn_attr(&mut self, attr: &Attr) {
        if attr.kind == FileKind::File {
            self.policy = Some(attr.policy);
        }
        if self.attr.as_ref().is_none_or(|known| known.version <= attr.version) {
            self.attr = Some(attr.clone());
        }
    }

    /// Forgets attributes of before a version.
    pub fn forget_attr_before(&mut self, version: u64) {
        self.attr.take_if(|known| known.version < version);
    }

    /// Sees a version of the inode. `covered`: since the last one was seen, nobody changed the inode
    /// without our being told.
    pub fn see_version(&mut self, version: u64, covered: bool) {
        self.pages_version = self.pages_version.filter(|known| covered || *known == version).map(|_| version);
    }

    /// Others keep no pages any more, or such as were read just now. `covered`: changes from now on
    /// are told.
    pub fn settle_pages(&mut self, covered: bool) {
        self.pages_version = self.attr.as_ref().filter(|_| covered).map(|attr| attr.version);
    }

    /// Whether there are writes under way that may themselves wait for another client's change.
    pub fn has_writes_in_the_way_of(&self, change: Changed) -> bool {
        let of_programs = self.writes_under_way > self.page_writes_under_way;
        of_programs || (change == Changed::ByPages && self.page_writes_under_way > 0)
    }

    /// Whether others may keep pages that were not read under a grant.
    pub fn pages_unsure(&self) -> bool {
        self.ungranted_pages || self.page_drops > 0
    }

    /// Forgets everything that a grant or a lease allowed to keep. Dirty data stays.
    pub fn drop_cached(&mut self) {
        self.granted_until = Instant::default();
        self.attr = None;
        self.extents.clear();
        self.entries.clear();
    }

    /// Whether others may still keep entries of this directory; they are about to be told to drop
    /// them.
    pub fn take_names_given(&mut self, now: Instant) -> bool {
        std::mem::take(&mut self.names_given_until) > now
    }

    /// Whether nothing may be written because a lock was lost that a program goes by.
    pub fn check_locks(&self) -> Result<(), Errno> {
        if self.locks_lost.is_empty() { Ok(()) } else { Err(Errno::EIO) }
    }

    /// An owner has no locks here any more.
    pub fn forget_locks(&mut self, owner: LockOwner) {
        self.lock_owners.remove(&owner);
        self.locks_lost.remove(&owner);
    }

    /// Records a failure to write back: each open file reports it once.
    pub fn fail(&mut self, errno: Errno) {
        self.failures = Failures { count: self.failures.count + 1, last: Some(errno), unseen: true };
    }

    /// Drops what is dirty; answers how many bytes, and what they were charged for.
    pub fn discard_dirty(&mut self) -> (usize, u64) {
        let bytes = self.dirty_bytes();
        let charge = std::mem::take(&mut self.dirty_charge) + std::mem::take(&mut self.flushing_charge);
        self.dirty = DirtyMap::default();
        self.flushing = None;
        self.written = Written::default();
        (bytes, charge)
    }
}

/// setuid goes; setgid goes where it means "run as the group".
pub(crate) fn without_privileges(mode: u32) -> u32 {
    let setgid = if mode & 0o010 != 0 { 0o2000 } else { 0 };
    mode & !(0o4000 | setgid)
}
