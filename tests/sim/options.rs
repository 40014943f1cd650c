//! What a run is made of: everything follows from the seed, and can be printed.
//!
//! Knows ranges and units; runs nothing. Called by `main`, and by named scenarios, which change what they are about.

use cirro_backend::trouble::OnTrouble;
use cirro_protocol::time::Nanos;
use fastrand::Rng;

use crate::disk::DiskTrouble;
use crate::guest::RingOptions;
use crate::host::{DiskOptions, REQUESTS_BETWEEN_RESTS};
use crate::wire::Weather;

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Everything that looks like chance comes from it.
    pub(crate) seed: u64,
    /// Bytes after the Ethernet header, the same for all.
    pub(crate) mtu: usize,
    pub(crate) volumes: usize,
    pub(crate) volume_bytes: usize,
    /// OK means stable.
    pub(crate) write_through: bool,
    /// Pools of the node for writes and reads, in bytes.
    pub(crate) pools: (usize, usize),
    pub(crate) hosts: Vec<Vec<DiskOptions>>,
    /// Guests wait up to this between two looks.
    pub(crate) think_max: Nanos,
    /// Trouble lasts so long; then everything heals.
    pub(crate) trouble_time: Nanos,
    /// Mean time between two changes.
    pub(crate) change_every: Nanos,
    /// What may happen.
    pub(crate) may: May,
    /// Frames of before are sent again by a stranger, in millionths of the frames; and garbage is.
    pub(crate) replays: u32,
    pub(crate) forgeries: u32,
    /// Frames are protected by keys, and the stranger does his worst.
    pub(crate) keys: bool,
}

/// What may happen in a run, each as a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct May {
    pub(crate) weather: u32,
    pub(crate) cut: u32,
    pub(crate) pause: u32,
    pub(crate) link_down: u32,
    pub(crate) node_kill: u32,
    pub(crate) node_power: u32,
    pub(crate) node_stop: u32,
    pub(crate) host_kill: u32,
    pub(crate) host_power: u32,
    pub(crate) blackout: u32,
    pub(crate) stall: u32,
    pub(crate) ring_restart: u32,
    pub(crate) ring_reset: u32,
    pub(crate) disk_slow: u32,
    pub(crate) disk_errors: u32,
    pub(crate) flush_errors: u32,
    pub(crate) clock_jump: u32,
    pub(crate) host_stop: u32,
}

/// A thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Weather,
    Cut,
    Pause,
    LinkDown,
    NodeKill,
    NodePower,
    NodeStop,
    HostKill,
    HostPower,
    Blackout,
    Stall,
    RingRestart,
    RingReset,
    DiskSlow,
    DiskErrors,
    FlushErrors,
    ClockJump,
    HostStop,
}

impl May {
    fn weights(&self) -> [(u32, Event); 18] {
        [
            (self.weather, Event::Weather),
            (self.cut, Event::Cut),
            (self.pause, Event::Pause),
            (self.link_down, Event::LinkDown),
            (self.node_kill, Event::NodeKill),
            (self.node_power, Event::NodePower),
            (self.node_stop, Event::NodeStop),
            (self.host_kill, Event::HostKill),
            (self.host_power, Event::HostPower),
            (self.blackout, Event::Blackout),
            (self.stall, Event::Stall),
            (self.ring_restart, Event::RingRestart),
            (self.ring_reset, Event::RingReset),
            (self.disk_slow, Event::DiskSlow),
            (self.disk_errors, Event::DiskErrors),
            (self.flush_errors, Event::FlushErrors),
            (self.clock_jump, Event::ClockJump),
            (self.host_stop, Event::HostStop),
        ]
    }

    /// Takes a kind of event out, by its name. False: there is none.
    pub(crate) fn forbid(&mut self, name: &str) -> bool {
        let field = match name {
            "weather" => &mut self.weather,
            "cut" => &mut self.cut,
            "pause" => &mut self.pause,
            "link-down" => &mut self.link_down,
            "node-kill" => &mut self.node_kill,
            "node-power" => &mut self.node_power,
            "node-stop" => &mut self.node_stop,
            "host-kill" => &mut self.host_kill,
            "host-power" => &mut self.host_power,
            "blackout" => &mut self.blackout,
            "stall" => &mut self.stall,
            "ring-restart" => &mut self.ring_restart,
            "ring-reset" => &mut self.ring_reset,
            "disk-slow" => &mut self.disk_slow,
            "disk-errors" => &mut self.disk_errors,
            "flush-errors" => &mut self.flush_errors,
            "clock-jump" => &mut self.clock_jump,
            "host-stop" => &mut self.host_stop,
            _ => return false,
        };
        *field = 0;
        true
    }

