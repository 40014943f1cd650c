//! A virtio-blk front-end without a VM: the `blkio` crate's vhost-user driver, which owes nothing to our back-end.
//!
//! Does not know what is right to read (that is `verify`) nor who serves. Keeps every queue full from one thread, times each request, and takes one that
//! does not end in ten seconds, or another time, for a failure. Used by the end-to-end tests, the benchmark and `cirro-load`.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, MemoryRegion, ReqFlags};
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys::{self, Done, Region};
use crate::verify::Corruption;

/// A request that takes longer has stalled: guests give up after 30 s.
pub const STALL: Duration = Duration::from_secs(10);
/// A time without a completion that is shorter is none worth keeping.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// How long a wait for a completion may last before stalls are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often the front-end tries to connect while the back-end starts.
const CONNECT_TRIES_MAX: u32 = 100;

/// How a front-end uses its device.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Queues.
    pub queues: usize,
    /// Requests in flight on each.
    pub depth: usize,
    /// The largest request.
    pub bytes_max: usize,
    /// Spin for completions, or sleep until the device interrupts.
    pub poll: bool,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Into the slot's buffer.
    Read,
    /// From the slot's buffer.
    Write,
    /// Everything that ended before.
    Flush,
    /// No data.
    Discard,
    /// No data; the device may give the space back.
    WriteZeroes,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// What it does.
    pub op: Op,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; 0 for a flush.
    pub bytes: usize,
}

/// The buffer of a slot, shared with the device.
#[derive(Debug)]
pub struct Buffer<'a> {
    region: &'a Region,
    at: usize,
}

impl Buffer<'_> {
    /// Fills its beginning.
    pub fn write(&self, from: &[u8]) {
        self.region.write(self.at, from);
    }

    /// Copies its beginning out.
    pub fn read(&self, to: &mut [u8]) {
        self.region.read(self.at, to);
    }
}

/// What a front-end is to do. Slots are numbered over all queues.
pub trait Workload {
    /// The next request for `slot`, whose buffer it fills for a write; None: this slot rests until another request ends.
    fn next(&mut self, slot: usize, buffer: &Buffer<'_>) -> Option<Io>;
    /// `io` ended well; the buffer holds what a read gave.
    ///
    /// # Errors
    /// The data is wrong.
    fn done(&mut self, slot: usize, io: &Io, buffer: &Buffer<'_>) -> Result<(), Corruption>;
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A request does not end.
    #[error("{io:?} in slot {slot} has not ended after {age:?}")]
    Stalled {
        /// The oldest request.
        io: Io,
        /// Its slot.
        slot: usize,
        /// For how long it has been waited.
        age: Duration,
    },
    /// The device refused a request.
    #[error("{io:?} ended with {}", std::io::Error::from_raw_os_error(-.ret))]
    Refused {
        /// The request.
        io: Io,
        /// A negative errno.
        ret: i32,
    },
    /// The device gave wrong data.
    #[error(transparent)]
    Corrupt(#[from] Corruption),
    /// The driver failed.
    #[error("the front-end's driver: {0}")]
    Driver(#[from] blkio::Error),
}

/// A time in which no request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// The last completion before it.
    pub from: Instant,
    /// The first after it.
    pub to: Instant,
}

/// What a run did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Requests that ended.
    pub requests: u64,
    /// From the first submission to the last completion.
    pub elapsed: Duration,
    /// Latency of each request in nanoseconds.
    pub latency: Histogram<u64>,
    /// Times of 5 ms and more without a completion, in order.
    pub pauses: Vec<Pause>,
    /// Requests that the device refused: none, unless the front-end bears it.
    pub refused: u64,
}

impl Outcome {
    /// How long after `moment` the guest went on, if nothing had ended at that moment for a while; else no time.
    pub fn pause_after(&self, moment: Instant) -> Duration {
        let pause = self.pauses.iter().find(|pause| pause.from < moment && moment < pause.to);
        pause.map_or(Duration::ZERO, |pause| pause.to - moment)
    }

    /// Requests a second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// The longest that a request took.
    pub fn worst(&self) -> Duration {
        Duration::from_nanos(self.latency.max())
    }

    /// The distribution of latency, a line for each power of two that occurred.
    pub fn histogram_lines(&self) -> String {
        let mut lines = String::new();
        for bucket in
            self.latency.iter_log(1024, 2.0).filter(|bucket| bucket.count_since_last_iteration() > 0)
        {
            let below = micros(bucket.value_iterated_to());
            lines += &format!("    up to {below:>12} us {:>9}\n", bucket.count_since_last_iteration());
        }
        lines
    }

    /// One line: how many, and the latency's distribution.
    pub fn line(&self) -> String {
        let at = |quantile| micros(self.latency.value_at_quantile(quantile));
        let (count, iops) = (self.requests, self.iops());
        let (p50, p99, p999, max) = (at(0.5), at(0.99), at(0.999), micros(self.latency.max()));
        format!(
            "{count:>8} requests {iops:>9.0}/s  p50 {p50:>9} p99 {p99:>9} p99.9 {p999:>9} max {max:>9} us"
        )
    }
}

fn micros(nanos: u64) -> String {
    format!("{:.1}", nanos as f64 / 1000.0)
}

/// An empty latency histogram: 1 ns to 100 s, within 0.1 %.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("the bounds are right")
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    io: Io,
    since: Instant,
}

/// A connected front-end.
pub struct FrontEnd {
    // The queues go before the driver that made them.
    queues: Vec<Blkioq>,
    region: Region,
    blkio: Blkio,
    mapped: MemoryRegion,
    shape: Shape,
    in_flight: Vec<Option<InFlight>>,
    /// How many of them are some.
    busy: usize,
    done: Vec<Done>,
    patience: Duration,
    bears_refusals: bool,
}

impl FrontEnd {
    /// Takes a request for stalled after this time instead of [`STALL`].
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Counts requests that the device refuses, and goes on, instead of failing at the first.
    pub fn bear_refusals(&mut self) {
        self.bears_refusals = true;
    }

