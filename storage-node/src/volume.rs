//! A volume: a raw file or block device that is served under a name, how it was opened, and its lock.
//!
//! Does not know who uses it (that is `opening`) and moves no data (that is the store). Opened by `server` before anything is
//! served; the lock of a volume that another process still has is waited for on a thread of its own.

mod resize;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use cirro_protocol::types::{
    BLOCK_BYTES, BadVolumeName, REQUEST_BYTES_MAX, SECTOR_BYTES, SERIAL_BYTES, VolumeName,
};
use cirro_protocol::wire::body::{
    VOLUME_DISCARD, VOLUME_READ_ONLY, VOLUME_WRITE_THROUGH, VOLUME_WRITE_ZEROES, VolumeInfo,
};
use rustix::fs::{AtFlags, FallocateFlags, StatxFlags, fallocate, fstatfs, statx};
use serde::{Deserialize, Serialize};

use crate::access::Right;
use crate::memory::VolumeMemory;
use crate::store::{Cached, StoreFile};

pub use resize::{ResizeError, Told, Unfit};

/// How a volume's file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoMode {
    /// Past the page cache (O_DIRECT).
    Direct,
    /// Through the page cache.
    Buffered,
}

/// What OK to a write promises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// It is stable.
    WriteThrough,
    /// The kernel has it; a flush makes it stable.
    #[default]
    WriteBack,
}

/// What a path begins with that is none, but the size of a volume in the node's memory.
const RAM_PREFIX: &str = "ram:";

/// A volume as the operator describes it: `NAME=PATH[,ro][,serial=S][,io=direct|buffered][,durability=write-through|write-back]`, or
/// `NAME=ram:SIZE[,serial=S]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Its name on the segment.
    pub name: VolumeName,
    /// The file or device, or `ram:SIZE`: memory of the node, which ends with it. (A file of such a name is `./ram:SIZE`.)
    pub path: PathBuf,
    /// Nobody may write.
    pub read_only: bool,
    /// The serial number that a guest reads; the name when none was given.
    pub serial: Option<Serial>,
    /// What was asked for; `None`: direct where it is possible.
    pub io: Option<IoMode>,
    /// What OK promises.
    pub durability: Durability,
}

/// A serial number: at most 20 printable ASCII characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial(pub [u8; SERIAL_BYTES]);

impl FromStr for Serial {
    type Err = BadVolumeSpec;
    fn from_str(text: &str) -> Result<Serial, BadVolumeSpec> {
        if text.len() > SERIAL_BYTES || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(BadVolumeSpec::Serial);
        }
        let mut bytes = [0; SERIAL_BYTES];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Serial(bytes))
    }
}

/// Why a description is none of a volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadVolumeSpec {
    /// No `=`.
    #[error("expected NAME=PATH[,ro][,serial=S][,io=direct|buffered][,durability=write-through|write-back]")]
    Form,
    /// The part before `=`.
    #[error(transparent)]
    Name(#[from] BadVolumeName),
    /// The path is empty.
    #[error("the path is empty")]
    Path,
    /// The serial number is too long or unprintable.
    #[error("a serial number is at most 20 printable characters")]
    Serial,
    /// The size of a volume in memory.
    #[error(
        "{0:?} is no size: write a number with K, M, G or T behind it, a multiple of 512 bytes, as in ram:4G"
    )]
    RamSize(Box<str>),
    /// An option that makes no sense for a volume in memory.
    #[error(
        "a volume in memory begins empty and ends with the node: ro, io= and durability= make no sense with ram:"
    )]
    RamOption,
    /// An option that does not exist.
    #[error(
        "unknown option {0:?}: there are ro, serial=S, io=direct|buffered and durability=write-through|write-back"
    )]
    Option(Box<str>),
}

