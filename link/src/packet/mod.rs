//! AF_PACKET: the default link. One socket per worker; the workers of a process form a fan-out group, so that the kernel brings each frame to
//! one of them at a cost that does not depend on how many sessions there are.
//!
//! Received frames are read where the kernel put them, in a mapped ring; sent frames are gathered by `sendmmsg` from where they lie: one copy,
//! made by the kernel. Knows interfaces, sockets and errors of sending; of a frame's content only the two bytes that pick a worker.

mod group;
mod ring;
mod sys;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress};
use socket2::SockRef;

use self::group::{Group, LOOK_EVERY, Port};
use self::sys::SendBatch;
use crate::clock::{self, KernelClocks, Stamps};
use crate::facts::Facts;
use crate::frame::{FramePool, Refusal, means_lost};
use crate::{Drops, FrameId, Link, OpenError, Received, TxFrame};

/// How often a socket on which nothing comes is asked for its pending error, which wakes its worker until somebody has asked. The question
/// costs a spinning worker a system call of about 0.15 µs each time, less than 1 % of this.
const ERROR_EVERY: Nanos = Nanos::from_micros(20);
/// How often a link that seems well is asked whether its interface is still the one it was bound to.
const CHECK_EVERY: Nanos = Nanos::from_secs(1);
/// Workers of one process: what a fan-out group takes (PACKET_FANOUT_MAX of kernels before 5.10).
pub const WORKERS_MAX: u16 = 256;

/// The link of one worker.
///
/// **An interface that goes away** (removed, renamed, or down) does not end the link: frames are refused meanwhile, and it is looked for 20
/// times a second. A worker that is alone binds its socket again. Of several, the first to find it opens the sockets of the whole group, in
/// order, for a member's place in the group is its number; the others take theirs at their next look, and one that sleeps is woken by the
/// first frame on its new socket. Somebody must call [`Link::receive`] at [`Link::poll_timeout`] for all this.
///
/// **What may be different afterwards** ([`Link::take_changed`] says so once): the address and the MTU, which are looked at once a second
/// also while all is well. Frames from a new address belong to no session that peers know, so sessions end with it and are made anew. The
/// process number stays.
///
/// A thread that calls [`Link::receive`] while the interface is lost is in the network namespace in which the group was opened, for new
/// sockets are of its namespace, and may open packet sockets (CAP_NET_RAW). Both only if there are several workers.
#[derive(Debug)]
pub struct PacketLink {
    group: Arc<Group>,
    worker: u16,
    generation: u32,
    port: Option<Port>,
    /// What the port was opened for; kept while it is lost.
    facts: Facts,
    pool: FramePool,
    batch: SendBatch,
    stamps: Stamps<KernelClocks>,
    check_at: Instant,
    error_at: Instant,
    changed: bool,
    drops: Arc<Drops>,
}

/// Opens the links of a process's `workers` on `interface`. Returns the process number (0 to 63), which with a worker's index makes its
/// [`Steer`](cirro_protocol::types::Steer), and a link for each worker. The number is held while a link of the group lives.
///
/// # Errors
/// [`OpenError`], in words for an operator.
///
/// # Panics
/// If `workers` is 0 or more than [`WORKERS_MAX`].
pub fn open(interface: &str, ethertype: u16, workers: u16) -> Result<(u16, Vec<PacketLink>), OpenError> {
    open_on(interface, ethertype, workers, None)
}

/// The same on a packet socket that is there, for one worker: with it nothing needs CAP_NET_RAW. The interface is of the socket's network
/// namespace.
pub(crate) fn open_on(
    interface: &str,
    ethertype: u16,
    workers: u16,
    given: Option<OwnedFd>,
) -> Result<(u16, Vec<PacketLink>), OpenError> {
    assert!((1..=WORKERS_MAX).contains(&workers), "{workers} workers");
    let (group, process) = Group::open(interface, ethertype, workers, given)?;
    let group = Arc::new(group);
    let links = (0..workers).map(|worker| PacketLink::new(Arc::clone(&group), worker)).collect();
    Ok((process, links))
}

