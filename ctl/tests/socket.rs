//! The control socket over a real unix socket: what operators do, what broken and hostile clients do, and what is left behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cirro_ctl::client::{AskError, ask};
use cirro_ctl::request::{LINE_BYTES_MAX, Request};
use cirro_ctl::server::{BindError, CONNECTIONS_MAX, Server};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(5);

/// A directory of its own for each test, removed at its end.
struct Home(PathBuf);

impl Home {
    fn new() -> Home {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("cirro-ctl-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Home(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("node.sock")
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Answers `status` with 42, `stats` with four megabytes of text, and refuses the rest.
fn answer(request: Request) -> Result<Value, String> {
    match request {
        Request::Status {} => Ok(json!(42)),
        Request::Stats {} => Ok(json!("x".repeat(4 << 20))),
        Request::LinkTapPush(_)
        | Request::LinkTapPop {}
        | Request::VolumeGrant(_)
        | Request::VolumeRevoke(_)
        | Request::VolumeGrants { .. }
        | Request::VolumeResize(_) => request.not_supported("a test"),
    }
}

fn status(path: &Path) -> Value {
    ask(path, &Request::Status {}, LIMIT).unwrap()
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(2 * LIMIT)).unwrap();
    stream
}

fn line(stream: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

#[test]
fn a_request_is_answered_and_refusals_carry_the_reason() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    assert_eq!(status(&home.socket()), 42);
    let refused = ask(&home.socket(), &Request::LinkTapPop {}, LIMIT).unwrap_err().to_string();
    assert!(refused.contains("node.sock: link-tap-pop: not supported by a test"), "{refused}");
}

#[test]
fn a_shell_can_ask_without_a_line_break() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    let mut stream = connect(&home.socket());
    stream.write_all(br#"{"cmd":"status"}"#).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert_eq!(reply, "{\"ok\":42}\n");
}

#[test]
fn several_requests_on_one_connection_are_answered_in_order() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    let mut stream = connect(&home.socket());
    stream
        .write_all(b"{\"cmd\":\"status\"}\n{\"cmd\":\"nonsense\"}\n{\"cmd\":\"status\"}\n{\"cmd\":")
        .unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), r#"{"ok":42}"#);
    assert!(lines.next().unwrap().unwrap().starts_with(r#"{"error":"not a request: unknown variant"#));
    assert_eq!(lines.next().unwrap().unwrap(), r#"{"ok":42}"#);
    stream.write_all(b"\"status\"}\n").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), r#"{"ok":42}"#);
}

#[test]
fn the_socket_is_for_its_owner_only_and_gone_at_the_end() {
    let home = Home::new();
    let server = Server::start(&home.socket(), answer).unwrap();
    let found = std::fs::metadata(home.socket()).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    assert_eq!(home.names(), ["node.sock"], "nothing but the socket is left of its making");
    drop(server);
    assert!(home.names().is_empty());
}

#[test]
fn the_socket_of_a_dead_process_is_replaced_and_that_of_a_live_one_is_not() {
    let home = Home::new();
    drop(UnixListener::bind(home.socket()).unwrap());
    assert!(home.socket().exists(), "a listener that dies leaves its socket");
    assert!(matches!(ask(&home.socket(), &Request::Status {}, LIMIT), Err(AskError::Dead(_))));
    let server = Server::start(&home.socket(), answer).unwrap();
    let second = Server::start(&home.socket(), answer).unwrap_err();
    assert!(matches!(second, BindError::InUse(_)), "{second}");
    assert_eq!(status(&home.socket()), 42);
    drop(server);
    assert!(matches!(ask(&home.socket(), &Request::Status {}, LIMIT), Err(AskError::Absent(_))));
}

#[test]
fn a_socket_that_is_not_ours_any_more_is_left_alone() {
    let home = Home::new();
    let server = Server::start(&home.socket(), answer).unwrap();
    std::fs::remove_file(home.socket()).unwrap();
    let _other = Server::start(&home.socket(), answer).unwrap();
    drop(server);
    assert_eq!(status(&home.socket()), 42);
}

#[test]
fn a_name_taken_by_a_file_is_refused_and_the_file_kept() {
    let home = Home::new();
    std::fs::write(home.socket(), "precious").unwrap();
    let refused = Server::start(&home.socket(), answer).unwrap_err();
    assert!(matches!(refused, BindError::NotASocket(_)), "{refused}");
    assert_eq!(std::fs::read(home.socket()).unwrap(), b"precious");
}

#[test]
fn of_many_that_start_at_once_exactly_one_serves() {
    let home = Home::new();
    drop(UnixListener::bind(home.socket()).unwrap());
    let started: Vec<_> = (0..8)
        .map(|_| {
            let path = home.socket();
            std::thread::spawn(move || Server::start(&path, answer))
        })
        .collect();
    let servers: Vec<_> = started.into_iter().filter_map(|thread| thread.join().unwrap().ok()).collect();
    assert_eq!(servers.len(), 1);
    assert_eq!(status(&home.socket()), 42);
}

#[test]
fn a_line_that_is_too_long_is_refused_and_its_connection_ended() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    let mut stream = connect(&home.socket());
    stream.write_all(&vec![b' '; LINE_BYTES_MAX]).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert_eq!(reply, "{\"error\":\"a request line has at most 65536 bytes\"}\n");
    let mut longest = br#"{"cmd":"status"}"#.to_vec();
    longest.resize(LINE_BYTES_MAX - 1, b' ');
    longest.push(b'\n');
    let mut stream = connect(&home.socket());
    stream.write_all(&longest).unwrap();
    assert_eq!(line(&stream), "{\"ok\":42}\n", "a line of exactly the limit is served");
}

#[test]
fn garbage_never_ends_the_server() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    let seed = 0x5eed_c0de_u64;
    let mut random = Xorshift(seed);
    for round in 0..400 {
        let mut bytes = br#"{"cmd":"link-tap-push","path":"/a","frame_bytes_max":96}"#.to_vec();
        for _ in 0..=random.below(20) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] = random.below(256) as u8,
                1 => bytes.truncate(at.max(1)),
                2 => bytes.insert(at, b"\n{}[]\"\\\0\xff"[random.below(9)]),
                _ => bytes.extend_from_within(at..),
            }
            bytes.truncate(8192);
        }
        let mut stream = connect(&home.socket());
        // The server may have closed its side already; then writing fails, which is its right.
        let _ = stream.write_all(&bytes);
        if random.below(2) == 0 {
            let _ = stream.shutdown(Shutdown::Write);
            let mut reply = Vec::new();
            let _ = stream.read_to_end(&mut reply);
            for line in reply.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
                let reply: Value = serde_json::from_slice(line).unwrap();
                assert!(reply.get("error").is_some(), "seed {seed:#x} round {round}: {reply}");
            }
        }
    }
    assert_eq!(status(&home.socket()), 42);
}

