//! The images that the rows run on.

use crate::Options;
use crate::blocks;
use crate::common::{Res, images};
use crate::warm::Memory;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Which image a row runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// A raw file, all of it written.
    Raw,
    /// A qcow2 image, all clusters allocated.
    Qcow2,
    /// An empty qcow2 overlay over the one above.
    Overlay,
    /// An empty qcow2 overlay over an empty one: allocation without anything to copy.
    Empty,
    /// Fifteen empty overlays, one over the other, over the image with all clusters.
    Chain,
    /// A qcow2 image, all clusters compressed.
    Compressed(Compression),
}

/// How the clusters of an image are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// With zlib, the default.
    Zlib,
    /// With zstd.
    Zstd,
}

impl Compression {
    /// Its name for `compression_type=`.
    fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

impl Disk {
    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Disk::Raw => "raw",
            Disk::Qcow2 => "qcow2",
            Disk::Overlay => "overlay",
            Disk::Empty => "empty overlay",
            Disk::Chain => "chain of 16",
            Disk::Compressed(Compression::Zlib) => "qcow2 compressed",
            Disk::Compressed(Compression::Zstd) => "qcow2 compressed zstd",
        }
    }
}

/// The size of a disk with compressed clusters, at most: it takes long to compress more.
const COMPRESSED: u64 = 256 << 20;

/// Layers of a chain.
const CHAIN: usize = 16;

/// A folder with the lasting images, removed at the end.
pub struct Disks {
    dir: tempfile::TempDir,
    size: u64,
}

impl Disks {
    /// A fresh folder in `parent`, for disks of `size` bytes.
    pub fn new(parent: &Path, size: u64) -> Res<Self> {
        fs::create_dir_all(parent)?;
        let dir = tempfile::Builder::new()
            .prefix("stratablk-bench-")
            .tempdir_in(parent)?;
        Ok(Disks { dir, size })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The size of the disks.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size of this one.
    pub fn size_of(&self, disk: Disk) -> u64 {
        match disk {
            Disk::Compressed(_) => self.size.min(COMPRESSED),
            _ => self.size,
        }
    }

    /// Memory for one more disk, where files are made of it: twice its size. With an eighth more than
    /// its size some runs still had to wait for the host.
    pub fn memory(&self, options: &Options, place: &str) -> Res<Option<Memory>> {
        if place != "tmpfs" {
            return Ok(None);
        }
        Memory::take(options, self.dir(), self.size * 2).map(Some)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The layers of `disk`, top first. An overlay is a fresh one at every call.
    pub fn layers(&self, disk: Disk) -> Res<Vec<(PathBuf, &'static str)>> {
        match disk {
            Disk::Raw => Ok(vec![(self.raw()?, "raw")]),
            Disk::Qcow2 => Ok(vec![(self.qcow2()?, "qcow2")]),
            Disk::Overlay => self.overlay(self.qcow2()?),
            Disk::Empty => {
                let base = self.file("empty.qcow2");
                if !base.exists() {
                    images::create(&base, self.size, "compat=1.1", None)?;
                }
                self.overlay(base)
            }
            Disk::Chain => {
                let mut layers = vec![(self.qcow2()?, "qcow2")];
                for number in 1..CHAIN {
                    let path = self.file(&format!("layer{number}.qcow2"));
                    let below = &layers[0].0;
                    if !path.exists() {
                        images::create(&path, self.size, "compat=1.1", Some((below, "qcow2")))?;
                    }
                    layers.insert(0, (path, "qcow2"));
                }
                Ok(layers)
            }
            Disk::Compressed(compression) => Ok(vec![(self.compressed(compression)?, "qcow2")]),
        }
    }

    fn raw(&self) -> Res<PathBuf> {
        self.written("disk.raw")
    }

    /// A file like the raw image, for programs that write anything to it.
    pub fn scratch(&self) -> Res<PathBuf> {
        self.written("scratch.raw")
    }

    fn written(&self, name: &str) -> Res<PathBuf> {
        let path = self.file(name);
        if !path.exists() {
            blocks::write_image(&path, self.size, blocks::fill_original)?;
        }
        Ok(path)
    }

    /// The qcow2 image with all clusters.
    pub fn qcow2(&self) -> Res<PathBuf> {
        let path = self.file("disk.qcow2");
        if !path.exists() {
            self.convert(&path, self.size, blocks::fill_original, &[])?;
        }
        Ok(path)
    }

    /// The qcow2 image with all clusters compressed.
    pub fn compressed(&self, compression: Compression) -> Res<PathBuf> {
        let path = self.file(&format!("{}.qcow2", compression.name()));
        if !path.exists() {
            let size = self.size_of(Disk::Compressed(compression));
            let kind = format!("compression_type={}", compression.name());
            self.convert(&path, size, blocks::fill_compressible, &["-c", "-o", &kind])?;
        }
        Ok(path)
    }

    /// Makes a qcow2 image of blocks from `fill`, and not from the raw image, which loads have
    /// written to by now.
    fn convert(
        &self,
        path: &Path,
        size: u64,
        fill: fn(&mut [u8], u64),
        options: &[&str],
    ) -> Res<()> {
        let source = self.file("source.raw");
        blocks::write_image(&source, size, fill)?;
        let names = [images::text(&source)?, images::text(path)?];
        let usual = ["convert", "-f", "raw", "-O", "qcow2"];
        images::qemu_img(&[&usual, options, &names].concat())?;
        fs::remove_file(source)?;
        File::open(path)?.sync_all()?;
        Ok(())
    }

    fn overlay(&self, base: PathBuf) -> Res<Vec<(PathBuf, &'static str)>> {
        let top = self.file("top.qcow2");
        if top.exists() {
            fs::remove_file(&top)?;
        }
        images::create(&top, self.size, "compat=1.1", Some((&base, "qcow2")))?;
        File::open(&top)?.sync_all()?;
        Ok(vec![(top, "qcow2"), (base, "qcow2")])
    }
}
