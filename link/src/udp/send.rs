//! Sending datagrams: frames to one peer that are equally long leave as one message, which the kernel or the card cuts up (UDP_SEGMENT, Linux
//! 4.18; udp(7)).
//!
//! Knows messages and their control data; does not know what a frame means. Used by one `UdpLink`.
#![allow(
    unsafe_code,
    reason = "plain structures of the kernel, made of zeroes; each block states why it may be"
)]

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::BorrowedFd;

use cirro_protocol::types::{ETHERNET_BYTES, MacAddress};

use super::PAYLOAD_MAX;
use super::address::endpoint_of;
use crate::frame::{FRAMES_QUEUED_MAX, Refusal, TxFrame};
use crate::sys;
use crate::vectors::{PARTS_MAX, Vectors};

/// Datagrams of one message (UDP_MAX_SEGMENTS of kernels before 6.9).
const SEGMENTS_MAX: usize = 64;

/// The control data of a message: which of our addresses it comes from, and how long each of its datagrams is.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control {
    source_header: libc::cmsghdr,
    source: libc::in_pktinfo,
    padding: u32,
    segment_header: libc::cmsghdr,
    segment_bytes: u16,
    padding_end: [u16; 3],
}

/// Bytes of the control data of a message that is one datagram.
const SOURCE_BYTES: usize = std::mem::offset_of!(Control, segment_header);

const _: () = assert!(SOURCE_BYTES.is_multiple_of(align_of::<libc::cmsghdr>()));

impl Control {
    fn new(source: Ipv4Addr, segment_bytes: usize) -> Control {
        // SAFETY: plain data for which all zeroes is a value.
        let mut control: Control = unsafe { std::mem::zeroed() };
        let header_bytes = size_of::<libc::cmsghdr>();
        control.source_header.cmsg_len = (header_bytes + size_of::<libc::in_pktinfo>()) as _;
        control.source_header.cmsg_level = libc::IPPROTO_IP;
        control.source_header.cmsg_type = libc::IP_PKTINFO;
        control.source.ipi_spec_dst.s_addr = u32::from(source).to_be();
        control.segment_header.cmsg_len = (header_bytes + size_of::<u16>()) as _;
        control.segment_header.cmsg_level = libc::SOL_UDP;
        control.segment_header.cmsg_type = libc::UDP_SEGMENT;
        control.segment_bytes = segment_bytes as u16;
        control
    }
}

/// The arrays that sendmmsg(2) reads, kept so that sending allocates nothing.
pub(super) struct Sender {
    vectors: Vectors,
    messages: Vec<libc::mmsghdr>,
    names: Vec<libc::sockaddr_in>,
    controls: Vec<Control>,
    /// For each message, how many frames it carries.
    counts: Vec<usize>,
    /// False once the kernel has refused to cut messages up: older ones need an interface that makes checksums.
    cuts: bool,
}

// SAFETY: the pointers in the messages are written and read within one call of `send`; between calls they are dead.
unsafe impl Send for Sender {}

impl Sender {
    pub(super) fn new() -> Sender {
        Sender {
            vectors: Vectors::new(),
            messages: Vec::with_capacity(FRAMES_QUEUED_MAX),
            names: Vec::with_capacity(FRAMES_QUEUED_MAX),
            controls: Vec::with_capacity(FRAMES_QUEUED_MAX),
            counts: Vec::with_capacity(FRAMES_QUEUED_MAX),
            cuts: true,
        }
    }

    /// The interface is another one, or like another: what was found out of it is found out again.
    pub(super) fn forget(&mut self) {
        self.cuts = true;
    }

    /// Sends frames in one call, from the front until one that is for all; returns how many left. A frame that is for all, at the front, goes
    /// to each of `everybody` by itself, as far as that can be done.
    pub(super) fn send(
        &mut self,
        fd: BorrowedFd<'_>,
        source: Ipv4Addr,
        frames: &[TxFrame],
        everybody: &[SocketAddrV4],
    ) -> Result<usize, Refusal> {
        self.vectors.clear();
        self.messages.clear();
        self.names.clear();
        self.controls.clear();
        self.counts.clear();
        if destination(&frames[0]) == Some(MacAddress::BROADCAST) {
            for endpoint in everybody {
                self.push(&frames[..1], *endpoint, source);
            }
            self.submit_each(fd);
            return Ok(1);
        }
        let mut rest = frames;
        while let Some(endpoint) = rest.first().and_then(destination).and_then(endpoint_of) {
            let (together, others) = rest.split_at(if self.cuts { together(rest) } else { 1 });
            self.push(together, endpoint, source);
            rest = others;
        }
        if self.messages.is_empty() {
            let error = io::Error::other("its destination stands for no UDP endpoint");
            return Err(Refusal { frames: 1, error });
        }
        match self.submit(fd, 0) {
            Ok(sent) => Ok(self.counts[..sent].iter().sum()),
            Err(error) if self.counts[0] > 1 && cannot_cut(&error) => {
                log::info!("one datagram is sent at a time from now on: {error}");
                self.cuts = false;
                Ok(0)
            }
            Err(error) => Err(Refusal { frames: self.counts[0], error }),
        }
    }

