//! Any bytes as a short frame: what parses stays within itself, is written again as it was, and can be checked.
//!
//! Knows the parser's promises only; whether a checksum is right is not asked.
#![no_main]

use cirro_protocol::types::{BLOCK_BYTES, ETHERNET_BYTES, MESSAGES_MAX, PAYLOADS_MAX};
use cirro_protocol::wire::header::HEADER_BYTES;
use cirro_protocol::wire::{Frame, Mode, pad_to_8};
use cirro_seal::{Nonces, open_crc};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(frame) = Frame::parse(bytes) else { return };
    let mut head = bytes[..ETHERNET_BYTES].to_vec();
    frame.header.emit(&mut head);
    let (mut messages, mut payloads, mut crcs) = (0, 0, 0);
    for payload in frame.messages() {
        payload.message.emit(&mut head);
        assert_eq!(head.len(), payload.range.start);
        let data = frame.payload(payload.range.clone());
        assert_eq!(data.len(), usize::from(payload.message.plen));
        head.extend_from_slice(data);
        head.resize(head.len() + pad_to_8(data.len()), 0);
        messages += 1;
        if payload.message.carries_data() {
            payloads += 1;
            let trailer_bytes = frame.header.mode.trailer_bytes(data.len());
            crcs += trailer_bytes / 4;
            assert!(frame.header.mode == Mode::Aead || trailer_bytes / 4 * BLOCK_BYTES >= data.len());
        }
    }
    assert!((1..=MESSAGES_MAX).contains(&messages) && payloads <= PAYLOADS_MAX);
    assert_eq!(head.len(), frame.trailer_start());
    assert_eq!(bytes.len() - head.len(), 4 * crcs + frame.header.mode.tag_bytes());
    // Mode 0 does not look at the key phase, nor any mode at what it does not know: compare all but `vt`.
    assert_eq!(head[ETHERNET_BYTES + 1..], bytes[ETHERNET_BYTES + 1..head.len()]);
    assert!(head.len() >= ETHERNET_BYTES + HEADER_BYTES);
    let _fits = open_crc(Nonces { sender: 1, receiver: 2 }, &frame);
});
