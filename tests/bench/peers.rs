//! The systems that are compared: each a vhost-user-blk back-end on the VM host, with whatever it needs on the storage machine.
//!
//! Knows command lines. A volume is a file in memory, filled, one for each system.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cirro_tests::daemons::{Daemon, Launch, Scratch, qemu_storage_daemon};
use cirro_tests::netns::{INTERFACE, Lab};
use clap::ValueEnum;

use crate::aoe;
use crate::machine::{Placement, pin};

pub(crate) const VOLUME_BYTES: u64 = 1 << 30;
/// Ports of the two NBD servers, IANA's and the next.
const NBDKIT_PORT: u16 = 10809;
const QEMU_NBD_PORT: u16 = 10810;

/// A system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Peer {
    /// cirro-backend and cirro-node.
    Ours,
    /// The same of another build, of the folder that --also names.
    Also,
    /// cirro-backend and cirro-node on a volume in the node's memory.
    OursRam,
    /// cirro-backend and cirro-node with keys.
    OursKeys,
    /// cirro-backend and cirro-node that never spin.
    OursSleeping,
    /// cirro-backend and cirro-node with `--link-mode udp`; segmentation offloads off.
    OursUdp,
    /// The same with segmentation offloads on.
    OursUdpOffload,
    /// qemu-storage-daemon, NBD over TCP, nbdkit; segmentation offloads off.
    Nbd,
    /// The same with segmentation offloads on.
    NbdOffload,
    /// qemu-storage-daemon, NBD over TCP, qemu-nbd; segmentation offloads off.
    QemuNbd,
    /// vblade, asked by an AoE initiator of the benchmark's own.
    Vblade,
    /// qemu-storage-daemon on the file itself.
    Local,
    /// qemu-storage-daemon on nothing: what the front-end can do at most.
    Null,
}

impl Peer {
    /// Those of the main tables.
    pub(crate) const ALL: [Peer; 12] = [
        Peer::Ours,
        Peer::OursKeys,
        Peer::OursRam,
        Peer::OursUdp,
        Peer::OursUdpOffload,
        Peer::Also,
        Peer::Nbd,
        Peer::NbdOffload,
        Peer::QemuNbd,
        Peer::Vblade,
        Peer::Local,
        Peer::Null,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Peer::Ours => "cirrostratus",
            Peer::OursKeys => "cirrostratus, keys",
            Peer::Also => "cirrostratus, other build",
            Peer::OursRam => "cirrostratus, `ram:` volume",
            Peer::OursSleeping => "cirrostratus, `--poll-us 0`",
            Peer::OursUdp => "cirrostratus over UDP, offloads off",
            Peer::OursUdpOffload => "cirrostratus over UDP, offloads on",
            Peer::Nbd => "NBD over TCP, offloads off",
            Peer::NbdOffload => "NBD over TCP, offloads on",
            Peer::QemuNbd => "NBD over TCP to qemu-nbd, offloads off",
            Peer::Vblade => "AoE to vblade, from a bare socket",
            Peer::Local => "local file",
            Peer::Null => "null device",
        }
    }

    /// The name of its processes on the VM host.
    fn front(self) -> &'static str {
        match self {
            Peer::Ours => "ours",
            Peer::OursKeys => "keys",
            Peer::Also => "also",
            Peer::OursRam => "ram",
            Peer::OursSleeping => "sleeping",
            Peer::OursUdp | Peer::OursUdpOffload => "udp",
            Peer::Nbd | Peer::NbdOffload => "nbd",
            Peer::QemuNbd => "qemunbd",
            Peer::Vblade => "vblade",
            Peer::Local => "local",
            Peer::Null => "null",
        }
    }
}

/// How our daemons are run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ours {
    /// How long they spin before they sleep, in microseconds; their default without it.
    pub(crate) poll_us: Option<u32>,
    /// The folder of another build.
    pub(crate) also: Option<PathBuf>,
}

/// The daemons of the systems that were asked for, on one wire.
pub(crate) struct Peers {
    /// On the VM host, by [`Peer::front`]; nothing where the front-end asks the storage machine itself.
    front: Vec<(&'static str, Option<Daemon>)>,
    back: Vec<Daemon>,
}

impl Peers {
    pub(crate) fn start(lab: &Lab, scratch: &Scratch, wanted: &[Peer], ours: &Ours) -> Result<Peers> {
        let mut peers = Peers { front: Vec::new(), back: Vec::new() };
        for peer in wanted.iter().copied() {
            if peers.front.iter().any(|(name, _)| *name == peer.front()) {
                continue;
            }
            let daemon = peers.start_one(lab, scratch, peer, ours)?;
            peers.front.push((peer.front(), daemon));
        }
        Ok(peers)
    }

