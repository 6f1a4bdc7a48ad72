//! Images whose tables point where they must not, as a fuzzer makes them.
//!
//! What would be caught: guest data far behind the end of the file, tables of the image freed
//! since a compressed cluster is said to be there, one guest cluster over another in a data file,
//! memory for a disk as large as a header can claim.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use serde_json::json;
use stratablk::graph::{Graph, Holder, Request};
use stratablk::options::{BlockdevOptions, Dialect};
use stratablk::reactor::Reactor;

use crate::support::*;

const CLUSTER: u64 = 4096;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
/// Behind the end of every image here.
const FAR: u64 = 1 << 40;

struct Image {
    path: PathBuf,
    file: std::fs::File,
    _dir: tempfile::TempDir,
}

impl Image {
    /// An image of 1 MiB whose first 64 KiB are written.
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = in_dir(&dir, "image.qcow2");
        let options = options.replace("DIR", dir.path().to_str().unwrap());
        create(&path, &format!("cluster_size=4k{options}"), 1 << 20);
        let write = ["-f", "qcow2", "-c", "write -q -P 3 0 64k"];
        let write: Vec<&str> = write.into_iter().chain([path.to_str().unwrap()]).collect();
        run("qemu-io", &write);
        Self {
            file: std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap(),
            path,
            _dir: dir,
        }
    }

    fn word(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    }

    fn set(&self, at: u64, word: u64) {
        self.file.write_all_at(&word.to_be_bytes(), at).unwrap();
    }

    /// Where the table is whose offset is the first entry of the one that the header names at
    /// `field`.
    fn second_level(&self, field: u64) -> u64 {
        self.word(self.word(field)) & OFFSET
    }

    fn l2(&self) -> u64 {
        self.second_level(40)
    }

    /// Writes to the disk's beginning, which must fail with `expected` and change nothing.
    fn write_is_refused(&self, expected: &str) {
        let before = std::fs::read(&self.path).unwrap();
        let result = Disk::try_open(&self.path, "qcow2", json!({}))
            .and_then(|disk| disk.try_write(0, &[9; 512]));
        let text = result
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        assert!(text.contains(expected), "expected '{expected}' in '{text}'");
        assert_unchanged(&self.path, &before);
    }
}

fn assert_unchanged(path: &Path, before: &[u8]) {
    let len = std::fs::metadata(path).unwrap().len();
    assert_eq!(len, before.len() as u64, "the file has another length");
    assert!(std::fs::read(path).unwrap() == before, "it was written to");
}

#[test]
fn nothing_is_written_where_an_entry_points_behind_the_end() {
    let image = Image::new("");
    image.set(image.l2(), FAR | COPIED);
    image.write_is_refused("behind the end");
    let image = Image::new("");
    let l1 = image.word(40);
    image.set(l1, FAR | COPIED);
    image.write_is_refused("behind the end");
    let image = Image::new("");
    let table = image.word(48);
    image.set(table, FAR);
    image.write_is_refused("behind the end");
    let image = Image::new("");
    image.set(40, FAR);
    image.write_is_refused("behind the end");
}

#[test]
fn a_compressed_cluster_is_no_way_to_free_a_table() {
    let image = Image::new("");
    let table = image.l2();
    image.set(table, table | 1 << 62);
    image.write_is_refused("an L2 table is");
    // It begins before the table and reaches into it: its length is in units of 512 bytes, above
    // the offset.
    let image = Image::new("");
    let table = image.l2();
    image.set(table, (table - 512) | 3 << (62 - (12 - 8)) | 1 << 62);
    image.write_is_refused("is");
    let image = Image::new("");
    image.set(image.l2(), FAR | 1 << 62);
    image.write_is_refused("behind the end");
}

#[test]
fn a_compressed_cluster_that_reaches_over_the_end_is_found() {
    // What is written there is another cluster's one day, and freed with this one.
    let image = Image::new("");
    let end = std::fs::metadata(&image.path).unwrap().len();
    let last = end.next_multiple_of(CLUSTER) - 512;
    image.set(image.l2(), last | 8 << (62 - (12 - 8)) | 1 << 62);
    image.write_is_refused("behind the end");
}

#[test]
fn what_is_wrong_with_an_image_harms_nothing_once_nobody_writes_it() {
    for written in [true, false] {
        let image = Image::new("");
        // An entry points at the refcount table.
        image.set(image.l2(), image.word(48) | COPIED);
        let file = json!({"driver": "file", "filename": image.path.to_str().unwrap()});
        let options = json!({"driver": "qcow2", "node-name": "top", "file": file});
        let options = BlockdevOptions::from_value(&options, Dialect::Json).unwrap();
        let reactor = Reactor::for_this_thread().unwrap();
        let graph = Graph::default();
        let (send, told) = channel();
        graph.on_corruption(move |corruption| drop(send.send(corruption)));
        let name = reactor.block_on(graph.open(&options)).unwrap();
        let request = Request::disk(Holder::Tool, &name, true);
        let mut grant = Some(reactor.block_on(graph.access(request)).unwrap());
        if let Some(grant) = grant.take_if(|_| !written) {
            reactor.block_on(grant.give_back()).unwrap();
        }
        let chain = graph.root(&name).unwrap().chain();
        let loaded = reactor.block_on(chain.top().format.load(0));
        assert!(loaded.is_err(), "written: {written}");
        assert_eq!(told.recv().unwrap().fatal, written);
        drop(grant);
    }
}

#[test]
fn clusters_of_a_data_file_stay_in_their_places() {
    let image = Image::new(",data_file=DIR/data.raw");
    let table = image.l2();
    assert_eq!(image.word(table + 8), CLUSTER | COPIED);
    image.set(table, CLUSTER | COPIED);
    image.write_is_refused("of a data file");
}

#[test]
fn the_directory_of_the_bitmaps_is_aligned() {
    let image = Image::new("");
    let path = image.path.to_str().unwrap();
    run("qemu-img", &["bitmap", "--add", path, "tracking"]);
    let mut header = [0; 512];
    image.file.read_exact_at(&mut header, 0).unwrap();
    let magic = 0x2385_2875_u32.to_be_bytes();
    let at = header.windows(4).position(|word| word == magic).unwrap() as u64;
    let directory = image.word(at + 24);
    image.set(at + 24, directory - 8);
    image.write_is_refused("bitmap directory");
}
