"""A server that is attacked while a well-behaved client works on, and what has to be true of it afterwards."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.attacked import DISK_BYTES, WITNESS_BYTES, Attacked, Servers
from tests.support.processes import Process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SLOWEST_SECONDS = 1.0
"""What the slowest request of the well-behaved client may take, on a machine that others use as well."""


@pytest.fixture
def limits() -> dict[str, Any]:
    """The server's limits, where they are not its defaults: for a test to parametrize."""
    return {}


@pytest.fixture
def tls() -> str:
    """What the server does about TLS, ``off``, ``on`` or ``require``: for a test to parametrize."""
    return "off"


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """The servers of a module: an attack is to leave nothing behind that the next one could notice."""
    with Servers() as servers:
        yield servers


@pytest.fixture
async def attacked(servers: Servers, limits: dict[str, Any], tls: str) -> AsyncIterator[Attacked]:
    """A server with a well-behaved client, which has to be served well for as long as the test takes."""
    path, server = servers.get(limits, tls)
    attacked = Attacked(path, server)
    own = str(DISK_BYTES), str(WITNESS_BYTES)
    with Process(sys.executable, "-m", "tests.support.witness", path, *own) as witness:
        witness.wait_for("at work")
        attacked.descriptors = attacked.count_descriptors()
        yield attacked
        for client in attacked.clients:
            client.writer.transport.abort()
        await attacked.quiet()
        assert witness.stop() == 0, str(witness)
    said = witness.progress[-1]
    text = "the well-behaved client: {requests} requests, median {median:.6f} s, slowest {slowest:.6f} s"
    print(text.format(**said))
    assert said["slowest"] < SLOWEST_SECONDS
    assert server.running, str(server)
