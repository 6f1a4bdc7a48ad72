"""The control socket as a wire: bytes in, JSON out, whatever a client sends."""

import json
import os

import pytest

from harness.scene import SLOW, make_scene

QUERY = {"execute": "query-block-jobs"}


@pytest.fixture
def running(daemon, tmp_path, seed):
    scene = make_scene(tmp_path, layers=2, seed=seed)
    daemon.start(*scene.words)
    return daemon


@pytest.fixture
def wire(running):
    """A negotiated connection."""
    wire = running.wire()
    assert wire.negotiate() == {"return": {}}
    return wire


def test_greeting(running):
    """qemu.qmp needs both members; anything but a list of known words would mislead it."""
    greeting = running.wire().greeting["QMP"]
    version = greeting["version"]["qemu"]
    assert all(isinstance(version[part], int) for part in ("major", "minor", "micro"))
    assert isinstance(greeting["version"]["package"], str)
    assert isinstance(greeting["capabilities"], list)


def test_nothing_before_negotiation(running):
    wire = running.wire()
    wire.send(json.dumps({**QUERY, "id": 1}))
    refused = wire.answer()
    assert refused["error"]["class"] == "CommandNotFound" and refused["id"] == 1
    assert wire.negotiate() == {"return": {}}
    wire.send(json.dumps(QUERY))
    assert wire.answer() == {"return": []}
    # And negotiated is negotiated: the second time it is an unknown command.
    wire.send('{"execute":"qmp_capabilities"}')
    assert wire.answer()["error"]["class"] == "CommandNotFound"


def test_lines_end_as_they_should(wire):
    wire.send(json.dumps(QUERY))
    wire.answer()
    assert wire.received.endswith(b"\r\n")
    for line in wire.received.split(b"\r\n")[:-1]:
        json.loads(line)


def test_split_packets(wire):
    """One value in as many packets as it has bytes."""
    for byte in json.dumps({**QUERY, "id": "split"}).encode():
        wire.send(bytes([byte]))
    assert wire.answer() == {"return": [], "id": "split"}


def test_several_values_in_a_packet(wire):
    """Answered all, in their order, with and without space between."""
    packet = ""
    for number in range(50):
        packet += json.dumps({**QUERY, "id": number}) + ["", "\n", " \r\n\t"][number % 3]
    wire.send(packet)
    assert [wire.answer()["id"] for _ in range(50)] == list(range(50))


def test_a_value_and_a_half(wire):
    """The end of one and the start of the next arrive together."""
    text = json.dumps({**QUERY, "id": "a"}) + json.dumps({**QUERY, "id": "b"})
    cut = len(text) // 2 + 7
    wire.send(text[:cut])
    assert wire.answer()["id"] == "a"
    wire.send(text[cut:])
    assert wire.answer()["id"] == "b"


def test_single_quotes(wire):
    wire.send("{'execute':'query-block-jobs','id':'it\\'s'}")
    assert wire.answer() == {"return": [], "id": "it's"}


@pytest.mark.parametrize(
    "identity",
    [0, -5, 1.5, "", "ü\n\t\"\\", True, None, [1, [2]], {"a": {"b": None}}, 2**53],
    ids=repr,
)  # fmt: skip
def test_id_of_any_type(wire, identity):
    """Comes back as it was, with an answer and with an error alike."""
    wire.send(json.dumps({**QUERY, "id": identity}))
    answer = wire.answer()
    assert answer["id"] == identity and type(answer["id"]) is type(identity)
    wire.send(json.dumps({"execute": "no-such-thing", "id": identity}))
    answer = wire.answer()
    assert answer["error"]["class"] == "CommandNotFound" and answer["id"] == identity


@pytest.mark.parametrize(
    "bad",
    [
        b'{"execute": }',
        b'{"execute": "query-block-jobs",}',
        b'{"execute" "query-block-jobs"}',
        b"}",
        b"]",
        b'{"execute": nonsense}',
        b"\xff\xfe\xfd",
        b'{"execute": "bad \xff byte"}',
        b'{"execute": "query-block-jobs" ]',
        b"{]",
        b'{"execute": "' + b"\x01" + b'"}',
    ],
    ids=repr,
)
def test_bad_json(wire, bad):
    """An error, and the session lives on. Catches a hang-up, and a stuck parser."""
    # The line end is where a parser that has lost its way takes up again.
    wire.send(bad + b"\n")
    wire.send(json.dumps({**QUERY, "id": "after"}) + "\n")
    answer, before = wire.answer_to("after")
    assert before, "the bad input was passed over in silence"
    assert all(value["error"]["class"] in ("GenericError", "CommandNotFound") for value in before)
    assert answer["return"] == []


