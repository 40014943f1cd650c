//! The machine under the benchmark: which processor runs what, and how busy they are.
//!
//! Knows nothing of disks.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Where the processes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// The front-end and the VM host's daemon on processor 0, the storage machine's daemon on processor 1.
    Pinned,
    /// Where the kernel likes.
    Free,
}

impl Placement {
    fn cpus(self, pinned: usize) -> CpuSet {
        let mut set = CpuSet::new();
        match self {
            Placement::Pinned => set.set(pinned),
            Placement::Free => (0..CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu)),
        }
        set
    }
}

/// Places every thread of a process of the VM host (`cpu` 0) or of the storage machine (`cpu` 1).
pub(crate) fn pin(process: u32, placement: Placement, cpu: usize) -> Result<()> {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).context("a daemon is gone")?;
    for thread in threads.flatten() {
        let id = thread.file_name().to_string_lossy().parse::<i32>().ok().and_then(Pid::from_raw);
        // A thread that ended meanwhile, or a kernel worker that is bound already, is no concern of ours.
        let _ = sched_setaffinity(id, &placement.cpus(cpu));
    }
    Ok(())
}

/// Places the calling thread, which is the front-end.
pub(crate) fn pin_self(placement: Placement) -> Result<()> {
    sched_setaffinity(None, &placement.cpus(0)).context("the front-end cannot be pinned")
}

/// Places the calling thread on one processor.
pub(crate) fn pin_to(cpu: usize) -> Result<()> {
    sched_setaffinity(None, &Placement::Pinned.cpus(cpu)).context("a thread cannot be pinned")
}

/// Time that all processors together were not idle, soft interrupts included; in steps of 10 ms.
pub(crate) fn busy_time() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let fields: Vec<u64> = text
        .lines()
        .next()
        .context("/proc/stat is empty")?
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    // user nice system idle iowait irq softirq steal (proc(5)); guest time is counted in user already.
    let ticks: u64 = [0, 1, 2, 5, 6].iter().map(|field| fields[*field]).sum();
    Ok(Duration::from_millis(ticks * 10))
}
