//! A controller in memory: registers, queues, doorbells, PRPs and a disk, so that all of the driver's
//! own logic runs in ordinary tests. It takes commands in when it is served, answers them in a seeded
//! order, and fails as it is told to.
//!
//! It reaches for memory under the addresses it has in this process, and only for what the driver may
//! give it: the arena and what it allocated. Anything else is counted as a fault of the IOMMU.

mod placement;

pub use placement::{PlacementFlaw, PlacementOptions};

use super::bus::{Bus, SharedMemory};
use super::spec::{
    Command, Completion, HEALTH_BYTES, IDENTIFY_BYTES, Status, admin, configuration, io, register,
    status as controller_status,
};
use crate::DeviceResult;
use cfs_reactor::Handle;
use cfs_reactor::buffer::device_memory;
use cfs_reactor::clock::SplitMix64;
use cfs_reactor::sync::Notify;
use placement::Placed;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;

const PAGE: usize = 4096;
const ADMIN: u16 = 0;
/// Registers and the doorbells of a few queues.
const REGISTER_BYTES: usize = 0x2000;
/// Reads of the status register until a change of the enable bit shows.
const READS_UNTIL_READY: u32 = 3;

/// What kind of device it is.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    pub blocks: u64,
    /// Of so many blocks each.
    pub namespaces: u32,
    /// log2 of the block size.
    pub block_shift: u8,
    /// MDTS: log2 of the largest transfer in pages, 0 for no limit.
    pub transfer_shift: u8,
    pub queue_entries_max: u16,
    pub volatile_cache: bool,
    pub deallocates: bool,
    /// Bytes of metadata with each block.
    pub metadata_bytes: u16,
    /// Whether it takes doorbells in memory.
    pub shadow_doorbells: bool,
    /// Whether an abort ends a command that was not answered.
    pub aborts: bool,
    pub placement: PlacementOptions,
}

impl Default for ModelOptions {
    fn default() -> ModelOptions {
        ModelOptions {
            blocks: 4096,
            namespaces: 1,
            block_shift: 12,
            transfer_shift: 7,
            queue_entries_max: 1024,
            volatile_cache: true,
            deallocates: true,
            metadata_bytes: 0,
            shadow_doorbells: false,
            aborts: true,
            placement: PlacementOptions::default(),
        }
    }
}

/// What it was asked for so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    pub doorbells: u64,
    pub commands: u64,
    pub flushes: u64,
    pub forced_writes: u64,
    pub resets: u64,
    /// Addresses that it may not reach.
    pub memory_faults: u64,
    /// Writes in which any field of a directive was set.
    pub directives: u64,
    /// Writes with a placement identifier of no handle.
    pub invalid_placements: u64,
}

struct CompletionQueue {
    base: u64,
    entries: u16,
    tail: u16,
    phase: bool,
}

struct SubmissionQueue {
    base: u64,
    entries: u16,
    head: u16,
    tail: u16,
    completions: u16,
}

struct State {
    options: ModelOptions,
    configuration: u32,
    /// Reads of the status register that still show the state of before.
    settling: u32,
    shut_down: bool,
    registers: BTreeMap<usize, u32>,
    /// Doorbells in memory, and where it says what it has seen of them.
    shadow: Option<[u64; 2]>,
    submissions: BTreeMap<u16, SubmissionQueue>,
    completions: BTreeMap<u16, CompletionQueue>,
    pending: Vec<(u16, Command)>,
    unanswered: Vec<(u16, Command)>,
    disk: Vec<u8>,
    placed: Placed,
    reachable: Vec<Range<u64>>,
    random: SplitMix64,
    failing: Vec<(u8, Status)>,
    swallowing: u32,
    swallowing_admin: u32,
    /// It never becomes ready.
    broken: bool,
    fatal: bool,
    wanted_back: bool,
    /// The first bytes of its health log: warnings, kelvins, spare, its minimum, used.
    health: [u8; 6],
    gone: bool,
    counts: Counts,
}

/// See the module.
pub struct Model {
    state: RefCell<State>,
    work: Rc<Notify>,
}

