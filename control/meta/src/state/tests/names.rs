//! Namespace stories that random operations don't tell: limits, listings under change, details
//! of rename.

use super::super::directory::collide;
use super::check::check;
use super::*;
use cfs_wire::limits::LINKS_MAX;
use cfs_wire::meta::{RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT};

#[test]
fn names_have_posix_limits() {
    let mut shard = Shard::new();
    let longest = "x".repeat(255);
    assert!(shard.create(ROOT, &longest, file()).is_ok());
    assert_eq!(errno(shard.create(ROOT, &"x".repeat(256), file())), Errno::ENAMETOOLONG);
    assert_eq!(errno(shard.create(ROOT, "", file())), Errno::ENOENT);
    assert_eq!(errno(shard.create(ROOT, "a/b", file())), Errno::EINVAL);
    for dots in [".", ".."] {
        assert_eq!(errno(shard.create(ROOT, dots, file())), Errno::EEXIST);
    }
    let target = |length| NewNode { target: vec![b'x'; length], ..node(FileKind::Symlink, 0o777) };
    assert_eq!(shard.create(ROOT, "s", target(4095)).unwrap().size, 4095);
    assert_eq!(errno(shard.create(ROOT, "t", target(4096))), Errno::ENAMETOOLONG);
    assert_eq!(errno(shard.create(ROOT, "t", target(0))), Errno::ENOENT);
}

#[test]
fn a_listing_goes_on_behind_its_cookie_while_entries_come_and_go() {
    for mask in [u64::MAX, 3] {
        collide::set_mask(mask);
        let mut shard = Shard::new();
        for number in 0..60 {
            shard.create(ROOT, &format!("stays{number}"), file()).unwrap();
            shard.create(ROOT, &format!("goes{number}"), file()).unwrap();
        }
        let (mut seen, mut after, mut step) = (Vec::new(), 0, 0);
        loop {
            let (entries, end) = shard.list(ROOT, after, 7).unwrap();
            for entry in &entries {
                assert!(entry.cookie > after);
                after = entry.cookie;
                seen.push(String::from_utf8(entry.name.to_vec()).unwrap());
            }
            if end {
                break;
            }
            shard.unlink(ROOT, &format!("goes{step}")).unwrap();
            shard.create(ROOT, &format!("comes{step}"), file()).unwrap();
            step += 1;
        }
        for number in 0..60 {
            let called = format!("stays{number}");
            assert_eq!(seen.iter().filter(|name| **name == called).count(), 1, "{called}");
        }
        collide::set_mask(u64::MAX);
    }
}

#[test]
fn an_entry_keeps_its_cookie_when_another_of_its_hash_goes() {
    collide::set_mask(0);
    let mut shard = Shard::new();
    for called in ["a", "b", "c"] {
        shard.create(ROOT, called, file()).unwrap();
    }
    let cookies = |shard: &Shard| -> Vec<u64> { shard.list(ROOT, 0, 9).unwrap().0.iter().map(|e| e.cookie).collect() };
    let before = cookies(&shard);
    shard.unlink(ROOT, "a").unwrap();
    assert_eq!(cookies(&shard), before[1..]);
    assert_eq!(shard.lookup(ROOT, "c").unwrap().nlink, 1);
    shard.create(ROOT, "d", file()).unwrap();
    assert_eq!(cookies(&shard), before);
    for called in ["b", "c", "d"] {
        shard.unlink(ROOT, called).unwrap();
    }
    assert_eq!(cookies(&shard), []);
    collide::set_mask(u64::MAX);
}

#[test]
fn links_end_at_their_limit() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    set_links(&mut shard, ino, LINKS_MAX - 1);
    let link = |called| MetaOp::Link { ino, dir: ROOT, name: name(called) };
    assert!(shard.call(link("last")).is_ok());
    assert_eq!(errno(shard.call(link("beyond"))), Errno::EMLINK);
    set_links(&mut shard, ROOT, LINKS_MAX);
    assert_eq!(errno(shard.create(ROOT, "d", dir())), Errno::EMLINK);
    assert!(shard.create(ROOT, "g", file()).is_ok());
}

