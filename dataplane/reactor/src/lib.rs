//! The per-core executor and what every task above the seams stands on: the clock seam,
//! timers, local synchronisation, mailboxes between cores, aligned buffers, and the io_uring
//! that real devices and sockets share.
//!
//! One [`Executor`] runs on one thread and owns its tasks; nothing in it is shared with another
//! thread but wakers and [`mailbox`]es. Given the [`clock::Clock`] it is deterministic: the
//! simulation runs a whole cluster on one executor, each node in its own [`Handle`] (a domain),
//! and kills a node by dropping that domain's tasks.
//!
//! It never uses tokio, never blocks a task, and never reads a clock but through the seam.
//! Start at [`executor`], then [`clock`]; [`uring`] is the production driver.

#[allow(unsafe_code, reason = "hands out pieces of one mapping that the kernel has registered")]
mod arena;
pub mod buffer;
pub mod clock;
pub mod collections;
pub mod executor;
pub mod mailbox;
mod spin;
pub mod sync;
pub mod timer;
#[allow(unsafe_code, reason = "submits kernel operations that refer to memory it keeps alive")]
pub mod uring;

pub use clock::{Clock, Instant};
pub use executor::{Executor, Handle, JoinHandle};
