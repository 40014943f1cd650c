//! Whole frames, sealed as a worker seals them and opened as the other end does.

use cirro_protocol::op::{Op, Status};
use cirro_protocol::types::{ETHERNET_BYTES, MacAddress, Slot, Steer};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::header::FLAG_CRC_TRAILER;
use cirro_protocol::wire::long::{Body, LongFrame, Redirect};
use cirro_protocol::wire::message::RequestBody;
use cirro_protocol::wire::{Frame, Header, Kind, Message, Mode, pad_to_8};
use cirro_seal::{Mismatch, Nonces, append_payload_crcs, open_crc, open_long, seal_crc, seal_long};

const NONCES: Nonces = Nonces { sender: 0x1122_3344_5566_7788, receiver: 0x99aa_bbcc_ddee_ff00 };

/// A frame as the core and a worker make it: messages, each with its data if it carries any. The data is inserted last, as the link does.
fn sealed(mode: Mode, parts: &[(Message, Vec<u8>)]) -> Vec<u8> {
    let mut head = Vec::new();
    Ethernet { destination: MacAddress([1; 6]), source: MacAddress([2; 6]), ethertype: 0x88b5 }
        .emit(&mut head);
    Header { mode, pn: 7, flags: FLAG_CRC_TRAILER, steer: Steer::new(1, 2), ..Header::default() }
        .emit(&mut head);
    let mut cuts = Vec::new();
    for (message, data) in parts {
        let message = Message { plen: data.len() as u16, ..*message };
        message.emit(&mut head);
        cuts.push((head.len(), data));
        head.resize(head.len() + pad_to_8(data.len()), 0);
    }
    for (_, data) in &cuts {
        append_payload_crcs(&mut head, data);
    }
    seal_crc(NONCES, &mut head);
    for (at, data) in cuts.into_iter().rev() {
        head.splice(at..at, data.iter().copied());
    }
    head
}

fn data(len: usize, salt: u32) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(salt) >> 11) as u8).collect()
}

fn read_data(slot: u16) -> Message {
    Message { slot: Slot(slot), code: Status::Ok as u8, ..Message::bare(Kind::ReadData) }
}

/// A read's piece of 8 KiB and three quarters, a ping, a write's piece with a length that needs padding.
fn busy_frame() -> Vec<u8> {
    let write = Message { code: Op::Write as u8, ..Message::bare(Kind::WriteData) };
    sealed(
        Mode::Crc,
        &[(read_data(3), data(11_264, 1)), (Message::bare(Kind::Ping), vec![]), (write, data(1365, 2))],
    )
}

fn open(bytes: &[u8]) -> Result<(), Mismatch> {
    open_crc(NONCES, &Frame::parse(bytes).expect("the layout is right"))
}

#[test]
fn what_was_sealed_opens() {
    assert_eq!(open(&busy_frame()), Ok(()));
    for len in [8, 512, 1368, 4096, 4104, 8192, 12_288] {
        assert_eq!(open(&sealed(Mode::Crc, &[(read_data(1), data(len, 9))])), Ok(()), "{len} bytes");
    }
    assert_eq!(open(&sealed(Mode::Crc, &[(Message::bare(Kind::Ping), vec![])])), Ok(()));
    let request = Message {
        request: Some(RequestBody::default()),
        code: Op::Write as u8,
        ..Message::bare(Kind::Request)
    };
    assert_eq!(open(&sealed(Mode::Crc, &[(request, data(4096, 3))])), Ok(()));
}

#[test]
fn every_flipped_byte_behind_the_ethernet_header_is_found() {
    let frame = busy_frame();
    for at in ETHERNET_BYTES..frame.len() {
        let mut bad = frame.clone();
        bad[at] ^= 0x41;
        let accepted = Frame::parse(&bad).is_ok_and(|frame| open_crc(NONCES, &frame).is_ok());
        assert!(!accepted, "byte {at} of {}", frame.len());
    }
}

#[test]
fn a_frame_of_another_session_or_reflected_is_rejected() {
    let bytes = busy_frame();
    let frame = Frame::parse(&bytes).unwrap();
    for nonces in [
        Nonces { sender: NONCES.sender ^ 1, ..NONCES },
        Nonces { receiver: NONCES.receiver ^ 1 << 63, ..NONCES },
        Nonces { sender: NONCES.receiver, receiver: NONCES.sender },
        Nonces::default(),
    ] {
        assert_eq!(open_crc(nonces, &frame), Err(Mismatch::Tag));
    }
    assert_eq!(open_crc(Nonces::from((NONCES.sender, NONCES.receiver)), &frame), Ok(()));
}

#[test]
fn damaged_data_is_named_by_its_payload() {
    let frame = busy_frame();
    // 14 + 34 + 16; then 11264 bytes, a ping of 16, the next message's 16 and its 1365 bytes.
    let (first, second) = (64, 64 + 11_264 + 16 + 16);
    for (at, index) in [(first, 0), (first + 4096, 0), (first + 11_263, 0), (second, 1), (second + 1364, 1)] {
        let mut bad = frame.clone();
        bad[at] ^= 1;
        assert_eq!(open(&bad), Err(Mismatch::Payload { index }), "byte {at}");
    }
    // Two blocks of one payload in each other's place: each has the CRC of the other.
    let mut swapped = frame;
    let (one, two) = swapped[first..first + 8192].split_at_mut(4096);
    one.swap_with_slice(two);
    assert_eq!(open(&swapped), Err(Mismatch::Payload { index: 0 }));
}

#[test]
fn the_ethernet_header_is_not_covered() {
    let mut frame = busy_frame();
    frame[..12].fill(9);
    assert_eq!(open(&frame), Ok(()));
}

#[test]
fn another_mode_is_not_opened() {
    // A ping with twelve bytes more, which is what a 16-byte tag would need.
    let mut bytes = sealed(Mode::Aead, &[(Message::bare(Kind::Ping), vec![])]);
    bytes.extend_from_slice(&[0; 12]);
    assert_eq!(open(&bytes), Err(Mismatch::Mode));
}

#[test]
fn a_long_frame_opens_and_every_flipped_byte_of_it_is_found() {
    let body = Body::Redirect(Redirect { session_epoch: 1, initiator_nonce: 2, steer: Steer::new(1, 2) });
    let mut frame = Vec::new();
    LongFrame::new(MacAddress([1; 6]), MacAddress([2; 6]), Steer(0), body).emit(&mut frame);
    seal_long(&mut frame);
    assert_eq!(open_long(&frame), Ok(()));
    assert_eq!(LongFrame::parse(&frame).unwrap().body, body);
    for at in ETHERNET_BYTES..frame.len() {
        let mut bad = frame.clone();
        bad[at] ^= 0x80;
        assert_eq!(open_long(&bad), Err(Mismatch::Tag), "byte {at}");
    }
    for len in 0..18 {
        assert_eq!(open_long(&frame[..len]), Err(Mismatch::Tag), "{len} bytes");
    }
}
