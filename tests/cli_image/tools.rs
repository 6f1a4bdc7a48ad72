//! A folder for a test, and running the tools in it.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

/// The seed of this run: `STRATABLK_SEED` repeats one.
pub fn seed() -> u64 {
    let seed = std::env::var("STRATABLK_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(rand::random);
    println!("STRATABLK_SEED={seed}");
    seed
}

pub fn rng() -> StdRng {
    StdRng::seed_from_u64(seed())
}

/// A folder that goes with the test.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn output(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program)
            .args(args)
            .current_dir(self.0.path())
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}"))
    }

    /// Runs `qemu-img`, whatever comes of it.
    pub fn qemu_img(&self, args: &[&str]) -> Output {
        self.output("qemu-img", args)
    }

    /// Runs `stratactl image`, whatever comes of it.
    pub fn image(&self, args: &[&str]) -> Output {
        let args = [&["image"], args].concat();
        self.output(env!("CARGO_BIN_EXE_stratactl"), &args)
    }

    /// Runs `qemu-img`, which succeeds.
    pub fn qemu(&self, args: &[&str]) -> String {
        succeeded("qemu-img", args, &self.qemu_img(args))
    }

    /// Runs `stratactl image`, which succeeds.
    pub fn ctl(&self, args: &[&str]) -> String {
        succeeded("stratactl image", args, &self.image(args))
    }

    /// Runs commands of `qemu-io` on an image.
    pub fn io(&self, format: &str, file: &str, commands: &[String]) {
        let mut args = vec!["-f", format];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(file);
        succeeded("qemu-io", &args, &self.output("qemu-io", &args));
    }

    pub fn qemu_json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.qemu(args)).unwrap()
    }

    pub fn ctl_json(&self, args: &[&str]) -> Value {
        let args = [&["--json"], args].concat();
        serde_json::from_str(&self.ctl(&args)).unwrap()
    }

    /// No error, and no leak.
    pub fn check(&self, file: &str) {
        self.qemu(&["check", "-q", "-f", "qcow2", file]);
    }

    /// What an image reads as.
    pub fn read(&self, format: &str, file: &str) -> Vec<u8> {
        self.qemu(&["convert", "-f", format, "-O", "raw", file, "read.raw"]);
        std::fs::read(self.path("read.raw")).unwrap()
    }

    /// Writes random pieces into an image: data, zeros, discards.
    pub fn scribble(&self, format: &str, file: &str, size: u64, rng: &mut StdRng) {
        let commands: Vec<String> = (0..12)
            .map(|_| {
                let start = rng.random_range(0..size / 512) * 512;
                let most = (size - start).min(300 << 10) / 512;
                let len = rng.random_range(1..=most) * 512;
                match rng.random_range(0..6) {
                    0 => format!("write -q -z {start} {len}"),
                    1 => format!("write -q -z -u {start} {len}"),
                    2 => format!("discard -q {start} {len}"),
                    _ => format!("write -q -P {} {start} {len}", rng.random_range(1..256)),
                }
            })
            .collect();
        self.io(format, file, &commands);
    }
}

fn succeeded(program: &str, args: &[&str], output: &Output) -> String {
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The standard error of a command.
pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
