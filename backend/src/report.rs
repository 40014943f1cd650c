//! Answers `cirroctl`: what the process serves and how it is.
//!
//! Knows counters, mailboxes and taps; touches nothing of the data path. Called on the control socket's thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cirro_ctl::report::{
    BackendReport, Disk, DiskCounters, DiskState, Link, LinkCounters, LinkState, Process, Report, Session,
    SessionState, State, Worker,
};
use cirro_ctl::request::{Request, TapFile, TapPopped, TapPush, TapPushed};
use cirro_link::Drops;
use cirro_link::clock;
use cirro_link::tap::Limits;
use cirro_link::taps::{TapError, Taps};
use cirro_protocol::initiator::StateName;
use cirro_protocol::types::{MacAddress, Uuid};
use cirro_protocol::wire::body::VOLUME_READ_ONLY;

use crate::attach::Attach;
use crate::config::{DiskEntry, Socket};
use crate::mailbox::{Answer, Change, DiskId, Mailbox};
use crate::stats::{DiskStats, SessionReport, WorkerStats};
use crate::trouble;

/// A disk as it is told of.
#[derive(Clone)]
pub struct DiskView {
    /// Which disk.
    pub id: DiskId,
    /// Its configuration.
    pub entry: DiskEntry,
    /// The worker it lives on.
    pub worker: u16,
    /// Its attachment.
    pub attachment: Uuid,
    /// The first session epoch of this start.
    pub session_epoch: u64,
    /// Its worker's mailbox.
    pub mailbox: Mailbox,
    /// Its volume.
    pub attach: Arc<Attach>,
    /// Its counters.
    pub stats: Arc<DiskStats>,
    /// Whether a VMM is there.
    pub connected: Arc<AtomicBool>,
}

/// Everything that is told of.
pub struct View {
    /// When the process started, ns.
    pub started_ns: u64,
    /// The interface.
    pub interface: String,
    /// Its address.
    pub address: MacAddress,
    /// Its MTU.
    pub mtu: u32,
    /// The workers' counters.
    pub workers: Vec<Arc<WorkerStats>>,
    /// The links' counters, a worker each.
    pub drops: Vec<Arc<Drops>>,
    /// The disks.
    pub disks: Vec<DiskView>,
    /// The workers' taps.
    pub taps: Taps,
}

impl View {
    /// Answers a request.
    ///
    /// # Errors
    /// One sentence for the operator.
    pub fn answer(&mut self, request: &Request) -> Result<serde_json::Value, String> {
        let answer = match request {
            Request::Status {}
            | Request::Stats {}
            | Request::VolumeGrant(_)
            | Request::VolumeRevoke(_)
            | Request::VolumeGrants { .. }
            | Request::VolumeResize(_) => return Report::Backend(self.report()).answer(request),
            Request::LinkTapPush(push) => self.push_taps(push).map(serde_json::to_value),
            Request::LinkTapPop {} => self.pop_taps().map(serde_json::to_value),
        };
        let value = answer.map_err(|error| error.to_string())?;
        value.map_err(|error| format!("the answer cannot be written: {error}"))
    }

    fn push_taps(&mut self, push: &TapPush) -> Result<TapPushed, TapError> {
        let limits = Limits { frame_bytes_max: push.frame_bytes_max, file_bytes_max: push.file_bytes_max };
        self.taps.push(&push.path, limits).map(|files| TapPushed { files: files.to_vec() })
    }

    fn pop_taps(&mut self) -> Result<TapPopped, TapError> {
        let files = self.taps.pop()?.into_iter().map(|(path, recorded)| TapFile {
            path,
            frames: recorded.frames,
            frames_missed: recorded.left_out,
        });
        Ok(TapPopped { files: files.collect() })
    }

    /// The report now.
    pub fn report(&self) -> BackendReport {
        BackendReport {
            process: Process {
                program: "cirro-backend".to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                started_ns: self.started_ns,
                now_ns: clock::now().0,
            },
            links: vec![self.link()],
            workers: self
                .workers
                .iter()
                .enumerate()
                .map(|(index, stats)| self.worker(index as u16, stats))
                .collect(),
            disks: self.disks.iter().map(DiskView::report).collect(),
        }
    }

