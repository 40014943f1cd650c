//! The rules of `docs/PROTOCOL.md` that need a look at single frames and points in time: acks, timers, silence, credit, sessions.
//!
//! Whole runs under a bad wire are in `promises.rs`.

mod pair;

use cirro_protocol::initiator::{Event, LossCause};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::*;
use cirro_protocol::wire::body::Access;
use cirro_protocol::wire::header::FLAG_ACK_NOW;
use cirro_protocol::wire::long::{Body, LongFrame, ResetHint};
use cirro_protocol::wire::message::RequestBody;
use cirro_protocol::wire::{Frame, Header, Kind, Message};
use pair::{GONE, NODE, Pair, Wire};

/// A pair whose session is open and quiet.
fn open_pair(seed: u64, wire: Wire) -> Pair {
    let mut pair = Pair::new(seed, wire);
    pair.submit(Op::Flush, 0, Vec::new());
    assert!(pair.run_until_idle(Nanos::from_secs(2)));
    pair.run_for(Nanos::from_millis(5));
    pair.done.clear();
    pair
}

/// The short frames of one direction since recording began.
fn frames(pair: &mut Pair, to_node: bool) -> Vec<Vec<u8>> {
    let all = pair.recorded.replace(Vec::new()).unwrap_or_default();
    let short = |(_, f): &(bool, Vec<u8>)| Header::is_long(&f[ETHERNET_BYTES..]) == Some(false);
    all.into_iter().filter(|f| f.0 == to_node && short(f)).map(|f| f.1).collect()
}

fn kinds(frame: &[u8]) -> Vec<Kind> {
    Frame::parse(frame).unwrap().messages().map(|m| m.message.kind).collect()
}

/// P-31: every short frame carries the steer and cid that its receiver chose.
#[test]
fn frames_name_their_receivers_worker_and_session() {
    let mut pair = open_pair(1, Wire::default());
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Write, 0, vec![1; 8192]);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    let cid = pair.node.targets[0].0.cid();
    for frame in frames(&mut pair, true) {
        let header = Frame::parse(&frame).unwrap().header;
        assert_eq!((header.steer, header.cid), (Steer::new(2, 0), cid));
    }
}

/// P-37 P-38: an idle end acks what asked for it within max_ack_delay, in a bare frame that itself asks for nothing.
#[test]
fn a_bare_ack_follows_the_last_answer_and_ends_the_talk() {
    let mut pair = open_pair(2, Wire::default());
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Read, 0, vec![0; 4096]);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    let done = pair.now;
    pair.run_for(Nanos::from_micros(60));
    let last = frames(&mut pair, true).pop().unwrap();
    assert!(Frame::parse(&last).unwrap().is_bare_ack() && !Frame::parse(&last).unwrap().asks_for_ack());
    let sent = pair.sent;
    pair.run_for(Nanos::from_secs(9));
    assert_eq!(pair.sent, sent, "silence from {done:?} until the idle PING");
}

/// P-40: the ack says how long it was held back, in 0.25 µs.
#[test]
fn an_ack_says_how_long_it_was_held() {
    let mut pair = open_pair(3, Wire::default());
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Read, 0, vec![0; 4096]);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    pair.run_for(Nanos::from_micros(60));
    let last = frames(&mut pair, true).pop().unwrap();
    // Held for the whole max_ack_delay of 50 µs: 200 units.
    assert_eq!(Frame::parse(&last).unwrap().header.ack_delay, 200);
}

/// P-41 P-43: a frame that the link refused leaves again under a new number, without a timeout.
#[test]
fn a_refused_frame_leaves_again_under_a_new_number() {
    let mut pair = open_pair(4, Wire::default());
    pair.submit(Op::Read, 0, vec![0; 4096]);
    let (mut head, mut payloads) = (Vec::new(), Vec::new());
    let refused = pair.initiator.poll_transmit(pair.now, &mut head, &mut payloads).unwrap();
    pair.initiator.not_sent(pair.now, refused.pn);
    let start = pair.now;
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    assert!(pair.now.since(start) < Nanos::from_micros(300), "took {:?}", pair.now.since(start));
    let stats = pair.initiator.stats();
    assert_eq!((stats.frames_refused, stats.messages_resent, stats.probe_timeouts), (1, 1, 0));
}

