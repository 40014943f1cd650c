//! UDP over IPv4: a link across networks that route. The same frames, without their Ethernet header, as datagrams.
//!
//! A process has one port; each of its workers has a socket on it, and the kernel brings every datagram to the worker that its `steer` names.
//! The core knows peers by MAC address, so an endpoint is given one ([`address`]). What is for all goes to the machines that the operator
//! named. Knows interfaces, sockets and endpoints; of a frame's content only the two bytes that pick a worker.

pub mod address;
mod receive;
mod send;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERNET_BYTES, MTU_MIN, MacAddress};
use socket2::{Domain, Protocol, Socket, Type};

use self::address::{PORT_FIRST, PROCESSES_MAX, all_of, mac_of, sender_of};
use self::receive::Receiver;
use self::send::Sender;
use crate::claim::claim;
use crate::clock::{self, KernelClocks, Stamps};
use crate::frame::{FramePool, send_buffer_bytes};
use crate::program::worker_of_datagram;
use crate::sys::{self, Buffer};
use crate::{Drops, FrameId, Link, OpenError, Received, TxFrame};

/// Headers between an interface's MTU and our frames: IPv4 without options (20) and UDP (8).
const HEADER_BYTES: usize = 28;
/// Bytes of a datagram at most: an IPv4 packet's length has 16 bits.
const PAYLOAD_MAX: usize = 65_535 - HEADER_BYTES;
/// What a socket may hold until its worker takes it. The kernel counts the memory, twice what is asked for.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;
/// How often the interface is asked for its address and MTU: while all is well, and while it is lost.
const CHECK_EVERY: Nanos = Nanos::from_secs(1);
const LOOK_EVERY: Nanos = Nanos::from_millis(50);
/// Sends the packet whole or not at all, whatever a router said of the path (linux/in.h): a session's own probes find what the path takes.
const IP_PMTUDISC_PROBE: i32 = 3;
/// Where SO_MEMINFO tells of datagrams that found no room, and how much it tells (linux/sock_diag.h).
const MEMINFO_DROPS: usize = 8;
const MEMINFO_WORDS: usize = 9;

/// What the interface is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Facts {
    ip: Ipv4Addr,
    /// Bytes of a frame after its Ethernet header.
    mtu: usize,
}

/// What the workers of a process share.
#[derive(Debug)]
struct Shared {
    interface: String,
    ethertype: u16,
    process: u16,
    /// Who gets what is for all.
    everybody: Vec<SocketAddrV4>,
    _held: UnixDatagram,
}

/// The link of one worker.
///
/// An interface that goes down or loses its address does not end the link: frames are refused until it is back. Its address or MTU may be
/// others then; [`Link::take_changed`] says so once. The sockets stay the same: they are bound to a port and to no interface.
#[derive(Debug)]
pub struct UdpLink {
    shared: Arc<Shared>,
    socket: Socket,
    /// What it was when it was seen last.
    facts: Facts,
    open: bool,
    pool: FramePool,
    sender: Sender,
    receiver: Receiver,
    stamps: Stamps<KernelClocks>,
    check_at: Instant,
    changed: bool,
    /// As SO_MEMINFO had it last.
    ring_full: u32,
    drops: Arc<Drops>,
}

