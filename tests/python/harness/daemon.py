"""Starting and ending the daemon under test."""

import os
import pathlib
import signal
import subprocess
import time

from .qmp import Qmp, Wire

ROOT = pathlib.Path(__file__).resolve().parents[3]


def blockdev(path, node, format="qcow2", backing=None, **options):
    """The words for one image as a node, its file inline."""
    words = [f"driver={format}", f"node-name={node}"]
    words += ["file.driver=file", f"file.filename={path}"]
    if backing:
        words.append(f"backing={backing}")
    words += [f"{key.replace('_', '-')}={value}" for key, value in options.items()]
    return ["--blockdev", ",".join(words)]


def export(node, name, socket, writable=True, queues=None):
    words = ["type=vhost-user-blk", f"id={name}", f"node-name={node}"]
    words += ["addr.type=unix", f"addr.path={socket}"]
    words.append(f"writable={'on' if writable else 'off'}")
    if queues:
        words.append(f"num-queues={queues}")
    return ["--export", ",".join(words)]


def lasting_words(binary, memory, state):
    """The words that keep completed writes and jobs beyond a process, as far as it knows them.

    `memory` is a folder on a tmpfs, `state` one on a disk.
    """
    known = subprocess.run([str(binary), "--help"], capture_output=True, text=True).stdout
    words = []
    if "--journal" in known:
        words += ["--journal", str(memory)]
    if "--state" in known:
        words += ["--state", str(state)]
    return words


class Daemon:
    """One process, its control socket, and a log to look into."""

    def __init__(self, binary, folder):
        self.binary = binary
        self.folder = pathlib.Path(folder)
        self.qmp_path = self.folder / "qmp.sock"
        self.pidfile = self.folder / "daemon.pid"
        self.log = self.folder / "daemon.log"
        self.process = None
        # What stands before the daemon's own command.
        self.before = []
        self._clients = []

    def start(self, *words, control=True):
        """Start with the given words; return when the daemon says it is ready."""
        command = [str(self.binary), *map(str, words)]
        if control:
            command += ["--chardev", f"socket,id=control,path={self.qmp_path},server=on,wait=off"]
            command += ["--monitor", "chardev=control,mode=control"]
        command += ["--pidfile", str(self.pidfile)]
        self.start_bare(command)
        self.wait_ready(lambda: self.pidfile.exists() and self.pidfile.read_text().strip())
        return self

    def start_bare(self, command):
        assert self.process is None or self.process.poll() is not None
        self.pidfile.unlink(missing_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                list(map(str, [*self.before, *command])), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_ready(self, condition, timeout=30):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"the daemon ended:\n{self.read_log()}"
            assert time.monotonic() < deadline, f"not ready in time:\n{self.read_log()}"
            time.sleep(0.005)

    def read_log(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def qmp(self):
        client = Qmp(self.qmp_path)
        self._clients.append(client)
        return client

    def wire(self):
        client = Wire(self.qmp_path)
        self._clients.append(client)
        return client

    def _close_clients(self):
        for client in self._clients:
            client.close()
        self._clients.clear()

    def stop(self, timeout=20, codes=(0,)):
        """SIGTERM, and assert a good end, or another one that is expected."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout)
        self._close_clients()
        assert code in codes, f"exit code {code} after SIGTERM:\n{self.read_log()}"

    def kill(self):
        """SIGKILL: the process has no chance to do anything more."""
        self.process.kill()
        self.process.wait()
        self._close_clients()

    def clean_up(self):
        if self.process and self.process.poll() is None:
            self.kill()
        self._close_clients()


def built(name):
    """The release build of a program, where cargo puts it."""
    target = os.environ.get("CARGO_TARGET_DIR") or "target"
    return str(ROOT / target / "release" / name)


def default_daemon():
    return os.environ.get("STRATABLK_DAEMON") or built("stratablk")


def default_control():
    return os.environ.get("STRATABLK_CONTROL") or built("stratactl")
