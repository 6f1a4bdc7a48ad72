"""Options and fixtures.

The daemon under test is `--daemon` (or STRATABLK_DAEMON). Against
qemu-storage-daemon the tests marked `beyond_qsd` are skipped: the rest says
that both behave alike, which is the point of running them there.
"""

import os
import pathlib
import random
import shutil
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "contrib"))

import guest as testbed  # noqa: E402
from harness.daemon import Daemon, default_control, default_daemon  # noqa: E402
from harness.guests import COMMON  # noqa: E402
from harness.images import qemu_img, run  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--daemon", default=default_daemon(), help="the daemon to test")
    parser.addoption("--stratactl", default=default_control(), help="the control tool to test")
    parser.addoption("--seed", type=int, default=None, help="repeat a run with its seed")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "beyond_qsd(why): qemu-storage-daemon is known not to do this"
    )
    config.addinivalue_line("markers", "guest: boots a virtual machine")
    found = shutil.which(config.getoption("--daemon"))
    if not found:
        raise pytest.UsageError(
            f"no daemon at {config.getoption('--daemon')}: build it with "
            "`cargo build --release`, or name another with --daemon"
        )
    config.daemon_binary = os.path.abspath(found)
    config.is_qsd = os.path.basename(found) == "qemu-storage-daemon"
    seed = config.getoption("--seed")
    config.seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed


def pytest_report_header(config):
    return [f"daemon: {config.daemon_binary}", f"seed: {config.seed}"]


def pytest_collection_modifyitems(config, items):
    if not config.is_qsd:
        return
    for item in items:
        mark = item.get_closest_marker("beyond_qsd")
        if mark:
            item.add_marker(pytest.mark.skip(reason=f"qemu-storage-daemon: {mark.args[0]}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With a failure, show the seed that repeats it and what the daemon said."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"--seed {item.config.seed}"))
        daemon = getattr(item, "funcargs", {}).get("daemon")
        if daemon:
            report.sections.append(("daemon", daemon.read_log()[-4000:]))


@pytest.fixture
def rng(request):
    """A source of randomness of this run's seed and this test's name."""
    return random.Random(f"{request.config.seed} {request.node.nodeid}")


@pytest.fixture
def seed(rng):
    return rng.randrange(1 << 32)


@pytest.fixture
def daemon(request, tmp_path):
    """A daemon that is not started yet, and does not outlive the test."""
    made = Daemon(request.config.daemon_binary, tmp_path)
    yield made
    made.clean_up()


@pytest.fixture
def is_qsd(request):
    return request.config.is_qsd


class SmallDisk:
    """A file system of its own, too small at first, that can be made larger."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4M", "none", str(path)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a file system can only be mounted as root")

    def grow(self):
        subprocess.run(["mount", "-o", "remount,size=64M", str(self.path)], check=True)

    def close(self):
        subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    disk = SmallDisk(tmp_path / "small")
    yield disk
    disk.close()


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """A golden image: ext4 with 48 MB of files, made once for all tests."""
    folder = tmp_path_factory.mktemp("golden")
    testbed.make_tree(folder / "tree", 48)
    raw, image = folder / "golden.raw", folder / "golden.qcow2"
    run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", folder / "tree", raw, "128M")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    shutil.rmtree(folder / "tree")
    image.chmod(0o444)
    return image


@pytest.fixture
def boot(tmp_path):
    """Boot guests that do not outlive the test."""
    running = []

    def boot(*sockets, job, queues=1):
        folder = tmp_path / f"guest{len(running)}"
        folder.mkdir()
        guest = testbed.Guest(sockets, COMMON + job, folder, queues)
        running.append(guest)
        return guest

    yield boot
    for guest in running:
        guest.kill()
