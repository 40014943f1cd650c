//! The worker on a link in memory and on virtual time, with a node made of the protocol's own target: every promise of the data path that needs no VMM.

mod rig;

use std::io::Read;

use cirro_backend::mailbox::{Answer, Change};
use cirro_backend::request::Reject;
use cirro_backend::stats::Drop;
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::Nanos;
use rig::bench::{DISK, MIB, Rig};
use rig::guest::{DATA, Ring, Used, pattern};
use vm_memory::GuestAddress;

#[test]
fn what_the_guest_writes_is_on_the_node_and_reads_back() {
    for mtu in [1500, 9000, 65535] {
        let (mut rig, mut ring) = Rig::ready(mtu);
        for (index, len) in [512usize, 4096, 12_288, 65_536, MIB, 3 * MIB + 512].into_iter().enumerate() {
            let (sector, bytes) = (index as u64 * 8192 / 2, pattern(index as u64, len));
            ring.write(DATA, &bytes);
            let written = rig.one(&mut ring, (1, sector), DATA, len);
            assert_eq!((written.status, written.len), (0, 1), "write of {len} at MTU {mtu}");
            let at = sector as usize * 512;
            assert!(rig.node.image[at..at + len] == bytes, "the image holds the write of {len} at MTU {mtu}");
            ring.write(DATA, &vec![0xee; len]);
            let read = rig.one(&mut ring, (0, sector), DATA, len);
            assert_eq!((read.status, read.len), (0, len as u32 + 1), "read of {len} at MTU {mtu}");
            assert!(ring.read(DATA, len) == bytes, "the read of {len} at MTU {mtu} gives what was written");
        }
        assert_eq!(
            rig.stats.drops(Drop::Tag) + rig.stats.drops(Drop::Payload) + rig.stats.drops(Drop::Malformed),
            0
        );
    }
}

#[test]
fn every_kind_of_request_has_its_answer() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.image.fill(0xaa);
    assert_eq!(rig.one(&mut ring, (4, 0), 0, 0).status, 0, "flush");
    let id = rig.one(&mut ring, (8, 0), DATA, 20);
    assert_eq!((id.status, id.len, ring.read(DATA, 20)), (0, 21, b"CIRRO-0123456789abcd".to_vec()));
    let mut segment = [8u64.to_le_bytes(), 16u64.to_le_bytes()].concat();
    ring.write(DATA, &segment);
    assert_eq!(rig.one(&mut ring, (13, 0), DATA, 16).status, 0, "write zeroes");
    assert!(
        rig.node.image[8 * 512..24 * 512].iter().all(|byte| *byte == 0) && rig.node.image[24 * 512] == 0xaa
    );
    assert_eq!(rig.one(&mut ring, (11, 0), DATA, 16).status, 0, "discard");
    segment[12] = 2;
    ring.write(DATA, &segment);
    assert_eq!(rig.one(&mut ring, (13, 0), DATA, 16).status, 2, "a reserved flag");
    let past = rig.one(&mut ring, (0, 16 * 2048 - 1), DATA, 1024);
    assert_eq!((past.status, past.len), (1, 1), "past the end");
    assert_eq!(rig.one(&mut ring, (77, 0), DATA, 512).status, 2, "an unknown type");
    assert_eq!(rig.one(&mut ring, (0, 0), 0, 0).status, 0, "a read of nothing");
    assert_eq!(rig.disk_stats.rejects(Reject::PastEnd), 1);
    rig.node.fail = Some(Status::NoSpace);
    assert_eq!(rig.one(&mut ring, (1, 0), DATA, 512).status, 1, "the node is full");
}

#[test]
fn both_rings_full_are_served_to_the_last_request() {
    let (mut rig, mut first) = Rig::ready(9000);
    let (mut second, _signals) = rig.start(1, false);
    for round in 0..4u64 {
        for place in 0..64u64 {
            first.add(0, place, DATA + place * 512, 512);
            second.add(1, 4096 + place + round, DATA + (64 + place) * 512, 512);
        }
        let (used_first, used_second) = (rig.wait_for(&mut first, 64), rig.wait_for(&mut second, 64));
        assert!(used_first.iter().chain(&used_second).all(|used| used.status == 0));
        assert_eq!((used_first.len(), used_second.len()), (64, 64));
    }
}

