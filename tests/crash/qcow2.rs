//! An independent reader of qcow2: it counts references and compares them with the refcounts,
//! and reads a guest's sectors through any L1 table. It shares no code with the engine, does
//! not decompress, and is made for images of a few MiB.
//!
//! Source: QEMU's `docs/interop/qcow2`.

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// A header, and the whole image behind it.
pub struct Image<'a> {
    bytes: &'a [u8],
    version: u32,
    bits: u32,
    l1: (u64, u64),
    reftable: (u64, u64),
    snapshots: (u64, u32),
    order: u32,
    incompatible: u64,
}

/// A table of mappings, and how large the disk is that it maps.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    offset: u64,
    entries: u64,
}

/// Where a sector of the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sector {
    Host(u64),
    Zero,
    Below,
}

fn number(bytes: &[u8], at: u64, len: usize) -> Result<u64, String> {
    bytes
        .get(at as usize..at as usize + len)
        .map(|part| part.iter().fold(0, |all, byte| all << 8 | u64::from(*byte)))
        .ok_or_else(|| format!("{at:#x} lies behind the end of the file"))
}

impl<'a> Image<'a> {
    pub fn new(bytes: &'a [u8]) -> Result<Self, String> {
        let at = |offset, len| number(bytes, offset, len);
        if at(0, 4)? != 0x5146_49fb {
            return Err("no qcow2 image".into());
        }
        let version = at(4, 4)? as u32;
        Ok(Self {
            version,
            bits: at(20, 4)? as u32,
            l1: (at(40, 8)?, at(36, 4)?),
            reftable: (at(48, 8)?, at(56, 4)?),
            snapshots: (at(64, 8)?, at(60, 4)? as u32),
            order: if version == 2 { 4 } else { at(96, 4)? as u32 },
            incompatible: if version == 2 { 0 } else { at(72, 8)? },
            bytes,
        })
    }

    fn cluster(&self) -> u64 {
        1 << self.bits
    }

    fn extended(&self) -> bool {
        self.incompatible & 1 << 4 != 0
    }

    fn has_data_file(&self) -> bool {
        self.incompatible & 1 << 2 != 0
    }

    fn entry_bytes(&self) -> u64 {
        if self.extended() { 16 } else { 8 }
    }

    /// The table that the guest sees.
    pub fn active(&self) -> Root {
        Root {
            offset: self.l1.0,
            entries: self.l1.1,
        }
    }

    /// Those of the internal snapshots, and the length of the snapshot table.
    fn all_snapshots(&self) -> Result<(Vec<Root>, u64), String> {
        let mut roots = Vec::new();
        let mut at = self.snapshots.0;
        for _ in 0..self.snapshots.1 {
            let field = |offset, len| number(self.bytes, at + offset, len);
            roots.push(Root {
                offset: field(0, 8)?,
                entries: field(8, 4)?,
            });
            let len = 40 + field(36, 4)? + field(12, 2)? + field(14, 2)?;
            at += len.next_multiple_of(8);
        }
        Ok((roots, at - self.snapshots.0))
    }

    /// The tables of the internal snapshots.
    pub fn snapshots(&self) -> Result<Vec<Root>, String> {
        Ok(self.all_snapshots()?.0)
    }

    /// The names of the internal snapshots.
    pub fn names(&self) -> Result<Vec<String>, String> {
        let mut names = Vec::new();
        let mut at = self.snapshots.0;
        for _ in 0..self.snapshots.1 {
            let field = |offset, len| number(self.bytes, at + offset, len);
            let start = at + 40 + field(36, 4)? + field(12, 2)?;
            let end = start + field(14, 2)?;
            let name = self.bytes.get(start as usize..end as usize);
            let name = name.ok_or("a name behind the end")?;
            names.push(String::from_utf8_lossy(name).into_owned());
            at += (end - at).next_multiple_of(8);
        }
        Ok(names)
    }

    /// Where a sector of the guest is, by one of the tables.
    pub fn find(&self, root: Root, sector: u64) -> Result<Sector, String> {
        let offset = sector * 512;
        let cluster = offset >> self.bits;
        let per_table = self.cluster() / self.entry_bytes();
        if cluster / per_table >= root.entries {
            return Ok(Sector::Zero);
        }
        let l1 = number(self.bytes, root.offset + cluster / per_table * 8, 8)?;
        if l1 & OFFSET == 0 {
            return Ok(Sector::Below);
        }
        let at = (l1 & OFFSET) + cluster % per_table * self.entry_bytes();
        let entry = number(self.bytes, at, 8)?;
        if entry & 1 << 62 != 0 {
            return Err("a compressed cluster: not expected here".into());
        }
        let within = offset & (self.cluster() - 1);
        let host = Sector::Host((entry & OFFSET) + within);
        let exists = entry & OFFSET != 0 || (self.has_data_file() && entry & COPIED != 0);
        if self.extended() {
            let bitmap = number(self.bytes, at + 8, 8)?;
            let unit = within >> (self.bits - 5);
            return Ok(match (bitmap >> unit & 1, bitmap >> (32 + unit) & 1) {
                (_, 1) => Sector::Zero,
                (1, _) if exists => host,
                (1, _) => return Err(format!("entry at {at:#x}: data without a cluster")),
                _ => Sector::Below,
            });
        }
        Ok(match (entry & 1, exists) {
            (1, _) => Sector::Zero,
            (_, true) => host,
            _ => Sector::Below,
        })
    }

