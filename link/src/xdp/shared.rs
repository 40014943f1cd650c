//! What the workers of a process share: the interface's name, its process numbers, and the program with its map of sockets, which is attached
//! anew to an interface that came back.
//!
//! Knows how a program comes to an interface; does not know frames. Shared by the process's `XdpLink`s, which come here when they start and when
//! they have lost the interface; never per frame.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cirro_protocol::types::{MTU_MAX, MTU_MIN, Steer};

use super::port::Port;
use super::program::frames_of;
use super::sys::{self, Place};
use crate::OpenError;
use crate::claim::claim;
use crate::facts::Facts;
use crate::sys as kernel;

/// Tries that find what was left by ourselves, before that is worth a word.
const LEFTOVER_TRIES: u32 = 8;

/// The part of the workers that is common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) interface: String,
    copy: bool,
    /// For questions about the interface, in the network namespace in which the link was opened.
    control: UnixDatagram,
    /// What a worker without a socket waits for: it never becomes readable.
    nowhere: OwnedFd,
    map: OwnedFd,
    program: OwnedFd,
    /// Somebody has said that the interface is lost.
    lost: AtomicBool,
    failures: AtomicU32,
    attached: Mutex<Attached>,
}

#[derive(Debug)]
struct Attached {
    claim: Option<Claim>,
    /// The program at the interface of this index, until it is closed.
    link: Option<(u32, OwnedFd)>,
    /// Counts attachments.
    generation: u32,
}

/// Every process number of an interface: AF_XDP takes all frames, so nobody else is to have one.
#[derive(Debug)]
struct Claim {
    index: u32,
    _held: Vec<UnixDatagram>,
}

impl Shared {
    /// Loads the program for frames of `ethertype`. With `copy` drivers are not asked to use our memory themselves.
    pub(super) fn new(
        interface: &str,
        ethertype: u16,
        workers: u16,
        copy: bool,
    ) -> Result<Shared, OpenError> {
        let failed = |step| move |cause| OpenError::kernel(step, interface, cause);
        let control = UnixDatagram::unbound().map_err(failed("unix socket"))?;
        kernel::interface_index(control.as_fd(), interface)
            .map_err(|cause| OpenError::NoInterface { interface: interface.to_owned(), cause })?;
        if let Some(queues) = sys::receive_queues(control.as_fd(), interface) {
            if queues < workers.into() {
                return Err(OpenError::Queues { interface: interface.to_owned(), queues, workers });
            }
            if queues > workers.into() {
                log::warn!(
                    "interface {interface} has {queues} receive queues for {workers} workers: frames that the card brings to another queue \
                     are lost (ethtool -L {interface} combined {workers})"
                );
            }
        }
        let needs = "XDP program (CAP_BPF and CAP_NET_ADMIN are needed, and Linux 5.18)";
        let map = sys::new_socket_map(workers.into()).map_err(failed(needs))?;
        let program = sys::load(&frames_of(ethertype, map.as_raw_fd())).map_err(failed(needs))?;
        Ok(Shared {
            interface: interface.to_owned(),
            copy,
            control,
            nowhere: kernel::epoll_create().map_err(failed("epoll"))?,
            map,
            program,
            lost: AtomicBool::new(false),
            failures: AtomicU32::new(0),
            attached: Mutex::new(Attached { claim: None, link: None, generation: 0 }),
        })
    }

    /// What the interface is like now; `None` if there is none of this name or it is down.
    pub(super) fn look(&self) -> Option<Facts> {
        Facts::look(&self.control, &self.interface)
    }

