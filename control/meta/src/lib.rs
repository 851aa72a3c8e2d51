//! ClaudeFS metadata: namespace, inodes, extents, leases, locks
