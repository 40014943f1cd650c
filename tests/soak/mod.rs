//! A soak: two nodes, two backends, three disks with a judge each, and faults from a seed; at the end every sector is read, in the guest's place
//! and in the node's files.
//!
//! Backends are stopped but not killed: the front-end here does not connect again (`qemu/crash-test.sh` kills them under QEMU, which does).
//! Used by `make soak` and, for a minute with a fixed seed, by the end-to-end tests.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::daemons::{Daemon, Launch, Scratch};
use crate::frontend::{Failure, FrontEnd, Outcome, Shape};
use crate::loss::{self, Drop as Dropped};
use crate::netns::{INTERFACE, Lab};
use crate::verify::{Mix, Size, Verifier};

mod schedule;

use schedule::{Fault, NODES, schedule};

const BYTES: u64 = 128 << 20;
const MTU: u32 = 9000;
/// A request that is not done by then has been forgotten: faults follow each other, but never for so long without a chance to get through.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long one kind of load goes on.
const SPELL: Duration = Duration::from_secs(5);
/// The disks: name, node, more of its description there, and queues and depth of the front-end.
const DISKS: [(&str, usize, &str, usize, usize); 3] = [
    ("a", 0, "durability=write-back", 1, 32),
    ("b", 0, "durability=write-through", 2, 16),
    ("c", 1, "durability=write-back", 4, 4),
];
/// The disks of each backend process.
const BACKEND_DISKS: [&[&str]; 2] = [&["a", "b"], &["c"]];

/// What a soak is.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Decides the faults and the load.
    pub seed: u64,
    /// How long faults go on.
    pub time: Duration,
}

/// Says how to repeat the run, if it fails.
struct Repeat(Options);

impl Repeat {
    fn command(&self) -> String {
        format!("make soak MINUTES={} SEED={}", self.0.time.as_secs().div_ceil(60), self.0.seed)
    }
}

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("FAILED; the same faults again: {}", self.command());
        }
    }
}

struct Soak {
    // Daemons end before their machines.
    nodes: Vec<Option<Daemon>>,
    backends: Vec<Daemon>,
    scratch: Scratch,
    lab: Lab,
    loss_per_mille: u32,
}

/// Runs a soak.
///
/// # Panics
/// A promise was broken: an error or wrong data in a guest's place, a request without an end, an `ERROR` in a log, a daemon that died.
pub fn run(options: Options) {
    let repeat = Repeat(options);
    let faults = schedule(options.seed, options.time);
    println!(
        "soak: seed {}, {} faults in {:?} ({})",
        options.seed,
        faults.len(),
        options.time,
        repeat.command()
    );
    let mut soak = Soak::start();
    let sockets = DISKS.map(|(name, ..)| soak.scratch.path(&format!("{name}.sock")));
    let judges = std::thread::scope(|scope| {
        let guests: Vec<_> = (0..DISKS.len())
            .map(|index| {
                let socket = &sockets[index];
                scope.spawn(move || guest(index, socket, options))
            })
            .collect();
        soak.suffer(&faults);
        guests.into_iter().map(|guest| guest.join().expect("a guest ran into what is said above")).collect()
    });
    soak.end(judges);
    println!("soak: every sector is right, here and in the nodes' files");
}

/// Works on a disk for as long as there are faults, then reads all of it.
fn guest(index: usize, socket: &Path, options: Options) -> Verifier {
    let (name, _, _, queues, depth) = DISKS[index];
    let shape = Shape { queues, depth, bytes_max: 256 << 10, poll: false };
    let mut front_end = FrontEnd::connect(socket, shape).expect("the backend is there");
    front_end.set_patience(PATIENCE);
    let mut random = fastrand::Rng::with_seed(options.seed ^ index as u64);
    let mut verifier = Verifier::new(BYTES, random.u32(..));
    let end = Instant::now() + options.time;
    let (mut requests, mut worst) = (0, Duration::ZERO);
    while Instant::now() < end {
        let size = [Size::Fixed(4096), Size::UpTo(64 << 10), Size::UpTo(256 << 10)][random.usize(..3)];
        let mix = [Mix::ReadWrite, Mix::Write, Mix::Everything, Mix::Everything][random.usize(..4)];
        let spell = SPELL.min(end - Instant::now());
        let outcome = must(name, verifier.run(&mut front_end, size, mix, spell));
        requests += outcome.requests;
        worst = worst.max(outcome.worst());
    }
    must(name, verifier.check_all(&mut front_end));
    println!("disk {name}: {requests} requests, the longest took {worst:?}; every sector read");
    verifier
}

fn must(name: &str, result: Result<Outcome, Failure>) -> Outcome {
    result.unwrap_or_else(|failure| panic!("disk {name}: {failure}"))
}

