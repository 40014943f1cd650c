//! `--on-trouble`: requests wait for a volume that is not open, or fail after a time. The same rig as in `worker`.

mod rig;

use cirro_backend::mailbox::{Answer, Change};
use cirro_backend::trouble::OnTrouble;
use cirro_protocol::op::Op;
use cirro_protocol::time::Nanos;
use rig::bench::Rig;
use rig::guest::{DATA, Ring, pattern};

/// A disk whose requests fail after so long.
fn impatient(patience: Nanos) -> (Rig, Ring) {
    let (mut rig, ring) = Rig::ready(9000);
    rig.on_trouble = OnTrouble::EioAfter(patience);
    rig.kill();
    rig.reconnect(&ring);
    rig.run_until("attached", |rig| rig.attach.get().is_some());
    (rig, ring)
}

fn report(rig: &mut Rig) -> Box<cirro_backend::stats::SessionReport> {
    let Answer::Session(report) = rig.ask(Change::Report) else { panic!("a report was asked for") };
    report
}

#[test]
fn what_waits_too_long_fails_and_what_comes_then_fails_at_once() {
    let (mut rig, mut ring) = impatient(Nanos::from_secs(5));
    assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0);
    rig.node.silent = true;
    let lost_at = rig.now;
    ring.write(DATA, &pattern(1, 4096));
    let heads = [ring.add(1, 0, DATA, 4096), ring.add(0, 8, DATA + 8192, 4096), ring.add(4, 0, 0, 0)];
    rig.run(Nanos::from_secs(5));
    assert!(ring.used().is_empty(), "the silence must first be noticed, and then last");
    let failed = rig.wait_for(&mut ring, 3);
    assert!(failed.iter().all(|used| used.status == 1 && heads.contains(&used.head)), "{failed:?}");
    assert!(rig.now.since(lost_at) < Nanos::from_secs(8));
    assert!(report(&mut rig).failing);
    let before = rig.now;
    for (kind, len) in [(0, 512), (1, 512), (4, 0)] {
        assert_eq!(rig.one(&mut ring, (kind, 0), DATA, len).status, 1);
    }
    assert!(rig.now.since(before) < Nanos::from_millis(1), "at once");
    assert_eq!(rig.one(&mut ring, (8, 0), DATA, 20).status, 0, "GET_ID needs no node");
    rig.node.silent = false;
    rig.run(Nanos::from_millis(600));
    assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0, "served again");
    assert!(!report(&mut rig).failing);
}

/// What failed is not issued by a later session.
#[test]
fn a_write_that_failed_is_not_issued_afterwards() {
    let (mut rig, mut ring) = impatient(Nanos::from_secs(2));
    rig.node.silent = true;
    ring.write(DATA, &pattern(1, 4096));
    ring.add(1, 0, DATA, 4096);
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 1);
    rig.node.silent = false;
    rig.node.runs.clear();
    rig.run(Nanos::from_secs(1));
    assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0);
    assert!(rig.node.runs.iter().all(|run| run.0 != Op::Write), "{:?}", rig.node.runs);
}

/// P-89: what was answered before is written again all the same; what failed is not in the copy.
#[test]
fn the_copy_outlasts_the_failure() {
    let (mut rig, mut ring) = impatient(Nanos::from_secs(2));
    ring.write(DATA, &pattern(1, 4096));
    assert_eq!(rig.one(&mut ring, (1, 0), DATA, 4096).status, 0);
    rig.node.silent = true;
    ring.write(DATA + 8192, &pattern(2, 4096));
    ring.add(1, 64, DATA + 8192, 4096);
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 1);
    assert_eq!(
        rig.one(&mut ring, (0, 0), DATA, 512).status,
        1,
        "what comes then fails too, though something is kept"
    );
    rig.node.restart(true);
    rig.node.silent = false;
    rig.run(Nanos::from_secs(1));
    assert_eq!(rig.one(&mut ring, (0, 0), DATA, 512).status, 0);
    assert!(rig.node.image[..4096] == pattern(1, 4096) && rig.node.image[64 * 512..][..4096] == [0; 4096]);
}

#[test]
fn a_short_break_is_waited_out_and_does_not_count_for_the_next() {
    let (mut rig, mut ring) = impatient(Nanos::from_secs(4));
    for _ in 0..3 {
        rig.node.silent = true;
        ring.add(0, 0, DATA, 512);
        rig.run(Nanos::from_secs(4));
        rig.node.silent = false;
        assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
    }
}

#[test]
fn who_waits_waits_for_minutes() {
    let (mut rig, mut ring) = Rig::ready(9000);
    rig.node.silent = true;
    ring.add(0, 0, DATA, 512);
    rig.run(Nanos::from_secs(90));
    assert!(ring.used().is_empty());
    rig.node.silent = false;
    assert_eq!(rig.wait_for(&mut ring, 1)[0].status, 0);
}