@pytest.mark.parametrize(
    "odd",
    [
        "[]",
        "7",
        '"query-block-jobs"',
        "{}",
        '{"execute": 7}',
        '{"execute": "query-block-jobs", "arguments": []}',
        '{"execute": "query-block-jobs", "arguments": {"x": 1}}',
        '{"execute": "query-block-jobs", "colour": "red"}',
    ],
)
def test_json_that_is_no_command(wire, odd):
    wire.send(odd + "\n")
    assert wire.answer()["error"]["class"] == "GenericError"
    wire.send(json.dumps({**QUERY, "id": "after"}))
    assert wire.answer() == {"return": [], "id": "after"}


def test_too_deep(wire):
    """Nesting has an end before the stack has."""
    wire.send(b'{"execute":' + b"[" * 5000 + b"]" * 5000 + b"}\n")
    wire.send(json.dumps({**QUERY, "id": "after"}) + "\n")
    answer, before = wire.answer_to("after")
    assert before and all("error" in value for value in before)
    assert answer["return"] == []


@pytest.mark.beyond_qsd("takes minutes for it")
def test_too_long(wire):
    """A value over 64 MiB is refused; it is not gathered for ever."""
    wire.send(b'{"execute":"')
    piece = b"x" * (1 << 20)
    for _ in range(65):
        wire.send(piece)
    wire.send('"}\n' + json.dumps({**QUERY, "id": "after"}) + "\n")
    answer, before = wire.answer_to("after")
    assert before and all("error" in value for value in before)
    assert answer["return"] == []


def test_client_goes_away_in_the_middle(running, is_qsd):
    """Half a command, a full one without waiting, and then nothing: harms nobody."""
    for last in ['{"execute":"query-', json.dumps({"execute": "query-named-block-nodes"}) * 200]:
        wire = running.wire()
        wire.negotiate()
        wire.send(last)
        wire.close()
    after = running.qmp()
    assert after.cmd("query-block-jobs") == []


def test_a_job_outlives_its_client(running):
    first = running.qmp()
    first.cmd("block-stream", device="n1", job_id="j", speed=SLOW)
    first.close()
    second = running.qmp()
    assert second.job("j")["speed"] == SLOW
    second.cmd("block-job-set-speed", device="j", speed=0)
    second.complete("j")


@pytest.mark.beyond_qsd("serves one client per monitor")
class TestSeveralClients:
    def test_side_by_side(self, running):
        """All see the same jobs, and one that says nothing holds up nobody."""
        silent = running.wire()
        half = running.wire()
        half.send('{"execute":"qmp_cap')
        clients = [running.qmp() for _ in range(5)]
        clients[0].cmd("block-stream", device="n1", job_id="j", speed=SLOW)
        for client in clients:
            assert client.job("j")["speed"] == SLOW
        clients[4].cmd("block-job-set-speed", device="j", speed=0)
        for client in clients:
            client.complete("j")
        half.send('abilities"}')
        assert half.answer() == {"return": {}}
        assert silent.negotiate() == {"return": {}}

    def test_one_that_does_not_read(self, running):
        """Its answers wait for it; the others' do not wait for it."""
        deaf = running.wire()
        deaf.negotiate()
        deaf._socket.setblocking(False)
        request = json.dumps({"execute": "query-named-block-nodes"}).encode() * 100
        try:
            for _ in range(2000):
                deaf._socket.send(request)
        except BlockingIOError:
            pass
        lively = running.qmp()
        lively.cmd("block-stream", device="n1", job_id="j")
        lively.complete("j")

    def test_many_come_and_go(self, running):
        """Catches clients that leave something behind: descriptors, threads."""

        def held():
            base = f"/proc/{running.process.pid}"
            return len(os.listdir(f"{base}/fd")), len(os.listdir(f"{base}/task"))

        watcher = running.qmp()
        for _ in range(20):
            running.qmp().close()
        before = held()
        for _ in range(200):
            running.qmp().close()
        watcher.poll("the last to be let go", lambda: held() <= before)


def test_commands_of_the_surroundings(running):
    """What a client asks first to find out where it is."""
    qmp = running.qmp()
    names = {command["name"] for command in qmp.cmd("query-commands")}
    needed = "block-stream block-job-set-speed block-job-cancel block-job-pause block-job-resume"
    needed += " block-job-complete block-job-finalize block-job-dismiss query-block-jobs query-jobs"
    needed += " job-pause job-resume job-cancel job-complete job-finalize job-dismiss"
    needed += " query-version query-commands query-named-block-nodes query-block-exports quit"
    assert set(needed.split()) <= names
    assert qmp.cmd("query-version")["qemu"]["major"] >= 0
    nodes = {node["node-name"]: node for node in qmp.cmd("query-named-block-nodes")}
    assert nodes["n1"]["drv"] == "qcow2" and nodes["n1"]["backing_file_depth"] == 1
    [export] = qmp.cmd("query-block-exports")
    assert export["id"] == "drive0" and export["type"] == "vhost-user-blk"
    assert export["node-name"] == "n1" and export["shutting-down"] is False


def test_quit(running):
    """An answer, and then an end with code 0."""
    qmp = running.qmp()
    assert qmp.cmd("quit") == {}
    assert running.process.wait(20) == 0
