"""The command line: both dialects, what is said of mistakes, and how it ends."""

import json
import os
import signal
import socket
import struct
import subprocess

import pytest

from harness import images
from harness.daemon import blockdev, export
from harness.images import CLUSTER, MIB
from harness.scene import SLOW, make_scene

ONLY_OURS = pytest.mark.beyond_qsd("speaks its own dialect only")


@pytest.fixture
def scene(tmp_path, seed):
    return make_scene(tmp_path / "chain", layers=2, seed=seed)


def features(connection):
    """Ask a vhost-user back-end for its features: the least of all conversations."""
    get_features, version_1 = 1, 0x1
    connection.settimeout(30)
    connection.sendall(struct.pack("<III", get_features, version_1, 0))
    reply = b""
    while len(reply) < 20:
        piece = connection.recv(20 - len(reply))
        assert piece, "the back-end hung up"
        reply += piece
    request, _flags, size, bits = struct.unpack("<IIIQ", reply)
    assert request == get_features and size == 8
    return bits


def assert_serves(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        assert features(connection) & (1 << 32), "no VIRTIO_F_VERSION_1"


def run(daemon, *words, **options):
    """Run the daemon for an end that it comes to by itself."""
    command = [daemon.binary, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, **options)


class TestVhostUserConventions:
    """What VMMs and libvirt expect of a back-end program."""

    pytestmark = ONLY_OURS

    def test_socket_and_file(self, daemon, scene, tmp_path):
        """One disk in two words; backing names count from the overlay's folder."""
        daemon.start(
            f"--socket-path={tmp_path}/s",
            f"--blk-file={scene.top}",
            "--num-queues=2",
            control=False,
        )
        assert_serves(tmp_path / "s")
        daemon.stop()

    def test_with_control(self, daemon, scene, tmp_path):
        """The one disk can be streamed: it has an export id to name."""
        words = ["--socket-path", tmp_path / "s", "--blk-file", scene.top]
        daemon.start(*words, "--qmp", daemon.qmp_path, control=False)
        qmp = daemon.qmp()
        [disk] = qmp.cmd("query-block-exports")
        qmp.cmd("block-stream", device=disk["id"])
        qmp.complete(disk["id"])
        daemon.stop()
        images.stands_alone(scene.top, scene.seen)

    @pytest.mark.parametrize("kind", ["listening", "connected"])
    def test_inherited_socket(self, daemon, scene, kind):
        """`--fd`: a socket that the starting program has opened already."""
        ours, theirs = socket.socketpair()
        if kind == "listening":
            theirs = socket.socket(socket.AF_UNIX)
            theirs.bind(str(scene.folder / "inherited"))
            theirs.listen(1)
        command = [daemon.binary, f"--fd={theirs.fileno()}", f"--blk-file={scene.top}"]
        daemon.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        if kind == "listening":
            ours = socket.socket(socket.AF_UNIX)
            ours.connect(str(scene.folder / "inherited"))
        assert features(ours) & (1 << 32)
        ours.close()

    def test_read_only(self, daemon, scene, tmp_path):
        words = [f"--socket-path={tmp_path}/s", f"--blk-file={scene.top}", "--read-only"]
        daemon.start(*words, control=False)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{tmp_path}/s")
            assert features(connection) & (1 << 5), "no VIRTIO_BLK_F_RO"
        daemon.stop()

    @pytest.mark.parametrize("more", [[], ["--blk-file=/nowhere", "--socket-path=/nowhere/s"]])
    def test_print_capabilities(self, daemon, more):
        """Says what it can, and heeds nothing else on the line."""
        done = run(daemon, "--print-capabilities", *more)
        assert done.returncode == 0
        assert json.loads(done.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}

    @pytest.mark.parametrize("cache", ["none", "writeback", "writethrough", "unsafe"])
    def test_cache_modes(self, daemon, scene, tmp_path, cache):
        words = [f"--socket-path={tmp_path}/s", f"--blk-file={scene.top}", "--cache", cache]
        daemon.start(*words, "--serial", "S-1", control=False)
        assert_serves(tmp_path / "s")
        daemon.stop()
        images.check(scene.top)


class TestQsdDialect:
    def test_json(self, daemon, scene, tmp_path):
        """JSON means what the dotted keys mean."""
        node = {
            "driver": "qcow2",
            "node-name": "n1",
            "file": {"driver": "file", "filename": str(scene.top)},
        }
        words = ["--blockdev", json.dumps(node)]
        daemon.start(*words, *export("n1", "drive0", tmp_path / "s"))
        qmp = daemon.qmp()
        qmp.cmd("block-stream", device="n1", job_id="j")
        qmp.complete("j")
        daemon.stop()
        images.stands_alone(scene.top, scene.seen)

    def test_file_node_of_its_own(self, daemon, scene, tmp_path):
        """The file as a node with a name, which the format node refers to."""
        words = ["--blockdev", f"driver=file,node-name=f1,filename={scene.top}"]
        words += ["--blockdev", "driver=qcow2,node-name=n1,file=f1"]
        daemon.start(*words, *export("n1", "drive0", tmp_path / "s"))
        assert_serves(tmp_path / "s")
        daemon.stop()

    def test_raw(self, daemon, tmp_path, rng):
        image = images.random_image(tmp_path / "a.raw", MIB, rng, format="raw")
        daemon.start(*blockdev(image, "n0", format="raw"), *export("n0", "e", tmp_path / "s"))
        assert_serves(tmp_path / "s")
        daemon.stop()

    def test_iothread(self, daemon, scene, tmp_path):
        """Accepted where scripts give one."""
        words = ["--object", "iothread,id=io0", *blockdev(scene.top, "n1")]
        exported = export("n1", "drive0", tmp_path / "s")
        exported[1] += ",iothread=io0"
        daemon.start(*words, *exported)
        assert_serves(tmp_path / "s")
        daemon.stop()

    def test_several_exports(self, daemon, tmp_path, rng):
        words = []
        for number in range(4):
            image = images.random_image(tmp_path / f"{number}.qcow2", MIB, rng)
            words += blockdev(image, f"n{number}")
            words += export(f"n{number}", f"e{number}", tmp_path / f"s{number}")
        daemon.start(*words)
        for number in range(4):
            assert_serves(tmp_path / f"s{number}")
        qmp = daemon.qmp()
        ids = {e["id"] for e in qmp.cmd("query-block-exports")}
        assert ids == {"e0", "e1", "e2", "e3"}
        daemon.stop()

    def test_control_socket_by_descriptor(self, daemon, scene):
        """`fd=`: the control socket opened by the starting program."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(daemon.qmp_path))
        listener.listen(1)
        number = listener.fileno()
        command = [daemon.binary, *scene.words]
        command += ["--chardev", f"socket,id=c,fd={number},server=on,wait=off"]
        command += ["--monitor", "chardev=c,mode=control"]
        daemon.process = subprocess.Popen(list(map(str, command)), pass_fds=[number])
        listener.close()
        assert daemon.qmp().cmd("query-block-jobs") == []


GOOD_EXPORT = "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=s"

# The words, and what must be found in the message: the place and the mistake.
MISTAKES = {
    "unknown option": (["--blokdev", "driver=file"], ["--blokdev"]),
    "no value": (["--blockdev", "driver=file,node-name"], ["node-name"]),
    "unknown driver": (["--blockdev", "driver=qcow9,node-name=n"], ["qcow9"]),
    "unknown key": (
        ["--blockdev", "driver=file,node-name=n,filename=a.raw,colour=red"],
        ["colour"],
    ),
    "bad JSON": (["--blockdev", '{"driver": "file",,}'], ["--blockdev", "JSON"]),
    "missing key": (["--blockdev", "driver=file,node-name=n"], ["filename"]),
    "missing node name": (
        ["--export", "type=vhost-user-blk,id=e,addr.type=unix,addr.path=s"],
        ["node-name"],
    ),
    "unknown node": (["--export", GOOD_EXPORT.replace("=n,", "=nosuch,")], ["nosuch"]),
    "unknown export type": (
        ["--export", "type=carrier-pigeon,id=e,node-name=n"],
        ["carrier-pigeon"],
    ),
    "not a number": (
        ["--blockdev", "driver=file,node-name=n,filename=a.raw"]
        + ["--export", GOOD_EXPORT + ",num-queues=many"],
        ["num-queues"],
    ),
    "not on or off": (
        ["--blockdev", "driver=file,node-name=n,filename=a.raw,read-only=maybe"],
        ["read-only"],
    ),
    "missing file": (["--blockdev", "driver=file,node-name=n,filename=absent.raw"], ["absent.raw"]),
    "unknown chardev": (["--monitor", "chardev=nosuch,mode=control"], ["nosuch"]),
    "twice the same name": (
        ["--blockdev", "driver=file,node-name=n,filename=a.raw"] * 2,
        ["n"],
    ),
}
OUR_MISTAKES = {
    "bad cache mode": (
        ["--socket-path=s", "--blk-file=a.raw", "--cache=sometimes"],
        ["sometimes", "writeback"],
    ),
    "no queues": (["--socket-path=s", "--blk-file=a.raw", "--num-queues=0"], ["--num-queues", "0"]),
    "missing image": (["--socket-path=s", "--blk-file=absent.raw"], ["absent.raw"]),
    "no socket": (["--blk-file=a.raw"], ["--socket-path"]),
    "no image": (["--socket-path=s"], ["--blk-file"]),
    "long serial": (
        ["--socket-path=s", "--blk-file=a.raw", "--serial=123456789012345678901"],
        ["--serial", "20"],
    ),
}


class TestMistakes:
    def check(self, daemon, folder, words, fragments):
        (folder / "a.raw").write_bytes(bytes(MIB))
        done = run(daemon, *words, cwd=folder)
        assert done.returncode not in (0, 101) and done.returncode > 0, done
        for fragment in fragments:
            assert fragment in done.stderr, done.stderr
        assert not (folder / "s").exists(), "a socket was left behind"

    @pytest.mark.parametrize("case", MISTAKES)
    def test_both(self, daemon, tmp_path, case, is_qsd):
        words, fragments = MISTAKES[case]
        # In its own words QSD does not repeat the option; ours does.
        self.check(daemon, tmp_path, words, fragments[-1:] if is_qsd else fragments)

    @ONLY_OURS
    @pytest.mark.parametrize("case", OUR_MISTAKES)
    def test_ours(self, daemon, tmp_path, case):
        self.check(daemon, tmp_path, *OUR_MISTAKES[case])

    @ONLY_OURS
    def test_the_status_tells_what_cannot_get_better(self, daemon, tmp_path):
        """A supervisor tries again what may be there the next time."""
        one_disk = [f"--socket-path={tmp_path}/s", f"--blk-file={tmp_path}/a.raw"]
        assert run(daemon, *one_disk, "--bogus").returncode == 2
        assert run(daemon, *one_disk).returncode == 1, "there is no image yet"


@pytest.mark.parametrize("word", ["--help", "-h", "--version", "-V"])
def test_help_and_version(daemon, word):
    done = run(daemon, word)
    assert done.returncode == 0 and done.stdout and not done.stderr


class TestTheEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, daemon, scene, number):
        """Exit code 0, the pid file gone, the image as it was."""
        daemon.start(*scene.words)
        assert int(daemon.pidfile.read_text()) == daemon.process.pid
        daemon.process.send_signal(number)
        assert daemon.process.wait(20) == 0, daemon.read_log()
        assert not daemon.pidfile.exists()
        images.check(scene.top)
        images.same(scene.top, scene.seen)

    def test_signal_while_a_job_runs(self, daemon, scene):
        """A job does not hold up the end, and leaves a clean image."""
        daemon.start(*scene.words)
        qmp = daemon.qmp()
        qmp.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
        qmp.reached("j", CLUSTER)
        daemon.stop()
        assert scene.backing_of(1) == scene.layers[0]
        images.check(scene.top)
        images.same(scene.top, scene.seen)

    def test_signal_while_a_job_is_paused(self, daemon, scene):
        """Nor does one that nobody will resume."""
        daemon.start(*scene.words)
        qmp = daemon.qmp()
        qmp.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
        qmp.cmd("job-pause", id="j")
        qmp.wait_status("j", "paused")
        daemon.stop()
        images.check(scene.top)

    def test_sockets_left_by_a_killed_one(self, daemon, scene):
        """The next start is not stopped by the files of the last."""
        daemon.start(*scene.words)
        daemon.kill()
        images.let_go(scene.top)
        assert os.path.exists(daemon.qmp_path)
        daemon.start(*scene.words)
        assert_serves(scene.folder / "drive0.sock")
        assert daemon.qmp().cmd("query-block-jobs") == []
        daemon.stop()


class TestWaiting:
    """Starts that wait for something end when they are told to, and say what they wait for.

    What would be caught: a signal that is swallowed, and what is left behind after one.
    """

    pytestmark = pytest.mark.beyond_qsd("goes on waiting")

    @pytest.fixture
    def waiting(self, daemon, scene, tmp_path):
        """A daemon that waits for the first clients of two control sockets."""
        words = blockdev(scene.top, "n1") + export("n1", "e", tmp_path / "s")
        for name in ("a", "b"):
            words += ["--chardev", f"socket,id={name},path={tmp_path}/{name},server=on,wait=on"]
            words += ["--monitor", f"chardev={name}"]
        daemon.start_bare([daemon.binary, *words, "--pidfile", daemon.pidfile])
        daemon.wait_ready(lambda: f"client on {tmp_path}/b" in daemon.read_log())
        return daemon

    def assert_nothing_left(self, daemon, tmp_path):
        assert not daemon.pidfile.exists()
        assert not [name for name in ("a", "b", "s") if (tmp_path / name).exists()]

    @pytest.mark.parametrize("signals", [["TERM"], ["INT"], ["HUP"], ["TERM", "TERM"]])
    def test_signal(self, waiting, tmp_path, signals):
        assert f"waiting for a client on {tmp_path}/a" in waiting.read_log()
        for name in signals:
            waiting.process.send_signal(getattr(signal, f"SIG{name}"))
        assert waiting.process.wait(20) == 0, waiting.read_log()
        self.assert_nothing_left(waiting, tmp_path)

    def test_signal_while_one_is_missing(self, waiting, tmp_path):
        """The first socket has its client, who says nothing; the second has none."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/a")
            assert client.recv(1)
            assert not waiting.pidfile.exists()
            waiting.process.send_signal(signal.SIGTERM)
            assert waiting.process.wait(20) == 0
        self.assert_nothing_left(waiting, tmp_path)

    def test_each_socket_gets_its_client(self, waiting, tmp_path):
        with socket.socket(socket.AF_UNIX) as a, socket.socket(socket.AF_UNIX) as b:
            b.connect(f"{tmp_path}/b")
            a.connect(f"{tmp_path}/a")
            waiting.wait_ready(waiting.pidfile.exists)
            waiting.stop()
        self.assert_nothing_left(waiting, tmp_path)

    def test_in_the_background(self, daemon, scene, tmp_path):
        """The process in the foreground says that it did not come to be."""
        words = ["--daemonize", "--pidfile", daemon.pidfile]
        words += ["--chardev", f"socket,id=m,path={tmp_path}/m,server=on", "--monitor", "m"]
        words += blockdev(scene.top, "n1") + export("n1", "e", tmp_path / "s")
        daemon.start_bare([daemon.binary, *words])
        daemon.wait_ready(lambda: "waiting for a client" in daemon.read_log())
        children = f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children"
        with open(children) as file:
            [child] = map(int, file.read().split())
        os.kill(child, signal.SIGTERM)
        assert daemon.process.wait(20) == 1
        assert not (tmp_path / "m").exists() and not (tmp_path / "s").exists()

    def test_an_image_that_is_a_pipe(self, daemon, tmp_path):
        """To open one is to wait for its other end: it is refused without being opened."""
        os.mkfifo(tmp_path / "pipe")
        done = run(daemon, *blockdev(tmp_path / "pipe", "n", format="raw", read_only="on"))
        assert done.returncode == 1 and "not a file or a block device" in done.stderr
