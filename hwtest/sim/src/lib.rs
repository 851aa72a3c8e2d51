//! ClaudeFS deterministic cluster simulation
