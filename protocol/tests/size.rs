//! A volume that gets another size while a session has it open: who is told, and what is believed when frames are lost or overtake each other.

mod pair;

use cirro_protocol::initiator::Event;
use cirro_protocol::op::Op;
use cirro_protocol::time::Nanos;
use cirro_protocol::types::*;
use cirro_protocol::wire::body::VolumeInfo;
use cirro_protocol::wire::{Frame, Header, Kind};
use pair::{CAPACITY, Pair, Wire};

const WAS: u64 = (CAPACITY / SECTOR_BYTES) as u64;

fn grown(sectors: u64) -> VolumeInfo {
    VolumeInfo {
        capacity_sectors: sectors,
        vol_epoch: 1,
        vol_handle: 9,
        block_bytes: 512,
        flags: 0,
        request_bytes_max: REQUEST_BYTES_MAX as u32,
        serial: *b"pair-test-serial-001",
    }
}

fn open_pair(seed: u64) -> Pair {
    let mut pair = Pair::new(seed, Wire::default());
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(2)));
    pair.run_for(Nanos::from_millis(5));
    pair.events.clear();
    pair
}

/// What the backend was told, in order.
fn told(pair: &Pair) -> Vec<u64> {
    let told = pair.events.iter().filter_map(|event| match event {
        Event::Attached(info, _) | Event::Changed(info) => Some(info.capacity_sectors),
        Event::Done { .. } | Event::Refused(..) | Event::Lost(_) => None,
    });
    told.collect()
}

fn carries(frame: &[u8], kind: Kind) -> bool {
    Header::is_long(&frame[ETHERNET_BYTES..]) == Some(false)
        && Frame::parse(frame).unwrap().messages().any(|payload| payload.message.kind == kind)
}

/// P-120: an idle session hears of it within a few round trips although the frame that told it was lost, and hears the last size only.
#[test]
fn news_that_was_lost_is_told_again_as_it_is_by_then() {
    let mut pair = open_pair(1);
    pair.cut = true;
    pair.node.targets[0].0.notify(grown(WAS + 8));
    pair.run_for(Nanos::from_micros(10));
    pair.node.targets[0].0.notify(grown(WAS + 16));
    pair.run_for(Nanos::from_micros(10));
    pair.cut = false;
    pair.run_for(Nanos::from_millis(50));
    assert_eq!(told(&pair).last(), Some(&(WAS + 16)));
    assert!(told(&pair).iter().all(|sectors| *sectors == WAS + 16), "{:?}", told(&pair));
    let (events, sent) = (told(&pair).len(), pair.sent);
    pair.run_for(Nanos::from_secs(9));
    assert_eq!((told(&pair).len(), pair.sent), (events, sent), "it was acked, and is over");
}

/// P-120 on a bad wire: whatever is lost, doubled and reordered, the last size is what stays.
#[test]
fn the_last_size_is_what_stays_on_any_wire() {
    for seed in 1..60 {
        let mut pair = open_pair(seed);
        pair.wire = Wire { loss: 200, duplicate: 200, reorder: 500, ..Wire::default() };
        for step in 1..=5 {
            pair.node.targets[0].0.notify(grown(WAS + step));
            pair.submit(Op::Read, 0, vec![0; 4096]);
            pair.run_for(Nanos::from_micros(step * 37));
        }
        pair.run_for(Nanos::from_secs(2));
        assert_eq!(told(&pair).last(), Some(&(WAS + 5)), "seed {seed}: {:?}", told(&pair));
    }
}

/// P-121
#[test]
fn an_older_frame_that_was_overtaken_changes_nothing() {
    let mut pair = open_pair(2);
    pair.recorded = Some(Vec::new());
    pair.cut = true;
    for sectors in [WAS + 8, WAS + 16] {
        pair.node.targets[0].0.notify(grown(sectors));
        pair.run_for(Nanos::from_micros(10));
    }
    let frames: Vec<_> =
        pair.recorded.take().unwrap().into_iter().filter(|(_, frame)| carries(frame, Kind::Event)).collect();
    assert_eq!(frames.len(), 2);
    for (_, frame) in frames.iter().rev() {
        pair.backend_receives(frame);
    }
    pair.cut = false;
    pair.run_for(Nanos::from_secs(1));
    assert_eq!(told(&pair), [WAS + 16]);
}

/// P-120 P-121: the answer to OPEN was lost, the volume grew, and the answer comes again; or it was only late, and comes after the news.
#[test]
fn an_answer_to_open_does_not_bring_back_the_old_size() {
    for late in [false, true] {
        let mut pair = Pair::new(3, Wire::default());
        pair.recorded = Some(Vec::new());
        let answers = |pair: &Pair| {
            let recorded = pair.recorded.as_ref().unwrap().iter();
            recorded
                .filter(|(to_node, f)| !to_node && carries(f, Kind::Response))
                .map(|(_, f)| f.clone())
                .collect::<Vec<_>>()
        };
        while answers(&pair).is_empty() {
            // The frame that carries the answer is lost.
            pair.cut = pair.node.targets.first().is_some_and(|(target, _)| target.is_confirmed())
                && pair.recorded.as_ref().unwrap().iter().any(|(_, f)| carries(f, Kind::Request));
            let end = pair.now + Nanos::from_millis(10);
            pair.step(end);
        }
        pair.cut = false;
        let answer = answers(&pair).remove(0);
        pair.node.targets[0].0.notify(grown(WAS + 8));
        if late {
            pair.run_for(Nanos::from_micros(100));
            pair.backend_receives(&answer);
        }
        pair.run_for(Nanos::from_millis(100));
        assert!(
            matches!(pair.events.iter().rev().find(|e| matches!(e, Event::Attached(..))), Some(Event::Attached(info, _)) if info.capacity_sectors == WAS + 8),
            "{:?}",
            pair.events
        );
        assert_eq!(told(&pair).last(), Some(&(WAS + 8)));
        assert!(told(&pair).iter().all(|sectors| *sectors == WAS + 8), "{:?}", told(&pair));
    }
}
