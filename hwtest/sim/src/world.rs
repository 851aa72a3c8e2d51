//! Disks, a network, one node and its clients, and how each of them dies.

use crate::ledger::{Ledger, Trust};
use crate::report::{Checker, Toll, Violation};
use crate::tuning::Tuning;
use cfs::format::{FormatSpec, format_cluster, format_replacement};
use cfs::node::{Attach, DeviceSlot, Node, NodeConfig, NodeSetup};
use cfs_client::Client;
use cfs_device::BlockDevice;
use cfs_device::mem::MemDisk;
use cfs_fabric::Address;
use cfs_fabric::mem::MemNetwork;
use cfs_movers::rebuild::RebuildConfig;
use cfs_reactor::Handle;
use cfs_reactor::sync::Notify;
use cfs_wire::meta::{MetaOp, MetaReply};
use cfs_wire::{Ino, Policy, TargetId};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// The node's name on the network and where it listens.
pub const SERVER: &str = "server";
/// A start reads a few disks in memory: longer than this it will never end.
const START_MAX: Duration = Duration::from_secs(120);

/// What the cluster of one run looks like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    pub targets: usize,
    pub disk_bytes: u64,
    pub block: u32,
    pub zone_bytes: u32,
    pub shards: u16,
    pub policy: Policy,
    /// See [`FormatSpec`].
    pub tolerate: Option<u8>,
    pub rebuild: RebuildConfig,
    pub tuning: Tuning,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            targets: 3,
            disk_bytes: 64 << 20,
            block: 4096,
            zone_bytes: 2 << 20,
            shards: 4,
            policy: Policy::new(2, 1).expect("2+1 is a policy"),
            tolerate: None,
            rebuild: RebuildConfig::default(),
            tuning: Tuning::default(),
        }
    }
}

/// The node while it runs.
struct Server {
    handle: Handle,
    /// Absent while it starts.
    node: Option<Rc<Node>>,
}

/// How the node dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Death {
    /// The process: what it had asked of the disks may still land.
    Process,
    /// Power: what was not flushed is there in part.
    Power,
}

/// How a start ended that found no fault with the disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Started {
    Serving,
    /// A disk halted before the node served.
    Halted,
}

/// A client and its domain.
pub struct Mounted {
    pub handle: Handle,
    pub client: Rc<Client>,
    pub name: String,
}

/// Everything outside the programs.
pub struct World {
    /// Outlives every node and client.
    pub handle: Handle,
    pub shape: Shape,
    pub network: Rc<MemNetwork>,
    disks: RefCell<Vec<Rc<MemDisk>>>,
    pub ledger: Rc<Ledger>,
    server: RefCell<Option<Server>>,
    halted: Rc<Cell<bool>>,
    halt: Rc<Notify>,
    seed: u64,
    replacements: Cell<u64>,
    toll: Cell<Toll>,
    pub client_deaths: Cell<u64>,
    /// Struck on disks that were replaced, or by hand.
    other_disk_faults: Cell<u64>,
}

impl World {
    pub fn new(handle: &Handle, shape: Shape, seed: u64) -> Rc<World> {
        let disk = |index: usize| {
            let disk = MemDisk::new(&format!("disk{index}"), shape.disk_bytes, shape.block, seed ^ (index as u64 + 1));
            disk.set_faults(shape.tuning.disk_faults(index));
            disk
        };
        let disks = (0..shape.targets).map(disk).collect();
        World::on(disks, Ledger::new(handle), handle, shape, seed)
    }

    /// Another world, in which the disks hold what they hold here and nothing runs.
    pub fn copy(&self) -> Rc<World> {
        let disks = self.disks().iter().map(|disk| disk.snapshot()).collect();
        World::on(disks, self.ledger.copy(), &self.handle, self.shape.clone(), self.seed)
    }

    fn on(disks: Vec<Rc<MemDisk>>, ledger: Rc<Ledger>, handle: &Handle, shape: Shape, seed: u64) -> Rc<World> {
        Rc::new(World {
            handle: handle.clone(),
            network: MemNetwork::new(seed ^ 0x4E45_7457_4F52_4B00),
            disks: RefCell::new(disks),
            ledger,
            server: RefCell::new(None),
            halted: Rc::default(),
            halt: Notify::new(),
            seed,
            replacements: Cell::new(0),
            toll: Cell::default(),
            client_deaths: Cell::new(0),
            other_disk_faults: Cell::new(0),
            shape,
        })
    }

    pub fn disk(&self, index: usize) -> Rc<MemDisk> {
        self.disks.borrow()[index].clone()
    }

    pub fn disks(&self) -> Vec<Rc<MemDisk>> {
        self.disks.borrow().clone()
    }

