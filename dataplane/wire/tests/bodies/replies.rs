//! What clients are answered and told.

use super::data::{chunk, extent, hot};
use super::ops::lock;
use super::{DIR, GOLDEN, INO, NODE, OTHER_DIR, SESSION, policy, time};
use cfs_wire::meta::{
    Attr, DirEntry, Entry, Event, EventsReply, ExtentsReply, FileKind, Grant, MetaError, MetaReply, MetaResult,
    MountReply, MountResult, Name, Renewal, StatFs,
};
use cfs_wire::{Errno, VolumeId};

fn attr() -> Attr {
    Attr {
        ino: INO,
        kind: FileKind::Symlink,
        mode: 0o1755,
        nlink: 3,
        uid: 1005,
        gid: 2006,
        rdev: 0x0908_0706,
        size: 0x1112_1314,
        allocated: 0x2122_2324,
        atime: time(11),
        mtime: time(22),
        ctime: time(33),
        btime: time(44),
        version: 0x3132,
        has_xattrs: true,
        policy: policy(3, 1),
    }
}

const GRANT: Grant = Grant { read_ms: 30_000, write: true };
const DIR_GRANT: Grant = Grant { read_ms: 15_000, write: false };

fn listing() -> MetaReply {
    let entry = |name: &str, cookie, attr| DirEntry {
        name: Name::from_slice(name.as_bytes()),
        ino: INO,
        kind: FileKind::Fifo,
        cookie,
        attr,
    };
    let entries = vec![entry("near", 0x4142_4344, Some(attr())), entry("far", 0x5152_5354, None)];
    MetaReply::Entries { entries, end: true, parent: DIR, grant: GRANT }
}

fn replies() -> Vec<MetaReply> {
    let name = |text: &str| Name::from_slice(text.as_bytes());
    let extents = vec![extent(hot()), extent(chunk())];
    let inline = Some(b"head".to_vec());
    vec![
        MetaReply::Done,
        MetaReply::Entry(Entry { attr: attr(), grant: GRANT, dir_grant: DIR_GRANT }),
        MetaReply::Remote { ino: INO, kind: FileKind::Socket, dir_grant: DIR_GRANT },
        MetaReply::Attr { attr: attr(), grant: GRANT },
        MetaReply::Target(b"to/there".to_vec()),
        listing(),
        MetaReply::Value(b"a value".to_vec()),
        MetaReply::Names(vec![name("user.one"), name("user.two")]),
        MetaReply::Extents(ExtentsReply { attr: attr(), grant: GRANT, inline, extents, covered: 0x6162_6364 }),
        MetaReply::StatFs(StatFs { bytes_total: 0x7172_7374, bytes_free: 0x6162, inodes_used: 0x5152 }),
        MetaReply::Conflict(Some(lock())),
        MetaReply::Conflict(None),
        MetaReply::Lease { granted: true, attr: attr(), grant: GRANT },
        MetaReply::Committed { attr: attr(), append_offset: Some(0x8182_8384) },
        MetaReply::Session { lease_ms: 45_000 },
        MetaReply::Removed { ino: INO, nlink: 7 },
        MetaReply::Renamed { moved: vec![INO, DIR], replaced: Some((OTHER_DIR, 9)) },
        MetaReply::Renewed(vec![Renewal { version: 0x9192, grant: GRANT }]),
    ]
}

fn errors() -> Vec<MetaError> {
    vec![
        MetaError::Errno(Errno::ENOTEMPTY),
        MetaError::NotLeader { hint: Some(NODE) },
        MetaError::SessionUnknown,
        MetaError::Fenced,
        MetaError::StaleReference,
        MetaError::Unavailable("why".to_owned()),
        MetaError::Malformed("what".to_owned()),
        MetaError::Busy("what".to_owned()),
    ]
}

#[test]
fn what_clients_are_told_is_what_it_was() {
    let mut golden = GOLDEN("replies");
    golden.variants::<MetaResult>(&[Ok(MetaReply::Done), Err(MetaError::Fenced)]);
    golden.variants(&replies());
    golden.variants(&errors());
    let mounted = MountReply {
        volume: VolumeId(0x0102),
        root: DIR,
        shards: 0x0304,
        lease_ms: 45_000,
        session: SESSION,
        policy: policy(2, 1),
    };
    golden.body::<MountResult>("MountResult", &Ok(mounted));
    let events = vec![(0x0506, Event::Invalidate { ino: INO }), (0x0507, Event::RecallWrite { ino: DIR })];
    golden.body::<Result<EventsReply, MetaError>>("events", &Ok(EventsReply { events, alive: true }));
    golden.variants(&[
        Event::Invalidate { ino: INO },
        Event::RecallWrite { ino: INO },
        Event::InvalidateForPages { ino: INO },
    ]);
    golden.check();
}
