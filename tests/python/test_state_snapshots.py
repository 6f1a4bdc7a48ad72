"""`--state` and the nodes of snapshots: what was made and removed is so in the next process.

What would be caught: a start that is refused since a node refers to one that a snapshot has made,
or lies where a snapshot has put something else; a node that a snapshot has made and that is gone, is
over something else than before or comes back after it was removed; a guest that is put under its own
overlay; an image without a name of a client's that stays open when nobody uses it.
"""

import json

import pytest

from harness import images
from harness.daemon import blockdev, export
from harness.images import MIB, qemu_io
from harness.lives import Lives
from harness.scene import Scene

pytestmark = pytest.mark.beyond_qsd("has no --state")


@pytest.fixture
def lives(daemon, tmp_path):
    """Two layers, `n0` and `n1`, each with a pattern of its own; `n1` is the guest's."""
    folder = tmp_path / "disk"
    folder.mkdir()
    below, layers = None, []
    for number in range(2):
        path = images.create(folder / f"n{number}.qcow2", None if below else 8 * MIB, below)
        qemu_io(path, f"write -P {number + 1} {number}M 64k")
        layers.append(path)
        below = path
    words = [*blockdev(layers[0], "n0"), *blockdev(layers[1], "n1", backing="n0")]
    words += export("n1", "drive0", folder / "drive0.sock")
    return Lives(daemon, Scene(folder, layers, None, words), tmp_path / "state")


def nodes(qmp):
    return {node["node-name"]: node for node in qmp.cmd("query-named-block-nodes", flat=True)}


def chain(qmp, node):
    """The names of a node and of all under it."""
    known, found = nodes(qmp), []
    while node:
        found.append(node)
        children = known[node].get("children", [])
        node = next((c["node-name"] for c in children if c["child"] == "backing"), None)
    return found


def named(qmp):
    """Each node that a client has named, and its chain."""
    return {name: chain(qmp, name) for name in sorted(nodes(qmp)) if not name.startswith("#")}


def served(qmp):
    return {one["id"]: one["node-name"] for one in qmp.cmd("query-block-exports")}


def snapshot(lives, qmp, name, over=None, unnamed=False):
    """A new image on top of a node, or of the guest's disk."""
    path = lives.scene.folder / f"{name}.qcow2"
    if unnamed:
        qmp.cmd("blockdev-snapshot-sync", device="drive0", snapshot_file=str(path))
    else:
        over = over or served(qmp)["drive0"]
        words = {"node_name": over, "snapshot_file": str(path), "snapshot_node_name": name}
        qmp.cmd("blockdev-snapshot-sync", **words)
    return path


def options(lives, name, backing, made=True):
    """The options of an image over node `backing`, which is made first."""
    path = lives.scene.folder / f"{name}.qcow2"
    if made:
        images.create(path, 8 * MIB)
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node_name": name, "file": file, "backing": backing}


def reopen(qmp, words):
    words = {key.replace("_", "-"): value for key, value in words.items()}
    qmp.cmd("blockdev-reopen", options=[words])


def commit(qmp, top, base, active=False):
    device = served(qmp)["drive0"]
    qmp.cmd("block-commit", device=device, top_node=top, base_node=base, job_id="j")
    if active:
        qmp.wait_event("BLOCK_JOB_READY", device="j")
        qmp.cmd("job-complete", id="j")
    qmp.complete("j")


def remove_export(qmp):
    qmp.cmd("block-export-del", id="drive0", mode="hard")
    qmp.poll("the export ends", lambda: not served(qmp))


def add_export(lives, qmp, node):
    addr = {"type": "unix", "path": str(lives.scene.folder / "drive0.sock")}
    words = {"type": "vhost-user-blk", "id": "drive0", "node_name": node, "writable": True}
    qmp.cmd("block-export-add", addr=addr, **words)


def is_kept(lives, qmp, times=2):
    """The next processes have what this one has."""
    there = named(qmp), served(qmp)
    for _ in range(times):
        qmp = lives.again()
        assert (named(qmp), served(qmp)) == there
    return qmp


