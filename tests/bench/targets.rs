//! What is asked of the system, beside what this run has measured.
//!
//! Knows the numbers that must be reached and the cells that show them; measures nothing.

use std::fmt::Write as _;

use crate::peers::Peer;
use crate::plan::{
    Cell, Ground, PINNED, READ, READ_LARGE, READ_ONE, SMALL_FRAMES, WRITE, WRITE_LARGE, WRITE_ONE, Workload,
    pinned_with_loss,
};
use crate::table::{Sample, Samples};

/// A ratio or a figure that is to be reached.
struct Target {
    what: &'static str,
    must: f64,
    aim: f64,
    /// It is to be at most this, not at least.
    at_most: bool,
    measured: Vec<Option<f64>>,
}

impl Target {
    fn row(&self) -> Option<String> {
        let measured: Vec<f64> = self.measured.iter().copied().collect::<Option<_>>()?;
        let reaches = |goal: f64| {
            measured.iter().all(|value| if self.at_most { *value <= goal } else { *value >= goal })
        };
        let verdict = match (reaches(self.must), reaches(self.aim)) {
            (_, true) => "aim reached",
            (true, false) => "reached",
            (false, false) => "**not reached**",
        };
        let sign = if self.at_most { '≤' } else { '≥' };
        let shown: Vec<String> = measured.iter().map(|value| format!("{value:.2}")).collect();
        Some(format!(
            "| {} | {sign} {} | {sign} {} | {} | {verdict} |\n",
            self.what,
            self.must,
            self.aim,
            shown.join(", ")
        ))
    }
}

fn rate(sample: &Sample) -> f64 {
    sample.per_second
}

fn p50(sample: &Sample) -> f64 {
    sample.p50_us
}

fn cpu(sample: &Sample) -> f64 {
    sample.cpu_us
}

fn p999_ms(sample: &Sample) -> f64 {
    sample.p999_us / 1000.0
}

/// The targets with what was measured for them; nothing if none was.
pub(crate) fn table(samples: &Samples) -> String {
    let at = |peer, workload, ground| Cell { peer, workload, ground };
    let of = |(peer, ground): (Peer, Ground), (other, base): (Peer, Ground), figure: fn(&Sample) -> f64| {
        move |workload: Workload| samples.ratio(at(peer, workload, ground), at(other, workload, base), figure)
    };
    let both = |ratio: &dyn Fn(Workload) -> Option<f64>, of: [Workload; 2]| of.map(ratio).to_vec();
    let (small, one, large) = ([READ, WRITE], [READ_ONE, WRITE_ONE], [READ_LARGE, WRITE_LARGE]);
    let nbd = |ground, figure| of((Peer::Ours, ground), (Peer::Nbd, ground), figure);
    let [none, tenth, whole] = [0, 1, 10].map(pinned_with_loss);
    let own = |ground| of((Peer::Ours, ground), (Peer::Ours, none), rate);
    let sleeping = of((Peer::OursSleeping, PINNED), (Peer::Nbd, PINNED), p50);
    let offload = of((Peer::Ours, PINNED), (Peer::NbdOffload, PINNED), rate);
    let tail = |workload| samples.median(at(Peer::Ours, workload, tenth), p999_ms);
    let target = |what, (must, aim), at_most, measured| Target { what, must, aim, at_most, measured };
    let targets = [
        target("depth 32, requests/s, × NBD", (4.0, 5.5), false, both(&nbd(PINNED, rate), small)),
        target(
            "depth 32, processor time per request, × NBD",
            (0.33, 0.22),
            true,
            both(&nbd(PINNED, cpu), small),
        ),
        target("depth 1, p50, × NBD", (0.25, 0.12), true, both(&nbd(PINNED, p50), one)),
        target("depth 1, `--poll-us 0`, p50, × NBD", (1.0, 0.85), true, both(&sleeping, one)),
        target(
            "depth 32 at MTU 1500, requests/s, × NBD",
            (2.0, 3.5),
            false,
            both(&nbd(SMALL_FRAMES, rate), small),
        ),
        target("1 % loss, depth 32, of own loss-free", (0.9, 0.95), false, both(&own(whole), small)),
        target("1 % loss, depth 32, requests/s, × NBD", (20.0, 20.0), false, both(&nbd(whole, rate), small)),
        target("0.1 % loss, depth 32, of own loss-free", (0.97, 0.99), false, both(&own(tenth), small)),
        target("0.1 % loss, depth 1, p99.9 in ms", (1.0, 0.4), true, one.map(tail).to_vec()),
        target("128 KiB, × NBD with offloads off", (1.4, 1.8), false, both(&nbd(PINNED, rate), large)),
        target("128 KiB, × NBD with offloads on", (1.2, 1.8), false, both(&offload, large)),
    ];
    let mut text = String::new();
    let rows: String = targets.iter().filter_map(Target::row).collect();
    if !rows.is_empty() {
        let _ = write!(
            text,
            "\n### Targets\n\nRead, then write; all pinned, 4 KiB unless said; ratios are medians of the rounds' own.\n\n| what | must | aim | measured | |\n|---|---|---|---|---|\n{rows}"
        );
    }
    text
}
