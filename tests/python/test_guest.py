"""A real Linux guest on the image, while jobs work on the layers below it.

The guest judges with its own means (checksums of its files, fio's
verification), and afterwards qemu-img and e2fsck judge what is on the host.
Each job script is a shell script; `report` and `hold` come from guest.py.
"""

import hashlib
import shutil

import pytest

from harness import images
from harness.daemon import blockdev, export
from harness.guests import file_system_is_good, overlay, stop_and_judge
from harness.images import KIB, MIB, run
from harness.scene import serve

# A TCG guest on a busy machine is slow; this only ends what hangs.
pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

# So slow that a stream of the golden image takes minutes: longer than the guest
# is given for its work.
SLOW = 256 * KIB

WORK = """
mount -t ext4 /dev/vda /mnt || return 1
files_are_right before || return 1
hold ready
verify --name=w --filename=/mnt/fio.dat --size=24M --rw=randwrite --fsync=32 || return 1
files_are_right during || return 1
report worked
hold end
files_are_right after || return 1
verify --name=w --filename=/mnt/fio.dat --size=24M --rw=randwrite --verify_only=1 || return 1
umount /mnt
"""


def test_streamed_under_a_guest(daemon, tmp_path, golden, boot):
    """The main job whole: the guest works while its base is copied in behind it.

    The stream is too slow to end before the guest's work does, and is let go
    when that is done.
    """
    top = overlay(tmp_path, golden)
    before = hashlib.sha256(golden.read_bytes()).digest()
    daemon.start(*serve([golden, top], tmp_path))
    qmp = daemon.qmp()
    with boot(tmp_path / "drive0.sock", job=WORK) as guest:
        guest.held("ready")
        qmp.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
        guest.go()
        guest.wait_for("worked", timeout=120)
        assert qmp.job("j"), "the stream was over before the guest's work was"
        qmp.cmd("block-job-set-speed", device="j", speed=0)
        qmp.complete("j")
        guest.held("end")
        guest.go()
        assert guest.wait_done() == 0, guest.console()
    stop_and_judge(daemon, top, golden)
    assert hashlib.sha256(golden.read_bytes()).digest() == before


def test_cancelled_and_restarted(daemon, tmp_path, golden, boot, rng):
    """Started and cancelled again and again under load, then to the end."""
    top = overlay(tmp_path, golden)
    daemon.start(*serve([golden, top], tmp_path))
    qmp = daemon.qmp()
    with boot(tmp_path / "drive0.sock", job=WORK) as guest:
        guest.held("ready")
        guest.go()
        for number in range(6):
            job = f"j{number}"
            qmp.cmd("block-stream", device="n1", job_id=job, speed=2 * MIB)
            goal = rng.randrange(64 * KIB, 3 * MIB)
            qmp.reached(job, goal)
            qmp.cmd("block-job-cancel", device=job, force=rng.random() < 0.5)
            assert qmp.job_done(job)[0] == "BLOCK_JOB_CANCELLED"
            assert images.backing(top) is not None
        guest.wait_for("worked", timeout=120)
        qmp.cmd("block-stream", device="n1", job_id="last")
        qmp.complete("last")
        guest.held("end")
        guest.go()
        assert guest.wait_done() == 0, guest.console()
    stop_and_judge(daemon, top, golden)


def test_two_queues(daemon, tmp_path, golden, boot):
    """Two processors write through two queues while the stream runs."""
    job = """
    report queues "$(ls /sys/block/vda/mq | wc -l)"
    mount -t ext4 /dev/vda /mnt || return 1
    hold ready
    verify --name=w --directory=/mnt --size=12M --numjobs=2 --rw=randwrite --fsync=32 || return 1
    report worked
    hold end
    files_are_right after || return 1
    verify --name=w --directory=/mnt --size=12M --numjobs=2 --rw=randwrite --verify_only=1 ||
        return 1
    umount /mnt
    """
    top = overlay(tmp_path, golden)
    words = blockdev(golden, "n0", read_only="on") + blockdev(top, "n1", backing="n0")
    words += export("n1", "drive0", tmp_path / "drive0.sock", queues=2)
    daemon.start(*words)
    qmp = daemon.qmp()
    with boot(tmp_path / "drive0.sock", job=job, queues=2) as guest:
        guest.held("ready")
        assert guest.value("queues") == "2"
        qmp.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
        guest.go()
        guest.wait_for("worked", timeout=120)
        qmp.cmd("block-job-set-speed", device="j", speed=0)
        qmp.complete("j")
        guest.held("end")
        guest.go()
        assert guest.wait_done() == 0, guest.console()
    stop_and_judge(daemon, top, golden)


