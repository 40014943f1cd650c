//! Who may use which volume: grants of the configuration, grants and revocations made while the node runs, and secrets shared with clients.
//!
//! Knows names, keys and rights, and the one rule; does not know sessions. Workers ask at each handshake; the control thread changes it.
//!
//! The rule: a client has the right that was given last. What was said at run time is kept in the state directory and wins over the
//! configuration, a revocation too. With keys nobody has a right who was given none. Without keys a volume of which nothing was ever said
//! is open to all, and to those who were named as soon as one was.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use cirro_protocol::types::{MacAddress, PublicKey, VolumeName};
use cirro_seal::Secret;

use crate::state_dir::{StateDir, StateError};

/// Who asks for a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Client {
    /// The owner of a private key (`security = "keys"`).
    Key(PublicKey),
    /// Whoever sends from an address (`security = "none"`).
    Mac(MacAddress),
}

/// What a client may do with a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// Nothing: it was revoked.
    None,
    /// Read it.
    ReadOnly,
    /// Read and write it.
    ReadWrite,
}

/// Not a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a client: a public key (64 hexadecimal digits, `cirroctl key show`), or a MAC address where security is none"
)]
pub struct BadClient;

/// Not a grant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadGrant {
    /// Not of this form.
    #[error("not of the form VOLUME=CLIENT[:ro|rw]")]
    Form,
    /// The volume.
    #[error("not a volume name: {0:?}")]
    Volume(Box<str>),
    /// The client.
    #[error(transparent)]
    Client(#[from] BadClient),
}

/// A grant as the configuration states it: `VOLUME=CLIENT[:ro|rw]`, rw unless said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The volume.
    pub volume: VolumeName,
    /// To whom.
    pub client: Client,
    /// What.
    pub right: Right,
}

impl FromStr for Client {
    type Err = BadClient;

    fn from_str(text: &str) -> Result<Client, BadClient> {
        let key = text.parse().map(Client::Key);
        key.or_else(|_| text.parse().map(Client::Mac)).map_err(|_| BadClient)
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Client::Key(key) => write!(f, "{key}"),
            Client::Mac(mac) => write!(f, "{mac}"),
        }
    }
}

impl FromStr for Right {
    type Err = ();

    fn from_str(text: &str) -> Result<Right, ()> {
        [Right::None, Right::ReadOnly, Right::ReadWrite]
            .into_iter()
            .find(|right| right.name() == text)
            .ok_or(())
    }
}

impl Right {
    /// As it is written in files and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Right::None => "none",
            Right::ReadOnly => "ro",
            Right::ReadWrite => "rw",
        }
    }
}

impl FromStr for Grant {
    type Err = BadGrant;

    fn from_str(text: &str) -> Result<Grant, BadGrant> {
        let (volume, rest) = text.split_once('=').ok_or(BadGrant::Form)?;
        let (client, right) = match rest.rsplit_once(':') {
            Some((client, "ro")) => (client, Right::ReadOnly),
            Some((client, "rw")) => (client, Right::ReadWrite),
            // The last colon may be one of a MAC address.
            Some(_) | None => (rest, Right::ReadWrite),
        };
        let volume = volume.parse().map_err(|_| BadGrant::Volume(volume.into()))?;
        Ok(Grant { volume, client: client.parse()?, right })
    }
}

type Rights = BTreeMap<(VolumeName, Client), Right>;

/// All of it, shared by the workers and the control thread.
pub struct AccessList {
    rights: RwLock<Rights>,
    /// What was said at run time; `None`: nothing is kept (a simulator's node).
    kept: Option<(Arc<StateDir>, RwLock<Rights>)>,
    psks: HashMap<PublicKey, Secret>,
    /// Without keys.
    open: bool,
}

impl AccessList {
    /// Only what `grants` says; kept nowhere. `open`: without keys.
    pub fn fixed(open: bool, grants: &[Grant]) -> AccessList {
        let rights = grants.iter().map(|grant| ((grant.volume, grant.client), grant.right)).collect();
        AccessList { rights: RwLock::new(rights), kept: None, psks: HashMap::new(), open }
    }

