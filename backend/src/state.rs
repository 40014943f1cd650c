//! What a disk must remember over restarts: its attachment's name, how often it was started, and what its volume was like.
//!
//! Knows files and durability; does not know sessions. Called by `main` before a worker exists, and by `server` when a front-end comes. A directory per volume
//! holds `lock`, `attachment` (32 hexadecimal digits), `starts` (a decimal number) and `volume` (a line for each property). The number is made
//! durable before it is used, so no session epoch is ever used twice.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cirro_protocol::types::{SERIAL_BYTES, Uuid, VolumeName};
use cirro_protocol::wire::body::VolumeInfo;

/// A disk's state, locked for as long as it lives.
#[derive(Debug)]
pub struct State {
    /// The attachment's name, the same over all starts.
    pub attachment: Uuid,
    /// Which start this is, from 1.
    pub starts: u64,
    /// The volume as a front-end was told of it last, without what belongs to a session.
    volume: Mutex<Option<VolumeInfo>>,
    dir: PathBuf,
    _lock: File,
}

/// Why a disk has no state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("cannot {doing} {path}: {cause}; give a directory that can be written with --state-dir")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Another process has the disk.
    #[error(
        "{path} is in use: another cirro-backend serves this volume; end it, or give this one another --state-dir"
    )]
    InUse {
        /// The lock.
        path: PathBuf,
    },
    /// The contents are not ours.
    #[error("{path} is damaged; remove it if no node knows this attachment any more")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Epochs have run out.
    #[error("{path}: started 2^32 times; remove the directory to begin as a new attachment")]
    UsedUp {
        /// The file.
        path: PathBuf,
    },
}

impl State {
    /// Opens the state of `volume` below `dir`, counts this start, and makes the count durable. `fresh` names the attachment if it has no name yet.
    ///
    /// # Errors
    /// See [`Error`]; nothing was counted then.
    pub fn open(dir: &Path, volume: VolumeName, fresh: Uuid) -> Result<State, Error> {
        let dir = dir.join(volume.as_str());
        fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(io_error("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: lock_path }),
            Err(TryLockError::Error(cause)) => return Err(io_error("lock", &lock_path)(cause)),
        }
        let attachment = match read(&dir.join("attachment"))? {
            Some(text) => parse_uuid(&text).ok_or_else(|| Error::Damaged { path: dir.join("attachment") })?,
            None => {
                replace(&dir, "attachment", &format!("{fresh}\n"))?;
                fresh
            }
        };
        let path = dir.join("starts");
        let before = match read(&path)? {
            Some(text) => text.parse::<u64>().map_err(|_| Error::Damaged { path: path.clone() })?,
            None => 0,
        };
        let starts = before + 1;
        if starts > u64::from(u32::MAX) {
            return Err(Error::UsedUp { path });
        }
        replace(&dir, "starts", &format!("{starts}\n"))?;
        let volume = read_volume(&dir);
        Ok(State { attachment, starts, volume: Mutex::new(volume), dir, _lock: lock })
    }

    /// The volume as it was remembered last; `None` when it never was.
    pub fn volume(&self) -> Option<VolumeInfo> {
        *self.volume.lock().expect("no holder of this lock panics")
    }

    /// Remembers the volume, durably, if it is another than before.
    ///
    /// # Errors
    /// [`Error::Io`]; what was remembered before stays.
    pub fn remember(&self, info: &VolumeInfo) -> Result<(), Error> {
        let info = VolumeInfo { vol_epoch: 0, vol_handle: 0, ..*info };
        let mut volume = self.volume.lock().expect("no holder of this lock panics");
        if *volume != Some(info) {
            replace(&self.dir, VOLUME, &write_volume(&info))?;
            *volume = Some(info);
        }
        Ok(())
    }

    /// The first session epoch of this start: larger than any of the starts before.
    pub fn session_epoch(&self) -> u64 {
        self.starts << 32
    }
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Io { doing, path, cause }
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(Error::Damaged { path: path.to_owned() })
        }
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// Replaces a file so that after a crash it is the old one or the new one, and after the return it is the new one.
fn replace(dir: &Path, name: &str, text: &str) -> Result<(), Error> {
    let (path, new) = (dir.join(name), dir.join(format!("{name}.new")));
    let mut file = File::create(&new).map_err(io_error("create", &new))?;
    file.write_all(text.as_bytes()).map_err(io_error("write", &new))?;
    file.sync_all().map_err(io_error("sync", &new))?;
    fs::rename(&new, &path).map_err(io_error("rename", &new))?;
    let opened = File::open(dir).map_err(io_error("open", dir))?;
    opened.sync_all().map_err(io_error("sync", dir))
}

/// The file that describes the volume.
const VOLUME: &str = "volume";

/// One line for each property, in this order.
fn write_volume(info: &VolumeInfo) -> String {
    let serial: String = info.serial.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "capacity-sectors {}\nblock-bytes {}\nflags {}\nrequest-bytes-max {}\nserial {serial}\n",
        info.capacity_sectors, info.block_bytes, info.flags, info.request_bytes_max
    )
}

/// What cannot be read is not remembered: the next node says it again.
fn read_volume(dir: &Path) -> Option<VolumeInfo> {
    let text = read(&dir.join(VOLUME)).unwrap_or_else(|error| {
        log::warn!("{error}");
        None
    })?;
    let info = parse_volume(&text);
    if info.is_none() {
        log::warn!("{} is damaged; it is written again when a node answers", dir.join(VOLUME).display());
    }
    info
}

