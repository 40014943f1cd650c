//! AF_PACKET: the default link. One socket per worker; the workers of a process form a fan-out group, so that the kernel brings each frame to
//! one of them at a cost that does not depend on how many sessions there are.
//!
//! Received frames are read where the kernel put them, in a mapped ring; sent frames are gathered by `sendmmsg` from where they lie: one copy,
//! made by the kernel.
//!
//! An interface that goes away (and comes back with another index, address or MTU) does not end the link: frames are refused meanwhile. The
//! first worker to find it back opens the sockets of the whole group, in order, for a member's place in the group is its number; the others
//! take theirs at their next look.

mod program;
mod ring;
mod sys;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERNET_BYTES, MTU_MAX, MTU_MIN, MacAddress, Steer};
use socket2::{Domain, SockRef, Socket, Type};

use self::ring::Ring;
use self::sys::SendBatch;
use crate::clock::{self, WallClock};
use crate::frame::FramePool;
use crate::{FrameId, Link, Received, TxFrame};

/// Memory for frames that the kernel holds until the interface takes them: twice the largest congestion window.
const SEND_BUFFER_BYTES: usize = 8 << 20;
/// How often a lost interface is looked for.
const LOOK_EVERY: Nanos = Nanos::from_millis(50);
/// How often a socket on which nothing comes is asked for its pending error, which would wake its worker for ever.
const ERROR_EVERY: Nanos = Nanos::from_millis(10);
/// How often a link that seems well is asked whether its interface is still the one it was bound to.
const CHECK_EVERY: Nanos = Nanos::from_secs(1);

/// Why a link could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such interface.
    #[error("no interface named {interface}: {source}")]
    NoInterface {
        /// Its name.
        interface: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// Its MTU is outside what the protocol carries.
    #[error(
        "interface {interface} has MTU {mtu}; {MTU_MIN} to {MTU_MAX} is needed (ip link set {interface} mtu 9000)"
    )]
    Mtu {
        /// Its name.
        interface: String,
        /// Its MTU.
        mtu: usize,
    },
    /// It is down.
    #[error("interface {interface} is down (ip link set {interface} up)")]
    Down {
        /// Its name.
        interface: String,
    },
    /// 64 processes use the interface already.
    #[error("all {} process numbers of interface {interface} are taken", Steer::PROCESSES_MAX)]
    NoProcessNumber {
        /// Its name.
        interface: String,
    },
    /// The kernel refused a step.
    #[error("{step} on interface {interface}: {source}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The interface.
        interface: String,
        /// What the kernel says.
        source: io::Error,
    },
}

/// One worker's socket with its ring.
#[derive(Debug)]
struct Port {
    ring: Ring,
    socket: OwnedFd,
    interface_index: u32,
    address: MacAddress,
    mtu: usize,
}

/// What the workers of a process share: how to open the group, and new ports that wait to be taken.
#[derive(Debug)]
struct Group {
    interface: String,
    ethertype: u16,
    workers: u16,
    process: AtomicU32,
    /// Counts openings; a link whose own number is smaller has a port waiting.
    generation: AtomicU32,
    reopening: Mutex<Reopening>,
}

#[derive(Debug, Default)]
struct Reopening {
    /// The process number's claim: an abstract socket of this name.
    claim: Option<UnixDatagram>,
    waiting: Vec<Option<Port>>,
}

/// Frames that never reached a worker.
#[derive(Debug, Default)]
pub struct Drops {
    /// The ring was full.
    pub ring_full: AtomicU64,
    /// For another address (a bridge floods; the interface is promiscuous).
    pub other_host: AtomicU64,
    /// Times the interface was opened anew.
    pub reopened: AtomicU64,
}

/// The link of one worker.
#[derive(Debug)]
pub struct PacketLink {
    group: Arc<Group>,
    worker: u16,
    generation: u32,
    /// An epoll instance that holds the port's socket: one descriptor to wait for, whatever becomes of the port.
    readable: OwnedFd,
    port: Option<Port>,
    /// Kept when the port is lost.
    address: MacAddress,
    mtu: usize,
    pool: FramePool,
    batch: SendBatch,
    wall: WallClock,
    /// The clock at the last look; refreshed once per batch of frames.
    now: Instant,
    check_at: Instant,
    error_at: Instant,
    changed: bool,
    drops: Arc<Drops>,
}

