//! From a byte stream to messages.

use super::link::Link;
use super::records::{CONTENT_BYTES_MAX, Opened, Opener, RecordError, room_for};
use super::tls::{Received, first_record};
use crate::Message;
use crate::sum::SUM_BYTES;
use bytes::Bytes;
use cfs_reactor::Handle;
use cfs_reactor::buffer::DmaBuf;
use cfs_reactor::uring::Errno;
use cfs_wire::frame::{BulkSum, FrameError, Header, Hello, Kind};
use std::rc::Rc;

/// Received at once when the size of what comes is unknown. Holds dozens of small frames; of a
/// large one only so much is copied, the rest is received in place.
const BUFFER_BYTES: usize = 16 << 10;
/// The same where records are decrypted to: one, what a padded one has besides, and a header's beginning.
const OPENED_BYTES: usize = CONTENT_BYTES_MAX + 4096;

/// Why a stream gave no further frame.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("the peer closed the connection")]
    Ended,
    #[error("the connection broke off within a frame")]
    Truncated,
    #[error("receiving failed: {0}")]
    Socket(Errno),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("bad frame: {0}")]
    Frame(#[from] FrameError),
    #[error("a frame of this kind makes no sense here")]
    Unexpected,
}

impl ReadError {
    /// Whether the peer broke the protocol, as opposed to having gone away.
    pub fn is_violation(&self) -> bool {
        matches!(self, ReadError::Frame(_) | ReadError::Record(_) | ReadError::Unexpected)
    }
}

/// Parses the frames of one connection.
pub(super) struct Reader {
    link: Rc<Link>,
    /// `None` only while the kernel fills it, or after an error.
    buffer: Option<DmaBuf>,
    start: usize,
    end: usize,
    /// Of a connection with TLS: what comes is records.
    records: Option<(Opener, Received)>,
}

impl Reader {
    pub fn new(link: Rc<Link>, records: Option<(Opener, Received)>) -> Reader {
        let bytes = if records.is_some() { OPENED_BYTES } else { BUFFER_BYTES };
        Reader { link, buffer: Some(DmaBuf::uninitialised(bytes)), start: 0, end: 0, records }
    }

    fn buffered(&self) -> &[u8] {
        self.buffer.as_deref().and_then(|buffer| buffer.get(self.start..self.end)).unwrap_or_default()
    }

    /// The next frame's header; body and bulk must be read next.
    pub async fn header(&mut self) -> Result<Header, ReadError> {
        loop {
            if let Some(header) = Header::decode(self.link.version(), self.buffered())? {
                self.start += header.prefix_length();
                return Ok(header);
            }
            self.fill().await?;
        }
    }

    /// What follows `header`, checked.
    pub async fn message(&mut self, header: &Header) -> Result<Message, ReadError> {
        let body = if header.body_length <= self.buffered().len() {
            let body = Bytes::copy_from_slice(&self.buffered()[..header.body_length]);
            self.start += header.body_length;
            body
        } else {
            self.part(header.body_length, None).await?
        };
        header.verify_body(&body)?;
        let mut sum = BulkSum::default();
        let bulk = match header.bulk_length {
            0 => Bytes::new(),
            length => self.part(length, Some(&mut sum)).await?,
        };
        header.verify_bulk(&sum)?;
        Ok(Message { opcode: header.opcode, body, bulk })
    }

    /// The peer's first frame.
    pub async fn hello(&mut self) -> Result<Hello, ReadError> {
        let header = self.header().await?;
        if header.kind != Kind::Hello {
            return Err(ReadError::Unexpected);
        }
        let message = self.message(&header).await?;
        Ok(Hello::decode(&message.body)?)
    }

