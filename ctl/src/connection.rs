//! One client of a control socket: reads a line, has it answered, writes the reply, in that order and never two at once.
//!
//! Does not know other clients, the daemon, or when it is called. Called by [`crate::server`] on its one thread; never blocks.
//! While a reply is being written nothing is read: a client that does not read its replies costs one reply's memory and then its place.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::request::{LINE_BYTES_MAX, REPLY_BYTES_MAX, Reply, Request};
use crate::server::Handler;

/// From the first byte of a line to its line break.
pub(crate) const LINE_TIME_MAX: Duration = Duration::from_secs(5);
/// From a reply's first byte to its last.
pub(crate) const REPLY_TIME_MAX: Duration = Duration::from_secs(10);
/// Bytes read at once.
const READ_BYTES: usize = 4096;

/// ```text
///            first byte                line complete
///   Idle ───────────────▶ Reading ───────────────────▶ Replying ─▶ Idle, or Reading when bytes of the next line are there
///    │ peer is gone          │ too slow                   │ too slow, or the last reply is out
///    └───────────────────────┴────────────────────────────┴──▶ closed (dropped by the server)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No byte of a line has come.
    Idle,
    /// A part of a line is there.
    Reading,
    /// A reply is on its way out.
    Replying,
}

/// Whether the server keeps the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Call again when it is ready.
    Keep,
    /// It ended; why, for the log.
    Close(&'static str),
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    /// Bytes of `input` that hold no line break.
    searched: usize,
    output: Vec<u8>,
    written: usize,
    /// Nothing more is read: the peer has ended its side, or has broken the rules.
    last: bool,
    state: State,
    since: Instant,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, now: Instant) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        let (input, output) = (Vec::new(), Vec::new());
        Ok(Connection {
            stream,
            input,
            searched: 0,
            output,
            written: 0,
            last: false,
            state: State::Idle,
            since: now,
        })
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    /// When the state began.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// When the connection must be closed if it is still in this state.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Idle => None,
            State::Reading => Some(self.since + LINE_TIME_MAX),
            State::Replying => Some(self.since + REPLY_TIME_MAX),
        }
    }

    /// Whether a whole line waits that needs no more reading: the server comes back without waiting.
    pub(crate) fn has_line(&self) -> bool {
        self.state != State::Replying && self.input[self.searched..].contains(&b'\n')
    }

    /// Does what can be done without waiting: at most one read, one request and one round of writing, so that no client holds up the rest.
    pub(crate) fn turn(&mut self, now: Instant, handler: &mut dyn Handler) -> Fate {
        if self.state != State::Replying {
            if !self.has_line() {
                match self.fill() {
                    Ok(()) => {}
                    Err(error)
                        if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
                    {
                        return Fate::Keep;
                    }
                    Err(_) => return Fate::Close("it could not be read"),
                }
            }
            self.take_request(now, handler);
        }
        if self.state == State::Replying {
            return self.drain(now);
        }
        if self.last { Fate::Close("it ended") } else { Fate::Keep }
    }

    /// One read. The end of the peer's side ends a line too.
    fn fill(&mut self) -> io::Result<()> {
        let old = self.input.len();
        let room = READ_BYTES.min(LINE_BYTES_MAX - old);
        self.input.resize(old + room, 0);
        let read = self.stream.read(&mut self.input[old..]);
        self.input.truncate(old + *read.as_ref().unwrap_or(&0));
        if read? == 0 {
            self.last = true;
            if !self.input.is_empty() {
                self.input.push(b'\n');
            }
        }
        Ok(())
    }

    /// Takes the next line out of the input and puts its reply into the output.
    fn take_request(&mut self, now: Instant, handler: &mut dyn Handler) {
        let found = self.input[self.searched..].iter().position(|&byte| byte == b'\n');
        let reply = if let Some(at) = found {
            let end = self.searched + at + 1;
            self.searched = 0;
            let result = Request::parse(&self.input[..end]).and_then(|request| handler.answer(request));
            self.input.drain(..end);
            reply_line(result)
        } else if self.input.len() >= LINE_BYTES_MAX {
            self.last = true;
            self.input.clear();
            self.searched = 0;
            reply_line(Err(format!("a request line has at most {LINE_BYTES_MAX} bytes")))
        } else {
            self.searched = self.input.len();
            let state = if self.input.is_empty() { State::Idle } else { State::Reading };
            self.enter(state, now);
            return;
        };
        self.output = reply;
        self.written = 0;
        self.enter(State::Replying, now);
    }

    /// Writes until the socket is full or the reply is out.
    fn drain(&mut self, now: Instant) -> Fate {
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Fate::Close("it could not be written"),
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Fate::Keep,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Fate::Close("it went away before its reply was out"),
            }
        }
        self.output = Vec::new();
        let state = if self.input.is_empty() { State::Idle } else { State::Reading };
        self.enter(state, now);
        if self.last && self.input.is_empty() { Fate::Close("it ended") } else { Fate::Keep }
    }

    fn enter(&mut self, state: State, now: Instant) {
        if state != self.state || state == State::Replying {
            self.since = now;
        }
        self.state = state;
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The line for an answer.
fn reply_line(result: Result<Value, String>) -> Vec<u8> {
    let reply = match result {
        Ok(value) => Reply::Ok(value),
        Err(sentence) => Reply::Error(sentence),
    };
    let mut line = serde_json::to_vec(&reply).expect("a JSON value has string keys and can be written");
    if line.len() >= REPLY_BYTES_MAX {
        return reply_line(Err(format!("the answer is longer than {REPLY_BYTES_MAX} bytes")));
    }
    line.push(b'\n');
    line
}
