//! Paths and disks that are not as they should be: narrower than the MTU says, or slow.
//!
//! The narrow path is an nftables rule; the slow disk is a frozen file system.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cirro_tests::daemons::{Launch, Scratch};
use cirro_tests::frontend::Shape;
use cirro_tests::loss::{self, Drop as Dropped};
use cirro_tests::netns::{Lab, shell};
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{DISK_BYTES, Rig, connect, disk, judge, must, start_backend, volume};

/// The piece of a 4 KiB block at MTU 1500: the fewest equal parts that fit, rounded up to 8 (docs/PROTOCOL.md, Pieces and the path).
const PIECE_AT_1500: u32 = 1368;

fn narrow(lab: &Lab) {
    for machine in lab.machines() {
        loss::set(machine, &[Dropped::LongerThan(1500)]);
    }
}

#[test]
fn a_path_that_drops_frames_over_1500_bytes_is_used_at_a_smaller_piece_size() {
    let lab = Lab::pair(9000);
    narrow(&lab);
    let rig = Rig::on(lab);
    let mut verifier = Verifier::new(DISK_BYTES, 21);
    let mut front_end = rig.connect(1, 32, 128 << 10);
    let outcome =
        judge(&mut verifier, &mut front_end, Size::UpTo(128 << 10), Mix::Everything, Duration::from_secs(1));
    println!("narrow from the start {}", outcome.line());
    must(verifier.check_all(&mut front_end));
    assert_eq!(rig.session().piece_bytes, PIECE_AT_1500);
    assert!(loss::dropped(rig.lab.store()) > 0, "the path was tried");
    drop(front_end);
    rig.stop();
}

#[test]
fn a_path_that_becomes_narrow_is_used_at_a_smaller_piece_size() {
    let rig = Rig::new(9000);
    let mut verifier = Verifier::new(DISK_BYTES, 22);
    assert!(rig.session().piece_bytes >= 4096, "{:?}", rig.session());
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let shape = Shape { queues: 1, depth: 32, bytes_max: 128 << 10, poll: false };
            let mut front_end = connect(&rig.scratch, "backend", shape);
            let time = Duration::from_secs(3);
            let outcome = judge(&mut verifier, &mut front_end, Size::UpTo(128 << 10), Mix::ReadWrite, time);
            must(verifier.check_all(&mut front_end));
            outcome
        });
        std::thread::sleep(Duration::from_millis(500));
        narrow(&rig.lab);
        println!("narrow after 0.5 s {}", guest.join().expect("the disk is right").line());
    });
    assert_eq!(rig.session().piece_bytes, PIECE_AT_1500);
    rig.stop();
}

/// An ext4 file system in a file, mounted; it can be frozen.
struct Mounted {
    device: String,
    at: PathBuf,
}

impl Mounted {
    fn new(scratch: &Scratch, bytes: u64) -> Mounted {
        let image = scratch.volume("ext4.img", bytes);
        let at = scratch.path("mounted");
        std::fs::create_dir(&at).unwrap();
        shell(&format!("mkfs.ext4 -q -F {}", image.display()));
        let device = shell(&format!("losetup --find --show {}", image.display())).trim().to_owned();
        let mounted = Mounted { device, at };
        shell(&format!("mount {} {}", mounted.device, mounted.at.display()));
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let (device, at) = (&self.device, self.at.display());
        let line = format!("umount {at} || umount --lazy {at}; losetup --detach {device}");
        let _ = std::process::Command::new("sh").args(["-c", &line]).status();
    }
}

/// A file system on which every write waits, until this value goes.
struct Frozen<'a>(&'a Path);

impl Frozen<'_> {
    fn new(at: &Path) -> Frozen<'_> {
        shell(&format!("fsfreeze --freeze {}", at.display()));
        Frozen(at)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("fsfreeze").arg("--unfreeze").arg(self.0).status();
    }
}

fn slow_disk(io: &str) {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let mounted = Mounted::new(&scratch, DISK_BYTES * 2);
    let path = mounted.at.join("disk.img");
    std::fs::File::create(&path).and_then(|file| file.set_len(DISK_BYTES)).unwrap();
    let node =
        Launch::new("node").node(lab.store(), &scratch, &[format!("{},io={io}", volume("disk", &path))]);
    let backend = start_backend(&lab, &scratch);
    let mut verifier = Verifier::new(DISK_BYTES, 23);
    let worst = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut front_end = connect(
                &scratch,
                "backend",
                Shape { queues: 1, depth: 8, bytes_max: 128 << 10, poll: false },
            );
            judge(&mut verifier, &mut front_end, Size::Fixed(4096), Mix::Write, Duration::from_millis(200));
            let before = disk(&backend).session.expect("a session").session_epoch;
            let time = Duration::from_millis(4500);
            let outcome = judge(&mut verifier, &mut front_end, Size::Fixed(4096), Mix::Write, time);
            let after = disk(&backend);
            must(verifier.check_all(&mut front_end));
            assert_eq!(after.session.expect("a session").session_epoch, before, "it is the same session");
            assert_eq!(after.counters.expect("stats were asked for").reconnects, 0);
            println!("io={io}, frozen for 3 s: {}", outcome.line());
            outcome.worst()
        });
        std::thread::sleep(Duration::from_secs(1));
        let frozen = Frozen::new(&mounted.at);
        std::thread::sleep(Duration::from_secs(3));
        drop(frozen);
        guest.join().expect("the disk is right")
    });
    assert!(worst > Duration::from_millis(2900), "nothing waited for the frozen disk: {worst:?}");
    assert!(worst < Duration::from_millis(4000), "the disk answered after 3 s, the guest waited {worst:?}");
    backend.stop();
    node.stop();
}

#[test]
fn a_disk_that_answers_after_3_s_is_waited_for_in_one_session() {
    slow_disk("direct");
    slow_disk("buffered");
}