    /// Starts what serves a system, and gives what it has on the VM host.
    fn start_one(&mut self, lab: &Lab, scratch: &Scratch, peer: Peer, ours: &Ours) -> Result<Option<Daemon>> {
        Ok(Some(match peer {
            Peer::Ours | Peer::OursKeys | Peer::OursRam | Peer::OursUdp | Peer::OursUdpOffload => {
                self.start_ours(lab, scratch, peer, (ours.poll_us, None))?
            }
            Peer::OursSleeping => self.start_ours(lab, scratch, peer, (Some(0), None))?,
            Peer::Also => self.start_ours(lab, scratch, peer, (ours.poll_us, ours.also.as_deref()))?,
            Peer::Nbd | Peer::NbdOffload => {
                self.start_nbdkit(lab, scratch)?;
                nbd_client(lab, scratch, peer.front(), NBDKIT_PORT)
            }
            Peer::QemuNbd => {
                self.start_qemu_nbd(lab, scratch)?;
                nbd_client(lab, scratch, peer.front(), QEMU_NBD_PORT)
            }
            Peer::Vblade => {
                self.start_vblade(lab, scratch)?;
                return Ok(None);
            }
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
        }))
    }

    fn start_ours(
        &mut self,
        lab: &Lab,
        scratch: &Scratch,
        peer: Peer,
        (poll_us, build): (Option<u32>, Option<&Path>),
    ) -> Result<Daemon> {
        let (name, node) = (peer.front(), format!("{}-node", peer.front()));
        let path = if peer == Peer::OursRam {
            PathBuf::from(format!("ram:{VOLUME_BYTES}"))
        } else {
            filled(scratch, &format!("{name}.img"))?
        };
        let spin = poll_us.map(|us| us.to_string());
        let spin: Vec<&str> = spin.iter().flat_map(|us| ["--poll-us", us.as_str()]).collect();
        let volume = format!("{name}={}", path.display());
        let udp = ["--link-mode", "udp", "--udp-peer", lab.store().address()];
        let link: &[&str] = if peer.front() == "udp" { &udp } else { &[] };
        let keys = peer == Peer::OursKeys;
        let launch = |name| Launch::new(name).with(&spin).with(link).of_build(build).with_keys(keys);
        self.back.push(launch(&node).node(lab.store(), scratch, &[volume]));
        Ok(launch(name).with(&["--queues", "4", "--queue-size", "1024"]).backend(lab.host(), scratch, name))
    }

    fn start_nbdkit(&mut self, lab: &Lab, scratch: &Scratch) -> Result<()> {
        let path = filled(scratch, "nbd.img")?;
        let (store, pid_file) = (lab.store(), scratch.path("nbdkit.pid"));
        let mut command = store.namespace().command("nbdkit");
        command.args(["--foreground", "--ipaddr", store.address(), "--port", &NBDKIT_PORT.to_string()]);
        command.arg("--pidfile").arg(&pid_file).arg("file").arg(&path);
        self.push_server(Daemon::start(scratch, "nbdkit", &mut command), &pid_file);
        Ok(())
    }

    fn start_qemu_nbd(&mut self, lab: &Lab, scratch: &Scratch) -> Result<()> {
        let path = filled(scratch, "qemunbd.img")?;
        let (store, pid_file) = (lab.store(), scratch.path("qemu-nbd.pid"));
        let mut command = store.namespace().command("qemu-nbd");
        command.args(["--persistent", "--format=raw", "--bind", store.address()]);
        command.args(["--port", &QEMU_NBD_PORT.to_string(), "--pid-file"]).arg(&pid_file).arg(&path);
        self.push_server(Daemon::start(scratch, "qemu-nbd", &mut command), &pid_file);
        Ok(())
    }

    fn start_vblade(&mut self, lab: &Lab, scratch: &Scratch) -> Result<()> {
        let mut command = lab.store().namespace().command("vblade");
        command.args([aoe::SHELF.to_string(), aoe::SLOT.to_string(), INTERFACE.to_owned()]);
        command.arg(filled(scratch, "vblade.img")?);
        self.back.push(Daemon::start(scratch, "vblade", &mut command));
        Ok(())
    }

    fn push_server(&mut self, mut server: Daemon, pid_file: &Path) {
        server.wait_until("listened", |_| pid_file.exists());
        self.back.push(server);
    }

    pub(crate) fn socket(&self, scratch: &Scratch, peer: Peer) -> PathBuf {
        scratch.path(&format!("{}.sock", peer.front()))
    }

    /// Sets the wire and the processors as `peer` is to have them.
    pub(crate) fn prepare(&self, lab: &Lab, peer: Peer, placement: Placement) -> Result<()> {
        let offload = matches!(peer, Peer::NbdOffload | Peer::OursUdpOffload);
        lab.machines().iter().for_each(|machine| machine.set_segmentation_offload(offload));
        let front = self.front.iter().filter_map(|(_, daemon)| daemon.as_ref());
        front.map(Daemon::pid).try_for_each(|process| pin(process, placement, 0))?;
        self.back.iter().try_for_each(|daemon| pin(daemon.pid(), placement, 1))
    }
}

fn nbd_client(lab: &Lab, scratch: &Scratch, name: &str, port: u16) -> Daemon {
    let server = format!("server.type=inet,server.host={},server.port={port}", lab.store().address());
    qemu(lab, scratch, name, &format!("driver=nbd,node-name=disk,{server}"))
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
