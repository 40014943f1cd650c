//! The real device on a unix socket, driven by the front-end of the `vhost` crate; the worker has its own thread, with the node on a link in memory.
//!
//! It is also the proof behind docs/decisions/0002: the crate starts no thread of its own and polls no kick.

mod rig;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cirro_link::tap::Limits;
use cirro_link::taps::Taps;
use rig::front_end::{Backend, Guest, IMAGE_BYTES};
use rig::guest::{DATA, Ring, pattern};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserVirtioFeatures};

fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok()).collect()
}

#[test]
fn a_guest_works_on_its_disk_and_the_crate_starts_no_thread_for_it() {
    let backend = Backend::start("works");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert!(threads().iter().all(|name| !name.starts_with("vring_worker")), "{:?}", threads());
    guest.call.read().expect("the guest is signalled when a ring starts");
    let bytes = pattern(1, 65_536);
    guest.ring.write(DATA, &bytes);
    assert_eq!(guest.one(1, 8, 65_536).status, 0);
    guest.ring.write(DATA, &[0; 65_536]);
    let read = guest.one(0, 8, 65_536);
    assert_eq!((read.status, read.len), (0, 65_537));
    assert!(guest.ring.read(DATA, 65_536) == bytes);
    guest.call.read().expect("the guest is signalled when its request is done");
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 2);
}

/// Virtio 1.2, section 2.7, allows any power of two; a driver may put header and data, or data and status, into one descriptor.
#[test]
fn a_ring_of_two_holds_a_request() {
    let backend = Backend::start("two");
    let mut guest = Guest::connect(&backend, None);
    guest.ring = Ring::of_size(&guest.ring.memory, 0, true, 2);
    guest.start(0);
    let status = |guest: &mut Guest, kind, bytes| {
        let at = guest.ring.add_in_two(kind, 8, bytes);
        guest.kick.write(1).unwrap();
        let used = guest.wait(1)[0];
        (guest.ring.read(at, 1)[0], used.len)
    };
    // More than the ring has places, so that its indices come round.
    for turn in 0..5 {
        guest.ring.write(DATA + 16, &pattern(turn, 8192));
        assert_eq!(status(&mut guest, 1, 8192), (0, 1));
        guest.ring.write(DATA + 16, &[0; 8192]);
        assert_eq!(status(&mut guest, 0, 8192), (0, 8193));
        assert!(guest.ring.read(DATA + 16, 8192) == pattern(turn, 8192));
    }
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 10);
}

#[test]
fn the_configuration_is_read_whole_and_writeback_is_written() {
    let backend = Backend::start("config");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    for size in [57u32, 60] {
        let (_, config) = guest
            .frontend
            .get_config(0, size, VhostUserConfigFlags::WRITABLE, &vec![0; size as usize])
            .unwrap();
        assert_eq!(config.len(), size as usize);
        assert_eq!(config[..8], (IMAGE_BYTES as u64 / 512).to_le_bytes(), "capacity");
        assert_eq!((config[32], config[34]), (1, 2), "writeback, num_queues");
    }
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    let (_, config) = guest.frontend.get_config(32, 1, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert_eq!(config, [0]);
    assert_eq!(guest.one(1, 0, 512).status, 0, "a write-through write");
}

#[test]
fn a_front_end_that_comes_back_finds_the_same_disk() {
    let backend = Backend::start("again");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    guest.ring.write(DATA, &pattern(4, 4096));
    assert_eq!(guest.one(1, 0, 4096).status, 0);
    let Guest { frontend, ring, file, features, .. } = guest;
    drop(frontend);
    // QEMU's base after a reconnect is the used index.
    let base = ring.state().next_used;
    let mut again = Guest::connect(&backend, Some((file, ring.memory.clone())));
    assert_eq!(again.features, features);
    again.ring = ring;
    again.start(base);
    again.ring.write(DATA, &[0; 4096]);
    assert_eq!(again.one(0, 0, 4096).status, 0);
    assert_eq!(again.ring.read(DATA, 4096), pattern(4, 4096));
}

/// P-94: the ring is looked at when it starts.
#[test]
fn a_backend_that_starts_before_its_node_offers_the_disk_it_offered_before() {
    let mut backend = Backend::start("before");
    backend.keeps_state = true;
    let mut guest = Guest::connect(&backend, None);
    let config = |guest: &mut Guest| {
        guest.frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap().1
    };
    let (features, told) = (guest.features, config(&mut guest));
    drop((guest, backend));

    let backend = Backend::start_with("before", true);
    let mut guest = Guest::connect(&backend, None);
    assert_eq!((guest.features, config(&mut guest)), (features, told));
    guest.start(0);
    guest.ring.write(DATA, &pattern(4, 4096));
    guest.ring.add(1, 0, DATA, 4096);
    guest.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.ring.used().is_empty(), "no node is there");
    backend.silent.store(false, Ordering::Relaxed);
    assert_eq!(guest.wait(1)[0].status, 0);
}

