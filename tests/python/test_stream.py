"""Stream jobs: what is copied, what the header says afterwards, and what is left alone.

Each test ends with what qemu-img finds in the image files, not with what the
daemon says of them.
"""

import time

import pytest

from harness import images
from harness.daemon import blockdev, export
from harness.images import CLUSTER, KIB, MIB
from harness.scene import SLOW, make_scene, serve


@pytest.fixture
def scene(tmp_path, seed):
    return make_scene(tmp_path, layers=3, seed=seed)


@pytest.fixture
def qmp(daemon, scene):
    daemon.start(*scene.words)
    return daemon.qmp()


def test_whole_chain(daemon, scene, qmp):
    """Without a base, everything moves up and the top needs no one below.

    Catches a cluster that was not copied, and a header that still points down.
    """
    qmp.cmd("block-stream", device=scene.top_node, job_id="j")
    done = qmp.complete("j")
    assert done["len"] == 8 * MIB and done["type"] == "stream"
    assert qmp.cmd("query-block-jobs") == []
    daemon.stop()
    for layer in scene.layers[:-1]:
        layer.unlink()
    images.stands_alone(scene.top, scene.seen)


def test_lower_layers_stay_as_they_are(daemon, scene, qmp):
    """A stream only reads what lies below. Catches a write to a wrong layer."""
    before = [layer.read_bytes() for layer in scene.layers[:-1]]
    qmp.cmd("block-stream", device=scene.top_node, job_id="j")
    qmp.complete("j")
    daemon.stop()
    assert [layer.read_bytes() for layer in scene.layers[:-1]] == before


@pytest.mark.parametrize("how", ["base", "base-node", "bottom"])
def test_partial(daemon, scene, qmp, how):
    """Down to a base: the layer between is no longer needed, the base is.

    Catches copying from the base itself, and a header pointing elsewhere.
    """
    target = {
        "base": {"base": str(scene.layers[0])},
        "base-node": {"base_node": "n0"},
        "bottom": {"bottom": "n1"},
    }[how]
    qmp.cmd("block-stream", device="n2", job_id="j", **target)
    qmp.complete("j")
    daemon.stop()
    assert scene.backing_of(2) == scene.layers[0]
    scene.layers[1].unlink()
    images.check(scene.top)
    images.same(scene.top, scene.seen)
    # Only what the layer between had was copied: far less than the whole.
    assert images.allocated(scene.top) < images.allocated(scene.layers[0])


def test_middle_layer(daemon, tmp_path, seed):
    """Any layer can be streamed into, also one that another stands on."""
    scene = make_scene(tmp_path / "four", layers=4, seed=seed, writable=[2])
    below = images.flatten(scene.layers[2], tmp_path / "below.raw")
    daemon.start(*scene.words)
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n2", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(scene.layers[2], below)
    assert scene.backing_of(3) == scene.layers[2]
    images.check(scene.top)
    images.same(scene.top, scene.seen)


def test_two_levels_at_once(daemon, tmp_path, seed):
    """Two jobs in one chain, on ranges of layers that do not touch."""
    scene = make_scene(tmp_path / "five", layers=5, seed=seed, writable=[2])
    daemon.start(*scene.words)
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n4", job_id="upper", base_node="n2", speed=SLOW)
    qmp.cmd("block-stream", device="n2", job_id="lower", base_node="n0", speed=SLOW)
    assert {j["device"] for j in qmp.cmd("query-block-jobs")} == {"upper", "lower"}
    qmp.cmd("block-job-set-speed", device="lower", speed=0)
    qmp.complete("lower")
    qmp.cmd("block-job-set-speed", device="upper", speed=0)
    qmp.complete("upper")
    daemon.stop()
    assert scene.backing_of(4) == scene.layers[2]
    assert scene.backing_of(2) == scene.layers[0]
    scene.layers[3].unlink()
    scene.layers[1].unlink()
    for layer in (scene.layers[2], scene.top):
        images.check(layer)
    images.same(scene.top, scene.seen)


def test_two_exports(daemon, tmp_path, seed):
    """Jobs of two devices run side by side and end each for itself."""
    one = make_scene(tmp_path / "one", layers=2, seed=seed, prefix="a-", drive="one")
    two = make_scene(tmp_path / "two", layers=2, seed=seed + 1, prefix="b-", drive="two")
    daemon.start(*one.words, *two.words)
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="a-n1", job_id="ja", speed=SLOW)
    qmp.cmd("block-stream", device="b-n1", job_id="jb", speed=SLOW)
    assert len(qmp.cmd("query-block-jobs")) == 2
    qmp.cmd("block-job-set-speed", device="jb", speed=0)
    qmp.complete("jb")
    assert [j["device"] for j in qmp.cmd("query-block-jobs")] == ["ja"]
    qmp.cmd("block-job-set-speed", device="ja", speed=0)
    qmp.complete("ja")
    daemon.stop()
    images.stands_alone(one.top, one.seen)
    images.stands_alone(two.top, two.seen)


