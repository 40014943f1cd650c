//! Several daemons, several sessions, one wire: that they do not disturb each other, and what they cost each other.

use std::time::Duration;

use cirro_tests::daemons::{Daemon, Launch, Scratch};
use cirro_tests::frontend::{Op, Shape};
use cirro_tests::load::{Load, median};
use cirro_tests::loss;
use cirro_tests::netns::Lab;
use cirro_tests::verify::{Mix, Size, Verifier};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::rig::{DISK_BYTES, connect, disk, judge, must, volume};

const SMALL_BYTES: u64 = 64 << 20;
const SHAPE: Shape = Shape { queues: 1, depth: 8, bytes_max: 128 << 10, poll: false };
/// Runs of each kind whose median counts.
const ROUNDS: usize = 5;
/// How often a frame's cost is measured, alone and beside others in turn.
const COST_ROUNDS: usize = 15;
/// Idle sessions beside the busy one.
const IDLE: usize = 64;

#[test]
fn two_nodes_and_several_backends_share_one_interface() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let paths = ["a", "b", "c"].map(|name| (name, volume(name, &scratch.volume(name, SMALL_BYTES))));
    let [a, b, c] = paths.map(|(_, path)| path);
    let first = Launch::new("node1").node(lab.store(), &scratch, &[a, b]);
    let second = Launch::new("node2").node(lab.store(), &scratch, std::slice::from_ref(&c));
    let backends: Vec<Daemon> =
        ["a", "b", "c"].iter().map(|name| Launch::new(name).backend(lab.host(), &scratch, name)).collect();
    let second = std::thread::scope(|scope| {
        let guests = ["a", "b", "c"].map(|name| {
            let scratch = &scratch;
            scope.spawn(move || {
                let mut verifier = Verifier::new(SMALL_BYTES, u32::from(name.as_bytes()[0]));
                let mut front_end = connect(scratch, name, SHAPE);
                let time = Duration::from_secs(3);
                let outcome =
                    judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, time);
                must(verifier.check_all(&mut front_end));
                println!("{name} {}", outcome.line());
                outcome.worst()
            })
        });
        std::thread::sleep(Duration::from_secs(1));
        second.kill();
        std::thread::sleep(Duration::from_millis(500));
        let second = Launch::new("node2").node(lab.store(), &scratch, &[c]);
        let worst = guests.map(|guest| guest.join().expect("the disk is right"));
        assert!(worst[2] > Duration::from_millis(400), "the third disk was without its node: {worst:?}");
        assert!(worst[0].max(worst[1]) < worst[2], "the others did not wait for it: {worst:?}");
        second
    });
    for backend in &backends[..2] {
        assert_eq!(disk(backend).counters.expect("stats were asked for").reconnects, 0);
    }
    backends.into_iter().for_each(Daemon::stop);
    first.stop();
    second.stop();
}

/// Time on processors per frame, in nanoseconds, that the node spends on a busy disk.
fn node_cost(node: &Daemon, scratch: &Scratch) -> f64 {
    let frames = || -> u64 { node.workers().iter().map(|c| c.frames_in + c.frames_out).sum() };
    let mut front_end = connect(scratch, "busy", Shape { depth: 32, ..SHAPE });
    let mut load = Load::random(Op::Read, 4096, SMALL_BYTES);
    must(front_end.run(&mut load, Duration::from_millis(100)));
    let (cpu, count) = (node.cpu_time(), frames());
    must(front_end.run(&mut load, Duration::from_millis(700)));
    let (cpu, count) = (node.cpu_time() - cpu, frames() - count);
    cpu.as_nanos() as f64 / count as f64
}

/// Keeps this test's thread, which is the front-end, on a processor.
fn run_on_processor(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("a thread can be kept on a processor");
}

/// The share of one processor that a daemon takes while nobody uses its disks.
fn share_when_idle(daemon: &Daemon) -> f64 {
    let (time, before) = (Duration::from_secs(2), daemon.cpu_time());
    std::thread::sleep(time);
    (daemon.cpu_time() - before).as_secs_f64() / time.as_secs_f64()
}

