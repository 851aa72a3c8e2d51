//! Who may serve which inode from its cache: the read leases of one shard, kept in the leader's
//! memory.
//!
//! A change first recalls the inode from its readers. While a recall is under way, and for reads
//! that overlapped one, no new lease is given: such a read may have seen the state before the
//! change and would be cached past it.

use cfs_reactor::Instant;
use cfs_wire::{Ino, SessionId};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Leases that a node gives at most: beyond it reads are answered without one. Some 110 bytes each,
/// with the tree's nodes.
const LEASES_MAX: usize = 512 << 10;

/// How many leases all shards of a node have given.
pub type LeaseTotal = Rc<Cell<usize>>;

#[derive(Default)]
struct State {
    leases: BTreeMap<Ino, SmallVec<[(SessionId, Instant); 2]>>,
    /// How many leases each session holds; sessions without any are absent.
    counts: BTreeMap<SessionId, usize>,
    total: LeaseTotal,
    /// The sessions whose changes are recalling an inode.
    recalls: BTreeMap<Ino, SmallVec<[SessionId; 2]>>,
    /// Reads under way, with the inodes whose recall began or ended since each began.
    reads: BTreeMap<u64, BTreeSet<Ino>>,
    next_read: u64,
    /// Sessions that were told to drop an inode and have not said that they have.
    dropping: BTreeMap<(Ino, SessionId), u32>,
    /// Sessions that were known when this leader started: each may hold leases given by its
    /// predecessor, on anything, until `suspect_until`.
    suspects: BTreeSet<SessionId>,
    suspect_until: Instant,
    /// What suspects have confirmed to have dropped.
    cleared: BTreeSet<(SessionId, Ino)>,
}

/// The read leases of one shard.
#[derive(Default)]
pub struct Readers(Rc<RefCell<State>>);

/// A read under way.
pub struct Read {
    state: Rc<RefCell<State>>,
    id: u64,
}

/// A recall under way on one or more inodes.
pub struct Recall {
    state: Rc<RefCell<State>>,
    session: SessionId,
    inos: Vec<Ino>,
}

/// A session was told to drop an inode, and is waited for.
pub struct Dropping {
    state: Rc<RefCell<State>>,
    key: (Ino, SessionId),
}

impl Readers {
    /// From here on its leases count together with those of other shards.
    pub fn count_in(&self, total: &LeaseTotal) {
        let mut state = self.0.borrow_mut();
        let own = state.held();
        state.total = total.clone();
        total.set(total.get() + own);
    }

    /// Starts over, as a leader that has just begun does: all it knows is who may be a reader.
    pub fn restart(&self, known: impl IntoIterator<Item = SessionId>, suspect_until: Instant) {
        let mut state = self.0.borrow_mut();
        state.leases.clear();
        state.recount();
        state.cleared.clear();
        state.suspects = known.into_iter().collect();
        state.suspect_until = suspect_until;
        // A read that began before can't say what it overlapped.
        state.reads.clear();
    }

    pub fn begin_read(&self) -> Read {
        let mut state = self.0.borrow_mut();
        let id = state.next_read;
        state.next_read += 1;
        state.reads.insert(id, BTreeSet::new());
        Read { state: self.0.clone(), id }
    }

    /// An entry that changes these inodes was applied: reads under way may have seen either state.
    pub fn changed(&self, inos: impl IntoIterator<Item = Ino>) {
        let mut state = self.0.borrow_mut();
        if state.reads.is_empty() {
            return;
        }
        for ino in inos {
            state.taint(ino);
        }
    }

    /// From here to the end of the recall nobody gets a lease on these inodes.
    pub fn begin_recall(&self, session: SessionId, inos: &[Ino]) -> Recall {
        let mut state = self.0.borrow_mut();
        for ino in inos {
            state.recalls.entry(*ino).or_default().push(session);
            state.taint(*ino);
        }
        Recall { state: self.0.clone(), session, inos: inos.to_vec() }
    }

    /// Whether another session's change is recalling the inode.
    pub fn is_recalled_for_other(&self, ino: Ino, session: SessionId) -> bool {
        self.0.borrow().recalls.get(&ino).is_some_and(|recalls| recalls.iter().any(|other| *other != session))
    }

    /// While the result lives, the session is waited for to drop the inode.
    pub fn begin_drop(&self, ino: Ino, session: SessionId) -> Dropping {
        let key = (ino, session);
        *self.0.borrow_mut().dropping.entry(key).or_default() += 1;
        Dropping { state: self.0.clone(), key }
    }

