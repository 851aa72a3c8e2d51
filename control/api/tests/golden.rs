//! The bytes of the admin bodies are pinned: a `cfsctl` of another version than the server's reads
//! them.

use cfs_api::{
    AdminCall, AdminError, AdminReply, CheckReport, CheckState, DeviceHealth, Df, FileExtent, FileStat, OP_ADMIN,
    PathPolicy, Repair, Shard, Status, Target,
};
use cfs_wire::golden::Golden;

fn text(text: &str) -> String {
    text.to_owned()
}

fn calls() -> Vec<AdminCall> {
    let path = b"/directory/caf\xe9".to_vec();
    vec![
        AdminCall::Status,
        AdminCall::Targets,
        AdminCall::Shards,
        AdminCall::Df,
        AdminCall::Stat { path: path.clone() },
        AdminCall::Extents { path: path.clone() },
        AdminCall::PolicyShow { path: path.clone() },
        AdminCall::PolicySet { path, policy: Some(text("3x")) },
        AdminCall::CheckStart { repair: true, deep: false },
        AdminCall::CheckPoll,
    ]
}

fn status() -> Status {
    Status {
        cluster: text("a cluster"),
        node: 0x0102,
        version: text("1.2.3"),
        policy: text("4+2"),
        shards: 0x0203,
        shards_led: 0x0201,
        targets_up: 5,
        targets_total: 6,
        sessions: 7,
        degraded_reads: 0x0304,
        uptime_seconds: 0x0405_0607,
        health: text("degraded"),
        repair: Repair {
            running: true,
            phase: text("segments"),
            queued: 0x0506,
            repaired: 0x0607,
            bytes: 0x0708_0910,
            waiting: 0x0809,
            lost: 0x0910,
            refilling: vec![3, 0x1011],
        },
        codec: text("simd"),
        fabric: text("tcp"),
    }
}

fn target() -> Target {
    Target {
        id: 0x0102,
        path: text("/dev/one"),
        state: text("up"),
        capacity_bytes: 0x1112_1314,
        live_bytes: 0x1011_1213,
        free_bytes: 0x0910_1112,
        zones: 0x0201,
        zones_free: 0x0202,
        log_bytes: 0x0301,
        run_bytes: 0x0302,
        manifest_bytes: 0x0303,
        hot_bytes: 0x0304,
        data_bytes: 0x0305,
        parity_bytes: 0x0306,
        tombstones: 0x0307,
        health: Some(DeviceHealth {
            warnings: vec![text("it is hot")],
            temperature_c: -40,
            spare_percent: 99,
            used_percent: 101,
            media_errors: 0x0401,
            unsafe_shutdowns: 0x0402,
            power_on_hours: 0x0403,
            placement_handles: 0x0404,
        }),
    }
}

fn shard() -> Shard {
    Shard {
        id: 0x0102,
        leader: Some(0x0203),
        term: 0x0304,
        applied: 0x0405,
        checkpointed: 0x0404,
        inodes: 0x0506,
        store_bytes: 0x0607,
        recent_runs: 8,
        level_bytes: vec![0x0910, 0x1011],
        entries: 0x1112,
    }
}

fn df() -> Df {
    Df {
        capacity_bytes: 0x0506_0708,
        free_bytes: 0x0405_0607,
        usable_free_bytes: 0x0203_0405,
        usable_total_bytes: 0x0304_0506,
        inodes: 0x0102,
    }
}

fn file() -> FileStat {
    FileStat {
        ino: 0x0003_0000_0000_0101,
        shard: 3,
        kind: text("file"),
        mode: text("0644"),
        nlink: 2,
        uid: 1001,
        gid: 2002,
        size: 0x0102_0304,
        allocated: 0x0103_0000,
        atime: text("accessed"),
        mtime: text("written"),
        ctime: text("changed"),
        btime: text("born"),
        policy: text("2+1"),
    }
}

fn check() -> CheckState {
    CheckState {
        id: 0x0102_0304,
        repair: true,
        deep: false,
        running: true,
        phase: text("blobs"),
        done: 0x0201,
        total: 0x0301,
        report: CheckReport {
            inodes: 0x0401,
            entries: 0x0402,
            references: 0x0403,
            segments: 0x0404,
            blobs: 0x0405,
            problems: vec![text("one"), text("another")],
            degraded: 0x0406,
            repaired: 0x0407,
            orphans: 0x0408,
        },
    }
}

fn replies() -> Vec<AdminReply> {
    let extent = FileExtent {
        offset: 0x0102_0304,
        length: 0x0506,
        kind: text("segment"),
        blob: text("0a0b"),
        targets: vec![2, 0x0708],
    };
    let policy = PathPolicy { path: text("/directory"), policy: text("3x"), survives: 2 };
    vec![
        AdminReply::Status(status()),
        AdminReply::Targets(vec![target()]),
        AdminReply::Shards(vec![shard()]),
        AdminReply::Df(df()),
        AdminReply::Stat(file()),
        AdminReply::Extents(vec![extent]),
        AdminReply::Policy(policy),
        AdminReply::Check(check()),
    ]
}

#[test]
fn the_admin_bodies_are_what_they_were() {
    let mut golden = Golden::new(env!("CARGO_MANIFEST_DIR"), "admin");
    golden.bytes("OP_ADMIN", &OP_ADMIN.to_le_bytes());
    golden.variants(&calls());
    golden.variants(&replies());
    golden.variants(&[
        AdminError::Path { path: text("/there"), detail: text("ENOENT") },
        AdminError::Policy(text("too wide")),
        AdminError::Malformed(text("left over")),
        AdminError::Unavailable(text("starting")),
        AdminError::CheckRunning { repair: true, deep: false },
    ]);
    golden.variants::<Result<AdminReply, AdminError>>(&[Ok(AdminReply::Df(df())), Err(AdminError::Policy(text("no")))]);
    golden.check();
}
