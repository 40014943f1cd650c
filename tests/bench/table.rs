//! Samples to medians, medians to Markdown.
//!
//! Knows no daemon. Writes between two markers of docs/PERFORMANCE.md and leaves the rest of it alone.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use cirro_tests::load::median;

use crate::limits::Limit;
use crate::peers::Peer;
use crate::plan::{Cell, Group, Section};
use crate::targets;

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

/// Every sample, by what it belongs to.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<(Cell, Sample)>);

impl Samples {
    pub(crate) fn add(&mut self, cell: Cell, sample: Sample) {
        self.0.push((cell, sample));
    }

    fn values(&self, cell: Cell, of: impl Fn(&Sample) -> f64) -> Vec<f64> {
        self.0.iter().filter(|(its, _)| *its == cell).map(|(_, sample)| of(sample)).collect()
    }

    /// The median of `of`; `None` if it was not measured.
    pub(crate) fn median(&self, cell: Cell, of: fn(&Sample) -> f64) -> Option<f64> {
        let values = self.values(cell, of);
        (!values.is_empty()).then(|| median(&values))
    }

    /// The median of what `of` is of the same round's `of` of another cell: what slows the machine down for minutes slows both. `None` if one of
    /// them was not measured.
    pub(crate) fn ratio(&self, cell: Cell, other: Cell, of: fn(&Sample) -> f64) -> Option<f64> {
        let pairs = self.values(cell, of).into_iter().zip(self.values(other, of));
        let ratios: Vec<f64> = pairs.map(|(value, other)| value / other).collect();
        (!ratios.is_empty()).then(|| median(&ratios))
    }

    fn row(&self, cell: Cell) -> Option<String> {
        let rates = self.values(cell, |sample| sample.per_second);
        let rate = self.median(cell, |sample| sample.per_second)?;
        let ratio = self.ratio(cell, Cell { peer: Peer::Nbd, ..cell }, |sample| sample.per_second);
        let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let unit = if cell.workload.is_stream() { cell.workload.bytes as f64 / 1e6 } else { 1.0 };
        let (low, high) = range(&rates);
        let p50s = self.values(cell, |sample| sample.p50_us);
        let (p50_low, p50_high) = range(&p50s);
        let cpu_us = self.median(cell, |sample| sample.cpu_us)?;
        Some(format!(
            "| {} | {:.0} ({:.0}..{:.0}) | {ratio} | {:.1} ({p50_low:.1}..{p50_high:.1}) | {:.0} | {cpu_us:.2} | {:.2} |\n",
            cell.peer.title(),
            rate * unit,
            low * unit,
            high * unit,
            median(&p50s),
            self.median(cell, |sample| sample.p999_us)?,
            cpu_us / 1e6 * (f64::from(1 << 30) / cell.workload.bytes as f64),
        ))
    }

    /// A section as one table: a line for each group, and in it rate, p50 and p99.9 of each system.
    fn compact(&self, section: &Section) -> String {
        let peers = section.groups.first().map_or(&[][..], |group| &group.peers);
        let figures = |cell: Cell| {
            let rate = self.median(cell, |sample| sample.per_second)?;
            let p50 = self.median(cell, |sample| sample.p50_us)?;
            Some(format!(" {rate:.0} | {p50:.1} | {:.0} |", self.median(cell, |sample| sample.p999_us)?))
        };
        let row = |group: &Group| {
            let figures = group.cells().map(figures).collect::<Option<String>>()?;
            Some(format!("| {} |{figures}\n", group.name()))
        };
        let rows: String = section.groups.iter().filter_map(row).collect();
        if rows.is_empty() || peers.is_empty() {
            return String::new();
        }
        let heads: String =
            peers.iter().map(|peer| format!(" {}: requests/s | p50 µs | p99.9 µs |", peer.title())).collect();
        format!("\n| workload |{heads}\n|---|{}\n{rows}", "---|---|---|".repeat(peers.len()))
    }

    fn table(&self, group: &Group) -> String {
        let rows: String = group.cells().filter_map(|cell| self.row(cell)).collect();
        if rows.is_empty() {
            return rows;
        }
        let unit = if group.workload.is_stream() { "MB/s" } else { "requests/s" };
        format!(
            "\n**{}**\n\n| system | {unit} | of NBD | p50 µs | p99.9 µs | processor µs per request | processor s per GiB |\n|---|---|---|---|---|---|---|\n{rows}",
            group.name()
        )
    }
}

fn range(values: &[f64]) -> (f64, f64) {
    (values.iter().copied().fold(f64::INFINITY, f64::min), values.iter().copied().fold(0.0, f64::max))
}

/// What a reader must know of the run.
#[derive(Debug)]
pub(crate) struct Circumstances {
    pub(crate) runs: usize,
    pub(crate) ms: u64,
    pub(crate) spin: bool,
}

/// The Markdown between the markers.
pub(crate) fn report(
    samples: &Samples,
    limits: &[Limit],
    sections: &[Section],
    circumstances: &Circumstances,
) -> String {
    let Circumstances { runs, ms, spin } = circumstances;
    let wait = if *spin { "spins for completions" } else { "sleeps until interrupted" };
    let mut text = format!(
        "Made by `make bench` on {}, commit {}, kernel {}, {} processors ({}). MTU 9000 unless said; medians of {runs} interleaved runs of {ms} ms, lowest and highest in brackets; the front-end {wait}.\n",
        shell("date -u '+%Y-%m-%d %H:%M UTC'"),
        shell("git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown"),
        shell("uname -r"),
        shell("getconf _NPROCESSORS_ONLN"),
        shell("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1"),
    );
    let _ = writeln!(
        text,
        "{}; {}; {}.",
        shell("qemu-storage-daemon --version | head -n 1"),
        shell("nbdkit --version"),
        shell("qemu-nbd --version | head -n 1")
    );
    text.push_str(&targets::table(samples));
    if !limits.is_empty() {
        text.push_str(
            "\n### Raw limits of this machine\n\n| what | median | lowest..highest |\n|---|---|---|\n",
        );
        limits.iter().for_each(|limit| text.push_str(&limit.row()));
    }
    for section in sections {
        let tables: String = match section.compact {
            true => samples.compact(section),
            false => section.groups.iter().map(|group| samples.table(group)).collect(),
        };
        if !tables.is_empty() {
            let _ = write!(text, "\n### {}\n{tables}", section.title);
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
