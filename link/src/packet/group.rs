//! The workers of one process on one interface: their process number, and the ports (socket and ring) that are opened for all of them
//! together, because a member's place in a fan-out group is the order in which it joined.
//!
//! Knows how an interface is opened; does not know frames. Shared by the process's `PacketLink`s, which come here when they start, when they
//! seem to have lost the interface, and when somebody else has opened it again; never per frame.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{MTU_MAX, MTU_MIN, Steer};
use socket2::{Domain, SockRef, Socket, Type};

use super::ring::Ring;
use super::sys;
use crate::OpenError;
use crate::claim::claim;
use crate::facts::Facts;
use crate::frame::send_buffer_bytes;
use crate::program;
use crate::sys::{self as kernel, Buffer, epoll_control, epoll_create};

/// How often a lost interface is looked for, by all workers together.
pub(super) const LOOK_EVERY: Nanos = Nanos::from_millis(50);
/// One worker's socket with its ring, and what the interface was like when it was opened.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) ring: Ring,
    pub(super) socket: Arc<OwnedFd>,
    pub(super) facts: Facts,
}

/// What the workers of a process share.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) interface: String,
    ethertype: u16,
    workers: u16,
    /// The socket of a worker that is alone, for life: it can be bound again, for which no privilege is needed. A member of a fan-out group
    /// cannot (packet(7), EINVAL), so several workers get new ones.
    kept: Option<Arc<OwnedFd>>,
    /// Counts openings; a link whose own number is another one has a port waiting.
    generation: AtomicU32,
    /// Somebody has said that the interface is lost.
    lost: AtomicBool,
    /// For each worker an epoll instance that holds the socket of its port until the worker takes it: what a worker without a port waits for.
    readable: Vec<OwnedFd>,
    opening: Mutex<Opening>,
}

#[derive(Debug)]
struct Opening {
    claim: Option<Claim>,
    waiting: Vec<Option<Port>>,
    look_at: Instant,
    failures: u32,
}

/// A packet socket that receives nothing (protocol 0) before the filter is there and it is bound.
fn new_socket(interface: &str) -> Result<Arc<OwnedFd>, OpenError> {
    let raw = Type::from(libc::SOCK_RAW).nonblocking().cloexec();
    let socket = Socket::new(Domain::PACKET, raw, None);
    let failed = |cause| OpenError::kernel("packet socket (CAP_NET_RAW is needed)", interface, cause);
    socket.map(OwnedFd::from).map(Arc::new).map_err(failed)
}

/// A process number, held by an abstract socket of the network namespace.
#[derive(Debug)]
struct Claim {
    index: u32,
    process: u16,
    _held: UnixDatagram,
}

