//! An AoE initiator for `vblade`: the kernel's own is a module, which a namespace cannot have.
//!
//! Knows ATA over Ethernet (revision 11 of AoEr11.pdf) as far as reads and writes need it. There is no guest and no vhost-user in it, so what it asks
//! of its server costs less than what the other systems are asked. It sends nothing again: on a wire that loses frames it fails.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cirro_protocol::types::MacAddress;
use cirro_tests::frontend::{Io, Op, Outcome, histogram};
use cirro_tests::load::Load;
use cirro_tests::netns::{INTERFACE, Lab};
use cirro_tests::sys::PacketSocket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::plan::Workload;

/// The shelf and the slot of the one target.
pub(crate) const SHELF: u16 = 7;
pub(crate) const SLOT: u8 = 1;

const ETHERTYPE: u16 = 0x88a2;
const SECTOR_BYTES: u64 = 512;
/// Whole blocks that fit into a frame of MTU 9000.
const PIECE_BYTES: usize = 8192;
/// Ethernet's header and the one that all AoE frames have, and that with the arguments of an ATA command.
const HEADER_BYTES: usize = 24;
const ATA_BYTES: usize = 36;
const FRAME_BYTES_MIN: usize = 60;
const FRAME_BYTES_MAX: usize = 9014;

const VERSION: u8 = 1 << 4;
const IS_ANSWER: u8 = 1 << 3;
const IS_ERROR: u8 = 1 << 2;
const COMMAND_ATA: u8 = 0;
const COMMAND_CONFIG: u8 = 1;
const ATA_LBA48: u8 = 1 << 6;
const ATA_WRITE: u8 = 1;
const READ_SECTORS_EXT: u8 = 0x24;
const WRITE_SECTORS_EXT: u8 = 0x34;
const STATUS_ERROR: u8 = 1;

/// A target that says nothing for so long has lost a frame, or is gone.
const SILENCE: Duration = Duration::from_secs(2);
/// How often a target that does not run yet is asked for.
const TRIES_MAX: u32 = 50;
const TRY_EVERY: Duration = Duration::from_millis(100);

/// A socket on the VM host, and the target that it found.
pub(crate) struct Initiator {
    socket: PacketSocket,
    own: MacAddress,
    target: MacAddress,
    /// Commands that the target can hold, as it says.
    commands_max: usize,
    buffer: Vec<u8>,
}

/// A request, of one or more commands.
struct Request {
    io: Io,
    since: Instant,
    commands_left: usize,
}

/// What a run has under way.
struct Run {
    requests: Vec<Option<Request>>,
    /// Commands that have not left: a request and which piece of it.
    unsent: VecDeque<(usize, usize)>,
    in_flight: usize,
    outcome: Outcome,
}

impl Initiator {
    /// Finds the target.
    pub(crate) fn open(lab: &Lab) -> Result<Initiator> {
        let host = lab.host();
        let socket = host.namespace().enter(|| PacketSocket::open(INTERFACE, ETHERTYPE))?;
        let own = host.mac().parse().context("the interface's address")?;
        let (target, buffer) = (MacAddress::BROADCAST, vec![0; FRAME_BYTES_MAX]);
        let mut initiator = Initiator { socket, own, target, commands_max: 1, buffer };
        for _ in 0..TRIES_MAX {
            initiator.socket.send(&initiator.frame(COMMAND_CONFIG, 0, HEADER_BYTES))?;
            if let Some(len) = initiator.receive(TRY_EVERY)? {
                ensure!(len >= HEADER_BYTES + 2, "the target's answer is cut off");
                let answer = &initiator.buffer;
                initiator.target = MacAddress(*answer[6..].first_chunk().expect("as long as a header"));
                initiator.commands_max = usize::from(u16::from_be_bytes([answer[24], answer[25]])).max(1);
                return Ok(initiator);
            }
        }
        anyhow::bail!("AoE target e{SHELF}.{SLOT} does not answer")
    }

    /// Keeps `workload` going for `time`, then waits for what is in flight.
    pub(crate) fn run(&mut self, workload: Workload, load: &mut Load, time: Duration) -> Result<Outcome> {
        let begun = Instant::now();
        let mut run = Run {
            requests: Vec::new(),
            unsent: VecDeque::new(),
            in_flight: 0,
            outcome: Outcome {
                requests: 0,
                elapsed: Duration::ZERO,
                latency: histogram(),
                pauses: Vec::new(),
                refused: 0,
            },
        };
        run.requests.resize_with(workload.depth, || None);
        (0..workload.depth).for_each(|slot| run.begin(slot, load.next_io(), begun));
        while run.in_flight > 0 || !run.unsent.is_empty() {
            while run.in_flight < self.commands_max
                && let Some((slot, piece)) = run.unsent.pop_front()
            {
                self.send(run.requests[slot].as_ref().expect("it has not ended").io, slot, piece)?;
                run.in_flight += 1;
            }
            let mut wait = SILENCE;
            while let Some(len) = self.receive(wait)? {
                wait = Duration::ZERO;
                let now = Instant::now();
                if let Some(slot) = run.take(&self.buffer[..len], now)?
                    && now - begun < time
                {
                    run.begin(slot, load.next_io(), now);
                }
            }
            ensure!(wait.is_zero(), "the target has not answered for {SILENCE:?}");
        }
        run.outcome.elapsed = begun.elapsed();
        Ok(run.outcome)
    }

