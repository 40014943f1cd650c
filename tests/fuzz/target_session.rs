//! The node's end of a session against an initiator that breaks every rule but the layout: no panic, no byte outside of a buffer, no request
//! run twice, and every frame that it sends parses.
#![no_main]

mod hostile;

use std::collections::{HashMap, HashSet, VecDeque};

use cirro_protocol::op::{Op, Status};
use cirro_protocol::target::{Event, Target, TargetConfig};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{Cid, Slot, Steer, Uuid, VolumeName};
use cirro_protocol::wire::long::Hello;
use cirro_protocol::wire::{Frame, Mode};
use hostile::{HERE, Input, PEER};
use libfuzzer_sys::fuzz_target;

const CID: Cid = Cid(0x0010_0001);

struct Node {
    target: Target,
    now: Instant,
    pn: u64,
    /// Bytes of each slot's buffer.
    buffers: HashMap<Slot, u32>,
    running: VecDeque<(Slot, Op)>,
    gone: bool,
}

impl Node {
    fn new(mtu: u16) -> Node {
        let hello = Hello {
            volume: VolumeName::new(b"v").expect("a name"),
            node: Uuid([1; 16]),
            attachment: Uuid([2; 16]),
            session_epoch: 1,
            nonce: 1,
            cid: Cid(5),
            steer: Steer(0),
            mtu,
            slots: 256,
            piece_bytes_max: u32::MAX,
        };
        let now = Instant(1_000_000_000);
        let config = TargetConfig {
            mode: Mode::Crc,
            hello,
            peer: PEER,
            address: HERE,
            ethertype: 0x88b5,
            node: Uuid([1; 16]),
            incarnation: Uuid([3; 16]),
            nonce: 2,
            token: 7,
            cid: CID,
            steer: Steer(0),
            mtu,
            credit_sectors: 4096,
            ack_delay_max: Nanos::from_micros(50),
        };
        let target = Target::accept(config, now);
        Node { target, now, pn: 0, buffers: HashMap::new(), running: VecDeque::new(), gone: false }
    }

    fn frame(&mut self, input: &mut Input<'_>) {
        self.pn += 1 + u64::from(input.byte() / 128) * 70;
        let bytes = hostile::frame(input, CID, self.pn);
        let Ok(frame) = Frame::parse(&bytes) else { return };
        let (mut wanted, mut placements) = (Vec::new(), Vec::new());
        self.target.buffers_wanted(&frame, &mut wanted);
        let slots: HashSet<Slot> = wanted.iter().map(|(slot, _)| *slot).collect();
        assert_eq!(slots.len(), wanted.len(), "one buffer for each slot");
        for (slot, bytes) in wanted {
            assert!(
                self.running.iter().all(|(running, _)| *running != slot),
                "the store still uses the buffer"
            );
            assert!(bytes <= 1 << 20);
            self.buffers.insert(slot, bytes);
        }
        self.target.handle_frame(self.now, self.now, &frame, &mut placements);
        for placement in placements {
            let buffer = self.buffers.get(&placement.slot).copied().expect("a buffer for what is placed");
            assert!(placement.range.end <= bytes.len());
            assert!(
                placement.offset as usize + placement.range.len() <= buffer as usize,
                "inside of the buffer"
            );
            assert!(
                self.running.iter().all(|(slot, _)| *slot != placement.slot),
                "the store uses the buffer"
            );
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.target.poll_event() {
            assert!(!self.gone, "nothing comes after Gone");
            match event {
                Event::Confirmed => {}
                Event::Run { slot, op, len, .. } => {
                    assert!(
                        self.running.iter().all(|(running, _)| *running != slot),
                        "a slot runs one request"
                    );
                    if op == Op::Write {
                        assert_eq!(self.buffers.get(&slot), Some(&len), "the write's buffer has its length");
                    } else if op == Op::Read {
                        self.buffers.insert(slot, len);
                    }
                    self.running.push_back((slot, op));
                }
                Event::Open { slot, .. } => self.running.push_back((slot, Op::Open)),
                Event::Free { slot } => drop(self.buffers.remove(&slot)),
                Event::Gone(_) => self.gone = true,
            }
        }
    }

    fn complete(&mut self, how: u8) {
        let Some((slot, op)) = self.running.pop_front() else { return };
        let status = Status::from_code(how % 12).expect("a status");
        match op {
            Op::Open | Op::Stat => self.target.complete_info(slot, status, hostile::volume()),
            Op::Read | Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Release => {
                self.target.complete(slot, status);
            }
        }
    }

    fn transmit(&mut self) {
        let (mut head, mut payloads) = (Vec::new(), Vec::new());
        while let Some(transmit) = self.target.poll_transmit(self.now, &mut head, &mut payloads) {
            let mut bytes = head.clone();
            for payload in payloads.iter().rev() {
                let buffer = self.buffers.get(&payload.slot).copied().expect("read data has its buffer");
                assert!(payload.offset + payload.len <= buffer);
                bytes.splice(payload.at..payload.at, std::iter::repeat_n(0, payload.len as usize));
            }
            let crcs: usize = payloads.iter().map(|p| Mode::Crc.trailer_bytes(p.len as usize) / 4).sum();
            bytes.resize(bytes.len() + 4 * crcs + 4, 0);
            let frame = Frame::parse(&bytes).expect("what is sent parses");
            assert_eq!(frame.header.pn, transmit.pn);
            head.clear();
            payloads.clear();
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut node = Node::new([1500, 9000][usize::from(input.byte() % 2)]);
    while !input.is_empty() && !node.gone {
        let action = input.byte();
        match action {
            0..160 => node.frame(&mut input),
            160..200 => node.complete(action),
            200..230 => {
                node.now += Nanos::from_micros(1 << (action % 16));
                node.target.handle_timeout(node.now);
            }
            230..240 => node.target.not_sent(node.now, u64::from(input.byte())),
            240..250 => node.target.notify(hostile::volume()),
            250..=255 => {
                node.now += Nanos::from_millis(100);
                node.target.handle_timeout(node.now);
            }
        }
        node.events();
        node.transmit();
        node.events();
    }
});
