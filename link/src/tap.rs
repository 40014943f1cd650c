//! A layer that records every frame that passes into a pcap file, with nanoseconds, which Wireshark and tcpdump open.
//!
//! Knows the file format and the order of things at its place in the stack: what a layer above drops it does not see, and a frame that is
//! handed down is recorded even if the kernel refuses it a moment later. Pushed and popped by `stack` while a worker runs; its file is
//! written from the worker's thread, so it is for finding faults, not for always.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use cirro_protocol::time::Instant;
use cirro_protocol::types::{ETHERNET_BYTES, FRAME_BYTES_MAX, MacAddress};

use crate::clock::{self, Source};
use crate::{FrameId, Link, Received, TxFrame};

/// Magic number of a pcap file with nanoseconds, in the writer's byte order (draft-ietf-opsawg-pcap section 4).
const MAGIC_NANOSECONDS: u32 = 0xa1b2_3c4d;
/// LINKTYPE_ETHERNET.
const LINK_TYPE_ETHERNET: u32 = 1;
const FILE_HEADER_BYTES: u64 = 24;
const RECORD_HEADER_BYTES: u64 = 16;
/// Bytes that are gathered before they are written to the file.
const BUFFER_BYTES: usize = 256 << 10;

/// How much a recorder keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of each frame; the rest is left out. 128 holds the headers of most frames.
    pub frame_bytes: usize,
    /// Bytes of the file, at which recording ends. A disk must not fill up because a tap was forgotten.
    pub file_bytes: u64,
}

impl Default for Limits {
    /// Whole frames, and 1 GiB of them.
    fn default() -> Self {
        Limits { frame_bytes: FRAME_BYTES_MAX, file_bytes: 1 << 30 }
    }
}

/// Writes frames to a pcap file.
pub struct Recorder {
    out: BufWriter<Box<dyn Write + Send>>,
    limits: Limits,
    /// The wall clock when the monotonic clock was 0; fixed, so that the file's times have true distances.
    epoch_ns: u64,
    file_bytes: u64,
    frames: u64,
    ended: Option<Ended>,
    whole: Vec<u8>,
}

/// Why a recorder does not write any more.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The file has the size that was allowed.
    #[error("the file is full")]
    Full,
    /// The file cannot be written.
    #[error("the file cannot be written: {0}")]
    Failed(#[from] io::Error),
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recorder({} frames)", self.frames)
    }
}

impl Recorder {
    /// A recorder that makes the file at `path` anew.
    ///
    /// # Errors
    /// The file cannot be made or written.
    pub fn create(path: &Path, limits: Limits) -> io::Result<Recorder> {
        let epoch_ns = clock::wall_ns().wrapping_sub(clock::now().0);
        Recorder::new(Box::new(File::create(path)?), limits, epoch_ns)
    }

    /// A recorder that writes to `out`; `epoch_ns` is the wall clock's time at [`Instant`] 0, in nanoseconds since 1970.
    ///
    /// # Errors
    /// The file header cannot be written.
    pub fn new(out: Box<dyn Write + Send>, limits: Limits, epoch_ns: u64) -> io::Result<Recorder> {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
        let snap_bytes = limits.frame_bytes.min(FRAME_BYTES_MAX) as u32;
        for word in [MAGIC_NANOSECONDS, 2 | 4 << 16, 0, 0, snap_bytes, LINK_TYPE_ETHERNET] {
            out.write_all(&word.to_le_bytes())?;
        }
        out.flush()?;
        let whole = Vec::with_capacity(FRAME_BYTES_MAX);
        Ok(Recorder { out, limits, epoch_ns, file_bytes: FILE_HEADER_BYTES, frames: 0, ended: None, whole })
    }

