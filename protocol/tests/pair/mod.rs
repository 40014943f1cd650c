//! A pair of ends on virtual time: an initiator and a node of one volume in memory, joined by a wire that loses, repeats, reorders and
//! damages frames. One seed is one run.
//!
//! Does not know sockets or threads. Included by the tests beside it.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::{BinaryHeap, HashMap};

use cirro_protocol::initiator::{Config, Event, Initiator};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::target::{Event as NodeEvent, Target, TargetConfig};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::*;
use cirro_protocol::wire::body::{Access, VOLUME_DISCARD, VOLUME_WRITE_ZEROES, VolumeInfo};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::long::{Body, IHave, LongFrame};
use cirro_protocol::wire::{Frame, Header, Mode};
use cirro_protocol::{PayloadRef, SealWith};

pub(crate) const BACKEND: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
pub(crate) const NODE: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
pub(crate) const CAPACITY: usize = 8 << 20;

/// What the wire does to frames, in each direction alike. Rates in 1/1000.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wire {
    pub(crate) mtu: u16,
    /// One-way delay.
    pub(crate) delay: Nanos,
    pub(crate) loss: u64,
    pub(crate) duplicate: u64,
    pub(crate) reorder: u64,
    pub(crate) corrupt: u64,
    /// Larger frames (after the Ethernet header) vanish.
    pub(crate) black_hole_bytes: usize,
    /// Bytes per microsecond; the queue in front is unbounded.
    pub(crate) bytes_per_us: u64,
}

impl Default for Wire {
    fn default() -> Wire {
        Wire {
            mtu: 9000,
            delay: Nanos::from_micros(20),
            loss: 0,
            duplicate: 0,
            reorder: 0,
            corrupt: 0,
            black_hole_bytes: usize::MAX,
            bytes_per_us: 5_000,
        }
    }
}

/// xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators", 2016.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    /// Smallest first in a max-heap.
    at: std::cmp::Reverse<(u64, u64)>,
    to_node: bool,
    bytes: Vec<u8>,
}

/// The sum that stands for CRC and tag here: FNV-1a over nonces and every byte. Detects what the wire does.
fn sum(nonces: (u64, u64), bytes: &[u8]) -> u32 {
    let nonces = nonces.0.to_le_bytes().into_iter().chain(nonces.1.to_le_bytes());
    nonces
        .chain(bytes.iter().copied())
        .fold(0x811c_9dc5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193))
}

/// A request as the test's guest sees it.
pub(crate) struct GuestRequest {
    pub(crate) op: Op,
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
}

/// The node: one volume in memory, at most one session a time and those it replaced.
pub(crate) struct Node {
    pub(crate) volume: Vec<u8>,
    pub(crate) targets: Vec<(Target, HashMap<Slot, Vec<u8>>)>,
    pub(crate) incarnation: u8,
    /// How long the store takes for a request.
    pub(crate) store_delay: Nanos,
    pub(crate) running: Vec<(Instant, Cid, Slot, Op, u64, u32)>,
    pub(crate) executed: HashMap<(Cid, u16), u64>,
    pub(crate) runs: u64,
    /// Frames are dropped as if there were no buffer.
    pub(crate) out_of_buffers: bool,
    /// RELEASE is not answered.
    pub(crate) hold_release: bool,
    next_cid: u16,
}

pub(crate) struct Pair {
    pub(crate) now: Instant,
    pub(crate) wire: Wire,
    pub(crate) random: Random,
    pub(crate) initiator: Initiator,
    pub(crate) node: Node,
    pub(crate) guest: HashMap<Slot, GuestRequest>,
    pub(crate) done: Vec<(Slot, Status, GuestRequest)>,
    pub(crate) events: Vec<Event>,
    /// Every frame that was handed to the wire.
    pub(crate) sent: [u64; 2],
    pub(crate) recorded: Option<Vec<(bool, Vec<u8>)>>,
    pub(crate) cut: bool,
    /// The backend does not look at its link and sends nothing.
    pub(crate) hold_backend: bool,
    flights: BinaryHeap<Flight>,
    held: Vec<Vec<u8>>,
    order: u64,
    busy_until: [u64; 2],
    pub(crate) capture_rejects: u64,
}

