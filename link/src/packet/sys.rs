//! The system calls of packet sockets: socket options with structures, the filter programs, sendmmsg.
//!
//! Knows how to call them safely and nothing of why.
#![allow(unsafe_code, reason = "system calls; each block states what its call needs")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use cirro_protocol::types::MacAddress;

use crate::frame::{FRAMES_QUEUED_MAX, Part, TxFrame};

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
fn get_option(fd: BorrowedFd<'_>, option: i32, value: &mut [u32]) -> io::Result<()> {
    let mut len = size_of_val(value) as libc::socklen_t;
    // SAFETY: the buffer and its length live during the call; the kernel writes at most `len` bytes of plain numbers.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, option, value.as_mut_ptr().cast(), &mut len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Frames that found the ring full since the last call (PACKET_STATISTICS).
pub(crate) fn ring_drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut packets_and_drops = [0; 2];
    get_option(fd, libc::PACKET_STATISTICS, &mut packets_and_drops)?;
    Ok(packets_and_drops[1])
}

/// The fan-out group of a socket: its number in the low 16 bits, its kind above.
pub(crate) fn fanout(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut value = [0];
    get_option(fd, libc::PACKET_FANOUT, &mut value)?;
    Ok(value[0])
}

/// Attaches a classic BPF program as the socket's filter (`SOL_SOCKET`/`SO_ATTACH_FILTER`) or as its group's demultiplexer
/// (`SOL_PACKET`/`PACKET_FANOUT_DATA`).
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

/// Binds a packet socket to an interface and an EtherType.
pub(crate) fn bind(fd: BorrowedFd<'_>, interface: u32, ethertype: u16) -> io::Result<()> {
    // SAFETY: sockaddr_ll is plain data for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex = interface as i32;
    // SAFETY: the address lives during the call and its size is the one given.
    let result = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Pieces of which the kernel gathers one message (UIO_MAXIOV). A frame in more of them is gathered here first.
const PARTS_MAX: usize = 1024;

/// The arrays that sendmmsg(2) reads, kept so that sending allocates nothing.
pub(crate) struct SendBatch {
    messages: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    /// Frames in more than [`PARTS_MAX`] parts, each in one piece: a guest that scatters its data so is legal and pays a copy.
    gathered: Vec<Vec<u8>>,
}

// SAFETY: the pointers in the arrays are written and read within one call of `send`; between calls they are dead.
unsafe impl Send for SendBatch {}

impl SendBatch {
    pub(crate) fn new() -> SendBatch {
        SendBatch {
            messages: Vec::with_capacity(FRAMES_QUEUED_MAX),
            vectors: Vec::with_capacity(32 * FRAMES_QUEUED_MAX),
            gathered: Vec::new(),
        }
    }

    /// Sends frames in one call; returns how many left. An error is the first frame's; a frame after the first that the kernel does not take
    /// only ends the count.
    pub(crate) fn send(&mut self, fd: BorrowedFd<'_>, frames: &[TxFrame]) -> io::Result<usize> {
        self.vectors.clear();
        self.messages.clear();
        self.gathered.clear();
        for frame in frames {
            let first = self.vectors.len();
            if frame.parts_max() > PARTS_MAX {
                let mut whole = Vec::new();
                frame.gather(&mut whole);
                self.vectors.push(vector(whole.as_ptr(), whole.len()));
                // Moving the Vec does not move what it points to.
                self.gathered.push(whole);
            } else {
                frame.parts(|part| {
                    self.vectors.push(match part {
                        Part::Head(head) => vector(head.as_ptr(), head.len()),
                        Part::Run(run) => vector(run.start(), run.len()),
                    });
                });
            }
            // SAFETY: mmsghdr is plain data for which all zeroes is a value: no name, no control data.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iovlen = self.vectors.len() - first;
            self.messages.push(message);
        }
        let mut vectors = self.vectors.as_mut_ptr();
        for message in &mut self.messages {
            message.msg_hdr.msg_iov = vectors;
            // SAFETY: the counts add up to the length of the array, so the pointer ends at most one past its last entry.
            vectors = unsafe { vectors.add(message.msg_hdr.msg_iovlen) };
        }
        // SAFETY: the message array and the vectors live during the call; the heads they name are borrowed for it, the runs are readable by
        // the promise of `Run::new`; the kernel only reads them.
        let sent = unsafe {
            libc::sendmmsg(
                fd.as_raw_fd(),
                self.messages.as_mut_ptr(),
                self.messages.len() as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        if sent >= 0 { Ok(sent as usize) } else { Err(io::Error::last_os_error()) }
    }
}

fn vector(start: *const u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len }
}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendBatch").finish_non_exhaustive()
    }
}
