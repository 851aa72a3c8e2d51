//! Grants, and what is kept under them: attributes, extents, directory entries.

use crate::Client;
use crate::calls::Answer;
use crate::files::OpenFile;
use crate::inode::{Inode, InodeState, WriteLease};
use crate::session::Session;
use crate::stamps::Stamp;
use cfs_reactor::Instant;
use cfs_wire::limits::MAPPED_PAGES_WAIT;
use cfs_wire::meta::{Attr, DirEntry, FileKind, Grant, MetaOp, MetaReply, Name};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, Timestamp};
use futures_util::future::{Either, LocalBoxFuture, select};
use std::rc::Rc;
use std::time::Duration;

/// For how long nobody else is told to keep names of a directory after another client changed it,
/// so that clients that change one directory together don't cost each other every name they know.
const CONTENDED: Duration = Duration::from_secs(5);

/// How long a change of another client waits for pages that are being written here.
const PAGES_WAIT: Duration = Duration::from_millis(20);
/// How long pages are not dropped because they are being written, for others may be written meanwhile.
const WRITES_WAIT: Duration = Duration::from_millis(500);

/// Drops copies that others (the kernel) keep of what this client told them.
pub trait Invalidator: 'static {
    /// Whether names may be kept at all: only by who can drop them while an operation on their
    /// directory is under way. Two clients that change one directory would else wait for each
    /// other's leases: each change for the other client to drop its names, and that for its change.
    fn keeps_names(&self) -> bool;

    /// Drops the names of all directories, at once.
    fn drop_names(&self);

    /// Drops attributes of `ino`, at once.
    fn drop_attributes(&self, ino: Ino);

    /// Drops attributes and pages of `ino`. Ends when nobody can see the old state any more. It
    /// waits for reads and writes of the file's pages, so those must not wait for it.
    fn invalidate(&self, ino: Ino) -> LocalBoxFuture<'static, ()>;
}

/// What another client changes an inode by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Changed {
    /// What a program asked for.
    ByProgram,
    /// Pages of a mapping, which it writes back.
    ByPages,
}

/// Attributes and for how long others may keep them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Located {
    pub attr: Attr,
    pub valid: Duration,
}

/// An entry of a directory, found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocatedEntry {
    pub attr: Attr,
    /// For how long the attributes may be kept.
    pub attr_valid: Duration,
    /// For how long it may be relied on that the name names this inode.
    pub entry_valid: Duration,
}

/// A name that does not exist, and for how long that may be relied on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Negative {
    pub valid: Duration,
}

/// Part of a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntries {
    pub entries: Vec<DirEntry>,
    pub end: bool,
    pub parent: Ino,
}

impl Client {
    pub(crate) fn inode(&self, ino: Ino) -> Rc<Inode> {
        if let Some(known) = self.known_inode(ino) {
            return known;
        }
        let inode = Inode::new(ino);
        self.inodes.borrow_mut().insert(ino, inode.clone());
        self.remembered();
        inode
    }

    pub(crate) fn known_inode(&self, ino: Ino) -> Option<Rc<Inode>> {
        self.inodes.borrow().get(&ino).cloned()
    }

    pub(crate) fn now(&self) -> Instant {
        self.handle.now()
    }

    fn live_session(&self) -> Option<Rc<Session>> {
        let session = self.session.borrow();
        session.is_live().then(|| session.clone())
    }

    /// Whether this client holds the inode's write lease, by its own clock.
    pub(crate) fn holds_lease(&self, inode: &Inode) -> bool {
        let Some(session) = self.live_session() else { return false };
        inode.state().lease == Some(WriteLease { session: session.id })
    }

    /// For how long what is cached of an inode may still be used.
    pub(crate) fn cache_left(&self, inode: &Inode) -> Duration {
        let Some(session) = self.live_session() else { return Duration::ZERO };
        let mut until = inode.state().granted_until.min(session.expires());
        if planted::is(Bug::ClientIgnoreExpiry) && inode.state().granted_until > Instant::default() {
            until = self.now() + session.lease;
        }
        until - self.now()
    }