    /// The configuration's grants, changed by what the state directory has kept.
    ///
    /// # Errors
    /// [`StateError`]: what was kept cannot be read, so what was revoked is not known.
    pub fn new(
        open: bool,
        grants: &[Grant],
        psks: HashMap<PublicKey, Secret>,
        state: &Arc<StateDir>,
    ) -> Result<AccessList, StateError> {
        let kept: Rights =
            state.read_grants()?.iter().map(|grant| ((grant.volume, grant.client), grant.right)).collect();
        let access = AccessList::fixed(open, grants);
        write(&access.rights).extend(kept.iter());
        Ok(AccessList { kept: Some((Arc::clone(state), RwLock::new(kept))), psks, ..access })
    }

    /// What a client may do with a volume; `None`: nothing, not even know that it exists.
    pub fn right(&self, volume: &VolumeName, client: &Client) -> Option<Right> {
        let rights = read(&self.rights);
        match rights.get(&(*volume, *client)) {
            Some(Right::None) => None,
            Some(right) => Some(*right),
            None => (self.open && is_unsaid(&rights, volume)).then_some(Right::ReadWrite),
        }
    }

    /// True if everybody may use a volume: there are no keys, and nothing was ever said of it.
    pub fn is_open(&self, volume: &VolumeName) -> bool {
        self.open && is_unsaid(&read(&self.rights), volume)
    }

    /// The secret shared with a client; zeroes where there is none.
    pub fn psk(&self, client: &PublicKey) -> Secret {
        self.psks.get(client).cloned().unwrap_or_default()
    }

    /// Says what a client may do from now on, and keeps it. True if that is a change, so that its sessions have to end.
    ///
    /// # Errors
    /// [`StateError`]: it could not be kept; nothing has changed.
    pub fn set(&self, volume: VolumeName, client: Client, right: Right) -> Result<bool, StateError> {
        if let Some((state, kept)) = &self.kept {
            let mut changed = read(kept).clone();
            changed.insert((volume, client), right);
            let grants = changed.iter().map(|((volume, client), right)| Grant {
                volume: *volume,
                client: *client,
                right: *right,
            });
            state.write_grants(&grants.collect::<Vec<_>>())?;
            *write(kept) = changed;
        }
        let before = write(&self.rights).insert((volume, client), right);
        Ok(before != Some(right))
    }

    /// Who has which right on a volume, revoked ones left out.
    pub fn granted(&self, volume: &VolumeName) -> Vec<(Client, Right)> {
        let rights = read(&self.rights);
        let of_volume = rights.iter().filter(|((named, _), right)| named == volume && **right != Right::None);
        of_volume.map(|((_, client), right)| (*client, *right)).collect()
    }
}

