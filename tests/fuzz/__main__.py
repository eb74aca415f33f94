"""Fuzz one target with atheris: ``python -m tests.fuzz TARGET [LIBFUZZER-ARGUMENT...]`` (see ``scripts/fuzz``)."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

# The cores have to be imported here first: what was imported before is not instrumented.
with atheris.instrument_imports(include=["nbdstream.wire", "nbdstream.block.qed"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Run libFuzzer; it ends the process."""
    name, *arguments = sys.argv[1:]
    dictionary = Path(__file__).with_name("qmp.dict" if name == "qmp" else "nbd.dict")
    atheris.Setup([sys.argv[0], f"-dict={dictionary}", *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