impl Model {
    pub fn new(options: ModelOptions, seed: u64) -> Rc<Model> {
        let disk = vec![0; (options.blocks as usize * options.namespaces as usize) << options.block_shift];
        let arena = device_memory().map(|(start, bytes)| start as u64..start as u64 + bytes as u64);
        let state = State {
            options,
            configuration: 0,
            settling: 0,
            shut_down: false,
            registers: BTreeMap::new(),
            shadow: None,
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            pending: Vec::new(),
            unanswered: Vec::new(),
            disk,
            placed: Placed::default(),
            reachable: arena.into_iter().collect(),
            random: SplitMix64::new(seed),
            failing: Vec::new(),
            swallowing: 0,
            swallowing_admin: 0,
            broken: false,
            fatal: false,
            wanted_back: false,
            health: [0, 0x3B, 0x01, 100, 10, 4],
            gone: false,
            counts: Counts::default(),
        };
        Rc::new(Model { state: RefCell::new(state), work: Notify::new() })
    }

    /// Answers commands for as long as the executor runs.
    pub fn serve(self: &Rc<Self>, handle: &Handle) {
        let (model, yielding) = (self.clone(), handle.clone());
        handle.spawn(async move {
            loop {
                let work = model.work.notified();
                if !model.step() {
                    work.await;
                }
                yielding.yield_now().await;
            }
        });
    }

    /// Takes in what was queued and answers some of it; false when there is nothing to answer.
    pub fn step(&self) -> bool {
        let mut state = self.state.borrow_mut();
        state.take_in();
        if state.pending.is_empty() {
            return false;
        }
        let state = &mut *state;
        let count = 1 + state.random.below(state.pending.len() as u64);
        for _ in 0..count {
            let next = state.random.below(state.pending.len() as u64) as usize;
            let (queue, command) = state.pending.swap_remove(next);
            state.carry_out(queue, command);
        }
        true
    }

    pub fn counts(&self) -> Counts {
        let state = self.state.borrow();
        Counts { directives: state.placed.directives, invalid_placements: state.placed.invalid, ..state.counts }
    }

    /// The handle by which a block of the first namespace was written last, if the write named one.
    pub fn handle_of(&self, block: u64) -> Option<u16> {
        self.state.borrow().placed.handle_of(block as usize)
    }

    /// Has other handles from now on, as after a change of its firmware or configuration.
    pub fn place_by(&self, placement: PlacementOptions) {
        self.state.borrow_mut().options.placement = placement;
    }

    /// The next command with this opcode ends with this status.
    pub fn fail_next(&self, opcode: u8, status: Status) {
        self.state.borrow_mut().failing.push((opcode, status));
    }

    /// The next I/O commands are never answered.
    pub fn swallow_next(&self, count: u32) {
        self.state.borrow_mut().swallowing = count;
    }

    /// The next admin commands are never answered.
    pub fn swallow_admin_next(&self, count: u32) {
        self.state.borrow_mut().swallowing_admin = count;
    }

    /// Answers a command on the I/O queue that nobody gave it.
    pub fn make_up(&self, id: u16) {
        self.state.borrow_mut().answer(1, id, Status::SUCCESS, 0);
    }

    /// Somebody wants to take it away.
    pub fn want_back(&self) {
        self.state.borrow_mut().wanted_back = true;
    }

    /// What it says of its spare capacity, and that this is too little.
    pub fn wear_out(&self, spare_percent: u8) {
        let mut state = self.state.borrow_mut();
        (state.health[0], state.health[3]) = (1, spare_percent);
    }

    /// As a reset of the PCI function does that others ask for.
    pub fn reset_function(&self) {
        let mut state = self.state.borrow_mut();
        state.configuration = 0;
        state.settling = 0;
        state.stop();
    }

    pub fn is_enabled(&self) -> bool {
        self.state.borrow().configuration & configuration::ENABLE != 0
    }

    /// It does not become ready any more once it was disabled.
    pub fn break_down(&self) {
        self.state.borrow_mut().broken = true;
    }

    /// It says that it has failed, until it is disabled.
    pub fn fail_fatally(&self) {
        self.state.borrow_mut().fatal = true;
    }

