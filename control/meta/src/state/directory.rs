//! Names in a directory: keyed by hash and ordinal, which together are the readdir cookie.

use super::entry::ChangeKind;
use super::records::{EntryRecord, Inode, decode};
use super::view::{Attempt, View, bad_key};
use super::{StateError, keys};
use cfs_wire::limits::NAME_BYTES_MAX;
use cfs_wire::meta::{DirEntry, FileKind, Name};
use cfs_wire::{Errno, Ino, ShardId, Timestamp};

const ORDINAL_BITS: u32 = 11;
const ORDINALS: u64 = 1 << ORDINAL_BITS;
const HASH_BITS: u32 = 52;
/// Entries fetched at once by a listing.
const PAGE_ROWS: usize = 256;
/// Entries in one listing reply: with 255-byte names and attributes well below the body limit.
const ENTRIES_MAX: u32 = 4096;

/// A name where it stands.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Found {
    pub cookie: u64,
    pub ino: Ino,
    pub kind: FileKind,
}

/// The keyed hash of a name: 52 bits, never 0 so that no cookie is 0.
pub(crate) fn name_hash(key: &[u8; 32], name: &[u8]) -> u64 {
    let digest = blake3::keyed_hash(key, name);
    let mut low = [0; 8];
    low.copy_from_slice(&digest.as_bytes()[..8]);
    let hash = u64::from_le_bytes(low) & ((1 << HASH_BITS) - 1);
    #[cfg(test)]
    let hash = hash & collide::mask();
    hash.max(1)
}

/// The shard a directory directly under the root is placed on.
pub(crate) fn placement(key: &[u8; 32], name: &[u8], shards: u16) -> ShardId {
    let digest = blake3::keyed_hash(key, name);
    // Other bytes than the cookie's, so that a shard's cookies stay uniform.
    let mut high = [0; 8];
    high.copy_from_slice(&digest.as_bytes()[8..16]);
    ShardId((u64::from_le_bytes(high) % u64::from(shards.max(1))) as u16)
}

