//! Disks to work on: made by QEMU's tools, opened by the engine on a [`Machine`].

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use stratablk::chain::{Chain, Layer, View, with_room};
use stratablk::error::Result;
use stratablk::format::qcow2::journal::Folder;
use stratablk::format::{Format, Qcow2, Raw, qcow2};
use stratablk::reactor::Reactor;
use stratablk::storage::{AlignedBuf, IoBufs, Storage};

use crate::history::{SECTOR, fill, stamp_of};
use crate::journals::Left;
use crate::machine::{Machine, Traits};
use crate::support::{create, create_over, run};

/// States judged by default, of each disk: all there are of most.
const STATES: usize = 6000;
/// Those that kills leave, where nothing but the files outlives the process.
const KILLS: usize = 600;

/// What lies under the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    Nothing,
    Raw,
    /// A qcow2 image over a raw one.
    Qcow2,
}

/// How a disk is made.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// For `qemu-img create -o`.
    pub options: &'static str,
    pub sectors: usize,
    /// Guests leave the sectors before this one alone.
    pub from: usize,
    pub below: Below,
    /// It has a data file.
    pub data_file: bool,
    /// Sectors from the start that hold data.
    pub filled: usize,
    /// It has an internal snapshot.
    pub snapshot: bool,
    /// It has a persistent bitmap.
    pub bitmap: bool,
    /// Bytes of mapping metadata in memory.
    pub cache_bytes: u64,
    pub reserves: bool,
    /// Copies from below are compressed.
    pub compress: bool,
    /// What kind of storage it is on.
    pub storage: Traits,
    /// States judged by default of each power cut.
    pub states: usize,
    /// States judged by default of each kill.
    pub kills: usize,
    /// The image has a journal.
    pub journaled: bool,
    /// How full the journal is when guests begin, in percent.
    pub used: u64,
    /// What is read from below is kept.
    pub copy_on_read: bool,
    /// So many sectors it gets while guests use it; 0: as many as it has.
    pub resized: usize,
}

impl Recipe {
    pub const fn new(options: &'static str, sectors: usize) -> Self {
        Self {
            options,
            sectors,
            from: 0,
            below: Below::Nothing,
            data_file: false,
            filled: 0,
            snapshot: false,
            bitmap: false,
            cache_bytes: qcow2::DEFAULT_CACHE_BYTES,
            reserves: false,
            compress: false,
            storage: Traits::FILE,
            states: STATES,
            kills: KILLS,
            journaled: false,
            used: 0,
            copy_on_read: false,
            resized: 0,
        }
    }

    /// Whether it becomes larger.
    pub fn grows(&self) -> bool {
        self.resized > self.sectors
    }

    /// Sectors of a block.
    pub fn grain(&self) -> usize {
        (self.storage.block as usize / SECTOR).max(1)
    }
}

/// A disk's files: the image, its data file if it has one, what lies below.
#[derive(Clone)]
pub struct Disk {
    pub recipe: Recipe,
    pub files: Vec<Vec<u8>>,
    paths: Vec<PathBuf>,
    /// The stamps that the guest sees.
    pub first: Vec<u32>,
    /// Those that it would see without the image on top.
    pub under: Vec<u32>,
}

/// An image that has been opened, and its chain.
pub struct Opened {
    pub image: Arc<Qcow2>,
    pub chain: Arc<Chain>,
}

/// Sectors `start..end` get the stamps from `stamp + start` on.
struct Part {
    start: usize,
    end: usize,
    stamp: u32,
}

impl Part {
    fn put(&self, first: &mut [u32]) {
        for (sector, stamp) in first[self.start..self.end].iter_mut().enumerate() {
            *stamp = self.stamp + (self.start + sector) as u32;
        }
    }

    /// Writes it into a qcow2 image.
    fn write(&self, path: &Path) {
        let mut bytes = vec![0; (self.end - self.start) * SECTOR];
        fill(&mut bytes, self.stamp + self.start as u32);
        let part = path.with_extension("part");
        std::fs::write(&part, &bytes).unwrap();
        let (part, at) = (part.display(), self.start * SECTOR);
        let command = format!("write -q -s {part} {at} {}", bytes.len());
        let path = path.to_str().unwrap();
        run("qemu-io", &["-f", "qcow2", "-c", &command, path]);
    }
}