    /// The next thing to happen, if anything may.
    pub(crate) fn choose(&self, rng: &mut Rng) -> Option<Event> {
        let weights = self.weights();
        let total: u32 = weights.iter().map(|(weight, _)| weight).sum();
        let mut roll = if total > 0 { rng.u32(0..total) } else { return None };
        weights.iter().find_map(|(weight, event)| {
            let found = roll < *weight;
            roll = roll.wrapping_sub(*weight);
            found.then_some(*event)
        })
    }

    /// Each kind is in a run or not; a run of everything finds less than many of a few.
    fn from(rng: &mut Rng) -> May {
        let mut some = |chance: u8| if rng.u8(0..100) < chance { rng.u32(1..=4) } else { 0 };
        // What a disk does wrong shows only when something else goes wrong as well: what it forgot, at a loss of power; what it
        // does late, when a guest has begun anew meanwhile.
        let (flush_errors, disk_slow) = (some(30), some(50));
        May {
            weather: some(70),
            cut: some(40),
            pause: some(20),
            link_down: some(20),
            node_kill: some(50),
            node_power: some(if flush_errors > 0 { 80 } else { 25 }),
            node_stop: some(20),
            host_kill: some(40),
            host_power: some(if disk_slow > 0 { 50 } else { 10 }),
            blackout: some(10),
            stall: some(30),
            ring_restart: some(20),
            ring_reset: some(if disk_slow > 0 { 60 } else { 20 }),
            disk_slow,
            disk_errors: some(10),
            flush_errors,
            clock_jump: some(15),
            host_stop: some(20),
        }
    }
}

impl Options {
    /// The run of a seed.
    pub(crate) fn of(seed: u64) -> Options {
        let mut rng = Rng::with_seed(seed);
        let rng = &mut rng;
        let volumes = rng.usize(1..=3);
        let hosts = rng.usize(1..=2);
        let meddling = if rng.u8(0..8) == 0 { 10 } else { 0 };
        let garbage = if rng.u8(0..4) == 0 { 4 } else { 0 };
        let ring = |rng: &mut Rng| RingOptions {
            size: *rng.choice(&[8u16, 32, 64, 256]).expect("some"),
            depth: *rng.choice(&[1usize, 4, 16, 31]).expect("some"),
            event_idx: rng.bool(),
            garbage,
            flushes: rng.u32(0..12),
            big: if rng.u8(0..3) == 0 { 5 } else { 0 },
            meddling,
            discards: rng.bool(),
            corner: *rng.choice(&[2, 16, 64]).expect("some"),
        };
        let trouble_time = Nanos::from_millis(rng.u64(50..8_000));
        let disk = |rng: &mut Rng, volume: usize| {
            let rings = (0..rng.usize(1..=2)).map(|_| ring(rng)).collect();
            let requests = *rng.choice(&[30, 80, 150, 300]).expect("some");
            // Trouble meets requests only while there are some: most guests take about as long as it does.
            let rests = requests as u64 / REQUESTS_BETWEEN_RESTS;
            let rest_max = if rng.u8(0..4) == 0 { 0 } else { 2 * trouble_time.0 / rests };
            DiskOptions {
                volume,
                rings,
                requests,
                rest_max: Nanos(rest_max),
                write_through: rng.u8(0..8) == 0,
                take_over: false,
                on_trouble: match rng.u8(0..8) {
                    0 => OnTrouble::EioAfter(Nanos::from_millis(rng.u64(50..2_000))),
                    _ => OnTrouble::Wait,
                },
            }
        };
        let mut of_hosts: Vec<Vec<DiskOptions>> = vec![Vec::new(); hosts];
        for volume in 0..volumes {
            of_hosts[volume % hosts].push(disk(rng, volume));
        }
        // Two hosts fight for a volume now and then.
        if hosts == 2 && rng.u8(0..3) == 0 {
            let rival = DiskOptions { take_over: rng.bool(), ..disk(rng, 0) };
            of_hosts[1].push(rival);
        }
        of_hosts.retain(|disks| !disks.is_empty());
        let strangers = rng.u8(0..4) == 0;
        let keys = seed.is_multiple_of(8);
        Options {
            seed,
            mtu: *rng.choice(&[1500, 1500, 4200, 9000, 9000, 65535]).expect("some"),
            volumes,
            volume_bytes: 2 << 20,
            write_through: rng.u8(0..3) == 0,
            pools: *rng.choice(&[(4 << 20, 2 << 20), (32 << 20, 8 << 20)]).expect("some"),
            hosts: of_hosts,
            think_max: Nanos::from_micros(*rng.choice(&[200, 2_000, 20_000]).expect("some")),
            trouble_time,
            change_every: Nanos::from_millis(*rng.choice(&[20, 100, 300, 800]).expect("some")),
            may: May::from(rng),
            replays: if strangers || keys { 20_000 } else { 0 },
            forgeries: if strangers || keys { 20_000 } else { 0 },
            keys,
        }
    }

