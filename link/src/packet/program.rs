//! The two classic BPF programs: which worker of a process gets a frame, and which process.
//!
//! Knows the offsets of `vt` and `steer` and no other byte of a frame.

use cirro_protocol::types::ETHERNET_BYTES;
use cirro_protocol::wire::header::VT_LONG;

/// Offset of `steer` in the frame header.
const STEER: u32 = 2;

const fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

const fn jump(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

/// Picks the group's member from the worker bits. In this program offset 0 is the first byte after the Ethernet header; the kernel takes the
/// result modulo the number of members.
pub(super) fn worker_of_frame() -> [libc::sock_filter; 3] {
    [
        statement(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, STEER),
        statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0x3ff),
        statement(libc::BPF_RET | libc::BPF_A, 0),
    ]
}

/// Takes LONG frames and those whose process bits are `process`; drops the rest before it is copied anywhere. Here offset 0 is the first byte
/// of the Ethernet header.
pub(super) fn frames_of_process(process: u16) -> [libc::sock_filter; 7] {
    let start = ETHERNET_BYTES as u32;
    [
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, start),
        jump(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, u32::from(VT_LONG), 3, 0),
        statement(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, start + STEER),
        statement(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 10),
        jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::from(process), 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, u32::MAX),
        statement(libc::BPF_RET | libc::BPF_K, 0),
    ]
}
