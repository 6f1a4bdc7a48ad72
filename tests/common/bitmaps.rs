//! The persistent bitmaps of a qcow2 file, read without the engine.
//!
//! Source: QEMU's `docs/interop/qcow2`, sections "Bitmaps extension" and "Bitmaps".

/// Out of date, or not saved.
pub const IN_USE: u64 = 1;
/// Tracks writes.
#[allow(dead_code)]
pub const AUTO: u64 = 2;

/// A bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    pub flags: u64,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// As long as its table has room for; none of one in use.
    pub bits: Vec<bool>,
    /// Where the entry is in the file.
    #[allow(dead_code)]
    pub entry: usize,
    /// Where the table is in the file.
    #[allow(dead_code)]
    pub table: usize,
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The bitmaps of an image; none if they are invalid as a whole.
pub fn bitmaps(file: &[u8]) -> Vec<Bitmap> {
    let field = |at: usize, len| number(file, at, len);
    if field(4, 4) < 3 || field(88, 8) & 1 == 0 {
        return Vec::new();
    }
    let mut at = field(100, 4) as usize;
    // The extension with the directory of the bitmaps.
    while field(at, 4) != 0x2385_2875 {
        if field(at, 4) == 0 {
            return Vec::new();
        }
        at += 8 + (field(at + 4, 4) as usize).next_multiple_of(8);
    }
    let (count, mut entry) = (field(at + 8, 4), field(at + 24, 8) as usize);
    let mut list = Vec::new();
    for _ in 0..count {
        let (name, extra) = (field(entry + 18, 2) as usize, field(entry + 20, 4) as usize);
        let (table, entries) = (field(entry, 8) as usize, field(entry + 8, 4) as usize);
        let flags = field(entry + 12, 4);
        let name_at = entry + 24 + extra;
        list.push(Bitmap {
            name: String::from_utf8(file[name_at..name_at + name].to_vec()).unwrap(),
            flags,
            granularity: 1 << field(entry + 17, 1),
            bits: match flags & IN_USE {
                0 => bits(file, table, entries),
                _ => Vec::new(),
            },
            entry,
            table,
        });
        entry += (24 + extra + name).next_multiple_of(8);
    }
    list
}

fn bits(file: &[u8], table: usize, entries: usize) -> Vec<bool> {
    let cluster = 1usize << number(file, 20, 4);
    let entry = |index| number(file, table + index * 8, 8);
    let bytes = (0..entries).flat_map(|index| match entry(index) {
        0 => vec![0; cluster],
        1 => vec![0xff; cluster],
        data => file[data as usize..data as usize + cluster].to_vec(),
    });
    bytes
        .flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1))
        .collect()
}

/// The bits of a disk of `old` bytes as those of one of `new` bytes: of a table for it, what is
/// behind the disk's end being clear.
#[allow(dead_code)]
pub fn resized(bitmap: &Bitmap, old: u64, new: u64, cluster: u64) -> Vec<bool> {
    let count = |size: u64| size.div_ceil(bitmap.granularity) as usize;
    let mut bits = bitmap.bits.clone();
    bits.truncate(count(old).min(count(new)));
    bits.resize(count(new).next_multiple_of(cluster as usize * 8), false);
    bits
}