/// P-45: a lost tail is sent again with ACK_NOW after the probe timeout, which doubles up to 10 ms.
#[test]
fn a_lost_tail_is_probed_for_with_growing_patience() {
    let mut pair = open_pair(5, Wire::default());
    pair.cut = true;
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Read, 0, vec![0; 4096]);
    let (start, mut times) = (pair.now, Vec::new());
    while pair.now.since(start) < Nanos::from_millis(60) {
        let sent_at = pair.now;
        pair.step(start + Nanos::from_millis(60));
        let new: Vec<_> =
            frames(&mut pair, true).into_iter().filter(|f| kinds(f).contains(&Kind::Request)).collect();
        for frame in new {
            times.push((sent_at, Frame::parse(&frame).unwrap().header.flags & FLAG_ACK_NOW != 0));
        }
    }
    assert!(times.len() >= 6 && times[1..].iter().all(|t| t.1), "{times:?}");
    let gaps: Vec<u64> = times.windows(2).map(|w| w[1].0.since(w[0].0).as_micros()).collect();
    assert!(gaps.windows(2).all(|w| w[1] + 20 >= w[0]), "never shorter: {gaps:?}");
    assert!(gaps[0] < 1_000 && gaps.iter().all(|gap| *gap <= 10_100), "{gaps:?}");
}

/// P-46 P-47: silence is asked into after 100 ms; a node that answers nothing is dead after a second, not before.
#[test]
fn a_silent_node_is_pinged_and_dead_after_a_second() {
    let mut pair = open_pair(6, Wire::default());
    pair.submit(Op::Write, 0, vec![1; 4096]);
    pair.cut = true;
    pair.recorded = Some(Vec::new());
    let start = pair.now;
    pair.run_for(Nanos::from_millis(900));
    assert!(frames(&mut pair, true).iter().filter(|f| kinds(f) == [Kind::Ping]).count() >= 10);
    assert!(!pair.events.contains(&Event::Lost(LossCause::Dead)));
    pair.run_for(Nanos::from_millis(300));
    assert!(pair.events.contains(&Event::Lost(LossCause::Dead)), "after {:?}", pair.now.since(start));
}

/// P-48: the target gives up after 5 s of silence with frames unacked, and 60 s without. P-49: an idle session is kept alive by PINGs.
#[test]
fn a_target_frees_a_session_of_which_nothing_is_heard() {
    let mut pair = open_pair(7, Wire::default());
    pair.run_for(Nanos::from_secs(200));
    assert_eq!((pair.node.targets.len(), pair.initiator.stats().sessions), (1, 1), "idle, and alive");
    pair.node.store_delay = Nanos::from_millis(1);
    pair.submit(Op::Read, 0, vec![0; 4096]);
    pair.run_for(Nanos::from_micros(100));
    pair.cut = true;
    pair.run_for(Nanos::from_millis(4_900));
    assert_eq!(pair.node.targets.len(), 1);
    pair.run_for(Nanos::from_millis(300));
    assert!(pair.node.targets.iter().all(|(_, buffers)| buffers.contains_key(&GONE)));
}

/// P-52: requests without data are not held back by a window that is full.
#[test]
fn reads_leave_while_the_window_is_full_of_writes() {
    let mut pair = open_pair(8, Wire::default());
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Write, 0, vec![1; 1 << 20]);
    pair.submit(Op::Write, 1 << 20, vec![1; 1 << 20]);
    pair.step(pair.now + Nanos(1));
    let sent: usize = frames(&mut pair, true).iter().map(Vec::len).sum();
    assert!(sent < 300 << 10, "the window of 256 KiB holds {sent} bytes back");
    pair.submit(Op::Read, 4 << 20, vec![0; 4096]);
    pair.step(pair.now + Nanos(1));
    let sent = frames(&mut pair, true);
    assert!(sent.iter().any(|f| kinds(f).contains(&Kind::Request)));
}

