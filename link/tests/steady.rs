//! Packet links over real veth pairs, under load and in quiet: foreign memory in frames, floods, stamps, and how often an idle worker wakes.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cirro_link::packet::{self, PacketLink};
use cirro_link::wait::Waiter;
use cirro_link::{FRAMES_QUEUED_MAX, FrameId, Link, Run, clock};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{MacAddress, Steer};
use support::frames::{ETHERTYPE, SESSION, SHORT, flush, put, receive_within};
use support::netns::{INTERFACE, Namespace, VethPair};

fn open(namespace: &Namespace, workers: u16) -> (u16, Vec<PacketLink>) {
    namespace.enter(|| packet::open(INTERFACE, ETHERTYPE, workers).unwrap())
}

fn open_one(namespace: &Namespace) -> PacketLink {
    open(namespace, 1).1.remove(0)
}

/// The 18 bytes that every frame here begins with.
fn header(to: MacAddress, from: MacAddress, steer: Steer) -> Vec<u8> {
    [&to.0[..], &from.0, &ETHERTYPE.to_be_bytes(), &[SHORT, 0], &steer.0.to_be_bytes()].concat()
}

/// Sends a frame whose data lies in pieces of `piece` bytes of `memory`, taken from its end to its start, with a byte of the head between.
/// Returns what the frame must look like.
fn send_scattered(link: &mut PacketLink, to: MacAddress, memory: &'static [u8], piece: usize) -> Vec<u8> {
    let from = link.address();
    let frame = link.frame().expect("room");
    frame.head.extend_from_slice(&header(to, from, Steer::new(0, 0)));
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
fn foreign_memory_is_in_the_frame_where_it_was_named_both_ways_at_every_mtu() {
    let memory: &'static [u8] = (0..65_000u32).map(|i| (i * 31 + i / 251) as u8).collect::<Vec<_>>().leak();
    for mtu in [1500, 9000, 65535] {
        let wire = VethPair::new(mtu);
        let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
        // One piece; pages; pieces smaller than what the kernel takes as one vector; more pieces than it takes at all (1024).
        for (bytes, piece) in [(mtu - 4, mtu), (mtu - 100, 4096), (1400, 512), (mtu * 9 / 10, 50), (1300, 1)]
        {
            let data = &memory[..bytes.min(memory.len())];
            if data.len() / piece / 2 + data.len() + 4 > mtu {
                continue;
            }
            let (to_b, to_a) = (b.address(), a.address());
            let expected = send_scattered(&mut a, to_b, data, piece);
            let (came, _) = receive_within(&mut b, Nanos::from_secs(1)).expect("a frame");
            assert!(came == expected, "MTU {mtu}, {bytes} bytes in pieces of {piece}");
            let expected = send_scattered(&mut b, to_a, data, piece);
            let (came, _) = receive_within(&mut a, Nanos::from_secs(1)).expect("a frame");
            assert!(came == expected, "MTU {mtu}, {bytes} bytes in pieces of {piece}, back");
        }
    }
}

#[test]
fn each_of_one_two_or_three_workers_gets_what_is_steered_to_it() {
    for workers in 1..=3u16 {
        let wire = VethPair::new(1500);
        let mut a = open_one(&wire.a);
        let (process, mut links) = open(&wire.b, workers);
        let to = links[0].address();
        for round in 0..20u8 {
            for worker in 0..workers {
                put(&mut a, to, SHORT, Steer::new(process, worker), &[worker as u8, round, 3], 1);
            }
        }
        let mut refused = Vec::new();
        a.flush(&mut refused);
        assert_eq!(refused, []);
        for (worker, link) in links.iter_mut().enumerate() {
            for round in 0..20u8 {
                let (bytes, _) = receive_within(link, Nanos::from_secs(1)).expect("a frame");
                assert_eq!(bytes[18..21], [worker as u8, round, 3], "of {workers}");
            }
            assert!(receive_within(link, Nanos::from_millis(5)).is_none());
        }
    }
}

#[test]
fn a_flood_that_nobody_reads_refuses_by_name_and_ends_nothing() {
    let wire = VethPair::new(9000);
    // 80 Mbit/s and a short queue before the wire: most of the flood cannot leave.
    wire.a.run(&format!("tc qdisc add dev {INTERFACE} root tbf rate 80mbit burst 100k limit 200k"));
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let to = b.address();
    let (mut refused, mut committed) = (Vec::new(), 0u64);
    for _ in 0..50 {
        while a.frame().is_some() {
            put(&mut a, to, SHORT, Steer::new(0, 0), &[7; 8000], committed);
            committed += 1;
        }
        a.flush(&mut refused);
    }
    assert_eq!(committed, 50 * FRAMES_QUEUED_MAX as u64);
    assert!(refused.len() > 1000, "only {} refused: the queue is too long for this test", refused.len());
    assert!(refused.is_sorted_by(|before, after| before.pn < after.pn), "each at most once");
    assert!(refused.iter().all(|id| id.session == SESSION && id.pn < committed));
    assert_eq!(a.drops().refused.load(Ordering::Relaxed), refused.len() as u64);
    // What was not refused arrives, and the link is as good as before.
    let mut came = 0;
    while came + (refused.len() as u64) < committed {
        assert!(receive_within(&mut b, Nanos::from_secs(2)).is_some(), "{came} came");
        came += 1;
    }
    wire.a.run(&format!("tc qdisc del dev {INTERFACE} root"));
    assert!(a.is_open() && !a.take_changed());
    put(&mut a, to, SHORT, Steer::new(0, 0), b"after", 1);
    refused.clear();
    a.flush(&mut refused);
    assert_eq!(refused, []);
    assert_eq!(receive_within(&mut b, Nanos::from_secs(1)).unwrap().0[18..], *b"after");
}

#[test]
fn arrivals_never_go_back_and_are_of_now() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let (to, mut last) = (b.address(), Instant(0));
    for round in 0..300u64 {
        let before = clock::now();
        for pn in 0..8 {
            put(&mut a, to, SHORT, Steer::new(0, 0), &[1; 60], pn);
        }
        a.flush(&mut Vec::new());
        let after = clock::now();
        for _ in 0..8 {
            let (_, arrival) = receive_within(&mut b, Nanos::from_secs(1)).expect("a frame");
            assert!(arrival >= last && arrival <= clock::now(), "round {round}");
            // On a veth the frame arrives while it is sent; 50 ms for a kernel thread that has to wait for its turn on a busy machine.
            let (earliest, latest) = (before.0 - 50_000, after.0 + 50_000_000);
            assert!((earliest..latest).contains(&arrival.0), "{arrival:?} is not in {before:?} to {after:?}");
            last = arrival;
        }
    }
}

