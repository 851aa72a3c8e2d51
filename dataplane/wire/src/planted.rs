//! Deliberate bugs. With the feature `planted` the simulation switches one on and must find it
//! by its ordinary checks; without the feature [`is`] is a constant `false` and costs nothing.

macro_rules! bugs {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// One deliberate bug each; the name says which rule it breaks.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Bug {
            $($(#[$doc])* $name,)*
        }

        impl Bug {
            pub const ALL: &'static [Bug] = &[$(Bug::$name,)*];

            pub fn name(self) -> &'static str {
                match self { $(Bug::$name => stringify!($name),)* }
            }
        }
    };
}

bugs! {
    /// Store: answer `put` without flushing the device.
    StoreSkipFlush,
    /// Store: accept any zone generation when scanning headers.
    StoreIgnoreGeneration,
    /// Store: take the generation in a zone's header for its last, whatever was written since.
    StoreIgnoreNewerGeneration,
    /// Store: reuse a zone before its new generation is durable.
    StoreReuseBeforeGeneration,
    /// Store: do not write tombstones.
    StoreDropTombstone,
    /// Store: do not carry live tombstones forward when a zone is collected.
    StoreForgetTombstoneAtCollection,
    /// Store: skip payload checksums on read.
    StoreSkipChecksum,
    /// Store: treat corruption below the durable mark as a torn tail.
    StoreCorruptionAsTornTail,
    /// Store: reset a zone before the copies it held are flushed.
    StoreResetBeforeCopiesDurable,
    /// Store: take a put of an id that exists for one of a new id.
    StoreReuseId,
    /// Store: keep appends above the durable mark whose payloads are not wholly there.
    StoreKeepTornTail,
    /// Segments: acknowledge before every shard is durable.
    SegmentAckEarly,
    /// Segments: put two shards of one segment on one target.
    SegmentShareDomain,
    /// Segments: do not re-place a failed shard.
    SegmentSkipReplace,
    /// Segments: answer before the registration is committed.
    SegmentSkipRegistration,
    /// Collector: ask only one shard whether it holds a reference.
    CollectorAskOneShard,
    /// Orphan search: delete what nobody references without freezing it first.
    OrphansWithoutFreeze,
    /// Log: answer an append before it is durable.
    LogAckEarly,
    /// Log: lose the vote on restart.
    LogForgetVote,
    /// Log: cut above the last synced checkpoint.
    LogCutEarly,
    /// Log: acknowledge a batch before the ones ahead of it are durable.
    LogAckOutOfOrder,
    /// Log: take damage below the durable mark for a torn tail.
    LogCorruptionAsTornTail,
    /// Log: cut a batch without copying forward what is alive in it.
    LogCutBeforeCopy,
    /// Log: write one copy only.
    LogSingleCopy,
    /// Ordered store: checkpoint without the applied index.
    KvForgetApplied,
    /// Ordered store: drop deletions in a merge that is not the bottom.
    KvDropDeletionEarly,
    /// Ordered store: delete input runs before the new manifest is durable.
    KvDeleteRunsEarly,
    /// Ordered store: answer a checkpoint with the latest mark, not the one written.
    KvSyncedEarly,
    /// Metadata: run a repeated request again.
    MetaRerunRequest,
    /// Metadata: do not store the reply.
    MetaForgetReply,
    /// Metadata: write an extent without its back-reference.
    MetaForgetReference,
    /// Metadata: accept references that are frozen or too old.
    MetaAcceptFrozen,
    /// Metadata: let a fenced session go on.
    MetaSkipFencing,
    /// Metadata: keep no record of an unlinked inode.
    MetaDropOrphan,
    /// Metadata: decide a transaction without the coordinator's own effects.
    MetaDecideWithoutEffects,
    /// Metadata: commit a transaction on a participant without its effects.
    MetaCommitWithoutEffects,
    /// Metadata: prepare without locking the keys.
    MetaPrepareWithoutLocks,
    /// Metadata: grant a lock whatever others hold.
    MetaIgnoreLocks,
    /// Metadata: grant a second write lease.
    MetaShareWriteLease,
    /// Metadata: change an inode without telling those who cache it.
    MetaSkipInvalidate,
    /// Metadata: a new leader forgets that its predecessor gave out read leases.
    MetaForgetReaders,
    /// Metadata: a new leader aborts transactions that its predecessor had decided.
    MetaAbortDecided,
    /// Metadata: give the number of a removed inode to the next one.
    MetaReuseInodeNumber,
    /// Metadata: move a directory without walking the ancestors of its new place.
    MetaSkipAncestors,
    /// Metadata: remove a directory of another shard without asking whether it is empty.
    MetaSkipEmptyCheck,
    /// Metadata: forget the reply to the lowest request that the client still waits for.
    MetaForgetReplyEarly,
    /// Metadata: apply commits of an inode in any order, and twice.
    MetaIgnoreCommitSequence,
    /// Metadata: replace what stands in the place of an extent, whatever it is.
    MetaSwapBlindly,
    /// Metadata: tell attributes without asking the session that is changing them.
    MetaSkipRecall,
    /// Metadata: forget a decision before the participants have acknowledged it.
    MetaForgetDecisionEarly,
    /// Client: use what was granted after the lease has run out.
    ClientIgnoreExpiry,
    /// Client: repeat a change under a new request id.
    ClientRenumberRetry,
    /// Client: answer fsync before the commit is acknowledged.
    ClientFsyncEarly,
    /// Client: acknowledge an invalidation without dropping what is cached.
    ClientKeepInvalidated,
    /// Client: return a write lease without committing what is dirty.
    ClientReturnLeaseDirty,
    /// Client: truncate without committing earlier writes first.
    ClientTruncateEarly,
    /// Client: keep dirty data when the session was fenced and commit it in the next one.
    ClientKeepFencedData,
    /// Client: do not tell that dirty data was lost with a fenced session.
    ClientHideLoss,
    /// Client: rename a file without committing what was written to it.
    ClientRenameDirty,
    /// Client: append at the size it knows instead of the one that the change finds.
    ClientAppendAtSize,
    /// Client: keep written bytes without room that is reserved for them.
    ClientOverdrawSpace,
}

#[cfg(feature = "planted")]
mod switch {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static ACTIVE: Cell<Option<Bug>> = const { Cell::new(None) };
        static REACHED: Cell<u64> = const { Cell::new(0) };
    }

    /// Switches one bug on, on this thread; `None` switches all off.
    pub fn activate(bug: Option<Bug>) {
        ACTIVE.with(|active| active.set(bug));
    }

    pub fn is(bug: Bug) -> bool {
        let active = ACTIVE.with(|active| active.get() == Some(bug));
        if active {
            REACHED.with(|reached| reached.set(reached.get() + 1));
        }
        active
    }

    /// How often the code has come by a bug that was switched on, on this thread.
    pub fn reached() -> u64 {
        REACHED.with(Cell::get)
    }
}

#[cfg(feature = "planted")]
pub use switch::{activate, is, reached};

/// Whether this bug is switched on.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub const fn is(_bug: Bug) -> bool {
    false
}
