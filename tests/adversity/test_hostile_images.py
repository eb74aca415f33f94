"""Images from strangers, and images of a terabyte: bounded time and memory, and one clear line where it goes wrong.

The limits are generous, since the machine is shared: what they tell apart is seconds from hours.
"""

from __future__ import annotations

import os
import struct
from array import array
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.processes import NBDSTREAM, nbdstream, run
from tests.support.qed import RawImage, create, qemu_check, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


class Cost(NamedTuple):
    status: int
    seconds: float
    """Of processor time."""
    memory: int
    """At the most, in bytes; an idle nbdstream takes about 40 MiB."""
    said: str


def cost(tmp_path: Path, *arguments: str) -> Cost:
    """Run a command, and see what it takes."""
    report, said = str(tmp_path / "cost"), str(tmp_path / "said")
    script = 'report=$1 said=$2; shift 2; exec python3 -c "$0" "$report" "$said" "$@"'
    measure = (
        "import os, resource, subprocess, sys\n"
        "with open(sys.argv[2], 'w') as said:\n"
        "    command = ['setpriv', '--pdeathsig', 'KILL', '--', *sys.argv[3:]]\n"
        "    status = subprocess.run(command, stdout=said, stderr=said).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "open(sys.argv[1], 'w').write(f'{status} {used.ru_utime + used.ru_stime} {used.ru_maxrss << 10}')\n"
    )
    run("sh", "-c", script, measure, report, said, NBDSTREAM, *arguments)
    with open(report, encoding="ascii") as file:
        status, seconds, memory = file.read().split()
    with open(said, encoding="utf-8") as file:
        return Cost(int(status), float(seconds), int(memory), file.read())


def make(
    path: str,
    size: int,
    *,
    cluster_size: int = 65536,
    table_size: int = 4,
    tables: Iterable[int],
    contents: dict[int, array[int]] | None = None,
    length: int,
) -> str:
    """Make an image by hand: its L1 entries, and what its L2 tables hold, by their places. All else is a hole."""
    with open(path, "wb") as file:
        file.write(
            struct.pack("<4sIIIQQQQQII", b"QED\0", cluster_size, table_size, 1, 0, 0, 0, cluster_size, size, 0, 0)
        )
        file.seek(cluster_size)
        file.write(array("Q", tables).tobytes())
        for place, entries in (contents or {}).items():
            file.seek(place)
            file.write(entries.tobytes())
        file.truncate(length)
    return path


