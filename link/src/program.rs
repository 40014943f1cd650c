//! The classic BPF programs: which worker of a process gets a frame, and which process.
//!
//! Knows the offsets of `vt` and `steer` and no other byte of a frame. Called when a link is opened.

use cirro_protocol::types::{ETHERNET_BYTES, Steer};
use cirro_protocol::wire::header::VT_LONG;

/// Offset of `steer` in the frame header.
const STEER: u32 = 2;
/// Where the kernel keeps what it knows beside the frame (SKF_AD_OFF), and there the packet type (SKF_AD_PKTTYPE, linux/filter.h).
const PACKET_TYPE: u32 = (-0x1000i32 + 4) as u32;
/// Host and broadcast are 0 and 1; multicast, other hosts' and outgoing frames follow (linux/if_packet.h).
const PACKET_BROADCAST: u32 = libc::PACKET_BROADCAST as u32;

const fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

const fn jump(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// Picks the group's member from the worker bits. In this program offset 0 is the first byte after the Ethernet header; the kernel takes the
/// result modulo the number of members.
pub(crate) fn worker_of_frame() -> [libc::sock_filter; 3] {
    [
        statement(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, STEER),
        statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, u32::from(Steer::WORKERS_MAX - 1)),
        statement(libc::BPF_RET | libc::BPF_A, 0),
    ]
}

/// The same for the sockets of one UDP port (SO_REUSEPORT): offset 0 is the first byte of the datagram, and a number that is no socket's would
/// be taken for no answer, so the program divides by itself.
pub(crate) fn worker_of_datagram(workers: u16) -> [libc::sock_filter; 4] {
    let [load, mask, answer] = worker_of_frame();
    [load, mask, statement(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, u32::from(workers)), answer]
}

/// Takes what is for our address or for all, and of that LONG frames and those with exactly this `steer`; drops the rest before it is copied
/// anywhere. Here offset 0 is the first byte of the Ethernet header. A frame too short to have a `steer` is dropped.
pub(crate) fn frames_for(steer: Steer) -> [libc::sock_filter; 8] {
    let start = ETHERNET_BYTES as u32;
    [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, PACKET_TYPE),
        jump(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, PACKET_BROADCAST, 5, 0),
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, start),
        jump(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, u32::from(VT_LONG), 2, 0),
        statement(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, start + STEER),
        jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::from(steer.0), 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, u32::MAX),
        statement(libc::BPF_RET | libc::BPF_K, 0),
    ]
}
