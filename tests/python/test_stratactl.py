"""The control tool, as a person and as a script uses it.

It speaks plain QMP, so most of this holds against qemu-storage-daemon too.
"""

import json
import os
import shutil
import subprocess

import pytest

from harness import images
from harness.daemon import blockdev, export
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


class TestSharedLayers:
    """Two disks on one golden image, each opened for itself: nodes that nobody named."""

    pytestmark = pytest.mark.beyond_qsd("does not tell which node is below another")

    @pytest.fixture
    def tool(self, request, daemon, tmp_path, rng):
        golden = images.random_image(tmp_path / "golden.qcow2", MIB, rng)
        words = []
        for name in ("a", "b"):
            mid = images.create(tmp_path / f"{name}-mid.qcow2", backing=golden.name)
            images.scribble(mid, MIB, rng)
            top = images.create(tmp_path / f"{name}.qcow2", backing=mid.name)
            words += blockdev(top, f"top-{name}")
            words += export(f"top-{name}", f"disk-{name}", tmp_path / f"{name}.sock")
        daemon.start(*words)
        binary = shutil.which(request.config.getoption("--stratactl"))

        def tool(*words):
            command = [binary, "--socket", str(daemon.qmp_path), *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done
            return done.stdout

        return tool

    def chains(self, tool):
        told = json.loads(tool("info", "--json"))
        return {e["id"]: [layer["node-name"] for layer in e["layers"]] for e in told["exports"]}

    def test_each_disk_has_its_own_nodes(self, daemon, tool):
        """Catches a node found by its file alone, which another node may have as well."""
        chains = self.chains(tool)
        assert [len(chain) for chain in chains.values()] == [3, 3]
        names = [name for chain in chains.values() for name in chain]
        assert len(set(names)) == 6, chains
        text = tool("info")
        assert all(text.count(f"{name}:") == 1 for name in names), text
        # They are the ones that are there: a job into one of them is refused for no other reason
        # than that the other disk reads the same file.
        qmp = daemon.qmp()
        for export, chain in chains.items():
            _, said = qmp.refused("block-stream", device=chain[2], job_id="j")
            assert any(chain[2] not in other and other[2] in said for other in chains.values()), said

    def test_a_node_without_a_name_of_its_own(self, daemon, tool):
        """`#block002` names a node and no job: the job gets a name that it can have."""
        chains = self.chains(tool)
        qmp = daemon.qmp()
        node = chains["disk-a"][1]
        assert node.startswith("#")
        assert qmp.refused("block-stream", device=node)[1] == "Invalid job ID ''"
        # It stays, however soon it has nothing left to do.
        told = json.loads(tool("stream", node, "--no-auto-finalize", "--json"))
        assert told["job"] == node[1:]
        tool("cancel", told["job"])
        qmp.job_done(told["job"])
        # Taken names are passed over.
        qmp.cmd("block-stream", device="disk-b", job_id=node[1:], auto_finalize=False)
        told = json.loads(tool("stream", node, "--no-auto-finalize", "--json"))
        assert told["job"] == f"{node[1:]}-2"
        tool("cancel", told["job"])
        qmp.job_done(told["job"])
        assert "completed" in tool("stream", node, "--wait")


class TestProgress:
    """What is told of a job is what it has to move, not the length of a device full of holes."""

    pytestmark = pytest.mark.beyond_qsd("tells the length only")

    @pytest.mark.parametrize("format", ["qcow2", "raw"])
    def test_holes_are_no_work(self, request, daemon, tmp_path, format):
        base = images.create(tmp_path / "base", 4096 * MIB, format=format)
        for at in (0, 2048, 4095):
            images.qemu_io(base, f"write -P 7 {at}M 1M", format=format)
        top = images.create(tmp_path / "top", backing=base.name, backing_format=format)
        # The guest has written one of them already.
        images.qemu_io(top, "write -P 8 2048M 1M")
        daemon.start(*blockdev(top, "n1"), *export("n1", "e", tmp_path / "s"))
        qmp = daemon.qmp()
        qmp.cmd("block-stream", device="e", speed=128 * KIB)
        qmp.poll("the survey", lambda: qmp.job("e")["to-copy-final"])
        told = qmp.job("e")
        assert told["to-copy"] == 2 * MIB and told["len"] == 4096 * MIB
        assert told["copied"] <= told["to-copy"]
        binary = shutil.which(request.config.getoption("--stratactl"))
        command = [binary, "--socket", str(daemon.qmp_path)]
        table = subprocess.run([*command, "jobs"], capture_output=True, text=True, timeout=60)
        assert "2.0 MiB" in table.stdout and "4.0 GiB" in table.stdout, table
        watcher = subprocess.Popen([*command, "jobs", "--watch"], stdout=subprocess.PIPE, text=True)
        line = watcher.stdout.readline()
        assert "of 2.0 MiB to copy, at " in line and "of 4.0 GiB" in line, line
        qmp.cmd("block-job-set-speed", device="e", speed=0)
        qmp.complete("e")
        assert qmp.copied("e") == 2 * MIB
        rest, _ = watcher.communicate(timeout=60)
        assert "completed, " in rest and "copied of 4.0 GiB" in rest, rest
        daemon.stop()
        # In raw there is no telling holes from zeros that were written: none is copied.
        assert images.allocated(top) == 3 * MIB
