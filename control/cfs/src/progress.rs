//! Tells whoever waits for more than a second what is being waited for.

use std::io::Write;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(1);

/// One line a second on stderr, from the end of the first second until this is dropped.
pub struct Progress {
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    pub fn of(what: impl Into<String>) -> Progress {
        Progress::told(what.into(), INTERVAL, std::io::stderr())
    }

    #[allow(clippy::disallowed_methods, reason = "people wait in real time; nothing here is simulated")]
    fn told(what: String, interval: Duration, mut to: impl Write + Send + 'static) -> Progress {
        let (end, ended) = mpsc::channel();
        let tell = move || {
            let mut waited = Duration::ZERO;
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                waited += interval;
                // Nobody to tell is no reason to stop the work.
                let _ = writeln!(to, "{what}, {} s", waited.as_secs());
            }
        };
        // Without a thread the work is done in silence.
        let thread = std::thread::Builder::new().name("cfs-progress".into()).spawn(tell).ok();
        Progress { end: Some(end), thread }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hands every line on.
    struct Lines(mpsc::Sender<String>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_come_while_something_lasts_and_none_after_it() {
        let (send, lines) = mpsc::channel();
        let progress = Progress::told("formatting".into(), Duration::from_millis(1), Lines(send));
        let mut first = String::new();
        while !first.ends_with('\n') {
            first += &lines.recv().unwrap();
        }
        assert_eq!(first, "formatting, 0 s\n");
        drop(progress);
        // The sender is gone with the thread.
        assert!(lines.iter().last().is_none_or(|end| end.ends_with('\n')));
        let (send, lines) = mpsc::channel();
        drop(Progress::told("quick".into(), Duration::from_secs(3600), Lines(send)));
        assert_eq!(lines.iter().next(), None, "what is over at once is not told of");
    }
}
