"""`--state`: what lies under images, and which images records are about.

What would be caught: layers that were streamed away and come back, because a
record was dropped, or is about another image than the one that has its path; a
start that is refused though nothing differs; a failed flush that an image leaves
behind when it is moved.
"""

import fcntl
import json
import os
import random
import shutil

import pytest

from harness import images
from harness.daemon import blockdev, export
from harness.images import MIB
from harness.lives import Lives, identity, stream
from harness.scene import SLOW, Scene, make_scene, serve

pytestmark = pytest.mark.beyond_qsd("has no --state")


@pytest.fixture
def lives(daemon, tmp_path, seed):
    return Lives(daemon, make_scene(tmp_path / "chain", seed=seed), tmp_path / "state")


def below(qmp, node="n2"):
    """The nodes in a node's chain that are under it."""
    nodes = {n["node-name"]: n for n in qmp.cmd("query-named-block-nodes", flat=True)}
    found = []
    while True:
        children = nodes[node].get("children", [])
        node = next((c["node-name"] for c in children if c["child"] == "backing"), None)
        if node is None:
            return found
        found.append(node)


def completed(qmp, **words):
    stream(qmp, **words)
    assert "error" not in qmp.complete("j")


def nested(lives):
    """The words for the same chain with the lower layers written inside the top one."""
    node = None
    for number, path in enumerate(lives.scene.layers):
        above = {"driver": "qcow2", "node-name": f"n{number}"}
        above["file"] = {"driver": "file", "filename": str(path)}
        node = {**above, **({"backing": node} if node else {})}
    words = ["--blockdev", json.dumps(node)]
    words += export("n2", "drive0", lives.scene.folder / "drive0.sock")
    return [*words, "--state", lives.folder]


def test_options_of_an_earlier_start_bring_no_layer_back(lives):
    """A start in between went by the header."""
    completed(lives.begin(), base_node="n0")
    lives.kill()
    words = [*blockdev(lives.scene.top, "n2")]
    words += export("n2", "drive0", lives.scene.folder / "drive0.sock")
    qmp = lives.begin(*words, "--state", lives.folder)
    assert len(below(qmp)) == 1
    completed(qmp)
    qmp = lives.again()
    assert below(qmp) == []
    lives.daemon.stop()
    images.stands_alone(lives.scene.top, lives.scene.seen)


def unrecorded(lives, qmp, done, **words):
    """Bring a stream to its end; the record is as if a kill had come right before that."""
    stream(qmp, auto_finalize=False, **words)
    qmp.wait_event("BLOCK_JOB_PENDING", id="j")
    state = lives.record()
    qmp.cmd("job-finalize", id="j")
    if words.get("auto_dismiss", True):
        qmp.complete("j")
    else:
        qmp.wait_status("j", "concluded")
    after = lives.record()
    lives.kill()
    [job] = state["jobs"]
    links = [link for link in after["links"] if link["node"] == job["work"]["target"]]
    links += [other["commit"]["link"] for other in after["jobs"]]
    job["commit"] = {"link": links[0], "done": done}
    lives.write(state)
    return state


@pytest.mark.parametrize("done", [False, True])
def test_a_chain_under_an_image_that_was_let_go_of(lives, done):
    """What is recorded of it does not keep the daemon from starting."""
    lives.words = nested(lives)
    qmp = lives.begin()
    completed(qmp, device="n1")
    assert lives.record()["links"]
    unrecorded(lives, qmp, done)
    for _ in range(2):
        qmp = lives.begin()
        qmp.poll("the job is gone", lambda: qmp.cmd("query-jobs") == [])
        assert below(qmp) == []
        lives.kill()
    images.stands_alone(lives.scene.top, lives.scene.seen)


