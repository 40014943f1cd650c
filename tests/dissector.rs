//! The Wireshark dissector shows every field of every golden frame as the specification has it, and names what is wrong with a bad one.
//!
//! Writes the golden frames into a capture file and lets `tshark` read it with `docs/cirrostratus.lua`. Needs tshark (Debian package
//! `tshark`, installed by `make test-install`). Does not use the code under test.

#[path = "golden/reader.rs"]
mod reader;

use std::path::PathBuf;
use std::process::Command;

use reader::{Golden, Value, goldens, layouts, root};

/// Frames in a capture file: nanosecond pcap, link type Ethernet.
struct Capture(PathBuf);

impl Capture {
    fn new(name: &str, frames: &[Vec<u8>]) -> Capture {
        let path = std::env::temp_dir().join(format!("cirro-dissector-{}-{name}.pcap", std::process::id()));
        let mut bytes = [0xa1b2_3c4du32, 0x0004_0002, 0, 0, 262_144, 1].map(u32::to_le_bytes).concat();
        for (second, frame) in (1u32..).zip(frames) {
            let length = frame.len() as u32;
            bytes.extend([second, 0, length, length].map(u32::to_le_bytes).concat());
            bytes.extend(frame);
        }
        std::fs::write(&path, bytes).unwrap();
        Capture(path)
    }

    /// What tshark prints for `columns`, one row per frame, all occurrences of a field joined by commas.
    fn columns(&self, columns: &[String]) -> Vec<Vec<String>> {
        let script = root().join("docs/cirrostratus.lua");
        let mut command = Command::new("tshark");
        command.arg("-X").arg(format!("lua_script:{}", script.display())).arg("-r").arg(&self.0);
        command.args(["-T", "fields", "-E", "separator=|", "-E", "aggregator=,", "-E", "occurrence=a"]);
        command.args(columns.iter().flat_map(|column| ["-e", column]));
        let output = command.output().expect("tshark runs; `make test-install` installs it");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !errors.contains("Lua:"), "tshark: {errors}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).expect("the capture file is still there");
    }
}

/// The handshake first, so that the dissector knows the nonces of the others.
fn handshake_first() -> Vec<Golden> {
    let mut goldens = goldens();
    goldens.sort_by_key(|golden| match golden.name.as_str() {
        "hello" => 0,
        "hello-reply" => 1,
        _ => 2,
    });
    goldens
}

fn same(shown: &str, expected: &Value) -> bool {
    match expected {
        Value::Text(text) => shown == text,
        Value::Number(number) => match shown.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16) == Ok(*number),
            None => shown.parse() == Ok(*number),
        },
    }
}

#[test]
fn every_field_of_every_golden_frame_is_shown() {
    let goldens = handshake_first();
    let capture = Capture::new("fields", &goldens.iter().map(Golden::bytes).collect::<Vec<_>>());
    for layout in layouts().iter().filter(|layout| layout.name != "ethernet") {
        let rows: Vec<_> = layout.rows.iter().filter(|row| row.kind != "zero").collect();
        let structure = layout.name.replace('-', "_");
        let columns: Vec<_> = rows.iter().map(|row| format!("cirro.{structure}.{}", row.field)).collect();
        let shown = capture.columns(&columns);
        assert_eq!(shown.len(), goldens.len(), "one row per frame");
        for (golden, line) in goldens.iter().zip(&shown) {
            let sections: Vec<_> =
                golden.sections.iter().filter(|section| section.name == layout.name).collect();
            for (column, (row, cell)) in rows.iter().zip(line).enumerate() {
                let expected: Vec<Value> =
                    sections.iter().map(|s| s.values(layout)[column].1.clone()).collect();
                let cells: Vec<&str> =
                    if expected.is_empty() { Vec::new() } else { cell.split(',').collect() };
                let fits =
                    cells.len() == expected.len() && cells.iter().zip(&expected).all(|(c, e)| same(c, e));
                assert!(
                    fits,
                    "{} {structure}.{}: shown {cell:?}, expected {expected:?}",
                    golden.name, row.field
                );
                assert!(
                    !expected.is_empty() || cell.is_empty(),
                    "{} shows {structure}.{}",
                    golden.name,
                    row.field
                );
            }
        }
    }
}

