//! Feeds the decoders of bytes from wire and disk with bytes that are nearly right, their
//! checksums included: what another version's bug, a hostile image or a hostile peer would bring.
//! Each must answer with an error or with harmless values; a panic, an endless loop or an
//! allocation of absurd size is a failure, and so is a value that means something else when it is
//! written and read again.
//!
//! What the kernel sends is trusted to be the kernel's; `client/fuse` checks its decoder with random
//! bytes of its own.
//!
//! It owns the mutations ([`mutate`]), what valid bytes look like ([`corpus`]: what a small
//! cluster really sent and stored), the targets, and the process in which they run
//! ([`process`]: a panic is caught there, a hang or a lack of memory ends it, and its parent says
//! which seed that was). A round is named by target and seed alone, so a failure replays. That
//! failures are found is tested with decoders that fail ([`planted`]).
//!
//! Start at [`Target`]; the program `fuzz` runs all of them.

mod blobs;
mod bodies;
mod corpus;
mod frames;
mod logs;
mod mutate;
mod ordered;
mod planted;
mod process;
mod rows;
mod stores;

pub use process::FuzzOptions;

use cfs_codec::crc32c::{crc32c, crc32c_append};
use cfs_reactor::clock::{SimClock, SplitMix64};
use cfs_reactor::{Executor, Handle};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

/// Opening and reading a small store takes well below a second of its clock: longer than this it
/// will never end.
const STORY_MAX: Duration = Duration::from_secs(600);

/// Something that decodes bytes it must not trust.
trait Target {
    /// Draws the inputs of one round and feeds them.
    fn round(&self, random: &mut SplitMix64, trial: &mut Trial);
}

/// Builds a target with its corpus.
type Build = fn() -> Box<dyn Target>;

const TARGETS: [(&str, Build); 6] = [
    ("frame", || Box::new(frames::Frames::new())),
    ("bodies", || Box::new(bodies::Bodies::new())),
    ("target", || Box::new(stores::Stores::new())),
    ("kv", || Box::new(ordered::Ordered::new())),
    ("log", || Box::new(logs::Logs::new())),
    ("rows", || Box::new(rows::Rows::new())),
];

/// The target of this name, one that is fuzzed only when it is asked for among them.
fn build_of(name: &str) -> Option<Build> {
    TARGETS.iter().chain(&planted::TARGETS).find(|(listed, _)| *listed == name).map(|(_, build)| *build)
}

/// What one input came to.
enum Fed {
    /// An error: nothing was believed.
    Refused,
    /// It was taken for a value.
    Taken,
}

/// An input that did what it must not.
struct Fault {
    /// Which structure it stands for.
    what: String,
    input: Vec<u8>,
    reason: String,
}

/// Counts inputs and keeps the first that failed.
struct Trial {
    inputs: u64,
    taken: u64,
    fault: Option<Fault>,
    /// Every input is printed before it is fed: the process may not outlive it.
    shown: bool,
}

impl Trial {
    fn new(shown: bool) -> Trial {
        Trial { inputs: 0, taken: 0, fault: None, shown }
    }

    /// Feeds one input, unless one has failed before.
    fn feed(&mut self, what: &str, input: &[u8], decode: impl FnOnce(&[u8]) -> Result<Fed, String>) {
        if self.fault.is_some() {
            return;
        }
        self.inputs += 1;
        if self.shown {
            process::show(what, input);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| decode(input)));
        // A task's panic may have been swallowed on the way here.
        let panicked = process::take_panic();
        let reason = match (panicked, outcome) {
            (Some(panic), _) => format!("panicked: {panic}"),
            (None, Err(_)) => "panicked".to_owned(),
            (None, Ok(Err(reason))) => reason,
            (None, Ok(Ok(fed))) => {
                self.taken += u64::from(matches!(fed, Fed::Taken));
                return;
            }
        };
        self.fault = Some(Fault { what: what.to_owned(), input: input.to_vec(), reason });
    }
}

/// Runs a story on a clock of its own.
fn simulated<F>(story: impl FnOnce(Handle) -> F) -> Result<Fed, String>
where
    F: Future<Output = Result<Fed, String>> + 'static,
{
    let executor = Executor::new(Rc::new(SimClock::new(1)));
    let handle = executor.domain();
    let (clock, story) = (handle.clone(), Box::pin(story(handle.clone())));
    let limited = async move { clock.timeout(STORY_MAX, story).await };
    match executor.run_simulated(&handle, limited) {
        Ok(Ok(Some(outcome))) => outcome,
        Ok(Ok(None)) => Err(format!("no end after {STORY_MAX:?} of its clock")),
        Ok(Err(cancelled)) => Err(cancelled.to_string()),
        Err(stalled) => Err(stalled.to_string()),
    }
}

/// Sets the CRC32C of all bytes, its own four at `at` taken as `blank`.
fn seal(bytes: &mut [u8], at: usize, blank: &[u8]) {
    let Some(rest) = bytes.get(at + 4..) else { return };
    let crc = crc32c_append(crc32c_append(crc32c(&bytes[..at]), blank), rest);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// The little-endian integer at `at`, 0 behind the end.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_le_bytes(*field))
}