def test_a_chain_that_was_changed_after_a_job_had_concluded_is_refused(lives):
    """Though a kill came before the record said that the header was changed."""
    unrecorded(lives, lives.begin(), False, auto_dismiss=False)
    qmp = lives.begin()
    assert qmp.job("j")["status"] == "concluded"
    lives.kill()
    layer = lives.scene.layers[1]
    images.qemu_img("rebase", "-u", "-b", layer, "-F", "qcow2", lives.scene.top)
    assert "something else has changed the image" in lives.refused()


def made_anew(path, size):
    """Another image under the same path."""
    path.rename(f"{path}.old")
    return images.create(path, size)


def restored(path, _):
    """A copy under the same path."""
    path.rename(f"{path}.old")
    shutil.copy(f"{path}.old", path)


@pytest.mark.parametrize("replace", [made_anew, restored])
def test_another_file_under_the_path_of_a_recorded_image_is_refused(lives, replace):
    top = lives.scene.top
    old = identity(top)
    completed(lives.begin())
    lives.kill()
    replace(top, 8 * MIB)
    said = lives.refused()
    for word in (str(top), "another file", str(lives.file()), str(old[0])):
        assert word in said, said
    # The one that is meant may come back.
    top.with_name(f"{top.name}.old").rename(top)
    assert below(lives.begin()) == []


def test_another_file_under_the_path_of_a_job_s_image_is_refused(lives):
    top = lives.scene.top
    stream(lives.begin(), speed=SLOW)
    lives.kill()
    restored(top, None)
    said = lives.refused()
    assert str(top) in said and "another file" in said and "'j'" in said, said


def mark(lives, layer):
    """Record that a flush of a layer's file has failed."""
    failed = {"file": str(layer), "identity": identity(layer), "errno": 5, "at": 1795424733}
    lives.write({"links": [], "jobs": [], "next-job": 0, "failed-syncs": [failed]})


def moved(lives):
    """Give the top image another path, and return words that say so."""
    top = lives.scene.top
    lives.scene.layers[-1] = top.rename(top.with_name("moved.qcow2"))
    return [*serve(lives.scene.layers, lives.scene.folder), "--state", lives.folder]


@pytest.mark.parametrize("another", [False, True])
def test_a_failed_flush_goes_with_the_image(lives, another):
    top = lives.scene.top
    mark(lives, top)
    words = moved(lives)
    if another:
        images.create(top, "1M")
    qmp = lives.begin(*words)
    stream(qmp, auto_dismiss=False)
    qmp.wait_status("j", "concluded")
    assert "a flush failed at" in qmp.job("j")["error"]
    assert lives.record()["failed-syncs"]
    qmp.cmd("x-clear-sync-error", device="n2")
    assert lives.record()["failed-syncs"] == []
    qmp.cmd("job-dismiss", id="j")
    lives.kill()
    completed(lives.begin(*words), base_node="n0")


def test_a_failed_flush_of_a_file_that_is_not_served_is_kept(lives):
    other = images.create(lives.scene.folder / "other.qcow2", "1M")
    mark(lives, other)
    other.rename(other.with_name("away"))
    lives.begin()
    assert "a failed flush is recorded of" in lives.daemon.read_log()
    assert lives.record()["failed-syncs"]


def test_a_failed_flush_of_another_file_under_the_path_is_refused(lives):
    top = lives.scene.top
    mark(lives, top)
    restored(top, None)
    said = lives.refused()
    assert "another file" in said and "clear-error" in said and str(top) in said, said


