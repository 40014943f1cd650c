//! What the protocol promises, tested end to end on virtual time: everything submitted ends, once, with the right data, whatever the wire does.

mod pair;

use cirro_protocol::initiator::{Event, LossCause, StateName};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::SECTOR_BYTES;
use pair::{CAPACITY, Pair, Random, Wire};

/// Runs `count` random requests at `depth`, never two overlapping at a time, and checks every read against a model.
fn verify(pair: &mut Pair, count: usize, depth: usize, largest: usize) {
    let mut random = Random(pair.random.next() | 1);
    let mut model = vec![0u8; CAPACITY];
    let mut left = count;
    while left > 0 || !pair.guest.is_empty() {
        while left > 0 && pair.guest.len() < depth {
            let len = SECTOR_BYTES * (1 + random.below((largest / SECTOR_BYTES) as u64) as usize);
            let offset = random.below(((CAPACITY - len) / SECTOR_BYTES) as u64) as usize * SECTOR_BYTES;
            let busy = |r: &pair::GuestRequest| {
                (r.offset as usize) < offset + len && offset < r.offset as usize + r.data.len()
            };
            if pair.guest.values().any(busy) {
                break;
            }
            let op = [
                Op::Read,
                Op::Read,
                Op::Write,
                Op::Write,
                Op::Write,
                Op::Flush,
                Op::Discard,
                Op::WriteZeroes,
            ][random.below(8) as usize];
            let fill = random.next() as u8;
            let data = match op {
                Op::Flush => Vec::new(),
                Op::Write => (0..len).map(|i| fill.wrapping_add((i / 7) as u8)).collect(),
                Op::Read | Op::Discard | Op::WriteZeroes | Op::Open | Op::Release | Op::Stat => {
                    vec![0xcc; len]
                }
            };
            if pair.submit(op, offset as u64, data).is_none() {
                break;
            }
            left -= 1;
        }
        let end = pair.now + Nanos::from_secs(60);
        assert!(pair.step(end), "stalled with {} pending in {:?}", pair.guest.len(), pair.initiator.state());
        assert!(pair.now < end, "no progress for a minute with {} pending", pair.guest.len());
        for (slot, status, request) in pair.done.drain(..) {
            assert_eq!(status, Status::Ok, "slot {} {:?}", slot.0, request.op);
            let range = request.offset as usize..request.offset as usize + request.data.len();
            match request.op {
                Op::Read => assert!(request.data == model[range.clone()], "read at {range:?} differs"),
                Op::Write => model[range].copy_from_slice(&request.data),
                Op::Discard | Op::WriteZeroes => model[range].fill(0),
                Op::Flush | Op::Open | Op::Release | Op::Stat => {}
            }
        }
    }
    assert!(model == pair.node.volume, "volume and model differ");
}

/// P-06 P-14 P-16: at every MTU no frame is too long, reads end by data alone, lengths count what they should.
#[test]
fn every_request_ends_once_with_the_right_data_on_a_clean_wire() {
    for mtu in [1500, 2200, 4500, 9000, 65535] {
        let mut pair = Pair::new(u64::from(mtu), Wire { mtu, ..Wire::default() });
        verify(&mut pair, 400, 16, 256 << 10);
        let stats = pair.initiator.stats();
        assert_eq!((stats.violations, stats.frames_lost, stats.sessions), (0, 0, 1), "mtu {mtu}: {stats:?}");
    }
}

/// P-15 P-21 P-39 P-64: frames are lost, repeated, reordered and damaged; nothing is lost, run twice or placed twice.
#[test]
fn every_request_ends_once_with_the_right_data_on_a_bad_wire() {
    for seed in 1..=24 {
        let mut random = Random(seed * 77);
        let wire = Wire {
            mtu: [1500, 4500, 9000, 65535][random.below(4) as usize],
            loss: random.below(100),
            duplicate: random.below(50),
            reorder: random.below(100),
            corrupt: random.below(30),
            ..Wire::default()
        };
        let mut pair = Pair::new(seed, wire);
        verify(&mut pair, 300, 1 + random.below(48) as usize, 128 << 10);
        assert_eq!(pair.initiator.stats().violations, 0, "seed {seed}: {:?}", pair.initiator.stats());
        if pair.initiator.stats().sessions == 1 {
            assert_eq!(pair.node.runs, 300, "seed {seed}: each request runs once in a session");
        }
    }
}

