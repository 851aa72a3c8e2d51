//! ClaudeFS background movers: collection, packing, repair, scrub
