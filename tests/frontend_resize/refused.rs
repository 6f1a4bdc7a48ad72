//! What is refused or fails, and devices.

use std::fs::{self, File};
use std::path::Path;

use serde_json::json;

use crate::common::daemon::Setup;
use crate::common::frontend::OK;
use crate::common::skips::skip;
use crate::common::slow::LoopDevice;
use crate::common::{Res, images};
use crate::scene::{Bed, MIB, qcow2, raw};

/// Catches refusals that change something, and jobs whose disk gets another size under them.
#[test]
fn what_is_refused_leaves_everything_as_it_was() -> Res<()> {
    let make = |dir: &Path| {
        raw(dir, "base.raw", 2 * MIB, 0xbb)?;
        raw(dir, "some.raw", MIB, 1)?;
        qcow2("top.qcow2", MIB, "", Some(("base.raw", "raw")))(dir)
    };
    let layers = [("top.qcow2", "qcow2"), ("base.raw", "raw")];
    let mut bed = Bed::begin(&layers, make)?;
    let file = json!({"driver": "file", "filename": bed.path("some.raw")});
    for node in [
        json!({"driver": "raw", "node-name": "ro", "read-only": true, "file": file}),
        json!({"driver": "null-co", "node-name": "null", "size": MIB}),
    ] {
        bed.ask("blockdev-add", node)?;
    }
    let mut guest = bed.guest()?;
    let before = (
        fs::read(bed.path("top.qcow2"))?,
        fs::read(bed.path("base.raw"))?,
    );
    for (arguments, words) in [
        (
            json!({"device": "nope", "size": MIB}),
            "Cannot find device='nope' nor node-name=''",
        ),
        (json!({"device": "disk", "size": -1}), "expects a >0 size"),
        (
            json!({"device": "disk", "size": MIB + 1}),
            "must be a multiple of 512",
        ),
        (
            json!({"device": "disk", "size": 1i64 << 62}),
            "Failed to grow the L1 table",
        ),
        (
            json!({"node-name": "layer1", "size": 4 * MIB}),
            "node is used as backing hd of 'layer0'",
        ),
        (
            json!({"node-name": "file0", "size": 4 * MIB}),
            "unshared by node 'layer0'",
        ),
        (
            json!({"node-name": "ro", "size": 4 * MIB}),
            "Image is read-only",
        ),
        (
            json!({"node-name": "null", "size": 4 * MIB}),
            "driver does not support resize",
        ),
    ] {
        let text = bed.refused(arguments.clone())?;
        assert!(text.contains(words), "{arguments}: {text}");
    }
    bed.ask(
        "block-stream",
        json!({"device": "disk", "job-id": "j", "speed": 1}),
    )?;
    let text = bed.refused(json!({"device": "disk", "size": 4 * MIB}))?;
    assert!(
        text.contains("Node 'layer0' is busy: block device is in use by block job: stream"),
        "{text}"
    );
    bed.ask("block-job-cancel", json!({"device": "j", "force": true}))?;
    bed.qmp.job_end("j")?;
    assert_eq!(guest.capacity()?, MIB);
    guest.is_told_nothing()?;
    let after = (
        fs::read(bed.path("top.qcow2"))?,
        fs::read(bed.path("base.raw"))?,
    );
    assert!(before.1 == after.1 && before.0.len() == after.0.len());
    // And now it can be done; what a snapshot covers has its new size, and the overlay as well.
    bed.resize(3 * MIB)?;
    assert_eq!(guest.is_told()?, 3 * MIB);
    assert_eq!(guest.read(MIB, 4096)?, [0; 4096]);
    assert_eq!(guest.read(0, 512)?, [0xbb; 512]);
    let file = bed.path("snap.qcow2");
    bed.ask(
        "blockdev-snapshot-sync",
        json!({"device": "disk", "snapshot-file": file, "snapshot-node-name": "snap"}),
    )?;
    bed.resize(4 * MIB)?;
    assert_eq!(guest.is_told()?, 4 * MIB);
    assert_eq!(
        (bed.size_of("snap")?, bed.size_of("layer0")?),
        (4 * MIB, 3 * MIB)
    );
    assert_eq!(guest.write(4 * MIB - 512, 512, 9)?, OK);
    bed.ask(
        "block-commit",
        json!({"device": "disk", "job-id": "c", "top-node": "snap", "base-node": "layer0"}),
    )?;
    bed.qmp.event(|event| event["event"] == "BLOCK_JOB_READY")?;
    let text = bed.refused(json!({"device": "disk", "size": 5 * MIB}))?;
    assert!(text.contains("in use by block job: commit"), "{text}");
    bed.ask("block-job-complete", json!({"device": "c"}))?;
    bed.qmp.job_end("c")?;
    assert_eq!(guest.capacity()?, 4 * MIB);
    assert_eq!(guest.read(4 * MIB - 512, 512)?, [9; 512]);
    let dir = bed.end(guest)?;
    assert!(
        !images::check(&dir.path().join("top.qcow2"))?,
        "clusters have leaked"
    );
    Ok(())
}