/// The stamps of the lowest file.
fn base_stamps(recipe: Recipe) -> Vec<u32> {
    let stamp = |sector: usize| match sector / 40 % 3 {
        0 => 0,
        _ => 0x8000_0000 + sector as u32,
    };
    match recipe.below {
        Below::Nothing => vec![0; recipe.sectors],
        Below::Raw | Below::Qcow2 => (0..recipe.sectors).map(stamp).collect(),
    }
}

/// What the image in the middle has.
fn middle_parts(recipe: Recipe) -> impl Iterator<Item = Part> {
    let step = recipe.sectors / 4;
    (0..recipe.sectors).step_by(step).map(move |start| Part {
        start,
        end: start + step / 4,
        stamp: 0x9000_0000,
    })
}

/// What the image itself has.
fn top_part(recipe: Recipe) -> Part {
    Part {
        start: 0,
        end: recipe.filled,
        stamp: 0xa000_0000,
    }
}

impl Disk {
    /// Makes the files in `dir`.
    pub fn make(dir: &Path, recipe: Recipe) -> Self {
        let size = (recipe.sectors * SECTOR) as u64;
        let path = |name: &str| dir.join(name);
        let mut lower = Vec::new();
        if recipe.below != Below::Nothing {
            let mut bytes = vec![0; recipe.sectors * SECTOR];
            for (part, stamp) in bytes.chunks_mut(SECTOR).zip(base_stamps(recipe)) {
                if stamp != 0 {
                    fill(part, stamp);
                }
            }
            std::fs::write(path("base.raw"), bytes).unwrap();
            lower.push(path("base.raw"));
        }
        if recipe.below == Below::Qcow2 {
            let middle = path("middle.qcow2");
            create_over(&middle, "", &path("base.raw"), "raw");
            middle_parts(recipe).for_each(|part| part.write(&middle));
            lower.insert(0, middle);
        }
        let top = path("top.qcow2");
        let data = path("data.raw");
        let mut options = recipe.options.to_owned();
        if recipe.data_file {
            options += &format!(",data_file={}", data.display());
        }
        let format = if recipe.below == Below::Raw {
            "raw"
        } else {
            "qcow2"
        };
        match lower.first() {
            None => create(&top, &options, size),
            Some(below) => create_over(&top, &options, below, format),
        }
        if recipe.filled > 0 {
            top_part(recipe).write(&top);
        }
        let name = top.to_str().unwrap();
        if recipe.snapshot {
            run("qemu-img", &["snapshot", "-c", "one", name]);
        }
        if recipe.bitmap {
            run("qemu-img", &["bitmap", "--add", name, "changed"]);
        }
        if recipe.grows() && recipe.below != Below::Nothing {
            // Longer than the image over it: what that gains must not show it.
            let mut bytes = std::fs::read(path("base.raw")).unwrap();
            let old = bytes.len();
            bytes.resize(recipe.resized * SECTOR, 0);
            fill(&mut bytes[old..], 0xd000_0000);
            std::fs::write(path("base.raw"), bytes).unwrap();
        }
        let mut paths = vec![top];
        paths.extend(recipe.data_file.then_some(data));
        paths.extend(lower);
        Self::at(paths, recipe)
    }

    /// The disk whose files are there already.
    pub fn at(paths: Vec<PathBuf>, recipe: Recipe) -> Self {
        let mut first = base_stamps(recipe);
        if recipe.below == Below::Qcow2 {
            middle_parts(recipe).for_each(|part| part.put(&mut first));
        }
        let under = first.clone();
        top_part(recipe).put(&mut first);
        first.resize(recipe.sectors.max(recipe.resized), 0);
        let mut files: Vec<_> = paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
        if let Some(len) = recipe.storage.device {
            // Left by an earlier use of the device.
            assert!(files[0].len() <= len as usize);
            files[0].resize(len as usize, 0xd5);
        }
        Self {
            recipe,
            files,
            paths,
            first,
            under,
        }
    }

    /// Where the image is for QEMU's tools.
    pub fn top(&self) -> &Path {
        &self.paths[0]
    }

    /// The number of the topmost file below the image.
    pub fn below(&self) -> usize {
        1 + usize::from(self.recipe.data_file)
    }

    /// A machine with the disk, and a folder for its journal if it has one.
    pub fn machine(&self) -> Machine {
        let machine = Machine::new(&self.files);
        if self.recipe.journaled {
            machine.keep_journals(&Left::new());
        }
        machine
    }