    /// Makes a new cluster of all disks.
    pub async fn format(&self) -> Result<(), Violation> {
        let shape = &self.shape;
        let domain = self.handle.new_domain();
        let devices: Vec<Rc<dyn BlockDevice>> =
            self.disks().iter().map(|disk| disk.open(&domain) as Rc<dyn BlockDevice>).collect();
        let zone_bytes = Some(shape.zone_bytes);
        let spec = FormatSpec {
            policy: shape.policy,
            tolerate: shape.tolerate,
            shards: shape.shards,
            zone_bytes,
            force: false,
        };
        let formatted = format_cluster(&domain, &devices, &spec).await;
        domain.kill();
        formatted.map(|_| ()).map_err(|error| Violation::new(Checker::Restart, format!("format: {error}")))
    }

    /// Starts the node on whatever the disks hold.
    pub async fn start_server(&self) -> Result<Started, Violation> {
        let domain = self.handle.new_domain();
        let slot = |disk: &Rc<MemDisk>| DeviceSlot {
            label: disk.name().to_owned(),
            device: Ok(disk.open(&domain) as Rc<dyn BlockDevice>),
        };
        let (ledger, node) = (self.ledger.clone(), domain.clone());
        let attach: Attach = Rc::new(move |store| ledger.attach(&node, store));
        let setup = NodeSetup {
            handle: domain.clone(),
            fabric: self.network.endpoint(SERVER, &domain),
            listen: Address(SERVER.to_owned()),
            devices: self.disks().iter().map(slot).collect(),
            config: NodeConfig { rebuild: self.shape.rebuild, ..self.shape.tuning.node() },
            attach: Some(attach),
        };
        *self.server.borrow_mut() = Some(Server { handle: domain.clone(), node: None });
        let starting = domain.spawn(Node::start(setup));
        let outcome = {
            let halt = Box::pin(self.halted());
            let limited = Box::pin(self.handle.timeout(START_MAX, starting));
            match futures_util::future::select(limited, halt).await {
                futures_util::future::Either::Left((outcome, _)) => outcome,
                futures_util::future::Either::Right(_) => return Ok(Started::Halted),
            }
        };
        match outcome {
            None => Err(Violation::new(Checker::Hang, "the node does not start")),
            Some(Err(cancelled)) => Err(Violation::new(Checker::Restart, format!("start: {cancelled}"))),
            Some(Ok(Err(error))) => Err(Violation::new(Checker::Restart, format!("start: {error}"))),
            Some(Ok(Ok(node))) => {
                self.ledger.verdict()?;
                if let Some(server) = self.server.borrow_mut().as_mut() {
                    server.node = Some(node);
                }
                Ok(Started::Serving)
            }
        }
    }

    /// The node.
    ///
    /// # Panics
    /// While it does not run.
    pub fn node(&self) -> Rc<Node> {
        let server = self.server.borrow();
        server.as_ref().and_then(|server| server.node.clone()).expect("the node runs")
    }

    pub fn is_serving(&self) -> bool {
        self.server.borrow().as_ref().is_some_and(|server| server.node.is_some())
    }

    /// Kills the node. Whether it was at work is not counted.
    pub fn crash_server(&self, death: Death) {
        self.crash_server_at_work(death, false);
    }

    /// Kills the node, which is at work if `wanted` says that operations are under way, or if a disk
    /// has halted at a write.
    pub fn crash_server_at_work(&self, death: Death, wanted: bool) {
        let at_work = wanted || self.halted.get();
        if self.end_server(death) {
            let mut toll = self.toll.get();
            match death {
                Death::Process => toll.process_crashes += 1,
                Death::Power => {
                    toll.power_cuts += 1;
                    toll.power_cuts_at_work += u64::from(at_work);
                }
            }
            self.toll.set(toll);
        }
    }

    /// Ends the node and what it had asked of the disks; true if it ran.
    fn end_server(&self, death: Death) -> bool {
        let server = self.server.borrow_mut().take();
        let ran = server.is_some();
        if let Some(server) = server {
            server.handle.kill();
            drop(server.node);
        }
        for disk in self.disks() {
            disk.halt_after(None, None);
            if death == Death::Power {
                disk.power_cut();
            }
        }
        self.halted.set(false);
        ran
    }

    /// Stops the node as an operator would.
    pub async fn stop_server(&self) {
        let node = self.server.borrow().as_ref().and_then(|server| server.node.clone());
        if let Some(node) = node {
            node.shutdown().await;
        }
        self.end_server(Death::Process);
    }

    /// A disk was harmed so often, beside what its own dice did.
    pub fn disk_harmed(&self, times: u64) {
        self.other_disk_faults.set(self.other_disk_faults.get() + times);
    }

