//! Waiting until a file descriptor is readable or time is up: one epoll instance, level-triggered, nanosecond timeouts.
//!
//! Does not know what the descriptors are. A worker has one and calls it between turns.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use cirro_protocol::time::Nanos;

use crate::sys;

/// Descriptors reported by one wait. More that are ready come with the next: level-triggered, so nothing is lost.
pub const READY_MAX: usize = 64;

/// A set of file descriptors, each with a token of the caller's choice.
#[derive(Debug)]
pub struct Waiter {
    epoll: OwnedFd,
    ready: Vec<sys::EpollEvent>,
}

impl Waiter {
    /// An empty set.
    ///
    /// # Errors
    /// The kernel's, when there is no memory or descriptor left.
    pub fn new() -> io::Result<Waiter> {
        Ok(Waiter { epoll: sys::epoll_create()?, ready: Vec::with_capacity(READY_MAX) })
    }

    /// From now on a wait ends when `fd` is readable (or in error), and reports `token`.
    ///
    /// # Errors
    /// The kernel's: `fd` is in the set already, or cannot be waited for (a plain file).
    pub fn add(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        sys::epoll_add(self.epoll.as_fd(), fd, token)
    }

    /// Takes `fd` out. To be called before the descriptor is closed, if it has duplicates.
    ///
    /// # Errors
    /// The kernel's: `fd` is not in the set.
    pub fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        sys::epoll_remove(self.epoll.as_fd(), fd)
    }

    /// Sleeps until a descriptor is ready or `timeout` has passed (`None`: for ever, zero: not at all), and puts the tokens of what is ready
    /// into `ready`, cleared first. A signal ends it early with nothing ready.
    ///
    /// # Errors
    /// The kernel's, which only a bug of ours causes.
    pub fn wait(&mut self, timeout: Option<Nanos>, ready: &mut Vec<u64>) -> io::Result<()> {
        ready.clear();
        sys::epoll_wait(self.epoll.as_fd(), timeout, &mut self.ready)?;
        ready.extend(self.ready.iter().map(sys::EpollEvent::token));
        Ok(())
    }
}

impl AsFd for Waiter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl AsRawFd for Waiter {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_readable_descriptor_is_reported_until_it_is_read() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let mut waiter = Waiter::new().unwrap();
        let mut ready = vec![99];
        waiter.add(near.as_fd(), 7).unwrap();
        waiter.wait(Some(Nanos::ZERO), &mut ready).unwrap();
        assert_eq!(ready, []);
        far.write_all(b"x").unwrap();
        for _ in 0..2 {
            waiter.wait(None, &mut ready).unwrap();
            assert_eq!(ready, [7]);
        }
        near.read_exact(&mut [0]).unwrap();
        waiter.wait(Some(Nanos::ZERO), &mut ready).unwrap();
        assert_eq!(ready, []);
        waiter.remove(near.as_fd()).unwrap();
        far.write_all(b"x").unwrap();
        waiter.wait(Some(Nanos::ZERO), &mut ready).unwrap();
        assert_eq!(ready, []);
    }

    #[test]
    fn a_timeout_shorter_than_a_millisecond_is_kept() {
        let mut waiter = Waiter::new().unwrap();
        let mut ready = Vec::new();
        let shortest = (0..20)
            .map(|_| {
                let start = clock::now();
                waiter.wait(Some(Nanos::from_micros(200)), &mut ready).unwrap();
                clock::now().since(start)
            })
            .min();
        let shortest = shortest.unwrap();
        assert!(shortest >= Nanos::from_micros(200) && shortest < Nanos::from_micros(1_000), "{shortest:?}");
    }

    #[test]
    fn more_ready_descriptors_than_one_wait_reports_all_come_in_turn() {
        let pairs: Vec<_> = (0..READY_MAX + 10).map(|_| UnixStream::pair().unwrap()).collect();
        let mut waiter = Waiter::new().unwrap();
        for (token, (near, far)) in pairs.iter().enumerate() {
            waiter.add(near.as_fd(), token as u64).unwrap();
            (&mut &*far).write_all(b"x").unwrap();
        }
        let (mut seen, mut ready) = (std::collections::BTreeSet::new(), Vec::new());
        for _ in 0..4 {
            waiter.wait(Some(Nanos::ZERO), &mut ready).unwrap();
            assert!(ready.len() <= READY_MAX);
            seen.extend(ready.iter().copied());
        }
        assert_eq!(seen.len(), pairs.len());
    }
}
