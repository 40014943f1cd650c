//! A run: one node, its hosts and their wire on virtual time, troubled by chance, then healed, then judged.
//!
//! Knows when who takes a turn; does not know what a turn does. One seed is one run: every choice comes from its generator, and everything that is sent goes
//! into the run's hash. Called by `main` and by named scenarios.

use std::cell::{Cell, RefCell};
use std::hash::Hasher;
use std::rc::Rc;

use cirro_node::volume::{Durability, Volume};
use cirro_protocol::time::{Instant, Nanos};
use fastrand::Rng;
use siphasher::sip::SipHasher13;

use crate::disk::{DiskTrouble, Image, Kernel, SECTOR};
use crate::host::{Host, HostParts};
use crate::keys;
use crate::logger;
use crate::machine::{Ended, Machine, open_volume};
use crate::options::{Event, Options, bad_weather, failing_disk, forgetful_disk, slow_disk};
use crate::oracle::{Court, Oracle, Shared, Violation};
use crate::wire::{Port, Weather, Wire, WireCounts};

/// After the healing everything must have ended within this.
const HEALING_TIME: Nanos = Nanos::from_secs(90);
/// Two hosts that fight for a volume are given so long to finish what they can.
const RIVALS_TIME: Nanos = Nanos::from_secs(20);
/// Then the backends have met the node again: an idle one asks every 10 s, and of two that ask at once one is told later.
const SETTLING_TIME: Nanos = Nanos::from_secs(20);
/// Turns of a run: more is a busy loop.
const TURNS_MAX: u64 = 500_000;
/// When a run begins: not at 0, which production code may take for "never".
const START: Instant = Instant(1_000_000_000);

/// How a run ended.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) hash: u64,
    pub(crate) requests: u64,
    pub(crate) failed_requests: u64,
    pub(crate) virtual_time: Nanos,
    pub(crate) turns: u64,
    pub(crate) wire: WireCounts,
    pub(crate) events: u64,
    pub(crate) violation: Option<Violation>,
}

/// Who takes turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Node,
    Host(usize),
}

/// A process's place in time.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The next turn without a cause from outside.
    wake: Option<Instant>,
    /// Busy, or stalled, until then.
    free_at: Instant,
    /// Starts (again) then.
    start_at: Option<Instant>,
}

/// A cure that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cure {
    Weather(usize, usize),
    LinkUp(usize),
    Disk,
    /// A backend that was asked to end has ended.
    StoppedHost(usize),
}

/// The run.
pub(crate) struct World {
    pub(crate) options: Options,
    pub(crate) now: Instant,
    rng: Rng,
    wire: Wire,
    pub(crate) machine: Machine,
    pub(crate) hosts: Vec<Host>,
    places: Vec<Place>,
    oracles: Vec<Rc<RefCell<Oracle>>>,
    pub(crate) court: Shared,
    cures: Vec<(Instant, Cure)>,
    next_event: Instant,
    events: u64,
    turns: u64,
    hash: SipHasher13,
    trace: bool,
    look_at: Vec<Option<Instant>>,
    /// Errors in the log are an operator's business in this run.
    errors_expected: bool,
}

thread_local! {
    static FOLDER: tempfile::TempDir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    static VIRTUAL_NOW: Cell<Instant> = const { Cell::new(Instant(0)) };
}

/// The time of the run on this thread, for log lines.
pub(crate) fn virtual_now() -> Instant {
    VIRTUAL_NOW.get()
}

fn volume(options: &Options) -> Volume {
    let durability = if options.write_through { Durability::WriteThrough } else { Durability::WriteBack };
    FOLDER.with(|folder| open_volume(folder.path(), options.volume_bytes, durability))
}

