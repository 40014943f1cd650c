//! UDP links over real veth pairs: what the kernel does with our sockets, and with many datagrams in one message.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cirro_link::udp::address::{PORT_FIRST, PROCESSES_MAX};
use cirro_link::udp::{self, UdpLink};
use cirro_link::wait::Waiter;
use cirro_link::{FRAMES_QUEUED_MAX, FrameId, Link, OpenError, clock};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{MacAddress, Steer};
use support::frames::{ETHERTYPE, LONG, SHORT, drain, flush, put, receive_within, send};
use support::netns::{INTERFACE, Namespace, VethPair};

const A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// A wire with an address at each end.
fn wire(mtu: usize) -> VethPair {
    let wire = VethPair::new(mtu);
    address(&wire);
    wire
}

fn address(wire: &VethPair) {
    for (end, ip) in [(&wire.a, A), (&wire.b, B)] {
        end.run(&format!("ip address add {ip}/24 dev {INTERFACE}"));
    }
}

fn open(namespace: &Namespace, workers: u16, peers: &[Ipv4Addr]) -> (u16, Vec<UdpLink>) {
    namespace.enter(|| udp::open(INTERFACE, ETHERTYPE, workers, peers).unwrap())
}

fn open_one(namespace: &Namespace, peers: &[Ipv4Addr]) -> UdpLink {
    open(namespace, 1, peers).1.remove(0)
}

// P-102, P-103, P-105
#[test]
fn whole_frames_of_every_size_cross_a_wire_of_any_mtu() {
    for mtu in [1500, 9000, 65535] {
        let wire = wire(mtu);
        let (mut a, mut b) = (open_one(&wire.a, &[]), open_one(&wire.b, &[]));
        assert_eq!((a.mtu(), b.mtu()), (mtu - 28, mtu - 28));
        assert_eq!(a.address().to_string(), "02:00:c0:00:02:01");
        let to = b.address();
        let lengths = [1, 42, 1000, 1400, 1400, 1400, 1000, mtu - 33, mtu - 32];
        for len in lengths {
            let body: Vec<u8> = (0..len).map(|i| (i * 31 + i / 256) as u8).collect();
            put(&mut a, to, SHORT, Steer::new(0, 0), &body, 1);
        }
        assert_eq!(flush(&mut a), []);
        for len in lengths {
            let (bytes, arrival) = receive_within(&mut b, Nanos::from_secs(1)).expect("a frame");
            assert_eq!(bytes.len(), 18 + len, "MTU {mtu}");
            assert_eq!((&bytes[..6], &bytes[6..12]), (&b.address().0[..], &a.address().0[..]));
            assert_eq!(bytes[12..14], ETHERTYPE.to_be_bytes());
            assert!(bytes[18..].iter().enumerate().all(|(i, byte)| *byte == (i * 31 + i / 256) as u8));
            assert!(clock::now().since(arrival) < Nanos::from_secs(2), "stamped by the kernel, on our clock");
        }
        assert!(b.receive().is_none() && a.receive().is_none());
    }
}

#[test]
fn many_full_flushes_arrive_in_order_with_offloads_and_without() {
    for offload in ["on", "off"] {
        let wire = wire(9000);
        for end in [&wire.a, &wire.b] {
            end.run(&format!("ethtool -K {INTERFACE} tx-udp-segmentation {offload} gro {offload}"));
        }
        let (mut a, mut b) = (open_one(&wire.a, &[]), open_one(&wire.b, &[]));
        let to = b.address();
        let mut expected = 0u32;
        for round in 0..30u32 {
            for i in 0..FRAMES_QUEUED_MAX as u32 {
                let number = round * 64 + i;
                let body =
                    [&number.to_le_bytes()[..], &vec![1; if number % 5 == 4 { 60 } else { 8300 }]].concat();
                put(&mut a, to, SHORT, Steer::new(0, 0), &body, 1);
            }
            assert!(a.frame().is_none());
            assert_eq!(flush(&mut a), []);
            while expected < round * 64 + 64 {
                let (bytes, _) = receive_within(&mut b, Nanos::from_secs(1)).expect("a frame");
                assert_eq!(bytes[18..22], expected.to_le_bytes());
                assert_eq!(bytes.len(), 22 + if expected % 5 == 4 { 60 } else { 8300 });
                expected += 1;
            }
        }
    }
}

