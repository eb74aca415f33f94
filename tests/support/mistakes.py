"""Wrong orders of writes, to test the tests with: what they are for must not get past them.

``python -m tests.support.mistakes MISTAKE ARGUMENT...`` is ``nbdstream ARGUMENT...`` with one of them.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

import pytest

from nbdstream.block.qed.epochs import Epochs
from nbdstream.block.qed.image import QedImage
from nbdstream.block.qed.opening import write_header
from nbdstream.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable


def link_before_the_barrier(patch: pytest.MonkeyPatch) -> None:
    """Entries of the tables are written together with the data that they lead to."""
    right = Epochs._write_new_tables

    async def early(self: Epochs, queue: list[tuple[int, int]]) -> dict[int, int]:
        tables = await right(self, queue)
        await self._worker.run(self._tables.link, tables, queue)
        return tables

    patch.setattr(Epochs, "_write_new_tables", early)


def l1_before_the_l2_table(patch: pytest.MonkeyPatch) -> None:
    """Only L1 entries are too early: they lead to tables that may not be there."""
    right = Epochs._write_new_tables

    async def early(self: Epochs, queue: list[tuple[int, int]]) -> dict[int, int]:
        tables = await right(self, queue)
        await self._worker.run(self._tables.link, tables, [])
        return tables

    patch.setattr(Epochs, "_write_new_tables", early)


def no_barrier(patch: pytest.MonkeyPatch) -> None:
    """Nothing is ever made durable."""
    patch.setattr(os, "fdatasync", lambda _fd: None)


def reuse_at_once(patch: pytest.MonkeyPatch) -> None:
    """A cluster that was replaced is used again before it is durable that nothing leads to it."""
    patch.setattr(Epochs, "_recycle_durably", lambda self, replaced: self._recycle(replaced))


def answer_before_the_link(patch: pytest.MonkeyPatch) -> None:
    """A write is answered when a kill can still lose it."""
    patch.setattr(Epochs, "note", lambda self, cluster: True)


def forget_the_backing_file_early(patch: pytest.MonkeyPatch) -> None:
    """The header is changed while links are still on their way."""
    right = QedImage.forget_backing

    async def early(image: QedImage) -> None:
        write_header(image.fd, image.header.without_backing())
        await right(image)

    async def nothing(*_: object) -> None:
        pass

    patch.setattr(QedImage, "forget_backing", early)
    importlib.import_module("nbdstream.stream.disk")
    for name in [name for name in sys.modules if name.startswith("nbdstream.stream")]:  # whoever tidies before
        patch.setattr(f"{name}.tidy", nothing, raising=False)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    mistake.__name__: mistake
    for mistake in (
        link_before_the_barrier,
        l1_before_the_l2_table,
        no_barrier,
        reuse_at_once,
        answer_before_the_link,
        forget_the_backing_file_early,
    )
}

if __name__ == "__main__":
    MISTAKES[sys.argv[1]](pytest.MonkeyPatch())
    sys.exit(main(sys.argv[2:]))
