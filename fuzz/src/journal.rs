//! A journal that says something else than what its image's process recorded.
//!
//! ```text
//! input  = seed:1 record*
//! record = kind:1 place:2 count:1 how:1 value:8
//! ```

use std::path::PathBuf;
use std::sync::OnceLock;

use stratablk::format::qcow2::journal::{Folder, Record, encode, seed_of};
use stratablk::format::qcow2::words::Words;

use super::image::{self, Files, How, reactor, write};
use super::read::walk;
use super::recipe::Input;
use super::seeds;

/// The least journal there is.
const JOURNAL: u64 = 256 << 10;
/// Records that are made at most.
const MOST: usize = 64;

/// A folder of this process.
fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let path = PathBuf::from(format!("/dev/shm/stratablk-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("/dev/shm is needed");
        path
    })
}

fn record(input: &mut Input<'_>, cluster: u64, end: u64) -> Record {
    let kind = input.byte();
    let place = u64::from(input.word());
    let count = u64::from(input.byte()) + 1;
    let how = input.byte();
    let value = u64::from_le_bytes(input.take());
    // Mostly something that could be meant: a cluster of the file, with or without a flag.
    let offset = match how & 3 {
        0 => value,
        1 => value % end.max(1) * cluster,
        _ => (value % end.max(1) * cluster) | (1 << 63),
    };
    match kind & 3 {
        0 => Record::Mapping {
            first: place,
            entries: (0..count.min(8))
                .map(|at| Words {
                    descriptor: offset.wrapping_add(at * cluster),
                    bitmap: if how & 4 == 0 {
                        0xffff_ffff
                    } else {
                        value.rotate_left(7)
                    },
                })
                .collect(),
        },
        1 => Record::Refcounts {
            first: place,
            count,
            value: if how & 4 == 0 { value & 3 } else { value },
        },
        2 => Record::L1 {
            index: place,
            value: offset,
        },
        _ => Record::Block {
            index: place,
            offset,
        },
    }
}

/// The target: a journal is adopted, and whatever comes of it read, written and flushed. Caught are
/// panics, overflows, endless loops, too much memory, and an image that is changed by adopting.
pub fn qcow2_journal(data: &[u8]) {
    let mut input = Input(data);
    let all = seeds::qcow2();
    let seed = &all[usize::from(input.byte()) % all.len()];
    let files = Files::new(seed.bytes.clone(), 1);
    let reactor = reactor();
    let folder = Folder::open(folder(), Some(JOURNAL)).expect("/dev/shm is needed");
    let how = How {
        writable: true,
        ..How::default()
    };
    let open = || reactor.block_on(files.open_journaled(how, Some(folder.clone())));
    let Ok((image, _)) = open() else { return };
    let header = image.header();
    let Some(mark) = header.journal else { return };
    drop(image);
    let cluster = image::cluster_size(&seed.bytes);
    let end = files.image.end() / cluster + 2;
    let mut records = Vec::new();
    while !input.is_empty() && records.len() < MOST {
        records.push(record(&mut input, cluster, end));
    }
    let words = encode(&records, 0, seed_of(mark.nonce), header.has_subclusters());
    let path = folder.file(mark.nonce);
    let mut journal = std::fs::read(&path).expect("a journal");
    journal[1024..1032].copy_from_slice(&(words.len() as u64).to_ne_bytes());
    for (place, word) in journal[4096..].chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    std::fs::write(&path, journal).expect("a journal");
    let before = files.image.bytes(0, files.image.end() as usize);
    let adopted = open();
    let after = files.image.bytes(0, files.image.end() as usize);
    assert!(before == after, "adopting has changed the image");
    if let Ok((image, chain)) = adopted {
        reactor.block_on(async {
            walk(&chain).await;
            let _ = write(&chain, 0, &[7; 512]).await;
            let _ = image.flush().await;
            walk(&chain).await;
        });
    }
    let _ = std::fs::remove_file(path);
}