impl FromStr for VolumeSpec {
    type Err = BadVolumeSpec;
    fn from_str(text: &str) -> Result<VolumeSpec, BadVolumeSpec> {
        let (name, rest) = text.split_once('=').ok_or(BadVolumeSpec::Form)?;
        let mut parts = rest.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(BadVolumeSpec::Path)?;
        let mut spec = VolumeSpec {
            name: name.parse()?,
            path: PathBuf::from(path),
            read_only: false,
            serial: None,
            io: None,
            durability: Durability::default(),
        };
        for option in parts {
            match option.split_once('=').unwrap_or((option, "")) {
                ("ro", "") => spec.read_only = true,
                ("serial", serial) => spec.serial = Some(serial.parse()?),
                ("io", "direct") => spec.io = Some(IoMode::Direct),
                ("io", "buffered") => spec.io = Some(IoMode::Buffered),
                ("durability", "write-through") => spec.durability = Durability::WriteThrough,
                ("durability", "write-back") => spec.durability = Durability::WriteBack,
                _ => return Err(BadVolumeSpec::Option(option.into())),
            }
        }
        spec.check()?;
        Ok(spec)
    }
}

impl VolumeSpec {
    /// Bytes of a volume in memory; `None` for a file.
    ///
    /// # Errors
    /// The size is none.
    fn ram_bytes(&self) -> Result<Option<u64>, BadVolumeSpec> {
        let Some(size) = self.path.to_str().and_then(|path| path.strip_prefix(RAM_PREFIX)) else {
            return Ok(None);
        };
        let whole = cirro_ctl::size::parse(size)
            .filter(|bytes| *bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES as u64));
        whole.map(Some).ok_or_else(|| BadVolumeSpec::RamSize(size.into()))
    }

    /// What its parts do not say one by one.
    ///
    /// # Errors
    /// A volume in memory without a size, or with an option that only a file has.
    pub fn check(&self) -> Result<(), BadVolumeSpec> {
        let plain = !self.read_only && self.io.is_none() && self.durability == Durability::default();
        match self.ram_bytes()? {
            Some(_) if !plain => Err(BadVolumeSpec::RamOption),
            Some(_) | None => Ok(()),
        }
    }
}

/// Why a volume cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Opening or looking at the file failed.
    #[error("volume {name}: {}: {what}: {error}", .path.display())]
    Io {
        /// The volume.
        name: VolumeName,
        /// Its file.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// There is not so much memory.
    #[error("volume {name}: {} cannot be had: {error}; name a smaller size, or free memory", .path.display())]
    NoMemory {
        /// The volume.
        name: VolumeName,
        /// What was asked for.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("volume {name}: {} is neither a regular file nor a block device; name one that is", .path.display())]
    Kind {
        /// The volume.
        name: VolumeName,
        /// Its file.
        path: PathBuf,
    },
    /// Less than one block long.
    #[error("volume {name}: {} has no room for one block of {block_bytes} bytes; make it larger, for example with truncate -s", .path.display())]
    Empty {
        /// The volume.
        name: VolumeName,
        /// Its file.
        path: PathBuf,
        /// The block size.
        block_bytes: u32,
    },
    /// Direct I/O was demanded where it cannot be had.
    #[error("volume {name}: {} has no direct I/O ({why}); leave io=direct out or say io=buffered", .path.display())]
    NoDirect {
        /// The volume.
        name: VolumeName,
        /// Its file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// Two volumes are one file.
    #[error("volumes {name} and {other} are the same file ({}); a file is served once", .path.display())]
    SameFile {
        /// The volume.
        name: VolumeName,
        /// The other.
        other: Box<VolumeName>,
        /// The file.
        path: PathBuf,
    },
}

/// Which file it is, whatever it is called: for a device its number, else device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    is_device: bool,
    device: u64,
    inode: u64,
}

/// An opened volume. Not to be served before [`Volume::try_lock`] gave the lock.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// Its file.
    pub path: PathBuf,
    /// How it is read and written.
    pub io: IoMode,
    /// Why not directly, if so.
    pub io_note: Option<&'static str>,
    /// What OK promises.
    pub durability: Durability,
    /// Logical block size in bytes: offsets and lengths are multiples of it.
    pub block_bytes: u32,
    /// Size in sectors, whole blocks.
    pub capacity_sectors: u64,
    /// Nobody may write.
    pub read_only: bool,
    discards: bool,
    cached: Cached,
    serial: Serial,
    identity: Identity,
    file: Arc<File>,
    /// For its length: another description, so that no error of a write is told there instead of to a flush.
    sizer: Arc<File>,
    memory: Option<Arc<Mutex<VolumeMemory>>>,
}

