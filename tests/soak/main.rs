//! `make soak`: real daemons on a real wire under a verified load, while they are killed, cut off and stopped at random, from a seed.
//!
//! Knows only its arguments; the work is in the library's `soak`. Run as root.

use std::time::Duration;

use cirro_tests::soak::{self, Options};
use clap::Parser;

/// Real daemons under verified load and random faults.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long faults go on.
    #[arg(long, default_value_t = 1)]
    minutes: u64,
    /// Decides every fault; random, and printed, when it is not given.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    soak::run(Options { seed, time: Duration::from_secs(60 * arguments.minutes) });
}
