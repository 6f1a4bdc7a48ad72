"""The house: each file of `src` knows only what is on its own floor or below, and no two import each
other, directly or through others, neither there nor in the benches and the fuzz targets.

What would be caught: an import that goes up, a circle of imports, a folder that has no floor.
The tests' own modules may import what they like.
"""

import re
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
SRC = TREE / "src"

# From the bottom up. A folder or file knows those of its own line and of the lines before.
FLOORS = [
    ["sync", "error", "planted", "sched", "unix_socket"],
    ["reactor", "grace"],
    ["shared_memory"],
    ["storage"],
    ["options"],
    ["format"],
    ["chain"],
    ["throttle"],
    ["graph"],
    ["state"],
    ["job", "export"],
    ["engine"],
    ["control"],
    ["config"],
    ["daemon", "ctl"],
    ["bin"],
]

# Files of the tests alone.
OF_TESTS = re.compile(r"(^|/|_)(tests|testing)(\.rs|/)")


# Comments, strings and characters: nothing in them is an import.
QUIET = re.compile(
    r"//[^\n]*"
    r'|r(#*)".*?"\1'
    r'|"(?:\\.|[^"\\])*"'
    r"|'(?:\\[^']+|[^'\\])'",
    flags=re.S,
)


def without_tests(text):
    """The text of a file without its module of tests, comments and strings."""
    text = QUIET.sub("", text)
    return re.sub(r"#\[cfg\(test\)\]\s*(pub(\([^)]*\))? )?mod \w+ \{.*\Z", "", text, flags=re.S)


def split_list(text):
    """The members of a brace list, those of nested lists kept together."""
    depth, start, parts = 0, 0, []
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in parts + [text[start:]] if part.strip()]


def expand(path):
    """`a::{b, c::d}` as `a::b` and `a::c::d`."""
    path = " ".join(path.split())
    head, brace, rest = path.partition("{")
    if not brace:
        return [path.split(" as ")[0].strip()]
    inner = rest[: rest.rindex("}")]
    return [head.strip() + one for part in split_list(inner) for one in expand(part)]


class Module:
    def __init__(self, path, src):
        self.path = path
        self.file = str(path.relative_to(src))
        parts = list(path.relative_to(src).with_suffix("").parts)
        if parts[-1] in ("mod", "lib", "main"):
            parts.pop()
        self.name = tuple(parts)
        self.text = without_tests(path.read_text())
        uses = re.findall(r"^\s*(pub(?:\([^)]*\))? )?use ([^;]+);", self.text, flags=re.M)
        self.imports = [one for public, path in uses if not public for one in expand(path)]
        # What it passes on is not its own import.
        self.passes_on = [one for public, path in uses if public for one in expand(path)]
        body = re.sub(r"^\s*(pub(\([^)]*\))? )?use [^;]+;", "", self.text, flags=re.M)
        self.imports += re.findall(r"\b(?:crate|super)(?:::\w+)+", body)

    def absolute(self, path):
        """The path from the top of the crate; None where it leads out of it."""
        parts = path.split("::")
        if parts[0] == "crate":
            return tuple(parts[1:])
        if parts[0] == "self":
            return self.name + tuple(parts[1:])
        if parts[0] != "super":
            return None
        place = self.name
        while parts and parts[0] == "super":
            place, parts = place[:-1], parts[1:]
        return place + tuple(parts)


class House:
    def __init__(self, src=SRC):
        files = [p for p in src.rglob("*.rs") if not OF_TESTS.search(str(p.relative_to(src)))]
        modules = [Module(path, src) for path in sorted(files)]
        self.modules = {module.name: module for module in modules}

    def find(self, path, seen=()):
        """The module that defines what `path` names, through those that pass it on."""
        for length in range(len(path), -1, -1):
            module = self.modules.get(path[:length])
            if module is None:
                continue
            rest = path[length:]
            if not rest or (module.name, rest) in seen:
                return module
            for passed in module.passes_on:
                target = module.absolute(passed)
                if target is None:
                    # A path that begins with one of its own modules.
                    target = module.name + tuple(passed.split("::"))
                    if target[: length + 1] not in self.modules:
                        continue
                if passed.split("::")[-1] == rest[0]:
                    return self.find(target + rest[1:], seen + ((module.name, rest),))
            return module
        return None

    def arrows(self):
        """What each file imports: pairs of files."""
        found = {}
        for module in self.modules.values():
            for path in module.imports:
                absolute = module.absolute(path)
                if absolute is None:
                    continue
                target = self.find(absolute)
                if target is not None and target is not module:
                    found.setdefault(module.file, {}).setdefault(target.file, path)
        return found


def circles(arrows):
    """The sets of files that reach each other."""

    def reach(start):
        seen, open_ = set(), [start]
        while open_:
            for target in arrows.get(open_.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    open_.append(target)
        return seen

    reached = {file: reach(file) for file in arrows}
    found = set()
    for file, all_ in reached.items():
        if file in all_:
            found.add(frozenset(f for f in all_ if file in reached.get(f, ())))
    return sorted(sorted(circle) for circle in found)


def floor_of(file):
    top = file.split("/")[0].removesuffix(".rs")
    return next((at for at, floor in enumerate(FLOORS) if top in floor), None)


def test_every_folder_has_a_floor():
    files = {module.file for module in House().modules.values()} - {"lib.rs"}
    assert sorted(f for f in files if floor_of(f) is None) == []


def test_no_import_goes_up():
    wrong = []
    for file, targets in House().arrows().items():
        for target, path in targets.items():
            if "lib.rs" in (file, target):
                continue
            if floor_of(target) > floor_of(file):
                wrong.append(f"{file} imports {path} of {target}")
    assert sorted(wrong) == []


@pytest.mark.parametrize("crate", ["src", "benches/compare", "benches/engine", "fuzz/src"])
def test_no_circles(crate):
    assert circles(House(TREE / crate).arrows()) == []


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"a.rs": "use crate::b::B;", "b.rs": "use crate::a::{A, c};"}, [["a.rs", "b.rs"]]),
        ({"a.rs": "use crate::b::B;", "b.rs": "// use crate::a::A;"}, []),
        # A module that passes on what its parts define does not import it.
        (
            {
                "job/mod.rs": "pub use one::One;\npub struct Event;",
                "job/one.rs": "use super::Event;",
                "job/two.rs": "use super::{Event, One};",
            },
            [],
        ),
        (
            {
                "job/mod.rs": "pub use one::One;\npub use two::Two;",
                "job/one.rs": "use super::Two;",
                "job/two.rs": "fn f(_: super::One) {}",
            },
            [["job/one.rs", "job/two.rs"]],
        ),
        # Tests may import what they like.
        ({"a.rs": "use crate::b::B;", "b.rs": "#[cfg(test)]\nmod tests { use crate::a::A; }"}, []),
    ],
)
def test_circles_are_found(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert circles(House(tmp_path).arrows()) == expected
