//! AF_XDP links and their interfaces: who may have one, queues, and what happens when one goes away, comes back or changes.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use cirro_link::xdp::{self, XdpLink};
use cirro_link::{FrameId, Link, OpenError, clock, packet};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{MacAddress, Steer};
use support::frames::{ETHERTYPE, LONG, SHORT, drain, flush, put, send};
use support::netns::{INTERFACE, Namespace, VethPair};

const STEER: Steer = Steer(0);

fn open(namespace: &Namespace, workers: u16) -> Vec<XdpLink> {
    namespace.enter(|| xdp::open(INTERFACE, ETHERTYPE, workers, false).unwrap().1)
}

fn open_one(namespace: &Namespace) -> XdpLink {
    open(namespace, 1).remove(0)
}

fn refusal(namespace: &Namespace, interface: &str, workers: u16) -> OpenError {
    namespace.enter(|| xdp::open(interface, ETHERTYPE, workers, false).map(|_| ()).unwrap_err())
}

/// How the program is attached to an interface, as ip(8) shows it; empty if none is.
fn program(namespace: &Namespace, interface: &str) -> String {
    let shown = namespace.run(&format!("ip -d link show dev {interface}"));
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let words = shown.split_whitespace().filter(|word| word.starts_with("xdp"));
    words.collect::<Vec<_>>().join(" ")
}

