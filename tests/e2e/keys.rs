//! Keys, with the real daemons: an attacker on the segment, those who may not, and what is on the wire.
//!
//! Knows frames as bytes, and how a HELLO is made; each promise is of docs/THREAT_MODEL.md.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cirro_ctl::report::DiskState;
use cirro_ctl::request::{GrantRight, Request, VolumeGrant, VolumeRevoke};
use cirro_protocol::types::{Cid, MacAddress, PublicKey, Steer, Uuid};
use cirro_protocol::wire::long::{Body, Hello, LongFrame};
use cirro_seal::{Caller, Identity, Secret, new_private, os_entropy};
use cirro_tests::daemons::{Daemon, Launch, Scratch, knows_its_volumes, run_on_processor};
use cirro_tests::frontend::{Buffer, FrontEnd, Io, Op, Shape, Workload};
use cirro_tests::load::{Load, median};
use cirro_tests::netns::{Lab, Machine};
use cirro_tests::verify::{Corruption, Mix, Size, Verifier};
use cirro_tests::wire::{Attack, Recorder};

use crate::rig::{connect, disk, judge, last_processor, must, volume};

const DISK_BYTES: u64 = 64 << 20;
const SHAPE: Shape = Shape { queues: 1, depth: 32, bytes_max: 128 << 10, poll: false };
/// HELLOs that the attacker has ready.
const HELLOS: usize = 1_000;
/// Rounds with and without the attack whose medians count, and the time of each.
const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_millis(500);

fn node(lab: &Lab, scratch: &Scratch, name: &str) -> Daemon {
    let path = scratch.volume(name, DISK_BYTES);
    Launch::new("node").with_keys(true).node(lab.store(), scratch, &[volume(name, &path)])
}

fn mac(machine: &Machine) -> MacAddress {
    machine.mac().parse().expect("a MAC address")
}

/// HELLOs as a stranger makes them who knows the node's public key: each costs the node a whole handshake if it lets itself in for it.
fn hellos(from: MacAddress, to: MacAddress, node: PublicKey) -> Vec<Vec<u8>> {
    let identity = Arc::new(Identity::new(new_private(&os_entropy()), os_entropy()));
    let mut caller = Caller::new(identity, node, Secret::default());
    let hello = |number: u64| Hello {
        volume: "disk".parse().expect("a name"),
        node: Uuid::default(),
        attachment: Uuid([7; 16]),
        session_epoch: number,
        nonce: number,
        cid: Cid(1),
        steer: Steer(0),
        mtu: 9000,
        slots: 256,
        piece_bytes_max: u32::MAX,
    };
    (0..HELLOS as u64)
        .map(|number| {
            // Every other one comes from another address.
            let MacAddress([a, b, c, d, _, _]) = from;
            let source = if number.is_multiple_of(2) {
                from
            } else {
                MacAddress([a, b, c, d, (number >> 8) as u8, number as u8])
            };
            let mut frame = Vec::new();
            LongFrame::new(source, to, Steer(0), Body::Hello(hello(number))).emit(&mut frame);
            caller.seal(&mut frame, (Cid(1), Steer(0)));
            frame
        })
        .collect()
}

/// What an attacker sends: of 12 frames 10 HELLOs and two recorded ones, as they were, under another address, turned back, or as garbage.
fn attack(
    recorded: Vec<Vec<u8>>,
    hellos: Vec<Vec<u8>>,
    node: MacAddress,
) -> impl FnMut(u64) -> Vec<u8> + Send {
    let mut rng = fastrand::Rng::with_seed(1);
    move |number| {
        if number % 12 < 10 {
            return hellos[rng.usize(0..hellos.len())].clone();
        }
        let mut old = recorded[(number as usize * 7) % recorded.len()].clone();
        match rng.u8(0..5) {
            0 | 1 => {}
            2 => old[6..12].copy_from_slice(&[2, 0, 0, 0, 0, rng.u8(..)]),
            3 => old[..12].rotate_left(6),
            _ => {
                let at = rng.usize(12..old.len());
                old[at..].iter_mut().for_each(|byte| *byte = rng.u8(..));
                old[..6].copy_from_slice(&node.0);
            }
        }
        old
    }
}

