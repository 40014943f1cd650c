//! Handshakes and frames with keys: both ends as the daemons use them, and what neither may let pass.

use std::sync::Arc;

use cirro_protocol::op::Status;
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{Cid, ETHERNET_BYTES, MacAddress, Steer, Uuid};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::guarded::{FIRST_MARK_AT, GUARDED_FRAME_BYTES};
use cirro_protocol::wire::header::CLEAR_BYTES;
use cirro_protocol::wire::long::{Body, Hello, HelloReply, LongFrame, Redirect};
use cirro_protocol::wire::{Header, Kind, Message, Mode};
use cirro_seal::{
    Admission, Answerer, Caller, Identity, Mismatch, Secret, SessionKeys, new_private, os_entropy,
};

const CLIENT: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const NODE: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
const CID: Cid = Cid(0x0012_3456);
const STEER: Steer = Steer(0x2801);
const NOW: Instant = Instant(1_000_000_000);

fn identity() -> Arc<Identity> {
    Arc::new(Identity::new(new_private(&os_entropy()), os_entropy()).with_phase_bits(4))
}

fn hello(session_epoch: u64) -> Hello {
    Hello {
        volume: "secret-volume".parse().unwrap(),
        node: Uuid([7; 16]),
        attachment: Uuid([9; 16]),
        session_epoch,
        nonce: 5,
        cid: CID,
        steer: STEER,
        mtu: 9000,
        slots: 256,
        piece_bytes_max: u32::MAX,
    }
}

fn reply(status: Status) -> Body {
    Body::HelloReply(HelloReply {
        session_epoch: 1,
        initiator_nonce: 5,
        status,
        node: Uuid([7; 16]),
        incarnation: Uuid([8; 16]),
        nonce: 6,
        token: 0xfeed,
        cid: Cid(3),
        steer: Steer::new(2, 0),
        mtu: 9000,
        slots: 256,
        piece_bytes: 8192,
        request_bytes_max: 1 << 20,
        credit_sectors: 8192,
    })
}

/// What the core writes, sealed by the caller.
fn sealed(caller: &mut Caller, body: Body) -> Vec<u8> {
    let mut head = Vec::new();
    LongFrame::new(CLIENT, NODE, Steer(9), body).emit(&mut head);
    caller.seal(&mut head, (CID, STEER));
    head
}

fn answer_frame(body: Body) -> LongFrame {
    LongFrame::new(NODE, CLIENT, STEER, body)
}

struct Pair {
    caller: Caller,
    answerer: Answerer,
    client: Arc<Identity>,
    psk: Secret,
}

impl Pair {
    fn new() -> Pair {
        let (client, node) = (identity(), identity());
        let psk = Secret::new([3; 32]);
        let caller = Caller::new(Arc::clone(&client), node.public(), psk.clone());
        Pair { caller, answerer: Answerer::new(node), client, psk }
    }

    /// A whole handshake; the keys of both ends.
    fn shake(&mut self) -> (SessionKeys, SessionKeys) {
        let frame = sealed(&mut self.caller, Body::Hello(hello(1)));
        let marked = self.answerer.check(&frame).unwrap();
        let (long, pending) = self.answerer.read_hello(&marked).unwrap();
        assert_eq!((long.body, pending.client), (Body::Hello(hello(1)), self.client.public()));
        let answer = answer_frame(reply(Status::Ok));
        let (frame, theirs) = self.answerer.answer(pending, &self.psk, &answer).unwrap();
        let opened = self.caller.open_answer(&frame).unwrap().expect("no cookie");
        assert_eq!(opened.frame.body, answer.body);
        (*opened.keys.expect("a session"), theirs)
    }
}

/// A frame of the core with some text in it.
fn frame(pn: u64, text: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    Ethernet { destination: NODE, source: CLIENT, ethertype: 0x88b5 }.emit(&mut frame);
    Header { mode: Mode::Aead, pn, cid: CID, steer: STEER, ack_pn: 77, ..Header::default() }.emit(&mut frame);
    let message = Message { plen: text.len() as u16, code: 0, ..Message::bare(Kind::Probe) };
    message.emit(&mut frame);
    frame.extend_from_slice(text);
    frame
}

fn open(keys: &mut SessionKeys, bytes: &[u8]) -> Result<Vec<u8>, Mismatch> {
    let header = Header::parse(&bytes[ETHERNET_BYTES..]).map_err(|_| Mismatch::Layout)?;
    let mut plain = Vec::new();
    let frame = keys.open(&header, bytes, &mut plain)?;
    assert_eq!(frame.header.ack_pn, 77, "the encrypted part of the header is read too");
    let message = frame.messages().next().unwrap();
    Ok(frame.payload(message.range).to_vec())
}

