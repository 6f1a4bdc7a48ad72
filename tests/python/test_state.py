"""`--state`: what the next daemon goes on with after this one was killed.

What would be caught: a job that is gone after a restart, or goes on with another
name, speed, pause or option, or from the beginning; one whose end is told twice
or never; a start that guesses where the record and the command line differ; a
failed flush that is forgotten; records of two daemons in one file.
"""

import os
import shutil
import subprocess
import time

import pytest

from harness import images
from harness.daemon import blockdev, default_control, export
from harness.images import MIB
from harness.lives import Lives, stream
from harness.scene import SLOW, make_scene, serve

pytestmark = pytest.mark.beyond_qsd("has no --state")


@pytest.fixture
def lives(daemon, tmp_path, seed):
    return Lives(daemon, make_scene(tmp_path / "chain", seed=seed), tmp_path / "state")


def ended(qmp):
    """How many events so far have told of an end."""
    ends = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
    return sum(event["event"] in ends for event in qmp.events)


def nothing_more(qmp):
    """Assert that nothing of the end of a job has come or comes before another answer."""
    qmp.cmd("query-version")
    while True:
        try:
            qmp.next_event(0.001)
        except Exception:  # there is none
            break
    assert ended(qmp) == 0, qmp.events


def test_a_running_job_goes_on(lives):
    qmp = lives.begin()
    stream(qmp, speed=MIB, on_error="stop", auto_finalize=False, auto_dismiss=False)
    qmp.cmd("block-job-set-speed", device="j", speed=SLOW)
    for _ in range(2):
        qmp = lives.again()
        job = qmp.job("j")
        assert (job["speed"], job["paused"], job["status"]) == (SLOW, False, "running")
        assert (job["auto-finalize"], job["auto-dismiss"]) == (False, False)
        assert job["len"] == 8 * MIB
    assert lives.record()["jobs"][0]["on-error"] == "stop"
    qmp.cmd("block-job-set-speed", device="j", speed=0)
    qmp.wait_event("BLOCK_JOB_PENDING", id="j")
    qmp.cmd("job-finalize", id="j")
    qmp.wait_status("j", "concluded")
    qmp.cmd("job-dismiss", id="j")
    lives.daemon.stop()
    images.stands_alone(lives.scene.top, lives.scene.seen)
    assert lives.record()["jobs"] == []


def test_what_was_copied_before_a_pause_is_not_copied_again(lives):
    qmp = lives.begin()
    stream(qmp, speed=4 * MIB)
    qmp.reached("j", 2 * MIB)
    qmp.cmd("job-pause", id="j")
    qmp.wait_status("j", "paused")
    offset = qmp.job("j")["offset"]
    lives.kill()
    kept = images.allocated(lives.scene.top)
    assert kept > 0
    qmp = lives.begin()
    qmp.poll("the restored job pauses", lambda: qmp.job("j")["status"] == "paused")
    job = qmp.job("j")
    assert job["paused"] and job["speed"] == 4 * MIB
    assert offset <= job["offset"] < job["len"]
    assert job["copied"] == 0
    qmp.cmd("job-resume", id="j")
    qmp.cmd("block-job-set-speed", device="j", speed=0)
    qmp.complete("j")
    lives.daemon.stop()
    assert qmp.copied("j") + kept <= images.allocated(lives.scene.top) + images.CLUSTER
    images.stands_alone(lives.scene.top, lives.scene.seen)


def test_a_clean_end_keeps_the_jobs(lives):
    qmp = lives.begin()
    stream(qmp, speed=SLOW)
    lives.daemon.stop()
    qmp = lives.begin()
    assert qmp.job("j")["speed"] == SLOW
    qmp.cmd("block-job-cancel", device="j")
    assert qmp.job_done("j")[0] == "BLOCK_JOB_CANCELLED"
    lives.kill()
    assert lives.begin().cmd("query-jobs") == []


