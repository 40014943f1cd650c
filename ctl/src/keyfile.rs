//! Files that hold a secret: a daemon's private key (X25519, RFC 7748), or a secret that two daemons share. 64 hexadecimal digits and a line break.
//!
//! Knows files and their modes: one that others can read is refused, as ssh refuses it. What a secret is good for is known to `cirro-seal`.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::agreement::{PrivateKey, X25519};
use cirro_protocol::types::PublicKey;
use zeroize::{Zeroize, Zeroizing};

/// What such a file holds. Wiped from memory when it is dropped.
pub type Secret = Zeroizing<[u8; 32]>;

/// Why there is no secret. Never says what is in the file.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// A file operation failed.
    #[error("{}: {what}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// Others can read it.
    #[error(
        "{}: others can read it (mode {mode:04o}), so it is no secret: make a new one with `cirroctl key new`, or, if nobody has read it, `chmod 600` it",
        .path.display()
    )]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It holds something else.
    #[error("{}: not a key file: it must hold 64 hexadecimal digits and a line break, as `cirroctl key new` writes them", .path.display())]
    Form {
        /// The file.
        path: PathBuf,
    },
}

/// Reads a secret.
///
/// # Errors
/// [`KeyFileError`].
pub fn read(path: &Path) -> Result<Secret, KeyFileError> {
    let failed = |what| move |error| KeyFileError::Io { path: path.to_owned(), what, error };
    let file = fs::File::open(path).map_err(failed("cannot open it"))?;
    let facts = file.metadata().map_err(failed("cannot look at it"))?;
    let mode = facts.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Readable { path: path.to_owned(), mode });
    }
    let mut text = Zeroizing::new(String::with_capacity(128));
    // A key file is 65 bytes; one byte more than the most that can be right tells a longer one.
    io::Read::read_to_string(&mut io::Read::take(file, 67), &mut text).map_err(failed("cannot read it"))?;
    parse(text.trim_end()).ok_or_else(|| KeyFileError::Form { path: path.to_owned() })
}

/// Makes a file with a new secret; refuses one that exists.
///
/// # Errors
/// [`KeyFileError::Io`].
pub fn make(path: &Path) -> Result<Secret, KeyFileError> {
    let mut secret = Secret::default();
    aws_lc_rs::rand::fill(&mut secret[..]).expect("the kernel gives random bytes");
    let mut text = Zeroizing::new(String::with_capacity(80));
    for byte in secret.iter() {
        text.extend([byte >> 4, byte & 15].map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])));
    }
    text.push('\n');
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}~", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    // A link, not a rename: whoever comes second finds the first one's whole key.
    let linked = written.and_then(|()| fs::hard_link(&fresh, path)).and_then(|()| {
        // A key that is gone after a power cut is a stranger to everybody who knows it.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::File::open(folder)?.sync_all()
    });
    // What is left is half a key, or another name of the whole one.
    let _ = fs::remove_file(&fresh);
    linked.map_err(|error| KeyFileError::Io { path: path.to_owned(), what: "cannot make it", error })?;
    Ok(secret)
}

/// Reads a secret, or makes it when there is no such file. True if it is new.
///
/// # Errors
/// [`KeyFileError`].
pub fn read_or_make(path: &Path) -> Result<(Secret, bool), KeyFileError> {
    match read(path) {
        Err(KeyFileError::Io { error, .. }) if error.kind() == ErrorKind::NotFound => {
            match make(path) {
                // Another process made it in this moment.
                Err(KeyFileError::Io { error, .. }) if error.kind() == ErrorKind::AlreadyExists => {
                    read(path).map(|secret| (secret, false))
                }
                made => made.map(|secret| (secret, true)),
            }
        }
        other => other.map(|secret| (secret, false)),
    }
}

/// The public key of a private one.
pub fn public_of(secret: &Secret) -> PublicKey {
    let private =
        PrivateKey::from_private_key(&X25519, &secret[..]).expect("any 32 bytes are a key of X25519");
    let public = private.compute_public_key().expect("a public key follows from it");
    PublicKey(public.as_ref().try_into().expect("X25519 has keys of 32 bytes"))
}

fn parse(text: &str) -> Option<Secret> {
    // The form is that of a public key; a secret must not stay in what was only read on the way.
    let mut parsed: PublicKey = text.parse().ok()?;
    let secret = Secret::new(parsed.0);
    parsed.0.zeroize();
    Some(secret)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_was_made_is_read_again_and_others_cannot_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let (made, new) = read_or_make(&path).unwrap();
        assert!(new);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (again, new) = read_or_make(&path).unwrap();
        assert!(!new && made == again);
        assert!(make(&path).unwrap_err().to_string().contains("exists"));
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        make(&path).unwrap();
        for mode in [0o640, 0o604, 0o601, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(
                error.contains("others can read it") && error.contains(&format!("{mode:04o}")),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        for text in ["", "\n", "12", &"1".repeat(63), &"1".repeat(65), &"g".repeat(64), &"é".repeat(32)] {
            let path = folder.path().join("key");
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("not a key file"), "{error}");
            assert!(text.len() < 3 || !error.contains(text), "{error}");
        }
    }

    /// RFC 7748, section 6.1.
    #[test]
    fn the_public_key_is_that_of_the_rfc() {
        let bob = parse("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb").unwrap();
        let public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f";
        assert_eq!(public_of(&bob).to_string(), public);
    }
}