/// Refuses what no directory can hold.
pub(crate) fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.is_empty() {
        return Err(Errno::ENOENT);
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    if name.iter().any(|&byte| byte == b'/' || byte == 0) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

pub(crate) fn is_dots(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

impl View<'_> {
    pub(crate) fn first_cookie(&self, name: &[u8]) -> u64 {
        name_hash(&self.config.name_key, name) << ORDINAL_BITS
    }

    pub(crate) fn name_lock(&self, dir: Ino, name: &[u8]) -> Vec<u8> {
        keys::locked_name(self.shard, dir, self.first_cookie(name))
    }

    /// All entries of one hash, vacant ones too, in ordinal order. Empty unless the first
    /// ordinal is there: one point get decides most lookups.
    async fn slots(&self, dir: Ino, first: u64) -> Result<Vec<(u64, EntryRecord)>, StateError> {
        let key = keys::entry(self.shard, dir, first);
        let Some(record) = self.get_versioned(&key).await? else {
            return Ok(Vec::new());
        };
        let mut slots = vec![(first, record)];
        let start = keys::entry(self.shard, dir, first + 1);
        let end = keys::entry(self.shard, dir, first + ORDINALS);
        for (key, value) in self.scan(start, &end, ORDINALS as usize).await? {
            let cookie = keys::u64_at(&key, keys::FIELDS + 8).ok_or_else(|| bad_key(&key))?;
            slots.push((cookie, entry_of(&key, &value)?));
        }
        Ok(slots)
    }

    /// What a name stands for, whatever transactions are prepared.
    pub(crate) async fn find(&self, dir: Ino, name: &[u8]) -> Result<Option<Found>, StateError> {
        let first = self.first_cookie(name);
        let Some(record) = self.get_versioned::<EntryRecord>(&keys::entry(self.shard, dir, first)).await? else {
            return Ok(None);
        };
        if record.name.as_slice() == name {
            return Ok(Some(Found { cookie: first, ino: record.ino, kind: record.kind }));
        }
        let slots = self.slots(dir, first).await?;
        let found = slots.into_iter().find(|(_, record)| record.name.as_slice() == name);
        Ok(found.map(|(cookie, record)| Found { cookie, ino: record.ino, kind: record.kind }))
    }

    /// What a name stands for; waits for a transaction that is about to change it.
    pub(crate) async fn lookup(&self, dir: Ino, name: &[u8]) -> Attempt<Option<Found>> {
        self.unlocked(&self.name_lock(dir, name)).await?;
        Ok(self.find(dir, name).await?)
    }

    /// Puts a name in, or makes an existing one stand for something else.
    pub(crate) async fn put_entry(&mut self, dir: Ino, name: &Name, ino: Ino, kind: FileKind) -> Attempt<()> {
        let first = self.first_cookie(name);
        let slots = self.slots(dir, first).await?;
        let same = slots.iter().find(|(_, record)| record.name == *name).map(|(cookie, _)| *cookie);
        let cookie = match same {
            Some(cookie) => cookie,
            None => free_cookie(first, &slots).ok_or(Errno::ENOSPC)?,
        };
        let record = EntryRecord { name: name.clone(), ino, kind };
        self.put_versioned(keys::entry(self.shard, dir, cookie), &record);
        Ok(())
    }

    pub(crate) async fn remove_entry(&mut self, dir: Ino, name: &[u8]) -> Attempt<()> {
        let first = self.first_cookie(name);
        let slots = self.slots(dir, first).await?;
        let Some((cookie, _)) = slots.iter().find(|(_, record)| record.name.as_slice() == name) else {
            return Ok(());
        };
        let others = slots.iter().filter(|(at, record)| at != cookie && !record.name.is_empty()).count();
        if others == 0 {
            for (cookie, _) in &slots {
                self.delete(keys::entry(self.shard, dir, *cookie));
            }
        } else if *cookie == first {
            let vacant = EntryRecord { name: Name::new(), ino: dir, kind: FileKind::File };
            self.put_versioned(keys::entry(self.shard, dir, first), &vacant);
        } else {
            self.delete(keys::entry(self.shard, dir, *cookie));
        }
        Ok(())
    }

    /// Marks a directory's change of names.
    pub(crate) async fn names_changed(&mut self, dir: Ino, links: i32, entries: i64, now: Timestamp) -> Attempt<()> {
        let mut inode = self.inode_raw(dir).await?.ok_or(Errno::ENOENT)?;
        inode.nlink = inode.nlink.saturating_add_signed(links);
        inode.entries = inode.entries.saturating_add_signed(entries);
        inode.modify(now);
        self.put_inode(&inode, ChangeKind::Entries);
        Ok(())
    }

    /// Entries behind the cookie `after`, and whether there are no more.
    pub(crate) async fn list(
        &self,
        dir: &Inode,
        after: u64,
        entries_max: u32,
        with_attrs: bool,
    ) -> Attempt<(Vec<DirEntry>, bool)> {
        let max = entries_max.clamp(1, ENTRIES_MAX) as usize;
        let end = keys::after_prefix(&keys::of_ino(self.shard, keys::ENTRY, dir.ino));
        let mut entries = Vec::new();
        let mut next = after.checked_add(1);
        while let Some(from) = next {
            let rows = self.scan(keys::entry(self.shard, dir.ino, from), &end, PAGE_ROWS).await?;
            let last_page = rows.len() < PAGE_ROWS;
            for (key, value) in rows {
                let cookie = keys::u64_at(&key, keys::FIELDS + 8).ok_or_else(|| bad_key(&key))?;
                next = cookie.checked_add(1);
                let record = entry_of(&key, &value)?;
                if record.name.is_empty() {
                    continue;
                }
                if entries.len() == max {
                    return Ok((entries, false));
                }
                let EntryRecord { name, ino, kind } = record;
                let mut attr = None;
                if with_attrs && ino.shard() == self.shard {
                    attr = Some(self.inode(ino).await?.attr(self.config.policy));
                }
                entries.push(DirEntry { name, ino, kind, cookie, attr });
            }
            if last_page {
                break;
            }
        }
        Ok((entries, true))
    }
}

pub(crate) fn entry_of(key: &[u8], value: &[u8]) -> Result<EntryRecord, StateError> {
    Ok(decode::<super::records::Versioned<EntryRecord>>(key, value)?.record)
}

/// The lowest cookie of a hash that is not in use.
fn free_cookie(first: u64, slots: &[(u64, EntryRecord)]) -> Option<u64> {
    let used = |cookie: u64| slots.iter().any(|(at, record)| *at == cookie && !record.name.is_empty());
    (first..first + ORDINALS).find(|cookie| !used(*cookie))
}

/// Makes hashes collide, in tests.
#[cfg(test)]
pub(crate) mod collide {
    use std::cell::Cell;

    thread_local! {
        static MASK: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    pub(crate) fn mask() -> u64 {
        MASK.get()
    }

    pub(crate) fn set_mask(mask: u64) {
        MASK.set(mask);
    }
}
