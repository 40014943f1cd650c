//! Recordings made by the tap layer: read back by the test, and by tshark.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cirro_link::memory::{MemoryLink, pair};
use cirro_link::tap::{FINISH_TIME, Limits, Recorded, Recording, Tap};
use cirro_link::{FrameId, Link, Run, clock};
use cirro_protocol::time::Nanos;

/// A record: wall-clock nanoseconds, bytes.
type Record = (u64, Vec<u8>);

/// Reads a pcap file as the format says: 24 bytes of header, then 16 bytes of header and the frame for each record.
fn parse(file: &Path) -> Vec<Record> {
    let bytes = std::fs::read(file).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(bytes[..8], [0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0], "nanosecond magic, version 2.4");
    assert_eq!((word(8), word(12), word(16), word(20)), (0, 0, 14 + 65535, 1));
    let (mut at, mut records) = (24, Vec::new());
    while at < bytes.len() {
        let (seconds, nanoseconds, len) = (word(at), word(at + 4), word(at + 8) as usize);
        assert_eq!(word(at + 12) as usize, len, "no frame is cut");
        assert!(nanoseconds < 1_000_000_000);
        let stamp = u64::from(seconds) * 1_000_000_000 + u64::from(nanoseconds);
        records.push((stamp, bytes[at + 16..at + 16 + len].to_vec()));
        at += 16 + len;
    }
    records
}

/// Lives as long as the tests, as memory for runs must live long enough.
fn frame(len: usize, first: u8) -> &'static [u8] {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(7) ^ first).collect();
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes.leak()
}

/// Queues `bytes`, of which those from `from` to `to` are foreign memory.
fn put(link: &mut impl Link, bytes: &'static [u8], (from, to): (usize, usize), pn: u64) {
    let queued = link.frame().expect("room");
    queued.head.extend_from_slice(&bytes[..from]);
    queued.head.extend_from_slice(&bytes[to..]);
    queued.push_cut(from, Run::of_static(&bytes[from..to]));
    link.commit(FrameId { session: 1, pn });
}

fn start(link: &mut Tap<MemoryLink>, path: &Path) {
    assert!(link.exchange(Some(Recording::create(path, Limits::default()).unwrap())).is_none());
}

/// The file is there already, and need not be a plain one.
fn start_into(link: &mut Tap<MemoryLink>, path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    link.exchange(Some(Recording::into_file(file, path, Limits::default()).unwrap()));
}

fn stop(link: &mut Tap<MemoryLink>) -> Recorded {
    link.exchange(None).expect("it records").finish(Duration::from_secs(20))
}

fn tapped() -> (Tap<MemoryLink>, MemoryLink, tempfile::TempDir) {
    let (near, far) = pair(65535);
    (Tap::new(near), far, tempfile::tempdir().unwrap())
}

#[test]
fn what_was_sent_and_received_is_in_the_file_byte_for_byte() {
    let (mut near, mut far, folder) = tapped();
    let path = folder.path().join("a.pcap");
    near.inner().set_now(clock::now());
    let unseen = frame(60, 9);
    put(&mut near, unseen, (20, 30), 0);
    near.flush(&mut Vec::new());

    let before = clock::wall_ns();
    start(&mut near, &path);
    let sent = [frame(60, 1), frame(14 + 65535, 2), frame(8200, 3)];
    for (bytes, cut) in sent.iter().zip([(20, 30), (100, 65000), (54, 8192)]) {
        put(&mut near, bytes, cut, 1);
    }
    near.flush(&mut Vec::new());
    near.inner().set_now(clock::now());
    let received = frame(1514, 4);
    near.inner().inject(received.to_vec());
    assert_eq!(near.receive().unwrap().bytes, received);
    let recorded = stop(&mut near);
    let after = clock::wall_ns();
    assert_eq!(recorded, Recorded { frames: 4, left_out: 0 });
    put(&mut near, unseen, (20, 30), 2);
    near.flush(&mut Vec::new());

    let records = parse(&path);
    let frames: Vec<&Vec<u8>> = records.iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(frames, [sent[0], sent[1], sent[2], received]);
    assert!(records.is_sorted_by_key(|(stamp, _)| *stamp));
    assert!(records.iter().all(|(stamp, _)| (before - 1_000_000..after + 1_000_000).contains(stamp)));
    let arrived: Vec<Vec<u8>> =
        std::iter::from_fn(|| far.receive().map(|frame| frame.bytes.to_vec())).collect();
    assert_eq!(arrived, [unseen, sent[0], sent[1], sent[2], unseen], "the wire sees no tap");
}

