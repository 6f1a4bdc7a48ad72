#!/usr/bin/env python3
"""A small Linux guest for the quickstart and the tests.

The guest is Debian's cloud kernel with an initramfs of busybox, the virtio
modules and fio. What it does is said by a job script, carried in by a second
initramfs appended to the first, so nothing is rebuilt from one run to the
next. The script talks to the host over the serial console:

    guest to host   lines "@@ NAME VALUE", printed with `report NAME VALUE`
    host to guest   one line ends a `hold`

The guest powers off when the script ends; `report done` gives its exit code.
Only Python's own library is needed here.

    guest.py build                     make the initramfs, print where it is
    guest.py run --disk SOCKET --job SCRIPT      boot, run, show the console
    guest.py tree FOLDER --megabytes N           files with their checksums
"""

import argparse
import gzip
import hashlib
import io
import lzma
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import threading
import time

CACHE = pathlib.Path(
    os.environ.get("STRATABLK_CACHE")
    or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stratablk"
)

# In this order: on 6.1 virtio needs virtio_ring to be there first. A name
# that a kernel does not have as a module is built in, and skipped.
MODULES = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "jbd2",
    "ext4",
]

INIT = """#!/bin/sh
export PATH=/bin:/usr/bin:/sbin HOME=/
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
mkdir -p /tmp /mnt
while read -r module; do insmod "/modules/$module.ko"; done </modules/order

stty -echo </dev/console 2>/dev/null
report() { echo "@@ $*"; }
hold() { report holding "$1"; read -r _ </dev/console; }
. /job.sh
report done $?
poweroff -f
"""


def kernel_image():
    """The unpacked kernel, as fetched by contrib/setup."""
    found = sorted((CACHE / "kernel" / "boot").glob("vmlinuz-*"))
    if not found:
        raise SystemExit(f"no kernel under {CACHE}/kernel; run contrib/setup")
    return found[-1]


class Archive:
    """An initramfs in the making: cpio's "newc" format, which the kernel reads."""

    def __init__(self):
        self._out = io.BytesIO()
        self._inode = 0
        self._folders = set()

    def _entry(self, name, mode, data=b"", device=(0, 0)):
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = [self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0]
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._align()
        self._out.write(data)
        self._align()

    def _align(self, to=4):
        self._out.write(b"\0" * (-self._out.tell() % to))

    def folder(self, name):
        name = name.strip("/")
        if name and name not in self._folders:
            self.folder(os.path.dirname(name))
            self._folders.add(name)
            self._entry(name, 0o040755)

    def file(self, name, data, mode=0o644):
        name = name.strip("/")
        self.folder(os.path.dirname(name))
        self._entry(name, 0o100000 | mode, data)

    def link(self, name, target):
        self.folder(os.path.dirname(name.strip("/")))
        self._entry(name.strip("/"), 0o120777, target.encode())

    def console(self):
        self.folder("dev")
        self._entry("dev/console", 0o020600, device=(5, 1))

    def finish(self):
        self._entry("TRAILER!!!", 0)
        self._align(512)
        return self._out.getvalue()


def read_module(path):
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    return path.read_bytes()


def add_modules(archive, version):
    """Put in the modules that this kernel has, and their order for init."""
    found = {}
    for path in (CACHE / "kernel" / "lib" / "modules" / version).rglob("*.ko*"):
        found[path.name.split(".ko")[0].replace("-", "_")] = path
    order = [name for name in MODULES if name in found]
    if "virtio_blk" not in order:
        raise SystemExit(f"kernel {version} has no virtio_blk module")
    for name in order:
        archive.file(f"modules/{name}.ko", read_module(found[name]))
    archive.file("modules/order", "".join(name + "\n" for name in order).encode())


def add_program(archive, program):
    """Put in a dynamically linked program and the libraries that ldd names."""
    archive.file(f"bin/{os.path.basename(program)}", pathlib.Path(program).read_bytes(), 0o755)
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        match = re.search(r"(?:=> )?(/\S+) \(0x", line)
        if match:
            archive.file(match[1], pathlib.Path(match[1]).read_bytes(), 0o755)


def cached(name, made_from, fill):
    """A file in the cache, made by `fill(archive)` unless it is there.

    The name carries what the file was made from: a change makes a new one.
    """
    key = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    path = CACHE / f"{name}-{key}.cpio"
    if not path.exists():
        archive = Archive()
        fill(archive)
        # Rename at the end: a run that is cut short leaves no half a file,
        # and two at once do not meet.
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(archive.finish())
        partial.rename(path)
        for old in CACHE.glob(f"{name}-*.cpio"):
            if old != path:
                old.unlink(missing_ok=True)
    return path


