//! `cirro-bench`: our disk beside the other ways to the same bytes, on the same wire, in one run. `make bench` runs it and writes docs/PERFORMANCE.md.
//!
//! Knows no daemon's inside. Every system gets the same front-end, the same kind of volume and its turn in every round, so that what else the machine
//! does hits all alike. It aborts on failure: the daemons die with it, and the next run removes its namespaces.

mod machine;
mod peers;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cirro_tests::daemons::Scratch;
use cirro_tests::frontend::{FrontEnd, Op, Shape};
use cirro_tests::load::Load;
use cirro_tests::netns::Lab;
use clap::Parser;

use crate::machine::{Placement, busy_time, pin_self};
use crate::peers::{Peer, Peers, VOLUME_BYTES};
use crate::table::{Cell, Sample, Table};

/// How long a system runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(100);

/// Measures our disk beside qemu-storage-daemon over NBD and on the local file.
#[derive(Debug, Parser)]
#[command(name = "cirro-bench", max_term_width = 120)]
struct Flags {
    /// Rounds; each measures everything once.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// How long one measurement lasts, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    ms: u64,
    /// The wire's MTU.
    #[arg(long, default_value_t = 9000)]
    mtu: u32,
    /// Only these systems (ours, nbd, nbd-offload, local, null).
    #[arg(long, value_delimiter = ',')]
    only: Vec<Peer>,
    /// The front-end spins for completions instead of sleeping.
    #[arg(long)]
    spin: bool,
    /// How long our daemons spin before they sleep, in microseconds; their default without it.
    #[arg(long)]
    poll_us: Option<u32>,
    /// Write the tables between the markers of this file.
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
}

/// What is asked of every system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    op: Op,
    bytes: usize,
    depth: usize,
}

const WORKLOADS: [Workload; 6] = [
    Workload { name: "4 KiB random read, depth 1", op: Op::Read, bytes: 4096, depth: 1 },
    Workload { name: "4 KiB random write, depth 1", op: Op::Write, bytes: 4096, depth: 1 },
    Workload { name: "4 KiB random read, depth 32", op: Op::Read, bytes: 4096, depth: 32 },
    Workload { name: "4 KiB random write, depth 32", op: Op::Write, bytes: 4096, depth: 32 },
    Workload { name: "128 KiB sequential read, depth 8", op: Op::Read, bytes: 128 << 10, depth: 8 },
    Workload { name: "128 KiB sequential write, depth 8", op: Op::Write, bytes: 128 << 10, depth: 8 },
];

impl Workload {
    fn load(self) -> Load {
        let make = if self.bytes == 4096 { Load::random } else { Load::sequential };
        make(self.op, self.bytes, VOLUME_BYTES)
    }

    /// Whether bytes a second say more than requests a second.
    pub(crate) fn is_stream(self) -> bool {
        self.bytes > 4096
    }

    pub(crate) fn bytes(self) -> usize {
        self.bytes
    }
}

fn measure(socket: &std::path::Path, workload: Workload, flags: &Flags) -> Result<Sample> {
    let shape = Shape { queues: 1, depth: workload.depth, bytes_max: workload.bytes, poll: flags.spin };
    let mut front_end = FrontEnd::connect(socket, shape).context("the front-end cannot connect")?;
    ensure!(front_end.capacity() == VOLUME_BYTES, "the disk has {} bytes", front_end.capacity());
    let mut load = workload.load();
    front_end.run(&mut load, WARM_UP)?;
    let before = busy_time()?;
    let outcome = front_end.run(&mut load, Duration::from_millis(flags.ms))?;
    let busy = busy_time()?.saturating_sub(before);
    Ok(Sample {
        per_second: outcome.iops(),
        p50_us: outcome.latency.value_at_quantile(0.5) as f64 / 1000.0,
        p999_us: outcome.latency.value_at_quantile(0.999) as f64 / 1000.0,
        cpu_us: busy.as_secs_f64() * 1e6 / outcome.requests as f64,
    })
}

fn run(flags: &Flags) -> Result<Vec<Table>> {
    let (lab, scratch) = (Lab::pair(flags.mtu), Scratch::new());
    let peers = Peers::start(&lab, &scratch, &flags.only, flags.poll_us)?;
    let mut tables: Vec<Table> = Placement::ALL.iter().map(|placement| Table::new(*placement)).collect();
    for round in 1..=flags.runs {
        eprintln!("round {round} of {}", flags.runs);
        for (placement, table) in Placement::ALL.into_iter().zip(&mut tables) {
            pin_self(placement)?;
            for workload in WORKLOADS {
                for peer in peers.all() {
                    peers.prepare(&lab, peer, placement)?;
                    let sample = measure(&peers.socket(&scratch, peer), workload, flags)
                        .with_context(|| format!("{peer:?}, {}", workload.name))?;
                    eprintln!("  {placement:?} {peer:?} {}: {}", workload.name, sample.line());
                    table.add(Cell { peer, workload }, sample);
                }
            }
        }
    }
    Ok(tables)
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let tables = run(&flags)?;
    let text = table::report(
        &tables,
        &WORKLOADS,
        &table::Circumstances { mtu: flags.mtu, runs: flags.runs, ms: flags.ms, spin: flags.spin },
    );
    println!("{text}");
    match &flags.write {
        Some(path) => table::write_between_markers(path, &text),
        None => Ok(()),
    }
}
