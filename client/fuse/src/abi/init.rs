//! What both sides agree upon at the beginning.

use super::*;

/// Requests of read-ahead and asynchronous direct I/O that the kernel keeps under way.
const BACKGROUND_MAX: u16 = 64;
/// From here on the kernel takes the device for busy and holds write-back off.
const CONGESTION: u16 = BACKGROUND_MAX / 4 * 3;
const PAGE: usize = 4096;

/// What is asked of the kernel, if it has it. Never FUSE_WRITEBACK_CACHE: it ignores changes of
/// size made elsewhere. Never FUSE_ATOMIC_O_TRUNC: with it the kernel sends O_TRUNC before it looks
/// whether the file is a running program, which then dies.
const WANTED: [(&str, u64); 16] = [
    ("ASYNC_READ", ASYNC_READ),
    ("BIG_WRITES", BIG_WRITES),
    ("MAX_PAGES", MAX_PAGES),
    ("INIT_EXT", INIT_EXT),
    ("POSIX_LOCKS", POSIX_LOCKS),
    ("FLOCK_LOCKS", FLOCK_LOCKS),
    ("EXPORT_SUPPORT", EXPORT_SUPPORT),
    // The umask does not apply under a default ACL; only the shard knows.
    ("DONT_MASK", DONT_MASK),
    ("AUTO_INVAL_DATA", AUTO_INVAL_DATA),
    ("ASYNC_DIO", ASYNC_DIO),
    ("PARALLEL_DIROPS", PARALLEL_DIROPS),
    ("POSIX_ACL", POSIX_ACL),
    ("CACHE_SYMLINKS", CACHE_SYMLINKS),
    ("HANDLE_KILLPRIV_V2", HANDLE_KILLPRIV_V2),
    ("SETXATTR_EXT", SETXATTR_EXT),
    ("DIRECT_IO_ALLOW_MMAP", DIRECT_IO_ALLOW_MMAP),
];

/// What was agreed upon, as far as it changes how messages look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Features {
    /// SETXATTR carries its second word of flags.
    pub setxattr_ext: bool,
    /// NOTIFY_INC_EPOCH is understood.
    pub epoch: bool,
}

/// Why the kernel's offer is not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// The kernel speaks a newer major version: it is told ours and asks again.
    Newer,
    /// It is too old.
    Older { major: u32, minor: u32 },
}

/// The answer to an INIT.
pub(crate) fn negotiate(offer: &InitIn) -> Result<(InitOut, Features), Refusal> {
    if offer.major > MAJOR {
        return Err(Refusal::Newer);
    }
    if offer.major < MAJOR || offer.minor < MINOR_MIN {
        return Err(Refusal::Older { major: offer.major, minor: offer.minor });
    }
    let mut offered = u64::from(offer.flags);
    if offered & INIT_EXT != 0 {
        offered |= u64::from(offer.flags2) << 32;
    }
    for (name, _) in WANTED.iter().filter(|(_, bit)| offered & bit == 0) {
        tracing::info!(name, "the kernel lacks a FUSE feature");
    }
    let taken = WANTED.iter().map(|(_, bit)| offered & bit).fold(0, |all, bit| all | bit);
    let answer = InitOut {
        major: MAJOR,
        minor: offer.minor.min(MINOR),
        max_readahead: offer.max_readahead.max(WRITE_BYTES_MAX as u32),
        flags: taken as u32,
        flags2: (taken >> 32) as u32,
        max_background: BACKGROUND_MAX,
        congestion_threshold: CONGESTION,
        max_write: WRITE_BYTES_MAX as u32,
        time_gran: 1,
        max_pages: (WRITE_BYTES_MAX / PAGE) as u16,
        ..InitOut::default()
    };
    let features = Features { setxattr_ext: taken & SETXATTR_EXT != 0, epoch: offer.minor >= MINOR_EPOCH };
    Ok((answer, features))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(minor: u32, flags: u32, flags2: u32) -> InitIn {
        InitIn { major: MAJOR, minor, max_readahead: 131_072, flags, flags2, ..InitIn::default() }
    }

    #[test]
    fn a_kernel_that_offers_everything_is_taken_at_our_word_but_never_caches_writes() {
        const WRITEBACK_CACHE: u32 = 1 << 16;
        const ATOMIC_O_TRUNC: u32 = 1 << 3;
        let (answer, features) = negotiate(&offer(99, u32::MAX, u32::MAX)).unwrap();
        let all = WANTED.iter().fold(0, |all, (_, bit)| all | bit);
        assert_eq!(u64::from(answer.flags) | u64::from(answer.flags2) << 32, all);
        assert_eq!(answer.flags & (WRITEBACK_CACHE | ATOMIC_O_TRUNC), 0);
        assert_eq!((answer.major, answer.minor, answer.max_write, answer.max_pages), (7, 45, 1 << 20, 256));
        assert_eq!(features, Features { setxattr_ext: true, epoch: true });
    }

    #[test]
    fn what_is_not_offered_is_not_taken_and_the_second_word_counts_only_where_announced() {
        let (answer, features) = negotiate(&offer(38, ASYNC_READ as u32, u32::MAX)).unwrap();
        assert_eq!((answer.minor, answer.flags, answer.flags2), (38, ASYNC_READ as u32, 0));
        assert_eq!(features, Features { setxattr_ext: false, epoch: false });
        let (answer, _) = negotiate(&offer(40, INIT_EXT as u32, u32::MAX)).unwrap();
        assert_eq!((answer.flags, answer.flags2), (INIT_EXT as u32, (DIRECT_IO_ALLOW_MMAP >> 32) as u32));
    }

    #[test]
    fn other_major_versions_and_kernels_before_5_17_are_refused() {
        assert_eq!(negotiate(&InitIn { major: 8, ..offer(0, 0, 0) }), Err(Refusal::Newer));
        assert_eq!(negotiate(&offer(35, u32::MAX, 0)), Err(Refusal::Older { major: 7, minor: 35 }));
        assert_eq!(negotiate(&InitIn { major: 6, ..offer(99, 0, 0) }), Err(Refusal::Older { major: 6, minor: 99 }));
    }
}
