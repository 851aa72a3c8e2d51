//! Room at the server that is reserved for written bytes which are kept here.
//!
//! Bytes are kept unwritten only where what they can take at most is covered by what the server has
//! reserved. More is asked for ahead, so that writes don't wait for it. What a kept byte takes goes off
//! when it is stored, here and at the server; a call whose answer is lost may have taken it too.

use crate::Client;
use crate::inode::Inode;
use bytes::Bytes;
use cfs_reactor::Instant;
use cfs_wire::data::{Claim, DataError, OP_RESERVE, ReserveCall, ReserveReply};
use cfs_wire::planted::{self, Bug};
use cfs_wire::{Policy, SessionId, body};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Where there is nothing to be had, it is not asked for again before this; and where there is less than
/// was wanted, what is not used any more is given back after it.
const SCARCE_PAUSE: Duration = Duration::from_secs(1);
/// A reservation is renewed when this part of its time is over: two calls may be lost before it is.
const RENEWED_AFTER: u32 = 3;

/// What storing and committing an inode's bytes takes beyond them, at most: pages that are filled in
/// part, headers, a segment's registration and the entries of the log.
const INODE_BYTES: u64 = 16 << 10;
/// The same for each run: its extent, and what refers to it.
const RUN_BYTES: u64 = 1 << 10;
/// The same for each 64 KiB, which are a chunk of their own: this part of them.
const CHUNK_PART: u64 = 16;

/// What kept bytes can take of a target.
pub(crate) fn footprint(bytes: usize, runs: usize) -> u64 {
    if runs == 0 {
        return 0;
    }
    let bytes = bytes as u64;
    bytes + bytes / CHUNK_PART + INODE_BYTES + runs as u64 * RUN_BYTES
}

/// What one more write can add to that: it may cut a run in two.
pub(crate) fn footprint_of_write(bytes: usize) -> u64 {
    footprint(bytes, 3)
}

/// One client's.
pub(crate) struct Reservation {
    session: SessionId,
    /// Bytes that the server keeps free, less what was used up.
    held: u64,
    /// Of these: for what is kept.
    charged: u64,
    /// Taken out of `held` for calls that are not answered.
    under_way: u64,
    expires: Instant,
    /// The widest it was asked for.
    policy: Policy,
    number: u64,
    asked: Instant,
    lifetime: Duration,
    /// What there was after the last answer.
    full: u64,
    /// The server gave less than was wanted.
    scarce: bool,
    /// It gave nothing, or no answer.
    refused: bool,
    used: Instant,
    renewing: bool,
}

impl Reservation {
    pub fn new(policy: Policy) -> Reservation {
        Reservation {
            session: SessionId::default(),
            held: 0,
            charged: 0,
            under_way: 0,
            expires: Instant::default(),
            policy,
            number: 0,
            asked: Instant::default(),
            lifetime: Duration::ZERO,
            full: 0,
            scarce: false,
            refused: false,
            used: Instant::default(),
            renewing: false,
        }
    }

    /// What nothing is kept for yet.
    fn left(&self) -> u64 {
        self.held.saturating_sub(self.charged)
    }

    fn covers(&self, now: Instant, policy: Policy, bytes: u64) -> bool {
        now < self.expires && policy.total() <= self.policy.total() && self.left() >= bytes
    }

    /// Whether asking may help.
    fn may_ask(&self, now: Instant) -> bool {
        !self.refused || now.saturating_since(self.asked) >= SCARCE_PAUSE
    }

    fn call(&mut self, now: Instant, session: SessionId, policy: Policy, wanted: u64) -> ReserveCall {
        if self.session != session {
            (self.session, self.held, self.under_way) = (session, 0, 0);
        }
        if now >= self.expires {
            // What is kept is kept all the same.
            self.held = self.held.min(self.charged);
        }
        if policy.total() > self.policy.total() {
            self.policy = policy;
        }
        if wanted == 0 {
            self.held = 0;
        }
        self.number += 1;
        self.asked = now;
        let held = self.held + self.under_way;
        ReserveCall { session, number: self.number, policy: self.policy, held, wanted }
    }

