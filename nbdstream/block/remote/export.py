"""A remote NBD export: what the loop sees of a source.

It knows two verbs: *read*, into memory for the guest, and *copy*, from the export into a file without
crossing the event loop. A lost connection fails what was in flight; whoever owns the export decides
what to ask again, and connects anew (``nbdstream.stream``).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from nbdstream.block.device import BlockDevice, Buffer
from nbdstream.block.remote.commands import Copy, Read, Status
from nbdstream.block.remote.connections import ConnectionOptions
from nbdstream.block.remote.handle import HandleError, RemoteInfo
from nbdstream.block.remote.thread import RemoteThread
from nbdstream.block.worker import settling
from nbdstream.errors import SourceError
from nbdstream.extents import Extent, ExtentFlags
from nbdstream.uri import NbdUri, UriError

if TYPE_CHECKING:
    from collections.abc import Sequence

ReadDone: TypeAlias = Callable[[bytearray | memoryview | None, OSError | None], None]
"""The bytes, which are the caller's from then on, or what went wrong."""

CopyDone: TypeAlias = Callable[[int | None, OSError | None], None]
"""The zero units that were not written (bit i: unit i), or what went wrong."""

CopyArrived: TypeAlias = Callable[[memoryview, OSError | None], None]
"""The bytes, to be looked at only."""


DEFAULT_STALL_SECONDS = 30.0
"""What the disk of a source may take to spin up, or to fail over to another path (Linux gives a SCSI command 30 s)."""

DEFAULT_MEMORY = 32 << 20
"""Bytes: three quarters fill a line of 960 MB/s with a round trip of 25 ms."""


class RemoteExport(BlockDevice):
    """An export of an NBD server, read over one or more connections in a thread of their own.

    A request fails with OSError: ECONNRESET when its connection broke before it was answered (others may
    live on), ENOTCONN when there was none left to send it on, ECANCELED when it was closed meanwhile, else with
    what the server answered (EIO for a broken answer). Memory is bounded by what the caller has in flight.
    """

    read_only = True

    def __init__(self, uri: NbdUri, info: RemoteInfo, thread: RemoteThread) -> None:
        """Use :meth:`connect`."""
        self.uri = uri
        self.info = info
        self.size = info.size
        self.preferred_block = info.preferred_block
        self.lost: asyncio.Future[str] = thread.lost
        """Done when the last connection is gone, with the reason for people. From then on every request fails."""
        self._thread = thread
        self._closed = False

    @classmethod
    async def connect(
        cls,
        uri: str,
        *,
        connections: int = 4,
        tls_certificates: str | None = None,
        timeout: float = 10.0,  # noqa: ASYNC109 - it limits the thread, too
        stall: float = DEFAULT_STALL_SECONDS,
        memory: int = DEFAULT_MEMORY,
    ) -> RemoteExport:
        """Connect, and return when the first connection is ready.

        The others follow behind, if the server says that several connections see one disk.
        ``tls_certificates`` is the directory of ca-cert.pem, client-cert.pem and client-key.pem.
        A connection is given up when nothing has arrived on it for ``stall`` seconds while something was asked for.
        ``memory`` bounds the payload that is on its way, in bytes; a quarter of it is for what is urgent.
        Raises :class:`SourceError`, also when nobody answers for ``timeout`` seconds.
        """
        try:
            parsed = NbdUri.parse(uri)
        except UriError as error:
            raise SourceError(str(error)) from error
        options = ConnectionOptions(connections, tls_certificates, timeout, stall)
        thread = RemoteThread(parsed, options, memory=memory, loop=asyncio.get_running_loop())
        try:
            async with asyncio.timeout(timeout):
                info = await thread.connected
        except BaseException as error:
            # It is not waited for: it may hang in looking up a name.
            thread.stop()
            if isinstance(error, TimeoutError):
                raise _cannot_connect(parsed, f"no answer within {timeout:g} seconds") from error
            if isinstance(error, HandleError):
                raise _cannot_connect(parsed, str(error)) from error
            raise
        return cls(parsed, info, thread)

    def read_soon(self, offset: int, length: int, done: ReadDone) -> None:
        """Read ahead of all copies; ``done`` is called on the loop, and never before this returns."""
        self._submit(Read(offset, length, done, urgent=True))

    def copy_soon(
        self,
        offset: int,
        length: int,
        fd: int,
        file_offset: int,
        done: CopyDone,
        *,
        zero_unit: int = 0,
        urgent: bool = False,
        write_back: bool = True,
        short_writes: bool = False,
        arrived: CopyArrived | None = None,
    ) -> Copy:
        """Read a range and write it to ``fd`` at ``file_offset``, neither of it on the loop.

        With ``zero_unit``, of the range's units of so many bytes those that hold only zeroes are not
        written but told of. ``write_back`` has the kernel begin at once to bring the data to the disk: an
        fdatasync is needed all the same, and is shorter. With ``short_writes`` others can write to the file in
        between. ``arrived`` is told, on the loop, of the bytes of a copy that is urgent by then, as soon as they are
        there, which is before they are in the file. ``fd`` must stay open until ``done``, which is called on the loop,
        never before this returns, and tells a failed write as it tells a failed read.
        What is returned can be given to :meth:`hurry`.
        """
        command = Copy(offset, length, done, urgent=urgent)
        command.fd = fd
        command.file_offset = file_offset
        command.zero_unit = zero_unit
        command.write_back = write_back
        command.short_writes = short_writes
        command.arrived = arrived
        self._submit(command)
        return command

    def hurry(self, command: Copy) -> None:
        """Let a copy that was not urgent be so from now on."""
        if not command.urgent and not self._closed:
            command.urgent = True
            self._thread.submit(command)

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Return the range as one buffer, which is the caller's."""
        answer: asyncio.Future[bytearray | memoryview] = asyncio.get_running_loop().create_future()
        self.read_soon(offset, length, settling(answer))
        return [await answer]

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe the range by the server's ``base:allocation``; without that as data."""
        if not self.info.has_allocation:
            return [Extent(offset, length, ExtentFlags.DATA)]
        answer: asyncio.Future[list[Extent]] = asyncio.get_running_loop().create_future()
        self._submit(Status(offset, length, settling(answer)))
        return await answer

    async def close(self) -> None:
        """Leave the server. Requests that are still in flight fail with ECANCELED before this returns."""
        self._closed = True
        await asyncio.shield(self._thread.stop())

    def _submit(self, command: Read | Copy | Status) -> None:
        if self._closed:
            error = OSError(errno.ECANCELED, "the source is closed")
            asyncio.get_running_loop().call_soon(command.done, None, error)
        else:
            self._thread.submit(command)


def _cannot_connect(uri: NbdUri, reason: str) -> SourceError:
    return SourceError(f"cannot connect to {uri.without_credentials()}: {reason}")
