//! The taps of all workers of a process, as the thread sees them that switches them on and off: it makes the files, and waits.
//!
//! Knows that a worker obeys an [`Exchange`] soon; does not know the way it takes there. Called by the daemons' control threads.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::tap::{Exchange, FINISH_TIME, Limits, Recorded, Recording};

/// How long workers may take to obey: a turn takes microseconds.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// Brings an exchange to a worker, and wakes it up.
pub type Way = Box<dyn Fn(Exchange) + Send>;

/// The taps.
pub struct Taps {
    /// One for each worker.
    ways: Vec<Way>,
    /// The files, while there are any.
    files: Vec<PathBuf>,
}

/// Why taps are not as they were asked to be.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is one recording at a time.
    #[error("frames are being recorded to {} already: end that first (cirroctl link tap pop)", .0.display())]
    Active(PathBuf),
    /// The daemon's working directory is not that of the user.
    #[error("{} is no absolute path: name the file from the root", .0.display())]
    Relative(PathBuf),
    /// The system refused.
    #[error(
        "cannot make {}: {cause}; name a file that does not exist, in a directory that the daemon may write to", .path.display()
    )]
    Create {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// It is stuck, or at its end.
    #[error("worker {0} does not answer: its frames are not recorded; is the process ending?")]
    Silent(usize),
}

impl fmt::Debug for Taps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Taps").field("workers", &self.ways.len()).field("files", &self.files).finish()
    }
}

impl Taps {
    /// All off.
    pub fn new(ways: Vec<Way>) -> Taps {
        Taps { ways, files: Vec::new() }
    }

    /// The files being written, one for each worker; empty when off.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Records the frames of every worker from now on, into new files: `path`, or `path.0`, `path.1`, … when there are several workers.
    ///
    /// # Errors
    /// [`TapError`]. Nothing is recorded then, and no file is left behind.
    pub fn push(&mut self, path: &Path, limits: Limits) -> Result<&[PathBuf], TapError> {
        if let Some(first) = self.files.first() {
            return Err(TapError::Active(first.clone()));
        }
        if !path.is_absolute() {
            return Err(TapError::Relative(path.to_owned()));
        }
        let files: Vec<PathBuf> = match self.ways.len() {
            1 => vec![path.to_owned()],
            workers => (0..workers).map(|worker| numbered(path, worker)).collect(),
        };
        let mut recordings = Vec::with_capacity(files.len());
        for file in &files {
            match Recording::create(file, limits) {
                Ok(recording) => recordings.push(Some(recording)),
                Err(cause) => {
                    remove(&files[..recordings.len()]);
                    return Err(TapError::Create { path: file.clone(), cause });
                }
            }
        }
        let answers = self.exchange(recordings.into_iter());
        let until = Instant::now() + ANSWER_TIME;
        if let Some(silent) = answers.iter().position(|answer| answer.recv_timeout(left(until)).is_err()) {
            // It may obey later; then it obeys this as well. What the others recorded so far is dropped with their answers.
            drop(self.exchange(self.ways.iter().map(|_| None)));
            remove(&files);
            return Err(TapError::Silent(silent));
        }
        self.files = files;
        Ok(&self.files)
    }

    /// Ends the recordings and completes the files; tells what is in them. Nothing when all were off.
    ///
    /// # Errors
    /// A worker does not answer. Its recording ends when it obeys; all others have ended.
    pub fn pop(&mut self) -> Result<Vec<(PathBuf, Recorded)>, TapError> {
        let files = std::mem::take(&mut self.files);
        let answers = self.exchange(files.iter().map(|_| None));
        let until = Instant::now() + ANSWER_TIME;
        let recordings: Vec<_> = answers.iter().map(|answer| answer.recv_timeout(left(until))).collect();
        let until = Instant::now() + FINISH_TIME;
        let mut ended = Vec::with_capacity(files.len());
        let mut silent = None;
        for (worker, (file, recording)) in files.into_iter().zip(recordings).enumerate() {
            match recording {
                Ok(Some(recording)) => ended.push((file, recording.finish(left(until)))),
                Ok(None) | Err(_) => silent = Some(worker),
            }
        }
        silent.map_or(Ok(ended), |worker| Err(TapError::Silent(worker)))
    }