/// P-107: what was sealed opens at the other end and nowhere else; any changed byte behind the Ethernet header is found; the text is not in
/// the frame.
#[test]
fn frames_open_at_the_other_end_only_and_unchanged_only() {
    let (mut ours, mut theirs) = Pair::new().shake();
    let (mut ours_of_another, _) = Pair::new().shake();
    let text = b"sixteen of words and then sixteen more of it!!!!";
    let mut bytes = frame(1, text);
    ours.seal(1, &mut bytes);
    assert_eq!(bytes.len(), frame(1, text).len() + 16);
    assert!(!bytes.windows(8).any(|window| text.windows(8).any(|part| part == window)));
    assert_eq!(bytes[ETHERNET_BYTES + 8..ETHERNET_BYTES + CLEAR_BYTES], 1u64.to_le_bytes());
    for at in ETHERNET_BYTES..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 0x10;
        assert!(open(&mut theirs, &bad).is_err(), "byte {at}");
    }
    for len in 0..bytes.len() {
        let short = &bytes[..len];
        assert!(short.len() < ETHERNET_BYTES || open(&mut theirs, short).is_err(), "{len} bytes");
    }
    assert_eq!(open(&mut ours, &bytes).unwrap_err(), Mismatch::Tag, "turned back to its sender");
    assert_eq!(open(&mut ours_of_another, &bytes).unwrap_err(), Mismatch::Tag);
    assert_eq!(open(&mut theirs, &bytes).unwrap(), text);
}

/// P-108: keys change by the packet number; late frames of the phase before open, those of two before and two ahead do not.
#[test]
fn keys_change_and_only_near_phases_open() {
    let (mut ours, mut theirs) = Pair::new().shake();
    let sealed: Vec<_> = (1..=64u64)
        .map(|pn| {
            let mut bytes = frame(pn, &[pn as u8; 8]);
            ours.seal(pn, &mut bytes);
            assert_eq!(bytes[ETHERNET_BYTES] >> 2 & 3, (pn >> 4 & 3) as u8);
            bytes
        })
        .collect();
    let at = |pn: u64| &sealed[pn as usize - 1];
    assert_eq!(open(&mut theirs, at(33)).unwrap_err(), Mismatch::Phase, "two ahead");
    for pn in [1, 17, 15, 40, 18, 50] {
        assert_eq!(open(&mut theirs, at(pn)).unwrap(), [pn as u8; 8], "packet {pn}");
    }
    assert_eq!(open(&mut theirs, at(16)).unwrap_err(), Mismatch::Phase, "two behind");
    let mut other_bits = at(51).clone();
    other_bits[ETHERNET_BYTES] ^= 0b0100;
    assert_eq!(open(&mut theirs, &other_bits).unwrap_err(), Mismatch::Phase);
    assert_eq!(open(&mut theirs, at(51)).unwrap(), [51; 8]);
}

/// P-115
#[test]
#[should_panic(expected = "packet number 7 comes after 7")]
fn a_packet_number_is_never_sealed_twice() {
    let (mut ours, _) = Pair::new().shake();
    ours.seal(7, &mut frame(7, &[0; 8]));
    ours.seal(7, &mut frame(7, &[1; 8]));
}

/// P-111: a HELLO that is sent again is the same message; after an answer it is another.
#[test]
fn a_hello_is_repeated_byte_for_byte() {
    let mut pair = Pair::new();
    let first = sealed(&mut pair.caller, Body::Hello(hello(1)));
    assert_eq!(first.len(), GUARDED_FRAME_BYTES);
    assert_eq!(sealed(&mut pair.caller, Body::Hello(hello(1))), first);
    assert_ne!(sealed(&mut pair.caller, Body::Hello(hello(2))), first);
    let redirect = Redirect { session_epoch: 2, initiator_nonce: 5, steer: Steer::new(2, 1) };
    let frame = sealed(&mut pair.caller, Body::Hello(hello(2)));
    let marked = pair.answerer.check(&frame).unwrap();
    let (_, pending) = pair.answerer.read_hello(&marked).unwrap();
    let answer = answer_frame(Body::Redirect(redirect));
    let (answer, _) = pair.answerer.answer(pending, &pair.psk, &answer).unwrap();
    assert!(pair.caller.open_answer(&answer).unwrap().unwrap().keys.is_none());
    assert!(pair.caller.open_answer(&answer).is_err(), "an answer is taken once");
    assert_ne!(sealed(&mut pair.caller, Body::Hello(hello(2))), frame);
}

/// The name of the volume is in no frame of the handshake, nor is the client's public key.
#[test]
fn a_handshake_shows_neither_names_nor_who_calls() {
    let mut pair = Pair::new();
    let frame = sealed(&mut pair.caller, Body::Hello(hello(1)));
    let holds = |part: &[u8]| frame.windows(part.len()).any(|window| window == part);
    assert!(!holds(b"secret-v") && !holds(&pair.client.public().0) && !holds(&[9; 16]));
}

