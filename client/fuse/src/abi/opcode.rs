//! What a request asks for.

macro_rules! opcodes {
    ($($name:ident = $value:literal),* $(,)?) => {
        /// An operation's number (`enum fuse_opcode`).
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Opcode { $($name = $value),* }

        impl Opcode {
            /// Every opcode that Linux has, for tests that leave none out.
            #[cfg(test)]
            pub const ALL: &[Opcode] = &[$(Opcode::$name),*];

            pub fn from_u32(number: u32) -> Option<Opcode> {
                match number {
                    $($value => Some(Opcode::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1, Forget = 2, GetAttr = 3, SetAttr = 4, ReadLink = 5, Symlink = 6, MkNod = 8, MkDir = 9, Unlink = 10,
    RmDir = 11, Rename = 12, Link = 13, Open = 14, Read = 15, Write = 16, StatFs = 17, Release = 18, Fsync = 20,
    SetXattr = 21, GetXattr = 22, ListXattr = 23, RemoveXattr = 24, Flush = 25, Init = 26, OpenDir = 27,
    ReadDir = 28, ReleaseDir = 29, FsyncDir = 30, GetLk = 31, SetLk = 32, SetLkw = 33, Access = 34, Create = 35,
    Interrupt = 36, Bmap = 37, Destroy = 38, Ioctl = 39, Poll = 40, NotifyReply = 41, BatchForget = 42,
    Fallocate = 43, ReadDirPlus = 44, Rename2 = 45, Lseek = 46, CopyFileRange = 47, SetupMapping = 48,
    RemoveMapping = 49, SyncFs = 50, TmpFile = 51, Statx = 52, CopyFileRange64 = 53,
}

impl Opcode {
    /// Whether the kernel waits for an answer.
    pub fn is_answered(self) -> bool {
        !matches!(self, Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::NotifyReply)
    }
}
