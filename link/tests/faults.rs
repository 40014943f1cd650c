//! The faults layer above a wire in memory: what it does is what was asked for, and the same again for the same seed.

use cirro_link::faults::{Chance, Counts, Faults, HELD_MAX, Options, Wire};
use cirro_link::memory::{MemoryLink, pair};
use cirro_link::{FrameId, Link};
use cirro_protocol::time::{Instant, Nanos};

const START: Instant = Instant(1_000_000_000);

/// A sender with faults and a receiver without.
fn wire(options: Options) -> (Faults<MemoryLink>, MemoryLink) {
    let (near, far) = pair(1500);
    let mut near = Faults::new(near);
    near.set(Some(options));
    near.set_now(START);
    (near, far)
}

fn sent(wire: Wire, seed: u64) -> Options {
    Options { seed, sent: wire, ..Options::default() }
}

/// A header of 14 bytes, the number, and some padding.
fn put(link: &mut impl Link, number: u64) {
    let head = &mut link.frame().expect("room").head;
    head.extend_from_slice(&[0; 14]);
    head.extend_from_slice(&number.to_le_bytes());
    head.extend_from_slice(&[0; 38]);
    link.commit(FrameId { session: 1, pn: number });
}

fn send_all(link: &mut impl Link, count: u64) -> Vec<FrameId> {
    let mut refused = Vec::new();
    for number in 0..count {
        put(link, number);
        link.flush(&mut refused);
    }
    refused
}

fn numbers(link: &mut impl Link) -> Vec<u64> {
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes[14..22].try_into().unwrap());
    std::iter::from_fn(|| link.receive().map(|frame| number(frame.bytes))).collect()
}

/// Sends `count` frames over a fresh wire; what arrives, and the counts.
fn over(options: Options, count: u64) -> (Vec<u64>, Counts) {
    let (mut near, mut far) = wire(options);
    let mut arrived = Vec::new();
    for number in 0..count {
        put(&mut near, number);
        near.flush(&mut Vec::new());
        arrived.extend(numbers(&mut far));
    }
    near.set_now(START + Nanos::from_secs(1));
    near.flush(&mut Vec::new());
    arrived.extend(numbers(&mut far));
    (arrived, near.counts().0)
}

/// `count` out of `frames` at a chance of `millionths`: within five standard deviations of a binomial distribution.
fn assert_rate(count: u64, frames: u64, millionths: u32) {
    let p = f64::from(millionths) / 1e6;
    let (mean, deviation) = (frames as f64 * p, (frames as f64 * p * (1.0 - p)).sqrt());
    assert!((count as f64 - mean).abs() < 5.0 * deviation, "{count} of {frames} at {p}");
}

#[test]
fn without_options_frames_pass_untouched() {
    let (near, mut far) = pair(1500);
    let mut near = Faults::new(near);
    assert_eq!(send_all(&mut near, 100), []);
    assert_eq!(numbers(&mut far), (0..100).collect::<Vec<_>>());
    near.set(Some(Options::default()));
    near.set_now(START);
    assert_eq!(send_all(&mut near, 100), []);
    assert_eq!(numbers(&mut far), (0..100).collect::<Vec<_>>());
    assert_eq!(near.counts().0, Counts { frames: 100, ..Counts::default() });
    assert_eq!(near.poll_timeout(), None);
}

#[test]
fn the_same_seed_gives_the_same_faults_and_another_seed_others() {
    let bad = Wire {
        loss: Chance::percent(5),
        burst: Chance::percent(1),
        burst_frames: 4,
        duplication: Chance::percent(3),
        reordering: Chance::percent(4),
        reorder_frames: 3,
        corruption: Chance::percent(2),
        ..Wire::default()
    };
    let first = over(sent(bad, 7), 5_000);
    assert_eq!(first, over(sent(bad, 7), 5_000));
    assert_ne!(first.0, over(sent(bad, 8), 5_000).0);
    // An option that is added does not change which frames another one picks.
    let only_loss = Wire { loss: bad.loss, ..Wire::default() };
    let loss_and_twins = Wire { duplication: bad.duplication, ..only_loss };
    let (mut with_twins, _) = over(sent(loss_and_twins, 7), 5_000);
    with_twins.dedup();
    assert_eq!(over(sent(only_loss, 7), 5_000).0, with_twins);
}

