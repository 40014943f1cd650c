//! Reads the annotated frames of this folder, and the `layout` tables of `docs/PROTOCOL.md`.
//!
//! A golden file is text: `# …` says what it is, `nonces SENDER RECEIVER` what its tag was made with, `[section]` names a layout of the
//! specification (or `data`, `control`, `rest`, `trailer`), and each line below gives a field, its bytes and after `=` its value. Bytes
//! are hexadecimal; `aa bb * 3` repeats, `+` joins. Knows nothing of the code under test. Used by `golden.rs` and `dissector.rs`.

use std::path::{Path, PathBuf};

/// What a field holds, by the type its layout gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// An integer.
    Number(u64),
    /// An address, a uuid or a text.
    Text(String),
}

/// One row of a layout table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Bytes.
    pub(crate) size: usize,
    /// `u8` … `u64`, `be16`, `mac`, `uuid`, `text` or `zero`.
    pub(crate) kind: String,
    /// The field's name.
    pub(crate) field: String,
}

/// One structure of the specification.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// Its name.
    pub(crate) name: String,
    /// Its fields in order; offsets and the size of the whole have been checked.
    pub(crate) rows: Vec<Row>,
}

/// One line of a golden file.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    /// The field's name.
    pub(crate) name: String,
    /// Its bytes.
    pub(crate) bytes: Vec<u8>,
    /// What the file says that they mean.
    pub(crate) value: Option<String>,
}

/// The lines below one `[section]`.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    /// The layout's name, or what else it is.
    pub(crate) name: String,
    /// Its fields.
    pub(crate) fields: Vec<Field>,
}

impl Section {
    /// The bytes of all its fields.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.fields.iter().flat_map(|field| field.bytes.clone()).collect()
    }

    /// The values of its fields but the reserved ones: decoded by `layout`, which must agree with what the file says.
    pub(crate) fn values(&self, layout: &Layout) -> Vec<(String, Value)> {
        let mut values = Vec::new();
        for (field, row) in self.fields.iter().zip(&layout.rows) {
            assert_eq!((&field.name, field.bytes.len()), (&row.field, row.size), "[{}]", self.name);
            let read = decode(&row.kind, &field.bytes);
            let said = field.value.as_deref().map_or(Value::Number(0), |text| annotated(&row.kind, text));
            assert_eq!(read, said, "[{}] {}", self.name, field.name);
            if row.kind != "zero" {
                values.push((field.name.clone(), read));
            }
        }
        values
    }
}

/// A golden frame.
#[derive(Clone, Debug)]
pub(crate) struct Golden {
    /// The file's name without `.hex`.
    pub(crate) name: String,
    /// Session nonces of sender and receiver.
    pub(crate) nonces: (u64, u64),
    /// Its parts in order.
    pub(crate) sections: Vec<Section>,
}

impl Golden {
    /// The whole frame.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.sections.iter().flat_map(Section::bytes).collect()
    }
}

/// The root of the work tree.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("tests/ lies in the work tree").to_owned()
}

/// All golden frames, by name.
pub(crate) fn goldens() -> Vec<Golden> {
    let folder = root().join("tests/golden");
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "hex"));
    paths.sort();
    assert!(paths.len() >= 18, "golden frames are only ever added: {paths:?}");
    paths.iter().map(|path| read_golden(path)).collect()
}

/// All layouts of the specification; panics if one has a gap, an overlap or another size than it says.
pub(crate) fn layouts() -> Vec<Layout> {
    let text = std::fs::read_to_string(root().join("docs/PROTOCOL.md")).unwrap();
    let mut layouts = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["layout", name, bytes] = words.as_slice() else { continue };
        let rows = lines.by_ref().skip(1).take_while(|line| *line != "```");
        let mut layout = Layout { name: (*name).into(), rows: Vec::new() };
        let end = rows.fold(0, |at, line| {
            let (offset, row) = read_row(line).unwrap_or_else(|| panic!("layout {name}: {line:?}"));
            assert_eq!(offset, at, "layout {name}: {line:?}");
            let next = at + row.size;
            layout.rows.push(row);
            next
        });
        assert_eq!(bytes.parse(), Ok(end), "layout {name}");
        layouts.push(layout);
    }
    layouts
}

fn read_row(line: &str) -> Option<(usize, Row)> {
    let mut words = line.split_whitespace();
    let (offset, size) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((offset, Row { size, kind: words.next()?.into(), field: words.next()?.into() }))
}

/// What `bytes` mean as a field of type `kind`.
fn decode(kind: &str, bytes: &[u8]) -> Value {
    let hex = |separator: &str| bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(separator);
    match kind {
        "u8" | "u16" | "u24" | "u32" | "u64" => {
            let bits: usize = kind[1..].parse().unwrap();
            assert_eq!(bits, bytes.len() * 8, "a {kind} of {} bytes", bytes.len());
            Value::Number(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
        }
        "be16" => {
            assert_eq!(bytes.len(), 2);
            Value::Number(u64::from(bytes[0]) << 8 | u64::from(bytes[1]))
        }
        "mac" => Value::Text(hex(":")),
        "uuid" => Value::Text(hex("")),
        "text" => {
            let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
            assert!(bytes[end..].iter().all(|b| *b == 0), "text is padded with NUL");
            Value::Text(String::from_utf8(bytes[..end].to_vec()).unwrap())
        }
        "zero" => {
            assert!(bytes.iter().all(|b| *b == 0), "reserved bytes are zero");
            Value::Number(0)
        }
        other => panic!("unknown type {other}"),
    }
}

/// The value that a golden file writes after `=`.
fn annotated(kind: &str, text: &str) -> Value {
    match (kind, text.strip_prefix("0x")) {
        ("mac" | "uuid" | "text", _) => Value::Text(text.trim_matches('"').into()),
        (_, Some(hex)) => Value::Number(u64::from_str_radix(hex, 16).unwrap()),
        (_, None) => Value::Number(text.parse().unwrap()),
    }
}

fn read_golden(path: &Path) -> Golden {
    let text = std::fs::read_to_string(path).unwrap();
    let name = path.file_stem().unwrap().to_string_lossy().into_owned();
    let mut golden = Golden { name, nonces: (0, 0), sections: Vec::new() };
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(nonces) = line.strip_prefix("nonces ") {
            let (sender, receiver) = nonces.split_once(' ').unwrap();
            golden.nonces = (sender.parse().unwrap(), receiver.parse().unwrap());
        } else if let Some(section) = line.strip_prefix('[') {
            let name = section.trim_end_matches(']').into();
            golden.sections.push(Section { name, fields: Vec::new() });
        } else {
            let field = read_field(line);
            golden.sections.last_mut().expect("a [section] before the first field").fields.push(field);
        }
    }
    golden
}

fn read_field(line: &str) -> Field {
    let (name, rest) = line.split_once(' ').unwrap_or_else(|| panic!("no bytes in {line:?}"));
    let (hex, value) =
        rest.split_once('=').map_or((rest, None), |(hex, value)| (hex, Some(value.trim().to_owned())));
    let mut bytes = Vec::new();
    for run in hex.split('+') {
        let (unit, times) =
            run.split_once('*').map_or((run, 1), |(unit, times)| (unit, times.trim().parse().unwrap()));
        let unit: Vec<u8> =
            unit.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        bytes.extend(unit.repeat(times));
    }
    Field { name: name.into(), bytes, value }
}
