"""Image locks: no two programs ever write one image."""

import pathlib
import subprocess
import time

import pytest

from harness import images
from harness.daemon import Daemon, blockdev, export
from harness.images import MIB, Refused
from harness.scene import make_scene, serve


@pytest.fixture
def scene(daemon, tmp_path, seed):
    scene = make_scene(tmp_path / "chain", layers=2, seed=seed)
    daemon.start(*scene.words)
    return scene


def test_top_is_not_for_others(scene):
    """QEMU's tools refuse an image that is being written, to write and to read."""
    for command in (
        ["qemu-img", "convert", "-O", "raw", scene.top, scene.folder / "copy"],
        ["qemu-img", "check", "-r", "all", scene.top],
        ["qemu-img", "resize", scene.top, "64M"],
        ["qemu-io", "-f", "qcow2", "-c", "write 0 512", scene.top],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode != 0, command
        assert "lock" in done.stderr, done.stderr


def test_base_is_read_by_others(scene):
    """A base may be read by all, and written by none."""
    images.qemu_img("check", scene.layers[0])
    with pytest.raises(Refused, match="lock"):
        images.qemu_io(scene.layers[0], "write 0 512")


def test_base_is_shared(daemon, request, tmp_path, scene):
    """Many guests on one golden image: the usual case."""
    second_top = images.create(tmp_path / "second.qcow2", backing=str(scene.layers[0]))
    (tmp_path / "second").mkdir()
    second = Daemon(request.config.daemon_binary, tmp_path / "second")
    try:
        second.start(*serve([scene.layers[0], second_top], tmp_path / "second"))
        qmp = second.qmp()
        qmp.cmd("block-stream", device="n1", job_id="j")
        qmp.complete("j")
        second.stop()
    finally:
        second.clean_up()
    images.stands_alone(second_top, images.flatten(scene.layers[0]))


def refused_start(daemon, words):
    """Start a daemon that must not come up; return what it says."""
    daemon.start_bare([daemon.binary, *words])
    assert daemon.process.wait(20) != 0
    return daemon.read_log()


def test_in_use_by_another_daemon(request, tmp_path, scene):
    (tmp_path / "second").mkdir()
    second = Daemon(request.config.daemon_binary, tmp_path / "second")
    words = blockdev(scene.top, "n1") + export("n1", "e", tmp_path / "second" / "s")
    said = refused_start(second, words)
    assert "lock" in said and scene.top.name in said


def test_in_use_by_qemu(daemon, tmp_path, rng):
    """The other way round: QEMU has it, the daemon does not come up."""
    image = images.random_image(tmp_path / "a.qcow2", MIB, rng)
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        # The answer to a command says that the image is open.
        holder.stdin.write("length\n")
        holder.stdin.flush()
        assert holder.stdout.readline()
        said = refused_start(daemon, blockdev(image, "n0") + export("n0", "e", tmp_path / "s"))
        assert "lock" in said and image.name in said
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


def test_base_is_let_go(daemon, tmp_path, rng):
    """After a stream nobody needs the base, so it is locked no longer."""
    base = images.random_image(tmp_path / "base.qcow2", MIB, rng)
    top = images.create(tmp_path / "top.qcow2", backing=base.name)
    daemon.start(*blockdev(top, "n1"), *export("n1", "drive0", tmp_path / "s"))
    with pytest.raises(Refused, match="lock"):
        images.qemu_io(base, "write 0 512")
    qmp = daemon.qmp()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")

    def writable():
        try:
            return images.qemu_io(base, "write 0 512")
        except Refused:
            return None

    qmp.poll("the end of the lock", writable)


def test_locks_end_with_the_process(daemon, scene):
    """A killed daemon leaves no lock that someone would have to remove."""
    daemon.kill()
    images.let_go(scene.top)
    images.qemu_io(scene.top, "write 0 512")
    images.check(scene.top, leaks=True)


@pytest.mark.beyond_qsd("does not say who holds a lock, and fails after a kill")
class TestWhoHoldsIt:
    """A lock that cannot be had: a running holder is named, that of a dead one is waited for."""

    def test_a_running_holder_is_named(self, request, tmp_path, scene, daemon):
        """By a second daemon and by the tools, in what they say at once."""
        holder = f"Process {daemon.process.pid} ({pathlib.Path(daemon.binary).name[:15]}) holds the lock"
        (tmp_path / "second").mkdir()
        second = Daemon(request.config.daemon_binary, tmp_path / "second")
        for writable in True, False:
            words = blockdev(scene.top, "n1")
            words += export("n1", "e", tmp_path / "second" / "s", writable=writable)
            assert holder in refused_start(second, words)
        tool = request.config.getoption("--stratactl")
        for command in (
            ["check", "--repair", "all", scene.top],
            ["resize", scene.top, "64M"],
            ["rebase", "-u", "-b", "", scene.top],
            ["compare", scene.top, scene.top],
            ["create", "-f", "qcow2", scene.top, "1M"],
        ):
            done = subprocess.run([tool, "image", *command], capture_output=True, text=True)
            assert done.returncode not in (0, 3) and holder in done.stderr, (command, done.stderr)

    def test_a_start_right_after_a_kill(self, request, daemon, tmp_path, rng):
        """The killed one had I/O in flight, whose end the kernel waits for with its locks.

        The successor is a daemon or a tool, in turns. Each must get the image, whenever the
        kernel lets go of it.
        """
        base = images.random_image(tmp_path / "base.qcow2", 32 * MIB, rng, holes=0)
        top = tmp_path / "top.qcow2"
        words = blockdev(top, "n1", **{"cache.direct": "on"})
        words += export("n1", "e", tmp_path / "s")
        tool = request.config.getoption("--stratactl")
        for turn in range(20):
            top.unlink(missing_ok=True)
            images.create(top, backing=base.name)
            daemon.start(*words)
            wire = daemon.wire()
            wire.negotiate()
            wire.send('{"execute":"block-stream","arguments":{"device":"n1","job-id":"j"}}')
            # The moment is random; what is asked holds at each.
            time.sleep(rng.uniform(0, 0.15))
            daemon.kill()
            if turn % 2:
                daemon.start(*words)
                daemon.stop()
            else:
                images.run(tool, "image", "check", "--repair", "leaks", top)
            images.let_go(top)
            images.check(top, leaks=True)