    /// Others reset it in the way that takes longest: registers read all ones until it is back.
    pub fn go_away(&self) {
        self.reset_function();
        self.state.borrow_mut().gone = true;
    }

    pub fn come_back(&self) {
        self.state.borrow_mut().gone = false;
    }

    /// Pulled out: registers read all ones, and nothing is answered any more.
    pub fn pull_out(&self) {
        let mut state = self.state.borrow_mut();
        state.gone = true;
        state.stop();
    }

    pub fn was_shut_down(&self) -> bool {
        self.state.borrow().shut_down
    }

    /// A pair of queues of the same number, for who answers it instead of this.
    pub(super) fn raw_queue(&self, id: u16) -> Option<RawQueue> {
        let state = self.state.borrow();
        let (submissions, completions) = (state.submissions.get(&id)?, state.completions.get(&id)?);
        let entries = submissions.entries.min(completions.entries);
        let bytes = |each: usize| usize::from(entries) * each;
        let reachable = state.can_reach(submissions.base, bytes(size_of::<Command>()))
            && state.can_reach(completions.base, bytes(size_of::<Completion>()));
        let pointer = |base: u64| std::ptr::with_exposed_provenance_mut::<u8>(base as usize);
        let (submissions, completions) = (pointer(submissions.base).cast(), pointer(completions.base).cast());
        reachable.then_some(RawQueue { submissions, completions, entries })
    }
}

impl State {
    /// Ends all work and forgets the queues.
    fn stop(&mut self) {
        self.submissions.clear();
        self.completions.clear();
        self.pending.clear();
        self.unanswered.clear();
        self.shadow = None;
    }

    fn configure(&mut self, value: u32) {
        let was_enabled = self.configuration & configuration::ENABLE != 0;
        self.configuration = value;
        let enabled = value & configuration::ENABLE != 0;
        if was_enabled != enabled {
            self.settling = READS_UNTIL_READY;
        }
        if was_enabled && !enabled {
            self.counts.resets += 1;
            self.fatal = false;
            self.stop();
        }
        if value & configuration::SHUTDOWN_MASK != 0 {
            self.shut_down = true;
        }
        if !was_enabled && enabled {
            let sizes = self.register(register::ADMIN_QUEUE_SIZES);
            let long = |low: usize| u64::from(self.register(low)) | u64::from(self.register(low + 4)) << 32;
            let (submissions, completions) = (long(register::ADMIN_SUBMISSIONS), long(register::ADMIN_COMPLETIONS));
            self.add_completions(ADMIN, completions, (sizes >> 16) as u16);
            self.add_submissions(ADMIN, submissions, sizes as u16, ADMIN);
            self.shut_down = false;
        }
    }

