//! Several daemons, several sessions, one wire: that they do not disturb each other, and what they cost each other.

use std::time::Duration;

use cirro_tests::daemons::{Daemon, Launch, Scratch, run_on_processor};
use cirro_tests::frontend::{Op, Shape};
use cirro_tests::load::{Load, median};
use cirro_tests::loss;
use cirro_tests::netns::{Lab, Machine};
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{DISK_BYTES, connect, disk, judge, last_processor, must, volume};

const SMALL_BYTES: u64 = 64 << 20;
const SHAPE: Shape = Shape { queues: 1, depth: 8, bytes_max: 128 << 10, poll: false };
/// Pairs of runs without and with loss, of whose ratios the median counts.
const LOSS_ROUNDS: usize = 11;
/// How often a frame's cost is measured, alone and beside others in turn.
const COST_ROUNDS: usize = 11;
/// Busy disks at once, and the size of each.
const CROWD: usize = 32;
const CROWD_BYTES: u64 = 16 << 20;
/// Idle sessions beside the busy one, and how many of them are of one backend.
const IDLE: usize = 256;
const IDLE_DISKS: usize = 64;

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

/// The share of one processor that a daemon takes while nobody uses its disks.
fn share_when_idle(daemon: &Daemon) -> f64 {
    let (time, before) = (Duration::from_secs(2), daemon.cpu_time());
    std::thread::sleep(time);
    (daemon.cpu_time() - before).as_secs_f64() / time.as_secs_f64()
}

/// The names of the disks of one idle backend.
fn idle_names(process: usize) -> impl Iterator<Item = String> {
    (0..IDLE_DISKS).map(move |index| format!("idle{process}-{index}"))
}

/// Starts a backend process with [`IDLE_DISKS`] disks that nobody uses.
fn start_idle(machine: &Machine, scratch: &Scratch, process: usize) -> Daemon {
    let names: Vec<String> = idle_names(process).collect();
    let disks: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    let name = format!("idle{process}");
    Launch::new(&name).on(Some(0)).backends(machine, scratch, &disks)
}

/// What idle daemons take: of a processor the node and one backend, and KiB of memory for a session and for a disk.
fn print_idle(node: &Daemon, node_kib_before: u64, backends: &[Daemon]) {
    let shares = [node, &backends[0]].map(share_when_idle);
    let session_kib = (node.memory_kib() - node_kib_before) as f64 / IDLE as f64;
    let disk_kib = backends[0].memory_kib() as f64 / IDLE_DISKS as f64;
    println!(
        "idle: of a processor, the node with {IDLE} sessions {:.4}, a backend with {IDLE_DISKS} disks {:.4}; KiB a session {session_kib:.0}, a disk {disk_kib:.0}",
        shares[0], shares[1]
    );
    assert!(shares[1] < 0.01, "an idle backend takes {shares:?} of a processor");
    // Four times the sessions that a backend of 64 disks makes.
    assert!(shares[0] < 0.04, "an idle node takes {shares:?} of a processor");
}

#[test]
fn idle_sessions_do_not_make_a_busy_one_dearer() {
    // The others have a host of their own: on a virtual wire, the node's processor does what every packet socket of the receiving machine costs.
    let (lab, scratch) = (Lab::bridged(3, 9000), Scratch::new());
    let mut volumes = vec![volume("busy", &scratch.volume("busy.img", SMALL_BYTES))];
    volumes.extend(
        (0..IDLE / IDLE_DISKS)
            .flat_map(idle_names)
            .map(|name| volume(&name, &scratch.volume(&format!("{name}.img"), 1 << 20))),
    );
    let launch = Launch::new("node").with(&["--write-pool-mib", "512"]).on(Some(last_processor()));
    let mut node = launch.node(lab.store(), &scratch, &volumes);
    let busy = Launch::new("busy").on(Some(0)).backend(lab.host(), &scratch, "busy");
    run_on_processor(0);
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for round in 0..COST_ROUNDS {
        alone.push(node_cost(&node, &scratch));
        let before = node.memory_kib();
        let idle: Vec<Daemon> =
            (0..IDLE / IDLE_DISKS).map(|process| start_idle(&lab.machines()[2], &scratch, process)).collect();
        node.wait_until("had a session with every disk", |node| node.node_report().sessions.len() > IDLE);
        if round == 0 {
            print_idle(&node, before, &idle);
        }
        beside.push(node_cost(&node, &scratch));
        idle.into_iter().for_each(Daemon::stop);
    }
    let (one, many) = (median(&alone), median(&beside));
    println!(
        "node time per frame: {one:.0} ns alone {alone:.0?}, {many:.0} ns beside {IDLE} idle sessions {beside:.0?}"
    );
    // At most 1.05 is asked for; medians of this many rounds stray by 0.03.
    assert!(many <= one * 1.08, "a frame costs {many:.0} ns beside {IDLE} idle sessions, {one:.0} ns alone");
    busy.stop();
    node.stop();
}

