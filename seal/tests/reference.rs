//! A second implementation of the handshake and the key schedule, written from docs/PROTOCOL.md, section 18, and the Noise Protocol Framework
//! (revision 34) with nothing but primitives: it calls our node's end, answers our backend's end, and finds its frames right and ours.
//!
//! Knows the specification; shares no code with what it judges but the layout of a HELLO. And the very bytes of one handshake, with everything
//! that is random fixed, are kept in `keys.hex`: they may not change within a version of the protocol.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::hmac::{HMAC_SHA256, Key, sign};
use cirro_protocol::op::Status;
use cirro_protocol::time::Instant;
use cirro_protocol::types::{Cid, MacAddress, Steer, Uuid};
use cirro_protocol::wire::long::{Body, Hello, HelloReply, LongFrame};
use cirro_protocol::wire::{Header, Kind, Message, Mode};
use cirro_seal::{Admission, Answerer, Caller, Identity, Secret, SessionKeys};

const CLIENT: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const NODE: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
const CID: Cid = Cid(0x0012_3456);
const STEER: Steer = Steer(0x2801);
const PSK: [u8; 32] = [0x55; 32];
const CLIENT_KEY: [u8; 32] = [0x11; 32];
const NODE_KEY: [u8; 32] = [0x22; 32];

type Hash = [u8; 32];

fn sha256(parts: &[&[u8]]) -> Hash {
    digest(&SHA256, &parts.concat()).as_ref().try_into().unwrap()
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Hash {
    sign(&Key::new(HMAC_SHA256, key), &parts.concat()).as_ref().try_into().unwrap()
}

fn public(private: &[u8; 32]) -> [u8; 32] {
    let key = PrivateKey::from_private_key(&X25519, private).unwrap();
    key.compute_public_key().unwrap().as_ref().try_into().unwrap()
}

fn dh(private: &[u8; 32], public: &[u8]) -> [u8; 32] {
    let key = PrivateKey::from_private_key(&X25519, private).unwrap();
    agree(&key, UnparsedPublicKey::new(&X25519, public), "dh", |shared| Ok(shared.try_into().unwrap()))
        .unwrap()
}

fn aead(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap())
}

/// The symmetric state of a handshake (Noise, section 5.2), with what IKpsk2 makes of it.
struct Noise {
    hash: Hash,
    chain: Hash,
    key: Hash,
    count: u64,
}

impl Noise {
    /// The name of the protocol is as long as a hash; then the prologue and the node's key, which the caller knows before.
    fn new(node: &[u8; 32]) -> Noise {
        let name: Hash = *b"Noise_IKpsk2_25519_AESGCM_SHA256";
        let mut noise = Noise { hash: name, chain: name, key: [0; 32], count: 0 };
        noise.mix_hash(b"cirrostratus 1");
        noise.mix_hash(node);
        noise
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.hash = sha256(&[&self.hash, data]);
    }

    fn hkdf(&self, input: &[u8]) -> [Hash; 3] {
        let secret = hmac(&self.chain, &[input]);
        let one = hmac(&secret, &[&[1]]);
        let two = hmac(&secret, &[&one, &[2]]);
        [one, two, hmac(&secret, &[&two, &[3]])]
    }

    fn mix_key(&mut self, input: &[u8]) {
        let [chain, key, _] = self.hkdf(input);
        (self.chain, self.key, self.count) = (chain, key, 0);
    }

    fn mix_key_and_hash(&mut self, psk: &[u8]) {
        let [chain, hash, key] = self.hkdf(psk);
        (self.chain, self.key, self.count) = (chain, key, 0);
        self.mix_hash(&hash);
    }

    /// A public key in clear; with a shared secret it makes a key besides (Noise, section 9.2).
    fn ephemeral(&mut self, public: &[u8]) {
        self.mix_hash(public);
        self.mix_key(public);
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.count.to_be_bytes());
        self.count += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    fn encrypt(&mut self, text: &[u8]) -> Vec<u8> {
        let (nonce, mut sealed) = (self.nonce(), text.to_vec());
        aead(&self.key).seal_in_place_append_tag(nonce, Aad::from(self.hash), &mut sealed).unwrap();
        self.mix_hash(&sealed);
        sealed
    }