    /// Adds the message that carries `frames`.
    fn push(&mut self, frames: &[TxFrame], endpoint: SocketAddrV4, source: Ipv4Addr) {
        // SAFETY: mmsghdr and sockaddr_in are plain data for which all zeroes is a value.
        let (mut message, mut name): (libc::mmsghdr, libc::sockaddr_in) = unsafe { std::mem::zeroed() };
        name.sin_family = libc::AF_INET as u16;
        name.sin_port = endpoint.port().to_be();
        name.sin_addr.s_addr = u32::from(*endpoint.ip()).to_be();
        message.msg_hdr.msg_iovlen =
            frames.iter().map(|frame| self.vectors.push(frame, ETHERNET_BYTES)).sum::<usize>();
        message.msg_hdr.msg_controllen =
            if frames.len() > 1 { size_of::<Control>() } else { SOURCE_BYTES } as _;
        self.messages.push(message);
        self.names.push(name);
        self.controls.push(Control::new(source, frames[0].len() - ETHERNET_BYTES));
        self.counts.push(frames.len());
    }

    /// Hands the messages from `first` on to the kernel: returns how many it took.
    fn submit(&mut self, fd: BorrowedFd<'_>, first: usize) -> io::Result<usize> {
        self.vectors.hand_out(&mut self.messages);
        let others = self.names.iter_mut().zip(&mut self.controls);
        for (message, (name, control)) in self.messages.iter_mut().zip(others) {
            message.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
            message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            message.msg_hdr.msg_control = std::ptr::from_mut(control).cast();
        }
        sys::send_messages(fd, &mut self.messages[first..])
    }

    /// Hands every message to the kernel, whatever it says to one of them: a peer that is not there must not cost the others theirs.
    fn submit_each(&mut self, fd: BorrowedFd<'_>) {
        let mut done = 0;
        while done < self.messages.len() {
            done += self.submit(fd, done).unwrap_or_else(|error| {
                log::trace!("a frame for all is not sent to one of them: {error}");
                1
            });
        }
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("cuts", &self.cuts).finish_non_exhaustive()
    }
}

/// The destination in a frame's Ethernet header; `None` if it has no such header.
fn destination(frame: &TxFrame) -> Option<MacAddress> {
    let header = frame.head.get(..ETHERNET_BYTES)?;
    header.first_chunk().copied().map(MacAddress)
}

/// How many frames at the front can be one message: for one peer, all as long as the first, but that the last may be shorter.
fn together(frames: &[TxFrame]) -> usize {
    let (peer, len) = (destination(&frames[0]), frames[0].len());
    let (mut bytes, mut parts) = (0, 0);
    for (place, frame) in frames.iter().enumerate().take(SEGMENTS_MAX) {
        bytes += frame.len() - ETHERNET_BYTES.min(frame.len());
        parts += frame.parts_max();
        let fits = bytes <= PAYLOAD_MAX && parts <= PARTS_MAX;
        if place > 0 && !(fits && frame.len() <= len && destination(frame) == peer) {
            return place;
        }
        if frame.len() < len {
            return place + 1;
        }
    }
    frames.len().min(SEGMENTS_MAX)
}

/// The errors of a message that is to be cut up where that cannot be done.
fn cannot_cut(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP | libc::EMSGSIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(peer: u8, len: usize) -> TxFrame {
        let mut frame = TxFrame::with_capacity(len);
        frame.head.resize(len, 0);
        frame.head[..6].copy_from_slice(&[2, 0, 192, 0, 2, peer]);
        frame
    }

    #[test]
    fn frames_go_together_while_they_are_for_one_peer_and_equally_long() {
        let count = |frames: &[(u8, usize)]| {
            together(&frames.iter().map(|(peer, len)| frame(*peer, *len)).collect::<Vec<_>>())
        };
        assert_eq!(count(&[(1, 100)]), 1);
        assert_eq!(count(&[(1, 100), (1, 100), (1, 100)]), 3);
        assert_eq!(count(&[(1, 100), (1, 100), (2, 100)]), 2);
        assert_eq!(count(&[(1, 100), (1, 60), (1, 60)]), 2, "a shorter one is the last");
        assert_eq!(count(&[(1, 60), (1, 100)]), 1);
        assert_eq!(count(&[(1, 9014); 20]), 7, "a message is an IP packet of at most 64 KiB");
        assert_eq!(count(&[(1, 80); 200]), SEGMENTS_MAX);
    }
}
