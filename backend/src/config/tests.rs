//! Flags and files that are taken, and those that are refused.

use super::*;

/// Security is none in the tests that do not speak of keys.
fn parse(line: &str, file: Option<&str>) -> Result<Config, String> {
    let speaks =
        [line, file.unwrap_or("")].iter().any(|text| text.contains("security") || text.contains("key"));
    let none: &[&str] = if speaks { &[] } else { &["--security", "none"] };
    let words = std::iter::once("cirro-backend").chain(line.split_whitespace()).chain(none.iter().copied());
    let flags = Flags::try_parse_from(words).map_err(|error| error.to_string())?;
    Config::new(&flags, file.map(|text| (Path::new("f.toml"), text))).map_err(|error| error.to_string())
}

const ONE: &str = "--socket-path /s --link eth1 --volume v";

#[test]
fn the_stable_command_line_is_understood() {
    let line = "--socket-path /run/a.sock --link eth1 --volume vm-1 --node 02:00:5e:10:00:01 --read-only --queues 4 --queue-size 128 \
                --security none --poll-us 5 --take-over --state-dir /tmp/s --run-dir /tmp/r --ctl-socket /tmp/c --workers 2";
    let config = parse(line, None).unwrap();
    let disk = &config.disks[0];
    assert_eq!((config.link.interface.as_str(), config.link.workers, config.poll_us), ("eth1", 2, 5));
    assert_eq!(disk.socket, Socket::Path("/run/a.sock".into()));
    assert_eq!(disk.node.unwrap().0, [2, 0, 0x5e, 0x10, 0, 1]);
    assert!(disk.read_only && disk.take_over);
    assert_eq!((disk.queues, disk.queue_size), (4, 128));
    assert_eq!(
        (config.state_dir.as_path(), config.run_dir.as_path()),
        (Path::new("/tmp/s"), Path::new("/tmp/r"))
    );
}

#[test]
fn what_is_not_said_has_the_documented_default() {
    let config = parse(ONE, None).unwrap();
    let disk = &config.disks[0];
    assert_eq!((disk.queues, disk.queue_size, config.poll_us, config.link.workers), (16, 256, 20, 1));
    assert_eq!(config.state_dir, Path::new("/var/lib/cirrostratus/backend"));
    assert_eq!(disk.node, None);
}

#[test]
fn a_file_lists_disks_and_flags_win_over_it() {
    let file = "link = 'eth9'\npoll-us = 7\n[[disk]]\nvolume = 'a'\nsocket-path = '/a'\nqueues = 2\n[[disk]]\nvolume = 'b'\nfd = 5\nread-only = true\n";
    assert_eq!(parse("--link eth1 --queue-size 2", Some(file)).unwrap().disks[0].queue_size, 2);
    let config = parse("--link eth1 --queue-size 64", Some(file)).unwrap();
    assert_eq!((config.link.interface.as_str(), config.poll_us), ("eth1", 7));
    let [a, b] = &config.disks[..] else { panic!("two disks") };
    assert_eq!((a.volume.as_str(), a.queues, a.queue_size, a.read_only), ("a", 2, 64, false));
    assert_eq!((b.volume.as_str(), b.queues, b.socket.clone(), b.read_only), ("b", 16, Socket::Fd(5), true));
    assert!(parse("--volume c", Some(file)).unwrap_err().contains("--volume can name one disk only"));
    assert_eq!(
        parse("--volume c", Some("link='x'\n[[disk]]\nvolume='a'\nsocket-path='/a'")).unwrap().disks[0]
            .volume
            .as_str(),
        "c"
    );
}

#[test]
fn what_happens_in_trouble_is_said_by_a_flag_or_for_each_disk() {
    let eio = |seconds| OnTrouble::EioAfter(cirro_protocol::time::Nanos::from_secs(seconds));
    assert_eq!(parse(ONE, None).unwrap().disks[0].on_trouble, OnTrouble::Wait);
    let flag = parse(&format!("{ONE} --on-trouble eio-after=30s"), None).unwrap();
    assert_eq!(flag.disks[0].on_trouble, eio(30));
    let file = "link='l'\n[[disk]]\nvolume='a'\nfd=4\non-trouble='eio-after 2m'\n[[disk]]\nvolume='b'\nfd=5\non-trouble='wait'";
    let both: Vec<_> = parse("", Some(file)).unwrap().disks.iter().map(|disk| disk.on_trouble).collect();
    assert_eq!(both, [eio(120), OnTrouble::Wait]);
    let all: Vec<_> =
        parse("--on-trouble eio-after=1s", Some(file)).unwrap().disks.iter().map(|d| d.on_trouble).collect();
    assert_eq!(all, [eio(1), eio(1)]);
}