    /// Takes the memory of all buffers away, as a VMM does that makes its memory file shorter. No buffer may be looked at from now on.
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn shrink_memory(&self) {
        sys::shrink(&self.mapped).expect("a memory file can be made shorter");
    }

    /// Connects to the back-end behind `socket` and starts its rings.
    ///
    /// # Errors
    /// The driver's.
    pub fn connect(socket: &Path, shape: Shape) -> Result<FrontEnd, blkio::Error> {
        let mut tries = 0;
        loop {
            match FrontEnd::try_connect(socket, shape) {
                Err(error) if error.errno() == blkio::Errno::CONNREFUSED && tries < CONNECT_TRIES_MAX => {
                    tries += 1
                }
                other => return other,
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn try_connect(socket: &Path, shape: Shape) -> Result<FrontEnd, blkio::Error> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
        blkio.set_str("path", &socket.to_string_lossy())?;
        blkio.connect()?;
        let count = i32::try_from(shape.queues).expect("few queues");
        blkio.set_i32("num-queues", if shape.poll { 0 } else { count })?;
        blkio.set_i32("queue-size", ring_size(shape.depth))?;
        blkio.set_i32("num-poll-queues", if shape.poll { count } else { 0 })?;
        let started = blkio.start()?;
        let slots = shape.queues * shape.depth;
        let alignment =
            usize::try_from(blkio.get_u64("mem-region-alignment")?).expect("a small alignment").max(4096);
        let bytes = (slots * slot_bytes(&shape)).next_multiple_of(alignment);
        let mapped = blkio.alloc_mem_region(bytes)?;
        blkio.map_mem_region(&mapped)?;
        let queues = if shape.poll { started.poll_queues } else { started.queues };
        let region = Region::new(&mapped);
        let in_flight = vec![None; slots];
        Ok(FrontEnd {
            queues,
            region,
            blkio,
            mapped,
            shape,
            in_flight,
            busy: 0,
            done: Vec::with_capacity(1024),
            patience: STALL,
            bears_refusals: false,
        })
    }

    /// The device's size in bytes.
    ///
    /// # Panics
    /// The back-end does not say.
    pub fn capacity(&self) -> u64 {
        self.blkio.get_u64("capacity").expect("the device says its capacity")
    }

    /// Largest discard in bytes; 0 when there is none.
    pub fn discard_bytes_max(&self) -> u64 {
        self.blkio.get_u64("max-discard-len").unwrap_or(0)
    }

    /// Largest write of zeroes in bytes; 0 when there is none.
    pub fn zeroes_bytes_max(&self) -> u64 {
        self.blkio.get_u64("max-write-zeroes-len").unwrap_or(0)
    }

    /// Keeps every slot busy with `load` for `time`, then waits for what is in flight.
    ///
    /// # Errors
    /// The first failure of any request; others may still be in flight then.
    pub fn run(&mut self, load: &mut impl Workload, time: Duration) -> Result<Outcome, Failure> {
        let start = Instant::now();
        let mut run = Run {
            latency: histogram(),
            resting: VecDeque::new(),
            requests: 0,
            last: start,
            pauses: Vec::new(),
            refused: 0,
        };
        let end = start + time;
        run.resting.extend(0..self.in_flight.len());
        let mut looked = start;
        loop {
            let now = Instant::now();
            let accepting = now < end;
            if accepting {
                self.fill(load, &mut run, now);
            }
            if self.busy == 0 && (!accepting || run.resting.len() == self.in_flight.len()) {
                break;
            }
            self.wait()?;
            let now = Instant::now();
            self.finish(load, &mut run, now)?;
            if now - looked > LOOK {
                looked = now;
                self.find_stalled(now)?;
            }
        }
        let Run { latency, requests, pauses, refused, .. } = run;
        Ok(Outcome { requests, elapsed: start.elapsed(), latency, pauses, refused })
    }

    /// Gives every resting slot its next request.
    fn fill(&mut self, load: &mut impl Workload, run: &mut Run, now: Instant) {
        for _ in 0..run.resting.len() {
            let slot = run.resting.pop_front().expect("counted");
            let at = slot * slot_bytes(&self.shape);
            match load.next(slot, &Buffer { region: &self.region, at }) {
                Some(io) => self.submit(slot, io, now),
                None => run.resting.push_back(slot),
            }
        }
    }

    fn submit(&mut self, slot: usize, io: Io, now: Instant) {
        assert!(io.bytes <= self.shape.bytes_max || matches!(io.op, Op::Discard | Op::WriteZeroes));
        let buffer = self.region.pointer(slot * slot_bytes(&self.shape), slot_bytes(&self.shape));
        let queue = &mut self.queues[slot / self.shape.depth];
        let none = ReqFlags::empty();
        match io.op {
            Op::Read => queue.read(io.offset, buffer, io.bytes, slot, none),
            Op::Write => queue.write(io.offset, buffer, io.bytes, slot, none),
            Op::Flush => queue.flush(slot, none),
            Op::Discard => queue.discard(io.offset, io.bytes as u64, slot, none),
            Op::WriteZeroes => queue.write_zeroes(io.offset, io.bytes as u64, slot, none),
        }
        self.in_flight[slot] = Some(InFlight { io, since: now });
        self.busy += 1;
    }

    /// Submits, and waits until something ended or [`LOOK`] is over.
    fn wait(&mut self) -> Result<(), blkio::Error> {
        self.done.clear();
        if let ([queue], false) = (self.queues.as_mut_slice(), self.shape.poll) {
            sys::take(queue, 1, Some(LOOK), &mut self.done)?;
            return Ok(());
        }
        let end = Instant::now() + LOOK;
        loop {
            self.take_from_all()?;
            if !self.done.is_empty() || Instant::now() > end {
                return Ok(());
            }
            if self.shape.poll {
                std::hint::spin_loop();
                continue;
            }
            self.sleep()?;
        }
    }

    fn take_from_all(&mut self) -> Result<(), blkio::Error> {
        for queue in &mut self.queues {
            sys::take(queue, 0, None, &mut self.done)?;
        }
        Ok(())
    }

    /// Sleeps until any queue is interrupted, after a last look with interrupts on.
    fn sleep(&mut self) -> Result<(), blkio::Error> {
        self.queues.iter_mut().for_each(|queue| queue.set_completion_fd_enabled(true));
        self.take_from_all()?;
        if self.done.is_empty() {
            let mut fds: Vec<PollFd<'_>> = self
                .queues
                .iter()
                .map(|queue| PollFd::from_borrowed_fd(sys::completion_fd(queue), PollFlags::IN))
                .collect();
            let limit = Timespec::try_from(LOOK).expect("short");
            let _ = poll(&mut fds, Some(&limit));
            let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
            for (queue, _) in self.queues.iter().zip(ready).filter(|(_, ready)| *ready) {
                let _ = rustix::io::read(sys::completion_fd(queue), &mut [0_u8; 8]);
            }
        }
        self.queues.iter_mut().for_each(|queue| queue.set_completion_fd_enabled(false));
        Ok(())
    }

    fn finish(&mut self, load: &mut impl Workload, run: &mut Run, now: Instant) -> Result<(), Failure> {
        if !self.done.is_empty() {
            if now - run.last >= PAUSE_MIN {
                run.pauses.push(Pause { from: run.last, to: now });
            }
            run.last = now;
        }
        for Done { user_data: slot, ret } in self.done.drain(..) {
            let InFlight { io, since } = self.in_flight[slot].take().expect("a request ends once");
            self.busy -= 1;
            if ret != 0 && !self.bears_refusals {
                return Err(Failure::Refused { io, ret });
            }
            if ret != 0 {
                run.refused += 1;
                run.resting.push_back(slot);
                continue;
            }
            let nanos = u64::try_from((now - since).as_nanos()).expect("less than 500 years");
            run.latency.saturating_record(nanos.max(1));
            run.requests += 1;
            load.done(slot, &io, &Buffer { region: &self.region, at: slot * slot_bytes(&self.shape) })?;
            run.resting.push_back(slot);
        }
        Ok(())
    }

    fn find_stalled(&self, now: Instant) -> Result<(), Failure> {
        let busy =
            self.in_flight.iter().enumerate().filter_map(|(slot, entry)| entry.map(|entry| (slot, entry)));
        match busy.min_by_key(|(_, entry)| entry.since) {
            Some((slot, InFlight { io, since })) if now - since > self.patience => {
                Err(Failure::Stalled { io, slot, age: now - since })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.queues.clear();
        self.blkio.unmap_mem_region(&self.mapped);
    }
}

struct Run {
    latency: Histogram<u64>,
    /// Slots without a request, the longest resting first.
    resting: VecDeque<usize>,
    requests: u64,
    /// The last completion.
    last: Instant,
    pauses: Vec<Pause>,
    refused: u64,
}

/// A request takes three descriptors: header, data, status.
fn ring_size(depth: usize) -> i32 {
    i32::try_from((4 * depth).next_power_of_two().max(128)).expect("a shallow queue")
}

fn slot_bytes(shape: &Shape) -> usize {
    shape.bytes_max.next_multiple_of(4096)
}
