//! Another size for a volume that is served.
//!
//! Knows files and what of them may be cut off; does not know sessions: whoever serves the volume is asked to serve another size. What grows is
//! stable before that, what becomes smaller is not served any more when its end is cut. Called on the control thread.

use std::io::{self, SeekFrom as From};
use std::path::PathBuf;

use cirro_ctl::size::show;
use cirro_protocol::types::{SECTOR_BYTES, Uuid, VolumeName};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::Volume;

/// The volume is served with its new size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// The capacity before.
    pub sectors_before: u64,
    /// Sessions that have it open and are told.
    pub sessions: u32,
}

/// Why a volume goes on with the size it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It is not served.
    #[error("it is not served yet; try again when `cirroctl status` shows that it is")]
    NotServed,
    /// It was to become smaller.
    #[error("{0} session(s) have it open; end the backends that use it, then try again")]
    Open(u32),
    /// As before; who holds it may have something to write again.
    #[error("attachment {0} holds it for writing; start its backend, end it with SIGTERM, then try again")]
    Held(Uuid),
    /// As before; changes are not done yet.
    #[error("changes of it are under way; try again")]
    Busy,
    /// The worker has ended.
    #[error("the node is ending; start it again and look at the size with `cirroctl status`")]
    Ending,
}

/// Why a volume keeps its size; nothing was changed.
#[derive(Debug, thiserror::Error)]
#[error("volume {name}: has {} and stays so, not {}: {why}", show(*.has), show(*.asked))]
pub struct ResizeError {
    name: VolumeName,
    has: u64,
    asked: u64,
    why: Box<Why>,
}

