//! Least privilege: what a daemon gives up when it has opened what it needs.
//!
//! Knows users, capabilities and system calls; does not know what the daemons open. Called by `main` of both, once, before any thread is
//! started: what a thread may do is inherited by those that it starts.
//!
//! Always: no new privileges by running programs, and a filter (seccomp) that answers EPERM to what neither daemon ever does: running programs,
//! making processes, tracing others, mounting, loading code into the kernel. With `--user` also: that user's identity. An ordinary
//! user keeps no capability, or only what sockets need that have to be opened again: [`Needs`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{chown, lchown};
use std::path::{Path, PathBuf};

use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Capabilities that this kernel may know: more are tried, and the first that it does not know ends the list.
const CAPABILITIES_MAX: u32 = 64;

/// Commands of bpf(2) that load nothing: to put something into a map that is there, and to attach a program that is there (enum bpf_cmd).
const BPF_MAP_UPDATE_ELEM: u64 = 2;
const BPF_LINK_CREATE: u64 = 28;

/// What a daemon must not do, whatever happens to it. And bpf(2): see [`Needs`].
const FORBIDDEN: [i64; 31] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_open_by_handle_at,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_personality,
];

/// The same, which newer processors do not have: there `clone` does it.
#[cfg(target_arch = "x86_64")]
const FORBIDDEN_OLD: [i64; 2] = [libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const FORBIDDEN_OLD: [i64; 0] = [];

/// What a daemon must go on being able to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: no capability is kept, and bpf(2) is forbidden.
    Nothing,
    /// Packet sockets: CAP_NET_RAW.
    PacketSockets,
    /// AF_XDP sockets: CAP_NET_RAW; CAP_IPC_LOCK, for the kernel counts their memory as locked; and the two commands of bpf(2) that make use of the
    /// program and the map that are there. No other can be made.
    XdpSockets,
}

impl Needs {
    fn capabilities(self) -> CapabilitySet {
        match self {
            Needs::Nothing => CapabilitySet::empty(),
            Needs::PacketSockets => CapabilitySet::NET_RAW,
            Needs::XdpSockets => CapabilitySet::NET_RAW | CapabilitySet::IPC_LOCK,
        }
    }

    /// When bpf(2) is forbidden: any of these, and always if there are none.
    fn bpf_rules(self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let is_not = |command| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, command);
        match self {
            Needs::Nothing | Needs::PacketSockets => Ok(Vec::new()),
            Needs::XdpSockets => {
                Ok(vec![SeccompRule::new(vec![is_not(BPF_MAP_UPDATE_ELEM)?, is_not(BPF_LINK_CREATE)?])?])
            }
        }
    }
}

/// A user as `/etc/passwd` knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The name.
    pub name: String,
    /// Its number.
    pub uid: u32,
    /// That of its group.
    pub gid: u32,
}

/// Why privileges cannot be given up.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// There is no such user.
    #[error("--user {0}: there is no such user in /etc/passwd; make one with `useradd --system {0}`")]
    NoUser(String),
    /// Nothing is given up by becoming root.
    #[error("--user {0} is root: name an ordinary user, or leave --user out")]
    Root(String),
    /// A file cannot be handed over.
    #[error("cannot give {} to user {user}: {error}", .path.display())]
    HandOver {
        /// The file.
        path: PathBuf,
        /// To whom.
        user: String,
        /// Why.
        error: io::Error,
    },
    /// The kernel refused.
    #[error("cannot {what}: {error}")]
    Kernel {
        /// What it should do.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// The filter cannot be made or installed.
    #[error("cannot install the system call filter: {0}")]
    Filter(String),
}

impl User {
    /// Looks a name up.
    ///
    /// # Errors
    /// [`ConfineError::NoUser`], [`ConfineError::Root`].
    pub fn named(name: &str) -> Result<User, ConfineError> {
        let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let user = parse_user(&text, name).ok_or_else(|| ConfineError::NoUser(name.to_owned()))?;
        if user.uid == 0 { Err(ConfineError::Root(name.to_owned())) } else { Ok(user) }
    }

    /// Gives the user a folder and the files that lie right in it, so that it can go on using what root has made. Links in it are not followed,
    /// nor are folders: one that was named by mistake is not lost as a whole.
    ///
    /// # Errors
    /// [`ConfineError::HandOver`].
    pub fn take(&self, path: &Path) -> Result<(), ConfineError> {
        let failed = |path: &Path| {
            let (path, user) = (path.to_owned(), self.name.clone());
            move |error| ConfineError::HandOver { path, user, error }
        };
        chown(path, Some(self.uid), Some(self.gid)).map_err(failed(path))?;
        for entry in fs::read_dir(path).map_err(failed(path))? {
            let entry = entry.map_err(failed(path))?;
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                let path = entry.path();
                lchown(&path, Some(self.uid), Some(self.gid)).map_err(failed(&path))?;
            }
        }
        Ok(())
    }

    /// Makes the folder that a socket is to lie in, for this user. One that is there stays whose it is.
    ///
    /// # Errors
    /// [`ConfineError::HandOver`].
    pub fn take_folder_of(&self, socket: &Path) -> Result<(), ConfineError> {
        let Some(folder) =
            socket.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists())
        else {
            return Ok(());
        };
        fs::create_dir_all(folder).map_err(|error| ConfineError::HandOver {
            path: folder.to_owned(),
            user: self.name.clone(),
            error,
        })?;
        self.take(folder)
    }
}

