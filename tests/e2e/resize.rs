//! A volume that becomes larger while its disk is used, and what comes to the backend's socket that is no front-end.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cirro_ctl::request::{Request, Resized, VolumeResize};
use cirro_tests::daemons::Daemon;
use cirro_tests::frontend::FrontEnd;
use cirro_tests::loss;
use cirro_tests::verify::{Mix, Size, Verifier};

use crate::rig::{DISK_BYTES, Rig, judge, must, start_node};

fn resize(node: &Daemon, bytes: u64) -> Result<Resized, String> {
    let request = Request::VolumeResize(VolumeResize { volume: "disk".into(), bytes });
    node.ask(&request).map(|answer| serde_json::from_value(answer).expect("an answer of its shape"))
}

/// The configuration is read again until it has the size.
fn sees(front_end: &FrontEnd, bytes: u64) {
    let end = Instant::now() + Duration::from_secs(10);
    while front_end.capacity() != bytes {
        assert!(Instant::now() < end, "the front-end has {} bytes, not {bytes}", front_end.capacity());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// At 20 % loss in both directions, so that news are lost too; then a node that is started again, and one that refuses to make it smaller.
#[test]
fn a_disk_grows_under_load_and_stays_so() {
    const STEP: u64 = 64 << 20;
    let rig = Rig::new(9000);
    let mut front_end = rig.connect(1, 8, 128 << 10);
    loss::set_both(rig.lab.machines(), 200);
    for step in 1..=5 {
        let bytes = DISK_BYTES + step * STEP;
        let told = resize(&rig.node, bytes).expect("it grows");
        assert_eq!((told.bytes_before, told.bytes, told.sessions_told), (bytes - STEP, bytes, 1));
        sees(&front_end, bytes);
    }
    let bytes = DISK_BYTES + 5 * STEP;
    let mut verifier = Verifier::new(bytes, 71);
    judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, Duration::from_secs(1));
    let refused = resize(&rig.node, DISK_BYTES).expect_err("it is used");
    assert!(refused.contains("volume disk: has 576M and stays so, not 256M: "), "{refused}");
    loss::set_both(rig.lab.machines(), 0);
    let Rig { backend, node, scratch, lab } = rig;
    node.kill();
    let node = start_node(&lab, &scratch);
    must(verifier.check_all(&mut front_end));
    assert_eq!(front_end.capacity(), bytes);
    drop(front_end);
    backend.stop();
    node.stop();
    drop((scratch, lab));
}

fn open(daemon: &Daemon, what: &str) -> usize {
    std::fs::read_dir(format!("/proc/{}/{what}", daemon.pid())).expect("the daemon runs").count()
}

/// Garbage, sizes that no message has, half messages, and ends at any point: the next one is served, and no descriptor and no thread is left of them.
#[test]
fn who_talks_nonsense_to_the_backend_leaves_nothing_behind() {
    let rig = Rig::new(9000);
    drop(rig.connect(1, 1, 4096));
    let header = |request: u32, size: u32| [request, 1, size].map(u32::to_ne_bytes).concat();
    let nonsense = [
        vec![0xff; 64],
        header(1, u32::MAX),
        header(1, 4097),
        header(21, 0),
        header(8, 200),
        vec![1; 5],
        Vec::new(),
    ];
    let settled = |most: (usize, usize)| {
        let end = Instant::now() + Duration::from_secs(10);
        while open(&rig.backend, "fd") > most.0 || open(&rig.backend, "task") > most.1 {
            assert!(Instant::now() < end, "more than {most:?} descriptors and threads are left");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let connect = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(rig.scratch.path("backend.sock")).expect("the socket listens");
        stream.write_all(bytes).expect("it takes a few bytes");
    };
    connect(&[]);
    std::thread::sleep(Duration::from_millis(200));
    let most = (open(&rig.backend, "fd"), open(&rig.backend, "task"));
    for _ in 0..10 {
        nonsense.iter().for_each(|bytes| connect(bytes));
    }
    settled(most);
    let mut verifier = Verifier::new(DISK_BYTES, 72);
    let mut front_end = rig.connect(1, 8, 128 << 10);
    judge(&mut verifier, &mut front_end, Size::UpTo(64 << 10), Mix::Everything, Duration::from_millis(300));
    drop(front_end);
    rig.stop();
}
