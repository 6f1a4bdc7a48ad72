"""Streams into layers that lie under others, however those came to be there.

What would be caught: a daemon whose own reading of a layer is in the way when it
is to be written, a moment in which another program gets at the image meanwhile,
and an attempt that failed and has changed something.
"""

import json
import os
import pathlib
import subprocess

import pytest

from harness import images
from harness.daemon import blockdev, export
from harness.images import MIB, Refused
from harness.scene import SLOW, make_scene


def node(path, below=None, driver="qcow2", **options):
    """The options of an image with its file, and what is under it, inline."""
    file = {"driver": "file", "filename": str(path)}
    made = {"driver": driver, "file": file, **options}
    if below:
        made["backing"] = below
    return made


def by_headers(layers):
    return node(layers[2], node_name="n2")


def inline(layers):
    return node(layers[2], node(layers[1], node(layers[0])), node_name="n2")


def inline_read_only(layers):
    bottom = node(layers[0], read_only=True)
    return node(layers[2], node(layers[1], bottom, read_only=True), node_name="n2")


def inline_direct(layers):
    return {**inline_read_only(layers), "cache": {"direct": True}}


def inline_no_locks(layers):
    made = inline_read_only(layers)
    made["backing"]["file"]["locking"] = "off"
    return made


def copy_on_read(layers):
    return {"driver": "copy-on-read", "node_name": "n2", "file": node(layers[2])}


KINDS = [by_headers, inline, inline_read_only, inline_direct, inline_no_locks, copy_on_read]


def words(options):
    """`--blockdev` with JSON; underscores in names stand for hyphens."""

    def renamed(value):
        if isinstance(value, dict):
            return {key.replace("_", "-"): renamed(item) for key, item in value.items()}
        return value

    return ["--blockdev", json.dumps(renamed(options))]


def node_of(qmp, path):
    """The name of the format node whose image is in `path`."""
    found = qmp.cmd("query-named-block-nodes", flat=True)
    [name] = [n["node-name"] for n in found if n["file"] == str(path) and n["drv"] != "file"]
    return name


def may_read(path):
    return subprocess.run(["qemu-img", "check", path], capture_output=True).returncode == 0


def may_write(path):
    try:
        images.qemu_io(path, "discard 0 0")
    except Refused as refused:
        assert "lock" in str(refused), refused
        return False
    return True


@pytest.fixture
def scene(tmp_path, seed):
    return make_scene(tmp_path / "chain", layers=3, seed=seed)


@pytest.mark.beyond_qsd("has no rule for layers that nobody made writable by name")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_chain(daemon, scene, tmp_path, kind):
    """The middle layer takes in all below it, twice, and is others' to read in between."""
    locked = kind is not inline_no_locks
    mid = scene.layers[1]
    below = images.flatten(mid, tmp_path / "mid.raw")
    daemon.start(*words(kind(scene.layers)), *export("n2", "e", tmp_path / "s"))
    qmp = daemon.qmp()
    name = node_of(qmp, mid)
    assert may_read(mid)
    for _ in range(2):
        qmp.cmd("block-stream", device=name, job_id="j", speed=SLOW)
        assert may_read(mid) == may_write(mid) == (not locked)
        qmp.cmd("block-job-cancel", device="j")
        assert qmp.job_done("j")[0] == "BLOCK_JOB_CANCELLED"
        assert may_read(mid)
        assert may_write(mid) == (not locked)
    qmp.cmd("block-stream", device=name, job_id="j")
    qmp.complete("j")
    assert may_read(mid)
    assert node_of(qmp, mid) == name
    daemon.stop()
    assert scene.backing_of(2) == mid
    images.stands_alone(mid, below)
    images.check(scene.top)
    images.same(scene.top, scene.seen)


@pytest.mark.beyond_qsd("has no rule for layers that nobody made writable by name")
def test_guest_data_in_a_file_of_its_own(daemon, tmp_path, rng):
    """Both files of a layer with a data file are locked, written and given back."""
    base = images.random_image(tmp_path / "base.qcow2", 2 * MIB, rng)
    data = tmp_path / "mid.data"
    mid = images.create(tmp_path / "mid.qcow2", backing=base.name, options=f"data_file={data}")
    images.qemu_io(mid, "write -P 7 64k 64k")
    top = images.create(tmp_path / "top.qcow2", backing=mid.name)
    seen = images.flatten(top, tmp_path / "seen.raw")
    daemon.start(*blockdev(top, "n2"), *export("n2", "e", tmp_path / "s"))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device=node_of(qmp, mid), job_id="j")
    qmp.complete("j")
    assert may_read(mid) and not may_write(mid)
    daemon.stop()
    base.unlink()
    images.stands_alone(mid, seen)
    images.same(top, seen)


