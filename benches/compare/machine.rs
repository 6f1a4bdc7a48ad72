//! What the numbers were taken on.

use crate::common::Res;
use crate::variants::Variant;
use std::fs;
use std::process::Command;

/// Lines that describe the machine, the programs and the command.
pub fn describe(variants: &[Variant]) -> Res<Vec<String>> {
    let mut lines = vec![
        format!("CPU: {}", cpu()),
        format!(
            "kernel: {}",
            fs::read_to_string("/proc/sys/kernel/osrelease")?.trim()
        ),
        format!("memory: {}", memory()),
    ];
    let mut seen = Vec::new();
    for variant in variants {
        if !seen.contains(&&variant.program.path) {
            seen.push(&variant.program.path);
            lines.push(format!("{}: {}", variant.name, version(variant)));
        }
    }
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    lines.push(format!(
        "command: `cargo bench --bench compare -- {}`",
        words.join(" ")
    ));
    Ok(lines)
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(": ").nth(1))
            .unwrap_or("?")
            .to_owned()
    };
    let count = info
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let model = ["vendor_id", "cpu family", "model\t"].map(field).join("/");
    format!(
        "{count} × {} ({model}, {} MHz)",
        field("model name"),
        field("cpu MHz")
    )
}

fn memory() -> String {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    info.lines()
        .next()
        .unwrap_or_default()
        .replace("MemTotal:", "")
        .trim()
        .to_owned()
}

fn version(variant: &Variant) -> String {
    let output = Command::new(&variant.program.path)
        .arg("--version")
        .output();
    let text = output
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    text.lines()
        .next()
        .unwrap_or("(says no version)")
        .to_owned()
}
