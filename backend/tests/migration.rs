//! What a front-end that moves its guest elsewhere leans on: the log of dirty pages, and a stop that leaves nothing in flight.

mod rig;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rig::front_end::{Backend, Guest, MEMORY_BYTES};
use rig::guest::{DATA, pattern};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

/// Bytes of a log with a bit for each page of the guest's memory.
const LOG_BYTES: usize = MEMORY_BYTES / 4096 / 8;
/// Pages in which the rig's ring has its used ring and its status bytes: 0x1000 + 0x5000 and 0x1000 + 0xc000.
const USED_PAGE: usize = 0x6;
const STATUS_PAGE: usize = 0xd;
const DATA_PAGE: usize = DATA as usize / 4096;
const IOERR: u8 = 1;

/// A log as a front-end makes it.
struct Log(File);

impl Log {
    fn new() -> Log {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(LOG_BYTES as u64).unwrap();
        Log(file)
    }

    /// Gives it to the device, as if it had `bytes`.
    fn hand_over(&self, guest: &Guest, bytes: usize) -> Result<(), vhost::Error> {
        let mmap_handle = self.0.as_raw_fd();
        let region = VhostUserDirtyLogRegion { mmap_size: bytes as u64, mmap_offset: 0, mmap_handle };
        guest.frontend.set_log_base(0, Some(region))
    }

    /// The pages that are marked; the marks are taken away.
    fn take(&self) -> BTreeSet<usize> {
        let mut bits = [0; LOG_BYTES];
        self.0.read_exact_at(&mut bits, 0).unwrap();
        self.0.write_all_at(&[0; LOG_BYTES], 0).unwrap();
        (0..LOG_BYTES * 8).filter(|page| bits[page / 8] >> (page % 8) & 1 == 1).collect()
    }
}

/// What QEMU says when a migration begins and when it is given up.
fn switch_log(guest: &Guest, on: bool) {
    let bit = if on { VhostUserVirtioFeatures::LOG_ALL.bits() } else { 0 };
    guest.frontend.set_features(guest.features | bit).unwrap();
}

/// A guest that works, and its log, switched on.
fn logged(backend: &Backend) -> (Guest, Log) {
    let mut guest = Guest::connect(backend, None);
    guest.start(0);
    assert_eq!(guest.one(1, 0, 65_536).status, 0);
    let log = Log::new();
    log.hand_over(&guest, LOG_BYTES).unwrap();
    switch_log(&guest, true);
    (guest, log)
}

fn pages(data: impl IntoIterator<Item = usize>) -> BTreeSet<usize> {
    [USED_PAGE, STATUS_PAGE].into_iter().chain(data).collect()
}

/// P-116.
#[test]
fn every_page_that_is_written_is_in_the_log_and_no_other() {
    let backend = Backend::start("log");
    let (mut guest, log) = logged(&backend);
    assert_eq!(guest.one(0, 0, 8192).status, 0);
    assert_eq!(log.take(), pages(DATA_PAGE..DATA_PAGE + 2));
    // Into parts of pages: 0x100 bytes before the end of one, all of the next, and the beginning of the third.
    guest.ring.add(0, 0, DATA + 0x10f00, 0x1400);
    guest.kick.write(1).unwrap();
    assert_eq!(guest.wait(1)[0].status, 0);
    assert_eq!(log.take(), pages(DATA_PAGE + 16..DATA_PAGE + 19));
    assert_eq!(guest.one(1, 0, 65_536).status, 0);
    assert_eq!(log.take(), pages([]), "a write of the guest's writes nothing but its end");
    // The serial number is data, too.
    assert_eq!(guest.one(8, 0, 20).status, 0);
    assert_eq!(log.take(), pages([DATA_PAGE]));
}

#[test]
fn nothing_is_marked_before_the_log_is_wanted_nor_after_it_is_not() {
    let backend = Backend::start("switch");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    let log = Log::new();
    log.hand_over(&guest, LOG_BYTES).unwrap();
    assert_eq!(guest.one(0, 0, 4096).status, 0);
    assert_eq!(log.take(), BTreeSet::new());
    for round in 0..3 {
        switch_log(&guest, true);
        assert_eq!(guest.one(0, 0, 4096).status, 0);
        assert_eq!(log.take(), pages([DATA_PAGE]), "round {round}");
        switch_log(&guest, false);
        assert_eq!(guest.one(0, 0, 4096).status, 0);
        assert_eq!(log.take(), BTreeSet::new(), "round {round}");
    }
}

#[test]
fn memory_that_is_given_while_it_is_logged_is_logged_too() {
    let backend = Backend::start("table");
    let (mut guest, log) = logged(&backend);
    guest.give_memory();
    log.take();
    assert_eq!(guest.one(0, 0, 4096).status, 0);
    assert_eq!(log.take(), pages([DATA_PAGE]));
}

/// Whatever a front-end does with its log is its own loss.
#[test]
fn a_log_that_is_too_small_or_goes_away_ends_no_more_than_its_connection() {
    let backend = Backend::start("hostile");
    for bytes in [0, 1, LOG_BYTES - 1] {
        let guest = Guest::connect(&backend, None);
        guest.give_memory();
        assert!(Log::new().hand_over(&guest, bytes).is_err(), "{bytes} bytes");
    }
    let (mut guest, log) = logged(&backend);
    log.0.set_len(0).unwrap();
    guest.ring.write(DATA, &[0; 4096]);
    assert_eq!(guest.one(0, 0, 4096).status, 0, "the disk works on");
    drop(guest);
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 4096).status, 0, "and so does the next connection");
}

/// P-95: elsewhere nobody knows what is in flight here.
#[test]
fn a_request_that_cannot_be_finished_before_its_guest_moves_fails_before_the_answer() {
    let backend = Backend::start("unfinished");
    let (mut guest, log) = logged(&backend);
    backend.silent.store(true, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(5));
    guest.ring.write(DATA, &pattern(3, 4096));
    guest.ring.add(1, 8, DATA, 4096);
    guest.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    log.take();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 2, "both requests are used");
    let used = guest.ring.used();
    assert_eq!((used.len(), used[0].status, used[0].len), (1, IOERR, 1));
    assert_eq!(log.take(), pages([]), "and the log says where that stands");
    // The move is given up: nothing is left to be issued again.
    backend.silent.store(false, Ordering::Relaxed);
    switch_log(&guest, false);
    guest.start(2);
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.ring.used().is_empty());
    assert_eq!(guest.one(0, 0, 4096).status, 0);
}