impl World {
    pub(crate) fn new(options: Options, trace: bool) -> World {
        let mut rng = Rng::with_seed(options.seed ^ 0x5eed);
        let court = Shared::new(RefCell::new(Court::default()));
        let ports: Vec<_> =
            (0..=options.hosts.len()).map(|number| Port::new(number as u8 + 1, options.mtu)).collect();
        let images =
            (0..options.volumes).map(|_| Image::new(options.volume_bytes, options.write_through)).collect();
        let kernel = Rc::new(RefCell::new(Kernel::new(images, rng.fork())));
        let takes = [0, 100_000, 5_000_000][rng.usize(0..3)];
        let volumes = vec![volume(&options); options.volumes];
        let hosts_with_keys = options.keys.then_some(options.hosts.len());
        let seed = options.seed;
        let machine =
            Machine::new(Rc::clone(&ports[0]), kernel, volumes, options.pools, (seed, hosts_with_keys));
        machine.keeper.set_time(Nanos(takes));
        let oracles: Vec<_> =
            (0..options.volumes).map(|_| Rc::new(RefCell::new(Oracle::default()))).collect();
        let host = |(number, disks): (usize, &Vec<_>)| {
            Host::new(HostParts {
                port: Rc::clone(&ports[number + 1]),
                number: number as u16,
                disks: disks.clone(),
                oracles: oracles.clone(),
                court: Rc::clone(&court),
                volume_sectors: (options.volume_bytes / SECTOR) as u64,
                think_max: options.think_max,
                seed: options.seed ^ ((number as u64 + 1) << 32),
                keys: options.keys.then_some(options.seed),
            })
        };
        let hosts: Vec<Host> = options.hosts.iter().enumerate().map(host).collect();
        let start =
            |_| Place { wake: None, free_at: START, start_at: Some(START + Nanos(rng.u64(0..20_000_000))) };
        let places: Vec<Place> = (0..=hosts.len()).map(start).collect();
        let mut wire = Wire::new(ports);
        (wire.replays, wire.forgeries, wire.attacks) = (options.replays, options.forgeries, options.keys);
        let mut world = World {
            now: START,
            wire,
            machine,
            look_at: vec![None; hosts.len()],
            errors_expected: options.has_operators_cause(),
            hosts,
            places,
            oracles,
            court,
            cures: Vec::new(),
            next_event: START,
            events: 0,
            turns: 0,
            hash: SipHasher13::new(),
            trace,
            rng,
            options,
        };
        world.plan_event();
        world
    }

    /// Trouble, healing, judgement.
    pub(crate) fn run(mut self) -> Outcome {
        logger::begin();
        keys::begin();
        self.run_for(self.options.trouble_time);
        self.finish()
    }

    /// Time passes, with whatever may happen in it.
    pub(crate) fn run_for(&mut self, span: Nanos) {
        let end = self.now + span;
        while self.now < end && self.is_well() {
            self.step(end);
        }
    }

    /// Everything heals, everybody finishes, and all is judged.
    pub(crate) fn finish(mut self) -> Outcome {
        self.heal();
        let end = self.now + HEALING_TIME;
        let rivals_end = self.now + RIVALS_TIME;
        while self.is_well() && !self.is_done() {
            if self.options.has_rivals() && self.now >= rivals_end {
                // Who lost the volume waits for it for ever: that guest is shut down, as its operator would.
                self.hosts.iter_mut().for_each(Host::shut_down_waiting);
            }
            if self.now >= end {
                let hosts: Vec<String> = self.hosts.iter().map(Host::report).collect();
                self.court
                    .borrow_mut()
                    .violation(format!("not done in time after everything was healed: {}", hosts.join("; ")));
                break;
            }
            self.step(end);
        }
        // A node that was started last may not have been given what it forgot yet.
        self.run_for(SETTLING_TIME);
        self.judge();
        let court = self.court.borrow();
        Outcome {
            hash: self.hash.finish(),
            requests: court.requests,
            failed_requests: court.failed_requests,
            virtual_time: self.now.since(START),
            turns: self.turns,
            wire: self.wire.counts,
            events: self.events,
            violation: court.violations.first().cloned(),
        }
    }

    pub(crate) fn is_well(&self) -> bool {
        self.court.borrow().violations.is_empty()
    }

    fn is_done(&self) -> bool {
        self.hosts.iter().all(Host::is_done)
    }

