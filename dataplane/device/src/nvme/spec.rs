//! The parts of the NVM Express Base Specification 2.0 and NVM Command Set Specification 1.0 that
//! this driver speaks: registers, commands, completions, and what identify answers. Figures are
//! theirs. Flexible Data Placement is of the Base Specification 2.1 (before that technical proposal
//! 4146). Nothing here touches a device.

use crate::{DeviceHealth, HealthWarnings};
use std::fmt;

/// Registers by their offset in BAR 0 (figure 36).
pub mod register {
    /// CAP, 64 bits.
    pub const CAPABILITIES: usize = 0x00;
    /// CC.
    pub const CONFIGURATION: usize = 0x14;
    /// CSTS.
    pub const STATUS: usize = 0x1C;
    /// AQA.
    pub const ADMIN_QUEUE_SIZES: usize = 0x24;
    /// ASQ, 64 bits.
    pub const ADMIN_SUBMISSIONS: usize = 0x28;
    /// ACQ, 64 bits.
    pub const ADMIN_COMPLETIONS: usize = 0x30;
    /// Where the doorbells begin (PCIe transport 1.0, figure 4).
    pub const DOORBELLS: usize = 0x1000;
}

pub mod configuration {
    pub const ENABLE: u32 = 1;
    /// Submission entries of 2^6, completion entries of 2^4 bytes; NVM command set, round robin, pages
    /// of 4 KiB.
    pub const ENTRY_SIZES: u32 = 6 << 16 | 4 << 20;
    /// A normal shutdown is notified.
    pub const SHUTDOWN: u32 = 1 << 14;
    pub const SHUTDOWN_MASK: u32 = 3 << 14;
}

pub mod status {
    pub const READY: u32 = 1;
    pub const FATAL: u32 = 1 << 1;
    pub const SHUTDOWN_MASK: u32 = 3 << 2;
    pub const SHUTDOWN_COMPLETE: u32 = 2 << 2;
    /// What every register reads once the device is gone from the bus.
    pub const GONE: u32 = u32::MAX;
}

/// CAP (figure 36).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Entries a queue may have.
    pub fn queue_entries_max(self) -> u32 {
        (self.0 & 0xFFFF) as u32 + 1
    }

    /// How long becoming ready may take.
    pub fn ready_within_ms(self) -> u64 {
        // At least one unit: 0 is not allowed, and devices say it.
        ((self.0 >> 24) & 0xFF).max(1) * 500
    }

    /// Bytes from one doorbell to the next.
    pub fn doorbell_stride(self) -> usize {
        4 << ((self.0 >> 32) & 0xF)
    }

    pub fn has_nvm_commands(self) -> bool {
        self.0 >> 37 & 1 == 1
    }

    /// The smallest page the controller works with, in bytes.
    pub fn page_bytes_min(self) -> u64 {
        1 << (12 + ((self.0 >> 48) & 0xF))
    }
}

pub mod admin {
    pub const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const CREATE_COMPLETION_QUEUE: u8 = 0x05;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0A;
    pub const DOORBELL_BUFFER_CONFIG: u8 = 0x7C;

    /// CNS of identify.
    pub const NAMESPACE: u32 = 0;
    pub const CONTROLLER: u32 = 1;

    /// Log page identifier: SMART and health.
    pub const HEALTH: u32 = 0x02;

    /// Feature identifier: number of queues.
    pub const NUMBER_OF_QUEUES: u32 = 0x07;
    /// Flexible data placement, of the endurance group that dword 11 names. Bit 0 of the answer: enabled.
    pub const FLEXIBLE_DATA_PLACEMENT: u32 = 0x1D;
}

pub mod io {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const MANAGEMENT_RECEIVE: u8 = 0x12;

