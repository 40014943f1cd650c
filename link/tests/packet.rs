//! Packet links over real veth pairs: what the kernel does with our sockets, programs and rings.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::Ordering;
use std::time::Duration;

use cirro_link::packet::{self, PacketLink};
use cirro_link::wait::Waiter;
use cirro_link::{FRAMES_QUEUED_MAX, FrameId, Link, clock};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{MacAddress, Steer};
use support::frames::{ETHERTYPE, LONG, SHORT, drain, flush, put, receive_within, send};
use support::netns::{INTERFACE, Namespace, VethPair};

fn open(namespace: &Namespace, workers: u16) -> (u16, Vec<PacketLink>) {
    namespace.enter(|| packet::open(INTERFACE, ETHERTYPE, workers).unwrap())
}

fn open_one(namespace: &Namespace) -> PacketLink {
    open(namespace, 1).1.remove(0)
}

#[test]
fn whole_frames_of_every_size_cross_a_wire_of_any_mtu() {
    for mtu in [1500, 9000, 65535] {
        let wire = VethPair::new(mtu);
        let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
        assert_eq!((a.mtu(), b.mtu()), (mtu, mtu));
        let to = b.address();
        let lengths = [42, 43, 1000, 1496, mtu - 5, mtu - 4];
        for len in lengths {
            let body: Vec<u8> = (0..len).map(|i| (i * 31 + i / 256) as u8).collect();
            put(&mut a, to, SHORT, Steer::new(0, 0), &body, 1);
        }
        assert_eq!(flush(&mut a), []);
        for len in lengths {
            let (bytes, _) = receive_within(&mut b, Nanos::from_secs(1)).expect("a frame");
            assert_eq!(bytes.len(), 18 + len);
            assert_eq!((&bytes[..6], &bytes[6..12]), (&b.address().0[..], &a.address().0[..]));
            assert!(bytes[18..].iter().enumerate().all(|(i, byte)| *byte == (i * 31 + i / 256) as u8));
        }
        assert!(b.receive().is_none());
        assert!(a.receive().is_none(), "own transmissions are not seen");
    }
}

#[test]
fn what_is_longer_than_the_mtu_is_refused_alone() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    for (pn, len) in [(1, 100), (2, 1497), (3, 1496), (4, 5000), (5, 100)] {
        put(&mut a, to, SHORT, Steer::new(0, 0), &vec![7; len], pn);
    }
    let ids = flush(&mut a).into_iter().map(|id| (id.session, id.pn)).collect::<Vec<_>>();
    assert_eq!(ids, [(5, 2), (5, 4)]);
    let lengths = drain(&mut b).iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths, [100, 1496, 100]);
    assert_eq!(a.drops().refused.load(Ordering::Relaxed), 2);
}

#[test]
fn a_full_queue_ends_at_64_frames_and_many_flushes_lose_nothing() {
    let wire = VethPair::new(9000);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    let mut expected = 0u32;
    // 50 · 64 frames: the ring of 456 slots goes round.
    for round in 0..50u32 {
        for i in 0..FRAMES_QUEUED_MAX as u32 {
            let body = [&(round * 64 + i).to_le_bytes()[..], &[1; 60]].concat();
            put(&mut a, to, SHORT, Steer::new(0, 0), &body, 1);
        }
        assert!(a.frame().is_none());
        assert_eq!(flush(&mut a), []);
        while let Some((bytes, _)) = receive_within(&mut b, Nanos::from_millis(200)) {
            assert_eq!(bytes[18..22], expected.to_le_bytes());
            expected += 1;
            if expected == round * 64 + 64 {
                break;
            }
        }
    }
    assert_eq!(expected, 3200);
}