impl Pair {
    pub(crate) fn new(seed: u64, wire: Wire) -> Pair {
        let config = Config {
            volume: VolumeName::new(b"vol").unwrap(),
            mode: Mode::Crc,
            attachment: Uuid([7; 16]),
            session_epoch: 1 << 32,
            address: BACKEND,
            ethertype: ETHERTYPE_DEFAULT,
            node_address: None,
            steer: Steer::new(1, 0),
            cid_index: 3,
            mtu: wire.mtu,
            slots: 64,
            take_over: false,
            ack_delay_max: Nanos::from_micros(50),
            random_seed: seed,
        };
        let mut initiator = Initiator::new(config, Instant(1));
        initiator.set_access(Access::ReadWrite);
        let node = Node {
            volume: vec![0; CAPACITY],
            targets: Vec::new(),
            incarnation: 1,
            store_delay: Nanos::from_micros(5),
            running: Vec::new(),
            executed: HashMap::new(),
            runs: 0,
            out_of_buffers: false,
            hold_release: false,
            next_cid: 0,
        };
        Pair {
            now: Instant(1),
            wire,
            random: Random(seed | 1),
            initiator,
            node,
            guest: HashMap::new(),
            done: Vec::new(),
            events: Vec::new(),
            sent: [0; 2],
            recorded: None,
            cut: false,
            hold_backend: false,
            held: Vec::new(),
            flights: BinaryHeap::new(),
            order: 0,
            busy_until: [0; 2],
            capture_rejects: 0,
        }
    }

    pub(crate) fn submit(&mut self, op: Op, offset: u64, data: Vec<u8>) -> Option<Slot> {
        let len = match op {
            Op::Read | Op::Write => data.len() as u32,
            Op::Discard | Op::WriteZeroes => (data.len() / SECTOR_BYTES) as u32,
            Op::Flush | Op::Open | Op::Release | Op::Stat => 0,
        };
        let slot = self.initiator.submit(op, offset, len)?;
        self.guest.insert(slot, GuestRequest { op, offset, data });
        Some(slot)
    }

    /// Runs until nothing is pending or `limit` has passed. True when nothing is pending.
    pub(crate) fn run_until_idle(&mut self, limit: Nanos) -> bool {
        let end = self.now + limit;
        while !self.guest.is_empty() {
            if self.now >= end || !self.step(end) {
                return self.guest.is_empty();
            }
        }
        true
    }

    pub(crate) fn run_for(&mut self, span: Nanos) {
        let end = self.now + span;
        while self.now < end && self.step(end) {}
        self.now = end;
    }

    /// One event: lets both ends send, then goes to the next time at which something happens. False when nothing ever will.
    pub(crate) fn step(&mut self, end: Instant) -> bool {
        self.transmit();
        let flight = self.flights.peek().map(|f| f.at.0.0);
        let store = self.node.running.iter().map(|r| r.0.0).min();
        let timers = self
            .node
            .targets
            .iter()
            .filter_map(|(t, _)| t.poll_timeout())
            .chain(self.initiator.poll_timeout());
        let timer = timers.map(|at| at.0).min();
        let Some(next) = [flight, store, timer].into_iter().flatten().min() else { return false };
        self.now = Instant(next.max(self.now.0 + 1).min(end.0.max(self.now.0 + 1)));
        while self.flights.peek().is_some_and(|f| f.at.0.0 <= self.now.0) {
            let flight = self.flights.pop().unwrap();
            if flight.to_node {
                self.node_receives(&flight.bytes)
            } else {
                self.backend_receives(&flight.bytes)
            }
        }
        if !self.hold_backend {
            for frame in std::mem::take(&mut self.held) {
                self.backend_receives(&frame);
            }
            self.initiator.handle_timeout(self.now);
        }
        for (target, _) in &mut self.node.targets {
            target.handle_timeout(self.now);
        }
        self.run_store();
        self.drain();
        true
    }

