//! Two hosts and one volume: who may write, what the other is told, and take-over.
//!
//! The hosts and the storage machine are on one bridge. Each host's backend has its own state, and so its own attachment.

use std::path::Path;
use std::time::{Duration, Instant};

use cirro_ctl::report::DiskState;
use cirro_tests::daemons::{Daemon, Launch, Scratch};
use cirro_tests::frontend::{Failure, FrontEnd, Op, Shape};
use cirro_tests::load::Load;
use cirro_tests::netns::{Lab, Machine};
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{connect, disk, judge, must, volume};

const BYTES: u64 = 64 << 20;
const SHAPE: Shape = Shape { queues: 1, depth: 8, bytes_max: 128 << 10, poll: false };
/// How long a loser may wait until it is told.
const TOLD_MAX: Duration = Duration::from_secs(5);

struct Fight {
    // Daemons end before their machines.
    node: Daemon,
    scratch: Scratch,
    lab: Lab,
}

impl Fight {
    fn new() -> Fight {
        let (lab, scratch) = (Lab::bridged(3, 9000), Scratch::new());
        let path = scratch.volume("disk.img", BYTES);
        let node = Launch::new("node").node(lab.store(), &scratch, &[volume("disk", &path)]);
        Fight { node, scratch, lab }
    }

    fn hosts(&self) -> [&Machine; 2] {
        [self.lab.host(), &self.lab.machines()[2]]
    }

    fn backend(&self, host: usize, name: &str, arguments: &[&str]) -> Daemon {
        Launch::new(name).with(arguments).backend(self.hosts()[host], &self.scratch, "disk")
    }

    fn connect(&self, name: &str) -> FrontEnd {
        connect(&self.scratch, name, SHAPE)
    }
}

/// The attachment's name: a backend keeps it in its state directory, the node names it in its log and its report.
fn holder(node: &Daemon) -> Option<String> {
    node.node_report().volumes.into_iter().find_map(|volume| volume.owner).map(|owner| owner.attachment)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < TOLD_MAX, "not in {TOLD_MAX:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Writes that must not be done: gives how many were answered OK.
fn writes_done(front_end: &mut FrontEnd, time: Duration) -> u64 {
    front_end.set_patience(time);
    match front_end.run(&mut Load::random(Op::Write, 4096, BYTES), time) {
        Ok(outcome) => outcome.requests,
        Err(Failure::Stalled { .. } | Failure::Refused { .. }) => 0,
        Err(failure) => panic!("{failure}"),
    }
}

/// P-80
#[test]
fn of_two_hosts_one_writes_and_the_other_is_told_who_holds_the_volume() {
    let fight = Fight::new();
    let (winner, loser) = (fight.backend(0, "winner", &[]), fight.backend(1, "loser", &[]));
    let mut verifier = Verifier::new(BYTES, 41);
    let mut ours = fight.connect("winner");
    judge(&mut verifier, &mut ours, Size::Fixed(4096), Mix::ReadWrite, Duration::from_millis(200));
    let attachment = holder(&fight.node).expect("the winner holds it");

    let (scratch, time) = (&fight.scratch, Duration::from_millis(2500));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut theirs = connect(scratch, "loser", SHAPE);
            let done = writes_done(&mut theirs, Duration::from_secs(1));
            (done, disk(&loser).state)
        });
        judge(&mut verifier, &mut ours, Size::Fixed(4096), Mix::ReadWrite, time);
        let (done, told) = other.join().expect("the loser ran");
        println!("the loser's disk: {told:?}");
        assert_eq!(done, 0, "the loser wrote");
        assert_eq!(told.name, DiskState::Refused);
        let why = told.why.expect("a refused disk says why");
        assert!(why.contains("held") || why.contains("holds"), "does that say who has it? {why}");
    });
    assert!(loser.times_said("another attachment holds it") > 0, "the loser's log does not say it");
    let line = format!("attachment {attachment} holds it");
    assert!(fight.node.times_said(&line) > 0, "the node's log does not say who holds it");
    must(verifier.check_all(&mut ours));

    drop(ours);
    let mut theirs = fight.connect("loser");
    judge(&mut verifier, &mut theirs, Size::Fixed(4096), Mix::ReadWrite, Duration::from_millis(300));
    must(verifier.check_all(&mut theirs));
    assert_ne!(holder(&fight.node), Some(attachment), "the volume went over when it was let go");
    drop(theirs);
    winner.stop();
    loser.stop();
    fight.node.stop();
}

/// Tries to write from a host whose volume was taken, again and again, as a guest would that does not believe it.
fn write_on(scratch: &Scratch, name: &str, until: &Path) -> u64 {
    let mut done = 0;
    while !until.exists() {
        let mut front_end = connect(scratch, name, SHAPE);
        done += writes_done(&mut front_end, Duration::from_millis(200));
    }
    done
}

/// P-81
#[test]
fn after_a_take_over_the_old_owner_never_writes_again() {
    let mut fight = Fight::new();
    let old = fight.backend(0, "old", &[]);
    let mut old_holder = String::new();
    let scratch = &fight.scratch;
    // It stays connected from here on: a volume that its owner lets go is anybody's.
    let (new, mut front_end) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut load = Load::random(Op::Write, 4096, BYTES);
            connect(scratch, "old", SHAPE).run(&mut load, Duration::from_secs(10))
        });
        wait_until("the first owner writes", || holder(&fight.node).is_some());
        std::thread::sleep(Duration::from_millis(200));
        old_holder = holder(&fight.node).expect("the first owner holds it");
        let new = fight.backend(1, "new", &["--take-over"]);
        let front_end = fight.connect("new");
        let result = guest.join().expect("the guest ran");
        assert!(
            matches!(result, Err(Failure::Refused { io, .. }) if io.op == Op::Write),
            "the old owner's writes must fail, not wait: {result:?}"
        );
        (new, front_end)
    });
    wait_until("the old owner's log says that it was fenced", || {
        old.times_said("another attachment took it over; writes fail") > 0
    });
    let line = format!("takes it over from {old_holder}");
    assert_eq!(fight.node.times_said(&line), 1, "the node's log says who took it from whom");

    // The new owner writes all of it while the old one goes on trying, also over a restart of the node.
    let mut verifier = Verifier::new(BYTES, 42);
    let over = fight.scratch.path("over");
    let (scratch, hosts) = (&fight.scratch, &fight.lab);
    let node = std::thread::scope(|scope| {
        let stubborn = scope.spawn(|| write_on(scratch, "old", &over));
        let mut write_all = |verifier: &mut Verifier| {
            while verifier.zeroes() > 0 {
                let time = Duration::from_millis(100);
                judge(verifier, &mut front_end, Size::Fixed(64 << 10), Mix::Write, time);
            }
            must(verifier.check_all(&mut front_end));
        };
        write_all(&mut verifier);
        fight.node.kill();
        let path = volume("disk", &scratch.path("disk.img"));
        let node = Launch::new("node").node(hosts.store(), scratch, &[path]);
        write_all(&mut verifier);
        std::thread::sleep(Duration::from_millis(500));
        write_all(&mut verifier);
        std::fs::write(&over, "").expect("a file can be made");
        assert_eq!(stubborn.join().expect("it tried"), 0, "the old owner wrote");
        node
    });
    drop(front_end);
    fight.node = node;
    old.stop();
    new.stop();
    fight.node.stop();
    verifier.check_image(&std::fs::read(fight.scratch.path("disk.img")).expect("the image")).expect("ours");
}
