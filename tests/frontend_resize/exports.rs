//! Several nodes and exports over one image, without a front-end, and across processes.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::common::Res;
use crate::common::daemon::{Program, Setup};
use crate::common::frontend::OK;
use crate::common::images;
use crate::scene::{Bed, MIB, qcow2, raw};

/// Catches nodes that go on with the old size, and exports whose front-ends hear nothing, or too much.
#[test]
fn nodes_and_exports_over_one_image() -> Res<()> {
    let make = qcow2("top.qcow2", MIB, "", None);
    let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
    raw(bed.dir.path(), "other.raw", MIB, 0)?;
    let other = json!({"driver": "file", "node-name": "of", "filename": bed.path("other.raw")});
    bed.ask("blockdev-add", other)?;
    for node in [
        json!({"driver": "copy-on-read", "node-name": "cor", "file": "layer0"}),
        json!({"driver": "raw", "node-name": "plain", "file": "layer0"}),
        json!({"driver": "blkdebug", "node-name": "debug", "image": "plain"}),
        json!({"driver": "raw", "node-name": "window", "file": "of", "offset": MIB / 2}),
        json!({"driver": "raw", "node-name": "fixed", "file": "of", "size": MIB / 2}),
    ] {
        bed.ask("blockdev-add", node)?;
    }
    let mut guest = bed.guest()?;
    let mut guests = Vec::new();
    for node in ["layer0", "cor", "debug", "window"] {
        guests.push(bed.guest_of(node, false)?);
    }
    // Whichever of them is named.
    for (round, node) in ["layer0", "cor", "plain", "debug"].into_iter().enumerate() {
        let size = (round as u64 + 2) * MIB;
        bed.ask("block_resize", json!({"node-name": node, "size": size}))?;
        assert_eq!(guest.is_told()?, size, "{node}");
        for told in &mut guests[..3] {
            assert_eq!(told.is_told()?, size, "{node}");
            assert_eq!(told.read(size - 512, 512)?, [0; 512]);
        }
        for node in ["layer0", "cor", "plain", "debug"] {
            assert_eq!(bed.size_of(node)?, size, "{node}");
        }
    }
    guests[3].is_told_nothing()?;
    assert_eq!(guest.write(5 * MIB - 512, 512, 3)?, OK);
    for told in &mut guests[..3] {
        assert_eq!(told.read(5 * MIB - 512, 512)?, [3; 512]);
    }
    // A window without an end is the end of its file; others in that file have their place.
    let text = bed.refused(json!({"node-name": "window", "size": MIB}))?;
    assert!(text.contains("unshared by node 'fixed'"), "{text}");
    bed.ask("blockdev-del", json!({"node-name": "fixed"}))?;
    bed.ask("block_resize", json!({"node-name": "window", "size": MIB}))?;
    assert_eq!(guests[3].is_told()?, MIB);
    assert_eq!(fs::metadata(bed.path("other.raw"))?.len(), MIB + MIB / 2);
    let text = bed.refused(json!({"node-name": "of", "size": MIB}))?;
    assert!(text.contains("unshared by node 'window'"), "{text}");
    drop(guests);
    bed.end(guest)?;
    Ok(())
}

/// Catches the crash that qemu-storage-daemon has here, and a first front-end that sees the old size.
#[test]
fn before_there_was_a_front_end() -> Res<()> {
    let make = qcow2("top.qcow2", MIB, "", None);
    let mut bed = Bed::begin(&[("top.qcow2", "qcow2")], make)?;
    bed.resize(2 * MIB)?;
    let mut guest = bed.guest()?;
    assert_eq!(guest.capacity()?, 2 * MIB);
    assert_eq!(guest.write(2 * MIB - 512, 512, 1)?, OK);
    guest.is_told_nothing()?;
    bed.end(guest)?;
    Ok(())
}

/// Catches a guest that goes on with the old size behind a lost connection or another process, and
/// completed writes behind the old end that are gone.
#[test]
fn across_lost_connections_and_kills() -> Res<()> {
    let dir = tempfile::tempdir()?;
    qcow2("top.qcow2", MIB + 512, "cluster_size=4k", None)(dir.path())?;
    let mut setup = Setup::new(dir.path(), &[(dir.path().join("top.qcow2"), "qcow2")]);
    let journal = tempfile::tempdir_in("/dev/shm")?;
    let state = dir.path().join("state");
    fs::create_dir(&state)?;
    let text = |path: &Path| path.display().to_string();
    setup.extra = [
        "--journal".into(),
        text(journal.path()),
        "--state".into(),
        text(&state),
    ]
    .into();
    let mut bed = Bed::start(dir, setup)?;
    let socket = bed.setup.socket.clone();
    let mut guest = bed.guest()?;
    assert_eq!(guest.write(0, 4096, 1)?, OK);
    for round in 0..3u64 {
        let size = MIB + 512 + (round + 1) * 700 * 512;
        bed.resize(size)?;
        assert_eq!(guest.is_told()?, size);
        assert_eq!(guest.write(size - 1024, 1024, round as u8 + 2)?, OK);
        // Nothing has been flushed since.
        bed.daemon.kill()?;
        let program = Program::under_test();
        bed.daemon = bed.setup.start(&program, bed.dir.path(), None)?;
        let qmp = bed.setup.qmp.clone().ok_or("no control socket")?;
        bed.qmp = bed.daemon.qmp(&qmp)?;
        bed.daemon.reconnect(&mut guest.front, &socket)?;
        guest.channel = guest.front.tracked()?.channel()?;
        // Its guest may have seen another size before.
        assert_eq!(guest.is_told()?, size, "round {round}");
        assert_eq!(guest.read(size - 1024, 1024)?, [round as u8 + 2; 1024]);
        assert_eq!(guest.read(0, 4096)?, [1; 4096]);
    }
    let dir = bed.end(guest)?;
    fs::remove_dir_all(&journal)?;
    images::check(&dir.path().join("top.qcow2"))?;
    Ok(())
}
