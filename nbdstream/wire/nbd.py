"""The constants and message layouts of NBD, named as in proto.md ("Values").

Nothing here decides anything. Integers are unsigned and big-endian, as everywhere in NBD; all offsets and
lengths are bytes. What has to do with extended headers is in proto.md's branch extension-ext-header.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REP_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

MAX_STRING: Final = 4096
"""Bytes of UTF-8 in an export name, a description, a context name or an error text ("Conventions")."""

EXPORT_NAME_PADDING: Final = bytes(124)
"""Follows the answer to EXPORT_NAME, unless the client set NO_ZEROES."""

GREETING: Final = struct.Struct("!QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""

CLIENT_FLAGS: Final = struct.Struct("!I")

OPTION: Final = struct.Struct("!QII")
"""IHAVEOPT, option, length of the data that follow."""

OPTION_REPLY: Final = struct.Struct("!QIII")
"""REP_MAGIC, option, reply type, length of the data that follow."""

EXPORT_NAME_REPLY: Final = struct.Struct("!QH")
"""Size of the export, transmission flags."""

INFO_EXPORT: Final = struct.Struct("!HQH")
"""Info.EXPORT, size of the export, transmission flags."""

INFO_BLOCK_SIZE: Final = struct.Struct("!HIII")
"""Info.BLOCK_SIZE, minimum block, preferred block, maximum payload."""

REQUEST: Final = struct.Struct("!IHHQQI")
"""REQUEST_MAGIC, command flags, command, cookie, offset, length."""

EXTENDED_REQUEST: Final = struct.Struct("!IHHQQQ")
"""EXTENDED_REQUEST_MAGIC, command flags, command, cookie, offset, length of the payload or of what is asked for."""

SIMPLE_REPLY: Final = struct.Struct("!IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie."""

CHUNK: Final = struct.Struct("!IHHQI")
"""STRUCTURED_REPLY_MAGIC, reply flags, reply type, cookie, length of the payload that follows."""

EXTENDED_CHUNK: Final = struct.Struct("!IHHQQQ")
"""EXTENDED_REPLY_MAGIC, reply flags, reply type, cookie, the request's offset, length of the payload that follows."""

OFFSET_DATA_CHUNK: Final = struct.Struct("!IHHQIQ")
"""A CHUNK header and the offset that an OFFSET_DATA chunk begins with."""

EXTENDED_OFFSET_DATA_CHUNK: Final = struct.Struct("!IHHQQQQ")
"""An EXTENDED_CHUNK header and the offset that an OFFSET_DATA chunk begins with."""

HOLE: Final = struct.Struct("!QI")
"""OFFSET_HOLE: offset, length of the hole."""

DESCRIPTOR: Final = struct.Struct("!II")
"""BLOCK_STATUS: length of the extent, status flags."""

DESCRIPTOR_EXT: Final = struct.Struct("!QQ")
"""BLOCK_STATUS_EXT: length of the extent, status flags."""

STATUS_HEADER: Final = struct.Struct("!I")
"""BLOCK_STATUS: context id. The descriptors follow."""

STATUS_HEADER_EXT: Final = struct.Struct("!II")
"""BLOCK_STATUS_EXT: context id, number of descriptors. The descriptors follow."""

STATUS_PAYLOAD: Final = struct.Struct("!Q")
"""What a BLOCK_STATUS request with a payload begins with: the length asked about. Context ids (32 bits) follow."""

ERROR_PAYLOAD: Final = struct.Struct("!IH")
"""Reply type ERROR: error, length of the text that follows."""


class HandshakeFlag(IntFlag):
    """What the server says of the handshake."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(IntFlag):
    """What the client answers to :class:`HandshakeFlag`."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Opt(IntEnum):
    """Option types."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Rep(IntEnum):
    """Option reply types; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class Info(IntEnum):
    """Information types of INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Cmd(IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CmdFlag(IntFlag):
    """Command flags."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntFlag):
    """Flags of a structured reply chunk."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """Structured reply types; error chunks have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class Err(IntEnum):
    """Error values: these and no others go over the wire."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108