impl Group {
    /// A group with its ports open and waiting, and its process number.
    pub(super) fn open(
        interface: &str,
        ethertype: u16,
        workers: u16,
        given: Option<OwnedFd>,
    ) -> Result<(Group, u16), OpenError> {
        let failed = |cause| OpenError::kernel("epoll", interface, cause);
        let given = given.map(Arc::new);
        let kept = match given {
            None if workers == 1 => Some(new_socket(interface)?),
            given => given,
        };
        let group = Group {
            interface: interface.to_owned(),
            ethertype,
            workers,
            kept,
            generation: AtomicU32::new(0),
            lost: AtomicBool::new(false),
            readable: (0..workers).map(|_| epoll_create()).collect::<Result<_, _>>().map_err(failed)?,
            opening: Mutex::new(Opening {
                claim: None,
                waiting: Vec::new(),
                look_at: Instant(0),
                failures: 0,
            }),
        };
        let process = group.open_ports(&mut group.lock())?;
        Ok((group, process))
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn readable(&self, worker: u16) -> &OwnedFd {
        &self.readable[usize::from(worker)]
    }

    /// The port that waits for `worker`, and the generation it is of. `None` while somebody opens them: ask again.
    pub(super) fn take_port(&self, worker: u16) -> Option<(u32, Option<Port>)> {
        let mut opening = self.try_lock()?;
        let port = opening.waiting.get_mut(usize::from(worker)).and_then(Option::take);
        if let Some(port) = &port {
            // A socket that stays in an epoll instance costs its sender a wake-up call per frame. If it cannot be taken out it only costs that.
            let _ = epoll_control(self.readable(worker), libc::EPOLL_CTL_DEL, port.socket.as_fd(), 0);
        }
        Some((self.generation(), port))
    }

    /// What the interface is like now; `None` if there is none of this name or it is down.
    pub(super) fn look(&self, fd: impl AsFd) -> Option<Facts> {
        Facts::look(fd, &self.interface)
    }

    /// Says once that the interface is lost, whoever notices first.
    pub(super) fn say_lost(&self, why: &str) {
        if !self.lost.swap(true, Ordering::Relaxed) {
            log::warn!("interface {} {why}; frames are refused until it is back", self.interface);
        }
    }

    /// Opens the ports of all workers anew, at most once in [`LOOK_EVERY`] and unless somebody has done so since `generation`. Errors are
    /// tried again at the next call: the interface is not there, or not up.
    pub(super) fn reopen(&self, now: Instant, generation: u32) {
        let Some(mut opening) = self.try_lock() else { return };
        if self.generation() != generation || now < opening.look_at {
            return;
        }
        opening.look_at = now + LOOK_EVERY;
        match self.open_ports(&mut opening) {
            Ok(_) => {
                opening.failures = 0;
                self.lost.store(false, Ordering::Relaxed);
                log::info!("interface {} is open again", self.interface);
            }
            Err(OpenError::NoInterface { .. } | OpenError::Down { .. }) => {}
            Err(error) => {
                // 2^n: a lasting failure is said less and less often.
                opening.failures += 1;
                if opening.failures.is_power_of_two() {
                    log::warn!("{error} (try {})", opening.failures);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Opening> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Opening>> {
        match self.opening.try_lock() {
            Ok(opening) => Some(opening),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(io::Error) -> OpenError {
        move |cause| OpenError::kernel(step, &self.interface, cause)
    }

    /// Opens a port for every worker, in order, and leaves them waiting. A worker that sleeps is woken by the first frame on its new port.
    fn open_ports(&self, opening: &mut Opening) -> Result<u16, OpenError> {
        let asked = self.socket()?;
        let index = kernel::interface_index(asked.as_fd(), &self.interface)
            .map_err(|cause| OpenError::NoInterface { interface: self.interface.clone(), cause })?;
        let process = self.claim_process(opening, index)?;
        let mut ports = Vec::with_capacity(usize::from(self.workers));
        let mut group = None;
        for worker in 0..self.workers {
            ports.push(self.open_port(Steer::new(process, worker), &mut group)?);
        }
        for (port, readable) in ports.iter().zip(&self.readable) {
            epoll_control(readable, libc::EPOLL_CTL_ADD, port.socket.as_fd(), 0)
                .map_err(self.failed("epoll"))?;
        }
        opening.waiting = ports.into_iter().map(Some).collect();
        self.generation.fetch_add(1, Ordering::Release);
        Ok(process)
    }

    /// Takes a process number on the interface: the first whose abstract socket can be bound. Once taken it is kept for life, for it is part
    /// of what peers have been told; on an interface that came back under another index the same one is taken.
    fn claim_process(&self, opening: &mut Opening, index: u32) -> Result<u16, OpenError> {
        let candidates = match &opening.claim {
            Some(claim) if claim.index == index => return Ok(claim.process),
            Some(claim) => claim.process..claim.process + 1,
            None => 0..Steer::PROCESSES_MAX,
        };
        let taken = claim(&index.to_string(), candidates).map_err(self.failed("process number"))?;
        let Some((process, held)) = taken else {
            return Err(OpenError::NoProcessNumber {
                interface: self.interface.clone(),
                most: Steer::PROCESSES_MAX,
            });
        };
        opening.claim = Some(Claim { index, process, _held: held });
        Ok(process)
    }

    fn socket(&self) -> Result<Arc<OwnedFd>, OpenError> {
        self.kept.as_ref().map_or_else(|| new_socket(&self.interface), |kept| Ok(Arc::clone(kept)))
    }

    /// Opens one port and joins it to `group`, which the first makes.
    fn open_port(&self, steer: Steer, group: &mut Option<u16>) -> Result<Port, OpenError> {
        let socket = self.socket()?;
        let fd = socket.as_fd();
        let facts = self.look(fd).ok_or_else(|| OpenError::Down { interface: self.interface.clone() })?;
        if !(MTU_MIN..=MTU_MAX).contains(&facts.mtu) {
            return Err(OpenError::mtu(&self.interface, facts.mtu, 0));
        }
        kernel::set_program(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &mut program::frames_for(steer))
            .map_err(self.failed("socket filter"))?;
        let ring = Ring::new(fd, facts.mtu).map_err(self.failed("receive ring"))?;
        kernel::set_buffer(fd, Buffer::Send, send_buffer_bytes(facts.mtu))
            .map_err(self.failed("send buffer"))?;
        // What a kept socket still has to say is of the interface as it was.
        let _ = SockRef::from(&fd).take_error();
        sys::bind(fd, facts.index, self.ethertype).map_err(self.failed("bind"))?;
        self.join(fd, group)?;
        Ok(Port { ring, facts, socket })
    }

    /// Joins the fan-out group: the first member has the kernel pick an unused number for it, and gives it its program.
    fn join(&self, fd: BorrowedFd<'_>, group: &mut Option<u16>) -> Result<(), OpenError> {
        if self.workers == 1 {
            return Ok(());
        }
        let kind = libc::PACKET_FANOUT_CBPF << 16;
        let argument = match *group {
            Some(number) => u32::from(number) | kind,
            None => kind | (libc::PACKET_FANOUT_FLAG_UNIQUEID << 16),
        };
        kernel::set_option(fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &argument)
            .map_err(self.failed("fan-out group"))?;
        if group.is_none() {
            let number = sys::fanout(fd).map_err(self.failed("fan-out group"))? & 0xffff;
            *group = Some(number as u16);
            kernel::set_program(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_FANOUT_DATA,
                &mut program::worker_of_frame(),
            )
            .map_err(self.failed("fan-out program"))?;
        }
        Ok(())
    }
}