    fn register(&self, offset: usize) -> u32 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }

    fn add_completions(&mut self, id: u16, base: u64, last: u16) {
        self.completions.insert(id, CompletionQueue { base, entries: last + 1, tail: 0, phase: true });
    }

    fn add_submissions(&mut self, id: u16, base: u64, last: u16, completions: u16) {
        let queue = SubmissionQueue { base, entries: last + 1, head: 0, tail: 0, completions };
        self.submissions.insert(id, queue);
    }

    fn status_register(&mut self) -> u32 {
        let mut enabled = self.configuration & configuration::ENABLE != 0;
        if self.settling > 0 {
            self.settling -= 1;
            enabled = !enabled;
        }
        let shutdown = if self.shut_down { controller_status::SHUTDOWN_COMPLETE } else { 0 };
        let fatal = u32::from(self.fatal) * controller_status::FATAL;
        (u32::from(enabled && !self.broken) * controller_status::READY) | shutdown | fatal
    }

    fn ring(&mut self, doorbell: usize, value: u32) {
        self.counts.doorbells += 1;
        // Of completion queues only the driver needs to know.
        let id = (doorbell / 2) as u16;
        if self.shadow.is_some() && id != ADMIN {
            return;
        }
        if let (0, Some(queue)) = (doorbell % 2, self.submissions.get_mut(&id)) {
            assert!(value < u32::from(queue.entries), "the driver rang for entry {value} of {}", queue.entries);
            queue.tail = value as u16;
        }
    }

    fn take_in(&mut self) {
        let ids: Vec<u16> = self.submissions.keys().copied().collect();
        for id in ids {
            self.look_at_shadow(id);
            while let Some(queue) = self.submissions.get_mut(&id).filter(|queue| queue.head != queue.tail) {
                let place = queue.base + u64::from(queue.head) * size_of::<Command>() as u64;
                queue.head = (queue.head + 1) % queue.entries;
                let mut entry = [0; size_of::<Command>()];
                self.copy_from(place, &mut entry);
                self.pending.push((id, bytemuck::pod_read_unaligned(&entry)));
                self.counts.commands += 1;
            }
        }
    }

    /// Says what it has seen, and then looks once more, as who goes to sleep has to.
    fn look_at_shadow(&mut self, id: u16) {
        let Some([values, seen]) = self.shadow.filter(|_| id != ADMIN) else { return };
        let at = u64::from(id) * 8;
        loop {
            let mut bytes = [0; 4];
            self.copy_from(values + at, &mut bytes);
            let tail = u32::from_le_bytes(bytes);
            let Some(queue) = self.submissions.get_mut(&id) else { return };
            assert!(tail < u32::from(queue.entries), "the driver's shadow says entry {tail} of {}", queue.entries);
            if u32::from(queue.tail) == tail {
                return;
            }
            queue.tail = tail as u16;
            self.copy_to(seen + at, &bytes);
        }
    }

    fn carry_out(&mut self, queue: u16, command: Command) {
        let silent = self.options.placement.flaw == Some(PlacementFlaw::Silent);
        let is_silent = queue != ADMIN && silent && command.opcode() == io::MANAGEMENT_RECEIVE;
        if queue != ADMIN && (self.swallowing > 0 || is_silent) {
            self.swallowing = self.swallowing.saturating_sub(1);
            self.unanswered.push((queue, command));
            return;
        }
        if queue == ADMIN && self.swallowing_admin > 0 {
            self.swallowing_admin -= 1;
            return;
        }
        let faults = self.counts.memory_faults;
        let failing = self.failing.iter().position(|(opcode, _)| queue != ADMIN && *opcode == command.opcode());
        let (status, result) = match failing {
            Some(position) => (self.failing.remove(position).1, 0),
            None if queue == ADMIN => self.admin(command),
            None => (self.io(command), 0),
        };
        let status = if self.counts.memory_faults > faults { Status::DATA_TRANSFER_ERROR } else { status };
        self.answer(queue, command.id(), status, result);
    }

    fn answer(&mut self, queue: u16, id: u16, status: Status, result: u32) {
        let Some(submissions) = self.submissions.get(&queue) else { return };
        let (head, completions) = (submissions.head, submissions.completions);
        let Some(to) = self.completions.get_mut(&completions) else { return };
        let completion = Completion::new(result, queue, head, id, status, to.phase);
        let place = to.base + u64::from(to.tail) * size_of::<Completion>() as u64;
        to.tail += 1;
        if to.tail == to.entries {
            to.tail = 0;
            to.phase = !to.phase;
        }
        self.copy_to(place, bytemuck::cast_slice(&completion.dwords));
    }

    fn admin(&mut self, command: Command) -> (Status, u32) {
        let (queue, last) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        match command.opcode() {
            admin::IDENTIFY => {
                let mut answer = [0; IDENTIFY_BYTES];
                let outcome = self.identify(command, &mut answer);
                if outcome.is_success() {
                    self.fill_pages(command.data(), &answer);
                }
                (outcome, 0)
            }
            admin::GET_LOG_PAGE if command.dword(10) & 0xFF == admin::HEALTH => {
                let mut log = [0; HEALTH_BYTES];
                log[..6].copy_from_slice(&self.health);
                log[128..130].copy_from_slice(&1000u16.to_le_bytes());
                log[144] = 3;
                log[160] = 2;
                let asked = ((command.dword(10) >> 16) as usize + 1) * 4;
                self.fill_pages(command.data(), &log[..asked.min(HEALTH_BYTES)]);
                (Status::SUCCESS, 0)
            }
            admin::GET_FEATURES if command.dword(10) == admin::FLEXIBLE_DATA_PLACEMENT => {
                let placement = self.options.placement;
                match placement.has_it() && command.dword(11) == u32::from(placement.endurance_group()) {
                    // The rest is the number of a configuration.
                    true => (Status::SUCCESS, 0x0300 | u32::from(placement.is_on())),
                    false => (Status::INVALID_FIELD, 0),
                }
            }
            admin::SET_FEATURES if command.dword(10) == admin::NUMBER_OF_QUEUES => (Status::SUCCESS, command.dword(11)),
            admin::CREATE_COMPLETION_QUEUE if queue != ADMIN => {
                self.add_completions(queue, command.data()[0], last);
                (Status::SUCCESS, 0)
            }
            admin::CREATE_SUBMISSION_QUEUE if self.completions.contains_key(&((command.dword(11) >> 16) as u16)) => {
                self.add_submissions(queue, command.data()[0], last, (command.dword(11) >> 16) as u16);
                (Status::SUCCESS, 0)
            }
            admin::DOORBELL_BUFFER_CONFIG if self.options.shadow_doorbells => {
                self.shadow = Some(command.data());
                (Status::SUCCESS, 0)
            }
            admin::ABORT => (Status::SUCCESS, u32::from(!self.abort(queue, last))),
            _ => (Status::INVALID_FIELD, 0),
        }
    }

    fn abort(&mut self, queue: u16, id: u16) -> bool {
        let of = |(at, command): &(u16, Command)| *at == queue && command.id() == id;
        let Some(position) = self.unanswered.iter().position(of).filter(|_| self.options.aborts) else { return false };
        self.unanswered.remove(position);
        self.answer(queue, id, Status::ABORTED_BY_REQUEST, 0);
        true
    }

    fn identify(&self, command: Command, answer: &mut [u8; IDENTIFY_BYTES]) -> Status {
        let options = &self.options;
        match (command.dword(10) & 0xFF, command.namespace()) {
            (admin::CONTROLLER, _) => {
                answer[4..24].copy_from_slice(b"MODEL-0             ");
                answer[24..64].fill(b' ');
                answer[24..29].copy_from_slice(b"model");
                answer[77] = options.transfer_shift;
                answer[98] = u8::from(options.placement.has_it()) << 3;
                answer[257] = options.shadow_doorbells.into();
                answer[520] = u8::from(options.deallocates) << 2;
                answer[525] = options.volatile_cache.into();
                Status::SUCCESS
            }
            // Of a namespace that is not there all is zero.
            (admin::NAMESPACE, namespace) if (1..=options.namespaces).contains(&namespace) => {
                answer[..8].copy_from_slice(&options.blocks.to_le_bytes());
                answer[26] = 2;
                answer[102..104].copy_from_slice(&options.placement.endurance_group().to_le_bytes());
                let format = u32::from(options.metadata_bytes) | u32::from(options.block_shift) << 16;
                answer[136..140].copy_from_slice(&format.to_le_bytes());
                Status::SUCCESS
            }
            (admin::NAMESPACE, _) => Status::SUCCESS,
            _ => Status::INVALID_FIELD,
        }
    }

    fn range_on_disk(&self, namespace: u32, first: u64, blocks: u64) -> Option<Range<usize>> {
        let end = first.checked_add(blocks).filter(|end| *end <= self.options.blocks)?;
        let base = u64::from(namespace - 1) * self.options.blocks;
        let at = |block: u64| ((base + block) as usize) << self.options.block_shift;
        Some(at(first)..at(end))
    }

    fn io(&mut self, command: Command) -> Status {
        if !(1..=self.options.namespaces).contains(&command.namespace()) {
            return Status::INVALID_FIELD;
        }
        let transfer = self.range_on_disk(command.namespace(), command.first_block(), command.block_count().into());
        match command.opcode() {
            io::FLUSH => {
                self.counts.flushes += 1;
                Status::SUCCESS
            }
            io::READ | io::WRITE => {
                let Some(range) = transfer else { return Status::LBA_OUT_OF_RANGE };
                let most = PAGE << self.options.transfer_shift;
                if self.options.transfer_shift > 0 && range.len() > most {
                    return Status::INVALID_FIELD;
                }
                if command.opcode() == io::READ {
                    let bytes = self.disk[range].to_vec();
                    self.fill_pages(command.data(), &bytes);
                } else {
                    let blocks = range.start >> self.options.block_shift..range.end >> self.options.block_shift;
                    let placed = self.placed.write(self.options.placement, &command, blocks);
                    if !placed.is_success() {
                        return placed;
                    }
                    self.counts.forced_writes += u64::from(command.dword(12) & io::FUA != 0);
                    let mut bytes = vec![0; range.len()];
                    self.gather_pages(command.data(), &mut bytes);
                    self.disk[range].copy_from_slice(&bytes);
                }
                Status::SUCCESS
            }
            io::DATASET_MANAGEMENT if command.dword(11) & io::DEALLOCATE != 0 => self.deallocate(command),
            io::MANAGEMENT_RECEIVE => self.management_receive(command),
            _ => Status::INVALID_OPCODE,
        }
    }

    fn management_receive(&mut self, command: Command) -> Status {
        let placement = self.options.placement;
        // One that is switched off has handles all the same.
        let refuses = !placement.has_it() || placement.flaw == Some(PlacementFlaw::RefusesStatus);
        if refuses || command.dword(10) != io::RECLAIM_UNIT_HANDLE_STATUS {
            return Status::INVALID_FIELD;
        }
        let status = placement.status();
        let asked = (command.dword(11) as usize + 1) * 4;
        self.fill_pages(command.data(), &status[..status.len().min(asked)]);
        Status::SUCCESS
    }

    fn deallocate(&mut self, command: Command) -> Status {
        let count = (command.dword(10) & 0xFF) as usize + 1;
        let mut ranges = vec![0; count * 16];
        self.gather_pages(command.data(), &mut ranges);
        for range in ranges.chunks_exact(16) {
            let blocks = u32::from_le_bytes(range[4..8].try_into().expect("four bytes"));
            let first = u64::from_le_bytes(range[8..16].try_into().expect("eight bytes"));
            let Some(range) = self.range_on_disk(command.namespace(), first, blocks.into()) else {
                return Status::LBA_OUT_OF_RANGE;
            };
            self.disk[range].fill(0);
        }
        Status::SUCCESS
    }

    /// The pieces of memory that a data pointer names (figure 91), for so many bytes.
    fn pieces(&mut self, [first, second]: [u64; 2], length: usize) -> Vec<(u64, usize)> {
        let head = length.min(PAGE - first as usize % PAGE);
        let mut pieces = vec![(first, head)];
        let mut left = length - head;
        if left == 0 {
            return pieces;
        }
        if left <= PAGE {
            pieces.push((second, left));
            return pieces;
        }
        for entry in 0.. {
            if left == 0 {
                break;
            }
            assert!(entry < PAGE as u64 / 8, "a list of more than a page");
            let mut page = [0; 8];
            self.copy_from(second + entry * 8, &mut page);
            let page = u64::from_le_bytes(page);
            assert!(page.is_multiple_of(PAGE as u64), "entry {entry} of a list is {page:#x}, which begins no page");
            pieces.push((page, left.min(PAGE)));
            left -= left.min(PAGE);
        }
        pieces
    }

    fn fill_pages(&mut self, pages: [u64; 2], bytes: &[u8]) {
        let mut done = 0;
        for (address, length) in self.pieces(pages, bytes.len()) {
            self.copy_to(address, &bytes[done..done + length]);
            done += length;
        }
    }

    fn gather_pages(&mut self, pages: [u64; 2], bytes: &mut [u8]) {
        let mut done = 0;
        for (address, length) in self.pieces(pages, bytes.len()) {
            self.copy_from(address, &mut bytes[done..done + length]);
            done += length;
        }
    }

    fn can_reach(&self, address: u64, length: usize) -> bool {
        let wanted = address..address.saturating_add(length as u64);
        self.reachable.iter().any(|range| range.start <= wanted.start && wanted.end <= range.end)
    }

    fn may_reach(&mut self, address: u64, length: usize) -> bool {
        let reaches = self.can_reach(address, length);
        self.counts.memory_faults += u64::from(!reaches);
        reaches
    }

    fn copy_to(&mut self, address: u64, bytes: &[u8]) {
        if self.may_reach(address, bytes.len()) {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(address as usize);
            // SAFETY: inside memory that lasts (the arena, or an allocation that was never taken back), to
            // which nobody holds a reference while a command names it: that is what the driver
            // vouches for, as it does to a real device.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
        }
    }

    fn copy_from(&mut self, address: u64, bytes: &mut [u8]) {
        if self.may_reach(address, bytes.len()) {
            let from = std::ptr::with_exposed_provenance::<u8>(address as usize);
            // SAFETY: as above; whoever refers to it only reads.
            unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
        }
    }
}

