//! A volume that gets another size while it is used, on the production worker over a wire in memory and virtual time.

#[allow(dead_code, reason = "the tests beside this one use the rest")]
mod segment;

use cirro_node::volume::{Told, Unfit, Volume};
use cirro_protocol::initiator::Event;
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::Uuid;
use cirro_protocol::wire::body::Access::{ReadOnly, ReadWrite};
use segment::{BYTES, Segment};

const SECTORS: u64 = BYTES / 512;

/// The control thread's part: the file first, then the worker.
fn resize(segment: &mut Segment, bytes: u64) -> Result<Told, String> {
    let volume = Volume::open(&format!("v={}", segment.path.display()).parse().unwrap()).unwrap();
    let worker = &mut segment.worker;
    volume.resize(bytes, |sectors| worker.resize(&volume.name, sectors)).map_err(|error| error.to_string())
}

fn told(segment: &Segment, guest: usize) -> Vec<u64> {
    let told = segment.guests[guest].events.iter().filter_map(|event| match event {
        Event::Attached(info, _) | Event::Changed(info) => Some(info.capacity_sectors),
        Event::Done { .. } | Event::Refused(..) | Event::Lost(_) => None,
    });
    told.collect()
}

fn opened() -> Segment {
    let mut segment = Segment::new("");
    segment.add_guest(1, ReadWrite, false);
    segment.attach(0, ReadWrite);
    segment.run_for(Nanos::from_millis(5));
    segment
}

/// P-120: every session that has the volume open, and who opens it later.
#[test]
fn who_has_the_volume_open_is_told_and_works_behind_the_old_end() {
    let mut segment = opened();
    let reader = segment.add_guest(2, ReadOnly, false);
    segment.attach(reader, ReadOnly);
    assert_eq!(segment.ask(0, Op::Write, BYTES, vec![1; 512]).0, Status::Invalid);
    assert_eq!(resize(&mut segment, 2 * BYTES), Ok(Told { sectors_before: SECTORS, sessions: 2 }));
    segment.run_for(Nanos::from_millis(1));
    for guest in [0, reader] {
        assert_eq!(told(&segment, guest).last(), Some(&(2 * SECTORS)));
    }
    assert_eq!(segment.ask(0, Op::Write, 2 * BYTES - 4096, vec![5; 4096]).0, Status::Ok);
    assert_eq!(segment.ask(reader, Op::Read, 2 * BYTES - 4096, vec![0; 4096]), (Status::Ok, vec![5; 4096]));
    assert_eq!(segment.ask(0, Op::Write, 2 * BYTES, vec![1; 512]).0, Status::Invalid);
    let later = segment.add_guest(3, ReadOnly, false);
    segment.attach(later, ReadOnly);
    assert_eq!(told(&segment, later), [2 * SECTORS]);
    segment.restart_node();
    segment.run_for(Nanos::from_secs(1));
    assert_eq!(told(&segment, later).last(), Some(&(2 * SECTORS)), "the file's length is its size");
    assert_eq!(resize(&mut segment, 2 * BYTES).unwrap().sessions, 0, "nothing is new");
}

/// P-120: the session is idle, so nothing but the loss of the frame itself can bring it again.
#[test]
fn news_that_is_lost_comes_again_to_an_idle_session() {
    let mut segment = opened();
    segment.deaf = true;
    resize(&mut segment, 2 * BYTES).unwrap();
    segment.run_for(Nanos::from_micros(200));
    segment.deaf = false;
    segment.run_for(Nanos::from_millis(200));
    assert_eq!(told(&segment, 0), [SECTORS, 2 * SECTORS]);
}

/// A request in flight is held to the size that it was taken under, and neither waits for the other.
#[test]
fn a_request_in_flight_ends_whatever_becomes_of_the_size() {
    let mut segment = opened();
    segment.faults.borrow_mut().hold.push(cirro_node::store::StoreOp::Write);
    let slot = segment.submit(0, Op::Write, BYTES - 4096, vec![7; 4096]);
    segment.run_for(Nanos::from_millis(1));
    resize(&mut segment, 2 * BYTES).unwrap();
    segment.faults.borrow_mut().hold.clear();
    segment.run_until("the write ended", |s| s.guests[0].done.iter().any(|(done, ..)| *done == slot));
    assert_eq!(segment.guests[0].done[0].1, Status::Ok);
}

#[test]
fn a_volume_that_anybody_has_is_not_made_smaller() {
    let mut segment = opened();
    resize(&mut segment, 2 * BYTES).unwrap();
    let refused = resize(&mut segment, BYTES).unwrap_err();
    assert_eq!(refused, format!("volume v: has 8M and stays so, not 4M: {}", Unfit::Open(1)));
    segment.guests[0].die();
    // Its session is forgotten, and it holds the volume all the same.
    segment.restart_node();
    segment.guests.clear();
    let refused = resize(&mut segment, BYTES).unwrap_err();
    assert_eq!(refused, format!("volume v: has 8M and stays so, not 4M: {}", Unfit::Held(Uuid([1; 16]))));
    assert_eq!(std::fs::metadata(&segment.path).unwrap().len(), 2 * BYTES);
}

#[test]
fn a_volume_that_nobody_has_is_made_smaller_where_it_is_empty() {
    let mut segment = Segment::new("");
    assert_eq!(resize(&mut segment, BYTES / 2), Ok(Told { sectors_before: SECTORS, sessions: 0 }));
    segment.add_guest(1, ReadWrite, false);
    segment.attach(0, ReadWrite);
    assert_eq!(told(&segment, 0), [SECTORS / 2]);
    assert_eq!(segment.ask(0, Op::Read, BYTES / 2, vec![0; 512]).0, Status::Invalid);
}
