//! The handshake of TLS 1.3, by rustls.

use super::records::{self, Opener, RECORD_BYTES_MAX, RecordError, Sealer, both_directions, record_length};
use crate::identity::{self, Identity};
use crate::{Peer, identity::server_name};
use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::uring::{Errno, Ring};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::pki_types::CertificateDer;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{CertificateError, ExtractedSecrets};
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Received at once: a dozen records, all of which stay in the cache until they are decrypted.
pub(super) const RECEIVED_BYTES: usize = 256 << 10;
const _: () = assert!(RECEIVED_BYTES > 2 * RECORD_BYTES_MAX);

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    #[error("TLS: {cause}{remedy}", cause = .0, remedy = remedy(.0))]
    Handshake(#[from] rustls::Error),
    #[error("TLS: {0}")]
    Record(#[from] RecordError),
    #[error("the peer closed the connection in the TLS handshake; perhaps it has no identity")]
    Closed,
    #[error("the socket failed in the TLS handshake: {0}")]
    Socket(Errno),
    #[error("TLS: {0}")]
    Peer(String),
    #[error("TLS: the peer did not keep to the handshake")]
    Unexpected,
}

fn remedy(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            ": it is of another cluster's authority than this identity"
        }
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            ": issue a new one with: cfs authority issue"
        }
        rustls::Error::InvalidMessage(_) => ": is the other end without an identity?",
        _ => "",
    }
}

/// What a handshake leaves.
pub(super) struct Secured {
    pub sealer: Sealer,
    pub opener: Opener,
    pub peer: Peer,
    pub received: Received,
}

/// Records as they came.
pub(super) struct Received {
    /// `None` only while the kernel fills it, or after an error.
    buffer: Option<DmaBuf>,
    start: usize,
    end: usize,
}

impl Received {
    fn new() -> Received {
        Received { buffer: Some(DmaBuf::apart(RECEIVED_BYTES)), start: 0, end: 0 }
    }

    /// All that is there.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().and_then(|buffer| buffer.get(self.start..self.end)).unwrap_or_default()
    }

    /// The first bytes of it.
    fn bytes_mut(&mut self, length: usize) -> &mut [u8] {
        let range = self.start..self.start + length;
        self.buffer.as_deref_mut().and_then(|buffer| buffer.get_mut(range)).unwrap_or_default()
    }

    pub fn consume(&mut self, length: usize) {
        self.start += length;
    }

    /// Receives more: how much, 0 at the end of the stream.
    pub async fn receive(&mut self, ring: &Rc<Ring>, socket: &Rc<OwnedFd>) -> Result<usize, Errno> {
        let Some(mut buffer) = self.buffer.take() else { return Ok(0) };
        if self.start > 0 {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let free = self.end..buffer.len();
        let (received, buffer) = ring.recv_range(socket, buffer, free, false).await;
        self.buffer = Some(buffer);
        let received = received?;
        self.end += received;
        Ok(received)
    }
}

/// Proves who this is to a server, which proves to be one.
pub(super) async fn connect(ring: &Rc<Ring>, socket: &Rc<OwnedFd>, identity: &Identity) -> Result<Secured, TlsError> {
    let side = UnbufferedClientConnection::new(identity.client(), server_name())?;
    shake_hands(ring, socket, side).await
}

/// Proves to be a server, to somebody who proves who they are.
pub(super) async fn accept(ring: &Rc<Ring>, socket: &Rc<OwnedFd>, identity: &Identity) -> Result<Secured, TlsError> {
    shake_hands(ring, socket, UnbufferedServerConnection::new(identity.server())?).await
}

/// What both sides of rustls have in common, which it has no trait for.
trait Side: Sized {
    type Data: 'static;
    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn is_handshaking(&self) -> bool;
    fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]>;
    fn into_keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error>;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn is_handshaking(&self) -> bool {
        (**self).is_handshaking()
    }

    fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        (**self).peer_certificates()
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error> {
        self.dangerous_into_kernel_connection()
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn is_handshaking(&self) -> bool {
        (**self).is_handshaking()
    }

    fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        (**self).peer_certificates()
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), rustls::Error> {
        self.dangerous_into_kernel_connection()
    }
}