def test_four_layers(daemon, tmp_path, boot, rng):
    """A chain of four, streamed in two steps; the guest reads every byte in between.

    No file system here: the guest's checksum of the whole disk is compared
    with the host's of what the chain said before.
    """
    size = 48 * MIB
    paths = [images.random_image(tmp_path / "layer0.qcow2", size, rng)]
    for number in (1, 2, 3):
        paths.append(images.create(tmp_path / f"layer{number}.qcow2", backing=paths[-1].name))
        images.scribble(paths[-1], size, rng, times=60)
    seen = images.flatten(paths[-1])
    expected = hashlib.md5(seen.read_bytes()).hexdigest()
    job = """
    sum() { fresh; report "$1" "$(md5sum </dev/vda | cut -d ' ' -f 1)"; }
    sum before
    hold ready
    sum during
    hold partial
    sum partial
    hold whole
    sum whole
    """
    daemon.start(*serve(paths, tmp_path))
    qmp = daemon.qmp()
    with boot(tmp_path / "drive0.sock", job=job) as guest:
        guest.held("ready")
        qmp.cmd("block-stream", device="n3", job_id="one", base_node="n0", speed=64 * KIB)
        guest.go()
        guest.held("partial")
        qmp.cmd("block-job-set-speed", device="one", speed=0)
        qmp.complete("one")
        guest.go()
        guest.held("whole")
        qmp.cmd("block-stream", device="n3", job_id="two")
        qmp.complete("two")
        guest.go()
        assert guest.wait_done() == 0, guest.console()
        for moment in ("before", "during", "partial", "whole"):
            assert guest.value(moment) == expected, moment
    daemon.stop()
    images.stands_alone(paths[-1], seen)


@pytest.mark.beyond_qsd("tells the guest that it writes through while it caches")
def test_fsync_then_kill(daemon, tmp_path, golden, boot):
    """What the guest synced is in the image, though the daemon had no time to end.

    Once on the bare disk, read back by qemu-io; once as a file, where the
    metadata of the guest's file system must have arrived too.
    """
    job = """
    mount -t ext4 /dev/vdb /mnt || return 1
    tr '\\0' '\\132' </dev/zero |
        dd of=/dev/vda bs=1M seek=4 count=3 iflag=fullblock conv=fsync 2>/dev/null || return 1
    tr '\\0' '\\133' </dev/zero |
        dd of=/mnt/synced bs=64k count=20 iflag=fullblock conv=fsync 2>/dev/null || return 1
    hold synced
    """
    bare = images.create(tmp_path / "bare.qcow2", 32 * MIB)
    top = overlay(tmp_path, golden)
    words = blockdev(bare, "bare") + export("bare", "bare", tmp_path / "bare.sock")
    daemon.start(*words, *serve([golden, top], tmp_path))
    with boot(tmp_path / "bare.sock", tmp_path / "drive0.sock", job=job) as guest:
        guest.held("synced")
        daemon.kill()
        guest.kill()
    images.let_go(bare)
    images.let_go(top)
    images.check(bare, leaks=True)
    images.qemu_io(bare, f"read -P 0x5a {4 * MIB} {3 * MIB}", "read -P 0 0 4M")
    images.check(top, leaks=True)
    raw = images.flatten(top)
    # The guest did not unmount: its journal is played first, as at a mount.
    run("e2fsck", "-fy", raw, allowed=(0, 1))
    run("debugfs", "-R", f"dump /synced {tmp_path}/synced", raw)
    assert (tmp_path / "synced").read_bytes() == b"\x5b" * (20 * 64 * KIB)


def test_daemon_is_killed_under_a_guest(daemon, tmp_path, boot, monkeypatch):
    """QEMU hands over what was in flight, and the guest sees a pause and no error."""
    job = """
    hold ready
    verify --name=w --filename=/dev/vda --size=24M --rw=randwrite || return 1
    report verified yes
    """
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(32 * MIB))
    socket = tmp_path / "disk.sock"
    words = blockdev(disk, "disk", format="raw") + export("disk", "disk", socket)
    monkeypatch.setenv("STRATABLK_LOG", "info")
    daemon.start(*words)
    with boot(socket, job=job) as guest:
        guest.held("ready")
        guest.go()
        for _ in range(3):
            # In the middle of its writes, wherever that is.
            qmp = daemon.qmp()
            daemon.wait_ready(
                lambda qmp=qmp: qmp.cmd("query-blockstats")[0]["stats"]["wr_operations"] > 20
            )
            daemon.kill()
            daemon.start(*words)
        assert guest.wait_done() == 0, guest.console()
        assert guest.value("verified") == "yes"
    assert "what is in flight is kept in a region" in daemon.read_log()
    daemon.stop()


