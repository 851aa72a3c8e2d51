//! A directory that is being listed: what was fetched of it, and what one answer takes of that.

use crate::abi::Dirents;
use crate::attributes::dirent_kind;
use cfs_client::Client;
use cfs_wire::meta::{DirEntry, FileKind, Name};
use cfs_wire::{Errno, Ino};
use std::rc::Rc;

/// Entries asked of the server at once; the kernel takes some 100 of them per request.
const ENTRIES_PER_CALL: u32 = 512;
/// Where `.` and `..` stand in a directory. A real cookie this small would need a name whose
/// 52-bit hash is 0.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;

pub(crate) struct Listing {
    ino: Ino,
    /// What was fetched and perhaps not yet taken, with the place it was fetched from.
    entries: Vec<DirEntry>,
    from: u64,
    end: bool,
}

impl Listing {
    pub fn new(ino: Ino) -> Listing {
        Listing { ino, entries: Vec::new(), from: 0, end: false }
    }

    /// Where in `entries` those behind a cookie begin; `None` if they have to be fetched.
    fn behind(&self, after: u64) -> Option<usize> {
        // 0 is also what `rewinddir` asks for: the directory is then read anew.
        if after == 0 || after == self.from {
            return None;
        }
        let next = self.entries.iter().position(|entry| entry.cookie == after)? + 1;
        (next < self.entries.len() || self.end).then_some(next)
    }

    /// Fetches the entries behind a cookie.
    pub async fn fetch(client: &Rc<Client>, ino: Ino, after: u64) -> Result<Listing, Errno> {
        let cookie = if after <= DOT_DOT { 0 } else { after };
        let fetched = client.readdir(ino, cookie, ENTRIES_PER_CALL, false).await?;
        let mut entries = Vec::with_capacity(fetched.entries.len() + 2);
        if after == 0 {
            entries.push(dot(b".", ino, DOT));
        }
        if after <= DOT {
            entries.push(dot(b"..", fetched.parent, DOT_DOT));
        }
        entries.extend(fetched.entries);
        Ok(Listing { ino, entries, from: after, end: fetched.end })
    }

    /// As many of the entries behind a cookie as there is room for, if they are here.
    pub fn answer(&self, after: u64, room: usize) -> Option<Vec<u8>> {
        Some(self.encoded(self.behind(after)?, room))
    }

    /// The same of what was just fetched.
    pub fn first(&self, room: usize) -> Vec<u8> {
        self.encoded(0, room)
    }

    fn encoded(&self, first: usize, room: usize) -> Vec<u8> {
        let mut dirents = Dirents::new(room);
        for entry in &self.entries[first..] {
            if !dirents.push(entry.ino.as_u64(), entry.cookie, dirent_kind(entry.kind), &entry.name) {
                break;
            }
        }
        dirents.into_bytes()
    }

    pub fn ino(&self) -> Ino {
        self.ino
    }
}

fn dot(name: &[u8], ino: Ino, cookie: u64) -> DirEntry {
    DirEntry { name: Name::from_slice(name), ino, kind: FileKind::Directory, cookie, attr: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_goes_on_behind_each_cookie_and_is_fetched_anew_from_the_start() {
        let entries = vec![dot(b"a", Ino::ROOT, 10), dot(b"b", Ino::ROOT, 20), dot(b"c", Ino::ROOT, 30)];
        let mut listing = Listing { ino: Ino::ROOT, entries, from: 0, end: false };
        assert_eq!(listing.behind(10), Some(1));
        assert_eq!(listing.behind(0), None);
        assert_eq!(listing.behind(15), None, "an unknown cookie is the server's to find");
        assert_eq!(listing.behind(30), None, "more may follow");
        listing.end = true;
        assert_eq!(listing.behind(30), Some(3));
        assert_eq!(listing.answer(30, 4096), Some(vec![]), "an empty answer is the end");
        assert_eq!(listing.answer(10, 4096).unwrap().len(), 2 * 32);
        assert_eq!(listing.answer(10, 63).unwrap().len(), 32);
    }
}
