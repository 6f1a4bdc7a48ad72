"""The unit of systemd that contrib/systemd has.

What would be caught: a unit that systemd does not understand, a setting without which a guest is
left alone or the next process knows nothing of the one before, folders for the daemon that systemd
does not make.
"""

import configparser
import pathlib
import shutil
import subprocess

import pytest

from harness.daemon import ROOT

UNIT = ROOT / "contrib/systemd/stratablk@.service"


@pytest.fixture
def unit():
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(UNIT)
    return parser


def test_the_settings_that_a_restart_needs(unit):
    service = unit["Service"]
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert (service["Restart"], service["RestartSec"]) == ("always", "0")
    assert service["RestartPreventExitStatus"] == "2"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["EnvironmentFile"] == "/etc/stratablk/%i.conf"
    # What the daemon is told is what systemd makes.
    command = service["ExecStart"].split()
    for option, root, made in [
        ("--journal", "%t", "RuntimeDirectory"),
        ("--state", "%S", "StateDirectory"),
    ]:
        folder = next(w.removeprefix(option + "=") for w in command if w.startswith(option + "="))
        assert folder.removeprefix(root + "/") in service[made].split()
    assert command[-1] == "$OPTIONS"


def test_systemd_understands_it(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not here")
    copy = tmp_path / UNIT.name
    # It looks for the program.
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/stratablk", "/bin/true"))
    instance = pathlib.Path(str(copy).replace("@.", "@vm1."))
    # It ends with 0 also where it has ignored a setting, and says so.
    result = subprocess.run(
        [analyze, "verify", str(instance)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
