//! The raw limits of a packet link on this machine: round trips and frames a second between two threads on two cores, over a veth pair of its own.
//! As root: `cargo run --release -p cirro-link --example pingpong`. Prints a table; takes about ten seconds.
//!
//! Knows nothing of the protocol but where `steer` stands. What it shows bounds what the daemons can do.

#[allow(dead_code, reason = "a part of what the tests use")]
#[path = "../tests/support/netns.rs"]
mod netns;

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cirro_link::packet::{self, PacketLink};
use cirro_link::tap::{Limits, Recording, Tap};
use cirro_link::wait::Waiter;
use cirro_link::{FrameId, Link, Run, clock};
use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::MacAddress;
use netns::{INTERFACE, Namespace, VethPair};
use rustix::thread::{CpuSet, sched_setaffinity};

const ETHERTYPE: u16 = 0x88b5;
const MTU: usize = 9000;
/// Bytes of a frame that the link copies from its head; the rest of a large one is foreign memory.
const HEAD_BYTES: usize = 64;
/// A small frame, and one with 4 KiB of data and its headers.
const SIZES: [usize; 2] = [64, 4300];
const ROUNDS: usize = 20_000;
const ROUNDS_ASLEEP: usize = 5_000;
/// The best of so many slices is shown: other work on the machine spoils some.
const SLICES: usize = 8;
const SLICE: Nanos = Nanos::from_millis(200);

static DATA: [u8; MTU] = [0x5a; MTU];

fn main() {
    let wire = VethPair::new(MTU);
    println!("veth, MTU {MTU}, one thread on each of two cores\n");
    println!("{:>8}  {:>12}  {:>10}  {:>10}  {:>10}", "bytes", "waiting by", "p50 µs", "p99 µs", "best µs");
    for bytes in SIZES {
        for (name, asleep) in [("spinning", false), ("Waiter", true)] {
            let mut times = round_trips(&wire, bytes, asleep);
            times.sort_unstable();
            let at = |percent: usize| times[(times.len() - 1) * percent / 100] as f64 / 1000.0;
            println!("{bytes:>8}  {name:>12}  {:>10.2}  {:>10.2}  {:>10.2}", at(50), at(99), at(0));
        }
    }
    println!("\n{:>8}  {:>12}  {:>10}  {:>10}  {:>10}", "bytes", "one way", "k sent/s", "k came/s", "MB/s");
    for bytes in SIZES {
        let mut best = [(0, 0); 2];
        for slice in 0..2 * SLICES {
            let tapped = slice % 2 == 1;
            best[slice % 2] = best[slice % 2].max(one_way(&wire, bytes, tapped));
        }
        for (name, (came, sent)) in ["plain", "sender taps"].into_iter().zip(best) {
            let per_second = |frames: u64| frames as f64 * 1e9 / SLICE.0 as f64;
            let (sent, came) = (per_second(sent), per_second(came));
            let megabytes = came * bytes as f64 / 1e6;
            println!("{bytes:>8}  {name:>12}  {:>10.0}  {:>10.0}  {megabytes:>10.0}", sent / 1e3, came / 1e3);
        }
    }
}

/// Runs `body` inside `namespace` on `core`, with a link there.
fn on_core<T>(namespace: &Namespace, core: usize, body: impl FnOnce(PacketLink) -> T) -> T {
    namespace.enter_here();
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).expect("the machine has two cores");
    body(packet::open(INTERFACE, ETHERTYPE, 1).expect("the wire is up").1.remove(0))
}

fn put(link: &mut impl Link, to: MacAddress, bytes: usize) -> bool {
    let from = link.address();
    let Some(frame) = link.frame() else { return false };
    for part in [&to.0[..], &from.0, &ETHERTYPE.to_be_bytes(), &[1 << 5], &[0; HEAD_BYTES - 15]] {
        frame.head.extend_from_slice(part);
    }
    if bytes > HEAD_BYTES {
        frame.push_cut(HEAD_BYTES, Run::of_static(&DATA[..bytes - HEAD_BYTES]));
    }
    link.commit(FrameId::default());
    true
}