/// Opens the links of a process's `workers` on `interface`. Returns the process number (0 to 63), which with a worker's index makes its
/// [`Steer`], and a link for each worker.
///
/// # Errors
/// [`OpenError`], in words for an operator.
pub fn open(interface: &str, ethertype: u16, workers: u16) -> Result<(u16, Vec<PacketLink>), OpenError> {
    assert!((1..=Steer::WORKERS_MAX).contains(&workers), "{workers} workers");
    let group = Arc::new(Group {
        interface: interface.to_owned(),
        ethertype,
        workers,
        process: AtomicU32::new(u32::MAX),
        generation: AtomicU32::new(0),
        reopening: Mutex::default(),
    });
    let mut reopening = group.reopening.lock().unwrap_or_else(PoisonError::into_inner);
    group.open_ports(&mut reopening)?;
    let ports = std::mem::take(&mut reopening.waiting);
    drop(reopening);
    let now = clock::now();
    let links = (0u16..)
        .zip(ports)
        .map(|(worker, port)| PacketLink::new(Arc::clone(&group), worker, port, now))
        .collect::<io::Result<Vec<_>>>()
        .map_err(group.failed("epoll"))?;
    Ok((group.process.load(Ordering::Relaxed) as u16, links))
}

impl Group {
    fn failed(&self, step: &'static str) -> impl FnOnce(io::Error) -> OpenError {
        let interface = self.interface.clone();
        move |source| OpenError::Kernel { step, interface, source }
    }