#[test]
fn what_is_longer_than_the_mtu_or_for_no_endpoint_is_refused_alone() {
    let wire = wire(1500);
    let (mut a, mut b) = (open_one(&wire.a, &[]), open_one(&wire.b, &[]));
    let (to, nowhere) = (b.address(), MacAddress([0x52, 0, 192, 0, 2, 2]));
    let frames = [(1, 100, to), (2, 1469, to), (3, 1468, to), (4, 100, nowhere), (5, 5000, to), (6, 100, to)];
    for (pn, len, to) in frames {
        put(&mut a, to, SHORT, Steer::new(0, 0), &vec![7; len], pn);
    }
    let ids = flush(&mut a).into_iter().map(|id| id.pn).collect::<Vec<_>>();
    assert_eq!(ids, [2, 4, 5]);
    assert_eq!(drain(&mut b).iter().map(Vec::len).collect::<Vec<_>>(), [100, 1468, 100]);
    assert_eq!(a.drops().refused.load(Ordering::Relaxed), 3);
}

// P-104
#[test]
fn what_is_for_all_reaches_every_process_of_every_peer_that_is_there() {
    let wire = wire(9000);
    let absent = Ipv4Addr::new(192, 0, 2, 77);
    let mut a = open_one(&wire.a, &[absent, B]);
    let mut others: Vec<UdpLink> = (0..3).map(|_| open_one(&wire.b, &[])).collect();
    assert_eq!(others[2].address().to_string(), "02:02:c0:00:02:02");
    put(&mut a, MacAddress::BROADCAST, LONG, Steer::new(0, 0), b"who has?", 1);
    let third = others[2].address();
    put(&mut a, third, SHORT, Steer::new(2, 0), b"you alone", 2);
    assert_eq!(flush(&mut a), []);
    for (index, other) in others.iter_mut().enumerate() {
        let expected: &[&[u8]] = if index == 2 { &[b"who has?", b"you alone"] } else { &[b"who has?"] };
        assert_eq!(drain(other), expected);
    }
    let to = a.address();
    send(&mut others[1], to, LONG, Steer::new(0, 0), b"I have");
    let (bytes, _) = receive_within(&mut a, Nanos::from_secs(1)).expect("a frame");
    assert_eq!(bytes[6..12], others[1].address().0);
}

#[test]
fn a_frame_reaches_the_worker_that_its_steer_names() {
    let wire = wire(9000);
    let mut a = open_one(&wire.a, &[]);
    let (process, mut workers) = open(&wire.b, 3, &[]);
    let to = workers[0].address();
    for worker in [2u16, 0, 1, 2, 7] {
        send(&mut a, to, SHORT, Steer::new(process, worker), &worker.to_le_bytes());
    }
    for (index, worker) in workers.iter_mut().enumerate() {
        // As in a fan-out group, a number that is no worker's goes to one of them all the same.
        let expected: Vec<Vec<u8>> = [2u16, 0, 1, 2, 7]
            .iter()
            .filter(|w| **w as usize % 3 == index)
            .map(|w| w.to_le_bytes().into())
            .collect();
        assert_eq!(drain(worker), expected, "worker {index}");
    }
}

// P-102
#[test]
fn a_stranger_is_not_heard() {
    let wire = wire(1500);
    let mut b = open_one(&wire.b, &[]);
    wire.a.enter(|| {
        let stranger = UdpSocket::bind((A, 5353)).unwrap();
        stranger.send_to(&[0x20; 100], (B, PORT_FIRST)).unwrap();
        // One of ours by its port, who says nothing, and too much.
        let known = UdpSocket::bind((A, PORT_FIRST + 3)).unwrap();
        known.send_to(&[], (B, PORT_FIRST)).unwrap();
        known.send_to(&[0x20; 4000], (B, PORT_FIRST)).unwrap();
        known.send_to(b"0123known", (B, PORT_FIRST)).unwrap();
    });
    assert_eq!(drain(&mut b), [b"known"]);
}

#[test]
fn datagrams_that_came_as_one_message_are_not_slept_on() {
    let wire = wire(9000);
    for end in [&wire.a, &wire.b] {
        end.run(&format!("ethtool -K {INTERFACE} tx-udp-segmentation on gro on"));
    }
    let (mut a, mut b) = (open_one(&wire.a, &[]), open_one(&wire.b, &[]));
    let to = b.address();
    for pn in 0..FRAMES_QUEUED_MAX as u64 {
        put(&mut a, to, SHORT, Steer::new(0, 0), &[7; 600], pn);
    }
    assert_eq!(flush(&mut a), []);
    let mut waiter = Waiter::new().unwrap();
    for _ in 1..FRAMES_QUEUED_MAX {
        assert!(receive_within(&mut b, Nanos::from_secs(1)).is_some());
        // What a worker does that has taken enough for a turn: it sleeps until the descriptor or the link's own time ends that.
        let (before, due) = (clock::now(), b.poll_timeout().expect("the link is looked at"));
        waiter.wait_beside(b.as_fd(), Some(due.since(before)), &mut Vec::new()).unwrap();
        assert!(clock::now().since(before) < Nanos::from_millis(300), "it slept though frames were there");
    }
    assert!(b.receive().is_some() && b.receive().is_none());
    assert!(b.poll_timeout().expect("the link is looked at") > clock::now());
}