    fn link(&self) -> Link {
        let sum = |of: fn(&Drops) -> u64| self.drops.iter().map(|drops| of(drops)).sum();
        Link {
            interface: self.interface.clone(),
            address: self.address.to_string(),
            mtu: self.mtu,
            state: State::plain(LinkState::Up, self.started_ns),
            taps: self.taps.files().to_vec(),
            counters: Some(LinkCounters {
                ring_drops: sum(|drops| drops.ring_full.load(Ordering::Relaxed)),
                refused: self.workers.iter().map(|stats| stats.frames_refused.get()).sum(),
                rebuilds: sum(|drops| drops.reopened.load(Ordering::Relaxed)),
            }),
        }
    }

    fn worker(&self, index: u16, stats: &WorkerStats) -> Worker {
        let sessions = self.disks.iter().filter(|disk| disk.worker == index).count() as u32;
        Worker { index, sessions, counters: Some(stats.meter.snapshot()) }
    }
}

impl DiskView {
    fn report(&self) -> Disk {
        let session = match self.mailbox.ask(self.id, Change::Report) {
            Some(Answer::Session(session)) => Some(session),
            Some(Answer::Done | Answer::Stopped { .. }) | None => None,
        };
        let info = self.attach.get();
        let read_only = self.entry.read_only || info.is_some_and(|info| info.flags & VOLUME_READ_ONLY != 0);
        let socket = match &self.entry.socket {
            Socket::Path(path) => Some(PathBuf::clone(path)),
            Socket::Fd(_) => None,
        };
        Disk {
            volume: self.entry.volume.to_string(),
            socket,
            state: disk_state(session.as_deref(), info.is_some()),
            front_end_connected: self.connected.load(Ordering::Relaxed),
            read_only,
            size_bytes: info.map_or(0, |info| info.capacity_sectors * 512),
            node: session.as_ref().and_then(|session| session.node).map(|node| node.to_string()),
            on_trouble: self.entry.on_trouble.to_string(),
            unflushed_bytes: session.as_ref().map_or(0, |session| session.unflushed_bytes),
            in_flight: session.as_ref().map_or(0, |session| session.requests as u32),
            worker: self.worker,
            counters: Some(DiskCounters {
                reconnects: session.as_ref().map_or(0, |session| session.stats.sessions.saturating_sub(1)),
                ops: self.stats.ops(),
            }),
            session: session.map(|session| self.session(&session, info.is_some())),
        }
    }

    fn session(&self, session: &SessionReport, attached: bool) -> Session {
        let stats = &session.stats;
        let name = match session.state {
            StateName::Seeking => SessionState::Seeking,
            StateName::Greeting => SessionState::Greeting,
            StateName::Probing => SessionState::Probing,
            StateName::Opening => SessionState::Opening,
            StateName::Open => SessionState::Open,
        };
        Session {
            peer: session.node.map_or_else(String::new, |node| node.to_string()),
            attachment: self.attachment.to_string(),
            session_epoch: self.session_epoch + stats.sessions.saturating_sub(1),
            volume: attached.then(|| self.entry.volume.to_string()),
            worker: self.worker,
            state: State::plain(name, session.since.0),
            piece_bytes: stats.piece_bytes,
            rtt_ns_min: stats.rtt_ns_min,
            rtt_ns_smoothed: stats.rtt_ns_smoothed,
            window_bytes: stats.window_bytes,
            in_flight_bytes: stats.in_flight_bytes,
            counters: Some(stats.into()),
        }
    }
}

fn disk_state(session: Option<&SessionReport>, attached: bool) -> State<DiskState> {
    let Some(session) = session else {
        return State {
            name: DiskState::Degraded,
            since_ns: 0,
            why: Some("its worker does not answer".to_owned()),
        };
    };
    let name = match (session.state, session.refusal) {
        (_, Some(_)) => DiskState::Refused,
        (StateName::Open, None) if session.replaying => DiskState::Reconnecting,
        (StateName::Open, None) => DiskState::Healthy,
        (StateName::Seeking | StateName::Greeting | StateName::Probing | StateName::Opening, None) => {
            if attached {
                DiskState::Reconnecting
            } else {
                DiskState::Connecting
            }
        }
    };
    let mut why = match name {
        DiskState::Healthy => None,
        DiskState::Reconnecting if session.stuck => {
            Some("the node does not take back what it has lost; it is tried again".to_owned())
        }
        DiskState::Reconnecting if session.state == StateName::Open => {
            Some("writing again what the node may have lost".to_owned())
        }
        DiskState::Degraded | DiskState::Reconnecting | DiskState::Connecting | DiskState::Refused => {
            Some(trouble::why(session.refusal, session.cause))
        }
    };
    if let Some(why) = why.as_mut().filter(|_| session.failing) {
        why.push_str("; requests fail");
    }
    State { name, since_ns: session.since.0, why }
}
