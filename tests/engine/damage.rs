//! Images with known damage, for the tests of check and repair.

use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::support::*;

pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub const COPIED: u64 = 1 << 63;

/// Options of images of many shapes, and what is made in them.
pub const SHAPES: [(&str, Content); 14] = [
    ("compat=1.1", Content::PLAIN),
    ("compat=0.10", Content::PLAIN),
    ("compat=0.10,cluster_size=4k", Content::ALL),
    ("compat=1.1,cluster_size=4k", Content::ALL),
    ("compat=1.1,cluster_size=512", Content::ALL),
    ("compat=1.1,cluster_size=2M", Content::ALL),
    ("cluster_size=4k,refcount_bits=1", Content::PLAIN),
    ("cluster_size=1k,refcount_bits=2", Content::PLAIN),
    ("cluster_size=4k,refcount_bits=4", Content::COMPRESSED),
    ("cluster_size=4k,refcount_bits=8", Content::SNAPSHOTS),
    ("cluster_size=8k,refcount_bits=32", Content::ALL),
    ("cluster_size=4k,refcount_bits=64", Content::ALL),
    ("cluster_size=16k,extended_l2=on", Content::ALL),
    (
        "cluster_size=64k,extended_l2=on,lazy_refcounts=on",
        Content::ALL,
    ),
];

/// What is in an image beside data and zeros.
#[derive(Clone, Copy)]
pub struct Content {
    pub compressed: bool,
    pub snapshots: bool,
    pub bitmaps: bool,
}

impl Content {
    pub const PLAIN: Self = Self {
        compressed: false,
        snapshots: false,
        bitmaps: false,
    };
    pub const COMPRESSED: Self = Self {
        compressed: true,
        ..Self::PLAIN
    };
    /// Each refers to a host cluster as often as all compressed clusters in it: refcounts of few
    /// bits do not hold both.
    pub const SNAPSHOTS: Self = Self {
        snapshots: true,
        ..Self::PLAIN
    };
    pub const ALL: Self = Self {
        compressed: true,
        snapshots: true,
        bitmaps: true,
    };
}

/// Makes an image of `size` bytes with a random life.
pub fn make(path: &Path, options: &str, content: Content, size: u64, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    create(path, options, size);
    write_some(path, content, size, &mut rng);
    let image = path.to_str().unwrap();
    if content.bitmaps && !options.contains("0.10") {
        run("qemu-img", &["bitmap", "--add", "-g", "64k", image, "b0"]);
    }
    if content.snapshots {
        for name in ["one", "two"] {
            run("qemu-img", &["snapshot", "-c", name, image]);
            write_some(path, content, size, &mut rng);
        }
    }
}