#[test]
fn write_through_flushes_after_each_write_and_only_then_answers() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.ask(Change::WriteThrough(true));
    rig.node.runs.clear();
    assert_eq!(rig.one(&mut ring, (1, 0), DATA, 512).status, 0);
    let ops: Vec<Op> = rig.node.runs.iter().map(|run| run.0).collect();
    assert_eq!(ops, [Op::Write, Op::Flush]);
    rig.ask(Change::WriteThrough(false));
    rig.node.runs.clear();
    rig.one(&mut ring, (1, 0), DATA, 512);
    assert_eq!(rig.node.runs.len(), 1);
}

#[test]
fn requests_wait_for_a_node_that_is_silent_and_then_finish() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.silent = true;
    ring.write(DATA, &pattern(3, 4096));
    ring.add(1, 0, DATA, 4096);
    rig.run(Nanos::from_secs(3));
    assert!(ring.used().is_empty());
    rig.node.silent = false;
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert_eq!(rig.node.image[..4096], pattern(3, 4096));
}

#[test]
fn a_ring_that_stops_waits_for_its_requests() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.hold = true;
    ring.add(0, 0, DATA, 4096);
    rig.run(Nanos::from_millis(1));
    let awaited = rig.mailbox.send(DISK, Change::Stop { ring: 0 });
    rig.run(Nanos::from_millis(500));
    assert!(ring.used().is_empty());
    rig.node.hold = false;
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    rig.step();
    assert!(matches!(awaited.wait(), Some(Answer::Stopped { next_avail: 1, unfinished: 0 })));
    ring.add(0, 0, DATA, 4096);
    rig.run(Nanos::from_millis(10));
    assert!(ring.used().is_empty(), "a stopped ring is not served");
}

/// P-95: the deadline, the answer of used_idx + live entries, and the same ring again.
#[test]
fn a_stop_gives_up_after_two_seconds_and_the_ring_goes_on_where_it_stopped() {
    let (mut rig, mut ring) = Rig::ready(9000);
    let (mut other, _signals) = rig.start(1, true);
    rig.node.silent = true;
    ring.write(DATA, &pattern(9, 4096));
    ring.add(1, 16, DATA, 4096);
    other.write(DATA + 8192, &pattern(10, 4096));
    other.add(1, 32, DATA + 8192, 4096);
    rig.run(Nanos::from_millis(1));
    let asked_at = rig.now;
    let first = rig.mailbox.send(DISK, Change::Stop { ring: 0 });
    rig.run(Nanos::from_millis(1990));
    let early = rig.mailbox.send(DISK, Change::Report);
    rig.step();
    assert!(
        matches!(early.wait(), Some(Answer::Session(report)) if report.rings == 2 && report.requests == 2)
    );
    rig.run(Nanos::from_millis(20));
    assert!(matches!(first.wait(), Some(Answer::Stopped { next_avail: 1, unfinished: 1 })));
    assert!(rig.now.since(asked_at) < Nanos::from_millis(2100));
    let second = rig.mailbox.send(DISK, Change::Stop { ring: 1 });
    rig.step();
    assert!(
        matches!(second.wait(), Some(Answer::Stopped { next_avail: 1, unfinished: 1 })),
        "the second does not wait again"
    );

    rig.node.silent = false;
    rig.run(Nanos::from_millis(300));
    assert_eq!(rig.node.image[16 * 512], 0, "nothing of a stopped ring reaches the node");
    rig.start_at(0, &ring);
    rig.start_at(1, &other);
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert_eq!(rig.wait_for(&mut other, 1)[0].status, 0);
    assert_eq!(rig.node.image[16 * 512..][..4096], pattern(9, 4096));
    assert_eq!(rig.node.image[32 * 512..][..4096], pattern(10, 4096));
}