    /// Dword 12 of a write: force unit access.
    pub const FUA: u32 = 1 << 30;
    /// Dword 12 of a write, directive type: data placement. The upper half of dword 13, the directive's own,
    /// is then the placement identifier.
    pub const DATA_PLACEMENT: u32 = 2 << 20;
    pub const DIRECTIVE_MASK: u32 = 0xF << 20;
    /// Dword 10 of management receive, the operation: reclaim unit handle status. Dword 11 is the number of
    /// dwords to answer, 0's based.
    pub const RECLAIM_UNIT_HANDLE_STATUS: u32 = 0x01;
    /// Dword 11 of dataset management: deallocate.
    pub const DEALLOCATE: u32 = 1 << 2;
    /// Ranges of 16 bytes in one dataset management command.
    pub const RANGES_MAX: usize = 256;
}

/// A submission queue entry (figure 87): sixteen little-endian dwords.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Command {
    dwords: [u32; 16],
}

impl Command {
    pub fn new(opcode: u8, namespace: u32) -> Command {
        let mut command = Command::default();
        command.set(0, opcode.into());
        command.set(1, namespace);
        command
    }

    #[inline]
    fn set(&mut self, dword: usize, value: u32) {
        self.dwords[dword] = value.to_le();
    }

    #[inline]
    fn get(&self, dword: usize) -> u32 {
        u32::from_le(self.dwords[dword])
    }

    /// Command dwords 10 to 15.
    #[inline]
    pub fn with(mut self, dword: usize, value: u32) -> Command {
        assert!((10..16).contains(&dword), "command dword {dword}");
        self.set(dword, value);
        self
    }

    /// The data pointer: PRP 1 and 2 (figure 91).
    #[inline]
    pub fn with_data(mut self, pages: [u64; 2]) -> Command {
        for (page, dword) in pages.into_iter().zip([6, 8]) {
            self.set(dword, page as u32);
            self.set(dword + 1, (page >> 32) as u32);
        }
        self
    }

    /// First block and count, the latter 0's based in the command, of reads and writes; and the upper
    /// half of dword 12.
    #[inline]
    pub fn with_blocks(self, first: u64, count: u32, flags: u32) -> Command {
        self.with(10, first as u32).with(11, (first >> 32) as u32).with(12, (count - 1) | flags)
    }

    /// A write whose data goes where this placement identifier says.
    #[inline]
    pub fn with_placement(self, identifier: u16) -> Command {
        self.with(12, self.get(12) & !io::DIRECTIVE_MASK | io::DATA_PLACEMENT).with(13, u32::from(identifier) << 16)
    }

    /// The placement identifier of a write that has one.
    pub fn placement(&self) -> Option<u16> {
        let placed = self.opcode() == io::WRITE && self.get(12) & io::DIRECTIVE_MASK == io::DATA_PLACEMENT;
        placed.then_some((self.get(13) >> 16) as u16)
    }

    /// The same without it: the device chooses.
    pub fn without_placement(self) -> Command {
        match self.placement() {
            Some(_) => self.with(12, self.get(12) & !io::DIRECTIVE_MASK).with(13, self.get(13) & 0xFFFF),
            None => self,
        }
    }

    #[inline]
    pub fn with_id(mut self, id: u16) -> Command {
        self.set(0, (self.get(0) & 0xFFFF) | u32::from(id) << 16);
        self
    }

    #[inline]
    pub fn opcode(&self) -> u8 {
        self.get(0) as u8
    }

    #[inline]
    pub fn id(&self) -> u16 {
        (self.get(0) >> 16) as u16
    }

    pub fn namespace(&self) -> u32 {
        self.get(1)
    }

    pub fn data(&self) -> [u64; 2] {
        [6, 8].map(|dword| u64::from(self.get(dword)) | u64::from(self.get(dword + 1)) << 32)
    }

    pub fn dword(&self, dword: usize) -> u32 {
        self.get(dword)
    }

    pub fn first_block(&self) -> u64 {
        u64::from(self.get(10)) | u64::from(self.get(11)) << 32
    }

    pub fn block_count(&self) -> u32 {
        (self.get(12) & 0xFFFF) + 1
    }
}

