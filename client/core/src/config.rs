//! What a client may be told about itself, with defaults that fit a workstation.

use std::time::Duration;

/// Bounds and times of one client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientConfig {
    /// What the client calls itself at the server, for people to read.
    pub name: String,
    /// Written bytes that are not committed yet, over all files. Writers wait beyond it.
    pub dirty_bytes_max: usize,
    /// The same for one file, so that one stream leaves room for the others.
    pub dirty_inode_bytes_max: usize,
    /// Room that the server is asked to keep free for unwritten bytes. Bytes count more than once
    /// while they are on their way, so twice what may be dirty.
    pub reserved_bytes: u64,
    /// Written bytes are sent off when they are this old.
    pub write_back_after: Duration,
    /// Bytes kept for reading again, over all files.
    pub cache_bytes_max: usize,
    /// How far a sequential reader is read ahead for.
    pub read_ahead_bytes_max: usize,
    /// Directory entries kept, over all directories.
    pub entries_max: usize,
    /// A call that gets no answer is repeated for so long; then the program gets EIO. Less than a server
    /// leaves a client to write back what another one asks for (90 s). A call that may have to wait for
    /// that itself is repeated for twice as long.
    pub retry_window: Duration,
    /// One attempt of a metadata call.
    pub call_timeout: Duration,
    /// One attempt of a `store` or `fetch`: 4 MiB may take long on a busy disk.
    pub data_timeout: Duration,
    /// `store` calls at once for one file: one is coded while another is on its way.
    pub stores_in_flight: usize,
    /// An open-file hold and an idle write lease are given back this long after the last close,
    /// so that opening again costs nothing.
    pub linger: Duration,
}

impl Default for ClientConfig {
    fn default() -> ClientConfig {
        ClientConfig {
            name: "client".to_owned(),
            dirty_bytes_max: 64 << 20,
            dirty_inode_bytes_max: 24 << 20,
            reserved_bytes: 128 << 20,
            write_back_after: Duration::from_secs(1),
            cache_bytes_max: 64 << 20,
            read_ahead_bytes_max: 4 << 20,
            entries_max: 200_000,
            retry_window: Duration::from_secs(60),
            call_timeout: Duration::from_secs(10),
            data_timeout: Duration::from_secs(30),
            stores_in_flight: 4,
            linger: Duration::from_secs(2),
        }
    }
}
