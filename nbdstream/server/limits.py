"""What clients may cost the server, each limit with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what clients may take. Times in seconds, sizes in bytes."""

    connections: int = 256
    """Connections in all, those whose requests are still being finished included. One costs a receive buffer
    (256 KiB) and at most ``bytes_in_flight`` + ``reply_backlog``; guests use 1, copying tools 4 to 16."""

    handshakes: int = 100
    """Connections that have not opened an export yet: what an attacker gets for nothing (CVE-2024-7409)."""

    handshake_time: float = 10.0
    """From the connection to the end of negotiation, as QEMU has it; a human over a satellite link needs under 5."""

    option_length: int = 256 << 10
    """Data of one option of the handshake, which are kept until they are complete; longer ones are skipped and refused.
    The largest sensible one (a name and every information type) has 135,172."""

    options: int = 1024
    """Options in one handshake. Real clients send fewer than ten for an export."""

    requests_in_flight: int = 256
    """Per connection, requests that the device has not answered yet. libnbd advises 64, the Linux client uses 128."""

    bytes_in_flight: int = 64 << 20
    """Per connection, payload of such requests. One request is always let in, so less than the maximum payload (64 MiB)
    would bound nothing."""

    reply_backlog: int = 4 << 20
    """Per connection, replies that the client has not taken yet; beyond it no further requests are read. It holds 16
    reads of 256 KiB, so a client that takes its replies steadily never meets it. Inside TLS nothing more is encrypted
    either."""

    poll_max_ns: int = 50_000
    """For how long at a time the server stays awake for the next request of a client that is quick to send it: two
    or three times what such a client takes, and as long as it costs to be woken up. QEMU's iothreads have 32 µs."""

    linger_time: float = 10.0
    """From the last reply to the end of a connection: a client that does not take what it asked for is then cut off."""