/// A pair of queues in memory that lasts.
#[derive(Clone, Copy)]
pub(super) struct RawQueue {
    submissions: *const Command,
    completions: *mut Completion,
    pub entries: u16,
}

impl RawQueue {
    pub fn submission(self, at: u16) -> Command {
        assert!(at < self.entries, "entry {at} of {}", self.entries);
        // SAFETY: inside the ring, whose memory was allocated by the model and never taken back, on a page;
        // nobody holds references to it.
        unsafe { self.submissions.add(at.into()).read_volatile() }
    }

    pub fn complete(self, at: u16, completion: Completion) {
        assert!(at < self.entries, "entry {at} of {}", self.entries);
        // SAFETY: as above.
        unsafe { self.completions.add(at.into()).write_volatile(completion) }
    }
}

/// A page of memory, aligned as one.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Aligned([u8; PAGE]);

impl Bus for Rc<Model> {
    fn name(&self) -> &str {
        "model"
    }

    fn register_bytes(&self) -> usize {
        REGISTER_BYTES
    }

    fn read32(&self, offset: usize) -> u32 {
        let mut state = self.state.borrow_mut();
        if state.gone {
            return u32::MAX;
        }
        match offset {
            // Contiguous queues; ready within 1 s.
            register::CAPABILITIES => u32::from(state.options.queue_entries_max - 1) | 1 << 16 | 2 << 24,
            // The NVM command set.
            0x04 => 1 << 5,
            register::STATUS => state.status_register(),
            register::CONFIGURATION => state.configuration,
            other => state.register(other),
        }
    }

