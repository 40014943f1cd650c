//! AF_XDP: a link for network cards whose drivers hand frames over before the kernel makes anything of them. One socket per worker, on the queue of
//! the worker's number; a small program picks our frames out, and the rest of the traffic goes its way.
//!
//! Received frames are read where the kernel or the card put them, unless they came in several parts; sent frames are copied into memory that is
//! shared with the kernel. Knows interfaces, sockets and programs; of a frame's content only to whom it is and the two bytes that pick a worker.

mod port;
mod program;
mod ring;
mod shared;
mod sys;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress, Steer};
use cirro_protocol::wire::header::VT_LONG;

use self::port::Port;
use self::shared::{Shared, may_pass};
use crate::clock;
use crate::facts::Facts;
use crate::frame::{FramePool, TxFrame};
use crate::packet::WORKERS_MAX;
use crate::{Drops, FrameId, Link, OpenError, Received};

/// How often a link that seems well asks whether its interface is still the one it was bound to: the kernel tells an AF_XDP socket nothing of an
/// interface that goes down, and does not wake who waits on one whose interface is gone.
const CHECK_EVERY: Nanos = Nanos::from_millis(100);
/// How often a lost interface is looked for.
const LOOK_EVERY: Nanos = Nanos::from_millis(50);
/// When frames that the interface had no room for are tried again, if nobody flushes before.
const SEND_AGAIN: Nanos = Nanos::from_millis(1);
/// Frames that are not for this worker and are passed over in one call: who floods us with them keeps no worker from its turn.
const STRANGERS_MAX: usize = 64;
/// How long opening waits for what a process that just ended leaves in the kernel.
const PATIENCE: Nanos = Nanos::from_secs(1);

/// The link of one worker.
///
/// **An interface that goes away** (removed, renamed, or down) does not end the link: frames are refused meanwhile, and it is looked for 20
/// times a second. Each worker opens a new socket; the first to find the interface attaches the program anew. Somebody must call
/// [`Link::receive`] at [`Link::poll_timeout`] for all this.
///
/// **What may be different afterwards** ([`Link::take_changed`] says so once): the address and the MTU.
///
/// A thread that calls [`Link::receive`] while the interface is lost is in the network namespace in which the link was opened, may open sockets
/// (CAP_NET_RAW) and have them use memory that is not moved (CAP_IPC_LOCK, or a limit), and may call bpf(2) for two things: to put a socket into a
/// map that it has, and to attach a program that it has.
#[derive(Debug)]
pub struct XdpLink {
    shared: Arc<Shared>,
    worker: u16,
    generation: u32,
    port: Option<Port>,
    /// What the port was opened for; kept while it is lost.
    facts: Facts,
    pool: FramePool,
    arrivals: Arrivals,
    check_at: Instant,
    send_at: Option<Instant>,
    changed: bool,
    drops: Arc<Drops>,
}

/// Opens the links of a process's `workers` on the first queues of `interface`. With `copy` the driver is not asked to use our memory itself.
/// Returns the process number, which is 0, for the process has the interface to itself while one of the links lives.
///
/// # Errors
/// [`OpenError`], in words for an operator.
///
/// # Panics
/// If `workers` is 0 or more than [`WORKERS_MAX`].
pub fn open(
    interface: &str,
    ethertype: u16,
    workers: u16,
    copy: bool,
) -> Result<(u16, Vec<XdpLink>), OpenError> {
    assert!((1..=WORKERS_MAX).contains(&workers), "{workers} workers");
    let shared = Arc::new(Shared::new(interface, ethertype, workers, copy)?);
    let links = (0..workers).map(|worker| XdpLink::open(Arc::clone(&shared), worker));
    Ok((0, links.collect::<Result<_, _>>()?))
}

impl XdpLink {
    fn open(shared: Arc<Shared>, worker: u16) -> Result<XdpLink, OpenError> {
        let until = clock::now() + PATIENCE;
        let (generation, facts, port) = loop {
            match shared.open_port(worker, 0) {
                Err(error) if may_pass(&error) && clock::now() < until => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                other => break other?,
            }
        };
        let mode = if port.is_zero_copy() { "zero-copy" } else { "copy" };
        log::info!("interface {}: AF_XDP on queue {worker} in {mode} mode", shared.interface);
        Ok(XdpLink {
            shared,
            worker,
            generation,
            port: Some(port),
            facts,
            pool: FramePool::new(ETHERNET_BYTES + facts.mtu),
            arrivals: Arrivals::default(),
            check_at: clock::now() + CHECK_EVERY,
            send_at: None,
            changed: false,
            drops: Arc::default(),
        })
    }

    /// The name of the interface.
    pub fn interface(&self) -> &str {
        &self.shared.interface
    }

    /// True while the interface is there and frames can be sent.
    pub fn is_open(&self) -> bool {
        self.port.is_some()
    }

    /// Counters to read from other threads. `ring_full` is brought up to date ten times a second.
    pub fn drops(&self) -> Arc<Drops> {
        Arc::clone(&self.drops)
    }

    /// Sees whether the interface is still the same, or there again, when it is time to.
    fn check(&mut self) {
        let now = clock::now();
        if now < self.check_at {
            return;
        }
        if let Some(port) = &mut self.port {
            self.check_at = now + CHECK_EVERY;
            self.drops.ring_full.fetch_add(port.take_dropped(), Ordering::Relaxed);
            if port.take_error().is_none() && self.shared.look() == Some(self.facts) {
                return;
            }
            self.lose("went away or changed");
        }
        self.check_at = now + LOOK_EVERY;
        match self.shared.open_port(self.worker, self.generation) {
            Ok((generation, facts, port)) => self.take_port(generation, facts, port),
            Err(error) => self.shared.say_failed(&error),
        }
    }

