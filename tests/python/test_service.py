"""The unit of systemd that contrib/systemd has, and hosts that have little to give.

What would be caught: a unit that systemd does not understand, a setting without which a guest is
left alone or the next process knows nothing of the one before, folders for the daemon that systemd
does not make; a start that is refused since the memory of the host is in small pieces.
"""

import configparser
import os
import pathlib
import shutil
import subprocess

import pytest

from harness import images
from harness.daemon import ROOT
from harness.scene import make_scene

UNIT = ROOT / "contrib/systemd/stratablk@.service"


@pytest.fixture
def unit():
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(UNIT)
    return parser


def test_the_settings_that_a_restart_needs(unit):
    service = unit["Service"]
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert (service["Restart"], service["RestartSec"]) == ("always", "0")
    assert service["RestartPreventExitStatus"] == "2"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["EnvironmentFile"] == "/etc/stratablk/%i.conf"
    # What the daemon is told is what systemd makes.
    command = service["ExecStart"].split()
    for option, root, made in [
        ("--journal", "%t", "RuntimeDirectory"),
        ("--state", "%S", "StateDirectory"),
    ]:
        folder = next(w.removeprefix(option + "=") for w in command if w.startswith(option + "="))
        assert folder.removeprefix(root + "/") in service[made].split()
    assert command[-1] == "$OPTIONS"


def test_systemd_understands_it(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not here")
    copy = tmp_path / UNIT.name
    # It looks for the program.
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/stratablk", "/bin/true"))
    instance = pathlib.Path(str(copy).replace("@.", "@vm1."))
    # It ends with 0 also where it has ignored a setting, and says so.
    result = subprocess.run(
        [analyze, "verify", str(instance)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


def without_the_right_to_lock(kibibytes):
    """The words before a command that let its user's rings take no more memory than this."""
    words = ["prlimit", f"--memlock={kibibytes << 10}"]
    if os.geteuid() == 0:
        words += ["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"]
    return words


@pytest.mark.beyond_qsd("it makes no smaller rings")
def test_little_memory_for_rings(daemon, tmp_path, monkeypatch):
    """What a host with little contiguous memory looks like to io_uring: smaller rings, same work."""
    scene = make_scene(tmp_path)
    monkeypatch.setenv("STRATABLK_LOG", "info")
    # Enough for three rings of 100 KiB, and for smaller ones.
    daemon.before = without_the_right_to_lock(400)
    daemon.start(*scene.words)
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device=scene.top_node, job_id="j")
    qmp.complete("j")
    assert "io_uring: no memory for 512 entries and 4096 completions" in daemon.read_log()
    daemon.stop()
    images.stands_alone(scene.top, scene.seen)


@pytest.mark.beyond_qsd("it says so in other words")
def test_no_memory_for_rings_at_all(daemon, tmp_path):
    scene = make_scene(tmp_path)
    daemon.before = without_the_right_to_lock(4)
    with pytest.raises(AssertionError, match=r"setting up an io_uring: Cannot allocate memory.*`ulimit -l`"):
        daemon.start(*scene.words)
