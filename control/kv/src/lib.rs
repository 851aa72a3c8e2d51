//! ClaudeFS ordered store: a log-structured merge tree on blobs