    /// One moment: whatever is due first, and the turns that follow from it.
    pub(crate) fn step(&mut self, end: Instant) {
        let next = self.next_moment().unwrap_or(end).max(self.now).min(end);
        self.now = next;
        VIRTUAL_NOW.set(next);
        self.wire.deliver(next, |_| {});
        self.machine.look(next);
        self.cure();
        if next >= self.next_event {
            self.happen();
            self.plan_event();
        }
        for index in 0..self.places.len() {
            if self.places[index].start_at.is_some_and(|at| at <= next) {
                self.start(index);
            }
        }
        for host in 0..self.hosts.len() {
            self.look_at[host] = self.hosts[host].live(next, &mut self.rng);
        }
        let first = self.rng.usize(0..self.places.len());
        for offset in 0..self.places.len() {
            self.take_turn((first + offset) % self.places.len());
        }
        if self.turns > TURNS_MAX {
            self.court.borrow_mut().violation("turns without end: a busy loop");
        }
    }

    fn who(index: usize) -> Who {
        if index == 0 { Who::Node } else { Who::Host(index - 1) }
    }

    fn wants_turn(&self, index: usize) -> bool {
        let place = &self.places[index];
        let called = match World::who(index) {
            Who::Node => {
                self.machine.is_up()
                    && (self.machine.port.borrow().has_frames()
                        || self.machine.next_due().is_some_and(|at| at <= self.now))
            }
            Who::Host(host) => self.hosts[host].is_up() && self.hosts[host].is_called(),
        };
        called || place.wake.is_some_and(|at| at <= self.now)
    }

    fn take_turn(&mut self, index: usize) {
        if self.places[index].free_at > self.now || !self.wants_turn(index) {
            return;
        }
        self.turns += 1;
        let cost = Nanos(self.rng.u64(500..8_000));
        self.places[index].free_at = self.now + cost;
        let ended = match World::who(index) {
            Who::Node => self.machine.turn(self.now),
            Who::Host(host) => self.hosts[host].turn(self.now),
        };
        let (hash, now, trace) = (&mut self.hash, self.now, self.trace);
        self.wire.collect(now, &mut self.rng, index, |bytes| {
            hash.write_u64(now.0);
            hash.write(bytes);
            if trace {
                eprintln!("{:>12} us port {index} sends {} bytes", now.since(START).as_micros(), bytes.len());
            }
        });
        match ended {
            Ended::At(wake) => self.places[index].wake = wake,
            Ended::Killed => self.kill(index, "in the middle of a turn"),
            Ended::Panicked(what) => {
                self.court.borrow_mut().violation(format!("process {index} panicked: {what}"));
                self.places[index].wake = None;
            }
        }
        self.follow_owners();
        if index == 0 && self.machine.has_stopped() {
            self.kill(0, "after SIGTERM");
        }
    }

    /// Whoever takes a volume over takes it as it is: what its last owner had not flushed is nobody's to write again. So is what an owner could not flush
    /// before it gave the volume back, and an operator was told of.
    fn follow_owners(&mut self) {
        for (name, before, after) in self.machine.keeper.take_changes() {
            let now = self.court.borrow_mut().tick();
            let volume = (0..self.oracles.len()).find(|index| Machine::volume_name(*index).as_str() == name);
            let volume = volume.expect("a volume of the run");
            let mut oracle = self.oracles[volume].borrow_mut();
            oracle.set_owner(after, now);
            let given_back = before.is_some() && after.is_none();
            if given_back && self.machine.kernel.borrow().has_failed_flush(volume) {
                oracle.lose_host(now);
            }
            if let (Some(before), Some(after)) = (before, after) {
                oracle.lose_host(now);
                if !self.hosts.iter().any(|host| host.may_take_over(after)) {
                    self.court
                        .borrow_mut()
                        .violation(format!("{name} went from {before} to {after}, who may not take it"));
                }
            }
        }
    }

