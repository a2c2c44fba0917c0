"""The command line of tproxy-pod-inject."""

import argparse
import contextlib
import os
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import trio

from sniproxy import __version__
from sniproxy.service.bind import listen
from sniproxy.service.fatal import FatalError, UsageError, attempt, print_out
from sniproxy.service.signals import Signals
from tproxy_pod.inject import webhook
from tproxy_pod.inject.manifest import ManifestError, inject
from tproxy_pod.inject.sidecar import Sidecar

_PROGRAM: Final = "tproxy-pod-inject"

_DESCRIPTION = """\
Add tproxy-pod to pods of Kubernetes: to those of a manifest, from standard
input to standard output; or as a webhook to all new ones that the API server
asks about.

Arguments behind -- are for tproxy-pod. A pod with the label
tproxy-pod/inject: "false" is left as it is.
"""
_EXAMPLE = "tproxy-pod-inject --image tproxy-pod:1 --secret web-tls <web.yaml >web-in-tls.yaml"

# What a manifest is that can't be injected into: the input is at fault, and nothing is printed.
_REFUSED: Final = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"unable to understand the options: {message}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run tproxy-pod-inject with the arguments `argv`; return its exit code."""
    try:
        return _run(argv)
    except ManifestError as error:
        _say(str(error))
        return _REFUSED
    except FatalError as error:
        _say(f"fatal: {error}")
        return error.code


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody is left to tell
        os.write(2, f"{_PROGRAM}: {message}\n".encode(errors="backslashreplace"))


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(
        prog=_PROGRAM,
        description=_DESCRIPTION,
        epilog=f"For example: {_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--image", metavar="IMAGE", help="the container image; required")
    parser.add_argument(
        "--secret", metavar="NAME", help="the secret that has tls.crt, tls.key and ca.crt"
    )
    parser.add_argument(
        "--csi-driver",
        metavar="NAME",
        help="or the CSI driver whose volume has them, such as one that makes SPIFFE identities",
    )
    parser.add_argument(
        "--csi-attribute",
        type=_attribute,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an attribute of that volume; may be given several times",
    )
    parser.add_argument(
        "--egress", metavar="NAME", help="the ConfigMap whose entries are those of pod/egress"
    )
    parser.add_argument(
        "--probe-address",
        action="append",
        default=[],
        metavar="ADDRESS[/LENGTH]",
        help="let it probe in plaintext, beside the node's own address; may be given several times",
    )
    parser.add_argument("--webhook", action="store_true", help="answer AdmissionReviews, over TLS")
    parser.add_argument(
        "--listen",
        default=f":{webhook.PORT}",
        metavar="ADDRESS:PORT",
        help=f"where the webhook listens (default: :{webhook.PORT})",
    )
    parser.add_argument("--cert", metavar="FILE", help="the certificate of the webhook")
    parser.add_argument("--key", metavar="FILE", help="its key")
    parser.add_argument("-h", "--help", action="store_true", help="print this")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("arguments", nargs="*", metavar="ARG", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.help:
        print_out(parser.format_help())
        return 0
    if options.version:
        print_out(f"{_PROGRAM} {__version__}\n")
        return 0
    if not options.image:
        parser.error("--image is missing")
    if bool(options.secret) == bool(options.csi_driver):
        parser.error("one of --secret and --csi-driver has to be given")
    if options.csi_attribute and not options.csi_driver:
        parser.error("--csi-attribute goes with --csi-driver")
    if bool(options.cert) != options.webhook or bool(options.key) != options.webhook:
        parser.error("--webhook, --cert and --key go together")
    sidecar = Sidecar(
        image=options.image,
        secret=options.secret,
        csi_driver=options.csi_driver,
        csi_attributes=dict(options.csi_attribute),
        egress=options.egress,
        probes=options.probe_address,
        arguments=options.arguments,
    )
    if options.webhook:
        _serve(options.listen, Path(options.cert), Path(options.key), sidecar)
    else:
        with attempt("read standard input"), open(0, "rb", closefd=False) as standard_input:
            manifest = standard_input.read()
        print_out(inject(manifest, sidecar))
    return 0


def _attribute(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!a} is not NAME=VALUE")
    return name, value


def _serve(where: str, certificate: Path, key: Path, sidecar: Sidecar) -> None:
    try:
        files = webhook.Certificate(certificate, key, _say)
    except (OSError, ssl.SSLError) as error:
        detail = error.strerror or str(error)
        raise UsageError(f"unable to read the certificate and its key: {detail}") from None
    listening = listen(where)
    trio.run(_serve_until_asked_to_end, listening, files, sidecar)


async def _serve_until_asked_to_end(
    listening: socket.socket, files: webhook.Certificate, sidecar: Sidecar
) -> None:
    signals = Signals()
    sock = trio.socket.from_stdlib_socket(listening)
    async with trio.open_nursery() as nursery:
        await nursery.start(signals.receive)
        _say(f"listening on {sock.getsockname()[1]}")
        await webhook.serve([trio.SocketListener(sock)], files, sidecar, _say, signals.drain.wait)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(main())
