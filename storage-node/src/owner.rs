//! Who may write to a volume, and the keeper that makes each change of that durable before it is answered.
//!
//! Knows epochs and attachments (docs/PROTOCOL.md, P-79 to P-82); does not know sessions, nor how a record is stored. The decision is made
//! on the volume's worker, the writing on a helper thread, because it waits for a disk. Called by `node`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use cirro_protocol::types::{Uuid, VolumeName};
use log::error;
use rustix::event::{EventfdFlags, eventfd};

use crate::state_dir::StateDir;

/// Records that wait to be written: one for each volume of a worker, which writes one at a time.
pub const KEEPER_JOBS_MAX: usize = crate::store::FILES_MAX;

/// Who owns a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerRecord {
    /// Grows with every new owner; 0 before the first.
    pub vol_epoch: u64,
    /// The attachment that may write.
    pub holder: Option<Uuid>,
}

/// What an OPEN for writing comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The attachment holds the volume already.
    Held,
    /// It will, once this record is durable.
    Grant(OwnerRecord),
    /// Another attachment holds it.
    Busy(Uuid),
}

impl OwnerRecord {
    /// The record of a volume as a start of the node finds it. One whose bytes ended with the last start belongs to nobody, in an epoch that nobody
    /// has had: to an attachment that goes on with its own the volume was another's meanwhile (P-81), so its guest gets errors and not an
    /// empty disk under its file system.
    #[must_use]
    pub fn found_by(self, bytes_are_gone: bool) -> OwnerRecord {
        match bytes_are_gone && self.vol_epoch > 0 {
            true => OwnerRecord { vol_epoch: self.vol_epoch + 1, holder: None },
            false => self,
        }
    }

    /// Decides an OPEN for writing.
    pub fn claim(&self, attachment: Uuid, take_over: Option<u64>) -> Claim {
        let next = OwnerRecord { vol_epoch: self.vol_epoch + 1, holder: Some(attachment) };
        match self.holder {
            None => Claim::Grant(next),
            Some(holder) if holder == attachment => Claim::Held,
            Some(_) if take_over == Some(self.vol_epoch) => Claim::Grant(next),
            Some(holder) => Claim::Busy(holder),
        }
    }

    /// What a RELEASE leaves; `None` when the attachment does not hold the volume.
    pub fn release(&self, attachment: Uuid) -> Option<OwnerRecord> {
        (self.holder == Some(attachment)).then_some(OwnerRecord { vol_epoch: self.vol_epoch, holder: None })
    }
}

/// A record to be made durable, or that was tried to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    /// The volume.
    pub volume: VolumeName,
    /// The worker's number for it.
    pub token: u32,
    /// The record.
    pub record: OwnerRecord,
}

/// Makes records durable. A worker has at most one under way for each volume.
pub trait Keeper: Send {
    /// Takes a record; false: no room now.
    fn keep(&mut self, keeping: Keeping) -> bool;
    /// The next record that is durable, or (false) could not be made so; never waits.
    fn kept(&mut self) -> Option<(Keeping, bool)>;
}

/// The keeper that serves: a thread that writes into the state directory.
#[derive(Debug)]
pub struct FileKeeper {
    jobs: Option<SyncSender<Keeping>>,
    answers: Receiver<(Keeping, bool)>,
    ready: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl FileKeeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread or no descriptor can be had.
    pub fn start(state: Arc<StateDir>) -> io::Result<FileKeeper> {
        let (jobs, inbox) = sync_channel::<Keeping>(KEEPER_JOBS_MAX);
        let (outbox, answers) = sync_channel(KEEPER_JOBS_MAX);
        let ready = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let bell = Arc::clone(&ready);
        let thread = std::thread::Builder::new().name("keeper".into()).spawn(move || {
            for keeping in inbox {
                let written = state.write_owner(&keeping.volume, &keeping.record);
                if let Err(e) = &written {
                    error!(
                        "volume {}: its new owner cannot be recorded, so nobody becomes it: {e}",
                        keeping.volume
                    );
                }
                if outbox.send((keeping, written.is_ok())).is_err() {
                    return;
                }
                // An eventfd counter that is full has rung already.
                let _ = rustix::io::write(&*bell, &1u64.to_ne_bytes());
            }
        })?;
        Ok(FileKeeper { jobs: Some(jobs), answers, ready, thread: Some(thread) })
    }
}

impl Keeper for FileKeeper {
    fn keep(&mut self, keeping: Keeping) -> bool {
        match self.jobs.as_ref().map(|jobs| jobs.try_send(keeping)) {
            Some(Ok(())) => true,
            Some(Err(TrySendError::Full(_))) => false,
            Some(Err(TrySendError::Disconnected(_))) | None => {
                panic!("the keeper lives as long as its worker")
            }
        }
    }

    fn kept(&mut self) -> Option<(Keeping, bool)> {
        self.answers.try_recv().ok()
    }
}

impl FileKeeper {
    /// Stops the descriptor from being readable; called when it woke the worker, before [`Keeper::kept`].
    pub fn quiet(&self) {
        let mut count = [0; 8];
        // Nothing to read: somebody was quicker.
        let _ = rustix::io::read(&*self.ready, &mut count);
    }

