//! A request taken apart. The kernel is trusted to speak its own protocol, and checked all the
//! same: no bytes make this panic or read past their end.

use super::*;
use bytemuck::AnyBitPattern;

/// Bytes that are no request of this protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Malformed {
    /// The request's number, if it has one and waits for an answer.
    pub unique: Option<u64>,
    pub what: &'static str,
}

/// One request. Borrows names and payload from the bytes it was decoded from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Request<'a> {
    pub header: InHeader,
    pub call: Call<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call<'a> {
    Lookup {
        name: &'a [u8],
    },
    /// FORGET and BATCH_FORGET: nothing hangs on what the kernel remembers.
    Forget,
    GetAttr(GetAttrIn),
    Statx,
    SetAttr(SetAttrIn),
    ReadLink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    MkNod {
        arguments: MkNodIn,
        name: &'a [u8],
    },
    MkDir {
        arguments: MkDirIn,
        name: &'a [u8],
    },
    Unlink {
        name: &'a [u8],
    },
    RmDir {
        name: &'a [u8],
    },
    /// RENAME and RENAME2.
    Rename {
        arguments: Rename2In,
        name: &'a [u8],
        new_name: &'a [u8],
    },
    Link {
        arguments: LinkIn,
        name: &'a [u8],
    },
    Open(OpenIn),
    Create {
        arguments: CreateIn,
        name: &'a [u8],
    },
    /// The name that comes with it is the kernel's own and means nothing.
    TmpFile(CreateIn),
    Read(ReadIn),
    Write {
        arguments: WriteIn,
        data: &'a [u8],
    },
    StatFs,
    Release(ReleaseIn),
    Flush(FlushIn),
    Fsync(FsyncIn),
    SyncFs,
    SetXattr {
        flags: u32,
        extended: u32,
        name: &'a [u8],
        value: &'a [u8],
    },
    GetXattr {
        size: u32,
        name: &'a [u8],
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a [u8],
    },
    OpenDir,
    ReadDir(ReadIn),
    ReleaseDir(ReleaseIn),
    FsyncDir,
    GetLk(LockIn),
    SetLk {
        arguments: LockIn,
        wait: bool,
    },
    Interrupt(InterruptIn),
    Fallocate(FallocateIn),
    Lseek(LseekIn),
    /// `wide`: the answer counts in 64 bits (COPY_FILE_RANGE_64).
    CopyFileRange {
        arguments: CopyFileRangeIn,
        wide: bool,
    },
    Init(InitIn),
    Destroy,
    /// Known and not served: the kernel does without, or its caller gets ENOSYS.
    Unserved(Opcode),
    /// Of a newer protocol.
    Unknown(u32),
}

/// Takes values from the front of a body.
struct Cursor<'a> {
    rest: &'a [u8],
}

type Taken<T> = Result<T, &'static str>;

impl<'a> Cursor<'a> {
    fn take<T: AnyBitPattern>(&mut self) -> Taken<T> {
        let bytes = self.bytes(size_of::<T>())?;
        Ok(bytemuck::pod_read_unaligned(bytes))
    }

    fn bytes(&mut self, count: usize) -> Taken<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or("the request is too short")?;
        self.rest = rest;
        Ok(taken)
    }

    /// A name up to its zero.
    fn name(&mut self) -> Taken<&'a [u8]> {
        let end = self.rest.iter().position(|byte| *byte == 0).ok_or("a name has no end")?;
        let name = self.bytes(end)?;
        self.bytes(1)?;
        Ok(name)
    }
}

