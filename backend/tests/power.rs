//! The node's machine loses power under a running guest: what was answered and not flushed is written again before anything else.
//!
//! The same rig as in `worker`; the node's image falls back to what its last flush made stable.

mod rig;

use cirro_backend::mailbox::{Answer, Change};
use cirro_protocol::op::{Op, Status};
use cirro_protocol::time::Nanos;
use cirro_protocol::wire::body::VOLUME_READ_ONLY;
use rig::bench::{DISK, MIB, Rig};
use rig::guest::{DATA, Ring, pattern};

const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const KIB4: usize = 4096;

/// Writes `len` bytes of a pattern, to its end.
fn write(rig: &mut Rig, ring: &mut Ring, sector: u64, seed: u64, len: usize) {
    ring.write(DATA, &pattern(seed, len));
    assert_eq!(rig.one(ring, (WRITE, sector), DATA, len).status, 0, "write at {sector}");
}

fn holds(rig: &Rig, sector: u64, seed: u64, len: usize) -> bool {
    let at = sector as usize * 512;
    rig.node.image[at..at + len] == pattern(seed, len)
}

/// A read makes sure that the session is there again.
fn come_back(rig: &mut Rig, ring: &mut Ring) {
    assert_eq!(rig.one(ring, (0, 8 * 2048), DATA, 512).status, 0, "the disk comes back");
}

/// P-89
#[test]
fn what_was_answered_is_there_after_the_node_lost_power_flushed_or_not() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    assert_eq!(rig.one(&mut ring, (FLUSH, 0), 0, 0).status, 0);
    write(&mut rig, &mut ring, 8, 2, KIB4);
    write(&mut rig, &mut ring, 8, 3, KIB4);
    write(&mut rig, &mut ring, 4096, 4, MIB + 512);
    let zeroes = [16u64.to_le_bytes(), 8u64.to_le_bytes()].concat();
    rig.node.durable[16 * 512..24 * 512].fill(9);
    rig.node.image[16 * 512..24 * 512].fill(9);
    ring.write(DATA, &zeroes);
    assert_eq!(rig.one(&mut ring, (13, 0), DATA, 16).status, 0);
    rig.node.restart(true);
    assert!(!holds(&rig, 8, 3, KIB4) && holds(&rig, 0, 1, KIB4), "the node lost what was not flushed");
    come_back(&mut rig, &mut ring);
    assert!(holds(&rig, 0, 1, KIB4) && holds(&rig, 8, 3, KIB4) && holds(&rig, 4096, 4, MIB + 512));
    assert!(rig.node.image[16 * 512..24 * 512].iter().all(|byte| *byte == 0));
}

/// P-89: before anything else of the disk, reads too.
#[test]
fn nothing_is_issued_before_all_was_written_again() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    write(&mut rig, &mut ring, 8, 2, KIB4);
    rig.node.restart(true);
    rig.node.runs.clear();
    ring.add(0, 0, DATA, 512);
    ring.add(FLUSH, 0, 0, 0);
    assert!(rig.wait_for(&mut ring, 2).iter().all(|used| used.status == 0));
    let ops: Vec<Op> = rig.node.runs.iter().map(|run| run.0).filter(|op| *op != Op::Release).collect();
    assert_eq!(ops[..2], [Op::Write, Op::Write]);
    assert!(ops[2..].contains(&Op::Read) && ops[2..].contains(&Op::Flush));
    assert!(rig.node.durable[..KIB4] == pattern(1, KIB4), "and the flush covers it");
}

#[test]
fn the_same_start_of_the_node_gets_nothing_again() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    rig.node.runs.clear();
    rig.node.silent = true;
    ring.add(0, 0, DATA, 512);
    rig.run(Nanos::from_secs(3));
    rig.node.silent = false;
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert!(rig.node.runs.iter().all(|run| run.0 != Op::Write), "{:?}", rig.node.runs);
}

