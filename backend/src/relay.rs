//! What stands between a front-end and the vhost-user crate: it passes messages on, whole, and keeps what the crate would hide, the channel on which a
//! back-end may speak first.
//!
//! Knows where a message begins and ends, and one of them by number; does not know what they mean: the crate checks them. Nothing of a guest's requests comes
//! by here. Driven by `server`, on the disk's own thread. See docs/decisions/0012-resize.md.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use cirro_link::random;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recvmsg,
    send, sendmsg, socket_with,
};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Bytes behind a message's header: what the crate takes at most. The longest that a front-end of a disk has to send is a memory table, 264.
pub const BODY_BYTES_MAX: usize = 4096;
/// Descriptors with a message: what the crate takes at most. The most that are needed are those of a memory table, 8 regions or up to 32 slots.
pub const DESCRIPTORS_MAX: usize = 32;
/// `request`, `flags`, `size`, each u32 of the machine (vhost-user, "Header").
const HEADER_BYTES: usize = 12;
/// Version 1, no reply wanted (vhost-user, "Header").
const FLAGS: u32 = 1;
/// How often a connection of our own is tried that somebody else was faster to make.
const MEETINGS_MAX: u32 = 8;

/// How a connection ended that did nothing wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The front-end closed it.
    FrontEnd,
    /// The crate closed it, and knows why.
    Device,
}

/// What became of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The connection goes on.
    Goes,
    /// It does, and the front-end has said what starts a ring.
    RingStarts,
    /// It is over.
    Ended(End),
}

/// Why a front-end's connection is ended.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// More than any message has.
    #[error("a message of {0} bytes, of {BODY_BYTES_MAX} at most")]
    TooLong(u32),
    /// Too many, or where none belong.
    #[error("more than {DESCRIPTORS_MAX} descriptors with a message, or some in the middle of one")]
    Descriptors,
    /// The connection ended before the message.
    #[error("it ended in the middle of a message")]
    Half,
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One connection of a front-end.
#[derive(Debug)]
pub struct Relay {
    frontend: UnixStream,
    device: UnixStream,
    inward: Message,
    outward: Message,
    channel: Option<OwnedFd>,
}

/// What a wait has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Either end has something, or room.
    pub messages: bool,
    /// The others, in their order.
    pub others: [bool; 2],
}

impl Relay {
    /// Between a front-end and the crate's end.
    ///
    /// # Errors
    /// A socket cannot be changed.
    pub fn new(frontend: UnixStream, device: UnixStream) -> io::Result<Relay> {
        frontend.set_nonblocking(true)?;
        device.set_nonblocking(true)?;
        Ok(Relay { frontend, device, inward: Message::new(), outward: Message::new(), channel: None })
    }

    /// Sleeps until there is something to pass on, or one of `others` is readable.
    ///
    /// # Errors
    /// The kernel has no memory left.
    pub fn wait(&self, others: [BorrowedFd<'_>; 2]) -> io::Result<Ready> {
        let [first, second] = others;
        let mut fds = [first, second, first, first].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // An end that is wanted for nothing is not in the set: that it hung up would be told without end.
        let mut count = 2;
        for (end, from, to) in
            [(&self.frontend, &self.inward, &self.outward), (&self.device, &self.outward, &self.inward)]
        {
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, !from.is_whole());
            wanted.set(PollFlags::OUT, to.is_whole());
            if !wanted.is_empty() {
                fds[count] = PollFd::new(end, wanted);
                count += 1;
            }
        }
        match poll(&mut fds[..count], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            messages: fds[2..count].iter().any(is_ready),
            others: [is_ready(&fds[0]), is_ready(&fds[1])],
        })
    }

    /// Passes on what there is, at most one message in each direction.
    ///
    /// # Errors
    /// [`Broken`]: the front-end is at fault, or the system.
    pub fn turn(&mut self) -> Result<Turn, Broken> {
        match self.outward.pass(&self.device, &self.frontend)? {
            Passed::Nothing | Passed::Whole => {}
            Passed::SourceEnded => return Ok(Turn::Ended(End::Device)),
            Passed::TargetEnded => return Ok(Turn::Ended(End::FrontEnd)),
        }
        if self.inward.fill(&self.frontend)? {
            return Ok(Turn::Ended(End::FrontEnd));
        }
        let request = self.inward.request();
        if request == Some(FrontendReq::SET_BACKEND_REQ_FD as u32)
            && let [channel] = &self.inward.descriptors[..]
        {
            self.channel = Some(channel.try_clone()?);
        }
        match self.inward.drain(&self.device)? {
            Passed::Nothing | Passed::SourceEnded => Ok(Turn::Goes),
            Passed::TargetEnded => Ok(Turn::Ended(End::Device)),
            Passed::Whole => {
                let starts = [FrontendReq::SET_VRING_KICK as u32, FrontendReq::SET_VRING_ENABLE as u32];
                let is_start = request.is_some_and(|request| starts.contains(&request));
                Ok(if is_start { Turn::RingStarts } else { Turn::Goes })
            }
        }
    }

    /// Tells the front-end that the device's configuration has changed (vhost-user, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG). No reply is asked for, so nothing
    /// is ever waited for. False: it takes no such news.
    pub fn tell_config_changed(&mut self) -> bool {
        let Some(channel) = &self.channel else { return false };
        let mut message = [0; HEADER_BYTES];
        message[0..4].copy_from_slice(&(BackendReq::CONFIG_CHANGE_MSG as u32).to_ne_bytes());
        message[4..8].copy_from_slice(&FLAGS.to_ne_bytes());
        match send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(HEADER_BYTES) => true,
            // Full of older news that were not taken yet: whoever takes those reads the configuration after this.
            Err(Errno::AGAIN) => true,
            Ok(_) | Err(_) => {
                self.channel = None;
                false
            }
        }
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passed {
    /// It is not there yet, or there is no room for it.
    Nothing,
    /// It has left.
    Whole,
    /// Nothing comes any more.
    SourceEnded,
    /// Nothing is taken any more.
    TargetEnded,
}