fn send(link: &mut PacketLink, bytes: usize) {
    put(link, MacAddress::BROADCAST, bytes);
    let mut refused = Vec::new();
    link.flush(&mut refused);
    assert!(refused.is_empty(), "the wire takes one frame");
}

/// Receives one frame; false when `ended` is set first.
fn next(link: &mut PacketLink, sleeper: Option<&mut Waiter>, ended: &AtomicBool) -> bool {
    let (mut sleeper, mut ready) = (sleeper, Vec::new());
    while !ended.load(Ordering::Relaxed) {
        if link.receive().is_some() {
            // Gives the frame back, as a worker does that looks for the next one.
            let _ = link.receive();
            return true;
        }
        match &mut sleeper {
            Some(waiter) => waiter.wait(Some(Nanos::from_millis(100)), &mut ready).expect("epoll works"),
            None => std::hint::spin_loop(),
        }
    }
    false
}

fn waiter(link: &PacketLink, asleep: bool) -> Option<Waiter> {
    asleep.then(|| {
        let waiter = Waiter::new().expect("a descriptor is left");
        waiter.add(link.as_fd(), 0).expect("a link can be waited for");
        waiter
    })
}

/// Nanoseconds of each round trip.
fn round_trips(wire: &VethPair, bytes: usize, asleep: bool) -> Vec<u64> {
    let (ended, ready) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            on_core(&wire.b, 1, |mut link| {
                let mut waiter = waiter(&link, asleep);
                ready.store(true, Ordering::Release);
                while next(&mut link, waiter.as_mut(), &ended) {
                    send(&mut link, bytes);
                }
            });
        });
        let pinging = scope.spawn(|| {
            on_core(&wire.a, 0, |mut link| {
                let mut waiter = waiter(&link, asleep);
                while !ready.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                let rounds = if asleep { ROUNDS_ASLEEP } else { ROUNDS };
                let round = |_| {
                    let start = clock::now();
                    send(&mut link, bytes);
                    assert!(next(&mut link, waiter.as_mut(), &ended), "an answer comes");
                    clock::now().since(start).0
                };
                let times = (0..rounds).map(round).collect();
                ended.store(true, Ordering::Relaxed);
                times
            })
        });
        pinging.join().expect("no panic")
    })
}

/// Frames received and sent in a slice, in batches of as many as a link takes.
fn one_way(wire: &VethPair, bytes: usize, tapped: bool) -> (u64, u64) {
    let (ended, ready, came) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let sent = std::thread::scope(|scope| {
        scope.spawn(|| {
            on_core(&wire.b, 1, |mut link| {
                ready.store(true, Ordering::Release);
                let mut count = 0;
                while !ended.load(Ordering::Relaxed) {
                    while link.receive().is_some() {
                        count += 1;
                    }
                    std::hint::spin_loop();
                }
                came.store(count, Ordering::Relaxed);
            });
        });
        let sending = scope.spawn(|| {
            on_core(&wire.a, 0, |link| {
                let mut link = Tap::new(link);
                if tapped {
                    let path = Path::new("/dev/null");
                    let null = File::options().write(true).open(path).expect("/dev/null is there");
                    let recording = Recording::into_file(null, path, Limits::default());
                    link.exchange(Some(recording.expect("a thread can be started")));
                }
                while !ready.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                let sent = flood(&mut link, bytes, clock::now() + SLICE);
                ended.store(true, Ordering::Relaxed);
                sent
            })
        });
        sending.join().expect("no panic")
    });
    (came.load(Ordering::Relaxed), sent)
}

fn flood(link: &mut impl Link, bytes: usize, until: Instant) -> u64 {
    let (mut sent, mut refused) = (0, Vec::new());
    while clock::now() < until {
        while put(link, MacAddress::BROADCAST, bytes) {
            sent += 1;
        }
        link.flush(&mut refused);
        sent -= refused.len() as u64;
        refused.clear();
    }
    sent
}