/// P-53 P-54: writes wait for credit in the order of submission; reads and flushes do not wait for it.
#[test]
fn writes_never_use_more_credit_than_was_granted() {
    let mut pair = open_pair(9, Wire::default());
    pair.node.store_delay = Nanos::from_millis(2);
    // The pair's node grants 4096 sectors: two of these writes, not three.
    for i in 0..4u64 {
        pair.submit(Op::Write, i << 20, vec![1; 1 << 20]);
    }
    pair.submit(Op::Read, 5 << 20, vec![0; 512]);
    let end = pair.now + Nanos::from_secs(2);
    while !pair.guest.is_empty() && pair.now < end {
        pair.step(end);
        let writes = pair.node.running.iter().filter(|r| r.3 == Op::Write).count();
        assert!(writes <= 2, "{writes} MiB in the store");
        let held: usize = pair.node.targets[0].1.values().map(Vec::len).sum();
        assert!(held <= 2 << 20 | 512, "{held} bytes of buffers");
    }
    let order: Vec<Op> = pair.done.iter().map(|d| d.2.op).collect();
    assert_eq!(order[0], Op::Read, "a read does not wait for credit");
    assert_eq!(order.len(), 5);
}

/// P-62: a slot's next sequence number appears only after the answer to the last. P-64: a write runs when all its pieces are there.
#[test]
fn a_slot_is_used_again_only_after_its_answer() {
    let mut pair = open_pair(10, Wire { loss: 50, ..Wire::default() });
    pair.recorded = Some(Vec::new());
    for i in 0..200u64 {
        pair.submit(Op::Write, (i % 16) << 16, vec![i as u8; 20_000]);
        assert!(pair.run_until_idle(Nanos::from_secs(2)));
    }
    let mut last = std::collections::HashMap::new();
    for frame in frames(&mut pair, true) {
        for m in Frame::parse(&frame).unwrap().messages().filter(|m| m.message.kind == Kind::Request) {
            let before = last.insert(m.message.slot, m.message.sseq).unwrap_or(m.message.sseq);
            assert!(m.message.sseq.wrapping_sub(before) <= 1, "slot {}", m.message.slot.0);
        }
    }
    assert!(pair.done.iter().all(|d| d.1 == Status::Ok) && pair.node.runs == 201);
}

/// P-70: HELLO is tried every 20 ms at most while requests wait, and every 250 ms when none do.
#[test]
fn a_node_that_is_away_is_asked_at_the_pace_of_those_who_wait() {
    let mut pair = Pair::new(11, Wire::default());
    pair.cut = true;
    pair.run_for(Nanos::from_secs(10));
    let idle = pair.sent[1];
    pair.submit(Op::Flush, 0, Vec::new());
    pair.run_for(Nanos::from_secs(10));
    let busy = pair.sent[1] - idle;
    assert!((30..60).contains(&idle) && (450..520).contains(&busy), "{idle} idle, {busy} busy");
}

/// P-73: each HELLO has a higher session epoch than the one before.
#[test]
fn session_epochs_only_grow() {
    let mut pair = Pair::new(12, Wire::default());
    pair.recorded = Some(Vec::new());
    for _ in 0..4 {
        pair.submit(Op::Write, 0, vec![1; 512]);
        assert!(pair.run_until_idle(Nanos::from_secs(3)));
        pair.restart_node();
    }
    let recorded = pair.recorded.take().unwrap();
    let mut epochs: Vec<u64> = recorded
        .iter()
        .filter_map(|(_, f)| LongFrame::parse(f).ok())
        .filter_map(|f| if let Body::Hello(hello) = f.body { Some(hello.session_epoch) } else { None })
        .collect();
    assert!(epochs.is_sorted());
    epochs.dedup();
    assert!(epochs.len() >= 3 && epochs[0] == 1 << 32, "{epochs:?}");
}

