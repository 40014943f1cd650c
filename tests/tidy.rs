//! The house rules that a program can check: crate arrows, file heads, unsafe, sizes, words, and who tests which rule of the protocol.
//!
//! Reads the work tree as text; knows nothing of what the code does. A failure says which file, and what to do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Lines of a source file.
const FILE_LINES_MAX: usize = 700;
/// Lines of a function, from `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 80;
/// Folders that hold nothing of ours.
const SKIPPED: [&str; 6] = [".git", "target", ".cache", "corpus", "artifacts", "node_modules"];

/// Crates, and which of ours each may use: layer 0 is the core, 1 what both daemons share, 2 the daemons (which never see each
/// other), 3 the tests.
const ARROWS: [(&str, &[&str]); 7] = [
    ("protocol", &[]),
    ("seal", &["cirro-protocol"]),
    ("link", &["cirro-protocol"]),
    ("ctl", &["cirro-protocol"]),
    ("backend", &["cirro-protocol", "cirro-seal", "cirro-link", "cirro-ctl"]),
    ("storage-node", &["cirro-protocol", "cirro-seal", "cirro-link", "cirro-ctl"]),
    ("tests", &["cirro-protocol", "cirro-seal", "cirro-link", "cirro-ctl", "cirro-backend", "cirro-node"]),
];

/// Foreign crates that belong to few of ours. `tests` may use what it likes.
const HOMES: [(&str, &[&str]); 11] = [
    ("vhost", &["backend"]),
    ("vhost-user-backend", &["backend"]),
    ("virtio-queue", &["backend"]),
    ("virtio-bindings", &["backend"]),
    ("vm-memory", &["backend"]),
    ("io-uring", &["storage-node", "link"]),
    ("socket2", &["link"]),
    ("crc-fast", &["seal"]),
    ("snow", &["seal"]),
    ("aws-lc-rs", &["seal", "ctl"]),
    ("serde", &["ctl", "backend", "storage-node"]),
];

/// Files in which `unsafe` may be written; each opens with its reason.
const UNSAFE_FILES: [&str; 13] = [
    "backend/src/guest_memory.rs",
    "backend/src/memory_guard.rs",
    "link/src/frame.rs",
    "link/src/inherited.rs",
    "link/src/mmap.rs",
    "link/src/packet/sys.rs",
    "link/src/sys.rs",
    "link/src/udp/receive.rs",
    "link/src/udp/send.rs",
    "link/src/xdp/sys.rs",
    "storage-node/src/memory.rs",
    "storage-node/src/store/uring.rs",
    "tests/sys.rs",
];

struct File {
    /// Relative to the root, with `/`.
    name: String,
    text: String,
}

impl File {
    fn extension(&self) -> &str {
        Path::new(&self.name).extension().and_then(|ext| ext.to_str()).unwrap_or("")
    }

    fn is_code(&self) -> bool {
        matches!(self.extension(), "rs" | "sh" | "lua" | "toml")
            || ["Makefile", ".ci/run"].contains(&self.name.as_str())
    }