    /// A frame with the header that all have, and zeroes up to `len`.
    fn frame(&self, command: u8, tag: u32, len: usize) -> Vec<u8> {
        let mut frame = Vec::with_capacity(FRAME_BYTES_MAX);
        frame.extend_from_slice(&self.target.0);
        frame.extend_from_slice(&self.own.0);
        frame.extend_from_slice(&ETHERTYPE.to_be_bytes());
        frame.extend_from_slice(&[VERSION, 0]);
        frame.extend_from_slice(&SHELF.to_be_bytes());
        frame.extend_from_slice(&[SLOT, command]);
        frame.extend_from_slice(&tag.to_be_bytes());
        frame.resize(len.max(FRAME_BYTES_MIN), 0);
        frame
    }

    fn send(&self, io: Io, slot: usize, piece: usize) -> Result<()> {
        let bytes = piece_bytes(io, piece);
        let sector = (io.offset + (piece * PIECE_BYTES) as u64) / SECTOR_BYTES;
        let (data, flag, command) =
            if io.op == Op::Write { (bytes, ATA_WRITE, WRITE_SECTORS_EXT) } else { (0, 0, READ_SECTORS_EXT) };
        let mut frame = self.frame(COMMAND_ATA, (slot << 16 | piece) as u32, ATA_BYTES + data);
        frame[24] = ATA_LBA48 | flag;
        frame[26] = (bytes as u64 / SECTOR_BYTES) as u8;
        frame[27] = command;
        frame[28..34].copy_from_slice(&sector.to_le_bytes()[..6]);
        self.socket.send(&frame).context("an AoE frame cannot be sent")
    }

    /// The next answer into the buffer, and how long it is; `None` after `wait`.
    fn receive(&mut self, wait: Duration) -> Result<Option<usize>> {
        let until = Instant::now() + wait;
        loop {
            match self.socket.receive(&mut self.buffer)? {
                Some(len) if len >= HEADER_BYTES && self.buffer[14] & IS_ANSWER != 0 => return Ok(Some(len)),
                Some(_) => continue,
                None => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let limit = Timespec::try_from(left).expect("short");
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&limit));
        }
    }
}

impl Run {
    fn begin(&mut self, slot: usize, io: Io, now: Instant) {
        let commands = io.bytes.div_ceil(PIECE_BYTES);
        self.requests[slot] = Some(Request { io, since: now, commands_left: commands });
        self.unsent.extend((0..commands).map(|piece| (slot, piece)));
    }

    /// Takes an answer. The slot of the request that it ended, if it was the last.
    fn take(&mut self, answer: &[u8], now: Instant) -> Result<Option<usize>> {
        if answer[19] != COMMAND_ATA {
            return Ok(None);
        }
        ensure!(answer[14] & IS_ERROR == 0, "the target refuses, error {}", answer[15]);
        ensure!(answer.len() >= ATA_BYTES && answer[27] & STATUS_ERROR == 0, "a command failed");
        let tag = u32::from_be_bytes(*answer[20..].first_chunk().expect("as long as a header"));
        let (slot, piece) = ((tag >> 16) as usize, (tag & 0xffff) as usize);
        let place = self.requests.get_mut(slot).context("the target invents a tag")?;
        let Some(request) = place else { return Ok(None) };
        let brought = answer.len() - ATA_BYTES;
        ensure!(
            request.io.op == Op::Write || brought >= piece_bytes(request.io, piece),
            "a read brought too little"
        );
        request.commands_left -= 1;
        self.in_flight -= 1;
        if request.commands_left > 0 {
            return Ok(None);
        }
        let nanos = u64::try_from((now - request.since).as_nanos())?;
        *place = None;
        self.outcome.latency.saturating_record(nanos.max(1));
        self.outcome.requests += 1;
        Ok(Some(slot))
    }
}

fn piece_bytes(io: Io, piece: usize) -> usize {
    io.bytes.saturating_sub(piece * PIECE_BYTES).min(PIECE_BYTES)
}
