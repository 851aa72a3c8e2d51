//! What happens without being asked: write-back of what is old, holds and leases given back,
//! memory bounded, and the end.

use crate::Client;
use crate::inode::{Inode, WriteLease};
use cfs_reactor::sync::Permit;
use cfs_wire::limits::RELEASES_MAX;
use cfs_wire::meta::MetaOp;
use cfs_wire::{Ino, ShardId};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// How often things are looked at while there is anything to do.
const TICK: Duration = Duration::from_millis(200);
/// Inodes remembered without a reason: some 500 bytes each.
const INODES_MAX: usize = 100_000;
/// How long an unmount waits for the server to take the session back.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// The memory bounds are looked at every so many ticks.
const SWEEP_TICKS: u32 = 25;
/// Sweeps, of 5 s, in which nobody read before what is kept for reading is dropped.
const QUIET_SWEEPS: u32 = 4;

/// An inode on which neither an open nor a commit can begin meanwhile.
struct Turn {
    inode: Rc<Inode>,
    _opening: Permit,
    _changing: Permit,
}

impl Turn {
    async fn take(inode: Rc<Inode>) -> Turn {
        let opening = inode.hold_order.acquire(1).await;
        let changing = inode.order.acquire(1).await;
        Turn { inode, _opening: opening, _changing: changing }
    }

    /// `None` if something is under way. Whoever wants several turns must not wait for one.
    fn at_once(inode: Rc<Inode>) -> Option<Turn> {
        let opening = inode.hold_order.try_acquire(1)?;
        let changing = inode.order.try_acquire(1)?;
        Some(Turn { inode, _opening: opening, _changing: changing })
    }
}

impl Client {
    pub(crate) fn spawn_upkeep(self: &Rc<Self>) {
        let client = self.clone();
        self.handle.spawn(async move {
            let mut ticks = 0u32;
            while !client.closed.get() {
                let wanted = client.upkeep_wanted.notified();
                if client.has_upkeep() {
                    client.handle.sleep(TICK).await;
                } else {
                    wanted.await;
                }
                client.flush_old();
                client.look_after_reservation();
                client.give_back_idle();
                ticks = ticks.wrapping_add(1);
                if ticks.is_multiple_of(SWEEP_TICKS) {
                    client.sweep();
                    // Of what was read the kernel has a copy too; what was read ahead may still be.
                    if client.pages.borrow_mut().drop_unused(QUIET_SWEEPS) {
                        client.quiet.notify_all();
                    }
                }
            }
        });
    }

    fn has_upkeep(&self) -> bool {
        !self.dirty_inodes.borrow().is_empty()
            || !self.lingering.borrow().is_empty()
            || self.has_idle_reservation()
            || self.is_over_bounds()
            || !self.pages.borrow().is_empty()
    }

    /// Ends when the client has dropped what it kept for reading again, because nobody reads.
    pub async fn has_become_quiet(&self) {
        self.quiet.notified().await;
    }

    fn is_over_bounds(&self) -> bool {
        self.inodes.borrow().len() > INODES_MAX || self.entries_kept.get() > self.config.entries_max
    }

    /// An inode or an entry more is remembered.
    pub(crate) fn remembered(&self) {
        if self.is_over_bounds() {
            self.upkeep_wanted.notify_all();
        }
    }

    /// Looks after what an inode holds at the server once nobody has it open.
    pub(crate) fn linger(&self, ino: Ino) {
        if self.lingering.borrow_mut().insert(ino) {
            self.upkeep_wanted.notify_all();
        }
    }

    fn flush_old(self: &Rc<Self>) {
        let now = self.now();
        let inos: Vec<Ino> = self.dirty_inodes.borrow().iter().copied().collect();
        for ino in inos {
            let Some(inode) = self.known_inode(ino) else { continue };
            if !inode.state().is_dirty() {
                self.dirty_inodes.borrow_mut().remove(&ino);
            } else if !inode.state().dirty.is_empty() && self.flush_due(&inode) <= now {
                self.spawn_flush(&inode);
            }
        }
    }