    fn drain(&mut self) {
        for i in 0..self.node.targets.len() {
            while let Some(event) = self.node.targets[i].0.poll_event() {
                self.node_event(i, event);
            }
        }
        let running: Vec<Cid> = self.node.running.iter().map(|r| r.1).collect();
        self.node.targets.retain(|(t, buffers)| !buffers.contains_key(&GONE) || running.contains(&t.cid()));
        while let Some(event) = self.initiator.poll_event() {
            if let Event::Done { slot, status } = event {
                let request = self.guest.remove(&slot).expect("a request completes once");
                self.done.push((slot, status, request));
            } else {
                self.events.push(event);
            }
        }
    }

    fn node_event(&mut self, i: usize, event: NodeEvent) {
        let now = self.now;
        let (target, buffers) = &mut self.node.targets[i];
        match event {
            NodeEvent::Confirmed => {
                for j in 0..self.node.targets.len() - 1 {
                    if j != i {
                        self.node.targets[j].1.insert(GONE, Vec::new());
                    }
                }
            }
            NodeEvent::Run { slot, op, offset, len, .. } => {
                if op == Op::Release || op == Op::Stat {
                    if !self.node.hold_release {
                        target.complete(slot, Status::Ok);
                    }
                    return;
                }
                self.node.runs += 1;
                self.node.running.push((now + self.node.store_delay, target.cid(), slot, op, offset, len));
            }
            NodeEvent::Open { slot, .. } => {
                let info = VolumeInfo {
                    capacity_sectors: (CAPACITY / SECTOR_BYTES) as u64,
                    vol_epoch: 1,
                    vol_handle: 9,
                    block_bytes: 512,
                    flags: VOLUME_DISCARD | VOLUME_WRITE_ZEROES,
                    request_bytes_max: REQUEST_BYTES_MAX as u32,
                    serial: *b"pair-test-serial-001",
                };
                target.complete_info(slot, Status::Ok, info);
            }
            NodeEvent::Free { slot } => {
                assert!(buffers.remove(&slot).is_some(), "a buffer is freed once");
            }
            NodeEvent::Gone(_) => {
                buffers.insert(GONE, Vec::new());
            }
        }
    }

    fn run_store(&mut self) {
        let now = self.now;
        let mut due: Vec<_> = self.node.running.iter().filter(|r| r.0 <= now).copied().collect();
        due.sort_by_key(|r| r.0);
        self.node.running.retain(|r| r.0 > now);
        for (_, cid, slot, op, offset, len) in due {
            let start = offset as usize;
            let Some((target, buffers)) = self.node.targets.iter_mut().find(|(t, _)| t.cid() == cid) else {
                continue;
            };
            let mut status = Status::Ok;
            match op {
                Op::Read => {
                    buffers.insert(slot, self.node.volume[start..start + len as usize].to_vec());
                }
                Op::Write => {
                    let data = buffers.remove(&slot).expect("a write's buffer");
                    assert_eq!(data.len(), len as usize);
                    self.node.volume[start..start + len as usize].copy_from_slice(&data);
                }
                Op::Discard | Op::WriteZeroes => {
                    self.node.volume[start..start + len as usize * SECTOR_BYTES].fill(0)
                }
                Op::Flush => {}
                Op::Open | Op::Release | Op::Stat => status = Status::Unsupported,
            }
            if !buffers.contains_key(&GONE) {
                target.complete(slot, status);
            }
        }
    }

    fn transmit(&mut self) {
        let (mut head, mut payloads) = (Vec::new(), Vec::<PayloadRef>::new());
        while !self.hold_backend
            && let Some(transmit) = self.initiator.poll_transmit(self.now, &mut head, &mut payloads)
        {
            let guest = &self.guest;
            let frame = build(&head, &payloads, transmit.seal, |p| {
                guest[&p.slot].data[p.offset as usize..][..p.len as usize].to_vec()
            });
            self.put(true, frame);
            (head, payloads) = Default::default();
        }
        for i in 0..self.node.targets.len() {
            loop {
                (head, payloads) = Default::default();
                let (target, buffers) = &mut self.node.targets[i];
                if buffers.contains_key(&GONE) {
                    break;
                }
                let Some(transmit) = target.poll_transmit(self.now, &mut head, &mut payloads) else { break };
                let frame = build(&head, &payloads, transmit.seal, |p| {
                    buffers[&p.slot][p.offset as usize..][..p.len as usize].to_vec()
                });
                self.put(false, frame);
            }
        }
    }

