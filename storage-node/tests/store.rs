//! The stores on real files: the serving one does what the simple one does, on every kind of file this machine has, and says what fails.
//!
//! Knows the [`Store`] trait and files; nothing of volumes.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use cirro_node::buffers::Pool;
use cirro_node::store::pread::PreadStore;
use cirro_node::store::uring::UringStore;
use cirro_node::store::{
    Cached, Completion, FileId, Request, STORE_REQUESTS_MAX, Store, StoreError, StoreFile, StoreOp,
};
use cirro_node::volume::Volume;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const BYTES: u64 = 4 << 20;

/// A store under test with a pool and one file.
struct Bench<S> {
    store: S,
    pool: Pool,
    file: FileId,
}

impl<S: Store> Bench<S> {
    fn request(&mut self, op: StoreOp, offset: u64, len: u64, fill: u8, token: u32) -> Request {
        let buffer = matches!(op, StoreOp::Read | StoreOp::Write).then(|| {
            let mut buffer = self.pool.take(len as usize).expect("the pool has room");
            buffer.bytes_mut().fill(fill);
            buffer
        });
        Request { file: self.file, op, offset, len, buffer, token }
    }

    fn submit(&mut self, op: StoreOp, offset: u64, len: u64, fill: u8, token: u32) {
        let request = self.request(op, offset, len, fill, token);
        self.store.submit(request).expect("there is room");
    }

    /// Does one request and gives its result and the bytes it read.
    fn run(&mut self, op: StoreOp, offset: u64, len: u64, fill: u8) -> (Result<(), StoreError>, Vec<u8>) {
        self.submit(op, offset, len, fill, 7);
        self.store.push();
        let completion = self.next();
        assert_eq!((completion.token, completion.op), (7, op));
        let bytes = completion.buffer.map_or(Vec::new(), |buffer| {
            let bytes = buffer.bytes().to_vec();
            self.pool.give_back(buffer);
            bytes
        });
        (completion.result, bytes)
    }

    fn next(&mut self) -> Completion {
        let start = std::time::Instant::now();
        loop {
            if let Some(completion) = self.store.complete() {
                return completion;
            }
            self.store.push();
            assert!(start.elapsed().as_secs() < 20, "the request never ends");
            std::thread::yield_now();
        }
    }
}

fn open(path: &Path, flags: i32) -> Arc<File> {
    Arc::new(
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).expect("the file opens"),
    )
}

fn sparse(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    File::create(&path).and_then(|file| file.set_len(BYTES)).expect("a sparse file can be made");
    path
}

fn uring(file: StoreFile) -> Bench<UringStore> {
    let mut store = UringStore::new().expect("io_uring is there");
    let file = store.attach(file);
    Bench { store, pool: Pool::new(16 << 20), file }
}

fn pread(file: StoreFile) -> Bench<PreadStore> {
    let mut store = PreadStore::new();
    let file = store.attach(file);
    Bench { store, pool: Pool::new(16 << 20), file }
}

/// A loop device over a file, detached at the end.
struct Loop(String);

