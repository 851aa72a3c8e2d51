//! Waits for the signals that mean "end in order".

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// SIGINT, SIGTERM and SIGHUP (the terminal is closed), as bytes in a pipe. They end the process at
/// once while there is nothing to end in order. Later a second SIGINT does: somebody at the terminal
/// has waited long enough. The others may come in any number, from shells and supervisors.
pub struct Signals {
    pipe: UnixStream,
    waker: UnixStream,
    starting: Arc<AtomicBool>,
    interrupted: Arc<AtomicBool>,
}

/// What signal-hook writes for a signal.
const SIGNALLED: u8 = b'X';

/// proc_pid_status(5): a mask, the lowest bit for signal 1. What is not known counts as no.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

impl Signals {
    pub fn catch() -> Result<Signals> {
        let (pipe, write) = UnixStream::pair().context("cannot make a pipe")?;
        let (starting, interrupted) = (Arc::new(AtomicBool::new(true)), Arc::<AtomicBool>::default());
        let ends_if = |signal, condition: &Arc<AtomicBool>| {
            // The code that a shell has for what a signal ended.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, condition.clone())
                .context("cannot catch signals")
        };
        ends_if(SIGINT, &interrupted)?;
        // nohup(1) is heeded. SIGINT is not asked about: scripts have it ignored by every background
        // job, and yet send it.
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP)) {
            ends_if(signal, &starting)?;
            let end = write.try_clone().context("cannot duplicate a pipe")?;
            signal_hook::low_level::pipe::register(signal, end).context("cannot catch signals")?;
        }
        Ok(Signals { pipe, waker: write, starting, interrupted })
    }

    /// From here on there is something to end in order.
    pub fn end_in_order(&self) {
        self.starting.store(false, Ordering::SeqCst);
    }

    /// Ends [`Self::wait`] from another thread.
    pub fn waker(&self) -> Result<UnixStream> {
        self.waker.try_clone().context("cannot duplicate a pipe")
    }

    /// Until a signal comes or somebody writes to the waker.
    pub fn wait(&self) -> Result<()> {
        let mut byte = [0];
        (&self.pipe).read_exact(&mut byte).context("cannot wait for signals")?;
        // Who unmounts and then sends the first signal may not know that there is something to commit.
        self.interrupted.store(byte[0] == SIGNALLED, Ordering::SeqCst);
        Ok(())
    }
}
