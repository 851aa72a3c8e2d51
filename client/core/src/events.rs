//! What the server wants of this client, and what happens when it gives the session up.
//!
//! One long poll is always held; each is a heartbeat. Events are carried out in tasks of their
//! own, so that a slow flush never holds up the next heartbeat, and each is acknowledged when it has been.

use crate::Client;
use crate::cache::Changed;
use crate::calls::{self, NotMounted};
use crate::inode::Inode;
use crate::link::LinkError;
use crate::session::Session;
use crate::write::LEASE_DENIED;
use bytes::Bytes;
use cfs_reactor::clock::Instant;
use cfs_reactor::sync::Notify;
use cfs_wire::limits::{MAPPED_PAGES_WAIT, RENEWALS_MAX};
use cfs_wire::meta::{Event, EventsCall, EventsReply, MetaError, MetaOp, OP_EVENTS};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Errno, Ino, body};
use futures_util::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// Between attempts when the server does not answer at all.
const POLL_PAUSE: Duration = Duration::from_millis(100);
/// An outage as long as this is told of: programs have begun to hang by then.
const OUTAGE_TOLD_AFTER: Duration = Duration::from_secs(5);

/// The server has not answered since then.
#[derive(Clone, Copy)]
pub(crate) struct Outage {
    since: Instant,
    told: bool,
}

/// Which events of a session are under way and which were carried out.
#[derive(Default)]
struct Progress {
    /// Every event up to here was carried out.
    acknowledged: Cell<u64>,
    running: RefCell<BTreeSet<u64>>,
    done: RefCell<BTreeSet<u64>>,
    /// The highest number seen.
    seen: Cell<u64>,
    advanced: Rc<Notify>,
}

impl Client {
    pub(crate) fn spawn_events(self: &Rc<Self>) {
        let client = self.clone();
        self.handle.spawn(async move { client.follow_events().await });
    }

    async fn follow_events(self: Rc<Self>) {
        while !self.closed.get() {
            let session = self.session.borrow().clone();
            if session.is_fenced() {
                let replaced = self.session_replaced.notified();
                if self.session.borrow().is_fenced() {
                    replaced.await;
                }
                continue;
            }
            self.follow_session(&session).await;
        }
    }

    /// Polls until the session ends.
    async fn follow_session(self: &Rc<Self>, session: &Rc<Session>) {
        // Whoever opened the session was answered.
        self.answered();
        let progress = Rc::new(Progress::default());
        while !session.is_fenced() && !self.closed.get() {
            let advanced = progress.advanced.notified();
            let (client, polled, under_way) = (self.clone(), session.clone(), progress.clone());
            let poll = self.handle.spawn(async move { client.poll_events(&polled, &under_way).await });
            // An acknowledgement is sent at once: a new poll ends the one that is held.
            match select(poll, advanced).await {
                Either::Left((Ok(true), _)) | Either::Right(_) => {}
                Either::Left(_) => self.handle.sleep(POLL_PAUSE).await,
            }
        }
    }

    /// One poll. False if it was not answered.
    async fn poll_events(self: &Rc<Self>, session: &Rc<Session>, progress: &Rc<Progress>) -> bool {
        // A third: two polls may be lost before the lease is.
        let hold = session.lease / 3;
        let call = EventsCall {
            session: session.id,
            acknowledged: progress.acknowledged.get(),
            done: progress.done.borrow().iter().copied().take(RENEWALS_MAX).collect(),
            hold_ms: u32::try_from(hold.as_millis()).unwrap_or(u32::MAX),
        };
        let Ok(encoded) = body::encode(&call) else { return false };
        let sent = self.now();
        let timeout = hold + session.lease / 6;
        let message = match self.event_link.call(OP_EVENTS, encoded, Bytes::new(), timeout).await {
            Ok(message) => message,
            Err(error) => {
                self.unanswered(sent + hold, &error);
                return false;
            }
        };
        self.answered();
        match body::decode::<Result<EventsReply, MetaError>>(&message.body) {
            Ok(Ok(reply)) if reply.alive => {
                session.renewed(sent);
                self.start_events(session, progress, reply);
                true
            }
            Ok(Ok(_) | Err(MetaError::Fenced)) => {
                self.fence(session);
                true
            }
            Ok(Err(_)) => false,
            Err(error) => {
                tracing::error!(%error, "the server's answer is malformed");
                false
            }
        }
    }

    fn answered(&self) {
        if self.outage.take().is_some_and(|outage| outage.told) {
            tracing::warn!(address = %self.meta.address(), "the server answers again");
        }
    }

    /// A poll got no answer, which was to come by that time, unless its connection broke before.
    fn unanswered(&self, due: Instant, error: &LinkError) {
        let now = self.handle.now();
        let mut outage = self.outage.get().unwrap_or(Outage { since: due.min(now), told: false });
        if !outage.told && now - outage.since >= OUTAGE_TOLD_AFTER && !self.closed.get() {
            let (address, window) = (self.meta.address(), self.config.retry_window);
            tracing::warn!(%address, ?window, %error, "the server does not answer: programs wait for so long or twice");
            outage.told = true;
        }
        self.outage.set(Some(outage));
    }

    fn start_events(self: &Rc<Self>, session: &Rc<Session>, progress: &Rc<Progress>, reply: EventsReply) {
        for (number, event) in reply.events {
            let known = number <= progress.acknowledged.get()
                || progress.done.borrow().contains(&number)
                || !progress.running.borrow_mut().insert(number);
            if known {
                continue;
            }
            progress.seen.set(progress.seen.get().max(number));
            let ino = match event {
                Event::Invalidate { ino } | Event::RecallWrite { ino } | Event::InvalidateForPages { ino } => ino,
            };
            // At once, so that no reply that is just being handled is cached past it.
            self.stamps.changed(ino);
            let (client, session, progress) = (self.clone(), session.clone(), progress.clone());
            self.handle.spawn(async move {
                match event {
                    Event::Invalidate { ino } => client.invalidate(ino, Changed::ByProgram).await,
                    Event::InvalidateForPages { ino } => client.invalidate(ino, Changed::ByPages).await,
                    Event::RecallWrite { ino } => client.recalled(ino, &session).await,
                }
                progress.finish(number);
            });
        }
    }

