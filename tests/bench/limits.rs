//! What the machine itself can do, without any of the systems: a frame or a TCP segment there and back, frames a second one way, a copy.
//!
//! Knows plain sockets and our link, two threads on two processors in two namespaces; no daemon. A system near these figures is near the wire.

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cirro_link::packet::{self, PacketLink};
use cirro_link::wait::Waiter;
use cirro_link::{FrameId, Link, Run};
use cirro_protocol::time::Nanos;
use cirro_protocol::types::{MacAddress, Steer};
use cirro_tests::load::median;
use cirro_tests::netns::{INTERFACE, Lab, Machine};

use crate::machine::pin_to;

/// The second EtherType for local experiments: our daemons have the first.
const ETHERTYPE: u16 = 0x88b6;
/// The first byte of a frame that names its receiver's worker (docs/PROTOCOL.md, the frame header).
const VT_SHORT: u8 = 1 << 5;
/// Bytes of the Ethernet header and of what the link looks at.
const HEAD_BYTES: usize = 18;
const SMALL: usize = 64;
/// A 4 KiB block with room for headers.
const BLOCK: usize = 4300;
const LARGE: usize = 8400;
const PORT: u16 = 10_811;
/// Frames given to the kernel at once.
const BATCH: usize = 32;
/// A side that hears nothing for so long gives up.
const SILENCE: Duration = Duration::from_secs(2);
static DATA: [u8; LARGE] = [7; LARGE];

/// One limit: what it is, its unit, and a value for each run.
#[derive(Debug)]
pub(crate) struct Limit {
    what: String,
    unit: &'static str,
    values: Vec<f64>,
}

impl Limit {
    pub(crate) fn row(&self) -> String {
        let low = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = self.values.iter().copied().fold(0.0, f64::max);
        let digits = if low >= 1000.0 { 0 } else { 2 };
        format!(
            "| {} | {:.digits$} {} | {low:.digits$}..{high:.digits$} |\n",
            self.what,
            median(&self.values),
            self.unit
        )
    }
}

/// Measures every limit `runs` times, one after another, each for `time`.
pub(crate) fn measure(lab: &Lab, runs: usize, time: Duration) -> Result<Vec<Limit>> {
    let mut limits: Vec<Limit> = Vec::new();
    for run in 1..=runs {
        eprintln!("limits, run {run} of {runs}");
        let mut add = |what: String, unit, value| match limits.iter_mut().find(|limit| limit.what == what) {
            Some(limit) => limit.values.push(value),
            None => limits.push(Limit { what, unit, values: vec![value] }),
        };
        for polls in [true, false] {
            let how = if polls { "polled" } else { "blocking" };
            for bytes in [SMALL, BLOCK] {
                let there_and_back = packet_ping(lab, bytes, polls, time)?;
                add(format!("packet ring, {bytes} bytes there and back, {how}"), "µs", there_and_back);
                let there_and_back = tcp_ping(lab, bytes, polls, time)?;
                add(format!("TCP, {bytes} bytes there and back, {how}"), "µs", there_and_back);
            }
        }
        for bytes in [BLOCK, LARGE] {
            let (sent, received) = one_way(lab, bytes, time)?;
            add(format!("{bytes}-byte frames one way, sent"), "frames/s", sent);
            add(format!("{bytes}-byte frames one way, received"), "frames/s", received);
        }
        add("copy of 4 KiB in the cache".to_owned(), "µs", copy(1 << 15, time));
        add("copy of a random 4 KiB of 1 GiB".to_owned(), "µs", copy(1 << 30, time));
    }
    Ok(limits)
}

fn open(machine: &Machine) -> Result<PacketLink> {
    let (process, mut links) = packet::open(INTERFACE, ETHERTYPE, 1)
        .with_context(|| format!("a link on {}'s interface", machine.address()))?;
    ensure!(process == 0, "another process has the interface");
    Ok(links.remove(0))
}

fn put(link: &mut PacketLink, to: MacAddress, bytes: usize) {
    let from = link.address();
    let Some(frame) = link.frame() else { return };
    frame.head.extend_from_slice(&to.0);
    frame.head.extend_from_slice(&from.0);
    frame.head.extend_from_slice(&ETHERTYPE.to_be_bytes());
    frame.head.extend_from_slice(&[VT_SHORT, 0]);
    frame.head.extend_from_slice(&Steer::new(0, 0).0.to_be_bytes());
    let at = frame.head.len();
    frame.push_cut(at, Run::of_static(&DATA[..bytes - HEAD_BYTES]));
    link.commit(FrameId::default());
}

/// Runs `near` on the VM host's processor and `far` on the storage machine's, each in its namespace and with its link; `far` until `near` has ended.
fn with_links<T: Send>(
    lab: &Lab,
    near: impl FnOnce(&mut PacketLink, MacAddress) -> Result<T> + Send,
    far: impl FnOnce(&mut PacketLink, MacAddress, &AtomicBool) + Send,
) -> Result<T> {
    let ended = AtomicBool::new(false);
    let (mut here, mut there) = (
        lab.host().namespace().enter(|| open(lab.host()))?,
        lab.store().namespace().enter(|| open(lab.store()))?,
    );
    let (here_at, there_at) = (here.address(), there.address());
    std::thread::scope(|scope| {
        let ended = &ended;
        let far = scope.spawn(move || {
            pin_to(1).expect("a thread can be pinned");
            lab.store().namespace().enter(|| far(&mut there, here_at, ended));
        });
        let result = lab.host().namespace().enter(move || {
            pin_to(0)?;
            near(&mut here, there_at)
        });
        ended.store(true, Ordering::Relaxed);
        far.join().expect("the far side ends when it is told to");
        result
    })
}

