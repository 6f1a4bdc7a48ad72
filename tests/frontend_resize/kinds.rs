//! Images of every kind, by themselves and over others.

use std::fs;
use std::path::Path;

use crate::common::frontend::{self, IOERR, OK, Op, Segment};
use crate::common::{Res, images};
use crate::scene::{Bed, Guest, MIB, SECTOR, qcow2, raw};

/// Grows a disk of `old` bytes under its guest, and shrinks it again.
fn grows_and_shrinks(bed: &mut Bed, guest: &mut Guest, old: u64, what: &str) -> Res<()> {
    let new = 3 * MIB + 7 * SECTOR;
    let last = 16 << 10;
    assert_eq!(guest.write(old - last, last as usize, 5)?, OK);
    assert_eq!(guest.write(old, 512, 6)?, IOERR, "{what}: it is not there");
    guest.is_told_nothing()?;
    bed.resize(new)?;
    assert_eq!(guest.is_told()?, new, "{what}");
    assert_eq!(bed.size_of("layer0")?, new);
    assert!(
        guest
            .read(old - last, last as usize)?
            .iter()
            .all(|byte| *byte == 5)
    );
    for at in (old..new).step_by(64 << 10) {
        let len = (new - at).min(64 << 10) as usize;
        let zeros = guest.read(at, len)?.iter().all(|byte| *byte == 0);
        assert!(zeros, "{what}: what is new at {at}");
    }
    assert_eq!(guest.write(old, 1024, 7)?, OK);
    assert_eq!(guest.write(new - 512, 512, 8)?, OK);
    assert_eq!(guest.write(new, 512, 9)?, IOERR);
    let discard = [Segment {
        sector: (new - 4096) / SECTOR,
        count: 7,
        flags: 0,
    }];
    let discard = Op::ranges(frontend::DISCARD, &discard);
    assert_eq!(guest.run(&discard)?, OK);
    assert_eq!(guest.read(new - 512, 512)?, [8; 512]);

    let small = MIB - 3 * SECTOR;
    bed.resize(small)?;
    assert_eq!(guest.is_told()?, small, "{what}");
    assert_eq!(guest.write(small - 512, 1024, 9)?, IOERR, "{what}");
    assert_eq!(guest.write(small - 512, 512, 4)?, OK);
    // What was above does not come back.
    bed.resize(new)?;
    assert_eq!(guest.is_told()?, new);
    for at in (small..new).step_by(64 << 10) {
        let len = (new - at).min(64 << 10) as usize;
        let zeros = guest.read(at, len)?.iter().all(|byte| *byte == 0);
        assert!(zeros, "{what}: what is new once more, at {at}");
    }
    assert_eq!(guest.read(small - 512, 512)?, [4; 512]);
    assert_eq!(guest.run(&Op::flush())?, OK);
    Ok(())
}

/// Catches what depends on the kind of the image.
#[test]
fn images_of_every_kind() -> Res<()> {
    let old = MIB + 5 * SECTOR;
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
        "compat=0.10",
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
    ] {
        let options = options.to_owned();
        let make = |dir: &Path| {
            let data = format!("data_file={}", dir.join("data.raw").display());
            let options = options.replace("data_file=data.raw", &data);
            qcow2("top.qcow2", old, &options, None)(dir)
        };
        let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
        let mut guest = bed.guest()?;
        grows_and_shrinks(&mut bed, &mut guest, old, &options)?;
        let dir = bed.end(guest)?;
        assert!(!images::check(&dir.path().join("top.qcow2"))?, "{options}");
    }
    for options in ["cluster_size=64k", "cluster_size=16k,extended_l2=on"] {
        let make = |dir: &Path| {
            raw(dir, "some.raw", old, 0x11)?;
            let (from, to) = (dir.join("some.raw"), dir.join("top.qcow2"));
            let (from, to) = (images::text(&from)?, images::text(&to)?);
            let words = [
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from, to,
            ];
            images::qemu_img(&words)?;
            Ok(())
        };
        let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
        let mut guest = bed.guest()?;
        grows_and_shrinks(&mut bed, &mut guest, old, "compressed")?;
        assert_eq!(guest.read(0, 4096)?, [0x11; 4096]);
        let dir = bed.end(guest)?;
        assert!(!images::check(&dir.path().join("top.qcow2"))?, "{options}");
    }
    let mut bed = Bed::begin(&[("disk.raw", "raw")], |dir| raw(dir, "disk.raw", old, 0))?;
    let mut guest = bed.guest()?;
    grows_and_shrinks(&mut bed, &mut guest, old, "raw")?;
    assert_eq!(
        fs::metadata(bed.path("disk.raw"))?.len(),
        3 * MIB + 7 * SECTOR
    );
    bed.end(guest)?;
    Ok(())
}

/// Catches bytes of an image below that come to light: it is longer than the disk was.
#[test]
fn over_images_that_are_longer_and_shorter() -> Res<()> {
    let old = MIB + 5 * SECTOR;
    for (below, options) in [
        (4 * MIB, "cluster_size=64k"),
        (4 * MIB, "cluster_size=16k,extended_l2=on"),
        (4 * MIB, "cluster_size=64k,compat=0.10"),
        (MIB / 2, "cluster_size=64k"),
    ] {
        let make = |dir: &Path| {
            raw(dir, "base.raw", below, 0xbb)?;
            qcow2("top.qcow2", old, options, Some(("base.raw", "raw")))(dir)
        };
        let layers = [("top.qcow2", "qcow2"), ("base.raw", "raw")];
        let mut bed = Bed::begin(&layers, make)?;
        let mut guest = bed.guest()?;
        grows_and_shrinks(&mut bed, &mut guest, old, options)?;
        let dir = bed.end(guest)?;
        assert!(
            !images::check(&dir.path().join("top.qcow2"))?,
            "clusters have leaked"
        );
        assert!(
            fs::read(dir.path().join("base.raw"))?
                .iter()
                .all(|byte| *byte == 0xbb)
        );
    }
    Ok(())
}