enum Next {
    Continue,
    Send,
    Receive,
    Done,
}

async fn shake_hands<S: Side>(ring: &Rc<Ring>, socket: &Rc<OwnedFd>, mut side: S) -> Result<Secured, TlsError> {
    let mut received = Received::new();
    let mut outgoing = Vec::new();
    // Whole records that rustls has been shown. It is given one at a time, lest it decrypt what comes behind
    // the handshake, which would be lost with it.
    let mut shown = 0;
    loop {
        let (discard, next) = advance(&mut side, received.bytes_mut(shown), &mut outgoing);
        received.consume(discard);
        shown = shown.checked_sub(discard).ok_or(TlsError::Unexpected)?;
        match next {
            Ok(Next::Continue) => {}
            Ok(Next::Send) => send(ring, socket, &mut outgoing).await?,
            Ok(Next::Receive) => {
                shown += loop {
                    let behind = received.bytes().get(shown..).unwrap_or_default();
                    let length = match record_length(behind) {
                        Ok(length) => length,
                        Err(error) => {
                            outgoing.extend_from_slice(&records::NO_RECORD_ALERT);
                            let _ = send(ring, socket, &mut outgoing).await;
                            return Err(error.into());
                        }
                    };
                    if let Some(length) = length.filter(|length| *length <= behind.len()) {
                        break length;
                    }
                    if received.receive(ring, socket).await.map_err(TlsError::Socket)? == 0 {
                        return Err(TlsError::Closed);
                    }
                };
            }
            Ok(Next::Done) => break,
            Err(error) => {
                // So that the peer knows, too: rustls has an alert for it. What fails then has failed already.
                if let (_, Ok(Next::Continue)) = advance(&mut side, received.bytes_mut(shown), &mut outgoing) {
                    let _ = send(ring, socket, &mut outgoing).await;
                }
                return Err(error);
            }
        }
    }
    if shown > 0 {
        return Err(TlsError::Unexpected);
    }
    let certificate = side.peer_certificates().and_then(<[_]>::first).ok_or(TlsError::Unexpected)?;
    let peer = identity::peer(certificate).map_err(TlsError::Peer)?;
    let (secrets, connection) = side.into_keys()?;
    let (sealer, opener) = both_directions(secrets, connection)?;
    Ok(Secured { sealer, opener, peer, received })
}

/// One step of rustls: how much of the records it is done with, and what is next.
fn advance<S: Side>(side: &mut S, records: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Next, TlsError>) {
    let UnbufferedStatus { discard, state, .. } = side.process(records);
    let next = match state {
        Ok(ConnectionState::EncodeTlsData(mut message)) => {
            let mut room = vec![0; 4096];
            let mut encoded = message.encode(&mut room);
            if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = encoded {
                room.resize(required_size, 0);
                encoded = message.encode(&mut room);
            }
            match encoded {
                Ok(length) => {
                    outgoing.extend_from_slice(&room[..length]);
                    Ok(Next::Continue)
                }
                Err(_) => Err(TlsError::Unexpected),
            }
        }
        Ok(ConnectionState::TransmitTlsData(sending)) => {
            sending.done();
            Ok(Next::Send)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Next::Receive),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Done),
        Ok(_) => Err(TlsError::Unexpected),
        Err(error) => Err(error.into()),
    };
    if matches!(next, Ok(Next::Done)) && side.is_handshaking() {
        return (discard, Ok(Next::Receive));
    }
    (discard, next)
}

