//! Extended attributes and ACLs, against what Linux does (acl(5), setfacl and getfattr on ext4).

use super::super::acl::{ACCESS, DEFAULT};
use super::*;
use cfs_wire::meta::{XATTR_CLEAR_SGID, XATTR_CREATE, XATTR_REPLACE};

const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;

fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const NO: u32 = u32::MAX;

fn set(shard: &mut Shard, ino: Ino, called: &[u8], value: &[u8], flags: u32) -> MetaResult {
    shard.call(MetaOp::SetXattr { ino, name: SmallVec::from_slice(called), value: value.to_vec(), flags })
}

fn get(shard: &Shard, ino: Ino, called: &[u8]) -> Result<Vec<u8>, MetaError> {
    match shard.read(MetaOp::GetXattr { ino, name: SmallVec::from_slice(called) })? {
        MetaReply::Value(value) => Ok(value),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_access_acl_and_the_mode_follow_each_other() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let list = |user, group, mask, other| {
        acl(&[(USER_OBJ, user, NO), (USER, 7, 5), (GROUP_OBJ, group, NO), (MASK, mask, NO), (OTHER, other, NO)])
    };
    set(&mut shard, ino, ACCESS, &list(6, 5, 3, 4), 0).unwrap();
    assert_eq!(shard.attr(ino).unwrap().mode, 0o634);
    shard.set(ino, AttrChanges { mode: Some(0o4751), ..Default::default() }).unwrap();
    assert_eq!(get(&shard, ino, ACCESS), Ok(list(7, 5, 5, 1)));
    // One that says no more than a mode is not kept.
    set(&mut shard, ino, ACCESS, &acl(&[(USER_OBJ, 6, NO), (GROUP_OBJ, 4, NO), (OTHER, 0, NO)]), 0).unwrap();
    assert_eq!(shard.attr(ino).unwrap().mode, 0o4640);
    assert_eq!(errno(get(&shard, ino, ACCESS)), Errno::ENODATA);
    assert!(!shard.attr(ino).unwrap().has_xattrs);
    shard.set(ino, AttrChanges { mode: Some(0o2770), ..Default::default() }).unwrap();
    set(&mut shard, ino, ACCESS, &list(7, 7, 7, 0), XATTR_CLEAR_SGID).unwrap();
    assert_eq!(shard.attr(ino).unwrap().mode, 0o770);
    let remove = MetaOp::RemoveXattr { ino, name: SmallVec::from_slice(ACCESS) };
    assert_eq!((shard.call(remove.clone()), shard.call(remove)), (Ok(MetaReply::Done), Ok(MetaReply::Done)));
}

#[test]
fn a_default_acl_takes_the_umasks_place_and_passes_to_subdirectories() {
    let mut shard = Shard::new();
    let parent = shard.create(ROOT, "d", dir()).unwrap().ino;
    let default = acl(&[(USER_OBJ, 7, NO), (USER, 6, 9), (GROUP_OBJ, 5, NO), (MASK, 7, NO), (OTHER, 5, NO)]);
    set(&mut shard, parent, DEFAULT, &default, 0).unwrap();
    assert_eq!(shard.attr(parent).unwrap().mode, 0o755);
    let child = shard.create(parent, "f", node(FileKind::File, 0o664)).unwrap();
    assert_eq!(child.mode, 0o664);
    let access = acl(&[(USER_OBJ, 6, NO), (USER, 6, 9), (GROUP_OBJ, 5, NO), (MASK, 6, NO), (OTHER, 4, NO)]);
    assert_eq!(get(&shard, child.ino, ACCESS), Ok(access));
    assert_eq!(errno(get(&shard, child.ino, DEFAULT)), Errno::ENODATA);
    let sub = shard.create(parent, "sub", dir()).unwrap();
    assert_eq!((sub.mode, get(&shard, sub.ino, DEFAULT)), (0o775, Ok(default)));
    // A minimal default ACL only narrows the mode.
    set(&mut shard, parent, DEFAULT, &acl(&[(USER_OBJ, 7, NO), (GROUP_OBJ, 0, NO), (OTHER, 0, NO)]), 0).unwrap();
    let narrow = shard.create(parent, "narrow", file()).unwrap();
    assert_eq!((narrow.mode, narrow.has_xattrs), (0o600, false));
    let link = NewNode { target: b"t".to_vec(), ..node(FileKind::Symlink, 0) };
    assert_eq!(shard.create(parent, "link", link).unwrap().mode, 0o777);
}

#[test]
fn malformed_and_misplaced_acls_are_refused() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let base = [(USER_OBJ, 7, NO), (GROUP_OBJ, 5, NO), (OTHER, 5, NO)];
    let bad: [&[(u16, u16, u32)]; 7] = [
        &base[..2],
        &[base[1], base[0], base[2]],
        &[base[0], (USER, 7, 1), base[1], base[2]],
        &[base[0], (USER, 7, NO), base[1], (MASK, 7, NO), base[2]],
        &[base[0], base[1], (OTHER, 8, NO)],
        &[base[0], base[0], base[1], base[2]],
        &[base[0], base[1], (GROUP, 1, 1), (MASK, 1, NO), (MASK, 1, NO), base[2]],
    ];
    for entries in bad {
        assert_eq!(errno(set(&mut shard, ino, ACCESS, &acl(entries), 0)), Errno::EINVAL, "{entries:?}");
    }
    let mut cut = acl(&base);
    cut.pop();
    assert_eq!(errno(set(&mut shard, ino, ACCESS, &cut, 0)), Errno::EINVAL);
    assert_eq!(errno(set(&mut shard, ino, ACCESS, &[3, 0, 0, 0], 0)), Errno::EOPNOTSUPP);
    assert_eq!(errno(set(&mut shard, ino, DEFAULT, &acl(&base), 0)), Errno::EACCES);
    let link = NewNode { target: b"t".to_vec(), ..node(FileKind::Symlink, 0) };
    let link = shard.create(ROOT, "link", link).unwrap().ino;
    assert_eq!(errno(set(&mut shard, link, ACCESS, &acl(&base), 0)), Errno::EOPNOTSUPP);
}