/// The promise of the threat model to whom a neighbour attacks who hears everything and knows the node's public key.
///
/// Two processors are all there is: the VM host has one, the storage machine and the attacker share the other.
#[test]
fn an_attacker_on_the_segment_changes_nothing() {
    let (lab, scratch) = (Lab::bridged(3, 9000), Scratch::new());
    lab.fix_addresses();
    let attacker = &lab.machines()[2];
    let recorders = [lab.host(), lab.store()].map(Recorder::start);
    let path = scratch.volume("disk", DISK_BYTES);
    let node = Launch::new("node").with_keys(true).on(Some(last_processor()));
    let node = node.node(lab.store(), &scratch, &[volume("disk", &path)]);
    let backend = Launch::new("backend").with_keys(true).on(Some(0)).backend(lab.host(), &scratch, "disk");
    run_on_processor(0);
    let mut front_end = connect(&scratch, "backend", SHAPE);
    let mut verifier = Verifier::new(DISK_BYTES, 5);
    judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, Duration::from_millis(700));
    let recorded: Vec<_> = recorders.into_iter().flat_map(Recorder::stop).collect();
    assert!(recorded.len() > 1_000, "the attacker heard everything: {} frames", recorded.len());
    let (own, node_mac) = (mac(attacker), mac(lab.store()));
    let hellos = hellos(own, node_mac, scratch.key("node").1);
    let frames = || attack(recorded.clone(), hellos.clone(), node_mac);
    let begin = || Attack::start(attacker, last_processor(), frames());
    // The attacker's processor is not ours, but here it is: what it takes of it shows when the same frames go back to where they come from, and the
    // bridge drops them.
    let begin_elsewhere = || {
        let mut each = frames();
        Attack::start(attacker, last_processor(), move |number| {
            let mut frame = each(number);
            frame[..6].copy_from_slice(&own.0);
            frame
        })
    };

    let running = begin();
    let time = Duration::from_secs(4);
    let outcome = judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, time);
    must(verifier.check_all(&mut front_end));
    println!("under attack {}", outcome.line());
    let rate = running.stop();
    println!("{rate:.0} frames a second, {:.0} of them HELLOs", rate * 10.0 / 12.0);
    assert!(rate * 10.0 / 12.0 >= 9_500.0, "the flood is a flood");

    let memory_before = node.memory_kib();
    let shares = shares_of_throughput(&mut front_end, [&begin, &begin_elsewhere]);
    let memory = node.memory_kib();
    println!("the node has {memory} KiB, {memory_before} before");
    let report = node.node_report();
    println!("dropped {:?}", report.workers[0].counters.as_ref().map(|counters| &counters.dropped));
    assert_eq!(report.sessions.len(), 1, "nobody else was let in: {:?}", report.sessions);
    assert_eq!(disk(&backend).counters.expect("stats were asked for").reconnects, 0);
    assert!(memory < memory_before + (8 << 10), "the node's memory is bounded");
    assert!(shares[0] > 0.8, "the session keeps its throughput: {shares:.2?} of it alone");
    must(verifier.check_all(&mut front_end));
    drop(front_end);
    backend.stop();
    node.stop();
}

/// What is left of the throughput of 4 KiB reads under each of two attacks, as shares of it alone.
fn shares_of_throughput(front_end: &mut FrontEnd, attacks: [&dyn Fn() -> Attack; 2]) -> [f64; 2] {
    let mut load = Load::random(Op::Read, 4096, DISK_BYTES);
    let mut measure = |running: Option<Attack>| {
        std::thread::sleep(Duration::from_millis(50));
        let iops = must(front_end.run(&mut load, ROUND)).iops();
        running.map(Attack::stop);
        iops
    };
    let (mut alone, mut under) = (Vec::new(), [Vec::new(), Vec::new()]);
    for _ in 0..ROUNDS {
        alone.push(measure(None));
        for (rates, begin) in under.iter_mut().zip(attacks) {
            rates.push(measure(Some(begin())));
        }
    }
    let alone = median(&alone);
    let [with, elsewhere] = under.map(|rates| median(&rates) / alone);
    println!(
        "{alone:.0} requests a second alone, {with:.2} of that under attack, {elsewhere:.2} while the same frames go elsewhere"
    );
    [with, elsewhere]
}