/// P-32 P-33: what names no worker of ours is dropped; LONG frames pass whatever process they name.
#[test]
fn the_fan_out_brings_each_frame_to_the_worker_that_its_steer_names() {
    let wire = VethPair::new(1500);
    let mut a = open_one(&wire.a);
    let (process, mut workers) = open(&wire.b, 3);
    let to = workers[0].address();
    for worker in [2u16, 0, 1, 1, 2, 0] {
        send(&mut a, to, SHORT, Steer::new(process, worker), &[worker as u8; 60]);
    }
    // A worker that does not exist: taken modulo 3 to worker 1, whose filter drops it.
    send(&mut a, to, SHORT, Steer::new(process, 4), &[9; 60]);
    for (worker, link) in workers.iter_mut().enumerate() {
        assert_eq!(drain(link), [vec![worker as u8; 60], vec![worker as u8; 60]]);
    }
    // LONG frames pass whatever their process bits say, and go to one worker each.
    send(&mut a, MacAddress::BROADCAST, LONG, Steer::new(63, 5), &[5; 60]);
    send(&mut a, to, LONG, Steer::new(9, 0), &[6; 60]);
    assert_eq!(drain(&mut workers[2]), [vec![5; 60]]);
    assert_eq!(drain(&mut workers[0]), [vec![6; 60]]);
    assert_eq!(drain(&mut workers[1]), Vec::<Vec<u8>>::new());
}