/// Receives as a worker does, when the link asks for it, until it is open or not.
fn turn_until(namespace: &Namespace, link: &mut XdpLink, open: bool) {
    namespace.enter(|| {
        let until = clock::now() + Nanos::from_secs(3);
        let reopened = link.drops().reopened.load(Ordering::Relaxed);
        while link.is_open() != open || (open && link.drops().reopened.load(Ordering::Relaxed) == reopened) {
            assert!(link.receive().is_none());
            assert!(clock::now() < until, "open: {}, after 3 s", link.is_open());
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

#[test]
fn a_second_daemon_on_the_interface_is_told_who_has_it_and_what_to_do() {
    let wire = VethPair::new(1500);
    let first = open_one(&wire.a);
    let second = refusal(&wire.a, INTERFACE, 1);
    assert!(matches!(second, OpenError::Shared { .. }), "{second}");
    let text = second.to_string();
    assert!(
        text.contains("ss -xap") && text.contains("--link-mode packet") && !text.contains('\n'),
        "{text}"
    );
    let on_packets = |namespace: &Namespace| namespace.enter(|| packet::open(INTERFACE, ETHERTYPE, 1));
    let third = on_packets(&wire.a).map(|_| ()).unwrap_err().to_string();
    assert!(third.contains("--link-mode xdp"), "{third}");
    // And the other way round.
    let _here = on_packets(&wire.b).unwrap();
    assert!(matches!(refusal(&wire.b, INTERFACE, 1), OpenError::Shared { .. }));
    assert_eq!(program(&wire.b, INTERFACE), "", "nothing is left of an attempt");
    drop(first);
    // Not at once if a test beside this one forks meanwhile: its child holds our descriptors until it runs another program.
    let until = clock::now() + Nanos::from_secs(5);
    while wire.a.enter(|| xdp::open(INTERFACE, ETHERTYPE, 1, false)).is_err() {
        assert!(clock::now() < until, "the interface is not free again");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_program_of_somebody_else_is_left_where_it_is() {
    let (wire, other) = (VethPair::new(1500), Namespace::new());
    let elsewhere = open_one(&wire.a);
    // The interface takes its program with it into a network namespace in which nobody of ours is.
    wire.a.run(&format!("ip link set {INTERFACE} netns {}", other.name()));
    other.run(&format!("ip link set {INTERFACE} up"));
    let error = refusal(&other, INTERFACE, 1);
    assert!(matches!(error, OpenError::Programmed { .. }), "{error}");
    assert!(program(&other, INTERFACE).contains("xdp"));
    drop(elsewhere);
    assert!(open_one(&other).is_open());
}

#[test]
fn errors_of_opening_say_what_is_wrong_with_what() {
    let wire = VethPair::with_queues(1500, 2);
    let fail = |interface: &str, workers| refusal(&wire.a, interface, workers).to_string();
    assert!(fail("nothere0", 1).starts_with("no interface named nothere0"));
    assert_eq!(
        fail(INTERFACE, 3),
        "interface wire0 has 2 receive queues, too few for 3 workers: --workers 2, or `ethtool -L wire0 combined 3`"
    );
    wire.a.run(&format!("ip link set {INTERFACE} mtu 1400"));
    assert!(fail(INTERFACE, 1).contains("wire0 has MTU 1400; "));
    wire.a.run(&format!("ip link set {INTERFACE} mtu 1500 down"));
    assert!(fail(INTERFACE, 1).contains("wire0 is down"));
    assert_eq!(program(&wire.a, INTERFACE), "");
}

/// P-32 P-33: what is steered to another worker than the queue's is dropped; LONG frames are the queue's.
#[test]
fn each_worker_has_the_queue_of_its_number() {
    let wire = VethPair::with_queues(9000, 3);
    let (mut here, mut there) = (open(&wire.a, 3), open(&wire.b, 3));
    let to = there[0].address();
    for (queue, link) in here.iter_mut().enumerate() {
        for worker in 0..3u16 {
            put(link, to, SHORT, Steer::new(0, worker), &vec![queue as u8; 100 + 4000 * queue], 1);
        }
        put(link, MacAddress::BROADCAST, LONG, Steer::new(9, 9), &[queue as u8 + 10; 60], 1);
        assert_eq!(flush(link), []);
    }
    for (queue, link) in there.iter_mut().enumerate() {
        let expected = [vec![queue as u8; 100 + 4000 * queue], vec![queue as u8 + 10; 60]];
        assert_eq!(drain(link), expected, "queue {queue}");
    }
}

#[test]
fn a_link_that_goes_down_and_up_refuses_meanwhile_and_works_again() {
    let wire = VethPair::with_queues(9000, 2);
    let (mut here, mut there) = (open(&wire.a, 2), open(&wire.b, 2));
    for round in 0..3 {
        wire.b.run(&format!("ip link set {INTERFACE} down"));
        let to = here[0].address();
        for (pn, len) in [(7, 60), (8, 8000)] {
            put(&mut there[1], to, SHORT, Steer::new(0, 1), &vec![1; len], pn);
        }
        let ids = [7, 8].map(|pn| FrameId { session: 5, pn });
        assert_eq!(flush(&mut there[1]), ids, "round {round}");
        assert!(!there[1].is_open());
        turn_until(&wire.b, &mut there[0], false);
        std::thread::sleep(Duration::from_millis(60));
        wire.b.run(&format!("ip link set {INTERFACE} up"));
        for turn in 0..2 {
            turn_until(&wire.b, &mut there[(turn + round) % 2], true);
        }
        let to = there[0].address();
        for worker in 0..2u16 {
            let index = usize::from(worker);
            send(&mut here[index], to, SHORT, Steer::new(0, worker), &vec![worker as u8; 8986]);
            assert_eq!(drain(&mut there[index]), [vec![worker as u8; 8986]], "round {round}");
            assert!(there[index].take_changed() && !there[index].take_changed());
        }
        let to = here[0].address();
        send(&mut there[0], to, SHORT, STEER, &[8; 60]);
        assert_eq!(drain(&mut here[0]), [vec![8; 60]]);
    }
}

#[test]
fn an_interface_that_is_removed_and_made_anew_is_found_with_its_new_index_address_and_mtu() {
    let mut wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let before = b.address();
    wire.cut();
    put(&mut b, a.address(), SHORT, STEER, &[1; 60], 3);
    assert_eq!(flush(&mut b), [FrameId { session: 5, pn: 3 }]);
    std::thread::sleep(Duration::from_millis(120));
    wire.b.enter(|| assert!(b.receive().is_none() && !b.is_open()));
    wire.b.run("ip link add other0 type veth peer name other1");
    wire.set_mtu(9000);
    wire.connect();
    for (end, link) in [(&wire.a, &mut a), (&wire.b, &mut b)] {
        turn_until(end, link, true);
        assert!(link.take_changed() && link.mtu() == 9000);
        assert!(program(end, INTERFACE).contains("xdp"));
    }
    assert_ne!(b.address(), before, "veth addresses are random");
    let to = b.address();
    send(&mut a, to, SHORT, STEER, &[7; 8996]);
    assert_eq!(drain(&mut b), [vec![7; 8996]]);
    assert!(matches!(refusal(&wire.b, INTERFACE, 1), OpenError::Shared { .. }), "also under its new index");
}

#[test]
fn an_idle_worker_notices_that_its_interface_was_replaced_under_the_same_index() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    let shown = wire.b.run(&format!("ip -o link show dev {INTERFACE}"));
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let index = shown.split(':').next().expect("the line begins with it");
    let address = b.address();
    wire.cut();
    wire.b.run(&format!(
        "ip link add {INTERFACE} index {index} address {address} mtu 1500 type veth peer name far0"
    ));
    for name in [INTERFACE, "far0"] {
        wire.b.run(&format!("ip link set {name} up"));
    }
    turn_until(&wire.b, &mut b, true);
    assert!(b.take_changed() && b.address() == address);
    assert!(program(&wire.b, INTERFACE).contains("xdp"), "attached anew");
    wire.a.enter(|| assert!(a.receive().is_none()));
}

#[test]
fn an_mtu_that_changes_is_followed() {
    let wire = VethPair::new(1500);
    let (mut a, mut b) = (open_one(&wire.a), open_one(&wire.b));
    for mtu in [9000, 1500, 65_535] {
        for end in [&wire.a, &wire.b] {
            end.run(&format!("ip link set {INTERFACE} mtu {mtu}"));
        }
        turn_until(&wire.a, &mut a, true);
        turn_until(&wire.b, &mut b, true);
        assert!(a.take_changed() && a.mtu() == mtu && b.mtu() == mtu);
        let to = b.address();
        send(&mut a, to, SHORT, STEER, &vec![6; mtu - 4]);
        assert_eq!(drain(&mut b), [vec![6; mtu - 4]]);
    }
}

#[test]
fn on_an_interface_whose_driver_runs_no_program_the_stack_does() {
    let wire = VethPair::new(9000);
    for end in [&wire.a, &wire.b] {
        end.run(&format!("ip link add link {INTERFACE} name upper0 type macvlan mode private"));
        end.run("ip link set upper0 up");
    }
    let on_upper =
        |end: &Namespace| end.enter(|| xdp::open("upper0", ETHERTYPE, 1, false).unwrap().1.remove(0));
    let (mut a, mut b) = (on_upper(&wire.a), on_upper(&wire.b));
    assert!(program(&wire.a, "upper0").starts_with("xdpgeneric"));
    for len in [60, 1500, 3822, 3823, 8996] {
        for _ in 0..2 {
            let to = b.address();
            send(&mut a, to, SHORT, STEER, &vec![len as u8; len]);
            assert!(drain(&mut b) == [vec![len as u8; len]], "{len}");
            std::mem::swap(&mut a, &mut b);
        }
    }
}