#[test]
fn each_fault_happens_as_often_as_was_asked_for() {
    const FRAMES: u64 = 50_000;
    let (arrived, counts) = over(sent(Wire { loss: Chance(10_000), ..Wire::default() }, 1), FRAMES);
    assert_rate(counts.lost, FRAMES, 10_000);
    assert_eq!(arrived.len() as u64, FRAMES - counts.lost);

    let (arrived, counts) = over(sent(Wire { duplication: Chance(20_000), ..Wire::default() }, 2), FRAMES);
    assert_rate(counts.duplicated, FRAMES, 20_000);
    assert_eq!(arrived.len() as u64, FRAMES + counts.duplicated);
    assert_eq!(arrived.windows(2).filter(|two| two[0] == two[1]).count() as u64, counts.duplicated);

    let burst = Wire { burst: Chance(2_000), burst_frames: 10, ..Wire::default() };
    let (arrived, counts) = over(sent(burst, 3), FRAMES);
    let gaps: Vec<u64> = arrived.windows(2).map(|two| two[1] - two[0] - 1).filter(|gap| *gap > 0).collect();
    assert!(gaps.iter().all(|gap| gap % 10 == 0), "{gaps:?}");
    // A burst takes up the ten frames in which no other begins: one per 510 frames on average.
    assert!((60..140).contains(&gaps.len()), "{} bursts", gaps.len());
    assert!(counts.lost >= 10 * gaps.len() as u64);
}

#[test]
fn a_reordered_frame_is_overtaken_by_as_many_as_was_said() {
    let wire = Wire { reordering: Chance(5_000), reorder_frames: 3, ..Wire::default() };
    let (arrived, counts) = over(sent(wire, 11), 20_000);
    assert_rate(counts.reordered, 20_000, 5_000);
    assert_eq!(arrived.len(), 20_000, "none is lost");
    let late = arrived
        .iter()
        .enumerate()
        .filter(|(place, number)| arrived[..*place].iter().rev().take(8).any(|before| before > *number));
    // A frame that follows a late one at once may be late too, and then be overtaken by fewer that come after it.
    let overtaken_by = |(place, number): (usize, &u64)| {
        arrived[..place].iter().rev().take(8).filter(|before| *before > number).count()
    };
    let by: Vec<usize> = late.map(overtaken_by).collect();
    assert!(by.iter().filter(|count| **count == 3).count() * 10 >= by.len() * 9, "{by:?}");
}

#[test]
fn a_reordered_frame_that_nobody_overtakes_comes_by_itself() {
    let wire_options = Wire { reordering: Chance::percent(100), reorder_frames: 3, ..Wire::default() };
    let (mut near, mut far) = wire(sent(wire_options, 1));
    send_all(&mut near, 1);
    assert_eq!(numbers(&mut far), []);
    let due = near.poll_timeout().expect("it waits");
    assert_eq!(due, START + Nanos::from_millis(2));
    near.set_now(due);
    near.flush(&mut Vec::new());
    assert_eq!(numbers(&mut far), [0]);
    assert_eq!(near.poll_timeout(), None);
}

#[test]
fn a_damaged_frame_differs_in_one_bit_behind_the_ethernet_header() {
    let (mut near, mut far) = wire(sent(Wire { corruption: Chance::percent(100), ..Wire::default() }, 5));
    let mut places = std::collections::BTreeSet::new();
    for _ in 0..2_000 {
        near.frame().unwrap().head.extend_from_slice(&[0; 60]);
        near.commit(FrameId::default());
        near.flush(&mut Vec::new());
        let frame = far.receive().unwrap();
        let ones: Vec<usize> = (0..480).filter(|bit| frame.bytes[bit / 8] >> (bit % 8) & 1 == 1).collect();
        assert_eq!(ones.len(), 1);
        places.insert(ones[0]);
    }
    // 46 bytes are 368 places; 2000 throws miss one of them with a chance of e^-5.4 each.
    assert!(places.first().unwrap() >= &112 && places.len() > 350, "{}", places.len());
}