def test_fstrim(daemon, tmp_path, golden, boot):
    """Deleted in the guest and trimmed: the image's clusters are free again."""
    job = """
    mount -t ext4 /dev/vda /mnt || return 1
    rm -r /mnt/d0* || return 1
    sync
    hold deleted
    fstrim -v /mnt || return 1
    left=$(grep -v '  d0' /mnt/MD5SUMS)
    echo "$left" >/mnt/MD5SUMS
    files_are_right after || return 1
    umount /mnt
    """
    image = tmp_path / "disk.qcow2"
    shutil.copy(golden, image)
    image.chmod(0o644)
    words = blockdev(image, "n0", discard="unmap")
    daemon.start(*words, *export("n0", "drive0", tmp_path / "drive0.sock"))
    with boot(tmp_path / "drive0.sock", job=job) as guest:
        guest.held("deleted")
        guest.go()
        assert guest.wait_done() == 0, guest.console()
    daemon.stop()
    images.check(image)
    file_system_is_good(image)
    # Ten of 23 folders went, of 48 MB; whole clusters of some of it are free.
    freed = images.allocated(golden) - images.allocated(image)
    assert freed > 10 * MIB, f"{freed} bytes were freed"


def test_fstrim_on_an_overlay(daemon, tmp_path, golden, boot):
    """Trimmed in an overlay, a range reads as zeros, and not as the base has it.

    And a stream afterwards does not fetch it back.
    """
    job = """
    fresh
    blkdiscard -o 1048576 -l 8388608 /dev/vda || return 1
    hold discarded
    fresh
    report sum "$(dd if=/dev/vda bs=1M skip=1 count=8 2>/dev/null | md5sum | cut -d ' ' -f 1)"
    """
    top = overlay(tmp_path, golden)
    words = blockdev(golden, "n0", read_only="on")
    words += blockdev(top, "n1", backing="n0", discard="unmap")
    daemon.start(*words, *export("n1", "drive0", tmp_path / "drive0.sock"))
    qmp = daemon.qmp()
    with boot(tmp_path / "drive0.sock", job=job) as guest:
        guest.held("discarded")
        qmp.cmd("block-stream", device="n1", job_id="j")
        qmp.complete("j")
        guest.go()
        assert guest.wait_done() == 0, guest.console()
        assert guest.value("sum") == hashlib.md5(bytes(8 * MIB)).hexdigest()
    daemon.stop()
    images.check(top)
    images.qemu_io(top, "read -P 0 1M 8M")


def test_one_guest_after_another(daemon, tmp_path, golden, boot):
    """A front-end goes, the next one comes, and finds what the first one wrote."""
    top = overlay(tmp_path, golden)
    daemon.start(*serve([golden, top], tmp_path))
    for number in range(3):
        job = f"""
        mount -t ext4 /dev/vda /mnt || return 1
        report boots "$(cat /mnt/boots 2>/dev/null)"
        echo {number + 1} >/mnt/boots
        umount /mnt
        """
        with boot(tmp_path / "drive0.sock", job=job) as guest:
            assert guest.wait_done() == 0, guest.console()
            assert guest.value("boots") == (str(number) if number else "")
    daemon.stop()
    images.check(top)
    file_system_is_good(top)


def test_guest_dies_in_the_middle(daemon, tmp_path, golden, boot):
    """QEMU killed with requests in flight harms neither the daemon nor a job."""
    job = """
    mount -t ext4 /dev/vda /mnt || return 1
    hold ready
    verify --name=w --filename=/mnt/fio.dat --size=24M --rw=randwrite --time_based --runtime=600
    """
    top = overlay(tmp_path, golden)
    daemon.start(*serve([golden, top], tmp_path))
    qmp = daemon.qmp()
    with boot(tmp_path / "drive0.sock", job=job) as guest:
        guest.held("ready")
        qmp.cmd("block-stream", device="n1", job_id="j", speed=MIB)
        guest.go()
        qmp.reached("j", 2 * MIB)
        guest.kill()
    qmp.cmd("block-job-set-speed", device="j", speed=0)
    qmp.complete("j")
    # The next guest finds a disk as after a power failure: good for ext4.
    job = "mount -t ext4 /dev/vda /mnt && files_are_right after && umount /mnt"
    with boot(tmp_path / "drive0.sock", job=job) as guest:
        assert guest.wait_done() == 0, guest.console()
    stop_and_judge(daemon, top, golden)


def test_read_only_export(daemon, tmp_path, golden, boot):
    """The guest is told that it cannot write, and the image stays as it is."""
    job = """
    report ro "$(cat /sys/block/vda/ro)"
    dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync 2>/dev/null && return 1
    mount -t ext4 -o ro /dev/vda /mnt || return 1
    files_are_right before
    """
    before = hashlib.sha256(golden.read_bytes()).digest()
    words = blockdev(golden, "n0", read_only="on")
    words += export("n0", "drive0", tmp_path / "drive0.sock", writable=False)
    daemon.start(*words)
    with boot(tmp_path / "drive0.sock", job=job) as guest:
        assert guest.wait_done() == 0, guest.console()
        assert guest.value("ro") == "1"
    daemon.stop()
    assert hashlib.sha256(golden.read_bytes()).digest() == before


