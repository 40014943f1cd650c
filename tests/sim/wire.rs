//! The simulated segment: ports with a MAC address each, and what the wire between two of them does to frames.
//!
//! Knows frames as bytes and virtual time; does not know what is in a frame beyond its length and whether it is a LONG one. Called by `world`; the
//! production workers see a [`Port`] through [`SimLink`].

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use cirro_link::{FrameId, FramePool, Link, Received, TxFrame};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress};
use cirro_protocol::wire::Header;
use fastrand::Rng;

/// Frames that wait at a port before the newest are lost, as in a full ring of the kernel's.
const INBOX_MAX: usize = 1024;
/// Frames that the one who replays remembers.
const REPLAY_MAX: usize = 64;

/// Handshakes that an attacker remembers.
const HANDSHAKES_MAX: usize = 256;

/// Thrown through a turn by the link when its process is killed in the middle of it.
pub(crate) struct Killed;

/// One machine's interface.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) address: MacAddress,
    pub(crate) mtu: usize,
    inbox: VecDeque<(Vec<u8>, Instant)>,
    outbox: Vec<Vec<u8>>,
    /// What its clock says of a frame's arrival is wrong by so much.
    pub(crate) skew: i64,
    /// The interface takes no frame.
    pub(crate) down: bool,
    /// Calls of the link after which its process is killed.
    pub(crate) calls_left: Option<u32>,
}

/// What a worker gets as its link.
pub(crate) struct SimLink {
    port: Rc<RefCell<Port>>,
    pool: FramePool,
    current: Vec<u8>,
    /// Runs between a frame's checksums and its copy: a guest that changes buffers in flight.
    meddle: Option<Rc<dyn Fn()>>,
}

impl Port {
    pub(crate) fn new(number: u8, mtu: usize) -> Rc<RefCell<Port>> {
        Rc::new(RefCell::new(Port {
            address: MacAddress([2, 0, 0, 0, 0, number]),
            mtu,
            inbox: VecDeque::new(),
            outbox: Vec::new(),
            skew: 0,
            down: false,
            calls_left: None,
        }))
    }

    pub(crate) fn has_frames(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// The process is gone: what waited for it is gone too.
    pub(crate) fn clear(&mut self) {
        self.inbox.clear();
        self.outbox.clear();
        self.calls_left = None;
    }

    fn count_call(&mut self) {
        match &mut self.calls_left {
            Some(0) => std::panic::panic_any(Killed),
            Some(left) => *left -= 1,
            None => {}
        }
    }
}

impl SimLink {
    pub(crate) fn new(port: &Rc<RefCell<Port>>, meddle: Option<Rc<dyn Fn()>>) -> SimLink {
        let mtu = port.borrow().mtu;
        SimLink {
            port: Rc::clone(port),
            pool: FramePool::new(mtu + ETHERNET_BYTES),
            current: Vec::new(),
            meddle,
        }
    }
}

impl Link for SimLink {
    fn mtu(&self) -> usize {
        self.port.borrow().mtu
    }

    fn address(&self) -> MacAddress {
        self.port.borrow().address
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        let mut port = self.port.borrow_mut();
        port.count_call();
        let (bytes, arrival) = port.inbox.pop_front()?;
        self.current = bytes;
        Some(Received { bytes: &self.current, arrival })
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        self.pool.next_free()
    }

    fn commit(&mut self, id: FrameId) {
        self.pool.commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        if let Some(meddle) = &self.meddle {
            meddle();
        }
        for frame in self.pool.queued() {
            let mut port = self.port.borrow_mut();
            if port.down || frame.len() > port.mtu + ETHERNET_BYTES {
                refused.push(frame.id());
                continue;
            }
            let mut bytes = Vec::new();
            frame.gather(&mut bytes);
            port.outbox.push(bytes);
            port.count_call();
        }
        self.pool.clear();
    }
}

/// What happens to frames of one direction between two ports. The default: a good wire of 20 µs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Weather {
    /// Lost, in millionths.
    pub(crate) loss: u32,
    /// A burst of losses begins, in millionths; and how many frames it takes.
    pub(crate) burst: u32,
    pub(crate) burst_frames: u32,
    /// LONG frames, and frames without data, are lost besides: in millionths.
    pub(crate) long_loss: u32,
    pub(crate) small_loss: u32,
    /// Come twice, in millionths.
    pub(crate) duplication: u32,
    /// With a bit turned over, or cut short, in millionths.
    pub(crate) corruption: u32,
    pub(crate) truncation: u32,
    pub(crate) delay: Nanos,
    /// Up to so much longer: frames overtake each other.
    pub(crate) jitter: Nanos,
    /// Stay behind alone, in millionths, for up to `straggle_time`: whoever sent them has long sent them again.
    pub(crate) stragglers: u32,
    pub(crate) straggle_time: Nanos,
    /// Time on the wire of a byte.
    pub(crate) byte_time: Nanos,
    /// Frames above this vanish.
    pub(crate) black_hole: Option<usize>,
    /// Nothing arrives.
    pub(crate) cut: bool,
    /// Everything is held back.
    pub(crate) paused: bool,
}

