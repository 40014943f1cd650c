//! The shapes of what the daemons report: the JSON of `status` and `stats`.
//!
//! Does not know how a daemon finds the numbers nor how `cirroctl` shows them. Filled by the daemons' control handlers, read by `cirroctl`, tests and scripts.
//! Both requests have one shape; `status` leaves the `counters` out. Points in time are CLOCK_MONOTONIC nanoseconds of the machine, so that
//! a snapshot does not age: subtract from `process.now_ns`. Addresses and identifiers are text as the log prints them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cirro_protocol::stats::Stats;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::request::Request;

/// The answer to `status` and `stats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "daemon", rename_all = "kebab-case")]
pub enum Report {
    /// Of a storage node.
    Node(NodeReport),
    /// Of a backend.
    Backend(BackendReport),
}

/// What `cirro-node` reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The process.
    pub process: Process,
    /// Its links.
    pub links: Vec<Link>,
    /// Its workers.
    pub workers: Vec<Worker>,
    /// The volumes it serves.
    pub volumes: Vec<Volume>,
    /// The backends that use them.
    pub sessions: Vec<Session>,
}

/// What `cirro-backend` reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendReport {
    /// The process.
    pub process: Process,
    /// Its links.
    pub links: Vec<Link>,
    /// Its workers.
    pub workers: Vec<Worker>,
    /// The disks it offers to guests.
    pub disks: Vec<Disk>,
}

/// A daemon's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its program's name.
    pub program: String,
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// When it started.
    pub started_ns: u64,
    /// When this report was made.
    pub now_ns: u64,
}

/// A state, since when, and why when that is not plain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State<N> {
    /// The state.
    pub name: N,
    /// When it began.
    pub since_ns: u64,
    /// What led to it, in a few words for an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A way to send and receive frames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The network interface.
    pub interface: String,
    /// Its MAC address.
    pub address: String,
    /// Bytes after the Ethernet header.
    pub mtu: u32,
    /// Whether it carries frames.
    pub state: State<LinkState>,
    /// Files that taps write now.
    pub taps: Vec<PathBuf>,
    /// In `stats` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<LinkCounters>,
}

/// Whether a link carries frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// It does.
    Up,
    /// The interface is down.
    Down,
    /// The interface is not there; it is looked for.
    Gone,
}

/// What a link counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkCounters {
    /// Frames the kernel dropped because the receive ring was full.
    pub ring_drops: u64,
    /// Frames the kernel would not send.
    pub refused: u64,
    /// Times the link was made anew after its interface had gone.
    pub rebuilds: u64,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Its number.
    pub index: u16,
    /// Sessions on it.
    pub sessions: u32,
    /// In `stats` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<WorkerCounters>,
}

/// What a worker counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerCounters {
    /// Frames the link gave it.
    pub frames_in: u64,
    /// Frames it gave to the link.
    pub frames_out: u64,
    /// Bytes of the frames in.
    pub bytes_in: u64,
    /// Bytes of the frames out.
    pub bytes_out: u64,
    /// Frames it dropped, by reason; only reasons that occurred.
    pub dropped: BTreeMap<String, u64>,
    /// Passes over everything.
    pub turns: u64,
    /// Times it slept and was woken.
    pub wakeups: u64,
}

/// A volume of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// The file or device that holds it.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Whether the node refuses to write to it.
    pub read_only: bool,
    /// How the node reaches the disk.
    pub io: Io,
    /// When a write counts as done.
    pub durability: Durability,
    /// Whether it can be used.
    pub state: State<VolumeState>,
    /// Who may write now.
    pub owner: Option<Owner>,
    /// Sessions that have it open.
    pub sessions: u32,
    /// The worker it lives on.
    pub worker: u16,
    /// In `stats` only: requests by kind, timed from arrival to reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<Ops>,
}

