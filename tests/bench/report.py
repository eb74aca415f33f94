"""The report: a Markdown page for people, JSON for machines."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tests.bench.peers import OURS
from tests.bench.process import run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.results import Floor, Section, Unit, Workload


BUSY = 0.1


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    processors: int
    processor: str
    memory_bytes: int
    kernel: str
    file_system: str
    busy: float
    """The share of the processors' time that others took just before, from 0 to 1; a hypervisor's other guests too."""
    time: str


@dataclass(frozen=True)
class Settings:
    """How it was measured."""

    quick: bool
    rounds: int
    size: int
    seconds: float
    """Of each run of fio."""
    source: str
    """Who serves what is streamed."""


def this_machine(directory: str) -> Machine:
    """Look at this machine; ``directory`` is where the files are."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return Machine(
        processors=os.cpu_count() or 0,
        processor=models[0] if models else platform.machine(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        file_system=run(["findmnt", "-n", "-o", "FSTYPE", "-T", directory]).strip(),
        busy=_busy(),
        time=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )


def _busy() -> float:
    def times() -> tuple[int, int]:
        with open("/proc/stat") as file:
            user, nice, system, idle, iowait, *rest = (int(word) for word in file.readline().split()[1:9])
        return idle + iowait, user + nice + system + idle + iowait + sum(rest)

    idle_before, all_before = times()
    time.sleep(1)
    idle, everything = times()
    return 1 - (idle - idle_before) / (everything - all_before)


def write_report(directory: str, machine: Machine, settings: Settings, sections: Sequence[Section]) -> str:
    """Write bench.md and bench.json to ``directory`` and return the Markdown."""
    text = "\n".join([*_heading(machine, settings), *(line for section in sections for line in _section(section))])
    document = {
        "machine": asdict(machine),
        "settings": asdict(settings),
        "sections": {section.name: section.as_json() for section in sections},
    }
    with open(f"{directory}/bench.md", "w") as file:
        file.write(text)
    with open(f"{directory}/bench.json", "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
    return text


def _heading(machine: Machine, settings: Settings) -> list[str]:
    where = (
        f"{machine.processors} processors ({machine.processor}), {machine.memory_bytes / (1 << 30):.0f} GiB of memory, "
        f"Linux {machine.kernel}, files on {machine.file_system}; {machine.time}."
    )
    how = (
        f"Median of {settings.rounds}, the slowest and the fastest in brackets; "
        f"1.50x: {OURS} is 1.5 times as fast as that peer."
    )
    lines = [where, "", how, ""]
    if settings.quick:
        lines += ["**A quick run: it shows that everything works, not how fast it is.**", ""]
    if machine.busy > BUSY:
        lines += [f"**Others took {machine.busy:.0%} of the processors: these figures mean little.**", ""]
    return lines


def _section(section: Section) -> list[str]:
    lines = [f"### {section.title}", ""]
    if len(section.workloads) == 1:
        lines += _competitors_down(section, section.workloads[0])
    else:
        lines += _workloads_down(section)
    lines.append("")
    lines += [_floor_line(floor, ratio) for floor, ratio in section.floor_ratios()]
    lines += [f"- **FAILED**: {key}: {why}" for key, why in section.problems.items()]
    return [*lines, ""]


def _workloads_down(section: Section) -> list[str]:
    labels = [competitor.label for competitor in section.competitors]
    lines = [f"| | {' | '.join(labels)} |", f"|---|{'---|' * len(labels)}"]
    for workload in section.workloads:
        cells = [_cell(section, workload, competitor.key) for competitor in section.competitors]
        lines.append(f"| {workload.title} | {' | '.join(cells)} |")
    return lines


def _competitors_down(section: Section, workload: Workload) -> list[str]:
    rows = [
        f"| {competitor.label} | {_cell(section, workload, competitor.key)} |" for competitor in section.competitors
    ]
    return [f"| | {workload.title} |", "|---|---|", *rows]


def _cell(section: Section, workload: Workload, key: str) -> str:
    samples = section.samples.get((workload.title, key))
    if not samples:
        return "-"
    by_speed = sorted(samples.values, key=workload.speed)
    spread = f"{_number(by_speed[0], workload.unit)}-{_number(by_speed[-1], workload.unit)}"
    text = f"{_amount(samples.median, workload.unit)} ({spread})"
    ratio = section.ratio(workload, key)
    if key == OURS:
        return f"**{text}**"
    return text if ratio is None else f"{text} {ratio:.2f}x"


def _number(value: float, unit: Unit) -> str:
    match unit:
        case "reads/s" | "writes/s":
            return f"{value:,.0f}"
        case "bytes/s":
            return f"{value / 1e9:.2f}"
        case "s":
            return f"{value:.2f}"
        case "ms":
            return f"{value * 1000:.2f}"


def _amount(value: float, unit: Unit) -> str:
    return _number(value, unit) + {"reads/s": "/s", "writes/s": "/s", "bytes/s": " GB/s", "s": " s", "ms": " ms"}[unit]


def _floor_line(floor: Floor, ratio: float | None) -> str:
    name = f"- {floor.workload}, against {floor.peer}: floor {floor.ratio}x"
    if ratio is None:
        return f"{name}: not measured"
    return f"{name}: {'ok' if ratio >= floor.ratio else '**NOT MET**'} ({ratio:.2f}x)"