fn parse_user(passwd: &str, name: &str) -> Option<User> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let fields = fields.into_iter().find(|fields| fields.first() == Some(&name))?;
    let number = |at: usize| fields.get(at).and_then(|field| field.parse().ok());
    Some(User { name: name.to_owned(), uid: number(2)?, gid: number(3)? })
}

/// Gives up what is not needed any more, but for what `needs` names.
///
/// # Errors
/// [`ConfineError`]: the daemon is to end, for it would run with more than was asked for.
pub fn confine(user: Option<&User>, needs: Needs) -> Result<(), ConfineError> {
    let kernel = |what| move |error: rustix::io::Errno| ConfineError::Kernel { what, error: error.into() };
    let programs = filters(needs).map_err(|error| ConfineError::Filter(error.to_string()))?;
    let kept = needs.capabilities();
    if let Some(user) = user {
        for bit in 0..CAPABILITIES_MAX {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            if !kept.contains(capability) && remove_capability_from_bounding_set(capability).is_err() {
                break;
            }
        }
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        set_keep_capabilities(true).map_err(kernel("keep capabilities"))?;
        set_thread_groups(&[]).map_err(kernel("leave root's groups"))?;
        set_thread_res_gid(gid, gid, gid).map_err(kernel("take the user's group"))?;
        set_thread_res_uid(uid, uid, uid).map_err(kernel("become the user"))?;
    }
    // Root without `--user` stays root. An ordinary user may have been started with capabilities (systemd's AmbientCapabilities).
    if !geteuid().is_root() {
        let kept = kept & capabilities(None).map_err(kernel("look at capabilities"))?.permitted;
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
        set_capabilities(None, sets).map_err(kernel("drop capabilities"))?;
    }
    set_no_new_privs(true).map_err(kernel("renounce new privileges"))?;
    for program in programs {
        seccompiler::apply_filter(&program).map_err(|error| ConfineError::Filter(error.to_string()))?;
    }
    Ok(())
}

/// What is forbidden, and a filter of its own for `clone3`: its flags lie in memory, where no filter looks, so it is said not to exist, and the C
/// library takes `clone`, of which only threads are allowed.
fn filters(needs: Needs) -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let process = SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64);
    let process = SeccompCondition::new(0, SeccompCmpArgLen::Qword, process, 0)?;
    let mut forbidden: BTreeMap<i64, Vec<SeccompRule>> =
        FORBIDDEN.iter().chain(&FORBIDDEN_OLD).map(|call| (*call, Vec::new())).collect();
    forbidden.insert(libc::SYS_clone, vec![SeccompRule::new(vec![process])?]);
    forbidden.insert(libc::SYS_bpf, needs.bpf_rules()?);
    let unknown = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let filter = |calls, errno: i32| {
        let refused = SeccompAction::Errno(errno as u32);
        SeccompFilter::new(calls, SeccompAction::Allow, refused, std::env::consts::ARCH.try_into()?)?
            .try_into()
    };
    Ok([filter(forbidden, libc::EPERM)?, filter(unknown, libc::ENOSYS)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_its_whole_name() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\ncirrus:x:7:8::/:/bin/false\ncirro:x:101:102::/:/bin/false\nbad:x:a:1::/:\n";
        let user = parse_user(passwd, "cirro").unwrap();
        assert_eq!((user.uid, user.gid), (101, 102));
        assert_eq!(
            (parse_user(passwd, "cirr"), parse_user(passwd, "bad"), parse_user(passwd, "")),
            (None, None, None)
        );
        assert!(User::named("root").unwrap_err().to_string().contains("is root"));
        assert!(User::named("no-such-user-here").unwrap_err().to_string().contains("useradd"));
    }

    /// In a thread of its own: what it gives up stays given up.
    #[test]
    fn a_confined_thread_runs_no_programs_and_starts_threads_all_the_same() {
        let confined = std::thread::spawn(|| {
            confine(None, Needs::PacketSockets).unwrap();
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            std::process::Command::new("true").status()
        });
        assert_eq!(confined.join().unwrap().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(std::process::Command::new("true").status().unwrap().success(), "other threads are free");
    }
}