    fn decrypt(&mut self, sealed: &[u8]) -> Vec<u8> {
        let (nonce, mut text) = (self.nonce(), sealed.to_vec());
        let len = aead(&self.key).open_in_place(nonce, Aad::from(self.hash), &mut text).unwrap().len();
        text.truncate(len);
        self.mix_hash(sealed);
        text
    }

    /// The secrets of both directions: the caller's, the answerer's.
    fn split(&self) -> (Hash, Hash) {
        let [caller, answerer, _] = self.hkdf(&[]);
        (caller, answerer)
    }
}

/// A LONG frame around a body, with its first mark; the second shows a cookie if there is one.
fn long(to: MacAddress, from: MacAddress, head: [u8; 10], body: &[u8], cookie: Option<&[u8]>) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &[0x88, 0xb5], &head, &[0; 24], body].concat();
    frame.resize(14 + 34 + 224, 0);
    let key = sha256(&[b"cirro mark", &public(&NODE_KEY)]);
    let mark = hmac(&key, &[&frame[14..]]);
    frame.extend_from_slice(&mark[..16]);
    let second = cookie.map_or([0; 32], |cookie| hmac(cookie, &[&frame[14..]]));
    frame.extend_from_slice(&second[..16]);
    frame
}

/// The key of a phase and its salt, and the secret of the next: HKDF-Expand of one block.
fn phase(secret: &Hash) -> (Hash, [u8; 4], Hash) {
    let expand = |label: &[u8]| hmac(secret, &[label, &[1]]);
    (expand(b"cirro key"), expand(b"cirro salt")[..4].try_into().unwrap(), expand(b"cirro next"))
}

/// Seals a short frame by the secret of phase 0 of a direction.
fn sealed(secret: &Hash, pn: u64, mut frame: Vec<u8>) -> Vec<u8> {
    let mut secret = *secret;
    for _ in 0..pn >> 23 {
        secret = phase(&secret).2;
    }
    let (key, salt, _) = phase(&secret);
    frame[14] |= ((pn >> 23 & 3) as u8) << 2;
    let nonce = [&salt[..], &pn.to_be_bytes()].concat();
    let mut text = frame.split_off(14 + 16);
    let nonce = Nonce::try_assume_unique_for_key(&nonce).unwrap();
    aead(&key).seal_in_place_append_tag(nonce, Aad::from(&frame[14..]), &mut text).unwrap();
    [frame, text].concat()
}

/// Bytes that count: what is random is the same in every run.
fn identity(private: [u8; 32], first: u8) -> Arc<Identity> {
    let count = AtomicU8::new(first);
    let fill = move |bytes: &mut [u8]| bytes.fill(count.fetch_add(1, Ordering::Relaxed));
    Arc::new(Identity::new(Secret::new(private), Arc::new(fill)))
}

fn hello() -> Hello {
    Hello {
        volume: "vm1".parse().unwrap(),
        node: Uuid([7; 16]),
        attachment: Uuid([9; 16]),
        session_epoch: 1,
        nonce: 5,
        cid: CID,
        steer: STEER,
        mtu: 9000,
        slots: 256,
        piece_bytes_max: u32::MAX,
    }
}

fn reply() -> LongFrame {
    let reply = HelloReply {
        session_epoch: 1,
        initiator_nonce: 5,
        status: Status::Ok,
        node: Uuid([7; 16]),
        incarnation: Uuid([8; 16]),
        nonce: 6,
        token: 0xfeed,
        cid: Cid(3),
        steer: Steer(0x0800),
        mtu: 9000,
        slots: 256,
        piece_bytes: 8192,
        request_bytes_max: 1 << 20,
        credit_sectors: 8192,
    };
    LongFrame::new(NODE, CLIENT, STEER, Body::HelloReply(reply))
}

/// What Noise carries: the type, the fields, zeroes.
fn inner(body: &Body) -> Vec<u8> {
    let mut inner = vec![body.code()];
    body.emit(127, &mut inner);
    inner
}