/// P-111: the right key and the wrong shared secret: the answer does not open, and a session of it has other keys.
#[test]
fn the_wrong_shared_secret_opens_no_answer() {
    let mut pair = Pair::new();
    let frame = sealed(&mut pair.caller, Body::Hello(hello(1)));
    let marked = pair.answerer.check(&frame).unwrap();
    let (_, pending) = pair.answerer.read_hello(&marked).unwrap();
    let (answer, _) =
        pair.answerer.answer(pending, &Secret::default(), &answer_frame(reply(Status::Ok))).unwrap();
    assert_eq!(pair.caller.open_answer(&answer).unwrap_err(), Mismatch::Tag);
}

/// P-110: whoever does not know the node's key is not listened to, and no changed byte passes.
#[test]
fn a_frame_without_the_right_mark_is_dropped_first() {
    let mut pair = Pair::new();
    let mut stranger = Caller::new(identity(), identity().public(), Secret::default());
    let frame = sealed(&mut stranger, Body::Hello(hello(1)));
    assert_eq!(pair.answerer.check(&frame).unwrap_err(), Mismatch::Tag);
    let frame = sealed(&mut pair.caller, Body::Hello(hello(1)));
    for at in ETHERNET_BYTES..FIRST_MARK_AT + 16 {
        let mut bad = frame.clone();
        bad[at] ^= 1;
        assert!(pair.answerer.check(&bad).is_err(), "byte {at}");
    }
}

/// P-110: under load a HELLO is answered by a cookie, for its source only, and goes on with it; the number of handshakes is bounded.
#[test]
fn a_flood_of_hellos_costs_no_handshakes_but_of_those_who_show_a_cookie() {
    let mut pair = Pair::new();
    let mut flooder = Caller::new(identity(), pair.caller.node(), Secret::default());
    let mut admitted = 0;
    let mut flood = |answerer: &mut Answerer, now: Instant, count: u64| {
        let (mut went, mut cookies) = (0, 0);
        for number in 0..count {
            let frame = sealed(&mut flooder, Body::Hello(hello(now.0 + number)));
            match answerer.admit(now, &answerer.check(&frame).unwrap()) {
                Admission::Go => went += 1,
                Admission::Cookie(answer) => {
                    assert_eq!(answer.len(), frame.len());
                    cookies += 1;
                }
                Admission::Drop => {}
            }
        }
        (went, cookies)
    };
    for tenth in 0..5 {
        let now = NOW + Nanos::from_millis(100 * tenth);
        let (went, cookies) = flood(&mut pair.answerer, now, 1_000);
        assert!(cookies >= 1 && went + cookies <= 220, "{went} handshakes and {cookies} cookies");
        admitted += went;
    }
    assert!(admitted <= 20, "{admitted} of 5000");

    let now = NOW + Nanos::from_millis(500);
    let frame = sealed(&mut pair.caller, Body::Hello(hello(1)));
    let Admission::Cookie(cookie) = pair.answerer.admit(now, &pair.answerer.check(&frame).unwrap()) else {
        panic!("a cookie is asked for")
    };
    assert!(pair.caller.open_answer(&cookie).unwrap().is_none());
    let again = sealed(&mut pair.caller, Body::Hello(hello(1)));
    assert_eq!(again[..FIRST_MARK_AT + 16], frame[..FIRST_MARK_AT + 16]);
    assert_eq!(pair.answerer.admit(now, &pair.answerer.check(&again).unwrap()), Admission::Go);
    let mut elsewhere = again.clone();
    elsewhere[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 99]);
    let elsewhere = pair.answerer.admit(now, &pair.answerer.check(&elsewhere).unwrap());
    assert!(matches!(elsewhere, Admission::Cookie(_)), "a cookie is of one address");
    // One address has a share of the handshakes, cookie or not.
    let went =
        (0..200).filter(|_| pair.answerer.admit(now, &pair.answerer.check(&again).unwrap()) == Admission::Go);
    assert!(went.count() <= 25);
    let (went, _) = flood(&mut pair.answerer, now + Nanos::from_secs(2), 10);
    assert_eq!(went, 10, "when it is over nobody is asked for a cookie");
}

/// HELLOs without a cookie; more than 20 of them put an answerer under load.
fn press(pair: &mut Pair, now: Instant, hellos: u64) {
    for number in 0..hellos {
        let frame = sealed(&mut pair.caller, Body::Hello(hello(number)));
        pair.answerer.admit(now, &pair.answerer.check(&frame).unwrap());
    }
}