/// A completion queue entry (figure 90), as its four dwords.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Completion {
    pub dwords: [u32; 4],
}

impl Completion {
    pub fn new(result: u32, queue: u16, head: u16, id: u16, status: Status, phase: bool) -> Completion {
        let last = u32::from(id) | u32::from(phase) << 16 | u32::from(status.0) << 17;
        Completion { dwords: [result, 0, u32::from(head) | u32::from(queue) << 16, last].map(u32::to_le) }
    }

    pub fn result(&self) -> u32 {
        u32::from_le(self.dwords[0])
    }

    /// How far the controller has taken submissions.
    #[inline]
    pub fn submission_head(&self) -> u16 {
        u32::from_le(self.dwords[2]) as u16
    }

    #[inline]
    pub fn id(&self) -> u16 {
        u32::from_le(self.dwords[3]) as u16
    }

    #[inline]
    pub fn phase(&self) -> bool {
        u32::from_le(self.dwords[3]) >> 16 & 1 == 1
    }

    #[inline]
    pub fn status(&self) -> Status {
        Status((u32::from_le(self.dwords[3]) >> 17) as u16)
    }
}

/// The status field without its phase tag (figure 93): code 7:0, code type 10:8, do not retry 14.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Status(pub u16);

impl Status {
    pub const SUCCESS: Status = Status(0);
    pub const INVALID_OPCODE: Status = Status(0x01);
    pub const INVALID_FIELD: Status = Status(0x02);
    pub const DATA_TRANSFER_ERROR: Status = Status(0x04);
    pub const ABORTED_BY_REQUEST: Status = Status(0x07);
    pub const LBA_OUT_OF_RANGE: Status = Status(0x80);
    pub const NOT_READY: Status = Status(0x82);
    /// Media and data integrity errors (figure 99).
    pub const WRITE_FAULT: Status = Status(0x280);
    pub const UNRECOVERED_READ: Status = Status(0x281);

    #[inline]
    pub fn is_success(self) -> bool {
        self.0 & 0x7FF == 0
    }

    /// Whether the same command may succeed if it is sent again.
    pub fn may_be_retried(self) -> bool {
        self.0 & 1 << 14 == 0 && matches!(self.code(), (0, 0x06 | 0x07 | 0x82) | (3, _))
    }

    /// Status code type and status code.
    #[inline]
    pub fn code(self) -> (u8, u8) {
        ((self.0 >> 8 & 7) as u8, self.0 as u8)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, code) = self.code();
        let known = match (kind, code) {
            (0, 0x00) => "success",
            (0, 0x01) => "invalid opcode",
            (0, 0x02) => "invalid field",
            (0, 0x04) => "data transfer error",
            (0, 0x06) => "internal error",
            (0, 0x07) => "aborted by request",
            (0, 0x08) => "aborted: queue deleted",
            (0, 0x0B) => "invalid namespace or format",
            (0, 0x13) => "invalid PRP offset",
            (0, 0x80) => "LBA out of range",
            (0, 0x81) => "capacity exceeded",
            (0, 0x82) => "namespace not ready",
            (2, 0x80) => "write fault",
            (2, 0x81) => "unrecovered read error",
            (2, 0x82) => "end-to-end guard check error",
            (2, 0x86) => "access denied",
            (2, 0x87) => "deallocated or unwritten block",
            _ => "NVMe status",
        };
        write!(f, "{known} (type {kind:#x}, code {code:#04x})")
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes of what identify answers.
pub const IDENTIFY_BYTES: usize = 4096;

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_matches([' ', '\0']).to_owned()
}

/// Identify controller (figure 275), as far as it is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Controller {
    pub serial: String,
    pub model: String,
    pub firmware: String,
    /// Largest transfer in bytes, if it is limited.
    pub transfer_max: Option<u64>,
    pub deallocates: bool,
    pub volatile_cache: bool,
    /// Takes doorbells in memory.
    pub shadow_doorbells: bool,
    /// Has endurance groups in which the host says which data goes together.
    pub flexible_data_placement: bool,
}