fn write_some(path: &Path, content: Content, size: u64, rng: &mut StdRng) {
    let mut args: Vec<String> = ["-f", "qcow2"].map(String::from).into();
    let zeros = !run("qemu-img", &["info", path.to_str().unwrap()]).contains("0.10");
    if content.compressed {
        // Whole clusters of any size, and only where nothing is.
        args.extend(["-c".into(), "discard -q 2M 2M".into()]);
        args.extend(["-c".into(), "write -q -c -P 99 2M 2M".into()]);
    }
    for value in 1..=16 {
        let start = rng.random_range(0..size / 4096) * 4096;
        let len = (rng.random_range(1..=16) * 4096).min(size - start);
        let command = match rng.random_range(0..8) {
            0 if zeros => format!("write -q -z {start} {len}"),
            1 if zeros => format!("write -q -z -u {start} {len}"),
            2 => format!("discard -q {start} {len}"),
            _ => format!("write -q -P {value} {start} {len}"),
        };
        args.extend(["-c".to_owned(), command]);
    }
    args.push(path.to_str().unwrap().to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    run("qemu-io", &args);
}

/// An image's bytes, and where its tables are.
pub struct Tables {
    pub bytes: Vec<u8>,
    pub cluster: u64,
    pub entry: u64,
    pub version: u64,
    pub rng: StdRng,
}

impl Tables {
    pub fn of(bytes: Vec<u8>, seed: u64) -> Self {
        let mut tables = Self {
            bytes,
            cluster: 0,
            entry: 8,
            version: 0,
            rng: StdRng::seed_from_u64(seed),
        };
        tables.cluster = 1 << (tables.word(16) & 0xffff_ffff);
        tables.version = tables.word(0) & 0xffff_ffff;
        if tables.version == 3 && tables.word(72) & 16 != 0 {
            tables.entry = 16;
        }
        tables
    }

    pub fn word(&self, at: u64) -> u64 {
        let bytes = self.bytes.get(at as usize..at as usize + 8);
        bytes.map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
    }

    pub fn put(&mut self, at: u64, word: u64) {
        if let Some(place) = self.bytes.get_mut(at as usize..at as usize + 8) {
            place.copy_from_slice(&word.to_be_bytes());
        }
    }

    /// Places of the entries but 0 of the L1 table.
    pub fn l1(&self) -> Vec<u64> {
        let (table, count) = (self.word(40), self.word(32) & 0xffff_ffff);
        let places = (0..count).map(|index| table + index * 8);
        places.filter(|&at| self.word(at) != 0).collect()
    }

    /// Places of the entries but 0 of the L2 tables.
    pub fn l2(&self) -> Vec<u64> {
        let tables = self.l1().into_iter().map(|at| self.word(at) & OFFSET);
        tables
            .flat_map(|table| (table..table + self.cluster).step_by(self.entry as usize))
            .filter(|&at| self.word(at) != 0)
            .collect()
    }

    /// Places of the entries but 0 of the refcount table.
    pub fn reftable(&self) -> Vec<u64> {
        let (table, clusters) = (self.word(48), self.word(56) >> 32);
        let places = (table..table + clusters * self.cluster).step_by(8);
        places.filter(|&at| self.word(at) != 0).collect()
    }

    /// Whether the L1 table, the refcount table or a refcount block is taken for an L2 table, too.
    pub fn maps_with_metadata(&self) -> bool {
        let (l1, refcounts) = (self.word(40), self.word(48));
        let l1_end = l1 + (self.word(32) & 0xffff_ffff) * 8;
        let refcounts_end = refcounts + (self.word(56) >> 32) * self.cluster;
        let blocks: Vec<u64> = self.reftable().iter().map(|&at| self.word(at)).collect();
        let l2_tables = self.l1().into_iter().map(|at| self.word(at) & OFFSET);
        l2_tables.into_iter().any(|table| {
            table < self.cluster
                || (l1..l1_end).contains(&table)
                || (refcounts..refcounts_end).contains(&table)
                || blocks.contains(&table)
        })
    }

    /// Whether an entry of an L2 table has that table for guest data.
    pub fn maps_itself(&self) -> bool {
        self.l2().into_iter().any(|at| {
            let entry = self.word(at);
            entry >> 62 & 1 == 0 && entry & OFFSET == at / self.cluster * self.cluster
        })
    }

    fn one_of(&mut self, places: &[u64]) -> Option<u64> {
        places.choose(&mut self.rng).copied()
    }

    fn some_cluster(&mut self) -> u64 {
        let clusters = self.bytes.len() as u64 / self.cluster;
        self.rng.random_range(1..clusters.max(2)) * self.cluster
    }

    /// Changes a byte of the refcounts of the file's clusters.
    pub fn damage_refcount(&mut self) {
        let order = match self.version {
            2 => 4,
            _ => self.word(92) & 0xffff_ffff,
        };
        let per_block = (self.cluster * 8) >> order;
        let cluster = self.some_cluster() / self.cluster;
        let block = self.word(self.word(48) + cluster / per_block * 8);
        let at = block + ((cluster % per_block) << order) / 8 + ((1u64 << order) / 8).max(1) - 1;
        let value = self.rng.random_range(0..4);
        if block != 0
            && let Some(byte) = self.bytes.get_mut(at as usize)
        {
            *byte = value;
        }
    }

    /// Changes an L2 entry's copied flag.
    pub fn damage_flag(&mut self) {
        let places = [self.l1(), self.l2()].concat();
        let standard: Vec<u64> = places
            .into_iter()
            .filter(|&at| self.word(at) >> 62 & 1 == 0 && self.word(at) & OFFSET != 0)
            .collect();
        if let Some(at) = self.one_of(&standard) {
            self.put(at, self.word(at) ^ COPIED);
        }
    }

    /// Changes an L2 entry.
    pub fn damage_l2(&mut self) {
        let places = self.l2();
        let Some(at) = self.one_of(&places) else {
            return;
        };
        let (word, elsewhere) = (self.word(at), self.some_cluster());
        let word = match self.rng.random_range(0..6) {
            0 => 0,
            1 => word | 1 << self.rng.random_range(56..62),
            2 => word & !OFFSET | elsewhere,
            3 => word & !OFFSET | (elsewhere + (1 << 40)),
            4 => word | 512,
            _ => self.one_of(&places).map_or(0, |other| self.word(other)),
        };
        self.put(at, word);
    }

    /// Changes an L1 entry.
    pub fn damage_l1(&mut self) {
        let places = self.l1();
        let Some(at) = self.one_of(&places) else {
            return;
        };
        let (word, elsewhere) = (self.word(at), self.some_cluster());
        let word = match self.rng.random_range(0..5) {
            0 => 0,
            1 => word | 1 << self.rng.random_range(56..62),
            2 => word & !OFFSET | elsewhere,
            3 => word & !OFFSET | (elsewhere + (1 << 40)),
            _ => self.one_of(&places).map_or(0, |other| self.word(other)),
        };
        self.put(at, word);
    }

    /// Makes an L2 entry point at the L1 table.
    pub fn damage_overlap(&mut self) {
        let places = self.l2();
        let standard: Vec<u64> = places
            .into_iter()
            .filter(|&at| self.word(at) & COPIED != 0)
            .collect();
        if let Some(at) = self.one_of(&standard) {
            self.put(at, self.word(40) | COPIED);
        }
    }

    /// Changes an entry of the refcount table.
    pub fn damage_reftable(&mut self) {
        let places = self.reftable();
        let Some(at) = self.one_of(&places) else {
            return;
        };
        let (word, elsewhere) = (self.word(at), self.some_cluster());
        let word = match self.rng.random_range(0..4) {
            0 => 0,
            1 => word | 1,
            2 => elsewhere,
            _ => elsewhere + (1 << 40),
        };
        self.put(at, word);
    }
}