#[test]
fn requests_made_available_before_the_start_need_no_kick() {
    let backend = Backend::start("early");
    let mut guest = Guest::connect(&backend, None);
    guest.ring.add(0, 0, DATA, 4096);
    guest.start(0);
    assert_eq!(guest.wait(1)[0].status, 0);
}

#[test]
fn a_disabled_ring_is_not_served_and_goes_on_when_it_is_enabled() {
    let backend = Backend::start("enable");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    guest.frontend.set_vring_enable(0, false).unwrap();
    guest.ring.add(0, 0, DATA, 512);
    guest.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.ring.used().is_empty());
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.wait(1)[0].status, 0);
}

/// P-95: the same, seen by the front-end.
#[test]
fn a_stop_with_a_silent_node_is_answered_in_about_two_seconds() {
    let backend = Backend::start("stop");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    backend.silent.store(true, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(5));
    guest.ring.add(0, 0, DATA, 4096);
    guest.kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let asked = Instant::now();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 2, "used index 1 and one request in flight");
    assert!((1900..2800).contains(&asked.elapsed().as_millis()), "{:?}", asked.elapsed());
    assert_eq!(backend.session().rings, 0);
    backend.silent.store(false, Ordering::Relaxed);
    guest.start(2);
    assert_eq!(guest.wait(1)[0].status, 0, "the request is issued again");
}

#[test]
fn a_reset_device_starts_afresh_on_the_same_connection() {
    let backend = Backend::start("reset");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    guest.frontend.reset_device().unwrap();
    assert_eq!(backend.session().rings, 0);
    let memory = guest.ring.memory.clone();
    guest.ring = Ring::new(&memory, 1, true);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    assert_eq!(backend.session().rings, 1);
}

#[test]
fn frames_are_recorded_while_a_guest_works_and_the_guest_sees_nothing_of_it() {
    let backend = Backend::start("tap");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    let mailbox = backend.mailbox.clone();
    let mut taps = Taps::new(vec![Box::new(move |exchange| mailbox.exchange(exchange))]);
    let path = backend.path.with_extension("pcap");
    assert_eq!(guest.one(0, 0, 512).status, 0);
    let seen = |backend: &Backend| {
        let stats = backend.session().stats;
        stats.frames_sent + stats.frames_received
    };
    let before = seen(&backend);
    taps.push(&path, Limits::default()).unwrap();
    for sector in 0..20u32 {
        assert_eq!(guest.one(sector % 2, sector.into(), 4096).status, 0);
    }
    let ended = taps.pop().unwrap();
    let during = seen(&backend) - before;
    assert_eq!(guest.one(1, 0, 512).status, 0);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    // 20 requests and their answers at least, and nothing that the session does not know of but what came just before and after.
    let (file, recorded) = &ended[0];
    assert_eq!((file, recorded.left_out), (&path, 0));
    assert!((40..=during).contains(&recorded.frames), "{recorded:?}, {during} frames sent and received");
    let data: usize = 20 * 4096;
    assert!(bytes.len() > data + 24 && bytes.len() < 2 * data, "{} bytes in the file", bytes.len());
}

#[test]
fn a_front_end_that_talks_nonsense_loses_its_connection_and_nobody_else_does() {
    use std::io::Write;
    let backend = Backend::start("nonsense");
    for nonsense in [&[0xff; 64][..], &[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = std::os::unix::net::UnixStream::connect(&backend.path).unwrap();
        stream.write_all(nonsense).unwrap();
    }
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    assert_eq!(guest.one(0, 0, 512).status, 0);
    assert_ne!(guest.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), 0);
}