/// P-32 P-34: numbers are claimed from 0 on; short frames reach the process that they name, LONG frames every one.
#[test]
fn two_processes_on_one_interface_have_numbers_of_their_own_and_get_their_own_frames() {
    let wire = VethPair::new(1500);
    let mut a = open_one(&wire.a);
    let (first, mut first_links) = open(&wire.b, 2);
    let (second, mut second_links) = open(&wire.b, 1);
    let (third, third_links) = open(&wire.b, 1);
    assert_eq!((first, second, third), (0, 1, 2));
    let to = second_links[0].address();
    send(&mut a, to, SHORT, Steer::new(second, 0), &[2; 60]);
    send(&mut a, to, SHORT, Steer::new(first, 1), &[1; 60]);
    send(&mut a, to, SHORT, Steer::new(7, 0), &[7; 60]);
    send(&mut a, to, LONG, Steer::new(63, 0), &[3; 60]);
    assert_eq!(drain(&mut first_links[0]), [vec![3; 60]]);
    assert_eq!(drain(&mut first_links[1]), [vec![1; 60]]);
    assert_eq!(drain(&mut second_links[0]), [vec![2; 60], vec![3; 60]]);
    // A number comes back when its process ends.
    drop(second_links);
    drop(third_links);
    drop(first_links);
    // Not at once if a test beside this one forks meanwhile: its child holds our sockets until it runs another program.
    let until = clock::now() + Nanos::from_secs(5);
    while open(&wire.b, 1).0 != 0 {
        assert!(clock::now() < until, "number 0 did not come back");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn frames_for_another_address_or_too_short_to_steer_are_dropped_in_the_kernel() {
    let wire = VethPair::new(1500);
    wire.b.run(&format!("ip link set {INTERFACE} promisc on"));
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    let steer = Steer::new(0, 0);
    send(&mut a, MacAddress([2, 0xaa, 0, 0, 0, 1]), SHORT, steer, &[1; 60]);
    send(&mut a, MacAddress([0x33, 0x33, 0, 0, 0, 1]), LONG, steer, &[2; 60]);
    let from = a.address();
    let head = &mut a.frame().unwrap().head;
    head.extend_from_slice(&[&to.0[..], &from.0, &ETHERTYPE.to_be_bytes(), &[SHORT, 0, 0]].concat());
    a.commit(FrameId::default());
    assert_eq!(flush(&mut a), []);
    send(&mut a, MacAddress::BROADCAST, SHORT, steer, &[3; 60]);
    send(&mut a, to, SHORT, steer, &[4; 60]);
    assert_eq!(drain(&mut b), [vec![3; 60], vec![4; 60]]);
}

#[test]
fn arrival_is_when_the_frame_came_and_not_when_it_was_looked_at() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    let mut sent = Vec::new();
    for pause_ms in [0, 5, 40, 1] {
        std::thread::sleep(Duration::from_millis(pause_ms));
        let before = clock::now();
        send(&mut a, to, SHORT, Steer::new(0, 0), &[1; 60]);
        sent.push((before, clock::now()));
    }
    std::thread::sleep(Duration::from_millis(50));
    for (before, after) in sent {
        let (_, arrival) = receive_within(&mut b, Nanos::from_secs(1)).unwrap();
        // The two clocks are read one after the other: a microsecond or two of error.
        let (earliest, latest) = (before.0 - 20_000, after.0 + 2_000_000);
        assert!(
            (earliest..latest).contains(&arrival.0),
            "{arrival:?} is not within {before:?} and {after:?}"
        );
    }
}

#[test]
fn a_link_that_goes_down_and_up_refuses_meanwhile_and_works_again_with_every_worker_in_its_place() {
    let wire = VethPair::new(1500);
    let mut a = open_one(&wire.a);
    let (process, mut workers) = open(&wire.b, 3);
    for round in 0..3 {
        wire.b.run(&format!("ip link set {INTERFACE} down"));
        let to = a.address();
        put(&mut workers[1], to, SHORT, Steer::new(0, 0), &[1; 60], 77);
        assert_eq!(flush(&mut workers[1]), [FrameId { session: 5, pn: 77 }], "round {round}");
        assert!(!workers[1].is_open());
        wire.b.run(&format!("ip link set {INTERFACE} up"));
        // In a different order each time: the first to look opens for all.
        for turn in 0..3 {
            turn_until_open(&wire.b, &mut workers[(turn + round) % 3]);
        }
        let to = workers[0].address();
        for worker in 0..3u16 {
            send(&mut a, to, SHORT, Steer::new(process, worker), &[worker as u8; 60]);
        }
        for (worker, link) in workers.iter_mut().enumerate() {
            assert_eq!(drain(link), [vec![worker as u8; 60]], "round {round}");
            assert!(link.take_changed());
            assert!(!link.take_changed());
        }
        send(&mut workers[2], a.address(), SHORT, Steer::new(0, 0), &[8; 60]);
        assert_eq!(drain(&mut a), [vec![8; 60]]);
    }
}

/// Receives as a worker does: at once, then when the link asks for it.
fn turn_until_open(namespace: &Namespace, link: &mut PacketLink) {
    namespace.enter(|| {
        let until = clock::now() + Nanos::from_secs(3);
        let reopened = link.drops().reopened.load(Ordering::Relaxed);
        loop {
            assert!(link.receive().is_none());
            if link.is_open() && link.drops().reopened.load(Ordering::Relaxed) > reopened {
                return;
            }
            assert!(clock::now() < until, "not open again after 3 s");
            let wait = link.poll_timeout().unwrap().since(clock::now());
            std::thread::sleep(Duration::from(wait.min(Nanos::from_millis(5))));
        }
    });
}

#[test]
fn an_interface_that_is_removed_and_made_anew_is_found_with_its_new_index_address_and_mtu() {
    let mut wire = VethPair::new(1500);
    let mut a = open_one(&wire.a);
    let (process, mut workers) = open(&wire.b, 2);
    let before = workers[0].address();
    wire.cut();
    assert!(workers[0].receive().is_none());
    put(&mut workers[0], a.address(), SHORT, Steer::new(0, 0), &[1; 60], 3);
    assert_eq!(flush(&mut workers[0]), [FrameId { session: 5, pn: 3 }]);
    // Gone for a while: nothing ends, everything is refused.
    std::thread::sleep(Duration::from_millis(120));
    wire.b.enter(|| assert!(workers.iter_mut().all(|link| link.receive().is_none())));
    assert_eq!(workers[0].mtu(), 1500);
    // Another interface takes the old number's place, so the index is another one too.
    wire.b.run("ip link add other0 type veth peer name other1");
    wire.set_mtu(9000);
    wire.connect();
    turn_until_open(&wire.b, &mut workers[1]);
    turn_until_open(&wire.b, &mut workers[0]);
    turn_until_open(&wire.a, &mut a);
    assert_ne!(workers[0].address(), before, "veth addresses are random");
    assert_eq!((workers[0].mtu(), workers[1].mtu(), a.mtu()), (9000, 9000, 9000));
    let to = workers[0].address();
    for worker in [1, 0] {
        send(&mut a, to, SHORT, Steer::new(process, worker), &vec![worker as u8; 8996]);
    }
    assert_eq!(drain(&mut workers[0]), [vec![0; 8996]]);
    assert_eq!(drain(&mut workers[1]), [vec![1; 8996]]);
    // The process number was taken on the new index as well.
    assert_ne!(open(&wire.b, 1).0, process);
}

/// Whether a frame or an event of the interface ends a wait of `limit` early.
fn wakes(link: &PacketLink, limit: Nanos) -> bool {
    let (mut waiter, begun) = (Waiter::new().unwrap(), clock::now());
    waiter.wait_beside(link.as_fd(), Some(limit), &mut Vec::new()).unwrap();
    clock::now().since(begun) < limit
}

#[test]
fn a_worker_that_sleeps_is_woken_by_the_first_frame_after_another_opened_the_interface_again() {
    let (long, short) = (Nanos::from_secs(2), Nanos::from_millis(1));
    let wire = VethPair::new(1500);
    let mut a = open_one(&wire.a);
    let (process, mut workers) = open(&wire.b, 2);
    let mut sleeper = workers.remove(1);
    wire.b.run(&format!("ip link set {INTERFACE} down"));
    assert!(wakes(&sleeper, long), "the interface's end is an event");
    wire.b.enter(|| assert!(sleeper.receive().is_none()));
    wire.b.run(&format!("ip link set {INTERFACE} up"));
    turn_until_open(&wire.b, &mut workers[0]);
    assert!(!wakes(&sleeper, short), "nothing to do for the sleeper yet");
    send(&mut a, workers[0].address(), SHORT, Steer::new(process, 1), &[4; 60]);
    assert!(wakes(&sleeper, long));
    wire.b.enter(|| assert_eq!(drain(&mut sleeper), [vec![4; 60]]));
    assert!(!wakes(&sleeper, short), "all frames were taken");
    send(&mut a, workers[0].address(), SHORT, Steer::new(process, 1), &[5; 60]);
    assert!(wakes(&sleeper, long), "also by what comes to the socket that it has");
}

#[test]
fn an_mtu_that_changes_is_followed_within_two_seconds() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    for end in [&wire.a, &wire.b] {
        end.run(&format!("ip link set {INTERFACE} mtu 9000"));
    }
    turn_until_open(&wire.a, &mut a);
    turn_until_open(&wire.b, &mut b);
    assert!(a.take_changed() && a.mtu() == 9000 && b.mtu() == 9000);
    let to = b.address();
    send(&mut a, to, SHORT, Steer::new(0, 0), &[6; 8996]);
    assert_eq!(drain(&mut b), [vec![6; 8996]]);
}

