//! A node with one volume in memory, on a link in memory.

use std::collections::HashMap;

use cirro_link::memory::MemoryLink;
use cirro_link::{FrameId, Link};
use cirro_protocol::SealWith;
use cirro_protocol::op::{Op, Status};
use cirro_protocol::target::{Event, Target, TargetConfig};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{
    Cid, ETHERNET_BYTES, ETHERTYPE_DEFAULT, MacAddress, REQUEST_BYTES_MAX, Slot, Steer, Uuid,
};
use cirro_protocol::wire::body::{VOLUME_DISCARD, VOLUME_WRITE_ZEROES, VolumeInfo};
use cirro_protocol::wire::long::{Body, Hello, IHave, LongFrame};
use cirro_protocol::wire::{Frame, Header, Mode};
use cirro_seal::{Nonces, crc32c, open_crc, open_long, seal_crc, seal_long};

const NODE: Uuid = Uuid([0x4e; 16]);
const STEER: Steer = Steer::new(1, 0);

/// The node.
pub(crate) struct Node {
    pub(crate) link: MemoryLink,
    pub(crate) image: Vec<u8>,
    /// What is there after a loss of power: the image as it was when a flush was answered last.
    pub(crate) durable: Vec<u8>,
    /// Which start of the node this is.
    pub(crate) starts: u8,
    /// Keeps requests at this offset unanswered, and lets others overtake them.
    pub(crate) hold_at: Option<u64>,
    pub(crate) info: VolumeInfo,
    /// Takes no notice of anything.
    pub(crate) silent: bool,
    /// Keeps requests unanswered until it is false again.
    pub(crate) hold: bool,
    /// Keeps requests of this kind unanswered, and lets others overtake them.
    pub(crate) hold_back: Option<Op>,
    /// Loses so many of the next frames with write data.
    pub(crate) lose_writes: usize,
    /// Answers every data request with this.
    pub(crate) fail: Option<Status>,
    /// What was run, in order.
    pub(crate) runs: Vec<(Op, u64, u32)>,
    target: Option<Target>,
    buffers: HashMap<Slot, Vec<u8>>,
    held: Vec<Event>,
    sessions: u64,
}

impl Node {
    pub(crate) fn new(link: MemoryLink, bytes: usize) -> Node {
        let info = VolumeInfo {
            capacity_sectors: bytes as u64 / 512,
            vol_epoch: 1,
            vol_handle: 7,
            block_bytes: 512,
            flags: VOLUME_DISCARD | VOLUME_WRITE_ZEROES,
            request_bytes_max: REQUEST_BYTES_MAX as u32,
            serial: *b"CIRRO-0123456789abcd",
        };
        Node {
            link,
            image: vec![0; bytes],
            durable: vec![0; bytes],
            starts: 1,
            hold_at: None,
            info,
            silent: false,
            hold: false,
            hold_back: None,
            lose_writes: 0,
            fail: None,
            runs: Vec::new(),
            target: None,
            buffers: HashMap::new(),
            held: Vec::new(),
            sessions: 0,
        }
    }

    /// Everything that can be done without waiting.
    pub(crate) fn step(&mut self, now: Instant) {
        self.link.set_now(now);
        while let Some(received) = self.link.receive() {
            let bytes = received.bytes.to_vec();
            if !self.silent {
                self.take(now, &bytes);
                // Before the next frame: it may use a slot again whose buffer an event of this one frees.
                self.run_events();
            }
        }
        if self.silent {
            return;
        }
        if let Some(target) = &mut self.target {
            target.handle_timeout(now);
        }
        self.run_events();
        self.send(now);
    }

    /// The volume has another size from now on, and who has it open is told.
    pub(crate) fn resize(&mut self, bytes: usize) {
        self.image.resize(bytes, 0);
        self.durable.resize(bytes, 0);
        self.info.capacity_sectors = bytes as u64 / 512;
        if let Some(target) = &mut self.target {
            target.notify(self.info);
        }
    }

    /// The process ends and starts again; `power`: with its machine, and what was not flushed is gone.
    pub(crate) fn restart(&mut self, power: bool) {
        self.starts += 1;
        self.target = None;
        self.buffers.clear();
        self.held.clear();
        if power {
            self.image.clone_from(&self.durable);
        }
    }

    fn incarnation(&self) -> Uuid {
        Uuid([self.starts; 16])
    }