#[derive(Debug, thiserror::Error)]
enum Why {
    #[error("it is served read-only; serve it without ro to change its size")]
    ReadOnly,
    #[error(
        "it is memory of the node, which is taken at the start; name the new size in the configuration and start the node again (the data ends with the old one)"
    )]
    InMemory,
    #[error("a size is a multiple of its blocks of {block_bytes} bytes, and not 0; give {fit}")]
    Blocks { block_bytes: u32, fit: u64 },
    #[error("{} is a block device, whose size is not ours to change; change it with the device's own tools, then give the size that it has ({has})", .path.display())]
    Device { path: PathBuf, has: u64 },
    #[error(
        "it would lose data, which begins at byte {at} behind the new end; keep the size, or discard what is there in a guest first"
    )]
    Data { at: u64 },
    #[error("{}: {what}: {error}", .path.display())]
    Io { path: PathBuf, what: &'static str, error: io::Error },
    #[error(transparent)]
    Unfit(#[from] Unfit),
}

impl Volume {
    /// Gives the volume, which is served, a size of `bytes`. `serve` serves it with a capacity in sectors from then on; it refuses a smaller
    /// one while the volume is used.
    ///
    /// # Errors
    /// [`ResizeError`].
    pub fn resize(
        &self,
        bytes: u64,
        mut serve: impl FnMut(u64) -> Result<Told, Unfit>,
    ) -> Result<Told, ResizeError> {
        let sectors = bytes / SECTOR_BYTES as u64;
        let has = self.file_bytes().unwrap_or(self.capacity_sectors * SECTOR_BYTES as u64);
        let refused = |why| ResizeError { name: self.name, has, asked: bytes, why: Box::new(why) };
        self.check_size(bytes, has).map_err(refused)?;
        if self.identity.is_device || bytes >= has {
            self.grow(has, bytes).map_err(refused)?;
            return serve(sectors).map_err(|unfit| refused(unfit.into()));
        }
        // Looked for twice: before anything is changed, and when nobody can write there any more.
        self.refuse_data_behind(bytes).map_err(refused)?;
        let told = serve(sectors).map_err(|unfit| refused(unfit.into()))?;
        if let Err(why) = self.refuse_data_behind(bytes).and_then(|()| self.set_length(has, bytes)) {
            if let Err(unfit) = serve(told.sectors_before) {
                log::error!("volume {}: cannot be served with its old size again: {unfit}", self.name);
            }
            return Err(refused(why));
        }
        Ok(told)
    }

    fn check_size(&self, bytes: u64, has: u64) -> Result<(), Why> {
        let block = u64::from(self.block_bytes);
        let fit = |bytes: u64| (bytes / block).max(1) * block;
        if self.read_only {
            return Err(Why::ReadOnly);
        }
        if self.is_volatile() {
            return Err(Why::InMemory);
        }
        if bytes == 0 || !bytes.is_multiple_of(block) {
            return Err(Why::Blocks { block_bytes: self.block_bytes, fit: fit(bytes) });
        }
        if self.identity.is_device && bytes != fit(has) {
            return Err(Why::Device { path: self.path.clone(), has: fit(has) });
        }
        Ok(())
    }

    fn grow(&self, has: u64, bytes: u64) -> Result<(), Why> {
        if self.identity.is_device {
            return Ok(());
        }
        // The kernel ends a process that makes a file longer than this (setrlimit(2)).
        if getrlimit(Resource::Fsize).current.is_some_and(|most| bytes > most) {
            return Err(self.failed("the process may not make files so long (ulimit -f)", Errno::FBIG.into()));
        }
        self.set_length(has, bytes)
    }

    /// Makes the file shorter or longer, and that stable; it is as it was when that fails. On a description of its own: an error of an earlier write that this
    /// fsync is told stays to be told to a guest's flush.
    fn set_length(&self, has: u64, bytes: u64) -> Result<(), Why> {
        if has != bytes {
            self.sizer.set_len(bytes).map_err(|error| self.failed("cannot change its length", error))?;
        }
        self.sizer.sync_all().map_err(|error| {
            if let Err(again) = self.sizer.set_len(has) {
                log::error!(
                    "volume {}: {}: its length is {bytes} bytes now: {again}",
                    self.name,
                    self.path.display()
                );
            }
            self.failed("cannot make its new length stable", error)
        })
    }

    fn refuse_data_behind(&self, bytes: u64) -> Result<(), Why> {
        match rustix::fs::seek(&*self.sizer, SeekFrom::Data(bytes)) {
            Ok(at) => Err(Why::Data { at }),
            // No data up to the end (lseek(2)).
            Err(Errno::NXIO) => Ok(()),
            Err(error) => Err(self.failed("cannot tell where its data ends", error.into())),
        }
    }

    fn file_bytes(&self) -> io::Result<u64> {
        io::Seek::seek(&mut &*self.sizer, From::End(0))
    }

    fn failed(&self, what: &'static str, error: io::Error) -> Why {
        Why::Io { path: self.path.clone(), what, error }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    struct Served {
        _dir: tempfile::TempDir,
        path: PathBuf,
        volume: Volume,
    }

    fn served(bytes: u64, options: &str) -> Served {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("v.img");
        File::create(&path).and_then(|file| file.set_len(bytes)).unwrap();
        let volume = Volume::open(&format!("v={}{options}", path.display()).parse().unwrap()).unwrap();
        Served { _dir: dir, path, volume }
    }

    impl Served {
        fn length(&self) -> u64 {
            std::fs::metadata(&self.path).unwrap().len()
        }

        /// Resizes it with somebody who serves what he is asked to; gives what he was asked, in order.
        fn resize(&self, bytes: u64) -> (Vec<(u64, u64)>, Result<Told, String>) {
            let mut asked = Vec::new();
            let result = self.volume.resize(bytes, |sectors| {
                asked.push((sectors, self.length()));
                Ok(Told { sectors_before: MIB / 512, sessions: 1 })
            });
            (asked, result.map_err(|error| error.to_string()))
        }
    }

    #[test]
    fn a_file_is_longer_before_anybody_is_told() {
        let v = served(MIB, "");
        let (asked, told) = v.resize(4 * MIB);
        assert_eq!(asked, [(4 * MIB / 512, 4 * MIB)], "told once, when the file had its new length");
        assert_eq!(told, Ok(Told { sectors_before: MIB / 512, sessions: 1 }));
        let (asked, _) = v.resize(4 * MIB);
        assert_eq!(asked, [(4 * MIB / 512, 4 * MIB)], "again: whoever serves it knows that nothing is new");
    }

    #[test]
    fn nothing_behind_the_new_end_is_cut_off_but_holes() {
        let v = served(MIB, "");
        File::options().write(true).open(&v.path).unwrap().write_all_at(b"x", 700 << 10).unwrap();
        let (asked, refused) = v.resize(512 << 10);
        let refused = refused.unwrap_err();
        assert!(
            refused.starts_with("volume v: has 1M and stays so, not 512K: it would lose data"),
            "{refused}"
        );
        assert!(refused.contains(&format!("at byte {}", 700 << 10)), "{refused}");
        assert_eq!((asked.len(), v.length()), (0, MIB));
        let (asked, told) = v.resize(768 << 10);
        assert_eq!(asked, [((768 << 10) / 512, MIB)], "not served any more before it is cut");
        assert_eq!((told.is_ok(), v.length()), (true, 768 << 10));
    }

    /// A write that lands after the first look, before the volume was served smaller.
    #[test]
    fn what_was_written_while_it_was_asked_is_not_cut_off() {
        let v = served(MIB, "");
        let mut asked = Vec::new();
        let result = v.volume.resize(512 << 10, |sectors| {
            if asked.is_empty() {
                File::options().write(true).open(&v.path).unwrap().write_all_at(b"x", 700 << 10).unwrap();
            }
            asked.push(sectors);
            Ok(Told { sectors_before: MIB / 512, sessions: 0 })
        });
        assert!(result.unwrap_err().to_string().contains("lose data"));
        assert_eq!((asked, v.length()), (vec![1024, 2048], MIB), "served with its old size again");
    }

    #[test]
    fn who_uses_it_keeps_it_from_becoming_smaller() {
        let v = served(MIB, "");
        for unfit in
            [Unfit::Open(2), Unfit::Held(Uuid([7; 16])), Unfit::Busy, Unfit::NotServed, Unfit::Ending]
        {
            let refused = v.volume.resize(512 << 10, |_| Err(unfit)).unwrap_err().to_string();
            assert_eq!(refused, format!("volume v: has 1M and stays so, not 512K: {unfit}"));
            assert_eq!(v.length(), MIB);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_in_one_line_and_changes_nothing() {
        let refused = |v: &Served, bytes| {
            let (asked, refused) = v.resize(bytes);
            assert!(asked.is_empty());
            let refused = refused.unwrap_err();
            assert!(
                !refused.contains('\n') && refused.starts_with("volume v: has 1M and stays so, not "),
                "{refused}"
            );
            refused
        };
        let v = served(MIB, ",io=buffered");
        assert!(refused(&v, 2 * MIB + 100).ends_with("of 512 bytes, and not 0; give 2097152"));
        assert!(refused(&v, 0).ends_with("give 512"));
        // Longer than any file system lets a file be: EFBIG, or EINVAL above what a number of 63 bits holds.
        for bytes in [i64::MAX as u64 / 512 * 512, u64::MAX / 512 * 512] {
            assert!(refused(&v, bytes).contains("cannot change its length"));
        }
        assert!(refused(&served(MIB, ",ro"), 2 * MIB).contains("read-only"));
        assert_eq!(v.length(), MIB);
        let memory = Volume::open(&"v=ram:1M".parse().unwrap()).unwrap();
        let error = memory.resize(2 * MIB, |_| panic!("nobody is asked")).unwrap_err().to_string();
        assert!(
            error.starts_with("volume v: has 1M and stays so, not 2M: it is memory of the node"),
            "{error}"
        );
    }
}
