//! ClaudeFS Multi-Raft host and its log on targets
