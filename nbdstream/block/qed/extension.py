"""What nbdstream remembers in a QED image: which image this is, and which source it was an overlay of.

The header of a QED image is whole clusters (qed_spec, ``header_size``), of which the format itself uses 64 bytes and
the backing file's name. The *extension* lies in what is spare, at a fixed place of the file. It is plain bytes to every
other program: QEMU leaves them as they are, when it writes, drops the backing file or repairs.

Nothing depends on it but what nbdstream says about an image. So it is never trusted and never an error: where it is
absent or damaged, nothing is known.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from uuid import UUID, uuid4

EXTENSION_OFFSET = 8192
"""Where it lies in the file, in bytes: behind any backing file's name that QEMU or we write (64 + 4095 at most)."""
EXTENSION_BYTES = 8192
"""How much of the file belongs to it. An image whose header clusters end before it has none."""

MAX_ORIGIN_BYTES = 4095
"""The longest backing file name that a QED image can have."""

_MAGIC = b"NBDSTRM\0"
_VERSION = 1
_PREFIX = struct.Struct("<8sII")  # magic, version, crc32 of everything behind these 16 bytes
_PAYLOAD = struct.Struct("<16sQH")  # image UUID, origin_size, length of the origin that follows


@dataclass(frozen=True, slots=True)
class Extension:
    """The identity of an image."""

    image_uuid: UUID
    """Made with the image, the same as long as it lives."""
    origin: str = ""
    """The backing file name that it was made with, remembered when it has none any more; empty if it never had."""
    origin_size: int = 0
    """The size of that source, bytes, as it said itself (the image's own size is a multiple of 512)."""

    @classmethod
    def new(cls, origin: str = "", origin_size: int = 0) -> Extension:
        """Return the extension of a new image, with a UUID of its own."""
        return cls(uuid4(), origin, origin_size)

    @classmethod
    def parse(cls, area: bytes) -> Extension | None:
        """Return what the bytes at ``EXTENSION_OFFSET`` say; None if that is nothing, or cannot be trusted."""
        if len(area) < EXTENSION_BYTES:
            return None
        magic, version, checksum = _PREFIX.unpack_from(area)
        if (magic, version) != (_MAGIC, _VERSION) or zlib.crc32(area[_PREFIX.size : EXTENSION_BYTES]) != checksum:
            return None
        uuid, origin_size, length = _PAYLOAD.unpack_from(area, _PREFIX.size)
        if length > MAX_ORIGIN_BYTES:
            return None
        start = _PREFIX.size + _PAYLOAD.size
        origin = area[start : start + length].decode("utf-8", "surrogateescape")
        return cls(UUID(bytes=uuid), origin, origin_size)

    def pack(self) -> bytes:
        """Return the whole area: ``EXTENSION_BYTES`` bytes for ``EXTENSION_OFFSET``.

        Raises ValueError if the origin is longer than a backing file name can be, or its size is no u64.
        """
        origin = self.origin.encode("utf-8", "surrogateescape")
        if len(origin) > MAX_ORIGIN_BYTES or not 0 <= self.origin_size < 1 << 64:
            msg = f"not an origin: {len(origin)} bytes of name, size {self.origin_size}"
            raise ValueError(msg)
        payload = _PAYLOAD.pack(self.image_uuid.bytes, self.origin_size, len(origin)) + origin
        payload = payload.ljust(EXTENSION_BYTES - _PREFIX.size, b"\0")
        return _PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(payload)) + payload
