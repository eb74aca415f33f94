from __future__ import annotations

import os
import re
import subprocess
import sys

# In a process of its own: logging is set up once, for all of it.
SCRIPT = """
import logging, sys
from nbdstream.service.logging import set_up_logging
set_up_logging(debug="debug" in sys.argv)
set_up_logging()
log = logging.getLogger("nbdstream.room")
log.debug("a detail")
log.info("serving %s", "disk.img")
log.warning("slow")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broken")
"""


def logged(*arguments: str, journal: bool = False) -> list[str]:
    reading, writing = os.pipe()
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    environment.pop("JOURNAL_STREAM", None)
    if journal:
        status = os.fstat(writing)
        environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], stderr=writing, env=environment, check=True)
    os.close(writing)
    with open(reading) as stderr:
        return stderr.read().splitlines()


def test_a_person_reads_plain_lines() -> None:
    lines = logged()
    assert lines[:4] == [
        "nbdstream: serving disk.img",
        "nbdstream: warning: slow",
        "nbdstream: error: broken",
        "Traceback (most recent call last):",
    ]


def test_debugging_says_more_and_when_and_where() -> None:
    detail, serving = logged("debug")[:2]
    assert re.fullmatch(r"nbdstream: \d\d:\d\d:\d\d\.\d\d\d nbdstream\.room: a detail", detail)
    assert serving.endswith("nbdstream.room: serving disk.img")


def test_the_journal_gets_a_priority_with_every_line() -> None:
    lines = logged(journal=True)
    assert lines[:4] == ["<6>serving disk.img", "<4>slow", "<3>broken", "<3>Traceback (most recent call last):"]
    assert all(line.startswith("<3>") for line in lines[3:])
    assert logged("debug", journal=True)[0] == "<7>nbdstream.room: a detail"


def test_a_journal_that_stderr_was_led_away_from_is_none() -> None:
    script = (
        "from nbdstream.service.logging import set_up_logging; set_up_logging(); import logging; logging.error('x')"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), JOURNAL_STREAM="1:2")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stderr == "nbdstream: error: x\n"
