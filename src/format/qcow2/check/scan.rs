//! Counting the references to every host cluster.
//!
//! Each table is read once, whatever number of others point at it: what it refers to counts as
//! often as it is referred to itself. So the time and the memory that a check takes follow what
//! the file really holds, not what its tables claim.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use super::super::header::Header;
use super::super::l2::{COPIED, OFFSET};
use super::super::snapshots::Snapshot;
use super::super::words::Words;
use super::super::{bitmaps, snapshots};
use super::counts::Counts;
use super::entries::{self, Fault, L1_RESERVED, Target};
use super::image::Image;
use super::{Finding, Report, Severity, Summary};
use crate::error::{Error, Result};

/// Bits of an entry of the refcount table that must be 0.
const REFTABLE_RESERVED: u64 = 0x1ff;
/// QEMU's limit on the clusters of a file.
const MAX_CLUSTERS: u64 = i32::MAX as u64;
/// More clusters of metadata than this make no sense with so many clusters.
const MAX_METADATA: usize = 1 << 25;

/// What a host cluster is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The header.
    Header,
    /// The L1 table of the disk, or of a snapshot.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The table of the snapshots.
    SnapshotTable,
    /// The directory, a table or the data of persistent bitmaps.
    Bitmaps,
    /// Guest data.
    Data,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "the header",
            Self::L1 => "an L1 table",
            Self::L2 => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::SnapshotTable => "the snapshot table",
            Self::Bitmaps => "a bitmap",
            Self::Data => "guest data",
        })
    }
}

/// How often a table is referred to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uses {
    /// By the disk and by snapshots.
    pub total: u64,
    /// By the disk.
    pub active: u64,
}

/// What a scan of the image found.
#[derive(Debug, Default)]
pub struct Scan {
    /// The numbers.
    pub summary: Summary,
    /// Contradictions that are not a matter of refcounts and copied flags.
    pub damage: u64,
    /// There may be references that were not seen.
    pub hidden: bool,
    /// The refcount structures cannot be used.
    pub rebuild: bool,
    /// Some clusters have more references than a refcount can hold.
    pub overflow: bool,
    /// References that were counted.
    pub references: Counts,
    /// What entries refer to that are not counted as they are, but will be when they are mended:
    /// first cluster, clusters, and how often.
    pub latent: Vec<(u64, u64, u64)>,
    /// Refcounts in the image.
    pub stored: Counts,
    /// What the clusters of the image's own hold.
    pub metadata: HashMap<u64, Area>,
    /// Clusters of metadata that something else uses as well.
    pub overlaps: BTreeMap<u64, (Area, Area)>,
    /// By offset and number of entries.
    pub l1_tables: BTreeMap<(u64, u64), Uses>,
    /// By offset.
    pub l2_tables: BTreeMap<u64, Uses>,
    /// Offsets of mapping tables with entries that make no sense.
    pub faulty: HashSet<u64>,
    /// The internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// The table of the snapshots, or an entry of it, makes no sense.
    pub faulty_snapshots: bool,
    /// The refcount table; empty if it cannot be where the header says.
    pub reftable: Vec<u64>,
    /// Clusters of the file, and one more if something begins in the file's last one; on a device
    /// those up to the last one in use.
    pub end: u64,
}

impl Scan {
    /// Scans the image.
    pub async fn run(image: &Image<'_>, report: &mut Report<'_>) -> Result<Self> {
        if image.clusters() > MAX_CLUSTERS {
            return Err(Error::unsupported(
                image.storage.name(),
                format!(
                    "a file of {} clusters is too large to be checked (at most {MAX_CLUSTERS})",
                    image.clusters()
                ),
            ));
        }
        let mut walk = Walk {
            image,
            report,
            scan: Self {
                end: image.clusters(),
                ..Self::default()
            },
        };
        walk.scan.summary.total_clusters =
            (image.header.size / 512 * 512).div_ceil(image.cluster_size());
        walk.refcount_structures().await?;
        walk.header_and_snapshots().await?;
        walk.bitmaps().await?;
        walk.l1_tables().await?;
        walk.l2_tables().await?;
        walk.refcount_blocks();
        walk.compare().await?;
        if image.fixed {
            // What a repair adds goes behind what is in use.
            let used = image.cluster_of(walk.scan.summary.image_end);
            walk.scan.end = used.min(walk.scan.end);
        }
        Ok(walk.scan)
    }
}