#[test]
fn payloads_checksums_and_tags_are_shown_and_right() {
    let goldens = handshake_first();
    let capture = Capture::new("tags", &goldens.iter().map(Golden::bytes).collect::<Vec<_>>());
    let columns =
        ["cirro.data", "cirro.crc", "cirro.tag", "cirro.tag_state", "_ws.expert.message"].map(str::to_owned);
    for (golden, line) in goldens.iter().zip(capture.columns(&columns)) {
        let trailer = golden.sections.last().unwrap();
        let value = |field: &reader::Field| field.value.clone().unwrap();
        let crcs: Vec<_> = trailer.fields.iter().filter(|f| f.name == "crc").map(value).collect();
        let tag: Vec<_> = trailer.fields.iter().filter(|f| f.name == "tag").map(value).collect();
        let hex = |bytes: &Vec<u8>| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let data = golden.sections.iter().filter(|s| s.name == "data").map(|s| hex(&s.fields[0].bytes));
        assert_eq!(line[0], data.collect::<Vec<_>>().join(","), "{}", golden.name);
        assert_eq!(line[1], crcs.join(","), "{}", golden.name);
        assert_eq!(line[2..4], [tag.join(","), "good".into()], "{}", golden.name);
        let expected = if golden.name == "resp-open" { "answered ESTALE" } else { "" };
        assert_eq!(line[4], expected, "{}", golden.name);
    }
}

/// With keys what is in clear is shown, and nothing is made up of what is not.
#[test]
fn frames_with_keys_show_what_is_in_clear() {
    let header = |vt: u8, code: u8| {
        let mut bytes = vec![2; 12];
        bytes.extend([0x88, 0xb5, vt, code, 0x28, 0x01, 0x78, 0x56, 0x34, 0x12]);
        bytes
    };
    let short = [header(0x21, 0), 77u64.to_le_bytes().to_vec(), vec![0xa5; 64]].concat();
    let hello = [header(0x31, 1), vec![0; 26], vec![0xa5; 256]].concat();
    let cut = hello[..300].to_vec();
    let capture = Capture::new("keys", &[short, hello, cut]);
    let columns = [
        "cirro.frame_header.pn",
        "cirro.frame_header.ack_pn",
        "cirro.sealed",
        "cirro.mode",
        "_ws.expert.message",
    ];
    let shown = capture.columns(&columns.map(str::to_owned));
    assert_eq!(shown[0][..2], ["77", ""], "{shown:?}");
    assert_eq!(
        (shown[0][2].as_str(), shown[0][3].as_str(), shown[0][4].as_str()),
        ("a5".repeat(64).as_str(), "1", "")
    );
    assert_eq!((shown[1][2].as_str(), shown[1][4].as_str()), ("a5".repeat(224).as_str(), ""));
    assert_eq!(shown[2][4], "a LONG frame with keys has 304 bytes");
}

#[test]
fn what_is_wrong_with_a_frame_is_named() {
    let goldens = handshake_first();
    let find = |name: &str| goldens.iter().find(|golden| golden.name == name).unwrap().bytes();
    let damage = |name: &str, offset: usize, value: u8| {
        let mut bytes = find(name);
        assert_ne!(bytes[offset], value);
        bytes[offset] = value;
        bytes
    };
    let hello = find("hello");
    let cases = [
        (hello.clone(), ""),
        (find("hello-reply"), ""),
        (damage("req-reads", 14, 0x40), "unknown version"),
        (damage("req-reads", 14, 0x22), "unknown mode"),
        (damage("req-reads", 14 + 34 + 10, 77), "unknown kind"),
        (find("wdata")[..2000].to_vec(), "a message reaches past the end"),
        ([find("ping-pad"), vec![0]].concat(), "a message reaches past the end"),
        (damage("wdata", 14 + 34 + 16 + 5, 0), "CRC of a payload does not fit"),
        (damage("ping-pad", 14 + 30, 9), "tag does not fit"),
        (damage("hello", 14 + 34 + 1, b'w'), "tag does not fit"),
        (damage("hello", 14 + 34 + 130, 1), "the rest of the body is not zero,tag does not fit"),
        (damage("hello", 14 + 20, 1), "reserved bytes are not zero,tag does not fit"),
        (damage("hello", 14 + 1, 3), "unknown type of LONG frame,tag does not fit"),
        (hello[..180].to_vec(), "a LONG frame has 204 bytes"),
        ([hello, vec![0]].concat(), "bytes after the tag"),
        (find("req-open")[..60].to_vec(), "shorter than headers and tag"),
    ];
    let frames: Vec<_> = cases.iter().map(|(frame, _)| frame.clone()).collect();
    let shown =
        Capture::new("bad", &frames).columns(&["_ws.expert.message".to_owned(), "frame.number".to_owned()]);
    assert_eq!(shown.len(), cases.len());
    for (number, (line, (_, expected))) in shown.iter().zip(&cases).enumerate() {
        assert_eq!(line[0], *expected, "case {number}");
    }
}
