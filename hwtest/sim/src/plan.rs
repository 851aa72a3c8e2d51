//! What a seed means: the cluster's shape and the faults of each phase.

use crate::draw::Mix;
use crate::tuning::Tuning;
use crate::world::{Death, Shape};
use cfs_reactor::clock::SplitMix64;
use cfs_wire::Policy;
use std::time::Duration;

/// Where one program works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ActorPlan {
    pub client: usize,
    pub mix: Mix,
}

/// Disks that are easily filled.
const SMALL_DISK: u64 = 32 << 20;

/// Longer partitions would take long and show no more.
const PARTITION_MAX: Duration = Duration::from_secs(3);

/// One disk's misbehaviour during a phase; redundancy must hide it.
#[derive(Clone, PartialEq, Debug)]
pub enum BadDisk {
    /// Gone; afterwards an empty one takes its place, or the old one comes back.
    Gone { replaced: bool },
    /// It refuses writes of at least so many bytes, and after the first of them is asked for no more;
    /// after it is mended another one is lost for a while before anything was repaired.
    Refusing { from_bytes: u64, other: usize },
    /// Bytes on the medium change.
    Rot { places: u64 },
    /// Writes are lost, misdirected or torn, reads fail or come back with a bit flipped.
    Flaky { lost: f64, misdirected: f64, torn: f64, read_error: f64, write_error: f64, bit_flip: f64 },
}

/// A partition that begins with a call of the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    pub call: u64,
    pub length: Duration,
}

/// What happens while the programs run.
#[derive(Clone, PartialEq, Debug)]
pub enum Fault {
    /// Nothing: caches and write-behind at their best.
    None,
    /// The node dies, again and again.
    Crashes(Vec<Crash>),
    /// The node is stopped in good order.
    Restart,
    /// A client dies, perhaps together with the node.
    ClientDies {
        client: usize,
        after_operations: u64,
        /// In the moment in which it was told that something is durable.
        synced: bool,
        node: Option<Death>,
    },
    /// A client is cut off for longer than its lease, and fenced.
    ClientCutOff {
        client: usize,
    },
    /// Requests and replies are lost, connections reset.
    Network {
        request_loss: u32,
        reply_loss: u32,
        reset: u32,
        delay_max: Duration,
    },
    /// A client and the node don't reach each other for less than a lease, again and again.
    ShortPartitions {
        client: usize,
        cuts: Vec<Cut>,
    },
    Disk {
        disk: usize,
        bad: BadDisk,
        crash: Option<Death>,
    },
    /// The node's wall clock jumps.
    Skew {
        nanos: i64,
    },
}

/// The node dies at a write of a disk, or a while after that disk began to answer nothing while the
/// others go on; `again`: and once more while it starts; `lost`: and this disk does not come back
/// before everything was compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Crash {
    pub death: Death,
    pub disk: usize,
    pub write: u64,
    pub stalled: Duration,
    pub again: Option<u64>,
    pub lost: Option<usize>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Phase {
    pub fault: Fault,
    pub operations: u64,
    /// Quiet time at its end: write-back, leases and movers take their course.
    pub rest: Duration,
    /// Whether the whole tree is compared and the node checked at its end.
    pub thorough: bool,
}

/// Everything that is drawn before a run begins.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    pub shape: Shape,
    pub clients: usize,
    pub actors: Vec<ActorPlan>,
    pub phases: Vec<Phase>,
    /// One operation in so many takes place where all programs meet.
    pub shared_one_in: u64,
    /// Of a hundred operations so many are games.
    pub games: u64,
    /// Percent of the free space that a file takes which nobody touches.
    pub ballast: u64,
    /// Largest write.
    pub write_bytes_max: u64,
    /// The programs' pause between operations.
    pub think: Duration,
    /// It ends with damage that no redundancy bears, in the place of an orderly end.
    pub ruin: bool,
    /// Everything is compared after every crash and phase, not only after some.
    pub thorough: bool,
}

fn up_to(random: &mut SplitMix64, most: Duration) -> Duration {
    Duration::from_micros(random.below(most.as_micros() as u64 + 1))
}

fn pick<T: Copy>(random: &mut SplitMix64, of: &[T]) -> T {
    of[random.below(of.len() as u64) as usize]
}

impl Plan {
    pub fn draw(seed: u64) -> Plan {
        let mut random = SplitMix64::new(seed ^ 0x504C_414E);
        let random = &mut random;
        let shape = shape(random);
        let clients = 2;
        let actors = 2 + random.below(3) as usize;
        let actors = (0..actors).map(|index| ActorPlan { client: index % clients, mix: Mix::draw(random) }).collect();
        let phases = 2 + random.below(4);
        let phases = (0..phases).map(|_| phase(random, &shape, clients)).collect();
        Plan {
            clients,
            actors,
            phases,
            games: pick(random, &[2, 5, 15, 40]),
            shared_one_in: pick(random, &[2, 3, 4, 8]),
            // On small disks only: on large ones it takes long and fills little.
            ballast: if shape.disk_bytes <= SMALL_DISK { pick(random, &[0, 50, 75, 75]) } else { 0 },
            write_bytes_max: pick(random, &[3000, 20_000, 100_000, 400_000]),
            think: pick(random, &[0, 50, 1000, 20_000].map(Duration::from_micros)),
            ruin: random.one_in(3),
            thorough: false,
            shape,
        }
    }
}

