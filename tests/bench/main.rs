//! `cirro-bench`: our disk beside the other ways to the same bytes, on the same wire, in one run. `make bench` runs it and writes docs/PERFORMANCE.md.
//!
//! Knows no daemon's inside. Every system gets the same front-end, the same kind of volume and its turn in every round, so that what else the machine
//! does hits all alike. It aborts on failure: the daemons die with it, and the next run removes its namespaces.

mod aoe;
mod limits;
mod machine;
mod peers;
mod plan;
mod plots;
mod table;
mod targets;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cirro_tests::daemons::Scratch;
use cirro_tests::frontend::{FrontEnd, Outcome, Shape};
use cirro_tests::loss;
use cirro_tests::netns::Lab;
use clap::Parser;

use crate::machine::{Placement, busy_time, pin_self};
use crate::peers::{Ours, Peer, Peers, VOLUME_BYTES};
use crate::plan::{Cell, Section};
use crate::table::{Sample, Samples};

/// The section of raw limits, which is not of the plan.
const LIMITS: &str = "limits";
/// How long a system runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(100);
/// A rule that looks at each frame and drops none: what a wire with loss is compared with.
const NO_FRAME: loss::Drop = loss::Drop::LongerThan(65_535);
/// How long one raw limit is measured.
const LIMIT_TIME: Duration = Duration::from_millis(200);

/// Measures our disk beside qemu-storage-daemon over NBD and on the local file.
#[derive(Debug, Parser)]
#[command(
    name = "cirro-bench",
    max_term_width = 120,
    after_help = "Examples:\n  \
        cirro-bench --sections pinned --workloads 'depth 32' --only ours,nbd    a short look\n  \
        cirro-bench --sections pinned,free --only ours,also --also /tmp/before  this build beside another\n\n\
        CIRRO_BIN_DIR names the folder of our daemons; without it they are built first."
)]
struct Flags {
    /// Rounds; each measures everything once.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// How long one measurement lasts, in milliseconds.
    #[arg(long, default_value_t = 700)]
    ms: u64,
    /// Only these sections (limits, pinned, free, sleeping, mtu1500, loss, curve).
    #[arg(long, value_delimiter = ',')]
    sections: Vec<String>,
    /// Only workloads whose name contains this.
    #[arg(long, value_name = "TEXT")]
    workloads: Option<String>,
    /// Only these systems.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Peer>,
    /// The folder of another build of our daemons, measured as a system of its own.
    #[arg(long, value_name = "DIR")]
    also: Option<PathBuf>,
    /// The front-end spins for completions instead of sleeping.
    #[arg(long)]
    spin: bool,
    /// How long our daemons spin before they sleep, in microseconds; their default without it.
    #[arg(long)]
    poll_us: Option<u32>,
    /// Write the tables between the markers of this file, and the plots into the folder `plots` beside it: of a whole run only.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

impl Flags {
    fn wants(&self, section: &str) -> bool {
        self.sections.is_empty() || self.sections.iter().any(|wanted| wanted == section)
    }

    /// Everything is measured, as it is.
    fn is_whole(&self) -> bool {
        let parts = self.sections.len() + self.only.len();
        parts == 0 && self.workloads.is_none() && self.also.is_none() && self.poll_us.is_none() && !self.spin
    }

    /// What of the plan was asked for.
    ///
    /// # Errors
    /// A section that there is not, or nothing at all.
    fn sections(&self) -> Result<Vec<Section>> {
        let mut sections = plan::sections();
        for name in &self.sections {
            let known = name == LIMITS || sections.iter().any(|section| section.key == name);
            ensure!(known, "there is no section '{name}'; see --help");
        }
        sections.retain(|section| self.wants(section.key));
        for section in &mut sections {
            section.groups.retain(|group| {
                self.workloads.as_ref().is_none_or(|part| group.name().contains(part.as_str()))
            });
            for group in &mut section.groups {
                group.peers.retain(|peer| self.only.is_empty() || self.only.contains(peer));
                group.peers.retain(|peer| *peer != Peer::Also || self.also.is_some());
            }
        }
        ensure!(
            self.wants(LIMITS) || !cells(&sections).is_empty(),
            "nothing of the plan is selected; see --help"
        );
        Ok(sections)
    }
}

/// Every cell once, though several sections may show it; those of one workload on one ground, which are compared, one after another.
fn cells(sections: &[Section]) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for cell in sections.iter().flat_map(|section| &section.groups).flat_map(plan::Group::cells) {
        if cells.contains(&cell) {
            continue;
        }
        let is_rival = |other: &Cell| other.workload == cell.workload && other.ground == cell.ground;
        let place = cells.iter().rposition(is_rival).map_or(cells.len(), |place| place + 1);
        cells.insert(place, cell);
    }
    cells
}

/// A wire with the systems on it.
struct Rig {
    mtu: u32,
    // The daemons end before what they run in.
    peers: Peers,
    scratch: Scratch,
    lab: Lab,
}