#[test]
fn every_mistake_is_told_in_one_line() {
    let cases = [
        (
            "",
            Some("link='l'\n[[disk]]\nvolume='x'\nfd=4\non-trouble='panic'"),
            "disk 1: on-trouble: not a policy",
        ),
        ("--socket-path /s --volume v", None, "--link IF is missing"),
        ("--socket-path /s --link l", None, "--volume NAME is missing"),
        ("--link l --volume v", None, "--socket-path PATH (or --fd N) is missing"),
        ("--socket-path /s --link l --volume v --queues 65", None, "queues is 65: it must be 1 to 64"),
        ("--socket-path /s --link l --volume v --queue-size 100", None, "a power of two from 2 to 1024"),
        ("--socket-path /s --link l --volume v --queue-size 1", None, "a power of two from 2 to 1024"),
        (
            "--socket-path /s --link l --volume v --security keys",
            None,
            "disk 1 (v): the node's public key is missing",
        ),
        ("--socket-path /s --link l --volume v --node-key x", None, "not a public key"),
        ("--socket-path /s --link l --volume v --link-mode udp", None, "--udp-peer IPV4"),
        ("--socket-path /s --link l --volume v --udp-peer 192.0.2.1", None, "needs --link-mode udp"),
        ("--fd 1 --link l --volume v", None, "fd is 1"),
        ("--fd 4 --link l --link-fd 4 --volume v", None, "link-fd: 4 is the socket of a disk, too"),
        ("--fd 4 --link l --link-fd 5 --workers 2 --volume v", None, "--link-fd needs --workers 1"),
        ("", Some("link='l'\ntypo=1"), "unknown field `typo`"),
        (
            "",
            Some("link='l'\n[[disk]]\nvolume='../x'\nsocket-path='/a'"),
            "disk 1: volume: not a volume name",
        ),
        ("", Some("link='l'\n[[disk]]\nvolume='x'\nsocket-path='/a'\nfd=4"), "give either socket-path or fd"),
        (
            "",
            Some("link='l'\n[[disk]]\nvolume='x'\nfd=4\n[[disk]]\nvolume='x'\nfd=5"),
            "two disks share the volume x",
        ),
    ];
    for (line, file, expected) in cases {
        let error = parse(line, file).unwrap_err();
        assert!(error.contains(expected), "{line:?} {file:?} said {error:?}");
    }
    assert!(parse("--socket-path /s --fd 3 --link l --volume v", None).is_err());
    assert!(parse(&format!("{ONE} --node 02:00"), None).unwrap_err().contains("not a MAC address"));
}

#[test]
fn capabilities_are_the_json_of_the_conventions() {
    let value: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
    assert_eq!(value["type"], "block");
    assert_eq!(value["features"], serde_json::json!(["read-only"]));
}

#[test]
fn keys_are_the_default_and_a_disk_may_name_its_own() {
    let (one, two) = ("1".repeat(64), "2".repeat(64));
    let line = format!("--socket-path /s --link l --volume v --node-key {one} --psk /p --state-dir /d");
    let config = parse(&line, None).unwrap();
    assert_eq!(config.key, Some("/d/key".into()));
    let node_key = config.disks[0].node_key.as_ref().unwrap();
    assert_eq!((node_key.public.to_string(), node_key.psk.clone()), (one.clone(), Some("/p".into())));
    let file = format!(
        "link = \"l\"\nkey = \"/k\"\nnode-key = \"{one}\"\n[[disk]]\nvolume = \"a\"\nsocket-path = \"/a\"\n\
         [[disk]]\nvolume = \"b\"\nsocket-path = \"/b\"\nnode-key = \"{two}\"\npsk = \"/q\"\n"
    );
    let config = parse("", Some(&file)).unwrap();
    assert_eq!(config.key, Some("/k".into()));
    let keys: Vec<_> = config.disks.iter().map(|disk| disk.node_key.clone().unwrap()).collect();
    assert_eq!(keys[0], NodeKey { public: one.parse().unwrap(), psk: None });
    assert_eq!(keys[1], NodeKey { public: two.parse().unwrap(), psk: Some("/q".into()) });
    for (more, said) in [
        ("--security none --key /k", "--key needs --security keys"),
        (&format!("--security none --node-key {one}"), "--node-key needs --security keys"),
        ("--security none --psk /p", "--node-key KEY"),
        ("--node-key 12", "not a public key"),
        (&format!("--node-key {one} --socket-mode 0999"), "give it in octal"),
    ] {
        let error = parse(&format!("--socket-path /s --link l --volume v {more}"), None).unwrap_err();
        assert!(error.contains(said), "{more}: {error}");
    }
    let listed = |setting: &str| {
        let file = format!(
            "link = \"l\"\nnode-key = \"{one}\"\n{setting}\n[[disk]]\nvolume = \"a\"\nsocket-path = \"/a\"\n"
        );
        parse("", Some(&file))
    };
    assert_eq!(listed("socket-mode = \"0660\"").unwrap().socket_mode, Some(0o660));
    assert!(listed("socket-mode = \"rw\"").unwrap_err().starts_with("socket-mode: not a mode"));
    let file = "link = \"l\"\nnode-key = \"12\"\n[[disk]]\nvolume = \"a\"\nsocket-path = \"/a\"\n";
    assert!(parse("", Some(file)).unwrap_err().starts_with("node-key: not a public key"));
    let file = "link = \"l\"\n[[disk]]\nvolume = \"a\"\nsocket-path = \"/a\"\nnode-key = \"12\"\n";
    assert!(parse("", Some(file)).unwrap_err().starts_with("disk 1: node-key: not a public key"));
}