def test_a_pending_job_is_pending_again(lives):
    qmp = lives.begin()
    stream(qmp, auto_finalize=False)
    qmp.wait_event("BLOCK_JOB_PENDING", id="j")
    qmp = lives.again()
    qmp.poll("pending", lambda: qmp.job("j")["status"] == "pending")
    qmp.cmd("job-finalize", id="j")
    qmp.complete("j")
    lives.daemon.stop()
    images.stands_alone(lives.scene.top, lives.scene.seen)


def test_a_job_that_an_error_stopped_is_stopped_again(daemon, tmp_path, seed, small_disk):
    scene = make_scene(tmp_path / "chain", seed=seed)
    top = small_disk.path / "top.qcow2"
    images.create(top, backing=scene.layers[1])
    images.flatten(top, scene.seen)
    lives = Lives(daemon, scene, tmp_path / "state")
    scene.layers[2] = top
    lives.words = [*serve(scene.layers, tmp_path), "--state", lives.folder]
    qmp = lives.begin()
    stream(qmp, on_error="enospc")
    qmp.wait_status("j", "paused")
    assert qmp.job("j")["io-status"] == "nospace"
    qmp = lives.again()
    qmp.poll("paused", lambda: qmp.job("j")["status"] == "paused")
    assert qmp.job("j")["io-status"] == "nospace"
    small_disk.grow()
    qmp.cmd("job-resume", id="j")
    qmp.complete("j")
    lives.daemon.stop()
    images.check(top, leaks=True)
    images.same(top, scene.seen)


def test_a_concluded_job_waits_to_be_dismissed(lives):
    qmp = lives.begin()
    stream(qmp, auto_dismiss=False)
    qmp.wait_status("j", "concluded")
    before = qmp.job("j")
    for _ in range(2):
        qmp = lives.again()
        after = qmp.job("j")
        for key in ("status", "offset", "len", "copied", "speed"):
            assert after[key] == before[key], key
        nothing_more(qmp)
    qmp.cmd("job-dismiss", id="j")
    qmp = lives.again()
    assert qmp.cmd("query-jobs") == []
    # The chain stays as the job has left it.
    assert "backing-image" not in qmp.cmd("query-block")[0]["inserted"]["image"]


def test_a_failed_job_waits_with_its_error(daemon, tmp_path, seed, small_disk):
    scene = make_scene(tmp_path / "chain", seed=seed)
    top = small_disk.path / "top.qcow2"
    images.create(top, backing=scene.layers[1])
    lives = Lives(daemon, scene, tmp_path / "state")
    scene.layers[2] = top
    lives.words = [*serve(scene.layers, tmp_path), "--state", lives.folder]
    qmp = lives.begin()
    stream(qmp, auto_dismiss=False)
    qmp.wait_status("j", "concluded")
    qmp = lives.again()
    [job] = qmp.cmd("query-jobs")
    assert (job["status"], job["error"]) == ("concluded", "No space left on device")
    qmp.cmd("job-dismiss", id="j")


def committed(lives, qmp, done=False):
    """Bring a job to its end, and put the record back to before that was recorded."""
    stream(qmp, auto_finalize=False)
    qmp.wait_event("BLOCK_JOB_PENDING", id="j")
    state = lives.record()
    qmp.cmd("job-finalize", id="j")
    qmp.complete("j")
    lives.kill()
    [job] = state["jobs"]
    target = job["work"]["target"]
    link = {"node": target, "identity": job["work"]["identity"], "header": None, "below": None}
    link |= {"released": ["n0", "n1"], "released-files": []}
    job["commit"] = {"link": link, "done": done}
    lives.write(state)


@pytest.mark.parametrize("done", [False, True])
def test_an_end_that_the_kill_left_unrecorded_is_told_once(lives, done):
    committed(lives, lives.begin(), done)
    lives.daemon.start(*lives.words)
    qmp = lives.daemon.qmp()
    data = qmp.wait_event("BLOCK_JOB_COMPLETED", device="j")
    assert "error" not in data and data["offset"] == data["len"] == 8 * MIB
    qmp.wait_status("j", "null")
    assert qmp.cmd("query-jobs") == []
    assert "backing-image" not in qmp.cmd("query-block")[0]["inserted"]["image"]
    other = lives.daemon.qmp()
    nothing_more(other)
    for _ in range(2):
        nothing_more(lives.again())
    lives.daemon.stop()
    images.stands_alone(lives.scene.top, lives.scene.seen)


