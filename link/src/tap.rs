//! A layer that records the frames of a link in a pcap file (nanosecond stamps, LINKTYPE_ETHERNET) that Wireshark opens. Switched on and off at run
//! time; when off it costs one branch per call.
//!
//! Knows the pcap format (draft-ietf-opsawg-pcap) and nothing of what is in a frame. Stands anywhere among the layers of a worker's link and
//! records what passes there. A thread of its own writes the file: the worker copies each frame into a chunk in memory and never waits for the
//! disk; frames for which no chunk is free are left out and counted. The copy costs 30 ns for a small frame, 0.1 µs for one of 8 KiB received and
//! 0.15 µs for one sent (measured with everything in cache).

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, channel, sync_channel};
use std::thread::JoinHandle;

use cirro_protocol::time::{Instant, Nanos};
use cirro_protocol::types::{FRAME_BYTES_MAX, MacAddress};

use crate::{FrameId, Link, Received, TxFrame, clock};

/// Bytes that are given to the writing thread at once.
const CHUNK_BYTES: usize = 512 << 10;
/// Full chunks that wait to be written: 4 MiB, which a disk of 1 GB/s takes in the time in which a link of 10 Gbit/s brings 5 MB.
const CHUNKS_MAX: usize = 8;
/// How long a frame stays in memory when few come: somebody may be watching the file.
const WRITE_EVERY: Nanos = Nanos::from_millis(100);

/// Nanosecond stamps, written in little-endian order.
const MAGIC: u32 = 0xa1b2_3c4d;
const LINKTYPE_ETHERNET: u32 = 1;
const RECORD_HEADER_BYTES: usize = 16;

const _: () = assert!(FRAME_BYTES_MAX + RECORD_HEADER_BYTES <= CHUNK_BYTES, "a chunk takes any frame");

/// What a recording has in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Frames in the file.
    pub frames: u64,
    /// Frames left out because the disk was too slow.
    pub left_out: u64,
}

/// The layer.
#[derive(Debug)]
pub struct Tap<L> {
    inner: L,
    recording: Option<Box<Recording>>,
}

#[derive(Debug)]
struct Recording {
    path: PathBuf,
    /// Wall clock minus monotonic clock when the recording began.
    wall_offset_ns: u64,
    /// The frame that is being built: the frames of the link below cannot be looked at any more once they are committed.
    frame: TxFrame,
    /// Frames committed and not flushed: which of them leave is known after the flush.
    committed: Vec<(FrameId, Range<usize>)>,
    committed_bytes: Vec<u8>,
    chunk: Vec<u8>,
    /// When the first frame came into the chunk.
    chunk_began: Instant,
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
    writer: JoinHandle<io::Result<()>>,
    writer_gone: bool,
    recorded: Recorded,
}

impl<L> Tap<L> {
    /// The layer above `inner`, off.
    pub fn new(inner: L) -> Tap<L> {
        Tap { inner, recording: None }
    }

    /// What is below.
    pub fn inner(&self) -> &L {
        &self.inner
    }

    /// What is below.
    pub fn inner_mut(&mut self) -> &mut L {
        &mut self.inner
    }

    /// Begins to record into a new file at `path`; what was there is replaced, and a recording that runs is ended. Call it between two turns.
    ///
    /// # Errors
    /// The file cannot be made, or no thread started. Nothing is recorded then.
    pub fn start(&mut self, path: &Path) -> io::Result<()> {
        self.stop()?;
        self.recording = Some(Box::new(Recording::new(path)?));
        Ok(())
    }

    /// True while frames are recorded.
    pub fn is_on(&self) -> bool {
        self.recording.is_some()
    }

    /// Ends the recording, if there is one, and waits until the file is complete: at most 4 MiB are to be written. Call it between two turns.
    ///
    /// # Errors
    /// The file could not be written to its end.
    pub fn stop(&mut self) -> io::Result<Recorded> {
        self.recording.take().map_or(Ok(Recorded::default()), |recording| recording.finish())
    }

    /// Hands the chunk over when it is time, and ends a recording that cannot be written.
    fn tend(&mut self) {
        let Some(recording) = &mut self.recording else { return };
        if recording.due().is_some_and(|due| clock::now() >= due) {
            recording.hand_over();
        }
        if recording.writer_gone {
            let path = recording.path.clone();
            if let Err(error) = self.stop() {
                log::warn!("recording to {} ended: {error}", path.display());
            }
        }
    }
}

impl<L> Drop for Tap<L> {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!("recording: {error}");
        }
    }
}

impl Recording {
    fn new(path: &Path) -> io::Result<Recording> {
        let mut file = File::create(path)?;
        let (full, to_write) = sync_channel::<Vec<u8>>(CHUNKS_MAX);
        let (written, empty) = channel();
        let write = move || {
            for mut chunk in to_write {
                file.write_all(&chunk)?;
                chunk.clear();
                // Nobody takes it: the recording is at its end.
                let _ = written.send(chunk);
            }
            Ok(())
        };
        let writer = std::thread::Builder::new().name("tap".to_owned()).spawn(write)?;
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        let now = clock::now();
        chunk.extend_from_slice(&file_header());
        Ok(Recording {
            path: path.to_owned(),
            wall_offset_ns: clock::wall_ns().wrapping_sub(now.0),
            frame: TxFrame::with_capacity(FRAME_BYTES_MAX),
            committed: Vec::new(),
            committed_bytes: Vec::new(),
            chunk,
            chunk_began: now,
            full,
            empty,
            writer,
            writer_gone: false,
            recorded: Recorded::default(),
        })
    }

