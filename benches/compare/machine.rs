//! What the numbers were taken on.

use crate::common::Res;
use crate::common::daemon;
use crate::samples::Disturbance;
use crate::variants::Variant;
use crate::workers::Workers;
use std::fs;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

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

/// Measures what others than the bench and the programs it has started do in the meantime. The
/// kernel's workers are not among them: what they do is counted as the back-end's.
pub struct OtherLoad {
    begin: Instant,
    time: CpuTime,
    own: Duration,
    workers: Workers,
    programs: Vec<u32>,
}

impl OtherLoad {
    /// Begins. `programs` are the process ids of what the bench has started.
    pub fn start(programs: &[u32]) -> Res<Self> {
        let programs = [programs, &[std::process::id()]].concat();
        Ok(OtherLoad {
            begin: Instant::now(),
            time: CpuTime::now()?,
            own: own(&programs)?,
            workers: Workers::start()?,
            programs,
        })
    }

    /// What there was since the start.
    pub fn end(&self) -> Res<Disturbance> {
        let own = own(&self.programs)?.saturating_sub(self.own) + self.workers.end()?;
        let now = CpuTime::now()?;
        let wall = self.begin.elapsed().as_secs_f64().max(0.001);
        let cpus = |time: Duration| time.as_secs_f64() / wall;
        let busy = now.busy.saturating_sub(self.time.busy);
        Ok(Disturbance {
            programs: cpus(busy.saturating_sub(own)),
            host: cpus(now.stolen.saturating_sub(self.time.stolen)),
        })
    }
}

fn own(programs: &[u32]) -> Res<Duration> {
    programs.iter().map(|&pid| daemon::cpu_time_of(pid)).sum()
}

/// What all CPUs did since the system started.
struct CpuTime {
    /// Neither idle nor taken away.
    busy: Duration,
    /// Taken away by the host.
    stolen: Duration,
}

impl CpuTime {
    fn now() -> Res<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let line = stat.lines().next().unwrap_or_default();
        let (mut busy, mut stolen) = (0, 0);
        // user, nice, system, idle, iowait, irq, softirq, steal
        for (i, field) in line.split_whitespace().skip(1).take(8).enumerate() {
            let ticks = field.parse::<u64>().unwrap_or(0);
            match i {
                3 | 4 => {}
                7 => stolen += ticks,
                _ => busy += ticks,
            }
        }
        Ok(CpuTime {
            busy: daemon::ticks(busy),
            stolen: daemon::ticks(stolen),
        })
    }
}

/// Makes sure that `programs` can be run: without one of them a run would end, most of an hour
/// later, with a report full of holes.
pub fn require(programs: &[&str]) -> Res<()> {
    for program in programs {
        succeed(Command::new(program).arg("--version"))
            .map_err(|error| format!("{error}; run contrib/setup"))?;
    }
    Ok(())
}

/// Runs a command to its end, and returns what it prints.
pub fn succeed(command: &mut Command) -> Res<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output();
    let Output {
        status,
        stdout,
        stderr,
    } = output.map_err(|error| format!("{name}: {error}"))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&stderr);
        return Err(format!("{name} ended with {status}: {}", said.trim()).into());
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}