    /// Writes one frame, unless the recorder has ended.
    pub fn record(&mut self, at: Instant, bytes: &[u8]) {
        if self.ended.is_some() {
            return;
        }
        let kept = &bytes[..bytes.len().min(self.limits.frame_bytes)];
        let more = RECORD_HEADER_BYTES + kept.len() as u64;
        if self.file_bytes + more > self.limits.file_bytes {
            self.end(Ended::Full);
            return;
        }
        match self.write(at, kept, bytes.len()) {
            Ok(()) => {
                self.file_bytes += more;
                self.frames += 1;
            }
            Err(error) => self.end(Ended::Failed(error)),
        }
    }

    /// Writes a frame that is about to be sent.
    pub fn record_outgoing(&mut self, at: Instant, frame: &TxFrame) {
        if self.ended.is_some() {
            return;
        }
        let mut whole = std::mem::take(&mut self.whole);
        whole.clear();
        frame.gather(&mut whole);
        self.record(at, &whole);
        self.whole = whole;
    }

    /// Brings everything recorded into the file; also done when the recorder is dropped.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn sync(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Frames recorded.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Why nothing is recorded any more, if so.
    pub fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    fn write(&mut self, at: Instant, kept: &[u8], len: usize) -> io::Result<()> {
        let wall_ns = self.epoch_ns.wrapping_add(at.0);
        let (seconds, nanoseconds) = (wall_ns / 1_000_000_000, wall_ns % 1_000_000_000);
        for word in [seconds as u32, nanoseconds as u32, kept.len() as u32, len as u32] {
            self.out.write_all(&word.to_le_bytes())?;
        }
        self.out.write_all(kept)
    }

    fn end(&mut self, why: Ended) {
        log::warn!("a tap records no more after {} frames: {why}", self.frames);
        self.ended = Some(why);
    }
}

/// A link with a recorder before it.
pub struct Tap<L> {
    link: L,
    recorder: Recorder,
    clock: Source,
    frame: TxFrame,
}

impl<L: Link> Tap<L> {
    /// Records what passes to and from `link`. `clock` gives the time of frames that are sent.
    pub fn new(link: L, recorder: Recorder, clock: Source) -> Tap<L> {
        let frame = TxFrame::with_capacity(ETHERNET_BYTES + link.mtu());
        Tap { link, recorder, clock, frame }
    }

    /// Takes the layer apart.
    pub fn into_parts(self) -> (L, Recorder) {
        (self.link, self.recorder)
    }

    /// The link below.
    pub fn below(&self) -> &L {
        &self.link
    }

    /// The link below.
    pub fn below_mut(&mut self) -> &mut L {
        &mut self.link
    }

    /// The recorder.
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }
}

impl<L: Link> Link for Tap<L> {
    fn mtu(&self) -> usize {
        self.link.mtu()
    }

    fn address(&self) -> MacAddress {
        self.link.address()
    }

