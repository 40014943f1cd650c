//! Waiting for several file descriptors with a timeout in nanoseconds: what a worker does when it has nothing to do.
//!
//! Knows descriptors and tokens; an event only says "wake up". Used by both daemons' loops, never by a turn.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use cirro_protocol::time::Nanos;

use crate::sys;

/// Events taken at once. What does not fit is reported by the next wait.
const EVENTS_MAX: usize = 64;

/// A set of descriptors to wait for; level-triggered, for reading.
#[derive(Debug)]
pub struct Waiter {
    epoll: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Waiter {
    /// An empty set.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Waiter> {
        let empty = libc::epoll_event { events: 0, u64: 0 };
        Ok(Waiter { epoll: sys::epoll_create()?, events: vec![empty; EVENTS_MAX] })
    }

    /// Adds `fd`; `token` names it in [`Waiter::wait`]. One that is in the set already gets the new token. A descriptor leaves the set when it
    /// is closed.
    ///
    /// # Errors
    /// When it cannot be waited for (a plain file), or the kernel has no memory left.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        match sys::epoll_control(&self.epoll, libc::EPOLL_CTL_ADD, fd, token) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                sys::epoll_control(&self.epoll, libc::EPOLL_CTL_MOD, fd, token)
            }
            other => other,
        }
    }

    /// Takes `fd` out.
    ///
    /// # Errors
    /// When it is not in the set.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sys::epoll_control(&self.epoll, libc::EPOLL_CTL_DEL, fd, 0)
    }

    /// The same as [`Waiter::wait`], and ends also when `link` is readable, which has no token. A link's descriptor does not belong in the set:
    /// there it has the kernel run through the set for each frame that comes, at the cost of whoever sends it, also while nobody waits
    /// (0.8 µs a frame on a veth pair; docs/decisions/0008-the-data-path.md).
    ///
    /// # Errors
    /// As of [`Waiter::wait`].
    pub fn wait_beside(
        &mut self,
        link: BorrowedFd<'_>,
        timeout: Option<Nanos>,
        ready: &mut Vec<u64>,
    ) -> io::Result<()> {
        ready.clear();
        match sys::poll_two(&self.epoll, link, timeout.map(|span| span.0)) {
            Ok(true) => self.wait(Some(Nanos::ZERO), ready),
            Ok(false) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until a descriptor is readable or `timeout` has passed (`None`: no limit; zero: a look). `ready` gets the tokens. A signal ends
    /// the wait early.
    ///
    /// # Errors
    /// None in practice: what epoll_pwait2(2) says of its own descriptor.
    pub fn wait(&mut self, timeout: Option<Nanos>, ready: &mut Vec<u64>) -> io::Result<()> {
        ready.clear();
        let count = match sys::epoll_wait(&self.epoll, &mut self.events, timeout.map(|span| span.0)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        ready.extend(self.events[..count].iter().map(|event| event.u64));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::time::Instant;

    #[test]
    fn more_ready_descriptors_than_one_wait_names_come_in_turn() {
        let pipes: Vec<_> = (0..EVENTS_MAX + 10).map(|_| std::io::pipe().unwrap()).collect();
        let mut waiter = Waiter::new().unwrap();
        for (token, (reader, writer)) in pipes.iter().enumerate() {
            waiter.add(reader.as_fd(), token as u64).unwrap();
            (&mut &*writer).write_all(b"x").unwrap();
        }
        let (mut seen, mut ready) = (std::collections::BTreeSet::new(), Vec::new());
        for _ in 0..4 {
            waiter.wait(Some(Nanos::ZERO), &mut ready).unwrap();
            assert!(ready.len() <= EVENTS_MAX);
            seen.extend(ready.iter().copied());
        }
        assert_eq!(seen.len(), pipes.len());
    }

    #[test]
    fn a_readable_descriptor_is_named_and_a_timeout_ends_the_wait() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut waiter = Waiter::new().unwrap();
        waiter.add(reader.as_fd(), 7).unwrap();
        let mut ready = vec![1];
        let start = Instant::now();
        waiter.wait(Some(Nanos::from_micros(300)), &mut ready).unwrap();
        assert!(ready.is_empty() && start.elapsed().as_micros() >= 300);
        writer.write_all(b"x").unwrap();
        for token in [7, 8] {
            waiter.add(reader.as_fd(), token).unwrap();
            waiter.wait(None, &mut ready).unwrap();
            assert_eq!(ready, [token]);
        }
        waiter.remove(reader.as_fd()).unwrap();
        waiter.wait(Some(Nanos::ZERO), &mut ready).unwrap();
        assert!(ready.is_empty());
    }
}
