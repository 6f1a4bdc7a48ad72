"""A daemon with `--state` that is killed and started again."""

import json
import pathlib
import subprocess
import zlib

from . import images


class Lives:
    """One daemon, killed and started again with the same words."""

    def __init__(self, daemon, scene, folder):
        self.daemon = daemon
        self.scene = scene
        self.folder = folder
        self.folder.mkdir(mode=0o700)
        self.words = [*scene.words, "--state", folder]

    def begin(self, *words):
        self.daemon.start(*(words or self.words))
        return self.daemon.qmp()

    def kill(self):
        self.daemon.kill()
        for layer in self.scene.layers:
            images.let_go(layer)

    def again(self):
        self.kill()
        return self.begin()

    def file(self, name="drive0"):
        return self.folder / f"{name}.state"

    def record(self):
        return json.loads(self.file().read_text())["state"]

    def write(self, state):
        """Write a state as the daemon would."""
        text = json.dumps(state, separators=(",", ":"), ensure_ascii=False)
        whole = {
            "stratablk-state": VERSION,
            "crc32": f"{zlib.crc32(text.encode()):08x}",
            "state": state,
        }
        self.file().write_text(json.dumps(whole))
        self.file().chmod(0o600)

    def refused(self, *words):
        """A start that fails; returns what it says."""
        command = [self.daemon.binary, *map(str, words or self.words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1, done
        return done.stderr


# The version of the format that `Lives.write` writes.
VERSION = 2


def identity(path):
    """Inode and time of birth in nanoseconds, as they are recorded."""
    path = pathlib.Path(path)
    inode, born = images.run("stat", "-c", "%i %.9W", path).stdout.split()
    seconds, part = born.split(".")
    return [int(inode), int(seconds) * 10**9 + int(part)]


def stream(qmp, **words):
    qmp.cmd("block-stream", device=words.pop("device", "n2"), job_id="j", **words)