def patterns(lives, qmp, node):
    """What node `node` reads as, as `qemu-io` sees its chain: each MiB's first byte."""
    known, found = nodes(qmp), None
    files = [known[name]["file"] for name in chain(qmp, node)]
    lives.kill()
    for file in reversed(files):
        plain = {"driver": "file", "filename": file}
        found = {"driver": "qcow2", "file": plain, "backing": found}
    raw = lives.scene.folder / "patterns.raw"
    images.qemu_img("convert", "-O", "raw", "json:" + json.dumps(found), raw)
    whole = raw.read_bytes()
    return [whole[at] for at in range(0, len(whole), MIB)]


def test_a_node_over_one_that_a_snapshot_has_made(lives):
    qmp = lives.begin()
    snapshot(lives, qmp, "s1")
    snapshot(lives, qmp, "s2")
    qmp.cmd("blockdev-add", **options(lives, "x", "s1"))
    qmp.cmd("blockdev-add", **options(lives, "y", "x"))
    read = {"driver": "copy-on-read", "node_name": "z", "file": "s1"}
    qmp.cmd("blockdev-add", **read)
    is_kept(lives, qmp)


def test_a_snapshot_of_a_node_over_one_that_a_snapshot_has_made(lives):
    """The record of it waits for what it covers."""
    qmp = lives.begin()
    snapshot(lives, qmp, "s1")
    snapshot(lives, qmp, "s2")
    qmp.cmd("blockdev-add", **options(lives, "x", "s1"))
    snapshot(lives, qmp, "s3", over="x")
    qmp.cmd("blockdev-add", **options(lives, "y", "s3"))
    is_kept(lives, qmp)


@pytest.mark.parametrize("learnt", [False, True])
def test_an_image_that_was_put_under_one_that_a_snapshot_has_put_on_top(lives, learnt):
    qmp = lives.begin()
    snapshot(lives, qmp, "s1")
    qmp.cmd("blockdev-add", **options(lives, "x", "n1"))
    reopen(qmp, options(lives, "s1", "x", made=False))
    qmp = is_kept(lives, qmp)
    assert chain(qmp, "s1") == ["s1", "x", "n1", "n0"]
    if learnt:
        # The command line may name all of it by now, or the one in between alone.
        lives.kill()
        changes = lives.record()["changes"]["nodes"]["added"]
        [between] = [json.dumps(node) for node in changes if node["node-name"] == "x"]
        lives.words = ["--blockdev", between, *lives.words]
        lives.words = sorted_by_need(lives.words)
        qmp = lives.begin()
        assert chain(qmp, "s1") == ["s1", "x", "n1", "n0"]
    reopen(qmp, options(lives, "s1", "n1", made=False))
    is_kept(lives, qmp)


def sorted_by_need(words):
    """The words with the first `--blockdev` behind the other ones."""
    first, rest = words[:2], words[2:]
    at = max(n for n, word in enumerate(rest) if word == "--blockdev") + 2
    return [*rest[:at], *first, *rest[at:]]


@pytest.mark.parametrize("job", ["stream", "commit"])
def test_an_image_under_which_a_node_lies_that_refers_to_one_of_a_snapshot(lives, job):
    """It waits for that node, which its options do not name, and a job has put there."""
    qmp = lives.begin()
    snapshot(lives, qmp, "s1")
    snapshot(lives, qmp, "s2")
    qmp.cmd("blockdev-add", **options(lives, "x", "s1"))
    reopen(qmp, options(lives, "s2", "x", made=False))
    snapshot(lives, qmp, "s3")
    if job == "stream":
        qmp.cmd("block-stream", device="s3", base_node="x", job_id="j")
        qmp.complete("j")
    else:
        commit(qmp, "s2", "x")
    assert chain(qmp, "s3") == ["s3", "x", "s1", "n1", "n0"]
    qmp = is_kept(lives, qmp)
    qmp.cmd("blockdev-del", node_name="s2")
    is_kept(lives, qmp)


def test_an_image_over_one_that_nobody_has_named(lives):
    """A job has put it there: it is the one that is open."""
    qmp = lives.begin()
    snapshot(lives, qmp, "u", unnamed=True)
    snapshot(lives, qmp, "s1")
    snapshot(lives, qmp, "s2")
    middle = chain(qmp, "s1")[1]
    commit(qmp, "s1", middle)
    before = len(nodes(qmp))
    qmp = lives.again()
    assert chain(qmp, "s2")[2:] == ["n1", "n0"] and chain(qmp, "s1")[2:] == ["n1", "n0"]
    assert len(nodes(qmp)) == before
    assert patterns(lives, qmp, "s2")[:3] == [1, 2, 0]