impl<'a> Request<'a> {
    /// Takes apart what one read of the device gave.
    pub fn decode(bytes: &'a [u8], features: Features) -> Result<Request<'a>, Malformed> {
        let mut cursor = Cursor { rest: bytes };
        let header: InHeader = cursor.take().map_err(|what| Malformed { unique: None, what })?;
        let answered = Opcode::from_u32(header.opcode).is_none_or(Opcode::is_answered);
        let malformed = |what| Malformed { unique: answered.then_some(header.unique), what };
        if header.len as usize != bytes.len() {
            return Err(malformed("the length is not the header's"));
        }
        let extensions = usize::from(header.total_extlen) * 8;
        let body = cursor.rest.len().checked_sub(extensions).ok_or(malformed("extensions exceed the request"))?;
        cursor.rest = &cursor.rest[..body];
        let call = call(&header, &mut cursor, features).map_err(malformed)?;
        Ok(Request { header, call })
    }
}

fn call<'a>(header: &InHeader, body: &mut Cursor<'a>, features: Features) -> Taken<Call<'a>> {
    let Some(opcode) = Opcode::from_u32(header.opcode) else { return Ok(Call::Unknown(header.opcode)) };
    Ok(match opcode {
        Opcode::Lookup
        | Opcode::Symlink
        | Opcode::MkNod
        | Opcode::MkDir
        | Opcode::Unlink
        | Opcode::RmDir
        | Opcode::Rename
        | Opcode::Rename2
        | Opcode::Link
        | Opcode::Create
        | Opcode::TmpFile => name_call(opcode, body)?,
        Opcode::SetXattr | Opcode::GetXattr | Opcode::ListXattr | Opcode::RemoveXattr => {
            xattr_call(opcode, body, features)?
        }
        Opcode::GetAttr => Call::GetAttr(body.take()?),
        Opcode::Statx => Call::Statx,
        Opcode::SetAttr => Call::SetAttr(body.take()?),
        Opcode::ReadLink => Call::ReadLink,
        Opcode::Open => Call::Open(body.take()?),
        Opcode::Read => Call::Read(body.take()?),
        Opcode::Write => {
            let arguments: WriteIn = body.take()?;
            let data = body.bytes(arguments.size as usize)?;
            Call::Write { arguments, data }
        }
        Opcode::Release => Call::Release(body.take()?),
        Opcode::Flush => Call::Flush(body.take()?),
        Opcode::Fsync => Call::Fsync(body.take()?),
        Opcode::Fallocate => Call::Fallocate(body.take()?),
        Opcode::Lseek => Call::Lseek(body.take()?),
        Opcode::CopyFileRange => Call::CopyFileRange { arguments: body.take()?, wide: false },
        Opcode::CopyFileRange64 => Call::CopyFileRange { arguments: body.take()?, wide: true },
        Opcode::OpenDir => Call::OpenDir,
        Opcode::ReadDir => Call::ReadDir(body.take()?),
        Opcode::ReleaseDir => Call::ReleaseDir(body.take()?),
        Opcode::FsyncDir => Call::FsyncDir,
        Opcode::GetLk => Call::GetLk(body.take()?),
        Opcode::SetLk => Call::SetLk { arguments: body.take()?, wait: false },
        Opcode::SetLkw => Call::SetLk { arguments: body.take()?, wait: true },
        Opcode::StatFs => Call::StatFs,
        Opcode::SyncFs => Call::SyncFs,
        Opcode::Forget | Opcode::BatchForget => Call::Forget,
        Opcode::Interrupt => Call::Interrupt(body.take()?),
        Opcode::Init => Call::Init(body.take()?),
        Opcode::Destroy => Call::Destroy,
        Opcode::Access
        | Opcode::Bmap
        | Opcode::Ioctl
        | Opcode::Poll
        | Opcode::NotifyReply
        | Opcode::SetupMapping
        | Opcode::ReadDirPlus
        | Opcode::RemoveMapping => Call::Unserved(opcode),
    })
}

fn name_call<'a>(opcode: Opcode, body: &mut Cursor<'a>) -> Taken<Call<'a>> {
    Ok(match opcode {
        Opcode::Lookup => Call::Lookup { name: body.name()? },
        Opcode::Unlink => Call::Unlink { name: body.name()? },
        Opcode::RmDir => Call::RmDir { name: body.name()? },
        Opcode::Symlink => Call::Symlink { name: body.name()?, target: body.name()? },
        Opcode::MkNod => Call::MkNod { arguments: body.take()?, name: body.name()? },
        Opcode::MkDir => Call::MkDir { arguments: body.take()?, name: body.name()? },
        Opcode::Link => Call::Link { arguments: body.take()?, name: body.name()? },
        Opcode::Create => Call::Create { arguments: body.take()?, name: body.name()? },
        Opcode::TmpFile => Call::TmpFile(body.take()?),
        Opcode::Rename => {
            let RenameIn { newdir } = body.take()?;
            let arguments = Rename2In { newdir, ..Rename2In::default() };
            Call::Rename { arguments, name: body.name()?, new_name: body.name()? }
        }
        Opcode::Rename2 => Call::Rename { arguments: body.take()?, name: body.name()?, new_name: body.name()? },
        other => Call::Unserved(other),
    })
}

fn xattr_call<'a>(opcode: Opcode, body: &mut Cursor<'a>, features: Features) -> Taken<Call<'a>> {
    Ok(match opcode {
        Opcode::SetXattr => {
            let SetXattrIn { size, flags } = body.take()?;
            let extended = if features.setxattr_ext { body.take::<SetXattrExt>()?.setxattr_flags } else { 0 };
            let name = body.name()?;
            Call::SetXattr { flags, extended, name, value: body.bytes(size as usize)? }
        }
        Opcode::GetXattr => {
            let GetXattrIn { size, .. } = body.take()?;
            Call::GetXattr { size, name: body.name()? }
        }
        Opcode::ListXattr => Call::ListXattr { size: body.take::<GetXattrIn>()?.size },
        Opcode::RemoveXattr => Call::RemoveXattr { name: body.name()? },
        other => Call::Unserved(other),
    })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
