"""What is refused, of which class, and in which words.

Clients match on these texts, so they are QEMU's to the letter.
"""

import pytest

from harness import images
from harness.daemon import blockdev, export
from harness.scene import SLOW, make_scene


@pytest.fixture
def scene(tmp_path, seed):
    return make_scene(tmp_path, layers=3, seed=seed)


@pytest.fixture
def qmp(daemon, scene):
    daemon.start(*scene.words)
    return daemon.qmp()


@pytest.fixture
def job(qmp):
    """A job `j` on the top node, running for as long as the test wants it."""
    qmp.cmd("block-stream", device="n2", job_id="j", speed=SLOW)
    qmp.wait_status("j", "running")
    yield "j"
    if qmp.job("j"):
        qmp.cmd("block-job-cancel", device="j", force=True)
        qmp.job_done("j")


def generic(text):
    return ("GenericError", text)


STREAM_ERRORS = {
    "unknown device": (
        {"device": "X"},
        generic("Cannot find device='X' nor node-name='X'"),
    ),
    "base and base-node": (
        {"device": "n2", "base": "layer0.qcow2", "base_node": "n0"},
        generic("'base' and 'base-node' cannot be specified at the same time"),
    ),
    "base not in the chain": (
        {"device": "n2", "base": "X"},
        generic("Can't find 'X' in the backing chain"),
    ),
    "base-node not below": (
        {"device": "n1", "base_node": "n2"},
        generic("Node 'n2' is not a backing image of 'n1'"),
    ),
    "backing-file with no base": (
        {"device": "n2", "backing_file": "X"},
        generic("backing file specified, but streaming the entire chain"),
    ),
    "speed below zero": (
        {"device": "n2", "speed": -1},
        generic("Parameter 'speed' expects a non-negative value"),
    ),
}


@pytest.mark.parametrize("case", STREAM_ERRORS)
def test_stream_is_refused(qmp, case):
    arguments, expected = STREAM_ERRORS[case]
    assert qmp.refused("block-stream", job_id="bad", **arguments) == expected
    # Nothing was begun, and nothing stands in the way of a good one.
    assert qmp.cmd("query-block-jobs") == []
    qmp.cmd("block-stream", device="n2", job_id="good")
    qmp.complete("good")


@pytest.mark.parametrize(
    "verb", ["cancel", "pause", "resume", "complete", "finalize", "dismiss"]
)  # fmt: skip
def test_job_verbs_on_an_unknown_id(qmp, verb):
    assert qmp.refused(f"job-{verb}", id="X") == generic("Job not found")


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("block-job-cancel", {"device": "X"}),
        ("block-job-pause", {"device": "X"}),
        ("block-job-resume", {"device": "X"}),
        ("block-job-complete", {"device": "X"}),
        ("block-job-set-speed", {"device": "X", "speed": 0}),
        ("block-job-finalize", {"id": "X"}),
        ("block-job-dismiss", {"id": "X"}),
    ],
)
def test_block_job_verbs_on_an_unknown_id(qmp, command, arguments):
    assert qmp.refused(command, **arguments) == ("DeviceNotActive", "Block job 'X' not found")


def test_speed_below_zero(qmp, job):
    """A refused speed leaves the one that was."""
    expected = generic("Parameter 'speed' expects a non-negative value")
    assert qmp.refused("block-job-set-speed", device=job, speed=-1) == expected
    assert qmp.job(job)["speed"] == SLOW


def test_node_in_use(qmp, job):
    """Neither the top nor a layer in the job's range takes a second job."""
    for node in ("n2", "n1"):
        expected = generic(f"Node '{node}' is busy: block device is in use by block job: stream")
        assert qmp.refused("block-stream", device=node, job_id="k") == expected


@pytest.mark.beyond_qsd("knows nodes only")
def test_export_in_use(qmp, job):
    """The error names what the client named."""
    expected = generic("Node 'drive0' is busy: block device is in use by block job: stream")
    assert qmp.refused("block-stream", device="drive0", job_id="k") == expected