    /// The part that is a test: all of a test file, and what follows `#[cfg(test)]` elsewhere.
    fn tests(&self) -> &str {
        let whole =
            self.name.starts_with("tests/") || self.name.starts_with("qemu/") || self.name.contains("/tests");
        match self.extension() {
            _ if self.name == "tests/tidy.rs" => "",
            "rs" | "sh" if whole => &self.text,
            "rs" => self.text.find("#[cfg(test)]").map_or("", |at| &self.text[at..]),
            _ => "",
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the work tree").to_owned()
}

fn files() -> Vec<File> {
    let root = root();
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_symlink() || SKIPPED.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
                files.push(File { name, text });
            }
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(files.iter().any(|file| file.name == "protocol/src/lib.rs"), "the walk sees the sources");
    files
}

fn sources() -> Vec<File> {
    files().into_iter().filter(|file| file.extension() == "rs").collect()
}

/// Fails with every complaint, one a line.
fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// Names below `[section]` of a Cargo.toml.
fn dependencies(manifest: &str, section: &str) -> Vec<String> {
    let lines = manifest.lines().skip_while(|line| line.trim() != section).skip(1);
    let lines = lines.take_while(|line| !line.starts_with('[')).map(str::trim);
    let names = lines.filter(|line| line.contains('=') && !line.starts_with('#'));
    names.map(|line| line.split(['.', ' ', '=']).next().unwrap().to_owned()).collect()
}

#[test]
fn crates_use_only_layers_below_their_own() {
    let mut complaints = Vec::new();
    for (home, allowed) in ARROWS {
        let manifest = std::fs::read_to_string(root().join(home).join("Cargo.toml")).unwrap();
        for name in dependencies(&manifest, "[dependencies]") {
            let ours = name.starts_with("cirro-");
            let elsewhere = HOMES.iter().any(|(krate, homes)| *krate == name && !homes.contains(&home));
            if (ours && !allowed.contains(&name.as_str())) || (elsewhere && home != "tests") {
                complaints.push(format!(
                    "{home}/Cargo.toml: may not use {name} (see docs/ARCHITECTURE.md, Crates)"
                ));
            }
        }
    }
    none(&complaints);
    let core = std::fs::read_to_string(root().join("protocol/Cargo.toml")).unwrap();
    assert_eq!(dependencies(&core, "[dependencies]"), ["thiserror"], "the core uses nothing that does I/O");
    let lib = std::fs::read_to_string(root().join("protocol/src/lib.rs")).unwrap();
    assert!(lib.contains("#![no_std]") && lib.contains("#![forbid(unsafe_code)]"));
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let fuzz = std::fs::read_to_string(root().join("tests/fuzz/Cargo.toml")).unwrap();
    let reasons = std::fs::read_to_string(root().join("docs/decisions/0001-dependencies.md")).unwrap();
    let mut names = dependencies(&manifest, "[workspace.dependencies]");
    names.extend(dependencies(&fuzz, "[dependencies]"));
    names.retain(|name| !name.starts_with("cirro-"));
    assert!(names.len() > 10, "{names:?}");
    let missing = names.iter().filter(|name| !reasons.contains(&format!("| `{name}` |")));
    let complaints: Vec<_> =
        missing.map(|name| format!("docs/decisions/0001-dependencies.md: no row for `{name}`")).collect();
    none(&complaints);
}

#[test]
fn every_source_file_says_what_it_is() {
    let silent = sources().into_iter().filter(|file| !file.text.starts_with("//! "));
    let complaints: Vec<_> = silent.map(|file| format!("{}: does not open with //!", file.name)).collect();
    none(&complaints);
}

#[test]
fn unsafe_is_written_in_named_files_only() {
    let keyword = concat!("uns", "afe");
    let allowance = format!("allow({keyword}_code");
    let mut complaints = Vec::new();
    for file in sources() {
        let named = UNSAFE_FILES.contains(&file.name.as_str());
        let packed: String = file.text.split_whitespace().collect();
        let opened = packed.contains(&allowance);
        let code = file.text.lines().map(|line| line.split("//").next().unwrap());
        let forms = ["{", "fn ", "impl ", "trait ", "extern "].map(|form| format!("{keyword} {form}"));
        let used = code.into_iter().any(|line| forms.iter().any(|form| line.contains(form)));
        if !named && (opened || used) {
            complaints
                .push(format!("{}: {keyword} outside of the files that tests/tidy.rs names", file.name));
        }
        if named && !packed.contains(&format!("#![{allowance},reason=\"")) {
            complaints.push(format!("{}: no #![{allowance}, reason = …)]", file.name));
        }
    }
    for name in UNSAFE_FILES {
        if !root().join(name).is_file() {
            complaints.push(format!("tests/tidy.rs names {name}, which does not exist"));
        }
    }
    none(&complaints);
}

#[test]
fn files_and_functions_fit_a_reader() {
    let mut complaints = Vec::new();
    for file in files().into_iter().filter(|file| file.is_code() && file.extension() != "toml") {
        let lines: Vec<&str> = file.text.lines().collect();
        if lines.len() > FILE_LINES_MAX {
            complaints.push(format!("{}: {} lines, at most {FILE_LINES_MAX}", file.name, lines.len()));
        }
        if file.extension() != "rs" {
            continue;
        }
        for (start, line) in lines.iter().enumerate().filter(|(_, line)| is_function(line)) {
            let indent = line.len() - line.trim_start().len();
            let closing = format!("{}}}", " ".repeat(indent));
            let length = lines[start..].iter().position(|line| *line == closing).map_or(1, |end| end + 1);
            let one_line = line.ends_with('}') || line.ends_with(';');
            if !one_line && length > FUNCTION_LINES_MAX {
                complaints.push(format!("{}:{}: function of {length} lines", file.name, start + 1));
            }
        }
    }
    none(&complaints);
}

fn is_function(line: &str) -> bool {
    let words = line.trim_start().split(' ').take_while(|word| *word != "fn");
    let prefix = |word: &str| {
        word.starts_with("pub")
            || matches!(word, "const" | "async" | "extern" | "\"C\"")
            || word == concat!("uns", "afe")
    };
    line.contains("fn ") && words.into_iter().all(prefix)
}

#[test]
fn code_has_no_marks_of_unfinished_work() {
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("dbg", "!("),
        concat!("#[ign", "ore"),
    ];
    let mut complaints = Vec::new();
    for file in files().into_iter().filter(File::is_code) {
        for (number, line) in (1..).zip(file.text.lines()) {
            for word in words.iter().filter(|word| line.contains(*word)) {
                complaints.push(format!("{}:{number}: {word}", file.name));
            }
        }
    }
    none(&complaints);
}

#[test]
fn text_has_no_stray_white_space() {
    let mut complaints = Vec::new();
    for file in files() {
        let ours = file.is_code() || matches!(file.extension(), "md" | "hex" | "txt" | "xml" | "json");
        if !ours {
            continue;
        }
        for (number, line) in (1..).zip(file.text.lines()) {
            let tab = line.contains('\t') && file.name != "Makefile";
            if line.ends_with([' ', '\t', '\r']) || tab {
                complaints.push(format!("{}:{number}: trailing white space or a tab", file.name));
            }
        }
        if !file.text.is_empty() && !file.text.ends_with('\n') {
            complaints.push(format!("{}: does not end with a line feed", file.name));
        }
    }
    none(&complaints);
}