/// P-74: a frame of the old session is not looked at once the new one is asked for.
#[test]
fn the_old_cid_is_dropped_before_anything_is_issued_again() {
    let mut pair = open_pair(13, Wire::default());
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Read, 0, vec![0; 4096]);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    let old = frames(&mut pair, false).pop().unwrap();
    let cid = Frame::parse(&old).unwrap().header.cid;
    assert!(pair.initiator.nonces_in(cid, NODE).is_some());
    pair.initiator.abandon(pair.now);
    assert!(pair.initiator.nonces_in(cid, NODE).is_none());
    assert!(pair.initiator.nonces_in(cid, MacAddress([9; 6])).is_none(), "P-23: nor from another address");
}

/// P-77: only a RESET_HINT with the session's token ends it.
#[test]
fn a_reset_hint_without_the_token_is_nothing() {
    let mut pair = open_pair(14, Wire::default());
    let target = &pair.node.targets[0].0;
    let (cid, token) = (target.cid(), target.hello_reply().token);
    for (cid, token, ends) in [(cid, token ^ 1, false), (Cid(cid.0 ^ 1), token, false), (cid, token, true)] {
        let hint = Body::ResetHint(ResetHint { cid, token, incarnation: Uuid([5; 16]) });
        let frame = LongFrame::new(NODE, MacAddress::BROADCAST, Steer(0), hint);
        assert_eq!(pair.initiator.handle_long(pair.now, &frame), ends);
    }
}

/// P-78: CLOSE ends the session at its receiver; requests go on in the next.
#[test]
fn a_close_makes_a_new_session_and_loses_nothing() {
    let mut pair = open_pair(15, Wire::default());
    pair.node.store_delay = Nanos::from_millis(1);
    pair.submit(Op::Write, 0, vec![7; 4096]);
    pair.run_for(Nanos::from_micros(200));
    pair.node.targets[0].0.close(cirro_protocol::wire::body::CloseReason::Restart);
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    assert!(pair.events.iter().any(|e| matches!(e, Event::Lost(LossCause::Closed(_)))));
    assert_eq!((pair.initiator.stats().sessions, pair.node.volume[0]), (2, 7));
}

/// P-17 P-18 P-58: messages whose pieces do not fit their request are ignored as a whole, whoever made them.
#[test]
fn a_piece_off_the_grid_changes_nothing() {
    let mut pair = open_pair(16, Wire::default());
    pair.recorded = Some(Vec::new());
    pair.submit(Op::Write, 0, vec![7; 20_000]);
    pair.cut = true;
    pair.step(pair.now + Nanos(1));
    let honest = frames(&mut pair, true);
    // frag_off of the first message: 14 + 34 + 4. The sums of this harness cover it, so the tag is made anew by sending through the core
    // only; here the parsed frame goes in directly, as one whose tag was right.
    let target = &mut pair.node.targets[0].0;
    let mut bad = honest[1].clone();
    bad[52..56].copy_from_slice(&1u32.to_le_bytes());
    let mut placements = Vec::new();
    target.handle_frame(Instant(1), Instant(1), &Frame::parse(&bad).unwrap(), &mut placements);
    assert!(placements.is_empty());
    assert_eq!(target.stats().violations, 1);
}

/// P-39 P-42: when one turn takes in more frames than the bitmap says, the ranges in the same frame keep the rest from counting as lost.
#[test]
fn frames_that_only_the_ranges_name_are_not_taken_for_lost() {
    let mut pair = open_pair(17, Wire { mtu: 1500, ..Wire::default() });
    // The answer of 768 pieces reaches a backend that looks at nothing for a while.
    pair.submit(Op::Read, 0, vec![0; 256 << 10]);
    pair.run_for(Nanos::from_micros(1));
    pair.hold_backend = true;
    pair.run_for(Nanos::from_micros(250));
    pair.hold_backend = false;
    assert!(pair.run_until_idle(Nanos::from_secs(1)));
    let node = pair.node.targets[0].0.stats();
    assert_eq!((node.frames_lost, pair.initiator.stats().duplicate_messages), (0, 0), "{node:?}");
}