def test_an_image_that_was_taken_out_again(lives):
    """Of three that snapshots have made; it may be removed, and stays so."""
    qmp = lives.begin()
    for name in ("s1", "s2", "s3"):
        path = snapshot(lives, qmp, name)
        if name == "s2":
            middle = path
    reopen(qmp, options(lives, "s3", "s1", made=False))
    qmp = is_kept(lives, qmp)
    assert chain(qmp, "s2") == ["s2", "s1", "n1", "n0"]
    qmp.cmd("blockdev-del", node_name="s2")
    middle.unlink()
    qmp = is_kept(lives, qmp)
    assert chain(qmp, "s3") == ["s3", "s1", "n1", "n0"] and "s2" not in nodes(qmp)


@pytest.mark.parametrize("job", ["stream", "commit", "active"])
def test_what_a_snapshot_has_made_stays_until_it_is_removed(lives, job):
    qmp = lives.begin()
    paths = [snapshot(lives, qmp, name) for name in ("s1", "s2", "s3")]
    if job == "stream":
        qmp.cmd("block-stream", device="s3", base_node="s1", job_id="j")
        qmp.complete("j")
    elif job == "commit":
        commit(qmp, "s2", "s1")
    else:
        commit(qmp, "s3", "s1", active=True)
    left = ["s3", "s2"] if job == "active" else ["s2"]
    qmp.cmd("blockdev-add", **options(lives, "x", left[0]))
    assert chain(qmp, "x")[1] == left[0]
    qmp = is_kept(lives, qmp)
    for name in ["x", *left]:
        qmp.cmd("blockdev-del", node_name=name)
        qmp = is_kept(lives, qmp, times=1)
        assert name not in nodes(qmp)
    for path in paths[1:]:
        if path.stem in left:
            path.unlink()
    is_kept(lives, qmp)


def test_a_covered_node_that_is_removed(lives):
    """What was put on top of it is there without it."""
    qmp = lives.begin()
    snapshot(lives, qmp, "s1")
    qmp.cmd("block-stream", device="s1", job_id="j")
    qmp.complete("j")
    for name in ("n1", "n0"):
        qmp.cmd("blockdev-del", node_name=name)
    qmp.cmd("blockdev-add", **options(lives, "x", "s1"))
    qmp = is_kept(lives, qmp)
    assert named(qmp) == {"s1": ["s1"], "x": ["x", "s1"]} and served(qmp) == {"drive0": "s1"}


def test_an_image_that_was_let_go_of_is_read_as_before(lives):
    """Its node was there before it was put on top: its options say that nothing is under it."""
    qmp = lives.begin()
    qmp.cmd("blockdev-add", **options(lives, "x", None))
    qmp.cmd("blockdev-snapshot", node="n1", overlay="x")
    snapshot(lives, qmp, "s1")
    qmp.cmd("block-stream", device="s1", job_id="j")
    qmp.complete("j")
    assert chain(qmp, "x") == ["x", "n1", "n0"]
    qmp = is_kept(lives, qmp)
    assert patterns(lives, qmp, "x")[:3] == [1, 2, 0]


def test_an_image_that_was_streamed_and_is_put_on_top_again(lives):
    """What was recorded to lie under it is not what does."""
    qmp = lives.begin()
    snapshot(lives, qmp, "s1")
    qmp.cmd("block-stream", device="s1", job_id="j")
    qmp.complete("j")
    remove_export(qmp)
    qmp.cmd("blockdev-snapshot", node="n1", overlay="s1")
    add_export(lives, qmp, "s1")
    is_kept(lives, qmp)


def test_a_guest_that_was_put_back_stays_there(lives):
    """A client has put it on the image below, whatever is recorded to be on top of that."""
    qmp = lives.begin()
    path = snapshot(lives, qmp, "s1")
    remove_export(qmp)
    qmp.cmd("blockdev-del", node_name="s1")
    path.unlink()
    qmp = is_kept(lives, qmp)
    add_export(lives, qmp, "n1")
    qmp = is_kept(lives, qmp)
    assert served(qmp) == {"drive0": "n1"}