impl Loop {
    /// `None` where loop devices cannot be had (no privilege).
    fn over(path: &Path) -> Option<Loop> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(path).output().ok()?;
        let name = String::from_utf8(made.stdout).ok()?.trim().to_owned();
        (made.status.success() && !name.is_empty()).then_some(Loop(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// What a step does and in which 4 KiB blocks.
type Step = (u8, u64, u64, u8);

/// The same steps on both stores and on a model; every read must agree.
fn agree(
    serving: &mut Bench<UringStore>,
    simple: &mut Bench<PreadStore>,
    steps: &[Step],
) -> Result<(), TestCaseError> {
    let mut model = vec![0u8; BYTES as usize];
    let blocks = BYTES / 4096;
    for &(kind, block, count, fill) in steps {
        let (offset, len) = (block % blocks * 4096, count.min(blocks - block % blocks) * 4096);
        let range = offset as usize..(offset + len) as usize;
        let op = [
            StoreOp::Read,
            StoreOp::Write,
            StoreOp::Write,
            StoreOp::Discard,
            StoreOp::WriteZeroes,
            StoreOp::Flush,
        ][usize::from(kind) % 6];
        let (a, read_a) = serving.run(op, offset, len, fill);
        let (b, read_b) = simple.run(op, offset, len, fill);
        prop_assert_eq!(a, Ok(()), "{:?} at {}", op, offset);
        prop_assert_eq!(b, Ok(()));
        match op {
            StoreOp::Read => {
                prop_assert!(
                    read_a == model[range.clone()],
                    "the serving store's data at {} differs",
                    offset
                );
                prop_assert!(read_b == model[range], "the simple store's data at {} differs", offset);
            }
            StoreOp::Write => model[range].fill(fill),
            StoreOp::Discard | StoreOp::WriteZeroes => model[range].fill(0),
            StoreOp::Flush => {}
        }
    }
    Ok(())
}

fn stores_agree(file: impl Fn(&str) -> StoreFile) {
    stores_agree_on(|round| (file(&format!("a{round}")), file(&format!("b{round}"))));
}

/// `files` makes one for the serving store and one for the simple one.
fn stores_agree_on(files: impl Fn(u32) -> (StoreFile, StoreFile)) {
    let step = (any::<u8>(), any::<u64>(), 1u64..=256, any::<u8>());
    let mut runner = TestRunner::new(ProptestConfig::with_cases(6));
    let round = std::cell::Cell::new(0);
    let ran = runner.run(&prop::collection::vec(step, 1..40), |steps| {
        round.set(round.get() + 1);
        let (serving, simple) = files(round.get());
        agree(&mut uring(serving), &mut pread(simple), &steps)
    });
    ran.unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_volume_in_memory_is_served_as_a_file_is_and_keeps_its_memory() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    stores_agree_on(|round| {
        let volume = Volume::open(&"v=ram:4M".parse().unwrap()).unwrap();
        assert_eq!(volume.capacity_sectors * 512, BYTES);
        let path = sparse(dir.path(), &round.to_string());
        let simple = StoreFile { file: open(&path, 0), memory: None, ..volume.store_file() };
        (volume.store_file(), simple)
    });
    let serving = Volume::open(&"v=ram:4M".parse().unwrap()).unwrap().store_file();
    let file = Arc::clone(&serving.file);
    let mut bench = uring(serving);
    for op in [StoreOp::Discard, StoreOp::WriteZeroes] {
        assert_eq!(bench.run(op, 0, BYTES, 0).0, Ok(()));
        assert_eq!(file.metadata().unwrap().blocks() * 512, BYTES, "{op:?} gave memory back");
    }
}

#[test]
fn both_stores_agree_on_a_buffered_file() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    stores_agree(|name| StoreFile {
        file: open(&sparse(dir.path(), name), 0),
        cached: Cached::Pages,
        write_through: false,
        memory: None,
    });
}

#[test]
fn both_stores_agree_on_a_direct_file_that_writes_through() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    stores_agree(|name| {
        let path = sparse(dir.path(), name);
        StoreFile { file: open(&path, libc::O_DIRECT), cached: Cached::No, write_through: true, memory: None }
    });
}

#[test]
fn both_stores_agree_in_memory() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    stores_agree(|name| StoreFile {
        file: open(&sparse(dir.path(), name), 0),
        cached: Cached::Always,
        write_through: false,
        memory: None,
    });
}

#[test]
fn both_stores_agree_on_a_block_device() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (a, b) = (Loop::over(&sparse(dir.path(), "a")), Loop::over(&sparse(dir.path(), "b")));
    let (Some(a), Some(b)) = (a, b) else {
        assert!(!rustix::process::geteuid().is_root(), "root can have loop devices");
        return;
    };
    let step: Vec<Step> = (0..60).map(|i| (i as u8, i * 37, 1 + i % 200, i as u8)).collect();
    let file = |device: &Loop| StoreFile {
        file: open(Path::new(&device.0), libc::O_DIRECT),
        cached: Cached::No,
        write_through: false,
        memory: None,
    };
    agree(&mut uring(file(&a)), &mut pread(file(&b)), &step).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_full_store_gives_the_request_back_and_forgets_none() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = open(&sparse(dir.path(), "v"), libc::O_DIRECT);
    let mut bench = uring(StoreFile { file, cached: Cached::No, write_through: false, memory: None });
    for token in 0..STORE_REQUESTS_MAX as u32 {
        bench.submit(StoreOp::Write, u64::from(token) * 4096, 4096, token as u8, token);
    }
    assert_eq!(bench.store.room(), 0);
    let one_more = bench.request(StoreOp::Flush, 0, 0, 0, 9999);
    assert_eq!(bench.store.submit(one_more).expect_err("there is no room").token, 9999);
    bench.store.push();
    let mut seen = HashMap::new();
    for _ in 0..STORE_REQUESTS_MAX {
        let completion = bench.next();
        assert_eq!(completion.result, Ok(()));
        *seen.entry(completion.token).or_insert(0) += 1;
    }
    assert!((0..STORE_REQUESTS_MAX as u32).all(|token| seen.get(&token) == Some(&1)), "each once");
    assert_eq!((bench.store.room(), bench.store.in_kernel()), (STORE_REQUESTS_MAX, 0));
}

#[test]
fn a_read_past_the_end_is_an_error_with_numbers() {
    for cached in [Cached::No, Cached::Pages] {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let flags = if cached == Cached::No { libc::O_DIRECT } else { 0 };
        let file = open(&sparse(dir.path(), "v"), flags);
        let mut bench = uring(StoreFile { file, cached, write_through: false, memory: None });
        // The file has half of what is asked for, and then nothing of it.
        let (half, _) = bench.run(StoreOp::Read, BYTES - 8192, 16384, 0);
        assert_eq!(
            half,
            Err(StoreError::Short { op: StoreOp::Read, offset: BYTES - 8192, len: 16384, done: 8192 })
        );
        let (none, _) = bench.run(StoreOp::Read, BYTES, 4096, 0);
        assert_eq!(none, Err(StoreError::Short { op: StoreOp::Read, offset: BYTES, len: 4096, done: 0 }));
    }
}

