//! The admin API: what `cfsctl` asks a server and what it answers. Types here are the JSON of
//! `cfsctl --json` as they are, so a field is never renamed, only added.
//!
//! It holds no logic but the [`client`] that carries a call over a fabric, and what both programs
//! tell those who wait for them ([`progress`]) or misspell something ([`misuse`]).
#![forbid(unsafe_code)]

pub mod client;
pub mod misuse;
pub mod progress;

use serde::{Deserialize, Serialize};

/// [`AdminCall`] in, `Result<AdminReply, AdminError>` out.
pub const OP_ADMIN: u16 = 0x0400;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum AdminCall {
    Status,
    Targets,
    Shards,
    Df,
    /// A path inside the volume, `/`-separated, as bytes.
    Stat {
        path: Vec<u8>,
    },
    Extents {
        path: Vec<u8>,
    },
    /// Answered by [`AdminReply::Policy`].
    PolicyShow {
        path: Vec<u8>,
    },
    /// A directory's own policy, such as `3x`; `None` takes it away. Answered by
    /// [`AdminReply::Policy`].
    PolicySet {
        path: Vec<u8>,
        policy: Option<String>,
    },
    /// Starts a check, or joins one that runs with the same options; with others it is refused.
    /// Answered, as is `CheckPoll`, by [`AdminReply::Check`].
    CheckStart {
        repair: bool,
        deep: bool,
    },
    CheckPoll,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum AdminReply {
    Status(Status),
    Targets(Vec<Target>),
    Shards(Vec<Shard>),
    Df(Df),
    Stat(FileStat),
    Extents(Vec<FileExtent>),
    Policy(PathPolicy),
    Check(CheckState),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum AdminError {
    #[error("{path}: {detail}")]
    Path { path: String, detail: String },
    #[error("policy: {0}")]
    Policy(String),
    #[error("malformed request: {0}")]
    Malformed(String),
    #[error("the server cannot answer now: {0}")]
    Unavailable(String),
    #[error("a check runs already, {}; wait for its end", check_options(*.repair, *.deep))]
    CheckRunning { repair: bool, deep: bool },
}

fn check_options(repair: bool, deep: bool) -> &'static str {
    match (repair, deep) {
        (false, false) => "without --repair and --deep",
        (true, false) => "with --repair and without --deep",
        (false, true) => "with --deep and without --repair",
        (true, true) => "with --repair and --deep",
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    pub cluster: String,
    pub node: u16,
    pub version: String,
    pub policy: String,
    pub shards: u16,
    pub shards_led: u16,
    pub targets_up: u32,
    pub targets_total: u32,
    pub sessions: u32,
    pub degraded_reads: u64,
    pub uptime_seconds: u64,
    /// `ok`, or `degraded`: a target is away or being refilled, or something waits for repair or
    /// is beyond it.
    pub health: String,
    pub repair: Repair,
    /// What codes segments on this node: `simd`, `isa-l` or `scalar`.
    pub codec: String,
    /// What clients can reach this node by: `tcp`, then what it offers them there, such as `ofi:verbs`.
    pub fabric: String,
}

/// Rebuilding of what lost and replaced targets held.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Repair {
    pub running: bool,
    /// `copies`, `segments`, `done`, `stopped`; empty while there was nothing to do.
    pub phase: String,
    /// Blobs or segments found short and not looked at yet.
    pub queued: u64,
    pub repaired: u64,
    pub bytes: u64,
    /// Short, but no target is free to take what is missing.
    pub waiting: u64,
    /// Segments that lost more than parity repairs; some may be garbage: `check` tells.
    pub lost: u64,
    /// Replacements that do not hold yet what the targets before them held.
    pub refilling: Vec<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Target {
    pub id: u32,
    pub path: String,
    pub state: String,
    pub capacity_bytes: u64,
    pub live_bytes: u64,
    pub free_bytes: u64,
    pub zones: u32,
    pub zones_free: u32,
    /// Payload bytes of live blobs, by what they are: batches of the Raft log, tables and
    /// manifests of the ordered stores, small writes, data and parity shards of segments.
    pub log_bytes: u64,
    pub run_bytes: u64,
    pub manifest_bytes: u64,
    pub hot_bytes: u64,
    pub data_bytes: u64,
    pub parity_bytes: u64,
    /// Deletions that still guard against a copy of their blob.
    pub tombstones: u64,
    /// What the device says of its own state; absent if it does not tell.
    pub health: Option<DeviceHealth>,
}

/// What a device says of its own state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceHealth {
    /// What it warns of, in words; empty if nothing.
    pub warnings: Vec<String>,
    pub temperature_c: i32,
    pub spare_percent: u8,
    /// Of the life its maker expects; may exceed 100.
    pub used_percent: u8,
    pub media_errors: u64,
    pub unsafe_shutdowns: u64,
    pub power_on_hours: u64,
    /// Reclaim unit handles by which it keeps apart what dies at different times; 0 if that is not used.
    pub placement_handles: u16,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shard {
    pub id: u16,
    pub leader: Option<u16>,
    pub term: u64,
    pub applied: u64,
    pub checkpointed: u64,
    pub inodes: u64,
    /// Bytes of the ordered store's runs, one copy.
    pub store_bytes: u64,
    /// Runs that were not merged into a level yet.
    pub recent_runs: u64,
    /// Bytes per level, the first level first.
    pub level_bytes: Vec<u64>,
    /// Entries in runs and memory; superseded ones and deletions count until merged away.
    pub entries: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Df {
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    /// What the free space holds under the volume's policy.
    pub usable_free_bytes: u64,
    pub usable_total_bytes: u64,
    pub inodes: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileStat {
    pub ino: u64,
    pub shard: u16,
    pub kind: String,
    pub mode: String,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub allocated: u64,
    pub atime: String,
    pub mtime: String,
    pub ctime: String,
    pub btime: String,
    pub policy: String,
}

/// How redundantly the new bytes of a file, or of what is created in a directory, are stored.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PathPolicy {
    pub path: String,
    pub policy: String,
    /// Lost targets that it survives.
    pub survives: u32,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileExtent {
    pub offset: u64,
    pub length: u64,
    /// `inline`, `hot` or `segment`.
    pub kind: String,
    pub blob: String,
    pub targets: Vec<u32>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CheckState {
    /// Tells this check from every other, also of a server that was restarted; 0: none was begun.
    pub id: u32,
    pub repair: bool,
    pub deep: bool,
    pub running: bool,
    pub phase: String,
    pub done: u64,
    pub total: u64,
    pub report: CheckReport,
}

/// What a check found. A clean file system has `problems` empty.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CheckReport {
    pub inodes: u64,
    pub entries: u64,
    pub references: u64,
    pub segments: u64,
    pub blobs: u64,
    /// Data or metadata that is wrong or lost.
    pub problems: Vec<String>,
    /// Redundancy below the policy: readable, and `--repair` restores it.
    pub degraded: u64,
    pub repaired: u64,
    pub orphans: u64,
}

impl CheckState {
    /// What the check with this id found, once it is done. `None`: it is under way.
    ///
    /// # Errors
    /// The server knows nothing of it (it was restarted), or has begun another check since.
    pub fn result_of(&self, id: u32) -> Result<Option<&CheckReport>, CheckLost> {
        match (self.id == id && id != 0, self.running, self.phase.as_str()) {
            (true, true, _) => Ok(None),
            (true, false, "done") => Ok(Some(&self.report)),
            _ => Err(CheckLost { replaced: self.id != 0 }),
        }
    }
}

/// A check whose end nobody knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the check did not finish: {}; start it again",
    if *.replaced { "the server has begun another one since" } else { "the server was restarted" })]
pub struct CheckLost {
    pub replaced: bool,
}

impl CheckReport {
    /// Whether nothing is wrong and all redundancy is there.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty() && self.degraded == self.repaired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(id: u32, running: bool, phase: &str) -> CheckState {
        CheckState { id, running, phase: phase.to_owned(), ..CheckState::default() }
    }

    #[test]
    fn only_the_end_of_this_very_check_is_its_result() {
        assert_eq!(state(7, true, "segments").result_of(7), Ok(None));
        assert_eq!(state(7, false, "done").result_of(7), Ok(Some(&CheckReport::default())));
        // A restarted server's first state looks like the end of a check that found nothing.
        assert_eq!(CheckState::default().result_of(7), Err(CheckLost { replaced: false }));
        assert_eq!(CheckState::default().result_of(0), Err(CheckLost { replaced: false }));
        assert_eq!(state(8, true, "metadata").result_of(7), Err(CheckLost { replaced: true }));
        assert_eq!(state(8, false, "done").result_of(7), Err(CheckLost { replaced: true }));
        assert_eq!(
            CheckLost { replaced: false }.to_string(),
            "the check did not finish: the server was restarted; start it again"
        );
    }
}
