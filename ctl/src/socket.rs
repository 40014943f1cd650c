//! The control socket's place in the file system: made so that nobody else can ever connect, taken over from a dead process, removed at the end.
//!
//! Does not know what is said over it. Called by [`crate::server`] and, to connect, [`crate::client`].
//! The socket is bound in a directory of mode 0700, given mode 0600, and then renamed to its name: at no moment is it open to others,
//! whatever the umask. Two processes that start at once are kept apart by a lock on the directory, held for the moment of the swap.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How often the directory's lock is tried, with [`LOCK_PAUSE`] in between: two seconds.
const LOCK_TRIES_MAX: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A live process answers there.
    #[error("control socket {}: another process answers on it; end that process or choose another --ctl-socket", .0.display())]
    InUse(PathBuf),
    /// Something else has that name.
    #[error("control socket {}: the name is taken by something that is not a socket; remove it or choose another --ctl-socket", .0.display())]
    NotASocket(PathBuf),
    /// The path cannot name a socket.
    #[error("control socket {}: not a path to a file", .0.display())]
    BadPath(PathBuf),
    /// A step failed.
    #[error("control socket {}: {step}", path.display())]
    Io {
        /// The socket's path.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A listening socket with a name; the name is removed when it is dropped, if it is still ours.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the name.
    identity: (u64, u64),
}

impl ControlSocket {
    pub(crate) fn bind(path: &Path) -> Result<ControlSocket, BindError> {
        let failed = |step| move |source| BindError::Io { path: path.to_owned(), step, source };
        let (Some(parent), Some(_)) = (path.parent(), path.file_name()) else {
            return Err(BindError::BadPath(path.to_owned()));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        fs::create_dir_all(parent).map_err(failed("make its directory"))?;
        let lock = lock_directory(parent).map_err(failed("lock its directory"))?;
        refuse_unless_free(path)?;

        let nursery = Nursery::new(parent).map_err(failed("make a directory to bind it in"))?;
        let newborn = nursery.0.join("s");
        let listener = UnixListener::bind(&newborn).map_err(failed("bind it"))?;
        fs::set_permissions(&newborn, fs::Permissions::from_mode(0o600)).map_err(failed("set its mode"))?;
        let identity = identity(&newborn).map_err(failed("look at it"))?;
        listener.set_nonblocking(true).map_err(failed("make it non-blocking"))?;
        fs::rename(&newborn, path).map_err(failed("give it its name"))?;
        drop(lock);
        Ok(ControlSocket { listener, path: path.to_owned(), identity })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // Nobody is left to tell, and the next start handles a stale socket.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A directory of mode 0700 that goes away with all it holds.
struct Nursery(PathBuf);

impl Nursery {
    /// The name is short because a socket's path has at most 107 bytes. A leftover can only be that of a dead process of the same id.
    fn new(parent: &Path) -> io::Result<Nursery> {
        let path = parent.join(format!(".c{}", std::process::id()));
        if fs::symlink_metadata(&path).is_ok() {
            fs::remove_dir_all(&path)?;
        }
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Nursery(path))
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Free: nothing is there, or a socket on which nobody listens.
fn refuse_unless_free(path: &Path) -> Result<(), BindError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(BindError::Io { path: path.to_owned(), step: "look at it", source }),
        Ok(found) if !found.file_type().is_socket() => Err(BindError::NotASocket(path.to_owned())),
        Ok(_) => match connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Ok(_) | Err(_) => Err(BindError::InUse(path.to_owned())),
        },
    }
}

/// Connects without ever waiting: a full backlog is `WouldBlock`. The stream is non-blocking.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn lock_directory(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    for _ in 0..LOCK_TRIES_MAX {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}
