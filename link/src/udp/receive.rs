//! Receiving datagrams: many of a peer may come as one, which is cut up here (UDP_GRO, Linux 5.0; udp(7)).
//!
//! Knows buffers, messages and their control data; does not know who sends. Used by one `UdpLink`.
#![allow(unsafe_code, reason = "system calls and their control data; each block states what it needs")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use cirro_protocol::types::ETHERNET_BYTES;

/// Messages taken in one call.
const MESSAGES: usize = 16;
/// What precedes a message in its buffer: room for the Ethernet header that its first frame gets.
const HEADROOM: usize = 16;
/// A message's bytes at most: an IP packet's.
const MESSAGE_BYTES: usize = 65_536;
const BUFFER_BYTES: usize = HEADROOM + MESSAGE_BYTES;
/// Control data of a message: a time stamp and a length, with their headers, aligned.
const CONTROL_WORDS: usize = 12;

/// One datagram, in its receiver's memory.
#[derive(Clone, Debug)]
pub(super) struct Datagram {
    /// Where its bytes are, with room for an Ethernet header before them.
    pub(super) frame: Range<usize>,
    pub(super) from: SocketAddrV4,
    pub(super) seconds: u32,
    pub(super) nanoseconds: u32,
}

/// A message that came, and how much of it is not taken.
#[derive(Clone, Debug)]
struct Message {
    rest: Range<usize>,
    segment_bytes: usize,
    from: SocketAddrV4,
    seconds: u32,
    nanoseconds: u32,
}

/// What recvmmsg(2) fills.
pub(super) struct Receiver {
    bytes: Vec<u8>,
    messages: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_in>,
    controls: Vec<[u64; CONTROL_WORDS]>,
    /// Messages that came, and the next of them.
    filled: usize,
    next: usize,
    current: Option<Message>,
    truncated: u64,
}

// SAFETY: the pointers in the messages are written and used within one call of `fill`; between calls they are dead.
unsafe impl Send for Receiver {}

impl Receiver {
    pub(super) fn new() -> Receiver {
        // SAFETY: mmsghdr, iovec and sockaddr_in are plain data for which all zeroes is a value.
        let (message, vector, name): (libc::mmsghdr, libc::iovec, libc::sockaddr_in) =
            unsafe { std::mem::zeroed() };
        Receiver {
            bytes: vec![0; MESSAGES * BUFFER_BYTES],
            messages: vec![message; MESSAGES],
            vectors: vec![vector; MESSAGES],
            names: vec![name; MESSAGES],
            controls: vec![[0; CONTROL_WORDS]; MESSAGES],
            filled: 0,
            next: 0,
            current: None,
            truncated: 0,
        }
    }

    /// True while datagrams that the kernel has handed over wait here: the socket is not readable for them any more.
    pub(super) fn has_more(&self) -> bool {
        self.next < self.filled || self.current.as_ref().is_some_and(|message| !message.rest.is_empty())
    }

    /// The next datagram of those that wait here. The memory of the one before it is used again.
    #[inline]
    pub(super) fn next(&mut self) -> Option<Datagram> {
        loop {
            if let Some(message) = self.current.as_mut().filter(|message| !message.rest.is_empty()) {
                let start = message.rest.start;
                let end = message.rest.end.min(start + message.segment_bytes);
                message.rest.start = end;
                return Some(Datagram {
                    frame: start - ETHERNET_BYTES..end,
                    from: message.from,
                    seconds: message.seconds,
                    nanoseconds: message.nanoseconds,
                });
            }
            if self.next == self.filled {
                return None;
            }
            self.current = self.message(self.next);
            self.next += 1;
        }
    }

    /// A datagram's bytes, and before them those of its Ethernet header: what lay there was a datagram that has been taken.
    pub(super) fn frame_mut(&mut self, datagram: &Datagram) -> &mut [u8] {
        &mut self.bytes[datagram.frame.clone()]
    }

    pub(super) fn frame(&self, datagram: &Datagram) -> &[u8] {
        &self.bytes[datagram.frame.clone()]
    }

    /// Messages that were longer than any packet since the last call.
    pub(super) fn take_truncated(&mut self) -> u64 {
        std::mem::take(&mut self.truncated)
    }

    /// Takes what waits on the socket, as much as fits, when nothing waits here.
    pub(super) fn fill(&mut self, fd: BorrowedFd<'_>) {
        let buffers = self.bytes.chunks_exact_mut(BUFFER_BYTES).zip(&mut self.vectors);
        let extras = self.names.iter_mut().zip(&mut self.controls);
        for (message, ((buffer, vector), (name, control))) in
            self.messages.iter_mut().zip(buffers.zip(extras))
        {
            let buffer = &mut buffer[HEADROOM..];
            *vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
            message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            message.msg_hdr.msg_control = control.as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = size_of_val(control) as _;
        }
        // SAFETY: each message names its own buffer, address and control data with their lengths, and all of them live during the call.
        let count = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                self.messages.as_mut_ptr(),
                MESSAGES as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        self.next = 0;
        self.filled = usize::try_from(count).unwrap_or(0);
    }

    /// A message that came; `None` if it is cut off or its sender's address is of another kind.
    fn message(&mut self, index: usize) -> Option<Message> {
        let message = &self.messages[index];
        let name = &self.names[index];
        if message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 || i32::from(name.sin_family) != libc::AF_INET {
            self.truncated += 1;
            return None;
        }
        let start = index * BUFFER_BYTES + HEADROOM;
        let len = message.msg_len as usize;
        let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
        let mut taken = Message {
            rest: start..start + len,
            segment_bytes: len.max(1),
            from: SocketAddrV4::new(ip, u16::from_be(name.sin_port)),
            seconds: 0,
            nanoseconds: 0,
        };
        read_control(&message.msg_hdr, &mut taken);
        Some(taken)
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("filled", &self.filled).finish_non_exhaustive()
    }
}

/// Reads the control data that the kernel wrote beside a message.
fn read_control(header: &libc::msghdr, message: &mut Message) {
    // SAFETY: the control data was written by the kernel in this turn, and lies in memory that its receiver owns; the macro stays within it.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: the macros give null or a header within the control data.
    while let Some(control) = unsafe { next.as_ref() } {
        // SAFETY: the data of a header that the kernel wrote follows it.
        let data = unsafe { libc::CMSG_DATA(control) };
        match (control.cmsg_level, control.cmsg_type) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: UDP_GRO carries an int.
                let bytes = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                message.segment_bytes = usize::try_from(bytes).unwrap_or(0).max(1);
            }
            (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) => {
                // SAFETY: SCM_TIMESTAMPNS carries a timespec.
                let time = unsafe { data.cast::<libc::timespec>().read_unaligned() };
                message.seconds = time.tv_sec as u32;
                message.nanoseconds = time.tv_nsec as u32;
            }
            _ => {}
        }
        // SAFETY: as for the first.
        next = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
}