/// A frame of a session with a PING in it.
fn ping(to: MacAddress, from: MacAddress, pn: u64) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &[0x88, 0xb5]].concat();
    Header { mode: Mode::Aead, pn, cid: CID, steer: STEER, ack_pn: 3, ..Header::default() }.emit(&mut frame);
    Message::bare(Kind::Ping).emit(&mut frame);
    frame
}

fn opens(keys: &mut SessionKeys, frame: &[u8]) -> bool {
    let (mut plain, header) = (Vec::new(), Header::parse(&frame[14..]).unwrap());
    keys.open(&header, frame, &mut plain).is_ok_and(|frame| frame.messages().count() == 1)
}

/// P-107, P-108, P-110, P-111: the reference calls our answerer.
#[test]
fn the_node_understands_who_keeps_to_the_specification() {
    let mut answerer = Answerer::new(identity(NODE_KEY, 0x80));
    let (ephemeral, node) = ([0x33; 32], public(&NODE_KEY));
    let mut noise = Noise::new(&node);
    noise.ephemeral(&public(&ephemeral));
    noise.mix_key(&dh(&ephemeral, &node));
    let name = noise.encrypt(&public(&CLIENT_KEY));
    noise.mix_key(&dh(&CLIENT_KEY, &node));
    let payload = noise.encrypt(&inner(&Body::Hello(hello())));
    let body = [&public(&ephemeral)[..], &name, &payload].concat();
    let [cid, steer] = [CID.0.to_le_bytes().to_vec(), STEER.0.to_be_bytes().to_vec()];
    let head: [u8; 10] = [vec![0x31, 1, 0, 0], cid, steer].concat().try_into().unwrap();

    let frame = long(NODE, CLIENT, head, &body, None);
    let marked = answerer.check(&frame).unwrap();
    let (said, pending) = answerer.read_hello(&marked).unwrap();
    assert_eq!((said.body, pending.client.0), (Body::Hello(hello()), public(&CLIENT_KEY)));
    let (answer, mut theirs) = answerer.answer(pending, &Secret::new(PSK), &reply()).unwrap();

    assert_eq!(
        (answer.len(), &answer[14..16], &answer[18..22]),
        (304, &[0x31, 2][..], &CID.0.to_le_bytes()[..])
    );
    assert_eq!(
        answer[..],
        long(CLIENT, NODE, answer[14..24].try_into().unwrap(), &answer[48..272], None)[..]
    );
    let (their_ephemeral, sealed_reply) = answer[48..48 + 176].split_at(32);
    noise.ephemeral(their_ephemeral);
    noise.mix_key(&dh(&ephemeral, their_ephemeral));
    noise.mix_key(&dh(&CLIENT_KEY, their_ephemeral));
    noise.mix_key_and_hash(&PSK);
    assert_eq!(noise.decrypt(sealed_reply), inner(&reply().body));

    let (ours, node_secret) = noise.split();
    for pn in [1, 2, (1 << 23) - 1, 1 << 23, (1 << 24) - 1, (1 << 24) + 5] {
        assert!(opens(&mut theirs, &sealed(&ours, pn, ping(NODE, CLIENT, pn))), "packet {pn}");
    }
    for pn in [1, 1 << 23, (1 << 24) + 5] {
        let mut frame = ping(CLIENT, NODE, pn);
        theirs.seal(pn, &mut frame);
        assert_eq!(frame, sealed(&node_secret, pn, ping(CLIENT, NODE, pn)), "packet {pn}");
    }

    // Under load: the cookie, and the second mark that shows it.
    let now = Instant(1_000_000_000);
    let mut asked = (0..21).map(|_| answerer.admit(now, &marked));
    let Some(Admission::Cookie(cookie)) = asked.find(|admission| matches!(admission, Admission::Cookie(_)))
    else {
        panic!("a cookie is asked for")
    };
    let (nonce, text) = cookie[48..48 + 44].split_at(12);
    let key = aead(&sha256(&[b"cirro cookie", &node]));
    let mut text = text.to_vec();
    let nonce = Nonce::try_assume_unique_for_key(nonce).unwrap();
    let cookie = key.open_in_place(nonce, Aad::from(&frame[272..288]), &mut text).unwrap();
    let shown = long(NODE, CLIENT, head, &body, Some(cookie));
    assert_eq!(answerer.admit(now, &answerer.check(&shown).unwrap()), Admission::Go);
}

