"""The command lines of tls-bridge and tls-bridge-peer, and their start."""

# First of all: until it is loaded, process 1 loses signals.
import sniproxy.service.process1  # noqa: F401  # isort: skip

import sys
from _socket import socket
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mutual_tls.identity import Identities
from mutual_tls.session import LATENCIES
from mutual_tls.start import enter_sandbox, give_up_privileges
from sniproxy.inherited import open_listening_sockets, take_listening_sockets
from sniproxy.service import bind, standard
from sniproxy.service.fatal import attempt
from sniproxy.service.notify import Notifier
from sniproxy.service.options import OptionParser, service_fields
from sniproxy.service.start import (
    open_status_socket,
    run_program,
    run_service,
    share_descriptors,
)
from sniproxy.service.syslogd import Syslog
from tls_bridge.config import Config
from tls_bridge.ingress import Ingress, ServerNameIngress
from tls_bridge.log import Log
from tls_bridge.peer_side import PeerSide
from tls_bridge.routes import Routes, parse_pattern
from tls_bridge.serve import MakeStory, serve

_INGRESS = "tls-bridge"
_PEER = "tls-bridge-peer"

# What the socket is called, in LISTEN_FDNAMES, whose clients say a ClientHello.
_SNI = "sni"

_INGRESS_DESCRIPTION = """\
Carry connections to services on other machines, over mutual TLS.

Standard input is a listening socket, TCP or Unix, unless --listen opens one.
A client says CONNECT (HTTP/1.1), or with --sni a TLS ClientHello, and is
carried to the peer that the working directory names: hosts/NAME/peer holds the
name of a peer, and peers/PEER/ its address, server-name, identity/ and servers/.
REGEX PEER pairs do for a few: PEER is then HOST:PORT, or the name of a peer.
"""
_INGRESS_EXAMPLE = (
    "tls-bridge --listen 127.0.0.1:8080 --identity id '.*[.]internal' peer.example:443"
)

_PEER_DESCRIPTION = """\
Let connections come out that tls-bridge carries, and reach the services here.

Standard input is a listening socket, TCP or Unix, unless --listen opens one.
Whoever connects has to show a certificate of the authority in identity/ca.pem,
and to be one of clients/. What may be reached stands in allow/HOST/PORT, and
nothing else is.
"""
_PEER_EXAMPLE = "cd /srv/peer && tls-bridge-peer --listen :443"

