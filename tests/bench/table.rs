//! Samples to medians, medians to Markdown.
//!
//! Knows no daemon. Writes between two markers of docs/PERFORMANCE.md and leaves the rest of it alone.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use cirro_tests::load::median;

use crate::Workload;
use crate::machine::Placement;
use crate::peers::Peer;

const BEGIN: &str = "<!-- make bench writes from here -->";
const END: &str = "<!-- to here -->";

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p999_us: f64,
    /// Time of all processors per request.
    pub(crate) cpu_us: f64,
}

impl Sample {
    pub(crate) fn line(&self) -> String {
        let Sample { per_second, p50_us, p999_us, cpu_us } = self;
        format!(
            "{per_second:.0}/s, p50 {p50_us:.1} us, p99.9 {p999_us:.1} us, {cpu_us:.2} us of processors each"
        )
    }
}

/// What a sample belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) peer: Peer,
    pub(crate) workload: Workload,
}

/// The samples of one placement.
#[derive(Debug)]
pub(crate) struct Table {
    placement: Placement,
    samples: Vec<(Cell, Sample)>,
}

impl Table {
    pub(crate) fn new(placement: Placement) -> Table {
        Table { placement, samples: Vec::new() }
    }

    pub(crate) fn add(&mut self, cell: Cell, sample: Sample) {
        self.samples.push((cell, sample));
    }

    fn values(&self, cell: Cell, of: impl Fn(&Sample) -> f64) -> Vec<f64> {
        self.samples.iter().filter(|(its, _)| *its == cell).map(|(_, sample)| of(sample)).collect()
    }

    fn row(&self, cell: Cell) -> Option<String> {
        let rates = self.values(cell, |sample| sample.per_second);
        if rates.is_empty() {
            return None;
        }
        let nbd = self.values(Cell { peer: Peer::Nbd, ..cell }, |sample| sample.per_second);
        let ratio =
            if nbd.is_empty() { "-".to_owned() } else { format!("{:.2}", median(&rates) / median(&nbd)) };
        let middle = |of: fn(&Sample) -> f64| median(&self.values(cell, of));
        let (unit, digits) =
            if cell.workload.is_stream() { (cell.workload.bytes() as f64 / 1e6, 0) } else { (1.0, 0) };
        let shown = |value: f64| format!("{:.digits$}", value * unit);
        let low = rates.iter().copied().fold(f64::INFINITY, f64::min);
        let high = rates.iter().copied().fold(0.0, f64::max);
        Some(format!(
            "| {} | {} ({}..{}) | {ratio} | {:.1} | {:.1} | {:.2} |\n",
            cell.peer.title(),
            shown(median(&rates)),
            shown(low),
            shown(high),
            middle(|sample| sample.p50_us),
            middle(|sample| sample.p999_us),
            middle(|sample| sample.cpu_us),
        ))
    }
}

/// What a reader must know of the run.
#[derive(Debug)]
pub(crate) struct Circumstances {
    pub(crate) mtu: u32,
    pub(crate) runs: usize,
    pub(crate) ms: u64,
    pub(crate) spin: bool,
}

/// The Markdown between the markers.
pub(crate) fn report(tables: &[Table], workloads: &[Workload], circumstances: &Circumstances) -> String {
    let Circumstances { mtu, runs, ms, spin } = circumstances;
    let wait = if *spin { "spins for completions" } else { "sleeps until interrupted" };
    let mut text = format!(
        "Made by `make bench` on {}, kernel {}, {} processors ({}). MTU {mtu}; medians of {runs} interleaved runs of {ms} ms, lowest and highest in brackets; the front-end {wait}.\n",
        shell("date -u '+%Y-%m-%d %H:%M UTC'"),
        shell("uname -r"),
        shell("nproc"),
        shell("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1"),
    );
    let _ = writeln!(
        text,
        "{}; {}.",
        shell("qemu-storage-daemon --version | head -n 1"),
        shell("nbdkit --version")
    );
    for table in tables {
        let title = match table.placement {
            Placement::Pinned => {
                "Pinned: front-end and VM host's daemon on one processor, storage daemon on the other"
            }
            Placement::Free => "Not pinned",
        };
        let _ = write!(text, "\n### {title}\n");
        for workload in workloads {
            let unit = if workload.is_stream() { "MB/s" } else { "requests/s" };
            let _ = write!(
                text,
                "\n**{}**\n\n| system | {unit} | of NBD | p50 µs | p99.9 µs | processor µs per request |\n|---|---|---|---|---|---|\n",
                workload.name
            );
            let rows = Peer::ALL.into_iter().filter_map(|peer| table.row(Cell { peer, workload: *workload }));
            rows.for_each(|row| text.push_str(&row));
        }
    }
    text
}

/// Replaces what lies between the markers of `path`.
pub(crate) fn write_between_markers(path: &Path, text: &str) -> Result<()> {
    let old = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let (head, rest) =
        old.split_once(BEGIN).with_context(|| format!("{} has no '{BEGIN}'", path.display()))?;
    let (_, tail) = rest.split_once(END).with_context(|| format!("{} has no '{END}'", path.display()))?;
    std::fs::write(path, format!("{head}{BEGIN}\n{text}\n{END}{tail}"))
        .with_context(|| format!("{} cannot be written", path.display()))
}

fn shell(line: &str) -> String {
    let output = std::process::Command::new("sh").args(["-c", line]).output();
    output.map_or_else(|_| "?".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