/// Starts one backend process with a disk for each idle volume.
fn start_idle(lab: &Lab, scratch: &Scratch) -> Daemon {
    let names: Vec<String> = (0..IDLE).map(|index| format!("idle{index}")).collect();
    let disks: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    Launch::new("idle").backends(lab.host(), scratch, &disks)
}

#[test]
fn sixty_four_idle_sessions_do_not_make_a_busy_one_dearer() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let mut volumes = vec![volume("busy", &scratch.volume("busy.img", SMALL_BYTES))];
    volumes.extend(
        (0..IDLE).map(|i| volume(&format!("idle{i}"), &scratch.volume(&format!("idle{i}.img"), 1 << 20))),
    );
    let mut node = Launch::new("node").node(lab.store(), &scratch, &volumes);
    let busy = Launch::new("busy").backend(lab.host(), &scratch, "busy");
    let (mut alone, mut beside, mut quiet) = (Vec::new(), Vec::new(), None);
    for _ in 0..COST_ROUNDS {
        alone.push(node_cost(&node, &scratch));
        let idle = start_idle(&lab, &scratch);
        node.wait_until("had a session with every disk", |node| node.node_report().sessions.len() > IDLE);
        quiet.get_or_insert_with(|| [&node, &idle].map(share_when_idle));
        beside.push(node_cost(&node, &scratch));
        idle.stop();
    }
    let quiet = quiet.expect("there was a round");
    println!(
        "of a processor, idle with {IDLE} disks and more: node {:.4}, backend {:.4}",
        quiet[0], quiet[1]
    );
    assert!(quiet.iter().all(|share| *share < 0.01), "an idle daemon takes {quiet:?} of a processor");
    let (one, many) = (median(&alone), median(&beside));
    println!(
        "node time per frame: {one:.0} ns alone {alone:.0?}, {many:.0} ns beside {IDLE} idle sessions {beside:.0?}"
    );
    assert!(many <= one * 1.10, "a frame costs {many:.0} ns beside {IDLE} idle sessions, {one:.0} ns alone");
    busy.stop();
    node.stop();
}

#[test]
fn one_percent_loss_keeps_85_percent_of_loss_free_iops() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let volumes = [volume("disk", &scratch.volume("disk.img", DISK_BYTES))];
    // What a lost frame costs is the question, and not where the scheduler puts three threads on two processors, which can halve the rate with loss and without.
    let last = std::thread::available_parallelism().map_or(1, usize::from) as u32 - 1;
    let node = Launch::new("node").on(Some(last)).node(lab.store(), &scratch, &volumes);
    let backend = Launch::new("backend").on(Some(0)).backend(lab.host(), &scratch, "disk");
    run_on_processor(0);
    let mut front_end = connect(&scratch, "backend", Shape { depth: 32, bytes_max: 4096, ..SHAPE });
    let mut load = Load::random(Op::Read, 4096, DISK_BYTES);
    let (mut free, mut lossy) = (Vec::new(), Vec::new());
    must(front_end.run(&mut load, Duration::from_millis(300)));
    for _ in 0..ROUNDS {
        for (per_mille, results) in [(0, &mut free), (10, &mut lossy)] {
            loss::set_both(lab.machines(), per_mille);
            let outcome = must(front_end.run(&mut load, Duration::from_millis(600)));
            println!("{per_mille:>3} ‰ loss {}", outcome.line());
            results.push(outcome.iops());
        }
    }
    let counters = node.node_report().sessions.into_iter().next().and_then(|session| session.counters);
    println!("backend {:?}\nnode {counters:?}", disk(&backend).session.and_then(|session| session.counters));
    let kept = median(&lossy) / median(&free);
    println!("at 1 % loss {:.0} of {:.0} requests a second: {kept:.3}", median(&lossy), median(&free));
    assert!(kept >= 0.85, "1 % loss leaves {kept:.3} of the loss-free rate");
    drop(front_end);
    backend.stop();
    node.stop();
}
