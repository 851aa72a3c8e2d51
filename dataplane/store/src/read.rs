//! Reading payloads: only the pages a range touches, each against its checksum.

use crate::WORK_PIECE_BYTES;
use crate::core::Core;
use crate::error::StoreError;
use crate::layout::{PAGE_BYTES, round_up};
use crate::state::{Entry, Place};
use crate::transfer;
use bytes::{Buf, Bytes};
use cfs_codec::crc32c::crc32c;
use cfs_wire::BlobId;
use cfs_wire::limits::PAGE;
use cfs_wire::planted::{self, Bug};
use std::ops::Range;

/// Reads of one blob, after the first look, before a mismatch is believed to be on the medium and not on the way.
pub(crate) const READS_MAX: usize = 2;

impl Core {
    pub async fn get(&self, id: BlobId, offset: u32, length: u32) -> Result<Bytes, StoreError> {
        loop {
            let found = self.state.borrow().index.get(&id).map(|entry| (entry.place, entry.info.length));
            let (place, size) = found.ok_or(StoreError::NotFound(id))?;
            let out_of_range = StoreError::OutOfRange { id, offset, length, size };
            let end = offset.checked_add(length).filter(|end| *end <= size).ok_or(out_of_range)?;
            if length == 0 {
                return Ok(Bytes::new());
            }
            let pages = offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES);
            let skip = (offset - pages.start * PAGE_BYTES) as usize;
            let mut bytes = match self.read_where_it_is(id, place, pages.clone()).await {
                Some(bytes) => bytes,
                None => {
                    let Some(entry) = self.at(id, place, Entry::clone) else { continue };
                    // Boxed: it is rare, and would make every read's future several times as large.
                    let result = Box::pin(self.read_any_copy(&entry, pages)).await;
                    // The collector may have moved the blob and reused its zone while we read.
                    if self.at(id, place, |_| ()).is_none() {
                        continue;
                    }
                    result?
                }
            };
            bytes.advance(skip);
            bytes.truncate(length as usize);
            return Ok(bytes);
        }
    }

    /// The blob's entry, unless it is elsewhere now.
    fn at<T>(&self, id: BlobId, place: Place, look: impl FnOnce(&Entry) -> T) -> Option<T> {
        self.state.borrow().index.get(&id).filter(|entry| entry.place == place).map(look)
    }

    /// What almost every read is: of few pages, which are there and verify. Nothing is copied from the
    /// index for it. `None`: see what is the matter.
    async fn read_where_it_is(&self, id: BlobId, place: Place, pages: Range<u32>) -> Option<Bytes> {
        if (pages.end - pages.start) as usize * PAGE > WORK_PIECE_BYTES {
            return None;
        }
        let first = pages.start;
        let bytes = self.read_raw(place, pages).await.ok()?;
        self.handle.work(bytes.len()).await;
        let sound = self.at(id, place, |entry| verify(entry, place, first, &bytes).is_ok());
        (sound == Some(true)).then_some(bytes)
    }

    /// The pages of a blob from its primary copy, else from any other that verifies.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] only where all could be read and none verifies: another error may be over
    /// the next time.
    pub async fn read_any_copy(&self, entry: &Entry, pages: Range<u32>) -> Result<Bytes, StoreError> {
        let mut failed: Option<StoreError> = None;
        let others = self.state.borrow().duplicates.get(&entry.info.id).cloned().unwrap_or_default();
        for place in std::iter::once(entry.place).chain(others) {
            match self.read_pages(entry, place, pages.clone()).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) if failed.as_ref().is_none_or(StoreError::is_corrupt) => failed = Some(error),
                Err(_) => {}
            }
        }
        Err(failed.unwrap_or(StoreError::NotFound(entry.info.id)))
    }

    pub async fn read_pages(&self, entry: &Entry, place: Place, pages: Range<u32>) -> Result<Bytes, StoreError> {
        let mut reads = 1;
        loop {
            let bytes = self.read_raw(place, pages.clone()).await?;
            match self.verify_in_turns(entry, place, pages.start, &bytes).await {
                Ok(()) => return Ok(bytes),
                Err(error) if reads == READS_MAX => return Err(error),
                Err(_) => reads += 1,
            }
        }
    }

    async fn verify_in_turns(&self, entry: &Entry, place: Place, first: u32, bytes: &[u8]) -> Result<(), StoreError> {
        let pages = (first..).step_by(WORK_PIECE_BYTES / PAGE);
        for (page, piece) in pages.zip(bytes.chunks(WORK_PIECE_BYTES)) {
            self.handle.work(piece.len()).await;
            verify(entry, place, page, piece)?;
        }
        Ok(())
    }

    async fn read_raw(&self, place: Place, pages: Range<u32>) -> Result<Bytes, StoreError> {
        let start = u64::from(place.offset) + u64::from(pages.start) * PAGE as u64;
        let length = (pages.end - pages.start) as usize * PAGE;
        let offset = self.superblock.zone_offset(place.zone) + start;
        Ok(transfer::read(&*self.device, offset, length).await?)
    }

    /// A whole payload for moving: verified if any copy verifies; otherwise what the medium
    /// holds, which stays recognisable as damaged because its checksums move with it.
    pub async fn read_for_move(&self, entry: &Entry) -> Result<Bytes, StoreError> {
        let pages = 0..round_up(entry.info.length) / PAGE_BYTES;
        let bytes = match self.read_any_copy(entry, pages.clone()).await {
            Err(error) if error.is_corrupt() => {
                tracing::warn!(id = %entry.info.id, %error, "moving a damaged blob as it is");
                self.note_damage(&entry.info);
                self.read_raw(entry.place, pages).await?
            }
            other => other?,
        };
        Ok(bytes.slice(..entry.info.length as usize))
    }
}

/// Checks pages from `first_page` on; the last page of the payload counts without its padding.
pub(crate) fn verify(entry: &Entry, place: Place, first_page: u32, bytes: &[u8]) -> Result<(), StoreError> {
    if planted::is(Bug::StoreSkipChecksum) {
        return Ok(());
    }
    let payload_left = (entry.info.length - first_page * PAGE_BYTES) as usize;
    let payload = &bytes[..bytes.len().min(payload_left)];
    let expected = entry.checksums.get(first_page as usize..).unwrap_or_default();
    for ((page, data), crc) in (first_page..).zip(payload.chunks(PAGE)).zip(expected) {
        if crc32c(data) != *crc {
            let (id, zone) = (entry.info.id, place.zone);
            return Err(StoreError::Corrupt { id, page, zone, offset: place.offset + page * PAGE_BYTES });
        }
    }
    Ok(())
}
