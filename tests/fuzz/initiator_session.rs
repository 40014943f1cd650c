//! The backend's end of a session against a node that breaks every rule but the layout: no panic, no byte outside of a request's data, every
//! request ends at most once, and every frame that it sends parses.
#![no_main]

mod hostile;

use std::collections::HashMap;

use cirro_protocol::initiator::{Config, Event, Initiator, StateName};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{CONTROL_SLOT, Cid, ETHERNET_BYTES, MacAddress, Slot, Steer, Uuid, VolumeName};
use cirro_protocol::wire::body::Access;
use cirro_protocol::wire::long::{Body, HelloReply, LongFrame};
use cirro_protocol::wire::{Frame, Header, Kind, Message, Mode};
use hostile::{HERE, Input, PEER};
use libfuzzer_sys::fuzz_target;

struct Backend {
    initiator: Initiator,
    now: Instant,
    pn: u64,
    /// Where the initiator wants its frames now.
    cid: Cid,
    mtu: u16,
    /// Data bytes of each request that has not ended.
    requests: HashMap<Slot, u32>,
    /// As a good node: answer the handshake and OPEN.
    helps: bool,
}

impl Backend {
    fn new(mtu: u16) -> Backend {
        let now = Instant(1_000_000_000);
        let config = Config {
            volume: VolumeName::new(b"v").expect("a name"),
            mode: Mode::Crc,
            attachment: Uuid([2; 16]),
            session_epoch: 1,
            address: HERE,
            ethertype: 0x88b5,
            node_address: None,
            steer: Steer(0),
            cid_index: 3,
            mtu,
            slots: 8,
            take_over: false,
            ack_delay_max: Nanos::from_micros(50),
            random_seed: 1,
        };
        let initiator = Initiator::new(config, now);
        Backend { initiator, now, pn: 0, cid: Cid(0), mtu, requests: HashMap::new(), helps: true }
    }

    fn take(&mut self, bytes: &[u8]) {
        let Ok(frame) = Frame::parse(bytes) else { return };
        if self.initiator.nonces_in(frame.header.cid, PEER).is_none() {
            return;
        }
        let mut placements = Vec::new();
        self.initiator.handle_frame(self.now, self.now, &frame, &mut placements);
        for placement in placements {
            let len = self.requests.get(&placement.slot).copied().expect("data is placed for a request");
            assert!(placement.range.end <= bytes.len());
            assert!(
                placement.offset as usize + placement.range.len() <= len as usize,
                "inside of the request"
            );
        }
    }

    fn answer(&mut self, message: Message, payload: &[u8]) {
        self.pn += 1;
        let mut bytes = hostile::start(self.cid, self.pn, 0, 0, 0);
        hostile::push(&mut bytes, message, payload);
        bytes.extend([0; 4]);
        self.take(&bytes);
    }

    fn answer_long(&mut self, body: Body) {
        let frame = LongFrame::new(PEER, HERE, Steer(0), body);
        self.initiator.handle_long(self.now, &frame);
    }

    /// What a good node says to a LONG frame of ours.
    fn greet(&mut self, frame: &LongFrame) {
        match frame.body {
            Body::WhoHas(ask) => self.answer_long(Body::IHave(cirro_protocol::wire::long::IHave {
                volume: ask.volume,
                nonce: ask.nonce,
                node: Uuid([1; 16]),
                incarnation: Uuid([3; 16]),
                steer: Steer(0),
            })),
            Body::Hello(hello) => {
                (self.cid, self.pn) = (hello.cid, 0);
                let (piece_bytes, _) = cirro_protocol::handshake::agree(
                    usize::from(self.mtu),
                    usize::from(self.mtu),
                    hello.piece_bytes_max,
                );
                self.answer_long(Body::HelloReply(HelloReply {
                    session_epoch: hello.session_epoch,
                    initiator_nonce: hello.nonce,
                    status: Status::Ok,
                    node: Uuid([1; 16]),
                    incarnation: Uuid([3; 16]),
                    nonce: 2,
                    token: 7,
                    cid: Cid(9),
                    steer: Steer(0),
                    mtu: self.mtu,
                    slots: hello.slots,
                    piece_bytes,
                    request_bytes_max: 1 << 20,
                    credit_sectors: 8192,
                }));
            }
            Body::HelloReply(_) | Body::ResetHint(_) | Body::Redirect(_) | Body::IHave(_) => {
                panic!("an initiator asks, {frame:?}")
            }
        }
    }