    /// Whether somebody waits for the session to drop the inode.
    pub fn is_dropping(&self, ino: Ino, session: SessionId) -> bool {
        self.0.borrow().dropping.contains_key(&(ino, session))
    }

    /// The other sessions that may hold a lease on the inode, and until when.
    pub fn others(&self, ino: Ino, except: SessionId, now: Instant) -> Vec<(SessionId, Instant)> {
        let state = self.0.borrow();
        let held = state.leases.get(&ino).into_iter().flatten().copied();
        let mut others: Vec<_> = held.filter(|(session, until)| *session != except && *until > now).collect();
        if now < state.suspect_until {
            for suspect in state.suspects.iter().filter(|suspect| **suspect != except) {
                let cleared = state.cleared.contains(&(*suspect, ino));
                if !cleared && !others.iter().any(|(session, _)| session == suspect) {
                    others.push((*suspect, state.suspect_until));
                }
            }
        }
        others
    }

    /// Whether any session but this one may serve something from a cache. Leases that are over
    /// count until they are swept away.
    pub fn has_other(&self, session: SessionId) -> bool {
        let state = self.0.borrow();
        state.counts.keys().chain(&state.suspects).any(|reader| *reader != session)
    }

    /// A session that lost its write leases unawares goes on serving these inodes until then.
    pub fn keep(&self, session: SessionId, inos: &[Ino], until: Instant) {
        let mut state = self.0.borrow_mut();
        for ino in inos {
            state.add(session, *ino, until);
        }
    }

    /// The session's lease on the inode ends no later than that.
    pub fn shorten(&self, session: SessionId, ino: Ino, latest: Instant) {
        let mut state = self.0.borrow_mut();
        let held = state.leases.get_mut(&ino).into_iter().flatten();
        for (_, until) in held.filter(|(other, _)| *other == session) {
            *until = latest.min(*until);
        }
    }

    /// The session has dropped the inode, or its lease on it is over.
    pub fn dropped(&self, session: SessionId, ino: Ino, now: Instant) {
        let mut state = self.0.borrow_mut();
        state.remove(session, ino);
        if now < state.suspect_until && state.suspects.contains(&session) {
            state.cleared.insert((session, ino));
        }
    }

    /// A session was closed or fenced.
    pub fn forget(&self, session: SessionId) {
        let mut state = self.0.borrow_mut();
        let inos: Vec<Ino> =
            state.leases.iter().filter(|(_, held)| held.iter().any(|(s, _)| *s == session)).map(|(i, _)| *i).collect();
        for ino in inos {
            state.remove(session, ino);
        }
        state.suspects.remove(&session);
    }

    /// Drops leases that are over.
    pub fn expire(&self, now: Instant) {
        let mut state = self.0.borrow_mut();
        state.leases.retain(|_, held| {
            held.retain(|(_, until)| *until > now);
            !held.is_empty()
        });
        state.recount();
        if now >= state.suspect_until {
            state.suspects.clear();
            state.cleared.clear();
        }
    }

    #[cfg(test)]
    pub fn holds(&self, session: SessionId, ino: Ino) -> bool {
        self.0.borrow().leases.get(&ino).is_some_and(|held| held.iter().any(|(s, _)| *s == session))
    }
}

impl Read {
    /// Gives the session a lease until then, unless a change or recall of the inode overlapped
    /// this read.
    pub fn grant(&self, session: SessionId, ino: Ino, until: Instant) -> bool {
        self.grant_within(None, session, ino, until)
    }

    /// The same for the session that made the change under `own`: what its reply tells is the
    /// new state, unless somebody else changed it too. Such a read begins when its change has
    /// been applied.
    pub fn grant_within(&self, own: Option<&Recall>, session: SessionId, ino: Ino, until: Instant) -> bool {
        let mut state = self.state.borrow_mut();
        let tainted = state.reads.get(&self.id).is_none_or(|tainted| tainted.contains(&ino));
        let own = own.map_or(0, |own| own.inos.iter().filter(|recalled| **recalled == ino).count());
        let recalls = state.recalls.get(&ino).map_or(0, SmallVec::len);
        if tainted || recalls > own || state.total.get() >= LEASES_MAX {
            return false;
        }
        state.add(session, ino, until);
        true
    }
}

impl Drop for Read {
    fn drop(&mut self) {
        self.state.borrow_mut().reads.remove(&self.id);
    }
}