    fn receive(&mut self) -> Option<Received<'_>> {
        let received = self.link.receive()?;
        self.recorder.record(received.arrival, received.bytes);
        Some(received)
    }

    fn frame(&mut self) -> Option<&mut TxFrame> {
        // Filled here, for the link below does not give a committed frame back to be read.
        self.link.frame()?;
        self.frame.clear();
        Some(&mut self.frame)
    }

    fn commit(&mut self, id: FrameId) {
        self.recorder.record_outgoing((self.clock)(), &self.frame);
        let below = self.link.frame().expect("there was room for this frame when it was asked for");
        std::mem::swap(below, &mut self.frame);
        self.link.commit(id);
    }

    fn flush(&mut self, refused: &mut Vec<FrameId>) {
        self.link.flush(refused);
        // What the swap left here was a frame of before; no run outlives a flush.
        self.frame.clear();
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.link.poll_timeout()
    }

    fn take_changed(&mut self) -> bool {
        self.link.take_changed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::tests::static_run;
    use crate::memory::{self, MemoryLink};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const EPOCH: u64 = 1_700_000_000_000_000_000;

    fn tapped(limits: Limits) -> (Tap<MemoryLink>, MemoryLink, Shared) {
        let (near, far) = memory::pair(1500);
        let file = Shared::default();
        let recorder = Recorder::new(Box::new(file.clone()), limits, EPOCH).unwrap();
        (Tap::new(near, recorder, Box::new(|| Instant(5_000_000_007))), far, file)
    }

    fn send(link: &mut impl Link, bytes: &[u8]) {
        link.frame().unwrap().head.extend_from_slice(bytes);
        link.commit(FrameId { session: 1, pn: 2 });
        link.flush(&mut Vec::new());
    }

    #[test]
    fn both_directions_are_recorded_as_the_format_says() {
        let (mut tap, mut far, file) = tapped(Limits { frame_bytes: 20, file_bytes: 1 << 20 });
        let frame = tap.frame().unwrap();
        frame.head.extend_from_slice(b"headtail");
        frame.push_cut(4, static_run(b"-data-"));
        tap.commit(FrameId::default());
        tap.flush(&mut Vec::new());
        assert_eq!(far.receive().unwrap().bytes, b"head-data-tail");
        send(&mut far, b"an answer that is longer than twenty bytes");
        tap.below_mut().set_now(Instant(6_000_000_008));
        assert_eq!(tap.receive().unwrap().bytes.len(), 42);
        let (_, mut recorder) = tap.into_parts();
        recorder.sync().unwrap();
        let mut expected = Vec::new();
        // Little-endian magic for nanoseconds, version 2.4, zone 0, accuracy 0, 20 bytes a frame, Ethernet.
        expected.extend_from_slice(&[
            0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0,
        ]);
        for (seconds, nanoseconds, kept, len) in
            [(1_700_000_005u32, 7u32, 14u32, 14u32), (1_700_000_006, 8, 20, 42)]
        {
            for word in [seconds, nanoseconds, kept, len] {
                expected.extend_from_slice(&word.to_le_bytes());
            }
            expected.extend_from_slice(if kept == 14 { b"head-data-tail" } else { b"an answer that is lo" });
        }
        assert_eq!(*file.0.lock().unwrap(), expected);
    }

    #[test]
    fn recording_ends_at_the_limit_and_frames_go_on() {
        // 24 + 2 · (16 + 10) = 76.
        let (mut tap, mut far, file) = tapped(Limits { frame_bytes: 100, file_bytes: 80 });
        for _ in 0..4 {
            send(&mut tap, b"0123456789");
        }
        assert!(matches!(tap.recorder().ended(), Some(Ended::Full)));
        assert_eq!(tap.recorder().frames(), 2);
        assert_eq!(std::iter::from_fn(|| far.receive().map(|_| ())).count(), 4);
        drop(tap);
        assert_eq!(file.0.lock().unwrap().len(), 76);
    }

    #[test]
    fn a_file_that_cannot_be_written_ends_the_recording_alone() {
        struct Broken(usize);
        impl Write for Broken {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (near, mut far) = memory::pair(65_535);
        let recorder = Recorder::new(Box::new(Broken(300_000)), Limits::default(), 0).unwrap();
        let mut tap = Tap::new(near, recorder, Box::new(|| Instant(0)));
        for _ in 0..20 {
            send(&mut tap, &[1; 60_000]);
        }
        assert!(matches!(tap.recorder().ended(), Some(Ended::Failed(_))));
        assert_eq!(std::iter::from_fn(|| far.receive().map(|_| ())).count(), 20);
    }

    #[test]
    fn room_and_refusals_are_those_of_the_link_below() {
        let (mut tap, _far, _file) = tapped(Limits::default());
        tap.below_mut().set_refuses(true);
        for pn in 0..crate::FRAMES_QUEUED_MAX as u64 {
            tap.frame().unwrap().head.push(1);
            tap.commit(FrameId { session: 0, pn });
        }
        assert!(tap.frame().is_none());
        let mut refused = Vec::new();
        tap.flush(&mut refused);
        assert_eq!(refused.len(), crate::FRAMES_QUEUED_MAX);
    }
}