    /// What was inflicted so far.
    pub fn toll(&self) -> Toll {
        let disk_faults = self.disks().iter().map(|disk| disk.faults_injected()).sum::<u64>();
        let client_deaths = self.client_deaths.get();
        Toll { client_deaths, disk_faults: disk_faults + self.other_disk_faults.get(), ..self.toll.get() }
    }

    /// Lets a disk die at its n-th further write.
    pub fn halt_disk_after(&self, disk: usize, writes: u64) {
        let (halted, halt) = (self.halted.clone(), self.halt.clone());
        let on_halt = move || {
            halted.set(true);
            halt.notify_all();
        };
        self.disk(disk).halt_after(Some(writes), Some(Box::new(on_halt)));
    }

    /// What the target on a disk can be held to from now on.
    pub fn distrust(&self, disk: usize, trust: Trust) {
        self.ledger.distrust(TargetId(disk as u32), trust);
    }

    /// Takes back halts that did not strike; true if one has struck.
    pub fn disarm_halts(&self) -> bool {
        if self.halted.get() {
            return true;
        }
        for disk in self.disks() {
            disk.halt_after(None, None);
        }
        false
    }

    /// Waits until a disk halts.
    pub async fn halted(&self) {
        loop {
            let halt = self.halt.notified();
            if self.halted.get() {
                return;
            }
            halt.await;
        }
    }

    /// Where the shard says a file's bytes are, for messages.
    pub async fn extents_text(&self, ino: Ino) -> String {
        if !self.is_serving() {
            return "the node does not serve".to_owned();
        }
        let op = MetaOp::GetExtents { ino, offset: 0, length: u64::MAX >> 1, extents_max: 1000 };
        match self.node().meta().inspect(ino.shard(), &op).await {
            Ok(MetaReply::Extents(reply)) => {
                let shown = reply
                    .extents
                    .iter()
                    .map(|extent| format!("{}+{} {:?}", extent.offset, extent.length, extent.location));
                let inline = reply.inline.map_or(0, |inline| inline.len());
                let size = reply.attr.size;
                format!("size {size}, {inline} bytes inline, {}", shown.collect::<Vec<_>>().join("; "))
            }
            other => format!("{other:?}"),
        }
    }

    /// Sets the wall clock of the node off.
    pub fn skew_server(&self, nanos: i64) {
        if let Some(server) = self.server.borrow().as_ref() {
            server.handle.set_skew_nanos(nanos);
        }
    }

    /// Puts an empty disk in the place of one; the node must not run.
    pub async fn replace_disk(&self, index: usize) -> Result<(), Violation> {
        let broken = |error: &dyn std::fmt::Display| Violation::new(Checker::Restart, format!("replacement: {error}"));
        let number = self.replacements.get() + 1;
        self.replacements.set(number);
        let old = self.disk(index);
        let seed = self.seed ^ (number << 32) ^ index as u64;
        let fresh = MemDisk::new(old.name(), old.size(), old.block(), seed);
        fresh.set_faults(self.shape.tuning.disk_faults(index));
        let domain = self.handle.new_domain();
        let others = self.disks().into_iter().enumerate().filter(|(other, _)| *other != index);
        let survivors: Vec<(String, Rc<dyn BlockDevice>)> =
            others.map(|(_, disk)| (disk.name().to_owned(), disk.open(&domain) as Rc<dyn BlockDevice>)).collect();
        let device = fresh.open(&domain);
        let target = TargetId(index as u32);
        let formatted = format_replacement(&domain, &*device, &survivors, target, false).await;
        domain.kill();
        formatted.map_err(|error| broken(&error))?;
        self.disk_harmed(old.faults_injected());
        self.disks.borrow_mut()[index] = fresh;
        self.ledger.replaced(target);
        Ok(())
    }

    /// Mounts in a domain of its own.
    pub async fn mount(&self, name: &str) -> Result<Mounted, Violation> {
        let domain = self.handle.new_domain();
        let config = self.shape.tuning.client(name);
        let fabric = self.network.endpoint(name, &domain);
        let handle = domain.clone();
        let connecting =
            domain.spawn(async move { Client::connect(&handle, fabric, &Address(SERVER.to_owned()), config).await });
        match connecting.await {
            Ok(Ok(client)) => Ok(Mounted { handle: domain, client, name: name.to_owned() }),
            Ok(Err(error)) => Err(Violation::new(Checker::Restart, format!("mount: {error}"))),
            Err(cancelled) => Err(Violation::new(Checker::Restart, format!("mount: {cancelled}"))),
        }
    }
}

impl Mounted {
    /// Kills the client: what it had not committed is lost.
    pub fn kill(self) {
        self.handle.kill();
    }
}
