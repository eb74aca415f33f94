"""The options for the server's TLS, which are nbdkit's, and what they come to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdstream.cli.arguments import UsageError
from nbdstream.server.tls import TlsError, TlsPolicy, default_certificates, default_directories, server_context

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from nbdstream.cli.exports import ExportSpec


def add_tls(parser: argparse.ArgumentParser) -> None:
    """Add --tls and what goes with it."""
    group = parser.add_argument_group("TLS")
    group.add_argument(
        "--tls",
        choices=("off", "on", "require"),
        default="off",
        help="whether clients can, or must, use TLS (default: off; 'on' can be stripped by whoever is in between)",
    )
    group.add_argument(
        "--tls-certificates",
        metavar="DIR",
        help="server-cert.pem, server-key.pem and ca-cert.pem, as QEMU, nbdkit and libnbd have them "
        f"(default: the first of {', '.join(default_directories())} that has them)",
    )
    group.add_argument(
        "--tls-verify-peer",
        action="store_true",
        help="let only clients in whose certificates ca-cert.pem (and ca-crl.pem, if there is one) confirms",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="listen on the network without --tls require: whoever can connect can use the exports",
    )


def tls_policy(options: argparse.Namespace, specs: Sequence[ExportSpec]) -> TlsPolicy | None:
    """Return what the server does about TLS, None for nothing; raises UsageError and TlsError."""
    if options.tls == "off" and (options.tls_certificates is not None or options.tls_verify_peer):
        raise UsageError("certificates are given, but TLS is off: say --tls require (or on)")
    for spec in specs:
        if spec.allow is not None and not options.tls_verify_peer:
            raise UsageError(
                f"export {spec.name!r} has allow=: clients have names with --tls require --tls-verify-peer only"
            )
    if options.tls == "off":
        return None
    certificates = options.tls_certificates or default_certificates()
    if certificates is None:
        raise TlsError(f"no server-cert.pem in {', '.join(default_directories())}: say --tls-certificates DIR")
    context = server_context(certificates, verify_peer=options.tls_verify_peer)
    return TlsPolicy(context, required=options.tls == "require")
