//! What a node promises to its backends, tested on the production worker over a wire in memory and virtual time.

mod segment;

use std::os::unix::fs::FileExt;

use cirro_node::access::{AccessList, Client, Grant, Right};
use cirro_node::store::StoreOp;
use cirro_protocol::initiator::{Event, LossCause};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{Cid, MacAddress, Slot, Steer, Uuid};
use cirro_protocol::wire::body::{Access, CloseReason, VOLUME_READ_ONLY};
use cirro_protocol::wire::ethernet::Ethernet;
use cirro_protocol::wire::header::Header;
use cirro_protocol::wire::long::{Body, Hello, WhoHas};
use cirro_protocol::wire::message::{Kind, Message};
use segment::stranger::{Stranger, hello, long_to_node};
use segment::{BYTES, Segment};

use Access::{ReadOnly, ReadWrite};

fn written(segment: &Segment, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    std::fs::File::open(&segment.path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn opened(option: &str) -> Segment {
    let mut segment = Segment::new(option);
    segment.add_guest(1, ReadWrite, false);
    segment.attach(0, ReadWrite);
    segment
}

#[test]
fn requests_of_every_size_and_kind_do_what_they_say() {
    let mut segment = opened("");
    let mut model = vec![0u8; BYTES as usize];
    let mut number = 0x2545_f491_4f6c_dd1du64;
    let mut random = |below: u64| {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        number % below
    };
    for round in 0..300u64 {
        let len = (1 + random(if round % 10 == 0 { 2048 } else { 40 })) * 512;
        let offset = random((BYTES - len) / 512) * 512;
        let range = offset as usize..(offset + len) as usize;
        let op =
            [Op::Read, Op::Write, Op::Write, Op::Discard, Op::WriteZeroes, Op::Flush][random(6) as usize];
        let data = if op == Op::Flush { Vec::new() } else { vec![round as u8 | 1; len as usize] };
        let (status, read) = segment.ask(0, op, offset, data);
        assert_eq!(status, Status::Ok, "{op:?} of {len} at {offset}");
        match op {
            Op::Read => assert!(read == model[range], "read of {len} at {offset}"),
            Op::Write => model[range].fill(round as u8 | 1),
            Op::Discard | Op::WriteZeroes => model[range].fill(0),
            Op::Flush | Op::Open | Op::Release | Op::Stat => {}
        }
    }
    assert!(written(&segment, 0, BYTES as usize) == model, "the file is what was written");
    segment.run_for(Nanos::from_secs(1));
    assert_eq!(segment.worker.pool_bytes_used(), (0, 0), "every buffer is free");
}

#[test]
fn many_requests_at_once_end_once_each_and_leave_no_buffer_behind() {
    let mut segment = opened("");
    for round in 0..64u64 {
        segment.submit(
            0,
            if round % 2 == 0 { Op::Write } else { Op::Read },
            round * 65536 / 2,
            vec![round as u8; 32768],
        );
    }
    segment.run_until("all 64 ended", |s| s.guests[0].done.len() == 64);
    assert!(segment.guests[0].done.iter().all(|(_, status, _)| *status == Status::Ok));
    segment.run_for(Nanos::from_secs(1));
    assert_eq!(segment.worker.pool_bytes_used(), (0, 0));
}

/// P-69: EINVAL for what is outside or no multiple of the block size; the store never hears of it.
#[test]
fn a_request_outside_the_volume_or_its_blocks_is_invalid_and_touches_nothing() {
    let mut segment = opened("");
    for (op, offset, len) in [
        (Op::Read, BYTES, 512),
        (Op::Write, BYTES - 512, 1024),
        (Op::Write, 100, 512),
        (Op::Read, 0, 700),
        (Op::Discard, BYTES - 512, 1024),
        (Op::WriteZeroes, 1 << 62, 512),
    ] {
        let (status, _) = segment.ask(0, op, offset, vec![1; len]);
        assert_eq!(status, Status::Invalid, "{op:?} of {len} at {offset}");
    }
    assert_eq!(segment.faults.borrow().seen, []);
    segment.run_for(Nanos::from_millis(10));
    assert_eq!(segment.worker.pool_bytes_used(), (0, 0));
}

/// P-69 P-82: EROFS for every change; the owner stays as it was.
#[test]
fn who_opened_for_reading_cannot_write_and_owns_nothing() {
    let mut segment = Segment::new("");
    let reader = segment.add_guest(1, ReadOnly, false);
    segment.attach(reader, ReadOnly);
    assert_eq!(segment.keeper.record(&"v".parse().unwrap()).vol_epoch, 0);
    assert_eq!(segment.ask(reader, Op::Read, 0, vec![1; 4096]), (Status::Ok, vec![0; 4096]));
    assert_eq!(segment.ask(reader, Op::Write, 0, vec![1; 4096]).0, Status::ReadOnly);
    assert_eq!(segment.ask(reader, Op::Discard, 0, vec![1; 4096]).0, Status::ReadOnly);
    assert_eq!(segment.ask(reader, Op::Flush, 0, Vec::new()).0, Status::Ok);
    assert_eq!(written(&segment, 0, 4096), [0; 4096]);
}

/// P-109: without keys clients are named by their address; `ro` reads, and sees a read-only volume; who is not named gets nothing.
#[test]
fn a_client_that_may_only_read_is_refused_to_write() {
    let granted = |right| {
        move |address| {
            let grant = Grant { volume: "v".parse().unwrap(), client: Client::Mac(address), right };
            AccessList::fixed(true, &[grant])
        }
    };
    let mut segment = Segment::with_access("", granted(Right::ReadOnly));
    segment.add_guest(1, ReadWrite, false);
    segment.run_until("it was refused", |s| s.refused(0, Status::ReadOnly));
    assert_eq!(segment.keeper.record(&"v".parse().unwrap()).vol_epoch, 0);
    let reader = segment.add_guest(2, ReadOnly, false);
    segment.attach(reader, ReadOnly);
    assert_eq!(segment.ask(reader, Op::Read, 0, vec![1; 4096]), (Status::Ok, vec![0; 4096]));
    assert_eq!(segment.ask(reader, Op::Write, 0, vec![1; 4096]).0, Status::ReadOnly);
    let info = segment.guests[reader].events.iter().find_map(|event| match event {
        Event::Attached(info, _) => Some(*info),
        Event::Done { .. } | Event::Refused(..) | Event::Lost(_) | Event::Changed(_) => None,
    });
    assert_eq!(info.unwrap().flags & VOLUME_READ_ONLY, VOLUME_READ_ONLY);

    let mut segment = Segment::with_access("", granted(Right::None));
    segment.add_guest(1, ReadOnly, false);
    segment.run_for(Nanos::from_millis(600));
    assert!(!segment.guests[0].events.iter().any(|event| matches!(event, Event::Attached(..))));
    let mut snapshot = cirro_node::node::Snapshot::default();
    segment.worker.snapshot(&mut snapshot);
    assert!(snapshot.sessions.is_empty());
}

#[test]
fn a_read_only_volume_is_not_opened_for_writing() {
    let mut segment = Segment::new(",ro");
    segment.add_guest(1, ReadWrite, false);
    segment.run_until("it was refused", |s| s.refused(0, Status::ReadOnly));
    assert_eq!(segment.keeper.record(&"v".parse().unwrap()).vol_epoch, 0);
}

/// P-79 P-80 P-81
#[test]
fn a_second_attachment_is_refused_until_it_takes_over_and_fences_the_first() {
    let mut segment = opened("");
    assert_eq!(segment.epoch(0), 1);
    let polite = segment.add_guest(2, ReadWrite, false);
    segment.run_until("it was refused", |s| s.refused(polite, Status::Busy));
    assert_eq!(segment.ask(0, Op::Write, 0, vec![1; 512]).0, Status::Ok, "the first still writes");
    let rude = segment.add_guest(3, ReadWrite, true);
    segment.attach(rude, ReadWrite);
    assert_eq!(segment.epoch(rude), 2);
    let record = segment.keeper.record(&"v".parse().unwrap());
    assert_eq!((record.vol_epoch, record.holder), (2, Some(Uuid([3; 16]))));
    let mut asked =
        [segment.submit(0, Op::Write, 0, vec![9; 512]), segment.submit(0, Op::Read, 0, vec![9; 512])];
    segment.run_until("both ended", |s| s.guests[0].done.len() == 2);
    let mut ended = segment.guests[0].done.clone();
    ended.sort_by_key(|done| done.0);
    asked.sort();
    assert_eq!(
        ended.iter().map(|done| (done.0, done.1)).collect::<Vec<_>>(),
        asked.map(|slot| (slot, Status::Fenced))
    );
    assert_eq!(segment.ask(rude, Op::Read, 0, vec![9; 512]), (Status::Ok, vec![1; 512]));
}

/// P-81: it is free again, and still what the fenced one knows of it is another's past.
#[test]
fn a_fenced_attachment_gets_a_free_volume_only_after_it_has_let_go() {
    for asks_meanwhile in [true, false] {
        let mut segment = opened("");
        let rude = segment.add_guest(2, ReadWrite, true);
        segment.attach(rude, ReadWrite);
        if asks_meanwhile {
            assert_eq!(segment.ask(0, Op::Write, 0, vec![9; 512]).0, Status::Fenced);
        }
        assert_eq!(segment.ask(rude, Op::Write, 0, vec![2; 512]).0, Status::Ok);
        segment.guests[rude].initiator.set_access(ReadOnly);
        let name = "v".parse().unwrap();
        segment.run_until("it was released", |s| s.keeper.record(&name).holder.is_none());
        segment.run_for(Nanos::from_millis(5));
        segment.restart_node();
        let before = segment.guests[0].events.len();
        segment.submit(0, Op::Write, 0, vec![9; 512]);
        segment.run_for(Nanos::from_secs(2));
        let events = &segment.guests[0].events[before..];
        assert!(!events.iter().any(|e| matches!(e, Event::Attached(_, ReadWrite))), "{events:?}");
        assert!(segment.guests[0].initiator.is_fenced());
        assert_eq!(written(&segment, 0, 512), [2; 512], "asked meanwhile: {asks_meanwhile}");
        assert_eq!(segment.keeper.record(&name).holder, None, "it does not keep others out either");
        segment.guests[0].initiator.abandon(segment.now);
        segment.guests[0].die();
        segment.guests[0].initiator.set_access(ReadOnly);
        segment.guests[0].initiator.set_access(ReadWrite);
        let seen = segment.guests[0].events.len();
        segment.run_until("a driver that starts anew has it", |s| {
            s.guests[0].events[seen..].iter().any(|e| matches!(e, Event::Attached(_, ReadWrite)))
        });
    }
}

/// P-83
#[test]
fn a_released_volume_goes_to_the_next_who_asks() {
    let mut segment = opened("");
    segment.guests[0].initiator.set_access(ReadOnly);
    let name = "v".parse().unwrap();
    segment.run_until("it was released", |s| s.keeper.record(&name).holder.is_none());
    let next = segment.add_guest(2, ReadWrite, false);
    segment.attach(next, ReadWrite);
    assert_eq!(segment.epoch(next), 2);
    assert_eq!(segment.ask(0, Op::Write, 0, vec![1; 512]).0, Status::ReadOnly);
    assert_eq!(segment.ask(0, Op::Read, 0, vec![1; 512]).0, Status::Ok, "it still reads");
}

#[test]
fn the_holder_keeps_its_epoch_over_sessions_and_restarts_of_the_node() {
    let mut segment = opened("");
    segment.restart_node();
    segment.run_until("it has a session again", |s| {
        s.guests[0].events.iter().filter(|e| matches!(e, Event::Attached(_, ReadWrite))).count() == 2
    });
    assert_eq!(segment.epoch(0), 1);
}

/// P-77: a restarted node says at once that it knows nothing, and what was pending is done then.
#[test]
fn a_request_pending_over_a_restart_of_the_node_ends_after_it() {
    let mut segment = opened("");
    segment.faults.borrow_mut().hold.push(StoreOp::Write);
    segment.submit(0, Op::Write, 4096, vec![7; 8192]);
    segment.run_for(Nanos::from_millis(5));
    segment.faults.borrow_mut().hold.clear();
    let before = segment.now;
    segment.restart_node();
    segment.run_until("the write ended", |s| s.guests[0].done.len() == 1);
    assert_eq!(segment.guests[0].done[0].1, Status::Ok);
    assert!(
        segment.guests[0].events.contains(&Event::Lost(LossCause::Reset)),
        "{:?}",
        segment.guests[0].events
    );
    assert!(
        segment.now.since(before) < Nanos::from_millis(900),
        "no need to wait until the node is taken for dead"
    );
    assert_eq!(written(&segment, 4096, 8192), [7; 8192]);
}

/// P-84
#[test]
fn an_open_waits_for_writes_of_the_session_before() {
    let mut segment = opened("");
    segment.faults.borrow_mut().hold.push(StoreOp::Write);
    segment.submit(0, Op::Write, 0, vec![7; 4096]);
    segment.run_until("the store has it", |s| !s.faults.borrow().seen.is_empty());
    segment.guests[0].die();
    segment.guests[0].initiator.abandon(segment.now);
    segment.guests[0].events.clear();
    segment.run_for(Nanos::from_millis(2_000));
    assert!(
        !segment.is_attached(0, ReadOnly) && !segment.is_attached(0, ReadWrite),
        "not while the write is under way"
    );
    segment.faults.borrow_mut().hold.clear();
    segment.attach(0, ReadWrite);
    assert_eq!(segment.epoch(0), 1);
    segment.run_for(Nanos::from_secs(1));
    assert_eq!(segment.worker.pool_bytes_used(), (0, 0));
}

#[test]
fn overlapping_writes_reach_the_store_one_after_the_other() {
    let mut segment = Segment::new("");
    let mut stranger = Stranger::opened(&mut segment);
    segment.faults.borrow_mut().hold.push(StoreOp::Write);
    let write = |slot, offset, fill| (Op::Write, Slot(slot), 1, offset, vec![fill; 1024]);
    stranger.send(&mut segment, &[write(0, 0, 1), write(1, 512, 2), write(2, 65536, 3), write(3, 1024, 4)]);
    let writes =
        |s: &Segment| s.faults.borrow().seen.iter().map(|(_, offset, _)| *offset).collect::<Vec<_>>();
    assert_eq!(writes(&segment), [0, 65536], "the second waits for the first, the fourth for the second");
    segment.faults.borrow_mut().hold.clear();
    segment.run_for(Nanos::from_millis(1));
    assert_eq!(writes(&segment), [0, 65536, 512, 1024]);
    let bytes = [[1; 512], [2; 512], [4; 512], [4; 512]].concat();
    assert_eq!(written(&segment, 0, 2048), bytes, "as if they had been written in order");
}

/// P-69: another handle never reaches the store.
#[test]
fn a_write_with_another_handle_touches_nothing() {
    let mut segment = Segment::new("");
    let mut stranger = Stranger::opened(&mut segment);
    stranger.handle = 2;
    stranger.send(&mut segment, &[(Op::Write, Slot(0), 1, 0, vec![1; 512])]);
    assert_eq!(segment.faults.borrow().seen, []);
    stranger.handle = 1;
    stranger.send(&mut segment, &[(Op::Write, Slot(0), 2, 0, vec![1; 512])]);
    assert_eq!(segment.faults.borrow().seen, [(StoreOp::Write, 0, 512)]);
}

#[test]
fn a_frame_that_is_not_of_the_session_changes_nothing_and_is_counted() {
    let mut segment = Segment::new("");
    let mut stranger = Stranger::opened(&mut segment);
    let write = [(Op::Write, Slot(0), 1, 0, vec![1; 512])];
    let (source, nonces) = (stranger.to.source, stranger.nonces);
    stranger.to.source = MacAddress([2, 0, 0, 0, 9, 8]);
    stranger.send(&mut segment, &write);
    (stranger.to.source, stranger.nonces.receiver) = (source, nonces.receiver ^ 1);
    stranger.send(&mut segment, &write);
    stranger.nonces = nonces;
    stranger.header.steer = Steer::new(2, 1);
    stranger.send(&mut segment, &write);
    assert_eq!(segment.faults.borrow().seen, []);
    let dropped = segment.worker.meter().snapshot().dropped;
    for reason in ["other-source", "tag", "not-for-us"] {
        assert_eq!(dropped.get(reason), Some(&1), "{reason}: {dropped:?}");
    }
}

/// P-56
#[test]
fn a_write_for_which_there_is_no_buffer_is_done_when_there_is_one() {
    let mut segment = opened("");
    // Writes of 513 KiB, of which only the first piece ever comes, occupy 1 MiB of the 32 each. Credit lets the first three strangers begin
    // 7 of them (4 MiB), the others one (1 MiB).
    let mut strangers: Vec<Stranger> = (0..14).map(|id| Stranger::greeted(&mut segment, 100 + id)).collect();
    for (number, stranger) in strangers.iter_mut().enumerate() {
        stranger.mlen = Some(513 << 10);
        for slot in 0..if number < 3 { 7 } else { 1 } {
            stranger.send(&mut segment, &[(Op::Write, Slot(slot), 1, 0, vec![1; 8192])]);
        }
    }
    assert_eq!(segment.worker.pool_bytes_used().0, 32 << 20);
    segment.submit(0, Op::Write, 4096, vec![5; 4096]);
    segment.run_for(Nanos::from_millis(300));
    assert!(segment.guests[0].done.is_empty());
    assert!(segment.worker.meter().snapshot().dropped["no-buffer"] > 1, "it was sent again");
    strangers[5].close(&mut segment);
    segment.run_until("the write ended", |s| s.guests[0].done.len() == 1);
    assert_eq!(segment.guests[0].done[0].1, Status::Ok);
    assert_eq!(written(&segment, 4096, 4096), [5; 4096]);
    assert!(!segment.guests[0].events.iter().any(|event| matches!(event, Event::Lost(_))), "in one session");
}

/// P-87: after an EIO every later flush fails, and the disk is not asked again.
#[test]
fn a_failed_flush_is_never_forgotten() {
    let mut segment = opened("");
    assert_eq!(segment.ask(0, Op::Flush, 0, Vec::new()).0, Status::Ok);
    segment.faults.borrow_mut().fail.push((StoreOp::Flush, libc::EIO));
    assert_eq!(segment.ask(0, Op::Flush, 0, Vec::new()).0, Status::Io);
    segment.faults.borrow_mut().fail.clear();
    segment.faults.borrow_mut().seen.clear();
    assert_eq!(segment.ask(0, Op::Flush, 0, Vec::new()).0, Status::Io, "the disk would say OK now, and lie");
    assert_eq!(segment.faults.borrow().seen, []);
    assert_eq!(segment.ask(0, Op::Write, 0, vec![1; 512]).0, Status::Ok);
}

/// P-86 P-87: of two flushes that were asked for together the kernel tells a failure to one. They run one after another, and both fail.
#[test]
fn flushes_asked_for_together_fail_together() {
    let mut segment = opened("");
    segment.faults.borrow_mut().seen.clear();
    segment.faults.borrow_mut().hold.push(StoreOp::Flush);
    segment.faults.borrow_mut().fail.push((StoreOp::Flush, libc::EIO));
    segment.submit(0, Op::Flush, 0, Vec::new());
    segment.submit(0, Op::Flush, 0, Vec::new());
    segment.run_for(Nanos::from_millis(5));
    assert_eq!(segment.faults.borrow().seen.len(), 1, "one fdatasync at a time");
    segment.faults.borrow_mut().fail.clear();
    segment.faults.borrow_mut().hold.clear();
    segment.run_for(Nanos::from_millis(5));
    let statuses: Vec<Status> = segment.guests[0].done.iter().map(|(_, status, _)| *status).collect();
    assert_eq!(statuses, [Status::Io, Status::Io]);
}

/// P-88: what the store did not do is not answered OK.
#[test]
fn errors_of_the_store_are_told_and_cost_no_buffer() {
    let mut segment = opened("");
    for (op, store_op, errno, status) in [
        (Op::Read, StoreOp::Read, libc::EIO, Status::Io),
        (Op::Write, StoreOp::Write, libc::ENOSPC, Status::NoSpace),
        (Op::Write, StoreOp::Write, libc::EIO, Status::Io),
        (Op::Discard, StoreOp::Discard, libc::EIO, Status::Io),
    ] {
        segment.faults.borrow_mut().fail = vec![(store_op, errno)];
        assert_eq!(segment.ask(0, op, 4096, vec![1; 4096]).0, status, "{op:?}");
    }
    segment.faults.borrow_mut().fail.clear();
    assert_eq!(segment.ask(0, Op::Write, 4096, vec![1; 4096]).0, Status::Ok);
    segment.run_for(Nanos::from_secs(1));
    assert_eq!(segment.worker.pool_bytes_used(), (0, 0));
}

#[test]
fn nobody_becomes_owner_whose_record_cannot_be_kept() {
    let mut segment = Segment::new("");
    segment.keeper.set_failing(true);
    segment.add_guest(1, ReadWrite, false);
    segment.run_until("it was refused", |s| s.refused(0, Status::Io));
    assert_eq!(segment.keeper.record(&"v".parse().unwrap()).holder, None);
    segment.keeper.set_failing(false);
    segment.attach(0, ReadWrite);
    assert_eq!(segment.epoch(0), 1);
}

#[test]
fn an_open_for_writing_is_answered_only_when_the_record_is_durable() {
    let mut segment = Segment::new("");
    segment.keeper.set_holding(true);
    segment.add_guest(1, ReadWrite, false);
    segment.run_for(Nanos::from_millis(300));
    assert!(!segment.is_attached(0, ReadWrite));
    segment.keeper.set_holding(false);
    segment.attach(0, ReadWrite);
}

#[test]
fn a_silent_guest_is_forgotten_with_all_its_buffers() {
    let mut segment = opened("");
    segment.submit(0, Op::Read, 0, vec![0; 1 << 20]);
    segment.run_until("the store has it", |s| !s.faults.borrow().seen.is_empty());
    segment.cut = true;
    segment.run_for(Nanos::from_millis(20));
    assert_ne!(segment.worker.pool_bytes_used().1, 0, "the data waits for its acks");
    segment.run_for(Nanos::from_secs(8));
    assert_eq!(segment.worker.pool_bytes_used(), (0, 0));
    let mut snapshot = cirro_node::node::Snapshot::default();
    segment.worker.snapshot(&mut snapshot);
    assert_eq!(snapshot.sessions.len(), 0);
    let owner = snapshot.volumes[0].owner.as_ref().expect("it still holds the volume");
    assert_eq!((owner.vol_epoch, owner.attachment.as_str()), (1, "01010101010101010101010101010101"));
}

#[test]
fn a_stopping_node_finishes_what_was_begun_and_says_that_it_will_be_back() {
    let mut segment = opened("");
    segment.faults.borrow_mut().hold.push(StoreOp::Write);
    segment.submit(0, Op::Write, 0, vec![7; 4096]);
    segment.run_until("the store has it", |s| !s.faults.borrow().seen.is_empty());
    segment.worker.stop(segment.now);
    segment.run_for(Nanos::from_millis(100));
    assert!(!segment.worker.has_stopped(), "the write is not done");
    segment.faults.borrow_mut().hold.clear();
    segment.run_until("it has stopped", |s| s.worker.has_stopped());
    assert_eq!(segment.guests[0].done.len(), 1, "the write was answered");
    let restart = Event::Lost(LossCause::Closed(CloseReason::Restart));
    segment.run_until("the guest knows", |s| s.guests[0].events.contains(&restart));
}

#[test]
fn a_store_that_never_answers_does_not_keep_the_node_from_stopping() {
    let mut segment = opened("");
    segment.faults.borrow_mut().hold.push(StoreOp::Write);
    segment.submit(0, Op::Write, 0, vec![7; 4096]);
    segment.run_until("the store has it", |s| !s.faults.borrow().seen.is_empty());
    let begun = segment.now;
    segment.worker.stop(begun);
    segment.run_until("it has stopped", |s| s.worker.has_stopped());
    let waited = segment.now.since(begun);
    assert!(waited >= Nanos::from_secs(2) && waited < Nanos::from_millis(2_200), "{waited:?}");
}

/// P-70 P-72 P-73
#[test]
fn the_same_hello_gets_the_same_answer_and_an_older_one_none() {
    let mut segment = Segment::new("");
    let replies = |s: &Segment| -> Vec<_> {
        s.long
            .iter()
            .filter_map(|frame| if let Body::HelloReply(r) = frame.body { Some(r) } else { None })
            .collect()
    };
    let mut snapshot = cirro_node::node::Snapshot::default();
    for _ in 0..3 {
        long_to_node(&mut segment, Body::Hello(hello("v", 5, 77)));
        segment.run_for(Nanos::from_millis(1));
    }
    let same = replies(&segment);
    assert_eq!(same.len(), 3);
    assert!(same.iter().all(|reply| *reply == same[0] && reply.status == Status::Ok));
    segment.worker.snapshot(&mut snapshot);
    assert_eq!(snapshot.sessions.len(), 1);
    segment.run_for(Nanos::from_millis(1_100));
    segment.worker.snapshot(&mut snapshot);
    assert_eq!(snapshot.sessions.len(), 0, "no frame confirmed it within a second");
    // A confirmed session of the attachment is not shaken by an older HELLO.
    segment.add_guest(9, ReadWrite, false);
    segment.attach(0, ReadWrite);
    segment.long.clear();
    long_to_node(&mut segment, Body::Hello(hello("v", 5, 78)));
    segment.run_for(Nanos::from_millis(1));
    assert_eq!(replies(&segment)[0].status, Status::Stale);
    assert_eq!(segment.ask(0, Op::Write, 0, vec![1; 512]).0, Status::Ok);
    segment.worker.snapshot(&mut snapshot);
    assert_eq!(snapshot.sessions.len(), 1);
}

/// P-72
#[test]
fn a_hello_nobody_follows_up_closes_nothing() {
    let mut segment = opened("");
    let newer = Hello { attachment: Uuid([1; 16]), ..hello("v", u64::MAX, 3) };
    long_to_node(&mut segment, Body::Hello(newer));
    segment.run_for(Nanos::from_millis(2));
    assert_eq!(segment.ask(0, Op::Write, 0, vec![1; 512]).0, Status::Ok);
    segment.run_for(Nanos::from_secs(2));
    assert_eq!(segment.ask(0, Op::Read, 0, vec![0; 512]).1, [1; 512]);
    assert!(!segment.guests[0].events.iter().any(|event| matches!(event, Event::Lost(_))));
}

/// P-72
#[test]
fn a_confirmed_newer_session_ends_the_older_of_its_attachment() {
    let mut segment = opened("");
    let again = segment.add_guest(1, ReadWrite, false);
    segment.attach(again, ReadWrite);
    assert_eq!(segment.epoch(again), 1, "the same holder, the same epoch");
    let mut snapshot = cirro_node::node::Snapshot::default();
    segment.worker.snapshot(&mut snapshot);
    let superseded = Event::Lost(LossCause::Closed(CloseReason::Superseded));
    assert!(segment.guests[0].events.contains(&superseded), "{:?}", segment.guests[0].events);
}

/// P-100: a volume that is not here is answered EACCES and nothing more is said of it.
#[test]
fn questions_are_answered_for_volumes_that_are_served_and_for_no_others() {
    let mut segment = Segment::new("");
    segment.run_for(Nanos::from_millis(100));
    let announcements =
        segment.long.iter().filter(|f| matches!(f.body, Body::IHave(have) if have.volume.is_none()));
    assert_eq!(announcements.count(), 3);
    for (volume, answered) in [("v", true), ("unserved", false), ("unknown", false)] {
        segment.long.clear();
        let question = WhoHas { volume: Some(volume.parse().unwrap()), nonce: 8, steer: Steer::new(1, 0) };
        long_to_node(&mut segment, Body::WhoHas(question));
        segment.run_for(Nanos::from_millis(1));
        let answer =
            segment.long.iter().find_map(|f| if let Body::IHave(have) = f.body { Some(have) } else { None });
        assert_eq!(answer.is_some(), answered, "{volume}");
        assert!(answer.is_none_or(|have| (have.nonce, have.steer) == (8, Steer::new(2, 0))));
    }
    segment.long.clear();
    for (volume, nonce) in [("unknown", 1), ("unserved", 2)] {
        long_to_node(&mut segment, Body::Hello(hello(volume, 1, nonce)));
    }
    segment.run_for(Nanos::from_millis(1));
    let [Body::HelloReply(reply)] = segment.long.iter().map(|f| f.body).collect::<Vec<_>>()[..] else {
        panic!("one answer: {:?}", segment.long)
    };
    assert_eq!((reply.initiator_nonce, reply.status), (1, Status::Access));
    let other = Hello { node: Uuid([0x12; 16]), ..hello("v", 1, 4) };
    segment.long.clear();
    long_to_node(&mut segment, Body::Hello(other));
    segment.run_for(Nanos::from_millis(1));
    assert_eq!(segment.long, [], "another node is meant");
}

/// P-77
#[test]
fn hints_about_unknown_sessions_are_few() {
    let mut segment = Segment::new("");
    segment.run_for(Nanos::from_millis(100));
    segment.long.clear();
    let mut head = Vec::new();
    let (destination, source) = (segment.node_address(), MacAddress([2, 0, 0, 0, 9, 9]));
    Ethernet { destination, source, ethertype: 0x88b5 }.emit(&mut head);
    Header { steer: Steer::new(2, 0), cid: Cid(0x1234_5678), pn: 1, ..Header::default() }.emit(&mut head);
    Message::bare(Kind::Ping).emit(&mut head);
    head.extend_from_slice(&[0; 4]);
    for _ in 0..40 {
        segment.send_raw(&head);
    }
    segment.run_for(Nanos::from_millis(2));
    let [Body::ResetHint(hint)] = segment.long.iter().map(|f| f.body).collect::<Vec<_>>()[..] else {
        panic!("one hint: {:?}", segment.long)
    };
    assert_eq!((hint.cid, hint.incarnation), (Cid(0x1234_5678), Uuid([1; 16])));
    segment.run_for(Nanos::from_millis(10));
    segment.send_raw(&head);
    segment.run_for(Nanos::from_millis(2));
    assert_eq!(segment.long.len(), 2, "after a while another");
}