    /// Sends each worker its recording, or none; where the ones that were there will come out.
    fn exchange(
        &self,
        recordings: impl Iterator<Item = Option<Box<Recording>>>,
    ) -> Vec<Receiver<Option<Box<Recording>>>> {
        let sent = self.ways.iter().zip(recordings).map(|(way, recording)| {
            let (exchange, old) = Exchange::new(recording);
            way(exchange);
            old
        });
        sent.collect()
    }
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

/// `path.worker`, whatever bytes the path is made of.
fn numbered(path: &Path, worker: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{worker}"));
    PathBuf::from(name)
}

/// Takes back files that we made a moment ago.
fn remove(files: &[PathBuf]) {
    for file in files {
        if let Err(error) = std::fs::remove_file(file) {
            log::warn!("cannot remove {}: {error}", file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::memory::pair;
    use crate::tap::Tap;
    use crate::{FrameId, Link};

    /// Workers that send frames of 60 bytes for ever; how many each, comes out at the end.
    fn workers(count: usize) -> (Taps, Vec<std::thread::JoinHandle<()>>) {
        let (mut ways, mut threads): (Vec<Way>, _) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let (sender, orders) = channel::<Exchange>();
            ways.push(Box::new(move |exchange| drop(sender.send(exchange))));
            threads.push(std::thread::spawn(move || {
                let mut tap = Tap::new(pair(1500).0);
                for order in orders {
                    order.carry_out(&mut tap);
                    tap.frame().unwrap().head.extend_from_slice(&[7; 60]);
                    tap.commit(FrameId::default());
                    tap.flush(&mut Vec::new());
                }
            }));
        }
        (Taps::new(ways), threads)
    }

    #[test]
    fn one_worker_writes_the_file_and_several_write_one_each() {
        let folder = tempfile::tempdir().unwrap();
        for (count, names) in [(1, vec!["1.pcap"]), (3, vec!["3.pcap.0", "3.pcap.1", "3.pcap.2"])] {
            let (mut taps, threads) = workers(count);
            let names: Vec<PathBuf> = names.iter().map(|name| folder.path().join(name)).collect();
            let path = folder.path().join(format!("{count}.pcap"));
            assert_eq!(taps.push(&path, Limits::default()).unwrap(), names);
            assert_eq!(taps.files(), names);
            let ended = taps.pop().unwrap();
            assert_eq!(ended.len(), count);
            for ((file, recorded), name) in ended.iter().zip(&names) {
                assert_eq!((file, *recorded), (name, Recorded { frames: 1, left_out: 0 }));
                let facts = std::fs::metadata(file).unwrap();
                assert_eq!(facts.len(), 24 + 16 + 60);
                assert_eq!(facts.permissions().mode() & 0o777, 0o600, "nobody else reads guests' data");
            }
            assert_eq!(taps.files(), <[PathBuf; 0]>::default());
            assert_eq!(taps.pop().unwrap(), [], "nothing was on");
            drop(taps);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        }
    }

    #[test]
    fn what_cannot_be_recorded_is_refused_by_name_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pcap");
        let (mut taps, _threads) = workers(2);
        let said = |result: Result<&[PathBuf], TapError>| result.unwrap_err().to_string();
        assert!(
            said(taps.push(Path::new("a.pcap"), Limits::default())).contains("a.pcap is no absolute path")
        );
        let second = folder.path().join("a.pcap.1");
        std::fs::write(&second, "precious").unwrap();
        let error = said(taps.push(&path, Limits::default()));
        assert!(error.contains("a.pcap.1: File exists"), "{error}");
        assert_eq!(std::fs::read_to_string(&second).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the first worker's file is gone");
        std::fs::remove_file(&second).unwrap();
        std::os::unix::fs::symlink("/nowhere", &second).unwrap();
        assert!(said(taps.push(&path, Limits::default())).contains("File exists"), "no link is followed");
        std::fs::remove_file(&second).unwrap();
        taps.push(&path, Limits::default()).unwrap();
        let error = said(taps.push(&folder.path().join("b.pcap"), Limits::default()));
        assert!(error.contains("a.pcap.0 already"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_worker_that_is_gone_or_stuck_is_named_and_what_was_begun_is_undone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pcap");
        let mut gone = Taps::new(vec![Box::new(drop)]);
        assert!(matches!(gone.push(&path, Limits::default()), Err(TapError::Silent(0))));
        let (sender, orders) = channel();
        let mut stuck = Taps::new(vec![Box::new(move |exchange| drop(sender.send(exchange)))]);
        assert!(matches!(stuck.push(&path, Limits::default()), Err(TapError::Silent(0))));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(stuck.files(), <[PathBuf; 0]>::default());
        let mut tap = Tap::new(pair(1500).0);
        orders.try_iter().for_each(|order: Exchange| order.carry_out(&mut tap));
        assert!(tap.exchange(None).is_none(), "a worker that comes back late does not record for nobody");
    }
}