def test_stratactl_waits_for_its_own_job(lives):
    """It is told of the end of one of the same name first."""
    committed(lives, lives.begin())
    lives.daemon.start(*lives.words)
    words = ["stream", "n2", "--job-id", "j", "--wait", "--no-auto-finalize"]
    command = [default_control(), "--socket", str(lives.daemon.qmp_path), *words]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    # The tool is the first client: it says when it is connected by what it prints.
    assert "j" in tool.stdout.readline()
    qmp = lives.daemon.qmp()
    qmp.poll("pending", lambda: (qmp.job("j") or {}).get("status") == "pending")
    assert tool.poll() is None
    qmp.cmd("job-finalize", id="j")
    assert tool.wait(60) == 0, tool.stdout.read()


def test_layers_that_were_streamed_away_may_be_gone(daemon, tmp_path, seed):
    """Though the command line names them, and one of them had taken in the other."""
    scene = make_scene(tmp_path / "chain", seed=seed, writable=(1,))
    lives = Lives(daemon, scene, tmp_path / "state")
    qmp = lives.begin()
    qmp.cmd("block-stream", device="n1", job_id="j")
    qmp.complete("j")
    qmp = lives.again()
    stream(qmp)
    qmp.complete("j")
    lives.kill()
    low, mid, top = scene.layers
    low.unlink()
    mid.unlink()
    scene.layers[:] = [top]
    for _ in range(2):
        lives.begin()
        assert lives.daemon.read_log().count("is left out") >= 2
        lives.kill()
    images.stands_alone(top, scene.seen)


def test_an_end_is_told_to_the_first_who_listens_however_late(lives):
    committed(lives, lives.begin())
    for _ in range(2):
        lives.daemon.start(*lives.words)
        lives.kill()
    lives.begin().wait_event("BLOCK_JOB_COMPLETED", device="j")


def test_a_result_that_was_not_put_in_force_is_none(lives):
    """The record announces what the header does not say yet: the job goes on."""
    pristine = lives.folder / "pristine"
    shutil.copy(lives.scene.top, pristine)
    committed(lives, lives.begin())
    shutil.copyfile(pristine, lives.scene.top)
    qmp = lives.begin()
    qmp.poll("pending", lambda: qmp.job("j")["status"] == "pending")
    nothing_more(qmp)
    assert "backing-image" in qmp.cmd("query-block")[0]["inserted"]["image"]
    qmp.cmd("job-finalize", id="j")
    qmp.complete("j")
    lives.daemon.stop()
    images.stands_alone(lives.scene.top, lives.scene.seen)


def test_killed_around_the_end(lives, rng):
    """Whenever it is killed, the end is told once and the disk reads as it did."""
    pristine = lives.folder / "pristine"
    shutil.copy(lives.scene.top, pristine)
    told = {}
    for _ in range(12):
        shutil.copy(pristine, lives.scene.top)
        lives.file().unlink(missing_ok=True)
        wire = lives.daemon.start(*lives.words).wire()
        wire.negotiate()
        wire.send('{"execute":"block-stream","arguments":{"device":"n2","job-id":"j"}}')
        wire.answer()
        # The moment is chosen by what the record says, and a little later.
        deadline = time.monotonic() + 30
        while '"done"' not in lives.file().read_text() and lives.record()["jobs"]:
            assert time.monotonic() < deadline
        time.sleep(rng.uniform(0, 0.003))
        lives.daemon.process.kill()
        lives.daemon.process.wait()
        before = 0
        try:
            while True:
                before += wire.value().get("event") == "BLOCK_JOB_COMPLETED"
        except (EOFError, OSError):
            pass
        for layer in lives.scene.layers:
            images.let_go(layer)
        recorded = lives.record()["jobs"]
        assert not (before and recorded), "it was told, and is going to be told again"
        qmp = lives.begin()
        if recorded:
            qmp.wait_event("BLOCK_JOB_COMPLETED", device="j")
        else:
            nothing_more(qmp)
        qmp.poll("the job is gone", lambda: qmp.cmd("query-jobs") == [])
        assert ended(qmp) == bool(recorded)
        told[before] = told.get(before, 0) + 1
        assert "backing-image" not in qmp.cmd("query-block")[0]["inserted"]["image"]
        assert qmp.cmd("query-jobs") == []
        lives.kill()
        assert images.backing(lives.scene.top) is None
        images.check(lives.scene.top, leaks=True)
        images.same(lives.scene.top, lives.scene.seen)
    print(f"told before the kill: {told}")