def over_a_window(folder, seed, named):
    """A chain over a part of a file, its words, and what a guest sees of it."""
    rng = random.Random(seed)
    whole = folder / "whole.raw"
    whole.write_bytes(rng.randbytes(10 * MIB))
    layers = []
    for name in ("mid", "top"):
        layers.append(images.create(folder / f"{name}.qcow2", 8 * MIB))
        images.scribble(layers[-1], 8 * MIB, rng)
    words, node = [], None
    for path in (whole, *layers):
        file = {"driver": "file", "filename": str(path)}
        if named:
            number = len(words) // 4
            words += ["--blockdev", json.dumps({**file, "node-name": f"f{number}"})]
            file = f"f{number}"
        node, below = {"driver": "qcow2", "file": file}, node
        if path == whole:
            node = {"driver": "raw", "file": file, "offset": MIB, "size": 8 * MIB}
        elif below:
            node["backing"] = below
        if named:
            words += ["--blockdev", json.dumps({**node, "node-name": f"n{number}"})]
            node = f"n{number}"
    if not named:
        words = ["--blockdev", json.dumps({**node, "node-name": "n2"})]
    words += export("n2", "drive0", folder / "drive0.sock")
    plain = None
    for path in (whole, *layers):
        file = {"driver": "file", "filename": str(path)}
        window = {"driver": "raw", "file": file, "offset": MIB, "size": 8 * MIB}
        plain = {"driver": "qcow2", "file": file, "backing": plain} if plain else window
    seen = folder / "seen.raw"
    images.qemu_img("convert", "-O", "raw", "json:" + json.dumps(plain), seen)
    return Scene(folder, layers, seen, words)


@pytest.mark.parametrize("named", [False, True])
def test_a_base_that_is_a_part_of_a_file(daemon, tmp_path, seed, named):
    lives = Lives(daemon, over_a_window(tmp_path, seed, named), tmp_path / "state")
    qmp = lives.begin()
    base = below(qmp)[-1]
    stream(qmp, base_node=base, speed=SLOW)
    qmp = lives.again()
    assert qmp.job("j")["speed"] == SLOW
    qmp.cmd("block-job-set-speed", device="j", speed=0)
    assert "error" not in qmp.complete("j")
    for _ in range(2):
        qmp = lives.again()
        assert qmp.cmd("query-jobs") == []
        nodes = {n["node-name"]: n for n in qmp.cmd("query-named-block-nodes", flat=True)}
        [base] = below(qmp)
        assert nodes[base]["drv"] == "raw" and (not named or base == "n0")
    lives.kill()
    images.same(lives.scene.top, lives.scene.seen)
    completed(lives.begin())
    assert below(lives.again()) == []
    lives.daemon.stop()
    images.stands_alone(lives.scene.top, lives.scene.seen)


def served(lives, *options):
    """Words for nodes with these options, of which `n2` is served."""
    words = [word for node in options for word in ("--blockdev", json.dumps(node))]
    words += export(options[-1]["node-name"], "drive0", lives.scene.folder / "drive0.sock")
    return [*words, "--state", lives.folder]


def qcow2(name, path, backing=None):
    file = {"driver": "file", "filename": str(path)}
    node = {"driver": "qcow2", "node-name": name, "file": file}
    return {**node, **({"backing": backing} if backing else {})}


def took_in_all(lives):
    """Stream into the middle layer, then into the top one, each to the bottom; kill."""
    scene = lives.scene
    words = serve(scene.layers, scene.folder, writable=(1,))
    qmp = lives.begin(*words, "--state", lives.folder)
    completed(qmp, device="n1")
    completed(qmp)
    lives.kill()


def elsewhere(path, how):
    """Another path of a file."""
    new = path.parent / "new"
    if how == "linked":
        new.exists() or new.symlink_to(path.parent)
    else:
        new.mkdir(exist_ok=True)
        path.rename(new / path.name)
    return new / path.name


@pytest.mark.parametrize("how", ["moved", "linked"])
@pytest.mark.parametrize("between", [False, True])
def test_what_lies_under_an_image_does_so_under_any_path(lives, how, between):
    """Of one that a stream has let go of since, as of any other; whatever is served between."""
    took_in_all(lives)
    if between:
        lives.begin()
        lives.kill()
    layers = lives.scene.layers
    for number in (1, 2):
        layers[number] = elsewhere(layers[number], how)
        node = f"n{number}"
        nodes = (qcow2("n0", layers[0]), qcow2(node, layers[number], "n0"))
        assert below(lives.begin(*served(lives, *nodes)), node) == []
        lives.kill()


