"""The thread that writes what was received."""

from __future__ import annotations

import threading
from typing import Any, cast

from nbdstream.block.remote.commands import Copy
from nbdstream.block.remote.store import Store


def copy(number: int, *, urgent: bool) -> Copy:
    return Copy(number, 1, cast("Any", None), urgent=urgent)


def test_an_urgent_copy_does_not_overtake() -> None:
    begun, go_on = threading.Event(), threading.Event()
    finished: list[int] = []

    def finish(each: Copy) -> None:
        begun.set()
        assert go_on.wait(10)
        finished.append(each.offset)

    store = Store(finish)
    store.put(copy(0, urgent=False))
    assert begun.wait(10)
    for number in range(1, 7):
        store.put(copy(number, urgent=number % 2 == 0))
    go_on.set()
    store.close()
    assert finished == list(range(7))


def test_closing_waits_until_everything_is_stored() -> None:
    finished: list[int] = []
    store = Store(lambda each: finished.append(each.offset))
    for number in range(100):
        store.put(copy(number, urgent=False))
    store.close()
    assert finished == list(range(100))