    fn refcount(&self, cluster: u64) -> Result<u64, String> {
        let per_block = (self.cluster() * 8) >> self.order;
        let index = cluster / per_block;
        if index >= self.reftable.1 * self.cluster() / 8 {
            return Ok(0);
        }
        let block = number(self.bytes, self.reftable.0 + index * 8, 8)?;
        if block == 0 {
            return Ok(0);
        }
        let bit = (cluster % per_block) << self.order;
        if self.order >= 3 {
            return number(self.bytes, block + bit / 8, 1 << (self.order - 3));
        }
        let byte = number(self.bytes, block + bit / 8, 1)?;
        Ok(byte >> (bit % 8) & ((1 << (1 << self.order)) - 1))
    }

    /// Counts all references. What is counted too low, or flagged wrongly, is an error; returns
    /// how many clusters are counted too high.
    pub fn check(&self) -> Result<u64, String> {
        let clusters = (self.bytes.len() as u64).div_ceil(self.cluster());
        let mut counted = Counted(vec![(0, "nobody"); clusters as usize + 1]);
        counted.range(self, 0, 1, "the header")?;
        counted.range(self, self.l1.0, self.l1.1 * 8, "the L1 table")?;
        let (reftable, len) = (self.reftable.0, self.reftable.1 << self.bits);
        counted.range(self, reftable, len, "the refcount table")?;
        for index in 0..len / 8 {
            let block = number(self.bytes, reftable + index * 8, 8)?;
            if block != 0 {
                counted.range(self, block, self.cluster(), "a refcount block")?;
            }
        }
        self.count_tables(self.active(), true, &mut counted)?;
        let (roots, len) = self.all_snapshots()?;
        counted.range(self, self.snapshots.0, len, "the snapshot table")?;
        for root in roots {
            counted.range(self, root.offset, root.entries * 8, "a snapshot's L1 table")?;
            self.count_tables(root, false, &mut counted)?;
        }
        let mut leaks = self.behind_the_end(clusters)?;
        for (cluster, (references, by)) in (0..=clusters).zip(counted.0) {
            let refcount = self.refcount(cluster)?;
            if refcount < references {
                return Err(format!(
                    "cluster {cluster}: refcount {refcount}, {references} references, one by {by}"
                ));
            }
            leaks += u64::from(refcount > references);
        }
        Ok(leaks)
    }

    /// Clusters behind the end of the file and its last cluster that are counted as used.
    fn behind_the_end(&self, end: u64) -> Result<u64, String> {
        let per_block = (self.cluster() * 8) >> self.order;
        let mut leaks = 0;
        for index in end / per_block..self.reftable.1 * self.cluster() / 8 {
            if number(self.bytes, self.reftable.0 + index * 8, 8)? == 0 {
                continue;
            }
            let covered = index * per_block..(index + 1) * per_block;
            for cluster in covered.filter(|cluster| *cluster > end) {
                leaks += u64::from(self.refcount(cluster)? > 0);
            }
        }
        Ok(leaks)
    }

    fn count_tables(&self, root: Root, active: bool, counted: &mut Counted) -> Result<(), String> {
        let per_table = self.cluster() / self.entry_bytes();
        for index in 0..root.entries {
            let l1 = number(self.bytes, root.offset + index * 8, 8)?;
            let table = l1 & OFFSET;
            if table == 0 {
                continue;
            }
            counted.range(self, table, self.cluster(), "an L1 entry")?;
            self.copied(active, l1, table)?;
            for at in (0..per_table).map(|index| table + index * self.entry_bytes()) {
                let entry = number(self.bytes, at, 8)?;
                if entry & 1 << 62 != 0 {
                    let (start, len) = self.compressed(entry);
                    counted.clusters(self, start, len, "a compressed cluster")?;
                    continue;
                }
                let host = entry & OFFSET;
                if host == 0 || self.has_data_file() {
                    continue;
                }
                if entry & 1 != 0 && (self.version < 3 || self.extended()) {
                    return Err(format!("entry at {at:#x}: a zero flag"));
                }
                counted.range(self, host, self.cluster(), "an L2 entry")?;
                self.copied(active, entry, host)?;
            }
        }
        Ok(())
    }

    /// Where the bytes of a compressed cluster are, in whole sectors.
    fn compressed(&self, entry: u64) -> (u64, u64) {
        let shift = 62 - (self.bits - 8);
        let field = entry & ((1 << 62) - 1);
        let offset = field & ((1 << shift) - 1);
        let sectors = (field >> shift) + 1;
        (offset, sectors * 512 - offset % 512)
    }

    /// The copied flag says whether the refcount is one.
    fn copied(&self, active: bool, entry: u64, host: u64) -> Result<(), String> {
        let refcount = self.refcount(host >> self.bits)?;
        if active && (entry & COPIED != 0) != (refcount == 1) {
            return Err(format!("entry {entry:#018x}: the refcount is {refcount}"));
        }
        Ok(())
    }
}

/// By cluster: how many references, and one who refers to it.
struct Counted(Vec<(u64, &'static str)>);

impl Counted {
    fn range(
        &mut self,
        image: &Image<'_>,
        start: u64,
        len: u64,
        by: &'static str,
    ) -> Result<(), String> {
        if len == 0 {
            return Ok(());
        }
        if !start.is_multiple_of(image.cluster()) {
            return Err(format!("{by} refers to {start:#x}: no cluster"));
        }
        self.clusters(image, start, len, by)
    }

    fn clusters(
        &mut self,
        image: &Image<'_>,
        start: u64,
        len: u64,
        by: &'static str,
    ) -> Result<(), String> {
        // As qemu-img: less than a cluster may lie behind the end of the file.
        if start + len > image.bytes.len() as u64 + image.cluster() - 1 {
            return Err(format!("{by} refers to {start:#x}, behind the end"));
        }
        for cluster in start >> image.bits..=(start + len - 1) >> image.bits {
            let known = self.0.get_mut(cluster as usize);
            let (count, last) = known.ok_or("a cluster behind the end")?;
            *count += 1;
            *last = by;
        }
        Ok(())
    }
}
