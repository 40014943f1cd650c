//! The deterministic simulator: the production backend and node on virtual time, with everything around them going wrong.
//!
//! One seed is one run; a run that fails prints the command that repeats it. Knows command lines and sums; the run itself is `world`. See docs/TESTING.md.

mod disk;
mod guest;
mod host;
mod keys;
mod logger;
mod machine;
mod mutants;
mod options;
mod oracle;
#[cfg(test)]
mod scenarios;
mod wire;
mod world;

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;

use clap::Parser;

use crate::options::Options;
use crate::world::{Outcome, World};

/// Seeds that one child process runs: a node's buffers are never given back to the system.
const SEEDS_PER_CHILD: u64 = 100;

/// Run the backend and the node on virtual time, with crashes, losses and stalls that follow from a seed.
#[derive(Debug, Parser)]
#[command(name = "cirro-sim", max_term_width = 120)]
struct Flags {
    /// Run this seed alone, and say what happened in it.
    #[arg(long, value_name = "N", conflicts_with_all = ["from", "count"])]
    seed: Option<u64>,
    /// The first seed of a row.
    #[arg(long, value_name = "N", default_value_t = 1)]
    from: u64,
    /// How many seeds.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    count: u64,
    /// Begin at a seed that nobody chose, and print it.
    #[arg(long)]
    random: bool,
    /// Processes at the same time.
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: u64,
    /// Leave out a kind of event, to see whether it is the cause: node-kill, host-kill, weather, cut, …
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    without: Vec<String>,
    /// Go on after a failure until so many.
    #[arg(long, value_name = "N", default_value_t = 1)]
    failures: u64,
    /// Show every log line and every frame of the run (with --seed).
    #[arg(long)]
    trace: bool,
    /// Plant deliberate bugs, those of tests/sim/mutants.toml whose names contain TEXT, and see whether they are found.
    #[arg(long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "", conflicts_with = "seed")]
    mutants: Option<String>,
    /// Run one disk with so many requests and no trouble, the same each time: what tests/instructions.sh counts.
    #[arg(long, value_name = "N", conflicts_with = "seed")]
    steady: Option<usize>,
    /// Run the row in this process and print a line a seed.
    #[arg(long, hide = true)]
    child: bool,
}

/// What a row of seeds came to.
#[derive(Debug, Default)]
struct Sum {
    seeds: u64,
    requests: u64,
    frames: u64,
    virtual_seconds: f64,
    failed: Vec<(u64, String)>,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    quiet_kills();
    if let Some(only) = &flags.mutants {
        return match mutants::run(only, &flags.without) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("cirro-sim: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    if let Some(requests) = flags.steady {
        let outcome = World::new(Options::steady(requests), false).run();
        print_outcome(0, &outcome);
        return if outcome.violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match flags.seed {
        Some(seed) => run_one(seed, &flags),
        None if flags.child => run_row(&flags),
        None => run_children(&flags),
    }
}

/// A process that is killed says nothing.
fn quiet_kills() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload().is::<wire::Killed>() {
                hook(info);
            }
        }));
    });
}

/// The run of a seed, but for what was left out.
fn options_of(seed: u64, flags: &Flags) -> Options {
    let mut options = Options::of(seed);
    for kind in &flags.without {
        assert!(options.may.forbid(kind), "there is no event {kind}");
    }
    options
}