    pub(crate) fn may_use_cache(&self, inode: &Inode) -> bool {
        self.holds_lease(inode) || !self.cache_left(inode).is_zero()
    }

    /// Whether an answer to a call of then tells what is still so: nothing that was told here changed it,
    /// and all changes were told.
    pub(crate) fn is_current(&self, inode: &Inode, stamp: Stamp) -> bool {
        self.stamps.unchanged_since(inode.ino, stamp) && stamp >= inode.state().granted_since
    }

    /// Takes a read grant in. Nothing is granted if the inode changed since the call began. That this
    /// client has the write lease is not learnt here: a read may tell of one that is just being
    /// given back.
    pub(crate) fn take_grant(&self, inode: &Inode, grant: Grant, session: &Session, sent: Instant, stamp: Stamp) {
        let current = self.session.borrow().id == session.id;
        let unchanged = self.stamps.unchanged_since(inode.ino, stamp) || planted::is(Bug::ClientKeepInvalidated);
        if !current || !unchanged {
            return;
        }
        if grant.read_ms == 0 {
            return;
        }
        let mut state = inode.state();
        if self.now() >= state.granted_until && state.lease.is_none() {
            // Between the old grant's end and when this was answered nobody told us of changes.
            state.drop_cached();
            state.granted_since = stamp;
            self.pages.borrow_mut().drop_inode(inode.ino);
        }
        state.granted_for = Duration::from_millis(grant.read_ms.into());
        let until = sent + state.granted_for;
        state.granted_until = state.granted_until.max(until);
    }

    /// Takes attributes with their grant; answers them with our own writes, and how long they
    /// may be kept.
    pub(crate) fn take_attr(&self, attr: &Attr, grant: Grant, answer: &Answer) -> Located {
        let inode = self.inode(attr.ino);
        let covered = self.holds_lease(&inode) || inode.state().granted_until > self.now();
        self.take_grant(&inode, grant, &answer.session, answer.sent, answer.stamp);
        if self.is_current(&inode, answer.stamp) {
            inode.state().see_version(attr.version, covered);
            inode.state().learn_attr(attr);
            return self.located(&inode).unwrap_or(Located { attr: attr.clone(), valid: Duration::ZERO });
        }
        // Not to be cached, but our own uncommitted writes belong to it all the same.
        // So do those of which the commit was answered meanwhile: what it told is newer than this.
        let mut state = inode.state();
        let known = state.attr.clone();
        if known.as_ref().is_none_or(|known| known.version <= attr.version) {
            state.attr = Some(attr.clone());
        }
        let local = state.local_attr();
        state.attr = known;
        Located { attr: local.unwrap_or_else(|| attr.clone()), valid: Duration::ZERO }
    }

    /// The attributes as they are known here.
    pub(crate) fn located(&self, inode: &Inode) -> Option<Located> {
        let left = self.cache_left(inode);
        let state = inode.state();
        let attr = state.local_attr()?;
        // What is dirty changes without a call from outside: allocation and times. And while
        // attributes may be kept, pages are not asked about.
        let changing = state.is_dirty() || self.pages_unsettled(&state);
        let valid = if changing { Duration::ZERO } else { left };
        Some(Located { attr, valid })
    }

    /// Whether others may have pages of an open file that are older than what is known here.
    fn pages_unsettled(&self, state: &InodeState) -> bool {
        state.opens > 0 && state.pages_version.is_none() && self.invalidator.borrow().is_some()
    }

    /// Whether others may go on using the pages they keep of a file that is being opened. If not,
    /// they drop them now.
    pub fn pages_are_current(&self, file: &OpenFile) -> bool {
        let covered = self.may_use_cache(&file.inode);
        let mut state = file.inode.state();
        let current = covered && state.pages_version.is_some();
        if !current {
            state.settle_pages(covered);
        }
        current
    }

