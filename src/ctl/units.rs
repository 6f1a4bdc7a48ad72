//! Sizes, rates and times as people write and read them.

use super::Failure;
use crate::options::size;
use std::time::Duration;

/// Reads a rate in bytes per second: `512K`, `20M`, `1G`, or `0` and `unlimited` for no limit.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    if text == "unlimited" {
        return Ok(0);
    }
    let number = text.strip_suffix("/s").unwrap_or(text);
    match size::parse(number) {
        // QMP's integers are signed.
        Some(rate) if i64::try_from(rate).is_ok() => Ok(rate),
        _ => Err("expected bytes per second such as 512K, 20M or 1G, or 'unlimited'".to_owned()),
    }
}

/// `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = "KiB";
    for larger in UNITS.iter().skip(1) {
        // What would be rounded to 1024.0 belongs to the next unit.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{value:.1} {unit}")
}

/// A speed limit, 0 being none.
pub fn limit(rate: u64) -> String {
    if rate == 0 {
        "unlimited".to_owned()
    } else {
        format!("{}/s", bytes(rate))
    }
}

/// How much of `total` is done. Only what is whole is 100 %.
pub fn percent(done: u64, total: u64) -> String {
    if total == 0 || done >= total {
        return "100.0%".to_owned();
    }
    let tenths = (u128::from(done) * 1000) / u128::from(total);
    format!("{}.{}%", tenths / 10, tenths % 10)
}

/// `0:42`, `1:05:09`.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

/// What to say of a size that was not understood.
pub fn size_error(what: &str, text: &str) -> String {
    format!("{what}: '{text}' is no size (expected {})", size::EXPECTED)
}

/// The size that is meant where a disk has `old` bytes: `20G`, or `+1G` and `-1G` for more or less.
///
/// # Errors
/// When it says no size, or one that no disk has.
pub fn new_size(text: &str, old: u64) -> Result<u64, Failure> {
    let (sign, number) = match text.split_at_checked(1) {
        Some((sign @ ("+" | "-"), number)) => (sign, number),
        _ => ("", text),
    };
    let number = size::parse(number).ok_or_else(|| Failure::Usage(size_error("SIZE", text)))?;
    let size = match sign {
        "+" => old.checked_add(number),
        "-" => old.checked_sub(number),
        _ => Some(number),
    };
    size.filter(|size| *size <= 1 << 62).ok_or_else(|| {
        Failure::Usage(format!(
            "SIZE: '{text}' of a disk of {old} bytes (expected a result from 0 to 4E)"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Would catch a rate that is set a thousand times too high or taken from a typing mistake.
    #[test]
    fn rates() {
        assert_eq!(parse_rate("512K"), Ok(512 << 10));
        assert_eq!(parse_rate("20M/s"), Ok(20 << 20));
        assert_eq!(parse_rate("1G"), Ok(1 << 30));
        assert_eq!(parse_rate("1048576"), Ok(1 << 20));
        assert_eq!(parse_rate("0"), Ok(0));
        assert_eq!(parse_rate("unlimited"), Ok(0));
        for bad in ["", "-1", "fast", "10Mb", "8E", "unlimited/s"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }

    /// Would catch a progress display that shows an unfinished job as finished.
    #[test]
    fn for_people() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes((1 << 30) - 1), "1.0 GiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(percent(999_999, 1_000_000), "99.9%");
        assert_eq!(percent(0, 0), "100.0%");
        assert_eq!(percent(u64::MAX - 1, u64::MAX), "99.9%");
        assert_eq!(clock(Duration::from_secs(42)), "0:42");
        assert_eq!(clock(Duration::from_secs(3909)), "1:05:09");
        assert_eq!(limit(0), "unlimited");
    }

    /// Would catch a disk that becomes as large as it was to grow, or one that wraps around.
    #[test]
    fn relative_sizes() {
        assert_eq!(new_size("20G", 5).ok(), Some(20 << 30));
        assert_eq!(new_size("+1M", 1 << 20).ok(), Some(2 << 20));
        assert_eq!(new_size("-1K", 1 << 20).ok(), Some((1 << 20) - 1024));
        for bad in ["", "+", "-2M", "1X", "+16E", "--1"] {
            assert!(new_size(bad, 1 << 20).is_err(), "{bad}");
        }
    }
}
