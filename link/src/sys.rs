//! The system calls of this crate that have nothing to do with packets: clocks, random bytes, epoll.
//!
//! Knows how to call them safely and nothing of why.
#![allow(unsafe_code, reason = "system calls; each block states what its call needs")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A clock's time in nanoseconds.
#[inline]
pub(crate) fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to; the clocks used here always exist.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    assert!(result == 0, "clock_gettime({clock}): {}", io::Error::last_os_error());
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Fills `bytes` from getrandom(2).
pub(crate) fn random(mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        // SAFETY: the pointer and length are those of a live mutable slice.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if got > 0 {
            bytes = &mut bytes[got as usize..];
        } else {
            let error = io::Error::last_os_error();
            assert!(error.kind() == io::ErrorKind::Interrupted, "getrandom: {error}");
        }
    }
}

/// A new epoll instance.
pub(crate) fn epoll_create() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just returned this descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds (`EPOLL_CTL_ADD`), changes (`EPOLL_CTL_MOD`) or removes (`EPOLL_CTL_DEL`) a descriptor, level-triggered, for reading.
pub(crate) fn epoll_control(
    epoll: &OwnedFd,
    operation: i32,
    fd: BorrowedFd<'_>,
    token: u64,
) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
    // SAFETY: both descriptors are open for the borrow; `event` is valid and only read.
    let result = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), operation, fd.as_raw_fd(), &mut event) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits until one of two descriptors is readable, at most `timeout_ns` (`None`: for ever). True if the first is.
pub(crate) fn poll_two(first: &OwnedFd, second: BorrowedFd<'_>, timeout_ns: Option<u64>) -> io::Result<bool> {
    let readable = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [readable(first.as_raw_fd()), readable(second.as_raw_fd())];
    let time = timeout_ns.map(timespec);
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `fds` is a live mutable array of two entries; `time` is null or points to a live timespec; no signal mask.
    let count = unsafe { libc::ppoll(fds.as_mut_ptr(), 2, time, std::ptr::null()) };
    if count >= 0 { Ok(fds[0].revents != 0) } else { Err(io::Error::last_os_error()) }
}

fn timespec(ns: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    }
}

/// Waits for events, at most `timeout_ns` (`None`: for ever). Returns how many.
pub(crate) fn epoll_wait(
    epoll: &OwnedFd,
    events: &mut [libc::epoll_event],
    timeout_ns: Option<u64>,
) -> io::Result<usize> {
    let time = timeout_ns.map(timespec);
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `events` is a live mutable slice of that many entries; `time` is null or points to a live timespec; no signal mask.
    let count = unsafe {
        libc::syscall(
            libc::SYS_epoll_pwait2,
            epoll.as_raw_fd(),
            events.as_mut_ptr(),
            events.len() as libc::c_int,
            time,
            std::ptr::null::<libc::sigset_t>(),
            0usize,
        )
    };
    if count >= 0 { Ok(count as usize) } else { Err(io::Error::last_os_error()) }
}