impl Soak {
    fn start() -> Soak {
        let (lab, scratch) = (Lab::pair(MTU), Scratch::new());
        for (name, ..) in DISKS {
            scratch.volume(&format!("{name}.img"), BYTES);
        }
        let mut soak = Soak { nodes: Vec::new(), backends: Vec::new(), scratch, lab, loss_per_mille: 0 };
        soak.nodes = (0..NODES).map(|index| Some(soak.start_node(index))).collect();
        soak.backends = (0..BACKEND_DISKS.len()).map(|index| soak.start_backend(index)).collect();
        soak
    }

    fn start_node(&self, index: usize) -> Daemon {
        let of_it = DISKS.iter().filter(|(_, node, ..)| *node == index);
        let volumes: Vec<String> = of_it
            .map(|(name, _, more, ..)| {
                let path = self.scratch.path(&format!("{name}.img"));
                format!("{name}={},{more}", path.display())
            })
            .collect();
        Launch::new(&format!("node{index}")).node(self.lab.store(), &self.scratch, &volumes)
    }

    fn start_backend(&self, index: usize) -> Daemon {
        let disks: Vec<(&str, &str)> = BACKEND_DISKS[index].iter().map(|name| (*name, "")).collect();
        let name = format!("backend{index}");
        Launch::new(&name).backends(self.lab.host(), &self.scratch, &disks)
    }

    /// Does every fault at its time, then makes the wire whole.
    fn suffer(&mut self, faults: &[(Duration, Fault)]) {
        let start = Instant::now();
        for (rest, fault) in faults {
            std::thread::sleep(*rest);
            println!("[{:>7.1} s] {fault}", start.elapsed().as_secs_f64());
            self.commit(*fault);
        }
        self.loss_per_mille = 0;
        self.drop_frames([None, None]);
        println!("[{:>7.1} s] no more faults", start.elapsed().as_secs_f64());
    }

    fn commit(&mut self, fault: Fault) {
        let sleep = || std::thread::sleep(fault.length());
        match fault {
            Fault::KillNode(index, _) => {
                self.take_node(index).kill();
                sleep();
                self.nodes[index] = Some(self.start_node(index));
            }
            Fault::RestartNode(index) => {
                self.take_node(index).stop();
                self.nodes[index] = Some(self.start_node(index));
            }
            Fault::StallNode(index, _) => stall(self.nodes[index].as_ref().expect("it runs"), fault.length()),
            Fault::StallBackend(index, _) => stall(&self.backends[index], fault.length()),
            Fault::LinkDown(_) => {
                let set = |state| {
                    let line = format!("ip link set {INTERFACE} {state}");
                    self.lab.store().namespace().shell(&line);
                };
                set("down");
                sleep();
                set("up");
            }
            Fault::Cut(_) => self.drop_for([Some(Dropped::All); 2], fault.length()),
            Fault::CutOneWay(at, _) => {
                let mut drops = [None; 2];
                drops[at] = Some(Dropped::All);
                self.drop_for(drops, fault.length());
            }
            Fault::Narrow(_) => self.drop_for([Some(Dropped::LongerThan(1500)); 2], fault.length()),
            Fault::Loss(per_mille) => {
                self.loss_per_mille = per_mille;
                self.drop_frames([None, None]);
            }
        }
    }

    fn take_node(&mut self, index: usize) -> Daemon {
        self.nodes[index].take().expect("it runs")
    }

    fn drop_for(&self, drops: [Option<Dropped>; 2], time: Duration) {
        self.drop_frames(drops);
        std::thread::sleep(time);
        self.drop_frames([None, None]);
    }

    /// At each machine: this, and the random loss that is in force.
    fn drop_frames(&self, drops: [Option<Dropped>; 2]) {
        for (machine, drop) in self.lab.machines().iter().zip(drops) {
            let mut rules = vec![Dropped::PerMille(self.loss_per_mille)];
            rules.extend(drop);
            loss::set(machine, &rules);
        }
    }

    /// Ends all daemons, which must have had nothing to complain about, and compares the nodes' files.
    fn end(self, judges: Vec<Verifier>) {
        let Soak { nodes, backends, scratch, lab, .. } = self;
        for daemon in backends.into_iter().chain(nodes.into_iter().flatten()) {
            assert_eq!(
                daemon.times_said(" ERROR "),
                0,
                "an error without an operator's cause:\n{}",
                daemon.log_tail()
            );
            daemon.stop();
        }
        for ((name, ..), mut judge) in DISKS.iter().zip(judges) {
            let image = std::fs::read(scratch.path(&format!("{name}.img"))).expect("the volume is there");
            judge
                .check_image(&image)
                .unwrap_or_else(|wrong| panic!("the node's file of disk {name}: {wrong}"));
        }
        drop(lab);
    }
}

fn stall(daemon: &Daemon, time: Duration) {
    daemon.pause();
    std::thread::sleep(time);
    daemon.resume();
}
