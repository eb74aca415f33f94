"""``python -m tests.support.kill_at CALL NUMBER COMMAND...``: COMMAND, killed when it is about to make a system call.

``kill -9`` comes at the NUMBER-th CALL (its name, as in ``pwrite64``) of all threads together, which does not happen
any more. (strace counts the calls of each thread alone.) The command takes this process' place: its status and the
signals to it are its own. A seccomp filter holds each call until another process, which ends with the command, has
counted it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import sys

_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000  # seccomp.h: SCMP_ACT_ALLOW, SCMP_ACT_NOTIFY
_CALL_BYTES, _RECEIVE = 80, 0xC0502100  # linux/seccomp.h: struct seccomp_notif, SECCOMP_IOCTL_NOTIF_RECV
_ANSWER, _SEND = struct.Struct("QqiI"), 0xC0182101  # struct seccomp_notif_resp, SECCOMP_IOCTL_NOTIF_SEND
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE


def main() -> None:
    """Become the command."""
    call, number, *command = sys.argv[1:]
    victim = os.getpid()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()  # so that this process ends, too, if the command never begins
        _, (listener,), *_ = socket.recv_fds(theirs, 1, 1)
        os.closerange(0, listener)  # whoever listens to the command is not kept waiting by this process
        os.closerange(listener + 1, 1024)
        _count(listener, int(number), victim)
        os._exit(0)
    socket.send_fds(ours, [b"."], [_hold(call)])
    os.execvp(command[0], command)


def _hold(call: str) -> int:
    """Have all such calls of this process wait; return where they are heard of."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    number = seccomp.seccomp_syscall_resolve_name(call.encode())
    assert number >= 0, f"there is no {call}"
    context = ctypes.c_void_p(seccomp.seccomp_init(_ALLOW))
    assert seccomp.seccomp_rule_add(context, _NOTIFY, number, 0) == 0
    assert seccomp.seccomp_load(context) == 0
    listener: int = seccomp.seccomp_notify_fd(context)
    os.set_inheritable(listener, False)
    return listener


def _count(listener: int, number: int, victim: int) -> None:
    """Let the calls go on, one by one, up to the last one."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while poll.poll()[0][1] & select.POLLIN:  # else the command has ended
        call = bytearray(_CALL_BYTES)
        try:
            fcntl.ioctl(listener, _RECEIVE, call)
            number -= 1
            if number == 0:
                os.kill(victim, signal.SIGKILL)
                return
            fcntl.ioctl(listener, _SEND, _ANSWER.pack(int.from_bytes(call[:8], sys.byteorder), 0, 0, _CONTINUE))
        except FileNotFoundError:  # the thread has ended meanwhile
            continue


if __name__ == "__main__":
    main()
