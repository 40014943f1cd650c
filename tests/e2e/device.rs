//! A disk below the node that can hang, lie and lose power: a loop device on a file that `qemu-storage-daemon` serves through FUSE.
//!
//! This machine's kernel has no device-mapper, so the layers that spoil a disk are QEMU's: one whose first flush fails, and one that logs every
//! write and flush in the order in which they came, from which the disk is made as a power cut may have left it. Does not know who
//! uses the device. Used by `storage` and `power`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cirro_tests::daemons::{Daemon, Scratch};
use cirro_tests::netns::shell;

const SECTOR: usize = 512;

/// What is between the loop device and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// Nothing.
    None,
    /// The first flush ends with EIO, every later one with OK.
    FirstFlushFails,
    /// A log of every write and flush.
    Log,
}

/// A block device whose server can be stopped and killed.
pub(crate) struct Device {
    server: Option<Daemon>,
    export: PathBuf,
    log: PathBuf,
    /// The loop device.
    pub(crate) path: PathBuf,
}

impl Device {
    /// On the image `NAME.base`, which is there.
    pub(crate) fn new(scratch: &Scratch, name: &str, layer: Layer) -> Device {
        let [image, export, log] =
            ["base", "export", "writes"].map(|end| scratch.path(&format!("{name}.{end}")));
        File::create(&export).expect("a file can be made");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-storage-daemon"]);
        let below = if layer == Layer::None { "disk" } else { "file" };
        command.arg("--blockdev").arg(format!("driver=file,node-name={below},filename={}", image.display()));
        match layer {
            Layer::None => {}
            Layer::FirstFlushFails => {
                let rule = "inject-error.0.event=none,inject-error.0.iotype=flush,inject-error.0.errno=5,inject-error.0.once=on";
                command.arg("--blockdev").arg(format!("driver=blkdebug,node-name=disk,image=file,{rule}"));
            }
            Layer::Log => {
                File::create(&log).expect("a file can be made");
                command
                    .arg("--blockdev")
                    .arg(format!("driver=file,node-name=log,filename={}", log.display()));
                let logged = "driver=blklogwrites,node-name=disk,file=file,log=log,log-sector-size=512";
                command.args(["--blockdev", logged]);
            }
        }
        let mountpoint = export.display();
        command.arg("--export");
        command.arg(format!("type=fuse,id=export,node-name=disk,mountpoint={mountpoint},writable=on"));
        let mut server = Daemon::start(scratch, name, &mut command);
        let size = std::fs::metadata(&image).expect("the image is there").len();
        let served = |_: &Daemon| std::fs::metadata(&export).is_ok_and(|found| found.len() == size);
        server.wait_until("served its file", served);
        let found = shell(&format!("losetup --find --show {}", export.display()));
        Device { server: Some(server), export, log, path: found.trim().into() }
    }

    /// What serves it.
    pub(crate) fn server(&self) -> &Daemon {
        self.server.as_ref().expect("it was not killed yet")
    }

    /// Takes the power away: what was not done is not done any more. Gives the log.
    pub(crate) fn cut_power(mut self) -> Log {
        self.server().kill_now();
        self.server.take().expect("it was not killed yet").kill();
        Log(self.log.clone())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // The server ends first: nothing can be asked of the device any more, and nothing waits for it.
        drop(self.server.take());
        let (device, export) = (self.path.display(), self.export.display());
        quietly(&format!("losetup --detach {device}; umount --lazy {export}; rm -f {export}"));
    }
}

/// A file system on a device.
pub(crate) struct Mounted {
    /// Where.
    pub(crate) at: PathBuf,
}

impl Mounted {
    pub(crate) fn new(scratch: &Scratch, device: &Path, name: &str) -> Mounted {
        let at = scratch.path(name);
        std::fs::create_dir(&at).expect("a folder can be made");
        shell(&format!("mount {} {}", device.display(), at.display()));
        Mounted { at }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        quietly(&format!("umount {0} || umount --lazy {0}", self.at.display()));
    }
}

fn quietly(line: &str) {
    let _ = Command::new("sh").args(["-c", line]).stderr(Stdio::null()).status();
}

/// What a device was asked to do, in order.
pub(crate) struct Log(PathBuf);

/// How much was asked for since the last flush, and how much of that was lost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lost {
    pub(crate) sectors_unflushed: u64,
    pub(crate) sectors_lost: u64,
}

/// An entry of the log: the format is the kernel's for its log-writes target (Documentation/admin-guide/device-mapper/log-writes.rst).
struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
}

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

impl Entry {
    /// None where the log ends.
    fn read(log: &File, at: u64) -> Option<Entry> {
        let mut head = [0; 24];
        log.read_exact_at(&mut head, at).ok()?;
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let entry = Entry { sector: word(0), sectors: word(8), flags: word(16) };
        (entry.sectors > 0 || entry.flags != 0).then_some(entry)
    }

    fn data_sectors(&self) -> u64 {
        if self.flags & DISCARD == 0 { self.sectors } else { 0 }
    }
}

impl Log {
    /// Makes `to` the disk as it may be after the power cut, from `from`, as it was when the log began: all up to the last flush, and of each
    /// later sector the new content or the old one, by `seed`.
    pub(crate) fn replay(&self, from: &Path, to: &Path, seed: u64) -> Lost {
        std::fs::copy(from, to).expect("an image can be copied");
        let log = File::open(&self.0).expect("the log is there");
        let disk = File::options().write(true).open(to).expect("the copy is there");
        let stable = self.last_flush(&log);
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut lost, mut at) = (Lost::default(), SECTOR as u64);
        while let Some(entry) = Entry::read(&log, at) {
            let data = at + SECTOR as u64;
            for index in 0..entry.data_sectors() {
                let unflushed = at > stable && entry.flags & FUA == 0;
                lost.sectors_unflushed += u64::from(unflushed);
                if unflushed && random.bool() {
                    lost.sectors_lost += 1;
                    continue;
                }
                let mut sector = [0; SECTOR];
                if log.read_exact_at(&mut sector, data + index * SECTOR as u64).is_err() {
                    break;
                }
                disk.write_all_at(&sector, (entry.sector + index) * SECTOR as u64).expect("it has room");
            }
            at = data + entry.data_sectors() * SECTOR as u64;
        }
        lost
    }

    /// Where the entry of the last flush is; the first entry is behind the log's own head, which has one sector.
    fn last_flush(&self, log: &File) -> u64 {
        let (mut stable, mut at) = (0, SECTOR as u64);
        while let Some(entry) = Entry::read(log, at) {
            if entry.flags & FLUSH != 0 {
                stable = at;
            }
            at += (1 + entry.data_sectors()) * SECTOR as u64;
        }
        stable
    }
}
