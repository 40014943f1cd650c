//! The system calls of AF_XDP: bpf(2) for the program, its map and its attachment; binding a socket to a queue; waking the kernel; how many
//! queues an interface has.
//!
//! Knows how to call them safely and nothing of why.
#![allow(unsafe_code, reason = "system calls; each block states what its call needs")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::program::Instruction;

/// Commands of bpf(2), and what else enum bpf_cmd's neighbours in linux/bpf.h name.
const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
/// The program may be given a frame in several buffers (BPF_F_XDP_HAS_FRAGS, Linux 5.18).
const XDP_HAS_FRAGS: u32 = 1 << 5;
/// The program uses no helper function that is for the GPL alone.
const LICENCE: &CStr = c"Apache-2.0 or MIT";

/// How a driver is asked for its queues (linux/sockios.h, linux/ethtool.h).
const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// Where an XDP program runs (XDP_FLAGS_SKB_MODE and XDP_FLAGS_DRV_MODE, linux/if_link.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the driver, before the kernel has made anything of the frame.
    Driver = 1 << 2,
    /// In the stack, with any driver.
    Generic = 1 << 1,
}

/// union bpf_attr, as far as each command reads it. The kernel takes what is left out for zeroes.
#[repr(C)]
#[derive(Clone, Copy)]
struct MapCreate {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    instructions_at: u64,
    licence_at: u64,
    log_level: u32,
    log_bytes: u32,
    log_at: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_kind: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapUpdate {
    map: u32,
    _padding: u32,
    key_at: u64,
    value_at: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct LinkCreate {
    program: u32,
    interface: u32,
    attach_kind: u32,
    flags: u32,
}

/// struct ethtool_channels.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Channels {
    command: u32,
    rx_max: u32,
    tx_max: u32,
    other_max: u32,
    combined_max: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// Calls bpf(2). What the attributes point to is read during the call only: the callers below borrow it for that long.
fn bpf<T: Copy>(command: i32, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes live during the call, their size is the one given, and the kernel writes to none of these commands' attributes.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result >= 0 { Ok(result as i32) } else { Err(io::Error::last_os_error()) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: a call has just returned this descriptor, which nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A map of AF_XDP sockets, by queue.
pub(super) fn new_socket_map(queues: u32) -> io::Result<OwnedFd> {
    let map = MapCreate { kind: MAP_TYPE_XSKMAP, key_bytes: 4, value_bytes: 4, entries: queues, flags: 0 };
    bpf(MAP_CREATE, &map).map(owned)
}

/// Loads an XDP program.
pub(super) fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut name = [0; 16];
    name[..5].copy_from_slice(b"cirro");
    let load = ProgramLoad {
        kind: PROG_TYPE_XDP,
        instructions: program.len() as u32,
        instructions_at: program.as_ptr() as u64,
        licence_at: LICENCE.as_ptr() as u64,
        log_level: 0,
        log_bytes: 0,
        log_at: 0,
        kernel_version: 0,
        flags: XDP_HAS_FRAGS,
        name,
        interface: 0,
        attach_kind: ATTACH_XDP,
    };
    bpf(PROG_LOAD, &load).map(owned)
}

/// Makes `socket` the one that gets the frames of `queue`, until it is closed.
pub(super) fn enter_socket(map: &OwnedFd, queue: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = socket.as_raw_fd();
    let update = MapUpdate {
        map: map.as_raw_fd() as u32,
        _padding: 0,
        key_at: std::ptr::from_ref(&queue) as u64,
        value_at: std::ptr::from_ref(&value) as u64,
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &update).map(drop)
}

/// Attaches a program to an interface of the thread's network namespace, until what this returns is closed, by whatever ends the process.
pub(super) fn attach(program: &OwnedFd, interface: u32, place: Place) -> io::Result<OwnedFd> {
    let (program, flags) = (program.as_raw_fd() as u32, place as u32);
    bpf(LINK_CREATE, &LinkCreate { program, interface, attach_kind: ATTACH_XDP, flags }).map(owned)
}

/// Binds a socket to a queue of an interface.
pub(super) fn bind(fd: BorrowedFd<'_>, interface: u32, queue: u32, flags: u16) -> io::Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: flags,
        sxdp_ifindex: interface,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    // SAFETY: the address lives during the call and its size is the one given.
    let result = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_xdp>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the kernel send what lies in the ring. In copy mode it does so during the call.
pub(super) fn wake_for_sending(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no buffer, no address.
    let result =
        unsafe { libc::sendto(fd.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0) };
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Tells the driver that there are buffers to receive into. That it cannot be told now is told again.
pub(super) fn wake_for_receiving(fd: BorrowedFd<'_>) {
    let (nothing, nowhere) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: no buffer, no address.
    unsafe { libc::recvfrom(fd.as_raw_fd(), nothing, 0, libc::MSG_DONTWAIT, nowhere, std::ptr::null_mut()) };
}

/// How many receive queues an interface has; `None` if its driver does not say.
pub(super) fn receive_queues(fd: BorrowedFd<'_>, name: &str) -> Option<u32> {
    let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= ifreq.ifr_name.len() {
        return None;
    }
    for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = std::ptr::from_mut(&mut channels).cast();
    // SAFETY: the request reads the name and the command, and writes a struct ethtool_channels, to which the pointer leads; both live during the
    // call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCETHTOOL, &mut ifreq) };
    (result == 0).then_some(channels.rx + channels.combined)
}
