//! Images, made and judged by `qemu-img` and `qemu-io`.

use super::rng::Rng;
use super::stamp::{self, Owner, SECTOR};
use super::{Res, frontend::PATIENCE};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Runs a tool; the exit code is for the caller to judge.
pub fn run(program: &str, args: &[&str]) -> Res<Output> {
    Ok(Command::new(program)
        .args(args)
        .output()
        .map_err(|e| format!("{program}: {e}"))?)
}

/// Runs `qemu-io`, whose commands must all succeed: patterns that are read are there.
pub fn qemu_io(args: &[&str]) -> Res<String> {
    succeed("qemu-io", args)
}

/// Runs `qemu-img`, which must succeed.
pub fn qemu_img(args: &[&str]) -> Res<String> {
    succeed("qemu-img", args)
}

fn succeed(program: &str, args: &[&str]) -> Res<String> {
    let output = run(program, args)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} {args:?}: {}\n{text}{errors}", output.status).into());
    }
    Ok(text)
}

/// A path as an argument.
pub fn text(path: &Path) -> Res<&str> {
    path.to_str()
        .ok_or_else(|| "a path that is not text".into())
}

/// Creates a qcow2 image with `options` (as for `-o`), over `backing` if given.
pub fn create(
    path: &Path,
    size: u64,
    options: &str,
    backing: Option<(&Path, &'static str)>,
) -> Res<()> {
    let size = size.to_string();
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
    if let Some((backing, format)) = backing {
        args.extend(["-b", text(backing)?, "-F", format]);
    }
    args.extend([text(path)?, &size]);
    qemu_img(&args)?;
    Ok(())
}

/// `qemu-img check`: errors fail, leaks are told.
pub fn check(path: &Path) -> Res<bool> {
    judge_check(text(path)?, &["check", "-f", "qcow2", text(path)?])
}

/// As [`check`], of an image that is named with its options (`json:`).
pub fn check_named(image: &str) -> Res<bool> {
    judge_check(image, &["check", image])
}

fn judge_check(image: &str, args: &[&str]) -> Res<bool> {
    let output = run("qemu-img", args)?;
    match output.status.code() {
        Some(0) => Ok(false),
        Some(3) => Ok(true),
        code => Err(format!(
            "qemu-img check {image}: exit code {code:?}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}

/// Waits until nobody holds the locks by which QEMU guards an image. After a kill the kernel may
/// let go of them a little later than of the process.
pub fn wait_unlocked(path: &Path) -> Res<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        // SAFETY: plain data, all of it set below or zero.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_WRLCK as i16;
        lock.l_whence = libc::SEEK_SET as i16;
        lock.l_start = 100;
        lock.l_len = 200;
        // SAFETY: a query about our own descriptor, into our own structure.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } < 0 {
            return Err(io::Error::last_os_error().into());
        }
        if lock.l_type == libc::F_UNLCK as i16 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{} stays locked", path.display()).into());
        }
        // A poll of a condition with a deadline: nothing depends on how long this takes.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The guest's view of a chain, read by `qemu-img` into `scratch`: the owner of every sector, or
/// the bytes that are nobody's.
pub fn read_owners(path: &Path, format: &str, scratch: &Path) -> Res<Vec<Result<Owner, String>>> {
    qemu_img(&[
        "convert",
        "-f",
        format,
        "-O",
        "raw",
        text(path)?,
        text(scratch)?,
    ])?;
    let data = fs::read(scratch)?;
    fs::remove_file(scratch)?;
    Ok(data
        .chunks_exact(SECTOR)
        .enumerate()
        .map(|(i, bytes)| stamp::owner_of(bytes, i as u64).ok_or_else(|| stamp::describe(bytes)))
        .collect())
}

/// Writes the disk that `owners` describe as a raw image.
pub fn write_raw(path: &Path, owners: &[Owner]) -> Res<()> {
    let file = File::create(path)?;
    file.set_len((owners.len() * SECTOR) as u64)?;
    // In pieces of 1 MiB, leaving out those that are all zeros.
    for (n, piece) in owners.chunks(2048).enumerate() {
        if piece.iter().all(|&owner| owner == 0) {
            continue;
        }
        let mut data = vec![0; piece.len() * SECTOR];
        for (i, (bytes, &owner)) in data.chunks_exact_mut(SECTOR).zip(piece).enumerate() {
            stamp::fill(bytes, owner, (n * 2048 + i) as u64);
        }
        file.write_all_at(&data, (n * 2048 * SECTOR) as u64)?;
    }
    Ok(())
}

/// How to make a chain of layers with known contents.
#[derive(Clone, Debug)]
pub struct ChainPlan {
    /// Sectors of the disk.
    pub sectors: u64,
    /// Options of each qcow2 layer, the guest's first. The last layer may also be `raw`, or have
    /// `compressed ` before its options.
    pub layers: Vec<&'static str>,
    /// How many pieces of data each layer below the guest's gets.
    pub pieces: u64,
}

/// A chain of files, and what it reads as.
pub struct Chain {
    /// (file, format), the guest's layer first.
    pub layers: Vec<(PathBuf, &'static str)>,
    /// The owner of every sector.
    pub owners: Vec<Owner>,
}

/// Makes the files of `plan` in `dir`: an empty layer for the guest over layers with stamped
/// pieces of data, zeros and compressed clusters at random places.
pub fn make_chain(dir: &Path, plan: &ChainPlan, rng: &mut Rng) -> Res<Chain> {
    let bytes = plan.sectors * SECTOR as u64;
    let mut owners = vec![0; plan.sectors as usize];
    let mut layers: Vec<(PathBuf, &'static str)> = Vec::new();
    for (depth, options) in plan.layers.iter().enumerate().rev() {
        let bottom = depth + 1 == plan.layers.len();
        let raw = bottom && *options == "raw";
        let compressed = bottom && options.starts_with("compressed ");
        let options = options.trim_start_matches("compressed ");
        let format = if raw { "raw" } else { "qcow2" };
        let path = dir.join(format!("layer{depth}.{format}"));
        let backing = layers.first().map(|(path, format)| (path.clone(), *format));
        if !raw {
            create(
                &path,
                bytes,
                options,
                backing.as_ref().map(|(p, f)| (p.as_path(), *f)),
            )?;
        }
        if raw {
            for n in 0..plan.pieces {
                let (start, count) = range(rng, plan.sectors, 400);
                own(
                    &mut owners,
                    start,
                    count,
                    stamp::layer_owner(depth as u64, n),
                );
            }
            write_raw(&path, &owners)?;
        } else if depth > 0 {
            add_pieces(dir, &path, depth as u64, plan.pieces, &mut owners, rng)?;
        }
        if compressed {
            let plain = dir.join("plain.qcow2");
            fs::rename(&path, &plain)?;
            let names = (text(&plain)?, text(&path)?);
            qemu_img(&[
                "convert", "-c", "-O", "qcow2", "-o", options, names.0, names.1,
            ])?;
            fs::remove_file(plain)?;
        }
        layers.insert(0, (path, format));
    }
    Ok(Chain { layers, owners })
}

/// Sets the owner of `count` sectors.
pub fn own(owners: &mut [Owner], start: u64, count: u64, owner: Owner) {
    for slot in owners.iter_mut().skip(start as usize).take(count as usize) {
        *slot = owner;
    }
}

fn range(rng: &mut Rng, sectors: u64, longest: u64) -> (u64, u64) {
    let start = rng.below(sectors);
    (start, rng.between(1, longest).min(sectors - start))
}

/// Writes random pieces into a qcow2 layer with one run of `qemu-io`.
fn add_pieces(
    dir: &Path,
    image: &Path,
    depth: u64,
    pieces: u64,
    owners: &mut [Owner],
    rng: &mut Rng,
) -> Res<()> {
    let sectors = owners.len() as u64;
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned()];
    let mut files = Vec::new();
    for n in 0..pieces {
        let (start, count) = range(rng, sectors, 400);
        let at = format!("{} {}", start * SECTOR as u64, count * SECTOR as u64);
        let owner = if rng.one_in(6) {
            0
        } else {
            stamp::layer_owner(depth, n)
        };
        own(owners, start, count, owner);
        args.push("-c".to_owned());
        if owner == 0 {
            let unmap = if rng.one_in(2) { " -u" } else { "" };
            args.push(format!("write -q -z{unmap} {at}"));
            continue;
        }
        let mut data = vec![0; count as usize * SECTOR];
        stamp::fill_all(&mut data, owner, start);
        let file = dir.join(format!("piece{n}"));
        fs::write(&file, &data)?;
        args.push(format!("write -q -s {} {at}", text(&file)?));
        files.push(file);
    }
    args.push(text(image)?.to_owned());
    succeed(
        "qemu-io",
        &args.iter().map(String::as_str).collect::<Vec<_>>(),
    )?;
    for file in files {
        fs::remove_file(file)?;
    }
    Ok(())
}

/// A number that changes when the bytes of a file do.
pub fn fingerprint(path: &Path) -> Res<u64> {
    let mut hasher = std::hash::DefaultHasher::new();
    std::hash::Hasher::write(&mut hasher, &fs::read(path)?);
    Ok(std::hash::Hasher::finish(&hasher))
}

/// Reads `len` bytes of a file at `offset`.
pub fn read_at(path: &Path, offset: u64, len: usize) -> Res<Vec<u8>> {
    let mut data = vec![0; len];
    File::open(path)?.read_exact_at(&mut data, offset)?;
    Ok(data)
}
