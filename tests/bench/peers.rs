//! The systems that are compared: each a vhost-user-blk back-end on the VM host, with whatever it needs on the storage machine.
//!
//! Knows command lines. A volume is a file in memory, filled, one for each system.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cirro_tests::daemons::{Daemon, Launch, Scratch, qemu_storage_daemon};
use cirro_tests::netns::Lab;
use clap::ValueEnum;

use crate::machine::{Placement, pin};

pub(crate) const VOLUME_BYTES: u64 = 1 << 30;
const NBD_PORT: u16 = 10809;

/// A system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Peer {
    /// cirro-backend and cirro-node.
    Ours,
    /// qemu-storage-daemon, NBD over TCP, nbdkit; segmentation offloads off.
    Nbd,
    /// The same with segmentation offloads on.
    NbdOffload,
    /// qemu-storage-daemon on the file itself.
    Local,
    /// qemu-storage-daemon on nothing: what the front-end can do at most.
    Null,
}

impl Peer {
    pub(crate) const ALL: [Peer; 5] = [Peer::Ours, Peer::Nbd, Peer::NbdOffload, Peer::Local, Peer::Null];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Peer::Ours => "cirrostratus",
            Peer::Nbd => "NBD over TCP, offloads off",
            Peer::NbdOffload => "NBD over TCP, offloads on",
            Peer::Local => "local file",
            Peer::Null => "null device",
        }
    }

    /// The name of its processes on the VM host.
    fn front(self) -> &'static str {
        match self {
            Peer::Ours => "ours",
            Peer::Nbd | Peer::NbdOffload => "nbd",
            Peer::Local => "local",
            Peer::Null => "null",
        }
    }
}

/// The daemons of the systems that were asked for.
pub(crate) struct Peers {
    all: Vec<Peer>,
    /// On the VM host, by [`Peer::front`].
    front: Vec<(&'static str, Daemon)>,
    back: Vec<Daemon>,
}

impl Peers {
    pub(crate) fn start(lab: &Lab, scratch: &Scratch, only: &[Peer], poll_us: Option<u32>) -> Result<Peers> {
        let all: Vec<Peer> =
            Peer::ALL.into_iter().filter(|peer| only.is_empty() || only.contains(peer)).collect();
        let mut peers = Peers { all, front: Vec::new(), back: Vec::new() };
        for peer in peers.all.clone() {
            if peers.front.iter().any(|(name, _)| *name == peer.front()) {
                continue;
            }
            let daemon = match peer {
                Peer::Ours => peers.start_ours(lab, scratch, poll_us)?,
                Peer::Nbd | Peer::NbdOffload => peers.start_nbd(lab, scratch)?,
                Peer::Local => {
                    let path = filled(scratch, "local.img")?;
                    qemu(
                        lab,
                        scratch,
                        "local",
                        &format!("driver=file,node-name=disk,filename={}", path.display()),
                    )
                }
                Peer::Null => {
                    qemu(lab, scratch, "null", &format!("driver=null-co,node-name=disk,size={VOLUME_BYTES}"))
                }
            };
            peers.front.push((peer.front(), daemon));
        }
        Ok(peers)
    }

    fn start_ours(&mut self, lab: &Lab, scratch: &Scratch, poll_us: Option<u32>) -> Result<Daemon> {
        let path = filled(scratch, "ours.img")?;
        let spin = poll_us.map(|us| us.to_string());
        let spin: Vec<&str> = spin.iter().flat_map(|us| ["--poll-us", us.as_str()]).collect();
        let volume = format!("disk={}", path.display());
        self.back.push(Launch::new("node").node(lab.store(), scratch, &[volume]));
        Ok(Launch::new("ours").with(&["--queues", "4"]).with(&spin).backend(lab.host(), scratch, "disk"))
    }

    fn start_nbd(&mut self, lab: &Lab, scratch: &Scratch) -> Result<Daemon> {
        let path = filled(scratch, "nbd.img")?;
        let (store, pid_file) = (lab.store(), scratch.path("nbdkit.pid"));
        let mut command = store.namespace().command("nbdkit");
        command.args([
            "--foreground",
            "--ipaddr",
            store.address(),
            "--port",
            &NBD_PORT.to_string(),
            "--pidfile",
        ]);
        command.arg(&pid_file).arg("file").arg(&path);
        let mut nbdkit = Daemon::start(scratch, "nbdkit", &mut command);
        nbdkit.wait_until("listened", |_| pid_file.exists());
        self.back.push(nbdkit);
        let (host, port) = (store.address(), NBD_PORT);
        let server = format!("server.type=inet,server.host={host},server.port={port}");
        Ok(qemu(lab, scratch, "nbd", &format!("driver=nbd,node-name=disk,{server}")))
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = Peer> + '_ {
        self.all.iter().copied()
    }

    pub(crate) fn socket(&self, scratch: &Scratch, peer: Peer) -> PathBuf {
        scratch.path(&format!("{}.sock", peer.front()))
    }

    /// Sets the wire and the processors as `peer` is to have them.
    pub(crate) fn prepare(&self, lab: &Lab, peer: Peer, placement: Placement) -> Result<()> {
        lab.machines().iter().for_each(|machine| machine.set_segmentation_offload(peer == Peer::NbdOffload));
        self.front.iter().try_for_each(|(_, daemon)| pin(daemon.pid(), placement, 0))?;
        self.back.iter().try_for_each(|daemon| pin(daemon.pid(), placement, 1))
    }
}

/// On an I/O thread of its own, which spins for a short while before it sleeps: the faster way to run it.
fn qemu(lab: &Lab, scratch: &Scratch, name: &str, blockdev: &str) -> Daemon {
    let mut command = lab.host().namespace().command("qemu-storage-daemon");
    command.args(["--object", "iothread,id=io"]);
    qemu_storage_daemon(scratch, name, blockdev, command)
}

/// A volume whose every page is there.
fn filled(scratch: &Scratch, name: &str) -> Result<PathBuf> {
    let path = scratch.path(name);
    fill(&path).with_context(|| format!("{} cannot be filled", path.display()))?;
    Ok(path)
}

fn fill(path: &Path) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    let chunk: Vec<u8> =
        (0..1 << 20).map(|index: u32| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    (0..VOLUME_BYTES / chunk.len() as u64).try_for_each(|_| file.write_all(&chunk))
}