/// Opens the links of a process's `workers` at the IPv4 address of `interface`; what is for all goes to `peers`. Returns the process number
/// (0 to 7), which with a worker's index makes its [`Steer`](cirro_protocol::types::Steer), and a link for each worker. The number is held
/// while a link lives.
///
/// # Errors
/// [`OpenError`], in words for an operator.
pub fn open(
    interface: &str,
    ethertype: u16,
    workers: u16,
    peers: &[Ipv4Addr],
) -> Result<(u16, Vec<UdpLink>), OpenError> {
    let failed = |step| move |cause| OpenError::kernel(step, interface, cause);
    let (process, held) = claim("udp", 0..PROCESSES_MAX)
        .map_err(failed("process number"))?
        .ok_or_else(|| OpenError::NoProcessNumber { interface: interface.to_owned(), most: PROCESSES_MAX })?;
    let shared = Arc::new(Shared {
        interface: interface.to_owned(),
        ethertype,
        process,
        everybody: peers.iter().copied().flat_map(all_of).collect(),
        _held: held,
    });
    let links = (0..workers)
        .map(|_| UdpLink::open(Arc::clone(&shared), workers > 1))
        .collect::<Result<Vec<_>, _>>()?;
    if workers > 1 {
        // One program for all sockets of the port: they are numbered in the order in which they were bound.
        let (fd, program) = (links[0].socket.as_fd(), &mut worker_of_datagram(workers));
        sys::set_program(fd, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, program)
            .map_err(failed("program that picks a worker"))?;
    }
    Ok((process, links))
}

impl UdpLink {
    fn open(shared: Arc<Shared>, share_port: bool) -> Result<UdpLink, OpenError> {
        let failed = |step| {
            let interface = shared.interface.clone();
            move |cause| OpenError::kernel(step, &interface, cause)
        };
        let kind = Type::DGRAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::IPV4, kind, Some(Protocol::UDP)).map_err(failed("UDP socket"))?;
        let facts = first_look(&shared.interface, &socket)?;
        let fd = socket.as_fd();
        let flag = |level, option, value: i32, step| {
            sys::set_option(fd, level, option, &value).map_err(failed(step))
        };
        flag(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, IP_PMTUDISC_PROBE, "path MTU")?;
        flag(libc::SOL_UDP, libc::UDP_GRO, 1, "UDP_GRO (Linux 5.0 is needed)")?;
        flag(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1, "time stamps")?;
        sys::set_buffer(fd, Buffer::Receive, RECEIVE_BUFFER_BYTES).map_err(failed("receive buffer"))?;
        sys::set_buffer(fd, Buffer::Send, send_buffer_bytes(facts.mtu)).map_err(failed("send buffer"))?;
        socket.set_reuse_port(share_port).map_err(failed("shared port"))?;
        let port = PORT_FIRST + shared.process;
        socket
            .bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())
            .map_err(failed("UDP port of this process (21110 for the first)"))?;
        Ok(UdpLink {
            shared,
            socket,
            facts,
            open: true,
            pool: FramePool::new(ETHERNET_BYTES + facts.mtu),
            sender: Sender::new(),
            receiver: Receiver::new(),
            stamps: Stamps::default(),
            check_at: clock::now() + CHECK_EVERY,
            changed: false,
            ring_full: 0,
            drops: Arc::default(),
        })
    }

    /// The name of the interface.
    pub fn interface(&self) -> &str {
        &self.shared.interface
    }

    /// True while the interface is there and frames can be sent.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Counters to read from other threads. `ring_full` and `truncated` are brought up to date once a second.
    pub fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    /// Asks what the interface is like, when it is time to.
    fn check(&mut self) {
        let now = clock::now();
        if now < self.check_at {
            return;
        }
        self.count_drops();
        let facts = look(&self.shared.interface, &self.socket);
        if let Some(facts) = facts
            && (facts != self.facts || !self.open)
        {
            let (interface, mtu) = (self.interface(), facts.mtu);
            log::info!("interface {interface} has the address {} now, for frames of {mtu} bytes", facts.ip);
            self.sender.forget();
            if self.facts.mtu < facts.mtu {
                self.pool = FramePool::new(ETHERNET_BYTES + facts.mtu);
            }
            self.changed |= facts != self.facts;
            self.facts = facts;
            self.drops.reopened.fetch_add(1, Ordering::Relaxed);
        } else if facts.is_none() && self.open {
            log::warn!(
                "interface {} went away or down; frames are refused until it is back",
                self.interface()
            );
        }
        self.open = facts.is_some();
        self.check_at = now + if self.open { CHECK_EVERY } else { LOOK_EVERY };
    }

    fn count_drops(&mut self) {
        let mut memory = [0; MEMINFO_WORDS];
        if sys::get_option(self.socket.as_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, &mut memory).is_ok() {
            let full = memory[MEMINFO_DROPS].wrapping_sub(self.ring_full);
            self.ring_full = memory[MEMINFO_DROPS];
            self.drops.ring_full.fetch_add(u64::from(full), Ordering::Relaxed);
        }
        self.drops.truncated.fetch_add(self.receiver.take_truncated(), Ordering::Relaxed);
    }

    /// Puts before a datagram the Ethernet header that it would have come with. `None` if it is not from one of us, or too long.
    fn write_header(&mut self, datagram: &receive::Datagram) -> Option<()> {
        let source = sender_of(datagram.from)?;
        let own = mac_of(self.facts.ip, self.shared.process);
        let frame = self.receiver.frame_mut(datagram);
        if frame.len() > ETHERNET_BYTES + self.facts.mtu {
            self.drops.truncated.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        frame[..6].copy_from_slice(&own.0);
        frame[6..12].copy_from_slice(&source.0);
        frame[12..ETHERNET_BYTES].copy_from_slice(&self.shared.ethertype.to_be_bytes());
        Some(())
    }
}