/// A message on its way: as much of it as has come, and then as much as has left.
#[derive(Debug)]
struct Message {
    bytes: Box<[u8; HEADER_BYTES + BODY_BYTES_MAX]>,
    come: usize,
    left: usize,
    descriptors: Vec<OwnedFd>,
}

impl Message {
    fn new() -> Message {
        let bytes = Box::new([0; HEADER_BYTES + BODY_BYTES_MAX]);
        Message { bytes, come: 0, left: 0, descriptors: Vec::with_capacity(DESCRIPTORS_MAX) }
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.bytes[at..at + 4].try_into().expect("four bytes of the header"))
    }

    /// Bytes of it that are known to come; `None`: more than a message has.
    fn bytes_known(&self) -> Option<usize> {
        if self.come < HEADER_BYTES {
            return Some(HEADER_BYTES);
        }
        let body = usize::try_from(self.word(8)).ok().filter(|body| *body <= BODY_BYTES_MAX)?;
        Some(HEADER_BYTES + body)
    }

    fn is_whole(&self) -> bool {
        self.come >= HEADER_BYTES && self.bytes_known() == Some(self.come)
    }

    /// What it is, once it is whole.
    fn request(&self) -> Option<u32> {
        self.is_whole().then(|| self.word(0))
    }

    fn pass(&mut self, from: &UnixStream, to: &UnixStream) -> Result<Passed, Broken> {
        if self.fill(from)? { Ok(Passed::SourceEnded) } else { self.drain(to) }
    }

    /// Takes what has come, up to the end of the message and no byte of the next: descriptors belong to the bytes they come with. True: nothing comes any more.
    fn fill(&mut self, from: &UnixStream) -> Result<bool, Broken> {
        loop {
            let known = self.bytes_known().ok_or_else(|| Broken::TooLong(self.word(8)))?;
            if self.come == known {
                return Ok(false);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            // Only the first byte brings descriptors; without room for them the kernel closes others, and says so.
            let room = if self.come == 0 { &mut space[..] } else { &mut [] };
            let mut control = RecvAncillaryBuffer::new(room);
            let mut into = [IoSliceMut::new(&mut self.bytes[self.come..known])];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = match recvmsg(from, &mut into, &mut control, flags) {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
                Err(Errno::CONNRESET) => return Ok(true),
                Err(error) => return Err(Broken::Io(error.into())),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    self.descriptors.extend(descriptors);
                }
            }
            // The space is rounded up, and may hold one more.
            let too_many = self.descriptors.len() > DESCRIPTORS_MAX;
            if too_many || received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(Broken::Descriptors);
            }
            if received.bytes == 0 {
                return if self.come == 0 { Ok(true) } else { Err(Broken::Half) };
            }
            self.come += received.bytes;
        }
    }

    /// Hands the message over if it is whole; its descriptors leave with its first byte, and are closed here then.
    fn drain(&mut self, to: &UnixStream) -> Result<Passed, Broken> {
        while self.is_whole() {
            let borrowed: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !borrowed.is_empty() {
                let fits = control.push(SendAncillaryMessage::ScmRights(&borrowed));
                assert!(fits, "no more descriptors are taken than fit");
            }
            let from = [IoSlice::new(&self.bytes[self.left..self.come])];
            match sendmsg(to, &from, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.left += sent;
                    self.descriptors.clear();
                }
                Err(Errno::AGAIN | Errno::INTR) => return Ok(Passed::Nothing),
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(Passed::TargetEnded),
                Err(error) => return Err(Broken::Io(error.into())),
            }
            if self.left == self.come {
                (self.come, self.left) = (0, 0);
                return Ok(Passed::Whole);
            }
        }
        Ok(Passed::Nothing)
    }
}