    /// The descriptor, to be kept by who waits.
    pub fn ready_fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.ready)
    }
}

impl AsFd for FileKeeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

impl Drop for FileKeeper {
    /// Lets the thread write what it was given, then ends it.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// A keeper for tests and simulations: keeps records in memory that survives the node.
#[derive(Clone, Debug, Default)]
pub struct MemoryKeeper {
    shared: Arc<Mutex<MemoryRecords>>,
}

#[derive(Debug, Default)]
struct MemoryRecords {
    kept: Vec<Keeping>,
    answers: std::collections::VecDeque<(Keeping, bool)>,
    fails: bool,
    holds: bool,
}

impl MemoryKeeper {
    /// Whether records asked for from now on cannot be kept, as on a full disk.
    pub fn set_failing(&self, fails: bool) {
        self.lock().fails = fails;
    }

    /// Whether answers are held back.
    pub fn set_holding(&self, holds: bool) {
        self.lock().holds = holds;
    }

    /// The record of a volume as it is on "disk".
    pub fn record(&self, volume: &VolumeName) -> OwnerRecord {
        let last = self.lock().kept.iter().rfind(|keeping| keeping.volume == *volume).copied();
        last.map_or(OwnerRecord::default(), |keeping| keeping.record)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, MemoryRecords> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Keeper for MemoryKeeper {
    fn keep(&mut self, keeping: Keeping) -> bool {
        let mut shared = self.lock();
        let kept = !shared.fails;
        if kept {
            shared.kept.push(keeping);
        }
        shared.answers.push_back((keeping, kept));
        true
    }

    fn kept(&mut self) -> Option<(Keeping, bool)> {
        let mut shared = self.lock();
        if shared.holds { None } else { shared.answers.pop_front() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uuid = Uuid([1; 16]);
    const B: Uuid = Uuid([2; 16]);

    #[test]
    fn a_volume_whose_bytes_are_gone_is_nobodys_and_no_epoch_of_before_is_its_own() {
        let held = OwnerRecord { vol_epoch: 5, holder: Some(A) };
        assert_eq!(held.found_by(false), held);
        let found = held.found_by(true);
        assert_eq!(found, OwnerRecord { vol_epoch: 6, holder: None });
        assert_eq!(found.claim(A, None), Claim::Grant(OwnerRecord { vol_epoch: 7, holder: Some(A) }));
        assert_eq!(OwnerRecord::default().found_by(true), OwnerRecord::default(), "nobody has had it yet");
    }

    /// P-79 P-80: the table of "Ownership" in docs/PROTOCOL.md.
    #[test]
    fn an_epoch_belongs_to_one_holder() {
        let nobody = OwnerRecord { vol_epoch: 4, holder: None };
        let held = OwnerRecord { vol_epoch: 5, holder: Some(A) };
        let taken = OwnerRecord { vol_epoch: 6, holder: Some(B) };
        assert_eq!(nobody.claim(A, None), Claim::Grant(held));
        assert_eq!(held.claim(A, None), Claim::Held);
        assert_eq!(held.claim(B, None), Claim::Busy(A));
        assert_eq!(held.claim(B, Some(4)), Claim::Busy(A), "the epoch named is not the one of now");
        assert_eq!(held.claim(B, Some(6)), Claim::Busy(A), "nor a later one");
        assert_eq!(held.claim(B, Some(5)), Claim::Grant(taken));
        assert_eq!(taken.claim(A, None), Claim::Busy(B), "the fenced one does not take it back by itself");
        assert_eq!(held.release(A), Some(OwnerRecord { vol_epoch: 5, holder: None }));
        assert_eq!(held.release(B), None);
        assert_eq!(nobody.release(A), None);
    }

    #[test]
    fn the_keeper_answers_after_the_record_is_on_disk_and_rings() {
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(StateDir::open(dir.path(), |bytes| bytes.fill(1)).unwrap());
        let mut keeper = FileKeeper::start(Arc::clone(&state)).unwrap();
        let record = OwnerRecord { vol_epoch: 1, holder: Some(A) };
        let keeping = Keeping { volume: "v".parse().unwrap(), token: 9, record };
        assert!(keeper.keep(keeping));
        let mut fds = [rustix::event::PollFd::new(&keeper, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)).unwrap(), 1);
        keeper.quiet();
        assert_eq!(keeper.kept(), Some((keeping, true)));
        assert_eq!(keeper.kept(), None);
        assert_eq!(state.read_owner(&keeping.volume).unwrap(), record);
    }

    #[test]
    fn a_record_that_cannot_be_written_is_answered_so() {
        let dir = tempfile::tempdir().unwrap();
        let state = Arc::new(StateDir::open(dir.path(), |bytes| bytes.fill(1)).unwrap());
        std::fs::remove_dir(dir.path().join("owners")).unwrap();
        let mut keeper = FileKeeper::start(state).unwrap();
        let keeping = Keeping { volume: "v".parse().unwrap(), token: 0, record: OwnerRecord::default() };
        assert!(keeper.keep(keeping));
        let answer = loop {
            if let Some(answer) = keeper.kept() {
                break answer;
            }
            std::thread::yield_now();
        };
        assert_eq!(answer, (keeping, false));
    }
}