impl Volume {
    /// Opens what `spec` names; takes no lock.
    ///
    /// # Errors
    /// [`VolumeError`].
    pub fn open(spec: &VolumeSpec) -> Result<Volume, VolumeError> {
        if let Ok(Some(bytes)) = spec.ram_bytes() {
            return Volume::in_memory(spec, bytes);
        }
        let failed = |what, error| VolumeError::Io { name: spec.name, path: spec.path.clone(), what, error };
        let kind = std::fs::metadata(&spec.path).map_err(|e| failed("cannot look at it", e))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(VolumeError::Kind { name: spec.name, path: spec.path.clone() });
        }
        let buffered = open_file(spec, 0).map_err(|e| failed("cannot open it", e))?;
        let sizer = open_file(spec, 0).map_err(|e| failed("cannot open it", e))?;
        let in_memory = fstatfs(&buffered).is_ok_and(|fs| fs.f_type == libc::TMPFS_MAGIC) && kind.is_file();
        let device_block_bytes = if kind.is_block_device() { device_block_bytes(&buffered) } else { None };
        let (file, io, io_note, direct_bytes) = match open_direct(spec, &buffered, in_memory) {
            Ok((file, align)) => (file, IoMode::Direct, None, align),
            Err(why) if spec.io == Some(IoMode::Direct) => {
                return Err(VolumeError::NoDirect { name: spec.name, path: spec.path.clone(), why });
            }
            Err(why) => (buffered, IoMode::Buffered, Some(why), SECTOR_BYTES as u32),
        };
        let block_bytes = direct_bytes.max(device_block_bytes.unwrap_or(0)).max(SECTOR_BYTES as u32);
        let metadata = file.metadata().map_err(|e| failed("cannot look at it", e))?;
        let identity = if kind.is_block_device() {
            Identity { is_device: true, device: metadata.rdev(), inode: 0 }
        } else {
            Identity { is_device: false, device: metadata.dev(), inode: metadata.ino() }
        };
        let mut volume = Volume {
            name: spec.name,
            path: spec.path.clone(),
            io,
            io_note,
            durability: spec.durability,
            block_bytes,
            capacity_sectors: 0,
            read_only: spec.read_only,
            discards: false,
            cached: match (io, in_memory) {
                (IoMode::Direct, _) => Cached::No,
                (IoMode::Buffered, true) => Cached::Always,
                (IoMode::Buffered, false) => Cached::Pages,
            },
            serial: spec.serial.unwrap_or_else(|| serial_from(&spec.name)),
            identity,
            file: Arc::new(file),
            sizer: Arc::new(sizer),
            memory: None,
        };
        volume.measure()?;
        volume.discards = !volume.read_only && volume.can_discard();
        Ok(volume)
    }

    /// Makes a volume of `bytes` of our own memory, all of it taken now.
    fn in_memory(spec: &VolumeSpec, bytes: u64) -> Result<Volume, VolumeError> {
        let failed = |error| VolumeError::NoMemory { name: spec.name, path: spec.path.clone(), error };
        let (file, memory) = VolumeMemory::new(&spec.name.to_string(), bytes).map_err(failed)?;
        let (metadata, file) = (file.metadata().map_err(failed)?, Arc::new(file));
        Ok(Volume {
            name: spec.name,
            path: spec.path.clone(),
            io: IoMode::Buffered,
            io_note: Some("it is the node's own memory, and ends with it"),
            durability: Durability::WriteBack,
            block_bytes: SECTOR_BYTES as u32,
            capacity_sectors: bytes / SECTOR_BYTES as u64,
            read_only: false,
            discards: true,
            cached: Cached::Always,
            serial: spec.serial.unwrap_or_else(|| serial_from(&spec.name)),
            identity: Identity { is_device: false, device: metadata.dev(), inode: metadata.ino() },
            file: Arc::clone(&file),
            sizer: file,
            memory: Some(Arc::new(Mutex::new(memory))),
        })
    }

    /// True if its bytes end with this process: whoever used it in an earlier one does not find them again.
    pub fn is_volatile(&self) -> bool {
        self.memory.is_some()
    }

    /// Looks at the size again: it may have changed while the lock was waited for.
    ///
    /// # Errors
    /// [`VolumeError::Io`], [`VolumeError::Empty`].
    pub fn measure(&mut self) -> Result<(), VolumeError> {
        let bytes = (&*self.file).seek(SeekFrom::End(0)).map_err(|error| VolumeError::Io {
            name: self.name,
            path: self.path.clone(),
            what: "cannot tell its size",
            error,
        })?;
        let blocks = bytes / u64::from(self.block_bytes);
        if blocks == 0 {
            return Err(VolumeError::Empty {
                name: self.name,
                path: self.path.clone(),
                block_bytes: self.block_bytes,
            });
        }
        self.capacity_sectors = blocks * u64::from(self.block_bytes) / SECTOR_BYTES as u64;
        Ok(())
    }

    /// Tries to lock the file: exclusively, or shared with other readers for a read-only volume. The lock belongs to the open file
    /// description that all I/O uses, so a killed process keeps it until its last request in the kernel is done.
    ///
    /// # Errors
    /// What flock says other than "not now".
    pub fn try_lock(&self) -> io::Result<bool> {
        let locked = if self.read_only { self.file.try_lock_shared() } else { self.file.try_lock() };
        match locked {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// True if a discard can be done.
    pub fn discards(&self) -> bool {
        self.discards
    }

    /// Which file it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The file as the store wants it.
    pub fn store_file(&self) -> StoreFile {
        let write_through = self.durability == Durability::WriteThrough;
        StoreFile {
            file: Arc::clone(&self.file),
            cached: self.cached,
            write_through,
            memory: self.memory.clone(),
        }
    }

    /// What an answer to OPEN or STAT says of it, with the given epoch and handle.
    pub fn info(&self, vol_epoch: u64, vol_handle: u32, right: Right) -> VolumeInfo {
        let mut flags = 0;
        let read_only = self.read_only || right != Right::ReadWrite;
        if read_only {
            flags |= VOLUME_READ_ONLY;
        } else {
            flags |= VOLUME_WRITE_ZEROES;
        }
        if self.discards && !read_only {
            flags |= VOLUME_DISCARD;
        }
        if self.durability == Durability::WriteThrough {
            flags |= VOLUME_WRITE_THROUGH;
        }
        VolumeInfo {
            capacity_sectors: self.capacity_sectors,
            vol_epoch,
            vol_handle,
            block_bytes: self.block_bytes,
            flags,
            request_bytes_max: REQUEST_BYTES_MAX as u32,
            serial: self.serial.0,
        }
    }

    /// True if `offset..offset + len` are whole blocks of the volume, and at least one.
    pub fn covers(&self, offset: u64, len: u64) -> bool {
        let block = u64::from(self.block_bytes);
        let capacity = self.capacity_sectors * SECTOR_BYTES as u64;
        let whole = len > 0 && offset.is_multiple_of(block) && len.is_multiple_of(block);
        whole && offset.checked_add(len).is_some_and(|end| end <= capacity)
    }

    /// Punches a hole behind the end, where there is nothing: the file system says whether it could. A device says it in sysfs.
    fn can_discard(&self) -> bool {
        if self.identity.is_device {
            return device_queue_number(self.identity.device, "write_zeroes_max_bytes")
                .is_some_and(|n| n > 0);
        }
        let end = (self.capacity_sectors + 1) * SECTOR_BYTES as u64;
        let beyond = end.next_multiple_of(BLOCK_BYTES as u64);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*self.file, mode, beyond, BLOCK_BYTES as u64).is_ok()
    }
}

