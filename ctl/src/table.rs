//! Tables for people: columns as wide as their widest cell, numbers to the right, and quantities in units that can be read at a glance.
//!
//! Does not know what the cells mean. Called by [`crate::show`].

use crate::daemon::escape_controls;

/// Spaces between two columns.
const GAP: &str = "  ";
/// An empty cell.
const EMPTY: &str = "-";

/// A table being filled row by row.
#[derive(Debug)]
pub(crate) struct Table {
    /// Column names; one that starts with `>` is set to the right.
    columns: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(columns: &'static [&'static str]) -> Table {
        Table { columns, rows: Vec::new() }
    }

    /// Adds a row of as many cells as there are columns. Empty cells show as `-`; control characters, which a hostile peer may have chosen, as escapes.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.columns.len(), "one cell for every column");
        let visible = |cell: String| if cell.is_empty() { EMPTY.to_owned() } else { escape_controls(&cell) };
        self.rows.push(cells.into_iter().map(visible).collect());
    }

    /// The table with a line break after every row and a blank line before it. Columns that are empty in every row are left out; without rows there
    /// is nothing at all.
    pub(crate) fn write_to(&self, out: &mut String) {
        if self.rows.is_empty() {
            return;
        }
        let names: Vec<String> =
            self.columns.iter().map(|name| name.trim_start_matches('>').to_owned()).collect();
        let shown = (0..names.len()).filter(|&column| self.rows.iter().any(|row| row[column] != EMPTY));
        let widths: Vec<(usize, usize)> = shown
            .map(|column| {
                let cells = self.rows.iter().chain([&names]).map(|row| row[column].chars().count());
                (column, cells.max().unwrap_or(0))
            })
            .collect();
        out.push('\n');
        for row in [&names].into_iter().chain(&self.rows) {
            let cells = widths.iter().map(|&(column, width)| {
                let cell = &row[column];
                if self.columns[column].starts_with('>') {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            });
            out.push_str(cells.collect::<Vec<_>>().join(GAP).trim_end());
            out.push('\n');
        }
    }
}

/// Nanoseconds as a latency: three digits and a unit. Empty for 0, which means unknown.
pub(crate) fn latency(ns: u64) -> String {
    let (value, unit) = match ns {
        0 => return String::new(),
        1..1_000 => return format!("{ns}ns"),
        1_000..1_000_000 => (ns as f64 / 1e3, "us"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        1_000_000_000.. => (ns as f64 / 1e9, "s"),
    };
    format!("{value:.*}{unit}", decimals(value))
}

/// Nanoseconds as an age: its two largest units.
pub(crate) fn age(ns: u64) -> String {
    let s = ns / 1_000_000_000;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        86_400.. => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// Bytes in binary units, three digits.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = bytes.ilog2() / 10;
    let value = bytes as f64 / (1u64 << (10 * power)) as f64;
    let exact = bytes.is_multiple_of(1 << (10 * power));
    format!("{value:.*} {}", if exact { 0 } else { decimals(value) }, UNITS[power as usize - 1])
}

/// Decimals that make three digits.
fn decimals(value: f64) -> usize {
    if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_three_digits_and_a_unit() {
        assert_eq!(
            [0, 999, 1_000, 75_231, 999_900].map(latency),
            ["", "999ns", "1.00us", "75.2us", "1000us"]
        );
        assert_eq!([3_500_000, 2_000_000_000].map(latency), ["3.50ms", "2.00s"]);
        assert_eq!(
            [0, 1023, 1024, 9 << 10, 1 << 30].map(bytes),
            ["0 B", "1023 B", "1 KiB", "9 KiB", "1 GiB"]
        );
        assert_eq!([1536, 1_000_000, u64::MAX].map(bytes), ["1.50 KiB", "977 KiB", "16.0 EiB"]);
        assert_eq!(
            [59, 61, 3600, 90_061].map(|s| age(s * 1_000_000_000)),
            ["59s", "1m01s", "1h00m", "1d01h"]
        );
    }

    #[test]
    fn columns_line_up_and_hostile_cells_stay_in_theirs() {
        let mut table = Table::new(&["NAME", ">SIZE", "WHY"]);
        table.row(["a".into(), "10".into(), String::new()]);
        table.row(["\x1b[2Jb\n".into(), "9".into(), "late".into()]);
        let mut out = String::new();
        table.write_to(&mut out);
        // The escaped name has 12 characters: 8 more than NAME, 11 more than a.
        let [eight, eleven] = [8, 11].map(|n| " ".repeat(n));
        let expected =
            format!("\nNAME{eight}  SIZE  WHY\na{eleven}    10  -\n\\u{{1b}}[2Jb\\n     9  late\n");
        assert_eq!(out, expected);
    }

    #[test]
    fn a_table_without_rows_is_not_shown() {
        let mut out = String::new();
        Table::new(&["NAME"]).write_to(&mut out);
        assert_eq!(out, "");
    }

    #[test]
    fn a_column_in_which_nothing_is_said_is_left_out() {
        let mut table = Table::new(&["NAME", "WHY", ">N"]);
        table.row(["a".into(), String::new(), "7".into()]);
        let mut out = String::new();
        table.write_to(&mut out);
        assert_eq!(out, "\nNAME  N\na     7\n");
    }
}