def test_cancel_and_start_again(daemon, scene, qmp):
    """A cancelled job keeps what it copied and the backing file; the next one ends it."""
    before = images.allocated(scene.top)
    qmp.cmd("block-stream", device="n2", job_id="j", speed=256 * KIB)
    qmp.reached("j", 512 * KIB)
    qmp.cmd("block-job-cancel", device="j")
    name, data = qmp.job_done("j")
    assert name == "BLOCK_JOB_CANCELLED"
    assert data["offset"] < data["len"] == 8 * MIB
    assert qmp.cmd("query-block-jobs") == []
    assert scene.backing_of(2) == scene.layers[1]

    qmp.cmd("block-stream", device="n2", job_id="j")
    qmp.complete("j")
    daemon.stop()
    assert images.allocated(scene.top) > before
    images.stands_alone(scene.top, scene.seen)


def test_cancelled_image_is_whole(daemon, scene, qmp):
    """After a cancel and an end, the chain reads as before and is clean."""
    before = images.allocated(scene.top)
    qmp.cmd("block-stream", device="n2", job_id="j", speed=256 * KIB)
    qmp.reached("j", 1 * MIB)
    qmp.cmd("block-job-cancel", device="j", force=True)
    assert qmp.job_done("j")[0] == "BLOCK_JOB_CANCELLED"
    daemon.stop()
    assert scene.backing_of(2) == scene.layers[1]
    assert images.allocated(scene.top) > before
    images.check(scene.top)
    images.same(scene.top, scene.seen)


def test_speed_and_its_query(daemon, scene, qmp):
    qmp.cmd("block-stream", device="n2", job_id="j", speed=SLOW)
    assert qmp.job("j")["speed"] == SLOW
    qmp.cmd("block-job-set-speed", device="j", speed=8 * KIB)
    assert qmp.job("j")["speed"] == 8 * KIB
    qmp.cmd("block-job-cancel", device="j")
    qmp.job_done("j")
    # A new job knows nothing of the old one's speed.
    qmp.cmd("block-stream", device="n2", job_id="j", auto_finalize=False)
    qmp.wait_status("j", "pending")
    assert qmp.job("j")["speed"] == 0
    qmp.cmd("job-finalize", id="j")
    qmp.complete("j")


@pytest.mark.parametrize("speed", [0, 1 << 40])
def test_raised_speed_wakes_at_once(daemon, scene, qmp, speed):
    """A job at one byte a second sleeps for days; a higher speed ends that."""
    qmp.cmd("block-stream", device="n2", job_id="j", speed=1)
    qmp.cmd("block-job-set-speed", device="j", speed=speed)
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(scene.top, scene.seen)