/// P-63 P-65: the answer is repaired by the target; the write is not run again.
#[test]
fn write_is_applied_once_when_its_reply_is_lost() {
    let mut pair = Pair::new(5, Wire::default());
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    pair.submit(Op::Write, 4096, vec![1; 4096]);
    pair.node.store_delay = Nanos::from_micros(500);
    pair.run_for(Nanos::from_micros(300));
    assert_eq!(pair.node.running.len(), 1, "the write is in the store");
    pair.cut = true;
    pair.run_for(Nanos::from_millis(1));
    pair.cut = false;
    assert!(pair.run_until_idle(Nanos::from_millis(30)));
    assert_eq!((pair.node.runs, pair.done.len()), (2, 2));
}

/// P-36 P-42: the gap is acked at once, and what was lost leaves again a round trip later.
#[test]
fn lost_frame_costs_a_round_trip_and_not_a_timeout() {
    let mut pair = Pair::new(6, Wire { loss: 0, ..Wire::default() });
    verify(&mut pair, 200, 32, 4096);
    for i in 0..32 {
        pair.submit(Op::Read, i * 4096, vec![0; 4096]);
    }
    let start = pair.now;
    pair.wire.loss = 1000;
    pair.step(start + Nanos(1));
    pair.wire.loss = 0;
    for i in 32..40 {
        pair.submit(Op::Read, i * 4096, vec![0; 4096]);
    }
    assert!(pair.run_until_idle(Nanos::from_millis(10)));
    assert!(pair.now.since(start) < Nanos::from_micros(600), "took {:?}", pair.now.since(start));
}

/// P-75: what was not answered is issued again in the next session.
#[test]
fn a_link_that_comes_back_after_a_minute_loses_nothing() {
    let mut pair = Pair::new(7, Wire::default());
    verify(&mut pair, 50, 8, 16 << 10);
    pair.submit(Op::Write, 0, vec![9; 65536]);
    pair.submit(Op::Read, 1 << 20, vec![0; 65536]);
    pair.cut = true;
    pair.run_for(Nanos::from_secs(60));
    assert_eq!(pair.guest.len(), 2);
    assert!(pair.events.contains(&Event::Lost(LossCause::Dead)));
    pair.cut = false;
    let back = pair.now;
    assert!(pair.run_until_idle(Nanos::from_secs(2)));
    assert!(pair.now.since(back) < Nanos::from_millis(100), "took {:?}", pair.now.since(back));
    assert!(pair.node.volume[..65536].iter().all(|b| *b == 9));
}

/// P-47: a cut of less than a second ends no session.
#[test]
fn a_short_cut_keeps_session_and_piece_size() {
    let mut pair = Pair::new(8, Wire::default());
    verify(&mut pair, 50, 8, 16 << 10);
    for _ in 0..5 {
        pair.submit(Op::Write, 0, vec![9; 65536]);
        pair.run_for(Nanos::from_micros(60));
        pair.cut = true;
        pair.run_for(Nanos::from_millis(700));
        pair.cut = false;
        assert!(pair.run_until_idle(Nanos::from_millis(50)));
    }
    let stats = pair.initiator.stats();
    assert_eq!((stats.sessions, stats.piece_bytes), (1, 8192), "{stats:?}");
}