/// How a volume's bytes are read and written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Io {
    /// Past the page cache or through it.
    pub mode: IoMode,
    /// Why not direct.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Past the page cache or through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoMode {
    /// O_DIRECT.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// When it is stable.
    WriteThrough,
    /// When the node has it; a flush makes it stable.
    WriteBack,
}

/// Whether a volume can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Requests are served.
    Serving,
    /// An open waits until the writes of an older session have ended.
    Draining,
    /// The disk below failed; requests get errors.
    Failed,
}

/// Who may write to a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The attachment.
    pub attachment: String,
    /// The volume epoch it was given.
    pub vol_epoch: u64,
}

/// One end's view of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The other end's MAC address.
    pub peer: String,
    /// The attachment it belongs to.
    pub attachment: String,
    /// Its place among the sessions of the attachment.
    pub session_epoch: u64,
    /// The volume, once it is open.
    pub volume: Option<String>,
    /// The worker it lives on.
    pub worker: u16,
    /// How far it is.
    pub state: State<SessionState>,
    /// Largest data in one frame; 0 before it is known.
    pub piece_bytes: u32,
    /// Smallest round trip of late; 0 before it is known.
    pub rtt_ns_min: u64,
    /// Smoothed round trip; 0 before it is known.
    pub rtt_ns_smoothed: u64,
    /// Congestion window.
    pub window_bytes: u64,
    /// Bytes sent and neither acked nor taken for lost.
    pub in_flight_bytes: u64,
    /// In `stats` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<SessionCounters>,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionState {
    /// Looking for the node.
    Seeking,
    /// In the handshake.
    Greeting,
    /// Trying which frames the path carries.
    Probing,
    /// Asking for the volume, or waiting for older writes to end.
    Opening,
    /// Requests flow.
    Open,
    /// Saying good-bye.
    Closing,
}

/// What a session counts, at this end. The words are those of [`cirro_protocol::stats::Stats`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionCounters {
    /// Frames sent.
    pub frames_sent: u64,
    /// Frames received whose seal was right.
    pub frames_received: u64,
    /// Bytes of data sent, repeats included.
    pub payload_bytes_sent: u64,
    /// Bytes of data received and used.
    pub payload_bytes_received: u64,
    /// Frames taken for lost.
    pub frames_lost: u64,
    /// Messages sent again.
    pub messages_resent: u64,
    /// Frames acked after they had been taken for lost.
    pub spurious_losses: u64,
    /// Probe timeouts.
    pub probe_timeouts: u64,
    /// Frames that came twice.
    pub duplicate_frames: u64,
    /// Messages of requests that were known already.
    pub duplicate_messages: u64,
    /// Messages that broke the protocol.
    pub violations: u64,
    /// Frames the link would not take.
    pub frames_refused: u64,
}

/// A disk of a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The volume it shows.
    pub volume: String,
    /// The vhost-user socket; None when the VMM gave a descriptor.
    pub socket: Option<PathBuf>,
    /// What the guest has of it.
    pub state: State<DiskState>,
    /// Whether a VMM is connected.
    pub front_end_connected: bool,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// The volume's size; 0 before it is known.
    pub size_bytes: u64,
    /// The node's MAC address, once it is known.
    pub node: Option<String>,
    /// Requests of the guest that have not ended.
    pub in_flight: u32,
    /// What happens to requests while the volume is not open: `wait`, or `eio-after=TIME`.
    #[serde(default)]
    pub on_trouble: String,
    /// Answered changes that no flush covers yet, of which a copy is kept.
    #[serde(default)]
    pub unflushed_bytes: u64,
    /// The worker it lives on.
    pub worker: u16,
    /// The session, or the attempt at one.
    pub session: Option<Session>,
    /// In `stats` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<DiskCounters>,
}

/// What the guest has of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// Never had a session yet.
    Connecting,
    /// Requests flow.
    Healthy,
    /// Requests flow, but badly: the path loses much, or a fault is latched.
    Degraded,
    /// The session was lost: requests wait for the next.
    Reconnecting,
    /// The node says no; it is asked again.
    Refused,
}

