//! Memory that outlives the process: a file of fixed size, mapped shared, whose bytes are there for the next process the moment they are stored.
//!
//! Knows files and mappings; does not know what is kept in them. Nothing is written by a system call and nothing is ever synced: it survives the death of
//! the process, not of the machine. On tmpfs no store waits for a device. What a file holds at the start may be anything: who reads it checks it.
//! Used by `record` and `replay`; opened by `main`. The variant without a file lives as long as its last clone, which is how tests and the simulator let a backend
//! die and give what it left to the next.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Bytes of a word.
pub const WORD_BYTES: usize = size_of::<u64>();

/// Memory that outlives its user. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct Mapped {
    region: Arc<MmapRegion>,
    file: Option<Arc<File>>,
}

/// Why there is no such memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("cannot {doing} {path}: {cause}; give a directory on tmpfs that can be written with --run-dir")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Another process has it.
    #[error(
        "{path} is in use: another cirro-backend works on it; end it, or give this one another --run-dir"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

impl Mapped {
    /// Maps the file at `path` and locks it for as long as a clone lives; makes it and its directory if they are missing. It is made at least `bytes`
    /// long and never shorter, and what it holds stays: new bytes are zero. Space is taken as bytes are first stored; see [`Mapped::reserve`].
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(path: &Path, bytes: usize) -> Result<Mapped, Error> {
        let failed = |doing| move |cause| Error::Io { doing, path: path.to_owned(), cause };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed("make the directory of"))?;
        }
        // What guests have written may lie there: for nobody else to read.
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(failed("open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(cause)) => return Err(failed("lock")(cause)),
        }
        let found = file.metadata().map_err(failed("look at"))?;
        if !found.is_file() {
            return Err(failed("map")(io::Error::other("it is no regular file")));
        }
        if found.len() < bytes as u64 {
            file.set_len(bytes as u64).map_err(failed("enlarge"))?;
        }
        let file = Arc::new(file);
        let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), bytes);
        let region = region.map_err(|error| failed("map")(io::Error::other(error)))?;
        Ok(Mapped { region: Arc::new(region), file: Some(file) })
    }

    /// Memory without a file, all zero.
    pub fn in_memory(bytes: usize) -> Mapped {
        let region = MmapRegion::new(bytes).expect("address space for a mapping of a known, small size");
        Mapped { region: Arc::new(region), file: None }
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.region.size()
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the space of `len` bytes at `offset` now; what is there stays. A store into a file on a full file system that has no space yet ends
    /// the process (SIGBUS), so nothing is stored where nothing was reserved.
    ///
    /// # Errors
    /// The file system is full.
    pub fn reserve(&self, offset: usize, len: usize) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let flags = rustix::fs::FallocateFlags::empty();
        Ok(rustix::fs::fallocate(file, flags, offset as u64, len as u64)?)
    }

    /// The word at `index`, counted in words.
    ///
    /// # Panics
    /// When it lies outside.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        self.region.get_atomic_ref(index * WORD_BYTES).expect("a word inside of the mapping")
    }

    /// Copies the bytes at `offset` to `into`.
    ///
    /// # Panics
    /// When they lie outside.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.region.as_volatile_slice().read_slice(into, offset).expect("bytes inside of the mapping");
    }

    /// The bytes at `offset`, for others to copy to. They are there as those of [`Mapped::write`] are.
    ///
    /// # Panics
    /// When they lie outside.
    pub fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.region.get_slice(offset, len).expect("bytes inside of the mapping")
    }

    /// Copies `bytes` to `offset`. They are there for others only after a later `Release` store to a word, in that order.
    ///
    /// # Panics
    /// When they lie outside.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.region.as_volatile_slice().write_slice(bytes, offset).expect("bytes inside of the mapping");
    }
}

/// The boot that this machine runs on: what lies in memory that outlives a process is of no use to another boot.
///
/// # Errors
/// The kernel does not tell.
pub fn boot_id() -> Result<u128, Error> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let failed = |cause| Error::Io { doing: "read", path: path.to_owned(), cause };
    let text = fs::read_to_string(path).map_err(failed)?;
    let digits: String = text.trim_end().chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&digits, 16).map_err(|error| failed(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let name = format!("cirro-mapped-{}-{name}", std::process::id());
            Dir(std::env::temp_dir().join(name))
        }

        fn file(&self) -> PathBuf {
            self.0.join("below/a.inflight")
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_was_stored_is_there_for_the_next_and_new_bytes_are_zero() {
        let dir = Dir::new("next");
        let first = Mapped::open(&dir.file(), 4096).unwrap();
        first.reserve(0, 4096).unwrap();
        first.word(7).store(0x1122_3344_5566_7788, Ordering::Release);
        first.write(1001, b"bytes");
        drop(first);
        let second = Mapped::open(&dir.file(), 8192).unwrap();
        assert_eq!(second.word(7).load(Ordering::Acquire), 0x1122_3344_5566_7788);
        let mut bytes = [1; 7];
        second.read(1000, &mut bytes);
        assert_eq!(&bytes, b"\0bytes\0");
        assert_eq!((second.len(), second.word(1023).load(Ordering::Acquire)), (8192, 0));
        drop(second);
        let third = Mapped::open(&dir.file(), 512).unwrap();
        assert_eq!((third.len(), fs::metadata(dir.file()).unwrap().len()), (512, 8192), "never made shorter");
        assert_eq!(third.word(7).load(Ordering::Acquire), 0x1122_3344_5566_7788);
    }

    #[test]
    fn two_processes_never_share_a_file() {
        let dir = Dir::new("share");
        let held = Mapped::open(&dir.file(), 64).unwrap();
        let clone = held.clone();
        drop(held);
        assert!(
            matches!(Mapped::open(&dir.file(), 64), Err(Error::InUse { .. })),
            "a clone holds it as well"
        );
        drop(clone);
        assert!(Mapped::open(&dir.file(), 64).is_ok());
    }

    #[test]
    fn only_its_owner_can_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = Dir::new("mode");
        let _held = Mapped::open(&dir.file(), 64).unwrap();
        assert_eq!(fs::metadata(dir.file()).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn clones_without_a_file_are_the_same_memory() {
        let one = Mapped::in_memory(64);
        let other = one.clone();
        one.word(3).store(9, Ordering::Release);
        drop(one);
        assert_eq!(other.word(3).load(Ordering::Acquire), 9);
        let mut bytes = [0; 8];
        other.read(24, &mut bytes);
        assert_eq!(bytes, 9u64.to_ne_bytes());
        assert!(other.reserve(0, 64).is_ok());
    }

    #[test]
    fn the_boot_has_a_name_that_stays() {
        assert_ne!(boot_id().unwrap(), 0);
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }
}