/// P-75 P-77: RESET_HINT starts a new session at once, and writes that never ran are issued again.
#[test]
fn a_node_that_restarts_is_a_pause_and_not_an_error() {
    let mut pair = Pair::new(9, Wire::default());
    verify(&mut pair, 50, 8, 16 << 10);
    pair.node.store_delay = Nanos::from_millis(50);
    for i in 0..8 {
        pair.submit(Op::Write, i << 16, vec![i as u8 + 1; 65536]);
    }
    pair.run_for(Nanos::from_millis(5));
    pair.restart_node();
    pair.node.store_delay = Nanos::from_micros(5);
    let restarted = pair.now;
    assert!(pair.run_until_idle(Nanos::from_secs(2)));
    assert!(pair.events.contains(&Event::Lost(LossCause::Reset)));
    assert!(pair.now.since(restarted) < Nanos::from_millis(120), "took {:?}", pair.now.since(restarted));
    for i in 0..8usize {
        assert!(pair.node.volume[i << 16..(i + 1) << 16].iter().all(|b| *b == i as u8 + 1));
    }
}

#[test]
fn a_disk_that_answers_after_three_seconds_is_waited_for_in_one_session() {
    let mut pair = Pair::new(10, Wire::default());
    pair.node.store_delay = Nanos::from_secs(3);
    pair.submit(Op::Write, 0, vec![5; 4096]);
    pair.submit(Op::Read, 8192, vec![0; 4096]);
    assert!(pair.run_until_idle(Nanos::from_secs(10)));
    assert_eq!(pair.initiator.stats().sessions, 1);
}

/// P-57 P-59 P-60: full-size PROBEs find the widest piece that passes before the volume is opened.
#[test]
fn a_path_narrower_than_its_links_is_found_and_used() {
    for (mtu, hole, piece) in
        [(9000, 1500, 1368), (9000, 5000, 4096), (65535, 9000, 8192), (65535, 1500, 1368)]
    {
        let mut pair = Pair::new(11, Wire { mtu, black_hole_bytes: hole, ..Wire::default() });
        pair.submit(Op::Write, 0, vec![3; 65536]);
        assert!(pair.run_until_idle(Nanos::from_secs(3)), "{:?}", pair.initiator.state());
        assert_eq!(pair.initiator.stats().piece_bytes, piece, "mtu {mtu} hole {hole}");
    }
}

/// P-60 P-61: within a session too, and back.
#[test]
fn a_path_that_becomes_narrower_and_wide_again_is_followed() {
    let mut pair = Pair::new(12, Wire::default());
    verify(&mut pair, 50, 8, 64 << 10);
    pair.wire.black_hole_bytes = 1500;
    pair.submit(Op::Write, 0, vec![3; 65536]);
    assert!(pair.run_until_idle(Nanos::from_secs(5)), "write: {:?}", pair.initiator.stats());
    pair.submit(Op::Read, 0, vec![0; 65536]);
    assert!(pair.run_until_idle(Nanos::from_secs(5)), "read: {:?}", pair.initiator.stats());
    assert_eq!(pair.initiator.stats().piece_bytes, 1368);
    pair.wire.black_hole_bytes = usize::MAX;
    pair.run_for(Nanos::from_secs(300));
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    assert_eq!(pair.initiator.stats().piece_bytes, 8192);
}

#[test]
fn reads_through_a_path_that_became_narrower_in_one_direction_end() {
    let mut pair = Pair::new(13, Wire::default());
    verify(&mut pair, 20, 8, 64 << 10);
    pair.wire.black_hole_bytes = 4000;
    pair.submit(Op::Read, 0, vec![0; 1 << 20]);
    assert!(pair.run_until_idle(Nanos::from_secs(5)), "{:?}", pair.initiator.stats());
}

