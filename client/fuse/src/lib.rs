//! ClaudeFS FUSE adapter