/// Where the refcount table is, and its bytes; `None`: it cannot be there.
pub fn reftable_range(image: &Image<'_>) -> Option<(u64, u64)> {
    let header = &image.header;
    let len = u64::from(header.reftable_clusters) << header.cluster_bits;
    let usable = header.check_refcount_table().is_ok();
    usable.then_some((header.reftable_offset, len))
}

/// Whether the header says where snapshots are, of which there are none, and QEMU does not believe it.
pub fn nameless_snapshots(header: &Header) -> bool {
    let aligned = header
        .snapshots_offset
        .is_multiple_of(1 << header.cluster_bits);
    header.snapshots == 0 && (!aligned || header.snapshots_offset >> 63 != 0)
}

/// A scan under way.
pub(super) struct Walk<'a, 'r, 's> {
    pub(super) image: &'a Image<'s>,
    pub(super) report: &'a mut Report<'r>,
    pub(super) scan: Scan,
}

impl Walk<'_, '_, '_> {
    /// Notes a contradiction that counts `times`.
    pub(super) fn corruption(&mut self, times: u64, what: String) {
        self.scan.summary.corruptions += times;
        (self.report)(Finding {
            severity: Severity::Corruption,
            what,
        });
    }

    /// Notes a contradiction that is not a matter of refcounts and copied flags.
    pub(super) fn damage(&mut self, times: u64, what: String) {
        self.scan.damage += times;
        self.corruption(times, what);
    }

    /// Notes what a range holds. What lies behind the file holds nothing.
    fn claim(&mut self, offset: u64, len: u64, area: Area) -> Result<()> {
        if self.image.leaves_file(offset, len) {
            return Ok(());
        }
        for cluster in self.image.clusters_of(offset, len) {
            if let Some(before) = self.scan.metadata.insert(cluster, area) {
                self.scan.overlaps.insert(cluster, (before, area));
            }
        }
        if self.scan.metadata.len() > MAX_METADATA {
            return Err(Error::corrupt(
                self.image.storage.name(),
                format!("there are more than {MAX_METADATA} clusters of metadata"),
            ));
        }
        Ok(())
    }

    /// Counts `times` references to each cluster of a range.
    fn count(&mut self, offset: u64, len: u64, times: u64, what: impl fmt::Display) {
        if self.image.leaves_file(offset, len) {
            let text = format!("{what} at {offset:#x}: {len} bytes past the end of the file");
            self.damage(times, text);
            return;
        }
        self.add(offset, len, times);
    }

    fn add(&mut self, offset: u64, len: u64, times: u64) {
        for cluster in self.image.clusters_of(offset, len) {
            self.scan.references.add(cluster, times);
            self.scan.end = self.scan.end.max(cluster + 1);
        }
    }

    async fn refcount_structures(&mut self) -> Result<()> {
        let (header, cluster) = (&self.image.header, self.image.cluster_size());
        let Some((offset, len)) = reftable_range(self.image) else {
            self.scan.rebuild = true;
            let what = format!(
                "refcount table of {} clusters at {:#x}",
                header.reftable_clusters, header.reftable_offset
            );
            self.damage(1, what);
            return Ok(());
        };
        self.scan.reftable = self.image.table(offset, len / 8).await?;
        self.claim(offset, len, Area::RefcountTable)?;
        self.count(offset, len, 1, Area::RefcountTable);
        for index in 0..self.scan.reftable.len() {
            let entry = self.scan.reftable.get(index).copied().unwrap_or_default();
            if entry != 0 && self.image.is_aligned(entry) {
                self.claim(entry, cluster, Area::RefcountBlock)?;
            }
        }
        Ok(())
    }

    async fn header_and_snapshots(&mut self) -> Result<()> {
        let (image, header) = (self.image, &self.image.header);
        self.claim(0, image.cluster_size(), Area::Header)?;
        self.count(0, image.cluster_size(), 1, Area::Header);
        let active = (header.l1_offset, u64::from(header.l1_size));
        self.scan.l1_tables.insert(
            active,
            Uses {
                total: 1,
                active: 1,
            },
        );
        if let Some(what) = header.objection() {
            self.damage(1, format!("header: {what}"));
        }
        if nameless_snapshots(header) {
            let what = format!(
                "snapshot table at {:#x}, without snapshots",
                header.snapshots_offset
            );
            self.damage(1, what);
            return Ok(());
        }
        let fetch = async |offset, len| image.read(offset, len).await;
        let table = snapshots::read(fetch, image.storage.name(), header).await?;
        self.claim(header.snapshots_offset, table.len, Area::SnapshotTable)?;
        self.count(header.snapshots_offset, table.len, 1, Area::SnapshotTable);
        if header.has_data_file() && !table.snapshots.is_empty() {
            let count = table.snapshots.len();
            self.damage(1, format!("{count} snapshots in an image with a data file"));
        }
        for snapshot in &table.snapshots {
            self.snapshot(snapshot);
        }
        self.scan.snapshots = table.snapshots;
        Ok(())
    }

    fn snapshot(&mut self, snapshot: &snapshots::Snapshot) {
        let at = snapshot.l1_offset;
        let which = format!("snapshot '{}' ({})", snapshot.name, snapshot.id);
        if snapshot.incomplete {
            self.damage(1, format!("{which} lacks its VM state size and disk size"));
        }
        let wrong = if !self.image.is_aligned(at) || at >> 56 != 0 {
            Some(format!("{which}: L1 table at {at:#x}, inside a cluster"))
        } else if snapshot.l1_entries > snapshots::MAX_L1_ENTRIES {
            Some(format!(
                "{which}: L1 table of {} entries (expected at most {})",
                snapshot.l1_entries,
                snapshots::MAX_L1_ENTRIES
            ))
        } else {
            None
        };
        if let Some(what) = wrong {
            self.scan.hidden = true;
            self.scan.faulty_snapshots = true;
            return self.damage(1, what);
        }
        let entries = u64::from(snapshot.l1_entries);
        let needed = self.image.shape.l1_entries(snapshot.disk_size);
        if snapshot.sized && entries < needed {
            // What the rest of the table referred to is not known.
            self.scan.hidden = true;
            self.damage(
                1,
                format!(
                    "{which}: L1 table of {entries} entries (expected at least {needed}, for a \
                     disk of {} bytes)",
                    snapshot.disk_size
                ),
            );
        }
        self.scan.hidden |= self.image.leaves_file(at, entries * 8);
        let key = (at, entries);
        self.scan.l1_tables.entry(key).or_default().total += 1;
    }

    async fn bitmaps(&mut self) -> Result<()> {
        let (image, header) = (self.image, &self.image.header);
        let consistent = header.autoclear & super::super::header::AUTOCLEAR_BITMAPS != 0;
        let Some(directory) = header.bitmaps.filter(|_| consistent) else {
            return Ok(());
        };
        let list = match bitmaps::list(image.storage, header).await {
            Ok(list) if list.len() == directory.count as usize => list,
            Err(error @ Error::Io { .. }) => return Err(error),
            _ => {
                self.scan.hidden = true;
                self.damage(1, "the bitmap directory is damaged".to_owned());
                return Ok(());
            }
        };
        if let Some(what) = bitmaps::directory_objection(header, &list) {
            self.scan.hidden = true;
            self.damage(1, what);
        }
        self.claim(directory.offset, directory.len, Area::Bitmaps)?;
        self.count(directory.offset, directory.len, 1, "bitmap directory");
        for bitmap in list {
            self.bitmap(&bitmap).await?;
        }
        Ok(())
    }

    async fn bitmap(&mut self, bitmap: &bitmaps::Bitmap) -> Result<()> {
        let (image, cluster) = (self.image, self.image.cluster_size());
        let (offset, count) = (bitmap.table_offset, u64::from(bitmap.table_entries));
        if let Some(what) = bitmap.objection(&image.header) {
            self.scan.hidden = true;
            self.damage(1, what);
        }
        if !bitmap.has_table(image.header.cluster_bits) {
            return Ok(());
        }
        self.claim(offset, count * 8, Area::Bitmaps)?;
        self.count(offset, count * 8, 1, "bitmap table");
        for entry in image.table(offset, count).await? {
            let data = entry & bitmaps::DATA_OFFSET;
            if !bitmaps::possible_entry(entry, image.header.cluster_bits) {
                let what = format!("bitmap '{}': table entry {entry:#018x}", bitmap.name);
                self.damage(1, what);
            } else if data != 0 {
                self.claim(data, cluster, Area::Bitmaps)?;
                self.count(data, cluster, 1, "bitmap data");
            }
        }
        Ok(())
    }

    async fn l1_tables(&mut self) -> Result<()> {
        let tables: Vec<_> = self.scan.l1_tables.iter().map(|(&k, &v)| (k, v)).collect();
        for ((offset, count), uses) in tables {
            self.claim(offset, count * 8, Area::L1)?;
            self.count(offset, count * 8, uses.total, Area::L1);
            let mut entries = Vec::new();
            let push = |index, entry| entries.push((index, entry));
            self.image.words(offset, count, push).await?;
            for &(index, entry) in &entries {
                let wrong = if entry & L1_RESERVED != 0 {
                    Some("has reserved bits set")
                } else if entry & OFFSET == 0 && entry & COPIED != 0 {
                    Some("has the copied flag, but no table")
                } else {
                    None
                };
                if let Some(wrong) = wrong {
                    let at = offset + index * 8;
                    self.scan.faulty.insert(offset);
                    self.damage(
                        uses.total,
                        format!("L1 entry {entry:#018x} at {at:#x} {wrong}"),
                    );
                }
                if !self.image.is_aligned(entry & OFFSET) {
                    self.scan.faulty.insert(offset);
                }
                if entry & OFFSET != 0 {
                    let table = self.scan.l2_tables.entry(entry & OFFSET).or_default();
                    table.total += uses.total;
                    table.active += uses.active;
                }
            }
            self.tables_used_twice(entries.iter().map(|(_, entry)| entry & OFFSET).collect());
        }
        Ok(())
    }

    /// Snapshots share L2 tables with the disk; within one L1 table each has its own.
    fn tables_used_twice(&mut self, mut offsets: Vec<u64>) {
        offsets.sort_unstable();
        for pair in offsets.windows(2) {
            if let &[a, b] = pair
                && a == b
                && a != 0
            {
                let cluster = self.image.cluster_of(a);
                self.scan.overlaps.insert(cluster, (Area::L2, Area::L2));
            }
        }
    }

    async fn l2_tables(&mut self) -> Result<()> {
        let cluster = self.image.cluster_size();
        let tables: Vec<_> = self.scan.l2_tables.iter().map(|(&k, &v)| (k, v)).collect();
        for &(offset, uses) in &tables {
            self.count(offset, cluster, uses.total, Area::L2);
            if !self.image.is_aligned(offset) {
                self.scan.hidden = true;
                let what = format!("L2 table at {offset:#x}, inside a cluster");
                self.damage(uses.total, what);
            }
            self.claim(offset, cluster, Area::L2)?;
        }
        for (offset, uses) in tables {
            if !self.image.leaves_file(offset, cluster) {
                self.l2_table(offset, uses).await?;
            }
        }
        Ok(())
    }

    async fn l2_table(&mut self, offset: u64, uses: Uses) -> Result<()> {
        let table = self.image.read_cluster(offset).await?;
        let shape = self.image.shape;
        // Where the next cluster is, if the image is not fragmented.
        let mut next = None;
        for (index, words) in entries::entries(shape, &table).enumerate() {
            if words == Words::default() {
                continue;
            }
            let image = self.image;
            let entry = entries::judge(shape, words, |at, len| image.leaves_file(at, len));
            if !entry.faults.is_empty() {
                self.scan.faulty.insert(offset);
            }
            for &fault in &entry.faults {
                let at = offset + index as u64 * shape.entry_bytes();
                self.fault(fault, words, at, uses);
            }
            if uses.active > 0 {
                self.statistics(&entry, &mut next, uses.active);
            }
            let (at, len) = match entry.target {
                Target::Compressed(at, len) => (at, len),
                Target::Cluster(at) => (at, self.image.cluster_size()),
                Target::None => continue,
            };
            let unclear = |fault| matches!(fault, Fault::Conflict | Fault::CompressedWithBitmap);
            if entry.faults.iter().copied().any(unclear) && !self.image.leaves_file(at, len) {
                let clusters = self.image.clusters_of(at, len);
                let count = clusters.end - clusters.start;
                self.scan.latent.push((clusters.start, count, uses.total));
            }
            if entry.counts {
                self.add(at, len, uses.total);
                self.beside_metadata(at, len);
            }
        }
        Ok(())
    }

    fn fault(&mut self, fault: Fault, words: Words, at: u64, uses: Uses) {
        self.scan.hidden |= matches!(
            fault,
            Fault::Conflict | Fault::CompressedInDataFile | Fault::CompressedWithBitmap
        );
        let what = format!("L2 entry {:#018x} at {at:#x} {fault}", words.descriptor);
        self.damage(uses.total, what);
    }

    fn statistics(&mut self, entry: &entries::Entry, next: &mut Option<u64>, times: u64) {
        let unclear = [
            Fault::Conflict,
            Fault::CompressedInDataFile,
            Fault::CompressedWithBitmap,
        ];
        if entry.faults.iter().any(|fault| unclear.contains(fault)) {
            return;
        }
        let summary = &mut self.scan.summary;
        match entry.target {
            Target::Compressed(..) => {
                summary.allocated_clusters += times;
                summary.compressed_clusters += times;
                summary.fragmented_clusters += times;
            }
            Target::Cluster(offset) => {
                summary.allocated_clusters += times;
                if next.is_some_and(|next| next != offset) {
                    summary.fragmented_clusters += times;
                }
                *next = Some(offset + self.image.cluster_size());
            }
            Target::None => {}
        }
    }

    /// Notes where guest data and metadata lie on top of one another.
    fn beside_metadata(&mut self, offset: u64, len: u64) {
        for cluster in self.image.clusters_of(offset, len) {
            if let Some(&area) = self.scan.metadata.get(&cluster) {
                self.scan.overlaps.insert(cluster, (area, Area::Data));
            }
        }
    }

    fn refcount_blocks(&mut self) {
        for index in 0..self.scan.reftable.len() {
            let entry = self.scan.reftable.get(index).copied().unwrap_or_default();
            if entry == 0 {
                continue;
            }
            let cluster = self.image.cluster_of(entry);
            let wrong = if entry & REFTABLE_RESERVED != 0 {
                Some("has reserved bits set".to_owned())
            } else if !self.image.is_aligned(entry) {
                Some("points inside a cluster".to_owned())
            } else if cluster >= self.scan.end {
                Some("points past the end of the file".to_owned())
            } else {
                self.add(entry, self.image.cluster_size(), 1);
                let references = self.scan.references.get(cluster);
                self.scan.rebuild |= references != 1;
                // More than a refcount can hold are told of as that.
                let wanted = self.scan.wanted(self.image, cluster);
                (wanted != 1).then(|| format!("points at a cluster with {references} references"))
            };
            if let Some(what) = wrong {
                self.scan.rebuild = true;
                self.damage(
                    1,
                    format!("refcount table entry {index}: {entry:#x} {what}"),
                );
            }
        }
    }
}