    fn next_moment(&self) -> Option<Instant> {
        let busy = (0..self.places.len()).filter_map(|index| {
            let place = &self.places[index];
            let called = match World::who(index) {
                Who::Node => self.machine.is_up() && self.machine.port.borrow().has_frames(),
                Who::Host(host) => self.hosts[host].is_up() && self.hosts[host].is_called(),
            };
            let wake = if called { Some(self.now) } else { place.wake };
            wake.map(|at| at.max(place.free_at))
        });
        // What the kernel has done is looked at by the node when it is free.
        let kernel = self
            .machine
            .next_due()
            .map(|at| if self.machine.is_up() { at.max(self.places[0].free_at) } else { at });
        let starts = self.places.iter().filter_map(|place| place.start_at);
        let cures = self.cures.iter().map(|(at, _)| *at);
        let others = [self.wire.next_due(), kernel, Some(self.next_event)].into_iter().flatten();
        busy.chain(starts).chain(cures).chain(others).chain(self.look_at.iter().copied().flatten()).min()
    }

    fn start(&mut self, index: usize) {
        self.places[index].start_at = None;
        self.places[index].wake = Some(self.now);
        match World::who(index) {
            Who::Node => {
                self.machine.start();
                self.machine.look(self.now);
            }
            Who::Host(host) => self.hosts[host].start(self.now),
        }
        self.say(format_args!("process {index} starts"));
    }

    /// `kill -9` of a process: 0 is the node, then the hosts. It comes back by itself.
    pub(crate) fn kill(&mut self, index: usize, how: &str) {
        self.say(format_args!("process {index} dies {how}"));
        match World::who(index) {
            Who::Node => {
                self.machine.kill(&mut self.rng);
                let now = self.court.borrow_mut().tick();
                self.oracles.iter().for_each(|oracle| oracle.borrow_mut().end_node(now));
            }
            Who::Host(host) => self.hosts[host].kill(),
        }
        let back = self.now + Nanos::from_millis(*self.rng.choice(&[1, 20, 300, 3_000]).expect("some"));
        self.places[index] = Place { wake: None, free_at: self.now, start_at: Some(back) };
    }

    pub(crate) fn say(&self, what: std::fmt::Arguments<'_>) {
        if self.trace {
            eprintln!("{:>12} us {what}", self.now.since(START).as_micros());
        }
    }

    fn plan_event(&mut self) {
        let mean = self.options.change_every.0;
        self.next_event = self.now + Nanos(self.rng.u64(1..=2 * mean));
    }

    fn cure_later(&mut self, cure: Cure) {
        let after = match self.rng.u8(0..4) {
            0 => self.rng.u64(1..8_000),
            1 => self.rng.u64(1..500),
            _ => self.rng.u64(1..50),
        };
        self.cures.push((self.now + Nanos::from_millis(after), cure));
    }

    fn cure(&mut self) {
        while let Some(place) = self.cures.iter().position(|(at, _)| *at <= self.now) {
            let (_, cure) = self.cures.swap_remove(place);
            match cure {
                Cure::Weather(from, to) => {
                    self.wire.set(self.now, &mut self.rng, (from, to), Weather::default())
                }
                Cure::LinkUp(0) => self.machine.port.borrow_mut().down = false,
                Cure::LinkUp(index) => self.hosts[index - 1].port.borrow_mut().down = false,
                Cure::StoppedHost(index) if self.hosts[index - 1].is_up() => {
                    self.kill(index, "after SIGTERM")
                }
                Cure::StoppedHost(_) => {}
                Cure::Disk => self.trouble_disks(&DiskTrouble::default()),
            }
        }
    }

    pub(crate) fn trouble_disks(&mut self, trouble: &DiskTrouble) {
        self.machine.kernel.borrow_mut().images.iter_mut().for_each(|image| image.trouble = trouble.clone());
    }

