//! A node with keys on a wire in memory, and those who call it: who is let in, who learns nothing, and what a repeated HELLO is worth.
//!
//! Knows handshakes and the first frame of a session; what sessions do then is in `node.rs`, and by the simulator.

#[path = "segment/hello.rs"]
mod hello;

use std::fs::File;
use std::sync::Arc;

use cirro_link::Link;
use cirro_link::memory::{MemoryLink, pair};
use cirro_node::access::{AccessList, Client, Grant, Right};
use cirro_node::node::{Directory, NodeConfig, NodeWorker, Snapshot};
use cirro_node::owner::{MemoryKeeper, OwnerRecord};
use cirro_node::store::pread::PreadStore;
use cirro_node::volume::Volume;
use cirro_protocol::op::Status;
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{Cid, ETHERNET_BYTES, ETHERTYPE_DEFAULT, MacAddress, Steer, Uuid};
use cirro_protocol::wire::body::CloseReason;
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::long::{Body, Hello, HelloReply, LongFrame, WhoHas};
use cirro_protocol::wire::{Header, Kind, Message, Mode};
use cirro_seal::{Caller, Identity, Secret, SessionKeys, new_private, os_entropy, seal_long};
use hello::hello;

/// Where a backend wants its answer.
const STEER: Steer = Steer::new(1, 0);

/// The wire, with the node on it.
struct Rig {
    now: Instant,
    worker: NodeWorker<MemoryLink, PreadStore>,
    link: MemoryLink,
    node: Arc<Identity>,
    access: Arc<AccessList>,
    _folder: tempfile::TempDir,
}

/// Somebody with a key.
struct Person {
    caller: Caller,
    identity: Arc<Identity>,
}

fn identity() -> Arc<Identity> {
    Arc::new(Identity::new(new_private(&os_entropy()), os_entropy()))
}

/// What an answer to HELLO says.
fn opened(person: &mut Person, answer: &[u8]) -> (HelloReply, Option<SessionKeys>) {
    let answer = person.caller.open_answer(answer).unwrap().expect("no cookie");
    let Body::HelloReply(reply) = answer.frame.body else { panic!("not an answer to HELLO") };
    (reply, answer.keys.map(|keys| *keys))
}

impl Person {
    fn new(rig: &Rig, identity: &Arc<Identity>) -> Person {
        let caller = Caller::new(Arc::clone(identity), rig.node.public(), Secret::default());
        Person { caller, identity: Arc::clone(identity) }
    }

    fn client(&self) -> Client {
        Client::Key(self.identity.public())
    }
}

impl Rig {
    fn new(granted: &[(&Arc<Identity>, Right)]) -> Rig {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("v.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let (node_end, link) = pair(9000);
        let node = identity();
        let grants = granted.iter().map(|(identity, right)| Grant {
            volume: "v".parse().unwrap(),
            client: Client::Key(identity.public()),
            right: *right,
        });
        let access = Arc::new(AccessList::fixed(false, &grants.collect::<Vec<_>>()));
        let config = NodeConfig {
            node: Uuid([0x11; 16]),
            incarnation: Uuid([1; 16]),
            secret: [5; 16],
            identity: Some(Arc::clone(&node)),
            access: Arc::clone(&access),
            random_seed: [1; 16],
            ethertype: ETHERTYPE_DEFAULT,
            steer: Steer::new(2, 0),
            ack_delay_max: Nanos::from_micros(50),
            write_pool_bytes: 32 << 20,
            read_pool_bytes: 8 << 20,
        };
        let names = ["v", "unserved"].map(|name| (name.parse().unwrap(), 0));
        let directory = Arc::new(Directory::new(2, names));
        let keeper = Box::new(MemoryKeeper::default());
        let mut worker = NodeWorker::new(config, directory, node_end, PreadStore::new(), keeper);
        let now = Instant(1_000_000_000);
        let volume = Volume::open(&format!("v={}", path.display()).parse().unwrap()).unwrap();
        let file = worker.store_mut().attach(volume.store_file());
        worker.add_volume(now, volume, file, OwnerRecord::default());
        let mut rig = Rig { now, worker, link, node, access, _folder: folder };
        rig.turns(50);
        rig.received();
        rig
    }

    /// Turns of the node, a millisecond apart.
    fn turns(&mut self, count: u64) {
        for _ in 0..count {
            self.now += Nanos::from_millis(1);
            self.worker.turn(self.now);
        }
    }

    fn received(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.link.receive().map(|received| received.bytes.to_vec())).collect()
    }

    fn send(&mut self, bytes: &[u8]) {
        self.link.frame().unwrap().head.extend_from_slice(bytes);
        self.link.commit(Default::default());
        self.link.flush(&mut Vec::new());
    }

    fn node_address(&mut self) -> MacAddress {
        self.worker.link_mut().address()
    }

