//! Images that contradict themselves under a guest.
//!
//! What would be caught: a contradiction that no client hears of, or hears of for each request that
//! meets it; an image that is written after its tables have shown that nothing is to be relied on,
//! by a write in place, one that allocates, zeros or a discard; what a guest had written before and
//! that is lost then, or does not get from the journal into the file; a header that does not say
//! so, or that another program may write all the same; an image that is only read and is marked.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::Res;
use common::daemon::{Daemon, Program};
use common::frontend::{DISCARD, Frontend, IOERR, OK, Op, Segment, WRITE_ZEROES};
use common::images;
use common::qmp::Qmp;
use serde_json::{Value, json};

const CLUSTER: u64 = 64 << 10;
/// Bytes of the disk that one L2 table maps, and one slice of it.
const SLICE: u64 = 512 * CLUSTER;
const SIZE: u64 = 4 * SLICE;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

struct Image {
    path: PathBuf,
    file: File,
}

impl Image {
    /// One with data in its first and in its third slice.
    fn new(dir: &Path, options: &str) -> Res<Self> {
        let path = dir.join("disk.qcow2");
        images::create(&path, SIZE, &format!("cluster_size=64k{options}"), None)?;
        let third = format!("write -P 2 {} 256k", 2 * SLICE);
        let name = images::text(&path)?;
        images::qemu_io(&["-f", "qcow2", "-c", "write -P 1 0 256k", "-c", &third, name])?;
        let file = File::options().read(true).write(true).open(&path)?;
        Ok(Self { path, file })
    }

    fn word(&self, at: u64) -> Res<u64> {
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, at)?;
        Ok(u64::from_be_bytes(word))
    }

    fn set(&self, at: u64, word: u64) -> Res<()> {
        Ok(self.file.write_all_at(&word.to_be_bytes(), at)?)
    }

    /// Where the L2 entry of the first cluster of the third slice is.
    fn entry(&self) -> Res<u64> {
        Ok((self.word(self.word(40)?)? & OFFSET) + 1024 * 8)
    }

    /// All of the header, and what is behind it in its cluster.
    fn header(&self) -> Res<Vec<u8>> {
        let mut bytes = vec![0; CLUSTER as usize];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn is_marked(&self) -> Res<bool> {
        Ok(self.word(72)? & 2 != 0)
    }
}

struct Scene {
    daemon: Daemon,
    frontend: Frontend,
    qmp: Qmp,
}

/// A daemon that serves the image as node `disk`.
fn serve(image: &Image, dir: &Path, writable: bool, more: &[String]) -> Res<Scene> {
    let (socket, control) = (dir.join("disk.sock"), dir.join("qmp.sock"));
    let mut args = vec![
        format!(
            "--blockdev=driver=file,node-name=f,discard=unmap,filename={}",
            images::text(&image.path)?
        ),
        "--blockdev=driver=qcow2,node-name=disk,file=f,discard=unmap".to_owned(),
        format!(
            "--export=type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},\
             writable={}",
            images::text(&socket)?,
            if writable { "on" } else { "off" }
        ),
        format!("--qmp={}", images::text(&control)?),
    ];
    args.extend_from_slice(more);
    let mut daemon = Daemon::start(&Program::under_test(), &args, dir, None)?;
    let qmp = daemon.qmp(&control)?;
    let frontend = daemon.connect(&socket, 1, 64, 1 << 20)?;
    frontend.memory.write(0, &[9; 4096]);
    Ok(Scene {
        daemon,
        frontend,
        qmp,
    })
}

impl Scene {
    fn run(&mut self, request: &Op) -> Res<u8> {
        self.frontend
            .queues
            .first_mut()
            .ok_or("no queue")?
            .run(request)
    }

    /// The answers to requests of 4 KiB at a place of the disk.
    fn outcomes(&mut self, at: u64) -> Res<Vec<u8>> {
        let (data, sector) = ([(0, 4096)], at / 512);
        let range = [Segment {
            sector,
            count: 128,
            flags: 0,
        }];
        [
            Op::read(sector, &[(4096, 4096)]),
            Op::write(sector, &data),
            Op::ranges(WRITE_ZEROES, &range),
            Op::ranges(DISCARD, &range),
        ]
        .iter()
        .map(|request| self.run(request))
        .collect()
    }

