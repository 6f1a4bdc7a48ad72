//! Numbers with a suffix, as sizes and rates are written by people.

/// What to say where a size was not understood.
pub const EXPECTED: &str = "a number, with an optional suffix K, M, G, T, P or E";

/// Reads `4096`, `0x1000`, `4K`, `1.5G` (powers of 1024). `None` when it is no such number or
/// does not fit into 64 bits.
pub fn parse(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // A sign would be accepted by the standard library, and not by a reader.
        let digits = hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        return if digits {
            u64::from_str_radix(hex, 16).ok()
        } else {
            None
        };
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    match digits.split_once('.') {
        None => digits.parse::<u64>().ok()?.checked_mul(1 << shift),
        // A fraction of a byte makes no sense.
        Some(_) if shift == 0 => None,
        Some((whole, fraction)) => with_fraction(whole, fraction, shift),
    }
}

/// `whole.fraction` times a power of two, rounded down.
fn with_fraction(whole: &str, fraction: &str, shift: u32) -> Option<u64> {
    let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if fraction.is_empty() || fraction.len() > 15 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = (fraction.parse::<u128>().ok()? << shift) / scale;
    whole.checked_add(u64::try_from(part).ok()?)
}

#[cfg(test)]
mod tests {
    use super::parse;

    /// Would catch a suffix with the wrong weight, and text that is taken for a number.
    #[test]
    fn sizes() {
        assert_eq!(parse("0"), Some(0));
        assert_eq!(parse("512K"), Some(512 << 10));
        assert_eq!(parse("20M"), Some(20 << 20));
        assert_eq!(parse("1.5G"), Some(3 << 29));
        assert_eq!(parse("0x200"), Some(512));
        assert_eq!(parse("15E"), Some(15 << 60));
        for bad in [
            "", "K", "1x", "-1", "+1", "16E", "1.5", "1..5K", ".5K", "1.K", "0x", "0x+1", "1KB",
            " 1",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
