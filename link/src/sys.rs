//! The system calls that belong to no kind of link: clocks, random bytes, epoll, what an interface is like, setting socket options.
//!
//! Knows how to call them safely and nothing of why.
#![allow(unsafe_code, reason = "system calls; each block states what its call needs")]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cirro_protocol::types::MacAddress;

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

fn interface_request(fd: BorrowedFd<'_>, name: &str, request: libc::c_ulong) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= ifreq.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the requests made here read the name from, and write their answer to, the ifreq, which lives during the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &mut ifreq) };
    if result == 0 { Ok(ifreq) } else { Err(io::Error::last_os_error()) }
}

/// The index of an interface, in the network namespace of the socket.
pub(crate) fn interface_index(fd: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    let ifreq = interface_request(fd, name, libc::SIOCGIFINDEX)?;
    // SAFETY: SIOCGIFINDEX fills the index of the union.
    let index = unsafe { ifreq.ifr_ifru.ifru_ifindex };
    u32::try_from(index).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The MTU of an interface.
pub(crate) fn interface_mtu(fd: BorrowedFd<'_>, name: &str) -> io::Result<usize> {
    let ifreq = interface_request(fd, name, libc::SIOCGIFMTU)?;
    // SAFETY: SIOCGIFMTU fills the MTU of the union.
    let mtu = unsafe { ifreq.ifr_ifru.ifru_mtu };
    usize::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// True if an interface is administratively up.
pub(crate) fn interface_is_up(fd: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    let ifreq = interface_request(fd, name, libc::SIOCGIFFLAGS)?;
    // SAFETY: SIOCGIFFLAGS fills the flags of the union.
    let flags = unsafe { ifreq.ifr_ifru.ifru_flags };
    Ok(i32::from(flags) & libc::IFF_UP != 0)
}

/// The MAC address of an interface.
pub(crate) fn interface_address(fd: BorrowedFd<'_>, name: &str) -> io::Result<MacAddress> {
    let ifreq = interface_request(fd, name, libc::SIOCGIFHWADDR)?;
    // SAFETY: SIOCGIFHWADDR fills the hardware address of the union.
    let address = unsafe { ifreq.ifr_ifru.ifru_hwaddr };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(address.sa_data) {
        *to = from as u8;
    }
    Ok(MacAddress(mac))
}

/// Sets a socket option whose value is a plain structure or number.
pub(crate) fn set_option<T: Copy>(fd: BorrowedFd<'_>, level: i32, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the value lives during the call and its size is the one given; every option used here takes plain data.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Fills `value` with a socket option of plain numbers.
pub(crate) fn get_option(fd: BorrowedFd<'_>, level: i32, option: i32, value: &mut [u32]) -> io::Result<()> {
    let mut len = size_of_val(value) as libc::socklen_t;
    // SAFETY: the buffer and its length live during the call; the kernel writes at most `len` bytes of plain numbers.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, value.as_mut_ptr().cast(), &mut len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a classic BPF program: as the socket's filter (`SOL_SOCKET`/`SO_ATTACH_FILTER`), or as what deals frames out to its group
/// (`SOL_PACKET`/`PACKET_FANOUT_DATA`, `SOL_SOCKET`/`SO_ATTACH_REUSEPORT_CBPF`).
pub(crate) fn set_program(
    fd: BorrowedFd<'_>,
    level: i32,
    option: i32,
    program: &mut [libc::sock_filter],
) -> io::Result<()> {
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: sock_fprog points to `program.len()` instructions that live during the call; the kernel copies them.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One of a socket's two buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Buffer {
    Send,
    Receive,
}

/// Lets a socket hold `bytes`. The forced size needs CAP_NET_ADMIN; without it the kernel's limit holds, and refused or lost frames tell.
pub(crate) fn set_buffer(fd: BorrowedFd<'_>, buffer: Buffer, bytes: usize) -> io::Result<()> {
    let (forced, plain) = match buffer {
        Buffer::Send => (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
        Buffer::Receive => (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
    };
    let set = |option| set_option(fd, libc::SOL_SOCKET, option, &(bytes as i32));
    set(forced).or_else(|_| set(plain))
}

/// Sends messages in one call without waiting; returns how many left. An error is the first one's. What the messages point to is only read.
pub(crate) fn send_messages(fd: BorrowedFd<'_>, messages: &mut [libc::mmsghdr]) -> io::Result<usize> {
    // SAFETY: what the messages point to lives during the call: heads of frames and control data that the caller borrows for it, and runs,
    // which are readable by the promise of `Run::new`. The kernel writes nothing but each message's length.
    let sent = unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            messages.as_mut_ptr(),
            messages.len() as libc::c_uint,
            libc::MSG_DONTWAIT,
        )
    };
    if sent >= 0 { Ok(sent as usize) } else { Err(io::Error::last_os_error()) }
}

/// The IPv4 address of an interface.
pub(crate) fn interface_ipv4(fd: BorrowedFd<'_>, name: &str) -> io::Result<Ipv4Addr> {
    let ifreq = interface_request(fd, name, libc::SIOCGIFADDR)?;
    // SAFETY: SIOCGIFADDR fills the address of the union, of the family AF_INET.
    let address = unsafe { ifreq.ifr_ifru.ifru_addr };
    // Of sockaddr_in's bytes after the family the first two are the port.
    let bytes: [u8; 4] = std::array::from_fn(|at| address.sa_data[2 + at] as u8);
    Ok(Ipv4Addr::from(bytes))
}
