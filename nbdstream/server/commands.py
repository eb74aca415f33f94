"""Requests that take their time: each one answered by a coroutine, with whatever went wrong as an NBD error."""

from __future__ import annotations

import errno
import itertools
import logging
from typing import TYPE_CHECKING, Final

from nbdstream.block.device import is_zeroes
from nbdstream.server.contexts import descriptors
from nbdstream.wire.nbd import Cmd, CmdFlag, Err
from nbdstream.wire.transmission import context_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nbdstream.block.device import Buffer
    from nbdstream.server.export import Export
    from nbdstream.wire.replies import Replies
    from nbdstream.wire.transmission import Request

_log = logging.getLogger(__name__)

_CACHE_STEP: Final = 1 << 20
"""Bytes that CACHE holds at a time, however much it was asked for."""

_RANGE_STEP: Final = 1 << 30
"""Bytes that a device is asked to zero or to forget at a time, so that others get their turn."""

_ERRORS: Final = {
    errno.EPERM: Err.EPERM,
    errno.EACCES: Err.EPERM,
    errno.EROFS: Err.EPERM,
    errno.ENOSPC: Err.ENOSPC,
    errno.EDQUOT: Err.ENOSPC,
    errno.EFBIG: Err.ENOSPC,
    errno.ESHUTDOWN: Err.ESHUTDOWN,
    # proto.md asks for no ENOMEM "if at all possible", and a guest can do with EIO what it could with it.
    errno.ENOMEM: Err.EIO,
    # A medium or a source that is gone is no invalid argument.
    **dict.fromkeys(
        (
            errno.EIO,
            errno.ENXIO,
            errno.ENODEV,
            errno.ESTALE,
            errno.EREMOTEIO,
            errno.ENOTCONN,
            errno.EPIPE,
            errno.ETIMEDOUT,
            errno.ECONNREFUSED,
            errno.ECONNRESET,
            errno.ECONNABORTED,
            errno.EHOSTUNREACH,
            errno.ENETUNREACH,
        ),
        Err.EIO,
    ),
}


def error_value(error: OSError) -> Err:
    """Return the error value of a device's failure (proto.md, "Error values")."""
    return _ERRORS.get(error.errno or 0, Err.EINVAL)


class Commands:
    """Answers requests for one export in the way that one connection understands."""

    def __init__(self, export: Export, replies: Replies, contexts: dict[int, str]) -> None:
        """``contexts``: the names of the negotiated meta contexts by id."""
        self._export = export
        self._device = export.device
        self._replies = replies
        self._contexts = {number: export.contexts[name] for number, name in contexts.items()}

    async def perform(self, request: Request) -> Sequence[Buffer]:
        """Do what a valid request asks for and return the reply to its success. Raises whatever the device raises."""
        reply = await self._perform(request)
        return reply or [self.success(request)]

    def success(self, request: Request) -> bytes:
        """Return the reply to a request that went well and has nothing to give."""
        return self._replies.done(request.command, request.cookie, request.offset)

    def failure(self, request: Request, error: Exception) -> bytes:
        """Return the reply to a request that the device failed."""
        if not isinstance(error, OSError):
            # Whatever is wrong with the device, the client stays and is told.
            _log.error("%s failed", Cmd(request.command).name, exc_info=error)
            return self._error(request, Err.EIO, "internal error")
        value = error_value(error)
        # proto.md keeps ENOTSUP for this one use.
        if error.errno == errno.ENOTSUP and request.flags & CmdFlag.FAST_ZERO:
            value = Err.ENOTSUP
        return self._error(request, value, error.strerror or "")

    def _error(self, request: Request, error: Err, text: str) -> bytes:
        return self._replies.error(request.cookie, request.offset, error, text)

    def read_reply(self, request: Request, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Return the reply that carries what the device read."""
        if sum(map(len, buffers)) != request.length:
            # A header that promises more or less than follows would cost the client the connection at best.
            _log.error("the device read %d bytes, not %d", sum(map(len, buffers)), request.length)
            return [self._error(request, Err.EIO, "the device read a wrong number of bytes")]
        if self._replies.sparse and not request.flags & CmdFlag.DF and any(map(is_zeroes, buffers)):
            return self._sparse_reply(request, buffers)
        return [self._replies.read_header(request.cookie, request.offset, request.length), *buffers]

    def _sparse_reply(self, request: Request, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Return the reply that tells of zeroes, and carries the rest."""
        _, _, cookie, offset, length, _, _ = request
        at, end = offset, offset + length
        reply: list[Buffer] = []
        for hole, run in itertools.groupby(buffers, is_zeroes):
            chunk = list(run)
            size = sum(map(len, chunk))
            reply.append(self._replies.read_chunk(cookie, offset, at, size, hole=hole, last=at + size == end))
            if not hole:
                reply += chunk
            at += size
        return reply

    async def _perform(self, request: Request) -> Sequence[Buffer] | None:
        """Return the reply, or None for a plain success."""
        command, flags, _, offset, length, payload, _ = request
        if command == Cmd.FLUSH:
            await self._device.flush()
        elif not length:
            # proto.md leaves it open, but for staying connected. A FUA on nothing has nothing to persist.
            return None
        elif command == Cmd.READ:
            return self.read_reply(request, await self._device.read(offset, length))
        elif command == Cmd.CACHE:
            await self._cache(offset, length)
        elif command == Cmd.BLOCK_STATUS:
            return await self._block_status(request)
        else:
            if command == Cmd.WRITE:
                assert payload is not None
                await self._device.write(offset, payload)
            elif command == Cmd.TRIM:
                await self._discard(offset, length)
            else:
                await self._write_zeroes(offset, length, flags)
            if flags & CmdFlag.FUA:
                await self._device.flush()
        return None

    async def _discard(self, offset: int, length: int) -> None:
        for at, some in _steps(offset, length, _RANGE_STEP):
            await self._device.discard(at, some)

    async def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        for at, some in _steps(offset, length, _RANGE_STEP):
            # "Not fast" must leave everything as it was. So it is too late to say so once something has changed.
            fast_only = bool(flags & CmdFlag.FAST_ZERO) and at == offset
            may_unmap = not flags & CmdFlag.NO_HOLE
            await self._device.write_zeroes(at, some, may_unmap=may_unmap, fast_only=fast_only)

    async def _cache(self, offset: int, length: int) -> None:
        for at, some in _steps(offset, length, _CACHE_STEP):
            await self._device.read(at, some)

    async def _block_status(self, request: Request) -> Sequence[Buffer]:
        only_one = bool(request.flags & CmdFlag.REQ_ONE)
        numbers = self._contexts.keys() if request.payload is None else context_ids(request.payload)
        extents = await self._device.extents(request.offset, request.length)
        status = {number: descriptors(self._contexts[number], extents, only_one=only_one) for number in numbers}
        return [self._replies.block_status(request.cookie, request.offset, status)]


def _steps(offset: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """Split a range into (offset, length) of at most ``step`` bytes each, ending at multiples of it."""
    end = offset + length
    while offset < end:
        some = min(step - offset % step, end - offset)
        yield offset, some
        offset += some