def find_program(name):
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if not path:
        raise SystemExit(f"{name} is missing; run contrib/setup")
    info = os.stat(path)
    return path, f"{path} {info.st_size} {info.st_mtime_ns}"


def build():
    """Make the guest's files unless they are there: (kernel, initramfs, fio)."""
    kernel = kernel_image()
    version = kernel.name.removeprefix("vmlinuz-")
    busybox, busybox_id = find_program("busybox")
    fio, fio_id = find_program("fio")

    def fill_base(archive):
        archive.console()
        for name in ("proc", "sys", "tmp", "mnt"):
            archive.folder(name)
        archive.file("init", INIT.encode(), 0o755)
        archive.file("bin/busybox", pathlib.Path(busybox).read_bytes(), 0o755)
        applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
        for applet in applets.stdout.split():
            if applet != "busybox":
                archive.link(f"bin/{applet}", "busybox")
        add_modules(archive, version)

    base = cached("initramfs", [version, INIT, *MODULES, busybox_id], fill_base)
    with_fio = cached("fio", [fio_id], lambda archive: add_program(archive, fio))
    return kernel, base, with_fio


def initramfs_with_job(job, folder):
    """The initramfs for a job script, as a file in `folder`.

    The kernel unpacks one archive after another. fio and its libraries are
    tens of megabytes, and a job that does not use it boots faster without.
    """
    _, base, with_fio = build()
    archive = Archive()
    archive.file("job.sh", job.encode(), 0o755)
    path = pathlib.Path(folder) / "initramfs"
    with open(path, "wb") as out:
        for part in [base, with_fio] if re.search(r"\bfio\b", job) else [base]:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, out, 1 << 20)
        out.write(gzip.compress(archive.finish(), 1))
    return path


def reconnect_option():
    """How this QEMU spells "try again when the back-end goes away"."""
    shown = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"version (\d+)\.(\d+)", shown)
    newer = match and (int(match[1]), int(match[2])) >= (9, 2)
    return "reconnect-ms=500" if newer else "reconnect=1"


