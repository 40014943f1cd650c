//! `cirro-load`: one measured load on any vhost-user-blk socket, for where the whole benchmark does not fit: the guests of qemu/nested.
//!
//! Knows no daemon and no wire. A request that is refused is counted and a stall is told, because some of those that are compared have them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cirro_tests::frontend::{Failure, FrontEnd, Op, Outcome, Shape};
use cirro_tests::load::Load;
use clap::{Parser, ValueEnum};
use serde_json::json;

/// How long the load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(300);
/// A request may take so long: longer than what the kernel's initiators wait before they try again.
const PATIENCE: Duration = Duration::from_secs(45);

/// Keeps one queue of a vhost-user-blk device busy, and tells requests a second and their latency.
#[derive(Debug, Parser)]
#[command(
    name = "cirro-load",
    max_term_width = 120,
    after_help = "Example:\n  cirro-load --socket /run/disk.sock --rw randwrite --depth 16 --seconds 10 --json\n\n\
        It writes over what is on the disk. Requests that the device refuses are counted as errors, and so is one that does \
        not end in 45 s: then the run is over. It exits with 0 if it has measured, whatever the errors."
)]
struct Flags {
    /// The socket of the back-end.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// What to do, at random places.
    #[arg(long, value_enum)]
    rw: Rw,
    /// Requests in flight.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    depth: u16,
    /// The size of a request in KiB.
    #[arg(long, value_name = "KIB", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    kib: u16,
    /// How long.
    #[arg(long, value_name = "S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Print a line of JSON instead of one for people.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Rw {
    /// Read.
    Randread,
    /// Write.
    Randwrite,
}

/// The figures of a run, times in microseconds.
fn figures(outcome: &Outcome) -> serde_json::Value {
    let at = |quantile| outcome.latency.value_at_quantile(quantile) / 1000;
    json!({
        "requests": outcome.requests,
        "seconds": outcome.elapsed.as_secs_f64(),
        "iops": outcome.iops().round(),
        "p50_us": at(0.5),
        "p99_us": at(0.99),
        "p999_us": at(0.999),
        "max_us": outcome.latency.max() / 1000,
        "errors": outcome.refused,
    })
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let bytes = usize::from(flags.kib) * 1024;
    let shape = Shape { queues: 1, depth: usize::from(flags.depth), bytes_max: bytes, poll: false };
    let mut front_end = FrontEnd::connect(&flags.socket, shape)
        .with_context(|| format!("cannot use the back-end behind {}", flags.socket.display()))?;
    front_end.set_patience(PATIENCE);
    front_end.bear_refusals();
    let capacity = front_end.capacity();
    ensure!(capacity >= bytes as u64, "the disk has {capacity} bytes, which is less than one request");
    let op = match flags.rw {
        Rw::Randread => Op::Read,
        Rw::Randwrite => Op::Write,
    };
    let mut load = Load::random(op, bytes, capacity);
    let outcome = front_end
        .run(&mut load, WARM_UP)
        .and_then(|_| front_end.run(&mut load, Duration::from_secs(flags.seconds)));
    match outcome {
        Ok(outcome) if flags.json => println!("{}", figures(&outcome)),
        Ok(outcome) => println!("{}  errors {}", outcome.line(), outcome.refused),
        Err(stalled @ Failure::Stalled { .. }) if flags.json => {
            println!("{}", json!({ "requests": 0, "iops": 0, "errors": 1, "stalled": stalled.to_string() }));
        }
        Err(failure) => return Err(failure.into()),
    }
    Ok(())
}
