"""The human monitor within the control socket, as the clients of 2011 use it."""

import re

import pytest

from harness import images
from harness.images import KIB, MIB
from harness.scene import make_scene

pytestmark = pytest.mark.beyond_qsd("has no human monitor")


@pytest.fixture
def scene(tmp_path, seed):
    return make_scene(tmp_path, layers=3, seed=seed)


@pytest.fixture
def qmp(daemon, scene):
    daemon.start(*scene.words)
    return daemon.qmp()


def test_no_jobs(qmp):
    assert qmp.hmp("info block-jobs").strip() == "No active jobs"


def test_a_job_in_words(daemon, qmp, scene):
    """Started, shown, changed and cancelled by hand."""
    assert qmp.hmp(f"block_stream drive0 0 {scene.layers[0]}").strip() == ""
    qmp.complete("drive0")
    assert scene.backing_of(2) == scene.layers[0]

    qmp.cmd("block-stream", device="drive0", speed=64 * KIB)
    line = qmp.hmp("info block-jobs").strip()
    found = re.fullmatch(
        r"Streaming device drive0: Completed (\d+) of (\d+) bytes, speed limit (\d+) bytes/s", line
    )
    assert found, line
    assert int(found[1]) <= int(found[2]) == 8 * MIB and int(found[3]) == 64 * KIB

    # A size as people write it: the suffix counts in binary.
    assert qmp.hmp("block_job_set_speed drive0 32k").strip() == ""
    assert qmp.job("drive0")["speed"] == 32 * KIB
    assert qmp.hmp("block_job_cancel drive0").strip() == ""
    assert qmp.job_done("drive0")[0] == "BLOCK_JOB_CANCELLED"
    assert qmp.hmp("info block-jobs").strip() == "No active jobs"
    daemon.stop()
    images.check(scene.top)
    images.same(scene.top, scene.seen)


def test_whole_chain(daemon, qmp, scene):
    qmp.hmp("block_stream drive0")
    qmp.complete("drive0")
    daemon.stop()
    images.stands_alone(scene.top, scene.seen)


def test_faults_are_told_in_text(qmp):
    """The answer is a good one; what went wrong stands in it."""
    assert "Cannot find device='X'" in qmp.hmp("block_stream X")
    assert "Block job 'X' not found" in qmp.hmp("block_job_cancel X")
    assert "no_such_thing" in qmp.hmp("no_such_thing")
    assert qmp.hmp("block_stream").strip()


def test_info_block_and_help(qmp, scene):
    assert "drive0" in qmp.hmp("info block")
    shown = qmp.hmp("help")
    for word in ("block_stream", "block_job_set_speed", "block_job_cancel", "info"):
        assert word in shown
