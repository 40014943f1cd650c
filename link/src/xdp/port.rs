//! One AF_XDP socket on one queue, with its memory cut into chunks: frames come into one part of them and leave from the other, each in as many
//! chunks as it needs.
//!
//! Knows chunks, descriptors and errors of sending; does not know what is in a frame, nor how a program comes to an interface. Used by one
//! `XdpLink`; one that lost its interface is thrown away.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use cirro_protocol::types::{ETHERNET_BYTES, MTU_MAX};
use socket2::{Domain, SockRef, Socket, Type};

use super::program::STAMP_BYTES;
use super::ring::{Consumer, Offsets, Producer};
use super::sys;
use crate::facts::Facts;
use crate::frame::{FRAMES_QUEUED_MAX, Part, Run, TxFrame, means_lost, send_buffer_bytes};
use crate::mmap::Mapping;
use crate::sys::{self as kernel, Buffer};
use crate::{Drops, FrameId};

/// Chunks that wait for frames. At MTU 9000, where a frame takes three, 682 frames: the largest congestion window, as of a packet ring.
const RECEIVE_CHUNKS: u32 = 2048;
/// Chunks that frames leave from: at MTU 9000 five batches of 64 frames. What is beyond waits for the kernel, or is refused.
const SEND_CHUNKS: u32 = 1024;
/// The largest chunk that the kernel takes is a page.
const CHUNK_BYTES_MAX: usize = 4096;
/// What the kernel keeps free before a frame that it receives (XDP_PACKET_HEADROOM, linux/bpf.h). Our stamp lies there.
const HEADROOM_BYTES: usize = 256;
/// Buffers of which the kernel makes one frame (MAX_SKB_FRAGS and the first).
const PARTS_MAX: usize = 18;

/// A descriptor is struct xdp_desc: where, how long, and whether the frame goes on in the next one. A buffer that is only given is eight bytes of
/// where.
const DESCRIPTOR_BYTES: usize = 16;
const ADDRESS_BYTES: usize = 8;

/// How the memory of a port is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    chunk_bytes: usize,
    /// Frames of full size take several chunks.
    several: bool,
}

impl Geometry {
    const fn for_mtu(mtu: usize) -> Geometry {
        let needed = HEADROOM_BYTES + ETHERNET_BYTES + mtu;
        let half = CHUNK_BYTES_MAX / 2;
        Geometry {
            chunk_bytes: if needed <= half { half } else { CHUNK_BYTES_MAX },
            several: needed > CHUNK_BYTES_MAX,
        }
    }
}

const _: () = assert!(MTU_MAX + ETHERNET_BYTES <= PARTS_MAX * (CHUNK_BYTES_MAX - HEADROOM_BYTES));
const _: () = assert!(PARTS_MAX <= SEND_CHUNKS as usize && STAMP_BYTES <= HEADROOM_BYTES);

/// A frame that came, and the stamp that it bears: 0 if none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// Where it lies in a chunk; `None` if its parts were put together.
    place: Option<(usize, usize)>,
    pub(super) stamp: u64,
}

