"""The control tool, as a person and as a script uses it.

It speaks plain QMP, so most of this holds against qemu-storage-daemon too.
"""

import json
import os
import shutil
import subprocess

import pytest

from harness import images
from harness.images import KIB, MIB
from harness.scene import make_scene

DONE, ANSWERED, USAGE, UNREACHABLE, JOB_FAILED = range(5)


@pytest.fixture
def scene(tmp_path, seed):
    return make_scene(tmp_path, layers=3, seed=seed)


@pytest.fixture
def ctl(request, daemon, scene):
    """Run stratactl against the daemon; return what it did."""
    binary = shutil.which(request.config.getoption("--stratactl"))
    if not binary:
        # Not a reason to skip where the daemon is ours: then it was built as well.
        assert request.config.is_qsd, "no stratactl; build it, or name one with --stratactl"
        pytest.skip("no stratactl is built")
    daemon.start(*scene.words)

    def ctl(*words, expect=DONE, socket=True):
        command = [binary, *(["--socket", str(daemon.qmp_path)] if socket else []), *words]
        environment = {k: v for k, v in os.environ.items() if k != "STRATABLK_QMP"}
        if isinstance(socket, dict):
            command = [binary, *words]
            environment.update(socket)
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=60, env=environment
        )
        assert done.returncode == expect, (words, done)
        return done

    ctl.binary = binary
    return ctl


def values(text):
    return [json.loads(line) for line in text.splitlines()]


def test_no_jobs(ctl):
    assert "no" in ctl("jobs").stdout.lower()
    assert json.loads(ctl("jobs", "--json").stdout) == []
    # Watching nothing ends at once.
    ctl("jobs", "--watch")


def test_stream_and_wait(daemon, scene, ctl):
    shown = ctl("stream", "n2", "--job-id", "j", "--wait").stdout
    assert "j" in shown
    assert images.backing(scene.top) is None
    daemon.stop()
    images.stands_alone(scene.top, scene.seen)


@pytest.mark.parametrize("how", ["--base", "--base-node", "--bottom"])
def test_partial(daemon, scene, ctl, how):
    target = {"--base": scene.layers[0], "--base-node": "n0", "--bottom": "n1"}[how]
    ctl("stream", "n2", how, target, "--wait")
    daemon.stop()
    assert scene.backing_of(2) == scene.layers[0]
    images.same(scene.top, scene.seen)


def test_life_of_a_job(daemon, scene, ctl):
    """Started slow, looked at, changed, paused, resumed, cancelled, begun again."""
    ctl("stream", "n2", "--job-id", "j", "--speed", "64K")
    [job] = json.loads(ctl("jobs", "--json").stdout)
    assert job["speed"] == 64 * KIB and "j" in (job.get("device"), job.get("id"))
    ctl("speed", "j", "1M")
    [job] = json.loads(ctl("jobs", "--json").stdout)
    assert job["speed"] == MIB
    ctl("speed", "j", "64K")
    ctl("pause", "j")
    shown = ctl("jobs").stdout
    assert "j" in shown and "%" in shown
    ctl("resume", "j")
    ctl("cancel", "j")
    qmp = daemon.qmp()
    qmp.poll("the end of it", lambda: qmp.job("j") is None)
    qmp.close()
    ctl("stream", "n2", "--wait")
    daemon.stop()
    images.stands_alone(scene.top, scene.seen)


def test_refused(ctl):
    """The daemon's words, on standard error, and a code that scripts can tell."""
    assert "Cannot find device='X'" in ctl("stream", "X", expect=ANSWERED).stderr
    assert "Block job 'X' not found" in ctl("cancel", "X", expect=ANSWERED).stderr
    assert "Job not found" in ctl("pause", "X", expect=ANSWERED).stderr
    assert "Block job 'X' not found" in ctl("speed", "X", "1M", expect=ANSWERED).stderr
    told = json.loads(ctl("cancel", "X", "--json", expect=ANSWERED).stderr)
    assert told["error"] == {"class": "DeviceNotActive", "desc": "Block job 'X' not found"}


@pytest.mark.parametrize(
    "words",
    [
        ["speed", "j"],
        ["speed", "j", "quick"],
        ["stream"],
        ["stream", "n2", "--speed", "-5"],
        ["stream", "n2", "--base", "a", "--bottom", "n1"],
        ["no-such-thing"],
        [],
    ],
    ids=" ".join,
)
def test_usage(ctl, words):
    assert ctl(*words, expect=USAGE).stderr


def test_which_daemon(daemon, tmp_path, ctl):
    """By option, by variable; a daemon that is not there is named."""
    assert "STRATABLK_QMP" in ctl("jobs", expect=USAGE, socket=False).stderr
    ctl("jobs", socket={"STRATABLK_QMP": str(daemon.qmp_path)})
    absent = str(tmp_path / "absent.sock")
    done = ctl("jobs", expect=UNREACHABLE, socket={"STRATABLK_QMP": absent})
    assert absent in done.stderr


def test_info(ctl):
    """The export and every layer below it."""
    shown = ctl("info").stdout
    for word in ("drive0", "layer2.qcow2", "layer1.qcow2", "layer0.qcow2"):
        assert word in shown
    values(ctl("info", "--json").stdout)


@pytest.mark.beyond_qsd("serves one client per monitor")
class TestWatching:
    """One watches, another acts."""

    def start(self, ctl, daemon, *words):
        return subprocess.Popen(
            [ctl.binary, "--socket", str(daemon.qmp_path), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_watch_until_all_is_done(self, daemon, ctl):
        ctl("stream", "drive0", "--speed", "64K")
        watcher = self.start(ctl, daemon, "jobs", "--watch")
        try:
            # A first line says that it looks on.
            assert "drive0" in watcher.stdout.readline()
            ctl("speed", "drive0", "unlimited")
            shown, _ = watcher.communicate(timeout=60)
        finally:
            watcher.kill()
            watcher.wait()
        assert watcher.returncode == DONE and "drive0" in shown

    def test_watched_job_is_cancelled(self, daemon, ctl):
        """The one who waits for a result learns that there is none."""
        waiter = self.start(ctl, daemon, "stream", "drive0", "--speed", "64K", "--wait", "--json")
        try:
            assert waiter.stdout.readline()
            ctl("cancel", "drive0")
            shown, _ = waiter.communicate(timeout=60)
        finally:
            waiter.kill()
            waiter.wait()
        assert waiter.returncode == JOB_FAILED
        assert values(shown), "nothing was said of the end"

    def test_human_monitor(self, ctl):
        assert "No active jobs" in ctl("hmp", "info", "block-jobs").stdout


def test_quit(daemon, ctl):
    ctl("quit")
    assert daemon.process.wait(20) == 0