    /// Attributes for who is about to use the pages it keeps, and drops them where size or
    /// modification time is another one than it knows. So where pages may be older, it is told a time
    /// that the file does not have, to be asked about again. To have the pages dropped meanwhile would not do: the
    /// kernel then takes what it is answered for outdated, the file's size too.
    pub async fn getattr_for_pages(self: &Rc<Self>, ino: Ino) -> Result<Located, Errno> {
        let stamp = self.stamps.now();
        let mut found = self.getattr(ino).await?;
        let Some(inode) = self.known_inode(ino) else { return Ok(found) };
        if found.attr.kind != FileKind::File || !self.pages_unsettled(&inode.state()) {
            return Ok(found);
        }
        let covered = self.may_use_cache(&inode) && self.stamps.unchanged_since(ino, stamp);
        inode.state().settle_pages(covered);
        found.attr.mtime = self.another_time(found.attr.mtime);
        found.valid = Duration::ZERO;
        Ok(found)
    }

    /// A time that differs from this one and from those given before, by less than a second.
    fn another_time(&self, time: Timestamp) -> Timestamp {
        let mut nanos = (self.times_given.get() + 1) % Timestamp::NANOS_PER_SEC;
        if nanos == time.nanos {
            nanos = (nanos + 1) % Timestamp::NANOS_PER_SEC;
        }
        self.times_given.set(nanos);
        Timestamp { nanos, ..time }
    }

    pub(crate) fn cached_attr(&self, ino: Ino) -> Option<Located> {
        let inode = self.known_inode(ino)?;
        if !self.may_use_cache(&inode) {
            return None;
        }
        self.located(&inode)
    }

    /// What a directory's cache says of a name: `None` if nothing.
    pub(crate) fn cached_entry(&self, dir: Ino, name: &Name) -> Option<Option<Ino>> {
        let inode = self.known_inode(dir)?;
        if self.cache_left(&inode).is_zero() {
            return None;
        }
        let state = inode.state();
        state.entries.get(name).copied()
    }

    /// Keeps an entry, or its absence, if the directory is granted and did not change since.
    pub(crate) fn keep_entry(&self, dir: Ino, name: &Name, ino: Option<Ino>, stamp: Stamp) {
        let inode = self.inode(dir);
        if !self.cache_left(&inode).is_zero() && self.is_current(&inode, stamp) {
            self.enter(&inode, name, ino);
        }
    }

    fn enter(&self, dir: &Inode, name: &Name, ino: Option<Ino>) {
        if dir.state().entries.insert(name.clone(), ino).is_none() {
            self.entries_kept.set(self.entries_kept.get() + 1);
            self.remembered();
        }
    }

    /// For how long others may keep an entry of a directory. They are taken at their word: the
    /// directory's names are dropped there when it changes.
    pub(crate) fn entry_left(&self, dir: Ino, name: &Name) -> Duration {
        let keeps_names = self.invalidator.borrow().as_ref().is_none_or(|invalidator| invalidator.keeps_names());
        let Some(inode) = self.known_inode(dir) else { return Duration::ZERO };
        let (now, left) = (self.now(), self.cache_left(&inode));
        let mut state = inode.state();
        // What could not be kept here changed since it was asked for.
        if !keeps_names || state.contended_until > now || !state.entries.contains_key(name) {
            return Duration::ZERO;
        }
        state.names_given_until = state.names_given_until.max(now + left);
        left
    }

    /// A change of our own to an entry, asked for then: what was cached of it is replaced, and the
    /// directory's attributes are asked for again. Where changes of others since then may not have been
    /// told here, the name may stand for something else by now.
    pub(crate) fn entry_changed(&self, dir: Ino, name: &Name, now: Option<Ino>, stamp: Stamp) {
        let inode = self.inode(dir);
        self.stamps.changed(dir);
        let kept = !self.cache_left(&inode).is_zero() && stamp >= inode.state().granted_since;
        inode.state().attr = None;
        inode.state().entries.remove(name);
        if kept {
            self.enter(&inode, name, now);
        }
    }

    /// A change of our own to an inode's attributes that the reply does not tell.
    pub(crate) fn attr_changed(&self, ino: Ino) {
        self.stamps.changed(ino);
        if let Some(inode) = self.known_inode(ino) {
            inode.state().attr = None;
        }
    }

