//! Writes the golden frames and their control payloads as raw bytes into `DIR/{frames,long_frames,control_payloads}`: where fuzzing
//! starts from. Called by `tests/fuzz/run.sh`.

#[path = "reader.rs"]
mod reader;

use std::path::Path;

fn main() {
    let folder = std::env::args().nth(1).expect("usage: seeds DIR");
    let layouts = reader::layouts();
    let payloads = ["open-request", "volume-info", "ack-range"];
    for golden in reader::goldens() {
        let long = golden.sections.iter().any(|section| section.name == "long-header");
        write(&folder, if long { "long_frames" } else { "frames" }, &golden.name, &golden.bytes());
        for (number, section) in golden.sections.iter().enumerate() {
            let layout = layouts
                .iter()
                .find(|layout| layout.name == section.name && payloads.contains(&layout.name.as_str()));
            if let Some(layout) = layout {
                assert!(!section.values(layout).is_empty());
                write(&folder, "control_payloads", &format!("{}-{number}", golden.name), &section.bytes());
            }
        }
        assert!(golden.nonces == (0, 0) || !long);
    }
}

fn write(folder: &str, target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(folder).join(target);
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(folder.join(name), bytes))
        .expect("the seed can be written");
}