impl Default for Weather {
    fn default() -> Weather {
        Weather {
            loss: 0,
            burst: 0,
            burst_frames: 0,
            long_loss: 0,
            small_loss: 0,
            duplication: 0,
            corruption: 0,
            truncation: 0,
            delay: Nanos::from_micros(20),
            jitter: Nanos(0),
            stragglers: 0,
            straggle_time: Nanos(0),
            byte_time: Nanos(1),
            black_hole: None,
            cut: false,
            paused: false,
        }
    }
}

/// One direction between two ports.
#[derive(Debug, Default)]
struct Path {
    weather: Weather,
    burst_left: u32,
    free_at: Instant,
    held: Vec<Vec<u8>>,
}

/// What the wire did, for the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WireCounts {
    pub(crate) frames: u64,
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
    pub(crate) damaged: u64,
    pub(crate) replayed: u64,
    pub(crate) forged: u64,
}

/// The segment.
pub(crate) struct Wire {
    ports: Vec<Rc<RefCell<Port>>>,
    paths: BTreeMap<(usize, usize), Path>,
    flying: std::collections::BinaryHeap<Reverse<Flight>>,
    next_flight: u64,
    old: VecDeque<Vec<u8>>,
    /// Frames of before are sent again by a stranger, in millionths of the frames; and garbage is sent.
    pub(crate) replays: u32,
    pub(crate) forgeries: u32,
    /// The stranger remembers handshakes, turns frames back to who sent them, and sends under other addresses.
    pub(crate) attacks: bool,
    handshakes: VecDeque<Vec<u8>>,
    pub(crate) counts: WireCounts,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    due: Instant,
    number: u64,
    to: usize,
    bytes: Vec<u8>,
}

fn happens(rng: &mut Rng, millionths: u32) -> bool {
    millionths > 0 && rng.u32(0..1_000_000) < millionths
}

impl Wire {
    pub(crate) fn new(ports: Vec<Rc<RefCell<Port>>>) -> Wire {
        let count = ports.len();
        let pairs = (0..count).flat_map(|a| (0..count).map(move |b| (a, b))).filter(|(a, b)| a != b);
        Wire {
            paths: pairs.map(|pair| (pair, Path::default())).collect(),
            ports,
            flying: std::collections::BinaryHeap::new(),
            next_flight: 0,
            old: VecDeque::new(),
            replays: 0,
            forgeries: 0,
            attacks: false,
            handshakes: VecDeque::new(),
            counts: WireCounts::default(),
        }
    }

    /// Changes the weather from one port to another.
    pub(crate) fn set(&mut self, now: Instant, rng: &mut Rng, (from, to): (usize, usize), weather: Weather) {
        let path = self.paths.get_mut(&(from, to)).expect("a path of the segment");
        path.weather = weather;
        if !path.weather.paused {
            for bytes in std::mem::take(&mut path.held) {
                self.fly(now, rng, from, to, bytes);
            }
        }
    }

    /// Takes what the port's process sent in its turn. `hash` sees every frame.
    pub(crate) fn collect(&mut self, now: Instant, rng: &mut Rng, from: usize, mut hash: impl FnMut(&[u8])) {
        let sent = std::mem::take(&mut self.ports[from].borrow_mut().outbox);
        for bytes in sent {
            hash(&bytes);
            self.counts.frames += 1;
            if self.old.len() == REPLAY_MAX {
                self.old.pop_front();
            }
            self.old.push_back(bytes.clone());
            if self.attacks && bytes.get(ETHERNET_BYTES..).and_then(Header::is_long) == Some(true) {
                if self.handshakes.len() == HANDSHAKES_MAX {
                    self.handshakes.remove(rng.usize(0..HANDSHAKES_MAX));
                }
                self.handshakes.push_back(bytes.clone());
            }
            self.route(now, rng, from, bytes);
        }
        self.meddle(now, rng);
    }

    fn route(&mut self, now: Instant, rng: &mut Rng, from: usize, bytes: Vec<u8>) {
        let to = MacAddress(bytes[..6].try_into().expect("a frame has an address"));
        let everyone = to.0[0] & 1 == 1;
        for port in 0..self.ports.len() {
            if port != from && (everyone || self.ports[port].borrow().address == to) {
                self.fly(now, rng, from, port, bytes.clone());
            }
        }
    }

    /// A stranger: sends what it recorded, and things that look like frames.
    fn meddle(&mut self, now: Instant, rng: &mut Rng) {
        if happens(rng, self.replays) && !self.old.is_empty() {
            let bytes = self.replay(rng);
            self.counts.replayed += 1;
            self.deliver_raw(now + Nanos(rng.u64(0..500_000_000)), bytes);
        }
        if happens(rng, self.forgeries) && !self.old.is_empty() {
            let mut bytes = self.replay(rng);
            self.counts.forged += 1;
            for _ in 0..rng.usize(1..8) {
                let at = rng.usize(ETHERNET_BYTES..bytes.len());
                bytes[at] = rng.u8(..);
            }
            if rng.bool() {
                bytes.truncate(rng.usize(ETHERNET_BYTES..=bytes.len()));
            }
            self.deliver_raw(now, bytes);
        }
    }

