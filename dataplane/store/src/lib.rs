//! ClaudeFS store: zones, blobs, segments, recovery, garbage collection
