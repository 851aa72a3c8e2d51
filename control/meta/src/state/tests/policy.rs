//! Policies of directories.

use super::*;
use cfs_wire::Policy;
use cfs_wire::meta::{XATTR_CREATE, XATTR_POLICY, XATTR_REPLACE};

fn set(shard: &mut Shard, ino: Ino, value: &str, flags: u32) -> MetaResult {
    let name = XATTR_POLICY.iter().copied().collect();
    shard.call(MetaOp::SetXattr { ino, name, value: value.as_bytes().to_vec(), flags })
}

fn shown(shard: &Shard, ino: Ino) -> String {
    match shard.read(MetaOp::GetXattr { ino, name: XATTR_POLICY.iter().copied().collect() }) {
        Ok(MetaReply::Value(value)) => String::from_utf8(value).unwrap(),
        other => panic!("not a value: {other:?}"),
    }
}

fn policy(text: &str) -> Policy {
    text.parse().unwrap()
}

#[test]
fn what_is_made_in_a_directory_takes_its_policy_and_keeps_it() {
    let mut shard = Shard::new();
    let scratch = shard.create(ROOT, "scratch", dir()).unwrap();
    let before = shard.create(scratch.ino, "before", file()).unwrap();
    assert_eq!(before.policy, policy("2+1"));
    assert_eq!(set(&mut shard, scratch.ino, "1+0", 0), Ok(MetaReply::Done));
    assert_eq!(shown(&shard, scratch.ino), "1+0");

    let file_in = shard.create(scratch.ino, "file", file()).unwrap();
    let inner = shard.create(scratch.ino, "inner", dir()).unwrap();
    let deep = shard.create(inner.ino, "deep", file()).unwrap();
    for made in [&file_in, &inner, &deep] {
        assert_eq!(made.policy, policy("1+0"));
    }
    assert_eq!(shard.attr(before.ino).unwrap().policy, policy("2+1"), "it was there already");

    // A file that moves keeps the promise its bytes were stored under; so does the subdirectory.
    shard.rename(scratch.ino, "file", ROOT, "moved", 0).unwrap();
    assert_eq!(shard.lookup(ROOT, "moved").unwrap().policy, policy("1+0"));
    let remove = MetaOp::RemoveXattr { ino: scratch.ino, name: XATTR_POLICY.iter().copied().collect() };
    assert_eq!(shard.call(remove.clone()), Ok(MetaReply::Done));
    assert_eq!(shard.create(scratch.ino, "later", file()).unwrap().policy, policy("2+1"));
    assert_eq!(shard.attr(inner.ino).unwrap().policy, policy("1+0"));
    assert_eq!(errno(shard.call(remove)), Errno::ENODATA);
}

#[test]
fn what_cannot_be_kept_or_makes_no_sense_is_refused_and_changes_nothing() {
    let mut shard = Shard::new();
    let some = shard.create(ROOT, "dir", dir()).unwrap();
    let plain = shard.create(ROOT, "file", file()).unwrap();
    // The metadata survives the loss of one of three targets.
    for beyond in ["3x", "3+1", "8+2"] {
        assert_eq!(errno(set(&mut shard, some.ino, beyond, 0)), Errno::EOPNOTSUPP, "{beyond}");
    }
    for nonsense in ["", "2", "2-1", "33+1", "2+1 "] {
        assert_eq!(errno(set(&mut shard, some.ino, nonsense, 0)), Errno::EINVAL, "{nonsense}");
    }
    assert_eq!(errno(set(&mut shard, plain.ino, "1+0", 0)), Errno::ENOTDIR);
    assert_eq!(errno(set(&mut shard, some.ino, "1+0", XATTR_REPLACE)), Errno::ENODATA);
    let untouched = shard.attr(some.ino).unwrap();
    assert_eq!((untouched.policy, untouched.ctime), (policy("2+1"), some.ctime));

    assert_eq!(set(&mut shard, some.ino, "2x", XATTR_CREATE), Ok(MetaReply::Done));
    assert_eq!(errno(set(&mut shard, some.ino, "1+0", XATTR_CREATE)), Errno::EEXIST);
    assert_eq!(shown(&shard, some.ino), "2x");
    // It is no attribute that copies of the directory would carry along.
    assert_eq!(shard.read(MetaOp::ListXattr { ino: some.ino }), Ok(MetaReply::Names(Vec::new())));
}

#[test]
fn an_administrator_sets_what_a_user_can_and_no_more() {
    let mut shard = Shard::new();
    let some = shard.create(ROOT, "dir", dir()).unwrap();
    let plain = shard.create(ROOT, "file", file()).unwrap();
    let op = |ino, policy: Option<&str>| ShardOp::SetPolicy { ino, policy: policy.map(|text| text.parse().unwrap()) };
    assert_eq!(shard.shard_op(op(some.ino, Some("1+0"))), ShardReply::Done);
    assert_eq!(shard.create(some.ino, "in", file()).unwrap().policy, policy("1+0"));
    assert_eq!(shard.shard_op(op(some.ino, None)), ShardReply::Done);
    assert_eq!(shard.attr(some.ino).unwrap().policy, policy("2+1"));
    for (ino, text, expected) in [(plain.ino, "1+0", Errno::ENOTDIR), (some.ino, "3x", Errno::EOPNOTSUPP)] {
        let entry = LogEntry::Shard { op: op(ino, Some(text)), now: at(2000) };
        assert_eq!(shard.entry(entry), Reply::Meta(Err(MetaError::Errno(expected))));
    }
}