#[test]
fn strangers_who_never_stop_do_not_keep_a_worker() {
    let wire = wire(1500);
    let mut b = open_one(&wire.b, &[]);
    let sent = wire.a.enter(|| {
        let stranger = UdpSocket::bind((A, 5353)).unwrap();
        (0..200).filter(|_| stranger.send_to(&[0x20; 100], (B, PORT_FIRST)).is_ok()).count()
    });
    assert_eq!(sent, 200);
    let readable = |link: &UdpLink| {
        let mut waiter = Waiter::new().unwrap();
        waiter.add(link.as_fd(), 1).unwrap();
        let mut ready = Vec::new();
        waiter.wait(Some(Nanos::ZERO), &mut ready).unwrap();
        !ready.is_empty()
    };
    assert!(b.receive().is_none() && readable(&b), "one call takes a part of them");
    let calls = (0..200).take_while(|_| readable(&b) && b.receive().is_none()).count();
    assert!((2..200).contains(&calls), "{calls}");
}

#[test]
fn the_ninth_process_is_told_that_no_number_is_left() {
    let wire = wire(1500);
    let mut held: Vec<_> = (0..PROCESSES_MAX).map(|_| open(&wire.a, 1, &[])).collect();
    assert!(held.iter().enumerate().all(|(index, (process, _))| index == usize::from(*process)));
    let error = wire.a.enter(|| udp::open(INTERFACE, ETHERTYPE, 1, &[]).map(|_| ()).unwrap_err());
    assert!(matches!(error, OpenError::NoProcessNumber { most: 8, .. }), "{error}");
    held.remove(5);
    assert_eq!(open(&wire.a, 2, &[]).0, 5);
}

#[test]
fn errors_of_opening_say_what_is_wrong_with_what() {
    let wire = VethPair::new(1500);
    let fail = |end: &Namespace, name: &str| {
        end.enter(|| udp::open(name, ETHERTYPE, 1, &[]).map(|_| ()).unwrap_err().to_string())
    };
    assert!(fail(&wire.a, "nothere0").starts_with("no interface named nothere0"));
    assert!(fail(&wire.a, INTERFACE).contains("wire0 has no IPv4 address (ip address add"));
    address(&wire);
    wire.a.run(&format!("ip link set {INTERFACE} mtu 1499"));
    assert!(fail(&wire.a, INTERFACE).contains("wire0 has MTU 1499; 1500 to 65535 is needed"));
    wire.b.run(&format!("ip link set {INTERFACE} down"));
    assert!(fail(&wire.b, INTERFACE).contains("wire0 is down"));
    wire.b.enter(|| {
        let _other = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT_FIRST)).unwrap();
        wire.b.run(&format!("ip link set {INTERFACE} up"));
        let error = udp::open(INTERFACE, ETHERTYPE, 1, &[]).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("UDP port of this process") && error.contains("in use"), "{error}");
    });
}

#[test]
fn an_interface_that_goes_and_comes_back_is_used_again_with_its_new_address() {
    let wire = wire(9000);
    let (mut a, mut b) = (open_one(&wire.a, &[]), open_one(&wire.b, &[]));
    let turn_until = |link: &mut UdpLink, open: bool| {
        let until = clock::now() + Nanos::from_secs(5);
        while link.is_open() != open {
            assert!(clock::now() < until, "open: {}", link.is_open());
            wire.a.enter(|| assert!(link.receive().is_none()));
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    wire.cut();
    turn_until(&mut a, false);
    let to = b.address();
    put(&mut a, to, SHORT, Steer::new(0, 0), b"lost", 4);
    assert_eq!(flush(&mut a), [FrameId { session: 5, pn: 4 }]);
    wire.connect();
    wire.b.run(&format!("ip address add {B}/24 dev {INTERFACE}"));
    wire.a.run(&format!("ip address add 192.0.2.9/24 dev {INTERFACE}"));
    turn_until(&mut a, true);
    assert!(a.take_changed() && !a.take_changed());
    assert_eq!((a.address().to_string().as_str(), a.mtu()), ("02:00:c0:00:02:09", 9000 - 28));
    send(&mut a, to, SHORT, Steer::new(0, 0), b"back");
    assert_eq!(drain(&mut b), [b"back"]);
    assert_eq!(a.drops().reopened.load(Ordering::Relaxed), 1);
}
