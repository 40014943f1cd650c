//! Any bytes as a LONG frame: what parses is written again byte by byte.
//!
//! Knows the parser's promises only; whether the tag is right is not asked.
#![no_main]

use cirro_protocol::types::{ETHERNET_BYTES, VolumeName};
use cirro_protocol::wire::guarded::{FIRST_MARK_AT, Guarded};
use cirro_protocol::wire::long::{Body, LONG_FRAME_BYTES, LongFrame};
use cirro_seal::open_long;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(guarded) = Guarded::parse(bytes) {
        let mut head = Vec::new();
        guarded.emit(&mut head);
        assert_eq!(head[..], bytes[..FIRST_MARK_AT]);
    }
    let _fits = open_long(bytes);
    let Ok(frame) = LongFrame::parse(bytes) else { return };
    assert_eq!(bytes.len(), LONG_FRAME_BYTES);
    let mut head = Vec::new();
    frame.emit(&mut head);
    assert_eq!(head, bytes[..LONG_FRAME_BYTES - 4]);
    assert!(head.len() > ETHERNET_BYTES);
    let name = match frame.body {
        Body::Hello(body) => Some(body.volume),
        Body::WhoHas(body) => body.volume,
        Body::IHave(body) => body.volume,
        Body::HelloReply(_) | Body::ResetHint(_) | Body::Redirect(_) => None,
    };
    if let Some(name) = name {
        assert_eq!(VolumeName::new(name.as_str().as_bytes()), Ok(name));
    }
});