/// P-95: another ring discards what the last one left.
#[test]
fn a_ring_that_began_anew_does_not_get_the_old_rings_requests() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.silent = true;
    ring.add(1, 16, DATA, 4096);
    rig.run(Nanos::from_millis(1));
    let stopped = rig.mailbox.send(DISK, Change::Stop { ring: 0 });
    rig.run(Nanos::from_millis(2010));
    assert!(matches!(stopped.wait(), Some(Answer::Stopped { unfinished: 1, .. })));
    rig.node.silent = false;
    let mut fresh = Ring::new(&rig.memory, 0, true);
    fresh.jump(0);
    rig.start_at(0, &fresh);
    rig.run(Nanos::from_millis(300));
    assert!(rig.node.runs.iter().all(|run| run.0 != Op::Write), "{:?}", rig.node.runs);
    let used = rig.one(&mut fresh, (0, 0), DATA, 512);
    assert_eq!(used.status, 0);
}

/// P-98: a request whose region is gone ends, and nothing of it is touched.
#[test]
fn memory_that_goes_away_ends_its_requests_without_a_write() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.hold = true;
    let above = 8 * MIB as u64 + 4096;
    let gone = ring.add(0, 0, above, 4096);
    let stays = ring.add(0, 8, DATA, 4096);
    rig.run(Nanos::from_millis(1));
    let (lower, _) = rig.memory.remove_region(GuestAddress(8 * MIB as u64), 8 * MIB as u64).unwrap();
    rig.ask(Change::Memory(lower));
    assert_eq!(ring.used(), [Used { head: gone, len: 0, status: 0xff }]);
    rig.node.hold = false;
    assert_eq!(rig.wait_for(&mut ring, 1), [Used { head: stays, len: 4097, status: 0 }]);
}

#[test]
fn what_a_link_refuses_is_sent_when_it_takes_frames_again() {
    let (mut rig, mut ring) = Rig::ready(9000);
    ring.write(DATA, &pattern(6, 8192));
    rig.worker.link().set_refuses(true);
    ring.add(1, 0, DATA, 8192);
    rig.run(Nanos::from_millis(20));
    assert!(rig.stats.frames_refused.get() > 0);
    rig.worker.link().set_refuses(false);
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert_eq!(rig.node.image[..8192], pattern(6, 8192));
}

#[test]
fn a_broken_ring_is_left_alone_and_the_others_are_served() {
    let (mut rig, ring) = Rig::ready(9000);
    let (mut other, _signals) = rig.start(1, true);
    ring.jump(300);
    rig.run(Nanos::from_millis(1));
    assert_eq!(rig.disk_stats.rings_broken.get(), 1, "told once");
    assert_eq!(rig.one(&mut other, (0, 0), DATA, 512).status, 0);
    other.offer(9999);
    rig.run(Nanos::from_millis(1));
    assert_eq!(rig.disk_stats.rings_broken.get(), 2);
    let answer = rig.ask(Change::Stop { ring: 0 });
    assert!(matches!(answer, Answer::Stopped { unfinished: 0, .. }));
    let mut fresh = Ring::new(&rig.memory, 0, true);
    fresh.jump(0);
    fresh.used();
    rig.start_at(0, &fresh);
    assert_eq!(rig.one(&mut fresh, (0, 0), DATA, 512).status, 0, "it is served again after a restart");
}

#[test]
fn a_head_that_is_in_flight_twice_breaks_the_ring_and_not_the_daemon() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.hold = true;
    let head = ring.add(0, 0, DATA, 512);
    ring.offer(head);
    rig.run(Nanos::from_millis(1));
    assert_eq!(rig.disk_stats.rings_broken.get(), 1);
    rig.node.hold = false;
    assert_eq!(rig.wait_for(&mut ring, 1), [Used { head, len: 513, status: 0 }]);
}