def test_another_image_under_the_path_of_one_that_was_let_go_of(lives):
    """A new one is no matter of the record; what may be a copy of the old one is."""
    took_in_all(lives)
    bottom, mid, _ = lives.scene.layers
    restored(mid, None)
    words = served(lives, qcow2("n0", bottom), qcow2("n1", mid, "n0"))
    assert "another file" in lives.refused(*words)
    mid.unlink()
    images.create(mid, backing=bottom)
    assert below(lives.begin(*words), "n1") == ["n0"]


def test_records_of_images_that_are_not_served_stay(lives):
    """A disk that is left out keeps nobody from starting, and has its record when it is back."""
    other = images.create(lives.scene.folder / "other.qcow2", 8 * MIB)
    completed(lives.begin())
    stands = lives.record()
    lives.kill()
    words = served(lives, qcow2("other", other))
    for _ in range(2):
        lives.begin(*words)
        assert "is not served" in lives.daemon.read_log()
        assert lives.record()["links"] == stands["links"]
        lives.kill()
    assert below(lives.begin()) == []


def test_a_job_of_a_disk_that_is_left_out_stays(lives):
    other = images.create(lives.scene.folder / "other.qcow2", 8 * MIB)
    stream(lives.begin(), speed=SLOW)
    lives.kill()
    qmp = lives.begin(*served(lives, qcow2("other", other)))
    assert "'j'" in lives.daemon.read_log() and qmp.cmd("query-jobs") == []
    assert [job["id"] for job in lives.record()["jobs"]] == ["j"]
    lives.daemon.stop()
    assert lives.begin().job("j")["speed"] == SLOW


def as_neighbour(lives):
    """Give the record another name."""
    lives.file().rename(lives.file("other"))
    return [*lives.words, "--state-name", "second"]


def test_a_neighbour_s_chain_that_is_opened_as_it_is_recorded(lives):
    completed(lives.begin())
    lives.kill()
    words = as_neighbour(lives)
    assert "--state-name=other" in lives.refused(*words)
    words = [*served(lives, qcow2("n2", lives.scene.top)), "--state-name", "second"]
    assert below(lives.begin(*words)) == []


@pytest.mark.parametrize("how", ["mode", "owner"])
def test_a_neighbour_is_heard_for_all_permissions(lives, how):
    stream(lives.begin(), speed=SLOW)
    lives.kill()
    words = as_neighbour(lives)
    path = lives.file("other")
    if how == "mode":
        path.chmod(0o666)
    elif os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    said = lives.refused(*words)
    assert "records a job" in said, said


def test_a_failed_flush_that_a_neighbour_records_is_heard(lives):
    mark(lives, lives.scene.layers[1])
    words = as_neighbour(lives)
    said = lives.refused(*words)
    for word in ("failed flush", str(lives.scene.layers[1]), "clear-error", "--state-name=other"):
        assert word in said, said
    # A daemon that runs sees to it itself.
    with open(lives.folder / "other.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lives.begin(*words)


@pytest.mark.parametrize("changed", [False, True])
def test_the_header_decides_what_a_failed_change_of_it_has_left(lives, changed):
    """A result that may be in force is, where the header says so, whatever the words are."""
    old = images.backing(lives.scene.top)
    state = unrecorded(lives, lives.begin(), False)
    [job] = state["jobs"]
    job["id"], job["auto-dismiss"] = "#0", True
    job["end"] = {"error": "no", "len": 0, "offset": 0, "copied": 0}
    lives.write(state)
    if not changed:
        images.qemu_img("rebase", "-u", "-b", old, "-F", "qcow2", lives.scene.top)
    qmp = lives.begin()
    assert below(qmp) == ([] if changed else ["n1", "n0"])
    assert qmp.cmd("query-jobs") == []
    record = lives.record()
    assert record["jobs"] == [] and len(record["links"]) == int(changed)
    assert below(lives.again()) == ([] if changed else ["n1", "n0"])
