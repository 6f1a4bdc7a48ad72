"""SIGKILL: what a daemon that had no chance to end leaves in the images.

The page cache outlives the process, so these tests catch what was said to be
done and still lay in the daemon's own memory, and files between two states.
"""

import shutil
import time

import pytest

from harness import images
from harness.images import MIB
from harness.scene import make_scene

pytestmark = pytest.mark.beyond_qsd("loses the base when it is killed after the event")


class Rounds:
    """One chain, served and killed again and again from the same beginning."""

    def __init__(self, daemon, scene):
        self.daemon = daemon
        self.scene = scene
        self._pristine = scene.folder / "pristine"
        shutil.copy(scene.top, self._pristine)

    def begin(self):
        shutil.copy(self._pristine, self.scene.top)
        self.daemon.start(*self.scene.words)
        wire = self.daemon.wire()
        wire.negotiate()
        return wire

    def judge(self):
        """The image is free of errors, and reads as it did, alone or on its base."""
        images.let_go(self.scene.top)
        images.check(self.scene.top, leaks=True)
        if images.backing(self.scene.top) is None:
            hidden = self.scene.folder / "hidden"
            hidden.mkdir()
            for layer in self.scene.layers[:-1]:
                layer.rename(hidden / layer.name)
            images.same(self.scene.top, self.scene.seen)
            for layer in self.scene.layers[:-1]:
                (hidden / layer.name).rename(layer)
            hidden.rmdir()
            return True
        images.same(self.scene.top, self.scene.seen)
        return False


@pytest.fixture
def rounds(daemon, tmp_path, seed):
    return Rounds(daemon, make_scene(tmp_path / "chain", layers=3, size=16 * MIB, seed=seed))


STREAM = '{"execute":"block-stream","arguments":{"device":"n2","job-id":"j"%s}}'


def wait_for(wire, name, **data):
    while True:
        value = wire.value()
        if value.get("event") == name and data.items() <= value["data"].items():
            return


@pytest.mark.parametrize("base", ["", ',"base-node":"n0"'], ids=["whole", "partial"])
def test_right_after_completion(rounds, base):
    """The event is a promise: what it tells of is on the disk already."""
    for _ in range(5):
        wire = rounds.begin()
        wire.send(STREAM % base)
        wait_for(wire, "BLOCK_JOB_COMPLETED", device="j")
        rounds.daemon.kill()
        assert rounds.judge() == (base == "")
        if base:
            assert rounds.scene.backing_of(2) == rounds.scene.layers[0]


def test_right_after_cancel(rounds):
    """Cancelled at once or on the way, and then killed: as before the job."""
    for _ in range(5):
        wire = rounds.begin()
        wire.send(STREAM % ',"speed":4194304')
        wait_for(wire, "JOB_STATUS_CHANGE", status="running")
        wire.send('{"execute":"block-job-cancel","arguments":{"device":"j"}}')
        wait_for(wire, "BLOCK_JOB_CANCELLED", device="j")
        rounds.daemon.kill()
        assert rounds.judge() is False


def test_while_pending(rounds):
    """All is copied, but nobody said finalize: the header stands as it stood."""
    wire = rounds.begin()
    wire.send(STREAM % ',"auto-finalize":false')
    wait_for(wire, "BLOCK_JOB_PENDING", id="j")
    rounds.daemon.kill()
    assert rounds.judge() is False


def test_at_random_moments(rounds, rng):
    """Whenever it happens, the chain reads the same.

    The moments are spread over one and a half times what a whole stream takes,
    so that some lie before, in and after the end of the job.
    """
    wire = rounds.begin()
    begun = time.monotonic()
    wire.send(STREAM % "")
    wait_for(wire, "BLOCK_JOB_COMPLETED", device="j")
    takes = time.monotonic() - begun
    rounds.daemon.kill()
    rounds.judge()

    alone = 0
    for _ in range(30):
        wire = rounds.begin()
        wire.send(STREAM % "")
        time.sleep(rng.uniform(0, 1.5 * takes))
        rounds.daemon.kill()
        alone += rounds.judge()
    print(f"{alone} of 30 stood alone; a stream takes {takes:.3f} s")


def test_a_killed_stream_is_taken_up(rounds, rng):
    """Killed on the way, restarted, streamed again: complete and clean."""
    wire = rounds.begin()
    wire.send(STREAM % f',"speed":{MIB}')
    wait_for(wire, "JOB_STATUS_CHANGE", status="running")
    time.sleep(rng.uniform(0, 0.5))
    rounds.daemon.kill()
    # Not from the beginning: with what the kill left behind.
    rounds.daemon.start(*rounds.scene.words)
    qmp = rounds.daemon.qmp()
    qmp.cmd("block-stream", device="n2", job_id="again")
    qmp.complete("again")
    rounds.daemon.stop()
    assert rounds.judge() is True