#[test]
fn frames_that_are_not_ours_change_nothing_and_are_counted() {
    let (mut rig, mut ring) = Rig::ready(9000);
    let mut short = vec![0u8; 80];
    short[14] = 1 << 5;
    rig.worker.link().inject(short);
    rig.worker.link().inject(vec![7; 3]);
    rig.worker.link().inject(vec![0xff; 2000]);
    rig.run(Nanos::from_millis(1));
    assert_eq!(rig.stats.drops(Drop::Malformed), 3);
    assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0);
}

/// P-99
#[test]
fn a_piece_that_was_lost_twice_is_sent_from_a_private_copy() {
    let (mut rig, mut ring) = Rig::ready(9000);
    ring.write(DATA, &pattern(5, 8192));
    rig.node.lose_writes = 3;
    let head = ring.add(1, 0, DATA, 8192);
    let mut used = Vec::new();
    // Other requests go through meanwhile: their acks tell that the write was lost, again and again.
    for sector in 0..60 {
        ring.add(0, 1000 + sector, DATA + 65_536, 512);
        rig.run(Nanos::from_micros(200));
        used.extend(ring.used());
    }
    assert!(used.contains(&Used { head, len: 1, status: 0 }), "{used:?}");
    assert_eq!(rig.node.image[..8192], pattern(5, 8192));
    assert!(rig.stats.private_copies.get() > 0);
}

#[test]
fn the_guest_is_signalled_once_at_the_start_and_once_per_batch() {
    for event_idx in [false, true] {
        let (mut rig, _ring) = Rig::ready(9000);
        let (mut ring, mut signals) = rig.start(1, event_idx);
        ring.used();
        let before = rig.disk_stats.interrupts.get();
        rig.node.hold = true;
        for place in 0..8 {
            ring.add(0, place, DATA + place * 512, 512);
        }
        rig.run(Nanos::from_millis(1));
        rig.node.hold = false;
        assert_eq!(rig.wait_for(&mut ring, 8).len(), 8);
        let sent = rig.disk_stats.interrupts.get() - before;
        assert!((1..=2).contains(&sent), "{sent} signals for one batch, event_idx {event_idx}");
        let mut bytes = [0; 8];
        signals.read_exact(&mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 1, "an eventfd's count");
    }
}

#[test]
fn the_guest_is_asked_to_kick_only_before_the_worker_sleeps() {
    for event_idx in [false, true] {
        let (mut rig, _ring) = Rig::ready(9000);
        let (mut ring, _signals) = rig.start(1, event_idx);
        assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0);
        rig.run(Nanos::from_millis(1));
        assert!(rig.worker.may_sleep());
        let head = ring.add(0, 0, DATA, 512);
        assert!(ring.wants_kick(), "a sleeping worker is woken up, event_idx {event_idx}");
        assert!(!rig.worker.may_sleep(), "what came meanwhile is seen without the kick");
        assert_eq!(rig.wait_for(&mut ring, 1)[0].head, head);
        ring.add(0, 0, DATA, 512);
        assert!(!ring.wants_kick(), "a worker that is awake is not kicked, event_idx {event_idx}");
        rig.wait_for(&mut ring, 1);
    }
}

/// P-120: what was beyond the end a moment ago.
#[test]
fn a_volume_that_grows_is_used_up_to_its_new_end() {
    let (mut rig, mut ring) = Rig::ready(9000);
    let sectors = rig.attach.get().unwrap().capacity_sectors;
    assert_eq!(rig.one(&mut ring, (1, sectors), DATA, 512).status, 1);
    rig.node.resize(sectors as usize * 1024);
    rig.run_until("the new size", |rig| {
        rig.attach.get().is_some_and(|info| info.capacity_sectors == 2 * sectors)
    });
    assert_eq!(rig.one(&mut ring, (1, 2 * sectors - 1), DATA, 512).status, 0);
    assert_eq!(rig.one(&mut ring, (1, 2 * sectors), DATA, 512).status, 1);
}