    fn transmit(&mut self) {
        let (mut head, mut payloads) = (Vec::new(), Vec::new());
        while self.initiator.poll_transmit(self.now, &mut head, &mut payloads).is_some() {
            let mut bytes = std::mem::take(&mut head);
            for payload in payloads.iter().rev() {
                let len = self.requests.get(&payload.slot).copied().expect("write data is of a request");
                assert!(payload.offset + payload.len <= len);
                bytes.splice(payload.at..payload.at, std::iter::repeat_n(0, payload.len as usize));
            }
            let crcs: usize = payloads.drain(..).map(|p| Mode::Crc.trailer_bytes(p.len as usize) / 4).sum();
            bytes.resize(bytes.len() + 4 * crcs + 4, 0);
            if Header::is_long(&bytes[ETHERNET_BYTES..]) == Some(true) {
                let long = LongFrame::parse(&bytes).expect("what is sent parses");
                if self.helps {
                    self.greet(&long);
                }
                continue;
            }
            let frame = Frame::parse(&bytes).expect("what is sent parses");
            let sent: Vec<Message> = frame.messages().map(|payload| payload.message).collect();
            let helps = self.helps;
            for message in sent.into_iter().filter(|_| helps) {
                if message.kind == Kind::Probe && message.code == 0 {
                    let filler = vec![0; usize::from(message.plen)];
                    self.answer(Message { code: 1, ..Message::bare(Kind::Probe) }, &filler);
                } else if message.kind == Kind::Request && message.slot == CONTROL_SLOT {
                    let mut info = Vec::new();
                    hostile::volume().emit(&mut info);
                    let answer =
                        Message { slot: message.slot, sseq: message.sseq, ..Message::bare(Kind::Response) };
                    self.answer(answer, &info);
                }
            }
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.initiator.poll_event() {
            match event {
                Event::Done { slot, .. } => {
                    assert!(self.requests.remove(&slot).is_some(), "a request ends once");
                }
                Event::Attached(..) | Event::Refused(..) | Event::Lost(_) | Event::Changed(_) => {}
            }
        }
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let (kind, place, len) = (input.byte(), u64::from(input.byte()), u32::from(input.byte()));
        let (op, len) = match kind % 5 {
            0 => (Op::Read, (len + 1) * 4096),
            1 => (Op::Write, (len + 1) * 512),
            2 => (Op::Flush, 0),
            3 => (Op::Discard, len + 1),
            _ => (Op::WriteZeroes, len + 1),
        };
        if let Some(slot) = self.initiator.submit(op, place * 4096, len) {
            let data = if matches!(op, Op::Read | Op::Write) { len } else { 0 };
            assert!(self.requests.insert(slot, data).is_none(), "a slot holds one request");
        }
    }

    fn wait(&mut self, span: Nanos) {
        self.now += span;
        self.initiator.handle_timeout(self.now);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut backend = Backend::new([1500, 9000][usize::from(input.byte() % 2)]);
    backend.initiator.set_access(Access::ReadWrite);
    for _ in 0..64 {
        backend.transmit();
        backend.wait(Nanos::from_millis(1));
    }
    assert_eq!(backend.initiator.state(), StateName::Open, "a good node gets through");
    while !input.is_empty() {
        let action = input.byte();
        match action {
            0..130 => {
                backend.pn += 1 + u64::from(input.byte() / 128) * 70;
                let frame = hostile::frame(&mut input, backend.cid, backend.pn);
                backend.take(&frame);
            }
            130..200 => backend.submit(&mut input),
            200..230 => backend.wait(Nanos::from_micros(1 << (action % 16))),
            230..240 => backend.initiator.not_sent(backend.now, u64::from(input.byte())),
            240..244 => backend.helps = !backend.helps,
            244..248 => {
                let mtu = if action % 2 == 0 { backend.mtu } else { 1500 };
                backend.initiator.link_changed(backend.now, MacAddress([2, 0, 0, 0, 0, 1]), mtu);
            }
            248..250 => {
                backend.initiator.abandon(backend.now);
                backend.requests.clear();
            }
            250..=255 => backend.wait(Nanos::from_millis(150)),
        }
        backend.events();
        backend.transmit();
        backend.events();
    }
});