impl PacketLink {
    fn new(group: Arc<Group>, worker: u16) -> PacketLink {
        let (generation, port) = group.take_port(worker).expect("nobody else has the group yet");
        let facts = port.as_ref().expect("each worker has a port").facts;
        let now = clock::now();
        PacketLink {
            group,
            worker,
            generation,
            port,
            facts,
            pool: FramePool::new(ETHERNET_BYTES + facts.mtu),
            batch: SendBatch::new(),
            stamps: Stamps::default(),
            check_at: now + CHECK_EVERY,
            error_at: now,
            changed: false,
            drops: Arc::default(),
        }
    }

    /// The name of the interface.
    pub fn interface(&self) -> &str {
        &self.group.interface
    }

    /// True while the interface is there and frames can be sent.
    pub fn is_open(&self) -> bool {
        self.port.is_some()
    }

    /// Counters to read from other threads. `ring_full` and `truncated` are brought up to date once a second.
    pub fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    /// What there is to do when no frame is there: see whether there is a new port, whether the socket has an error, and now and then
    /// whether the interface is still the same.
    fn look_around(&mut self) {
        if self.group.generation() != self.generation {
            self.take_port();
        }
        let now = clock::now();
        if self.error_at <= now {
            self.error_at = now + ERROR_EVERY;
            self.take_error();
        }
        if self.check_at <= now {
            self.check(now);
        }
    }

    /// The kernel reports an error of the socket once, to whoever asks first: here, or a send.
    fn take_error(&mut self) {
        let Some(port) = &self.port else { return };
        match SockRef::from(&port.socket).take_error() {
            Ok(Some(error)) | Err(error) if means_lost(&error) => self.lose("went away or down"),
            Ok(Some(error)) | Err(error) => log::debug!("interface {}: {error}", self.group.interface),
            Ok(None) => {}
        }
    }

    fn check(&mut self, now: Instant) {
        if let Some(port) = &mut self.port {
            self.check_at = now + CHECK_EVERY;
            let ring_full = sys::ring_drops(port.socket.as_fd()).unwrap_or(0);
            self.drops.ring_full.fetch_add(u64::from(ring_full), Ordering::Relaxed);
            self.drops.truncated.fetch_add(port.ring.take_truncated(), Ordering::Relaxed);
            if self.group.look(&port.socket) == Some(port.facts) {
                return;
            }
            self.lose("went away or changed");
        }
        self.check_at = now + LOOK_EVERY;
        self.group.reopen(now, self.generation);
        if self.group.generation() != self.generation {
            self.take_port();
        }
    }

    /// Lets the port go. The interface is looked for at once, and then as often as is allowed.
    fn lose(&mut self, why: &str) {
        self.group.say_lost(why);
        self.port = None;
        self.check_at = Instant(0);
    }

    fn take_port(&mut self) {
        let Some((generation, port)) = self.group.take_port(self.worker) else { return };
        self.generation = generation;
        self.port = port;
        let Some(port) = &self.port else { return };
        if self.facts.mtu < port.facts.mtu {
            self.pool = FramePool::new(ETHERNET_BYTES + port.facts.mtu);
        }
        self.facts = port.facts;
        self.changed = true;
        self.check_at = clock::now() + CHECK_EVERY;
        self.drops.reopened.fetch_add(1, Ordering::Relaxed);
    }
}

/// Readable when a frame has come. Another descriptor when the interface goes and comes back: ask for it before each wait.
impl AsFd for PacketLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let waiting = || self.group.readable(self.worker).as_fd();
        self.port.as_ref().map_or_else(waiting, |port| port.socket.as_fd())
    }
}

impl Link for PacketLink {
    fn mtu(&self) -> usize {
        self.facts.mtu
    }

    fn address(&self) -> MacAddress {
        self.facts.address
    }

    #[inline]
    fn receive(&mut self) -> Option<Received<'_>> {
        let Some(slot) = self.port.as_mut().and_then(|port| port.ring.take()) else {
            self.look_around();
            return None;
        };
        let arrival = self.stamps.instant(slot.seconds, slot.nanoseconds);
        let port = self.port.as_ref()?;
        Some(Received { bytes: port.ring.bytes(slot), arrival })
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
        let Some(port) = &self.port else { return self.pool.refuse(refused, &self.drops) };
        let (fd, batch) = (port.socket.as_fd(), &mut self.batch);
        let send = |frames: &[TxFrame]| batch.send(fd, frames).map_err(|error| Refusal { frames: 1, error });
        if self.pool.flush(refused, &self.drops, send) {
            self.lose("went away or down");
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.check_at)
    }

    fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}