/// P-88: a write that was done in part is an error.
#[test]
fn a_full_file_system_is_told_with_its_error_number() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "cirro-node-test"])
        .arg(dir.path())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        assert!(!rustix::process::geteuid().is_root(), "root can mount a tmpfs");
        return;
    }
    let file = open(&sparse(dir.path(), "v"), 0);
    let mut bench = uring(StoreFile { file, cached: Cached::Always, write_through: false, memory: None });
    let (result, _) = bench.run(StoreOp::Write, 0, 1 << 20, 1);
    let unmounted = Command::new("umount").args(["--lazy"]).arg(dir.path()).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    let Err(StoreError::Failed { errno, done, len, .. }) = result else { panic!("{result:?}") };
    assert_eq!((errno, len), (libc::ENOSPC, 1 << 20));
    assert!(done < len);
}

#[test]
fn writing_to_a_file_that_is_read_only_fails_and_the_store_lives() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = Arc::new(File::open(sparse(dir.path(), "v")).unwrap());
    let mut bench = uring(StoreFile { file, cached: Cached::Pages, write_through: false, memory: None });
    for op in [StoreOp::Write, StoreOp::Discard, StoreOp::WriteZeroes] {
        let (result, _) = bench.run(op, 0, 4096, 1);
        assert!(matches!(result, Err(StoreError::Failed { errno: libc::EBADF, .. })), "{op:?}: {result:?}");
    }
    assert_eq!(bench.run(StoreOp::Read, 0, 4096, 1).1, [0; 4096]);
}

#[test]
fn what_is_cached_is_served_without_the_ring() {
    for (folder, cached) in [("/var/tmp", Cached::Pages), ("/dev/shm", Cached::Always)] {
        let dir = tempfile::tempdir_in(folder).unwrap();
        let path = sparse(dir.path(), "v");
        File::options().write(true).open(&path).unwrap().write_all_at(&[9; 8192], 4096).unwrap();
        let mut bench = uring(StoreFile { file: open(&path, 0), cached, write_through: false, memory: None });
        bench.submit(StoreOp::Read, 4096, 8192, 0, 3);
        assert_eq!(bench.store.in_kernel(), 0, "{folder}: nothing was given to the ring");
        let completion = bench.store.complete().expect("it is done already");
        assert_eq!(completion.buffer.unwrap().bytes(), [9; 8192]);
    }
}

#[test]
fn the_descriptor_wakes_who_waits_for_a_completion() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = open(&sparse(dir.path(), "v"), libc::O_DIRECT);
    let mut bench = uring(StoreFile { file, cached: Cached::No, write_through: false, memory: None });
    for op in [StoreOp::Write, StoreOp::Flush, StoreOp::Discard] {
        bench.submit(op, 0, 4096, 5, 1);
        bench.store.push();
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        let completion = loop {
            if let Some(completion) = bench.store.complete() {
                break completion;
            }
            let mut fds = [PollFd::from_borrowed_fd(bench.store.as_fd(), PollFlags::IN)];
            // A completion may interrupt the wait; it is seen then all the same.
            match poll(&mut fds, Some(&limit)) {
                Ok(ready) => assert_ne!(ready, 0, "{op:?} woke nobody"),
                Err(e) => assert_eq!(e, rustix::io::Errno::INTR),
            }
        };
        assert_eq!(completion.result, Ok(()));
    }
}

#[test]
fn a_discard_frees_blocks_and_zeroes_read_as_zero() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = sparse(dir.path(), "v");
    let mut bench = uring(StoreFile {
        file: open(&path, libc::O_DIRECT),
        cached: Cached::No,
        write_through: false,
        memory: None,
    });
    assert_eq!(bench.run(StoreOp::Write, 0, 1 << 20, 0xee).0, Ok(()));
    assert_eq!(bench.run(StoreOp::Flush, 0, 0, 0).0, Ok(()));
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
    let before = blocks();
    assert!(before >= 2048, "a MiB is 2048 sectors: {before}");
    assert_eq!(bench.run(StoreOp::Discard, 0, 1 << 19, 0).0, Ok(()));
    assert!(blocks() <= before - 1024, "half of them are free: {} of {before}", blocks());
    assert_eq!(bench.run(StoreOp::WriteZeroes, 1 << 19, 4096, 0).0, Ok(()));
    assert_eq!(bench.run(StoreOp::Read, 1 << 19, 8192, 1).1, [[0; 4096], [0xee; 4096]].concat());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), BYTES, "the size stays");
}
