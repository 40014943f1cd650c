//! Golden frames, the specification's byte diagrams and the code must say the same of the same bytes.
//!
//! Each frame of `tests/golden/` is decoded three times: by hand (its annotations), by the `layout` tables of `docs/PROTOCOL.md`, and by
//! `cirro-protocol`. Then it is written again by `cirro-protocol` and compared byte by byte, and damaged to see that it is refused.
//! Does not know what messages mean in a session.

#[path = "golden/reader.rs"]
mod reader;

use std::collections::{BTreeMap, BTreeSet};

use cirro_protocol::types::{ETHERNET_BYTES, MacAddress, VolumeName};
use cirro_protocol::wire::body::{
    ACK_RANGE_BYTES, Access, OPEN_BYTES, OpenRequest, VOLUME_INFO_BYTES, VolumeInfo, parse_ack_ranges,
};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::header::{HEADER_BYTES, VERSION, VT_LONG};
use cirro_protocol::wire::long::{Body, LONG_BODY_BYTES, LONG_FRAME_BYTES, LongFrame};
use cirro_protocol::wire::message::{MESSAGE_BYTES, REQUEST_BYTES, RequestBody};
use cirro_protocol::wire::{Frame, Header, Kind, Message, Mode, Payload, Reject, pad_to_8};
use cirro_seal::{Mismatch, Nonces, open_crc, open_long, seal_crc, seal_long};
use reader::{Golden, Value, goldens, layouts};

/// What the code read from a structure: its name in the specification, and its fields.
type Parsed = (&'static str, Vec<(&'static str, Value)>);

/// Where the messages of a short frame begin.
const MESSAGES_AT: usize = ETHERNET_BYTES + HEADER_BYTES;

#[test]
fn layouts_have_no_gaps_and_the_sizes_of_the_code() {
    let sizes: BTreeMap<&str, usize> = BTreeMap::from([
        ("ethernet", ETHERNET_BYTES),
        ("frame-header", HEADER_BYTES),
        ("message", MESSAGE_BYTES),
        ("request-body", REQUEST_BYTES),
        ("open-request", OPEN_BYTES),
        ("volume-info", VOLUME_INFO_BYTES),
        ("ack-range", ACK_RANGE_BYTES),
        ("long-header", HEADER_BYTES),
    ]);
    let layouts = layouts();
    assert_eq!(layouts.len(), 14, "every structure of the protocol has a layout");
    for layout in &layouts {
        let end: usize = layout.rows.iter().map(|row| row.size).sum();
        match sizes.get(layout.name.as_str()) {
            Some(size) => assert_eq!(end, *size, "{}", layout.name),
            None => assert!(end <= LONG_BODY_BYTES, "{} is the body of a LONG frame", layout.name),
        }
    }
}

/// P-01: the annotations were made by hand from the specification; byte order is part of each type.
#[test]
fn golden_frames_are_laid_out_as_the_specification_says() {
    let layouts = layouts();
    for golden in goldens() {
        for section in &golden.sections {
            let Some(layout) = layouts.iter().find(|layout| layout.name == section.name) else {
                assert!(
                    ["data", "control", "rest", "trailer"].contains(&section.name.as_str()),
                    "{}",
                    section.name
                );
                continue;
            };
            let named: Vec<_> = section.fields.iter().map(|f| (f.name.as_str(), f.bytes.len())).collect();
            let rows: Vec<_> = layout.rows.iter().map(|row| (row.field.as_str(), row.size)).collect();
            assert_eq!(named, rows, "{} [{}]", golden.name, section.name);
            assert!(!section.values(layout).is_empty());
        }
    }
}

#[test]
fn the_code_reads_what_the_layouts_say() {
    let layouts = layouts();
    for golden in goldens() {
        let bytes = golden.bytes();
        let parsed = if is_long(&bytes) { parse_long(&bytes) } else { parse_short(&bytes) };
        let sections =
            golden.sections.iter().filter_map(|s| Some((s, layouts.iter().find(|l| l.name == s.name)?)));
        let expected: Vec<_> = sections
            .map(|(section, layout)| (layout.name.clone(), section.values(layout).into_iter().collect()))
            .collect();
        let parsed: Vec<_> = parsed.into_iter().map(by_name).collect();
        assert_eq!(parsed, expected, "{}", golden.name);
    }
}

