"""Every command of README and of the manuals runs, in order, as a new user would type it.

The code blocks of a page go to one shell, in a folder of its own that stands for the repository;
lines of QMP go to the control socket that the page has set up. What is not run stands in `TABLE`,
with the reason; a block that is neither run nor there is a failure, and so is an entry of the
table that no page has any more.

What would be caught: a recipe that uses a name or a file that no line before it makes, an option
that is gone or spelled otherwise, a command that fails, an answer that is an error, an example of
output that looks otherwise by now.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import time

import guest
import pytest

from harness import images
from harness.daemon import ROOT

pytestmark = pytest.mark.beyond_qsd("has other options")

PAGES = [ROOT / "README.md", ROOT / "tests/python/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
# It only decides how long a broken program takes to be noticed.
PATIENCE = 90


@dataclasses.dataclass
class NotRun:
    """A block that is not run, and why. The files and tests that it names must exist."""

    why: str


@dataclasses.dataclass
class Run:
    """A block that is run with a little help."""

    # Words of the page, and what stands for them here.
    instead: dict = dataclasses.field(default_factory=dict)
    # Commands that are left out, each with the reason.
    without: dict = dataclasses.field(default_factory=dict)
    # What the page takes for granted.
    before: str = ""


@dataclasses.dataclass
class Output:
    """A block that shows what a command prints: numbers may differ, and `...` stands for more."""

    of: str
    code: int = 0
    # Only so many lines of the block; all if not given.
    lines: int | None = None


RANDOM_SEEDS = NotRun("whole steps of contrib/test, an example of a name, and a loop for hours")
FUZZING = NotRun("needs a fuzzer's build, a find of it, or hours")
KILLS = NotRun("twenty minutes; each of these runs is in contrib/test, with fewer kills")

CHAIN = """
head -c 16M /dev/urandom > golden.raw
qemu-img convert -f raw -O qcow2 golden.raw golden.qcow2
qemu-img create -q -f qcow2 -b golden.qcow2 -F qcow2 middle.qcow2
qemu-io -f qcow2 -c 'write -q -P 7 1M 1M' middle.qcow2
qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 overlay.qcow2
"""
SERVED = """
rm -f vm1.qcow2
qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 vm1.qcow2
stratablk --daemonize --blk-file=vm1.qcow2 --socket-path=/run/vm1.sock --qmp=/run/vm1.qmp
"""

# What a page takes for granted, before its first block.
SETUP = {
    "docs/command-line.md": CHAIN,
    "docs/qmp.md": CHAIN,
    "docs/state.md": CHAIN,
    "docs/stratactl.md": CHAIN + SERVED,
}

# By page and the beginning of a block.
TABLE = {
    ("README.md", "contrib/quickstart"): NotRun("two minutes of what the Python tests look at in parts"),
    ("README.md", "contrib/test"): NotRun("runs this test"),
    ("README.md", "cargo build"): Run(
        without={"cargo build --release --bins": "the programs under test are in target/release"}
    ),
    ("README.md", "chgrp kvm"): Run(instead={"kvm": "$(id -gn)"}),
    ("tests/python/README.md", "contrib/test python"): NotRun("runs this test"),
    ("docs/command-line.md", "stratablk: --export"): Output(
        "stratablk --export vhost-user-blk,wrtable=on", code=2
    ),
    ("docs/command-line.md", "[Service]"): NotRun("a part of a unit of systemd"),
    ("docs/design.md", "           guests"): NotRun("a drawing"),
    ("docs/images.md", "  header"): NotRun("a drawing"),
    ("docs/performance.md", "cargo bench --bench compare -- --output"): NotRun("an hour"),
    ("docs/benchmarks/2026-11-29.md", "cargo bench --bench compare -- --before"): NotRun("an hour"),
    ("docs/qmp.md", "block_stream device"): NotRun("a grammar; test_hmp.py sends such lines"),
    ("docs/service.md", "install -m 755"): NotRun("needs systemd; test_service.py looks at the unit"),
    ("docs/service.md", "serving after"): NotRun("a line of the log; tests/frontend_fence.rs looks for it"),
    ("docs/state.md", "stratactl image clear-error"): NotRun("no flush has failed; see test_state.py"),
    ("docs/stratactl.md", "$ stratactl stats"): Output("stratactl stats", lines=1),
    ("docs/stratactl.md", "stratactl stream disk0 --base"): Run(
        before="stratactl quit\nwhile test -e /run/vm1.sock; do sleep 0.01; done\n" + SERVED,
    ),
    ("docs/stratactl.md", "stratactl image create"): Run(
        # Space is really taken.
        instead={"100G": "1G"},
    ),
    ("docs/stratactl.md", "stratactl image resize"): Run(instead={"+10G": "+1G"}),
    ("docs/stratactl.md", "stratactl image rebase"): Run(
        before="qemu-img convert -f raw -O qcow2 golden.raw golden-2.qcow2"
    ),
    ("docs/stratactl.md", "stratactl image compare"): Run(
        before="cp golden.raw copy.raw; stratactl image create -f qcow2 -b golden.qcow2 -F qcow2 overlay.qcow2"
    ),
    ("docs/stratactl.md", '{"job":"disk0"'): NotRun("test_stratactl.py looks at these lines"),
    ("docs/testing.md", "STRATABLK_SEED=random"): RANDOM_SEEDS,
    ("docs/testing.md", "contrib/fuzz"): FUZZING,
    ("docs/testing.md", "fuzzer=fuzz/target"): FUZZING,
    ("docs/testing.md", "$fuzzer -merge=1"): FUZZING,
    ("docs/testing.md", "contrib/test costs"): NotRun("a step of contrib/test"),
    ("docs/testing.md", "contrib/test kills"): KILLS,
    ("docs/testing.md", "contrib/test crash"): NotRun("hours"),
    ("docs/testing.md", "contrib/test walk"): NotRun("hours; two walks are among the tests"),
    ("docs/testing.md", "contrib/test planted"): NotRun("minutes, in a debug build"),
    ("docs/testing.md", "STRATABLK_GRAPHS=500"): NotRun("an hour; graphs.rs runs some"),
    ("docs/testing.md", "cargo test --test graph_faults"): NotRun("a test of contrib/test"),
    ("docs/testing.md", "cargo test --test frontend_hung"): NotRun("a test of contrib/test"),
    ("docs/recovery.md", "contrib/test kills"): KILLS,
    ("docs/recovery.md", "STRATABLK_DAEMON=qemu"): KILLS,
    ("docs/testing.md", "STRATABLK_ROUNDS=50"): NotRun("minutes, and an example of a seed"),
}


@dataclasses.dataclass
class Block:
    page: str
    line: int
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page):
    """The code blocks of a page, fenced and indented."""
    name = str(page.relative_to(ROOT))
    found, lines, fenced, start = [], [], False, 0
    previous = ""
    for number, line in enumerate(page.read_text().splitlines() + [""], 1):
        indented = not fenced and line.startswith("    ") and (lines or not previous.strip())
        if line.startswith("```"):
            fenced = not fenced
            ends = not fenced
        else:
            ends = bool(lines) and not fenced and not indented
        if ends and lines:
            found.append(Block(name, start, "\n".join(lines)))
            lines = []
        if (fenced and not line.startswith("```")) or indented:
            start = start if lines else number
            lines.append(line if fenced else line[4:])
        previous = line
    return found


def entry_for(block):
    for (page, begins), entry in TABLE.items():
        if page == block.page and without_comments(block.text).startswith(begins):
            return (page, begins), entry
    return None, None


def without_comments(text):
    lines = text.splitlines()
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    return "\n".join(lines)


def commands_of(text):
    """The commands of a shell block, continued lines joined; comments are left out."""
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


class Shell:
    """One shell, into which a page's commands go."""

    def __init__(self, folder, programs):
        self.folder = folder
        self.mark = f"STRATABLK_DOCS={folder}"
        path = f"{programs}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        environment = {**os.environ, "PATH": path, "STRATABLK_DOCS": str(folder)}
        environment.pop("STRATABLK_QMP", None)
        self.process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
        )

    def run(self, command, code=0):
        """Run it, with nothing to read; return what it printed."""
        self._send(command)
        got, said = self._answer(command)
        assert got == code, f"exit code {got} of: {command}\n{said}"
        return said

    def _send(self, command):
        # Behind a line end: the command may end in a comment.
        line = f"{{ {command}\n}} </dev/null\nprintf '\\n@@%s@@\\n' $?\n"
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()

    def _answer(self, command):
        said, deadline = b"", time.monotonic() + PATIENCE
        while True:
            end = re.search(rb"\n@@(\d+)@@\n", said)
            if end:
                return int(end[1]), said[: end.start()].decode(errors="replace")
            left = deadline - time.monotonic()
            assert left > 0, f"not within {PATIENCE} s: {command}\n{said.decode(errors='replace')}"
            if select.select([self.process.stdout], [], [], left)[0]:
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                assert piece, f"the shell ended: {command}\n{said.decode(errors='replace')}"
                said += piece

    def value(self, expression):
        return self.run(f'printf %s "{expression}"')

    def here(self, path):
        return pathlib.Path(self.value("$PWD")) / path

    def end(self):
        """End the shell and all that was started from it, told by the environment it gave them."""
        self.process.kill()
        self.process.wait()
        for pipe in self.process.stdin, self.process.stdout:
            pipe.close()
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                pass


