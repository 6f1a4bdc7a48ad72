//! Guests whose requests fail by rules, and guests on disks that keep nothing.
//!
//! What would be caught: a failure that a guest does not hear of, since its request is tried again
//! where nobody sees it; one that lasts longer than its rule; a request that fails here and not with
//! qemu-storage-daemon; a read of a disk without contents that shows memory of somebody else, or does
//! not take its time.

mod common;

use common::Res;
use common::daemon::{Daemon, Program};
use common::frontend::{DISCARD, Frontend, IOERR, OK, Op, Segment, WRITE_ZEROES};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const SIZE: usize = 1 << 20;
const SECTOR: usize = 512;

/// A daemon of `program` that serves node `disk`.
fn serve(program: &Program, dir: &Path, nodes: &[String]) -> Res<(Daemon, Frontend)> {
    let socket: PathBuf = dir.join("disk.sock");
    let mut args = Vec::new();
    for node in nodes {
        args.extend(["--blockdev".to_owned(), node.clone()]);
    }
    let export = format!(
        "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={},writable=on",
        socket.display()
    );
    args.extend(["--export".to_owned(), export]);
    let mut daemon = Daemon::start(program, &args, dir, None)?;
    let frontend = daemon.connect(&socket, 1, 64, 64 * SECTOR)?;
    Ok((daemon, frontend))
}

/// The outcomes of requests in their order.
fn outcomes(frontend: &mut Frontend, requests: &[Op]) -> Res<Vec<u8>> {
    let queue = frontend.queues.first_mut().ok_or("no queue")?;
    requests.iter().map(|request| queue.run(request)).collect()
}

#[test]
fn a_guest_hears_of_each_failure_once() -> Res<()> {
    const RULES: &[&str] = &[
        "inject-error.0.event=read_aio,inject-error.0.sector=100,inject-error.0.once=on",
        "inject-error.0.event=write_aio,inject-error.0.errno=28,inject-error.0.once=on",
        "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.once=on,\
         inject-error.0.immediately=on",
        // The second read arms it.
        "set-state.0.event=read_aio,set-state.0.state=1,set-state.0.new_state=2,\
         inject-error.0.event=read_aio,inject-error.0.state=2,inject-error.0.once=on",
        "inject-error.0.event=none,inject-error.0.iotype=write-zeroes,inject-error.0.once=on",
        "inject-error.0.event=none,inject-error.0.iotype=discard,inject-error.0.once=on",
        "align=512,max-transfer=1024",
    ];
    let data = [(0, 8 * SECTOR)];
    let range = [Segment {
        sector: 8,
        count: 8,
        flags: 0,
    }];
    let requests = [
        Op::read(96, &data),
        Op::read(96, &data),
        Op::write(0, &data),
        Op::write(0, &data),
        Op::ranges(WRITE_ZEROES, &range),
        Op::ranges(WRITE_ZEROES, &range),
        Op::ranges(DISCARD, &range),
        Op::ranges(DISCARD, &range),
        Op::read(200, &data),
    ];
    let dir = tempfile::tempdir()?;
    let base = dir.path().join("base");
    for rules in RULES {
        let mut seen = Vec::new();
        for program in [Program::under_test(), Program::reference()] {
            fs::write(&base, vec![7; SIZE])?;
            let file = format!(
                "driver=file,node-name=f,filename={},discard=unmap",
                base.display()
            );
            let failing = format!("driver=blkdebug,node-name=b,image=f,discard=unmap,{rules}");
            let disk = "driver=raw,node-name=disk,file=b,discard=unmap".to_owned();
            let (daemon, mut frontend) = serve(&program, dir.path(), &[file, failing, disk])?;
            seen.push(outcomes(&mut frontend, &requests)?);
            drop(frontend);
            daemon.stop()?;
        }
        assert_eq!(seen[0], seen[1], "{rules}");
        let failed = seen[0].iter().filter(|status| **status == IOERR).count();
        assert_eq!(failed, usize::from(rules.contains("once")), "{rules}");
    }
    Ok(())
}

#[test]
fn a_disk_without_contents_answers_with_zeros_in_its_time() -> Res<()> {
    const LATENCY: Duration = Duration::from_millis(20);
    let dir = tempfile::tempdir()?;
    let node = format!(
        "driver=null-co,node-name=disk,size=1M,latency-ns={}",
        LATENCY.as_nanos()
    );
    let (daemon, mut frontend) = serve(&Program::under_test(), dir.path(), &[node])?;
    frontend.memory.write(0, &vec![9; 64 * SECTOR]);
    let data = [(0, 8 * SECTOR)];
    let began = Instant::now();
    let requests = [Op::write(0, &data), Op::read(0, &data), Op::flush()];
    assert_eq!(outcomes(&mut frontend, &requests)?, [OK; 3]);
    assert!(began.elapsed() >= 3 * LATENCY);
    let mut seen = vec![1; 16 * SECTOR];
    frontend.memory.read(0, &mut seen);
    assert!(seen[..8 * SECTOR] == [0; 8 * SECTOR] && seen[8 * SECTOR..] == [9; 8 * SECTOR]);
    let past = [Op::read((1 << 20) / SECTOR as u64, &data)];
    assert_eq!(outcomes(&mut frontend, &past)?, [IOERR]);
    drop(frontend);
    daemon.stop()
}
