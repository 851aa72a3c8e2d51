//! TLS 1.3's record layer (RFC 8446 section 5) under the keys that a handshake of rustls agreed on.
//!
//! rustls does the handshake and derives each next key; the records are made here, so that bulk bytes are
//! encrypted out of the memory they are in and decrypted into the memory they are to be in, with no copy
//! between (rustls's own layer copies them twice on either side).

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use bytes::Bytes;
use cfs_reactor::buffer::DmaBuf;
use rustls::kernel::KernelConnection;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// Content of one record at most.
pub(super) const CONTENT_BYTES_MAX: usize = 1 << 14;
pub(super) const RECORD_HEADER_BYTES: usize = 5;
const TYPE_BYTES: usize = 1;
/// Of all three ciphers.
const TAG_BYTES: usize = 16;
/// What a record adds to its content.
pub(super) const RECORD_OVERHEAD: usize = RECORD_HEADER_BYTES + TYPE_BYTES + TAG_BYTES;
/// What may follow a record's header: 2^14 and 256 bytes (RFC 8446 section 5.2).
const PAYLOAD_BYTES_MAX: usize = CONTENT_BYTES_MAX + 256;
/// A record at most, header and all.
pub(super) const RECORD_BYTES_MAX: usize = RECORD_HEADER_BYTES + PAYLOAD_BYTES_MAX;
/// Sealed with one key at most: RFC 8446 section 5.5 allows AES-GCM 2^24.5 full records.
const KEY_RECORDS_MAX: u64 = 1 << 24;

const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
pub(super) const APPLICATION_DATA: u8 = 23;
const CLOSE_NOTIFY: u8 = 0;
const KEY_UPDATE: u8 = 24;
/// Type, length 1, and that the peer need not do so too.
const KEY_UPDATE_MESSAGE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, NOT_REQUESTED];
const NOT_REQUESTED: u8 = 0;
const REQUESTED: u8 = 1;

/// A record that says, before there are keys, that what came was none: a fatal unexpected_message.
pub(super) const NO_RECORD_ALERT: [u8; 7] = [ALERT, 3, 3, 0, 2, 2, 10];

/// What is wrong with a record.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    #[error("a TLS record of type {0} makes no sense here")]
    Type(u8),
    #[error("a TLS record of {0} bytes is shorter or longer than any may be")]
    Length(usize),
    #[error("a TLS record is not authentic")]
    Forged,
    #[error("the peer refused: TLS alert {0}{remedy}", remedy = remedy(*.0))]
    Alert(u8),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("a TLS handshake message of type {0} makes no sense here")]
    Message(u8),
}

/// What the alerts are about that certificates give rise to (RFC 8446 section 6.2).
fn remedy(alert: u8) -> &'static str {
    match alert {
        42..=46 | 48 => ": it does not accept this identity; give one that the cluster's authority issued",
        116 => ": it wants an identity; give one with --identity",
        _ => "",
    }
}

/// Derives each direction's next key.
trait Schedule {
    fn next_to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
    fn next_to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
}

impl<Side> Schedule for KernelConnection<Side> {
    fn next_to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_tx_secret()
    }

    fn next_to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_rx_secret()
    }
}

/// One direction's key, and which record is next.
struct Key {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Key {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Key, rustls::Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(rustls::Error::General("a cipher that was not offered".to_owned())),
        };
        let unusable = |_| rustls::Error::General("a key of another length than its cipher's".to_owned());
        let key = LessSafeKey::new(UnboundKey::new(algorithm, key.as_ref()).map_err(unusable)?);
        let iv = iv.as_ref().try_into().map_err(|_| unusable(aws_lc_rs::error::Unspecified))?;
        Ok(Key { key, iv, sequence })
    }

    /// Of the next record, of which there is only one.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, counted) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= counted;
        }
        // A key is replaced long before 2^64 records.
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Both directions of a connection whose handshake is over.
pub(super) fn both_directions<Side: 'static>(
    secrets: ExtractedSecrets,
    connection: KernelConnection<Side>,
) -> Result<(Sealer, Opener), rustls::Error> {
    let schedule: Rc<RefCell<dyn Schedule>> = Rc::new(RefCell::new(connection));
    let new_key_wanted = Rc::new(Cell::new(false));
    let sealer = Sealer {
        key: Key::new(secrets.tx)?,
        schedule: schedule.clone(),
        new_key_wanted: new_key_wanted.clone(),
        key_records_max: KEY_RECORDS_MAX,
    };
    Ok((sealer, Opener { key: Key::new(secrets.rx)?, schedule, new_key_wanted }))
}

/// Encrypts what is sent.
pub(super) struct Sealer {
    key: Key,
    schedule: Rc<RefCell<dyn Schedule>>,
    /// By the peer.
    new_key_wanted: Rc<Cell<bool>>,
    key_records_max: u64,
}