impl Rig {
    fn start(mtu: u32, cells: &[Cell], ours: &Ours) -> Result<Rig> {
        let (lab, scratch) = (Lab::pair(mtu), Scratch::new());
        let wanted: Vec<Peer> =
            cells.iter().filter(|cell| cell.ground.mtu == mtu).map(|cell| cell.peer).collect();
        let peers = Peers::start(&lab, &scratch, &wanted, ours)?;
        Ok(Rig { mtu, peers, scratch, lab })
    }

    fn measure(&self, cell: Cell, flags: &Flags) -> Result<Sample> {
        self.peers.prepare(&self.lab, cell.peer, cell.ground.placement)?;
        let mut run = self.connect(cell, flags.spin)?;
        match cell.ground.lost_per_mille {
            None => {}
            Some(0) => self.lab.machines().iter().for_each(|machine| loss::set(machine, &[NO_FRAME])),
            Some(rate) => loss::set_both(self.lab.machines(), rate),
        }
        let sample = measure(&mut run, Duration::from_millis(flags.ms));
        loss::set_both(self.lab.machines(), 0);
        sample
    }

    /// What runs the cell's workload for a time: the front-end, or where a system has none the benchmark's own initiator.
    fn connect(&self, Cell { peer, workload, .. }: Cell, spin: bool) -> Result<Box<RunFor>> {
        let mut load = workload.load();
        if peer == Peer::Vblade {
            let mut initiator = aoe::Initiator::open(&self.lab)?;
            return Ok(Box::new(move |time| initiator.run(workload, &mut load, time)));
        }
        let shape = Shape { queues: 1, depth: workload.depth, bytes_max: workload.bytes, poll: spin };
        let socket = self.peers.socket(&self.scratch, peer);
        let mut front_end = FrontEnd::connect(&socket, shape).context("the front-end cannot connect")?;
        ensure!(front_end.capacity() == VOLUME_BYTES, "the disk has {} bytes", front_end.capacity());
        Ok(Box::new(move |time| Ok(front_end.run(&mut load, time)?)))
    }
}

/// Keeps a workload going for a time.
type RunFor = dyn FnMut(Duration) -> Result<Outcome>;

fn measure(run: &mut RunFor, time: Duration) -> Result<Sample> {
    run(WARM_UP)?;
    let before = busy_time()?;
    let outcome = run(time)?;
    let busy = busy_time()?.saturating_sub(before);
    Ok(Sample {
        per_second: outcome.iops(),
        p50_us: outcome.latency.value_at_quantile(0.5) as f64 / 1000.0,
        p999_us: outcome.latency.value_at_quantile(0.999) as f64 / 1000.0,
        cpu_us: busy.as_secs_f64() * 1e6 / outcome.requests as f64,
    })
}

fn run(flags: &Flags, sections: &[Section]) -> Result<Samples> {
    let cells = cells(sections);
    let ours = Ours { poll_us: flags.poll_us, also: flags.also.clone() };
    let mut mtus: Vec<u32> = cells.iter().map(|cell| cell.ground.mtu).collect();
    mtus.sort_unstable();
    mtus.dedup();
    let rigs = mtus.into_iter().map(|mtu| Rig::start(mtu, &cells, &ours)).collect::<Result<Vec<_>>>()?;
    let mut samples = Samples::default();
    for round in 1..=flags.runs {
        eprintln!("round {round} of {}", flags.runs);
        // There and back: what comes second is not always what comes second.
        let mut order = cells.clone();
        if round % 2 == 0 {
            order.reverse();
        }
        for cell in &order {
            pin_self(cell.ground.placement)?;
            let rig = rigs.iter().find(|rig| rig.mtu == cell.ground.mtu).expect("a wire for each MTU");
            let of = || format!("{:?}, {}", cell.peer, cell.name());
            let sample = rig.measure(*cell, flags).with_context(of)?;
            eprintln!("  {:?} {}: {}", cell.ground.placement, of(), sample.line());
            samples.add(*cell, sample);
        }
    }
    Ok(samples)
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let sections = flags.sections()?;
    let limits = match flags.wants(LIMITS) {
        true => limits::measure(&Lab::pair(9000), flags.runs, LIMIT_TIME)?,
        false => Vec::new(),
    };
    pin_self(Placement::Free)?;
    let samples = run(&flags, &sections)?;
    let circumstances = table::Circumstances { runs: flags.runs, ms: flags.ms, spin: flags.spin };
    let text = table::report(&samples, &limits, &sections, &circumstances);
    println!("{text}");
    let Some(path) = &flags.write else { return Ok(()) };
    if !flags.is_whole() {
        eprintln!("{} is left as it is: this was not a whole run", path.display());
        return Ok(());
    }
    plots::write(&path.parent().unwrap_or(Path::new(".")).join("plots"), &samples)?;
    table::write_between_markers(path, &text)
}