    /// Opens a port for every worker, in order, and leaves them in `waiting`.
    fn open_ports(&self, reopening: &mut Reopening) -> Result<(), OpenError> {
        let interface = || self.interface.clone();
        let index = sys::interface_index(&self.interface)
            .map_err(|source| OpenError::NoInterface { interface: interface(), source })?;
        let (process, claim) = self.claim_process(index)?;
        let generation = self.generation.load(Ordering::Relaxed);
        let ports = (0..16)
            .find_map(|attempt| {
                // Another group may have the number; the kernel then answers EINVAL, and the next one is tried.
                let group = process << 10 | (generation.wrapping_add(attempt) & 0x3ff) as u16;
                match (0..self.workers)
                    .map(|_| self.open_port(index, process, group))
                    .collect::<Result<Vec<_>, _>>()
                {
                    Err(OpenError::Kernel { step: FANOUT, source, .. })
                        if source.raw_os_error() == Some(libc::EINVAL) =>
                    {
                        None
                    }
                    other => Some(other),
                }
            })
            .unwrap_or_else(|| Err(self.failed(FANOUT)(io::Error::from_raw_os_error(libc::EINVAL))))?;
        reopening.claim = Some(claim);
        reopening.waiting = ports.into_iter().map(Some).collect();
        self.process.store(u32::from(process), Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Takes a process number on the interface: the first whose abstract socket can be bound; the one we had if there is one.
    fn claim_process(&self, index: u32) -> Result<(u16, UnixDatagram), OpenError> {
        let had = u16::try_from(self.process.load(Ordering::Relaxed)).ok();
        for number in had.into_iter().chain((0..Steer::PROCESSES_MAX).filter(|_| had.is_none())) {
            let name = format!("cirro-{index}-{number}");
            let address = SocketAddr::from_abstract_name(name).map_err(self.failed("process number"))?;
            match UnixDatagram::bind_addr(&address) {
                Ok(claim) => return Ok((number, claim)),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(self.failed("process number")(error)),
            }
        }
        Err(OpenError::NoProcessNumber { interface: self.interface.clone() })
    }

    fn open_port(&self, index: u32, process: u16, group: u16) -> Result<Port, OpenError> {
        let raw = Type::from(libc::SOCK_RAW).nonblocking().cloexec();
        // Protocol 0: nothing is received before the filter is there and the socket is bound.
        let socket = Socket::new(Domain::PACKET, raw, None)
            .map_err(self.failed("packet socket (CAP_NET_RAW is needed)"))?;
        let fd = socket.as_fd();
        if !sys::interface_is_up(fd, &self.interface).map_err(self.failed("flags"))? {
            return Err(OpenError::Down { interface: self.interface.clone() });
        }
        let mtu = sys::interface_mtu(fd, &self.interface).map_err(self.failed("MTU"))?;
        if !(MTU_MIN..=MTU_MAX).contains(&mtu) {
            return Err(OpenError::Mtu { interface: self.interface.clone(), mtu });
        }
        let address = sys::interface_address(fd, &self.interface).map_err(self.failed("address"))?;
        let mut filter = program::frames_of_process(process);
        sys::set_program(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &mut filter)
            .map_err(self.failed("socket filter"))?;
        let ring = Ring::new(fd, mtu).map_err(self.failed("receive ring"))?;
        // The forced size needs CAP_NET_ADMIN; without it the kernel's limit holds, and refused frames tell.
        let forced = sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &(SEND_BUFFER_BYTES as i32));
        if forced.is_err() {
            socket.set_send_buffer_size(SEND_BUFFER_BYTES).map_err(self.failed("send buffer"))?;
        }
        sys::bind(fd, index, self.ethertype).map_err(self.failed("bind"))?;
        let fanout = u32::from(group) | libc::PACKET_FANOUT_CBPF << 16;
        sys::set_option(fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &fanout).map_err(self.failed(FANOUT))?;
        sys::set_program(fd, libc::SOL_PACKET, libc::PACKET_FANOUT_DATA, &mut program::worker_of_frame())
            .map_err(self.failed("fan-out program"))?;
        Ok(Port { ring, interface_index: index, address, mtu, socket: OwnedFd::from(socket) })
    }
}

const FANOUT: &str = "fan-out group";

impl PacketLink {
    fn new(group: Arc<Group>, worker: u16, port: Option<Port>, now: Instant) -> io::Result<PacketLink> {
        let readable = crate::sys::epoll_create()?;
        if let Some(port) = &port {
            crate::sys::epoll_control(&readable, libc::EPOLL_CTL_ADD, port.socket.as_fd(), 0)?;
        }
        let generation = group.generation.load(Ordering::Acquire);
        let (address, mtu) =
            port.as_ref().map_or((MacAddress::default(), MTU_MIN), |port| (port.address, port.mtu));
        Ok(PacketLink {
            group,
            worker,
            generation,
            readable,
            port,
            address,
            mtu,
            pool: FramePool::new(ETHERNET_BYTES + MTU_MAX),
            batch: SendBatch::new(),
            wall: WallClock::default(),
            now,
            check_at: now + CHECK_EVERY,
            error_at: now,
            changed: false,
            drops: Arc::default(),
        })
    }

    /// What to wait for: the same as [`AsFd`].
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }

    /// The name of the interface.
    pub fn interface(&self) -> &str {
        &self.group.interface
    }

    /// Counters to read from other threads.
    pub fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    /// Once a second while all is well, twenty times a second while the interface is away: is the port still bound to the interface of this
    /// name? If not it is let go, and opened anew when the interface is there.
    fn check(&mut self) {
        if self.port.is_some() {
            self.check_at = self.now + CHECK_EVERY;
            self.count_ring_drops();
        } else {
            self.check_at = self.now + LOOK_EVERY;
        }
        if self.group.generation.load(Ordering::Acquire) != self.generation {
            self.take_port();
            return;
        }
        let index = sys::interface_index(&self.group.interface).ok();
        if let Some(port) = &self.port {
            let mtu = sys::interface_mtu(port.socket.as_fd(), &self.group.interface).ok();
            let address = sys::interface_address(port.socket.as_fd(), &self.group.interface).ok();
            if index == Some(port.interface_index) && mtu == Some(port.mtu) && address == Some(port.address) {
                return;
            }
            log::warn!(
                "interface {} went away or changed; frames are refused until it is back",
                self.group.interface
            );
            self.port = None;
            self.changed = true;
            self.check_at = self.now + LOOK_EVERY;
        }
        if index.is_some() {
            self.reopen();
        }
    }

