//! What a node remembers over restarts: its uuid, the secret behind reset tokens, and who owns each volume.
//!
//! Knows files and their formats; what an owner may do is `owner`'s to say. A file that is torn or strange is refused by name, never
//! guessed. Opened by `server` once; the keeper's thread writes to it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use cirro_protocol::types::{Uuid, VolumeName};

use crate::access::Grant;
use crate::owner::OwnerRecord;

/// Bytes of the secret behind reset tokens: a SipHash key.
pub const SECRET_BYTES: usize = 16;
/// First word of an owner record.
const OWNER_MAGIC: &str = "cirro-owner-1";
/// Largest record: magic, epoch, uuid, checksum and blanks are below 100 bytes.
const RECORD_BYTES_MAX: u64 = 256;
/// First line of the file of grants.
const GRANTS_MAGIC: &str = "cirro-grants-1";
/// Grants and revocations that are kept: each is written with all others.
pub const GRANTS_MAX: usize = 10_000;
/// Its largest size: a line has a name, a key, a right and blanks, at most 135 bytes.
const GRANTS_BYTES_MAX: u64 = 64 + 135 * GRANTS_MAX as u64;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed.
    #[error("state directory: {}: {what}: {error}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// Another process has it.
    #[error("state directory {} is in use by another cirro-node; give each its own with --state-dir", .path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// More grants than are kept.
    #[error("{GRANTS_MAX} grants and revocations are kept, and this would be one more: state the lasting ones in the configuration, stop the node, and remove {}", .path.display())]
    TooMany {
        /// The file of grants.
        path: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("state directory: {} is damaged ({what}); restore it from a backup, or remove it if you know that {loss}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
        /// What removing it means.
        loss: &'static str,
    },
}

/// The directory, locked for this process.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The node's name for all time.
    pub node: Uuid,
    /// The key of reset tokens.
    pub secret: [u8; SECRET_BYTES],
    _lock: File,
}

impl StateDir {
    /// Makes the directory if it is missing, locks it, and reads (or makes, from `random`) uuid and secret.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(path: &Path, mut random: impl FnMut(&mut [u8])) -> Result<StateDir, StateError> {
        let owners = path.join("owners");
        fs::create_dir_all(&owners).map_err(|e| failed(&owners, "cannot make the folder", e))?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
        let lock = lock.map_err(|e| failed(&lock_path, "cannot open it", e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(e)) => return Err(failed(&lock_path, "cannot lock it", e)),
        }
        let node =
            kept_bytes(&path.join("node-uuid"), "backends may take this node for a new one", &mut random)?;
        let loss = "sessions of now end a little later";
        let secret = kept_bytes(&path.join("reset-secret"), loss, &mut random)?;
        Ok(StateDir { path: path.to_owned(), node: Uuid(node), secret, _lock: lock })
    }

    /// Who owns the volume; nobody, in epoch 0, when there is no record.
    ///
    /// # Errors
    /// [`StateError::Damaged`] and [`StateError::Io`].
    pub fn read_owner(&self, volume: &VolumeName) -> Result<OwnerRecord, StateError> {
        let path = self.owner_path(volume);
        match read_bounded(&path, RECORD_BYTES_MAX)? {
            None => Ok(OwnerRecord::default()),
            Some(text) => parse_owner(&text).ok_or(StateError::Damaged {
                path,
                what: "not a whole owner record",
                loss: "no backend has writes of its own in flight",
            }),
        }
    }

    /// Makes the record durable: a new file, fsync, rename, fsync of the folder.
    ///
    /// # Errors
    /// [`StateError::Io`]; the old record is still there then, or the new one already is.
    pub fn write_owner(&self, volume: &VolumeName, record: &OwnerRecord) -> Result<(), StateError> {
        write_durably(&self.owner_path(volume), &format_owner(record))
    }

    /// What was granted and revoked while the node ran; nothing when there is no such file.
    ///
    /// # Errors
    /// [`StateError::Damaged`] and [`StateError::Io`].
    pub fn read_grants(&self) -> Result<Vec<Grant>, StateError> {
        let path = self.path.join("grants");
        let text = read_bounded(&path, GRANTS_BYTES_MAX)?;
        text.map_or(Ok(Vec::new()), |text| {
            parse_grants(&text).ok_or(StateError::Damaged {
                path,
                what: "not a whole list of grants",
                loss: "nothing was revoked or granted with cirroctl, or you say all of it again",
            })
        })
    }

    /// Makes the list durable, as [`StateDir::write_owner`] does.
    ///
    /// # Errors
    /// [`StateError::Io`], [`StateError::TooMany`].
    pub fn write_grants(&self, grants: &[Grant]) -> Result<(), StateError> {
        let path = self.path.join("grants");
        if grants.len() > GRANTS_MAX {
            return Err(StateError::TooMany { path });
        }
        let lines = grants.iter().map(|g| format!("{} {} {}\n", g.volume, g.client, g.right.name()));
        let body = std::iter::once(format!("{GRANTS_MAGIC}\n")).chain(lines).collect::<String>();
        let crc = cirro_seal::crc32c(body.as_bytes());
        write_durably(&path, &format!("{body}{crc:08x}\n"))
    }

    fn owner_path(&self, volume: &VolumeName) -> PathBuf {
        self.path.join("owners").join(volume.as_str())
    }
}