#[test]
fn frames_that_the_interface_drops_are_refused_one_by_one_and_the_link_goes_on() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    // An egress filter that drops makes the send fail with ENOBUFS, as a full transmit queue does. It drops frames whose body begins with 0xbb.
    let rules = format!(
        "table netdev t {{ chain c {{ type filter hook egress device \"{INTERFACE}\" priority 0; policy accept; \
         @ll,144,8 0xbb drop; }}; }}"
    );
    let nft = wire.a.command("nft").arg(rules).output().unwrap();
    assert!(nft.status.success(), "{}", String::from_utf8_lossy(&nft.stderr));
    for pn in 0..20u64 {
        let mark = if pn % 5 == 2 { 0xbb } else { pn as u8 };
        put(&mut a, to, SHORT, Steer::new(0, 0), &[mark; 60], pn);
    }
    let refused: Vec<u64> = flush(&mut a).iter().map(|id| id.pn).collect();
    assert_eq!(refused, [2, 7, 12, 17]);
    assert_eq!(drain(&mut b).len(), 16);
    // All dropped: every frame is named, and the kernel is not asked for all of them.
    for pn in 0..64u64 {
        put(&mut a, to, SHORT, Steer::new(0, 0), &[0xbb; 60], pn);
    }
    let refused: BTreeSet<u64> = flush(&mut a).iter().map(|id| id.pn).collect();
    assert_eq!(refused, (0..64).collect());
    assert!(a.is_open());
    send(&mut a, to, SHORT, Steer::new(0, 0), &[1; 60]);
    assert_eq!(drain(&mut b), [vec![1; 60]]);
}