    fn happen(&mut self) {
        let Some(event) = self.options.may.choose(&mut self.rng) else { return };
        self.events += 1;
        let index = self.rng.usize(0..self.places.len());
        let host = self.rng.usize(0..self.hosts.len());
        self.say(format_args!("{event:?} (process {index}, host {host})"));
        match event {
            Event::Weather => self.spoil_weather(host + 1, bad_weather),
            Event::Cut => self.spoil_weather(host + 1, |_| Weather { cut: true, ..Weather::default() }),
            Event::Pause => self.spoil_weather(host + 1, |_| Weather { paused: true, ..Weather::default() }),
            Event::LinkDown => {
                let port = if index == 0 { &self.machine.port } else { &self.hosts[index - 1].port };
                port.borrow_mut().down = true;
                self.cure_later(Cure::LinkUp(index));
            }
            Event::NodeKill if self.machine.is_up() => self.kill_soon(0),
            Event::HostKill if self.hosts[host].is_up() => self.kill_soon(host + 1),
            Event::NodePower => {
                self.kill(0, "by loss of power");
                self.end_machine();
            }
            Event::NodeStop => self.machine.stop(self.now),
            Event::HostPower => {
                self.kill(host + 1, "by loss of power");
                self.end_host(host);
            }
            Event::Blackout => self.black_out(),
            Event::Stall => {
                let stalled = Nanos::from_millis(*self.rng.choice(&[1, 30, 400, 7_000]).expect("some"));
                self.places[index].free_at = self.now + stalled;
            }
            Event::RingRestart | Event::RingReset => {
                let disk = self.rng.usize(0..self.hosts[host].disks.len());
                self.hosts[host].restart_rings(disk, event == Event::RingReset);
                self.hosts[host].ring_bell();
            }
            Event::DiskSlow => self.spoil_disks(slow_disk),
            Event::DiskErrors => self.spoil_disks(failing_disk),
            Event::FlushErrors => self.spoil_disks(forgetful_disk),
            Event::ClockJump => {
                let port = if index == 0 { &self.machine.port } else { &self.hosts[index - 1].port };
                port.borrow_mut().skew = self.rng.i64(-2_000_000_000..2_000_000_000);
            }
            Event::HostStop => {
                self.hosts[host].stop();
                let patience = Nanos::from_millis(self.rng.u64(0..500));
                self.cures.push((self.now + patience, Cure::StoppedHost(host + 1)));
            }
            Event::NodeKill | Event::HostKill => {}
        }
    }

    fn spoil_weather(&mut self, host: usize, weather: fn(&mut Rng) -> Weather) {
        let ways: &[(usize, usize)] = match self.rng.u8(0..4) {
            0 => &[(0, host)],
            1 => &[(host, 0)],
            _ => &[(0, host), (host, 0)],
        };
        for way in ways {
            let weather = weather(&mut self.rng);
            self.wire.set(self.now, &mut self.rng, *way, weather);
            self.cure_later(Cure::Weather(way.0, way.1));
        }
    }

    fn spoil_disks(&mut self, trouble: fn(&mut Rng) -> DiskTrouble) {
        let trouble = trouble(&mut self.rng);
        self.trouble_disks(&trouble);
        let after = Nanos::from_millis(self.rng.u64(1..3_000));
        self.cures.push((self.now + after, Cure::Disk));
    }

    /// At once, or in the middle of one of its next turns.
    fn kill_soon(&mut self, index: usize) {
        if self.rng.bool() {
            return self.kill(index, "between two turns");
        }
        let port = if index == 0 { &self.machine.port } else { &self.hosts[index - 1].port };
        port.borrow_mut().calls_left = Some(self.rng.u32(0..200));
    }

    fn end_machine(&mut self) {
        self.machine.lose_power(&mut self.rng);
        let now = self.court.borrow_mut().tick();
        self.oracles.iter().for_each(|oracle| oracle.borrow_mut().lose_power(now));
    }

    fn end_host(&mut self, host: usize) {
        self.hosts[host].lose_power();
        let now = self.court.borrow_mut().tick();
        for disk in &self.options.hosts[host] {
            self.oracles[disk.volume].borrow_mut().lose_host(now);
        }
    }

    /// Everybody loses power at once: only what was flushed must be there afterwards.
    fn black_out(&mut self) {
        for index in 0..self.places.len() {
            self.kill(index, "in a blackout");
        }
        (0..self.hosts.len()).for_each(|host| self.end_host(host));
        self.end_machine();
    }

