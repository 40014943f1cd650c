//! Frames of a peer that keeps the layout and breaks every other rule, made out of fuzzed bytes. Shared by the session targets.
//!
//! Knows the wire; does not know which end it plays.

use cirro_protocol::types::{Cid, MacAddress, Slot};
use cirro_protocol::wire::body::{Access, OpenRequest, VolumeInfo};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::header::FLAG_ACK_NOW;
use cirro_protocol::wire::message::RequestBody;
use cirro_protocol::wire::{Frame, Header, Kind, Message, Mode, pad_to_8};

/// The peer that is fuzzed.
pub const PEER: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
/// Our side.
pub const HERE: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
/// Lengths near which something changes.
const LENGTHS: [u32; 8] = [0, 1, 512, 4096, 8192, 8193, 1 << 20, (1 << 24) - 1];

/// Fuzzed bytes, taken off the front; zero when there are no more.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// True when all were taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn length(&mut self) -> u32 {
        let byte = self.byte();
        if byte < 128 { LENGTHS[usize::from(byte % 8)] } else { u32::from(byte) * 512 }
    }
}

/// A volume that a node could have.
pub fn volume() -> VolumeInfo {
    VolumeInfo {
        capacity_sectors: 1 << 20,
        vol_epoch: 3,
        vol_handle: 1,
        block_bytes: 512,
        flags: 0b110,
        request_bytes_max: 1 << 20,
        serial: [0; 20],
    }
}

/// A whole frame with the next bytes as its contents; it always parses.
pub fn frame(input: &mut Input<'_>, cid: Cid, pn: u64) -> Vec<u8> {
    let shape = input.byte();
    let mut bytes = start(cid, pn, shape, u32::from(input.byte()), u64::from(input.byte()) << (shape % 64));
    let mut crcs = 0;
    for _ in 0..=shape % 3 {
        let (message, payload) = message(input);
        push(&mut bytes, message, &payload);
        crcs += if message.carries_data() { Mode::Crc.trailer_bytes(payload.len()) / 4 } else { 0 };
    }
    bytes.resize(bytes.len() + 4 * crcs + 4, 0);
    assert!(Frame::parse(&bytes).is_ok(), "the generator keeps the layout");
    bytes
}

/// The Ethernet and frame header of a frame from the peer.
pub fn start(cid: Cid, pn: u64, shape: u8, ack_pn: u32, ack_bits: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    Ethernet { destination: HERE, source: PEER, ethertype: 0x88b5 }.emit(&mut bytes);
    let flags = if shape & 0x40 != 0 { FLAG_ACK_NOW } else { 0 };
    let credit = u32::from(shape) << 8;
    Header { cid, pn, flags, ack_pn, ack_bits, credit, ..Header::default() }.emit(&mut bytes);
    bytes
}

/// Appends a message and its payload.
pub fn push(bytes: &mut Vec<u8>, mut message: Message, payload: &[u8]) {
    message.plen = payload.len() as u16;
    message.emit(bytes);
    bytes.extend(payload);
    bytes.resize(bytes.len() + pad_to_8(payload.len()), 0);
}

fn message(input: &mut Input<'_>) -> (Message, Vec<u8>) {
    let kind = Kind::from_code(1 + input.byte() % 10).expect("1 to 10 are kinds");
    let place = input.byte();
    let code = input.byte();
    let code = match kind {
        Kind::Request => [1, 2, 3, 4, 5, 16, 17, 18][usize::from(code % 8)],
        Kind::WriteData => 2,
        Kind::Response => code % 12,
        Kind::ReadData => 0,
        Kind::Probe => code % 2,
        Kind::AckRanges | Kind::Ping | Kind::Event | Kind::Close | Kind::Pad => code,
    };
    let slot = match place % 8 {
        7 => 256 + u16::from(place / 128) * 1000,
        slot => u16::from(slot),
    };
    let sseq = if place & 0x40 != 0 { u16::MAX } else { u16::from(place >> 3 & 7) };
    let request = (kind == Kind::Request).then(|| RequestBody {
        offset: u64::from(input.length()),
        vol_handle: 1,
        vol_epoch: 3,
        ..RequestBody::default()
    });
    let message = Message {
        slot: Slot(slot),
        sseq,
        code,
        mlen: input.length(),
        frag_off: input.length(),
        request,
        ..Message::bare(kind)
    };
    (message, payload(input))
}

fn payload(input: &mut Input<'_>) -> Vec<u8> {
    let mut payload = Vec::new();
    match input.byte() % 8 {
        0 => volume().emit(&mut payload),
        1 => OpenRequest { access: Access::ReadWrite, take_over: None }.emit(&mut payload),
        2 => payload.resize(input.length().min(8192) as usize, 0xa5),
        3 => payload.extend((0..32).map(|_| input.byte())),
        4 => payload.extend([
            8,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            9,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            1,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            u8::MAX,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]),
        _ => {}
    }
    payload
}
