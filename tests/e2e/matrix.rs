//! The matrix: every pair of request size, depth, number of queues and MTU, each without loss, at 1 % and at 5 % in both directions.
//!
//! One test per MTU, for an interface's MTU is read when a daemon starts.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use cirro_ctl::report::{Link, Session};
use cirro_tests::daemons::Daemon;
use cirro_tests::frontend::Outcome;
use cirro_tests::loss;
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{DISK_BYTES, Rig, judge, must};

const SIZES: [usize; 5] = [512, 4096, 20 << 10, 128 << 10, 1 << 20];
const DEPTHS: [usize; 4] = [1, 8, 32, 128];
const QUEUES: [usize; 2] = [1, 4];
const MTUS: [u32; 3] = [1500, 9000, 65535];

/// How long each run of a case lasts.
const RUN: Duration = Duration::from_millis(250);
/// Runs of each kind in a case: the worst of few runs says little where a run holds few turns of all that is in flight.
const PAIRS: usize = 2;
const PAIRS_DEEP: usize = 8;
/// Bytes in flight from which a case is deep: a turn of them takes more than a third of a run.
const DEEP: usize = 16 << 20;
/// What a case may take, all its runs and a look at the whole disk. Printed beside what it took.
const CASE_MAX: Duration = Duration::from_secs(20);
/// How much longer the worst request may take at 1 % loss.
const LOSS_COST_MAX: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    size: usize,
    depth: usize,
    queues: usize,
    mtu: u32,
}

impl Case {
    /// Runs without loss, and as many at 1 %.
    fn pairs(&self) -> usize {
        if self.size * self.depth * self.queues >= DEEP { PAIRS_DEEP } else { PAIRS }
    }
}

/// Size and depth in full, queues and MTU turning with both: 20 cases. Four queues only where that leaves less than [`DEEP`] in flight: beyond
/// it the worst of a run is how long the machine takes for all of it, with loss or without.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (row, size) in SIZES.into_iter().enumerate() {
        for (column, depth) in DEPTHS.into_iter().enumerate() {
            let turn = row + column;
            let queues = if size * depth * 4 < DEEP { QUEUES[(turn + 1) % 2] } else { QUEUES[0] };
            cases.push(Case { size, depth, queues, mtu: MTUS[turn % 3] });
        }
    }
    cases
}

#[test]
fn the_matrix_has_every_pair() {
    type Column = fn(&Case) -> usize;
    let columns: [(Column, usize); 4] = [
        (|case| case.size, SIZES.len()),
        (|case| case.depth, DEPTHS.len()),
        (|case| case.queues, QUEUES.len()),
        (|case| case.mtu as usize, MTUS.len()),
    ];
    for (index, (one, ones)) in columns.iter().enumerate() {
        for (other, others) in &columns[index + 1..] {
            let pairs: BTreeSet<_> = cases().iter().map(|case| (one(case), other(case))).collect();
            assert_eq!(pairs.len(), ones * others);
        }
    }
    assert!(cases().iter().all(|case| (case.size * case.depth * case.queues) as u64 <= DISK_BYTES / 2));
}

/// Merges two runs of one kind.
fn add(sum: &mut Option<Outcome>, run: Outcome) {
    match sum {
        None => *sum = Some(run),
        Some(sum) => {
            sum.requests += run.requests;
            sum.elapsed += run.elapsed;
            sum.latency.add(&run.latency).expect("equal bounds");
        }
    }
}

/// What both ends lost since they started, and why.
fn losses(rig: &Rig) -> String {
    let node = rig.node.node_report();
    let ring =
        |links: &[Link]| links.iter().filter_map(|link| link.counters.as_ref()).map(|c| c.ring_drops).sum();
    let rings: [u64; 2] = [ring(&rig.backend.backend_report().links), ring(&node.links)];
    let session = |session: Option<&Session>| {
        let c = session.and_then(|session| session.counters.clone()).unwrap_or_default();
        format!(
            "{} sent, {} lost, {} of them wrongly, {} probes, {} refused by the link, \
             {} messages came twice",
            c.frames_sent,
            c.frames_lost,
            c.spurious_losses,
            c.probe_timeouts,
            c.frames_refused,
            c.duplicate_messages
        )
    };
    let (backend, node) = (session(Some(&rig.session())), session(node.sessions.first()));
    let dropped = |daemon: &Daemon| -> Vec<_> { daemon.workers().into_iter().map(|c| c.dropped).collect() };
    let (by_backend, by_node) = (dropped(&rig.backend), dropped(&rig.node));
    format!(
        "backend: {backend}; ring dropped {}, worker {by_backend:?}\n  and node: {node}; ring dropped {}, worker {by_node:?}",
        rings[0], rings[1]
    )
}