    /// Hands a frame to the wire.
    pub(crate) fn put(&mut self, to_node: bool, frame: Vec<u8>) {
        let side = usize::from(to_node);
        self.sent[side] += 1;
        let bytes = frame.len() - ETHERNET_BYTES;
        assert!(bytes <= usize::from(self.wire.mtu), "frame of {bytes} bytes");
        assert!(frame.len() >= 60);
        if let Some(recorded) = &mut self.recorded {
            recorded.push((to_node, frame.clone()));
        }
        let start = self.busy_until[side].max(self.now.0);
        self.busy_until[side] = start + bytes as u64 * 1000 / self.wire.bytes_per_us;
        if self.cut || bytes > self.wire.black_hole_bytes || self.random.chance(self.wire.loss) {
            return;
        }
        let copies = 1 + usize::from(self.random.chance(self.wire.duplicate));
        for _ in 0..copies {
            let mut at = self.busy_until[side] + self.wire.delay.0;
            if self.random.chance(self.wire.reorder) {
                at += self.random.below(200_000);
            }
            let mut bytes = frame.clone();
            if self.random.chance(self.wire.corrupt) {
                let bit = self.random.below(bytes.len() as u64 * 8);
                bytes[bit as usize / 8] ^= 1 << (bit % 8);
            }
            self.order += 1;
            self.flights.push(Flight { at: std::cmp::Reverse((at, self.order)), to_node, bytes });
        }
    }

    pub(crate) fn backend_receives(&mut self, bytes: &[u8]) {
        if self.hold_backend {
            self.held.push(bytes.to_vec());
            return;
        }
        let Some(is_long) = Header::is_long(&bytes[ETHERNET_BYTES..]) else { return };
        if is_long {
            if let (true, Ok(long)) = (opens((0, 0), bytes), LongFrame::parse(bytes)) {
                self.initiator.handle_long(self.now, &long);
            }
            return;
        }
        let Ok(frame) = Frame::parse(bytes) else { return };
        let source = Ethernet::parse(bytes).unwrap().source;
        let Some(nonces) = self.initiator.nonces_in(frame.header.cid, source) else { return };
        if !opens(nonces, bytes) {
            self.capture_rejects += 1;
            return;
        }
        let mut placements = Vec::new();
        self.initiator.handle_frame(self.now, self.now, &frame, &mut placements);
        for p in placements {
            let request = self.guest.get_mut(&p.slot).expect("data for a pending request");
            request.data[p.offset as usize..][..p.range.len()].copy_from_slice(&bytes[p.range]);
        }
    }

    pub(crate) fn node_receives(&mut self, bytes: &[u8]) {
        let Some(is_long) = Header::is_long(&bytes[ETHERNET_BYTES..]) else { return };
        if is_long {
            if let (true, Ok(long)) = (opens((0, 0), bytes), LongFrame::parse(bytes)) {
                self.node_greeted(&long);
            }
            return;
        }
        let Ok(frame) = Frame::parse(bytes) else { return };
        let now = self.now;
        let found =
            self.node.targets.iter_mut().find(|(t, b)| t.cid() == frame.header.cid && !b.contains_key(&GONE));
        let Some((target, buffers)) = found else { return self.reset_hint(&frame) };
        if !opens(target.nonces_in(), bytes) {
            self.capture_rejects += 1;
            return;
        }
        let mut wanted = Vec::new();
        target.buffers_wanted(&frame, &mut wanted);
        if self.node.out_of_buffers && !wanted.is_empty() {
            return;
        }
        for (slot, len) in wanted {
            buffers.insert(slot, vec![0xee; len as usize]);
        }
        let mut placements = Vec::new();
        target.handle_frame(now, now, &frame, &mut placements);
        for p in placements {
            buffers.get_mut(&p.slot).expect("a buffer was given")[p.offset as usize..][..p.range.len()]
                .copy_from_slice(&bytes[p.range]);
        }
    }

