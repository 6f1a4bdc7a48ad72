//! A judge of qcow2 images that shares no code with the engine: counts who refers to each
//! cluster, and compares that with the refcounts.
//!
//! Source: QEMU's `docs/interop/qcow2`, and the rules of `qemu-img check`.

use std::collections::HashMap;

use super::storage::SparseStorage;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// What must be 0 in the descriptor of a cluster that is not compressed.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Images with more than this of anything are not judged.
const LIMIT: u64 = 1024;
/// Neither are images with more bytes.
const LARGEST: u64 = 32 << 20;

/// Refcounts that are looked at where the file ends before.
const COUNTED: u64 = 1 << 16;

/// The verdict.
#[derive(Debug, Default)]
pub struct Report {
    /// Contradictions: references to clusters that are counted as used by fewer, or elsewhere.
    pub errors: Vec<String>,
    /// Clusters that are counted as used by more than use them.
    pub leaks: usize,
    /// The disk has a cluster in two places. Both may be counted; but the entry that is left when
    /// the other goes would have to become the cluster's owner, and nobody looks for it.
    pub shared: bool,
}

struct Judge {
    image: Image,
    bits: u32,
    /// References of each cluster, and whether one of them must be the only one.
    references: HashMap<u64, (u64, bool)>,
    /// Entries of the active tables: cluster, and whether it is said to be referred to once.
    copied: Vec<(u64, bool)>,
    extended: bool,
    data_file: bool,
    report: Report,
}

/// The bytes of an image; zeros behind its end.
struct Image(Vec<u8>);

impl Image {
    /// A big-endian number of `len` bytes.
    fn number(&self, at: u64, len: u64) -> u64 {
        (at..at.saturating_add(len))
            .map(|at| self.0.get(at as usize).copied().unwrap_or(0))
            .fold(0, |all, byte| (all << 8) | u64::from(byte))
    }

    fn word(&self, at: u64) -> u64 {
        self.number(at, 8)
    }
}

/// Judges the image in `storage`; `None`: it is too large, or no image at all.
#[must_use]
pub fn check(storage: &SparseStorage) -> Option<Report> {
    let len = storage.end();
    if len > LARGEST {
        return None;
    }
    let image = Image(storage.bytes(0, len as usize));
    let bits = image.number(20, 4);
    if !(9..=21).contains(&bits) || image.number(0, 4) != 0x5146_49fb {
        return None;
    }
    let version = image.number(4, 4);
    let incompatible = if version >= 3 { image.word(72) } else { 0 };
    let order = if version >= 3 { image.number(96, 4) } else { 4 };
    let (l1, l1_size) = (image.word(40), image.number(36, 4));
    let (reftable, reftable_clusters) = (image.word(48), image.number(56, 4));
    let (snapshot_table, snapshots) = (image.word(64), image.number(60, 4));
    let header_length = image.number(100, 4);
    if l1_size > LIMIT || order > 6 || snapshots > 16 || reftable_clusters << bits > 1 << 20 {
        return None;
    }
    let mut judge = Judge {
        image,
        bits: bits as u32,
        references: HashMap::new(),
        copied: Vec::new(),
        extended: incompatible & 16 != 0,
        data_file: incompatible & 4 != 0,
        report: Report::default(),
    };
    let cluster = 1u64 << bits;
    judge.refer(0, cluster, true);
    judge.refer(reftable, reftable_clusters << bits, true);
    let table = judge.table(reftable, reftable_clusters << bits >> 3);
    for &block in table.iter().filter(|&&block| block != 0) {
        judge.refer(block, cluster, true);
    }
    judge.refer(l1, l1_size * 8, true);
    judge.mapping(l1, l1_size, true);
    judge.snapshots(snapshot_table, snapshots)?;
    judge.bitmaps(version, header_length)?;
    judge.compare(&table, order as u32);
    Some(judge.report)
}

impl Judge {
    fn table(&self, offset: u64, entries: u64) -> Vec<u64> {
        (0..entries)
            .map(|index| self.image.word(offset.saturating_add(index * 8)))
            .collect()
    }

    fn len(&self) -> u64 {
        self.image.0.len() as u64
    }

    fn refer(&mut self, offset: u64, len: u64, alone: bool) {
        let end = self.len();
        if len == 0 {
            // Where nothing is, is not said.
            return;
        }
        if offset.saturating_add(len) >= end.saturating_add(1 << self.bits) {
            let what = format!("{len} bytes at {offset:#x} are behind the end, {end:#x}");
            self.report.errors.push(what);
            return;
        }
        for cluster in offset >> self.bits..=(offset + len - 1) >> self.bits {
            let entry = self.references.entry(cluster).or_default();
            *entry = (entry.0 + 1, entry.1 || alone);
        }
    }

    fn refer_aligned(&mut self, offset: u64, alone: bool) -> bool {
        if !offset.is_multiple_of(1 << self.bits) {
            let what = format!("{offset:#x} is not aligned");
            self.report.errors.push(what);
            return false;
        }
        self.refer(offset, 1 << self.bits, alone);
        true
    }

    /// The tables under an L1 table.
    fn mapping(&mut self, l1: u64, l1_size: u64, active: bool) {
        let cluster = 1u64 << self.bits;
        let words = if self.extended { 2 } else { 1 };
        for entry in self.table(l1, l1_size) {
            let table = entry & OFFSET;
            if table == 0 || !self.refer_aligned(table, false) {
                continue;
            }
            if active {
                self.copied.push((table >> self.bits, entry & COPIED != 0));
            }
            for entry in self.table(table, cluster / 8).chunks(words) {
                self.entry(entry, active);
            }
        }
    }

