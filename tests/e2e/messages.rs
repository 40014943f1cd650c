//! vhost-user messages as bytes on a unix socket, with descriptors beside them: the front-end's end.
//!
//! Written from the specification (vhost-user, "Message Specification"), so that it owes nothing to the crate that the back-end uses. Knows no
//! order of messages: that is a VMM's, see `cloud_hypervisor`.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

/// Numbers of requests of the front-end.
pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const ADD_MEM_REG: u32 = 37;

/// Flags of a header: the version in two bits, a reply, a reply that is asked for.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Longer than a back-end may take for anything here, and shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(15);
const HEADER_BYTES: usize = 12;
/// More than any reply here has.
const REPLY_BYTES_MAX: u32 = 4096;

/// A connection to a back-end.
pub(crate) struct Connection {
    stream: UnixStream,
    /// Every message asks for a reply from now on (REPLY_ACK).
    pub(crate) need_reply: bool,
}

impl Connection {
    pub(crate) fn open(socket: &Path) -> Connection {
        let stream = UnixStream::connect(socket).expect("the backend listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time can be set");
        Connection { stream, need_reply: false }
    }

    fn send(&self, request: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let flags = VERSION | if self.need_reply { NEED_REPLY } else { 0 };
        let message = [&words(&[request, flags, body.len() as u32]), body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(beside.push(SendAncillaryMessage::ScmRights(descriptors)), "one descriptor has room");
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(&message)], &mut beside, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(message.len()), "request {request} is sent");
    }

    /// The body of the one reply to `request`; `None`: the back-end hung up instead.
    fn reply(&mut self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(word(0), request, "a reply names what it replies to");
        assert_eq!(word(4) & (VERSION | REPLY), VERSION | REPLY, "the flags of a reply to {request}");
        assert!(word(8) <= REPLY_BYTES_MAX, "a reply to {request} of {} bytes", word(8));
        let mut body = vec![0; word(8) as usize];
        self.stream.read_exact(&mut body).ok()?;
        Some(body)
    }

    /// Sends a message that is always answered, and gives the answer.
    pub(crate) fn ask(&mut self, request: u32, body: &[u8]) -> Vec<u8> {
        self.send(request, body, &[]);
        self.reply(request).unwrap_or_else(|| panic!("the backend hung up at request {request}"))
    }

    /// The same, where the answer is one number.
    pub(crate) fn ask_number(&mut self, request: u32) -> u64 {
        number(&self.ask(request, &[]))
    }

    /// Sends a message that has no answer of its own. True if the back-end did it, or was not asked whether.
    pub(crate) fn told(&mut self, request: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
        self.send(request, body, descriptors);
        !self.need_reply || self.reply(request).is_some_and(|reply| number(&reply) == 0)
    }

    /// The same, which must succeed.
    pub(crate) fn tell(&mut self, request: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) {
        assert!(self.told(request, body, descriptors), "the backend refused request {request}");
    }

    /// True if the back-end has said nothing that was not asked for.
    pub(crate) fn is_silent(&self) -> bool {
        let got = recv(&self.stream, &mut [0; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        got.is_err_and(|error| error == rustix::io::Errno::AGAIN)
    }

    /// True if the back-end hung up.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.stream.read(&mut [0; 1]).is_ok_and(|bytes| bytes == 0)
    }
}

/// Fields of four bytes.
pub(crate) fn words(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

/// Fields of eight bytes.
pub(crate) fn longs(fields: &[u64]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn number(body: &[u8]) -> u64 {
    u64::from_le_bytes(body.try_into().expect("a number has eight bytes"))
}