#[test]
fn a_refused_frame_is_not_in_the_file() {
    let (mut near, _far, folder) = tapped();
    let path = folder.path().join("a.pcap");
    start(&mut near, &path);
    let (mut refused, bytes) = (vec![FrameId { session: 1, pn: 2 }], frame(60, 1));
    near.inner_mut().set_refuses(true);
    put(&mut near, bytes, (20, 30), 1);
    near.flush(&mut refused);
    assert_eq!(refused.len(), 2);
    near.inner_mut().set_refuses(false);
    put(&mut near, bytes, (20, 30), 2);
    near.flush(&mut refused);
    assert_eq!(stop(&mut near).frames, 1);
    assert_eq!(parse(&path).len(), 1);
}

#[test]
fn a_frame_is_in_the_file_soon_although_no_other_follows() {
    let (mut near, _far, folder) = tapped();
    let path = folder.path().join("a.pcap");
    start(&mut near, &path);
    let bytes = frame(60, 1);
    put(&mut near, bytes, (20, 30), 1);
    near.flush(&mut Vec::new());
    let until = clock::now() + Nanos::from_secs(5);
    while std::fs::metadata(&path).unwrap().len() < 24 + 16 + 60 {
        let due = near.poll_timeout().expect("something is to be written");
        assert!(due.since(clock::now()) <= Nanos::from_millis(100));
        assert!(clock::now() < until, "not written after 5 s");
        std::thread::sleep(due.since(clock::now()).into());
        assert!(near.receive().is_none());
        if near.poll_timeout().is_none() {
            break;
        }
    }
    // The writing thread has it now.
    while std::fs::metadata(&path).unwrap().len() < 24 + 16 + 60 {
        assert!(clock::now() < until, "not written after 5 s");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(parse(&path)[0].1, bytes);
}

#[test]
fn a_disk_that_is_full_ends_the_recording_and_nothing_else() {
    let (mut near, mut far, _folder) = tapped();
    start_into(&mut near, Path::new("/dev/full"));
    let (bytes, mut refused) = (frame(8200, 1), Vec::new());
    // 1600 frames of 8200 bytes fill 25 chunks; the recording has room for ten.
    for pn in 0..1600 {
        put(&mut near, bytes, (54, 8192), pn);
        near.flush(&mut refused);
        assert_eq!(far.receive().unwrap().bytes, bytes);
    }
    assert!(refused.is_empty());
    assert_eq!(stop(&mut near), Recorded { frames: 0, left_out: 1600 });
    put(&mut near, bytes, (54, 8192), 1);
    near.flush(&mut refused);
    assert_eq!(far.receive().unwrap().bytes, bytes);
}

#[test]
fn a_file_that_is_there_is_not_recorded_into() {
    let (_, _, folder) = tapped();
    let path = folder.path().join("a.pcap");
    std::fs::write(&path, "precious").unwrap();
    let error = Recording::create(&path, Limits::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    assert!(Recording::create(Path::new("/nowhere/at/all.pcap"), Limits::default()).is_err());
}

#[test]
fn frames_are_cut_and_the_file_ends_where_it_was_asked_to() {
    let (mut near, mut far, folder) = tapped();
    let path = folder.path().join("a.pcap");
    // A file header of 24 bytes, and ten records of a header of 16 bytes and 96 bytes each; one byte less than an eleventh needs.
    let limits = Limits { frame_bytes_max: 96, file_bytes_max: 24 + 11 * (16 + 96) - 1 };
    near.exchange(Some(Recording::create(&path, limits).unwrap()));
    let long = frame(1514, 1);
    for pn in 0..12 {
        put(&mut near, long, (54, 1000), pn);
        near.flush(&mut Vec::new());
        assert_eq!(far.receive().unwrap().bytes, long);
    }
    // This one would fit, but a file with a hole in it would tell a wrong story.
    put(&mut near, frame(60, 1), (20, 30), 12);
    near.flush(&mut Vec::new());
    assert_eq!(stop(&mut near), Recorded { frames: 10, left_out: 3 });
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 24 + 10 * (16 + 96));
    assert_eq!(bytes[16..20], 96u32.to_le_bytes());
    for record in bytes[24..].chunks_exact(16 + 96) {
        assert_eq!(record[8..16], [96u32.to_le_bytes(), 1514u32.to_le_bytes()].concat());
        assert_eq!(record[16..], long[..96]);
    }
}

#[test]
fn a_disk_that_hangs_does_not_hold_up_whoever_ends_the_recording() {
    let (mut near, _far, folder) = tapped();
    let path = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let _held = File::options().read(true).write(true).open(&path).unwrap();
    start_into(&mut near, &path);
    for pn in 0..100 {
        put(&mut near, frame(65000, 1), (54, 8192), pn);
        near.flush(&mut Vec::new());
    }
    let began = std::time::Instant::now();
    let recorded = near.exchange(None).unwrap().finish(FINISH_TIME);
    assert!(began.elapsed() < FINISH_TIME * 3, "{:?}", began.elapsed());
    assert_eq!(recorded, Recorded { frames: 0, left_out: 100 });
}

#[test]
fn a_disk_that_is_too_slow_costs_frames_in_the_file_and_not_on_the_link() {
    let (mut near, mut far, folder) = tapped();
    // A pipe that nobody empties: the writing thread stands still.
    let path = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    // Opened for reading and writing, so that nobody waits for the other end.
    let held = File::options().read(true).write(true).open(&path).unwrap();
    start_into(&mut near, &path);
    let bytes = frame(65000, 1);
    // 8 chunks of 512 KiB wait, one is being written and one filled: 80 frames and then no more.
    for pn in 0..200 {
        put(&mut near, bytes, (54, 8192), pn);
        near.flush(&mut Vec::new());
        assert_eq!(far.receive().unwrap().bytes.len(), 65000);
    }
    let read = std::thread::spawn(move || std::io::copy(&mut &held, &mut std::io::sink()));
    let recorded = stop(&mut near);
    assert!((72..=80).contains(&recorded.frames), "{recorded:?}");
    assert_eq!(recorded.frames + recorded.left_out, 200);
    // It reads for ever from a pipe that it also holds open; it ends with the process.
    drop(read);
}

#[test]
fn tshark_reads_the_recording() {
    let (mut near, _far, folder) = tapped();
    let path = folder.path().join("a.pcap");
    start(&mut near, &path);
    let sent = [frame(60, 1), frame(9014, 2)];
    for bytes in &sent {
        put(&mut near, bytes, (20, 30), 1);
    }
    near.flush(&mut Vec::new());
    stop(&mut near);
    let fields =
        ["-T", "fields", "-e", "frame.len", "-e", "eth.type", "-e", "eth.dst", "-e", "frame.time_epoch"];
    let output = Command::new("tshark").arg("-r").arg(&path).args(fields).output();
    let output = output.expect("tshark is installed (tests/install.sh)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let records = parse(&path);
    let line = |(stamp, bytes): &Record| {
        let mac = bytes[..6].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
        let (seconds, nanoseconds) = (stamp / 1_000_000_000, stamp % 1_000_000_000);
        format!("{}\t0x88b5\t{mac}\t{seconds}.{nanoseconds:09}", bytes.len())
    };
    assert_eq!(text.lines().collect::<Vec<_>>(), records.iter().map(line).collect::<Vec<_>>());
    assert_eq!(records.iter().map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>(), sent);
}
