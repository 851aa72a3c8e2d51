//! ClaudeFS POSIX client: operations, caches, write-behind