@pytest.mark.beyond_qsd("copies half a megabyte at once and sleeps afterwards")
def test_never_faster_than_asked(daemon, tmp_path, rng):
    """At any moment: no more than the rate times the time, and one burst.

    The clock starts before the command is sent and is read after an answer
    came, so a slow machine can only make the bound looser.
    """
    base = images.random_image(tmp_path / "base.qcow2", 8 * MIB, rng, holes=0)
    top = images.create(tmp_path / "top.qcow2", backing=base.name)
    daemon.start(*serve([base, top], tmp_path))
    qmp = daemon.qmp()
    speed = 512 * KIB
    burst = max(speed // 10, CLUSTER)
    begun = time.monotonic()
    qmp.cmd("block-stream", device="n1", job_id="j", speed=speed)
    last = 0
    while True:
        offset = qmp.job("j")["offset"]
        passed = time.monotonic() - begun
        assert offset <= speed * passed + burst, (offset, passed)
        assert offset >= last, "progress went back"
        assert offset - last <= 512 * KIB, "progress in steps that are too long"
        last = offset
        if offset >= 2 * MIB:
            break
    qmp.cmd("block-job-cancel", device="j")
    qmp.job_done("j")


def test_skipped_ranges_cost_nothing(daemon, tmp_path, rng):
    """At a byte per second a job still passes what is in the top, or nowhere."""
    base = images.random_image(tmp_path / "base.qcow2", 8 * MIB, rng, holes=1)
    top = images.create(tmp_path / "top.qcow2", backing=base.name)
    images.qemu_io(top, f"write -P 7 0 {4 * MIB}")
    seen = images.flatten(top)
    daemon.start(*serve([base, top], tmp_path))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j", speed=1)
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(top, seen)


def test_pause_and_resume(daemon, scene, qmp):
    """A paused job does not move, whatever its speed; a resumed one goes on."""
    qmp.cmd("block-stream", device="n2", job_id="j", speed=SLOW)
    qmp.cmd("block-job-pause", device="j")
    qmp.poll("the pause", lambda: qmp.job("j")["status"] == "paused")
    job = qmp.job("j")
    assert job["paused"] is True and job["busy"] is False
    stood = job["offset"]
    # With no limit left it would be at the end in a moment, were it running.
    qmp.cmd("block-job-set-speed", device="j", speed=0)
    assert qmp.job("j")["offset"] == stood
    qmp.cmd("block-job-resume", device="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(scene.top, scene.seen)


def test_job_family(daemon, scene, qmp):
    """The job-* commands do the same to the same job."""
    qmp.cmd("block-stream", device="n2", job_id="j", speed=SLOW)
    [job] = qmp.cmd("query-jobs")
    assert job["id"] == "j" and job["type"] == "stream" and job["status"] == "running"
    assert job["total-progress"] >= job["current-progress"]
    qmp.cmd("job-pause", id="j")
    qmp.poll("the pause", lambda: qmp.cmd("query-jobs")[0]["status"] == "paused")
    qmp.cmd("job-resume", id="j")
    qmp.poll("the end of it", lambda: qmp.cmd("query-jobs")[0]["status"] == "running")
    qmp.cmd("job-cancel", id="j")
    assert qmp.job_done("j")[0] == "BLOCK_JOB_CANCELLED"


def test_query_block_jobs_members(daemon, scene, qmp):
    """Every member that a client may lean on is there, and of its type."""
    qmp.cmd("block-stream", device="n2", job_id="j", speed=SLOW)
    job = qmp.job("j")
    expected = {
        "device": "j", "type": "stream", "len": 8 * MIB, "paused": False, "speed": SLOW,
        "io-status": "ok", "ready": False, "status": "running",
        "auto-finalize": True, "auto-dismiss": True,
    }  # fmt: skip
    assert {key: job[key] for key in expected} == expected
    assert isinstance(job["busy"], bool) and isinstance(job["offset"], int)
    qmp.cmd("block-job-cancel", device="j")
    qmp.job_done("j")


def test_backing_file_name(daemon, scene, qmp):
    """`backing-file` is what the header gets, byte for byte."""
    qmp.cmd("block-stream", device="n2", job_id="j", base_node="n0", backing_file="./layer0.qcow2")
    qmp.complete("j")
    daemon.stop()
    assert images.backing(scene.top) == "./layer0.qcow2"
    images.same(scene.top, scene.seen)


def test_nothing_to_do(daemon, tmp_path, rng):
    """An image with no backing file: a job that ends well at once."""
    image = images.random_image(tmp_path / "alone.qcow2", 2 * MIB, rng)
    seen = images.flatten(image)
    daemon.start(*blockdev(image, "n0"), *export("n0", "drive0", tmp_path / "s"))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n0", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(image, seen)


@pytest.mark.parametrize("top_size, base_size", [(8, 4), (4, 8)], ids=["longer", "shorter"])
def test_sizes_differ(daemon, tmp_path, rng, top_size, base_size):
    """A longer top reads zeros past its base; a shorter one is streamed alone.

    Catches an error at the base's end, and bytes from past the top's.
    """
    base = images.random_image(tmp_path / "base.qcow2", base_size * MIB, rng, holes=0.2)
    top = images.create(tmp_path / "top.qcow2", top_size * MIB, backing=base.name)
    images.scribble(top, top_size * MIB, rng)
    seen = images.flatten(top)
    daemon.start(*serve([base, top], tmp_path))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    assert qmp.complete("j")["len"] == top_size * MIB
    daemon.stop()
    images.stands_alone(top, seen)


def test_base_ends_within_a_cluster(daemon, tmp_path, rng):
    """A raw base whose length is no multiple of a cluster: the rest is zeros."""
    base = tmp_path / "base.raw"
    base.write_bytes(rng.randbytes(3 * MIB + 5 * 512))
    top = images.create(
        tmp_path / "top.qcow2", 4 * MIB + 512, backing=base.name, backing_format="raw"
    )
    seen = images.flatten(top)
    words = blockdev(base, "n0", format="raw", read_only="on")
    words += blockdev(top, "n1", backing="n0") + export("n1", "drive0", tmp_path / "s")
    daemon.start(*words)
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(top, seen)


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 2 * MIB])
def test_cluster_sizes_differ(daemon, tmp_path, rng, cluster):
    """Small clusters over larger ones, and large over smaller: nothing is lost between."""
    base = images.random_image(tmp_path / "base.qcow2", 6 * MIB, rng)
    top = images.create(
        tmp_path / "top.qcow2", backing=base.name, options=f"cluster_size={cluster}"
    )
    images.scribble(top, 6 * MIB, rng)
    seen = images.flatten(top)
    daemon.start(*serve([base, top], tmp_path))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(top, seen)