#[test]
fn received_frames_suffer_too_and_are_late_by_the_delay() {
    let (near, mut far) = pair(1500);
    let mut near = Faults::new(near);
    let delay = Nanos::from_micros(300);
    near.set(Some(Options { received: Wire { delay, ..Wire::default() }, ..Options::default() }));
    near.set_now(START);
    send_all(&mut far, 3);
    assert!(near.receive().is_none());
    assert_eq!(near.poll_timeout(), Some(START + delay));
    near.set_now(START + Nanos::from_micros(299));
    assert!(near.receive().is_none());
    near.set_now(START + delay);
    let arrival = near.receive().expect("now it is due").arrival;
    assert_eq!(arrival, START + delay);
    assert_eq!(numbers(&mut near), [1, 2]);
    assert_eq!(near.counts().1.frames, 3);
    assert_eq!(near.counts().0.frames, 0);
}

#[test]
fn jitter_lets_frames_overtake_each_other_and_loses_none() {
    let (delay, jitter) = (Nanos::from_micros(100), Nanos::from_micros(50));
    let (mut near, mut far) = wire(sent(Wire { delay, jitter, ..Wire::default() }, 9));
    let mut arrived = Vec::new();
    for microsecond in 0..1_200u64 {
        near.set_now(START + Nanos::from_micros(microsecond));
        if microsecond < 1_000 {
            put(&mut near, microsecond);
        }
        near.flush(&mut Vec::new());
        for number in numbers(&mut far) {
            assert!((number + 100..=number + 151).contains(&microsecond), "{number} came at {microsecond}");
            arrived.push(number);
        }
    }
    assert!(!arrived.is_sorted());
    arrived.sort_unstable();
    assert_eq!(arrived, (0..1_000).collect::<Vec<_>>());
}

#[test]
fn refused_frames_are_named_and_the_copies_that_nobody_sent_are_not() {
    let twins = Wire { duplication: Chance::percent(100), ..Wire::default() };
    let (mut near, mut far) = wire(sent(twins, 3));
    near.inner_mut().set_refuses(true);
    let refused = send_all(&mut near, 5);
    assert_eq!(refused.iter().map(|id| id.pn).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(numbers(&mut far), []);
}

#[test]
fn a_full_link_holds_copies_back_until_there_is_room() {
    let twins = Wire { duplication: Chance::percent(100), ..Wire::default() };
    let (mut near, mut far) = wire(sent(twins, 3));
    let mut own = 0;
    while near.frame().is_some() {
        put(&mut near, own);
        own += 1;
    }
    assert_eq!(own, cirro_link::FRAMES_QUEUED_MAX as u64 / 2);
    near.flush(&mut Vec::new());
    assert_eq!(numbers(&mut far).len(), cirro_link::FRAMES_QUEUED_MAX);
}

#[test]
fn what_is_held_back_has_a_limit() {
    let slow = Wire { delay: Nanos::from_secs(1), ..Wire::default() };
    let (mut near, mut far) = wire(sent(slow, 3));
    send_all(&mut near, HELD_MAX as u64 + 10);
    assert_eq!(near.counts().0.overflowed, 10);
    near.set_now(START + Nanos::from_secs(1));
    let mut arrived = Vec::new();
    for _ in 0..=HELD_MAX / cirro_link::FRAMES_QUEUED_MAX {
        near.flush(&mut Vec::new());
        arrived.extend(numbers(&mut far));
    }
    assert_eq!(arrived, (0..HELD_MAX as u64).collect::<Vec<_>>());
}
