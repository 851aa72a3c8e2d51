//! What a connection stands on that another one has vouched for: a token, which names it once, and a key.
//!
//! Each direction has a key of its own, derived from the session's by HKDF (RFC 5869). Packets are encrypted
//! with AES-256-GCM under their number; they arrive in order and once, or not at all. After
//! [`KEY_PACKETS`] packets each direction goes on to the next key.

use crate::Peer;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, Prk};
use aws_lc_rs::rand;
use cfs_reactor::{Handle, Instant};
use cfs_wire::offers::{KEY_BYTES, TOKEN_BYTES};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

/// A token that was not shown by then is of no more use.
const TOKEN_WAIT: Duration = Duration::from_secs(10);
/// Tokens that were given and not shown, at most.
const TOKENS_MAX: usize = 1024;
/// Packets under one key: with 2^24 of 4 KiB each, AES-GCM is far from its limits (RFC 8446 section 5.5 allows
/// sixteen times the bytes).
const KEY_PACKETS: u64 = 1 << 24;

pub(crate) type Token = [u8; TOKEN_BYTES];
pub(crate) type SessionKey = [u8; KEY_BYTES];

/// Which end seals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Client,
    Server,
}

/// What was sealed is not what came.
#[derive(Debug)]
pub(super) struct Forged;

/// One direction.
struct Direction {
    secret: SessionKey,
    key: LessSafeKey,
    /// Packets under this key.
    count: u64,
    key_packets: u64,
}

/// The secret that this label leads to.
fn derive(secret: &SessionKey, label: &[u8]) -> SessionKey {
    let mut derived = [0; KEY_BYTES];
    let prk = Prk::new_less_safe(HKDF_SHA256, secret);
    prk.expand(&[label], HKDF_SHA256).and_then(|okm| okm.fill(&mut derived)).expect("one block is asked for");
    derived
}

fn aead(secret: &SessionKey) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &derive(secret, b"cfs packet key")).expect("a key of its length"))
}

impl Direction {
    fn new(session: &SessionKey, of: Side) -> Direction {
        let label: &[u8] = if of == Side::Client { b"cfs client" } else { b"cfs server" };
        let secret = derive(session, label);
        Direction { key: aead(&secret), secret, count: 0, key_packets: KEY_PACKETS }
    }

    /// The next packet's number, which is used once with its key.
    fn nonce(&mut self) -> Nonce {
        if self.count == self.key_packets {
            self.secret = derive(&self.secret, b"cfs next");
            self.key = aead(&self.secret);
            self.count = 0;
        }
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.count.to_be_bytes());
        self.count += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Both directions, as one end has them.
pub(super) struct Seal {
    sends: Direction,
    receives: Direction,
}

impl Seal {
    pub fn new(key: &SessionKey, end: Side) -> Seal {
        let other = if end == Side::Client { Side::Server } else { Side::Client };
        Seal { sends: Direction::new(key, end), receives: Direction::new(key, other) }
    }

    /// Encrypts the next packet in place and puts its tag behind it.
    pub fn seal(&mut self, packet: &mut Vec<u8>) {
        let nonce = self.sends.nonce();
        self.sends.key.seal_in_place_append_tag(nonce, Aad::empty(), packet).expect("a packet is short");
    }

    /// What the next packet says.
    pub fn open<'a>(&mut self, packet: &'a mut [u8]) -> Result<&'a [u8], Forged> {
        let nonce = self.receives.nonce();
        let opened = self.receives.key.open_in_place(nonce, Aad::empty(), packet);
        opened.map(|opened| &*opened).map_err(|_| Forged)
    }

    #[cfg(test)]
    pub fn limit_keys(&mut self, packets: u64) {
        self.sends.key_packets = packets;
        self.receives.key_packets = packets;
    }
}

struct Waiting {
    key: SessionKey,
    peer: Peer,
    until: Instant,
}

/// Sessions that were given to clients which have not come yet.
#[derive(Default)]
pub(crate) struct Sessions {
    waiting: RefCell<BTreeMap<Token, Waiting>>,
}

impl Sessions {
    /// A new one for this client; `None` if too many wait.
    pub fn give(&self, handle: &Handle, peer: &Peer) -> Option<(Token, SessionKey)> {
        let now = handle.now();
        let mut waiting = self.waiting.borrow_mut();
        waiting.retain(|_, waiting| waiting.until > now);
        if waiting.len() >= TOKENS_MAX {
            return None;
        }
        let (mut token, mut key) = ([0; TOKEN_BYTES], [0; KEY_BYTES]);
        rand::fill(&mut token).and_then(|()| rand::fill(&mut key)).ok()?;
        waiting.insert(token, Waiting { key, peer: peer.clone(), until: now + TOKEN_WAIT });
        Some((token, key))
    }

    /// Whose this token is. It is of use once.
    pub fn take(&self, handle: &Handle, token: &Token) -> Option<(SessionKey, Peer)> {
        let Waiting { key, peer, until } = self.waiting.borrow_mut().remove(token)?;
        (until > handle.now()).then_some((key, peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SessionKey = [7; KEY_BYTES];

    fn sealed(seal: &mut Seal, text: &[u8]) -> Vec<u8> {
        let mut packet = text.to_vec();
        seal.seal(&mut packet);
        packet
    }

    #[test]
    fn what_is_sealed_is_opened_once_and_in_its_turn_only() {
        let (mut client, mut server) = (Seal::new(&KEY, Side::Client), Seal::new(&KEY, Side::Server));
        for seal in [&mut client, &mut server] {
            seal.limit_keys(3);
        }
        for number in 0..20u8 {
            let mut packet = sealed(&mut client, &[number; 50]);
            assert_eq!(server.open(&mut packet).unwrap(), [number; 50]);
            let mut back = sealed(&mut server, &[number; 50]);
            assert_ne!(back, sealed(&mut Seal::new(&KEY, Side::Client), &[number; 50]), "each direction has its key");
            assert_eq!(client.open(&mut back).unwrap(), [number; 50]);
        }
        let (one, other) = (sealed(&mut client, b"one"), sealed(&mut client, b"other"));
        assert!(server.open(&mut other.clone()).is_err());
        // It goes no further: the connection ends with what was forged.
        let mut server = Seal::new(&KEY, Side::Server);
        assert!(server.open(&mut one.clone()).is_err());
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let packet = sealed(&mut Seal::new(&KEY, Side::Client), b"something");
        for place in 0..packet.len() * 8 {
            let mut forged = packet.clone();
            forged[place / 8] ^= 1 << (place % 8);
            assert!(Seal::new(&KEY, Side::Server).open(&mut forged).is_err());
        }
        assert!(Seal::new(&KEY, Side::Server).open(&mut packet[..5].to_vec()).is_err());
        assert!(Seal::new(&[8; KEY_BYTES], Side::Server).open(&mut packet.clone()).is_err());
    }
}
