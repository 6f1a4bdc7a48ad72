"""Failures that a `blkdebug` node injects, and disks of `null-co`.

What would be caught: a job whose source fails and that copies on, ends without a word, or tries
again what it was not told to; a rule that fires at another time than in qemu-storage-daemon, to which
the same tests are put; a guest's disk that is not there, or holds what was written.
"""

import json

import pytest

from harness import images
from harness.images import MIB

LEN = 2 * MIB
# What is read at a time.
STEP = 512 * 1024
# Fires once, at the sector behind the first step.
RULES = """
[inject-error]
state = "1"
event = "read_aio"
errno = "{errno}"
immediately = "off"
once = "on"
sector = "{sector}"

[set-state]
state = "1"
event = "read_aio"
new_state = "2"

[set-state]
state = "2"
event = "read_aio"
new_state = "1"
"""
EIO, ENOSPC = 5, 28
TEXT = {EIO: "Input/output error", ENOSPC: "No space left on device"}


def words(node):
    return ["--blockdev", json.dumps(node)]


def file(path):
    return {"driver": "file", "filename": str(path)}


class Chain:
    """An overlay over a raw disk whose reads fail by rules."""

    def __init__(self, daemon, folder, rng, errno, immediately=False):
        self.base, self.top = folder / "base", folder / "top.qcow2"
        self.bytes = rng.randbytes(LEN)
        self.base.write_bytes(self.bytes)
        images.create(self.top, size=LEN)
        rules = folder / "rules"
        text = RULES.format(errno=errno, sector=STEP // 512)
        if immediately:
            text = text.replace('immediately = "off"', 'immediately = "on"')
        rules.write_text(text)
        failing = {"driver": "blkdebug", "config": str(rules), "image": file(self.base)}
        backing = {"driver": "raw", "file": failing}
        top = {"driver": "qcow2", "node-name": "n1", "file": file(self.top), "backing": backing}
        daemon.start(*words(top))
        self.daemon, self.qmp = daemon, daemon.qmp()

    def stream(self, **arguments):
        self.qmp.cmd("block-stream", device="n1", job_id="j", **arguments)

    def is_whole(self):
        """The overlay alone holds all bytes, once nobody has it."""
        self.daemon.stop()
        images.check(self.top)
        images.same(self.top, self.base)


@pytest.mark.parametrize("immediately", [False, True])
@pytest.mark.parametrize("on_error", ["report", "enospc", None])
def test_report(daemon, tmp_path, rng, on_error, immediately):
    """The job ends where the error was, and keeps what it has copied."""
    chain = Chain(daemon, tmp_path, rng, EIO, immediately)
    chain.stream(**({"on_error": on_error} if on_error else {}))
    name, data = chain.qmp.job_done("j")
    assert name == "BLOCK_JOB_COMPLETED"
    assert (data["error"], data["offset"], data["len"]) == (TEXT[EIO], STEP, LEN)
    [told] = [e["data"] for e in chain.qmp.events if e["event"] == "BLOCK_JOB_ERROR"]
    assert (told["operation"], told["action"]) == ("read", "report")
    # The rule is gone, and what is there is passed over.
    chain.stream()
    chain.qmp.complete("j")
    chain.is_whole()


def test_ignore(daemon, tmp_path, rng):
    """The job goes on to the end, and ends with the error all the same."""
    chain = Chain(daemon, tmp_path, rng, EIO)
    chain.stream(on_error="ignore")
    told = chain.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
    assert (told["operation"], told["action"]) == ("read", "ignore")
    name, data = chain.qmp.job_done("j")
    assert name == "BLOCK_JOB_COMPLETED"
    assert (data["error"], data["offset"]) == (TEXT[EIO], LEN)


@pytest.mark.parametrize(
    "errno, on_error, status",
    [(EIO, "stop", "failed"), (ENOSPC, "stop", "nospace"), (ENOSPC, "enospc", "nospace")],
)
def test_stop_and_resume(daemon, tmp_path, rng, errno, on_error, status):
    """The job waits with the error, and goes on where it was."""
    chain = Chain(daemon, tmp_path, rng, errno)
    chain.stream(on_error=on_error)
    told = chain.qmp.wait_event("BLOCK_JOB_ERROR", device="j")
    assert (told["operation"], told["action"]) == ("read", "stop")
    chain.qmp.wait_status("j", "paused")
    job = chain.qmp.job("j")
    assert (job["paused"], job["offset"], job["io-status"]) == (True, STEP, status)
    chain.qmp.cmd("block-job-resume", device="j")
    data = chain.qmp.complete("j")
    assert data["len"] == LEN
    chain.is_whole()


@pytest.mark.beyond_qsd("follows such headers always")
def test_a_header_leads_there_when_it_is_allowed(daemon, tmp_path, rng):
    """`--allow-backing blkdebug`, as for the tests that come with QEMU."""
    base, top, rules = (tmp_path / name for name in ("base", "top.qcow2", "rules"))
    base.write_bytes(rng.randbytes(LEN))
    rules.write_text(RULES.format(errno=EIO, sector=STEP // 512))
    images.create(top, backing=f"blkdebug:{rules}:{base}", backing_format="raw")
    node = {"driver": "qcow2", "node-name": "n1", "file": file(top)}
    with pytest.raises(AssertionError):
        daemon.start(*words(node))
    assert "--allow-backing blkdebug" in daemon.read_log()
    daemon.start("--allow-backing", "blkdebug", *words(node))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    assert qmp.job_done("j")[1]["error"] == TEXT[EIO]
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.same(top, base)


NULLS = {
    "null-co": {},
    "null-aio": {"size": 4 * MIB, "latency-ns": 1000000},
    "known": {"size": 3 * MIB, "read-zeroes": True},
}


@pytest.mark.parametrize("kind", NULLS)
def test_null_nodes_are_told(daemon, kind):
    """As qemu-storage-daemon tells them."""
    options = NULLS[kind]
    driver = "null-aio" if kind == "null-aio" else "null-co"
    daemon.start(*words({"driver": driver, "node-name": "n", **options}))
    [node] = daemon.qmp().cmd("query-named-block-nodes")
    assert (node["drv"], node["node-name"]) == (driver, "n")
    assert node["image"]["virtual-size"] == options.get("size", 1 << 30)
    name = node["file"]
    assert name == node["image"]["filename"]
    if options:
        # How long operations take is no part of it.
        told = {key: value for key, value in options.items() if key != "latency-ns"}
        assert json.loads(name.removeprefix("json:")) == {"driver": driver, **told}
    else:
        assert name == f"{driver}://"


def test_blkdebug_nodes_are_told(daemon, tmp_path):
    base, rules = tmp_path / "base", tmp_path / "rules"
    base.write_bytes(bytes(MIB))
    rules.write_text("")
    with_rules = {"driver": "blkdebug", "node-name": "a", "config": str(rules), "image": "f"}
    without = {"driver": "blkdebug", "node-name": "b", "image": "f"}
    daemon.start(*words({"node-name": "f", **file(base)}), *words(with_rules), *words(without))
    nodes = {n["node-name"]: n for n in daemon.qmp().cmd("query-named-block-nodes")}
    assert nodes["a"]["file"] == f"blkdebug:{rules}:{base}"
    assert nodes["b"]["file"] == f"blkdebug::{base}"
    assert nodes["a"]["drv"] == "blkdebug"
    assert nodes["a"]["image"]["virtual-size"] == MIB


def test_a_stream_takes_zeros_from_a_null_node(daemon, tmp_path):
    """What lies over it need not be copied, and reads the same afterwards."""
    top = images.create(tmp_path / "top.qcow2", size=LEN)
    images.qemu_io(top, "write -P 7 0 65536")
    node = {"driver": "qcow2", "node-name": "n1", "file": file(top)}
    below = {"driver": "null-co", "size": LEN, "read-zeroes": True}
    daemon.start(*words({**node, "backing": below}))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    daemon.stop()
    expected = tmp_path / "expected"
    expected.write_bytes(bytes([7]) * 65536 + bytes(LEN - 65536))
    images.check(top)
    images.same(top, expected)
