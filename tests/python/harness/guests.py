"""What tests with real guests share: shell functions for jobs, and judges of the disk afterwards."""

import os
import shutil
import subprocess

from . import images
from .images import qemu_img

# Shell functions that most jobs use.
COMMON = r"""
fresh() { sync; echo 3 >/proc/sys/vm/drop_caches; }
files_are_right() {
    fresh
    (cd /mnt && md5sum -c MD5SUMS) >/tmp/sums 2>&1 && report files "$1" right && return 0
    grep -v OK /tmp/sums | head -n 5
    report files "$1" WRONG
    return 1
}
verify() {
    fio --bs=4k-64k --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 \
        --verify_fatal=1 --randseed=11 --output=/tmp/fio.out "$@" && return 0
    tail -n 20 /tmp/fio.out
    return 1
}
"""


def file_system_is_good(image):
    raw = images.flatten(image)
    done = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True)
    os.unlink(raw)
    assert done.returncode == 0, done.stdout + done.stderr


def leans_on_nothing(top, base):
    """Put the base back under a copy: nothing may shine through."""
    copy = shutil.copy(top, f"{top}.with-base")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", copy)
    done = qemu_img("compare", "-f", "qcow2", "-F", "qcow2", top, copy, allowed=(0, 1))
    assert done.returncode == 0, done.stdout
    os.unlink(copy)


def stop_and_judge(daemon, top, base, leaks=False):
    """The end of most tests: the overlay alone is the guest's whole disk."""
    daemon.stop()
    assert images.backing(top) is None
    images.check(top, leaks=leaks)
    leans_on_nothing(top, base)
    file_system_is_good(top)


def overlay(tmp_path, golden, **options):
    return images.create(tmp_path / "overlay.qcow2", backing=str(golden), **options)
