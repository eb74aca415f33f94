from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdstream.block.joining import KernelJoin
from nbdstream.block.mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def joiner() -> Iterator[KernelJoin]:
    joiner = KernelJoin()
    yield joiner
    joiner.close()


@given(lengths=st.lists(st.sampled_from([0, 1, 28, 4096, 100_000, 300_000, 1 << 20]), max_size=12))
def test_all_bytes_come_out_in_their_order(lengths: list[int]) -> None:
    joiner = KernelJoin()
    buffers = [os.urandom(length) for length in lengths]
    assert b"".join(joiner.join(buffers)) == b"".join(buffers)
    joiner.close()


def test_more_buffers_than_one_system_call_takes(joiner: KernelJoin) -> None:
    buffers = [bytes([number % 256]) for number in range(5000)]
    assert b"".join(joiner.join(buffers)) == b"".join(buffers)


@pytest.mark.parametrize("before", [0, 1, 3])
async def test_a_page_that_is_gone_is_an_error(joiner: KernelJoin, tmp_path: Path, before: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data" * 4096)
    fd = os.open(path, os.O_RDWR)
    mapping = Mapping(fd, 16384)
    views = [mapping.view(4096 * page, 4096) for page in range(4)]
    os.ftruncate(fd, 4096 * before)
    with pytest.raises(OSError, match="Bad address") as raised:
        list(joiner.join([b"header", *views]))
    assert raised.value.errno == errno.EFAULT
    assert b"".join(joiner.join(views[:before])) == b"data" * 1024 * before
    os.close(fd)


def test_closing_twice_does_no_harm(joiner: KernelJoin) -> None:
    joiner.close()
    joiner.close()
