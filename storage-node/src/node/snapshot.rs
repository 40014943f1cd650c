//! What a worker tells of itself: its volumes and sessions in the shapes of `cirro_ctl::report`.
//!
//! Knows the reports' words. Filled a few times a second by `server`, off the data path.

use cirro_ctl::report;
use cirro_protocol::wire::body::Access;

use super::Node;
use super::served::{Served, Stage};
use super::session::Session;
use crate::store::Store;
use crate::volume::{Durability, IoMode, Volume};

/// A worker's part of the report.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The volumes it serves.
    pub volumes: Vec<report::Volume>,
    /// Its sessions.
    pub sessions: Vec<report::Session>,
}

impl<S: Store> Node<S> {
    pub(super) fn fill(&self, snapshot: &mut Snapshot) {
        let Snapshot { volumes, sessions } = snapshot;
        volumes.clear();
        let worker = self.config.steer.worker();
        volumes.extend(self.volumes.iter().map(|served| report_volume(served, worker)));
        for (_, session) in self.sessions.iter().filter(|(_, session)| session.opened.is_some()) {
            volumes[usize::from(session.volume)].sessions += 1;
        }
        sessions.clear();
        sessions.extend(self.sessions.iter().map(|(_, session)| self.report_session(session)));
    }

    fn report_session(&self, session: &Session) -> report::Session {
        let (stats, hello) = (session.target.stats(), session.target.hello());
        let name = match (session.closing, session.opened, session.target.is_confirmed()) {
            (true, _, _) => report::SessionState::Closing,
            (false, Some(_), _) => report::SessionState::Open,
            (false, None, true) => report::SessionState::Opening,
            (false, None, false) => report::SessionState::Greeting,
        };
        report::Session {
            peer: session.target.peer().to_string(),
            attachment: hello.attachment.to_string(),
            session_epoch: hello.session_epoch,
            volume: Some(hello.volume.to_string()),
            worker: self.config.steer.worker(),
            state: report::State {
                name,
                since_ns: session.since.0,
                why: session.opened.map(|opened| match opened.access {
                    Access::ReadOnly => "read only".to_owned(),
                    Access::ReadWrite => "for writing".to_owned(),
                }),
            },
            piece_bytes: stats.piece_bytes,
            rtt_ns_min: stats.rtt_ns_min,
            rtt_ns_smoothed: stats.rtt_ns_smoothed,
            window_bytes: stats.window_bytes,
            in_flight_bytes: stats.in_flight_bytes,
            counters: Some(report::SessionCounters::from(&stats)),
        }
    }
}

/// Without the number of its sessions.
fn report_volume(served: &Served, worker: u16) -> report::Volume {
    let draining = served.openings.iter().any(|o| matches!(o.stage, Stage::Draining { .. }));
    let (name, why) = match served.flush_failed {
        Some(errno) => {
            let error = std::io::Error::from_raw_os_error(errno);
            (report::VolumeState::Failed, Some(format!("a flush failed ({error}); every later one fails")))
        }
        None if draining => (report::VolumeState::Draining, None),
        None => (report::VolumeState::Serving, None),
    };
    let holder = served.owner.holder;
    let owner = holder
        .map(|holder| report::Owner { attachment: holder.to_string(), vol_epoch: served.owner.vol_epoch });
    let meters = &served.meters;
    report::Volume {
        state: report::State { name, since_ns: served.since.0, why },
        owner,
        counters: Some(report::Ops {
            read: meters.read.snapshot(),
            write: meters.write.snapshot(),
            flush: meters.flush.snapshot(),
            discard: meters.discard.snapshot(),
            write_zeroes: meters.write_zeroes.snapshot(),
        }),
        ..report_waiting(&served.volume, worker, served.since.0)
    }
}

/// A volume that is not served yet, because another process has its lock.
pub fn report_waiting(volume: &Volume, worker: u16, since_ns: u64) -> report::Volume {
    report::Volume {
        name: volume.name.to_string(),
        path: volume.path.clone(),
        size_bytes: volume.capacity_sectors * 512,
        read_only: volume.read_only,
        io: report::Io {
            mode: match volume.io {
                IoMode::Direct => report::IoMode::Direct,
                IoMode::Buffered => report::IoMode::Buffered,
            },
            why: volume.io_note.map(str::to_owned),
        },
        durability: match volume.durability {
            Durability::WriteThrough => report::Durability::WriteThrough,
            Durability::WriteBack => report::Durability::WriteBack,
        },
        state: report::State {
            name: report::VolumeState::Draining,
            since_ns,
            why: Some(
                "another process has the lock, or requests of one that was killed are not done".to_owned(),
            ),
        },
        owner: None,
        sessions: 0,
        worker,
        counters: None,
    }
}
