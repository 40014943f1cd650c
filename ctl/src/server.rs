//! The control socket's server: one thread, a bounded number of clients, JSON lines in and out.
//!
//! Does not know what the answers mean: a [`Handler`] of the daemon gives them. Started by the daemons' `main`; ended by dropping it.
//! Nothing a client sends ends the daemon, and no client keeps the others waiting: each gets one request per pass, a line and a reply have deadlines, and
//! when every place is taken the client that has been silent longest loses its own.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use serde_json::Value;

use crate::connection::{Connection, Fate, State};
use crate::request::Request;
use crate::socket::ControlSocket;
use crate::stop::Stop;

pub use crate::socket::BindError;

/// Clients at a time: a few operators and a scraper each, four times over. Costs 64 KiB of input and one reply each.
pub const CONNECTIONS_MAX: usize = 16;
/// How long a silent client keeps its place when another wants it.
const IDLE_TIME_MIN: Duration = Duration::from_secs(1);
/// How long no client is accepted after accepting failed (no file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// How long nothing is done after waiting itself failed (no kernel memory).
const POLL_PAUSE: Duration = Duration::from_secs(1);

/// Answers requests. Runs on the control thread: it may look at published snapshots and wait a moment for a worker's mailbox, but while it
/// runs other clients wait, so it bounds its own waiting to about a second.
pub trait Handler: Send + 'static {
    /// The answer as JSON, or one sentence for the operator that says why there is none.
    ///
    /// # Errors
    /// What failed, on what, what to do.
    fn answer(&mut self, request: Request) -> Result<Value, String>;
}

impl<F: FnMut(Request) -> Result<Value, String> + Send + 'static> Handler for F {
    fn answer(&mut self, request: Request) -> Result<Value, String> {
        self(request)
    }
}

/// A control socket being served. Dropping it ends the thread and removes the socket.
#[derive(Debug)]
pub struct Server {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Makes the socket at `path` (mode 0600, its directory made when missing, a dead process's socket replaced) and serves it on a thread of its own.
    ///
    /// # Errors
    /// The name is in use or a step failed; the message names the path and the way out.
    pub fn start(path: &Path, handler: impl Handler) -> Result<Server, BindError> {
        let failed = |step| move |source| BindError::Io { path: path.to_owned(), step, source };
        let socket = ControlSocket::bind(path)?;
        let stop = Stop::new().map_err(failed("make a stop signal"))?;
        let mut service = Service {
            socket,
            stop: stop.clone(),
            handler: Box::new(handler),
            connections: Vec::with_capacity(CONNECTIONS_MAX),
            accept_after: Instant::now(),
        };
        let thread = std::thread::Builder::new().name("ctl".into()).spawn(move || service.run());
        let thread = Some(thread.map_err(failed("start its thread"))?);
        info!("control socket {}", path.display());
        Ok(Server { stop, thread })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.ask();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// What the thread owns.
struct Service {
    socket: ControlSocket,
    stop: Stop,
    handler: Box<dyn Handler>,
    connections: Vec<Connection>,
    accept_after: Instant,
}

impl Service {
    fn run(&mut self) {
        loop {
            let ready = self.wait();
            if self.stop.is_asked() {
                return;
            }
            let now = Instant::now();
            if ready.listener {
                self.accept(now);
            }
            self.serve(&ready.connections, now);
        }
    }

    /// Sleeps until something can be done.
    fn wait(&self) -> Ready {
        let now = Instant::now();
        let accepting = self.accept_at(now).is_some_and(|at| at <= now);
        let listener = if accepting { PollFlags::IN } else { PollFlags::empty() };
        let mut fds =
            vec![PollFd::new(&self.stop, PollFlags::IN), PollFd::new(&self.socket.listener, listener)];
        for connection in &self.connections {
            let replying = connection.state() == State::Replying;
            fds.push(PollFd::new(connection, if replying { PollFlags::OUT } else { PollFlags::IN }));
        }
        let limit = self.wake_at(now).map(|at| at.saturating_duration_since(now));
        let limit = limit.map(|span| Timespec::try_from(span).expect("deadlines are seconds away"));
        match rustix::event::poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                warn!("control socket {}: wait for clients: {error}", self.socket.path().display());
                std::thread::sleep(POLL_PAUSE);
            }
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ready {
            listener: accepting && is_ready(&fds[1]),
            connections: fds[2..].iter().map(is_ready).collect(),
        }
    }

    /// When the next client can be accepted; None: not before one of the clients has gone.
    fn accept_at(&self, now: Instant) -> Option<Instant> {
        if self.connections.len() < CONNECTIONS_MAX {
            return Some(self.accept_after.max(now));
        }
        let idle = self.longest_idle()?;
        Some(self.accept_after.max(self.connections[idle].since() + IDLE_TIME_MIN).max(now))
    }

    /// When something has to be done though no descriptor is ready.
    fn wake_at(&self, now: Instant) -> Option<Instant> {
        if self.connections.iter().any(Connection::has_line) {
            return Some(now);
        }
        let accept = self.accept_at(now).filter(|&at| at > now);
        self.connections.iter().filter_map(Connection::deadline).chain(accept).min()
    }

    fn longest_idle(&self) -> Option<usize> {
        let idle = self.connections.iter().enumerate().filter(|(_, c)| c.state() == State::Idle);
        idle.min_by_key(|(_, c)| c.since()).map(|(index, _)| index)
    }

    /// Takes one client in, in place of the longest idle one when there is no room.
    fn accept(&mut self, now: Instant) {
        let accepted = self.socket.listener.accept().and_then(|(stream, _)| self.admit(stream, now));
        match accepted {
            Ok(()) => {}
            Err(error) if is_passing(&error) => {}
            Err(error) => {
                warn!(
                    "control socket {}: accept a client: {error}; next try in {ACCEPT_PAUSE:?}",
                    self.socket.path().display()
                );
                self.accept_after = now + ACCEPT_PAUSE;
            }
        }
    }

    fn admit(&mut self, stream: UnixStream, now: Instant) -> io::Result<()> {
        let connection = Connection::new(stream, now)?;
        if self.connections.len() < CONNECTIONS_MAX {
            self.connections.push(connection);
        } else if let Some(idle) = self.longest_idle() {
            debug!("control socket: a silent client gave its place to another");
            self.connections[idle] = connection;
        }
        Ok(())
    }

    /// A turn for every client that is ready or has a line waiting, and the end of those that are late.
    fn serve(&mut self, ready: &[bool], now: Instant) {
        let mut index = 0;
        let handler = &mut *self.handler;
        self.connections.retain_mut(|connection| {
            let is_ready = ready.get(index).copied().unwrap_or(false);
            index += 1;
            let mut fate = Fate::Keep;
            if is_ready || connection.has_line() {
                fate = connection.turn(now, handler);
            }
            if fate == Fate::Keep && connection.deadline().is_some_and(|at| at <= now) {
                fate = Fate::Close("it was too slow");
            }
            match fate {
                Fate::Keep => true,
                Fate::Close(why) => {
                    debug!("control socket: a client's connection is closed: {why}");
                    false
                }
            }
        });
    }
}

/// Which descriptors were ready.
struct Ready {
    listener: bool,
    connections: Vec<bool>,
}

/// Errors of accept that concern only the client that was about to come.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}