    /// A LONG frame as `person` sends it.
    fn sealed(&mut self, person: &mut Person, body: Body) -> Vec<u8> {
        let mut head = Vec::new();
        LongFrame::new(self.link.address(), self.node_address(), Steer(0), body).emit(&mut head);
        person.caller.seal(&mut head, (Cid::new(7, 1), STEER));
        head
    }

    /// What the node says to a frame.
    fn ask(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.send(bytes);
        self.turns(1);
        self.received()
    }

    /// Says HELLO; the answer and the keys.
    fn greet(&mut self, person: &mut Person, hello: Hello) -> (HelloReply, Option<SessionKeys>) {
        let frame = self.sealed(person, Body::Hello(hello));
        let answers = self.ask(&frame);
        let [answer] = &answers[..] else { panic!("{} answers", answers.len()) };
        opened(person, answer)
    }

    /// The first frame of a session, which confirms it.
    fn ping(&mut self, reply: &HelloReply, keys: &mut SessionKeys, pn: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let (destination, source) = (self.node_address(), self.link.address());
        Ethernet { destination, source, ethertype: ETHERTYPE_DEFAULT }.emit(&mut bytes);
        let (steer, cid) = (reply.steer, reply.cid);
        Header { mode: Mode::Aead, pn, steer, cid, flags: 1, ..Header::default() }.emit(&mut bytes);
        Message::bare(Kind::Ping).emit(&mut bytes);
        keys.seal(pn, &mut bytes);
        bytes
    }

    fn sessions(&self) -> usize {
        let mut snapshot = Snapshot::default();
        self.worker.snapshot(&mut snapshot);
        snapshot.sessions.len()
    }

    fn dropped(&self, reason: &str) -> u64 {
        self.worker.meter().snapshot().dropped.get(reason).copied().unwrap_or(0)
    }
}

/// P-100, P-109: with keys a client without a grant is told the same of a volume that is there and of one that is not; it makes no session.
#[test]
fn who_has_no_grant_learns_nothing() {
    let (friend, stranger) = (identity(), identity());
    let mut rig = Rig::new(&[(&friend, Right::ReadWrite)]);
    let mut person = Person::new(&rig, &stranger);
    let mut told = Vec::new();
    for (number, volume) in ["v", "unserved", "unknown"].into_iter().enumerate() {
        let (reply, keys) = rig.greet(&mut person, hello(volume, 1, number as u64));
        assert!(keys.is_none());
        told.push(HelloReply { initiator_nonce: 0, ..reply });
    }
    assert_eq!((told[0].status, told[0], told[1]), (Status::Access, told[1], told[2]));
    assert_eq!(rig.sessions(), 0);
    let mut person = Person::new(&rig, &friend);
    let (reply, keys) = rig.greet(&mut person, hello("v", 1, 1));
    assert_eq!((reply.status, keys.is_some(), rig.sessions()), (Status::Ok, true, 1));
}

/// P-106: a node with keys answers nothing that comes without; frames without keys are not taken in a session that has some (P-22).
#[test]
fn what_comes_without_keys_is_not_answered() {
    let friend = identity();
    let mut rig = Rig::new(&[(&friend, Right::ReadWrite)]);
    let mut bytes = Vec::new();
    let question = WhoHas { volume: Some("v".parse().unwrap()), nonce: 1, steer: STEER };
    for body in [Body::Hello(hello("v", 1, 1)), Body::WhoHas(question)] {
        bytes.clear();
        LongFrame::new(rig.link.address(), rig.node_address(), Steer(0), body).emit(&mut bytes);
        seal_long(&mut bytes);
        assert!(rig.ask(&bytes).is_empty());
    }
    assert_eq!(rig.dropped("long-other-mode"), 2);
    let mut person = Person::new(&rig, &friend);
    let (reply, keys) = rig.greet(&mut person, hello("v", 1, 1));
    let mut keys = keys.unwrap();
    let first = rig.ping(&reply, &mut keys, 1);
    assert!(!rig.ask(&first).is_empty());
    let mut plain = rig.ping(&reply, &mut keys, 2);
    plain[ETHERNET_BYTES] &= !1;
    assert!(rig.ask(&plain).is_empty());
    assert_eq!(rig.dropped("other-mode"), 1);
}

/// P-112: a question about a volume is not answered, one about the node is.
#[test]
fn the_node_is_found_by_its_key_and_not_by_its_volumes() {
    let friend = identity();
    let mut rig = Rig::new(&[(&friend, Right::ReadWrite)]);
    let mut person = Person::new(&rig, &identity());
    for (volume, answers) in [(Some("v".parse().unwrap()), 0), (None, 1)] {
        let frame = rig.sealed(&mut person, Body::WhoHas(WhoHas { volume, nonce: 8, steer: STEER }));
        let answered = rig.ask(&frame);
        assert_eq!(answered.len(), answers);
        for answer in answered {
            let Body::IHave(have) = person.caller.open_hint(&answer).unwrap().body else {
                panic!("not IHAVE")
            };
            assert_eq!((have.volume, have.nonce), (None, 8));
        }
    }
}