/// What a disk counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCounters {
    /// Sessions after the first.
    pub reconnects: u64,
    /// Requests of the guest by kind, timed from taking them off the ring to their status.
    pub ops: Ops,
}

/// Requests by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ops {
    /// Reads.
    pub read: OpCounters,
    /// Writes.
    pub write: OpCounters,
    /// Flushes.
    pub flush: OpCounters,
    /// Discards.
    pub discard: OpCounters,
    /// Writes of zeroes.
    pub write_zeroes: OpCounters,
}

/// Requests of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpCounters {
    /// Requests that ended well.
    pub requests: u64,
    /// Bytes they moved or covered.
    pub bytes: u64,
    /// Requests that ended with an error.
    pub errors: u64,
    /// How long both took.
    pub latency: LatencySummary,
}

/// A distribution of latencies; quantiles are upper bounds within 3.1 %, the maximum is exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// How many.
    pub count: u64,
    /// Mean.
    pub ns_mean: u64,
    /// Half took no longer.
    pub ns_p50: u64,
    /// 99 of 100 took no longer.
    pub ns_p99: u64,
    /// 999 of 1000 took no longer.
    pub ns_p99_9: u64,
    /// The longest.
    pub ns_max: u64,
}

impl Report {
    /// The answer to `status` or `stats`; the other requests are not supported here.
    ///
    /// # Errors
    /// The request is neither.
    pub fn answer(mut self, request: &Request) -> Result<Value, String> {
        match request {
            Request::Status {} => self.drop_counters(),
            Request::Stats {} => {}
            Request::LinkTapPush(_)
            | Request::LinkTapPop {}
            | Request::VolumeGrant(_)
            | Request::VolumeRevoke(_)
            | Request::VolumeGrants { .. }
            | Request::VolumeResize(_) => {
                return request.not_supported(&self.process().program);
            }
        }
        serde_json::to_value(self).map_err(|error| format!("the report cannot be written: {error}"))
    }

    /// The process that reports.
    pub fn process(&self) -> &Process {
        match self {
            Report::Node(node) => &node.process,
            Report::Backend(backend) => &backend.process,
        }
    }

    /// The parts that both kinds have.
    pub fn links_and_workers(&self) -> (&[Link], &[Worker]) {
        match self {
            Report::Node(node) => (&node.links, &node.workers),
            Report::Backend(backend) => (&backend.links, &backend.workers),
        }
    }

    fn drop_counters(&mut self) {
        let (links, workers) = match self {
            Report::Node(node) => {
                node.volumes.iter_mut().for_each(|volume| volume.counters = None);
                node.sessions.iter_mut().for_each(|session| session.counters = None);
                (&mut node.links, &mut node.workers)
            }
            Report::Backend(backend) => {
                for disk in &mut backend.disks {
                    disk.counters = None;
                    disk.session.iter_mut().for_each(|session| session.counters = None);
                }
                (&mut backend.links, &mut backend.workers)
            }
        };
        links.iter_mut().for_each(|link| link.counters = None);
        workers.iter_mut().for_each(|worker| worker.counters = None);
    }
}

impl<N> State<N> {
    /// A state that explains itself.
    pub fn plain(name: N, since_ns: u64) -> State<N> {
        State { name, since_ns, why: None }
    }
}

impl From<&Stats> for SessionCounters {
    fn from(stats: &Stats) -> SessionCounters {
        SessionCounters {
            frames_sent: stats.frames_sent,
            frames_received: stats.frames_received,
            payload_bytes_sent: stats.payload_bytes_sent,
            payload_bytes_received: stats.payload_bytes_received,
            frames_lost: stats.frames_lost,
            messages_resent: stats.messages_resent,
            spurious_losses: stats.spurious_losses,
            probe_timeouts: stats.probe_timeouts,
            duplicate_frames: stats.duplicate_frames,
            duplicate_messages: stats.duplicate_messages,
            violations: stats.violations,
            frames_refused: stats.frames_refused,
        }
    }
}