#[test]
fn the_code_writes_the_same_bytes() {
    for golden in goldens() {
        let bytes = golden.bytes();
        let mut head = Vec::new();
        if is_long(&bytes) {
            LongFrame::parse(&bytes).unwrap().emit(&mut head);
        } else {
            let frame = Frame::parse(&bytes).unwrap();
            Ethernet::parse(&bytes).unwrap().emit(&mut head);
            frame.header.emit(&mut head);
            frame
                .messages()
                .for_each(|payload| emit_message(&payload, frame.payload(payload.range.clone()), &mut head));
            assert_eq!(head.len(), frame.trailer_start(), "{}", golden.name);
        }
        assert_eq!(head, bytes[..head.len()], "{}", golden.name);
        let trailer = golden.sections.last().unwrap();
        let expected = ("trailer", bytes.len() - head.len());
        assert_eq!((trailer.name.as_str(), trailer.bytes().len()), expected, "{}", golden.name);
    }
}

/// P-19, P-20, P-28: trailer and tag by a bitwise CRC32C that shares nothing with the code.
#[test]
fn checksums_are_those_of_the_specification() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    for golden in goldens() {
        let bytes = golden.bytes();
        let mut covered = [golden.nonces.0.to_le_bytes(), golden.nonces.1.to_le_bytes()].concat();
        let mut crcs = Vec::new();
        for section in golden.sections.iter().filter(|section| section.name != "ethernet") {
            for field in section.fields.iter().filter(|field| field.name != "tag") {
                if section.name == "data" && field.name == "bytes" {
                    crcs.extend(field.bytes.chunks(4096).flat_map(|block| crc32c(block).to_le_bytes()));
                } else {
                    covered.extend(&field.bytes);
                }
            }
        }
        let (rest, tag) = bytes.split_at(bytes.len() - 4);
        assert!(rest.ends_with(&crcs), "{}: trailer", golden.name);
        assert_eq!(crc32c(&covered).to_le_bytes(), tag, "{}: tag", golden.name);
    }
}

/// P-19, P-20, P-21, P-28: what the daemons seal and open frames with gives the golden tags, and refuses every other.
#[test]
fn the_code_seals_and_opens_golden_frames() {
    for golden in goldens() {
        let bytes = golden.bytes();
        let nonces = Nonces::from(golden.nonces);
        let (mut head, tag) = (without_data(&golden), &bytes[bytes.len() - 4..]);
        head.truncate(head.len() - 4);
        if is_long(&bytes) {
            seal_long(&mut head);
            assert_eq!(open_long(&bytes), Ok(()), "{}", golden.name);
            let body = MESSAGES_AT + LONG_BODY_BYTES / 2;
            assert_eq!(open_long(&with(&bytes, body, !bytes[body])), Err(Mismatch::Tag), "{}", golden.name);
        } else {
            seal_crc(nonces, &mut head);
            let frame = Frame::parse(&bytes).unwrap();
            assert_eq!(open_crc(nonces, &frame), Ok(()), "{}", golden.name);
            let older = Nonces { sender: nonces.sender ^ 1, ..nonces };
            assert_eq!(open_crc(older, &frame), Err(Mismatch::Tag), "{}", golden.name);
            let data = frame.messages().filter(|payload| payload.message.carries_data());
            for (index, payload) in data.enumerate() {
                let damaged = with(&bytes, payload.range.start, !bytes[payload.range.start]);
                let opened = open_crc(nonces, &Frame::parse(&damaged).unwrap());
                assert_eq!(opened, Err(Mismatch::Payload { index }), "{}", golden.name);
            }
        }
        assert_eq!(&head[head.len() - 4..], tag, "{}", golden.name);
    }
}

/// All bytes of a frame but its data payloads.
fn without_data(golden: &Golden) -> Vec<u8> {
    let fields =
        golden.sections.iter().flat_map(|section| section.fields.iter().map(move |field| (section, field)));
    let kept = fields.filter(|(section, field)| section.name != "data" || field.name != "bytes");
    kept.flat_map(|(_, field)| field.bytes.clone()).collect()
}