fn grant(node: &Daemon, client: PublicKey, right: GrantRight) {
    let grant = VolumeGrant { volume: "disk".to_owned(), client: client.to_string(), right };
    node.ask(&Request::VolumeGrant(grant)).expect("a grant is taken");
}

fn revoke(node: &Daemon, client: PublicKey) {
    let revoke = VolumeRevoke { volume: "disk".to_owned(), client: client.to_string() };
    node.ask(&Request::VolumeRevoke(revoke)).expect("a revocation is taken");
}

/// Why a backend's disk is where it is.
fn why(backend: &Daemon) -> String {
    disk(backend).state.why.unwrap_or_default()
}

/// Fails when one of two rules is broken: nobody without a right has a disk, and everybody with one gets it soon.
#[test]
fn who_may_not_is_refused_as_specified() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let node = node(&lab, &scratch, "disk");
    let (stranger_key, stranger) = scratch.key("stranger");
    let node_key = scratch.key("node").1.to_string();
    let arguments = ["--key", &stranger_key.to_string_lossy(), "--node-key", &node_key];

    // Without a grant: told nothing, whether the volume is there or not.
    let start = |name, volume| {
        Launch::new(name).with_keys(true).with(&arguments).backend_alone(lab.host(), &scratch, volume)
    };
    let (mut backend, nowhere) = (start("stranger", "disk"), start("nowhere", "no-such-disk"));
    std::thread::sleep(Duration::from_secs(1));
    assert!(!knows_its_volumes(&backend) && !knows_its_volumes(&nowhere));
    assert_eq!(why(&backend).replace("disk", "volume"), why(&nowhere).replace("no-such-disk", "volume"));
    println!("without a grant: {}", why(&backend));
    assert!(node.node_report().sessions.is_empty());
    nowhere.stop();

    // With `ro`: a disk that cannot be written.
    grant(&node, stranger, GrantRight::Ro);
    backend.wait_until("known its volume", knows_its_volumes);
    assert!(disk(&backend).read_only, "the guest sees a read-only disk");
    backend.stop();
    let backend =
        Launch::new("reader").with_keys(true).with(&arguments).backend(lab.host(), &scratch, "disk");
    let error =
        FrontEnd::connect(&scratch.path("reader.sock"), SHAPE).err().expect("this one wants to write");
    assert!(error.to_string().contains("read-only"), "{error}");
    backend.stop();

    // With `rw`, revoked while it works: its requests fail when the time that its operator set is over, and not one is served before the
    // next grant.
    grant(&node, stranger, GrantRight::Rw);
    let arguments = [&arguments[..], &["--on-trouble", "eio-after=300ms"]].concat();
    let mut backend =
        Launch::new("writer").with_keys(true).with(&arguments).backend(lab.host(), &scratch, "disk");
    let mut front_end = connect(&scratch, "writer", SHAPE);
    let mut load = Load::random(Op::Write, 4096, DISK_BYTES);
    must(front_end.run(&mut load, Duration::from_millis(200)));
    let revoked = std::thread::scope(|scope| {
        let revoking = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            revoke(&node, stranger);
            Instant::now()
        });
        let failed = front_end.run(&mut load, Duration::from_secs(3)).expect_err("requests fail");
        let since = revoking.join().expect("it is revoked").elapsed();
        println!("revoked: {failed} after {since:?}");
        since
    });
    assert!(revoked < Duration::from_secs(2), "{revoked:?}");
    assert!(node.node_report().sessions.is_empty(), "its session ended");
    drop(front_end);
    grant(&node, stranger, GrantRight::Rw);
    backend.wait_until("been let in again", |backend| disk(backend).state.name == DiskState::Healthy);
    let mut front_end = connect(&scratch, "writer", SHAPE);
    must(front_end.run(&mut load, Duration::from_millis(200)));

    // Down to `ro` while its guest writes: not one write is taken any more.
    let image = || std::fs::read(scratch.path("disk")).expect("the volume can be read");
    grant(&node, stranger, GrantRight::Ro);
    let before = image();
    let failed = front_end.run(&mut load, Duration::from_secs(3)).expect_err("writes fail");
    println!("writes with ro: {failed}; {}", why(&backend));
    assert!(image() == before, "nothing was written");
    drop(front_end);
    backend.stop();
    node.stop();
}

