"""SIGKILL of the daemon under a running guest, again and again: the guest sees pauses, and no more.

A guest with two queues and ext4 on an O_DIRECT overlay works with fio, verification and fsync at
depth 32, while a stream copies its base in. The daemon is killed at random moments, started again
with the same words, and QEMU connects again by itself.

What would be caught: an I/O error in the guest, a byte that fio did not write, a request that is
never answered (the guest hangs), a golden file that reads differently, an image with errors at the
end, a daemon that does not start right after a kill, a pause that is longer than its reasons.

STRATABLK_GUEST_KILLS=n sets the number of kills. With 100 or more the length of the pauses is
judged as well, which takes a machine that has nothing else to do.
"""

import os
import pathlib
import statistics
import tempfile
import time

import pytest

from harness import images
from harness.daemon import blockdev, export, lasting_words
from harness.guests import overlay, stop_and_judge
from harness.images import KIB

KILLS = int(os.environ.get("STRATABLK_GUEST_KILLS", "20"))
# Pauses without the front-end's own timer, in seconds.
MEDIAN, LONGEST = 0.1, 1.0
# What only a hanging daemon or guest takes.
PATIENCE = 60

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(300 + 6 * KILLS),
    pytest.mark.beyond_qsd("loses what completed and hangs guests when it is killed"),
]

JOB = """
mount -t ext4 /dev/vda /mnt || return 1
files_are_right before || return 1
# Always something in flight, also while the other fio starts or ends.
fio --name=heart --eta=never --filename=/dev/vda --readonly --rw=randread --bs=4k --direct=1 \
    --ioengine=psync --time_based --runtime=100000 --rate_iops=300 --output=/tmp/heart.out &
heart=$!
(read -r _ </dev/console; touch /tmp/stop) &
report working
round=0
while [ ! -e /tmp/stop ]; do
    round=$((round + 1))
    verify --name=w --eta=never --directory=/mnt --numjobs=2 --size=6M --rw=randwrite \
        --iodepth=32 --fsync=32 --randseed=$round || return 1
    report round $round
done
kill -0 $heart || { report heart STOPPED; tail -n 5 /tmp/heart.out; return 1; }
kill -INT $heart
wait $heart
grep -q 'err= 0' /tmp/heart.out || { report heart FAILED; tail -n 5 /tmp/heart.out; return 1; }
report worked
files_are_right after || return 1
umount /mnt
if dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|blocked for more|timed? ?out'; then
    report kernel COMPLAINS
    return 1
fi
"""


def connections(socket):
    """Whether somebody listens at a socket's path, and how many front-ends have connected to it."""
    listening, connected = False, 0
    for line in pathlib.Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[-1] == str(socket):
            listening |= fields[3] == "00010000"
            connected += fields[5] == "03"
    return listening, connected


class Killed:
    """A daemon that is killed and started again, with a clock."""

    def __init__(self, daemon, words, socket):
        self.daemon = daemon
        self.socket = socket
        daemon.start(*words)
        self.command = daemon.process.args
        self.pauses = []

    def answered(self, wire):
        """How many requests this process has completed."""
        wire.send('{"execute":"query-blockstats"}')
        stats = [device["stats"] for device in wire.answer()["return"]]
        kinds = ("rd_operations", "wr_operations", "flush_operations")
        return sum(entry[kind] for entry in stats for kind in kinds)

    def again(self, soon=None):
        """Kill it, start it, and wait until a request is answered; or kill that one `soon` too."""
        killed = time.monotonic()
        self.daemon.kill()
        while soon is not None:
            self.daemon.start_bare(self.command)
            time.sleep(soon)  # the moment of a kill
            self.alive()
            soon = None
            killed = time.monotonic()
            self.daemon.kill()
        self.daemon.start_bare(self.command)
        self.wait("somebody to listen", lambda: connections(self.socket)[0])
        listening = time.monotonic()
        self.wait("the front-end", lambda: connections(self.socket)[1])
        connected = time.monotonic()
        self.wait("the control socket", lambda: connections(self.daemon.qmp_path)[0])
        wire = self.daemon.wire()
        wire.negotiate()
        self.wait("an answer", lambda: self.answered(wire))
        now = time.monotonic()
        wire.close()
        self.pauses.append((listening - killed + now - connected, now - killed))

    def alive(self):
        code = self.daemon.process.poll()
        assert code is None, f"ended by itself with {code}:\n{self.daemon.read_log()[-2000:]}"

    def wait(self, what, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.alive()
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
            time.sleep(0.001)

    def print(self):
        own = sorted(pause for pause, _ in self.pauses)
        whole = sorted(pause for _, pause in self.pauses)
        for what, times in ("pauses", own), ("with the front-end's timer", whole):
            print(
                f"{what}: median {1e3 * statistics.median(times):.0f} ms,"
                f" longest {1e3 * times[-1]:.0f} ms;",
                *(f"{1e3 * pause:.0f}" for pause in times),
            )


class Stream:
    """A stream that lasts as long as the kills do: it goes on, or is started again."""

    def __init__(self, daemon, top, goes_on):
        self.daemon = daemon
        self.top = top
        self.goes_on = goes_on
        self.started = False
        self.offset = 0

    def look_after(self):
        qmp = self.daemon.qmp()
        job = qmp.job("j")
        if self.started and self.goes_on:
            assert job, "the stream is gone after a kill"
            assert job["offset"] >= self.offset, "the stream went back"
        if not job:
            qmp.cmd("block-stream", device="n1", job_id="j", speed=256 * KIB)
            job = qmp.job("j")
        self.started = True
        self.offset = job["offset"]
        qmp.close()

    def finish(self):
        qmp = self.daemon.qmp()
        if qmp.job("j"):
            qmp.cmd("block-job-set-speed", device="j", speed=0)
            qmp.complete("j")
        if images.backing(self.top):
            qmp.cmd("block-stream", device="n1", job_id="j")
            qmp.complete("j")


@pytest.fixture
def memory():
    """A folder on a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield pathlib.Path(folder)


def test_a_guest_survives_any_number_of_kills(daemon, tmp_path, golden, boot, rng, memory):
    top = overlay(tmp_path, golden)
    socket = tmp_path / "drive0.sock"
    words = blockdev(golden, "n0", read_only="on", **{"file.cache.direct": "on"})
    words += blockdev(top, "n1", backing="n0", discard="unmap", **{"file.cache.direct": "on"})
    words += export("n1", "drive0", socket, queues=2)
    state = tmp_path / "state"
    state.mkdir()
    lasting = lasting_words(daemon.binary, memory, state)
    killed = Killed(daemon, [*words, *lasting], socket)
    stream = Stream(daemon, top, goes_on="--state" in lasting)
    with boot(socket, job=JOB, queues=2) as guest:
        guest.wait_for("working", timeout=PATIENCE)
        stream.look_after()
        for _ in range(KILLS):
            time.sleep(rng.uniform(0, 0.8))  # the moment of a kill
            killed.again(soon=rng.uniform(0, 0.15) if rng.random() < 0.2 else None)
            stream.look_after()
        killed.print()
        stream.finish()
        guest.go()
        assert guest.wait_done(timeout=2 * PATIENCE) == 0, guest.console()
    # What requests had allocated and not yet mapped is lost to the image: clusters, no data.
    stop_and_judge(daemon, top, golden, leaks=True)
    if KILLS >= 100:
        own = sorted(pause for pause, _ in killed.pauses)
        assert statistics.median(own) <= MEDIAN, "the pauses above"
        assert own[-1] <= LONGEST, "the pauses above"