impl Controller {
    /// `page_bytes`: CAP.MPSMIN, in which MDTS counts.
    pub fn parse(bytes: &[u8; IDENTIFY_BYTES], page_bytes: u64) -> Controller {
        let transfer_max = match bytes[77] {
            // No transfer that can be described is as long as the latter.
            0 | 32.. => None,
            shift => Some(page_bytes << shift),
        };
        Controller {
            serial: text(&bytes[4..24]),
            model: text(&bytes[24..64]),
            firmware: text(&bytes[64..72]),
            transfer_max,
            deallocates: u16_at(bytes, 520) >> 2 & 1 == 1,
            volatile_cache: bytes[525] & 1 == 1,
            shadow_doorbells: u16_at(bytes, 256) >> 8 & 1 == 1,
            // CTRATT.
            flexible_data_placement: u32_at(bytes, 96) >> 19 & 1 == 1,
        }
    }
}

/// Bytes of the health log.
pub const HEALTH_BYTES: usize = 512;

/// The SMART / health information log (figure 207), as far as it is used.
pub fn parse_health(bytes: &[u8; HEALTH_BYTES]) -> DeviceHealth {
    let warns = |bit: u8| bytes[0] >> bit & 1 == 1;
    // Counters have 128 bits; none has ever needed them.
    let counter = |at: usize| if u64_at(bytes, at + 8) == 0 { u64_at(bytes, at) } else { u64::MAX };
    DeviceHealth {
        warnings: HealthWarnings {
            spare_is_low: warns(0),
            temperature: warns(1),
            unreliable: warns(2),
            read_only: warns(3),
            backup_failed: warns(4),
        },
        // In kelvins.
        temperature_c: i32::from(u16_at(bytes, 1)) - 273,
        spare_percent: bytes[3],
        spare_percent_min: bytes[4],
        used_percent: bytes[5],
        power_on_hours: counter(128),
        unsafe_shutdowns: counter(144),
        media_errors: counter(160),
        // Not of the log.
        placement_handles: 0,
    }
}

/// Why a namespace can't be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("it does not exist or is not attached")]
    Absent,
    #[error(
        "its blocks have {bytes} bytes, and 512 to 4096 are needed; give it another format with: nvme format --block-size=4096"
    )]
    BlockSize { bytes: u64 },
    #[error(
        "its blocks carry {bytes} bytes of metadata; give it a format without with: nvme format --block-size=4096 --ms=0"
    )]
    Metadata { bytes: u16 },
    #[error("it is formatted with end-to-end protection; take that away with: nvme format --pi=0")]
    Protection,
}

/// Identify namespace (NVM command set, figure 97), as far as it is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Namespace {
    pub blocks: u64,
    pub block_bytes: u32,
    /// ENDGID; 0 if it is in none.
    pub endurance_group: u16,
}

impl Namespace {
    pub fn parse(bytes: &[u8; IDENTIFY_BYTES]) -> Result<Namespace, NamespaceError> {
        let blocks = u64_at(bytes, 0);
        if blocks == 0 {
            return Err(NamespaceError::Absent);
        }
        // FLBAS: the index's low four bits, and two more where there are more than 16 formats.
        let index = usize::from(bytes[26] & 0xF) | usize::from(bytes[26] >> 5 & 3) << 4;
        let format = u32_at(bytes, 128 + 4 * index);
        let metadata = format as u16;
        if metadata > 0 {
            return Err(NamespaceError::Metadata { bytes: metadata });
        }
        if bytes[29] & 7 != 0 {
            return Err(NamespaceError::Protection);
        }
        let block_bytes = 1u64.checked_shl(format >> 16 & 0xFF).unwrap_or(0);
        if !(512..=4096).contains(&block_bytes) {
            return Err(NamespaceError::BlockSize { bytes: block_bytes });
        }
        Ok(Namespace { blocks, block_bytes: block_bytes as u32, endurance_group: u16_at(bytes, 102) })
    }
}