    fn told(&mut self) -> Res<Value> {
        Ok(self.qmp.event(is_corrupted)?["data"].take())
    }

    fn end(mut self) -> Res<()> {
        let again = self.qmp.pending_events()?.into_iter().find(is_corrupted);
        assert_eq!(again, None, "it is told once");
        drop(self.frontend);
        drop(self.qmp);
        self.daemon.stop()
    }
}

fn is_corrupted(event: &Value) -> bool {
    event["event"] == "BLOCK_IMAGE_CORRUPTED"
}

/// Whether query-named-block-nodes says that the image is marked.
fn says_corrupt(qmp: &mut Qmp) -> Res<bool> {
    let nodes = qmp.execute("query-named-block-nodes", json!({}))??;
    let nodes = nodes.as_array().ok_or("no list")?;
    let disk = nodes.iter().find(|node| node["node-name"] == "disk");
    let disk = disk.ok_or("no such node")?;
    Ok(disk["image"]["format-specific"]["data"]["corrupt"] == json!(true))
}

/// Once nothing can be relied on, nothing is written, and what was written before is kept.
#[test]
fn nothing_is_written_to_an_image_that_is_lost() -> Res<()> {
    for journaled in [false, true] {
        let dir = tempfile::tempdir()?;
        // In memory, as journals must be.
        let journal = tempfile::tempdir_in("/dev/shm")?;
        let image = Image::new(dir.path(), "")?;
        let entry = image.entry()?;
        image.set(entry, image.word(entry)? + 512)?;
        let mut more = Vec::new();
        if journaled {
            more.push(format!("--journal={}", images::text(journal.path())?));
        }
        let mut scene = serve(&image, dir.path(), true, &more)?;
        // In place, and in a cluster that is allocated for it.
        let data = [(0, 4096)];
        for at in [0, SLICE] {
            assert_eq!(scene.run(&Op::write(at / 512, &data))?, OK);
        }
        assert_eq!(scene.outcomes(2 * SLICE)?, [IOERR; 4]);
        let told = scene.told()?;
        let message = told["msg"].as_str().unwrap_or_default().to_owned();
        assert!(
            message.contains("expected a multiple of the cluster"),
            "{told}"
        );
        assert_eq!(
            told,
            json!({"device": "e", "node-name": "disk", "msg": message, "fatal": true})
        );
        // Also where the mapping is known, and right.
        assert_eq!(scene.outcomes(0)?, [OK, IOERR, IOERR, IOERR]);
        // What reads as zeros already takes no change.
        assert_eq!(scene.outcomes(3 * SLICE)?, [OK, IOERR, OK, OK]);
        let Scene { daemon, qmp, .. } = &mut scene;
        daemon.retry(|| match says_corrupt(qmp)? {
            true => Ok(()),
            false => Err(std::io::Error::from(std::io::ErrorKind::NotFound).into()),
        })?;
        if !journaled {
            assert_eq!(scene.run(&Op::flush())?, OK);
        }
        // What was written is in the file by now: it outlives a kill without help.
        scene.daemon.kill()?;
        assert!(image.is_marked()?);
        let info = images::qemu_img(&["info", "-U", images::text(&image.path)?])?;
        assert!(info.contains("corrupt: true"), "{info}");
        let program = Program::under_test();
        let mut args = vec![
            format!(
                "--socket-path={}",
                images::text(&dir.path().join("again.sock"))?
            ),
            format!("--blk-file={}", images::text(&image.path)?),
        ];
        args.extend(more);
        let mut again = Daemon::start(&program, &args, dir.path(), None)?;
        assert!(!again.wait_for_end()?.success());
        assert!(again.log().contains("marked corrupt"), "{}", again.log());
        for (at, pattern) in [(0, 9), (SLICE, 9), (4096, 1)] {
            let read = format!("read -P {pattern} {at} 4k");
            let name = images::text(&image.path)?;
            let seen = images::qemu_io(&["-r", "-f", "qcow2", "-c", &read, name])?;
            assert!(!seen.contains("verification failed"), "{seen}");
        }
    }
    Ok(())
}