fn parse_volume(text: &str) -> Option<VolumeInfo> {
    let mut lines = text.lines();
    let mut value = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let mut info = VolumeInfo {
        capacity_sectors: value("capacity-sectors")?.parse().ok()?,
        block_bytes: value("block-bytes")?.parse().ok()?,
        flags: value("flags")?.parse().ok()?,
        request_bytes_max: value("request-bytes-max")?.parse().ok()?,
        ..VolumeInfo::default()
    };
    let serial = value("serial")?;
    if serial.len() != 2 * SERIAL_BYTES || !serial.is_ascii() || lines.next().is_some() {
        return None;
    }
    for (index, byte) in info.serial.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&serial[2 * index..2 * index + 2], 16).ok()?;
    }
    let blocks = info.block_bytes.is_power_of_two() && (512..=4096).contains(&info.block_bytes);
    let sizes = info.capacity_sectors <= u64::MAX / 512 && info.request_bytes_max >= 4096;
    (blocks && sizes).then_some(info)
}

fn parse_uuid(text: &str) -> Option<Uuid> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(Uuid(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let path = std::env::temp_dir().join(format!("cirro-state-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Dir(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn open(dir: &Dir, fresh: u8) -> Result<State, Error> {
        State::open(&dir.0, "vol".parse().unwrap(), Uuid([fresh; 16]))
    }

    #[test]
    fn the_attachment_keeps_its_name_and_epochs_only_grow() {
        let dir = Dir::new("name");
        let first = open(&dir, 0xa5).unwrap();
        assert_eq!((first.attachment, first.starts, first.session_epoch()), (Uuid([0xa5; 16]), 1, 1 << 32));
        drop(first);
        let second = open(&dir, 0x11).unwrap();
        assert_eq!((second.attachment, second.session_epoch()), (Uuid([0xa5; 16]), 2 << 32));
    }

    #[test]
    fn two_processes_never_share_an_attachment() {
        let dir = Dir::new("share");
        let held = open(&dir, 1).unwrap();
        assert!(matches!(open(&dir, 2), Err(Error::InUse { .. })));
        drop(held);
        assert_eq!(open(&dir, 2).unwrap().starts, 2, "the refused start was not counted");
    }

    #[test]
    fn the_volume_is_remembered_without_what_belongs_to_a_session() {
        let dir = Dir::new("volume");
        let info = VolumeInfo {
            capacity_sectors: u64::MAX / 512,
            vol_epoch: 7,
            vol_handle: 9,
            block_bytes: 4096,
            flags: 0xb,
            request_bytes_max: 1 << 20,
            serial: *b"a serial\0number\xff\0\0\0\0",
        };
        let first = open(&dir, 1).unwrap();
        assert_eq!(first.volume(), None);
        first.remember(&info).unwrap();
        drop(first);
        let second = open(&dir, 1).unwrap();
        let remembered = VolumeInfo { vol_epoch: 0, vol_handle: 0, ..info };
        assert_eq!(second.volume(), Some(remembered));
        let path = dir.0.join("vol/volume");
        fs::remove_file(&path).unwrap();
        second.remember(&VolumeInfo { vol_epoch: 8, ..info }).unwrap();
        assert!(!path.exists(), "nothing is written when nothing changed");
        second.remember(&VolumeInfo { flags: 0, ..info }).unwrap();
        drop(second);
        assert_eq!(open(&dir, 1).unwrap().volume(), Some(VolumeInfo { flags: 0, ..remembered }));
    }

    #[test]
    fn a_damaged_description_of_the_volume_is_forgotten() {
        let dir = Dir::new("description");
        let info = VolumeInfo { block_bytes: 512, request_bytes_max: 4096, ..VolumeInfo::default() };
        open(&dir, 1).unwrap().remember(&info).unwrap();
        let whole = fs::read_to_string(dir.0.join("vol/volume")).unwrap();
        let damaged = [
            whole.replace("block-bytes 512", "block-bytes 513"),
            whole.replace("request-bytes-max 4096", "request-bytes-max 1"),
            whole.replace("flags", "flegs"),
            whole.replace("serial 00", "serial \u{e9}"),
            format!("{whole}more\n"),
            whole[..whole.len() / 2].to_owned(),
            String::new(),
        ];
        for text in damaged {
            fs::write(dir.0.join("vol/volume"), &text).unwrap();
            assert_eq!(open(&dir, 1).unwrap().volume(), None, "{text}");
        }
        fs::write(dir.0.join("vol/volume"), whole).unwrap();
        assert_eq!(open(&dir, 1).unwrap().volume(), Some(info));
    }

    #[test]
    fn damage_is_told_and_not_guessed_around() {
        let dir = Dir::new("damage");
        drop(open(&dir, 1).unwrap());
        fs::write(dir.0.join("vol/starts"), "12x").unwrap();
        assert!(matches!(open(&dir, 1), Err(Error::Damaged { .. })));
        fs::write(dir.0.join("vol/starts"), "4294967295").unwrap();
        assert!(matches!(open(&dir, 1), Err(Error::UsedUp { .. })));
        fs::write(dir.0.join("vol/attachment"), "zz").unwrap();
        assert!(matches!(open(&dir, 1), Err(Error::Damaged { .. })));
    }
}
