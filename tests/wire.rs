//! A recorder and replayer of frames, beside the daemons on the same interface.
//!
//! Knows Ethernet and nothing of our protocol but its EtherType. Used by tests that play old frames again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cirro_protocol::types::MacAddress;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::daemons::run_on_processor;
use crate::netns::{INTERFACE, Machine};
use crate::sys::PacketSocket;

/// The EtherType the daemons use by default.
pub const ETHERTYPE: u16 = 0x88B5;
/// Stands for all EtherTypes (ETH_P_ALL, linux/if_ether.h).
const EVERY_KIND: u16 = 3;
/// Frames a recorder keeps; it forgets what follows.
const FRAMES_MAX: usize = 100_000;

/// Records every frame of ours that arrives at a machine.
#[derive(Debug)]
pub struct Recorder {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Vec<u8>>>,
}

impl Recorder {
    /// Starts now.
    ///
    /// # Panics
    /// The socket cannot be had.
    pub fn start(machine: &Machine) -> Recorder {
        let (namespace, device, hook) = machine.last_sight();
        // Who watches frames leave sees those that come as well, which are the machine's own.
        let leaving =
            (hook == "egress").then(|| machine.mac().parse::<MacAddress>().expect("ip(8) writes one"));
        let kind = if leaving.is_some() { EVERY_KIND } else { ETHERTYPE };
        let socket = namespace.enter(|| PacketSocket::open(device, kind)).expect("root may open one");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Recorder { stop, thread: std::thread::spawn(move || record(&socket, leaving, &stopped)) }
    }

    /// Ends, and gives the frames in the order of their arrival.
    ///
    /// # Panics
    /// Recording failed.
    pub fn stop(self) -> Vec<Vec<u8>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the recorder works")
    }
}

fn record(socket: &PacketSocket, leaving: Option<MacAddress>, stop: &AtomicBool) -> Vec<Vec<u8>> {
    let (mut frames, mut buffer) = (Vec::new(), vec![0; 70_000]);
    let wanted = |frame: &[u8]| {
        leaving.is_none_or(|own| frame[6..12] != own.0 && frame[12..14] == ETHERTYPE.to_be_bytes())
    };
    loop {
        match socket.receive(&mut buffer).expect("a packet socket can be read") {
            Some(bytes) if frames.len() < FRAMES_MAX && wanted(&buffer[..bytes]) => {
                frames.push(buffer[..bytes].to_vec())
            }
            Some(_) => {}
            None if stop.load(Ordering::Relaxed) => return frames,
            None => {
                let limit = Timespec::try_from(Duration::from_millis(20)).expect("short");
                let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit));
            }
        }
    }
}

/// Frames that are replayed in one go; a pause follows, so that the receivers' rings do not run over.
const BURST: usize = 16;

/// Sends frames as they are from a machine, oldest first, at no more than 16 a millisecond.
///
/// # Panics
/// The kernel refuses one for good.
pub fn replay(machine: &Machine, frames: &[Vec<u8>]) {
    let socket = socket(machine);
    for (index, frame) in frames.iter().enumerate() {
        if index % BURST == BURST - 1 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut tries = 0;
        while let Err(error) = socket.send(frame) {
            let full =
                error.kind() == std::io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS);
            assert!(full && tries < 1000, "a frame cannot be sent: {error}");
            tries += 1;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Frames that an attacker sends in one go, and how often: 12 000 a second.
const ATTACK_BURST: u64 = 48;
const ATTACK_EVERY: Duration = Duration::from_millis(4);

/// Sends for as long as nobody stops it, 12 frames a millisecond; `each` writes one at a time.
#[derive(Debug)]
pub struct Attack {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

impl Attack {
    /// Starts now, on one processor.
    ///
    /// # Panics
    /// The socket cannot be had.
    pub fn start(
        machine: &Machine,
        cpu: u32,
        mut each: impl FnMut(u64) -> Vec<u8> + Send + 'static,
    ) -> Attack {
        let socket = socket(machine);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            run_on_processor(cpu);
            let (start, mut sent) = (Instant::now(), 0);
            while !stopped.load(Ordering::Relaxed) {
                // What the kernel does not take is lost: an attacker does not mind.
                sent += u64::from(socket.send(&each(sent)).is_ok());
                if sent.is_multiple_of(ATTACK_BURST) {
                    let due = start + ATTACK_EVERY * (sent / ATTACK_BURST) as u32;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
            }
            (sent, start.elapsed())
        });
        Attack { stop, thread }
    }

    /// Ends, and gives how many frames were sent in a second.
    ///
    /// # Panics
    /// Its thread did.
    pub fn stop(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        let (sent, time) = self.thread.join().expect("the attacker works");
        sent as f64 / time.as_secs_f64()
    }
}

fn socket(machine: &Machine) -> PacketSocket {
    let open = || PacketSocket::open(INTERFACE, ETHERTYPE);
    machine.namespace().enter(open).expect("root may open a packet socket")
}