fn failed(path: &Path, what: &'static str, error: io::Error) -> StateError {
    StateError::Io { path: path.to_owned(), what, error }
}

fn read_bounded(path: &Path, bytes_max: u64) -> Result<Option<String>, StateError> {
    match fs::metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(path, "cannot look at it", e)),
        Ok(facts) if facts.len() > bytes_max => return Ok(Some(String::new())),
        Ok(_) => {}
    }
    let bytes = fs::read(path).map_err(|e| failed(path, "cannot read it", e))?;
    Ok(Some(String::from_utf8(bytes).unwrap_or_default()))
}

fn write_durably(path: &Path, text: &str) -> Result<(), StateError> {
    // Volume names do not end so: '~' is not among their characters.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push("~");
    let fresh = PathBuf::from(fresh);
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&fresh);
    let written = file.as_mut().map_err(|e| io::Error::from(e.kind())).and_then(|file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|e| failed(&fresh, "cannot write it", e))?;
    fs::rename(&fresh, path).map_err(|e| failed(path, "cannot rename it into place", e))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|e| failed(folder, "cannot sync the folder", e))
}

/// Sixteen bytes that are made at random once and kept.
fn kept_bytes(
    path: &Path,
    loss: &'static str,
    random: &mut impl FnMut(&mut [u8]),
) -> Result<[u8; 16], StateError> {
    let damaged = || StateError::Damaged { path: path.to_owned(), what: "not 32 hexadecimal digits", loss };
    if let Some(text) = read_bounded(path, RECORD_BYTES_MAX)? {
        return text.strip_suffix('\n').and_then(parse_hex).ok_or_else(damaged);
    }
    let mut bytes = [0; 16];
    random(&mut bytes);
    write_durably(path, &format!("{}\n", Uuid(bytes)))?;
    Ok(bytes)
}

fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let number = if digits { u128::from_str_radix(text, 16).ok()? } else { return None };
    Some(number.to_be_bytes())
}

/// `cirro-owner-1 EPOCH HOLDER CRC`: the epoch in decimal, the attachment in hexadecimal or `-`, CRC32C over all before its blank.
fn format_owner(record: &OwnerRecord) -> String {
    let holder = record.holder.map_or("-".to_owned(), |uuid| uuid.to_string());
    let body = format!("{OWNER_MAGIC} {} {holder}", record.vol_epoch);
    format!("{body} {:08x}\n", cirro_seal::crc32c(body.as_bytes()))
}

