//! AF_XDP links over real veth pairs: what the kernel does with our program, sockets and rings.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cirro_link::packet::{self, PacketLink};
use cirro_link::wait::Waiter;
use cirro_link::xdp::{self, XdpLink};
use cirro_link::{FRAMES_QUEUED_MAX, FrameId, Link, Run, clock};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{MacAddress, Steer};
use support::frames::{ETHERTYPE, LONG, SESSION, SHORT, drain, flush, put, receive_within, send};
use support::netns::{INTERFACE, Namespace, VethPair};

fn open(namespace: &Namespace, workers: u16) -> Vec<XdpLink> {
    namespace.enter(|| {
        let (process, links) = xdp::open(INTERFACE, ETHERTYPE, workers, false).unwrap();
        assert_eq!(process, 0);
        links
    })
}

fn open_one(namespace: &Namespace) -> XdpLink {
    open(namespace, 1).remove(0)
}

fn packet_link(namespace: &Namespace) -> PacketLink {
    namespace.enter(|| packet::open(INTERFACE, ETHERTYPE, 1).unwrap().1.remove(0))
}

/// True if an XDP program is attached to the interface.
fn has_program(namespace: &Namespace) -> bool {
    let shown = namespace.run(&format!("ip -d link show dev {INTERFACE}"));
    String::from_utf8_lossy(&shown.stdout).contains("prog/xdp")
}

const STEER: Steer = Steer(0);

/// Bytes that look different at every place and for every frame.
fn body(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed) * 31 + i / 251) as u8).collect()
}

/// Frames of these lengths from one link to another, batch by batch, each held to what was sent.
fn send_all(from: &mut impl Link, to: &mut impl Link, lengths: &[usize]) {
    for batch in lengths.chunks(FRAMES_QUEUED_MAX) {
        let address = to.address();
        for len in batch {
            put(from, address, SHORT, STEER, &body(len - 18, *len), 1);
        }
        assert_eq!(flush(from), []);
        for len in batch {
            let (bytes, _) = receive_within(to, Nanos::from_secs(2)).expect("a frame");
            assert_eq!(bytes.len(), *len);
            assert!(bytes[..6] == address.0 && bytes[18..] == body(len - 18, *len), "{len} bytes");
        }
    }
    assert!(to.receive().is_none(), "no frame twice");
}

