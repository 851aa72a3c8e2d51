//! Tells whoever waits for more than a second what is being waited for.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(1);
/// To the beginning of a terminal's line, which is then empty.
const REWIND: &str = "\r\x1b[K";

/// One line a second on stderr, from the end of the first second until this is dropped.
pub struct Progress {
    what: Arc<Mutex<String>>,
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// How a line follows the one before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Below,
    /// In its place, and none is left at the end.
    Over,
}

impl Progress {
    /// For a program that writes other lines meanwhile.
    pub fn of(what: impl Into<String>) -> Progress {
        Progress::told(what.into(), INTERVAL, Form::Below, std::io::stderr())
    }

    /// For a program that writes nothing to stderr meanwhile: on a terminal one line stays one.
    pub fn on_one_line(what: impl Into<String>) -> Progress {
        let form = if std::io::stderr().is_terminal() { Form::Over } else { Form::Below };
        Progress::told(what.into(), INTERVAL, form, std::io::stderr())
    }

    /// What is being waited for now.
    pub fn now(&self, what: impl Into<String>) {
        *self.what.lock().unwrap_or_else(PoisonError::into_inner) = what.into();
    }

    #[allow(clippy::disallowed_methods, reason = "people wait in real time; nothing here is simulated")]
    fn told(what: String, interval: Duration, form: Form, mut to: impl Write + Send + 'static) -> Progress {
        let what = Arc::new(Mutex::new(what));
        let (end, ended) = mpsc::channel();
        let said = what.clone();
        let tell = move || {
            let mut waited = Duration::ZERO;
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                waited += interval;
                let line = format!("{}, {} s", said.lock().unwrap_or_else(PoisonError::into_inner), waited.as_secs());
                // Nobody to tell is no reason to stop the work.
                let _ = match form {
                    Form::Below => to.write_all(format!("{line}\n").as_bytes()),
                    Form::Over => to.write_all(format!("{REWIND}{line}").as_bytes()).and_then(|()| to.flush()),
                };
            }
            if form == Form::Over && waited > Duration::ZERO {
                let _ = to.write_all(REWIND.as_bytes()).and_then(|()| to.flush());
            }
        };
        // Without a thread the work is done in silence.
        let thread = std::thread::Builder::new().name("cfs-progress".into()).spawn(tell).ok();
        Progress { what, end: Some(end), thread }
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

    /// Hands everything that is written on.
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

    fn every(interval: Duration, what: &str, form: Form) -> (Progress, mpsc::Receiver<String>) {
        let (send, lines) = mpsc::channel();
        (Progress::told(what.into(), interval, form, Lines(send)), lines)
    }

    #[test]
    fn lines_come_while_something_lasts_and_none_after_it() {
        let (progress, lines) = every(Duration::from_millis(1), "formatting", Form::Below);
        assert_eq!(lines.recv().unwrap(), "formatting, 0 s\n");
        progress.now("writing");
        assert!(lines.iter().any(|line| line == "writing, 0 s\n"));
        drop(progress);
        // The sender is gone with the thread.
        assert!(lines.iter().all(|line| line.ends_with(" s\n")));
        let (progress, lines) = every(Duration::from_secs(3600), "quick", Form::Over);
        drop(progress);
        assert_eq!(lines.iter().next(), None, "what is over at once is not told of");
    }

    #[test]
    fn on_a_terminal_a_line_takes_the_place_of_the_one_before_and_the_last_is_wiped_away() {
        let (progress, lines) = every(Duration::from_millis(1), "checking", Form::Over);
        let first: Vec<String> = lines.iter().take(2).collect();
        assert_eq!(first, ["\r\x1b[Kchecking, 0 s"; 2]);
        drop(progress);
        assert_eq!(lines.iter().last().unwrap(), "\r\x1b[K");
    }
}
