"""The units as they are installed: systemd finds nothing to complain about, and they run our command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nbdstream import cli

TREE = Path(__file__).parents[2]
INSTALL = TREE / "scripts/install-units"
HANDOVER = ["nbdstream-offer@.service", "nbdstream-receive@.service"]
SERVICES = [*HANDOVER, "nbdstream-serve@.service", "nbdstream-stream@.service"]
UNITS = [*SERVICES, "nbdstream-serve@.socket"]


def install(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([INSTALL, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def command(tmp_path: Path) -> Path:
    command = tmp_path / "bin/nbdstream"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    return command


def test_every_unit_is_installed_with_the_path_of_the_command(tmp_path: Path, command: Path) -> None:
    result = install("--root", str(tmp_path / "root"), "--command", str(command))
    folder = tmp_path / "root/etc/systemd/system"
    assert result.stdout.splitlines() == [str(folder / unit) for unit in UNITS]
    assert {path.name for path in folder.iterdir()} == set(UNITS)
    for unit in SERVICES:
        assert f"\nExecStart={command} " in (folder / unit).read_text()
    assert (tmp_path / "root/etc/nbdstream").is_dir()


def test_systemd_analyze_verify_is_silent(tmp_path: Path, command: Path) -> None:
    assert install("--root", str(tmp_path), "--command", str(command)).returncode == 0
    names = [unit.replace("@", "@disk") for unit in UNITS]
    result = subprocess.run(
        ["systemd-analyze", "verify", *names],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}/etc/systemd/system:"},  # and the system's own units
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--command", "/nowhere/nbdstream"], "no such command"),
        (["--command", "nbdstream"], "not an absolute path"),
        (["--command", "/opt/my tools/nbdstream"], "no unit can name such a path"),
        (["--root"], "usage"),
        (["--nonsense", "x"], "usage"),
    ],
)
def test_nothing_is_installed_after_a_mistake(arguments: list[str], complaint: str) -> None:
    result = install(*arguments)
    assert result.returncode
    assert complaint in result.stderr
    assert not result.stdout


def test_the_socket_lies_where_the_service_would_listen_on_its_own() -> None:
    units = {unit: (TREE / "systemd" / unit).read_text() for unit in UNITS}
    assert '\nEnvironment="OPTIONS=-U /run/nbdstream/%i.sock"\n' in units["nbdstream-serve@.service"]
    assert "\nListenStream=/run/nbdstream/%i.sock\n" in units["nbdstream-serve@.socket"]


@pytest.mark.parametrize("unit", HANDOVER)
def test_the_command_takes_what_the_unit_makes_of_its_example(unit: str) -> None:
    text = (TREE / "systemd" / unit).read_text()
    example = dict(re.findall(r"^#     ([A-Z]+)=(.*)$", text, re.MULTILINE))
    (command,) = re.findall(r"^ExecStart=\S+ (.*)$", text, re.MULTILINE)
    whole = re.sub(r"\$\{([A-Z]+)\}", lambda name: shlex.quote(example[name[1]]), command)
    split = re.sub(r"\$([A-Z]+)", lambda name: example[name[1]], whole)  # at white space; quotes are respected
    options = cli._parser().parse_args(shlex.split(split.replace("%i", "NAME")))
    disks = options.images if options.command == "offer" else options.overlays
    assert [Path(path).stem for path in disks] == ["vda", "vdb"]
    assert options.state == f"/var/lib/nbdstream/{options.command}-NAME"
    assert (options.on_fence if options.command == "offer" else options.on_accept).endswith(" vm7")