    /// Lets the port go. The interface is looked for at the next call, and then as often as is allowed.
    fn lose(&mut self, why: &str) {
        self.shared.say_lost(why);
        self.port = None;
        self.send_at = None;
        self.check_at = Instant(0);
    }

    fn take_port(&mut self, generation: u32, facts: Facts, port: Port) {
        if self.facts.mtu < facts.mtu {
            self.pool = FramePool::new(ETHERNET_BYTES + facts.mtu);
        }
        (self.generation, self.facts, self.port) = (generation, facts, Some(port));
        self.changed = true;
        self.check_at = clock::now() + CHECK_EVERY;
        self.drops.reopened.fetch_add(1, Ordering::Relaxed);
        self.shared.say_open();
    }
}

/// True if a frame is for the worker that `steer` names at `address`: sent there or to all, and LONG or with exactly this `steer`; what the filter of a
/// packet socket says in the kernel (`program::frames_for`). One too short to have a `steer` is for nobody.
#[inline]
fn is_for(steer: Steer, address: MacAddress, frame: &[u8]) -> bool {
    let Some((to, rest)) = frame.split_first_chunk::<6>() else { return false };
    let Some([vt, _, high, low]) = rest.get(8..12) else { return false };
    let here = *to == address.0 || *to == MacAddress::BROADCAST.0;
    here && (vt & VT_LONG != 0 || u16::from_be_bytes([*high, *low]) == steer.0)
}

/// Turns the program's stamps into instants that never go back and never lie ahead of now.
#[derive(Debug, Default)]
struct Arrivals {
    /// The clock when it was last looked at; looked at again only for a stamp that seems later.
    now: Instant,
    last: Instant,
}

impl Arrivals {
    /// The instant of a stamp; of none (0), now.
    #[inline]
    fn instant(&mut self, stamp: u64) -> Instant {
        if stamp == 0 || stamp > self.now.0 {
            self.now = clock::now();
        }
        let at = if stamp == 0 { self.now } else { Instant(stamp).min(self.now) };
        self.last = self.last.max(at);
        self.last
    }
}

/// Readable when a frame has come. Another descriptor when the interface goes and comes back: ask for it before each wait.
impl AsFd for XdpLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_ref().map_or_else(|| self.shared.nowhere(), Port::as_fd)
    }
}

impl Link for XdpLink {
    fn mtu(&self) -> usize {
        self.facts.mtu
    }

    fn address(&self) -> MacAddress {
        self.facts.address
    }

    #[inline]
    fn receive(&mut self) -> Option<Received<'_>> {
        for _ in 0..STRANGERS_MAX {
            let Some(frame) = self.port.as_mut().and_then(Port::take) else {
                self.check();
                return None;
            };
            let bytes = self.port.as_ref()?.bytes(frame);
            if is_for(Steer::new(0, self.worker), self.facts.address, bytes) {
                let arrival = self.arrivals.instant(frame.stamp);
                return Some(Received { bytes: self.port.as_ref()?.bytes(frame), arrival });
            }
        }
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
        let Some(port) = &mut self.port else { return self.pool.refuse(refused, &self.drops) };
        if self.pool.queued().is_empty() && self.send_at.is_none() {
            return;
        }
        let before = refused.len();
        let sent = port.send(self.pool.queued(), refused, &self.drops);
        self.send_at = port.has_unsent().then(|| clock::now() + SEND_AGAIN);
        self.drops.refused.fetch_add((refused.len() - before) as u64, Ordering::Relaxed);
        self.pool.clear();
        if let Err(error) = sent {
            log::debug!("interface {}: {error}", self.shared.interface);
            self.lose("went away or down");
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        Some(self.send_at.map_or(self.check_at, |at| at.min(self.check_at)))
    }

    fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_for_the_worker_that_it_names_at_our_address_or_for_all() {
        let (ours, steer) = (MacAddress([2, 0, 0, 0, 0, 7]), Steer::new(0, 3));
        let is_ours = |to: MacAddress, rest: &[u8]| is_for(steer, ours, &[&to.0[..], &[9; 8], rest].concat());
        let (short, long) = (1 << 5, 1 << 5 | 1 << 4);
        assert!(is_ours(ours, &[short, 0, 0, 3]));
        assert!(is_ours(MacAddress::BROADCAST, &[short, 0, 0, 3, 1, 2, 3]));
        assert!(!is_ours(ours, &[short, 0, 0, 2]));
        assert!(!is_ours(ours, &[short, 0, 1, 3]));
        assert!(is_ours(ours, &[long, 0, 1, 2]));
        assert!(!is_ours(MacAddress([2, 0, 0, 0, 0, 8]), &[short, 0, 0, 3]));
        assert!(!is_ours(MacAddress([0x33, 0x33, 0, 0, 0, 1]), &[long, 0, 0, 3]));
        assert!(!is_ours(ours, &[short, 0, 0]));
        assert!(!is_for(steer, ours, &ours.0) && !is_for(steer, ours, &[]));
    }

    #[test]
    fn arrivals_never_go_back_nor_lie_ahead_whatever_the_stamps_are() {
        let (mut arrivals, mut last) = (Arrivals::default(), Instant(0));
        let start = clock::now();
        for stamp in [start.0, 5, 0, start.0 - 1000, u64::MAX, start.0, 0] {
            let at = arrivals.instant(stamp);
            assert!(at >= last && at >= start && at <= clock::now(), "{stamp}");
            last = at;
        }
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.instant(start.0), start);
        assert_eq!(arrivals.instant(start.0 + 1), Instant(start.0 + 1));
    }
}
