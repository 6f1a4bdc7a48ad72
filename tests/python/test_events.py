"""The states of a job and the events that tell of them, in their order."""

import pytest

from harness import images
from harness.images import MIB
from harness.scene import SLOW, make_scene, serve


@pytest.fixture
def scene(tmp_path, seed):
    return make_scene(tmp_path, layers=2, seed=seed)


@pytest.fixture
def qmp(daemon, scene):
    daemon.start(*scene.words)
    return daemon.qmp()


def test_success(qmp):
    qmp.cmd("block-stream", device="n1", job_id="j")
    data = qmp.complete("j")
    assert qmp.story("j") == [
        "created",
        "running",
        "waiting",
        "pending",
        "BLOCK_JOB_COMPLETED",
        "concluded",
        "null",
    ]
    assert data["type"] == "stream" and data["speed"] == 0


@pytest.mark.beyond_qsd("has no such event")
def test_what_was_copied_is_told_once_before_the_end(qmp):
    qmp.cmd("block-stream", device="n1", job_id="j")
    data = qmp.complete("j")
    names = [event["event"] for event in qmp.events]
    assert names.count("JOB_COPIED") == 1
    assert names[names.index("JOB_COPIED") + 1] == "BLOCK_JOB_COMPLETED"
    assert 0 < qmp.copied("j") <= data["len"]


def test_cancel(qmp):
    qmp.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
    qmp.cmd("block-job-cancel", device="j")
    name, data = qmp.job_done("j")
    assert qmp.story("j") == [
        "created",
        "running",
        "aborting",
        "BLOCK_JOB_CANCELLED",
        "concluded",
        "null",
    ]
    assert data["speed"] == SLOW and data["len"] == 8 * MIB


def test_cancel_of_a_paused_job(qmp):
    """A cancel does not wait for the resume that never comes."""
    qmp.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
    qmp.cmd("block-job-pause", device="j")
    qmp.wait_status("j", "paused")
    # The old command refuses that unless it is forced; the new one does not.
    qmp.cmd("block-job-cancel", device="j", force=True)
    assert qmp.job_done("j")[0] == "BLOCK_JOB_CANCELLED"


def test_no_finalize_by_itself(qmp, scene):
    """auto-finalize=false: the work is done, the header is not touched until told."""
    qmp.cmd("block-stream", device="n1", job_id="j", auto_finalize=False)
    data = qmp.wait_event("BLOCK_JOB_PENDING")
    assert data == {"id": "j", "type": "stream"}
    job = qmp.job("j")
    assert job["status"] == "pending" and job["auto-finalize"] is False
    assert scene.backing_of(1) == scene.layers[0]
    qmp.cmd("block-job-finalize", id="j")
    qmp.complete("j")
    assert scene.backing_of(1) is None
    assert qmp.story("j") == [
        "created",
        "running",
        "waiting",
        "pending",
        "BLOCK_JOB_PENDING",
        "BLOCK_JOB_COMPLETED",
        "concluded",
        "null",
    ]


def test_cancel_while_pending(daemon, qmp, scene):
    """A job may be given up at the last moment; the backing file stays."""
    qmp.cmd("block-stream", device="n1", job_id="j", auto_finalize=False)
    qmp.wait_status("j", "pending")
    qmp.cmd("job-cancel", id="j")
    assert qmp.job_done("j")[0] == "BLOCK_JOB_CANCELLED"
    daemon.stop()
    assert scene.backing_of(1) == scene.layers[0]
    images.check(scene.top)
    images.same(scene.top, scene.seen)


def test_no_dismiss_by_itself(qmp):
    """auto-dismiss=false: the job stays to be asked after, until it is sent away."""
    qmp.cmd("block-stream", device="n1", job_id="j", auto_dismiss=False)
    qmp.wait_event("BLOCK_JOB_COMPLETED", device="j")
    qmp.wait_status("j", "concluded")
    [job] = qmp.cmd("query-jobs")
    assert job["status"] == "concluded" and "error" not in job
    assert job["current-progress"] == job["total-progress"]
    qmp.cmd("block-job-dismiss", id="j")
    qmp.wait_status("j", "null")
    assert qmp.cmd("query-jobs") == []