fn parse_owner(text: &str) -> Option<OwnerRecord> {
    let (body, crc) = text.strip_suffix('\n')?.rsplit_once(' ')?;
    if crc != format!("{:08x}", cirro_seal::crc32c(body.as_bytes())) {
        return None;
    }
    let mut words = body.split(' ');
    let [magic, epoch, holder] = [words.next()?, words.next()?, words.next()?];
    let holder = if holder == "-" { None } else { Some(Uuid(parse_hex(holder)?)) };
    let record = OwnerRecord { vol_epoch: epoch.parse().ok()?, holder };
    (magic == OWNER_MAGIC && words.next().is_none()).then_some(record)
}

/// A line for each, `VOLUME CLIENT RIGHT`, between the magic and a CRC32C over all before it.
fn parse_grants(text: &str) -> Option<Vec<Grant>> {
    let (body, crc) = text.strip_suffix('\n')?.rsplit_once('\n')?;
    if crc != format!("{:08x}", cirro_seal::crc32c(format!("{body}\n").as_bytes())) {
        return None;
    }
    let mut lines = body.split('\n');
    let magic = lines.next()? == GRANTS_MAGIC;
    let grants = lines.map(|line| {
        let mut words = line.split(' ');
        let volume = words.next()?.parse().ok()?;
        Some(Grant { volume, client: words.next()?.parse().ok()?, right: words.next()?.parse().ok()? })
    });
    grants.collect::<Option<Vec<_>>>().filter(|_| magic)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(bytes: &mut [u8]) {
        bytes.fill(0xa7);
    }

    #[test]
    fn what_was_written_is_read_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let name: VolumeName = "disk-1".parse().unwrap();
        let record = OwnerRecord { vol_epoch: 17, holder: Some(Uuid([3; 16])) };
        let first = StateDir::open(dir.path(), fixed).unwrap();
        assert_eq!(first.read_owner(&name).unwrap(), OwnerRecord { vol_epoch: 0, holder: None });
        first.write_owner(&name, &record).unwrap();
        drop(first);
        let again = StateDir::open(dir.path(), |_| panic!("uuid and secret are kept")).unwrap();
        assert_eq!(again.read_owner(&name).unwrap(), record);
        assert_eq!((again.node, again.secret), (Uuid([0xa7; 16]), [0xa7; 16]));
        again.write_owner(&name, &OwnerRecord { vol_epoch: 17, holder: None }).unwrap();
        assert_eq!(again.read_owner(&name).unwrap().holder, None);
    }

    #[test]
    fn a_second_process_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path(), fixed).unwrap();
        let error = StateDir::open(dir.path(), fixed).unwrap_err();
        assert!(error.to_string().contains("--state-dir"), "{error}");
        drop(first);
        StateDir::open(dir.path(), fixed).unwrap();
    }

    #[test]
    fn a_torn_or_changed_record_is_refused_whatever_byte_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), fixed).unwrap();
        let name: VolumeName = "v".parse().unwrap();
        let whole = format_owner(&OwnerRecord { vol_epoch: 900, holder: Some(Uuid([0x5c; 16])) });
        let path = dir.path().join("owners/v");
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = state.read_owner(&name).unwrap_err();
            assert!(error.to_string().contains("owners/v is damaged"), "{length} bytes: {error}");
        }
        for index in 0..whole.len() {
            let mut bytes = whole.clone().into_bytes();
            bytes[index] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(state.read_owner(&name).is_err(), "byte {index} changed");
        }
        fs::write(&path, "0".repeat(5000)).unwrap();
        assert!(state.read_owner(&name).is_err());
        fs::write(dir.path().join("node-uuid"), "zz").unwrap();
        drop(state);
        let error = StateDir::open(dir.path(), fixed).unwrap_err();
        assert!(error.to_string().contains("node-uuid is damaged"), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), fixed).unwrap();
        fs::remove_dir(dir.path().join("owners")).unwrap();
        let error = state.write_owner(&"v".parse().unwrap(), &OwnerRecord::default()).unwrap_err();
        assert!(error.to_string().contains("owners/v~: cannot write it"), "{error}");
    }
}