#[test]
fn the_gate_runs_every_test_there_is() {
    let manifest = std::fs::read_to_string(root().join("tests/Cargo.toml")).unwrap();
    let gate = std::fs::read_to_string(root().join("tests/run-suites.sh")).unwrap();
    let tests = manifest.split("[[test]]").skip(1).filter_map(|part| part.split('"').nth(1));
    // What lib, binaries and this pattern do not name needs machines of its own.
    assert!(gate.contains(r#"--lib --bins --test "[!e]*""#));
    let forgotten = tests.filter(|name| name.starts_with('e') && !gate.contains(&format!("--test {name} ")));
    none(
        &forgotten.map(|name| format!("tests/run-suites.sh does not run --test {name}")).collect::<Vec<_>>(),
    );
}

#[test]
fn the_readme_shows_the_machine_that_libvirt_is_tested_with() {
    let file = |name: &str| std::fs::read_to_string(root().join(name)).unwrap();
    let (readme, domain) = (file("README.md"), file("qemu/libvirt/domain.xml"));
    let shown = readme.split("```xml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let tested: Vec<&str> = domain.lines().map(str::trim).collect();
    let strange: Vec<String> = shown
        .lines()
        .filter(|line| !tested.contains(&line.trim()))
        .map(|line| format!("README.md: {} is not in qemu/libvirt/domain.xml", line.trim()))
        .collect();
    none(&strange);
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut complaints = Vec::new();
    for file in files().into_iter().filter(|file| file.extension() == "md") {
        let folder = root().join(&file.name).parent().unwrap().to_owned();
        let targets =
            file.text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
        for target in targets.filter(|target| !target.contains("://")) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let there = if path.is_empty() { file.text.clone() } else { read(&folder.join(path)) };
            let anchors: BTreeSet<String> =
                there.lines().filter(|line| line.starts_with('#')).map(anchor_of).collect();
            let missing = there.is_empty() || !(anchor.is_empty() || anchors.contains(anchor));
            if missing {
                complaints.push(format!("{}: the link to {target} leads nowhere", file.name));
            }
        }
    }
    none(&complaints);
}

/// The text of a file; of a folder or of nothing, what tells them apart.
fn read(path: &Path) -> String {
    if path.is_dir() { "folder".into() } else { std::fs::read_to_string(path).unwrap_or_default() }
}

fn anchor_of(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    kept.chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// Ids such as `P-07` in a text.
fn ids(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("P-") {
        let after_word = text[..at].chars().next_back().is_some_and(char::is_alphanumeric);
        let digits: String = text[at + 2..].chars().take_while(char::is_ascii_digit).collect();
        if !after_word && (2..=3).contains(&digits.len()) {
            found.insert(format!("P-{digits}"));
        }
    }
    found
}

#[test]
fn ids_are_found_where_they_stand_alone() {
    assert_eq!(ids("(P-07), P-101; UDP-12 P-1 P-x").into_iter().collect::<Vec<_>>(), ["P-07", "P-101"]);
}

/// Every rule of the protocol is defined once; a test cites it, or `tests/uncited.txt` admits that none does.
#[test]
fn every_rule_of_the_protocol_is_cited_by_a_test() {
    let text = std::fs::read_to_string(root().join("docs/PROTOCOL.md")).unwrap();
    let mut defined: BTreeMap<String, usize> = BTreeMap::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("- **P-")) {
        *defined.entry(format!("P-{}", line.split('*').next().unwrap())).or_default() += 1;
    }
    assert!(defined.len() >= 100, "rules keep their ids: {}", defined.len());
    let uncited_text = std::fs::read_to_string(root().join("tests/uncited.txt")).unwrap();
    let admitted: BTreeSet<String> =
        uncited_text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    let mut cited: BTreeMap<String, String> = BTreeMap::new();
    for file in files() {
        cited.extend(ids(file.tests()).into_iter().map(|id| (id, file.name.clone())));
    }
    let mut complaints = Vec::new();
    for (id, count) in &defined {
        match (cited.get(id), admitted.contains(id)) {
            (Some(file), true) => {
                complaints.push(format!("{id} is cited by {file}: remove it from tests/uncited.txt"))
            }
            (None, false) => complaints.push(format!("{id}: no test cites it")),
            (Some(_), false) | (None, true) => {}
        }
        if *count > 1 {
            complaints.push(format!("{id} is defined {count} times in docs/PROTOCOL.md"));
        }
    }
    let known = |id: &&String| !defined.contains_key(*id);
    complaints
        .extend(cited.keys().filter(known).map(|id| format!("{id}, cited by {}, is not defined", cited[id])));
    complaints
        .extend(admitted.iter().filter(known).map(|id| format!("{id} in tests/uncited.txt is not defined")));
    none(&complaints);
}