/// A header of version 2 has no place for the mark. The image is written no more all the same.
#[test]
fn an_image_of_version_2_is_written_no_more_and_has_no_mark() -> Res<()> {
    let dir = tempfile::tempdir()?;
    let image = Image::new(dir.path(), ",compat=0.10")?;
    image.set(image.entry()?, image.word(image.entry()?)? + 512)?;
    let header = image.header()?;
    let mut scene = serve(&image, dir.path(), true, &[])?;
    assert_eq!(scene.run(&Op::write(0, &[(0, 4096)]))?, OK);
    assert_eq!(scene.outcomes(2 * SLICE)?, [IOERR; 4]);
    assert_eq!(scene.told()?["fatal"], json!(true));
    assert_eq!(scene.outcomes(0)?, [OK, IOERR, IOERR, IOERR]);
    assert_eq!(scene.run(&Op::flush())?, OK);
    scene.end()?;
    assert!(image.header()? == header, "the header has changed");
    let seen = images::qemu_io(&[
        "-r",
        "-f",
        "qcow2",
        "-c",
        "read -P 9 0 4k",
        images::text(&image.path)?,
    ])?;
    assert!(!seen.contains("verification failed"), "{seen}");
    Ok(())
}

#[test]
fn each_contradiction_has_its_weight() -> Res<()> {
    // The damage, whether the image is exported to be written, and what is told.
    type Damage = fn(&Image) -> Res<()>;
    let cases: [(Damage, bool, &str, bool); 5] = [
        (
            |image| image.set(image.entry()?, image.word(40)? | COPIED),
            true,
            "where the L1 table is",
            true,
        ),
        (
            |image| image.set(image.entry()?, image.word(image.entry()?)? + 512),
            false,
            "expected a multiple of the cluster",
            false,
        ),
        (
            |image| image.set(image.entry()?, 1 << 40 | COPIED),
            true,
            "behind the end of the file",
            false,
        ),
        // A refcount of a cluster that is used, which is taken off.
        (
            |image| {
                let cluster = (image.word(image.entry()?)? & OFFSET) / CLUSTER;
                let block = image.word(image.word(48)?)?;
                Ok(image.file.write_all_at(&[0, 0], block + 2 * cluster)?)
            },
            true,
            "has no reference",
            false,
        ),
        (
            |image| {
                let block = image.word(image.word(48)?)?;
                let cluster = image.word(40)? / CLUSTER;
                Ok(image.file.write_all_at(&[0, 0], block + 2 * cluster)?)
            },
            true,
            "but the L1 table is there",
            false,
        ),
    ];
    for (damage, writable, message, fatal) in cases {
        let dir = tempfile::tempdir()?;
        let image = Image::new(dir.path(), "")?;
        damage(&image)?;
        let mut scene = serve(&image, dir.path(), writable, &[])?;
        // In place; where the allocator is to look around, in new clusters.
        let new = message.ends_with("table is there");
        for round in 0..8 {
            let at = if new { SLICE + round * CLUSTER } else { 0 };
            scene.outcomes(2 * SLICE)?;
            let data = [(0, 4096)];
            // It goes on elsewhere unless all is lost.
            let status = scene.run(&Op::write(at / 512, &data))?;
            assert_eq!(status == OK, writable && !fatal, "{message}");
            // One makes a discard stable, and the other takes the reference off.
            scene.run(&Op::flush())?;
            scene.run(&Op::flush())?;
            assert_eq!(scene.run(&Op::read(0, &data))?, OK, "{message}");
        }
        let told = scene
            .told()
            .map_err(|error| format!("{message}: {error}"))?;
        let text = told["msg"].as_str().unwrap_or_default();
        assert!(text.contains(message), "{message}: {told}");
        assert_eq!(told["fatal"], json!(fatal), "{told}");
        assert_eq!(told["offset"].is_u64(), told["size"].is_u64(), "{told}");
        scene.end()?;
        assert!(fatal || !image.is_marked()?, "{message}");
    }
    Ok(())
}