def test_pause_and_resume(qmp):
    qmp.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
    qmp.cmd("job-pause", id="j")
    qmp.wait_status("j", "paused")
    qmp.cmd("job-resume", id="j")
    qmp.wait_status("j", "running")
    qmp.cmd("block-job-cancel", device="j")
    qmp.job_done("j")
    assert qmp.story("j")[:4] == ["created", "running", "paused", "running"]


def test_events_have_a_time(qmp):
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    for event in qmp.events:
        stamp = event["timestamp"]
        assert stamp["seconds"] > 1_000_000_000 and 0 <= stamp["microseconds"] < 1_000_000


@pytest.mark.beyond_qsd("serves one client per monitor")
def test_every_client_hears(daemon, qmp):
    """Events reach all who negotiated, not just the one who started the job."""
    others = [daemon.qmp() for _ in range(3)]
    mute = daemon.wire()  # connected, but did not negotiate: hears nothing
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    for other in others:
        other.complete("j")
        assert other.story("j") == qmp.story("j")
    mute.send('{"execute":"qmp_capabilities","id":1}')
    assert mute.value() == {"return": {}, "id": 1}


class TestNoSpace:
    """Errors of a real kind: the overlay lies on a file system that is too small."""

    @pytest.fixture
    def small(self, daemon, tmp_path, rng, small_disk):
        base = images.random_image(tmp_path / "base.qcow2", 8 * MIB, rng, holes=0)
        top = images.create(small_disk.path / "top.qcow2", backing=str(base))
        daemon.start(*serve([base, top], tmp_path))
        return daemon.qmp(), top, images.flatten(base)

    def test_report(self, daemon, small):
        """The job ends with the error; what was copied stays, and the image is whole."""
        qmp, top, seen = small
        qmp.cmd("block-stream", device="n1", job_id="j")
        error = qmp.wait_event("BLOCK_JOB_ERROR", device="j")
        assert error["action"] == "report" and error["operation"] in ("read", "write")
        name, data = qmp.job_done("j")
        assert name == "BLOCK_JOB_COMPLETED" and "No space left" in data["error"]
        assert data["offset"] < data["len"]
        told = qmp.story("j")
        assert told[-4:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
        # The last flush may find no room either, which is told.
        daemon.stop(codes=(0, 1))
        assert images.backing(top) is not None
        images.check(top, leaks=True)
        images.same(top, seen)

    @pytest.mark.parametrize("on_error", ["stop", "enospc"])
    def test_stop_and_go_on(self, daemon, small, small_disk, on_error):
        """The job waits for room, and then copies all of it, the failed part too."""
        qmp, top, seen = small
        qmp.cmd("block-stream", device="n1", job_id="j", on_error=on_error)
        assert qmp.wait_event("BLOCK_JOB_ERROR", device="j")["action"] == "stop"
        qmp.poll("the stop", lambda: qmp.job("j")["status"] == "paused")
        job = qmp.job("j")
        assert job["io-status"] == "nospace" and job["paused"] is True
        small_disk.grow()
        qmp.cmd("block-job-resume", device="j")
        qmp.complete("j")
        daemon.stop()
        assert images.backing(top) is None
        images.check(top, leaks=True)
        images.same(top, seen)

    def test_ignore(self, daemon, small):
        """To the end in spite of errors, but then the backing file is still needed."""
        qmp, top, seen = small
        qmp.cmd("block-stream", device="n1", job_id="j", on_error="ignore", speed=64 * MIB)
        name, data = qmp.job_done("j")
        assert name == "BLOCK_JOB_COMPLETED" and data["error"]
        assert data["offset"] == data["len"]
        daemon.stop(codes=(0, 1))
        assert images.backing(top) is not None
        images.check(top, leaks=True)
        images.same(top, seen)
