"""The control socket: QEMU's own client from PyPI, and a bare one for odd input."""

import asyncio
import json
import socket
import time

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient

# Generous: it only decides how long a broken daemon takes to be noticed.
PATIENCE = 30


class Qmp:
    """`qemu.qmp`'s client, one call after another, with every event kept."""

    def __init__(self, path, name="test"):
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient(name)
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self.events = []
        try:
            self._run(self._client.connect(str(path)), PATIENCE)
        except BaseException:
            self._loop.close()
            raise

    def _run(self, work, timeout):
        return self._loop.run_until_complete(asyncio.wait_for(work, timeout))

    @property
    def greeting(self):
        return self._client.greeting

    def cmd(self, name, /, **arguments):
        """Execute a command. Underscores in argument names stand for hyphens."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self._run(self._client.execute(name, arguments), PATIENCE)

    def refused(self, name, /, **arguments):
        """Execute a command that must fail; return (class, desc)."""
        try:
            answer = self.cmd(name, **arguments)
        except ExecuteError as error:
            return error.error_class, str(error)
        raise AssertionError(f"{name} {arguments} was not refused but answered {answer}")

    def hmp(self, line):
        return self.cmd("human-monitor-command", command_line=line)

    def next_event(self, timeout=PATIENCE):
        event = self._run(self._listener.get(), timeout)
        self.events.append(event)
        return event

    def wait_event(self, name, timeout=PATIENCE, **data):
        """Wait for an event by its name and some of its data; return all data.

        Events that came before it stay in `events`; one that was waited for
        already does not count again.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                event = self.next_event(max(left, 0.001))
            except asyncio.TimeoutError:
                raise AssertionError(
                    f"no event {name} {data} within {timeout} s; seen: {self.events}"
                ) from None
            found = event.get("data", {})
            if event["event"] == name and all(found.get(k) == v for k, v in data.items()):
                return found

    def wait_status(self, job, status):
        return self.wait_event("JOB_STATUS_CHANGE", id=job, status=status)

    def job_done(self, job, timeout=PATIENCE):
        """Wait until a job is gone; return the data of the event that ended it."""
        self.wait_event("JOB_STATUS_CHANGE", timeout, id=job, status="null")
        for event in reversed(self.events):
            if event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
                if event["data"]["device"] == job:
                    return event["event"], event["data"]
        raise AssertionError(f"job {job} ended without saying how: {self.events}")

    def complete(self, job, timeout=PATIENCE):
        """Wait for a job's end and assert that it was a good one."""
        name, data = self.job_done(job, timeout)
        assert name == "BLOCK_JOB_COMPLETED" and "error" not in data, (name, data)
        assert data["offset"] == data["len"], data
        return data

    def copied(self, job):
        """How many bytes the job that ended last under this name had copied."""
        told = [e["data"] for e in self.events if e["event"] == "JOB_COPIED"]
        return [data["copied"] for data in told if data["id"] == job][-1]

    def story(self, job):
        """What the events so far said of a job: its states and its block-job events."""
        told = []
        for event in self.events:
            data = event.get("data", {})
            if event["event"] == "JOB_STATUS_CHANGE" and data.get("id") == job:
                told.append(data["status"])
            elif event["event"].startswith("BLOCK_JOB_"):
                if job in (data.get("device"), data.get("id")):
                    told.append(event["event"])
        return told

    def job(self, job):
        """The entry of query-block-jobs for a job, or None."""
        found = [j for j in self.cmd("query-block-jobs") if j["device"] == job]
        return found[0] if found else None

    def poll(self, what, condition, timeout=PATIENCE):
        """Ask again and again until `condition()` is true; return what it gave."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            got = condition()
            if got:
                return got
            self._run(asyncio.sleep(0.01), PATIENCE)
        raise AssertionError(f"{what}: not within {timeout} s")

    def reached(self, job, offset):
        """Wait until a job, which must not end before, has come as far as `offset`."""

        def there():
            state = self.job(job)
            assert state, f"job {job} ended before it came to {offset}"
            return state["offset"] >= offset

        self.poll(f"progress of {job} to {offset}", there)

    def close(self):
        if self._loop.is_closed():
            return
        try:
            self._run(self._client.disconnect(), PATIENCE)
        except (EOFError, OSError, ConnectError, asyncio.TimeoutError):
            # The daemon is gone already, as some tests want it.
            pass
        self._loop.close()


class Wire:
    """The socket itself, for input that no good client would send."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self.received = b""
        self._text = ""
        self.greeting = self.answer()

    def send(self, data):
        self._socket.sendall(data if isinstance(data, bytes) else data.encode())

    def negotiate(self):
        self.send('{"execute":"qmp_capabilities"}')
        return self.answer()

    def value(self):
        """The next JSON value that comes, whatever it is."""
        while True:
            self._text = self._text.lstrip()
            if self._text:
                try:
                    value, end = json.JSONDecoder().raw_decode(self._text)
                except json.JSONDecodeError:
                    pass  # not whole yet
                else:
                    self._text = self._text[end:]
                    return value
            data = self._socket.recv(65536)
            if not data:
                raise EOFError(f"the daemon hung up; left over: {self._text!r}")
            self.received += data
            self._text += data.decode()

    def answer(self):
        """The next value that is not an event."""
        while True:
            value = self.value()
            if "event" not in value:
                return value

    def answer_to(self, identity):
        """The answer with this id, and those before it."""
        before = []
        while True:
            value = self.answer()
            if value.get("id") == identity:
                return value, before
            before.append(value)

    def close(self):
        self._socket.close()