#[test]
fn whole_frames_of_every_size_cross_a_wire_both_ways_at_every_mtu() {
    for mtu in [1500, 3826, 3827, 9000, 65_535] {
        let wire = VethPair::new(mtu);
        let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
        assert_eq!((a.mtu(), b.mtu()), (mtu, mtu));
        // Above 9014 around every multiple of what a chunk holds, in either direction: 4096 leaving, 3840 coming.
        let near = |len: usize| len % 4096 <= 20 || len % 3840 <= 20 || len > mtu;
        let lengths: Vec<usize> = (60..=mtu + 14).filter(|len| *len <= 9014 || near(*len)).collect();
        send_all(&mut a, &mut b, &lengths);
        send_all(&mut b, &mut a, &lengths);
        assert_eq!(a.drops().refused.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn an_end_on_packet_sockets_and_one_on_af_xdp_understand_each_other() {
    for mtu in [1500, 9000] {
        let wire = VethPair::new(mtu);
        let (mut a, mut b) = (open_one(&wire.a), packet_link(&wire.b));
        let lengths: Vec<usize> = (60..=mtu + 14).step_by(7).chain(mtu - 3..=mtu + 14).collect();
        send_all(&mut a, &mut b, &lengths);
        send_all(&mut b, &mut a, &lengths);
    }
}

/// Sends a frame whose data lies in pieces of `piece` bytes of `memory`, taken from its end to its start, with a byte of the head between.
/// Returns what the frame must look like.
fn send_scattered(link: &mut XdpLink, to: MacAddress, memory: &'static [u8], piece: usize) -> Vec<u8> {
    let from = link.address();
    let frame = link.frame().expect("room");
    frame.head.extend_from_slice(&[&to.0[..], &from.0, &ETHERTYPE.to_be_bytes(), &[SHORT, 0, 0, 0]].concat());
    let mut expected = frame.head.clone();
    for (count, bytes) in memory.rchunks(piece).enumerate() {
        if count % 2 == 1 {
            frame.head.push(count as u8);
            expected.push(count as u8);
        }
        frame.push_cut(frame.head.len(), Run::of_static(bytes));
        expected.extend_from_slice(bytes);
    }
    link.commit(FrameId::default());
    assert_eq!(flush(link), []);
    expected
}

#[test]
fn foreign_memory_is_in_the_frame_where_it_was_named() {
    let memory: &'static [u8] = body(65_000, 3).leak();
    for mtu in [1500, 9000, 65_535] {
        let wire = VethPair::new(mtu);
        let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
        // One piece; pages; small pieces, of which some lie across the end of a chunk; bytes.
        for (bytes, piece) in [(mtu - 4, mtu), (mtu - 100, 4096), (1400, 512), (mtu * 9 / 10, 50), (960, 1)] {
            let data = &memory[..bytes.min(memory.len())];
            let to = b.address();
            let expected = send_scattered(&mut a, to, data, piece);
            let (came, _) = receive_within(&mut b, Nanos::from_secs(1)).expect("a frame");
            assert!(came == expected, "MTU {mtu}, {bytes} bytes in pieces of {piece}");
        }
    }
}

#[test]
fn what_is_longer_than_the_mtu_or_no_frame_is_refused_alone() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    for (pn, len) in [(1, 100), (2, 1497), (3, 1496), (4, 5000), (5, 100)] {
        put(&mut a, to, SHORT, STEER, &vec![7; len], pn);
    }
    a.frame().unwrap().head.extend_from_slice(&[1; 13]);
    a.commit(FrameId { session: SESSION, pn: 6 });
    let refused = flush(&mut a).into_iter().map(|id| id.pn).collect::<Vec<_>>();
    assert_eq!(refused, [2, 4, 6]);
    assert_eq!(drain(&mut b).iter().map(Vec::len).collect::<Vec<_>>(), [100, 1496, 100]);
    assert_eq!(a.drops().refused.load(Ordering::Relaxed), 3);
}

#[test]
fn the_rings_go_round_and_round_and_lose_nothing() {
    let wire = VethPair::new(9000);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    // 40 · 64 frames of three parts: both rings of chunks go round several times.
    let lengths: Vec<usize> = (0..40 * 64).map(|i| 8000 + i % 1000).collect();
    send_all(&mut a, &mut b, &lengths);
    let small: Vec<usize> = (0..100 * 64).map(|i| 60 + i % 8).collect();
    send_all(&mut a, &mut b, &small);
    assert_eq!(b.drops().ring_full.load(Ordering::Relaxed), 0);
}

#[test]
fn a_receiver_that_does_not_look_loses_what_it_has_no_room_for_and_counts_it() {
    let wire = VethPair::new(9000);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    for round in 0..20u64 {
        for pn in 0..64 {
            put(&mut a, to, SHORT, STEER, &body(8900, (round * 64 + pn) as usize), pn);
        }
        assert_eq!(flush(&mut a), []);
    }
    // 2048 chunks are 682 frames of three.
    let mut came = 0;
    while let Some((bytes, _)) = receive_within(&mut b, Nanos::from_millis(100)) {
        assert!(bytes[18..] == body(8900, came), "whole and in order");
        came += 1;
    }
    assert_eq!(came, 682);
    std::thread::sleep(Duration::from_millis(110));
    assert!(b.receive().is_none());
    assert_eq!(b.drops().ring_full.load(Ordering::Relaxed), 20 * 64 - 682);
    send_all(&mut a, &mut b, &[9014, 60]);
}

#[test]
fn what_a_slow_wire_has_no_room_for_is_refused_by_name_and_the_rest_arrives() {
    let wire = VethPair::new(1500);
    for end in [&wire.a, &wire.b] {
        end.run(&format!("ip link add link {INTERFACE} name upper0 type macvlan mode private"));
        end.run("ip link set upper0 up");
    }
    // AF_XDP goes by an interface's own queue, but not by that of the one below: 80 Mbit/s, and room for all that can be sent.
    wire.a.run(&format!("tc qdisc add dev {INTERFACE} root tbf rate 80mbit burst 100k limit 20m"));
    let mut a = wire.a.enter(|| xdp::open("upper0", ETHERTYPE, 1, false).unwrap().1.remove(0));
    let mut b = wire.b.enter(|| packet::open("upper0", ETHERTYPE, 1).unwrap().1.remove(0));
    let to = b.address();
    let (mut refused, mut committed) = (Vec::new(), 0u64);
    for _ in 0..25 {
        for _ in 0..FRAMES_QUEUED_MAX {
            put(&mut a, to, SHORT, STEER, &[&committed.to_le_bytes()[..], &[7; 1400]].concat(), committed);
            committed += 1;
        }
        a.flush(&mut refused);
    }
    // 1024 chunks are there, one a frame; what left meanwhile comes to it.
    assert!((100..=committed as usize - 1024).contains(&refused.len()), "{} refused", refused.len());
    assert!(refused.is_sorted_by(|before, after| before.pn < after.pn), "each at most once");
    assert_eq!(a.drops().refused.load(Ordering::Relaxed), refused.len() as u64);
    let refused: Vec<u64> = refused.iter().map(|id| id.pn).collect();
    let soon = a.poll_timeout().expect("it is looked at").since(clock::now());
    assert!(soon <= Nanos::from_millis(1), "what waits in the ring is not forgotten: {soon:?}");
    for pn in (0..committed).filter(|pn| refused.binary_search(pn).is_err()) {
        let (bytes, _) = receive_within(&mut b, Nanos::ZERO).unwrap_or_else(|| {
            a.flush(&mut Vec::new());
            receive_within(&mut b, Nanos::from_secs(2)).unwrap_or_else(|| panic!("frame {pn}"))
        });
        assert_eq!(bytes[18..26], pn.to_le_bytes());
    }
    assert!(a.is_open() && receive_within(&mut b, Nanos::from_millis(20)).is_none());
    wire.a.run(&format!("tc qdisc del dev {INTERFACE} root"));
    send_all(&mut a, &mut b, &[1514, 60, 1000]);
}

#[test]
fn other_traffic_passes_and_the_program_goes_with_its_link() {
    let wire = VethPair::new(1500);
    for (end, host) in [(&wire.a, 1), (&wire.b, 2)] {
        end.run(&format!("ip address add 192.0.2.{host}/24 dev {INTERFACE}"));
        assert!(!has_program(end));
    }
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    assert!(has_program(&wire.a) && has_program(&wire.b));
    let far = wire.b.enter(|| UdpSocket::bind(("192.0.2.2", 5000)).unwrap());
    let near = wire.a.enter(|| UdpSocket::bind(("192.0.2.1", 5000)).unwrap());
    far.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let over_the_stack = || {
        near.send_to(&[1; 1400], ("192.0.2.2", 5000)).unwrap();
        assert_eq!(far.recv(&mut [0; 2000]).unwrap(), 1400);
    };
    over_the_stack();
    send_all(&mut a, &mut b, &[100, 1514]);
    over_the_stack();
    drop(a);
    drop(b);
    // Not at once if a test beside this one forks meanwhile: its child holds our descriptors until it runs another program.
    let until = clock::now() + Nanos::from_secs(5);
    while has_program(&wire.a) || has_program(&wire.b) {
        assert!(clock::now() < until, "the program stayed");
        std::thread::sleep(Duration::from_millis(20));
    }
    over_the_stack();
}

#[test]
fn frames_that_are_not_for_us_are_dropped_and_a_flood_of_them_keeps_no_worker() {
    let wire = VethPair::new(1500);
    wire.b.run(&format!("ip link set {INTERFACE} promisc on"));
    let (mut a, mut b) = (packet_link(&wire.a), open_one(&wire.b));
    let to = b.address();
    send(&mut a, MacAddress([2, 0xaa, 0, 0, 0, 1]), SHORT, STEER, &[1; 60]);
    send(&mut a, MacAddress([0x33, 0x33, 0, 0, 0, 1]), LONG, STEER, &[2; 60]);
    send(&mut a, to, SHORT, Steer::new(0, 1), &[8; 60]);
    send(&mut a, to, SHORT, Steer::new(7, 0), &[9; 60]);
    // The header alone, and one byte too few for a `steer`.
    for rest in [0, 3] {
        let from = a.address();
        let head = &mut a.frame().unwrap().head;
        head.extend_from_slice(&[&to.0[..], &from.0, &ETHERTYPE.to_be_bytes(), &[SHORT; 3][..rest]].concat());
        a.commit(FrameId::default());
        assert_eq!(flush(&mut a), []);
    }
    send(&mut a, MacAddress::BROADCAST, SHORT, STEER, &[3; 60]);
    send(&mut a, to, LONG, Steer::new(63, 5), &[4; 60]);
    send(&mut a, to, SHORT, STEER, &[5; 60]);
    assert_eq!(drain(&mut b), [vec![3; 60], vec![4; 60], vec![5; 60]]);
    for _ in 0..3 {
        for _ in 0..FRAMES_QUEUED_MAX {
            put(&mut a, to, SHORT, Steer::new(7, 0), &[9; 60], 1);
        }
        assert_eq!(flush(&mut a), []);
    }
    // 192 of them: a call passes over 64, and the descriptor says that there is more.
    for _ in 0..3 {
        assert!(wakes(&b, Nanos::ZERO) && b.receive().is_none());
    }
    assert!(!wakes(&b, Nanos::ZERO) && b.receive().is_none());
}

/// Whether a link's descriptor is readable within `limit`.
fn wakes(link: &XdpLink, limit: Nanos) -> bool {
    let (mut waiter, mut ready) = (Waiter::new().unwrap(), Vec::new());
    waiter.add(link.as_fd(), 7).unwrap();
    waiter.wait(Some(limit), &mut ready).unwrap();
    !ready.is_empty()
}

#[test]
fn a_worker_that_sleeps_is_woken_by_a_frame_and_else_sleeps() {
    let wire = VethPair::new(9000);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    for len in [60, 8900] {
        assert!(!wakes(&b, Nanos::from_millis(2)));
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                send(&mut a, to, SHORT, STEER, &body(len, 1));
            });
            assert!(wakes(&b, Nanos::from_secs(5)));
            sender.join().unwrap();
        });
        assert_eq!(drain(&mut b), [body(len, 1)]);
    }
    let (until, mut looks) = (clock::now() + Nanos::from_millis(500), 0);
    let mut waiter = Waiter::new().unwrap();
    while clock::now() < until {
        assert!(b.receive().is_none());
        b.flush(&mut Vec::new());
        let due = b.poll_timeout().unwrap().since(clock::now());
        waiter.wait_beside(b.as_fd(), Some(due), &mut Vec::new()).unwrap();
        looks += 1;
    }
    assert!(looks <= 7, "ten times a second, and {looks} in half of one");
}

#[test]
fn arrival_is_when_the_frame_came_and_not_when_it_was_looked_at() {
    let wire = VethPair::new(9000);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    let mut sent = Vec::new();
    for (pause_ms, len) in [(0, 60), (5, 8000), (40, 60), (1, 8000)] {
        std::thread::sleep(Duration::from_millis(pause_ms));
        let before = clock::now();
        send(&mut a, to, SHORT, STEER, &body(len, 1));
        sent.push((before, clock::now()));
    }
    std::thread::sleep(Duration::from_millis(50));
    for (before, after) in sent {
        let (_, arrival) = receive_within(&mut b, Nanos::from_secs(1)).unwrap();
        // A kernel thread may have to wait for its turn on a busy machine, but not until the frame is looked at.
        assert!((before.0..after.0 + 20_000_000).contains(&arrival.0), "{arrival:?}, {before:?}, {after:?}");
    }
}