@pytest.fixture(scope="module")
def terabyte(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A disk of 1 TiB of which 64 GiB are allocated, in every L2 table some; the data is a hole in the file."""
    path = str(tmp_path_factory.mktemp("terabyte") / "image")
    cluster, table = 65536, 4 * 65536
    place = cluster + table
    places, contents = [], {}
    for _ in range(512):
        places.append(place)
        contents[place] = array("Q", range(place + table, place + table + 2048 * cluster, cluster))
        place += table + 2048 * cluster
    return make(path, TIB, tables=places, contents=contents, length=place)


def test_a_terabyte_is_checked_in_seconds(terabyte: str, tmp_path: Path) -> None:
    checked = cost(tmp_path, "check", terabyte)
    assert (checked.status, checked.said.splitlines()[-1]) == (0, f"{1 << 20} of {1 << 24} clusters allocated")
    assert checked.seconds < 8
    assert checked.memory < 64 * MIB


def test_a_terabyte_is_mapped_at_once(terabyte: str, tmp_path: Path) -> None:
    mapped = cost(tmp_path, "map", "-f", "qed", terabyte)
    assert (mapped.status, len(mapped.said.splitlines())) == (0, 1024)
    assert mapped.seconds < 6
    assert mapped.memory < 128 * MIB


def test_a_map_of_many_parts_is_not_kept_in_memory(tmp_path: Path) -> None:
    cluster, table = 65536, 4 * 65536
    entries = array("Q", [0]) * (4 * 32768)
    data = cluster + table + 4 * table
    entries[::2] = array("Q", range(data, data + (2 << 15) * cluster, cluster))
    contents = {cluster + table + i * table: entries[i << 15 : i + 1 << 15] for i in range(4)}
    path = make(str(tmp_path / "a"), 8 * GIB, tables=contents, contents=contents, length=data + (2 << 15) * cluster)
    for form in ([], ["--json"]):
        mapped = cost(tmp_path, "map", "-f", "qed", *form, path)
        assert mapped.status == 0
        assert mapped.said.count("\n") >= 1 << 17
        assert mapped.memory < 64 * MIB


@pytest.mark.parametrize("writable", [False, True])
def test_a_terabyte_is_opened_and_read_at_once(terabyte: str, tmp_path: Path, *, writable: bool) -> None:
    program = (
        "import asyncio, resource, sys, nbdstream\n"
        "async def main():\n"
        "    async with nbdstream.Image.open(sys.argv[1], writable=sys.argv[2] == 'True') as image:\n"
        "        assert await image.read(1 << 39, 65536) == bytes(65536)\n"
        "        assert image.size == 1 << 40\n"
        "asyncio.run(main())\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        # ru_maxrss would be the most that the tests' own process had, if that is more.
        "status = dict(line.split(':') for line in open('/proc/self/status'))\n"
        "print(used.ru_utime + used.ru_stime, int(status['VmHWM'].split()[0]) << 10)\n"
    )
    python = os.path.join(os.path.dirname(NBDSTREAM), "python")
    seconds, memory = run(python, "-c", program, terabyte, str(writable)).stdout.split()
    assert float(seconds) < (8 if writable else 3)
    assert int(memory) < 96 * MIB


def test_a_table_that_every_entry_leads_to_is_looked_into_once(tmp_path: Path) -> None:
    """Two million L1 entries, one table of 16 MiB."""
    cluster, table = 2 << 20, 16 << 20
    place = cluster + table
    path = make(
        str(tmp_path / "a"),
        1 << 40,
        cluster_size=cluster,
        table_size=8,
        tables=[place] * (table // 8),
        length=place + table,
    )
    checked = cost(tmp_path, "check", path)
    assert checked.status == 2
    assert f"{((table // 8) - 1) * 8} corruptions" in checked.said
    assert checked.seconds < 30
    assert checked.memory < 96 * MIB
    before = os.stat(path)
    repaired = cost(tmp_path, "check", "-r", "all", path)
    assert repaired.status == 1
    assert "tangled" in repaired.said
    assert repaired.seconds < 60
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns


def test_tables_in_a_hole_of_many_terabytes_cost_nothing(tmp_path: Path) -> None:
    """A file of 8 TiB that is nothing but a hole, said to be full of L2 tables."""
    cluster, table = 2 << 20, 16 << 20
    places = range(cluster + table, 8 * TIB - table, table)
    path = make(
        str(tmp_path / "a"), 1 << 40, cluster_size=cluster, table_size=8, tables=places, length=places[-1] + table
    )
    for command in (["check"], ["map", "-f", "qed"], ["check", "-r", "all"]):
        looked = cost(tmp_path, *command, path)
        assert looked.status == 0
        assert looked.seconds < 30
        assert looked.memory < 128 * MIB


@pytest.mark.parametrize("command", [["check"], ["check", "-r", "all"], ["map", "-f", "qed"], ["info"], ["resize"]])
@pytest.mark.parametrize(
    "header",
    [
        b"QED\0",
        b"QED\0" + b"\xff" * 60,
        b"QED\0" + bytes(60),
        struct.pack("<4sIIIQQQQQII", b"QED\0", 4096, 2, 0, 0, 0, 0, 0, 4096, 0, 0),
        struct.pack("<4sIIIQQQQQII", b"QED\0", 4096, 2, (1 << 32) - 1, 0, 0, 0, 4096, 4096, 0, 0),
        struct.pack("<4sIIIQQQQQII", b"QED\0", 4096, 2, 1, 0, 0, 0, (1 << 64) - 4096, 4096, 0, 0),
        struct.pack("<4sIIIQQQQQII", b"QED\0", 64 << 20, 16, 1, 0, 0, 0, 64 << 20, 1 << 62, 0, 0),
        struct.pack("<4sIIIQQQQQII", b"QED\0", 4096, 2, 1, 1, 0, 0, 4096, 4096, 64, (1 << 32) - 1),
        struct.pack("<4sIIIQQQQQII", b"QED\0", 4096, 2, 1, 1, 0, 0, 4096, 4096, (1 << 32) - 1, 100),
        struct.pack("<4sIIIQQQQQII", b"QED\0", 4096, 2, 1, 1 << 63, 0, 0, 4096, 4096, 0, 0),
    ],
    ids=["magic alone", "all ones", "all zeroes", "no header cluster", "endless header", "L1 at the end of time",
         "overflow", "endless name", "name far away", "unknown feature"],
)  # fmt: skip
def test_an_impossible_header_is_refused_with_one_line(tmp_path: Path, header: bytes, command: list[str]) -> None:
    path = tmp_path / "image"
    path.write_bytes(header.ljust(64, b"\0") + bytes(65536))
    before = path.read_bytes()
    result = nbdstream(*command, str(path), *(["1G"] if command == ["resize"] else []), status=1)
    assert result.stderr.startswith("nbdstream: ")
    assert result.stderr.count("\n") == 1
    assert path.read_bytes() == before


def test_what_is_not_damaged_can_be_read(tmp_path: Path) -> None:
    """As QEMU reads it: an error where an entry leads nowhere, and nowhere else."""
    path = create(str(tmp_path / "image"), 3 * GIB)
    qemu_io(path, "write -P 1 0 1M", "write -P 2 2G 64k")
    image = RawImage(path)
    image.put(image.l2_offset(3), 1 << 50)
    image.put(image.l1_offset(1), 4711)
    program = (
        "import asyncio, sys, nbdstream\n"
        "async def main():\n"
        "    async with nbdstream.Image.open(sys.argv[1]) as image:\n"
        "        assert await image.read(0, 3 << 16) == b'\\1' * (3 << 16)\n"
        "        assert await image.read(4 << 16, 12 << 16) == b'\\1' * (12 << 16)\n"
        "        for offset in (3 << 16, (2 << 30) + 5, (3 << 30) - 1):\n"
        "            try: await image.read(offset, 1)\n"
        "            except OSError as error: print(error)\n"
        "asyncio.run(main())\n"
    )
    python = os.path.join(os.path.dirname(NBDSTREAM), "python")
    assert run(python, "-c", program, path).stdout.count("[Errno 5]") == 3
    assert qemu_check(path).status == 2
    nbdstream("check", "-r", "all", path)
    assert qemu_check(path).status == 0
    qemu_io(path, "read -P 1 0 192k", "read -P 0 192k 64k", "read -P 1 256k 768k", "read -P 0 2G 64k")
