//! What is written into sectors. Every sector says which write it belongs to and where it should
//! lie, so that a wrong one tells what went wrong: a lost write, an old one, one at the wrong place.

use super::rng::mix;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"stratast");

/// Who wrote a sector: 0 for nobody (zeros), else a number that the test gives to each write.
pub type Owner = u64;

/// The owner of what lies in layer `layer` before the test starts, piece `n`.
pub fn layer_owner(layer: u64, n: u64) -> Owner {
    ((layer + 1) << 48) | n
}

/// Fills one sector with the stamp of `owner` at `sector`.
pub fn fill(data: &mut [u8], owner: Owner, sector: u64) {
    if owner == 0 {
        data.fill(0);
        return;
    }
    let header = [MAGIC, sector, owner];
    let mut state = mix(owner ^ mix(sector));
    for (i, word) in data.chunks_exact_mut(8).enumerate() {
        let value = header.get(i).copied().unwrap_or_else(|| {
            state = state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            state
        });
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Fills several sectors, from `sector` on.
pub fn fill_all(data: &mut [u8], owner: Owner, sector: u64) {
    for (i, part) in data.chunks_exact_mut(SECTOR).enumerate() {
        fill(part, owner, sector + i as u64);
    }
}

/// The owner whose stamp for `sector` these bytes are, all 512 of them; None if they are nobody's.
pub fn owner_of(data: &[u8], sector: u64) -> Option<Owner> {
    let owner = if word(data, 0) == MAGIC {
        word(data, 2)
    } else {
        0
    };
    let mut expected = [0; SECTOR];
    fill(&mut expected, owner, sector);
    (data == expected).then_some(owner)
}

/// Says what a sector holds, for a message.
pub fn describe(data: &[u8]) -> String {
    if data.iter().all(|&b| b == 0) {
        return "zeros".to_owned();
    }
    if word(data, 0) != MAGIC {
        return format!(
            "no stamp, but {:02x?}…",
            data.iter().take(16).collect::<Vec<_>>()
        );
    }
    let (sector, owner) = (word(data, 1), word(data, 2));
    let whole = if owner_of(data, sector).is_some() {
        ""
    } else {
        " (torn)"
    };
    format!("{} of sector {sector}{whole}", describe_owner(owner))
}

/// Says who an owner is.
pub fn describe_owner(owner: Owner) -> String {
    match owner >> 48 {
        0 if owner == 0 => "zeros".to_owned(),
        0 => format!("write {owner}"),
        layer => format!("layer {} piece {}", layer - 1, owner & 0xffff_ffff_ffff),
    }
}

fn word(data: &[u8], i: usize) -> u64 {
    let bytes = data.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(bytes.unwrap_or_default())
}
