//! The few things that checked Rust does not give a front-end and a wire recorder: memory shared with a device, and packet sockets.
//!
//! Does not know what the bytes mean. Used by `frontend`, `wire` and `netns`. Every other file of the tests is checked Rust.
#![allow(
    unsafe_code,
    reason = "memory shared with a vhost-user device, blkio's uninitialised completions, AF_PACKET addresses, setns"
)]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use blkio::{Blkioq, Completion, MemoryRegion};

/// Completions taken from a queue by one call.
const COMPLETIONS_MAX: usize = 128;

/// Memory that a device reads and writes too. Never a slice: the device may change it at any moment.
#[derive(Debug)]
pub struct Region {
    base: *mut u8,
    bytes: usize,
}

impl Region {
    /// Wraps what `blkio` mapped. The caller keeps the `Blkio` that owns the region alive for as long as this.
    pub(crate) fn new(region: &MemoryRegion) -> Region {
        Region { base: region.addr as *mut u8, bytes: region.len }
    }

    /// Where `bytes` bytes at `at` lie, for a request.
    pub(crate) fn pointer(&self, at: usize, bytes: usize) -> *mut u8 {
        assert!(at <= self.bytes && bytes <= self.bytes - at, "{at}+{bytes} is outside of the region");
        self.base.wrapping_add(at)
    }

    /// Copies `from` into the region at `at`.
    pub fn write(&self, at: usize, from: &[u8]) {
        let to = self.pointer(at, from.len());
        // SAFETY: `pointer` checked the bounds of a live mapping; `from` is not part of it, for no slice of it is ever made.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    /// Copies from the region at `at` into `to`.
    pub fn read(&self, at: usize, to: &mut [u8]) {
        let from = self.pointer(at, to.len());
        // SAFETY: as in `write`; the device is done with this request, and a device that is not harms only the comparison.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }
}

/// A request that ended.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// What the request was submitted with.
    pub user_data: usize,
    /// 0, or a negative errno.
    pub ret: i32,
}

/// Submits what is queued, waits for at least `min` completions for at most `limit`, and appends what ended. A time-out is no error.
pub(crate) fn take(
    queue: &mut Blkioq,
    min: usize,
    limit: Option<Duration>,
    done: &mut Vec<Done>,
) -> blkio::Result<usize> {
    let mut completions = [const { MaybeUninit::<Completion>::uninit() }; COMPLETIONS_MAX];
    let mut left = limit.unwrap_or_default();
    let limit = limit.is_some().then_some(&mut left);
    let taken = match queue.do_io(&mut completions, min, limit, None) {
        Ok(taken) => taken,
        Err(error) if [blkio::Errno::TIME, blkio::Errno::INTR].contains(&error.errno()) => return Ok(0),
        Err(error) => return Err(error),
    };
    for completion in &completions[..taken] {
        // SAFETY: blkio wrote the first `taken` entries.
        let completion = unsafe { completion.assume_init_ref() };
        done.push(Done { user_data: completion.user_data, ret: completion.ret });
    }
    Ok(taken)
}

/// A descriptor of blkio's that lives as long as its queue.
pub(crate) fn completion_fd(queue: &Blkioq) -> BorrowedFd<'_> {
    let fd = queue.get_completion_fd().expect("the queue is not polled");
    // SAFETY: the queue owns the descriptor and is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Makes the file behind a region empty; an access to the mapping faults from then on.
pub(crate) fn shrink(region: &MemoryRegion) -> io::Result<()> {
    // SAFETY: plain system call; blkio keeps the region's descriptor open for as long as the region.
    check(unsafe { libc::ftruncate(region.fd, 0) }).map(drop)
}

/// Moves this thread into the network namespace behind `namespace`.
pub(crate) fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain system call on a descriptor that is open.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// A raw socket on one interface of the calling thread's network namespace.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Receives the frames of `ethertype` that arrive on `interface`, and sends any.
    ///
    /// # Errors
    /// There is no such interface, or the caller may not open one.
    pub fn open(interface: &str, ethertype: u16) -> io::Result<PacketSocket> {
        let protocol = i32::from(ethertype.to_be());
        // SAFETY: plain system call.
        let fd = check(unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol)
        })?;
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = CString::new(interface)?;
        // SAFETY: `name` ends with a zero and lives through the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: all zeroes is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ethertype.to_be();
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: a valid address and its length.
        check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) })?;
        let buffer: i32 = 256 << 20;
        // SAFETY: a valid option value and its length.
        check(unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const buffer).cast(),
                4,
            )
        })?;
        Ok(PacketSocket { fd })
    }

    /// The next frame that is there, whole.
    ///
    /// # Errors
    /// The interface is gone or down.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        // SAFETY: the buffer is valid for writes of its length.
        let got = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match usize::try_from(got) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Sends one whole frame.
    ///
    /// # Errors
    /// The kernel takes no more now, or the interface is gone or down.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the frame is valid for reads of its length.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
