//! Sizes as people write them: a number of bytes, or of K, M, G or T, which are powers of 1024.
//!
//! Knows no volume. Used by `cirroctl`, and by the node for its volumes in memory.

/// The bytes that `text` names: `512M`, `4G`, `1048576`; `None` when it names none, or more than a number of 64 bits holds.
pub fn parse(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// `bytes` with the largest unit that leaves a whole number, and exact therefore.
pub fn show(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let fits = |(shift, _): &&(u32, &str)| bytes > 0 && bytes.trailing_zeros() >= *shift;
    match units.iter().find(fits) {
        Some((shift, unit)) => format!("{}{unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_read_and_shown_exactly() {
        let sizes =
            [("1K", 1 << 10), ("512M", 512 << 20), ("4G", 4 << 30), ("3T", 3 << 40), ("1025K", 1025 << 10)];
        for (text, bytes) in sizes {
            assert_eq!((parse(text), show(bytes)), (Some(bytes), text.to_owned()));
        }
        assert_eq!((parse("513"), show(513)), (Some(513), "513 bytes".to_owned()));
        assert_eq!((parse("0"), show(0)), (Some(0), "0 bytes".to_owned()));
        assert_eq!(parse("18446744073709551615"), Some(u64::MAX));
        for text in [
            "",
            "K",
            "-1",
            "+1",
            "1k",
            "1KB",
            " 1",
            "1.5G",
            "18446744073709551616",
            "16777216T",
            "1é",
            "0x10",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