    /// Opens the image on a machine.
    pub async fn open(&self, machine: &Machine, writable: bool) -> Result<Opened> {
        if self.recipe.reserves {
            machine.allow_reserving();
        }
        machine.behave(self.recipe.storage);
        let journal = machine.journals();
        self.open_with(|index| machine.file(index), journal, writable)
            .await
    }

    /// Opens the image, and what its header says is below.
    pub async fn open_files(
        &self,
        file: impl Fn(usize) -> Arc<dyn Storage>,
        writable: bool,
    ) -> Result<Opened> {
        self.open_with(file, None, writable).await
    }

    async fn open_with(
        &self,
        file: impl Fn(usize) -> Arc<dyn Storage>,
        journal: Option<Arc<Folder>>,
        writable: bool,
    ) -> Result<Opened> {
        let options = qcow2::Options {
            writable,
            discard: true,
            cache_bytes: self.recipe.cache_bytes,
            journal,
            ..qcow2::Options::default()
        };
        let data = self.recipe.data_file.then(|| file(1));
        let image = Qcow2::open_with_data(file(0), data, options).await?;
        let image = Arc::new(image);
        let top = Layer {
            copy_on_read: self.recipe.copy_on_read && writable,
            ..layer(
                Format::Qcow2(image.clone()),
                image.data_storage().clone(),
                !writable,
            )
        };
        let mut layers = vec![Arc::new(top)];
        if image.backing().is_some() {
            let mut at = self.below();
            if self.recipe.below == Below::Qcow2 {
                let middle = Qcow2::open(file(at), qcow2::Options::default()).await?;
                let middle = layer(Format::Qcow2(Arc::new(middle)), file(at), true);
                layers.push(Arc::new(middle));
                at += 1;
            }
            let size = (self.recipe.sectors.max(self.recipe.resized) * SECTOR) as u64;
            let base = layer(Format::Raw(Raw::new(size)), file(at), true);
            layers.push(Arc::new(base));
        }
        let chain = Arc::new(Chain::new(layers)?);
        Ok(Opened { image, chain })
    }

    /// Lets `qemu-img check` judge the image.
    pub fn qemu_check(&self, files: &[Vec<u8>]) -> std::result::Result<(), String> {
        for (path, bytes) in self.paths.iter().zip(files).take(self.below()) {
            std::fs::write(path, bytes).unwrap();
        }
        let name = self.paths[0].to_str().unwrap();
        let output = crate::support::output("qemu-img", &["check", "-f", "qcow2", name]);
        match output.status.code() {
            Some(0 | 3) => Ok(()),
            code => Err(format!(
                "qemu-img check: {code:?}\n{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    }
}

fn layer(format: Format, storage: Arc<dyn Storage>, read_only: bool) -> Layer {
    Layer {
        name: "layer".into(),
        format,
        storage,
        read_only,
        discard: true,
        copy_on_read: false,
    }
}

/// Everything that the guest sees; `None` for a torn sector.
pub fn read_all(reactor: &Reactor, chain: &Arc<Chain>) -> Result<Vec<Option<u32>>> {
    let size = chain.size() as usize;
    let mut seen = Vec::with_capacity(size / SECTOR);
    let buffer = AlignedBuf::zeroed(size.min(1 << 20));
    for at in (0..size).step_by(1 << 20) {
        let len = buffer.len().min(size - at);
        // SAFETY: `buffer` outlives the operation.
        let bufs = unsafe { IoBufs::of(&buffer, 0, len) };
        reactor.block_on(View::of(chain.clone()).read(at as u64, bufs))?;
        seen.extend(buffer[..len].chunks(SECTOR).map(stamp_of));
    }
    Ok(seen)
}

/// Writes sectors with the stamps from `stamp` on, as a queue does.
pub fn write(
    reactor: &Reactor,
    chain: &Arc<Chain>,
    start: usize,
    count: usize,
    stamp: u32,
) -> Result<()> {
    let mut buffer = AlignedBuf::zeroed(count * SECTOR);
    fill(&mut buffer, stamp);
    // SAFETY: `buffer` outlives the operation.
    let bufs = unsafe { IoBufs::of(&buffer, 0, buffer.len()) };
    let write = |view: Rc<View>| view.write((start * SECTOR) as u64, bufs.clone());
    let view = View::of(chain.clone());
    reactor.block_on(with_room(view, || chain.clone(), write))
}
