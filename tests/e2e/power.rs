//! Power cuts of the storage machine: a real file system on a device of which everything since the last flush is lost by half, at random.
//!
//! The guest works through it: in a write-through volume nothing that was answered may be gone, and in a write-back one the backend
//! brings back what was lost.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use cirro_tests::daemons::{Launch, Scratch};
use cirro_tests::frontend::Shape;
use cirro_tests::netns::{Lab, shell};
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::device::{Device, Layer, Mounted};
use crate::rig::{connect, judge, must, start_backend, volume};

/// The guest's disk, and the device with the file system that it is a file of.
const BYTES: u64 = 32 << 20;
const DEVICE_BYTES: u64 = 96 << 20;
/// Power cuts of one run.
const CUTS: usize = 3;
/// How long the guest works before each.
const WORK: Duration = Duration::from_millis(700);

/// One life of the storage machine: device and mounted file system, for the node that comes.
struct Machine {
    mounted: Mounted,
    device: Device,
}

impl Machine {
    /// On the disk as it was left [`before`] this life.
    fn start(scratch: &Scratch, life: usize) -> Machine {
        let name = format!("life{life}");
        std::fs::copy(before(scratch, life), scratch.path(&format!("{name}.base"))).expect("a copy");
        let device = Device::new(scratch, &name, Layer::Log);
        let mounted = Mounted::new(scratch, &device.path, &format!("{name}.mnt"));
        Machine { mounted, device }
    }
}

fn before(scratch: &Scratch, life: usize) -> PathBuf {
    scratch.path(&format!("life{life}.before"))
}

/// Gives how many sectors the cuts took.
fn power_cuts(durability: &str, mix: Mix) -> u64 {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let first = scratch.volume("life0.before", DEVICE_BYTES);
    shell(&format!("mkfs.ext4 -q -F {}", first.display()));
    let mut machine = Machine::start(&scratch, 0);
    let file = File::create_new(machine.mounted.at.join("disk.img")).expect("a file can be made");
    file.set_len(BYTES).and_then(|()| file.sync_all()).expect("and be made stable");
    drop(file);
    let start_node = |machine: &Machine| {
        let path = volume("disk", &machine.mounted.at.join("disk.img"));
        Launch::new("node").node(lab.store(), &scratch, &[format!("{path},durability={durability}")])
    };
    let mut node = start_node(&machine);
    let backend = start_backend(&lab, &scratch);
    let mut verifier = Verifier::new(BYTES, 61);
    let (machine, node, lost) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let shape = Shape { queues: 1, depth: 16, bytes_max: 128 << 10, poll: false };
            let mut front_end = connect(&scratch, "backend", shape);
            let time = (WORK + Duration::from_secs(1)) * CUTS as u32;
            let outcome = judge(&mut verifier, &mut front_end, Size::UpTo(32 << 10), mix, time);
            must(verifier.check_all(&mut front_end));
            outcome
        });
        let mut lost = 0;
        for life in 1..=CUTS {
            std::thread::sleep(WORK);
            // Nothing is answered after this, and nothing is written after the next line.
            node.kill_now();
            let Machine { mounted, device } = machine;
            let log = device.cut_power();
            node.kill();
            drop(mounted);
            let [from, to] = [life - 1, life].map(|life| before(&scratch, life));
            let what = log.replay(&from, &to, life as u64);
            println!("power cut {life}: {what:?}");
            lost += what.sectors_lost;
            machine = Machine::start(&scratch, life);
            node = start_node(&machine);
        }
        println!("{durability} {}", guest.join().expect("nothing is lost").line());
        (machine, node, lost)
    });
    backend.stop();
    node.stop();
    let image = std::fs::read(machine.mounted.at.join("disk.img")).expect("the image is there");
    verifier.check_image(&image).expect("nothing is lost");
    lost
}

#[test]
fn a_write_through_volume_loses_nothing_to_power_cuts() {
    // What was answered was flushed: few sectors, or none, are there to be lost.
    power_cuts("write-through", Mix::Everything);
}

/// P-89
#[test]
fn a_guest_on_a_write_back_volume_loses_nothing_to_power_cuts() {
    power_cuts("write-back", Mix::Everything);
    // Without flushes of the guest's own, much is.
    let lost = power_cuts("write-back", Mix::ReadWrite);
    assert!(lost > 100, "the cuts lost {lost} sectors: this has shown nothing");
}
