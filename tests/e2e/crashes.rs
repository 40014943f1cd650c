//! A node that is killed again and again under a guest that works on, and a VMM that takes its memory away.
//!
//! A killed backend needs a VMM that connects again, which the front-end here cannot: `qemu/crash-test.sh` kills that one.

use std::time::{Duration, Instant};

use cirro_tests::daemons::Launch;
use cirro_tests::frontend::{Op, Shape};
use cirro_tests::load::Load;
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{DISK_BYTES, Rig, connect, judge, must, start_node, volume};

const SHAPE: Shape = Shape { queues: 2, depth: 16, bytes_max: 128 << 10, poll: false };
/// How often the node is killed.
const KILLS: usize = 20;
/// How long the guest works between a start of the node and the next kill.
const WORK: Duration = Duration::from_millis(250);
/// The longest that the guest may wait once the node says that it is ready.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// What a node says when it serves.
const READY: &str = " is ready on ";

#[test]
fn a_node_restarted_under_load_is_a_pause_of_less_than_100_ms_once_it_is_up() {
    let mut rig = Rig::new(9000);
    let mut verifier = Verifier::new(DISK_BYTES, 31);
    let (lab, scratch) = (&rig.lab, &rig.scratch);
    let (node, ready, outcome) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut front_end = connect(scratch, "backend", SHAPE);
            // A start takes about 20 ms; a machine that is busy with more than this may take ten times that.
            let time = (WORK + Duration::from_millis(150)) * KILLS as u32;
            let outcome = judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, time);
            must(verifier.check_all(&mut front_end));
            outcome
        });
        let mut ready: Vec<Instant> = Vec::new();
        let mut node = rig.node;
        while ready.len() < KILLS {
            std::thread::sleep(WORK);
            node.kill();
            node = start_node(lab, scratch);
            ready.push(node.said_at(READY));
        }
        (node, ready, guest.join().expect("the disk is right"))
    });
    rig.node = node;
    let mut pauses: Vec<Duration> = ready.iter().map(|ready| outcome.pause_after(*ready)).collect();
    pauses.sort_unstable();
    println!("pauses of the guest after the node is up: {pauses:?}\n{}", outcome.line());
    println!("median {:?}, worst {:?} of {KILLS}", pauses[KILLS / 2], pauses[KILLS - 1]);
    let seen = outcome.pauses.iter().filter(|pause| pause.to - pause.from > Duration::from_millis(8)).count();
    assert!(seen >= KILLS, "the guest noticed {seen} of {KILLS} kills: it was not at work");
    assert!(pauses[KILLS - 1] < PAUSE_MAX, "the guest waited {:?} for a node that was up", pauses[KILLS - 1]);
    rig.stop();
}

#[test]
fn a_vmm_that_shrinks_its_memory_file_does_not_take_other_disks_down() {
    let rig = Rig::new(9000);
    let volumes = ["gone", "stays"].map(|name| volume(name, &rig.scratch.volume(name, 64 << 20)));
    let second = Launch::new("second").node(rig.lab.store(), &rig.scratch, &volumes);
    let backend = Launch::new("two").backends(rig.lab.host(), &rig.scratch, &[("gone", ""), ("stays", "")]);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut verifier = Verifier::new(64 << 20, 32);
            let mut front_end = connect(&rig.scratch, "stays", SHAPE);
            let time = Duration::from_secs(3);
            let outcome = judge(&mut verifier, &mut front_end, Size::Fixed(4096), Mix::ReadWrite, time);
            must(verifier.check_all(&mut front_end));
            outcome
        });
        for op in [Op::Write, Op::Read] {
            let mut front_end = connect(&rig.scratch, "gone", SHAPE);
            front_end.set_patience(Duration::from_millis(500));
            let mut load = Load::random(op, 64 << 10, 64 << 20);
            must(front_end.run(&mut load, Duration::from_millis(200)));
            front_end.shrink_memory();
            // Whatever becomes of these requests is the VMM's own fault; it is the neighbour that is judged.
            match front_end.run(&mut load, Duration::from_millis(200)) {
                Ok(outcome) => println!("{op:?} without memory {}", outcome.line()),
                Err(failure) => println!("{op:?} without memory: {failure}"),
            }
        }
        println!("the other disk {}", other.join().expect("the other disk is right").line());
    });
    backend.stop();
    second.stop();
    rig.stop();
}