    /// Someone else changes the inode: drops what is cached here and elsewhere. What was stored to mappings
    /// is written back before; the server lets that pass. Pages that programs are writing are waited for
    /// `PAGES_WAIT` only: the write may itself wait for the change. Who uses them before they are gone asks
    /// for attributes first, and drops them then. So it is where both clients write pages back: what two
    /// mappings store to one page overwrites each other anyway.
    pub(crate) async fn invalidate(self: &Rc<Self>, ino: Ino, by: Changed) {
        if planted::is(Bug::ClientKeepInvalidated) {
            return;
        }
        self.stamps.changed(ino);
        let (mut names_given, mut within) = (false, PAGES_WAIT);
        if let Some(inode) = self.known_inode(ino) {
            let now = self.now();
            let mut state = inode.state();
            names_given = state.take_names_given(now);
            if names_given || state.contended_until > now {
                state.contended_until = now + CONTENDED;
            }
            state.pages_version = None;
            state.drop_cached();
            // Changes of our own, truncations too, keep pages from being written back until they are answered.
            let own_change = by == Changed::ByPages && inode.order.available() == 0;
            if state.mappable > 0 && !own_change && !state.has_writes_in_the_way_of(by) {
                within = MAPPED_PAGES_WAIT;
            }
        }
        self.pages.borrow_mut().drop_inode(ino);
        self.drop_pages(ino, names_given, within).await;
    }

    /// Has others drop what they keep of an inode, and waits so long for it.
    pub(crate) async fn drop_pages(self: &Rc<Self>, ino: Ino, names_given: bool, within: Duration) {
        let client = self.clone();
        let told = self.handle.spawn(async move { client.tell_invalidator(ino, names_given).await });
        if let Either::Right(_) = select(told, Box::pin(self.handle.sleep(within))).await {
            tracing::debug!(%ino, "pages are still being written");
        }
    }

    /// Has others drop what they keep of an inode, and of names where some were given to them.
    pub(crate) async fn tell_invalidator(&self, ino: Ino, names_given: bool) {
        let Some(invalidator) = self.invalidator.borrow().clone() else { return };
        if names_given {
            invalidator.drop_names();
        }
        invalidator.drop_attributes(ino);
        self.writes_answered(ino).await;
        let Some(inode) = self.known_inode(ino) else { return invalidator.invalidate(ino).await };
        // Of what is read from now on none goes with these pages.
        inode.state().ungranted_pages = false;
        inode.state().pages_read = false;
        inode.state().page_drops += 1;
        invalidator.invalidate(ino).await;
        inode.state().page_drops -= 1;
    }

    /// Waits for the writes that hold the inode's pages, as long as they may well take: a thread
    /// that waits for them in the kernel cannot be killed.
    async fn writes_answered(&self, ino: Ino) {
        let Some(inode) = self.known_inode(ino) else { return };
        let deadline = self.now() + WRITES_WAIT;
        loop {
            let ended = self.writes_ended.notified();
            let left = deadline - self.now();
            if inode.state().writes_under_way == 0 || left.is_zero() {
                return;
            }
            select(ended, Box::pin(self.handle.sleep(left))).await;
        }
    }

    /// The inode's attributes, from the cache where that is allowed.
    pub async fn getattr(self: &Rc<Self>, ino: Ino) -> Result<Located, Errno> {
        if let Some(located) = self.cached_attr(ino) {
            return Ok(located);
        }
        loop {
            let answer = self.read_call(MetaOp::GetAttr { ino }).await?;
            let MetaReply::Attr { attr, grant } = &answer.reply else { return Err(unexpected(&answer.reply)) };
            let located = self.take_attr(attr, *grant, &answer);
            if !self.lacks_commit(attr) {
                return Ok(located);
            }
        }
    }

    /// Whether attributes are of before a commit of ours that was answered while they were on their way.
    /// Nobody must be told them: what was written is no longer added to them.
    pub(crate) fn lacks_commit(&self, attr: &Attr) -> bool {
        self.known_inode(attr.ino).is_some_and(|inode| attr.version < inode.state().committed_version)
    }
}

/// The server answered something else than was asked: a bug on one side.
pub(crate) fn unexpected(reply: &MetaReply) -> Errno {
    tracing::error!(?reply, "the server answered something else than was asked");
    Errno::EIO
}