/// A million links at once.
fn set_links(shard: &mut Shard, ino: Ino, nlink: u32) {
    use super::super::keys;
    use super::super::records::{Inode, Versioned, decode, encode};
    let key = keys::inode(shard.id, ino);
    let mut inode: Versioned<Inode> = decode(&key, &shard.state.map[&key]).unwrap();
    inode.record.nlink = nlink;
    shard.state.map.insert(key, encode(&inode).into());
}

#[test]
fn a_directory_does_not_move_beneath_itself() {
    let mut shard = Shard::new();
    let a = shard.create(ROOT, "a", dir()).unwrap().ino;
    let b = shard.create(a, "b", dir()).unwrap().ino;
    assert_eq!(errno(shard.rename(ROOT, "a", b, "x", 0)), Errno::EINVAL);
    assert_eq!(errno(shard.rename(ROOT, "a", a, "x", 0)), Errno::EINVAL);
    assert_eq!(errno(shard.rename(a, "b", ROOT, "a", 0)), Errno::ENOTEMPTY);
    let c = shard.create(b, "c", dir()).unwrap().ino;
    assert_eq!(errno(shard.rename(b, "c", ROOT, "a", RENAME_EXCHANGE)), Errno::EINVAL);
    let renamed = shard.rename(b, "c", ROOT, "c", RENAME_NOREPLACE);
    assert_eq!(renamed, Ok(MetaReply::Renamed { moved: vec![c], replaced: None }));
    assert_eq!((shard.attr(b).unwrap().nlink, shard.attr(ROOT).unwrap().nlink), (2, 4));
    let up = shard.read(MetaOp::Lookup { dir: c, name: name("..") }).unwrap();
    assert!(matches!(up, MetaReply::Entry(entry) if entry.attr.ino == ROOT));
    assert_eq!(errno(shard.rename(ROOT, "c", ROOT, "d", RENAME_WHITEOUT)), Errno::EINVAL);
    check(&[(shard.id, &shard.state)]).unwrap();
}

#[test]
fn a_directory_that_is_gone_but_held_is_empty_and_takes_nothing() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "d", dir()).unwrap().ino;
    shard.call(MetaOp::Open { ino }).unwrap();
    shard.call(MetaOp::Rmdir { dir: ROOT, name: name("d") }).unwrap();
    assert_eq!(shard.attr(ino).unwrap().nlink, 0);
    assert_eq!(shard.list(ino, 0, 9), Ok((vec![], true)));
    assert_eq!(errno(shard.create(ino, "f", file())), Errno::ENOENT);
    assert_eq!(errno(shard.lookup(ino, "f")), Errno::ENOENT);
}

#[test]
fn times_change_as_on_linux() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let times = |attr: Attr| (attr.mtime, attr.ctime);
    let made = at(shard.clock);
    assert_eq!((times(shard.attr(ino).unwrap()), times(shard.attr(ROOT).unwrap())), ((made, made), (made, made)));
    shard.rename(ROOT, "f", ROOT, "g", 0).unwrap();
    let renamed = at(shard.clock);
    assert_eq!(times(shard.attr(ino).unwrap()), (made, renamed));
    assert_eq!(times(shard.attr(ROOT).unwrap()), (renamed, renamed));
    // Truncating to the same size counts as a modification.
    shard.set(ino, AttrChanges { size: Some(0), ..Default::default() }).unwrap();
    let truncated = at(shard.clock);
    assert_eq!(times(shard.attr(ino).unwrap()), (truncated, truncated));
    let attr = shard.set(ino, AttrChanges { ctime: Some(at(7)), ..Default::default() }).unwrap();
    assert_eq!(times(attr), (truncated, at(7)));
}