/// The right key and the wrong shared secret; then the right one.
#[test]
fn a_wrong_shared_secret_lets_nobody_in() {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let [right, wrong] = ["right", "wrong"].map(|name| scratch.key(name).0.to_string_lossy().into_owned());
    let path = scratch.volume("disk", DISK_BYTES);
    let psk = format!("{}={right}", scratch.key("backend").1);
    let launch = Launch::new("node").with_keys(true).with(&["--psk", &psk]);
    let node = launch.node(lab.store(), &scratch, &[volume("disk", &path)]);
    for (name, psk) in [("none", None), ("wrong", Some(&wrong))] {
        let arguments: Vec<&str> = psk.iter().flat_map(|psk| ["--psk", psk.as_str()]).collect();
        let launch = Launch::new(name).with_keys(true).with(&arguments);
        let backend = launch.backend_alone(lab.host(), &scratch, "disk");
        std::thread::sleep(Duration::from_secs(1));
        assert!(!knows_its_volumes(&backend), "{name}");
        assert_eq!(backend.times_said("the node's answer does not open: give the same --psk"), 1);
        backend.stop();
    }
    let launch = Launch::new("right").with_keys(true).with(&["--psk", &right]);
    launch.backend(lab.host(), &scratch, "disk").stop();
    node.stop();
}

/// Writes one pattern all over a disk, and reads it again.
struct Pattern {
    place: u64,
    reading: bool,
}

const PATTERN: &[u8; 16] = b"CIRRO-IN-CLEAR!!";

impl Workload for Pattern {
    fn next(&mut self, _slot: usize, buffer: &Buffer<'_>) -> Option<Io> {
        self.place += 1;
        let op = if self.reading { Op::Read } else { Op::Write };
        buffer.write(&PATTERN.repeat(256));
        Some(Io { op, offset: self.place % 1024 * 4096, bytes: 4096 })
    }

    fn done(&mut self, _slot: usize, _io: &Io, _buffer: &Buffer<'_>) -> Result<(), Corruption> {
        Ok(())
    }
}

/// What two recorders at both ends of the wire hear while the pattern is written and read.
fn heard(keys: bool) -> Vec<Vec<u8>> {
    let (lab, scratch) = (Lab::pair(9000), Scratch::new());
    let recorders = [lab.host(), lab.store()].map(Recorder::start);
    let path = scratch.volume("volume-with-a-name", DISK_BYTES);
    let served = [volume("volume-with-a-name", &path)];
    let node = Launch::new("node").with_keys(keys).node(lab.store(), &scratch, &served);
    let launch = Launch::new("backend").with_keys(keys);
    let backend = launch.backend(lab.host(), &scratch, "volume-with-a-name");
    let mut front_end = connect(&scratch, "backend", SHAPE);
    for reading in [false, true] {
        must(front_end.run(&mut Pattern { place: 0, reading }, Duration::from_millis(300)));
    }
    drop(front_end);
    backend.stop();
    node.stop();
    recorders.into_iter().flat_map(Recorder::stop).collect()
}

/// Without keys both are there, or the test would see nothing.
#[test]
fn nothing_of_the_disk_is_on_the_wire_in_clear() {
    for keys in [false, true] {
        let frames = heard(keys);
        let count = |text: &[u8]| {
            frames.iter().filter(|frame| frame.windows(text.len()).any(|window| window == text)).count()
        };
        let (patterns, names) = (count(PATTERN), count(b"volume-with-a-name"));
        println!(
            "keys {keys}: {} frames, {patterns} with the pattern, {names} with the volume's name",
            frames.len()
        );
        assert!(frames.len() > 100);
        assert_eq!((patterns > 100, names > 0), (!keys, !keys));
    }
}
