//! Tests of the test bed itself: that the wire loses what it is told to lose, and that the judge can find a disk guilty.
//!
//! Needs none of our daemons: `qemu-storage-daemon` is the back-end here.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cirro_tests::daemons::{Daemon, Scratch, qemu_storage_daemon};
use cirro_tests::frontend::{Failure, FrontEnd, Op, Shape};
use cirro_tests::load::Load;
use cirro_tests::loss::{self, Drop};
use cirro_tests::netns::Lab;
use cirro_tests::verify::{Content, Mix, Size, Verifier};
use cirro_tests::wire::{ETHERTYPE, Recorder, replay};

const DISK_BYTES: u64 = 64 << 20;

/// A frame whose part after the Ethernet header has `bytes` bytes.
fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = vec![0xFF; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.resize(14 + bytes, 0x5A);
    frame
}

#[test]
fn a_veth_pair_and_a_bridge_carry_frames_of_every_mtu() {
    for mtu in [1500_u32, 9000, 65535] {
        for lab in [Lab::pair(mtu), Lab::bridged(2, mtu)] {
            let recorder = Recorder::start(lab.store());
            replay(lab.host(), &[frame(60), frame(mtu as usize)]);
            std::thread::sleep(Duration::from_millis(50));
            let lengths: Vec<usize> = recorder.stop().iter().map(Vec::len).collect();
            assert_eq!(lengths, [74, 14 + mtu as usize], "MTU {mtu}");
        }
    }
}

#[test]
fn random_loss_takes_the_asked_part_of_the_frames_that_arrive() {
    let lab = Lab::pair(1500);
    loss::set_both(lab.machines(), 50);
    for (from, to) in [(lab.host(), lab.store()), (lab.store(), lab.host())] {
        let recorder = Recorder::start(to);
        replay(from, &vec![frame(100); 20_000]);
        std::thread::sleep(Duration::from_millis(100));
        let arrived = recorder.stop().len() as u64;
        let dropped = loss::dropped(to);
        assert_eq!(arrived + dropped, 20_000, "every frame arrived or was dropped");
        // 20000 × 0.05 = 1000; a standard deviation is sqrt(20000 × 0.05 × 0.95) = 31.
        assert!((800..1200).contains(&dropped), "{dropped} of 20000 frames lost at 5 %");
    }
    loss::set_both(lab.machines(), 0);
    assert_eq!(loss::dropped(lab.store()), 0, "no rule, no loss");
}

#[test]
fn a_narrow_path_drops_by_the_bytes_after_the_ethernet_header() {
    let lab = Lab::pair(9000);
    loss::set(lab.store(), &[Drop::LongerThan(1500)]);
    let recorder = Recorder::start(lab.store());
    replay(lab.host(), &[frame(1499), frame(1500), frame(1501), frame(9000)]);
    std::thread::sleep(Duration::from_millis(50));
    let lengths: Vec<usize> = recorder.stop().iter().map(|frame| frame.len() - 14).collect();
    assert_eq!(lengths, [1499, 1500]);
    assert_eq!(loss::dropped(lab.store()), 2);
}

#[test]
fn a_front_end_that_bears_refusals_counts_them_and_goes_on() {
    let (lab, scratch) = (Lab::pair(1500), Scratch::new());
    let image = scratch.volume("disk.img", DISK_BYTES);
    let bad = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector=0";
    let blockdev =
        format!("driver=blkdebug,node-name=disk,image.driver=file,image.filename={},{bad}", image.display());
    let _daemon = qemu_storage_daemon(
        &scratch,
        "qsd",
        &blockdev,
        lab.host().namespace().command("qemu-storage-daemon"),
    );
    // Of four places the first cannot be read.
    let mut load = Load::random(Op::Read, 4096, 4 * 4096);
    let time = Duration::from_millis(300);
    let mut front_end = connect(&scratch.path("qsd.sock"), 1, 1);
    assert!(matches!(front_end.run(&mut load, time), Err(Failure::Refused { .. })));
    drop(front_end);
    let mut front_end = connect(&scratch.path("qsd.sock"), 1, 4);
    front_end.bear_refusals();
    let outcome = front_end.run(&mut load, time).unwrap_or_else(|failure| panic!("{failure}"));
    assert!(outcome.refused > 0 && outcome.requests > outcome.refused, "{outcome:?}");
}