    /// Gives back what files that were closed a while ago still hold at the server: many in one
    /// call, since each call is an entry in the shard's log.
    fn give_back_idle(self: &Rc<Self>) {
        let now = self.now();
        let lingering: Vec<Ino> = self.lingering.borrow().iter().copied().collect();
        let mut idle: BTreeMap<ShardId, Vec<Turn>> = BTreeMap::new();
        for ino in lingering {
            let Some(inode) = self.known_inode(ino) else {
                self.lingering.borrow_mut().remove(&ino);
                continue;
            };
            let (wanted, due, dirty) = {
                let state = inode.state();
                let holds = state.held.is_some() || state.lease.is_some();
                (state.opens == 0 && holds, state.last_close + self.config.linger <= now, state.is_dirty())
            };
            if !wanted {
                // Opened again (its next close brings it back), or nothing is held any more.
                self.lingering.borrow_mut().remove(&ino);
            } else if due && dirty {
                self.spawn_flush(&inode);
            } else if due && let Some(turn) = Turn::at_once(inode) {
                idle.entry(ino.shard()).or_default().push(turn);
            }
        }
        for mut turns in idle.into_values() {
            while !turns.is_empty() {
                let some = turns.split_off(turns.len().saturating_sub(RELEASES_MAX));
                let client = self.clone();
                self.handle.spawn(async move { client.let_go(&some).await });
            }
        }
    }

    /// Commits what is dirty, then returns the write lease and the hold, unless the file was
    /// opened again.
    pub(crate) async fn give_back(self: &Rc<Self>, inode: &Rc<Inode>) {
        let turn = Turn::take(inode.clone()).await;
        if inode.state().opens > 0 {
            return;
        }
        let _ = self.flush_in_turn(inode).await;
        self.let_go(&[turn]).await;
    }

    /// Returns the write leases and the holds of inodes of one shard that nobody has open. None
    /// of them can be opened or written before the server has answered.
    async fn let_go(self: &Rc<Self>, turns: &[Turn]) {
        let session = self.session.borrow().clone();
        let mut inos = Vec::new();
        for Turn { inode, .. } in turns {
            let mut state = inode.state();
            if state.opens > 0 || state.is_dirty() {
                continue;
            }
            let leased = state.lease.take() == Some(WriteLease { session: session.id });
            let held = state.held.take() == Some(session.id);
            if leased || held {
                inos.push(inode.ino);
            }
        }
        if !inos.is_empty() {
            // Should it fail, the end of the session does the same.
            let _ = self.change_in(&session, MetaOp::Release { inos }).await;
        }
    }

    /// Keeps the caches within their bounds.
    fn sweep(&self) {
        let mut inodes = self.inodes.borrow_mut();
        let entries: usize = inodes.values().map(|inode| inode.state().entries.len()).sum();
        let excess = inodes.len() > INODES_MAX;
        let now = self.now();
        let mut surplus = entries.saturating_sub(self.config.entries_max);
        inodes.retain(|_, inode| {
            let mut state = inode.state();
            let lapsed = state.granted_until <= now;
            if surplus > 0 || lapsed {
                surplus = surplus.saturating_sub(std::mem::take(&mut state.entries).len());
            }
            let needed = state.opens > 0
                || state.is_dirty()
                || state.lease.is_some()
                || state.held.is_some()
                || state.failures.unseen
                || !state.entries.is_empty()
                || state.names_given_until > now
                || state.contended_until > now;
            // An operation under way has a reference of its own.
            needed || Rc::strong_count(inode) > 1 || !(lapsed || excess)
        });
        self.entries_kept.set(inodes.values().map(|inode| inode.state().entries.len()).sum());
    }

    /// Commits everything, gives everything back and ends the session. Data that could not be
    /// committed is reported by the error, now or earlier if no open file has told of it.
    pub async fn shutdown(self: &Rc<Self>) -> Result<(), cfs_wire::Errno> {
        let untold = |inode: &Rc<Inode>| Some(inode.state().failures).filter(|failures| failures.unseen)?.last;
        let outcome = self.syncfs().await;
        let outcome = outcome.and(self.inodes.borrow().values().find_map(untold).map_or(Ok(()), Err));
        self.closed.set(true);
        self.upkeep_wanted.notify_all();
        self.page_care_wanted.notify_all();
        let _ = self.handle.timeout(CLOSE_WITHIN, self.give_up_reservation()).await;
        let session = self.session.borrow().clone();
        let mut shards: Vec<u16> = (0..session.shards.max(1)).collect();
        shards.retain(|shard| session.knows(ShardId(*shard)));
        // Closing releases the session's leases, locks and holds in a shard. A server that is away
        // lets the session lapse.
        let closing = shards.into_iter().map(|shard| self.close_session(&session, ShardId(shard)));
        let _ = self.handle.timeout(CLOSE_WITHIN, futures_util::future::join_all(closing)).await;
        outcome
    }
}