#[test]
fn attributes_have_namespaces_flags_and_limits() {
    let mut shard = Shard::new();
    let ino = shard.create(ROOT, "f", file()).unwrap().ino;
    let pipe = shard.create(ROOT, "p", node(FileKind::Fifo, 0o600)).unwrap().ino;
    assert_eq!(errno(set(&mut shard, ino, b"user.x", b"1", XATTR_REPLACE)), Errno::ENODATA);
    assert_eq!(set(&mut shard, ino, b"user.x", b"1", XATTR_CREATE), Ok(MetaReply::Done));
    assert_eq!(errno(set(&mut shard, ino, b"user.x", b"2", XATTR_CREATE)), Errno::EEXIST);
    assert_eq!(get(&shard, ino, b"user.x"), Ok(b"1".to_vec()));
    assert_eq!(errno(set(&mut shard, pipe, b"user.x", b"1", 0)), Errno::EPERM);
    for called in [b"trusted.x".as_slice(), b"security.x"] {
        assert_eq!(set(&mut shard, pipe, called, b"1", 0), Ok(MetaReply::Done));
    }
    assert_eq!(errno(set(&mut shard, ino, b"system.x", b"1", 0)), Errno::EOPNOTSUPP);
    assert_eq!(errno(set(&mut shard, ino, b"other", b"1", 0)), Errno::EOPNOTSUPP);
    assert_eq!(errno(set(&mut shard, ino, b"user.", b"1", 0)), Errno::EINVAL);
    assert_eq!(errno(set(&mut shard, ino, &[b"user.".as_slice(), &[b'x'; 251]].concat(), b"1", 0)), Errno::ERANGE);
    assert_eq!(errno(set(&mut shard, ino, b"user.big", &vec![0; (64 << 10) + 1], 0)), Errno::E2BIG);
    let full = (0..400).map(|n| set(&mut shard, ino, format!("user.{n:0>250}").as_bytes(), b"", 0));
    let refused: Vec<_> = full.filter(|result| result.is_err()).collect();
    assert_eq!(refused.len(), 400 - ((64 << 10) - 7) / 256);
    assert_eq!(refused.first(), Some(&Err(Errno::ENOSPC.into())));
}

#[test]
fn setgid_directories_pass_their_group_on() {
    let mut shard = Shard::new();
    let parent = shard.create(ROOT, "d", NewNode { gid: 77, ..node(FileKind::Directory, 0o2775) }).unwrap().ino;
    let child = shard.create(parent, "f", file()).unwrap();
    let sub = shard.create(parent, "s", dir()).unwrap();
    assert_eq!((child.gid, child.mode, sub.gid, sub.mode), (77, 0o644, 77, 0o2755));
}

#[test]
fn killing_privileges_spares_directories_and_locking_bits() {
    let mut shard = Shard::new();
    for (kind, mode, left) in
        [(FileKind::File, 0o6755, 0o755), (FileKind::File, 0o6745, 0o2745), (FileKind::Directory, 0o6755, 0o6755)]
    {
        let called = format!("{kind:?}{mode:o}");
        let ino = shard.create(ROOT, &called, node(kind, mode)).unwrap().ino;
        let changes = AttrChanges { uid: Some(3), kill_privileges: true, ..Default::default() };
        assert_eq!(shard.set(ino, changes).unwrap().mode, left, "{called}");
    }
}
