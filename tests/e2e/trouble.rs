//! What a guest's requests do while the node is away: wait, or fail after a time, as its disk is configured; and what the operator sees of it.
//!
//! Two disks of one backend, with either policy, lose their node at the same moment.

use std::time::{Duration, Instant};

use cirro_ctl::report::DiskState;
use cirro_tests::daemons::{Daemon, Launch, Scratch};
use cirro_tests::frontend::{Failure, Op, Shape};
use cirro_tests::load::Load;
use cirro_tests::netns::Lab;
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{connect, judge, must, volume};

const BYTES: u64 = 64 << 20;
const SHAPE: Shape = Shape { queues: 1, depth: 8, bytes_max: 128 << 10, poll: false };
/// When requests of the impatient disk fail.
const EIO_AFTER: Duration = Duration::from_secs(1);
/// How long the node stays away.
const AWAY: Duration = Duration::from_secs(3);

fn node(lab: &Lab, scratch: &Scratch) -> Daemon {
    let volumes = ["waits", "fails"].map(|name| volume(name, &scratch.path(&format!("{name}.img"))));
    Launch::new("node").node(lab.store(), scratch, &volumes)
}

fn backend(lab: &Lab, scratch: &Scratch) -> Daemon {
    let disks = [("waits", "on-trouble = \"wait\""), ("fails", "on-trouble = \"eio-after=1s\"")];
    Launch::new("backend").backends(lab.host(), scratch, &disks)
}

/// How long it takes until a read fails.
fn time_to_error(scratch: &Scratch) -> Duration {
    let mut front_end = connect(scratch, "fails", SHAPE);
    let start = Instant::now();
    let result = front_end.run(&mut Load::random(Op::Read, 4096, BYTES), AWAY);
    assert!(matches!(result, Err(Failure::Refused { .. })), "the request must fail: {result:?}");
    start.elapsed()
}

#[test]
fn without_a_node_one_disk_waits_and_the_other_fails_after_its_time() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    for name in ["waits", "fails"] {
        scratch.volume(&format!("{name}.img"), BYTES);
    }
    let old = node(&lab, &scratch);
    let backend = backend(&lab, &scratch);
    let mut patient = Verifier::new(BYTES, 51);
    let mut impatient = Verifier::new(BYTES, 52);
    let mut front_end = connect(&scratch, "fails", SHAPE);
    judge(&mut impatient, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, Duration::from_millis(300));
    drop(front_end);

    let new = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut front_end = connect(&scratch, "waits", SHAPE);
            let time = AWAY + Duration::from_secs(1);
            let outcome = judge(&mut patient, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, time);
            must(patient.check_all(&mut front_end));
            outcome
        });
        std::thread::sleep(Duration::from_millis(300));
        old.kill();
        let gone = Instant::now();
        let first = time_to_error(&scratch);
        assert!(first > EIO_AFTER * 8 / 10 && first < EIO_AFTER * 2, "the first error came after {first:?}");
        let second = time_to_error(&scratch);
        assert!(second < Duration::from_millis(300), "the next error came after {second:?}");
        println!("requests fail {first:?} after the node is gone, and then after {second:?}");
        // By now the session of the one that waits has been given up.
        std::thread::sleep((AWAY - Duration::from_millis(300)).saturating_sub(gone.elapsed()));
        see(&backend);
        let new = node(&lab, &scratch);
        let outcome = guest.join().expect("the patient disk is right");
        assert!(outcome.worst() > AWAY / 2, "it did not wait: {}", outcome.line());
        new
    });

    // What was answered before is there, and the disk serves again.
    let mut front_end = connect(&scratch, "fails", SHAPE);
    judge(&mut impatient, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, Duration::from_millis(300));
    must(impatient.check_all(&mut front_end));
    drop(front_end);
    assert!(backend.times_said("requests are served again") > 0, "the log does not say that it is over");
    backend.stop();
    new.stop();
    let image = |name: &str| std::fs::read(scratch.path(&format!("{name}.img"))).expect("an image");
    patient.check_image(&image("waits")).expect("the patient disk's image");
    impatient.check_image(&image("fails")).expect("the impatient disk's image");
}

/// What `cirroctl status` shows of the two disks while the node is away.
fn see(backend: &Daemon) {
    let report = backend.backend_report();
    let of = |name: &str| report.disks.iter().find(|disk| disk.volume == name).expect("a disk of the report");
    let (waits, fails) = (of("waits"), of("fails"));
    assert_eq!((waits.on_trouble.as_str(), fails.on_trouble.as_str()), ("wait", "eio-after=1s"));
    assert_eq!(waits.state.name, DiskState::Reconnecting);
    let why = |disk: &cirro_ctl::report::Disk| disk.state.why.clone().unwrap_or_default();
    println!("waits: {:?}\nfails: {:?}", waits.state, fails.state);
    assert!(why(waits).contains("does not answer"), "says why: {:?}", waits.state);
    assert!(why(fails).contains("fail"), "says that requests fail: {:?}", fails.state);
}
