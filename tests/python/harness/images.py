"""Disk images, made and judged by qemu-img and qemu-io."""

import json
import pathlib
import random
import subprocess
import time

KIB = 1024
MIB = 1024 * KIB
CLUSTER = 64 * KIB


class Refused(Exception):
    """A program of QEMU's ended with an error; the text is its message."""


def run(*command, allowed=(0,), timeout=120):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout
    )
    if done.returncode not in allowed:
        raise Refused(f"{' '.join(map(str, command))}: {done.stderr}{done.stdout}")
    return done


def qemu_img(*arguments, **options):
    return run("qemu-img", *arguments, **options)


def qemu_io(path, *commands, format="qcow2"):
    """Run commands of qemu-io on an image; a failing one raises Refused."""
    words = []
    for command in commands:
        words += ["-c", command]
    done = run("qemu-io", "-f", format, *words, path)
    # qemu-io can end with 0 though a command failed or a pattern differed.
    for sign in ("failed", "error", "Pattern verification"):
        if sign in done.stdout:
            raise Refused(f"qemu-io {path} {commands}: {done.stdout}")
    return done.stdout


def create(path, size=None, backing=None, format="qcow2", backing_format="qcow2", options=None):
    """An empty image; the backing name is stored as it is given."""
    words = ["create", "-q", "-f", format]
    if options:
        words += ["-o", options]
    if backing:
        words += ["-b", backing, "-F", backing_format]
    words.append(path)
    if size is not None:
        words.append(size)
    qemu_img(*words)
    return pathlib.Path(path)


def random_image(path, size, rng, holes=0.25, format="qcow2"):
    """An image of random data, with a share of its clusters left as holes."""
    raw = pathlib.Path(f"{path}.raw")
    with open(raw, "wb") as out:
        out.truncate(size)
        for offset in range(0, size, CLUSTER):
            if rng.random() >= holes:
                out.seek(offset)
                out.write(rng.randbytes(min(CLUSTER, size - offset)))
    if format == "raw":
        raw.rename(path)
    else:
        qemu_img("convert", "-f", "raw", "-O", format, raw, path)
        raw.unlink()
    return pathlib.Path(path)


def scribble(path, size, rng, times=12):
    """Write patterns at random places of an image, in whole sectors."""
    commands = []
    for _ in range(times):
        offset = rng.randrange(0, size, 512)
        length = min(rng.choice([512, 4 * KIB, 100 * KIB, 256 * KIB]), size - offset)
        commands.append(f"write -P {rng.randrange(1, 256)} {offset} {length}")
    qemu_io(path, *commands)


def make_chain(folder, layers=2, size=8 * MIB, seed=0, scribbles=12):
    """A chain of `layers` images, the bottom one full of random data.

    Returns the paths from the bottom to the top. Backing names are relative,
    as they should be. The overlay on top is as scribbled in as the others.
    """
    rng = random.Random(seed)
    folder = pathlib.Path(folder)
    paths = [random_image(folder / "layer0.qcow2", size, rng)]
    for number in range(1, layers):
        path = folder / f"layer{number}.qcow2"
        create(path, backing=paths[-1].name)
        if scribbles:
            scribble(path, size, rng, scribbles)
        paths.append(path)
    return paths


def flatten(path, target=None, format="qcow2"):
    """What a guest sees in an image, as a raw file."""
    target = pathlib.Path(target or f"{path}.flat")
    qemu_img("convert", "-f", format, "-O", "raw", path, target)
    return target


def let_go(path, timeout=30):
    """Wait until nobody has an image open, after a kill.

    The kernel takes back what a killed process had in its io_uring after the
    process itself is gone, and the locks go with that.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return qemu_io(path, "length")
        except Refused as refused:
            if "lock" not in str(refused) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def check(path, leaks=False):
    """Assert that qemu-img finds nothing wrong (code 3: only leaked clusters)."""
    done = qemu_img("check", "-f", "qcow2", path, allowed=(0, 2, 3))
    allowed = (0, 3) if leaks else (0,)
    assert done.returncode in allowed, f"qemu-img check {path}: {done.stdout}{done.stderr}"


def same(path, raw, format="qcow2"):
    """Assert that an image reads as a raw file does."""
    done = qemu_img("compare", "-f", format, "-F", "raw", path, raw, allowed=(0, 1))
    assert done.returncode == 0, f"{path} is not as {raw}: {done.stdout}"


def info(path):
    shown = qemu_img("info", "-U", "-f", "qcow2", "--output=json", path).stdout
    return json.loads(shown)


def backing(path):
    """The backing file's name as it stands in the header, or None."""
    return info(path).get("backing-filename")


def allocated(path):
    """How many bytes of guest data the image itself holds (zero clusters not)."""
    extents = json.loads(qemu_img("map", "-U", "-f", "qcow2", "--output=json", path).stdout)
    return sum(e["length"] for e in extents if e["depth"] == 0 and e["data"])


def stands_alone(path, raw):
    """Assert that an image has no backing file, is clean, and reads as `raw`."""
    assert backing(path) is None, f"{path} still has a backing file"
    check(path)
    same(path, raw)