def test_other_words_are_refused(lives, tmp_path):
    qmp = lives.begin()
    stream(qmp, speed=SLOW)
    lives.kill()
    other = tmp_path / "other.qcow2"
    shutil.copy(lives.scene.top, other)
    raw = tmp_path / "raw"
    layers = lives.scene.layers
    state = ["--state", lives.folder]

    def text(*words):
        said = lives.refused(*words, *state)
        assert str(lives.file()) in said and "remove that file" in said, said
        return said

    said = text(*serve([*layers[:2], other], tmp_path))
    assert f"'n2' is in '{other}', and was in '{lives.scene.top}'" in said
    # The same file, with other ways to look at it.
    plain = [*blockdev(lives.scene.top, "n2", "raw"), *export("n2", "drive0", raw)]
    assert "'n2' is of format raw, and was of format qcow2" in text(*plain)
    named = [*blockdev(lives.scene.top, "m2"), *export("m2", "drive0", raw)]
    assert "there is no node 'n2'" in text(*named)
    # What is refused has changed nothing.
    qmp = lives.begin()
    assert qmp.job("j")["speed"] == SLOW
    lives.kill()
    lives.file().unlink()
    qmp = lives.begin(*named, *state)
    assert qmp.cmd("query-jobs") == []


def test_a_base_that_is_gone_from_the_chain_is_refused(lives, tmp_path):
    qmp = lives.begin()
    stream(qmp, speed=SLOW, base_node="n0")
    lives.kill()
    layers = lives.scene.layers
    other = tmp_path / "base.qcow2"
    shutil.copy(layers[0], other)
    said = lives.refused(*serve([other, *layers[1:]], tmp_path), "--state", lives.folder)
    assert f"its base, the qcow2 image in '{layers[0]}', is not under node 'n2'" in said


def test_a_name_of_its_own_for_each_daemon(lives, tmp_path):
    qmp = lives.begin()
    stream(qmp, speed=SLOW)
    words = blockdev(tmp_path / "b.qcow2", "b")
    images.create(tmp_path / "b.qcow2", "1M")
    words += [*export("b", "drive0", tmp_path / "b.sock"), "--state", lives.folder]
    said = lives.refused(*words)
    assert "--state-name" in said and f"process {lives.daemon.process.pid}" in said
    # Another name is no way round what is recorded under the first one.
    lives.kill()
    said = lives.refused(*lives.words, "--state-name", "second")
    assert str(lives.file()) in said and "--state-name=drive0" in said
    qmp = lives.begin()
    assert qmp.job("j")["speed"] == SLOW


@pytest.mark.parametrize("text", ["", "{", '{"stratablk-state": 5, "more": []}'])
def test_a_file_that_is_not_understood_is_kept(lives, text):
    lives.file().write_text(text)
    lives.file().chmod(0o600)
    said = lives.refused(*lives.words)
    assert str(lives.file()) in said and "remove" in said
    if "5" in text:
        assert "version 5" in said and "version 4" in said
    assert lives.file().read_text() == text