    fn reopen(&mut self) {
        let group = Arc::clone(&self.group);
        // Somebody else is at it: its port is taken at the next look.
        let Ok(mut reopening) = group.reopening.try_lock() else { return };
        if group.generation.load(Ordering::Acquire) == self.generation {
            reopening.claim = None;
            if let Err(error) = group.open_ports(&mut reopening) {
                log::debug!("{error}");
                return;
            }
            log::info!("interface {} is back", group.interface);
        }
        drop(reopening);
        self.take_port();
    }

    fn take_port(&mut self) {
        let Ok(mut reopening) = self.group.reopening.try_lock() else { return };
        self.generation = self.group.generation.load(Ordering::Acquire);
        self.port = reopening.waiting.get_mut(usize::from(self.worker)).and_then(Option::take);
        if let Some(port) = &self.port {
            (self.address, self.mtu) = (port.address, port.mtu);
            if let Err(error) =
                crate::sys::epoll_control(&self.readable, libc::EPOLL_CTL_ADD, port.socket.as_fd(), 0)
            {
                log::error!("interface {}: cannot wait for frames: {error}", self.group.interface);
            }
        }
        self.changed = true;
        self.drops.reopened.fetch_add(1, Ordering::Relaxed);
    }

    fn count_ring_drops(&self) {
        if let Some(Ok((_, dropped))) = self.port.as_ref().map(|port| sys::statistics(port.socket.as_fd())) {
            self.drops.ring_full.fetch_add(u64::from(dropped), Ordering::Relaxed);
        }
    }

    fn found_nothing(&mut self) {
        self.now = clock::now();
        if self.error_at <= self.now {
            self.error_at = self.now + ERROR_EVERY;
            let pending =
                self.port.as_ref().and_then(|port| SockRef::from(&port.socket).take_error().ok().flatten());
            if let Some(error) = pending {
                log::debug!("{}: {error}", self.group.interface);
                self.suspect();
            }
        }
    }

    /// After an error on the socket: the kernel reports a pending one once, and what it means is found by looking at the interface.
    fn suspect(&mut self) {
        self.check_at = self.check_at.min(self.now + LOOK_EVERY);
    }
}

/// Readable when a frame has come. Stays the same descriptor when the interface goes and comes back.
impl AsFd for PacketLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }
}

impl Link for PacketLink {
    fn mtu(&self) -> usize {
        self.mtu
    }

    fn address(&self) -> MacAddress {
        self.address
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        if self.check_at <= self.now {
            self.check();
        }
        let port = self.port.as_mut()?;
        let slot = loop {
            let Some(slot) = port.ring.take() else {
                self.found_nothing();
                return None;
            };
            if slot.packet_type == libc::PACKET_HOST || slot.packet_type == libc::PACKET_BROADCAST {
                break slot;
            }
            self.drops.other_host.fetch_add(1, Ordering::Relaxed);
        };
        let mut arrival = self.wall.instant(self.now, slot.seconds, slot.nanoseconds);
        if arrival == self.now {
            // It came after the last look at the clock.
            self.now = clock::now();
            arrival = self.wall.instant(self.now, slot.seconds, slot.nanoseconds);
        }
        let port = self.port.as_ref()?;
        Some(Received { bytes: port.ring.bytes(slot), arrival })
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        self.pool.next_free()
    }

    fn commit(&mut self, id: FrameId) {
        self.pool.commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        let mut done = 0;
        while let Some(rest) = self.pool.queued().get(done..).filter(|rest| !rest.is_empty()) {
            let Some(port) = &self.port else {
                refused.extend(rest.iter().map(TxFrame::id));
                break;
            };
            match self.batch.send(port.socket.as_fd(), rest) {
                Ok(sent) => done += sent.max(1),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // This frame alone does not fit (the MTU has just shrunk): the others may.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    refused.push(rest[0].id());
                    done += 1;
                }
                Err(error) => {
                    log::trace!("{}: {} frames refused: {error}", self.group.interface, rest.len());
                    refused.extend(rest.iter().map(TxFrame::id));
                    self.suspect();
                    break;
                }
            }
        }
        self.pool.clear();
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.check_at)
    }

    fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}
