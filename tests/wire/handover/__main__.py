"""The command line of ``scripts/model-check``."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from tests.wire.handover.explore import Exploration
from tests.wire.handover.settle import check_settling
from tests.wire.handover.sides import BrokenError, World


def main() -> int:
    """Explore one world after the other, each to its end, and print how much there was; 1 if a rule is broken."""
    parser = argparse.ArgumentParser(prog="model-check", description="Explore every state of a hand-over.")
    parser.add_argument(
        "--depth",
        type=int,
        default=2,
        help="how many effects may wait while something else happens (default: 2; 3: five times as many states, 2 GB)",
    )
    depth = parser.parse_args().depth
    worlds: Final = {
        "between operations and while they run": World(depth),
        "before any effect": World(depth - 1, always_open=True),
        "a guest that knows no locks": World(depth, locks=False),
    }
    rivals: Final = {
        "a rival with the same certificate": World(depth - 1, fingerprint="f" * 64, rival=True),
        "a rival on loopback": World(depth - 1, rival=True),
    }
    for name, world in (worlds | rivals).items():
        began = time.monotonic()
        found = Exploration(world)
        try:
            found.run()
            # Who comes second to a rival is left without disks, and that is not wrong.
            ends = "" if world.rival else f"; {check_settling(found)} ends, one owner in each"
        except BrokenError as error:
            sys.stderr.write(f"{name}: {error}\n")
            return 1
        print(f"{name}: {found.summary()}{ends} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