class Page:
    """A page at work."""

    def __init__(self, shell, scratch):
        self.shell = shell
        self.scratch = scratch
        self.daemon = None
        self.wire = None
        # Events that came so far.
        self.events = []

    def localized(self, text):
        """No test uses /run: it stands for a folder of the scratch folder."""
        return text.replace("/run/", f"{self.scratch}/run/")

    def shell_block(self, block, entry):
        for command in commands_of(self.localized(entry.before)):
            self.command(command)
        text = block.text
        for command in entry.without:
            assert command in text, f"{block}: {command!r} is left out, and not there"
            text = text.replace(command, "")
        for word, other in entry.instead.items():
            assert word in text, f"{block}: {word!r} is replaced, and not there"
            text = text.replace(word, other)
        commands = commands_of(self.localized(text))
        assert commands, f"{block}: nothing to run"
        for command in commands:
            self.command(command)

    def command(self, command):
        words = command.split()
        if words[0] == "qemu-system-x86_64":
            self.boot(command)
        elif words[0] == "stratablk" and not {"--daemonize", "--help", "--version"} & set(words):
            self.serve(command)
        else:
            self.shell.run(command)

    def serve(self, command):
        """A daemon in the foreground: it has a terminal of its own, and takes the last one's place."""
        if self.daemon:
            self.shell.run(f"kill {self.daemon}; wait {self.daemon}")
        self.shell.run(f"{command} >daemon.log 2>&1 &")
        self.daemon = int(self.shell.value("$!"))
        self.wait_for("its sockets", lambda: self.is_up(command), "daemon.log")

    def is_up(self, command):
        self.shell.run(f"kill -0 {self.daemon}")
        sockets = re.findall(r"(?:--socket-path[= ]|--qmp[= ]|path=)([^\s,]+)", command)
        return sockets and all(self.shell.here(path).is_socket() for path in sockets)

    def boot(self, command):
        """QEMU with a guest to boot: it reads its whole disk."""
        job = "report sum $(md5sum </dev/vda | cut -c 1-32)\nwhile :; do sleep 1; done\n"
        initramfs = guest.initramfs_with_job(job, self.shell.folder)
        command = re.sub(r"reconnect(-ms)?=\d+", guest.reconnect_option(), command)
        command += f" -accel {os.environ.get('STRATABLK_ACCEL', 'tcg')} -nodefaults -no-reboot"
        command += f" -serial file:{self.scratch}/console -kernel {guest.kernel_image()}"
        command += f" -initrd {initramfs} -append 'console=ttyS0 quiet panic=-1 mitigations=off'"
        command += "" if "-smp" in command else " -smp 1,maxcpus=2"
        if "-daemonize" in command:
            self.shell.run(command)
        else:
            self.shell.run(f"{command} -display none >qemu.log 2>&1 &")
        console = self.scratch / "console"

        def report():
            text = console.read_text(errors="replace") if console.exists() else ""
            return re.search(r"@@ sum (\w{32})", text)

        found = self.wait_for("the guest's report", report, console)
        overlay = self.shell.here("overlay.qcow2")
        raw = self.scratch / "seen.raw"
        images.qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", overlay, raw)
        assert found[1] == hashlib.md5(raw.read_bytes()).hexdigest(), "the guest reads other bytes"

    def wait_for(self, what, condition, log):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.01)
        log = self.shell.here(log)
        said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        raise AssertionError(f"{what}: not within {PATIENCE} s\n{said}")

    def session_block(self, block):
        """What is typed after `$`, and into `qmp-shell` after its own prompt."""
        typed = []
        for line in block.text.splitlines():
            if line.startswith("$ "):
                typed.append((self.localized(line[2:]), []))
            elif line.startswith("(QEMU) "):
                typed[-1][1].append(line[len("(QEMU) ") :])
        for command, lines in typed:
            if not lines:
                self.command(command)
                continue
            said = self.shell.run(f"printf '%s\\n' {' '.join(map(repr, lines))} | {command}")
            assert said.count('"return"') >= len(lines), said
            assert '"error"' not in said, said

    def qmp_block(self, block):
        """Commands are sent, and answered without an error; events come."""
        for line in block.text.splitlines():
            if line.startswith('{"event"'):
                self.await_event(json.loads(line.replace(", ...", "")))
                continue
            if self.wire is None:
                self.wire = self.connect()
            self.send(json.loads(line))

    def connect(self):
        path = self.shell.here(self.shell.value("$STRATABLK_QMP") or "vm1.qmp")
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(PATIENCE)
        found.connect(str(path))
        stream = found.makefile("rw")
        found.close()
        assert "QMP" in json.loads(stream.readline())
        return stream

    def send(self, command):
        self.wire.write(json.dumps(command) + "\n")
        self.wire.flush()
        while True:
            answer = json.loads(self.wire.readline())
            if "event" in answer:
                self.events.append(answer)
                continue
            assert "return" in answer, f"{command}: {answer}"
            return

    def await_event(self, wanted):
        while True:
            for event in self.events:
                if event["event"] == wanted["event"] and wanted["data"].items() <= event["data"].items():
                    return
            self.events.append(json.loads(self.wire.readline()))

    def output_block(self, block, entry):
        said = self.shell.run(self.localized(entry.of), code=entry.code)
        shown = [line for line in block.text.splitlines() if not line.startswith("$ ")]
        for line, wanted in zip(said.strip().splitlines(), shown[: entry.lines], strict=False):
            pattern = re.sub(r"\d+", r"\\d+", re.escape(wanted)).replace(r"\.\.\.", ".*")
            pattern = re.sub(r"(\\ )+", r"\\s+", pattern)
            assert re.fullmatch(pattern, line.rstrip()), f"{block}:\nshown: {wanted}\nit is: {line}"
        assert said.strip(), f"{entry.of}: no output"

    def close(self):
        if self.wire:
            self.wire.close()


