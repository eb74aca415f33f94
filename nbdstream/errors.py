"""The errors that the user of nbdstream sees, each of them one clear line.

A failed *request* on a device is an :class:`OSError` whose errno says what the client is told
(proto.md, "Error values"). Everything that ends a *command* is an :class:`NbdstreamError`.
"""

from __future__ import annotations


class NbdstreamError(Exception):
    """A command cannot go on. The text is one line that says what was wrong and what to do."""


class ImageError(NbdstreamError):
    """An image file is missing, damaged, or not what it was said to be."""


class ImageLockedError(ImageError):
    """Another process owns the image: another nbdstream or a QEMU holds its locks."""


class SourceError(NbdstreamError):
    """The source cannot be reached, refuses, is no NBD server, or is not the one it was."""


class WrongSourceError(SourceError):
    """The source is there, but it is another disk than the one that the overlay belongs to."""


class JobError(NbdstreamError):
    """A job cannot do what it is told in its present state, or its disk cannot have one."""


class ListenError(NbdstreamError):
    """The server cannot listen where it was told to: the port or the socket is in use."""


class ControlError(NbdstreamError):
    """A control socket cannot be reached, or refuses what it is asked."""


class ControlLostError(ControlError):
    """Whoever was at the other end of a control socket has ended, or has cut us off."""


class ProtocolError(Exception):
    """The peer broke the protocol so that the stream cannot be followed any further.

    It ends one connection and nothing else.
    """