/// Records under construction.
struct Sealed {
    bytes: DmaBuf,
    end: usize,
    /// Content that was copied behind the next record's header.
    gathered: usize,
}

impl Sealed {
    fn content(&self) -> Range<usize> {
        let start = self.end + RECORD_HEADER_BYTES;
        start..start + self.gathered
    }
}

impl Sealer {
    /// These bytes as records: full ones out of large parts, small parts together.
    pub fn seal(&mut self, parts: &[Bytes]) -> Result<Bytes, RecordError> {
        let length: usize = parts.iter().map(Bytes::len).sum();
        // A part may end a record before it and leave one behind it that is not full.
        let records = length / CONTENT_BYTES_MAX + 2 * parts.len() + 1;
        let updates = records / self.key_records_max as usize + 2;
        let room = length + records * RECORD_OVERHEAD + updates * (KEY_UPDATE_MESSAGE.len() + RECORD_OVERHEAD);
        let mut sealed = Sealed { bytes: DmaBuf::uninitialised(room), end: 0, gathered: 0 };
        for part in parts {
            if part.len() >= CONTENT_BYTES_MAX {
                self.finish(&mut sealed, APPLICATION_DATA)?;
            }
            let mut rest = &part[..];
            while !rest.is_empty() {
                if sealed.gathered == 0 && rest.len() >= CONTENT_BYTES_MAX {
                    let (content, behind) = rest.split_at(CONTENT_BYTES_MAX);
                    self.seal_from(&mut sealed, content)?;
                    rest = behind;
                    continue;
                }
                let (content, behind) = rest.split_at(rest.len().min(CONTENT_BYTES_MAX - sealed.gathered));
                let place = sealed.content().end;
                sealed.bytes[place..place + content.len()].copy_from_slice(content);
                sealed.gathered += content.len();
                rest = behind;
                if sealed.gathered == CONTENT_BYTES_MAX {
                    self.finish(&mut sealed, APPLICATION_DATA)?;
                }
            }
        }
        self.finish(&mut sealed, APPLICATION_DATA)?;
        sealed.bytes.truncate(sealed.end);
        Ok(sealed.bytes.freeze())
    }

    /// A record of content that stays where it is.
    fn seal_from(&mut self, sealed: &mut Sealed, content: &[u8]) -> Result<(), RecordError> {
        self.renew_key(sealed)?;
        let header = header(content.len() + TYPE_BYTES + TAG_BYTES);
        let record = &mut sealed.bytes[sealed.end..sealed.end + content.len() + RECORD_OVERHEAD];
        let (head, payload) = record.split_at_mut(RECORD_HEADER_BYTES);
        head.copy_from_slice(&header);
        let (encrypted, tail) = payload.split_at_mut(content.len());
        let nonce = self.key.nonce();
        let aad = Aad::from(header);
        let done = self.key.key.seal_out_of_place_scatter(nonce, aad, content, encrypted, &[APPLICATION_DATA], tail);
        done.map_err(|_| RecordError::Length(content.len()))?;
        sealed.end += content.len() + RECORD_OVERHEAD;
        Ok(())
    }

    /// A record of what was gathered, if anything was.
    fn finish(&mut self, sealed: &mut Sealed, kind: u8) -> Result<(), RecordError> {
        if sealed.gathered == 0 {
            return Ok(());
        }
        if kind == APPLICATION_DATA && self.is_key_due() {
            // Its place is before what was gathered.
            let gathered = Bytes::copy_from_slice(&sealed.bytes[sealed.content()]);
            sealed.gathered = 0;
            self.renew_key(sealed)?;
            sealed.gathered = gathered.len();
            let place = sealed.content();
            sealed.bytes[place].copy_from_slice(&gathered);
        }
        let content = sealed.content();
        let header = header(content.len() + TYPE_BYTES + TAG_BYTES);
        sealed.bytes[sealed.end..content.start].copy_from_slice(&header);
        let (before, tail) = sealed.bytes.split_at_mut(content.end);
        let nonce = self.key.nonce();
        let tail = &mut tail[..TYPE_BYTES + TAG_BYTES];
        let done =
            self.key.key.seal_in_place_scatter(nonce, Aad::from(header), &mut before[content.clone()], &[kind], tail);
        done.map_err(|_| RecordError::Length(content.len()))?;
        sealed.end = content.end + TYPE_BYTES + TAG_BYTES;
        sealed.gathered = 0;
        Ok(())
    }

    fn is_key_due(&self) -> bool {
        self.key.sequence >= self.key_records_max || self.new_key_wanted.get()
    }