def qemu_command(disks, initramfs, queues=1, memory="512M", append=""):
    """QEMU's command line for a guest with these vhost-user-blk sockets as disks."""
    # Without KVM: stock kernels do not boot under it everywhere. With plain
    # `-smp 1` such a guest loses interrupts under load; maxcpus=2 mends that.
    accel = os.environ.get("STRATABLK_ACCEL", "tcg")
    command = ["qemu-system-x86_64", "-accel", accel, "-M", "q35,memory-backend=m"]
    command += ["-object", f"memory-backend-memfd,id=m,size={memory},share=on", "-m", memory]
    command += ["-smp", f"{queues},maxcpus={max(2, queues)}"]
    command += ["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]
    command += ["-kernel", str(kernel_image()), "-initrd", str(initramfs)]
    command += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off {append}".rstrip()]
    for index, disk in enumerate(disks):
        command += ["-chardev", f"socket,id=c{index},path={disk},{reconnect_option()}"]
        command += ["-device", f"vhost-user-blk-pci,chardev=c{index},num-queues={queues}"]
    return command


class GuestError(Exception):
    """The guest did not do what was waited for; carries its console."""


class Guest:
    """A running guest. Use it in a `with`, so that no QEMU stays behind."""

    def __init__(self, disks, job, folder, queues=1, on_line=None, append=""):
        initramfs = initramfs_with_job(job, folder)
        self.lines = []
        self.reports = []
        self._on_line = on_line
        self._changed = threading.Condition()
        self._closed = False
        self.process = subprocess.Popen(
            qemu_command(disks, initramfs, queues, append=append),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def _read(self):
        try:
            for raw in self.process.stdout:
                self._take(raw.decode(errors="replace").rstrip("\r\n"))
        finally:
            # Also when there is nobody left to show a line to: who waits must not go on.
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _take(self, line):
        with self._changed:
            self.lines.append(line)
            # A kernel message may stand before the mark in the same line.
            at = line.find("@@ ")
            if at >= 0:
                name, _, value = line[at + 3 :].partition(" ")
                self.reports.append((name, value))
            self._changed.notify_all()
        if self._on_line:
            self._on_line(line)

    def console(self, last=60):
        return "\n".join(self.lines[-last:])

    def wait_for(self, name, value=None, timeout=60):
        """Wait until the guest has reported `name` (with `value`); return its value."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for reported, found in self.reports:
                    if reported == name and value in (None, found):
                        return found
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    why = "the guest ended" if self._closed else f"{timeout} s passed"
                    raise GuestError(f"{why} before report {name!r}:\n{self.console()}")
                self._changed.wait(left)

    def held(self, name, timeout=60):
        """Wait until the guest stands at `hold name`."""
        self.wait_for("holding", name, timeout)

    def go(self):
        """End the guest's `hold`."""
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def wait_done(self, timeout=90):
        """Wait for the end of the job and for power-off; return the job's exit code."""
        code = int(self.wait_for("done", timeout=timeout))
        self.process.wait(timeout=30)
        self._reader.join(timeout=10)
        return code

    def value(self, name):
        """The last value reported under `name`, or None."""
        values = [value for reported, value in self.reports if reported == name]
        return values[-1] if values else None

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass


def make_tree(folder, megabytes, seed=1):
    """Fill a folder with files of many sizes and a list of their checksums.

    Most bytes are random, so that nothing can stand in for anything else; some
    files are text or mostly holes, as real trees have them. The list, MD5SUMS,
    is what `md5sum -c` in the guest takes.
    """
    folder = pathlib.Path(folder)
    rng = random.Random(seed)
    left = megabytes << 20
    sums = []
    number = 0
    while left > 0:
        size = min(left, rng.choice([700, 5_000, 30_000, 200_000, 1_500_000, 6_000_000]))
        kind = rng.random()
        if kind < 0.8:
            data = rng.randbytes(size)
        elif kind < 0.9:
            data = (f"line {number} of a text file\n".encode() * (size // 20 + 1))[:size]
        else:
            data = rng.randbytes(size // 8) + bytes(size - size // 8)
        name = f"d{number % 23:02}/f{number:05}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sums.append(f"{hashlib.md5(data).hexdigest()}  {name}\n")
        left -= size
        number += 1
    (folder / "MD5SUMS").write_text("".join(sums))
    return number


def run(arguments):
    """The `run` command: boot, and show the console or only the reports."""
    import tempfile

    def show(line):
        if arguments.all or arguments.driven:
            print(line, flush=True)
        elif "@@ " in line:
            print(line[line.find("@@ ") + 3 :], flush=True)

    with tempfile.TemporaryDirectory(prefix="stratablk-guest-") as folder:
        job = pathlib.Path(arguments.job).read_text()
        guest = Guest(arguments.disk, job, folder, arguments.queues, show, arguments.append)
        with guest:
            if arguments.release:
                # The script that started us ends a hold by making this file.
                threading.Thread(
                    target=release_when_made, args=(guest, arguments.release), daemon=True
                ).start()
            if arguments.driven:
                print("@@ qemu", guest.process.pid, flush=True)
                threading.Thread(target=follow, args=(guest,), daemon=True).start()
            try:
                return guest.wait_done(arguments.timeout)
            except GuestError as error:
                print(error, file=sys.stderr)
                return 1


def release_when_made(guest, path):
    while guest.process.poll() is None:
        if os.path.exists(path):
            guest.go()
            return
        time.sleep(0.1)


def follow(guest):
    """Do what the program that started us says: a line ends a hold, its end ends the guest.

    It writes a line only after a hold. Not through sys.stdin, whose lock would
    trouble Python's exit while this thread waits for more.
    """
    while os.read(0, 4096):
        guest.go()
    guest.process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make the initramfs, print where it is")
    running = commands.add_parser("run", help="boot a guest and run a job script in it")
    running.add_argument("--disk", action="append", default=[], metavar="SOCKET")
    running.add_argument("--job", required=True, metavar="SCRIPT")
    running.add_argument("--queues", type=int, default=1)
    running.add_argument("--append", default="", metavar="WORDS", help="for the guest's kernel")
    running.add_argument("--timeout", type=float, default=170)
    running.add_argument("--release", metavar="FILE", help="end a hold when this file appears")
    running.add_argument(
        "--driven",
        action="store_true",
        help="show all and QEMU's process id; a line of input ends a hold, end of input the guest",
    )
    running.add_argument("--all", action="store_true", help="show the whole console")
    tree = commands.add_parser("tree", help="fill a folder with files and their checksums")
    tree.add_argument("folder")
    tree.add_argument("--megabytes", type=int, default=256)
    tree.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "build":
        print(*build(), sep="\n")
        return 0
    if arguments.command == "tree":
        print(make_tree(arguments.folder, arguments.megabytes, arguments.seed), "files")
        return 0
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