/// P-107, P-110, P-111: our caller calls the reference.
#[test]
fn the_backend_understands_who_keeps_to_the_specification() {
    let (node, ephemeral) = (public(&NODE_KEY), [0x44; 32]);
    let node_key = Identity::new(Secret::new(NODE_KEY), cirro_seal::os_entropy()).public();
    assert_eq!(node_key.0, node);
    let mut caller = Caller::new(identity(CLIENT_KEY, 0x40), node_key, Secret::new(PSK));
    let mut frame = Vec::new();
    LongFrame::new(CLIENT, NODE, Steer(0), Body::Hello(hello())).emit(&mut frame);
    caller.seal(&mut frame, (CID, STEER));
    assert_eq!(frame[..], long(NODE, CLIENT, frame[14..24].try_into().unwrap(), &frame[48..272], None)[..]);

    let mut noise = Noise::new(&node);
    let (their_ephemeral, rest) = frame[48..272].split_at(32);
    noise.ephemeral(their_ephemeral);
    noise.mix_key(&dh(&NODE_KEY, their_ephemeral));
    let name = noise.decrypt(&rest[..48]);
    assert_eq!(name, public(&CLIENT_KEY));
    noise.mix_key(&dh(&NODE_KEY, &name));
    assert_eq!(noise.decrypt(&rest[48..]), inner(&Body::Hello(hello())));
    noise.ephemeral(&public(&ephemeral));
    noise.mix_key(&dh(&ephemeral, their_ephemeral));
    noise.mix_key(&dh(&ephemeral, &name));
    noise.mix_key_and_hash(&PSK);
    let sealed_reply = noise.encrypt(&inner(&reply().body));
    let body = [&public(&ephemeral)[..], &sealed_reply].concat();
    let head =
        [vec![0x31, 2], STEER.0.to_be_bytes().to_vec(), CID.0.to_le_bytes().to_vec(), vec![0, 0]].concat();
    let answer = long(CLIENT, NODE, head.try_into().unwrap(), &body, None);
    let opened = caller.open_answer(&answer).unwrap().expect("no cookie");
    assert_eq!(opened.frame.body, reply().body);
    let mut ours = opened.keys.expect("a session");
    let (our_secret, node_secret) = noise.split();
    assert!(opens(&mut ours, &sealed(&node_secret, 1, ping(CLIENT, NODE, 1))));
    let mut sent = ping(NODE, CLIENT, 1);
    ours.seal(1, &mut sent);
    assert_eq!(sent, sealed(&our_secret, 1, ping(NODE, CLIENT, 1)));
}

/// P-107, P-110: one handshake and the first frames of its session, byte for byte. A change of them is another version of the protocol.
#[test]
fn the_bytes_of_a_handshake_do_not_change() {
    let (node, client) = (identity(NODE_KEY, 0x80), identity(CLIENT_KEY, 0x40));
    let mut caller = Caller::new(client, node.public(), Secret::new(PSK));
    let answerer = Answerer::new(node);
    let mut hello_frame = Vec::new();
    LongFrame::new(CLIENT, NODE, Steer(0), Body::Hello(hello())).emit(&mut hello_frame);
    caller.seal(&mut hello_frame, (CID, STEER));
    let (_, pending) = answerer.read_hello(&answerer.check(&hello_frame).unwrap()).unwrap();
    let (answer, mut theirs) = answerer.answer(pending, &Secret::new(PSK), &reply()).unwrap();
    let mut ours = caller.open_answer(&answer).unwrap().unwrap().keys.unwrap();
    let (mut there, mut back) = (ping(NODE, CLIENT, 1), ping(CLIENT, NODE, 1 << 23));
    ours.seal(1, &mut there);
    theirs.seal(1 << 23, &mut back);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let made: Vec<String> = [hello_frame, answer, there, back].iter().map(|frame| hex(frame)).collect();
    let kept: Vec<&str> = include_str!("keys.hex").lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(made, kept);
}