    fn entry(&mut self, entry: &[u64], active: bool) {
        let (word, bitmap) = (entry[0], entry.get(1).copied().unwrap_or(0));
        if word & COMPRESSED != 0 {
            let shift = 62 - (self.bits - 8);
            let field = word & (COMPRESSED - 1);
            let start = field & ((1 << shift) - 1);
            let sectors = (field >> shift) + 1;
            self.refer(start, sectors * 512 - start % 512, false);
            if word & COPIED != 0 || self.data_file {
                self.report
                    .errors
                    .push(format!("compressed and owned: {word:#x}"));
            }
            return;
        }
        if self.extended && bitmap & bitmap >> 32 & 0xffff_ffff != 0 {
            self.report
                .errors
                .push(format!("subclusters are both: {bitmap:#x}"));
        }
        if word & RESERVED != 0 {
            self.report.errors.push(format!("reserved bits: {word:#x}"));
        }
        let host = word & OFFSET;
        if self.data_file || host == 0 {
            return;
        }
        if self.refer_aligned(host, false) && active {
            self.copied.push((host >> self.bits, word & COPIED != 0));
        }
    }

    fn snapshots(&mut self, table: u64, count: u64) -> Option<()> {
        let mut at = table;
        for _ in 0..count {
            let (l1, l1_size) = (
                self.image.word(at),
                self.image.number(at.wrapping_add(8), 4),
            );
            if l1_size > LIMIT {
                return None;
            }
            self.refer(l1, l1_size * 8, true);
            self.mapping(l1, l1_size, false);
            let number = |from, len| self.image.number(at.wrapping_add(from), len);
            let len = 40 + number(36, 4) + number(12, 2) + number(14, 2);
            at = at.checked_add(len.next_multiple_of(8))?;
        }
        self.refer(table, at - table, true);
        Some(())
    }

    fn bitmaps(&mut self, version: u64, header_length: u64) -> Option<()> {
        if version < 3 || self.table(88, 1)[0] & 1 == 0 {
            return Some(());
        }
        let mut at = header_length;
        let (mut directory, mut len, mut count) = (0, 0, 0);
        // The extensions end where the backing file's name begins.
        let name_at = self.table(8, 1)[0];
        let end = if name_at == 0 { u64::MAX } else { name_at };
        while at < end.min(1 << self.bits) {
            let word = self.table(at, 1)[0];
            let (kind, length) = (word >> 32, word & 0xffff_ffff);
            match kind {
                0 => break,
                0x2385_2875 => {
                    count = self.table(at + 8, 1)[0] >> 32;
                    (len, directory) = (self.table(at + 16, 1)[0], self.table(at + 24, 1)[0]);
                }
                _ => {}
            }
            at += 8 + length.next_multiple_of(8);
        }
        if count > 16 || len > 1 << 16 {
            return None;
        }
        self.refer(directory, len, true);
        let mut at = directory;
        for _ in 0..count {
            let fixed = self.table(at, 3);
            let (entries, name) = (fixed[1] >> 32, fixed[2] >> 32 & 0xffff);
            let (table, extra) = (fixed[0], fixed[2] & 0xffff_ffff);
            if entries > LIMIT {
                return None;
            }
            self.refer(table, entries * 8, true);
            for entry in self.table(table, entries) {
                if entry & OFFSET != 0 {
                    self.refer_aligned(entry & OFFSET, true);
                }
            }
            at = at.checked_add((24 + name + extra).next_multiple_of(8))?;
            if at > directory.checked_add(len)? || extra > 0 {
                // It leaves the directory, or has extra data that must be understood: what the
                // bitmaps refer to is not to be relied on.
                return None;
            }
        }
        Some(())
    }

    fn refcount(&self, table: &[u64], order: u32, cluster: u64) -> u64 {
        let per_block = (8u64 << self.bits) >> order;
        let Some(&block) = table.get((cluster / per_block) as usize) else {
            return 0;
        };
        if block == 0 {
            return 0;
        }
        let index = cluster % per_block;
        if order < 3 {
            let bit = index << order;
            let byte = self.image.number(block.wrapping_add(bit / 8), 1);
            return (byte >> (bit % 8)) & ((1 << (1 << order)) - 1);
        }
        let width = 1u64 << (order - 3);
        self.image.number(block.wrapping_add(index * width), width)
    }

    fn compare(&mut self, table: &[u64], order: u32) {
        let clusters = self.len() >> self.bits;
        let per_block = (8u64 << self.bits) >> order;
        let counted = per_block.saturating_mul(table.len() as u64).min(COUNTED);
        // What is counted behind the end is a leak too, once the file reaches it.
        for cluster in 0..=counted.max(clusters + LIMIT) {
            let (references, alone) = self.references.remove(&cluster).unwrap_or_default();
            let refcount = self.refcount(table, order, cluster);
            if refcount < references || (alone && references > 1) {
                self.report.errors.push(format!(
                    "cluster {cluster}: refcount {refcount}, {references} references"
                ));
            }
            if refcount > references {
                self.report.leaks += 1;
            }
        }
        self.report.shared = self.is_shared();
        for (cluster, copied) in std::mem::take(&mut self.copied) {
            let refcount = self.refcount(table, order, cluster);
            if copied != (refcount == 1) {
                self.report.errors.push(format!(
                    "cluster {cluster}: copied flag {copied}, refcount {refcount}"
                ));
            }
        }
    }

    fn is_shared(&self) -> bool {
        let mut clusters: Vec<u64> = self.copied.iter().map(|(cluster, _)| *cluster).collect();
        clusters.sort_unstable();
        clusters.windows(2).any(|pair| pair[0] == pair[1])
    }
}
