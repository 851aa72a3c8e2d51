//! What the controller says of itself and of the namespace, asked through the kernel's ioctls
//! (linux/nvme_ioctl.h). They block.

use crate::nvme::spec::{self, Command, IDENTIFY_BYTES, Status, admin};
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::ffi::c_void;

const NVME: u8 = b'N';
const ID: Opcode = opcode::none(NVME, 0x40);
const ADMIN_COMMAND: Opcode = opcode::read_write::<AdminCommand>(NVME, 0x41);
/// The identify commands are answered at once, or never.
const TIMEOUT_MS: u32 = 10_000;

/// struct nvme_admin_cmd.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    dwords_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_bytes: u32,
    bytes: u32,
    dwords_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// The number of the namespace (NVME_IOCTL_ID).
struct NamespaceId;

// SAFETY: the request takes no argument and answers a number.
unsafe impl Ioctl for NamespaceId {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        ID
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    // SAFETY: looks at nothing behind the pointer.
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        Ok(output as u32)
    }
}

/// An identify command and where its answer lands.
struct Identify<'a> {
    command: AdminCommand,
    answer: &'a mut [u8; IDENTIFY_BYTES],
}

// SAFETY: the argument is the structure that the request takes; the memory it names is the answer's, and as
// long as an answer to identify is.
unsafe impl Ioctl for Identify<'_> {
    type Output = Status;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        ADMIN_COMMAND
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.command.address = self.answer.as_mut_ptr() as u64;
        (&raw mut self.command).cast()
    }

    // SAFETY: looks at nothing behind the pointer.
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<Status> {
        // Negative ones were made errors.
        Ok(Status(output as u16))
    }
}

/// Why there is no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unanswered {
    Kernel(Errno),
    Controller(Status),
}

pub(super) fn namespace_number(file: impl AsFd) -> Result<u32, Errno> {
    // SAFETY: the request is what it says, and of a file that does not know it an error.
    unsafe { ioctl(file, NamespaceId) }
}

fn identify(file: impl AsFd, what: u32, namespace: u32) -> Result<Box<[u8; IDENTIFY_BYTES]>, Unanswered> {
    let command = Command::new(admin::IDENTIFY, namespace).with(10, what);
    let command = AdminCommand {
        opcode: command.opcode(),
        namespace: command.namespace(),
        bytes: IDENTIFY_BYTES as u32,
        dwords_10_15: std::array::from_fn(|index| command.dword(10 + index)),
        timeout_ms: TIMEOUT_MS,
        ..AdminCommand::default()
    };
    let mut answer = Box::new([0; IDENTIFY_BYTES]);
    // SAFETY: the request is what it says, and of a file that does not know it an error.
    match unsafe { ioctl(file, Identify { command, answer: &mut answer }) } {
        Ok(status) if status.is_success() => Ok(answer),
        Ok(status) => Err(Unanswered::Controller(status)),
        Err(errno) => Err(Unanswered::Kernel(errno)),
    }
}

pub(super) fn controller(file: impl AsFd) -> Result<spec::Controller, Unanswered> {
    // The unit of its largest transfer can't be asked for here: the smallest that there is.
    identify(file, admin::CONTROLLER, 0).map(|answer| spec::Controller::parse(&answer, 4096))
}

pub(super) fn namespace(
    file: impl AsFd,
    number: u32,
) -> Result<Result<spec::Namespace, spec::NamespaceError>, Unanswered> {
    identify(file, admin::NAMESPACE, number).map(|answer| spec::Namespace::parse(&answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_kernels_numbers() {
        assert_eq!((ID, ADMIN_COMMAND), (0x4E40, 0xC048_4E41));
    }

    #[test]
    fn a_file_that_is_no_namespace_answers_nothing() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(namespace_number(&file), Err(Errno::NOTTY));
        assert_eq!(controller(&file), Err(Unanswered::Kernel(Errno::NOTTY)));
        assert_eq!(namespace(&file, 1), Err(Unanswered::Kernel(Errno::NOTTY)));
    }
}