    fn answered(&mut self, call: &ReserveCall, reply: Option<&ReserveReply>) {
        if (self.session, self.number) != (call.session, call.number) {
            return;
        }
        let Some(reply) = reply else {
            self.refused = true;
            return;
        };
        self.refused = reply.granted == 0 && call.held < call.wanted;
        self.held = self.held.saturating_add(reply.granted);
        self.full = self.held;
        self.scarce = call.held.saturating_add(reply.granted) < call.wanted;
        self.lifetime = Duration::from_millis(reply.lifetime_ms.into());
        self.expires = self.asked + self.lifetime;
    }

    fn is_due(&self, now: Instant) -> bool {
        now.saturating_since(self.asked) >= (self.lifetime / RENEWED_AFTER).max(SCARCE_PAUSE)
    }

    /// Nothing is kept any more, and others may need it.
    fn is_idle(&self, now: Instant) -> bool {
        self.scarce && self.charged == 0 && self.held > 0 && now.saturating_since(self.used) >= SCARCE_PAUSE
    }
}

/// What one `store` may use up, until it is answered. A call that is given up may have been carried out.
pub(crate) struct Claimed<'a> {
    reservation: &'a RefCell<Reservation>,
    pub claim: Claim,
}

impl Claimed<'_> {
    /// The call was answered, and took nothing.
    pub fn give_back(&mut self) {
        let mut reservation = self.reservation.borrow_mut();
        if reservation.session == self.claim.session {
            reservation.held += self.claim.reserved.min(reservation.under_way);
        }
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        let mut reservation = self.reservation.borrow_mut();
        if reservation.session == self.claim.session {
            reservation.under_way = reservation.under_way.saturating_sub(self.claim.reserved);
        }
    }
}

impl Client {
    /// Whether a write of so many bytes may be kept: there is room reserved for it.
    pub(crate) fn may_keep(&self, inode: &Inode, length: usize) -> bool {
        let policy = self.policy_known(inode);
        let covered = self.reservation.borrow().covers(self.now(), policy, footprint_of_write(length));
        covered || planted::is(Bug::ClientOverdrawSpace)
    }

    fn policy_known(&self, inode: &Inode) -> Policy {
        let volume = self.session.borrow().policy;
        inode.state().policy.unwrap_or(volume)
    }

    /// Reserves room for such a write and for others to come, unless there was too little a moment ago.
    pub(crate) async fn reserve_for(self: &Rc<Self>, inode: &Inode, length: usize) {
        let policy = self.policy_known(inode);
        let needed = footprint_of_write(length);
        let _turn = self.reserving.acquire(1).await;
        let (now, session) = (self.now(), self.session.borrow().clone());
        let call = {
            let mut reservation = self.reservation.borrow_mut();
            let has_asked = reservation.covers(now, policy, needed) || !reservation.may_ask(now);
            if has_asked || session.is_fenced() {
                return;
            }
            let wanted = self.config.reserved_bytes.max(reservation.charged + needed);
            reservation.call(now, session.id, policy, wanted)
        };
        self.ask_for_room(call).await;
    }

    /// Asks for more when a quarter is used up or much of its time is over, while writes go on.
    pub(crate) fn renew_reservation(self: &Rc<Self>) {
        let (now, session) = (self.now(), self.session.borrow().clone());
        let mut reservation = self.reservation.borrow_mut();
        reservation.used = now;
        let low = reservation.held < reservation.full / 4 * 3 && reservation.may_ask(now);
        let wanted = low || reservation.is_due(now);
        if !wanted || session.is_fenced() || std::mem::replace(&mut reservation.renewing, true) {
            return;
        }
        drop(reservation);
        self.spawn_reserving(self.config.reserved_bytes);
    }

    /// Keeps what is needed for kept bytes alive, and gives back what others may need.
    pub(crate) fn look_after_reservation(self: &Rc<Self>) {
        let now = self.now();
        let mut reservation = self.reservation.borrow_mut();
        let due = reservation.charged > 0 && reservation.is_due(now);
        let idle = reservation.is_idle(now);
        if !(due || idle) || std::mem::replace(&mut reservation.renewing, true) {
            return;
        }
        drop(reservation);
        self.spawn_reserving(if idle { 0 } else { self.config.reserved_bytes });
    }

