//! One controller: brought up, polled, and brought up again when it does not answer.
//!
//! The executor is told nothing by the device: while commands are under way a task of its own looks
//! for completions each turn, and rings the doorbell once for all that was queued in the turn. When
//! nothing has completed for a while it looks only now and then, so that a slow device leaves the
//! core to others.
//!
//! A command that is not answered in time costs the controller a reset, which is the one thing that
//! ends all its work on our memory; what was under way is then asked for again. Others are answered
//! until then: who looks after the old ones is not who polls.

mod under_way;

pub(super) use under_way::UnderWay;

use super::bus::{Bus, SharedMemory};
use super::commands::{Commands, Harvest, Outcome};
use super::error::NvmeError;
use super::queue::{QueuePair, ShadowDoorbells};
use super::spec::{
    Capabilities, Command, Controller as Identity, HEALTH_BYTES, IDENTIFY_BYTES, Namespace, admin, configuration,
    parse_health, register, status,
};
use crate::DeviceHealth;
use cfs_reactor::sync::{Mutex, Notify, Permit, Semaphore};
use cfs_reactor::{Handle, Instant};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

const ADMIN_QUEUE: u16 = 0;
const ADMIN_ENTRIES: u16 = 16;
const IO_QUEUE: u16 = 1;
/// Deeper than any depth at which a device still becomes faster; their pages of addresses take 1 MiB.
const IO_ENTRIES_MAX: u16 = 256;
/// The controller's page, and ours.
pub(super) const PAGE: usize = 4096;
/// Addresses in a page of them.
const LIST_ENTRIES: usize = PAGE / 8;
/// Bytes that a command moves at most, whatever the device allows: as many pages as one page of addresses
/// names.
pub(super) const TRANSFER_MAX: u64 = (LIST_ENTRIES * PAGE) as u64;

/// Commands queued without the controller being told, at most: it idles meanwhile.
const RING_AT: u16 = 16;
/// Turns without a completion before polling makes pauses. A turn takes some 100 ns.
const FRUITLESS_TURNS: u32 = 2000;
/// The pause: as short as the kernel's timers are sharp.
const POLL_PAUSE: Duration = Duration::from_micros(50);
/// How often the controller is looked at, and commands for their age.
const AGE_CHECK: Duration = Duration::from_secs(1);
/// A command that takes longer is not going to be answered: what Linux gives one.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for an admin command.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an aborted command may take to say so.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a controller may take to get its caches in order.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
const STATUS_PAUSE: Duration = Duration::from_millis(1);
/// Registers of a function that is being reset read all ones as those of one that is gone. It has a second
/// to come back (PCI Express Base Specification, "Conventional Reset"); this is twice as long.
const ABSENT_MAX: Duration = Duration::from_secs(2);
/// How often the controller is given a command that it does not answer, with a reset before each time but
/// the first.
const SENT_MAX: u8 = 3;

/// Tries to bring a controller up after a reset, and the pause between them: others reset a function in well
/// under a second.
const BRING_UPS_MAX: u32 = 5;
const BRING_UP_PAUSE: Duration = Duration::from_millis(200);
/// Resets in a row after which no command was answered: it is lost then.
const VAIN_RESETS_MAX: u32 = 8;

/// Memory to which the device reaches, for what lies elsewhere: a shard of a segment at once.
pub(super) const BOUNCE_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    /// Being brought up: commands wait for it.
    Resetting,
    Gone,
    /// Closed by us.
    Closed,
}

pub(super) struct Controller<B: Bus> {
    pub(super) handle: Handle,
    capabilities: Capabilities,
    admin: Mutex<QueuePair>,
    /// The identifier of the last admin command.
    admin_id: Cell<u16>,
    /// Answers of identify.
    answers: SharedMemory,
    io: RefCell<QueuePair>,
    /// Used if the controller takes them.
    shadow: Rc<ShadowDoorbells>,
    /// As it said when it was brought up last.
    flexible_data_placement: Cell<bool>,
    commands: RefCell<Commands>,
    /// A page of addresses for each command.
    lists: SharedMemory,
    /// For what the device can't reach where it is.
    pub(super) bounce: SharedMemory,
    /// Whose turn it is with that.
    pub(super) bouncing: Rc<Semaphore>,
    /// Places for commands.
    places: Rc<Semaphore>,
    /// Completions are not looked for at this moment: nobody rings for what comes now.
    pausing: Cell<bool>,
    /// Kept to be filled again.
    harvest: RefCell<Harvest>,
    state: Cell<State>,
    /// Commands came, or it was closed.
    work: Rc<Notify>,
    resets: Cell<u64>,
    /// Resets that it needed because it had failed.
    failures: Cell<u64>,
    /// Since it last answered a command.
    vain_resets: Cell<u32>,
    /// Nothing else helps; whoever polls resets it.
    reset_wanted: Cell<bool>,
    /// Whoever brings it up has the admin queue.
    bringing_up: Cell<bool>,
    /// Commands that take too long are being looked after.
    looking_after: Cell<bool>,
    /// It was closed, and nothing more is done with it.
    ended: Cell<bool>,
    /// Told when it has ended.
    at_end: Rc<Notify>,
    command_timeout: Duration,
    /// After all memory that it was given.
    bus: Rc<B>,
}

