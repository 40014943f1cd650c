//! Two plots as SVG: latency against requests a second, and requests a second against loss.
//!
//! Knows how to draw lines on logarithmic axes; measures nothing.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::peers::Peer;
use crate::plan::{Cell, DEPTHS, LOSSES, PINNED, READ, pinned_with_loss, read_at};
use crate::table::Samples;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
/// Room beside the axes: left, right, top, bottom.
const MARGIN: [f64; 4] = [80.0, 30.0, 50.0, 60.0];
const COLOURS: [&str; 4] = ["#0b6e4f", "#c0392b", "#2c5aa0", "#7d6608"];

/// A line: its name, and for each point x, y and what is written beside it.
struct Line {
    name: &'static str,
    points: Vec<(f64, f64, String)>,
}

struct Axis {
    title: &'static str,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From 1, 2 or 5 times a power of ten below the least value to one above the largest.
    fn logarithmic(title: &'static str, values: impl Iterator<Item = f64> + Clone) -> Axis {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(0.0, f64::max);
        let steps = (-2..8).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)));
        let low = steps.clone().rfind(|step| *step <= low).unwrap_or(low);
        let high = steps.clone().find(|step| *step >= high).unwrap_or(high);
        let ticks =
            steps.filter(|step| (low..=high).contains(step)).map(|step| (step, short(step))).collect();
        Axis { title, low, high, ticks }
    }

    /// Where `value` lies between the ends, 0 to 1.
    fn place(&self, value: f64) -> f64 {
        (value.ln() - self.low.ln()) / (self.high.ln() - self.low.ln())
    }
}

fn short(value: f64) -> String {
    match value {
        1e6.. => format!("{} M", value / 1e6),
        1e3.. => format!("{} k", value / 1e3),
        _ => format!("{}", (value * 100.0).round() / 100.0),
    }
}

/// Writes both plots into `folder`; one that has no points is left as it is.
pub(crate) fn write(folder: &Path, samples: &Samples) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    let at = |peer, workload, ground| Cell { peer, workload, ground };
    let depths = [Peer::Ours, Peer::Nbd, Peer::Local].map(|peer| Line {
        name: peer.title(),
        points: DEPTHS
            .iter()
            .filter_map(|depth| {
                let cell = at(peer, read_at(*depth), PINNED);
                let rate = samples.median(cell, |sample| sample.per_second)?;
                Some((rate, samples.median(cell, |sample| sample.p50_us)?, depth.to_string()))
            })
            .collect(),
    });
    let losses = [Peer::Ours, Peer::Nbd].map(|peer| Line {
        name: peer.title(),
        points: LOSSES
            .iter()
            .filter_map(|loss| {
                let rate =
                    samples.median(at(peer, READ, pinned_with_loss(*loss)), |sample| sample.per_second)?;
                // No loss has no place on a logarithmic axis: it stands at its left end, named 0.
                let percent = if *loss == 0 { 0.05 } else { f64::from(*loss) / 10.0 };
                Some((percent, rate, String::new()))
            })
            .collect(),
    });
    let xs = |lines: &[Line]| {
        lines.iter().flat_map(|line| line.points.iter().map(|point| point.0)).collect::<Vec<_>>()
    };
    let ys = |lines: &[Line]| {
        lines.iter().flat_map(|line| line.points.iter().map(|point| point.1)).collect::<Vec<_>>()
    };
    if !xs(&depths).is_empty() {
        let x = Axis::logarithmic("requests a second", xs(&depths).into_iter());
        let y = Axis::logarithmic("p50 latency in µs", ys(&depths).into_iter());
        let text = draw("4 KiB random reads, pinned; each point is a depth", &x, &y, &depths);
        put(&folder.join("latency-iops.svg"), &text)?;
    }
    if !xs(&losses).is_empty() {
        let ticks = LOSSES.map(|loss| match loss {
            0 => (0.05, "0".to_owned()),
            loss => (f64::from(loss) / 10.0, format!("{}", f64::from(loss) / 10.0)),
        });
        let x =
            Axis { title: "frames lost in each direction, %", low: 0.045, high: 3.5, ticks: ticks.to_vec() };
        let y = Axis::logarithmic("requests a second", ys(&losses).into_iter());
        let text =
            draw("4 KiB random reads at depth 32 on a wire that loses frames, pinned", &x, &y, &losses);
        put(&folder.join("throughput-loss.svg"), &text)?;
    }
    Ok(())
}

fn put(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
}

fn draw(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> String {
    let [left, right, top, bottom] = MARGIN;
    let at_x = |value| left + x.place(value) * (WIDTH - left - right);
    let at_y = |value| HEIGHT - bottom - y.place(value) * (HEIGHT - top - bottom);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{}\" y=\"24\" text-anchor=\"middle\" font-size=\"16\">{title}</text>\n",
        WIDTH / 2.0
    );
    let (floor, wall) = (HEIGHT - bottom, WIDTH - right);
    for (value, label) in &x.ticks {
        let at = at_x(*value);
        let _ = writeln!(
            svg,
            "<path d=\"M{at:.1} {top} V{floor}\" stroke=\"#ddd\"/><text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            floor + 18.0
        );
    }
    for (value, label) in &y.ticks {
        let at = at_y(*value);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {at:.1} H{wall}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            left - 8.0,
            at + 4.0
        );
    }
    let _ = writeln!(
        svg,
        "<path d=\"M{left} {top} V{floor} H{wall}\" fill=\"none\" stroke=\"black\"/>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n\
         <text transform=\"translate(20 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (left + wall) / 2.0,
        HEIGHT - 18.0,
        x.title,
        (top + floor) / 2.0,
        y.title
    );
    for (number, (line, colour)) in lines.iter().zip(COLOURS).enumerate() {
        let places: Vec<String> =
            line.points.iter().map(|(px, py, _)| format!("{:.1},{:.1}", at_x(*px), at_y(*py))).collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            places.join(" ")
        );
        for (px, py, label) in &line.points {
            let (px, py) = (at_x(*px), at_y(*py));
            let _ = writeln!(
                svg,
                "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\" fill=\"{colour}\">{label}</text>",
                px + 5.0,
                py + 13.0
            );
        }
        let legend = floor - 12.0 - 18.0 * (lines.len() - 1 - number) as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{}\" y=\"{}\" width=\"16\" height=\"4\" fill=\"{colour}\"/><text x=\"{}\" y=\"{legend}\">{}</text>",
            left + 12.0,
            legend - 6.0,
            left + 34.0,
            line.name
        );
    }
    svg + "</svg>\n"
}