def test_copy_on_read(daemon, tmp_path, boot, rng):
    """What the guest reads is copied into the overlay; what it does not, is not.

    In QEMU's way: a node of its own above the image.
    """
    job = """
    report sum "$(dd if=/dev/vda bs=1M skip=4 count=16 2>/dev/null | md5sum | cut -d ' ' -f 1)"
    """
    base = images.random_image(tmp_path / "base.qcow2", 64 * MIB, rng, holes=0)
    top = images.create(tmp_path / "top.qcow2", backing=base.name)
    seen = images.flatten(top)
    with open(seen, "rb") as raw:
        raw.seek(4 * MIB)
        expected = hashlib.md5(raw.read(16 * MIB)).hexdigest()
    words = blockdev(base, "n0", read_only="on") + blockdev(top, "n1", backing="n0")
    words += ["--blockdev", "driver=copy-on-read,node-name=cor,file=n1"]
    daemon.start(*words, *export("cor", "drive0", tmp_path / "drive0.sock"))
    with boot(tmp_path / "drive0.sock", job=job) as guest:
        assert guest.wait_done() == 0, guest.console()
        assert guest.value("sum") == expected
    daemon.stop()
    images.check(top)
    images.same(top, seen)
    # The guest reads ahead, and looks for partitions; not at half the disk.
    assert 16 * MIB <= images.allocated(top) < 32 * MIB


@pytest.mark.beyond_qsd("block_resize knows no exports, and crashes it")
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_another_size(request, daemon, tmp_path, boot, format):
    """The guest's driver sees each new size without a restart, and writes behind the old end.

    Told by hand, by `stratactl`, and once behind its back: the daemon is killed, and the next one
    serves a disk that has grown meanwhile.
    """
    job = r"""
    size() { report "$1" "$(blockdev --getsize64 /dev/vda)"; }
    await() {
        n=0
        while [ "$(blockdev --getsize64 /dev/vda)" != "$1" ]; do
            n=$((n + 1)); [ $n -gt 600 ] && return 1
            sleep 0.1
        done
    }
    size first
    hold ready
    await $((24 << 20)) || { size stuck; return 1; }
    dd if=/dev/vda bs=1M skip=16 count=8 iflag=direct 2>/dev/null | tr -d '\0' | wc -c >/tmp/new
    report zeros "$(cat /tmp/new)"
    yes new | dd of=/dev/vda bs=1M seek=16 count=8 iflag=fullblock oflag=direct conv=fsync 2>/dev/null
    report grown "$(dd if=/dev/vda bs=1M skip=16 count=8 iflag=direct 2>/dev/null | md5sum)"
    hold killed
    await $((40 << 20)) || { size stuck; return 1; }
    report after "$(dd if=/dev/vda bs=1M skip=16 count=8 iflag=direct 2>/dev/null | md5sum)"
    hold small
    await $((8 << 20)) || { size stuck; return 1; }
    dd if=/dev/zero of=/dev/vda bs=1M seek=7 count=1 oflag=direct conv=fsync 2>/dev/null || return 1
    report small "$(dd if=/dev/vda bs=1M skip=7 count=2 iflag=direct 2>/dev/null | wc -c)"
    """
    disk = tmp_path / f"disk.{format}"
    run("qemu-img", "create", "-q", "-f", format, disk, "16M")
    words = blockdev(disk, "n0", format=format) + export("n0", "drive0", tmp_path / "drive0.sock")
    daemon.start(*words)
    binary = request.config.getoption("--stratactl")

    def resize(*words):
        run(binary, "--socket", daemon.qmp_path, "resize", "drive0", *words)

    with boot(tmp_path / "drive0.sock", job=job) as guest:
        guest.held("ready")
        assert guest.value("first") == str(16 * MIB)
        guest.go()
        resize("+8M")
        guest.held("killed")
        assert guest.value("zeros") == "0"
        daemon.kill()
        run("qemu-img", "resize", "-q", "-f", format, disk, "40M")
        daemon.start(*words)
        guest.go()
        guest.held("small")
        assert guest.value("after") == guest.value("grown")
        guest.go()
        resize("8M", "--shrink")
        assert guest.wait_done() == 0, guest.console()
        # What can be read from there on: up to the new end.
        assert guest.value("small") == str(MIB)
    daemon.stop()
    if format == "qcow2":
        images.check(disk)