def mentioned(text):
    """Files, tests and benches that a block names."""
    for path in re.findall(r"(?<![\w/.-])(?:contrib|tests|docs|fuzz)/[\w./@-]*\w", text):
        # What a build or a run makes is not there yet.
        if not re.match(r"fuzz/(target|artifacts|corpus/.*what-it-is-about)", path):
            yield path
    for kind, name in re.findall(r"--(test|bench) (\w+)", text):
        folder = "tests" if kind == "test" else "benches"
        yield f"{folder}/{name}.rs|{folder}/{name}/main.rs"


def refer(block):
    """What a block that is not run names is there."""
    for path in mentioned(block.text):
        assert any((ROOT / one).exists() for one in path.split("|")), f"{block}: no {path}"
    for name in re.findall(r"--test (\w+) (\w{6,})", block.text):
        sources = [ROOT / f"tests/{name[0]}.rs", *(ROOT / f"tests/{name[0]}").glob("*.rs")]
        texts = [source.read_text() for source in sources if source.exists()]
        module = name[1].rstrip(":")
        assert any(f"fn {module}" in text or f"mod {module};" in text for text in texts), block


def parameter(page):
    boots = "\nqemu-system-" in page.read_text().replace("    ", "")
    name = str(page.relative_to(ROOT))
    return pytest.param(page, id=name, marks=[pytest.mark.guest] if boots else [])