#[test]
fn a_ring_that_overflows_loses_frames_and_counts_them() {
    let wire = VethPair::new(65535);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    let sent = 20 * FRAMES_QUEUED_MAX;
    for _ in 0..20 {
        for pn in 0..FRAMES_QUEUED_MAX as u64 {
            put(&mut a, to, SHORT, Steer::new(0, 0), &[1; 60], pn);
        }
        assert_eq!(flush(&mut a), []);
    }
    let received = drain(&mut b).len();
    // 27 blocks of 15 slots.
    assert_eq!(received, 27 * 15);
    let until = clock::now() + Nanos::from_secs(3);
    let drops = b.drops();
    while drops.ring_full.load(Ordering::Relaxed) == 0 && clock::now() < until {
        wire.b.enter(|| assert!(b.receive().is_none()));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(drops.ring_full.load(Ordering::Relaxed), (sent - received) as u64);
    send(&mut a, to, SHORT, Steer::new(0, 0), &[2; 60]);
    assert_eq!(drain(&mut b), [vec![2; 60]]);
}

#[test]
fn errors_of_opening_say_what_is_wrong_with_what() {
    let wire = VethPair::new(1500);
    wire.a.run(&format!("ip link set {INTERFACE} down"));
    wire.b.run(&format!("ip link set {INTERFACE} mtu 1400"));
    let fail =
        |end: &Namespace, name: &str| end.enter(|| packet::open(name, ETHERTYPE, 1).map(|_| ()).unwrap_err());
    assert!(matches!(fail(&wire.a, "nothere0"), cirro_link::OpenError::NoInterface { .. }));
    assert!(matches!(fail(&wire.a, INTERFACE), cirro_link::OpenError::Down { .. }));
    let error = fail(&wire.b, INTERFACE);
    assert!(matches!(error, cirro_link::OpenError::Mtu { mtu: 1400, .. }), "{error}");
    assert!(error.to_string().contains("wire0 has MTU 1400"), "{error}");
}

/// P-34: a number that another holds is never taken, and the one that is free is found.
#[test]
fn the_sixty_fifth_process_is_told_that_no_number_is_left() {
    let wire = VethPair::new(1500);
    // "7: wire0@if7: <BROADCAST,…"
    let shown = wire.a.run(&format!("ip -o link show {INTERFACE}")).stdout;
    let index = String::from_utf8_lossy(&shown).split(':').next().unwrap().to_owned();
    wire.a.enter(|| {
        let claim = |number| {
            let address = SocketAddr::from_abstract_name(format!("cirro-{index}-{number}")).unwrap();
            UnixDatagram::bind_addr(&address).unwrap()
        };
        let mut held: Vec<_> = (0..64).map(claim).collect();
        let error = packet::open(INTERFACE, ETHERTYPE, 1).map(|_| ()).unwrap_err();
        assert!(matches!(error, cirro_link::OpenError::NoProcessNumber { .. }), "{error}");
        held.remove(37);
        assert_eq!(packet::open(INTERFACE, ETHERTYPE, 1).unwrap().0, 37);
    });
}