/// Catches a size that is taken from the command, and one that is not noticed.
#[test]
fn a_device_that_becomes_longer() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("device.raw");
    raw(dir.path(), "device.raw", 2 * MIB, 0)?;
    let Some(device) = LoopDevice::over(&file)? else {
        return Ok(skip("no loop devices")?);
    };
    let mut setup = Setup::new(dir.path(), &[(device.path.clone(), "raw")]);
    setup.qmp = Some(dir.path().join("qmp.sock"));
    let mut bed = Bed::start(tempfile::tempdir()?, setup)?;
    let mut guest = bed.guest()?;
    let text = bed.refused(json!({"device": "disk", "size": 4 * MIB}))?;
    assert!(text.contains("Cannot grow device files"), "{text}");
    File::options().write(true).open(&file)?.set_len(4 * MIB)?;
    device.find_size()?;
    bed.resize(3 * MIB)?;
    assert_eq!(guest.is_told()?, 4 * MIB, "as long as the device is");
    assert_eq!(guest.write(4 * MIB - 512, 512, 1)?, OK);
    bed.end(guest)?;
    Ok(())
}

/// Catches a change that fails half-way and leaves another size, or loses what was to be cut off.
#[test]
fn a_failure_leaves_the_old_size() -> Res<()> {
    let make = |dir: &Path| raw(dir, "disk.raw", MIB, 0);
    let mut bed = Bed::begin(&[("disk.raw", "raw")], make)?;
    for (round, (iotype, size)) in [
        ("write", 4 * MIB),
        ("write", MIB / 2),
        ("flush", 4 * MIB),
        ("flush", MIB / 2),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("q{round}");
        let file = bed.path(&format!("{name}.qcow2"));
        qcow2(&format!("{name}.qcow2"), MIB, "cluster_size=512", None)(bed.dir.path())?;
        images::qemu_io(&[
            "-f",
            "qcow2",
            "-c",
            "write -q -P 7 0 1M",
            images::text(&file)?,
        ])?;
        bed.ask(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": {"driver": "blkdebug",
                "image": {"driver": "file", "filename": file},
                "inject-error": [{"event": "none", "iotype": iotype, "errno": 5, "once": true}]}}),
        )?;
        let mut guest = bed.guest_of(&name, true)?;
        let arguments = json!({"device": name, "size": size});
        let text = bed.refused(arguments.clone())?;
        let context = format!("{iotype} to {size}: {text}");
        assert!(text.contains("Input/output error"), "{context}");
        assert_eq!(guest.capacity()?, MIB, "{context}");
        assert_eq!(bed.size_of(&name)?, MIB, "{context}");
        assert!(
            guest.read(0, MIB as usize)?.iter().all(|byte| *byte == 7),
            "{context}"
        );
        if iotype == "flush" {
            bed.ask("x-clear-sync-error", json!({"device": name}))?;
        }
        // The failure is over.
        bed.ask("block_resize", arguments)?;
        assert_eq!(guest.capacity()?, size, "{context}");
        let kept = size.min(MIB) as usize;
        assert!(guest.read(0, kept)?.iter().all(|byte| *byte == 7));
        assert_eq!(guest.write(size - 512, 512, 8)?, OK);
    }
    drop(bed.qmp);
    bed.daemon.stop()?;
    for round in 0..4 {
        images::check(&bed.dir.path().join(format!("q{round}.qcow2")))?;
    }
    Ok(())
}