/// P-111: the same HELLO gets the same answer while nobody has confirmed the session, then none; an older one changes nothing.
#[test]
fn a_repeated_hello_makes_no_second_session() {
    let friend = identity();
    let mut rig = Rig::new(&[(&friend, Right::ReadWrite)]);
    let mut person = Person::new(&rig, &friend);
    let old = rig.sealed(&mut person, Body::Hello(hello("v", 1, 1)));
    let mut person = Person::new(&rig, &friend);
    let frame = rig.sealed(&mut person, Body::Hello(hello("v", 2, 2)));
    let first = rig.ask(&frame);
    assert_eq!((first.len(), rig.sessions()), (1, 1));
    assert_eq!(rig.ask(&frame), first);
    assert_eq!((rig.ask(&old).len(), rig.sessions()), (1, 1), "an older one is refused");
    let (reply, keys) = opened(&mut person, &first[0]);
    let mut keys = keys.expect("a session");
    assert_eq!(reply.status, Status::Ok, "the newer one's session is still there");
    let ping = rig.ping(&reply, &mut keys, 1);
    assert!(!rig.ask(&ping).is_empty());
    for _ in 0..3 {
        assert!(rig.ask(&frame).is_empty(), "somebody repeats it");
    }
    assert_eq!(rig.ask(&old).len(), 1);
    let ping = rig.ping(&reply, &mut keys, 2);
    assert_eq!((rig.ask(&ping).is_empty(), rig.sessions()), (false, 1));
    // The very frame again is dropped by its packet number.
    rig.send(&ping);
    rig.turns(1);
    assert_eq!((rig.sessions(), rig.dropped("repeated")), (1, 1));
}

/// P-111: an attachment is its first client's; another with a right of its own cannot take its sessions away.
#[test]
fn another_client_cannot_use_an_attachment() {
    let (friend, other) = (identity(), identity());
    let mut rig = Rig::new(&[(&friend, Right::ReadWrite), (&other, Right::ReadWrite)]);
    let mut person = Person::new(&rig, &friend);
    let (reply, keys) = rig.greet(&mut person, hello("v", 1, 1));
    let mut keys = keys.unwrap();
    let ping = rig.ping(&reply, &mut keys, 1);
    rig.ask(&ping);
    let mut thief = Person::new(&rig, &other);
    let (refused, _) = rig.greet(&mut thief, hello("v", 9, 9));
    assert_eq!((refused.status, rig.sessions()), (Status::Access, 1));
    let ping = rig.ping(&reply, &mut keys, 2);
    assert!(!rig.ask(&ping).is_empty());
}

/// P-114: a revoked right ends the sessions at once, and no other begins.
#[test]
fn a_revoked_client_is_closed_at_once() {
    let friend = identity();
    let mut rig = Rig::new(&[(&friend, Right::ReadWrite)]);
    let mut person = Person::new(&rig, &friend);
    let (reply, keys) = rig.greet(&mut person, hello("v", 1, 1));
    let mut keys = keys.unwrap();
    let ping = rig.ping(&reply, &mut keys, 1);
    rig.ask(&ping);
    let volume = "v".parse().unwrap();
    assert!(rig.access.set(volume, person.client(), Right::None).unwrap());
    rig.worker.end_sessions_of(&volume, &person.client());
    rig.turns(2);
    let mut plain = Vec::new();
    let closed = rig.received().iter().any(|bytes| {
        let header = Header::parse(&bytes[ETHERNET_BYTES..]).unwrap();
        let frame = keys.open(&header, bytes, &mut plain).unwrap();
        let close = frame.messages().find(|part| part.message.kind == Kind::Close);
        close.is_some_and(|part| CloseReason::from_code(part.message.code) == CloseReason::Revoked)
    });
    assert!(closed);
    assert_eq!(rig.sessions(), 0);
    assert_eq!(rig.greet(&mut person, hello("v", 2, 2)).0.status, Status::Access);
}

/// P-23: a session's frame from another address changes nothing; the address changes by a new handshake only.
#[test]
fn a_frame_from_another_address_is_dropped() {
    let friend = identity();
    let mut rig = Rig::new(&[(&friend, Right::ReadWrite)]);
    let mut person = Person::new(&rig, &friend);
    let (reply, keys) = rig.greet(&mut person, hello("v", 1, 1));
    let mut keys = keys.unwrap();
    let mut moved = rig.ping(&reply, &mut keys, 1);
    moved[11] ^= 1;
    assert!(rig.ask(&moved).is_empty());
    assert_eq!(rig.dropped("other-source"), 1);
    let ping = rig.ping(&reply, &mut keys, 2);
    assert!(!rig.ask(&ping).is_empty());
}