/// P-20 P-33: an older session's frame has another cid, or another tag.
#[test]
fn a_frame_of_an_older_session_changes_nothing() {
    let mut pair = Pair::new(14, Wire::default());
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Write, 0, vec![1; 16384]);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    let old = pair.recorded.take().unwrap();
    pair.restart_node();
    pair.submit(Op::Write, 0, vec![2; 16384]);
    assert!(pair.run_until_idle(Nanos::from_secs(2)));
    let runs = pair.node.runs;
    for (to_node, frame) in old {
        if to_node {
            pair.node_receives(&frame)
        } else {
            pair.backend_receives(&frame)
        }
        pair.run_for(Nanos::from_micros(100));
    }
    assert_eq!(pair.node.runs, runs);
    assert!(pair.node.volume[..16384].iter().all(|b| *b == 2));
    pair.submit(Op::Read, 0, vec![0; 16384]);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    assert_eq!(pair.initiator.state(), StateName::Open);
}

/// P-35 P-66: a packet number is processed once; nothing is placed twice.
#[test]
fn frames_replayed_within_a_session_change_nothing() {
    let mut pair = Pair::new(15, Wire::default());
    pair.recorded = Some(Vec::new());
    verify(&mut pair, 60, 8, 32 << 10);
    let old = pair.recorded.take().unwrap();
    let (runs, volume) = (pair.node.runs, pair.node.volume.clone());
    for (to_node, frame) in old {
        if to_node { pair.node_receives(&frame) } else { pair.backend_receives(&frame) }
    }
    pair.run_for(Nanos::from_millis(100));
    assert_eq!(pair.node.runs, runs);
    assert!(pair.node.volume == volume);
}

/// P-56: a frame without a buffer is dropped unacked and comes again.
#[test]
fn a_node_without_buffers_pauses_and_does_not_fail() {
    let mut pair = Pair::new(16, Wire::default());
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    pair.node.out_of_buffers = true;
    pair.submit(Op::Write, 0, vec![4; 8192]);
    assert!(!pair.run_until_idle(Nanos::from_millis(200)));
    pair.node.out_of_buffers = false;
    assert!(pair.run_until_idle(Nanos::from_millis(50)));
    assert_eq!(pair.initiator.stats().sessions, 1);
}

#[test]
fn thirty_two_reads_leave_in_one_frame_and_two_answers_share_one() {
    let mut pair = Pair::new(17, Wire::default());
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    pair.run_for(Nanos::from_millis(5));
    let before = pair.sent;
    for i in 0..32 {
        pair.submit(Op::Read, i * 4096, vec![0; 4096]);
    }
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    let [to_backend, to_node] = [pair.sent[0] - before[0], pair.sent[1] - before[1]];
    assert!(
        to_backend <= 18 && to_node <= 4,
        "{to_backend} frames of answers, {to_node} of requests and acks"
    );
}

/// P-67
#[test]
fn overlapping_writes_are_never_in_flight_together() {
    let mut pair = Pair::new(18, Wire::default());
    pair.node.store_delay = Nanos::from_millis(1);
    for i in 1..=20u8 {
        pair.submit(Op::Write, u64::from(i % 3) * 512, vec![i; 2048]);
    }
    let end = pair.now + Nanos::from_secs(5);
    while !pair.guest.is_empty() && pair.now < end {
        pair.step(end);
        let changing = pair.node.running.iter().filter(|r| r.3 == Op::Write).count();
        assert!(changing <= 1, "{changing} overlapping writes in the store");
    }
    let order: Vec<u8> = pair.done.iter().map(|(_, _, r)| r.data[0]).collect();
    assert_eq!(order, (1..=20).collect::<Vec<u8>>());
}

#[test]
fn abandoned_requests_never_complete_and_the_next_session_works() {
    let mut pair = Pair::new(19, Wire::default());
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    pair.cut = true;
    pair.submit(Op::Write, 0, vec![4; 8192]);
    pair.run_for(Nanos::from_millis(10));
    pair.initiator.abandon(pair.now);
    pair.guest.clear();
    pair.done.clear();
    pair.cut = false;
    pair.submit(Op::Write, 65536, vec![6; 8192]);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    assert_eq!(pair.done.len(), 1);
    assert!(pair.node.volume[..8192].iter().all(|b| *b == 0));
}
