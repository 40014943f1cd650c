//! The client of a control socket: one request, one answer, within a time limit.
//!
//! Does not know what the answer means. Called by `cirroctl` and by tests.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::request::{REPLY_BYTES_MAX, Reply, Request};
use crate::socket;

/// Pause between tries while the server's backlog is full.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no such socket.
    #[error("{}: no daemon serves it (there is no such socket)", .0.display())]
    Absent(PathBuf),
    /// The socket is there, its process is not.
    #[error("{}: the daemon that made it is gone", .0.display())]
    Dead(PathBuf),
    /// The socket belongs to another user.
    #[error("{}: permission denied; run cirroctl as the daemon's user (root)", .0.display())]
    Denied(PathBuf),
    /// No whole answer came in time.
    #[error("{}: no answer within {limit:?}", path.display())]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The daemon ended the connection before its answer was complete.
    #[error("{}: the daemon closed the connection before it answered; is it stopping, or busy with {max} other clients?", .0.display(), max = crate::server::CONNECTIONS_MAX)]
    Closed(PathBuf),
    /// What came is not a reply.
    #[error("{}: not a reply of this protocol", path.display())]
    NotAReply {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The answer is longer than any daemon gives.
    #[error("{}: the answer is longer than {REPLY_BYTES_MAX} bytes", .0.display())]
    TooLong(PathBuf),
    /// The daemon says no.
    #[error("{}: {sentence}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// The daemon's reason.
        sentence: String,
    },
    /// Reading or writing failed.
    #[error("{}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Asks the daemon behind `path` and waits at most `limit` for its answer.
///
/// # Errors
/// [`AskError`]; each message names the socket.
pub fn ask(path: &Path, request: &Request, limit: Duration) -> Result<Value, AskError> {
    let end = Instant::now() + limit;
    let named = |error: io::Error| name_error(path, limit, error);
    let mut stream = connect_until(path, end).map_err(named)?;
    let mut line = serde_json::to_vec(request).expect("a request has string keys and can be written");
    line.push(b'\n');
    write_until(&mut stream, &line, end).map_err(named)?;
    let reply = read_line_until(&mut stream, end).map_err(named)?;
    match reply {
        Line::Whole(bytes) => match serde_json::from_slice(&bytes) {
            Ok(Reply::Ok(value)) => Ok(value),
            Ok(Reply::Error(sentence)) => Err(AskError::Refused { path: path.to_owned(), sentence }),
            Err(source) => Err(AskError::NotAReply { path: path.to_owned(), source }),
        },
        Line::Cut => Err(AskError::Closed(path.to_owned())),
        Line::TooLong => Err(AskError::TooLong(path.to_owned())),
    }
}

enum Line {
    Whole(Vec<u8>),
    Cut,
    TooLong,
}

fn connect_until(path: &Path, end: Instant) -> io::Result<UnixStream> {
    loop {
        match socket::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(CONNECT_PAUSE);
            }
            Err(error) => return Err(error),
            Ok(stream) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
        }
    }
}

fn write_until(stream: &mut UnixStream, mut bytes: &[u8], end: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(time_left(end)?))?;
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn read_line_until(stream: &mut UnixStream, end: Instant) -> io::Result<Line> {
    let mut line = Vec::new();
    let mut chunk = [0; 16 << 10];
    while line.len() < REPLY_BYTES_MAX {
        stream.set_read_timeout(Some(time_left(end)?))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(Line::Cut),
            Ok(n) => {
                line.extend_from_slice(&chunk[..n]);
                if chunk[..n].contains(&b'\n') {
                    return Ok(Line::Whole(line));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Line::TooLong)
}

fn time_left(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn name_error(path: &Path, limit: Duration, error: io::Error) -> AskError {
    use io::ErrorKind as Kind;
    let path = path.to_owned();
    let kind = error.kind();
    if kind == Kind::NotFound {
        AskError::Absent(path)
    } else if kind == Kind::ConnectionRefused {
        AskError::Dead(path)
    } else if kind == Kind::PermissionDenied {
        AskError::Denied(path)
    } else if matches!(kind, Kind::WouldBlock | Kind::TimedOut) {
        AskError::TimedOut { path, limit }
    } else if matches!(kind, Kind::ConnectionReset | Kind::BrokenPipe) {
        AskError::Closed(path)
    } else {
        AskError::Io { path, source: error }
    }
}