/// Waits for a frame; false after [`SILENCE`], or when `ended` is set.
fn hear(link: &mut PacketLink, waiter: &mut Waiter, polls: bool, ended: &AtomicBool) -> bool {
    let begun = Instant::now();
    while link.receive().is_none() {
        if ended.load(Ordering::Relaxed) || begun.elapsed() > SILENCE {
            return false;
        }
        if !polls && waiter.wait_beside(link.as_fd(), Some(Nanos::from_millis(100)), &mut Vec::new()).is_err()
        {
            return false;
        }
    }
    true
}

/// Microseconds of a frame of `bytes` there and one of `bytes` back.
fn packet_ping(lab: &Lab, bytes: usize, polls: bool, time: Duration) -> Result<f64> {
    let near = |link: &mut PacketLink, to| {
        let (mut waiter, never) = (Waiter::new()?, AtomicBool::new(false));
        let (begun, mut count) = (Instant::now(), 0u64);
        while begun.elapsed() < time {
            put(link, to, bytes);
            link.flush(&mut Vec::new());
            ensure!(hear(link, &mut waiter, polls, &never), "a frame was lost on a wire that loses none");
            count += 1;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e6 / count as f64)
    };
    let far = |link: &mut PacketLink, to, ended: &AtomicBool| {
        let mut waiter = Waiter::new().expect("a descriptor");
        while hear(link, &mut waiter, polls, ended) {
            put(link, to, bytes);
            link.flush(&mut Vec::new());
        }
    };
    with_links(lab, near, far)
}

/// Frames a second that one processor sends in batches, and that arrive at the other.
fn one_way(lab: &Lab, bytes: usize, time: Duration) -> Result<(f64, f64)> {
    let received = AtomicU64::new(0);
    let near = |link: &mut PacketLink, to| {
        let (begun, mut sent, mut refused) = (Instant::now(), 0, Vec::new());
        while begun.elapsed() < time {
            (0..BATCH).for_each(|_| put(link, to, bytes));
            link.flush(&mut refused);
            sent += BATCH - refused.len();
            refused.clear();
        }
        Ok((sent as f64, begun.elapsed().as_secs_f64()))
    };
    let far = |link: &mut PacketLink, _, ended: &AtomicBool| {
        while !ended.load(Ordering::Relaxed) {
            while let Some(frame) = link.receive() {
                black_box(frame.bytes.len());
                received.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let (sent, seconds) = with_links(lab, near, far)?;
    Ok((sent / seconds, received.load(Ordering::Relaxed) as f64 / seconds))
}

/// Reads exactly as much as fits; false when the other side has hung up.
fn read_all(stream: &mut TcpStream, buffer: &mut [u8]) -> bool {
    let mut at = 0;
    while at < buffer.len() {
        match stream.read(&mut buffer[at..]) {
            Ok(0) => return false,
            Ok(count) => at += count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(_) => return false,
        }
    }
    true
}

/// The same as [`packet_ping`] over TCP.
fn tcp_ping(lab: &Lab, bytes: usize, polls: bool, time: Duration) -> Result<f64> {
    let bind = || TcpListener::bind((lab.store().address(), PORT));
    let listener = lab.store().namespace().enter(bind).context("a TCP port on the storage machine")?;
    let prepare = |stream: &TcpStream| stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(polls));
    std::thread::scope(|scope| {
        let far = scope.spawn(move || -> Result<()> {
            pin_to(1)?;
            let (mut stream, _) = listener.accept()?;
            prepare(&stream)?;
            let mut buffer = [0; BLOCK];
            while read_all(&mut stream, &mut buffer[..bytes]) {
                stream.write_all(&DATA[..bytes])?;
            }
            Ok(())
        });
        let result = lab.host().namespace().enter(move || -> Result<f64> {
            pin_to(0)?;
            let mut stream = TcpStream::connect((lab.store().address(), PORT))?;
            prepare(&stream)?;
            let (mut buffer, begun, mut count) = ([0; BLOCK], Instant::now(), 0u64);
            while begun.elapsed() < time {
                stream.write_all(&DATA[..bytes])?;
                ensure!(read_all(&mut stream, &mut buffer[..bytes]), "the far side hung up");
                count += 1;
            }
            Ok(begun.elapsed().as_secs_f64() * 1e6 / count as f64)
        });
        far.join().expect("the far side ends with the connection")?;
        result
    })
}

/// Microseconds of a copy of 4 KiB from a random place of `span` bytes to one place.
fn copy(span: usize, time: Duration) -> f64 {
    let (from, mut to) = (vec![1u8; span], [0u8; 4096]);
    let (begun, mut count, mut state) = (Instant::now(), 0u64, 88_172_645_463_325_252u64);
    while begun.elapsed() < time {
        for _ in 0..64 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let at = state as usize % (span / to.len()) * to.len();
            to.copy_from_slice(black_box(&from[at..at + 4096]));
            black_box(&to);
            count += 1;
        }
    }
    begun.elapsed().as_secs_f64() * 1e6 / count as f64
}