/// A connection of our own, and the listener that has it waiting: the crate takes a connection from a listener only. Nobody can be in its place: the queue
/// has room for one, and ours is in it.
///
/// # Errors
/// No descriptor is left; or somebody on this machine connects to sockets that he cannot know of, again and again.
pub fn meeting() -> io::Result<(UnixStream, UnixListener)> {
    let new =
        |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | flags, None);
    for _ in 0..MEETINGS_MAX {
        let (listener, stream) = (new(SocketFlags::empty())?, new(SocketFlags::NONBLOCK)?);
        let name = format!("cirro-backend-{:016x}{:016x}", random::u64(), random::u64());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        bind(&listener, &address)?;
        listen(&listener, 0)?;
        match connect(&stream, &address) {
            Ok(()) => return Ok((UnixStream::from(stream), UnixListener::from(listener))),
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody connects to a socket of ours before we do"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn relay() -> (UnixStream, Relay, UnixStream) {
        let ((front_end, near), (far, device)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        device.set_nonblocking(true).unwrap();
        front_end.set_nonblocking(true).unwrap();
        (front_end, Relay::new(near, far).unwrap(), device)
    }

    fn message(request: u32, body: &[u8]) -> Vec<u8> {
        let header = [request, FLAGS, body.len() as u32].map(u32::to_ne_bytes).concat();
        [&header, body].concat()
    }

    fn send_with(to: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        assert_eq!(sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()), Ok(bytes.len()));
    }

    /// What lies at the device's end, with its descriptors, one receive for each message.
    fn take(from: &UnixStream) -> (Vec<u8>, usize) {
        let mut bytes = vec![0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(from, &mut into, &mut control, RecvFlags::DONTWAIT).unwrap();
        let descriptors = control.drain().map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.count(),
            RecvAncillaryMessage::ScmCredentials(_) | _ => 0,
        });
        let count = descriptors.sum();
        bytes.truncate(received.bytes);
        (bytes, count)
    }

    /// Two messages that came in one piece, the second with a descriptor, leave as they were said: none gets the other's.
    #[test]
    fn descriptors_stay_with_their_message() {
        let (front_end, mut relay, device) = relay();
        let (first, second) = (message(1, &[7; 20]), message(FrontendReq::SET_VRING_KICK as u32, &[0; 8]));
        (&front_end).write_all(&first).unwrap();
        send_with(&front_end, &second, &[front_end.as_fd()]);
        assert_eq!(relay.turn().unwrap(), Turn::Goes);
        assert_eq!(take(&device), (first, 0));
        assert_eq!(relay.turn().unwrap(), Turn::RingStarts);
        assert_eq!(take(&device), (second, 1));
        (&device).write_all(&message(2, b"an answer")).unwrap();
        relay.turn().unwrap();
        assert_eq!(take(&front_end), (message(2, b"an answer"), 0));
    }

    #[test]
    fn a_message_that_comes_byte_by_byte_leaves_whole_and_once() {
        let (front_end, mut relay, device) = relay();
        let whole = message(9, &[3; BODY_BYTES_MAX]);
        for (index, byte) in whole.iter().enumerate() {
            let passed = (&device).read(&mut [0; 1]);
            assert!(passed.is_err(), "nothing has left after {index} bytes");
            (&front_end).write_all(&[*byte]).unwrap();
            assert_eq!(relay.turn().unwrap(), Turn::Goes);
        }
        assert_eq!(take(&device), (whole, 0));
    }

    #[test]
    fn what_is_no_message_ends_the_connection() {
        let broken = |say: &dyn Fn(&UnixStream)| {
            let (front_end, mut relay, _device) = relay();
            say(&front_end);
            drop(front_end);
            (0..4).find_map(|_| relay.turn().err()).expect("an end by fault").to_string()
        };
        for size in [BODY_BYTES_MAX as u32 + 1, u32::MAX] {
            let header = [1, FLAGS, size].map(u32::to_ne_bytes).concat();
            let said = broken(&|front_end| (&*front_end).write_all(&header).unwrap());
            assert!(said.starts_with(&format!("a message of {size} bytes")), "{said}");
        }
        for bytes in [&[0; 3][..], &message(1, &[1; 8])[..15]] {
            let said = broken(&|front_end| (&*front_end).write_all(bytes).unwrap());
            assert!(said.contains("middle of a message"), "{said}");
        }
        let many = |front_end: &UnixStream| send_with(front_end, &message(1, &[]), &[front_end.as_fd(); 33]);
        assert!(broken(&many).contains("descriptors"));
        let amid = |front_end: &UnixStream| {
            let bytes = message(1, &[0; 8]);
            (&*front_end).write_all(&bytes[..12]).unwrap();
            send_with(front_end, &bytes[12..], &[front_end.as_fd()]);
        };
        assert!(broken(&amid).contains("descriptors"));
    }

    /// Neither end reads: what lies between stays bounded, and goes on when they do. Then either closes.
    #[test]
    fn an_end_that_does_not_read_stops_the_other_and_loses_nothing() {
        let (front_end, mut relay, device) = relay();
        let mut sent = 0u32;
        while (&front_end).write(&message(sent, &[0; 1000])).is_ok_and(|written| written == 1012) {
            sent += 1;
            relay.turn().unwrap();
        }
        assert!((100..2000).contains(&sent), "{sent} messages lie between");
        let mut seen = Vec::new();
        while seen.len() < sent as usize * 1012 {
            relay.turn().unwrap();
            seen.extend(take(&device).0);
        }
        let numbers =
            seen.chunks(1012).take(sent as usize).map(|one| u32::from_ne_bytes(one[..4].try_into().unwrap()));
        assert!(numbers.eq(0..sent), "in order, none twice");
        drop(device);
        let ended = (0..4).find_map(|_| match relay.turn() {
            Ok(Turn::Ended(end)) => Some(end),
            Ok(_) | Err(_) => None,
        });
        assert_eq!(ended, Some(End::Device));
    }

    /// Whatever comes in whatever pieces: what leaves is whole messages of what came, and the rest is an end.
    #[test]
    fn garbage_is_passed_on_in_whole_messages_or_ends_the_connection() {
        for seed in 1u64..300 {
            let (front_end, mut relay, device) = relay();
            let mut number = seed;
            let mut random = move || {
                number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                number >> 33
            };
            let (mut came, mut left, mut ended) = (Vec::new(), Vec::new(), false);
            for _ in 0..20 {
                let mut piece: Vec<u8> = (0..random() % 64).map(|_| random() as u8).collect();
                if random() % 2 == 0 {
                    piece = message(random() as u32 % 50, &piece);
                }
                if (&front_end).write_all(&piece).is_err() {
                    break;
                }
                came.extend(piece);
                ended |= (0..3).any(|_| !matches!(relay.turn(), Ok(Turn::Goes | Turn::RingStarts)));
                if ended {
                    break;
                }
            }
            let mut buffer = [0; 8192];
            while let Ok(bytes @ 1..) = (&device).read(&mut buffer) {
                left.extend_from_slice(&buffer[..bytes]);
            }
            assert!(came.starts_with(&left), "seed {seed}");
        }
    }

    #[test]
    fn a_channel_is_kept_and_told_on_without_waiting() {
        let (front_end, mut relay, device) = relay();
        assert!(!relay.tell_config_changed(), "there is none");
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        send_with(&front_end, &message(FrontendReq::SET_BACKEND_REQ_FD as u32, &[]), &[theirs.as_fd()]);
        drop(theirs);
        relay.turn().unwrap();
        assert_eq!(take(&device).1, 1, "the crate has it too");
        assert!(relay.tell_config_changed());
        let mut news = [0; HEADER_BYTES];
        ours.read_exact(&mut news).unwrap();
        assert_eq!(news, *message(2, &[]));
        // Nobody reads: it fills, and that is no reason to wait or to give up.
        assert!((0..10_000).all(|_| relay.tell_config_changed()));
        drop(ours);
        assert!(!relay.tell_config_changed(), "its other end is closed");
    }

    #[test]
    fn a_connection_of_our_own_is_met_by_its_listener_and_by_nobody_else() {
        let (stream, listener) = meeting().unwrap();
        let address = listener.local_addr().unwrap();
        let intruder =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        let name = std::os::linux::net::SocketAddrExt::as_abstract_name(&address).unwrap();
        let address = SocketAddrUnix::new_abstract_name(name).unwrap();
        assert_eq!(connect(&intruder, &address), Err(Errno::AGAIN), "the queue has room for one");
        let (met, _) = listener.accept().unwrap();
        (&stream).write_all(b"x").unwrap();
        assert_eq!((&met).read(&mut [0; 2]).unwrap(), 1);
    }
}