/// P-83: a driver that starts again while the volume is being released waits for the new OPEN; nothing is issued under the epoch that ends.
#[test]
fn nothing_is_issued_while_a_release_is_on_its_way() {
    let mut pair = open_pair(18, Wire::default());
    pair.node.hold_release = true;
    pair.initiator.set_access(Access::ReadOnly);
    pair.run_for(Nanos::from_millis(1));
    pair.initiator.set_access(Access::ReadWrite);
    let runs = pair.node.runs;
    pair.submit(Op::Write, 0, vec![1; 4096]);
    pair.run_for(Nanos::from_millis(20));
    assert_eq!(pair.node.runs, runs, "the write waits for the end of the RELEASE");
    pair.node.targets[0].0.complete(CONTROL_SLOT, Status::Ok);
    assert!(pair.run_until_idle(Nanos::from_millis(50)));
    assert_eq!((pair.node.runs, pair.done[0].1), (runs + 1, Status::Ok));
}

/// P-05: a packet number from which sums would wrap is no frame.
#[test]
fn a_packet_number_near_the_end_of_the_range_is_refused() {
    for (pn, legal) in [(1, true), (1 << 62, true), ((1 << 62) + 1, false), (u64::MAX, false)] {
        let mut head = vec![0; ETHERNET_BYTES];
        Header { pn, ..Header::default() }.emit(&mut head);
        Message::bare(Kind::Pad).emit(&mut head);
        head.extend_from_slice(&[0; 4]);
        assert_eq!(Frame::parse(&head).is_ok(), legal, "pn {pn}");
    }
}

/// A frame as a peer could send it, straight into the core: seals are checked before it.
fn frame_of(pn: u64, ack_pn: u32, ack_bits: u64, messages: &[Message]) -> Vec<u8> {
    let mut head = vec![0; ETHERNET_BYTES];
    Header { pn, ack_pn, ack_bits, ..Header::default() }.emit(&mut head);
    messages.iter().for_each(|message| message.emit(&mut head));
    head.extend_from_slice(&[0; 4]);
    head
}

/// P-63: a slot that is used again before its answer was sent gives the old answer up; it is not sent twice, nor past its end.
#[test]
fn a_slot_used_again_early_sends_only_its_last_answer() {
    let mut pair = open_pair(19, Wire::default());
    let (target, now) = (&mut pair.node.targets[0].0, pair.now);
    let read = |slot, sseq, mlen| Message {
        slot: Slot(slot),
        sseq,
        code: Op::Read as u8,
        mlen,
        request: Some(RequestBody::default()),
        ..Message::bare(Kind::Request)
    };
    let (mut head, mut payloads, mut placements) = (Vec::new(), Vec::new(), Vec::new());
    let mut pn = 1_000;
    // The answer to the first read fills the window; those of slot 8 wait behind it.
    for message in [read(9, 1, 1 << 20), read(8, 1, 5_000), read(8, 2, 5_000)] {
        pn += 1;
        let bytes = frame_of(pn, 0, 0, &[message]);
        target.handle_frame(now, now, &Frame::parse(&bytes).unwrap(), &mut placements);
        while target.poll_event().is_some() {}
        target.complete(message.slot, Status::Ok);
        loop {
            head.clear();
            payloads.clear();
            let Some(_) = target.poll_transmit(now, &mut head, &mut payloads) else { break };
        }
    }
    let (mut sent, mut largest) = (Vec::new(), 200);
    for _ in 0..200 {
        pn += 1;
        let bytes = frame_of(pn, largest, u64::MAX, &[Message::bare(Kind::Pad)]);
        target.handle_frame(now, now, &Frame::parse(&bytes).unwrap(), &mut placements);
        head.clear();
        payloads.clear();
        if let Some(transmit) = target.poll_transmit(now, &mut head, &mut payloads) {
            largest = transmit.pn as u32;
            sent.extend(payloads.iter().filter(|p| p.slot == Slot(8)).map(|p| (p.offset, p.len)));
        } else {
            largest = largest.saturating_sub(1).max(1);
        }
    }
    assert_eq!(sent, [(0, 5_000)]);
}