fn run_one(seed: u64, flags: &Flags) -> ExitCode {
    let trace = flags.trace;
    logger::install(trace);
    let options = options_of(seed, flags);
    println!("{options:#?}");
    let first = World::new(options.clone(), trace).run();
    print_outcome(seed, &first);
    if !trace {
        let again = World::new(options, false).run();
        if again.hash != first.hash {
            println!("seed {seed}: a second run of it was another: hash {:016x}", again.hash);
            return ExitCode::FAILURE;
        }
    }
    if first.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn print_outcome(seed: u64, outcome: &Outcome) {
    println!(
        "seed {seed}: hash {:016x}, {} requests ({} failed), {:.3} s of virtual time, {} turns, {} events, {:?}",
        outcome.hash,
        outcome.requests,
        outcome.failed_requests,
        outcome.virtual_time.0 as f64 / 1e9,
        outcome.turns,
        outcome.events,
        outcome.wire
    );
    if let Some(violation) = &outcome.violation {
        println!("seed {seed}: VIOLATION: {violation}\nrepeat it: make sim SEED={seed}");
    }
}

/// A row in this process: a line a seed, for the parent.
fn run_row(flags: &Flags) -> ExitCode {
    logger::install(false);
    let mut failures = 0;
    for seed in flags.from..flags.from.saturating_add(flags.count) {
        let outcome = World::new(options_of(seed, flags), false).run();
        let what = outcome.violation.map_or(String::new(), |violation| violation.0.replace('\n', " "));
        println!("{seed} {} {} {} {what}", outcome.requests, outcome.wire.frames, outcome.virtual_time.0);
        failures += u64::from(!what.is_empty());
        if failures >= flags.failures {
            break;
        }
    }
    ExitCode::SUCCESS
}

fn run_children(flags: &Flags) -> ExitCode {
    let from = if flags.random {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |since| since.as_secs())
            << 16
    } else {
        flags.from
    };
    println!("seeds {from} to {}", from + flags.count - 1);
    let began = std::time::Instant::now();
    let (next, sum) = (Mutex::new(from), Mutex::new(Sum::default()));
    std::thread::scope(|scope| {
        for _ in 0..flags.jobs.max(1) {
            scope.spawn(|| work_off(&next, from + flags.count, flags, &sum));
        }
    });
    let sum = sum.into_inner().expect("no worker panics");
    println!(
        "{} seeds, {} requests, {} frames, {:.0} s of virtual time in {:.0} s: {} failed",
        sum.seeds,
        sum.requests,
        sum.frames,
        sum.virtual_seconds,
        began.elapsed().as_secs_f64(),
        sum.failed.len()
    );
    for (seed, what) in &sum.failed {
        println!("seed {seed}: VIOLATION: {what}\nrepeat it: make sim SEED={seed}");
    }
    if sum.failed.is_empty() && sum.seeds == flags.count { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Takes rows of seeds until none is left or enough have failed.
fn work_off(next: &Mutex<u64>, end: u64, flags: &Flags, sum: &Mutex<Sum>) {
    loop {
        let from = {
            let mut next = next.lock().expect("no worker panics");
            let from = *next;
            *next += SEEDS_PER_CHILD;
            from
        };
        let enough = sum.lock().expect("no worker panics").failed.len() as u64 >= flags.failures;
        if from >= end || enough {
            return;
        }
        run_child(from, SEEDS_PER_CHILD.min(end - from), flags, sum);
    }
}

fn run_child(from: u64, count: u64, flags: &Flags, sum: &Mutex<Sum>) {
    let program = std::env::current_exe().expect("this program has a path");
    let mut child = Command::new(program)
        .args(["--child", "--from", &from.to_string(), "--count", &count.to_string()])
        .args(["--failures", &flags.failures.to_string()])
        .args(flags.without.iter().flat_map(|kind| ["--without", kind]))
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can be run");
    let output = child.stdout.take().expect("its output is ours");
    let (mut seen, mut failed) = (0, false);
    for line in BufReader::new(output).lines() {
        let line = line.expect("a line of text");
        let mut words = line.splitn(5, ' ');
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or_default();
        let (seed, requests, frames, nanos) = (number(), number(), number(), number());
        let mut sum = sum.lock().expect("no worker panics");
        (sum.seeds, sum.requests, sum.frames) = (sum.seeds + 1, sum.requests + requests, sum.frames + frames);
        sum.virtual_seconds += nanos as f64 / 1e9;
        if let Some(what) = words.next().filter(|what| !what.is_empty()) {
            sum.failed.push((seed, what.to_owned()));
            failed = true;
        }
        seen += 1;
    }
    let status = child.wait().expect("it was ours to wait for");
    if (seen != count && !failed) || !status.success() {
        let what = format!("the process ended in the middle of it: {status}");
        sum.lock().expect("no worker panics").failed.push((from + seen, what));
    }
}