fn shape(random: &mut SplitMix64) -> Shape {
    // Three copies survive one loss more than the simulation inflicts.
    let policy = pick(random, &[(2, 1), (2, 1), (2, 1), (1, 1)]);
    // At least twelve zones and what lies before them.
    let (disk_mib, zone_mib) = pick(random, &[(32, 2), (32, 2), (48, 2), (64, 2), (64, 4), (128, 2), (128, 4)]);
    Shape {
        targets: pick(random, &[3, 3, 4]),
        disk_bytes: disk_mib << 20,
        block: pick(random, &[512, 4096, 4096]),
        zone_bytes: zone_mib << 20,
        shards: pick(random, &[1, 2, 4, 8]),
        policy: Policy::new(policy.0, policy.1).expect("the policies above are valid"),
        tuning: if random.one_in(8) { Tuning::default() } else { Tuning::draw(random) },
        ..Shape::default()
    }
}

fn phase(random: &mut SplitMix64, shape: &Shape, clients: usize) -> Phase {
    let death = |random: &mut SplitMix64| if random.one_in(3) { Death::Process } else { Death::Power };
    let client = random.below(clients as u64) as usize;
    let disk = random.below(shape.targets as u64) as usize;
    let fault = match random.below(26) {
        0..2 => Fault::None,
        2..9 => {
            let within = pick(random, &[40, 150, 400]);
            let crash = |random: &mut SplitMix64| {
                let disk = random.below(shape.targets as u64) as usize;
                Crash {
                    death: death(random),
                    disk,
                    write: 1 + random.below(within),
                    stalled: pick(random, &[0, 2, 100, 100].map(Duration::from_millis)),
                    again: random.one_in(4).then(|| 1 + random.below(30)),
                    lost: random.one_in(4).then(|| another(random, disk, shape.targets)),
                }
            };
            Fault::Crashes((0..1 + random.below(4)).map(|_| crash(random)).collect())
        }
        9 => Fault::Restart,
        10..13 => {
            let node = random.one_in(2).then(|| death(random));
            Fault::ClientDies { client, after_operations: random.below(60), synced: random.one_in(2), node }
        }
        13..15 => Fault::ClientCutOff { client },
        15..17 => Fault::Network {
            request_loss: random.below(30_000) as u32,
            reply_loss: random.below(50_000) as u32,
            reset: random.below(10_000) as u32,
            delay_max: up_to(random, Duration::from_millis(3)),
        },
        17..19 => {
            let within = pick(random, &[40, 150, 400]);
            // A client that was silent since its last heartbeat, a third of a lease before, is not fenced yet.
            let longest = (shape.tuning.session_lease / 2).min(PARTITION_MAX);
            let cut = |random: &mut SplitMix64| Cut { call: 2 + random.below(within), length: up_to(random, longest) };
            Fault::ShortPartitions { client, cuts: (0..1 + random.below(4)).map(|_| cut(random)).collect() }
        }
        19..25 => {
            let crash = random.one_in(3).then(|| death(random));
            Fault::Disk { disk, bad: bad_disk(random, disk, shape.targets), crash }
        }
        _ => Fault::Skew { nanos: (random.below(7_200_000_000_000) as i64) - 3_600_000_000_000 },
    };
    Phase {
        fault,
        operations: 40 + random.below(200),
        rest: pick(random, &[0, 0, 400, 1500, 12_000].map(Duration::from_millis)),
        thorough: random.one_in(2),
    }
}

/// A disk other than this one.
fn another(random: &mut SplitMix64, disk: usize, disks: usize) -> usize {
    (disk + 1 + random.below(disks as u64 - 1) as usize) % disks
}

fn bad_disk(random: &mut SplitMix64, disk: usize, targets: usize) -> BadDisk {
    match random.below(9) {
        0..2 => BadDisk::Gone { replaced: random.one_in(2) },
        2..5 => BadDisk::Refusing {
            // What is first refused is else mostly a batch of the log.
            from_bytes: pick(random, &[0, 8 << 10, 16 << 10, 32 << 10]),
            other: another(random, disk, targets),
        },
        5 => BadDisk::Rot { places: 1 + random.below(40) },
        _ => {
            let mut some = |most: f64| if random.one_in(2) { 0.0 } else { most * random.below(1000) as f64 / 1000.0 };
            BadDisk::Flaky {
                lost: some(0.1),
                misdirected: some(0.05),
                torn: some(0.1),
                read_error: some(0.05),
                write_error: some(0.02),
                bit_flip: some(0.05),
            }
        }
    }
}
