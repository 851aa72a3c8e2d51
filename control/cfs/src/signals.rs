//! Waits for the signals that mean "end in order".

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::Read;
use std::os::unix::net::UnixStream;

/// SIGINT and SIGTERM, as bytes in a pipe.
pub struct Signals {
    pipe: UnixStream,
    waker: UnixStream,
}

impl Signals {
    /// From here on the signals no longer end the process.
    pub fn block() -> Result<Signals> {
        let (pipe, write) = UnixStream::pair().context("cannot make a pipe")?;
        for signal in [SIGINT, SIGTERM] {
            let end = write.try_clone().context("cannot duplicate a pipe")?;
            signal_hook::low_level::pipe::register(signal, end).context("cannot catch signals")?;
        }
        Ok(Signals { pipe, waker: write })
    }

    /// Ends [`Self::wait`] from another thread.
    pub fn waker(&self) -> Result<UnixStream> {
        self.waker.try_clone().context("cannot duplicate a pipe")
    }

    /// Until a signal comes or somebody writes to the waker.
    pub fn wait(&self) -> Result<()> {
        let mut byte = [0];
        (&self.pipe).read_exact(&mut byte).context("cannot wait for signals")
    }
}