/// P-89, P-86: a write whose flush was under way is no more than written; the flush at another start says nothing of it.
#[test]
fn a_write_that_waits_for_its_flush_begins_again() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.ask(Change::WriteThrough(true));
    rig.node.hold_back = Some(Op::Flush);
    ring.write(DATA, &pattern(1, KIB4));
    ring.add(WRITE, 0, DATA, KIB4 as u32);
    rig.run(Nanos::from_millis(2));
    assert!(holds(&rig, 0, 1, KIB4) && ring.used().is_empty());
    rig.node.restart(true);
    rig.node.hold_back = None;
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert!(rig.node.durable[..KIB4] == pattern(1, KIB4));
}

/// P-89: one slot of a request was answered when the node lost it.
#[test]
fn a_write_of_which_a_part_was_answered_is_there_as_a_whole() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.hold_at = Some(MIB as u64);
    ring.write(DATA, &pattern(1, 2 * MIB));
    ring.add(WRITE, 0, DATA, 2 * MIB as u32);
    rig.run(Nanos::from_millis(20));
    assert!(holds(&rig, 0, 1, KIB4) && ring.used().is_empty());
    rig.node.restart(true);
    rig.node.hold_at = None;
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    assert!(holds(&rig, 0, 1, 2 * MIB));
}

/// P-89: in the order in which the node did them, not in that in which requests ended.
#[test]
fn a_write_that_ends_late_does_not_cover_one_that_came_after_its_part() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.hold_at = Some(MIB as u64);
    ring.write(DATA, &pattern(1, 2 * MIB));
    ring.add(WRITE, 0, DATA, 2 * MIB as u32);
    rig.run(Nanos::from_millis(20));
    ring.write(DATA + 3 * MIB as u64, &pattern(2, KIB4));
    ring.add(WRITE, 0, DATA + 3 * MIB as u64, KIB4 as u32);
    assert_eq!(rig.wait_for(&mut ring, 1).len(), 1, "the later one ends first");
    rig.node.hold_at = None;
    assert_eq!(rig.wait_for(&mut ring, 1).len(), 1);
    assert!(holds(&rig, 0, 2, KIB4), "as the guest can read it");
    rig.node.restart(true);
    come_back(&mut rig, &mut ring);
    assert!(holds(&rig, 0, 2, KIB4), "and as it stays");
}

/// P-89: a killed backend and a node without power, at the same time.
#[test]
fn the_copy_outlives_the_backend() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    rig.kill();
    rig.node.restart(true);
    rig.reconnect(&ring);
    come_back(&mut rig, &mut ring);
    assert!(holds(&rig, 0, 1, KIB4));
}

/// P-81, P-89: what somebody else may have written is not overwritten, by the copy or by the guest, until the driver starts anew.
#[test]
fn a_volume_that_others_had_meanwhile_gets_nothing_again() {
    for killed in [false, true] {
        let (mut rig, mut ring) = Rig::ready(9000);
        write(&mut rig, &mut ring, 0, 1, KIB4);
        if killed {
            rig.kill();
        }
        rig.node.restart(true);
        rig.node.info.vol_epoch += 2;
        rig.node.runs.clear();
        if killed {
            rig.reconnect(&ring);
        }
        ring.add(WRITE, 64, DATA, KIB4 as u32);
        assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 1, "killed {killed}");
        assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 1, "nor does it read on");
        assert!(rig.node.runs.iter().all(|run| run.0 != Op::Write), "{:?}", rig.node.runs);
        let stopped = rig.mailbox.send(DISK, Change::Stop { ring: 0 });
        rig.run(Nanos::from_millis(20));
        assert!(matches!(stopped.wait(), Some(Answer::Stopped { unfinished: 0, .. })));
        let (mut fresh, _signals) = rig.start(1, true);
        rig.run(Nanos::from_millis(20));
        assert_eq!(rig.one(&mut fresh, (0, 0), DATA, 512).status, 0, "a driver that starts anew may ask");
    }
}