    /// When something is due.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.target.as_ref().filter(|_| !self.silent)?.poll_timeout()
    }

    fn take(&mut self, now: Instant, bytes: &[u8]) {
        if Header::is_long(&bytes[ETHERNET_BYTES..]) == Some(true) {
            let Ok(long) = LongFrame::parse(bytes) else { return };
            assert!(open_long(bytes).is_ok(), "the backend sealed a LONG frame wrongly");
            self.take_long(now, &long);
            return;
        }
        let (Ok(frame), Some(target)) = (Frame::parse(bytes), &mut self.target) else { return };
        if self.lose_writes > 0 && frame.messages().any(|payload| payload.message.carries_data()) {
            self.lose_writes -= 1;
            return;
        }
        let (sender, receiver) = target.nonces_in();
        if frame.header.cid != target.cid() || open_crc(Nonces { sender, receiver }, &frame).is_err() {
            return;
        }
        let (mut wanted, mut placements) = (Vec::new(), Vec::new());
        target.buffers_wanted(&frame, &mut wanted);
        for (slot, len) in wanted {
            self.buffers.insert(slot, vec![0; len as usize]);
        }
        target.handle_frame(now, now, &frame, &mut placements);
        for placement in placements {
            let data = frame.payload(placement.range.clone());
            let at = placement.offset as usize;
            self.buffers.get_mut(&placement.slot).unwrap()[at..at + data.len()].copy_from_slice(data);
        }
    }

    fn take_long(&mut self, now: Instant, long: &LongFrame) {
        let source = long.ethernet.source;
        match &long.body {
            Body::WhoHas(ask) => {
                let have = IHave {
                    volume: ask.volume,
                    nonce: ask.nonce,
                    node: NODE,
                    incarnation: self.incarnation(),
                    steer: STEER,
                };
                self.send_long(source, ask.steer, Body::IHave(have));
            }
            Body::Hello(hello) => self.greet(now, source, *hello),
            Body::HelloReply(_) | Body::ResetHint(_) | Body::Redirect(_) | Body::IHave(_) => {}
        }
    }

    fn greet(&mut self, now: Instant, source: MacAddress, hello: Hello) {
        let known = self.target.as_ref().is_some_and(|target| target.hello() == &hello);
        if !known {
            self.sessions += 1;
            self.buffers.clear();
            self.held.clear();
            let config = TargetConfig {
                mode: Mode::Crc,
                hello,
                peer: source,
                address: self.link.address(),
                ethertype: ETHERTYPE_DEFAULT,
                node: NODE,
                incarnation: self.incarnation(),
                nonce: 0x5e55_0000 + self.sessions,
                token: self.sessions,
                cid: Cid::new(0, self.sessions as u32),
                steer: STEER,
                mtu: self.link.mtu() as u16,
                credit_sectors: 8192,
                ack_delay_max: Nanos::from_micros(50),
            };
            self.target = Some(Target::accept(config, now));
        }
        let reply = self.target.as_ref().unwrap().hello_reply();
        self.send_long(source, hello.steer, Body::HelloReply(reply));
    }

    fn send_long(&mut self, to: MacAddress, steer: Steer, body: Body) {
        let long = LongFrame::new(self.link.address(), to, steer, body);
        let frame = self.link.frame().expect("a free frame");
        long.emit(&mut frame.head);
        seal_long(&mut frame.head);
        self.link.commit(FrameId::default());
        self.link.flush(&mut Vec::new());
    }

    fn run_events(&mut self) {
        let Some(target) = &mut self.target else { return };
        let mut events = std::mem::take(&mut self.held);
        while let Some(event) = target.poll_event() {
            events.push(event);
        }
        for event in events {
            match event {
                Event::Run { op, .. }
                    if self.hold_back == Some(op) || self.hold && !matches!(op, Op::Release | Op::Stat) =>
                {
                    self.held.push(event)
                }
                Event::Run { offset, op, .. } if self.hold_at == Some(offset) && op != Op::Flush => {
                    self.held.push(event);
                }
                Event::Run { slot, op, offset, len, .. } => self.run(slot, op, offset, len),
                Event::Open { slot, .. } => {
                    self.target.as_mut().unwrap().complete_info(slot, Status::Ok, self.info);
                }
                Event::Free { slot } => {
                    self.buffers.remove(&slot);
                }
                Event::Confirmed | Event::Gone(_) => {}
            }
        }
    }

    fn run(&mut self, slot: Slot, op: Op, offset: u64, len: u32) {
        self.runs.push((op, offset, len));
        let at = offset as usize;
        let status = self.fail.filter(|_| !matches!(op, Op::Release | Op::Stat)).unwrap_or(Status::Ok);
        let bytes = if op.length_in_sectors() { len as usize * 512 } else { len as usize };
        match op {
            Op::Read => {
                self.buffers.insert(slot, self.image[at..at + bytes].to_vec());
            }
            Op::Write if status == Status::Ok => {
                self.image[at..at + bytes].copy_from_slice(&self.buffers[&slot])
            }
            Op::Discard | Op::WriteZeroes if status == Status::Ok => self.image[at..at + bytes].fill(0),
            Op::Flush if status == Status::Ok => self.durable.clone_from(&self.image),
            Op::Write | Op::Discard | Op::WriteZeroes | Op::Flush | Op::Open | Op::Release | Op::Stat => {}
        }
        self.target.as_mut().unwrap().complete(slot, status);
    }

    fn send(&mut self, now: Instant) {
        let Some(target) = &mut self.target else { return };
        let mut payloads = Vec::new();
        while let Some(frame) = self.link.frame() {
            payloads.clear();
            let Some(transmit) = target.poll_transmit(now, &mut frame.head, &mut payloads) else { break };
            let data: Vec<&[u8]> = payloads
                .iter()
                .map(|p| &self.buffers[&p.slot][p.offset as usize..(p.offset + p.len) as usize])
                .collect();
            for crc in data.iter().flat_map(|data| data.chunks(4096)).map(crc32c) {
                frame.head.extend_from_slice(&crc.to_le_bytes());
            }
            match transmit.seal {
                SealWith::Long => seal_long(&mut frame.head),
                SealWith::Session(sender, receiver) => seal_crc(Nonces { sender, receiver }, &mut frame.head),
            }
            // Last first, so that the places of the others stay where they are.
            for (payload, data) in payloads.iter().zip(&data).rev() {
                frame.head.splice(payload.at..payload.at, data.iter().copied());
            }
            self.link.commit(FrameId { session: 0, pn: transmit.pn });
        }
        let mut refused = Vec::new();
        self.link.flush(&mut refused);
        for id in refused {
            self.target.as_mut().unwrap().not_sent(now, id.pn);
        }
    }
}
