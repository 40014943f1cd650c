//! Loss on the wire: nftables rules on the ingress of a machine's interface, so that any sender's frames are hit alike; over AF_XDP, whose program
//! takes frames before any rule sees them, on the way out of the bridge that leads there.
//!
//! Does not know who sends. Used by the end-to-end tests and the benchmark.

use std::fmt::Write as _;

use crate::netns::Machine;

/// What is dropped on arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// This many of 1000 frames of any kind, at random.
    PerMille(u32),
    /// Frames with more than this many bytes after the Ethernet header.
    LongerThan(u32),
    /// Every frame.
    All,
}

/// Replaces what is dropped on its way to the machine. An empty list ends all loss.
pub fn set(machine: &Machine, drops: &[Drop]) {
    let (namespace, device, hook) = machine.last_sight();
    // On ingress the kernel has taken the Ethernet header off, so `meta length` counts what follows it; on egress it counts all.
    let header_bytes = if hook == "egress" { 14 } else { 0 };
    let mut rules = String::new();
    for drop in drops {
        let condition = match drop {
            Drop::PerMille(0) => continue,
            Drop::PerMille(rate) => format!("numgen random mod 1000 < {rate}"),
            Drop::LongerThan(bytes) => format!("meta length > {}", bytes + header_bytes),
            Drop::All => "meta length >= 0".to_owned(),
        };
        let _ = writeln!(rules, "    {condition} counter drop");
    }
    let chain = format!("type filter hook {hook} device \"{device}\" priority 0; policy accept;");
    let mut table = format!("table netdev loss-{device} {{}}\ndelete table netdev loss-{device}\n");
    if !rules.is_empty() {
        let _ = write!(table, "table netdev loss-{device} {{\n  chain c {{\n    {chain}\n{rules}  }}\n}}\n");
    }
    namespace.shell(&format!("nft -f - <<'END'\n{table}END"));
}

/// The same random loss in both directions: for every machine.
pub fn set_both(machines: &[Machine], per_mille: u32) {
    for machine in machines {
        set(machine, &[Drop::PerMille(per_mille)]);
    }
}

/// Frames dropped by the rules that are in force now.
pub fn dropped(machine: &Machine) -> u64 {
    let (namespace, device, _) = machine.last_sight();
    let listing = namespace.shell(&format!("nft list table netdev loss-{device} 2>/dev/null || true"));
    let words: Vec<&str> = listing.split_whitespace().collect();
    words
        .windows(3)
        .filter(|w| w[0] == "counter" && w[1] == "packets")
        .map(|w| w[2].parse::<u64>().unwrap())
        .sum()
}