#[test]
fn clients_that_say_nothing_lose_their_place_to_one_that_asks() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    let silent: Vec<_> = (0..2 * CONNECTIONS_MAX).map(|_| connect(&home.socket())).collect();
    let begun = Instant::now();
    assert_eq!(ask(&home.socket(), &Request::Status {}, 4 * LIMIT).unwrap(), 42);
    assert!(begun.elapsed() < LIMIT, "it took {:?}", begun.elapsed());
    drop(silent);
}

#[test]
fn clients_that_do_not_read_their_replies_do_not_hold_up_the_rest() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    let mut stuck: Vec<_> = (0..CONNECTIONS_MAX - 1).map(|_| connect(&home.socket())).collect();
    for stream in &mut stuck {
        stream.write_all(b"{\"cmd\":\"stats\"}\n").unwrap();
    }
    let begun = Instant::now();
    assert_eq!(status(&home.socket()), 42);
    assert!(begun.elapsed() < Duration::from_secs(2), "it took {:?}", begun.elapsed());
    let whole = ask(&home.socket(), &Request::Stats {}, LIMIT).unwrap();
    assert_eq!(whole.as_str().unwrap().len(), 4 << 20, "a long answer arrives whole");
}

#[test]
fn a_table_full_of_unfinished_lines_is_cleared_by_their_deadline() {
    let home = Home::new();
    let _server = Server::start(&home.socket(), answer).unwrap();
    let mut unfinished: Vec<_> = (0..CONNECTIONS_MAX).map(|_| connect(&home.socket())).collect();
    for stream in &mut unfinished {
        stream.write_all(b"{\"cmd\":").unwrap();
    }
    assert_eq!(ask(&home.socket(), &Request::Status {}, 4 * LIMIT).unwrap(), 42);
    let mut rest = Vec::new();
    unfinished[0].read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "a client that is too slow is closed without a reply");
}

#[test]
fn a_daemon_that_does_not_answer_is_given_up_in_time() {
    let home = Home::new();
    let _deaf = UnixListener::bind(home.socket()).unwrap();
    let limit = Duration::from_millis(200);
    let begun = Instant::now();
    let given_up = ask(&home.socket(), &Request::Status {}, limit).unwrap_err();
    assert!(matches!(given_up, AskError::TimedOut { .. }), "{given_up}");
    assert!(begun.elapsed() < LIMIT);
}

#[test]
fn the_server_ends_at_once_with_clients_connected() {
    let home = Home::new();
    let server = Server::start(&home.socket(), answer).unwrap();
    let mut stuck = connect(&home.socket());
    stuck.write_all(b"{\"cmd\":\"stats\"}\n").unwrap();
    let begun = Instant::now();
    drop(server);
    assert!(begun.elapsed() < Duration::from_secs(2));
}

/// Marsaglia's xorshift64: enough to make garbage that a seed repeats.
struct Xorshift(u64);

impl Xorshift {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}