@pytest.mark.parametrize("page", list(map(parameter, PAGES)))
def test_commands_run_as_they_stand(request, page, tmp_path):
    programs = tmp_path / "target/release"
    programs.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (programs / "stratablk").symlink_to(request.config.daemon_binary)
    (programs / "stratactl").symlink_to(os.path.abspath(request.config.getoption("--stratactl")))
    shell = Shell(tmp_path, "" if page.name == "README.md" else programs)
    worked = Page(shell, tmp_path)
    try:
        name = str(page.relative_to(ROOT))
        for command in commands_of(worked.localized(SETUP.get(name, ""))):
            worked.command(command)
        for block in blocks_of(page):
            _, entry = entry_for(block)
            try:
                work_through(worked, block, entry)
            except AssertionError as error:
                raise AssertionError(f"{block}:\n{block.text}\n\n{error}") from None
    finally:
        worked.close()
        shell.end()


def work_through(page, block, entry):
    if isinstance(entry, NotRun):
        refer(block)
    elif isinstance(entry, Output):
        page.output_block(block, entry)
    elif block.text.startswith("$ "):
        assert entry is None
        page.session_block(block)
    elif block.text.startswith("{"):
        assert entry is None
        page.qmp_block(block)
    else:
        page.shell_block(block, entry or Run())


def test_the_table_names_blocks_that_are_there():
    """An entry that outlives its block would let a new one of the same beginning pass unseen."""
    blocks = [block for page in PAGES for block in blocks_of(page)]
    assert len(blocks) > 30, "blocks are found"
    found = {entry_for(block)[0] for block in blocks}
    assert set(TABLE) <= found, set(TABLE) - found
