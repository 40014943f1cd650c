//! The system calls that have no safe form in the standard library: clocks with a known epoch, epoll, random bytes.
//!
//! Thin and total: each function is one call, its errors as `io::Error`. Called by `clock`, `wait`, `random` and the packet link's ring of
//! descriptors. (Those of packet sockets are in `packet::sys`.)
#![allow(unsafe_code, reason = "system calls through libc")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cirro_protocol::time::Nanos;

/// A clock of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ClockId {
    /// Never jumps.
    Monotonic,
    /// The wall clock.
    Realtime,
}

/// The clock's time in nanoseconds.
pub(crate) fn clock_ns(clock: ClockId) -> u64 {
    let id = match clock {
        ClockId::Monotonic => libc::CLOCK_MONOTONIC,
        ClockId::Realtime => libc::CLOCK_REALTIME,
    };
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writes; both clocks exist on every Linux, so the call cannot fail.
    let result = unsafe { libc::clock_gettime(id, &raw mut time) };
    assert_eq!(result, 0, "every Linux has this clock");
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Fills `bytes` with random ones.
pub(crate) fn random(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: the pointer and length are those of a slice that we may write.
        let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// What epoll reports of one descriptor.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct EpollEvent(libc::epoll_event);

impl EpollEvent {
    /// The token it was added with.
    pub(crate) fn token(&self) -> u64 {
        self.0.u64
    }
}

impl std::fmt::Debug for EpollEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EpollEvent({})", self.token())
    }
}

/// A new epoll instance.
pub(crate) fn epoll_create() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds a descriptor, level-triggered, for reading.
pub(crate) fn epoll_add(epoll: BorrowedFd<'_>, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
    // SAFETY: `event` is valid for reads for the time of the call; the descriptors are borrowed and so open.
    let result =
        unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a descriptor out.
pub(crate) fn epoll_remove(epoll: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: EPOLL_CTL_DEL ignores the event pointer; the descriptors are borrowed and so open.
    let result = unsafe {
        libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_DEL, fd.as_raw_fd(), std::ptr::null_mut())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits and fills `events`, up to its capacity, which is not zero. A signal ends it with nothing.
pub(crate) fn epoll_wait(
    epoll: BorrowedFd<'_>,
    timeout: Option<Nanos>,
    events: &mut Vec<EpollEvent>,
) -> io::Result<()> {
    events.clear();
    let timeout = timeout.map(|span| libc::timespec {
        tv_sec: (span.0 / 1_000_000_000) as libc::time_t,
        tv_nsec: (span.0 % 1_000_000_000) as libc::c_long,
    });
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `events` has room for `capacity` events, which are `repr(transparent)` over the kernel's; `timeout` is null or points to a
    // local that outlives the call; no signal mask is passed.
    let count = unsafe {
        libc::epoll_pwait2(
            epoll.as_raw_fd(),
            events.as_mut_ptr().cast::<libc::epoll_event>(),
            events.capacity().min(i32::MAX as usize) as i32,
            timeout,
            std::ptr::null(),
        )
    };
    let Ok(count) = usize::try_from(count) else {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    };
    // SAFETY: the kernel filled `count` events, at most the capacity.
    unsafe { events.set_len(count) };
    Ok(())
}