# Descriptors that one connection takes beside the two that every program counts: none, as there are
# no pipes.
_NO_PIPES = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run tls-bridge with the arguments `argv`; return its exit code."""
    return run_program(_INGRESS, partial(_run, _INGRESS, _ingress_config, argv))


def main_peer(argv: Sequence[str] | None = None) -> int:
    """Run tls-bridge-peer with the arguments `argv`; return its exit code."""
    return run_program(_PEER, partial(_run, _PEER, _peer_config, argv))


def _ingress_config(argv: Sequence[str] | None) -> Config | None:
    parser = OptionParser(_INGRESS, _INGRESS_DESCRIPTION, _INGRESS_EXAMPLE)
    parser.add_argument(
        "pairs", nargs="*", metavar="REGEX PEER", help="which peer carries hosts that match"
    )
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="read more of them, a line each, for every connection",
    )
    parser.add_argument(
        "--identity",
        type=Path,
        metavar="DIRECTORY",
        help="what to show to peers that are given as HOST:PORT (default: identity)",
    )
    parser.add_argument(
        "--server-name",
        metavar="NAME",
        help="whom their certificates have to be for (default: HOST)",
    )
    parser.add_argument(
        "--sni",
        action="store_true",
        help="clients speak TLS, and their server name is the host that they want",
    )
    _add_listen_option(parser)
    parser.add_argument(
        "--listen-sni",
        type=_place,
        metavar="ADDRESS",
        help="the same, for clients as with --sni; both may be given",
    )
    parser.add_service_options()

    def check(options: Namespace) -> None:
        if len(options.pairs) % 2:
            parser.error(f"{options.pairs[-1]!a} is a REGEX without a PEER")
        for pattern, peer in _in_pairs(options.pairs):
            try:
                parse_pattern(pattern, peer)
            except ValueError as error:
                parser.error(str(error))

    options = parser.understand(argv, check)
    if options is None:
        return None
    return Config(
        sni=options.sni,
        pairs=tuple(_in_pairs(options.pairs)),
        files=tuple(path.absolute() for path in options.file),
        identity=options.identity and options.identity.absolute(),
        server_name=options.server_name,
        listen=options.listen,
        listen_sni=options.listen_sni,
        **service_fields(options),
    )


def _add_listen_option(parser: OptionParser) -> None:
    parser.add_argument(
        "--listen",
        type=_place,
        metavar="ADDRESS",
        help="listen there, and not on standard input: IP:PORT, :PORT for all addresses, or a "
        "path of a Unix socket, with a slash in it",
    )


def _place(text: str) -> str:
    try:
        return bind.check(text)
    except ValueError as error:
        raise ArgumentTypeError(f"unable to listen on {text!a}: {error}") from None


def _in_pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


def _peer_config(argv: Sequence[str] | None) -> Config | None:
    parser = OptionParser(_PEER, _PEER_DESCRIPTION, _PEER_EXAMPLE)
    _add_listen_option(parser)
    parser.add_service_options()
    options = parser.understand(argv)
    return None if options is None else Config(listen=options.listen, **service_fields(options))


def _take_sockets(program: str, config: Config) -> list[tuple[socket, bool]]:
    """Return the listening sockets, and for each whether clients say a ClientHello there."""
    places = [(config.listen, config.sni), (config.listen_sni, True)]
    if wanted := [(where, is_sni) for where, is_sni in places if where is not None]:
        opened = open_listening_sockets([where for where, _ in wanted])
        return [(sock, is_sni) for sock, (_, is_sni) in zip(opened, wanted, strict=True)]
    if program == _PEER:
        how = f"{_PEER_EXAMPLE} (in a systemd service: StandardInput=socket)"
        return [(sock, False) for sock, _ in take_listening_sockets(how, may_be_unix=True)]
    how = f"{_INGRESS_EXAMPLE} (in a systemd service: StandardInput=socket)"
    taken = take_listening_sockets(how, most=2, may_be_unix=True)
    # Of two sockets the one that is called sni is for those clients.
    return [(sock, config.sni or name == _SNI) for sock, name in taken]


def _story(program: str, *, is_sni: bool, routes: Routes) -> MakeStory:
    """Return what makes the story of a client."""
    if program == _PEER:
        return PeerSide
    return partial(ServerNameIngress if is_sni else Ingress, routes=routes)


def _run(
    program: str,
    read: Callable[[Sequence[str] | None], Config | None],
    argv: Sequence[str] | None,
    syslogd: Syslog | None,
) -> None:
    config = read(argv)
    if config is None:
        return
    taken = _take_sockets(program, config)
    with attempt("start"):
        standard.replace_copies_of_input()
        log = Log(program, syslogd)
        log.is_json = config.log_json
    status = open_status_socket(config, program, LATENCIES)
    share = share_descriptors(config, _NO_PIPES, log)
    notifier = Notifier()
    give_up_privileges(config)
    directory = Path()
    identities = Identities(log.identity)
    routes = Routes(
        directory,
        identities,
        log.bad_line,
        config.pairs,
        config.files,
        config.identity,
        config.server_name,
    )
    places = [directory / "identity", *directory.glob("peers/*/identity"), *config.files]
    if config.identity is not None:
        places.append(config.identity)
    enter_sandbox(config, log, places)
    listening = [(sock, _story(program, is_sni=is_sni, routes=routes)) for sock, is_sni in taken]

    def stop_listening() -> None:
        for sock, _ in listening:
            sock.close()

    try:
        run_service(
            config,
            log,
            notifier,
            partial(serve, program, listening, identities, config, share, log, status=status),
            stop_listening,
            status=status,
        )
    finally:
        notifier.close()


if __name__ == "__main__":
    sys.exit(main())