/// What the interface is like now; `None` if there is none of this name, or it is down or without an address, or its MTU is too small.
fn look(interface: &str, fd: impl AsFd) -> Option<Facts> {
    first_look(interface, &fd).ok()
}

/// The same, with what is wrong.
fn first_look(interface: &str, fd: &impl AsFd) -> Result<Facts, OpenError> {
    let (fd, name) = (fd.as_fd(), || interface.to_owned());
    let up = sys::interface_is_up(fd, interface)
        .map_err(|cause| OpenError::NoInterface { interface: name(), cause })?;
    if !up {
        return Err(OpenError::Down { interface: name() });
    }
    let ip = sys::interface_ipv4(fd, interface).map_err(|_| OpenError::NoAddress { interface: name() })?;
    let mtu =
        sys::interface_mtu(fd, interface).map_err(|cause| OpenError::kernel("MTU", interface, cause))?;
    if mtu < MTU_MIN + HEADER_BYTES {
        return Err(OpenError::mtu(interface, mtu, HEADER_BYTES));
    }
    Ok(Facts { ip, mtu: (mtu - HEADER_BYTES).min(PAYLOAD_MAX) })
}

/// Readable when a frame has come.
impl AsFd for UdpLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link for UdpLink {
    fn mtu(&self) -> usize {
        self.facts.mtu
    }

    fn address(&self) -> MacAddress {
        mac_of(self.facts.ip, self.shared.process)
    }

    /// Asks the kernel at most once: strangers who send faster than they are dropped here keep no worker from its turn.
    fn receive(&mut self) -> Option<Received<'_>> {
        if !self.receiver.has_more() {
            self.receiver.fill(self.socket.as_fd());
        }
        while let Some(datagram) = self.receiver.next() {
            if self.write_header(&datagram).is_some() {
                let arrival = self.stamps.instant(datagram.seconds, datagram.nanoseconds);
                return Some(Received { bytes: self.receiver.frame(&datagram), arrival });
            }
        }
        self.check();
        None
    }

    #[inline]
    fn frame(&mut self) -> Option<&mut TxFrame> {
        self.pool.next_free()
    }

    #[inline]
    fn commit(&mut self, id: FrameId) {
        self.pool.commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        if !self.open {
            return self.pool.refuse(refused, &self.drops);
        }
        let (fd, ip, everybody, sender) =
            (self.socket.as_fd(), self.facts.ip, &self.shared.everybody, &mut self.sender);
        let send = |frames: &[TxFrame]| sender.send(fd, ip, frames, everybody);
        if self.pool.flush(refused, &self.drops, send) {
            self.check_at = Instant(0);
        }
    }

    /// At once while datagrams wait here, of which the descriptor does not tell.
    fn poll_timeout(&self) -> Option<Instant> {
        Some(if self.receiver.has_more() { Instant(0) } else { self.check_at })
    }

    fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}