/// Two volumes that are one file are refused by name.
///
/// # Errors
/// [`VolumeError::SameFile`].
pub fn refuse_same_file(volumes: &[Volume]) -> Result<(), VolumeError> {
    for (index, volume) in volumes.iter().enumerate() {
        if let Some(other) = volumes[..index].iter().find(|other| other.identity == volume.identity) {
            return Err(VolumeError::SameFile {
                name: volume.name,
                other: Box::new(other.name),
                path: volume.path.clone(),
            });
        }
    }
    Ok(())
}

fn serial_from(name: &VolumeName) -> Serial {
    let mut bytes = [0; SERIAL_BYTES];
    let text = name.as_str().as_bytes();
    let len = text.len().min(SERIAL_BYTES);
    bytes[..len].copy_from_slice(&text[..len]);
    Serial(bytes)
}

fn open_file(spec: &VolumeSpec, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(!spec.read_only).custom_flags(flags).open(&spec.path)
}

/// The file open for direct I/O and the alignment that asks for, or why that is not done.
fn open_direct(spec: &VolumeSpec, buffered: &File, in_memory: bool) -> Result<(File, u32), &'static str> {
    if spec.io == Some(IoMode::Buffered) {
        return Err("asked for");
    }
    if in_memory {
        return Err("it is in memory already");
    }
    let facts = statx(buffered, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .map_err(|_| "the kernel cannot tell its alignment")?;
    if facts.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Err("the kernel cannot tell its alignment");
    }
    let align = facts.stx_dio_offset_align;
    if align == 0 {
        return Err("the file system has none");
    }
    if align as usize > BLOCK_BYTES
        || facts.stx_dio_mem_align as usize > BLOCK_BYTES
        || !align.is_power_of_two()
    {
        return Err("it asks for an alignment of more than 4096 bytes");
    }
    let file = open_file(spec, libc::O_DIRECT).map_err(|_| "the file system refuses O_DIRECT")?;
    Ok((file, align))
}