    fn write32(&self, offset: usize, value: u32) {
        let mut state = self.state.borrow_mut();
        if state.gone {
            return;
        }
        match offset {
            register::CONFIGURATION => state.configure(value),
            register::DOORBELLS.. => state.ring((offset - register::DOORBELLS) / 4, value),
            other => drop(state.registers.insert(other, value)),
        }
        drop(state);
        self.work.notify_all();
    }

    fn allocate(&self, bytes: usize) -> DeviceResult<SharedMemory> {
        let pages = vec![Aligned([0; PAGE]); bytes.div_ceil(PAGE)].into_boxed_slice();
        let length = pages.len() * PAGE;
        // Never taken back: the model may be told to reach for it at any time.
        let start = Box::leak(pages).as_mut_ptr().cast::<u8>();
        let address = start.expose_provenance() as u64;
        self.state.borrow_mut().reachable.push(address..address + length as u64);
        let start = NonNull::new(start).expect("memory is somewhere");
        // SAFETY: page-aligned, zeroed, leaked, and reached by the model and the driver through pointers only.
        Ok(unsafe { SharedMemory::new(start, length, address, Box::new(())) })
    }

    fn device_address(&self, bytes: &[u8]) -> Option<u64> {
        let address = bytes.as_ptr().expose_provenance() as u64;
        let arena = device_memory().map(|(start, length)| start as u64..start as u64 + length as u64)?;
        (arena.start <= address && address + bytes.len() as u64 <= arena.end).then_some(address)
    }

    fn cut_off(&self) {
        self.state.borrow_mut().stop();
    }

    fn is_wanted_back(&self) -> bool {
        self.state.borrow().wanted_back
    }

    fn give_up(&self) {
        self.pull_out();
        self.state.borrow_mut().wanted_back = false;
    }
}