def test_a_command_that_cannot_be_recorded_fails(daemon, tmp_path, seed, small_disk):
    lives = Lives(daemon, make_scene(tmp_path / "chain", seed=seed), small_disk.path / "state")
    qmp = lives.begin()
    stream(qmp, speed=SLOW)
    with open(small_disk.path / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    for command in ("job-pause", "job-cancel"):
        _, said = qmp.refused(command, id="j")
        assert "No space left on device" in said and str(lives.file()) in said
    job = qmp.job("j")
    assert (job["status"], job["paused"]) == ("running", False)
    (small_disk.path / "filler").unlink()
    qmp.cmd("job-pause", id="j")
    qmp = lives.again()
    assert qmp.job("j")["paused"]


def mark(lives, layer):
    """Record that a flush of a layer's file has failed."""
    failed = {"file": str(layer), "identity": [0, 0], "errno": 5, "at": 1795424733}
    lives.write({"links": [], "jobs": [], "next-job": 0, "failed-syncs": [failed]})


def control(*words):
    command = [default_control(), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_failed_flush_is_not_forgotten(lives):
    top = lives.scene.top
    mark(lives, top)
    qmp = lives.begin()
    assert "2026-11-23" in lives.daemon.read_log()
    stream(qmp, auto_dismiss=False)
    qmp.wait_status("j", "concluded")
    assert qmp.job("j")["error"]
    said = control("image", "clear-error", top, "--state", lives.folder)
    assert said.returncode == 1 and "clear-sync-error" in said.stderr, said
    qmp.cmd("x-clear-sync-error", device="n2")
    assert lives.record()["failed-syncs"] == []
    qmp.cmd("job-dismiss", id="j")
    qmp = lives.again()
    stream(qmp)
    qmp.complete("j")


def test_a_failed_flush_is_cleared_without_a_daemon(lives):
    top = lives.scene.top
    mark(lives, top)
    other = control("image", "clear-error", lives.scene.layers[0], "--state", lives.folder)
    assert other.returncode == 1 and "no failed flush" in other.stderr, other
    done = control("image", "clear-error", top, "--state", lives.folder)
    assert done.returncode == 0 and "Input/output error" in done.stdout, done
    qmp = lives.begin()
    stream(qmp)
    qmp.complete("j")


def test_a_damaged_neighbour_keeps_no_failed_flush_from_being_cleared(lives):
    mark(lives, lives.scene.top)
    neighbour = lives.file("a")
    neighbour.write_text("{")
    neighbour.chmod(0o600)
    done = control("image", "clear-error", lives.scene.top, "--state", lives.folder)
    assert done.returncode != 0 and str(neighbour) in done.stderr, done
    assert "Input/output error" in done.stdout, done
    assert lives.record()["failed-syncs"] == []


def test_a_failed_flush_is_cleared_by_root_for_another_user(lives):
    mark(lives, lives.scene.top)
    os.chown(lives.file(), 12345, 12345)
    done = control("image", "clear-error", lives.scene.top, "--state", lives.folder)
    assert done.returncode == 0, done
    for file in (lives.file(), lives.folder / "drive0.lock"):
        assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (12345, 0o600), file


@pytest.mark.parametrize("text", ["{", '{"stratablk-state": 99}'])
def test_a_neighbour_that_may_be_about_the_same_images_is_not_passed_over(lives, text):
    neighbour = lives.file("a")
    neighbour.write_text(text + f" of {lives.scene.layers[0]}")
    neighbour.chmod(0o600)
    said = lives.refused()
    assert str(neighbour) in said and str(lives.scene.layers[0]) in said, said
    neighbour.write_text(text + " of something else")
    lives.begin()
    assert "another daemon's state" in lives.daemon.read_log()


def test_a_neighbour_that_records_the_same_image_under_another_path_is_heard(lives):
    qmp = lives.begin()
    stream(qmp, speed=SLOW)
    lives.kill()
    other = lives.folder.parent / "other"
    other.symlink_to(lives.scene.folder)
    layers = [other / layer.name for layer in lives.scene.layers]
    words = [*serve(layers, lives.scene.folder), "--state", lives.folder]
    assert "--state-name=drive0" in lives.refused(*words, "--state-name", "second")
