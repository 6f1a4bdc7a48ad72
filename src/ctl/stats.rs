//! What guests have asked of the exports, queue by queue.

use super::Failure;
use super::client::Client;
use super::table::write_table;
use super::units;
use serde_json::Value;
use std::io::Write;

/// Prints the counters of all queues.
pub fn show(client: &mut Client, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let exports = client.execute("query-blockstats", Value::Null)?;
    if json {
        writeln!(out, "{exports}")?;
        return Ok(());
    }
    write(&exports, out)
}

fn write(exports: &Value, out: &mut dyn Write) -> Result<(), Failure> {
    let mut rows = vec![
        [
            "EXPORT", "QUEUE", "READS", "READ", "WRITES", "WRITTEN", "FLUSHES", "DISCARDS",
            "ERRORS", "SLEEPS", "POLLS", "FOUND", "POLLED", "SHARE",
        ]
        .map(String::from),
    ];
    for export in list(Some(exports)) {
        let id = export.get("device").and_then(Value::as_str).unwrap_or("?");
        for (index, queue) in list(export.get("queues")).iter().enumerate() {
            let number = |key: &str| queue.get(key).and_then(Value::as_u64).unwrap_or(0);
            let found = number("polls-found");
            let share = queue.get("poll-share").and_then(Value::as_f64);
            rows.push([
                id.to_owned(),
                index.to_string(),
                number("reads").to_string(),
                units::bytes(number("read-bytes")),
                number("writes").to_string(),
                units::bytes(number("write-bytes")),
                number("flushes").to_string(),
                number("discards").to_string(),
                number("errors").to_string(),
                number("sleeps").to_string(),
                (found.saturating_add(number("polls-missed"))).to_string(),
                found.to_string(),
                format!("{:.3} s", number("poll-ns") as f64 / 1e9),
                format!("{:.1}%", share.unwrap_or(0.0) * 100.0),
            ]);
        }
    }
    if rows.len() == 1 {
        writeln!(out, "No queues")?;
        return Ok(());
    }
    write_table(&rows, out)
}

fn list(value: Option<&Value>) -> &[Value] {
    value
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(exports: &Value) -> String {
        let mut out = Vec::new();
        write(exports, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// Would catch queues that are mixed up, and a polling time in the wrong unit.
    #[test]
    fn a_line_for_every_queue() {
        let busy = json!({
            "reads": 7, "read-bytes": 4096, "sleeps": 3, "polls-found": 5, "polls-missed": 2,
            "poll-ns": 1_500_000_000u64, "poll-share": 0.125,
        });
        let shown = text(&json!([
            {"device": "a", "queues": [busy, {}]},
            {"device": "b", "queues": [{"errors": 1}]},
        ]));
        let lines: Vec<Vec<&str>> = shown
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines.len(), 4);
        let first = "a 0 7 4.0 KiB 0 0 B 0 0 0 3 7 5 1.500 s 12.5%";
        assert_eq!(lines[1].join(" "), first);
        assert_eq!(
            lines[2].join(" "),
            "a 1 0 0 B 0 0 B 0 0 0 0 0 0 0.000 s 0.0%"
        );
        assert_eq!(
            lines[3].join(" "),
            "b 0 0 0 B 0 0 B 0 0 1 0 0 0 0.000 s 0.0%"
        );
    }

    /// Would catch a failure on a daemon that counts nothing for its exports.
    #[test]
    fn without_queues() {
        assert_eq!(text(&json!([])), "No queues\n");
        assert_eq!(text(&json!([{"device": "a", "stats": {}}])), "No queues\n");
    }
}