fn is_unsaid(rights: &Rights, volume: &VolumeName) -> bool {
    !rights.keys().any(|(named, _)| named == volume)
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::GRANTS_MAX;

    fn client(digit: char) -> Client {
        digit.to_string().repeat(64).parse().unwrap()
    }

    #[test]
    fn grants_are_read_as_the_manual_shows_them() {
        let grant: Grant = format!("a={}:ro", "1".repeat(64)).parse().unwrap();
        assert_eq!((grant.volume.as_str(), grant.client, grant.right), ("a", client('1'), Right::ReadOnly));
        let grant: Grant = "a=02:00:00:00:00:05".parse().unwrap();
        assert_eq!((grant.client.to_string().as_str(), grant.right), ("02:00:00:00:00:05", Right::ReadWrite));
        let grant: Grant = "a=02:00:00:00:00:05:ro".parse().unwrap();
        assert_eq!(grant.right, Right::ReadOnly);
        for bad in ["", "a", "a=", "=11", "a=xy", "a=02:00:00:00:00:05:wo", "../a=02:00:00:00:00:05"] {
            bad.parse::<Grant>().unwrap_err();
        }
    }

    /// P-109: with keys nobody has a right who was given none; without, a volume is open until somebody is named, and stays closed then.
    #[test]
    fn the_right_given_last_counts_and_a_revocation_closes() {
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let given = Grant { volume: a, client: client('1'), right: Right::ReadOnly };
        let keys = AccessList::fixed(false, &[given]);
        assert_eq!(keys.right(&a, &client('1')), Some(Right::ReadOnly));
        assert_eq!((keys.right(&a, &client('2')), keys.right(&b, &client('1'))), (None, None));
        assert!(keys.set(a, client('1'), Right::ReadWrite).unwrap());
        assert!(!keys.set(a, client('1'), Right::ReadWrite).unwrap());
        assert_eq!(keys.right(&a, &client('1')), Some(Right::ReadWrite));
        assert!(keys.set(a, client('1'), Right::None).unwrap());
        assert_eq!((keys.right(&a, &client('1')), keys.granted(&a)), (None, vec![]));

        let open = AccessList::fixed(true, &[]);
        assert_eq!(open.right(&a, &client('3')), Some(Right::ReadWrite));
        open.set(a, client('1'), Right::ReadWrite).unwrap();
        assert_eq!(
            (open.right(&a, &client('3')), open.right(&b, &client('3'))),
            (None, Some(Right::ReadWrite))
        );
        open.set(a, client('1'), Right::None).unwrap();
        assert_eq!(open.right(&a, &client('3')), None);
    }

    #[test]
    fn what_was_said_at_run_time_outlives_the_process_and_wins() {
        let folder = tempfile::tempdir().unwrap();
        let a = "a".parse().unwrap();
        let given = Grant { volume: a, client: client('1'), right: Right::ReadWrite };
        let open = || Arc::new(StateDir::open(folder.path(), |bytes| bytes.fill(7)).unwrap());
        let access = AccessList::new(false, &[given], HashMap::new(), &open()).unwrap();
        assert_eq!(access.right(&a, &client('1')), Some(Right::ReadWrite));
        access.set(a, client('1'), Right::None).unwrap();
        access.set(a, client('2'), Right::ReadOnly).unwrap();
        drop(access);
        let access = AccessList::new(false, &[given], HashMap::new(), &open()).unwrap();
        assert_eq!(
            (access.right(&a, &client('1')), access.right(&a, &client('2'))),
            (None, Some(Right::ReadOnly))
        );
        drop(access);
        std::fs::write(folder.path().join("grants"), "torn").unwrap();
        let error = AccessList::new(false, &[given], HashMap::new(), &open()).err().unwrap().to_string();
        assert!(error.contains("grants is damaged"), "{error}");
    }

    /// A full disk, or anything else that keeps the list from being written: the right is as it was, before and after a restart.
    #[test]
    fn a_right_that_cannot_be_kept_is_not_changed() {
        let folder = tempfile::tempdir().unwrap();
        let a = "a".parse().unwrap();
        let open = || Arc::new(StateDir::open(folder.path(), |bytes| bytes.fill(7)).unwrap());
        let access = AccessList::new(false, &[], HashMap::new(), &open()).unwrap();
        access.set(a, client('1'), Right::ReadWrite).unwrap();
        std::fs::create_dir(folder.path().join("grants~")).unwrap();
        let error = access.set(a, client('1'), Right::None).unwrap_err().to_string();
        assert!(error.contains("grants~"), "{error}");
        access.set(a, client('2'), Right::ReadOnly).unwrap_err();
        assert_eq!(
            (access.right(&a, &client('1')), access.right(&a, &client('2'))),
            (Some(Right::ReadWrite), None)
        );
        drop(access);
        let access = AccessList::new(false, &[], HashMap::new(), &open()).unwrap();
        assert_eq!(
            (access.right(&a, &client('1')), access.right(&a, &client('2'))),
            (Some(Right::ReadWrite), None)
        );
    }

    /// As many as are kept can be read again, with the longest names; one more is refused.
    #[test]
    fn the_list_of_grants_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path(), |bytes| bytes.fill(7)).unwrap();
        let grant = |number: usize| Grant {
            volume: format!("{}{number:05}", "v".repeat(59)).parse().unwrap(),
            client: client('f'),
            right: Right::None,
        };
        let mut grants: Vec<Grant> = (0..GRANTS_MAX).map(grant).collect();
        state.write_grants(&grants).unwrap();
        assert_eq!(state.read_grants().unwrap(), grants);
        grants.push(grant(GRANTS_MAX));
        assert!(state.write_grants(&grants).unwrap_err().to_string().contains("one more"));
        assert_eq!(state.read_grants().unwrap().len(), GRANTS_MAX);
    }
}