/// Waits and looks as an idle worker does, for `span`. Returns how often it was woken.
fn wakeups(namespace: &Namespace, link: &mut PacketLink, span: Nanos) -> u32 {
    namespace.enter(|| {
        let mut waiter = Waiter::new().unwrap();
        let (mut count, mut ready, until) = (0, Vec::new(), clock::now() + span);
        while clock::now() < until {
            assert!(link.receive().is_none());
            link.flush(&mut Vec::new());
            let due = link.poll_timeout().map_or(until, |due| due.min(until));
            waiter.wait_beside(link.as_fd(), Some(due.since(clock::now())), &mut ready).unwrap();
            count += 1;
        }
        count
    })
}

#[test]
fn an_idle_worker_sleeps_whatever_its_interface_does() {
    let span = Nanos::from_millis(200);
    let wire = VethPair::new(1500);
    let (_, mut links) = open(&wire.b, 2);
    for link in &mut links {
        assert!(wakeups(&wire.b, link, span) <= 3, "the interface is up");
    }
    // While it is away it is looked for twenty times a second; finding an error out may take a few wake-ups more.
    let limit = 4 + 20 + 10;
    for what in ["down", "up", "down"] {
        wire.b.run(&format!("ip link set {INTERFACE} {what}"));
        for link in &mut links {
            let count = wakeups(&wire.b, link, span);
            assert!(count <= limit, "{count} wake-ups with the interface {what}");
        }
    }
    wire.b.run(&format!("ip link set {INTERFACE} up"));
    wire.cut();
    for link in &mut links {
        let count = wakeups(&wire.b, link, span);
        assert!(count <= limit, "{count} wake-ups without an interface");
    }
}

#[test]
fn a_worker_that_has_just_looked_does_not_spin_on_the_end_of_its_interface() {
    let wire = VethPair::new(1500);
    let (_, mut links) = open(&wire.b, 1);
    let link = &mut links[0];
    for _ in 0..5 {
        wire.b.run(&format!("ip link set {INTERFACE} up"));
        let until = clock::now() + Nanos::from_secs(3);
        while !link.is_open() {
            wire.b.enter(|| assert!(link.receive().is_none()));
            assert!(clock::now() < until, "not open again after 3 s");
        }
        // The error comes at once after a look, as it does to a worker that is busy with other things.
        std::thread::scope(|scope| {
            let down = scope.spawn(|| wire.b.run(&format!("ip link set {INTERFACE} down")));
            let count = wakeups(&wire.b, link, Nanos::from_millis(100));
            assert!(count <= 30, "{count} wake-ups");
            down.join().unwrap();
        });
    }
}

#[test]
fn two_processes_keep_their_numbers_when_their_interface_is_made_anew() {
    let wire = VethPair::new(1500);
    let (first, mut first_links) = open(&wire.b, 1);
    let (second, mut second_links) = open(&wire.b, 2);
    wire.cut();
    wire.b.enter(|| {
        for link in first_links.iter_mut().chain(&mut second_links) {
            assert!(link.receive().is_none());
        }
    });
    wire.connect();
    let mut a = open_one(&wire.a);
    wire.b.enter(|| {
        let until = clock::now() + Nanos::from_secs(3);
        // The second looks first.
        for link in second_links.iter_mut().rev().chain(&mut first_links) {
            while !link.take_changed() {
                assert!(link.receive().is_none());
                assert!(clock::now() < until, "not open again after 3 s");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let to = first_links[0].address();
    for (process, worker) in [(second, 1), (first, 0), (second, 0)] {
        put(&mut a, to, SHORT, Steer::new(process, worker), &[process as u8, worker as u8], 1);
    }
    let mut refused = Vec::new();
    a.flush(&mut refused);
    assert_eq!(refused, []);
    let places = [(first, 0u8), (second, 0), (second, 1)];
    for (link, (process, worker)) in first_links.iter_mut().chain(&mut second_links).zip(places) {
        let (bytes, _) = receive_within(link, Nanos::from_secs(1)).expect("a frame");
        assert_eq!(bytes[18..20], [process as u8, worker]);
        assert!(receive_within(link, Nanos::from_millis(5)).is_none());
    }
}