    /// A frame of before, as it was or, of an attacker, with other addresses.
    fn replay(&self, rng: &mut Rng) -> Vec<u8> {
        if !self.attacks {
            return self.old[rng.usize(0..self.old.len())].clone();
        }
        let old = if rng.bool() || self.handshakes.is_empty() { &self.old } else { &self.handshakes };
        let mut bytes = old[rng.usize(0..old.len())].clone();
        let port = self.ports[rng.usize(0..self.ports.len())].borrow().address;
        match rng.u8(0..8) {
            0 => bytes[6..12].copy_from_slice(&port.0),
            1 => bytes[..6].copy_from_slice(&port.0),
            2 => bytes[..12].rotate_left(6),
            3 => bytes[11] = rng.u8(..),
            _ => {}
        }
        bytes
    }

    fn deliver_raw(&mut self, due: Instant, bytes: Vec<u8>) {
        let to = MacAddress(bytes[..6].try_into().expect("a frame has an address"));
        let everyone = to.0[0] & 1 == 1;
        for port in 0..self.ports.len() {
            if everyone || self.ports[port].borrow().address == to {
                self.push(due, port, bytes.clone());
            }
        }
    }

    fn fly(&mut self, now: Instant, rng: &mut Rng, from: usize, to: usize, mut bytes: Vec<u8>) {
        let path = self.paths.get_mut(&(from, to)).expect("a path of the segment");
        let weather = path.weather.clone();
        if weather.paused {
            path.held.push(bytes);
            return;
        }
        if path.burst_left == 0 && happens(rng, weather.burst) {
            path.burst_left = weather.burst_frames;
        }
        let in_burst = path.burst_left > 0;
        path.burst_left = path.burst_left.saturating_sub(1);
        let is_long = bytes.get(ETHERNET_BYTES..).and_then(Header::is_long) == Some(true);
        let lost = in_burst
            || weather.cut
            || weather.black_hole.is_some_and(|max| bytes.len() - ETHERNET_BYTES > max)
            || happens(rng, weather.loss)
            || (is_long && happens(rng, weather.long_loss))
            || (!is_long && bytes.len() < 160 && happens(rng, weather.small_loss));
        if lost {
            self.counts.lost += 1;
            return;
        }
        let start = path.free_at.max(now);
        path.free_at = start + Nanos(weather.byte_time.0 * bytes.len() as u64);
        let due = path.free_at + weather.delay;
        let jitter =
            |rng: &mut Rng| Nanos(if weather.jitter.0 > 0 { rng.u64(0..weather.jitter.0) } else { 0 });
        if happens(rng, weather.corruption) {
            self.counts.damaged += 1;
            let bit = rng.usize(0..(bytes.len() - ETHERNET_BYTES) * 8);
            bytes[ETHERNET_BYTES + bit / 8] ^= 1 << (bit % 8);
        }
        if happens(rng, weather.truncation) {
            self.counts.damaged += 1;
            bytes.truncate(rng.usize(ETHERNET_BYTES..bytes.len()));
        }
        if happens(rng, weather.duplication) {
            self.counts.duplicated += 1;
            // Far enough away to come in another session now and then.
            let late =
                if rng.u8(0..8) == 0 { Nanos(rng.u64(0..2_000_000_000)) } else { Nanos(rng.u64(0..200_000)) };
            self.push(due + late, to, bytes.clone());
        }
        let mut late = jitter(rng);
        if happens(rng, weather.stragglers) {
            late = late + Nanos(rng.u64(0..weather.straggle_time.0.max(1)));
        }
        self.push(due + late, to, bytes);
    }

    fn push(&mut self, due: Instant, to: usize, bytes: Vec<u8>) {
        self.next_flight += 1;
        self.flying.push(Reverse(Flight { due, number: self.next_flight, to, bytes }));
    }

    /// When the next frame arrives somewhere.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.flying.peek().map(|Reverse(flight)| flight.due)
    }

    /// Puts every frame that is due into its port. The ports are told by number.
    pub(crate) fn deliver(&mut self, now: Instant, mut told: impl FnMut(usize)) {
        while self.flying.peek().is_some_and(|Reverse(flight)| flight.due <= now) {
            let Some(Reverse(flight)) = self.flying.pop() else { return };
            let mut port = self.ports[flight.to].borrow_mut();
            if !port.down && port.inbox.len() < INBOX_MAX {
                let arrival = Instant(flight.due.0.saturating_add_signed(port.skew));
                port.inbox.push_back((flight.bytes, arrival));
                told(flight.to);
            }
        }
    }
}