    /// A quiet run: nothing happens but what a scenario adds.
    #[cfg(test)]
    pub(crate) fn quiet(seed: u64) -> Options {
        Options { may: May::default(), replays: 0, forgeries: 0, keys: false, ..Options::of(seed) }
    }

    /// The run whose instructions are counted: one disk, a full ring, nothing happens.
    pub(crate) fn steady(requests: usize) -> Options {
        let ring = RingOptions {
            size: 256,
            depth: 31,
            event_idx: true,
            garbage: 0,
            flushes: 1,
            big: 0,
            meddling: 0,
            discards: false,
            corner: 64,
        };
        let disk = DiskOptions {
            volume: 0,
            rings: vec![ring],
            requests,
            rest_max: Nanos(0),
            write_through: false,
            take_over: false,
            on_trouble: OnTrouble::Wait,
        };
        Options {
            mtu: 9000,
            volumes: 1,
            write_through: false,
            pools: (32 << 20, 8 << 20),
            hosts: vec![vec![disk]],
            think_max: Nanos::from_micros(200),
            trouble_time: Nanos::from_millis(50),
            change_every: Nanos::from_millis(800),
            may: May::default(),
            replays: 0,
            forgeries: 0,
            keys: false,
            ..Options::of(1)
        }
    }

    /// What an operator would have to be told of, beside a disk that failed: errors in the log, and of requests, are expected then.
    pub(crate) fn has_operators_cause(&self) -> bool {
        let impatient = self.hosts.iter().flatten().any(|disk| disk.on_trouble != OnTrouble::Wait);
        impatient || self.has_rivals()
    }

    /// Two disks of one volume.
    pub(crate) fn has_rivals(&self) -> bool {
        let mut seen = vec![0; self.volumes];
        self.hosts.iter().flatten().for_each(|disk| seen[disk.volume] += 1);
        seen.iter().any(|count| *count > 1)
    }
}

/// Bad weather of some kind.
pub(crate) fn bad_weather(rng: &mut Rng) -> Weather {
    let mut some = |chance: u8, max: u32| if rng.u8(0..100) < chance { rng.u32(0..=max) } else { 0 };
    let mut weather = Weather {
        loss: some(60, 100_000),
        burst: some(20, 20_000),
        burst_frames: 20,
        long_loss: some(20, 600_000),
        small_loss: some(20, 400_000),
        duplication: some(30, 50_000),
        corruption: some(20, 30_000),
        truncation: some(10, 30_000),
        stragglers: some(50, 200_000),
        ..Weather::default()
    };
    weather.delay = Nanos::from_micros(*rng.choice(&[5, 20, 100, 2_000]).expect("some"));
    weather.jitter = Nanos(if rng.u8(0..3) == 0 { rng.u64(0..500_000) } else { 0 });
    weather.straggle_time = Nanos::from_millis(*rng.choice(&[2, 20, 200]).expect("some"));
    weather.byte_time = Nanos(*rng.choice(&[0, 1, 8]).expect("some"));
    weather.black_hole = (rng.u8(0..10) == 0).then(|| *rng.choice(&[1500, 4500, 9000]).expect("some"));
    weather
}

/// A disk that is slow.
pub(crate) fn slow_disk(rng: &mut Rng) -> DiskTrouble {
    let slow_time = Nanos::from_millis(*rng.choice(&[20, 400, 3_500, 8_000]).expect("some"));
    DiskTrouble { slow: rng.u32(0..200_000), slow_time, ..DiskTrouble::default() }
}

/// A disk that fails reads and writes.
pub(crate) fn failing_disk(rng: &mut Rng) -> DiskTrouble {
    DiskTrouble { errors: rng.u32(0..100_000), no_space: rng.u32(0..50_000), ..DiskTrouble::default() }
}

/// A disk that forgets what it was to make stable.
pub(crate) fn forgetful_disk(rng: &mut Rng) -> DiskTrouble {
    DiskTrouble { flush_errors: rng.u32(0..500_000), ..DiskTrouble::default() }
}
