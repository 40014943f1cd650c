//! The wish to stop: set by SIGTERM, SIGINT or the process itself, seen by every thread that waits on its file descriptor.
//!
//! Does not know what has to be done before the process ends. Called by the daemons' `main`; workers and the control socket add it to what they wait for.
//! It is the read end of a socket pair whose bytes are never read: once asked, it stays readable for everybody.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use signal_hook::consts::{SIGINT, SIGTERM};

/// A wish to stop that threads can wait for. Clones share it; it cannot be taken back.
#[derive(Clone, Debug)]
pub struct Stop {
    ends: Arc<Ends>,
}

#[derive(Debug)]
struct Ends {
    seen: UnixStream,
    asked: UnixStream,
}

impl Stop {
    /// A wish that only [`Stop::ask`] sets.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Stop> {
        let (seen, asked) = UnixStream::pair()?;
        seen.set_nonblocking(true)?;
        asked.set_nonblocking(true)?;
        Ok(Stop { ends: Arc::new(Ends { seen, asked }) })
    }

    /// A wish that SIGTERM and SIGINT set too. A second SIGINT (an impatient Ctrl-C) ends the process at once. Call it once, early in `main`.
    ///
    /// # Errors
    /// No file descriptor is left, or the kernel refuses the handler.
    pub fn on_signals() -> io::Result<Stop> {
        let stop = Stop::new()?;
        let asked_before = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register_conditional_default(SIGINT, Arc::clone(&asked_before))?;
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register(signal, Arc::clone(&asked_before))?;
            signal_hook::low_level::pipe::register(signal, stop.ends.asked.try_clone()?)?;
        }
        Ok(stop)
    }

    /// Asks everybody to stop. Any thread, any number of times.
    pub fn ask(&self) {
        // A full pair means that it was asked before.
        let _ = (&self.ends.asked).write(&[1]);
    }

    /// Whether it was asked.
    pub fn is_asked(&self) -> bool {
        self.wait_for(Duration::ZERO)
    }

    /// Sleeps until it is asked.
    pub fn wait(&self) {
        while !self.poll(None) {}
    }

    /// Sleeps until it is asked or `limit` has passed; true when it was asked.
    pub fn wait_for(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if self.poll(Some(left)) {
                return true;
            }
            if left.is_zero() {
                return false;
            }
        }
    }

    fn poll(&self, limit: Option<Duration>) -> bool {
        let limit = limit.map(|span| Timespec::try_from(span).expect("a wait of fewer than 2^63 seconds"));
        let mut fds = [PollFd::new(&self.ends.seen, PollFlags::IN)];
        // An interrupted wait is an early return; the callers wait again.
        rustix::event::poll(&mut fds, limit.as_ref()).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Stop {
    /// Readable (level-triggered) once it was asked; never read from it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ends.seen.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_sees_a_stop_once_it_is_asked() {
        let stop = Stop::new().unwrap();
        let other = stop.clone();
        assert!(!stop.is_asked());
        assert!(!other.wait_for(Duration::from_millis(5)));
        let waiter = std::thread::spawn(move || other.wait());
        stop.ask();
        waiter.join().unwrap();
        assert!(stop.is_asked(), "it stays asked after it was seen");
    }

    #[test]
    fn asking_very_often_neither_blocks_nor_fails() {
        let stop = Stop::new().unwrap();
        for _ in 0..100_000 {
            stop.ask();
        }
        assert!(stop.is_asked());
    }
}