async fn send(ring: &Rc<Ring>, socket: &Rc<OwnedFd>, outgoing: &mut Vec<u8>) -> Result<(), TlsError> {
    let bytes = Bytes::from(std::mem::take(outgoing));
    if bytes.is_empty() {
        return Ok(());
    }
    let length = bytes.len();
    let (sent, _) = ring.send(socket, vec![bytes]).await;
    match sent.map_err(TlsError::Socket)? {
        sent if sent == length => Ok(()),
        _ => Err(TlsError::Closed),
    }
}

/// The first whole record that was received and how long it is, if one is there.
pub(super) fn first_record(received: &Received) -> Result<Option<usize>, RecordError> {
    let length = records::record_length(received.bytes())?;
    Ok(length.filter(|length| *length <= received.bytes().len()))
}

#[cfg(test)]
mod tests {
    use super::records::{CONTENT_BYTES_MAX, Opened, room_for};
    use super::*;
    use crate::identity::authority::{self, Role};
    use cfs_reactor::Executor;
    use cfs_reactor::clock::KernelClock;
    use futures_util::future::join;
    use proptest::prelude::*;
    use std::os::unix::net::UnixStream;
    use std::sync::OnceLock;
    use std::time::Duration;

    /// A server's and a client's identity.
    fn identities() -> &'static [Identity; 2] {
        static IDENTITIES: OnceLock<[Identity; 2]> = OnceLock::new();
        IDENTITIES.get_or_init(|| {
            let home = tempfile::tempdir().unwrap();
            let ca = home.path().join("ca");
            authority::create(&ca).unwrap();
            [("server", Role::Server), ("client", Role::Client)].map(|(name, role)| {
                authority::issue(&ca, role, name, &home.path().join(name)).unwrap();
                Identity::load(&home.path().join(name)).unwrap()
            })
        })
    }

    /// Both ends of a connection whose handshake is over.
    fn shaken() -> [Secured; 2] {
        let ring = Ring::new(64).unwrap();
        let executor = Executor::new(Rc::new(KernelClock::new()));
        let (one, other) = UnixStream::pair().unwrap();
        let [server, client] = identities();
        let story = {
            let ring = ring.clone();
            async move {
                let (one, other) = (Rc::new(OwnedFd::from(one)), Rc::new(OwnedFd::from(other)));
                let (server, client) = join(accept(&ring, &one, server), connect(&ring, &other, client)).await;
                [server.unwrap(), client.unwrap()]
            }
        };
        executor.run(&mut ring.driver(), Duration::ZERO, &executor.domain(), story).unwrap()
    }

    /// What these records hold, each decrypted into no more room than it needs.
    fn opened(opener: &mut Opener, mut records: &[u8]) -> Result<Vec<u8>, RecordError> {
        let mut content = Vec::new();
        while !records.is_empty() {
            let length = record_length(records)?.filter(|length| *length <= records.len());
            let (record, behind) = records.split_at(length.ok_or(RecordError::Length(records.len()))?);
            let mut room = vec![0; room_for(record.len())];
            let Opened::Data(bytes) = opener.open(record, &mut room)? else { panic!("closed") };
            content.extend_from_slice(&room[..bytes]);
            records = behind;
        }
        Ok(content)
    }

    fn pattern(seed: usize, length: usize) -> Bytes {
        (0..length).map(|at| (seed + at * 7 % 253) as u8).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Parts of any size, both ways, with a key for a few records or for all.
        #[test]
        fn what_is_sealed_is_opened(
            batches in prop::collection::vec(
                prop::collection::vec(prop_oneof![0usize..200, 0usize..3 * CONTENT_BYTES_MAX], 0..6), 1..6),
            key_records in prop_oneof![1u64..4, Just(u64::MAX)],
        ) {
            let [mut server, mut client] = shaken();
            server.sealer.limit_keys(key_records);
            for (seed, lengths) in batches.iter().enumerate() {
                let parts: Vec<Bytes> = lengths.iter().map(|length| pattern(seed, *length)).collect();
                let sealed = server.sealer.seal(&parts).unwrap();
                prop_assert!(opened(&mut client.opener, &sealed).unwrap() == parts.concat());
                let back = client.sealer.seal(&parts).unwrap();
                prop_assert!(opened(&mut server.opener, &back).unwrap() == parts.concat());
            }
        }

        /// Whatever is done to a record, it is refused, and nothing panics.
        #[test]
        fn no_other_record_is_opened(length in 1usize..300, place in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<bool>()) {
            let [mut server, mut client] = shaken();
            let sealed = server.sealer.seal(&[pattern(1, length)]).unwrap();
            let mut forged = sealed.to_vec();
            let place = place.index(forged.len());
            if cut {
                forged.truncate(place);
            } else {
                forged[place] ^= 1 << bit;
            }
            let outcome = opened(&mut client.opener, &forged);
            let is_nothing = forged.is_empty() && outcome.as_ref().is_ok_and(Vec::is_empty);
            prop_assert!(is_nothing || outcome.is_err());
        }
    }

    /// Forwards one direction with a bit flipped at a place, or cut off there.
    async fn forward(ring: Rc<Ring>, from: Rc<OwnedFd>, to: Rc<OwnedFd>, harm: Option<(usize, Option<u8>)>) {
        let mut at = 0;
        loop {
            let (received, buffer) = ring.recv(&from, DmaBuf::uninitialised(4096)).await;
            let Ok(length @ 1..) = received else { break };
            let mut bytes = buffer[..length].to_vec();
            match harm {
                Some((place, Some(bit))) if (at..at + length).contains(&place) => bytes[place - at] ^= 1 << bit,
                Some((place, None)) if place < at + length => bytes.truncate(place - at),
                _ => {}
            }
            let is_cut = bytes.len() < length;
            at += length;
            let (sent, _) = ring.send(&to, vec![Bytes::from(bytes)]).await;
            if sent.is_err() || is_cut {
                break;
            }
        }
        let _ = rustix::net::shutdown(&*to, rustix::net::Shutdown::Both);
        let _ = rustix::net::shutdown(&*from, rustix::net::Shutdown::Both);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever happens to a handshake on its way, both ends come to an end, and those that believe that
        /// it is over agree on the keys.
        #[test]
        fn a_harmed_handshake_fails_or_is_one(
            place in 0usize..2200, bit in prop::option::of(0u8..8), of_client in any::<bool>(),
        ) {
            let ring = Ring::new(64).unwrap();
            let executor = Executor::new(Rc::new(KernelClock::new()));
            let handle = executor.domain();
            let [(client_end, near), (far, server_end)] =
                [(); 2].map(|()| UnixStream::pair().unwrap()).map(|(one, other)| (Rc::new(OwnedFd::from(one)), Rc::new(OwnedFd::from(other))));
            let [server, client] = identities();
            let story = {
                let (ring, handle) = (ring.clone(), handle.clone());
                async move {
                    let harm = |harmed: bool| harmed.then_some((place, bit));
                    handle.spawn(forward(ring.clone(), near.clone(), far.clone(), harm(of_client)));
                    handle.spawn(forward(ring.clone(), far, near, harm(!of_client)));
                    // As a connection does, each end closes its socket when it fails.
                    let ended = |socket: Rc<OwnedFd>, outcome: Result<Secured, TlsError>| {
                        outcome.inspect_err(|_| {
                            let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
                        })
                    };
                    let serving = async { ended(server_end.clone(), accept(&ring, &server_end, server).await) };
                    let calling = async { ended(client_end.clone(), connect(&ring, &client_end, client).await) };
                    handle.timeout(Duration::from_secs(20), join(serving, calling)).await
                }
            };
            let both = executor.run(&mut ring.driver(), Duration::ZERO, &handle, story).unwrap();
            let both = both.expect("both ends come to an end");
            if let (Ok(mut server), Ok(mut client)) = both {
                let sealed = client.sealer.seal(&[pattern(0, 100)]).unwrap();
                prop_assert_eq!(opened(&mut server.opener, &sealed).unwrap(), pattern(0, 100));
            }
        }
    }

    #[test]
    fn a_record_is_taken_once_and_in_its_turn_only() {
        let [mut server, mut client] = shaken();
        let [one, other] = [1, 2].map(|seed| server.sealer.seal(&[pattern(seed, 100)]).unwrap());
        assert!(matches!(opened(&mut client.opener, &other), Err(RecordError::Forged)));
        let [mut server, mut client] = shaken();
        let sealed = server.sealer.seal(&[pattern(1, 100)]).unwrap();
        assert_eq!(opened(&mut client.opener, &sealed).unwrap(), pattern(1, 100));
        assert!(matches!(opened(&mut client.opener, &sealed), Err(RecordError::Forged)));
        assert!(matches!(opened(&mut client.opener, &one), Err(RecordError::Forged)), "another connection's");
    }

    #[test]
    fn only_data_of_no_more_than_a_record_holds_is_data() {
        let [mut server, mut client] = shaken();
        let mut room = vec![0; 2 * CONTENT_BYTES_MAX];
        let mut said = |kind: u8, content: &[u8]| client.opener.open(&server.sealer.seal_one(kind, content), &mut room);
        assert_eq!(said(23, b"data").unwrap(), Opened::Data(4));
        assert_eq!(said(23, &vec![7; CONTENT_BYTES_MAX]).unwrap(), Opened::Data(CONTENT_BYTES_MAX));
        assert_eq!(said(21, &[1, 0]).unwrap(), Opened::Closed);
        let refusal = said(21, &[2, 48]).unwrap_err();
        assert!(refusal.to_string().contains("give one that the cluster's authority issued"), "{refusal}");
        assert!(matches!(said(21, &[2]), Err(RecordError::Length(1))));
        assert!(matches!(said(20, &[1]), Err(RecordError::Type(20))));
        assert!(matches!(said(0, &[0, 0]), Err(RecordError::Type(0))));
        assert!(matches!(said(23, &vec![7; CONTENT_BYTES_MAX + 1]), Err(RecordError::Length(_))));
    }

    #[test]
    fn who_is_asked_for_a_new_key_takes_one() {
        let [mut server, mut client] = shaken();
        assert!(server.opener.heed(&[24, 0, 0, 1, 2]).is_err());
        assert!(server.opener.heed(&[4, 0, 0, 1, 1]).is_err());
        server.opener.heed(&[24, 0, 0, 1, 1]).unwrap();
        let plain = 100 + records::RECORD_OVERHEAD;
        let sealed = server.sealer.seal(&[pattern(1, 100)]).unwrap();
        assert_eq!(sealed.len(), plain + 5 + records::RECORD_OVERHEAD, "a KeyUpdate goes before it");
        assert_eq!(opened(&mut client.opener, &sealed).unwrap(), pattern(1, 100));
        let sealed = server.sealer.seal(&[pattern(2, 100)]).unwrap();
        assert_eq!(sealed.len(), plain, "and only once");
        assert_eq!(opened(&mut client.opener, &sealed).unwrap(), pattern(2, 100));
    }

    #[test]
    fn full_records_are_made_of_large_parts_and_small_parts_share_one() {
        let [mut server, _] = shaken();
        let lengths = |sealed: &[u8]| {
            let mut lengths = Vec::new();
            let mut at = 0;
            while at < sealed.len() {
                let length = record_length(&sealed[at..]).unwrap().unwrap();
                lengths.push(length - records::RECORD_OVERHEAD);
                at += length;
            }
            lengths
        };
        let small = [pattern(0, 60), pattern(1, 4096)];
        assert_eq!(lengths(&server.sealer.seal(&small).unwrap()), [4156]);
        let large = [pattern(0, 60), pattern(1, 2 * CONTENT_BYTES_MAX), pattern(2, 60)];
        assert_eq!(lengths(&server.sealer.seal(&large).unwrap()), [60, CONTENT_BYTES_MAX, CONTENT_BYTES_MAX, 60]);
    }
}
