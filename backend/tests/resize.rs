//! What a front-end is told of another size, over the real socket.

mod rig;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rig::front_end::{Backend, Guest, IMAGE_BYTES};
use rig::guest::{DATA, pattern};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// One VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: number 2, version 1 and no reply wanted, no body (vhost-user, "Back-end message types").
fn takes_news(channel: &mut UnixStream) {
    use std::io::Read;
    let mut message = [0; 12];
    channel.read_exact(&mut message).expect("the front-end is told that the configuration changed");
    let words = [0, 4, 8].map(|at| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap()));
    assert_eq!(words, [2, 1, 0]);
}

fn is_quiet(channel: &mut UnixStream) -> bool {
    use std::io::Read;
    channel.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    channel.read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

#[test]
fn a_front_end_is_told_of_another_size_and_finds_it_again_without_a_node() {
    const SECTORS: u64 = IMAGE_BYTES as u64 / 512;
    let mut backend = Backend::start("grows");
    backend.keeps_state = true;
    let mut guest = Guest::connect(&backend, None);
    let mut channel = guest.open_channel();
    assert_eq!(guest.capacity(), SECTORS);
    guest.start(0);
    assert_eq!(guest.one(1, SECTORS, 4096).status, 1, "behind the end");
    for times in [2, 3] {
        backend.resize(times * IMAGE_BYTES);
        takes_news(&mut channel);
        assert_eq!(guest.capacity(), times as u64 * SECTORS);
        guest.ring.write(DATA, &pattern(times as u64, 4096));
        assert_eq!(guest.one(1, times as u64 * SECTORS - 8, 4096).status, 0);
    }
    assert!(is_quiet(&mut channel), "it is told once of each");
    // A front-end may have a channel and not listen: nobody waits for it, and it reads the size that is true by then.
    backend.resize(2 * IMAGE_BYTES);
    assert_eq!(guest.one(0, 2 * SECTORS, 512).status, 1);
    backend.resize(3 * IMAGE_BYTES);
    drop((guest, backend));

    let backend = Backend::start_with("grows", true);
    let mut guest = Guest::connect(&backend, None);
    assert_eq!(guest.capacity(), 3 * SECTORS, "no node is there to say so");
}

/// QEMU takes no news of a device that has not started, and reads no configuration when it connects again.
#[test]
fn a_front_end_that_has_not_read_the_size_is_told_when_its_ring_starts() {
    let backend = Backend::start("start");
    let mut guest = Guest::connect(&backend, None);
    let mut channel = guest.open_channel();
    guest.start(0);
    takes_news(&mut channel);
    assert_eq!(guest.capacity(), IMAGE_BYTES as u64 / 512);
    assert!(is_quiet(&mut channel), "once, whatever starts a ring");
    guest.frontend.get_vring_base(0).unwrap();
    backend.resize(2 * IMAGE_BYTES);
    channel.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    takes_news(&mut channel);
    guest.start(0);
    takes_news(&mut channel);
    assert_eq!(guest.capacity(), IMAGE_BYTES as u64 / 256);
    guest.frontend.get_vring_base(0).unwrap();
    guest.start(0);
    assert!(is_quiet(&mut channel), "it has read it");
}

/// One whose other end is closed, one that nobody reads from: the disk serves, and its size is there to be read.
#[test]
fn whatever_a_front_end_gives_for_a_channel_the_disk_serves() {
    let backend = Backend::start("channel");
    let mut guest = Guest::connect(&backend, None);
    guest.start(0);
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    let (full, filled) = UnixStream::pair().unwrap();
    filled.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut &filled, &[0; 4096]).is_ok() {}
    for (times, descriptor) in (2..).zip([&theirs, &filled]) {
        guest.frontend.set_backend_request_fd(descriptor).unwrap();
        backend.resize(times * IMAGE_BYTES);
        let end = Instant::now() + Duration::from_secs(20);
        while guest.capacity() != (times * IMAGE_BYTES) as u64 / 512 {
            assert!(Instant::now() < end, "the configuration never has the new size");
        }
        assert_eq!(guest.one(1, (times * IMAGE_BYTES) as u64 / 512 - 8, 4096).status, 0);
    }
    drop(full);
}
