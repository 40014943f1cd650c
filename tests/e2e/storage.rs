//! Disks below the node that hang, and disks that lie about a flush.

use std::time::{Duration, Instant};

use cirro_ctl::report::VolumeState;
use cirro_tests::daemons::{Launch, Scratch};
use cirro_tests::frontend::{Buffer, Failure, FrontEnd, Io, Op, Shape, Workload};
use cirro_tests::netns::{Lab, shell};
use cirro_tests::verify::{Corruption, Mix, Size, Verifier};

use crate::device::{Device, Layer};
use crate::rig::{connect, judge, must, start_backend, volume};

const BYTES: u64 = 64 << 20;
/// What a node says of a volume whose lock is not free.
const LOCKED: &str = "is locked by another process, or by one that was killed and has writes in the kernel";

/// P-84 P-85
#[test]
fn a_node_killed_with_writes_stuck_in_the_kernel_serves_again_only_when_they_are_done() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    scratch.volume("below.base", BYTES);
    let device = Device::new(&scratch, "below", Layer::None);
    let volumes = [format!("{},io=direct", volume("disk", &device.path))];
    let node = Launch::new("node").node(lab.store(), &scratch, &volumes);
    let backend = start_backend(&lab, &scratch);
    let mut verifier = Verifier::new(BYTES, 51);
    let second = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let shape = Shape { queues: 1, depth: 16, bytes_max: 128 << 10, poll: false };
            let mut front_end = connect(&scratch, "backend", shape);
            let time = Duration::from_millis(4500);
            let outcome = judge(&mut verifier, &mut front_end, Size::Fixed(4096), Mix::Write, time);
            must(verifier.check_all(&mut front_end));
            outcome
        });
        std::thread::sleep(Duration::from_millis(500));
        device.server().pause();
        std::thread::sleep(Duration::from_millis(300));
        node.kill_now();
        // Its own state directory is locked until its last write is done, like the volume; so another machine's node is the one that
        // could do harm, and this one plays it.
        let second = Launch::new("second").node(lab.store(), &scratch, &volumes);
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(second.times_said(LOCKED), 1, "the lock is free while writes are in the kernel");
        assert_eq!(second.node_report().volumes[0].state.name, VolumeState::Draining);
        let hung = Instant::now();
        device.server().resume();
        let outcome = guest.join().expect("the disk is right");
        println!("{}", outcome.line());
        let waited = outcome.pause_after(hung);
        assert!(waited > Duration::ZERO, "something was answered while the disk hung");
        println!("served {waited:?} after the disk went on");
        second
    });
    node.kill();
    backend.stop();
    second.stop();
    let image = std::fs::read(scratch.path("below.base")).expect("the image is there");
    drop(device);
    verifier.check_image(&image).expect("nothing older is in the image");
}

/// One request.
struct One(Option<Io>);

impl Workload for One {
    fn next(&mut self, _slot: usize, buffer: &Buffer<'_>) -> Option<Io> {
        buffer.write(&[0xA5; 4096]);
        self.0.take()
    }

    fn done(&mut self, _slot: usize, _io: &Io, _buffer: &Buffer<'_>) -> Result<(), Corruption> {
        Ok(())
    }
}

/// Does one request: the errno that it ended with, or 0.
fn one(front_end: &mut FrontEnd, op: Op, offset: u64) -> i32 {
    let bytes = if op == Op::Flush { 0 } else { 4096 };
    match front_end.run(&mut One(Some(Io { op, offset, bytes })), Duration::from_millis(50)) {
        Ok(outcome) => {
            assert_eq!(outcome.requests, 1);
            0
        }
        Err(Failure::Refused { ret, .. }) => -ret,
        Err(failure) => panic!("{failure}"),
    }
}

/// P-87
#[test]
fn an_error_of_fdatasync_stays_though_the_disk_takes_it_back() {
    for io in ["direct", "buffered"] {
        let (lab, scratch) = (Lab::pair(9000), Scratch::new());
        scratch.volume("below.base", BYTES);
        let device = Device::new(&scratch, "below", Layer::FirstFlushFails);
        let volumes = [format!("{},io={io}", volume("disk", &device.path))];
        let mut node = Launch::new("node").node(lab.store(), &scratch, &volumes);
        let backend = start_backend(&lab, &scratch);
        let shape = Shape { queues: 1, depth: 1, bytes_max: 4096, poll: false };
        let mut front_end = connect(&scratch, "backend", shape);
        assert_eq!(one(&mut front_end, Op::Write, 0), 0);
        assert_eq!(one(&mut front_end, Op::Flush, 0), libc::EIO, "io={io}: the disk could not flush");
        shell(&format!("dd if=/dev/zero of={} bs=4k count=1 seek=8 conv=fdatasync", device.path.display()));
        for _ in 0..3 {
            let errno = one(&mut front_end, Op::Flush, 0);
            assert_eq!(errno, libc::EIO, "io={io}: the disk's second word was believed");
        }
        assert_eq!(one(&mut front_end, Op::Read, 4096), 0, "reads go on");
        node.wait_until("said that the volume failed, and why", |node| {
            let states = node.node_report().volumes.into_iter().map(|volume| volume.state);
            states.filter(|state| state.name == VolumeState::Failed).any(|state| state.why.is_some())
        });
        assert_eq!(node.times_said("written data may be lost"), 1);
        drop(front_end);
        backend.stop();
        node.stop();
    }
}

/// P-81, for a volume whose bytes end with the node.
#[test]
fn a_volume_in_memory_that_ended_with_its_node_is_no_empty_disk_under_a_guest_that_goes_on() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let volumes = [format!("disk=ram:{}M,serial=SCRATCH", BYTES >> 20)];
    let node = || Launch::new("node").node(lab.store(), &scratch, &volumes);
    let (first, backend) = (node(), start_backend(&lab, &scratch));
    let shape = Shape { queues: 1, depth: 16, bytes_max: 128 << 10, poll: false };
    let mut verifier = Verifier::new(BYTES, 53);
    let mut guest = connect(&scratch, "backend", shape);
    let time = Duration::from_millis(500);
    let outcome = judge(&mut verifier, &mut guest, Size::UpTo(128 << 10), Mix::Everything, time);
    println!("{}", outcome.line());
    must(verifier.check_all(&mut guest));
    first.kill();
    let second = node();
    assert_ne!(one(&mut guest, Op::Read, 0), 0, "a guest read from a disk that is not the one it wrote to");
    assert_ne!(one(&mut guest, Op::Write, 0), 0, "a guest wrote to a disk that is not the one it wrote to");
    drop(guest);
    // A driver that begins anew looks at the disk anew.
    let mut guest = connect(&scratch, "backend", shape);
    let mut verifier = Verifier::new(BYTES, 54);
    judge(&mut verifier, &mut guest, Size::Fixed(4096), Mix::ReadWrite, time);
    must(verifier.check_all(&mut guest));
    drop(guest);
    backend.stop();
    second.stop();
}
