//! What happens to a session when its ends restart, and when old frames come again.
//!
//! The old frames are real: recorded on the wire by a socket beside the daemons.

use std::time::Duration;

use cirro_tests::daemons::Daemon;
use cirro_tests::frontend::Shape;
use cirro_tests::netns::Lab;
use cirro_tests::verify::{Mix, Size, Verifier};
use cirro_tests::wire::{Recorder, replay};

use crate::rig::{DISK_BYTES, Rig, connect, judge, must, start_backend, start_node};

const SHAPE: Shape = Shape { queues: 1, depth: 32, bytes_max: 128 << 10, poll: false };

/// Frames of a session, by the machine at which they arrived.
struct Recorded {
    at_host: Vec<Vec<u8>>,
    at_store: Vec<Vec<u8>>,
}

/// Frames of a session, not of a handshake: bit 4 of the first byte after the Ethernet header is clear (docs/PROTOCOL.md, Frames).
fn short(frames: &[Vec<u8>]) -> u64 {
    frames.iter().filter(|frame| frame[14] & 0x10 == 0).count() as u64
}

fn dropped(daemon: &Daemon) -> u64 {
    daemon.workers().iter().flat_map(|counters| counters.dropped.values()).sum()
}

/// Plays every old frame again from the machine that sent it, while the disk is in use, and judges the disk.
fn replay_under_load(rig: &Rig, recorded: &Recorded, verifier: &mut Verifier) {
    let before = (dropped(&rig.node), dropped(&rig.backend));
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut front_end = connect(&rig.scratch, "backend", SHAPE);
            judge(verifier, &mut front_end, Size::Fixed(4096), Mix::ReadWrite, Duration::from_millis(2500));
            must(verifier.check_all(&mut front_end));
        });
        std::thread::sleep(Duration::from_millis(300));
        replay(rig.lab.host(), &recorded.at_store);
        replay(rig.lab.store(), &recorded.at_host);
        guest.join().expect("the disk is right");
    });
    let node = dropped(&rig.node) - before.0;
    let backend = dropped(&rig.backend) - before.1;
    let (to_node, to_backend) = (short(&recorded.at_store), short(&recorded.at_host));
    println!("dropped: node {node} of {to_node}, backend {backend} of {to_backend} old frames");
    assert!(node >= to_node, "the node counted {node} drops for {to_node} old frames");
    assert!(backend >= to_backend, "the backend counted {backend} drops for {to_backend} old frames");
}

/// Writes the disk for a moment and records what goes over the wire from the first frame on.
fn record(lab: &Lab, rig: &Rig, verifier: &mut Verifier) -> Recorded {
    let (host, store) = (Recorder::start(lab.host()), Recorder::start(lab.store()));
    let mut front_end = connect(&rig.scratch, "backend", Shape { depth: 8, ..SHAPE });
    judge(verifier, &mut front_end, Size::Fixed(4096), Mix::ReadWrite, Duration::from_millis(300));
    drop(front_end);
    let recorded = Recorded { at_host: host.stop(), at_store: store.stop() };
    assert!(short(&recorded.at_host) > 100 && short(&recorded.at_store) > 100, "frames were recorded");
    recorded
}

#[test]
fn a_frame_of_an_older_session_changes_nothing() {
    let mut rig = Rig::new(9000);
    let mut verifier = Verifier::new(DISK_BYTES, 11);
    let first = record(&rig.lab, &rig, &mut verifier);

    rig.backend.kill();
    rig.backend = start_backend(&rig.lab, &rig.scratch);
    replay_under_load(&rig, &first, &mut verifier);
    let second = record(&rig.lab, &rig, &mut verifier);

    rig.node.kill();
    rig.node = start_node(&rig.lab, &rig.scratch);
    replay_under_load(&rig, &first, &mut verifier);
    replay_under_load(&rig, &second, &mut verifier);
    rig.stop();
}

#[test]
fn requests_wait_for_a_node_that_was_killed_and_comes_back() {
    let mut rig = Rig::new(9000);
    let mut verifier = Verifier::new(DISK_BYTES, 12);
    let scratch = &rig.scratch;
    rig.node = std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut front_end = connect(scratch, "backend", SHAPE);
            let outcome = judge(
                &mut verifier,
                &mut front_end,
                Size::Fixed(4096),
                Mix::ReadWrite,
                Duration::from_secs(3),
            );
            must(verifier.check_all(&mut front_end));
            outcome
        });
        std::thread::sleep(Duration::from_secs(1));
        rig.node.kill();
        std::thread::sleep(Duration::from_millis(500));
        let node = start_node(&rig.lab, scratch);
        println!("{}", guest.join().expect("the disk is right").line());
        node
    });
    rig.stop();
}
