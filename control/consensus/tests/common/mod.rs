//! What the tests stand on: a mirrored store in memory that can be cut at every step, and a
//! state machine that keeps a list.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod blobs;
pub mod machine;
pub mod script;

use cfs_reactor::clock::SimClock;
use cfs_reactor::{Executor, Handle};
use std::future::Future;
use std::rc::Rc;

/// Runs a story on a simulated executor; answers its outcome and the executor's trace hash.
pub fn simulate<T: 'static, F: Future<Output = T> + 'static>(seed: u64, story: impl FnOnce(Handle) -> F) -> (T, u64) {
    let executor = Executor::new(Rc::new(SimClock::new(seed)));
    let handle = executor.domain();
    let outcome = executor.run_simulated(&handle, story(handle.clone()));
    let value = outcome.unwrap_or_else(|stalled| panic!("seed {seed}: {stalled}")).expect("the story's domain lives");
    (value, executor.trace_hash())
}