/// Runs without loss and at 1 %, taking turns, then one at 5 %, then a look at every sector. Gives a complaint about the worst request.
fn run(rig: &Rig, verifier: &mut Verifier, case: Case) -> Option<String> {
    let start = Instant::now();
    let mut front_end = rig.connect(case.queues, case.depth, case.size.max(128 << 10));
    let mut sums: [Option<Outcome>; 3] = [None, None, None];
    let pairs = [(0, 0), (1, 10)].repeat(case.pairs());
    for (kind, per_mille) in pairs.into_iter().chain([(2, 50)]) {
        loss::set_both(rig.lab.machines(), per_mille);
        let outcome = judge(verifier, &mut front_end, Size::Fixed(case.size), Mix::ReadWrite, RUN);
        add(&mut sums[kind], outcome);
    }
    loss::set_both(rig.lab.machines(), 0);
    must(verifier.check_all(&mut front_end));
    let took = start.elapsed();
    println!("{case:?}: {:.1} s of {} s", took.as_secs_f64(), CASE_MAX.as_secs());
    let [free, one, five] = sums.map(|sum| sum.expect("each kind ran"));
    for (name, outcome) in [("no loss", &free), ("1 % loss", &one), ("5 % loss", &five)] {
        println!("  {name:<8} {}\n{}", outcome.line(), outcome.histogram_lines().trim_end());
    }
    println!("  so far: {}", losses(rig));
    assert!(took < CASE_MAX, "{case:?} took {took:?}");
    if one.worst() > free.worst() + LOSS_COST_MAX {
        return Some(format!("{case:?}: worst {:?} at 1 % loss, {:?} without", one.worst(), free.worst()));
    }
    None
}

fn run_all(mtu: u32) {
    let rig = Rig::new(mtu);
    let mut verifier = Verifier::new(DISK_BYTES, mtu);
    let mine = cases().into_iter().filter(|case| case.mtu == mtu);
    let complaints: Vec<String> = mine.filter_map(|case| run(&rig, &mut verifier, case)).collect();
    assert_eq!(rig.disk().counters.expect("stats were asked for").reconnects, 0, "loss broke the session");
    let path = rig.scratch.path("disk.img");
    rig.stop_keeping(|| verifier.check_image(&std::fs::read(&path).unwrap()).unwrap());
    assert!(
        complaints.is_empty(),
        "more than {LOSS_COST_MAX:?} above the loss-free worst:\n{}",
        complaints.join("\n")
    );
}

#[test]
fn what_is_written_is_read_at_mtu_1500() {
    run_all(1500);
}

#[test]
fn what_is_written_is_read_at_mtu_9000() {
    run_all(9000);
}

#[test]
fn what_is_written_is_read_at_mtu_65535() {
    run_all(65535);
}

#[test]
fn every_operation_at_any_size_is_served() {
    let rig = Rig::new(9000);
    let mut verifier = Verifier::new(DISK_BYTES, 3);
    let mut front_end = rig.connect(4, 16, 1 << 20);
    assert_eq!(front_end.capacity(), DISK_BYTES);
    assert!(front_end.discard_bytes_max() >= 1 << 20, "discard of {} bytes", front_end.discard_bytes_max());
    assert!(front_end.zeroes_bytes_max() >= 1 << 20, "zeroes of {} bytes", front_end.zeroes_bytes_max());
    for per_mille in [0, 10, 50] {
        loss::set_both(rig.lab.machines(), per_mille);
        let time = Duration::from_secs(1);
        let outcome = judge(&mut verifier, &mut front_end, Size::UpTo(1 << 20), Mix::Everything, time);
        println!("{per_mille:>3} ‰ loss {}", outcome.line());
    }
    must(verifier.check_all(&mut front_end));
    drop(front_end);
    rig.stop();
}