    /// The next `length` bytes, at the start of a page; summed while they are in the cache.
    async fn part(&mut self, length: usize, mut sum: Option<&mut BulkSum>) -> Result<Bytes, ReadError> {
        let mut part = DmaBuf::uninitialised(length);
        let copied = length.min(self.buffered().len());
        part[..copied].copy_from_slice(&self.buffered()[..copied]);
        self.start += copied;
        if self.records.is_some() {
            return self.open_part(part, copied, sum).await;
        }
        let mut piece = 0..copied;
        loop {
            if let Some(sum) = sum.as_deref_mut() {
                sum.update(&part[piece.clone()]);
            }
            if piece.end == length {
                return Ok(part.freeze());
            }
            piece = piece.end..length.min(piece.end + SUM_BYTES);
            let receiving = self.link.ring.recv_range(&self.link.socket, part, piece.clone(), true);
            let (received, filled) = receiving.await;
            part = filled;
            if received.map_err(ReadError::Socket)? < piece.len() {
                return Err(ReadError::Truncated);
            }
        }
    }

    /// The same of an encrypted connection: records are decrypted to where their content belongs, if they
    /// lie within the part, as all but the last of a long one do.
    async fn open_part(
        &mut self,
        mut part: DmaBuf,
        copied: usize,
        mut sum: Option<&mut BulkSum>,
    ) -> Result<Bytes, ReadError> {
        let handle = Handle::current();
        let mut piece = 0..copied;
        loop {
            if let Some(sum) = sum.as_deref_mut() {
                sum.update(&part[piece.clone()]);
            }
            let filled = piece.end;
            if filled == part.len() {
                return Ok(part.freeze());
            }
            let length = self.whole_record().await?.ok_or(ReadError::Truncated)?;
            handle.work(length).await;
            let opened = if room_for(length) <= part.len() - filled {
                self.open(length, &mut part[filled..])?
            } else {
                self.open_buffered(length)?;
                let copied = self.buffered().len().min(part.len() - filled);
                part[filled..filled + copied].copy_from_slice(&self.buffered()[..copied]);
                self.start += copied;
                copied
            };
            piece = filled..filled + opened;
        }
    }

    /// Waits for a whole record: its length, or `None` at the end of the stream.
    async fn whole_record(&mut self) -> Result<Option<usize>, ReadError> {
        let Some((_, received)) = &mut self.records else { return Ok(None) };
        loop {
            if let Some(length) = first_record(received)? {
                return Ok(Some(length));
            }
            let more = received.receive(&self.link.ring, &self.link.socket).await;
            if more.map_err(ReadError::Socket)? == 0 {
                return if received.bytes().is_empty() { Ok(None) } else { Err(ReadError::Truncated) };
            }
        }
    }

    /// Decrypts the first record, which is whole and for whose content there is room: how much it was.
    fn open(&mut self, length: usize, room: &mut [u8]) -> Result<usize, ReadError> {
        let Some((opener, received)) = &mut self.records else { return Err(ReadError::Ended) };
        let opened = opener.open(&received.bytes()[..length], room)?;
        received.consume(length);
        match opened {
            Opened::Data(bytes) => Ok(bytes),
            Opened::Closed => Err(ReadError::Ended),
        }
    }

    /// The same behind what is in the buffer, which is less than a header.
    fn open_buffered(&mut self, length: usize) -> Result<(), ReadError> {
        let Some(mut buffer) = self.buffer.take() else { return Err(ReadError::Ended) };
        buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let opened = self.open(length, &mut buffer[self.end..]);
        self.buffer = Some(buffer);
        self.end += opened?;
        Ok(())
    }

    /// Receives more behind the start of a header.
    async fn fill(&mut self) -> Result<(), ReadError> {
        if self.records.is_some() {
            return match self.whole_record().await? {
                Some(length) => self.open_buffered(length),
                None if self.end > self.start => Err(ReadError::Truncated),
                None => Err(ReadError::Ended),
            };
        }
        let Some(mut buffer) = self.buffer.take() else { return Err(ReadError::Ended) };
        // What is left is less than a header.
        buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let free = self.end..buffer.len();
        let (received, buffer) = self.link.ring.recv_range(&self.link.socket, buffer, free, false).await;
        self.buffer = Some(buffer);
        match received.map_err(ReadError::Socket)? {
            0 if self.end > 0 => Err(ReadError::Truncated),
            0 => Err(ReadError::Ended),
            received => {
                self.end += received;
                Ok(())
            }
        }
    }
}