fn device_block_bytes(file: &File) -> Option<u32> {
    let device = file.metadata().ok()?.rdev();
    let bytes = u32::try_from(device_queue_number(device, "logical_block_size")?).ok()?;
    (bytes.is_power_of_two() && bytes as usize <= BLOCK_BYTES).then_some(bytes)
}

/// A number from the queue of a block device, or of the disk of which it is a partition.
fn device_queue_number(device: u64, name: &str) -> Option<u64> {
    let folder = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let read = |path: &str| std::fs::read_to_string(Path::new(&folder).join(path).join(name)).ok();
    read("queue").or_else(|| read("../queue"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &Path, options: &str) -> VolumeSpec {
        format!("v={}{options}", path.display()).parse().expect("a legal description")
    }

    fn sparse(folder: &Path, name: &str, bytes: u64) -> PathBuf {
        let path = folder.join(name);
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("a file can be made");
        path
    }

    /// P-85: the lock is on the open file description that I/O uses, and lives as long as anything that does I/O has it.
    #[test]
    fn a_volume_is_locked_by_who_has_it_open_and_free_when_that_is_closed() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = sparse(dir.path(), "a", 1 << 20);
        let (first, second) =
            (Volume::open(&spec(&path, "")).unwrap(), Volume::open(&spec(&path, "")).unwrap());
        assert!(first.try_lock().unwrap());
        assert!(!second.try_lock().unwrap());
        // The description stays open for as long as anything that does I/O has it.
        let in_use = first.store_file();
        drop(first);
        assert!(!second.try_lock().unwrap());
        drop(in_use);
        assert!(second.try_lock().unwrap());
        drop(second);
        let readers: Vec<Volume> = (0..2).map(|_| Volume::open(&spec(&path, ",ro")).unwrap()).collect();
        assert!(readers.iter().all(|reader| reader.try_lock().unwrap()), "readers share");
        assert!(!Volume::open(&spec(&path, "")).unwrap().try_lock().unwrap());
    }

    /// P-85: the same file twice is refused.
    #[test]
    fn the_same_file_under_another_name_is_refused() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = sparse(dir.path(), "a", 1 << 20);
        let (link, other) = (dir.path().join("b"), sparse(dir.path(), "c", 1 << 20));
        std::fs::hard_link(&path, &link).unwrap();
        let open = |name: &str, path: &Path| {
            Volume::open(&VolumeSpec { name: name.parse().unwrap(), ..spec(path, "") }).unwrap()
        };
        refuse_same_file(&[open("one", &path), open("two", &other)]).unwrap();
        let error =
            refuse_same_file(&[open("one", &path), open("two", &other), open("three", &link)]).unwrap_err();
        assert!(error.to_string().starts_with("volumes three and one are the same file"), "{error}");
    }

    #[test]
    fn a_file_in_memory_falls_back_from_direct_io_and_says_why() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = sparse(dir.path(), "a", (1 << 20) + 700);
        let volume = Volume::open(&spec(&path, "")).unwrap();
        assert_eq!((volume.io, volume.block_bytes), (IoMode::Buffered, 512));
        assert!(volume.io_note.is_some_and(|why| why.contains("memory")));
        assert_eq!(volume.capacity_sectors, 2049, "a sector that is not whole is none");
        let error = Volume::open(&spec(&path, ",io=direct")).unwrap_err();
        assert!(error.to_string().contains("leave io=direct out"), "{error}");
    }

    #[test]
    fn a_file_with_direct_io_tells_the_alignment_that_it_asks_for() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = sparse(dir.path(), "a", 1 << 20);
        let volume = Volume::open(&spec(&path, "")).unwrap();
        let facts = statx(&*volume.file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).unwrap();
        match volume.io {
            IoMode::Direct => assert_eq!(volume.block_bytes, facts.stx_dio_offset_align.max(512)),
            IoMode::Buffered => assert_eq!(facts.stx_dio_offset_align, 0, "{:?}", volume.io_note),
        }
        assert_eq!(Volume::open(&spec(&path, ",io=buffered")).unwrap().io, IoMode::Buffered);
    }

    #[test]
    fn only_whole_blocks_inside_are_covered() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut volume = Volume::open(&spec(&sparse(dir.path(), "a", 1 << 20), "")).unwrap();
        let end = 1 << 20;
        for (offset, len, covered) in [
            (0, 512, true),
            (0, end, true),
            (end - 512, 512, true),
            (end - 512, 1024, false),
            (end, 512, false),
            (0, 0, false),
            (1, 512, false),
            (0, 513, false),
            (u64::MAX - 511, 512, false),
            (u64::MAX - 511, 1024, false),
        ] {
            assert_eq!(volume.covers(offset, len), covered, "{len} at {offset}");
        }
        volume.block_bytes = 4096;
        assert!(!volume.covers(512, 4096) && !volume.covers(0, 512) && volume.covers(4096, 4096));
    }

    #[test]
    fn what_cannot_be_a_volume_is_refused_with_its_path() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        for (path, words) in [
            (dir.path().to_owned(), "neither a regular file nor a block device"),
            (PathBuf::from("/dev/null"), "neither a regular file nor a block device"),
            (dir.path().join("missing"), "No such file"),
            (sparse(dir.path(), "small", 511), "make it larger"),
        ] {
            let error = Volume::open(&spec(&path, "")).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn an_answer_to_open_says_what_the_volume_can_do() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = sparse(dir.path(), "a", 1 << 20);
        let info = Volume::open(&spec(&path, ",serial=ABC,durability=write-through")).unwrap().info(
            3,
            4,
            Right::ReadWrite,
        );
        assert_eq!((info.vol_epoch, info.vol_handle, info.capacity_sectors), (3, 4, 2048));
        assert_eq!(info.flags, VOLUME_DISCARD | VOLUME_WRITE_ZEROES | VOLUME_WRITE_THROUGH);
        assert_eq!(&info.serial[..4], b"ABC\0");
        let info = Volume::open(&spec(&path, ",ro")).unwrap().info(1, 1, Right::ReadWrite);
        assert_eq!((info.flags, &info.serial[..2]), (VOLUME_READ_ONLY, &b"v\0"[..]));
    }

    #[test]
    fn a_volume_in_memory_has_the_size_that_was_asked_for_or_is_refused_in_words() {
        for (size, sectors) in [("512", 1), ("3K", 6), ("64M", 131_072)] {
            let volume = Volume::open(&format!("v=ram:{size},serial=A").parse().unwrap()).unwrap();
            assert_eq!((volume.capacity_sectors, volume.is_volatile()), (sectors, true));
            assert!(volume.try_lock().unwrap());
            assert_eq!(volume.info(1, 1, Right::ReadWrite).flags, VOLUME_DISCARD | VOLUME_WRITE_ZEROES);
        }
        for size in ["", "0", "0G", "513", "1E", "-1", "+512", "64 M", "M", "16777216T", "0x200", "1.5G"] {
            let error = format!("v=ram:{size}").parse::<VolumeSpec>().unwrap_err();
            assert_eq!(error, BadVolumeSpec::RamSize(size.into()), "{error}");
        }
        for option in ["ro", "io=buffered", "durability=write-through"] {
            let error = format!("v=ram:1M,{option}").parse::<VolumeSpec>().unwrap_err();
            assert_eq!(error, BadVolumeSpec::RamOption);
        }
        let error = Volume::open(&"v=ram:4096T".parse().unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("volume v: ram:4096T cannot be had: "), "{error}");
    }

    /// Two of the same description are two, unlike two of one path.
    #[test]
    fn volumes_in_memory_are_apart() {
        let [one, two] =
            ["one=ram:1M", "two=ram:1M"].map(|text| Volume::open(&text.parse().unwrap()).unwrap());
        refuse_same_file(&[one, two]).unwrap();
    }
}
