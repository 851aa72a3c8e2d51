//! A shard's records one by one, for `cfsctl check` and the simulation's checkers.

use super::directory::entry_of;
use super::file::extent_of;
use super::liveness::ROWS_MAX;
use super::records::{Inode, TxnRecord, Versioned, decode};
use super::view::{View, bad_key};
use super::{StateError, keys};
use bytes::Bytes;
use cfs_wire::Ino;
use cfs_wire::meta::{AuditRecord, ShardReply};

/// The tables a check looks at, in key order.
const TABLES: [u8; 7] =
    [keys::INODE, keys::ENTRY, keys::EXTENT, keys::REFERENCE, keys::REGISTRATION, keys::ORPHAN, keys::TRANSACTION];

/// Rows of one reply: a registration is up to about 10 KiB, and the body limit is 2 MiB.
const REGISTRATIONS_MAX: usize = 64;

impl View<'_> {
    /// Records behind the position `after`, which is the key last reported.
    pub(crate) async fn audit(&self, after: Option<&[u8]>, max: u32) -> Result<ShardReply, StateError> {
        let max = max.clamp(1, ROWS_MAX) as usize;
        let from = after.map(|key| [key, &[0]].concat()).unwrap_or_default();
        for table in TABLES {
            let prefix = keys::table(self.shard, table);
            let end = keys::after_prefix(&prefix);
            let max = if table == keys::REGISTRATION { max.min(REGISTRATIONS_MAX) } else { max };
            let rows = self.scan(prefix.max(from.clone()), &end, max).await?;
            let Some((last, _)) = rows.last() else {
                continue;
            };
            let next = Some(last.clone());
            let mut records = Vec::with_capacity(rows.len());
            for (key, value) in &rows {
                records.extend(self.audit_record(table, key, value).await?);
            }
            return Ok(ShardReply::Audit { records, next });
        }
        Ok(ShardReply::Audit { records: Vec::new(), next: None })
    }

    async fn audit_record(&self, table: u8, key: &[u8], value: &Bytes) -> Result<Option<AuditRecord>, StateError> {
        let field = |at: usize| keys::u64_at(key, keys::FIELDS + at).ok_or_else(|| bad_key(key));
        Ok(Some(match table {
            keys::INODE => {
                let inode: Inode = decode::<Versioned<Inode>>(key, value)?.record;
                let attr = inode.attr(self.config.policy);
                AuditRecord::Inode {
                    ino: attr.ino,
                    kind: attr.kind,
                    nlink: attr.nlink,
                    size: attr.size,
                    allocated: attr.allocated,
                    inline: inode.inline.len() as u32,
                    parent: inode.parent,
                }
            }
            keys::ENTRY => {
                let entry = entry_of(key, value)?;
                if entry.name.is_empty() {
                    return Ok(None);
                }
                let dir = Ino::from_u64(field(0)?);
                AuditRecord::Entry { dir, name: entry.name, ino: entry.ino, kind: entry.kind }
            }
            keys::EXTENT => AuditRecord::Extent { ino: Ino::from_u64(field(0)?), extent: extent_of(key, value)? },
            keys::REFERENCE => AuditRecord::BackReference {
                referent: keys::referent_at(key, keys::FIELDS).ok_or_else(|| bad_key(key))?,
                ino: Ino::from_u64(field(keys::REFERENT_BYTES)?),
                offset: field(keys::REFERENT_BYTES + 8)?,
            },
            keys::REGISTRATION => {
                let registration: cfs_wire::data::Registration = decode(key, value)?;
                let dead = self.dead_slots(registration.segment).await?;
                AuditRecord::Registration { registration, dead }
            }
            keys::ORPHAN => AuditRecord::Orphan { ino: Ino::from_u64(field(0)?) },
            _ => {
                let record: TxnRecord = decode(key, value)?;
                let role = if record.lead.is_some() { "coordinating" } else { "taking part" };
                let stage = if record.decided { "decided" } else { "prepared" };
                AuditRecord::Transaction { detail: format!("{role}, {stage}, {} actions", record.actions.len()) }
            }
        }))
    }
}
