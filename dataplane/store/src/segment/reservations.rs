//! Room that is kept free for bytes which clients have answered for and not stored yet.
//!
//! A reserved byte is a byte on every target: however a store is cut and placed, it puts no more on any
//! one target than it has bytes, but for pages that are filled in part, which clients count in. So where
//! as many targets as the widest policy asks for have room for all that is reserved, every reserved byte
//! finds its place. That stays so: a store under a reservation takes no more of a target than goes off
//! the reservation, one without takes from a target only what lies beyond all reservations.
//!
//! Nothing here is stored. Clients name what they hold whenever they ask again, and a server that has
//! just started leaves as much room as its predecessor can have given away until all of that is over.

use cfs_reactor::Instant;
use cfs_wire::SessionId;
use cfs_wire::data::{Claim, ReserveCall, ReserveReply};
use std::collections::BTreeMap;
use std::time::Duration;

/// A client is given this part of what is left at most, so that others find some too and all have the
/// less the nearer the end is.
const SHARE: u64 = 4;
/// Less is not worth a call.
const GRANT_BYTES_MIN: u64 = 64 << 10;
/// What is told to clients to last so long is kept for this part longer, for clocks that run apart.
const DRIFT: u32 = 64;
/// Sessions with a reservation; others store what they write at once.
const SESSIONS_MAX: usize = 64 << 10;

/// What may be reserved.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reservable {
    /// Of each target that takes writes.
    pub rooms: Vec<u64>,
    /// In all. It must not grow while a server is away.
    pub most: u64,
}

struct Held {
    bytes: u64,
    /// The widest policy of what they are for.
    width: usize,
    /// Of the last call.
    number: u64,
    expires: Instant,
}

/// Reservations by session.
pub struct Reservations {
    lifetime: Duration,
    /// From then on nobody counts on what a predecessor gave.
    settled: Instant,
    held: BTreeMap<SessionId, Held>,
}

/// Room that a store has to leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kept {
    pub known: u64,
    /// For what a predecessor may have given away.
    pub unknown: u64,
}

impl Reservations {
    /// `lifetime`: how long one lasts that is not asked for again. A predecessor's was no longer.
    pub fn new(now: Instant, lifetime: Duration) -> Reservations {
        Reservations { lifetime, settled: now + lifetime + lifetime / DRIFT, held: BTreeMap::new() }
    }

    /// Gives back what the session counts on no more, and reserves more if there is room.
    pub fn reserve(&mut self, now: Instant, call: &ReserveCall, room: &Reservable) -> ReserveReply {
        self.expire(now);
        let lifetime_ms = u32::try_from(self.lifetime.as_millis()).unwrap_or(u32::MAX);
        // What it holds is not known here: it can't count on that.
        let refused = ReserveReply { granted: 0, lifetime_ms: 0 };
        let before = self.held.get(&call.session);
        if before.is_some_and(|held| call.number <= held.number) || before.is_none() && self.held.len() >= SESSIONS_MAX
        {
            return refused;
        }
        // What is not known here a predecessor gave, or it was let go because nothing was heard.
        let bytes = before.map_or(room.most, |held| held.bytes).min(call.held);
        let width = before.map_or(0, |held| held.width).max(call.policy.total());
        let expires = now + self.lifetime + self.lifetime / DRIFT;
        self.held.insert(call.session, Held { bytes, width, number: call.number, expires });
        let up = room.rooms.len() > call.policy.parity();
        let granted = if up { self.grant(now, call.wanted.saturating_sub(bytes), room) } else { 0 };
        if bytes + granted == 0 {
            self.held.remove(&call.session);
        } else if let Some(held) = self.held.get_mut(&call.session) {
            held.bytes += granted;
        }
        ReserveReply { granted, lifetime_ms }
    }

    /// How much of what is wanted may be reserved.
    fn grant(&self, now: Instant, wanted: u64, room: &Reservable) -> u64 {
        let mut rooms = room.rooms.clone();
        rooms.sort_unstable_by(|a, b| b.cmp(a));
        let width = self.held.values().map(|held| held.width).max().unwrap_or(0).min(rooms.len());
        let Some(narrowest) = width.checked_sub(1).and_then(|last| rooms.get(last)) else { return 0 };
        let reserved = self.total();
        let left = narrowest.saturating_sub(reserved).saturating_sub(self.unknown(now, room.most));
        let granted = wanted.min(left.min(room.most.saturating_sub(reserved)) / SHARE);
        if granted < GRANT_BYTES_MIN { 0 } else { granted }
    }

    /// A store has taken so much of what was reserved.
    pub fn used(&mut self, claim: &Claim) {
        if let Some(held) = self.held.get_mut(&claim.session) {
            held.bytes = held.bytes.saturating_sub(claim.reserved);
        }
    }

    /// What a store has to leave on each target. `most` as in [`Reservable`].
    pub fn kept_from(&mut self, now: Instant, claim: &Claim, most: u64) -> Kept {
        if claim.answered {
            return Kept { known: 0, unknown: 0 };
        }
        self.expire(now);
        let own = self.held.get(&claim.session).map_or(0, |held| held.bytes.min(claim.reserved));
        Kept { known: self.total() - own, unknown: self.unknown(now, most) }
    }