impl Recall {
    pub fn covers(&self, ino: Ino) -> bool {
        self.inos.contains(&ino)
    }
}

impl Drop for Dropping {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        if let Some(count) = state.dropping.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                state.dropping.remove(&self.key);
            }
        }
    }
}

impl Drop for Recall {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        for ino in &self.inos {
            state.taint(*ino);
            let Some(recalls) = state.recalls.get_mut(ino) else { continue };
            if let Some(at) = recalls.iter().position(|session| *session == self.session) {
                recalls.swap_remove(at);
            }
            if recalls.is_empty() {
                state.recalls.remove(ino);
            }
        }
    }
}

impl State {
    fn taint(&mut self, ino: Ino) {
        for tainted in self.reads.values_mut() {
            tainted.insert(ino);
        }
    }

    fn held(&self) -> usize {
        self.counts.values().sum()
    }

    /// Counts again after many leases went at once.
    fn recount(&mut self) {
        let before = self.held();
        self.counts.clear();
        for (session, _) in self.leases.values().flatten() {
            *self.counts.entry(*session).or_default() += 1;
        }
        self.total.set(self.total.get() + self.held() - before);
    }

    fn add(&mut self, session: SessionId, ino: Ino, until: Instant) {
        let held = self.leases.entry(ino).or_default();
        match held.iter_mut().find(|(holder, _)| *holder == session) {
            Some((_, old)) => *old = (*old).max(until),
            None => {
                held.push((session, until));
                *self.counts.entry(session).or_default() += 1;
                self.total.set(self.total.get() + 1);
            }
        }
    }

    fn remove(&mut self, session: SessionId, ino: Ino) {
        let Some(held) = self.leases.get_mut(&ino) else { return };
        let before = held.len();
        held.retain(|(holder, _)| *holder != session);
        let removed = before - held.len();
        self.total.set(self.total.get() - removed);
        if held.is_empty() {
            self.leases.remove(&ino);
        }
        if let Some(count) = self.counts.get_mut(&session) {
            *count = count.saturating_sub(removed);
            if *count == 0 {
                self.counts.remove(&session);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);
    const FILE: Ino = Ino::from_u64(9);

    fn at(secs: u64) -> Instant {
        Instant::from_nanos(secs * 1_000_000_000)
    }

    #[test]
    fn a_read_that_overlapped_a_recall_gets_no_lease() {
        let readers = Readers::default();
        let before = readers.begin_read();
        let recall = readers.begin_recall(A, &[FILE]);
        let during = readers.begin_read();
        assert!(!before.grant(B, FILE, at(9)));
        assert!(!during.grant(B, FILE, at(9)));
        drop(recall);
        assert!(!during.grant(B, FILE, at(9)), "it may have read the old state");
        assert!(readers.begin_read().grant(B, FILE, at(9)));
        assert_eq!(readers.others(FILE, A, at(1)), [(B, at(9))]);
        assert_eq!(readers.others(FILE, B, at(1)), []);
        assert_eq!(readers.others(FILE, A, at(9)), [], "a lease ends by itself");
    }

    #[test]
    fn all_shards_of_a_node_together_give_bounded_leases() {
        let (one, other, total) = (Readers::default(), Readers::default(), LeaseTotal::default());
        one.count_in(&total);
        other.count_in(&total);
        let give =
            |readers: &Readers, number: usize| readers.begin_read().grant(A, Ino::from_u64(number as u64), at(9));
        assert!((0..LEASES_MAX - 1).all(|number| give(&one, number)));
        assert!(give(&other, 0));
        assert!(!give(&other, 1) && !give(&one, LEASES_MAX), "the node has given all");
        one.dropped(A, Ino::from_u64(5), at(1));
        assert!(give(&other, 1));
        assert!(!give(&other, 2));
        one.expire(at(9));
        assert_eq!(total.get(), 2);
        other.restart([], at(9));
        assert_eq!(total.get(), 0);
    }

    #[test]
    fn after_a_start_every_known_session_is_a_reader_until_it_has_dropped_the_inode() {
        let readers = Readers::default();
        readers.restart([A, B], at(10));
        assert_eq!(readers.others(FILE, A, at(1)), [(B, at(10))]);
        readers.dropped(B, FILE, at(2));
        assert_eq!(readers.others(FILE, A, at(2)), []);
        let other = Ino::from_u64(10);
        assert_eq!(readers.others(other, A, at(2)), [(B, at(10))]);
        assert_eq!(readers.others(other, A, at(10)), []);
    }
}