    pub(super) fn nowhere(&self) -> BorrowedFd<'_> {
        self.nowhere.as_fd()
    }

    /// Opens the port of `worker`, whose last one was made with attachment `generation` (0: it had none): attaches the program if nobody else has
    /// done so since. Returns the attachment that the port is made with, too.
    pub(super) fn open_port(&self, worker: u16, generation: u32) -> Result<(u32, Facts, Port), OpenError> {
        let facts = self.look().ok_or_else(|| OpenError::Down { interface: self.interface.clone() })?;
        if !(MTU_MIN..=MTU_MAX).contains(&facts.mtu) {
            return Err(OpenError::mtu(&self.interface, facts.mtu, 0));
        }
        let generation = self.attach(facts.index, generation)?;
        let failed = |(step, cause)| OpenError::kernel(step, &self.interface, cause);
        let port = Port::open(facts, worker.into(), self.copy).map_err(failed)?;
        sys::enter_socket(&self.map, worker.into(), port.as_fd())
            .map_err(|cause| failed(("socket map", cause)))?;
        Ok((generation, facts, port))
    }

    fn attach(&self, index: u32, generation: u32) -> Result<u32, OpenError> {
        let mut attached = self.lock();
        self.claim(&mut attached, index)?;
        let current = attached.link.as_ref().is_some_and(|(at, _)| *at == index);
        if current && attached.generation != generation {
            return Ok(attached.generation);
        }
        attached.link = None;
        let native = sys::attach(&self.program, index, Place::Driver);
        let place = if native.is_ok() { Place::Driver } else { Place::Generic };
        let link = match native {
            // Somebody is there; the other place would be refused or shared.
            Err(error) if is_busy(&error) => Err(error),
            Err(_) => sys::attach(&self.program, index, Place::Generic),
            Ok(link) => Ok(link),
        };
        let link = link.map_err(|cause| {
            let interface = self.interface.clone();
            if is_busy(&cause) {
                OpenError::Programmed { interface }
            } else {
                OpenError::kernel("attaching the XDP program", &interface, cause)
            }
        })?;
        if place == Place::Generic {
            log::warn!(
                "interface {}: its driver runs no XDP program for frames of this size, so the stack does (slower)",
                self.interface
            );
        }
        attached.link = Some((index, link));
        attached.generation += 1;
        Ok(attached.generation)
    }

    /// Takes all process numbers of the interface with this index, once.
    fn claim(&self, attached: &mut Attached, index: u32) -> Result<(), OpenError> {
        if attached.claim.as_ref().is_some_and(|claim| claim.index == index) {
            return Ok(());
        }
        let held = (0..Steer::PROCESSES_MAX).map(|process| claim(&index.to_string(), process..process + 1));
        let held: Vec<_> = held
            .collect::<io::Result<_>>()
            .map_err(|cause| OpenError::kernel("process number", &self.interface, cause))?;
        let all = held.into_iter().map(|taken| taken.map(|(_, held)| held)).collect::<Option<_>>();
        let all = all.ok_or_else(|| OpenError::Shared { interface: self.interface.clone() })?;
        attached.claim = Some(Claim { index, _held: all });
        Ok(())
    }

    /// Says once that the interface is lost, whoever notices first.
    pub(super) fn say_lost(&self, why: &str) {
        if !self.lost.swap(true, Ordering::Relaxed) {
            log::warn!("interface {} {why}; frames are refused until it is back", self.interface);
        }
    }

    /// Says once that it is there again.
    pub(super) fn say_open(&self) {
        self.failures.store(0, Ordering::Relaxed);
        if self.lost.swap(false, Ordering::Relaxed) {
            log::info!("interface {} is open again", self.interface);
        }
    }

    /// Says what keeps it from being opened, a lasting failure less and less often. That it is not there is no news, nor that the kernel has not let
    /// go of our last socket yet.
    pub(super) fn say_failed(&self, error: &OpenError) {
        if matches!(error, OpenError::NoInterface { .. } | OpenError::Down { .. }) {
            return;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        let passes = may_pass(error) && failures < LEFTOVER_TRIES;
        if failures.is_power_of_two() && !passes {
            log::warn!("{error} (try {failures})");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Attached> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// True if somebody else has the place: another program, or a socket on the queue.
fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// True if opening may succeed a moment later: what a process had that just ended is let go of by the kernel in its own time.
pub(super) fn may_pass(error: &OpenError) -> bool {
    let busy = matches!(error, OpenError::Kernel { cause, .. } if is_busy(cause));
    busy || matches!(error, OpenError::Programmed { .. })
}