    /// Bytes that are reserved.
    pub fn total(&self) -> u64 {
        self.held.values().fold(0, |sum, held| sum.saturating_add(held.bytes))
    }

    fn unknown(&self, now: Instant, most: u64) -> u64 {
        if now < self.settled { most } else { 0 }
    }

    fn expire(&mut self, now: Instant) {
        self.held.retain(|_, held| now < held.expires);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cfs_reactor::clock::SplitMix64;
    use cfs_wire::Policy;

    const LIFETIME: Duration = Duration::from_secs(20);
    const MIB: u64 = 1 << 20;

    fn at(seconds: u64) -> Instant {
        Instant::default() + Duration::from_secs(seconds)
    }

    /// Of a server that has been there for long.
    fn settled() -> Reservations {
        Reservations::new(at(0), LIFETIME)
    }

    fn room(mib: u64) -> Reservable {
        Reservable { rooms: vec![mib * MIB; 3], most: 1 << 40 }
    }

    fn ask(session: u64, number: u64, held: u64, wanted: u64) -> ReserveCall {
        ReserveCall { session: SessionId(session), number, policy: Policy::new(2, 1).unwrap(), held, wanted }
    }

    fn without() -> Claim {
        Claim::default()
    }

    #[test]
    fn each_gets_a_part_of_what_is_left_and_the_last_nothing() {
        let mut reservations = settled();
        let granted: Vec<u64> = (0..40)
            .map(|session| reservations.reserve(at(100), &ask(session, 1, 0, 16 * MIB), &room(64)).granted)
            .collect();
        assert_eq!(granted[..3], [16 * MIB, 12 * MIB, 9 * MIB]);
        assert_eq!(granted[39], 0);
        assert_eq!(reservations.total(), granted.iter().sum::<u64>());
        assert!(reservations.total() < 64 * MIB);
        // Nor does asking again bring more than is there.
        for number in 2..100 {
            reservations.reserve(at(100), &ask(0, number, 1 << 40, 1 << 40), &room(64));
        }
        assert!(reservations.total() < 64 * MIB);
    }

    #[test]
    fn what_a_store_took_is_reserved_no_more_and_what_is_given_back_neither() {
        let mut reservations = settled();
        assert_eq!(reservations.reserve(at(100), &ask(1, 1, 0, 16 * MIB), &room(64)).granted, 16 * MIB);
        reservations.used(&Claim { session: SessionId(1), reserved: 10 * MIB, answered: true });
        assert_eq!(reservations.total(), 6 * MIB);
        reservations.reserve(at(100), &ask(1, 2, MIB, 0), &room(64));
        assert_eq!(reservations.total(), MIB);
        reservations.reserve(at(100), &ask(1, 3, 0, 0), &room(64));
        assert_eq!(reservations.total(), 0);
    }

    #[test]
    fn an_old_call_that_comes_late_changes_nothing() {
        let mut reservations = settled();
        reservations.reserve(at(100), &ask(1, 2, 0, 16 * MIB), &room(64));
        assert_eq!(reservations.reserve(at(101), &ask(1, 1, 0, MIB), &room(64)).granted, 0);
        assert_eq!(reservations.total(), 16 * MIB);
    }

    #[test]
    fn who_is_silent_loses_it_not_before_his_own_clock_says_so() {
        let mut reservations = settled();
        reservations.reserve(at(100), &ask(1, 1, 0, 16 * MIB), &room(64));
        assert_eq!(reservations.kept_from(at(120), &without(), 0).known, 16 * MIB);
        assert_eq!(reservations.kept_from(at(121), &without(), 0).known, 0);
        // What he kept unwritten nevertheless counts from when he is heard of.
        reservations.reserve(at(200), &ask(1, 2, MIB, 0), &room(0));
        assert_eq!(reservations.kept_from(at(200), &without(), 0).known, MIB);
    }

    #[test]
    fn a_store_leaves_what_is_reserved_for_others() {
        let mut reservations = settled();
        reservations.reserve(at(100), &ask(1, 1, 0, 16 * MIB), &room(64));
        reservations.reserve(at(100), &ask(2, 1, 0, 4 * MIB), &room(64));
        let mut kept = |claim: Claim| reservations.kept_from(at(100), &claim, MIB);
        assert_eq!(kept(without()), Kept { known: 20 * MIB, unknown: 0 });
        let session = SessionId(1);
        assert_eq!(kept(Claim { session, reserved: MIB, answered: false }).known, 19 * MIB);
        assert_eq!(kept(Claim { session, reserved: 99 * MIB, answered: false }).known, 4 * MIB);
        assert_eq!(kept(Claim { session, reserved: MIB, answered: true }).known, 0);
    }

    #[test]
    fn after_a_start_there_is_room_left_for_all_that_may_have_been_given_before() {
        let mut reservations = Reservations::new(at(100), LIFETIME);
        let room = Reservable { most: 40 * MIB, ..room(64) };
        assert_eq!(reservations.kept_from(at(100), &without(), room.most), Kept { known: 0, unknown: 40 * MIB });
        // Who held something goes on holding it, whatever there is.
        reservations.reserve(at(101), &ask(1, 5, 16 * MIB, 16 * MIB), &Reservable { rooms: vec![0; 3], ..room });
        assert_eq!(reservations.total(), 16 * MIB);
        let granted = reservations.reserve(at(101), &ask(2, 1, 0, 16 * MIB), &room).granted;
        assert_eq!(granted, 2 * MIB, "a quarter of 64 - 40 - 16");
        assert_eq!(reservations.kept_from(at(119), &without(), room.most).unknown, 40 * MIB);
        assert_eq!(reservations.kept_from(at(121), &without(), room.most).unknown, 0);
    }

    #[test]
    fn as_many_targets_have_room_as_the_widest_policy_takes() {
        let call = |session, policy: (u8, u8)| ReserveCall {
            policy: Policy::new(policy.0, policy.1).unwrap(),
            ..ask(session, 1, 0, 4 * MIB)
        };
        let room = Reservable { rooms: vec![16, 0, 64, 64].into_iter().map(|mib| mib * MIB).collect(), most: 1 << 40 };
        let mut reservations = settled();
        assert_eq!(reservations.reserve(at(100), &call(1, (2, 2)), &room).granted, 0, "it takes the full one too");
        assert_eq!(reservations.reserve(at(100), &call(2, (2, 1)), &room).granted, 4 * MIB);
        // A narrow one must leave room for the wide one before it.
        assert_eq!(reservations.reserve(at(100), &call(3, (1, 1)), &room).granted, 3 * MIB);
        let few = Reservable { rooms: vec![64 * MIB; 2], most: 1 << 40 };
        assert_eq!(settled().reserve(at(100), &call(1, (2, 2)), &few).granted, 0, "none can be written");
    }

    /// Clients that lose replies and die, a server that starts anew, and targets that are filled with
    /// what has no reservation: what clients count on always has room.
    #[test]
    fn nobody_ever_counts_on_more_than_there_is() {
        struct Client {
            number: u64,
            counts_on: u64,
            until: Instant,
        }
        let policy = Policy::new(2, 1).unwrap();
        let (mut granted, mut restarts) = (0, 0);
        for seed in 0..200 {
            let mut random = SplitMix64::new(seed);
            let most = 8 * MIB;
            let mut free = [48 * MIB, 40 * MIB, 44 * MIB];
            let mut now = at(0);
            let mut server = Reservations::new(now, LIFETIME);
            let client = || Client { number: 0, counts_on: 0, until: at(0) };
            let mut clients: Vec<Client> = (0..4).map(|_| client()).collect();
            for _ in 0..400 {
                now += Duration::from_millis(random.below(1500));
                let which = random.below(4);
                let session = SessionId(which);
                let client = &mut clients[which as usize];
                if now >= client.until {
                    client.counts_on = 0;
                }
                let bytes = 1 + random.below(2 * MIB);
                match random.below(8) {
                    0..3 => {
                        client.number += 1;
                        let keeps = client.counts_on - if random.one_in(4) { client.counts_on / 2 } else { 0 };
                        client.counts_on = keeps;
                        let wanted = 4 * MIB;
                        let call = ReserveCall { session, number: client.number, policy, held: keeps, wanted };
                        let delay = Duration::from_millis(random.below(500));
                        let room = Reservable { rooms: free.to_vec(), most };
                        let reply = server.reserve(now + delay, &call, &room);
                        if !random.one_in(5) {
                            client.counts_on += reply.granted;
                            client.until = now + LIFETIME;
                            granted += reply.granted;
                        }
                        now += delay;
                    }
                    // Under the reservation; of a lost reply the client takes the worst.
                    3..5 => {
                        let bytes = bytes.min(client.counts_on);
                        client.counts_on -= bytes;
                        if !random.one_in(5) {
                            server.used(&Claim { session, reserved: bytes, answered: true });
                            free.iter_mut().for_each(|free| *free -= bytes);
                        }
                    }
                    5..7 => {
                        let kept = server.kept_from(now, &without(), most);
                        if free.iter().all(|free| *free >= bytes + kept.known + kept.unknown) {
                            free.iter_mut().for_each(|free| *free -= bytes);
                        }
                    }
                    _ if random.one_in(10) => {
                        server = Reservations::new(now, LIFETIME);
                        restarts += 1;
                    }
                    _ if random.one_in(3) => free.iter_mut().for_each(|free| *free += bytes),
                    _ => {}
                }
                let live = clients.iter().filter(|client| now < client.until);
                let counted_on: u64 = live.map(|client| client.counts_on).sum();
                assert!(free.iter().all(|free| *free >= counted_on), "seed {seed}: {counted_on} of {free:?}");
            }
        }
        assert!(granted > 1000 * MIB && restarts > 500, "{granted} bytes, {restarts} restarts: a test of nothing");
    }
}