/// P-89: until everything was written again nothing of the guest's is issued: it would read what it has long overwritten.
#[test]
fn a_node_that_does_not_take_it_back_is_asked_again_until_it_does() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    rig.node.restart(true);
    rig.node.fail = Some(Status::NoSpace);
    rig.node.runs.clear();
    ring.add(FLUSH, 0, 0, 0);
    ring.add(0, 0, DATA, KIB4 as u32);
    rig.run(Nanos::from_millis(3_500));
    assert!(ring.used().is_empty());
    let tries = rig.node.runs.iter().filter(|run| run.0 == Op::Write).count();
    assert!((3..=5).contains(&tries), "{tries} tries in 3.5 s");
    assert!(rig.node.runs.iter().all(|run| run.0 != Op::Read && run.0 != Op::Flush));
    rig.node.fail = None;
    assert!(rig.wait_for(&mut ring, 2).iter().all(|used| used.status == 0));
    assert!(ring.read(DATA, KIB4) == pattern(1, KIB4) && rig.node.durable[..KIB4] == pattern(1, KIB4));
}

/// A disk that can only be read now has nothing to write again, and does not wait for it.
#[test]
fn what_is_kept_does_not_hold_up_a_disk_that_became_read_only() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    rig.kill();
    rig.node.restart(false);
    rig.node.info.flags |= VOLUME_READ_ONLY;
    rig.reconnect(&ring);
    come_back(&mut rig, &mut ring);
}

/// P-89: a copy that is half full makes the disk flush, and one that is full makes changes wait for a flush; none fails, and none is lost.
#[test]
fn a_full_copy_makes_changes_wait_for_a_flush() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.runs.clear();
    rig.node.hold_back = Some(Op::Flush);
    let mut done = 0;
    for number in 0..8 {
        ring.write(DATA, &pattern(number, MIB / 2));
        ring.add(WRITE, number * 1024, DATA, MIB as u32 / 2);
        rig.run(Nanos::from_millis(20));
        done += ring.used().len();
    }
    assert!((2..8).contains(&done), "{done} of 8 found room");
    assert_eq!(rig.node.runs.iter().filter(|run| run.0 == Op::Write).count(), 8, "all were written");
    rig.node.hold_back = None;
    let rest = rig.wait_for(&mut ring, 8 - done);
    assert!(rest.iter().all(|used| used.status == 0));
    rig.node.restart(true);
    come_back(&mut rig, &mut ring);
    assert!((0..8).all(|number| holds(&rig, number * 1024, number, MIB / 2)));
}

/// P-83, P-89: the volume is given back after a flush, so who stops cleanly leaves nothing behind.
#[test]
fn a_clean_stop_flushes() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    rig.node.runs.clear();
    let stopped = rig.mailbox.send(DISK, Change::Stop { ring: 0 });
    rig.run(Nanos::from_millis(20));
    assert!(matches!(stopped.wait(), Some(Answer::Stopped { unfinished: 0, .. })));
    let ops: Vec<Op> = rig.node.runs.iter().map(|run| run.0).collect();
    assert_eq!(ops, [Op::Flush, Op::Release]);
}

/// P-70: somebody waits, so the node is asked every 20 ms and not every 250.
#[test]
fn a_node_that_comes_back_is_found_soon() {
    let (mut rig, mut ring) = Rig::ready(9000);
    write(&mut rig, &mut ring, 0, 1, KIB4);
    for pause in 0..8 {
        rig.node.silent = true;
        ring.add(0, 0, DATA, 512);
        rig.run(Nanos::from_millis(4000 + 37 * pause));
        rig.node.silent = false;
        rig.node.restart(false);
        let back = rig.now;
        assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
        let took = rig.now.since(back);
        assert!(took < Nanos::from_millis(100), "{} ms after it was up", took.0 / 1_000_000);
    }
}