def test_compressed_base(daemon, tmp_path, rng):
    """Compressed clusters are read, and land uncompressed in the top."""
    plain = images.random_image(tmp_path / "plain.qcow2", 4 * MIB, rng)
    images.qemu_io(plain, f"write -P 5 1M {MIB}")
    base = tmp_path / "base.qcow2"
    images.qemu_img("convert", "-c", "-f", "qcow2", "-O", "qcow2", plain, base)
    top = images.create(tmp_path / "top.qcow2", backing=base.name)
    seen = images.flatten(top)
    daemon.start(*serve([base, top], tmp_path))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(top, seen)


def test_zeros_over_data(daemon, tmp_path, rng):
    """A zero cluster in the top hides data below for ever, also after the stream."""
    base = images.random_image(tmp_path / "base.qcow2", 2 * MIB, rng, holes=0)
    top = images.create(tmp_path / "top.qcow2", backing=base.name)
    images.qemu_io(top, f"write -z 0 {CLUSTER * 3}", f"write -z -u 1M {CLUSTER}")
    seen = images.flatten(top)
    daemon.start(*serve([base, top], tmp_path))
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(top, seen)


@pytest.mark.beyond_qsd("looks for zeros in its copy buffer as a whole")
def test_zeros_are_found_per_cluster(daemon, tmp_path):
    """4 KiB of data in every 512 KiB of base cost one cluster each, not eight."""
    size, step = 8 * MIB, 512 * KIB
    base = tmp_path / "base.raw"
    # Written zeros, not holes: only a look at the bytes can find them.
    data = bytearray(size)
    for offset in range(0, size, step):
        data[offset : offset + 4096] = b"\x5a" * 4096
    base.write_bytes(data)
    top = images.create(tmp_path / "top.qcow2", backing=base.name, backing_format="raw")
    seen = images.flatten(top)
    words = blockdev(base, "n0", format="raw", read_only="on")
    words += blockdev(top, "n1", backing="n0") + export("n1", "drive0", tmp_path / "s")
    daemon.start(*words)
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    daemon.stop()
    images.stands_alone(top, seen)
    assert images.allocated(top) == size // step * CLUSTER


@pytest.mark.beyond_qsd("knows nodes only")
class TestByExport:
    """`device` may name an export; the job is then called after it."""

    def test_id_of_an_export(self, daemon, scene, qmp):
        qmp.cmd("block-stream", device="drive0", speed=SLOW)
        assert [j["device"] for j in qmp.cmd("query-block-jobs")] == ["drive0"]
        qmp.cmd("block-job-set-speed", device="drive0", speed=0)
        qmp.complete("drive0")
        daemon.stop()
        images.stands_alone(scene.top, scene.seen)

    def test_top_node_of_an_export(self, daemon, scene, qmp):
        """Named by its top node, the job's id is still the export's."""
        qmp.cmd("block-stream", device="n2", speed=SLOW)
        assert [j["device"] for j in qmp.cmd("query-block-jobs")] == ["drive0"]
        qmp.cmd("block-job-cancel", device="drive0")
        qmp.job_done("drive0")

    def test_names_of_2011(self, daemon, scene, qmp):
        """The first clients of streaming still find what they know."""
        qmp.cmd("block_stream", device="drive0", base=str(scene.layers[0]))
        qmp.complete("drive0")
        assert scene.backing_of(2) == scene.layers[0]
        qmp.cmd("block_stream", device="drive0", speed=SLOW)
        qmp.cmd("block_job_set_speed", device="drive0", value=32 * KIB)
        assert qmp.job("drive0")["speed"] == 32 * KIB
        qmp.cmd("block_job_cancel", device="drive0")
        assert qmp.job_done("drive0")[0] == "BLOCK_JOB_CANCELLED"
        daemon.stop()
        images.check(scene.top)
        images.same(scene.top, scene.seen)