struct Reference {
    scratch: Scratch,
    daemon: Daemon,
    image: PathBuf,
}

impl Reference {
    fn new() -> Reference {
        let (lab, scratch) = (Lab::pair(1500), Scratch::new());
        let image = scratch.volume("disk.img", DISK_BYTES);
        let blockdev = format!("driver=file,node-name=disk,filename={},discard=unmap", image.display());
        let command = lab.host().namespace().command("qemu-storage-daemon");
        let daemon = qemu_storage_daemon(&scratch, "qsd", &blockdev, command);
        Reference { scratch, daemon, image }
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path("qsd.sock")
    }
}

fn connect(socket: &Path, queues: usize, depth: usize) -> FrontEnd {
    let shape = Shape { queues, depth, bytes_max: 1 << 20, poll: false };
    FrontEnd::connect(socket, shape).unwrap_or_else(|error| panic!("the front-end cannot connect: {error}"))
}

#[test]
fn the_judge_acquits_a_back_end_that_others_wrote() {
    let reference = Reference::new();
    let mut verifier = Verifier::new(DISK_BYTES, 1);
    for (queues, depth) in [(1, 1), (1, 32), (4, 16)] {
        let mut front_end = connect(&reference.socket(), queues, depth);
        assert_eq!(front_end.capacity(), DISK_BYTES);
        for (size, mix) in [(Size::Fixed(512), Mix::ReadWrite), (Size::UpTo(1 << 20), Mix::Everything)] {
            let outcome = verifier.run(&mut front_end, size, mix, Duration::from_millis(300));
            println!(
                "{queues} × {depth:>2} {}",
                outcome.unwrap_or_else(|failure| panic!("{failure}")).line()
            );
        }
        verifier.check_all(&mut front_end).unwrap_or_else(|failure| panic!("{failure}"));
    }
    reference.daemon.stop();
    verifier.check_image(&std::fs::read(&reference.image).unwrap()).unwrap();
}

/// Writes a disk, changes one sector of the image behind the back-end's back, and gives what the judge finds.
fn found_after(tamper: impl Fn(&File)) -> (u64, Content, Content) {
    let reference = Reference::new();
    let mut verifier = Verifier::new(DISK_BYTES, 7);
    let mut front_end = connect(&reference.socket(), 1, 32);
    while verifier.zeroes() > 0 {
        verifier.run(&mut front_end, Size::Fixed(1 << 20), Mix::Write, Duration::from_millis(100)).unwrap();
    }
    tamper(&File::options().read(true).write(true).open(&reference.image).unwrap());
    match verifier.check_all(&mut front_end) {
        Err(Failure::Corrupt(corruption)) => {
            assert_eq!(corruption.io.op, Op::Read);
            (corruption.sector, corruption.wanted, corruption.found)
        }
        other => panic!("a corrupt disk was not found guilty: {other:?}"),
    }
}

#[test]
fn the_judge_finds_a_flipped_bit_a_lost_write_and_a_misplaced_sector() {
    let (sector, wanted, found) = found_after(|image| {
        let mut byte = [0];
        image.read_exact_at(&mut byte, 77 * 512 + 300).unwrap();
        image.write_all_at(&[byte[0] ^ 1], 77 * 512 + 300).unwrap();
    });
    assert_eq!((sector, found), (77, Content::Garbage));
    assert!(matches!(wanted, Content::Written { sector: 77, seed: 7, .. }), "{wanted}");

    let (sector, _, found) = found_after(|image| image.write_all_at(&[0; 512], 99 * 512).unwrap());
    assert_eq!((sector, found), (99, Content::Zeroes));

    let (sector, _, found) = found_after(|image| {
        let mut other = [0; 512];
        image.read_exact_at(&mut other, 500 * 512).unwrap();
        image.write_all_at(&other, 1000 * 512).unwrap();
    });
    assert_eq!(sector, 1000);
    assert!(matches!(found, Content::Written { sector: 500, seed: 7, .. }), "{found}");
}