/// P-08: CRC_TRAILER stands in exactly the frames with a data payload.
#[test]
fn golden_frames_show_every_kind_and_type() {
    let (mut kinds, mut types, mut seen) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for golden in goldens() {
        let bytes = golden.bytes();
        seen.extend(golden.sections.iter().map(|section| section.name.clone()));
        if is_long(&bytes) {
            types.insert(bytes[ETHERNET_BYTES + 1]);
            continue;
        }
        let frame = Frame::parse(&bytes).unwrap();
        kinds.extend(frame.messages().map(|payload| payload.message.kind as u8));
        let data = frame.messages().any(|payload| payload.message.carries_data());
        assert_eq!(data, frame.header.flags & 2 != 0, "{}", golden.name);
    }
    assert_eq!(kinds, (1..=10).collect());
    assert_eq!(types, BTreeSet::from([1, 2, 4, 5, 6, 7]));
    let missing: Vec<_> = layouts().into_iter().filter(|layout| !seen.contains(&layout.name)).collect();
    assert!(missing.is_empty(), "layouts without a golden frame: {missing:?}");
}

/// P-17: a frame that ends anywhere else is refused, or ends after a message, and then its tag does not fit. P-26: a LONG frame has one size.
#[test]
fn a_frame_of_another_length_is_refused() {
    for golden in goldens() {
        let bytes = golden.bytes();
        for length in 0..bytes.len() {
            let cut = &bytes[..length];
            assert!(
                refused(cut, &bytes).is_some() || !tag_fits(cut, golden.nonces),
                "{} cut to {length}",
                golden.name
            );
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(refused(&longer, &bytes).is_some(), "{} with a byte more", golden.name);
        assert!(is_long(&bytes) || tag_fits(&bytes, golden.nonces), "{} is whole", golden.name);
        if is_long(&bytes) {
            assert_eq!(bytes.len(), 204);
        }
    }
}

/// P-02, P-03, P-04, P-05: the header's rules, one damaged byte each.
#[test]
fn a_header_that_breaks_a_rule_is_refused() {
    let golden = golden("req-reads");
    let vt = ETHERNET_BYTES;
    assert_eq!(damaged(&golden, vt, 0x40), Some(Reject::Version));
    assert_eq!(damaged(&golden, vt, 0x30), Some(Reject::Form));
    assert_eq!(damaged(&golden, vt, 0x22), Some(Reject::Mode));
    assert_eq!(damaged(&golden, vt, 0x23), Some(Reject::Mode));
    for bit in 2..8 {
        assert_eq!(damaged(&golden, vt + 1, 1 << bit), Some(Reject::Field), "fflags bit {bit}");
    }
    assert_eq!(damaged(&golden, vt + 8, 0), Some(Reject::Field), "pn 0");
}

/// P-07: a header alone is no frame. P-09: padding is zero. P-10: codes are known.
#[test]
fn a_message_that_breaks_a_rule_is_refused() {
    let reads = golden("req-reads");
    let bare = [&reads.bytes()[..MESSAGES_AT], &[0; 4]].concat();
    assert_eq!(Frame::parse(&bare).err(), Some(Reject::Truncated));
    for (name, offset, value) in [
        ("req-reads", 10, 0),
        ("req-reads", 10, 11),
        ("req-reads", 11, 0),
        ("req-reads", 11, 6),
        ("req-reads", 11, 19),
        ("wdata", 11, 1),
        ("resp-open", 11, 12),
        ("rdata", 11, 1),
        ("probe-echo", 11, 2),
    ] {
        assert_eq!(
            damaged(&golden(name), MESSAGES_AT + offset, value),
            Some(Reject::Kind),
            "{name} {offset} {value}"
        );
    }
    let probe = golden("probe-echo");
    let pad = MESSAGES_AT + MESSAGE_BYTES + 100;
    for byte in pad..pad + 4 {
        assert_eq!(damaged(&probe, byte, 1), Some(Reject::Padding), "padding byte {byte}");
    }
}

/// P-11: 64 messages and 32 data payloads pass, one more does not.
#[test]
fn a_frame_with_too_much_in_it_is_refused() {
    let header = golden("req-write").bytes()[..MESSAGES_AT].to_vec();
    let frame = |count: usize, message: &[u8], crcs: usize| {
        let mut bytes = header.clone();
        bytes.extend(message.repeat(count));
        bytes.resize(bytes.len() + 4 * crcs + 4, 0);
        Frame::parse(&bytes).map(|frame| frame.messages().count())
    };
    let pad = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0];
    assert_eq!((frame(64, &pad, 0), frame(65, &pad, 0)), (Ok(64), Err(Reject::TooMany)));
    let data = [0, 0, 1, 0, 0, 0, 0, 0, 8, 0, 2, 2, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    assert_eq!((frame(32, &data, 32), frame(33, &data, 33)), (Ok(32), Err(Reject::TooMany)));
}

/// P-12: bytes that are reserved for later are not looked at. P-22: a frame in another mode than the session's does not open.
#[test]
fn what_is_for_later_versions_changes_nothing_now() {
    let reads = golden("req-reads");
    let bytes = reads.bytes();
    let nonces = Nonces::from(reads.nonces);
    let first = |bytes: &[u8]| Frame::parse(bytes).unwrap().messages().next().unwrap().message;
    for offset in [15, MESSAGE_BYTES + 20, MESSAGE_BYTES + 23] {
        let mut message = first(&with(&bytes, MESSAGES_AT + offset, 0x81));
        message.flags = 0;
        message.request.as_mut().unwrap().map_version = 0;
        assert_eq!(message, first(&bytes), "message byte {offset}");
    }
    let sealed_otherwise = [&with(&bytes, ETHERNET_BYTES, 0x21), [0; 12].as_slice()].concat();
    let frame = Frame::parse(&sealed_otherwise).unwrap();
    assert_eq!((frame.header.mode, open_crc(nonces, &frame)), (Mode::Aead, Err(Mismatch::Mode)));
}

/// P-24, P-25: control payloads are refused as a whole.
#[test]
fn a_control_payload_that_breaks_a_rule_is_refused() {
    let open = section_bytes("req-open", "open-request");
    for (offset, value) in [(0, 2), (1, 2), (2, 1), (7, 1)] {
        assert_eq!(
            OpenRequest::parse(&with(&open, offset, value)),
            Err(Reject::Field),
            "open-request {offset}"
        );
    }
    assert_eq!(OpenRequest::parse(&open[..15]), Err(Reject::Field));
    let info = section_bytes("resp-open", "volume-info");
    for (offset, value) in [(7, 0xff), (20, 1), (21, 0x20), (30, 0)] {
        assert_eq!(
            VolumeInfo::parse(&with(&info, offset, value)),
            Err(Reject::Field),
            "volume-info {offset}"
        );
    }
    assert_eq!(VolumeInfo::parse(&info[..55]), Err(Reject::Field));
    let range = section_bytes("ack-ranges", "ack-range");
    let ranges = |bytes: &[u8]| parse_ack_ranges(bytes).map(Iterator::count);
    assert_eq!(ranges(&range.repeat(32)), Ok(32));
    assert_eq!(ranges(&range.repeat(33)), Err(Reject::Field), "33 ranges");
    assert_eq!(ranges(&range[..15]), Err(Reject::Field));
    assert_eq!(ranges(&with(&range, 0, 9)), Err(Reject::Field), "reversed");
    assert_eq!(ranges(&with(&range, 0, 0)), Err(Reject::Field), "number 0");
}

/// P-27, P-29, P-30: what a LONG frame may not say.
#[test]
fn a_long_frame_that_breaks_a_rule_is_refused() {
    let hello = golden("hello");
    let body = MESSAGES_AT;
    for low in 1..16 {
        assert_eq!(damaged(&hello, ETHERNET_BYTES, 0x30 | low), Some(Reject::Mode), "low bits of vt {low}");
    }
    for reserved in (ETHERNET_BYTES + 4..body).chain(body + 127..body + LONG_BODY_BYTES) {
        assert_eq!(damaged(&hello, reserved, 1), Some(Reject::Padding), "byte {reserved}");
    }
    for kind in [0, 3, 8, 255] {
        assert_eq!(damaged(&hello, ETHERNET_BYTES + 1, kind), Some(Reject::Kind), "type {kind}");
    }
    let name = [(0, 0), (0, 65), (0, 9), (1, b'-'), (1, b'.'), (2, b'/'), (2, 0), (1 + 10, b'x')];
    let limits = [(120, 4), (121, 0), (123 + 1, 0)];
    for (offset, value) in name.into_iter().chain(limits) {
        assert_eq!(damaged(&hello, body + offset, value), Some(Reject::Field), "HELLO {offset} = {value}");
    }
    let reply = golden("hello-reply");
    for (offset, value) in [(16, 12), (72, 4), (73, 0), (74, 2)] {
        assert_eq!(
            damaged(&reply, body + offset, value),
            Some(Reject::Field),
            "HELLO_REPLY {offset} = {value}"
        );
    }
}

/// P-13: only frames with something to hear ask for an ack.
#[test]
fn bare_acks_padding_and_close_ask_for_no_ack() {
    let asks = |name| Frame::parse(&golden(name).bytes()).unwrap().asks_for_ack();
    let asking =
        ["req-reads", "req-write", "wdata", "resp-open", "rdata", "ping-pad", "probe-echo", "event-close"];
    assert!(asking.into_iter().all(asks));
    assert!(!asks("ack-ranges"));
    for kind in [Kind::AckRanges, Kind::Pad, Kind::Close] {
        let mut bytes = golden("ping-pad").bytes()[..MESSAGES_AT].to_vec();
        Message::bare(kind).emit(&mut bytes);
        bytes.extend([0; 4]);
        assert!(!Frame::parse(&bytes).unwrap().asks_for_ack(), "{kind:?}");
    }
}

fn golden(name: &str) -> Golden {
    goldens()
        .into_iter()
        .find(|golden| golden.name == name)
        .unwrap_or_else(|| panic!("no golden frame {name}"))
}

fn section_bytes(name: &str, section: &str) -> Vec<u8> {
    golden(name).sections.iter().find(|s| s.name == section).unwrap().bytes()
}

fn is_long(bytes: &[u8]) -> bool {
    bytes[ETHERNET_BYTES] & VT_LONG != 0
}

fn with(bytes: &[u8], offset: usize, value: u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    assert_ne!(bytes[offset], value, "the damage must change something");
    bytes[offset] = value;
    bytes
}

/// Why `bytes`, read in the form of `original`, are refused.
fn refused(bytes: &[u8], original: &[u8]) -> Option<Reject> {
    if is_long(original) { LongFrame::parse(bytes).err() } else { Frame::parse(bytes).err() }
}

/// Why the frame is refused with `value` at `offset`.
fn damaged(golden: &Golden, offset: usize, value: u8) -> Option<Reject> {
    let bytes = golden.bytes();
    refused(&with(&bytes, offset, value), &bytes)
}

/// True if the tag of a short frame that parses is right.
fn tag_fits(bytes: &[u8], nonces: (u64, u64)) -> bool {
    let frame = Frame::parse(bytes).unwrap();
    let mut covered = [nonces.0.to_le_bytes(), nonces.1.to_le_bytes()].concat();
    let mut at = ETHERNET_BYTES;
    for Payload { range, .. } in frame.messages().filter(|payload| payload.message.carries_data()) {
        covered.extend(&bytes[at..range.start]);
        at = range.end;
    }
    covered.extend(&bytes[at..bytes.len() - 4]);
    bytes.ends_with(&crc32c(&covered).to_le_bytes())
}

fn by_name((name, fields): Parsed) -> (String, BTreeMap<String, Value>) {
    (name.to_owned(), fields.into_iter().map(|(field, value)| (field.to_owned(), value)).collect())
}

fn n(value: impl Into<u64>) -> Value {
    Value::Number(value.into())
}

fn t(value: impl ToString) -> Value {
    Value::Text(value.to_string())
}

fn ethernet(bytes: &[u8]) -> Parsed {
    let Ethernet { destination, source, ethertype } = Ethernet::parse(bytes).unwrap();
    let mac = |MacAddress(m): MacAddress| t(m.map(|byte| format!("{byte:02x}")).join(":"));
    (
        "ethernet",
        vec![("destination", mac(destination)), ("source", mac(source)), ("ethertype", n(ethertype))],
    )
}

fn parse_short(bytes: &[u8]) -> Vec<Parsed> {
    let frame = Frame::parse(bytes).unwrap();
    let Header { mode, key_phase, flags, steer, cid, pn, ack_pn, ack_bits, ack_delay, credit } = frame.header;
    let vt = VERSION << 5 | key_phase << 2 | u8::from(mode == Mode::Aead);
    let header = vec![
        ("vt", n(vt)),
        ("fflags", n(flags)),
        ("steer", n(steer.0)),
        ("cid", n(cid.0)),
        ("pn", n(pn)),
        ("ack_pn", n(ack_pn)),
        ("ack_bits", n(ack_bits)),
        ("ack_delay", n(ack_delay)),
        ("credit", n(credit)),
    ];
    let mut parsed = vec![ethernet(bytes), ("frame-header", header)];
    for Payload { message, range } in frame.messages() {
        parsed.extend(message_values(&message));
        parsed.extend(control_values(&message, &bytes[range]));
    }
    parsed
}

fn message_values(message: &Message) -> Vec<Parsed> {
    let Message { kind, slot, sseq, frag_off, plen, code, mlen, flags, request } = *message;
    let header = vec![
        ("slot", n(slot.0)),
        ("sseq", n(sseq)),
        ("frag_off", n(frag_off)),
        ("plen", n(plen)),
        ("kind", n(kind as u8)),
        ("code", n(code)),
        ("mlen", n(mlen)),
        ("mflags", n(flags)),
    ];
    let body = request.map(
        |RequestBody { offset, vol_epoch, vol_handle, map_version, timeout_hint_ms, trace_id }| {
            let fields = vec![
                ("offset", n(offset)),
                ("vol_epoch", n(vol_epoch)),
                ("vol_handle", n(vol_handle)),
                ("map_version", n(map_version)),
                ("timeout_hint_ms", n(timeout_hint_ms)),
                ("trace_id", n(trace_id)),
            ];
            ("request-body", fields)
        },
    );
    [("message", header)].into_iter().chain(body).collect()
}

fn control_values(message: &Message, payload: &[u8]) -> Vec<Parsed> {
    if message.carries_data() || payload.is_empty() {
        return Vec::new();
    }
    match message.kind {
        Kind::Request => {
            let OpenRequest { access, take_over } = OpenRequest::parse(payload).unwrap();
            let access = ("access", n(access == Access::ReadWrite));
            let epoch = ("take_over", n(take_over.unwrap_or(0)));
            vec![("open-request", vec![access, ("oflags", n(take_over.is_some())), epoch])]
        }
        Kind::Response | Kind::Event => {
            let info = VolumeInfo::parse(payload).unwrap();
            let serial = String::from_utf8(info.serial.to_vec()).unwrap();
            let fields = vec![
                ("capacity_sectors", n(info.capacity_sectors)),
                ("vol_epoch", n(info.vol_epoch)),
                ("vol_handle", n(info.vol_handle)),
                ("block_bytes", n(info.block_bytes)),
                ("flags", n(info.flags)),
                ("request_bytes_max", n(info.request_bytes_max)),
                ("serial", t(serial.trim_end_matches('\0'))),
            ];
            vec![("volume-info", fields)]
        }
        Kind::AckRanges => {
            let ranges = parse_ack_ranges(payload).unwrap();
            ranges.map(|(first, last)| ("ack-range", vec![("first", n(first)), ("last", n(last))])).collect()
        }
        Kind::Probe => Vec::new(),
        Kind::WriteData | Kind::ReadData | Kind::Ping | Kind::Close | Kind::Pad => {
            panic!("{message:?} has no payload")
        }
    }
}

fn parse_long(bytes: &[u8]) -> Vec<Parsed> {
    assert_eq!(bytes.len(), LONG_FRAME_BYTES);
    let LongFrame { ethernet: _, steer, body } = LongFrame::parse(bytes).unwrap();
    let (code, name, fields) = long_values(&body);
    let header = vec![("vt", n(VERSION << 5 | VT_LONG)), ("type", n(code)), ("steer", n(steer.0))];
    vec![ethernet(bytes), ("long-header", header), (name, fields)]
}

fn long_values(body: &Body) -> (u8, &'static str, Vec<(&'static str, Value)>) {
    let named = |name: Option<VolumeName>| {
        let text = name.map_or(String::new(), |name| name.to_string());
        vec![("name_bytes", n(text.len() as u64)), ("volume", t(text))]
    };
    let (code, name, mut fields, more) = match *body {
        Body::Hello(b) => {
            let place =
                vec![("cid", n(b.cid.0)), ("steer", n(b.steer.0)), ("mtu", n(b.mtu)), ("slots", n(b.slots))];
            let who = vec![
                ("node", t(b.node)),
                ("attachment", t(b.attachment)),
                ("session_epoch", n(b.session_epoch)),
            ];
            let rest = vec![("nonce", n(b.nonce)), ("piece_bytes_max", n(b.piece_bytes_max))];
            (1, "hello", named(Some(b.volume)), [place, who, rest].concat())
        }
        Body::HelloReply(b) => {
            let echo = vec![("session_epoch", n(b.session_epoch)), ("initiator_nonce", n(b.initiator_nonce))];
            let who =
                vec![("status", n(b.status as u8)), ("node", t(b.node)), ("incarnation", t(b.incarnation))];
            let place = vec![
                ("nonce", n(b.nonce)),
                ("token", n(b.token)),
                ("cid", n(b.cid.0)),
                ("steer", n(b.steer.0)),
            ];
            let limits = vec![("mtu", n(b.mtu)), ("slots", n(b.slots)), ("piece_bytes", n(b.piece_bytes))];
            let more =
                vec![("request_bytes_max", n(b.request_bytes_max)), ("credit_sectors", n(b.credit_sectors))];
            (2, "hello-reply", echo, [who, place, limits, more].concat())
        }
        Body::ResetHint(b) => {
            let cid = vec![("cid", n(b.cid.0))];
            (4, "reset-hint", cid, vec![("token", n(b.token)), ("incarnation", t(b.incarnation))])
        }
        Body::Redirect(b) => {
            let echo = vec![("session_epoch", n(b.session_epoch)), ("initiator_nonce", n(b.initiator_nonce))];
            (5, "redirect", echo, vec![("steer", n(b.steer.0))])
        }
        Body::WhoHas(b) => {
            (6, "who-has", named(b.volume), vec![("nonce", n(b.nonce)), ("steer", n(b.steer.0))])
        }
        Body::IHave(b) => {
            let who = vec![("node", t(b.node)), ("incarnation", t(b.incarnation))];
            let place = vec![("nonce", n(b.nonce)), ("steer", n(b.steer.0))];
            (7, "i-have", named(b.volume), [who, place].concat())
        }
    };
    fields.extend(more);
    (code, name, fields)
}

/// Writes a message from what was parsed; control payloads from their structs.
fn emit_message(payload: &Payload, bytes: &[u8], head: &mut Vec<u8>) {
    payload.message.emit(head);
    let structured = !payload.message.carries_data() && !bytes.is_empty();
    match payload.message.kind {
        Kind::Request if structured => OpenRequest::parse(bytes).unwrap().emit(head),
        Kind::Response | Kind::Event if structured => VolumeInfo::parse(bytes).unwrap().emit(head),
        Kind::AckRanges => parse_ack_ranges(bytes).unwrap().for_each(|(first, last)| {
            head.extend(first.to_le_bytes());
            head.extend(last.to_le_bytes());
        }),
        Kind::Request | Kind::Response | Kind::Event | Kind::WriteData | Kind::ReadData | Kind::Probe => {
            head.extend(bytes)
        }
        Kind::Ping | Kind::Close | Kind::Pad => assert!(bytes.is_empty()),
    }
    head.resize(head.len() + pad_to_8(bytes.len()), 0);
}

/// CRC32C bit by bit: reflected polynomial 0x82f63b78, RFC 3720 appendix B.4.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}
