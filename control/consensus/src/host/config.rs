//! The host's settings.

use std::sync::Arc;
use std::time::Duration;

/// Entries in one message to a follower at most; their bytes are bounded separately.
const ENTRIES_PER_MESSAGE: u64 = 256;

#[derive(Clone, Debug)]
pub struct HostConfig {
    /// A leader's sign of life. At least 500 ms: with hundreds of groups a node, shorter ones
    /// cost most of a core.
    pub heartbeat: Duration,
    /// A follower that hears nothing this long (drawn anew each time) stands for election.
    pub election: (Duration, Duration),
}

impl Default for HostConfig {
    fn default() -> Self {
        HostConfig {
            heartbeat: Duration::from_millis(500),
            election: (Duration::from_millis(1500), Duration::from_millis(3000)),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl HostConfig {
    /// `ticking` is false for a group of one voter: nobody waits for its heartbeats, and an idle
    /// server must not wake.
    pub(super) fn raft(&self, ticking: bool) -> Arc<openraft::Config> {
        Arc::new(openraft::Config {
            cluster_name: "cfs".into(),
            heartbeat_interval: millis(self.heartbeat),
            election_timeout_min: millis(self.election.0),
            election_timeout_max: millis(self.election.1),
            install_snapshot_timeout: 60_000,
            max_payload_entries: ENTRIES_PER_MESSAGE,
            // Checkpoints are taken when the log has grown, not every so many entries; and the
            // host alone says how far the log is purged.
            snapshot_policy: openraft::SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            enable_tick: ticking,
            enable_heartbeat: ticking,
            enable_elect: ticking,
            enable_pre_vote: Some(true),
            // A leader replicates entries before its own disk has them. Restarted, it must not
            // lead on in the same term: it may have lost entries that its followers hold, and
            // would give their log ids to others.
            enable_leader_restore: Some(false),
            ..openraft::Config::default()
        })
    }
}
