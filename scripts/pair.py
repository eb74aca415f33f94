"""A source and a streamer on loopback, with faults to switch on by typing: the paired harness of the tests, for people.

  scripts/pair                          an image of random data, streamed as fast as it goes
  scripts/pair disk.img --rate 4M       an image of yours; it is only read
  scripts/pair -- -c 8                  more options for nbdstream stream

Ctrl-C, or the end of the input, ends both and removes everything but your image.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from typing import TYPE_CHECKING

from nbdstream.units import format_size, parse_size
from tests.support.harness import CommandPair, make_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FAULTS = """\
  cut             reset the connections between source and streamer
  stall, flow     let nothing through, let everything through
  refuse, accept  hang up on new connections, or do not
  delay SECONDS   of everything, in each direction
  corrupt N       turn over the byte that comes from the source after N more
  kill source, start source, kill streamer, start streamer
  progress        how far the stream has come
  quit"""


class TalkativePair(CommandPair):
    """Shows what the two commands say, and does what a person says."""

    def __init__(self, directory: str, image: str | None, size: int, rate: int | None, options: Sequence[str]) -> None:
        super().__init__(directory)
        self._rate = rate
        self._options = options
        if image:
            self.image = os.path.abspath(image)
        else:
            make_image(self.image, size, random.Random())

    def tell(self, line: str) -> None:
        print(f"  {line}", flush=True)

    def start_streamer(self, *, rate: int | None = None) -> None:
        self.begin_streamer(*self._options, rate=rate or self._rate).wait_until_serving()

    def show_progress(self) -> None:
        assert self.streamer
        progress = self.streamer.progress[-1] if self.streamer.progress else {"position": 0, "length": 0, "fetched": 0}
        sizes = {name: format_size(progress[name]) for name in ("position", "length", "fetched")}
        print("  {position} of {length} need the source no more; fetched: {fetched}".format(**sizes))

    def obey(self, line: str) -> None:
        """Do what was typed. Raises KeyError or ValueError if that is nothing."""
        word, *arguments = line.split()
        if word in ("kill", "start"):
            calls: dict[str, Callable[[], None]] = {
                "kill source": self.kill_source,
                "kill streamer": self.kill_streamer,
                "start source": self.start_source,
                "start streamer": self.start_streamer,
            }
            calls[" ".join([word, *arguments])]()
        elif word == "delay":
            self.faults.delay = float(arguments[0])
        elif word == "corrupt":
            self.faults.corrupt_after(int(arguments[0]))
        elif word in ("refuse", "accept"):
            self.faults.refusing = word == "refuse"
        elif word == "progress":
            self.show_progress()
        else:
            {"cut": self.faults.cut, "stall": self.faults.stall, "flow": self.faults.flow}[word]()


def converse(pair: TalkativePair) -> None:
    pair.start()
    print(f"source:   {pair.uri} (through a proxy; {pair.image})")
    print(f"overlay:  {pair.overlay}")
    print(f"guest:    {pair.guest_uri}")
    print(f"say:\n{FAULTS}", flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        if line.strip():
            try:
                pair.obey(line)
            except (KeyError, ValueError, IndexError):
                print(f"say:\n{FAULTS}", flush=True)
            except AssertionError as error:
                print(f"  {error}", flush=True)


def main() -> int:
    """Run both ends until told to stop."""
    parser = argparse.ArgumentParser(
        prog="scripts/pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", nargs="?", help="a raw image to serve (default: one of random data)")
    parser.add_argument("--size", type=parse_size, default=256 << 20, help="of the image that is made (default: 256M)")
    parser.add_argument("--rate", type=parse_size, help="of the stream, bytes a second (default: no limit)")
    arguments, rest = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = [word for word in rest if word != "--"]
    with tempfile.TemporaryDirectory(prefix="nbdstream-pair-") as directory:
        try:
            with TalkativePair(directory, arguments.image, arguments.size, arguments.rate, options) as pair:
                converse(pair)
        except KeyboardInterrupt:
            return 130
        except AssertionError as error:
            print(f"scripts/pair: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