    /// Tells the peer of the next key, under the old one, once that was used for long enough.
    fn renew_key(&mut self, sealed: &mut Sealed) -> Result<(), RecordError> {
        if !self.is_key_due() {
            return Ok(());
        }
        sealed.gathered = KEY_UPDATE_MESSAGE.len();
        let place = sealed.content();
        sealed.bytes[place].copy_from_slice(&KEY_UPDATE_MESSAGE);
        self.finish(sealed, HANDSHAKE)?;
        self.key = Key::new(self.schedule.borrow_mut().next_to_seal()?)?;
        self.new_key_wanted.set(false);
        Ok(())
    }

    /// A record of any kind and length.
    #[cfg(test)]
    pub fn seal_one(&mut self, kind: u8, content: &[u8]) -> Bytes {
        let bytes = DmaBuf::zeroed(content.len() + RECORD_OVERHEAD);
        let mut sealed = Sealed { bytes, end: 0, gathered: content.len() };
        let place = sealed.content();
        sealed.bytes[place].copy_from_slice(content);
        self.finish(&mut sealed, kind).unwrap();
        sealed.bytes.freeze()
    }

    /// From now on a key is for so many records.
    #[cfg(test)]
    pub fn limit_keys(&mut self, records: u64) {
        self.key_records_max = records;
    }
}

fn header(payload: usize) -> [u8; RECORD_HEADER_BYTES] {
    // At most 2^14 + 17.
    let [high, low] = (payload as u16).to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}

/// Decrypts what is received.
pub(super) struct Opener {
    key: Key,
    schedule: Rc<RefCell<dyn Schedule>>,
    new_key_wanted: Rc<Cell<bool>>,
}

/// What a record was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// So many bytes of data.
    Data(usize),
    /// The peer closed the connection.
    Closed,
}

/// The length of the record that begins here, header and all; `None` if that can't be seen yet.
pub(super) fn record_length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    // Who speaks something else would wait as long as we for the rest of a record.
    if let Some(kind) = bytes.first().filter(|kind| !(CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(*kind)) {
        return Err(RecordError::Type(*kind));
    }
    let &[_, _, _, high, low, ..] = bytes else { return Ok(None) };
    let payload = usize::from(u16::from_be_bytes([high, low]));
    if payload > PAYLOAD_BYTES_MAX {
        return Err(RecordError::Length(payload));
    }
    Ok(Some(RECORD_HEADER_BYTES + payload))
}

/// The room that [`Opener::open`] needs for the content of a record of this length.
pub(super) fn room_for(record: usize) -> usize {
    record.saturating_sub(RECORD_HEADER_BYTES + TAG_BYTES)
}

impl Opener {
    /// Decrypts a whole record to the start of `room`, which holds [`room_for`] it: its data, then a byte or
    /// more of anything.
    pub fn open(&mut self, record: &[u8], room: &mut [u8]) -> Result<Opened, RecordError> {
        let Some((&header, payload)) = record.split_first_chunk::<RECORD_HEADER_BYTES>() else {
            return Err(RecordError::Length(record.len()));
        };
        if header[0] != APPLICATION_DATA {
            return Err(RecordError::Type(header[0]));
        }
        let Some((encrypted, tag)) = payload.split_last_chunk::<TAG_BYTES>().filter(|(rest, _)| !rest.is_empty())
        else {
            return Err(RecordError::Length(record.len()));
        };
        let room = &mut room[..encrypted.len()];
        let nonce = self.key.nonce();
        let opened = self.key.key.open_separate_gather(nonce, Aad::from(header), encrypted, tag, room);
        opened.map_err(|_| RecordError::Forged)?;
        // Behind the content are its type and zeroes.
        let place = room.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Type(0))?;
        if place > CONTENT_BYTES_MAX {
            return Err(RecordError::Length(place));
        }
        match room[place] {
            APPLICATION_DATA => Ok(Opened::Data(place)),
            HANDSHAKE => self.heed(&room[..place]).map(|()| Opened::Data(0)),
            ALERT => match room[..place] {
                [_, CLOSE_NOTIFY] => Ok(Opened::Closed),
                [_, alert] => Err(RecordError::Alert(alert)),
                _ => Err(RecordError::Length(place)),
            },
            other => Err(RecordError::Type(other)),
        }
    }

    /// The only handshake message that comes later: what follows is under the next key.
    pub(super) fn heed(&mut self, message: &[u8]) -> Result<(), RecordError> {
        let &[KEY_UPDATE, 0, 0, 1, request @ (NOT_REQUESTED | REQUESTED)] = message else {
            return Err(RecordError::Message(message.first().copied().unwrap_or_default()));
        };
        self.key = Key::new(self.schedule.borrow_mut().next_to_open()?)?;
        if request == REQUESTED {
            self.new_key_wanted.set(true);
        }
        Ok(())
    }
}