    /// All trouble ends; who is dead is started.
    fn heal(&mut self) {
        self.say(format_args!("everything heals"));
        self.options.may = crate::options::May::default();
        (self.wire.replays, self.wire.forgeries) = (0, 0);
        let count = self.places.len();
        for from in 0..count {
            for to in (0..count).filter(|to| *to != from) {
                self.wire.set(self.now, &mut self.rng, (from, to), Weather::default());
            }
            let port = if from == 0 { &self.machine.port } else { &self.hosts[from - 1].port };
            let mut port = port.borrow_mut();
            (port.down, port.calls_left, port.skew) = (false, None, 0);
            drop(port);
            self.places[from].free_at = self.now;
        }
        // A backend that is asked to end still ends, and its successor starts.
        self.cures.retain(|(_, cure)| matches!(cure, Cure::StoppedHost(_)));
        self.trouble_disks(&DiskTrouble::default());
        self.hosts.iter_mut().for_each(Host::rest_no_more);
        if self.options.has_rivals() {
            self.hosts.iter_mut().for_each(|host| host.quiet = true);
        }
    }

    /// What is on the disks, what guests' memory looks like, what the processes say of themselves.
    fn judge(&mut self) {
        if !self.is_well() {
            return;
        }
        self.hosts.iter_mut().for_each(Host::check_poison);
        let kernel = self.machine.kernel.borrow();
        for (oracle, image) in self.oracles.iter().zip(&kernel.images) {
            let now = self.court.borrow_mut().tick();
            let mut oracle = oracle.borrow_mut();
            for sector in oracle.touched() {
                let at = sector as usize * SECTOR;
                if let Err(what) = oracle.judge(sector, &image.live[at..at + SECTOR], now, now) {
                    self.court.borrow_mut().violation(format!("on the node's disk: {what}"));
                    return;
                }
            }
        }
        if let Some(nonce) = keys::used_twice() {
            self.court.borrow_mut().violation(format!("used twice: {nonce:?}"));
        }
        // With keys no stranger can make a peer break the protocol.
        let strangers = self.options.replays + self.options.forgeries > 0 && !self.options.keys;
        if !strangers && self.machine.violations() > 0 {
            self.court
                .borrow_mut()
                .violation(format!("the node counts {} broken rules", self.machine.violations()));
        }
        let errors_expected = self.errors_expected || kernel.failed > 0;
        let failed = self.court.borrow().failed_requests;
        if failed > 0 && !errors_expected {
            self.court
                .borrow_mut()
                .violation(format!("{failed} requests failed without an operator's cause"));
        }
        if let Some(error) = logger::first_error().filter(|_| !errors_expected) {
            self.court
                .borrow_mut()
                .violation(format!("an error was logged without an operator's cause: {error}"));
        }
    }

    /// The storage machine loses power, and comes back by itself.
    #[cfg(test)]
    pub(crate) fn cut_power(&mut self) {
        self.kill(0, "by loss of power");
        self.end_machine();
    }

    /// Every ring of a host's first disk stops; its driver begins anew or goes on.
    #[cfg(test)]
    pub(crate) fn reset_rings(&mut self, host: usize, anew: bool) {
        self.hosts[host].restart_rings(0, anew);
        self.hosts[host].ring_bell();
    }

    /// True if a process runs.
    #[cfg(test)]
    pub(crate) fn is_up(&self, index: usize) -> bool {
        match World::who(index) {
            Who::Node => self.machine.is_up(),
            Who::Host(host) => self.hosts[host].is_up(),
        }
    }

    /// SIGTERM of a backend.
    #[cfg(test)]
    pub(crate) fn stop_host(&mut self, host: usize) {
        self.hosts[host].stop();
        self.hosts[host].ring_bell();
    }

    /// The weather of a path, for scenarios.
    #[cfg(test)]
    pub(crate) fn set_weather(&mut self, path: (usize, usize), weather: Weather) {
        self.wire.set(self.now, &mut self.rng, path, weather);
    }
}
