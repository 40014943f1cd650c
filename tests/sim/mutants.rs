//! Plants each deliberate bug of `mutants.toml` in a copy of the tree and sees whether the simulator finds it.
//!
//! Knows files and cargo; does not know what the bugs mean. Called by `main` for `--mutants`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde::Deserialize;

/// Seeds within which a bug must be found.
const SEEDS: u64 = 200;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    edit: Vec<Edit>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    file: PathBuf,
    old: String,
    new: String,
}

/// Runs every mutant whose name contains `only`; true if all were found.
///
/// # Errors
/// A copy cannot be made or built, or a mutant does not fit the source any more.
pub(crate) fn run(only: &str, without: &[String]) -> anyhow::Result<bool> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests lie in the workspace")?;
    let text = std::fs::read_to_string(root.join("tests/sim/mutants.toml"))?;
    let list: List = toml::from_str(&text)?;
    let copy = root.join("target/mutants");
    copy_tree(root, &copy.join("tree"))?;
    let (mut found, mut count) = (0, 0);
    for mutant in list.mutant.iter().filter(|mutant| mutant.name.contains(only)) {
        count += 1;
        let result =
            plant(mutant, root, &copy, without).with_context(|| format!("mutant {:?}", mutant.name))?;
        found += u32::from(result.is_some());
        let what = result.unwrap_or_else(|| format!("NOT FOUND in {SEEDS} seeds"));
        println!("{}: {what}", mutant.name);
    }
    println!("{found} of {count} found");
    Ok(found == count)
}

/// The files that git knows, and those it does not ignore.
fn copy_tree(root: &Path, to: &Path) -> anyhow::Result<()> {
    let listed = Command::new("git")
        .args([
            "-C",
            &root.display().to_string(),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .context("git cannot be run")?;
    ensure!(listed.status.success(), "git cannot list the files of {}", root.display());
    for name in String::from_utf8(listed.stdout)?.split_terminator('\0') {
        let (from, to) = (root.join(name), to.join(name));
        if !from.exists() {
            continue;
        }
        std::fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
        let same = std::fs::read(&to).is_ok_and(|there| std::fs::read(&from).is_ok_and(|here| here == there));
        if !same {
            std::fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    Ok(())
}

/// The first line about the seed that fails; `None` when none does.
fn plant(mutant: &Mutant, root: &Path, copy: &Path, without: &[String]) -> anyhow::Result<Option<String>> {
    let tree = copy.join("tree");
    for edit in &mutant.edit {
        let source = std::fs::read_to_string(tree.join(&edit.file))?;
        let places = source.matches(&edit.old).count();
        ensure!(places == 1, "its old text is {places} times in {}", edit.file.display());
        std::fs::write(tree.join(&edit.file), source.replace(&edit.old, &edit.new))?;
    }
    let outcome = build_and_run(copy, without);
    for edit in &mutant.edit {
        std::fs::copy(root.join(&edit.file), tree.join(&edit.file))?;
    }
    outcome
}

fn build_and_run(copy: &Path, without: &[String]) -> anyhow::Result<Option<String>> {
    let built = Command::new("cargo")
        .args(["build", "--quiet", "--profile", "checked", "-p", "cirro-tests", "--bin", "cirro-sim"])
        .current_dir(copy.join("tree"))
        .env("CARGO_TARGET_DIR", copy.join("target"))
        .env("RUSTFLAGS", "--cap-lints=warn")
        .stderr(Stdio::piped())
        .output()?;
    ensure!(built.status.success(), "it does not build:\n{}", String::from_utf8_lossy(&built.stderr));
    let ran = Command::new(copy.join("target/checked/cirro-sim"))
        .args(["--from", "1", "--count", &SEEDS.to_string()])
        .args(without.iter().flat_map(|kind| ["--without", kind]))
        .stderr(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let line = said.lines().filter(|line| line.contains("VIOLATION")).min_by_key(|line| seed_of(line));
    Ok(line.map(|line| line.chars().take(160).collect()))
}

fn seed_of(line: &str) -> u64 {
    let digits: String =
        line.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(u64::MAX)
}
