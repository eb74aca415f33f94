"""System calls of a command that are held until another process lets them go on.

A seccomp filter holds each such call of any of its threads. All others cost what they always do, which is not so with
strace: so this is for what is measured, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000  # seccomp.h: SCMP_ACT_ALLOW, SCMP_ACT_NOTIFY
_CALL_BYTES, _RECEIVE = 80, 0xC0502100  # linux/seccomp.h: struct seccomp_notif, SECCOMP_IOCTL_NOTIF_RECV
_ANSWER, _SEND = struct.Struct("QqiI"), 0xC0182101  # struct seccomp_notif_resp, SECCOMP_IOCTL_NOTIF_SEND
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE


class HeldCalls:
    """The calls of one command that are held."""

    def __init__(self, listener: int, victim: int) -> None:
        self.victim = victim
        """The command's process."""
        self._listener = listener
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the next call that is held, None if there was none for so long. Ends this process with the command."""
        # Not with poll: that knows no fractions of a millisecond.
        if not select.select([self._listener], [], [], seconds)[0]:
            return None
        if not self._poll.poll(0)[0][1] & select.POLLIN:
            os._exit(0)
        call = bytearray(_CALL_BYTES)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, call)
        except FileNotFoundError:  # the thread has ended meanwhile
            return None
        return int.from_bytes(call[:8], sys.byteorder)

    def let_go(self, call: int) -> None:
        """Let a call go on, if its thread is still there."""
        with contextlib.suppress(FileNotFoundError):
            fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(call, 0, 0, _CONTINUE))


def become(command: list[str], names: Sequence[str], watch: Callable[[HeldCalls], None]) -> NoReturn:
    """Become ``command``, and have its calls of these names held for ``watch``, which runs in a process of its own.

    The command takes this process' place: its status and the signals to it are its own.
    """
    victim = os.getpid()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()  # so that this process ends, too, if the command never begins
        _, (listener,), *_ = socket.recv_fds(theirs, 1, 1)
        os.closerange(0, listener)  # whoever listens to the command is not kept waiting by this process
        os.closerange(listener + 1, 1024)
        watch(HeldCalls(listener, victim))
        os._exit(0)
    socket.send_fds(ours, [b"."], [_hold(names)])
    os.execvp(command[0], command)


def _hold(names: Sequence[str]) -> int:
    """Have all such calls of this process held; return where they are heard of."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_ALLOW))
    for name in names:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        assert number >= 0, f"there is no {name}"
        assert seccomp.seccomp_rule_add(context, _NOTIFY, number, 0) == 0
    assert seccomp.seccomp_load(context) == 0
    listener: int = seccomp.seccomp_notify_fd(context)
    os.set_inheritable(listener, False)
    return listener