def test_a_guest_that_has_gone_on_several_times(lives):
    """To a base, to what was put on top of it, to a base below, and up again."""
    qmp = lives.begin()
    snapshot(lives, qmp, "s1")
    commit(qmp, "s1", "n1", active=True)
    qmp.cmd("blockdev-del", node_name="s1")
    snapshot(lives, qmp, "s2")
    commit(qmp, "s2", "n0", active=True)
    for name in ("s2", "n1"):
        qmp.cmd("blockdev-del", node_name=name)
    snapshot(lives, qmp, "s3")
    qmp = is_kept(lives, qmp)
    assert served(qmp) == {"drive0": "s3"} and chain(qmp, "s3") == ["s3", "n0"]


@pytest.mark.parametrize("first", [False, True])
def test_a_guest_whose_images_are_gone_but_for_the_last(lives, first):
    """By a commit, a snapshot and a stream, or by a snapshot before all of them."""
    qmp = lives.begin()
    if first:
        snapshot(lives, qmp, "s0")
    commit(qmp, served(qmp)["drive0"], "n0", active=True)
    for name in ["s0", "n1"] if first else ["n1"]:
        qmp.cmd("blockdev-del", node_name=name)
    snapshot(lives, qmp, "s1")
    qmp.cmd("block-stream", device="s1", job_id="j")
    qmp.complete("j")
    qmp.cmd("blockdev-del", node_name="n0")
    qmp = is_kept(lives, qmp)
    assert named(qmp) == {"s1": ["s1"]} and served(qmp) == {"drive0": "s1"}


def test_an_image_that_nobody_has_named_goes_with_its_last_user(lives):
    """After a commit, in this process or the next one; its file is free then."""
    for again in (False, True):
        qmp = lives.begin() if not again else lives.again()
        before = set(nodes(qmp))
        path = snapshot(lives, qmp, f"u{again}", unnamed=True)
        overlay = served(qmp)["drive0"]
        assert overlay.startswith("#")
        refused = qmp.refused("blockdev-del", node_name=overlay)
        assert "in use" in refused[1] or "busy" in refused[1]
        if again:
            qmp = lives.again()
        commit(qmp, served(qmp)["drive0"], "n1", active=True)
        qmp.poll("its node goes", lambda: all(n["file"] != str(path) for n in nodes(qmp).values()))
        assert served(qmp) == {"drive0": "n1"}
        if not again:
            assert set(nodes(qmp)) == before
        path.unlink()
        qmp = is_kept(lives, qmp)
        lives.kill()
        lives.begin()


def test_an_image_that_nobody_has_named_goes_with_its_export(lives):
    """The one below can be removed then, for good."""
    qmp = lives.begin()
    path = snapshot(lives, qmp, "u", unnamed=True)
    qmp = lives.again()
    remove_export(qmp)
    qmp.poll("its node goes", lambda: all(n["file"] != str(path) for n in nodes(qmp).values()))
    qmp = is_kept(lives, qmp)
    assert all(node["file"] != str(path) for node in nodes(qmp).values())
    qmp.cmd("blockdev-del", node_name="n1")
    is_kept(lives, qmp)


def test_nodes_over_an_image_that_nobody_has_named(lives):
    """It is there for them, over what it was put on top of."""
    qmp = lives.begin()
    snapshot(lives, qmp, "u", unnamed=True)
    snapshot(lives, qmp, "s1")
    middle = chain(qmp, "s1")[1]
    assert middle.startswith("#")
    qmp.cmd("blockdev-add", **options(lives, "x", middle))
    qmp = lives.again()
    assert served(qmp) == {"drive0": "s1"} and chain(qmp, "s1")[2:] == ["n1", "n0"]
    assert chain(qmp, "x")[2:] == ["n1", "n0"]
    assert patterns(lives, qmp, "x")[:3] == [1, 2, 0]


def test_an_export_of_a_node_that_cannot_be_found_again_is_refused(lives):
    qmp = lives.begin()
    snapshot(lives, qmp, "u", unnamed=True)
    overlay = served(qmp)["drive0"]
    addr = {"type": "unix", "path": str(lives.scene.folder / "other.sock")}
    refused = qmp.refused(
        "block-export-add", type="vhost-user-blk", id="other", node_name=overlay, addr=addr
    )
    assert "no name of a client's" in refused[1]