@pytest.mark.beyond_qsd("cannot start a second job there")
def test_both_layers_of_one_chain_at_once(daemon, tmp_path, seed):
    """Side by side into two layers of a chain that was found by its headers."""
    scene = make_scene(tmp_path / "five", layers=5, seed=seed)
    daemon.start(*blockdev(scene.top, "n4"), *export("n4", "e", tmp_path / "s"))
    qmp = daemon.qmp()
    lower, base = node_of(qmp, scene.layers[2]), node_of(qmp, scene.layers[0])
    qmp.cmd("block-stream", device="n4", job_id="upper", base_node=lower, speed=SLOW)
    qmp.cmd("block-stream", device=lower, job_id="lower", base_node=base, speed=SLOW)
    for job in ("lower", "upper"):
        qmp.cmd("block-job-set-speed", device=job, speed=0)
        qmp.complete(job)
    daemon.stop()
    assert scene.backing_of(4) == scene.layers[2]
    assert scene.backing_of(2) == scene.layers[0]
    images.check(scene.layers[2])
    images.same(scene.top, scene.seen)


@pytest.mark.beyond_qsd("has no rule for layers that nobody made writable by name")
@pytest.mark.parametrize("exported", [False, True])
def test_two_disks_on_one_node(daemon, scene, tmp_path, exported):
    """Both read through the layer, and it may be an export of its own, to be read."""
    mid = scene.layers[1]
    other = images.create(tmp_path / "other.qcow2", backing=str(mid))
    below = images.flatten(mid, tmp_path / "mid.raw")
    command = words(node(mid, node(scene.layers[0]), node_name="mid"))
    command += blockdev(scene.top, "a", backing="mid") + export("a", "ea", tmp_path / "a")
    command += blockdev(other, "b", backing="mid") + export("b", "eb", tmp_path / "b")
    if exported:
        command += export("mid", "em", tmp_path / "m", writable=False)
    daemon.start(*command)
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="mid", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(mid, below)
    images.same(scene.top, scene.seen)
    images.same(other, below)


def test_two_nodes_on_one_file(daemon, scene, tmp_path):
    """Two disks that opened one file each for itself: writing it is refused, by name."""
    mid = scene.layers[1]
    other = images.create(tmp_path / "other.qcow2", backing=str(mid))
    command = blockdev(scene.top, "a") + export("a", "ea", tmp_path / "a")
    command += blockdev(other, "b") + export("b", "eb", tmp_path / "b")
    daemon.start(*command)
    qmp = daemon.qmp()
    found = qmp.cmd("query-named-block-nodes", flat=True)
    one, two = [n["node-name"] for n in found if n["file"] == str(mid) and n["drv"] == "qcow2"]
    for target, holder in ((one, two), (two, one)):
        _, text = qmp.refused("block-stream", device=target, job_id="j")
        assert 'Failed to get "write" lock' in text and mid.name in text, text
        assert holder in text or daemon.binary.endswith("qemu-storage-daemon"), text
    assert may_read(mid) and not may_write(mid)
    assert qmp.cmd("query-jobs") == []


@pytest.mark.beyond_qsd("has no rule for layers that nobody made writable by name")
def test_a_reader_elsewhere_is_respected(daemon, scene, tmp_path):
    """While another program reads the layer it is not written, and nothing has changed."""
    mid = scene.layers[1]
    before = mid.read_bytes()
    daemon.start(*blockdev(scene.top, "n2"), *export("n2", "e", tmp_path / "s"))
    qmp = daemon.qmp()
    name = node_of(qmp, mid)
    reader = subprocess.Popen(
        ["qemu-io", "-r", "-f", "qcow2", str(mid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        # The answer to a command says that the image is open.
        reader.stdin.write("length\n")
        reader.stdin.flush()
        assert reader.stdout.readline()
        for _ in range(3):
            _, text = qmp.refused("block-stream", device=name, job_id="j")
            assert 'Failed to get "write" lock' in text and "another process" in text
        assert may_read(mid) and not may_write(mid)
        assert mid.read_bytes() == before
    finally:
        reader.stdin.close()
        reader.wait(10)
        reader.stdout.close()
    qmp.cmd("block-stream", device=name, job_id="j")
    qmp.complete("j")


@pytest.mark.beyond_qsd("opens what bears the name by then")
def test_a_name_that_stands_for_another_file(daemon, scene, tmp_path):
    """The file that was opened is the one to be written, or none is."""
    mid = scene.layers[1]
    daemon.start(*blockdev(scene.top, "n2"), *export("n2", "e", tmp_path / "s"))
    qmp = daemon.qmp()
    name = node_of(qmp, mid)
    copy = pathlib.Path(f"{mid}.new")
    copy.write_bytes(mid.read_bytes())
    os.rename(copy, mid)
    _, text = qmp.refused("block-stream", device=name, job_id="j")
    assert "another file" in text and mid.name in text, text
    mid.unlink()
    _, text = qmp.refused("block-stream", device=name, job_id="j")
    assert "No such file" in text, text