/// A step of opening that the kernel refused.
pub(super) type Refused = (&'static str, io::Error);

/// A socket with its memory and rings.
#[derive(Debug)]
pub(super) struct Port {
    socket: OwnedFd,
    to_fill: Producer<ADDRESS_BYTES>,
    came: Consumer<DESCRIPTOR_BYTES>,
    to_send: Producer<DESCRIPTOR_BYTES>,
    sent: Consumer<ADDRESS_BYTES>,
    memory: Mapping,
    geometry: Geometry,
    frame_bytes_max: usize,
    zero_copy: bool,
    /// The chunk of the frame taken last is still ours.
    held: Option<usize>,
    gathering: Gathering,
    /// Chunks to send from.
    free: Vec<usize>,
    /// The frames of the flush that goes on, each with the place in the ring after it.
    queued: Vec<(u32, FrameId)>,
    /// What the kernel had dropped when it was asked last.
    dropped: u64,
}

/// A frame of several parts, as far as it has come.
#[derive(Debug)]
struct Gathering {
    bytes: Vec<u8>,
    stamp: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There is none.
    None,
    /// Parts have come, and more will.
    Open,
    /// It is longer than a frame may be: the rest is thrown away as well.
    TooLong,
    /// It is whole, and was handed out.
    Whole,
}

fn step<T>(what: &'static str) -> impl FnOnce(io::Result<T>) -> Result<T, Refused> {
    move |result| result.map_err(|error| (what, error))
}

impl Port {
    /// Opens a socket for frames of an interface like `facts` on `queue`. With `copy` drivers are not asked to use our memory themselves.
    pub(super) fn open(facts: Facts, queue: u32, copy: bool) -> Result<Port, Refused> {
        let geometry = Geometry::for_mtu(facts.mtu);
        let raw = Type::from(libc::SOCK_RAW).nonblocking().cloexec();
        let socket = Socket::new(Domain::from(libc::AF_XDP), raw, None);
        let socket = step("AF_XDP socket (CAP_NET_RAW is needed)")(socket)?;
        let fd = socket.as_fd();
        let chunks = (RECEIVE_CHUNKS + SEND_CHUNKS) as usize;
        let memory = step("memory for frames")(Mapping::anonymous(chunks * geometry.chunk_bytes))?;
        register(fd, &memory, geometry)?;
        let rings = [
            (libc::XDP_UMEM_FILL_RING, RECEIVE_CHUNKS),
            (libc::XDP_UMEM_COMPLETION_RING, SEND_CHUNKS),
            (libc::XDP_RX_RING, RECEIVE_CHUNKS),
            (libc::XDP_TX_RING, SEND_CHUNKS),
        ];
        for (ring, entries) in rings {
            step("rings")(kernel::set_option(fd, libc::SOL_XDP, ring, &entries))?;
        }
        let [rx, tx, fill, completion] = step("rings")(offsets(fd))?;
        let map_failed = step("mapping a ring");
        let to_fill = Producer::new(fd, libc::XDP_UMEM_PGOFF_FILL_RING as _, fill, RECEIVE_CHUNKS);
        let sent = Consumer::new(fd, libc::XDP_UMEM_PGOFF_COMPLETION_RING as _, completion, SEND_CHUNKS);
        let came = Consumer::new(fd, libc::XDP_PGOFF_RX_RING, rx, RECEIVE_CHUNKS);
        let to_send = Producer::new(fd, libc::XDP_PGOFF_TX_RING, tx, SEND_CHUNKS);
        let rings = (|| Ok((to_fill?, sent?, came?, to_send?)))();
        let (to_fill, sent, came, to_send) = map_failed(rings)?;
        step("send buffer")(kernel::set_buffer(fd, Buffer::Send, send_buffer_bytes(facts.mtu)))?;
        let several = if geometry.several { libc::XDP_USE_SG } else { 0 };
        let copy = if copy { libc::XDP_COPY } else { 0 };
        let flags = libc::XDP_USE_NEED_WAKEUP | several | copy;
        step(bind_step(geometry))(sys::bind(fd, facts.index, queue, flags))?;
        let mut options = [0];
        step("options")(kernel::get_option(fd, libc::SOL_XDP, libc::XDP_OPTIONS, &mut options))?;
        let first_to_send = RECEIVE_CHUNKS as usize * geometry.chunk_bytes;
        let mut port = Port {
            socket: socket.into(),
            to_fill,
            came,
            to_send,
            sent,
            memory,
            geometry,
            frame_bytes_max: ETHERNET_BYTES + facts.mtu,
            zero_copy: options[0] & libc::XDP_OPTIONS_ZEROCOPY != 0,
            held: None,
            gathering: Gathering {
                bytes: Vec::with_capacity(ETHERNET_BYTES + facts.mtu),
                stamp: 0,
                state: State::None,
            },
            free: (0..SEND_CHUNKS as usize).map(|c| first_to_send + c * geometry.chunk_bytes).collect(),
            queued: Vec::with_capacity(FRAMES_QUEUED_MAX),
            dropped: 0,
        };
        for chunk in 0..RECEIVE_CHUNKS as usize {
            port.to_fill.put(&((chunk * geometry.chunk_bytes) as u64).to_ne_bytes());
        }
        port.to_fill.publish();
        port.wake_driver();
        Ok(port)
    }

    /// True if the driver uses our memory itself.
    pub(super) fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// The socket's error, which it has once its interface is gone.
    pub(super) fn take_error(&self) -> Option<io::Error> {
        SockRef::from(&self.socket).take_error().unwrap_or_else(Some)
    }

    /// Takes the next whole frame; the one before it is given back.
    #[inline]
    pub(super) fn take(&mut self) -> Option<Taken> {
        if let Some(held) = self.held.take() {
            self.give_back(held);
        }
        if self.gathering.state == State::Whole {
            self.gathering.state = State::None;
        }
        loop {
            let (address, len, more) = split(self.came.take()?);
            if !more && self.gathering.state == State::None {
                self.held = Some(address);
                return Some(Taken { place: Some((address, len)), stamp: self.stamp(address) });
            }
            self.gather(address, len);
            self.give_back(address);
            if !more && self.gathering.state == State::Open {
                self.gathering.state = State::Whole;
                return Some(Taken { place: None, stamp: self.gathering.stamp });
            }
            if !more {
                self.gathering.state = State::None;
            }
        }
    }

    /// The bytes of the frame just taken.
    #[inline]
    pub(super) fn bytes(&self, frame: Taken) -> &[u8] {
        frame.place.map_or(&self.gathering.bytes, |(at, len)| self.memory.owned_bytes(at, len))
    }

    fn gather(&mut self, address: usize, len: usize) {
        if self.gathering.state == State::None {
            self.gathering.bytes.clear();
            self.gathering.stamp = self.stamp(address);
            self.gathering.state = State::Open;
        }
        if self.gathering.bytes.len() + len > self.frame_bytes_max {
            self.gathering.state = State::TooLong;
        } else if self.gathering.state == State::Open {
            self.gathering.bytes.extend_from_slice(self.memory.owned_bytes(address, len));
        }
    }

    #[inline]
    fn stamp(&self, address: usize) -> u64 {
        let stamped = address % self.geometry.chunk_bytes >= STAMP_BYTES;
        if stamped { u64::from_ne_bytes(self.memory.read(address - STAMP_BYTES)) } else { 0 }
    }

    /// Gives the chunk in which `address` lies to the kernel, for another frame. Its stamp is wiped, so that none is taken for the next frame's.
    #[inline]
    fn give_back(&mut self, address: usize) {
        let within = address % self.geometry.chunk_bytes;
        if within >= STAMP_BYTES {
            self.memory.write(address - STAMP_BYTES, &[0; STAMP_BYTES]);
        }
        self.to_fill.put(&((address - within) as u64).to_ne_bytes());
        self.to_fill.publish();
        self.wake_driver();
    }

    /// A driver that ran out of buffers may have gone to sleep. In copy mode it has none of ours.
    #[inline]
    fn wake_driver(&self) {
        if self.zero_copy && self.to_fill.needs_wakeup() {
            sys::wake_for_receiving(self.socket.as_fd());
        }
    }

    /// Copies frames into chunks and has the kernel send them. What finds no room, or is no frame that the interface takes, is named in `refused`.
    /// An error says that the interface is lost: then what was not sent is named.
    pub(super) fn send(
        &mut self,
        frames: &[TxFrame],
        refused: &mut Vec<FrameId>,
        drops: &Drops,
    ) -> io::Result<()> {
        self.queued.clear();
        self.reclaim();
        for (index, frame) in frames.iter().enumerate() {
            if !(ETHERNET_BYTES..=self.frame_bytes_max).contains(&frame.len()) {
                refused.push(frame.id());
                continue;
            }
            let chunks = frame.len().div_ceil(self.geometry.chunk_bytes) as u32;
            if !self.has_room(chunks) {
                // In copy mode the kernel sends while it is asked, so there may be room then.
                if let Err(error) = self.wake(refused, drops) {
                    refused.extend(frames[index..].iter().map(TxFrame::id));
                    return Err(error);
                }
                self.reclaim();
                if !self.has_room(chunks) {
                    refused.extend(frames[index..].iter().map(TxFrame::id));
                    return Ok(());
                }
            }
            self.put(frame);
            self.queued.push((self.to_send.position(), frame.id()));
        }
        self.wake(refused, drops)
    }

    /// True if frames wait for the kernel to have room.
    pub(super) fn has_unsent(&self) -> bool {
        !self.zero_copy && self.to_send.waiting() > 0
    }

    /// Takes back the chunks whose frames were sent.
    #[inline]
    fn reclaim(&mut self) {
        while let Some(address) = self.sent.take() {
            self.free.push(u64::from_ne_bytes(address) as usize);
        }
    }

    #[inline]
    fn has_room(&mut self, chunks: u32) -> bool {
        self.free.len() >= chunks as usize && self.to_send.has_room(chunks)
    }

    /// Copies a frame, for which there is room, into chunks and names them to the kernel.
    fn put(&mut self, frame: &TxFrame) {
        let mut writing =
            Writing { chunk: self.free.pop().expect("there is room"), filled: 0, left: frame.len() };
        frame.parts(|part| {
            let mut run = match part {
                Part::Head(head) => Run::of_borrowed(head),
                Part::Run(run) => run,
            };
            while !run.is_empty() {
                if writing.filled == self.geometry.chunk_bytes {
                    self.to_send.put(&writing.descriptor());
                    writing.chunk = self.free.pop().expect("there is room");
                    writing.filled = 0;
                }
                let (now, rest) = run.split_at(run.len().min(self.geometry.chunk_bytes - writing.filled));
                self.memory.write_run(writing.chunk + writing.filled, now);
                writing.filled += now.len();
                writing.left -= now.len();
                run = rest;
            }
        });
        self.to_send.put(&writing.descriptor());
    }

    /// Publishes what was put, and wakes the kernel until it has sent all or can send no more.
    fn wake(&mut self, refused: &mut Vec<FrameId>, drops: &Drops) -> io::Result<()> {
        self.to_send.publish();
        let mut tries = self.to_send.waiting();
        while tries > 0 && self.to_send.needs_wakeup() {
            let waiting = self.to_send.waiting();
            let Err(error) = sys::wake_for_sending(self.socket.as_fd()) else { break };
            if means_lost(&error) {
                let first = self.to_send.position().wrapping_sub(self.to_send.waiting());
                let unsent = self.queued.iter().filter(|(end, _)| end.wrapping_sub(first) as i32 > 0);
                refused.extend(unsent.map(|(_, id)| *id));
                return Err(error);
            }
            // EAGAIN without a step: the interface's queue is full, and what waits is sent by a later call. Any other error is one frame's that
            // the interface dropped: lost, as on the wire.
            let later = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            if later && self.to_send.waiting() == waiting {
                break;
            }
            if !later {
                log::trace!("frame dropped: {error}");
                drops.refused.fetch_add(1, Ordering::Relaxed);
            }
            tries -= 1;
        }
        Ok(())
    }

    /// Frames that found no room since the last call.
    pub(super) fn take_dropped(&mut self) -> u64 {
        // struct xdp_statistics: rx_dropped (no chunk), rx_invalid_descs, tx_invalid_descs, rx_ring_full, …: eight bytes each.
        let mut words = [0; 12];
        let asked = kernel::get_option(self.socket.as_fd(), libc::SOL_XDP, libc::XDP_STATISTICS, &mut words);
        let counter = |at: usize| u64::from(words[2 * at]) | u64::from(words[2 * at + 1]) << 32;
        let dropped = if asked.is_ok() { counter(0) + counter(3) } else { self.dropped };
        dropped - std::mem::replace(&mut self.dropped, dropped)
    }
}

/// A frame on its way into chunks.
struct Writing {
    chunk: usize,
    filled: usize,
    /// Bytes that are in no chunk yet.
    left: usize,
}

impl Writing {
    fn descriptor(&self) -> [u8; DESCRIPTOR_BYTES] {
        let options = if self.left > 0 { libc::XDP_PKT_CONTD } else { 0 };
        let mut entry = [0; DESCRIPTOR_BYTES];
        entry[..8].copy_from_slice(&(self.chunk as u64).to_ne_bytes());
        entry[8..12].copy_from_slice(&(self.filled as u32).to_ne_bytes());
        entry[12..].copy_from_slice(&options.to_ne_bytes());
        entry
    }
}

/// Where a part of a frame lies, how long it is, and whether another one follows.
#[inline]
fn split(entry: [u8; DESCRIPTOR_BYTES]) -> (usize, usize, bool) {
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| entry[at + i]));
    let address = u64::from_ne_bytes(std::array::from_fn(|i| entry[i]));
    (address as usize, word(8) as usize, word(12) & libc::XDP_PKT_CONTD != 0)
}