    /// Whether it has to be looked after although nothing is kept.
    pub(crate) fn has_idle_reservation(&self) -> bool {
        let reservation = self.reservation.borrow();
        reservation.scarce && reservation.held > 0
    }

    fn spawn_reserving(self: &Rc<Self>, wanted: u64) {
        let client = self.clone();
        self.handle.spawn(async move {
            client.reserve_in_background(wanted).await;
            client.reservation.borrow_mut().renewing = false;
        });
    }

    async fn reserve_in_background(self: &Rc<Self>, wanted: u64) {
        let _turn = self.reserving.acquire(1).await;
        let (now, session) = (self.now(), self.session.borrow().clone());
        let call = {
            let mut reservation = self.reservation.borrow_mut();
            let used_again = wanted == 0 && !reservation.is_idle(now);
            if session.is_fenced() || used_again {
                return;
            }
            let (policy, charged) = (reservation.policy, reservation.charged);
            reservation.call(now, session.id, policy, if wanted > 0 { wanted.max(charged) } else { 0 })
        };
        self.ask_for_room(call).await;
    }

    /// The unmount's: nobody has to wait for the time to be over.
    pub(crate) async fn give_up_reservation(self: &Rc<Self>) {
        let _turn = self.reserving.acquire(1).await;
        let session = self.session.borrow().clone();
        let call = {
            let mut reservation = self.reservation.borrow_mut();
            if reservation.held == 0 || session.is_fenced() {
                return;
            }
            let policy = reservation.policy;
            reservation.call(self.now(), session.id, policy, 0)
        };
        self.ask_for_room(call).await;
    }

    async fn ask_for_room(self: &Rc<Self>, call: ReserveCall) {
        let Ok(encoded) = body::encode(&call) else { return };
        // Not behind bulk bytes.
        let answer = self.meta.call(OP_RESERVE, encoded, Bytes::new(), self.config.call_timeout).await;
        let reply = answer.ok().and_then(|message| {
            body::decode::<Result<ReserveReply, DataError>>(&message.body)
                .inspect_err(|error| tracing::error!(%error, "the data plane's answer is malformed"))
                .ok()?
                .ok()
        });
        self.reservation.borrow_mut().answered(&call, reply.as_ref());
    }

    /// What a `store` of so many bytes claims. `kept`: they are charged for; else it may use what
    /// nothing is kept for.
    pub(crate) fn claim(&self, bytes: usize, kept: bool) -> Claimed<'_> {
        let mut reservation = self.reservation.borrow_mut();
        let live = kept || self.now() < reservation.expires;
        let most = if kept { reservation.held } else { reservation.left() };
        let reserved = if live { most.min(bytes as u64) } else { 0 };
        reservation.held -= reserved;
        reservation.under_way += reserved;
        let claim = Claim { session: reservation.session, reserved, answered: kept };
        drop(reservation);
        Claimed { reservation: &self.reservation, claim }
    }

    /// What is kept takes more, or less, than before.
    pub(crate) fn charge(&self, before: u64, after: u64) {
        let mut reservation = self.reservation.borrow_mut();
        reservation.charged = (reservation.charged + after).saturating_sub(before);
    }

    /// Bytes that were charged for are kept no more; `claimed` of that went off with the calls that
    /// stored them, the rest of it is used up otherwise.
    pub(crate) fn settle(&self, charged: u64, claimed: u64) {
        let mut reservation = self.reservation.borrow_mut();
        reservation.charged = reservation.charged.saturating_sub(charged);
        reservation.held = reservation.held.saturating_sub(charged.saturating_sub(claimed));
    }

    /// The session is over, and what it had reserved.
    pub(crate) fn forget_reservation(&self) {
        let mut reservation = self.reservation.borrow_mut();
        (reservation.held, reservation.full, reservation.expires) = (0, 0, Instant::default());
        (reservation.scarce, reservation.refused) = (false, false);
        reservation.session = SessionId::default();
        reservation.under_way = 0;
    }
}
