//! Commands to NVMe namespaces through the kernel's character devices `/dev/ngXnY` (IORING_OP_URING_CMD;
//! linux/nvme_ioctl.h). The kernel keeps the queues, and passes a command on as it is.

use super::core::{SUBMIT_AT, Wide};
use super::file::{ARENA, entry};
use super::operation::Kept;
use super::{Operation, Ring, RingFile, clamp};
use crate::arena;
use io_uring::{opcode, types};
use std::os::fd::AsRawFd;
use std::rc::Rc;

/// NVME_URING_CMD_IO: _IOWR('N', 0x80, struct nvme_uring_cmd).
const IO: u32 = 3 << 30 | (size_of::<UringCommand>() as u32) << 16 | (b'N' as u32) << 8 | 0x80;

/// What a namespace is asked for: the opcode, the namespace's number and command dwords 10 to 15.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NvmeCommand {
    pub opcode: u8,
    pub namespace: u32,
    pub dwords: [u32; 6],
}

/// The memory that a command moves data to or from.
pub enum NvmeData {
    None,
    Run { start: *const u8, bytes: usize },
}

/// struct nvme_uring_cmd.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct UringCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    dwords_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_bytes: u32,
    /// Of the data, in bytes.
    length: u32,
    dwords_10_15: [u32; 6],
    timeout_ms: u32,
    reserved_last: u32,
}

/// What a submission has room for.
fn encode(command: NvmeCommand, address: u64, length: u32) -> [u8; 80] {
    let command = UringCommand {
        opcode: command.opcode,
        namespace: command.namespace,
        address,
        length,
        dwords_10_15: command.dwords,
        ..UringCommand::default()
    };
    let mut bytes = [0; 80];
    bytes[..size_of::<UringCommand>()].copy_from_slice(bytemuck::bytes_of(&command));
    bytes
}

impl Ring<Wide> {
    /// Sends a command to a namespace. Its result is an NVMe status (0 is success), or what the kernel
    /// refused it with. `registered`: memory that is registered with the ring is named as such.
    ///
    /// # Safety
    /// `kept` owns the memory of `data`, on the heap, and nothing else touches it before `kept` is given
    /// back (or only reads it, if the command does not write to it). The command moves as many bytes as
    /// `data` has, at most: the controller would go on behind its end.
    pub unsafe fn nvme<K: 'static>(
        self: &Rc<Self>,
        file: &Rc<RingFile<Wide>>,
        command: NvmeCommand,
        data: NvmeData,
        registered: bool,
        kept: K,
    ) -> Operation<K, Wide> {
        let kept = Kept::new(kept, file.clone());
        let (address, length, fixed) = match data {
            NvmeData::None => (0, 0, false),
            NvmeData::Run { start, bytes } => {
                let fixed = registered && self.has_registered_buffers() && arena::contains_range(start, bytes);
                (start as u64, clamp(bytes), fixed)
            }
        };
        let command = encode(command, address, length);
        let buffer = fixed.then_some(ARENA);
        let entry = entry!(file, target => opcode::UringCmd80::new(target, IO).buf_index(buffer).cmd(command));
        // SAFETY: passed on to our caller.
        unsafe { Operation::start_in_lots(self, entry, kept, SUBMIT_AT) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_laid_out_as_the_kernel_reads_it() {
        // linux/nvme_ioctl.h, on every architecture.
        assert_eq!(IO, 0xC048_4E80);
        let command = NvmeCommand { opcode: 0x02, namespace: 7, dwords: [10, 11, 12, 13, 14, 15] };
        let bytes = encode(command, 0x1122_3344_5566_7788, 8192);
        let mut expected = [0; 80];
        expected[0] = 0x02;
        expected[4..8].copy_from_slice(&7u32.to_ne_bytes());
        expected[24..32].copy_from_slice(&0x1122_3344_5566_7788u64.to_ne_bytes());
        expected[36..40].copy_from_slice(&8192u32.to_ne_bytes());
        for (index, dword) in (10u32..16).enumerate() {
            expected[40 + 4 * index..][..4].copy_from_slice(&dword.to_ne_bytes());
        }
        assert_eq!(bytes, expected);
    }
}