fn register(fd: BorrowedFd<'_>, memory: &Mapping, geometry: Geometry) -> Result<(), Refused> {
    let (addr, len) = memory.place();
    let memory = libc::xdp_umem_reg {
        addr,
        len,
        chunk_size: geometry.chunk_bytes as u32,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    let told = kernel::set_option(fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &memory);
    step("memory for frames (CAP_IPC_LOCK, or a limit of locked memory of 16 MiB for each worker, is needed)")(
        told,
    )
}

fn bind_step(geometry: Geometry) -> &'static str {
    if geometry.several { "bind to a queue (an MTU above 3826 needs Linux 6.6)" } else { "bind to a queue" }
}

/// Where the parts of the four rings lie: struct xdp_mmap_offsets, receive, send, fill and completion ring.
fn offsets(fd: BorrowedFd<'_>) -> io::Result<[Offsets; 4]> {
    let mut words = [0; 32];
    kernel::get_option(fd, libc::SOL_XDP, libc::XDP_MMAP_OFFSETS, &mut words)?;
    let number = |at: usize| (u64::from(words[2 * at]) | u64::from(words[2 * at + 1]) << 32) as usize;
    Ok(std::array::from_fn(|ring| Offsets {
        producer: number(4 * ring),
        consumer: number(4 * ring + 1),
        entries: number(4 * ring + 2),
        flags: number(4 * ring + 3),
    }))
}

/// Readable when a frame has come.
impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_holds_what_a_small_mtu_brings_and_several_any_frame() {
        // 2048 - 256 - 14 and 4096 - 256 - 14 bytes fit into one chunk.
        for (mtu, chunk_bytes, several) in [
            (1500, 2048, false),
            (1778, 2048, false),
            (1779, 4096, false),
            (3826, 4096, false),
            (3827, 4096, true),
            (9000, 4096, true),
            (65_535, 4096, true),
        ] {
            assert_eq!(Geometry::for_mtu(mtu), Geometry { chunk_bytes, several }, "MTU {mtu}");
        }
    }

    #[test]
    fn a_descriptor_says_where_how_long_and_whether_more_follows() {
        let part = Writing { chunk: 0x1_2345_6000, filled: 4096, left: 1 };
        assert_eq!(split(part.descriptor()), (0x1_2345_6000, 4096, true));
        let last = Writing { left: 0, ..part };
        assert_eq!(split(last.descriptor()), (0x1_2345_6000, 4096, false));
    }
}