/// What a command works on.
#[derive(Clone, Copy)]
pub(super) enum Data<'a> {
    None,
    /// The device's addresses of whole pages, one after the other in the transfer.
    Pages(&'a [u64]),
    /// So many bytes from a page's beginning on.
    Run {
        start: u64,
        bytes: usize,
    },
    /// Bytes that are copied to where the page of addresses would be.
    Inline(&'a [u8]),
}

impl<B: Bus> Controller<B> {
    /// Resets the controller, whatever state it is in, and makes its queues.
    pub async fn open(bus: Rc<B>, handle: &Handle) -> Result<Rc<Controller<B>>, NvmeError> {
        let device = || bus.name().to_owned();
        let unsupported = |what| Err(NvmeError::Unsupported { device: device(), what });
        let capabilities = Capabilities(bus.read64(register::CAPABILITIES));
        if capabilities.0 == u64::MAX {
            return Err(NvmeError::Gone { device: device() });
        }
        if !capabilities.has_nvm_commands() {
            return unsupported("has no NVM command set");
        }
        if capabilities.page_bytes_min() > PAGE as u64 {
            return unsupported("works with pages larger than 4 KiB only");
        }
        let entries = IO_ENTRIES_MAX.min(capabilities.queue_entries_max().min(u16::MAX.into()) as u16);
        let admin_entries = ADMIN_ENTRIES.min(entries);
        if entries < 2 {
            return unsupported("has queues of one entry");
        }
        let doorbells = register::DOORBELLS + 4 * capabilities.doorbell_stride();
        if bus.register_bytes() < doorbells {
            return unsupported("has too few registers");
        }
        let places = entries - 1;
        let controller = Rc::new(Controller {
            admin_id: Cell::new(0),
            admin: Mutex::new(QueuePair::new(&*bus, ADMIN_QUEUE, admin_entries, capabilities)?),
            answers: bus.allocate(IDENTIFY_BYTES)?,
            io: RefCell::new(QueuePair::new(&*bus, IO_QUEUE, entries, capabilities)?),
            shadow: Rc::new(ShadowDoorbells::new(&*bus)?),
            flexible_data_placement: Cell::new(false),
            commands: RefCell::new(Commands::new(places)),
            lists: bus.allocate(usize::from(places) * PAGE)?,
            bounce: bus.allocate(BOUNCE_BYTES)?,
            bouncing: Semaphore::new(1),
            places: Semaphore::new(places.into()),
            pausing: Cell::new(false),
            harvest: RefCell::default(),
            state: Cell::new(State::Resetting),
            work: Notify::new(),
            resets: Cell::new(0),
            failures: Cell::new(0),
            vain_resets: Cell::new(0),
            reset_wanted: Cell::new(false),
            bringing_up: Cell::new(false),
            looking_after: Cell::new(false),
            ended: Cell::new(false),
            at_end: Notify::new(),
            command_timeout: COMMAND_TIMEOUT,
            capabilities,
            handle: handle.clone(),
            bus,
        });
        controller.bring_up().await?;
        controller.state.set(State::Running);
        let polled = controller.clone();
        handle.spawn(async move { polled.poll_until_closed().await });
        Ok(controller)
    }

    fn device(&self) -> String {
        self.bus.name().to_owned()
    }

    pub fn is_gone(&self) -> bool {
        self.state.get() == State::Gone
    }

    /// How often the controller was reset because it did not answer.
    pub fn resets(&self) -> u64 {
        self.resets.get()
    }

    /// How often it had failed. What was in its volatile cache then may be lost.
    pub fn failures(&self) -> u64 {
        self.failures.get()
    }

    pub async fn identify(&self) -> Result<Identity, NvmeError> {
        self.identify_in(&mut *self.admin.lock().await).await
    }

    async fn identify_in(&self, queue: &mut QueuePair) -> Result<Identity, NvmeError> {
        let command = Command::new(admin::IDENTIFY, 0).with(10, admin::CONTROLLER);
        let answer = self.answer_to(queue, command, "identify itself").await?;
        Ok(Identity::parse(&answer, self.capabilities.page_bytes_min()))
    }

    pub async fn namespace(&self, namespace: u32) -> Result<Namespace, NvmeError> {
        let command = Command::new(admin::IDENTIFY, namespace).with(10, admin::NAMESPACE);
        let mut queue = self.admin.lock().await;
        let answer = self.answer_to(&mut queue, command, "identify a namespace").await?;
        Namespace::parse(&answer).map_err(|why| NvmeError::Namespace { device: self.device(), namespace, why })
    }

    /// While it is brought up that is not known yet: it waits for whoever does that.
    pub async fn has_flexible_data_placement(&self) -> bool {
        let _queue = self.admin.lock().await;
        self.flexible_data_placement.get()
    }

    /// Whether flexible data placement is enabled in an endurance group.
    pub async fn places_data(&self, endurance_group: u16) -> Result<bool, NvmeError> {
        let command = Command::new(admin::GET_FEATURES, 0)
            .with(10, admin::FLEXIBLE_DATA_PLACEMENT)
            .with(11, endurance_group.into());
        let mut queue = self.admin.lock().await;
        let answer = self.admin_command(&mut queue, command, "tell of its flexible data placement").await?;
        Ok(answer & 1 == 1)
    }

    /// What it says of its own state.
    pub async fn health(&self) -> Result<DeviceHealth, NvmeError> {
        const ALL_NAMESPACES: u32 = u32::MAX;
        let command = Command::new(admin::GET_LOG_PAGE, ALL_NAMESPACES)
            .with(10, admin::HEALTH | (HEALTH_BYTES as u32 / 4 - 1) << 16);
        let mut queue = self.admin.lock().await;
        Ok(parse_health(&self.answer_to(&mut queue, command, "tell of its health").await?))
    }

    /// The first bytes of what a command answers into a page.
    async fn answer_to<const BYTES: usize>(
        &self,
        queue: &mut QueuePair,
        command: Command,
        what: &'static str,
    ) -> Result<[u8; BYTES], NvmeError> {
        self.admin_command(queue, command.with_data([self.answers.device_address(0), 0]), what).await?;
        let mut answer = [0; BYTES];
        self.answers.copy_out(0, &mut answer);
        Ok(answer)
    }

    /// One command at a time; its answer is looked for and not waited for.
    async fn admin_command(
        &self,
        queue: &mut QueuePair,
        command: Command,
        what: &'static str,
    ) -> Result<u32, NvmeError> {
        // While it is brought up only who does that has the queue.
        let usable = || self.bringing_up.get() || self.state.get() == State::Running;
        if !usable() {
            return Err(NvmeError::Silent { device: self.device(), what });
        }
        let id = self.admin_id.get().wrapping_add(1);
        self.admin_id.set(id);
        let resets = self.resets.get();
        queue.push(command.with_id(id));
        queue.ring(&*self.bus);
        let deadline = self.handle.now() + ADMIN_TIMEOUT;
        let mut turns = 0;
        let completion = loop {
            if let Some(completion) = queue.take() {
                queue.acknowledge(&*self.bus);
                if completion.id() == id {
                    break completion;
                }
                tracing::debug!(device = self.bus.name(), "an admin command is answered that was given up");
                continue;
            }
            // After a reset it is not answered any more, and that waits for the queue.
            let in_vain = self.resets.get() != resets || !usable();
            if self.handle.now() >= deadline || in_vain {
                if !in_vain {
                    // It may still write its answer to where the next one's is to be.
                    self.reset_wanted.set(true);
                    self.work.notify_all();
                }
                return Err(NvmeError::Silent { device: self.device(), what });
            }
            self.pause(&mut turns).await;
        };
        match completion.status() {
            status if status.is_success() => Ok(completion.result()),
            status => Err(NvmeError::Refused { device: self.device(), what, status }),
        }
    }

    async fn pause(&self, turns: &mut u32) {
        *turns = turns.saturating_add(1);
        match *turns < FRUITLESS_TURNS {
            true => self.handle.yield_now().await,
            false => self.handle.sleep(POLL_PAUSE).await,
        }
    }

    /// The same between looking for completions: a command that comes ends it.
    async fn pause_polling(&self, turns: &mut u32) {
        *turns = turns.saturating_add(1);
        if *turns < FRUITLESS_TURNS {
            return self.handle.yield_now().await;
        }
        self.pausing.set(true);
        if self.handle.timeout(POLL_PAUSE, self.work.notified()).await.is_some() {
            *turns = 0;
        }
        self.pausing.set(false);
    }

    /// Disables the controller, which ends all that it does, and enables it with empty queues.
    async fn bring_up(&self) -> Result<(), NvmeError> {
        // Whoever has it, or waits for it, sees that it is in vain.
        let mut queue = self.admin.lock().await;
        self.bringing_up.set(true);
        let outcome = self.bring_up_with(&mut queue).await;
        self.bringing_up.set(false);
        outcome
    }

    async fn bring_up_with(&self, queue: &mut QueuePair) -> Result<(), NvmeError> {
        self.disable().await?;
        queue.start_again();
        let [submissions, completions] = queue.device_addresses();
        let last = u32::from(queue.entries() - 1);
        self.bus.write32(register::ADMIN_QUEUE_SIZES, last | last << 16);
        self.bus.write64(register::ADMIN_SUBMISSIONS, submissions);
        self.bus.write64(register::ADMIN_COMPLETIONS, completions);
        self.bus.write32(register::CONFIGURATION, configuration::ENABLE | configuration::ENTRY_SIZES);
        self.wait_for(status::READY, status::READY, "ready").await?;
        // One pair is wanted; the controller may grant more, and no less.
        let queues = Command::new(admin::SET_FEATURES, 0).with(10, admin::NUMBER_OF_QUEUES).with(11, 0);
        self.admin_command(queue, queues, "give a queue").await?;
        let identity = self.identify_in(queue).await?;
        self.flexible_data_placement.set(identity.flexible_data_placement);
        let mut shadow = identity.shadow_doorbells.then(|| self.shadow.clone());
        if let Some(doorbells) = &shadow {
            doorbells.clear();
            let here = Command::new(admin::DOORBELL_BUFFER_CONFIG, 0).with_data(doorbells.device_addresses());
            match self.admin_command(queue, here, "look for doorbells in memory").await {
                Ok(_) => {}
                Err(refused @ NvmeError::Refused { .. }) => {
                    tracing::debug!(%refused, "its registers do");
                    shadow = None;
                }
                Err(other) => return Err(other),
            }
        }
        let (id, last, [submissions, completions]) = {
            let mut io = self.io.borrow_mut();
            io.start_again();
            io.use_shadow(shadow);
            (u32::from(io.id()), u32::from(io.entries() - 1), io.device_addresses())
        };
        const CONTIGUOUS: u32 = 1;
        // Without interrupts: completions are looked for.
        let create = Command::new(admin::CREATE_COMPLETION_QUEUE, 0).with_data([completions, 0]);
        let create = create.with(10, id | last << 16).with(11, CONTIGUOUS);
        self.admin_command(queue, create, "make a completion queue").await?;
        let create = Command::new(admin::CREATE_SUBMISSION_QUEUE, 0).with_data([submissions, 0]);
        let create = create.with(10, id | last << 16).with(11, CONTIGUOUS | id << 16);
        self.admin_command(queue, create, "make a submission queue").await?;
        Ok(())
    }

    /// The status register, once there is one to be read.
    async fn status(&self) -> Result<u32, NvmeError> {
        let deadline = self.handle.now() + ABSENT_MAX;
        loop {
            let status = self.bus.read32(register::STATUS);
            if status != status::GONE {
                return Ok(status);
            }
            if self.bus.is_wanted_back() || self.handle.now() >= deadline {
                return Err(NvmeError::Gone { device: self.device() });
            }
            self.handle.sleep(STATUS_PAUSE).await;
        }
    }

    async fn disable(&self) -> Result<(), NvmeError> {
        if self.status().await? & status::FATAL != 0 {
            self.failures.set(self.failures.get() + 1);
        }
        if self.bus.read32(register::CONFIGURATION) & configuration::ENABLE != 0 {
            self.bus.write32(register::CONFIGURATION, 0);
        }
        self.wait_for(status::READY, 0, "disabled").await
    }

    /// Waits until the bits of the status register that `mask` names are `wanted`.
    async fn wait_for(&self, mask: u32, wanted: u32, state: &'static str) -> Result<(), NvmeError> {
        let within = Duration::from_millis(self.capabilities.ready_within_ms());
        let deadline = self.handle.now() + within;
        loop {
            let status = self.status().await?;
            // One that has failed may still be disabled, which brings it back.
            if status & status::FATAL != 0 && wanted != 0 {
                return Err(NvmeError::Fatal { device: self.device(), status });
            }
            if status & mask == wanted {
                return Ok(());
            }
            if wanted != 0 && self.bus.read32(register::CONFIGURATION) & configuration::ENABLE == 0 {
                return Err(NvmeError::Undone { device: self.device() });
            }
            if self.handle.now() >= deadline {
                let seconds = within.as_secs();
                return Err(NvmeError::NotReady { device: self.device(), state, seconds, status });
            }
            self.handle.sleep(STATUS_PAUSE).await;
        }
    }

    /// Sends a command and waits for its end. `kept`: what `data` lies in; it comes back with the outcome,
    /// and if nobody waits for that any more, it stays with the controller for as long as that may touch it.
    pub async fn execute<K: 'static>(self: &Rc<Self>, command: Command, data: Data<'_>, kept: K) -> (Outcome, K) {
        let place = self.places.acquire(1).await;
        match self.send(place, command, data, kept) {
            Ok(under_way) => under_way.await,
            Err(kept) => (Outcome::Gone, kept),
        }
    }

    /// A place for a command, if there is one at once.
    pub fn place(&self) -> Option<Permit> {
        self.places.try_acquire(1)
    }

    /// As [`Controller::execute`], without waiting. Gives `kept` back if the controller is gone or closed.
    pub fn send<K: 'static>(
        self: &Rc<Self>,
        place: Permit,
        command: Command,
        data: Data<'_>,
        kept: K,
    ) -> Result<UnderWay<B, K>, K> {
        let running = match self.state.get() {
            State::Gone | State::Closed => return Err(kept),
            state => state == State::Running,
        };
        let mut commands = self.commands.borrow_mut();
        let id = commands.take();
        let command = match data {
            Data::None => command,
            Data::Pages(pages) => command.with_data(self.describe(id, pages.iter().copied())),
            Data::Run { start, bytes } => {
                let page = |index: usize| start + (index * PAGE) as u64;
                command.with_data(self.describe(id, (0..bytes.div_ceil(PAGE)).map(page)))
            }
            Data::Inline(bytes) => {
                let list = usize::from(id) * PAGE;
                self.lists.copy_in(list, bytes);
                command.with_data([self.lists.device_address(list), 0])
            }
        };
        let command = commands.start(id, command, self.handle.now_coarse(), running);
        let pausing = self.pausing.get();
        if running {
            let mut io = self.io.borrow_mut();
            io.push(command);
            if pausing || io.unrung() >= RING_AT {
                io.ring(&*self.bus);
            }
        }
        if pausing || commands.under_way() == 1 {
            self.work.notify_all();
        }
        Ok(UnderWay { controller: self.clone(), id, kept: Some((kept, place)) })
    }

    /// Where the controller finds the pages: both, or the first and a page of the others' addresses.
    #[inline]
    fn describe(&self, id: u16, mut pages: impl ExactSizeIterator<Item = u64>) -> [u64; 2] {
        let first = pages.next().expect("a transfer has a page");
        match pages.len() {
            0 => [first, 0],
            1 => [first, pages.next().expect("one is left")],
            others => {
                assert!(others <= LIST_ENTRIES, "{others} more pages are more than one list takes");
                let list = usize::from(id) * PAGE;
                for (index, page) in pages.enumerate() {
                    self.lists.write(list + 8 * index, page.to_le());
                }
                [first, self.lists.device_address(list)]
            }
        }
    }

    async fn poll_until_closed(self: Rc<Self>) {
        let mut fruitless = 0;
        let mut next_check = self.handle.now() + AGE_CHECK;
        while self.state.get() == State::Running {
            if self.reset_wanted.replace(false) {
                self.reset().await;
                continue;
            }
            let work = self.work.notified();
            if self.commands.borrow().under_way() == 0 {
                let wakers = self.commands.borrow_mut().take_wakers();
                drop(wakers);
                let left = next_check - self.handle.now();
                if self.handle.timeout(left, work).await.is_none() {
                    next_check = self.handle.now() + AGE_CHECK;
                    self.check();
                    continue;
                }
                fruitless = 0;
            }
            match self.turn() {
                Ok(true) => fruitless = 0,
                Ok(false) => {}
                Err(made_up) => {
                    tracing::error!(
                        device = self.bus.name(),
                        command = made_up,
                        "the controller answers what nobody asked"
                    );
                    self.reset_wanted.set(true);
                }
            }
            if self.handle.now_coarse() >= next_check {
                next_check = self.handle.now() + AGE_CHECK;
                self.check();
            }
            self.pause_polling(&mut fruitless).await;
        }
        if self.state.get() == State::Closed {
            self.end().await;
        }
        self.ended.set(true);
        self.at_end.notify_all();
    }

    /// What is under way is waited for, then the controller is shut down.
    async fn end(&self) {
        let deadline = self.handle.now() + SHUTDOWN_TIMEOUT;
        let mut turns = 0;
        while self.commands.borrow().any_lives() && self.handle.now() < deadline && self.turn().is_ok() {
            self.pause(&mut turns).await;
        }
        if let Err(error) = self.shut_down().await {
            tracing::info!(%error, "the NVMe controller was not shut down in order");
            self.bus.cut_off();
        }
        self.end_all();
    }

    /// No command is taken any more; what is under way is waited for a while.
    pub fn close(&self) {
        if self.state.get() != State::Gone {
            self.state.set(State::Closed);
        }
        self.work.notify_all();
    }

    /// Closes it and waits until nothing is under way and its power may go.
    pub async fn closed(&self) {
        self.close();
        loop {
            let ended = self.at_end.notified();
            if self.ended.get() {
                return;
            }
            ended.await;
        }
    }

    /// Tells the controller that its power may go.
    async fn shut_down(&self) -> Result<(), NvmeError> {
        let configuration = self.bus.read32(register::CONFIGURATION) & !configuration::SHUTDOWN_MASK;
        self.bus.write32(register::CONFIGURATION, configuration | configuration::SHUTDOWN);
        let deadline = self.handle.now() + SHUTDOWN_TIMEOUT;
        while self.bus.read32(register::STATUS) & status::SHUTDOWN_MASK != status::SHUTDOWN_COMPLETE {
            if self.bus.read32(register::STATUS) == status::GONE {
                return Err(NvmeError::Gone { device: self.device() });
            }
            if self.handle.now() >= deadline {
                return Err(NvmeError::Silent { device: self.device(), what: "shut down" });
            }
            self.handle.sleep(STATUS_PAUSE).await;
        }
        self.disable().await
    }

    /// Rings for what was queued and takes what completed. True if anything did; an identifier of no
    /// command if the controller made one up.
    fn turn(&self) -> Result<bool, u16> {
        let mut harvest = self.harvest.take();
        let mut made_up = None;
        let mut any = false;
        {
            let (mut io, mut commands) = (self.io.borrow_mut(), self.commands.borrow_mut());
            io.ring(&*self.bus);
            while let Some(completion) = io.take() {
                any = true;
                if !commands.complete(&completion, &mut harvest) {
                    made_up = Some(completion.id());
                    break;
                }
            }
            io.acknowledge(&*self.bus);
        }
        if any {
            self.vain_resets.set(0);
        }
        self.deliver(harvest);
        made_up.map_or(Ok(any), Err)
    }

    /// Whether the controller is still there and well, and commands are answered in time.
    fn check(self: &Rc<Self>) {
        if self.bus.is_wanted_back() {
            tracing::warn!(device = self.bus.name(), "the NVMe controller is taken away");
            return self.gone();
        }
        let status = self.bus.read32(register::STATUS);
        if status == status::GONE {
            tracing::warn!(device = self.bus.name(), "the NVMe controller is gone from the bus, or is being reset");
            return self.reset_wanted.set(true);
        }
        if status & status::FATAL != 0 {
            tracing::error!(device = self.bus.name(), status, "the NVMe controller has failed");
            return self.reset_wanted.set(true);
        }
        if status & status::READY == 0 {
            tracing::warn!(device = self.bus.name(), "somebody else has reset the NVMe controller");
            return self.reset_wanted.set(true);
        }
        if let Some(old) = self.timed_out()
            && !self.looking_after.replace(true)
        {
            let controller = self.clone();
            self.handle.spawn(async move {
                controller.look_after_the_old(old).await;
                controller.looking_after.set(false);
            });
        }
    }

    /// Aborts commands that take too long, and wants the controller reset if that does not end them.
    async fn look_after_the_old(&self, old: Vec<u16>) {
        let device = self.bus.name();
        let resets = self.resets.get();
        tracing::warn!(device, commands = ?old, "NVMe commands take too long: they are aborted");
        {
            let mut queue = self.admin.lock().await;
            for id in old {
                // It may have been answered meanwhile, and its place be another's.
                let is_old = self.timed_out().is_some_and(|old| old.contains(&id));
                if self.resets.get() != resets || !is_old {
                    continue;
                }
                let id = self.commands.borrow().identifier(id);
                let abort = Command::new(admin::ABORT, 0).with(10, u32::from(IO_QUEUE) | u32::from(id) << 16);
                if let Err(error) = self.admin_command(&mut queue, abort, "abort a command").await {
                    tracing::warn!(%error, "a command was not aborted");
                }
            }
        }
        let deadline = self.handle.now() + ABORT_TIMEOUT;
        while self.timed_out().is_some() && self.handle.now() < deadline && self.resets.get() == resets {
            self.handle.sleep(STATUS_PAUSE).await;
        }
        if self.timed_out().is_some() && self.resets.get() == resets {
            self.reset_wanted.set(true);
        }
    }

    /// The commands that take too long, if any do.
    fn timed_out(&self) -> Option<Vec<u16>> {
        let before =
            Instant::from_nanos(self.handle.now().as_nanos().saturating_sub(self.command_timeout.as_nanos() as u64));
        let old = self.commands.borrow().older_than(before);
        (!old.is_empty()).then_some(old)
    }

    async fn reset(&self) {
        if self.state.get() != State::Running {
            return;
        }
        self.state.set(State::Resetting);
        self.resets.set(self.resets.get() + 1);
        self.vain_resets.set(self.vain_resets.get() + 1);
        if self.vain_resets.get() > VAIN_RESETS_MAX {
            tracing::error!(device = self.bus.name(), "the NVMe controller does nothing any more but be reset");
            return self.gone();
        }
        tracing::warn!(device = self.bus.name(), "the NVMe controller is reset");
        let mut tries = 1;
        while let Err(error) = self.bring_up().await {
            // Others' reset may take a while and do its work twice: what was set up meanwhile is undone.
            if tries == BRING_UPS_MAX || matches!(error, NvmeError::Gone { .. }) || self.state.get() == State::Closed {
                tracing::error!(%error, "the NVMe controller does not come back");
                return self.gone();
            }
            tracing::warn!(%error, "the NVMe controller is brought up once more");
            tries += 1;
            self.handle.sleep(BRING_UP_PAUSE).await;
        }
        if self.state.get() == State::Closed {
            return self.end_all();
        }
        // Whatever wanted another one is done.
        self.reset_wanted.set(false);
        let mut harvest = Harvest::default();
        let again = self.commands.borrow_mut().after_reset(self.handle.now(), SENT_MAX, &mut harvest);
        let mut io = self.io.borrow_mut();
        for command in again {
            io.push(command);
        }
        drop(io);
        self.state.set(State::Running);
        self.deliver(harvest);
    }

    fn gone(&self) {
        self.bus.cut_off();
        // Nobody looks any more whether it is wanted back.
        self.bus.give_up();
        if self.state.get() != State::Closed {
            self.state.set(State::Gone);
        }
        self.end_all();
    }

    /// The controller touches no memory any more.
    fn end_all(&self) {
        let mut harvest = Harvest::default();
        self.commands.borrow_mut().end_all(&mut harvest);
        self.deliver(harvest);
    }

    fn deliver(&self, mut harvest: Harvest) {
        {
            let commands = self.commands.borrow();
            for id in harvest.ended.drain(..) {
                commands.wake(id);
            }
        }
        harvest.released.clear();
        self.harvest.replace(harvest);
    }
}

impl<B: Bus> Drop for Controller<B> {
    fn drop(&mut self) {
        // What commands under way work on goes with us.
        self.bus.cut_off();
    }
}
