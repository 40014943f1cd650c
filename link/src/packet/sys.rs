//! The system calls of packet sockets: socket options that are asked for, the filter programs, sendmmsg.
//!
//! Knows how to call them safely and nothing of why.
#![allow(unsafe_code, reason = "system calls; each block states what its call needs")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::frame::{FRAMES_QUEUED_MAX, TxFrame};
use crate::sys;
use crate::vectors::Vectors;

/// Frames that found the ring full since the last call (PACKET_STATISTICS).
pub(crate) fn ring_drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut packets_and_drops = [0; 2];
    sys::get_option(fd, libc::SOL_PACKET, libc::PACKET_STATISTICS, &mut packets_and_drops)?;
    Ok(packets_and_drops[1])
}

/// The fan-out group of a socket: its number in the low 16 bits, its kind above.
pub(crate) fn fanout(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut value = [0];
    sys::get_option(fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &mut value)?;
    Ok(value[0])
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

/// The arrays that sendmmsg(2) reads, kept so that sending allocates nothing.
pub(crate) struct SendBatch {
    messages: Vec<libc::mmsghdr>,
    vectors: Vectors,
}

// SAFETY: the pointers in the messages are written and read within one call of `send`; between calls they are dead.
unsafe impl Send for SendBatch {}

impl SendBatch {
    pub(crate) fn new() -> SendBatch {
        SendBatch { messages: Vec::with_capacity(FRAMES_QUEUED_MAX), vectors: Vectors::new() }
    }

    /// Sends frames in one call; returns how many left. An error is the first frame's; a frame after the first that the kernel does not take
    /// only ends the count.
    pub(crate) fn send(&mut self, fd: BorrowedFd<'_>, frames: &[TxFrame]) -> io::Result<usize> {
        self.vectors.clear();
        self.messages.clear();
        for frame in frames {
            // SAFETY: mmsghdr is plain data for which all zeroes is a value: no name, no control data.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_iovlen = self.vectors.push(frame, 0);
            self.messages.push(message);
        }
        self.vectors.hand_out(&mut self.messages);
        sys::send_messages(fd, &mut self.messages)
    }
}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendBatch").finish_non_exhaustive()
    }
}