    fn reset_hint(&mut self, frame: &Frame<'_>) {
        let hint = cirro_protocol::wire::long::ResetHint {
            cid: frame.header.cid,
            token: token(frame.header.cid),
            incarnation: Uuid([self.node.incarnation; 16]),
        };
        self.put_long(Body::ResetHint(hint));
    }

    fn put_long(&mut self, body: Body) {
        let mut head = Vec::new();
        LongFrame::new(NODE, BACKEND, Steer::new(1, 0), body).emit(&mut head);
        let frame = build(&head, &[], SealWith::Long, |_| Vec::new());
        self.put(false, frame);
    }

    fn node_greeted(&mut self, long: &LongFrame) {
        let incarnation = Uuid([self.node.incarnation; 16]);
        match &long.body {
            Body::WhoHas(ask) => self.put_long(Body::IHave(IHave {
                volume: ask.volume,
                nonce: ask.nonce,
                node: Uuid([9; 16]),
                incarnation,
                steer: Steer::new(2, 0),
            })),
            Body::Hello(hello) => {
                let known =
                    self.node.targets.iter().find(|(t, b)| t.hello() == hello && !b.contains_key(&GONE));
                let reply = match known {
                    Some((target, _)) => target.hello_reply(),
                    None => {
                        self.node.next_cid += 1;
                        let cid = Cid::new(self.node.next_cid, self.random.next() as u32);
                        let target = Target::accept(
                            TargetConfig {
                                mode: Mode::Crc,
                                hello: *hello,
                                peer: long.ethernet.source,
                                address: NODE,
                                ethertype: ETHERTYPE_DEFAULT,
                                node: Uuid([9; 16]),
                                incarnation,
                                nonce: self.random.next(),
                                token: token(cid),
                                cid,
                                steer: Steer::new(2, 0),
                                mtu: self.wire.mtu,
                                credit_sectors: 4096,
                                ack_delay_max: Nanos::from_micros(50),
                            },
                            self.now,
                        );
                        let reply = target.hello_reply();
                        self.node.targets.push((target, HashMap::new()));
                        reply
                    }
                };
                self.put_long(Body::HelloReply(reply));
            }
            Body::HelloReply(_) | Body::ResetHint(_) | Body::Redirect(_) | Body::IHave(_) => {}
        }
    }

    /// The node is killed and starts again: it knows no session any more. What ran in its store ends.
    pub(crate) fn restart_node(&mut self) {
        self.node.targets.clear();
        self.node.running.clear();
        self.node.incarnation += 1;
    }
}

/// Marks a session whose end was announced in its buffer table.
pub(crate) const GONE: Slot = Slot(u16::MAX);

fn token(cid: Cid) -> u64 {
    u64::from(cid.0) * 0x9e37_79b9
}

fn build(
    head: &[u8],
    payloads: &[PayloadRef],
    seal: SealWith,
    data: impl Fn(&PayloadRef) -> Vec<u8>,
) -> Vec<u8> {
    let (mut frame, mut at, mut crcs) = (Vec::new(), 0, 0);
    for p in payloads {
        frame.extend_from_slice(&head[at..p.at]);
        frame.extend_from_slice(&data(p));
        crcs += Mode::Crc.trailer_bytes(p.len as usize) / 4;
        at = p.at;
    }
    frame.extend_from_slice(&head[at..]);
    frame.resize(frame.len() + 4 * crcs, 0);
    let nonces = match seal {
        SealWith::Long => (0, 0),
        SealWith::Session(sender, receiver) => (sender, receiver),
    };
    let tag = sum(nonces, &frame[ETHERNET_BYTES..]);
    frame.extend_from_slice(&tag.to_le_bytes());
    frame
}

fn opens(nonces: (u64, u64), frame: &[u8]) -> bool {
    frame.split_last_chunk::<4>().is_some_and(|(body, tag)| {
        body.len() >= ETHERNET_BYTES && sum(nonces, &body[ETHERNET_BYTES..]) == u32::from_le_bytes(*tag)
    })
}
