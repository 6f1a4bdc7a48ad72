//! The floor: what the kernel alone takes for the least I/O that a row needs, by `fio` on files in
//! the same folder. Calls in line (psync) on tmpfs, where the data is in memory, and io_uring past
//! the page cache on a disk. Where clusters are compressed, it is what their decompressor takes.

use crate::Options;
use crate::common::{Res, images};
use crate::decompress;
use crate::disks::{Disk, Disks};
use crate::load::Order;
use crate::row::Row;
use crate::samples::Floor;
use crate::workers::Workers;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Measures the floor of a row.
///
/// A write that allocates is one to a fresh file; where it copies the rest of a cluster, it is a
/// read of that rest and a write of the cluster.
pub fn measure(options: &Options, row: &Row, disks: &Disks, place: &str) -> Res<Floor> {
    if let Disk::Compressed(compression) = row.disk {
        let image = disks.compressed(compression)?;
        return decompress::measure(options, &image, compression, row.shape);
    }
    let fio = Fio {
        options,
        disks,
        in_memory: place == "tmpfs",
    };
    let whole = disks.scratch()?;
    let shape = row.shape;
    let name = match (shape.write, shape.order) {
        (false, Order::Sequential) => "read",
        (true, Order::Sequential) => "write",
        (false, _) => "randread",
        (true, _) => "randwrite",
    };
    if shape.order != Order::EachClusterOnce {
        return fio.run(&whole, name, shape.len, shape.depth, None);
    }
    let fresh = disks.dir().join("floor.raw");
    // One that failed may have left it.
    let _ = fs::remove_file(&fresh);
    let flush = shape.flush_every;
    let floor = if row.disk == Disk::Overlay {
        let rest = 65536 - shape.len;
        fio.run(&whole, "randread", rest, shape.depth, None)?
            .then(fio.run(&fresh, "write", 65536, shape.depth, flush)?)
    } else {
        fio.run(&fresh, "write", shape.len, shape.depth, flush)?
    };
    fs::remove_file(fresh)?;
    Ok(floor)
}

struct Fio<'a> {
    options: &'a Options,
    disks: &'a Disks,
    in_memory: bool,
}

impl Fio<'_> {
    /// A file that is there is used for as long as a row; a fresh one is filled once.
    fn run(
        &self,
        file: &Path,
        how: &str,
        len: usize,
        depth: usize,
        flush_every: Option<u64>,
    ) -> Res<Floor> {
        let fresh = !file.exists();
        let engine = if self.in_memory { "psync" } else { "io_uring" };
        let mut fio = Command::new("fio");
        fio.args(["--name=floor", "--output-format=json", "--thread"])
            .arg(format!("--filename={}", images::text(file)?))
            .arg(format!("--rw={how}"))
            .arg(format!("--bs={len}"))
            .arg(format!("--size={}", self.size(fresh, len)))
            .arg(format!("--ioengine={engine}"))
            .arg(format!(
                "--iodepth={}",
                if self.in_memory { 1 } else { depth }
            ))
            .arg(format!("--direct={}", u8::from(!self.in_memory)))
            .arg(format!("--cpus_allowed={}", self.options.cpu_backend))
            .arg(format!("--fsync={}", flush_every.unwrap_or(0)))
            .args(["--norandommap", "--fallocate=none", "--gtod_reduce=1"]);
        if !fresh {
            let seconds = self.options.measured().as_secs_f64();
            fio.args(["--time_based", &format!("--runtime={seconds:.0}")]);
        }
        let workers = Workers::start()?;
        let output = fio.output().map_err(|error| format!("fio: {error}"))?;
        if !output.status.success() {
            return Err(format!("fio: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        let workers = workers.end()?;
        parse(&serde_json::from_slice(&output.stdout)?, workers)
            .ok_or_else(|| "fio: no figures".into())
    }

    /// A fresh file takes one request for each cluster, as the rows do.
    fn size(&self, fresh: bool, len: usize) -> u64 {
        match fresh {
            true => self.disks.size() / 65536 * len as u64,
            false => self.disks.size(),
        }
    }
}

/// Of what `fio` says, and the time of the kernel's workers meanwhile.
fn parse(report: &Value, workers: Duration) -> Option<Floor> {
    let job = report["jobs"].get(0)?;
    let sum = |field: &str| Some(job["read"][field].as_f64()? + job["write"][field].as_f64()?);
    let requests = sum("total_ios")?;
    let share = (job["usr_cpu"].as_f64()? + job["sys_cpu"].as_f64()?) / 100.0;
    let seconds = share * job["job_runtime"].as_f64()? / 1000.0 + workers.as_secs_f64();
    (requests > 0.0).then_some(Floor {
        iops: sum("iops")?,
        cpu: seconds * 1e6 / requests,
    })
}