    fn note_committed(&mut self, id: FrameId) {
        let start = self.committed_bytes.len();
        self.frame.gather(&mut self.committed_bytes);
        self.committed.push((id, start..self.committed_bytes.len()));
    }

    /// Records the committed frames but for those that were refused.
    fn note_flushed(&mut self, refused: &[FrameId]) {
        if self.committed.is_empty() {
            return;
        }
        let now = clock::now();
        let (committed, bytes) =
            (std::mem::take(&mut self.committed), std::mem::take(&mut self.committed_bytes));
        for (_, range) in committed.iter().filter(|(id, _)| !refused.contains(id)) {
            self.record(now, &bytes[range.clone()]);
        }
        (self.committed, self.committed_bytes) = (committed, bytes);
        self.committed.clear();
        self.committed_bytes.clear();
    }

    fn record(&mut self, at: Instant, frame: &[u8]) {
        if self.chunk.len() + RECORD_HEADER_BYTES + frame.len() > CHUNK_BYTES {
            self.hand_over();
        }
        if self.chunk.len() + RECORD_HEADER_BYTES + frame.len() > CHUNK_BYTES {
            self.recorded.left_out += 1;
            return;
        }
        if self.chunk.is_empty() {
            self.chunk_began = at;
        }
        let wall_ns = at.0.wrapping_add(self.wall_offset_ns);
        let (seconds, nanoseconds) = ((wall_ns / 1_000_000_000) as u32, (wall_ns % 1_000_000_000) as u32);
        let len = frame.len() as u32;
        for word in [seconds, nanoseconds, len, len] {
            self.chunk.extend_from_slice(&word.to_le_bytes());
        }
        self.chunk.extend_from_slice(frame);
        self.recorded.frames += 1;
    }

    /// When the chunk is to be handed over.
    fn due(&self) -> Option<Instant> {
        (!self.chunk.is_empty()).then(|| self.chunk_began + WRITE_EVERY)
    }

    /// Gives the chunk to the writing thread if that has room for it.
    fn hand_over(&mut self) {
        let next = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK_BYTES));
        match self.full.try_send(std::mem::replace(&mut self.chunk, next)) {
            Ok(()) => {}
            Err(TrySendError::Full(chunk)) => {
                // Looked at again after a while.
                self.chunk = chunk;
                self.chunk_began = clock::now();
            }
            Err(TrySendError::Disconnected(_)) => self.writer_gone = true,
        }
    }

    fn finish(self) -> io::Result<Recorded> {
        let Recording { full, chunk, writer, recorded, .. } = self;
        // A thread that ended early has an error to tell.
        let _ = full.send(chunk);
        drop(full);
        match writer.join() {
            Ok(result) => result.map(|()| recorded),
            Err(_) => Err(io::Error::other("the writing thread panicked")),
        }
    }
}

/// Magic, version 2.4, two fields that are zero, the longest frame, the link type.
fn file_header() -> [u8; 24] {
    let mut header = [0; 24];
    header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    header[4..6].copy_from_slice(&2u16.to_le_bytes());
    header[6..8].copy_from_slice(&4u16.to_le_bytes());
    header[16..20].copy_from_slice(&(FRAME_BYTES_MAX as u32).to_le_bytes());
    header[20..24].copy_from_slice(&LINKTYPE_ETHERNET.to_le_bytes());
    header
}

impl<L: AsFd> AsFd for Tap<L> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl<L: Link> Link for Tap<L> {
    fn mtu(&self) -> usize {
        self.inner.mtu()
    }

    fn address(&self) -> MacAddress {
        self.inner.address()
    }

    #[inline]
    fn receive(&mut self) -> Option<Received<'_>> {
        if self.recording.is_some() {
            self.tend();
        }
        let received = self.inner.receive()?;
        if let Some(recording) = &mut self.recording {
            recording.record(received.arrival, received.bytes);
        }
        Some(received)
    }

    #[inline]
    fn frame(&mut self) -> Option<&mut TxFrame> {
        let below = self.inner.frame()?;
        let Some(recording) = &mut self.recording else { return Some(below) };
        recording.frame.clear();
        Some(&mut recording.frame)
    }

    #[inline]
    fn commit(&mut self, id: FrameId) {
        if let Some(recording) = &mut self.recording {
            recording.note_committed(id);
            let below = self.inner.frame().expect("there was room when this frame was asked for");
            std::mem::swap(below, &mut recording.frame);
        }
        self.inner.commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        let refused_before = refused.len();
        self.inner.flush(refused);
        if let Some(recording) = &mut self.recording {
            recording.note_flushed(&refused[refused_before..]);
            self.tend();
        }
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let due = self.recording.as_ref().and_then(|recording| recording.due());
        self.inner.poll_timeout().into_iter().chain(due).min()
    }

    fn take_changed(&mut self) -> bool {
        self.inner.take_changed()
    }
}