    /// The server wants the write lease back.
    async fn recalled(self: &Rc<Self>, ino: Ino, session: &Rc<Session>) {
        let inode = self.inode(ino);
        if inode.state().mappable > 0 {
            // What a program stored to a mapping is written while it can still be kept under the lease, under
            // which no write waits for the change.
            self.drop_pages(ino, false, MAPPED_PAGES_WAIT).await;
        }
        let turn = inode.order.acquire(1).await;
        // From here on writes wait for the turn: nothing that is kept comes in any more.
        inode.state().lease = None;
        inode.state().lease_denied_until = self.now() + LEASE_DENIED;
        if !planted::is(Bug::ClientReturnLeaseDirty) {
            self.write_kept(&inode).await;
        }
        self.return_lease(&inode, session).await;
        drop(turn);
        self.invalidate(ino, Changed::ByProgram).await;
    }

    /// Tells the server that nothing dirty is left; called in turn, the lease already dropped.
    pub(crate) async fn return_lease(self: &Rc<Self>, inode: &Inode, session: &Rc<Session>) {
        let (outcome, _) = self.change_in(session, MetaOp::ReturnLease { ino: inode.ino }).await;
        if let Err(error) = outcome {
            tracing::debug!(ino = %inode.ino, ?error, "a write lease could not be returned");
        }
    }

    /// The session is over: what it cached and what it had written are void. Files that were
    /// open report the loss once; a new session takes over.
    pub(crate) fn fence(self: &Rc<Self>, session: &Rc<Session>) {
        if !session.set_fenced() {
            return;
        }
        tracing::error!(session = %session.id, "the server has given up this client's session");
        self.stamps.all_changed();
        self.forget_reservation();
        let inodes: Vec<Rc<Inode>> = self.inodes.borrow().values().cloned().collect();
        let mut told = Vec::new();
        for inode in inodes {
            let mut state = inode.state();
            if state.is_dirty() && !planted::is(Bug::ClientKeepFencedData) {
                let (bytes, charge) = state.discard_dirty();
                self.charge(charge, 0);
                if !planted::is(Bug::ClientHideLoss) {
                    state.fail(Errno::EIO);
                    self.has_lost.set(true);
                }
                self.dirty_inodes.borrow_mut().remove(&inode.ino);
                self.dirty_less(bytes);
            }
            if !state.lock_owners.is_empty() {
                let lost = std::mem::take(&mut state.lock_owners);
                state.locks_lost.extend(lost);
                state.fail(Errno::EIO);
            }
            // Pages that were stored to before are as void as what was written.
            state.pages_void |= state.mappable > 0 && !planted::is(Bug::ClientKeepFencedData);
            state.lease = None;
            state.held = None;
            state.commit_sequence = 0;
            told.push((inode.ino, state.take_names_given(self.now())));
            state.pages_version = None;
            state.drop_cached();
            self.pages.borrow_mut().drop_inode(inode.ino);
        }
        if let Some(invalidator) = self.invalidator.borrow().as_ref() {
            if told.iter().any(|(_, names_given)| *names_given) {
                invalidator.drop_names();
            }
            told.iter().for_each(|(ino, _)| invalidator.drop_attributes(*ino));
        }
        // Pages that are being read or written are dropped when that ends, which takes a new session.
        let client = self.clone();
        self.handle.spawn(async move {
            for (ino, _) in told {
                client.tell_invalidator(ino, false).await;
                client.let_go_of_void_pages(ino).await;
            }
        });
        let client = self.clone();
        self.handle.spawn(async move { client.replace_session().await });
    }

    /// The kernel keeps a page that it could not write back. It goes when it is dropped again.
    async fn let_go_of_void_pages(self: &Rc<Self>, ino: Ino) {
        let Some(inode) = self.known_inode(ino) else { return };
        if inode.state().pages_void {
            self.tell_invalidator(ino, false).await;
            inode.state().pages_void = false;
        }
    }

    async fn replace_session(self: &Rc<Self>) {
        let session = loop {
            if self.closed.get() {
                return;
            }
            match calls::mount(&self.meta, &self.handle, &self.config).await {
                Ok(session) => break session,
                Err(failed) => {
                    if let NotMounted::Refused(error) = failed {
                        tracing::error!(%error, "no new session");
                    }
                    self.handle.sleep(Duration::from_millis(500)).await;
                }
            }
        };
        *self.session.borrow_mut() = session;
        self.session_replaced.notify_all();
        let inodes: Vec<Rc<Inode>> = self.inodes.borrow().values().cloned().collect();
        for inode in inodes {
            let open = inode.state().opens > 0;
            if open && let Err(errno) = self.hold(&inode).await {
                tracing::debug!(ino = %inode.ino, %errno, "an open file is gone");
            }
        }
    }
}

impl Progress {
    fn finish(&self, number: u64) {
        self.running.borrow_mut().remove(&number);
        self.done.borrow_mut().insert(number);
        // Events come in order and without gaps, so what is not running is done.
        let upto = match self.running.borrow().first() {
            Some(first) => first.saturating_sub(1),
            None => self.seen.get(),
        };
        if upto > self.acknowledged.get() {
            self.acknowledged.set(upto);
            self.done.borrow_mut().retain(|done| *done > upto);
        }
        self.advanced.notify_all();
    }
}
