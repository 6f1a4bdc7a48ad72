//! The client library that most users of QMP have, `qemu.qmp` from PyPI, against our socket.
//!
//! Skipped, with a word about it, where Python does not have it. `PYTHON` names the interpreter.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod qmp_support;

use std::process::Command;

use qmp_support::Bench;

const SCRIPT: &str = r#"
import asyncio, sys
from qemu.qmp import QMPClient, EventListener, ExecuteError

async def client(path, name):
    qmp = QMPClient(name)
    await qmp.connect(path)
    return qmp

async def main(path):
    one, two = await client(path, 'one'), await client(path, 'two')
    ended = EventListener(names=('BLOCK_JOB_COMPLETED', 'BLOCK_JOB_CANCELLED'))
    with two.listen(ended):
        await one.execute('block-stream', {'device': 'e0'})
        event = await ended.get()
        assert event['data']['offset'] == event['data']['len'], event
        await one.execute('block_stream', {'device': 'e0', 'speed': 1})
        await two.execute('block_job_set_speed', {'device': 'e0', 'value': 2})
        (job,) = await one.execute('query-block-jobs')
        assert job['speed'] == 2, job
        await two.execute('block_job_cancel', {'device': 'e0'})
        assert (await ended.get())['event'] == 'BLOCK_JOB_CANCELLED'
    assert await one.execute('query-block-jobs') == []
    for command, arguments in (
        ('block-stream', {'device': 'nonexistent'}),
        ('block-stream', {'device': 'e0', 'speed': -1}),
        ('block-job-cancel', {'device': 'e0'}),
    ):
        try:
            await one.execute(command, arguments)
        except ExecuteError:
            continue
        raise SystemExit(f'{command} {arguments} should have failed')
    await asyncio.gather(*(one.execute('query-jobs') for _ in range(50)))
    await two.disconnect()
    await one.execute('quit')
    await one.disconnect()

asyncio.run(main(sys.argv[1]))
"#;

/// Would catch an answer, greeting or event that the library takes for a breach of protocol.
#[test]
fn the_library_of_qemu() {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has_library = Command::new(&python)
        .args(["-c", "import qemu.qmp"])
        .output();
    if !has_library.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {python} has no qemu.qmp (pip install qemu.qmp)");
        return;
    }
    let bench = Bench::new();
    let output = Command::new(python)
        .args(["-c", SCRIPT])
        .arg(&bench.path)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
