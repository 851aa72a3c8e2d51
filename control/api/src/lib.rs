//! ClaudeFS admin API types and client
