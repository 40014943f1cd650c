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

impl Edit {
    fn apply(&self, source: &str) -> anyhow::Result<String> {
        let places = source.matches(&self.old).count();
        ensure!(places == 1, "its old text is {places} times in {}", self.file.display());
        Ok(source.replace(&self.old, &self.new))
    }
}

fn root() -> anyhow::Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests lie in the workspace")
}

fn list() -> anyhow::Result<List> {
    let text = std::fs::read_to_string(root()?.join("tests/sim/mutants.toml"))?;
    Ok(toml::from_str(&text)?)
}

/// Runs every mutant whose name contains `only`; true if all were found.
///
/// # Errors
/// A copy cannot be made or built, or a mutant does not fit the source any more.
pub(crate) fn run(only: &str, without: &[String]) -> anyhow::Result<bool> {
    let (root, list) = (root()?, list()?);
    let copy = root.join("target/mutants");
    copy_tree(root, &copy.join("tree"))?;
    let (mut found, mut count) = (0, 0);
    for mutant in list.mutant.iter().filter(|mutant| mutant.name.contains(only)) {
        count += 1;
        let result = plant(mutant, &copy, without).with_context(|| format!("mutant {:?}", mutant.name))?;
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

/// The first line about the seed that fails; `None` when none does. The tree is as it was afterwards.
fn plant(mutant: &Mutant, copy: &Path, without: &[String]) -> anyhow::Result<Option<String>> {
    let tree = copy.join("tree");
    let mut before = Vec::new();
    for edit in &mutant.edit {
        let source = std::fs::read_to_string(tree.join(&edit.file))?;
        std::fs::write(tree.join(&edit.file), edit.apply(&source)?)?;
        before.push((&edit.file, source));
    }
    let outcome = build_and_run(copy, without);
    for (file, source) in before.into_iter().rev() {
        std::fs::write(tree.join(file), source)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_fits_the_source() {
        for mutant in list().unwrap().mutant {
            for edit in &mutant.edit {
                let source = std::fs::read_to_string(root().unwrap().join(&edit.file)).unwrap();
                edit.apply(&source).unwrap_or_else(|e| panic!("{}: {e}", mutant.name));
            }
        }
    }
}