def test_job_id_in_use(qmp, scene, job):
    """Two jobs of one name cannot be told apart, so there are none."""
    class_, text = qmp.refused("block-stream", device="n1", job_id=job)
    assert class_ == "GenericError" and text


def test_wrong_verb_for_the_state(qmp, job):
    for verb in ("complete", "finalize", "dismiss"):
        expected = generic(f"Job 'j' in state 'running' cannot accept command verb '{verb}'")
        assert qmp.refused(f"job-{verb}", id="j") == expected


def test_wrong_verb_at_the_end(qmp):
    """Concluded: only a dismissal is left, and it works."""
    qmp.cmd("block-stream", device="n2", job_id="j", auto_dismiss=False)
    qmp.wait_status("j", "concluded")
    for verb in ("cancel", "pause", "complete", "finalize"):
        expected = generic(f"Job 'j' in state 'concluded' cannot accept command verb '{verb}'")
        assert qmp.refused(f"job-{verb}", id="j") == expected
    qmp.cmd("job-dismiss", id="j")
    assert qmp.cmd("query-jobs") == []


def test_paused_twice(qmp, job):
    qmp.cmd("job-pause", id=job)
    assert qmp.refused("job-pause", id=job) == generic("Job is already paused")
    assert qmp.refused("block-job-pause", device=job) == generic("Job is already paused")
    qmp.cmd("job-resume", id=job)


def test_resumed_without_a_pause(qmp, job):
    expected = generic("Can't resume a job that was not paused")
    assert qmp.refused("job-resume", id=job) == expected
    assert qmp.refused("block-job-resume", device=job) == expected


def test_read_only_layer(daemon, tmp_path, seed):
    """Catches a stream that writes into a layer the user wanted left alone."""
    bottom, top = images.make_chain(tmp_path, layers=2, seed=seed)
    # The file as well as the node: of a node alone QEMU would think that it
    # is read-only for now, and may be written when there is a need.
    read_only = {"read_only": "on", "file.read_only": "on"}
    words = blockdev(bottom, "n0", **read_only)
    words += blockdev(top, "n1", backing="n0", **read_only)
    words += export("n1", "drive0", tmp_path / "s", writable=False)
    before = top.read_bytes()
    daemon.start(*words)
    qmp = daemon.qmp()
    expected = generic("Block node is read-only")
    assert qmp.refused("block-stream", device="n1", job_id="j") == expected
    daemon.stop()
    assert top.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"device": 7},
        {"device": "n2", "speed": "fast"},
        {"device": "n2", "on_error": "shrug"},
        {"device": "n2", "colour": "red"},
    ],
    ids=["missing", "wrong type", "not a number", "not a choice", "unknown"],
)
def test_malformed_arguments(qmp, arguments):
    """Each names the parameter it is about; none starts a job."""
    class_, text = qmp.refused("block-stream", **{"job_id": "j", **arguments})
    assert class_ == "GenericError"
    about = next((key for key in ("colour", "on_error", "speed") if key in arguments), "device")
    assert about.replace("_", "-") in text or "shrug" in text
    assert qmp.cmd("query-jobs") == []


@pytest.mark.beyond_qsd("always wants a job id, there being no devices")
def test_bare_node_needs_a_job_id(daemon, tmp_path, seed):
    """A node that no export shows has no name for a job to take over."""
    bottom, top = images.make_chain(tmp_path, layers=2, seed=seed)
    daemon.start(*blockdev(bottom, "n0", read_only="on"), *blockdev(top, "n1", backing="n0"))
    qmp = daemon.qmp()
    assert qmp.refused("block-stream", device="n1") == generic("Invalid job ID ''")


def test_unknown_command(qmp):
    expected = ("CommandNotFound", "The command no-such-thing has not been found")
    assert qmp.refused("no-such-thing") == expected