#[test]
fn one_percent_loss_keeps_90_percent_of_loss_free_iops() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let volumes = [volume("disk", &scratch.volume("disk.img", DISK_BYTES))];
    // What a lost frame costs is the question, and not where the scheduler puts three threads on two processors, which can halve the rate with loss and without.
    let node = Launch::new("node").on(Some(last_processor())).node(lab.store(), &scratch, &volumes);
    let backend = Launch::new("backend").on(Some(0)).backend(lab.host(), &scratch, "disk");
    run_on_processor(0);
    let mut front_end = connect(&scratch, "backend", Shape { depth: 32, bytes_max: 4096, ..SHAPE });
    let mut load = Load::random(Op::Read, 4096, DISK_BYTES);
    must(front_end.run(&mut load, Duration::from_millis(300)));
    let mut rate_under = |drop| {
        lab.machines().iter().for_each(|machine| loss::set(machine, &[drop]));
        let outcome = must(front_end.run(&mut load, Duration::from_millis(600)));
        println!("{drop:?} {}", outcome.line());
        outcome.iops()
    };
    // Both wires have a rule that looks at every frame: it costs a frame's sender something by itself. Each run with loss is held to the one just before it:
    // the machine itself is a quarter slower in some seconds than in others.
    let kept: Vec<f64> = (0..LOSS_ROUNDS)
        .map(|_| (rate_under(loss::Drop::LongerThan(65_535)), rate_under(loss::Drop::PerMille(10))))
        .map(|(free, lossy)| lossy / free)
        .collect();
    let counters = node.node_report().sessions.into_iter().next().and_then(|session| session.counters);
    println!("backend {:?}\nnode {counters:?}", disk(&backend).session.and_then(|session| session.counters));
    println!("at 1 % loss, of the loss-free rate: {kept:.3?}");
    let kept = median(&kept);
    assert!(kept >= 0.90, "1 % loss leaves {kept:.3} of the loss-free rate");
    drop(front_end);
    backend.stop();
    node.stop();
}

/// Bytes a second that all of `names` write together, each by a front-end of its own.
fn rate_of(scratch: &Scratch, names: &[String]) -> f64 {
    const BYTES: usize = 128 << 10;
    let write = |name: &String| {
        let mut front_end = connect(scratch, name, SHAPE);
        let mut load = Load::sequential(Op::Write, BYTES, CROWD_BYTES);
        must(front_end.run(&mut load, Duration::from_millis(700))).iops() * BYTES as f64
    };
    std::thread::scope(|scope| {
        let guests: Vec<_> = names.iter().map(|name| scope.spawn(move || write(name))).collect();
        guests.into_iter().map(|guest| guest.join().expect("a front-end ends")).sum()
    })
}

/// Each session may have 256 KiB in flight and more, and one worker's ring takes 4 MiB: what overflows is sent again, and nothing collapses.
/// (32 front-ends on two processors take more than half of the rate by themselves, with a ring of any size.)
#[test]
fn more_in_flight_than_a_receive_ring_holds_is_no_collapse() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let names: Vec<String> = (0..CROWD).map(|index| format!("crowd{index}")).collect();
    let volumes: Vec<String> =
        names.iter().map(|name| volume(name, &scratch.volume(&format!("{name}.img"), CROWD_BYTES))).collect();
    let node = Launch::new("node").node(lab.store(), &scratch, &volumes);
    let disks: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    let backend = Launch::new("crowd").backends(lab.host(), &scratch, &disks);
    rate_of(&scratch, &names[..1]);
    let (one, all) = (rate_of(&scratch, &names[..1]), rate_of(&scratch, &names));
    let drops: u64 =
        node.node_report().links.iter().filter_map(|link| link.counters.as_ref()).map(|c| c.ring_drops).sum();
    println!(
        "{:.0} MB/s of one disk, {:.0} of {CROWD}; the ring overflowed {drops} times",
        one / 1e6,
        all / 1e6
    );
    assert!(
        all >= 0.25 * one,
        "{CROWD} busy disks write {all:.0} bytes a second together, one alone {one:.0}"
    );
    backend.stop();
    node.stop();
}