/// A HELLO from an address that shows the cookie which the answerer gives that address.
fn with_cookie(pair: &mut Pair, now: Instant, address: u8) -> Vec<u8> {
    let mut caller = Caller::new(Arc::clone(&pair.client), pair.caller.node(), Secret::default());
    let from = |caller: &mut Caller| {
        let mut frame = sealed(caller, Body::Hello(hello(1)));
        // The marks do not cover the Ethernet header.
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 1, address]);
        frame
    };
    let first = from(&mut caller);
    let Admission::Cookie(cookie) = pair.answerer.admit(now, &pair.answerer.check(&first).unwrap()) else {
        panic!("a cookie is asked for")
    };
    assert!(caller.open_answer(&cookie).unwrap().is_none());
    from(&mut caller)
}

fn goes(pair: &mut Pair, now: Instant, frame: &[u8]) -> bool {
    pair.answerer.admit(now, &pair.answerer.check(frame).unwrap()) == Admission::Go
}

/// P-110: 100 handshakes in 100 ms, whoever asks and whatever floods beside them.
#[test]
fn with_cookies_too_the_handshakes_are_bounded() {
    let (mut pair, mut went) = (Pair::new(), 0);
    press(&mut pair, NOW, 30);
    let now = NOW + Nanos::from_millis(120);
    for address in 0..20 {
        let frame = with_cookie(&mut pair, now, address);
        went += (0..10).filter(|_| goes(&mut pair, now, &frame)).count();
        // Whoever shows no cookie does not make room for more.
        press(&mut pair, now, 5);
    }
    assert_eq!(went, 100);
}

/// Addresses that a window tells apart are bounded: of 80 with a cookie each, 64 get in.
#[test]
fn more_addresses_than_are_told_apart_wait_for_the_next_window() {
    let mut pair = Pair::new();
    press(&mut pair, NOW, 30);
    let now = NOW + Nanos::from_millis(120);
    let went = (0..80).filter(|address| {
        let frame = with_cookie(&mut pair, now, *address);
        goes(&mut pair, now, &frame)
    });
    assert_eq!(went.count(), 64);
}

fn both_refuse(caller: &mut Caller, bytes: &[u8]) -> bool {
    caller.open_answer(bytes).is_err() && caller.open_hint(bytes).is_err()
}

/// P-110: answers that somebody forges who knows the node's public key are looked at ten times for a HELLO, and no more; the next HELLO is
/// answered as ever.
#[test]
fn forged_answers_cost_a_few_handshakes_and_no_more() {
    let mut pair = Pair::new();
    let answered = |pair: &mut Pair, epoch| {
        let frame = sealed(&mut pair.caller, Body::Hello(hello(epoch)));
        let marked = pair.answerer.check(&frame).unwrap();
        let (_, pending) = pair.answerer.read_hello(&marked).unwrap();
        pair.answerer.answer(pending, &pair.psk, &answer_frame(reply(Status::Ok))).unwrap().0
    };
    let real = answered(&mut pair, 1);
    // With another shared secret everything is right but what is inside.
    let forged = {
        let frame = sealed(&mut pair.caller, Body::Hello(hello(1)));
        let marked = pair.answerer.check(&frame).unwrap();
        let (_, pending) = pair.answerer.read_hello(&marked).unwrap();
        pair.answerer.answer(pending, &Secret::new([9; 32]), &answer_frame(reply(Status::Ok))).unwrap().0
    };
    for _ in 0..10 {
        assert_eq!(pair.caller.open_answer(&forged).unwrap_err(), Mismatch::Tag);
    }
    assert_eq!(pair.caller.open_answer(&forged).unwrap_err(), Mismatch::Layout, "not looked at");
    assert_eq!(pair.caller.open_answer(&real).unwrap_err(), Mismatch::Layout, "nor is the real one");
    let real = answered(&mut pair, 2);
    for _ in 0..9 {
        assert_eq!(pair.caller.open_answer(&forged).unwrap_err(), Mismatch::Tag);
    }
    assert!(pair.caller.open_answer(&real).unwrap().unwrap().keys.is_some());
}

/// Garbage of every length and kind is refused, by both ends.
#[test]
fn garbage_is_refused_by_both_ends() {
    let mut pair = Pair::new();
    let (hello, fill) = (sealed(&mut pair.caller, Body::Hello(hello(1))), os_entropy());
    for len in 0..400 {
        let mut bytes = vec![0; len];
        fill(&mut bytes);
        assert!(pair.answerer.check(&bytes).is_err() && both_refuse(&mut pair.caller, &bytes));
        let keep = hello.len().min(len).min(ETHERNET_BYTES + 2);
        bytes[..keep].copy_from_slice(&hello[..keep]);
        assert!(pair.answerer.check(&bytes).is_err() && both_refuse(&mut pair.caller, &bytes));
    }
}
