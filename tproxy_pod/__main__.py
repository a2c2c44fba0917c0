"""The command line of tproxy-pod, and its start: what takes privileges, and then giving them up."""

# First of all: until it is loaded, process 1 loses signals.
import sniproxy.service.process1  # noqa: F401  # isort: skip

import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from mutual_tls.identity import Files, Identities
from mutual_tls.netfilter.memory import NO_MEMORY
from mutual_tls.netfilter.route import LocalRoute, RouteError
from mutual_tls.netfilter.table import Nft, NftError
from mutual_tls.redirected import (
    EVERYWHERE,
    LOOPBACK,
    future_user,
    listen,
    marking_capabilities,
    open_nft,
    port_option,
)
from mutual_tls.session import LATENCIES
from mutual_tls.start import enter_sandbox, give_up_privileges
from sniproxy.engine.pipes import MOST_PIPES
from sniproxy.service import standard
from sniproxy.service.fatal import FatalError, attempt
from sniproxy.service.notify import Notifier
from sniproxy.service.options import OptionParser, service_fields
from sniproxy.service.start import (
    open_status_socket,
    run_program,
    run_service,
    share_descriptors,
)
from sniproxy.service.syslogd import Syslog
from tproxy_pod.config import Config
from tproxy_pod.intercept import Interception, stop_refusing
from tproxy_pod.log import Log
from tproxy_pod.pod import Network, Pod, parse_source
from tproxy_pod.serve import Listening, Watch, serve

_PROGRAM: Final = "tproxy-pod"

_DESCRIPTION = """\
Put mutual TLS around the connections between pods.

It runs in the network namespace of a pod, beside programs that know nothing of
TLS. What they send to other pods leaves with TLS and our certificate; what
comes to them has to show a certificate, and reaches them in plaintext, from the
client's own address. Which addresses and ports, the directory pod/ says, or the
options. It takes root at the start, or CAP_NET_ADMIN and CAP_NET_RAW.
"""
_EXAMPLE = "tproxy-pod -cert cert.pem -key key.pem -ca-cert ca.pem"

# What may be a link in the working directory, or has links in it.
_ENTRIES: Final = (
    "pod",
    "pod/*",
    "pod/egress/*",
    "pod/egress/*/*",
    "pod/ingress/*",
    "pod/ingress/*/*",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run tproxy-pod with the arguments `argv`; return its exit code."""
    return run_program(_PROGRAM, partial(_run, argv))


def _read_options(argv: Sequence[str] | None) -> tuple[Config, bool] | None:
    """Return what the options say, and whether to remove what fail-closed has left, and end."""
    parser = OptionParser(_PROGRAM, _DESCRIPTION, _EXAMPLE)
    # The options of the first tproxy-pod have one hyphen; its library took two as well.
    parser.add_argument(
        "-cert", "--cert", metavar="FILE", help="the certificate to show, and its chain"
    )
    parser.add_argument("-key", "--key", metavar="FILE", help="its key")
    parser.add_argument(
        "-ca-cert",
        "--ca-cert",
        metavar="FILE",
        help="the authorities that the others' certificates are to be of (default: the system's)",
    )
    parser.add_argument(
        "-tcp-port",
        "--tcp-port",
        type=port_option,
        default=1,
        metavar="PORT",
        help="where connections arrive that leave the pod, on the loopback addresses (default: 1)",
    )
    parser.add_argument(
        "-tls-port",
        "--tls-port",
        type=port_option,
        default=2,
        metavar="PORT",
        help="where connections arrive that come to the pod (default: 2)",
    )
    parser.add_argument(
        "--ready-port",
        type=port_option,
        metavar="PORT",
        help="answer there, in HTTP, whether connections can be served",
    )
    parser.add_argument(
        "--probe-address",
        type=_source,
        action="append",
        default=[],
        metavar="ADDRESS[/LENGTH]",
        help="let it connect in plaintext, for probes; may be given several times",
    )
    parser.add_argument(
        "--fail-closed",
        action="store_true",
        help="refuse those connections when we have ended, however that was",
    )
    parser.add_argument(
        "--stop-refusing",
        action="store_true",
        help="remove what --fail-closed has left, and end",
    )
    parser.add_argument(
        "-v",
        type=_level,
        nargs="?",
        const=1,
        default=0,
        metavar="LEVEL",
        help="log connections, as --log=connections does; LEVEL is a number, and 0 is not to",
    )
    parser.add_service_options()

    def check(options: Namespace) -> None:
        if bool(options.cert) != bool(options.key):
            parser.error("-cert and -key go together")
        if options.ca_cert and not options.cert:
            parser.error("-ca-cert goes with -cert and -key")
        ports = [options.tcp_port, options.tls_port, options.ready_port]
        if len(set(ports)) < len(ports):
            parser.error("-tcp-port, -tls-port and --ready-port have to differ")

    options = parser.understand(argv, check)
    if options is None:
        return None
    fields = service_fields(options)
    fields["log_connections"] |= bool(options.v)
    config = Config(
        identity=Files(options.cert, options.key, options.ca_cert) if options.cert else None,
        tcp_port=options.tcp_port,
        tls_port=options.tls_port,
        ready_port=options.ready_port,
        probes=tuple(options.probe_address),
        fail_closed=options.fail_closed,
        **fields,
    )
    return config, options.stop_refusing


def _level(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 3:
        return int(text)
    raise ArgumentTypeError(f"{text!a} is no level, a number")


def _source(text: str) -> Network:
    try:
        return parse_source(text)
    except ValueError as error:
        raise ArgumentTypeError(f"unable to understand {text!a}: {error}") from None


def _run(argv: Sequence[str] | None, syslogd: Syslog | None) -> None:
    understood = _read_options(argv)
    if understood is None:
        return
    config, is_to_stop_refusing = understood
    with attempt("start"):
        standard.open_missing()
        standard.replace_copies_of_input()
        log = Log(syslogd)
        log.is_json = config.log_json
    with ExitStack() as ends:
        nft = open_nft(config)
        ends.callback(nft.close)
        try:
            if is_to_stop_refusing:
                stop_refusing(nft)
            else:
                _serve(config, log, nft, ends)
        except (NftError, RouteError) as error:
            raise FatalError(f"unable to redirect connections: {error}") from None


def _serve(config: Config, log: Log, nft: Nft, ends: ExitStack) -> None:
    Interception.claim(nft)
    route = LocalRoute(nft, future_user(config))
    ends.callback(route.close)
    ready = listen(EVERYWHERE, config.ready_port) if config.ready_port else []
    listening = Listening(
        listen(LOOPBACK, config.tcp_port, is_transparent=True),
        listen(EVERYWHERE, config.tls_port),
        ready,
    )
    ends.callback(listening.close)
    status = open_status_socket(config, _PROGRAM, LATENCIES)
    share = share_descriptors(config, MOST_PIPES, log)
    notifier = Notifier()
    ends.callback(notifier.close)
    give_up_privileges(config, marking_capabilities())
    pod = Pod(Identities(log.identity), log.problem, identity=config.identity, probes=config.probes)
    directory = Path()
    entries = (path for each in _ENTRIES for path in directory.glob(each))
    files = [Path(path) for path in config.identity or () if path]
    enter_sandbox(config, log, [*entries, *files], may_bind=True)
    interception = Interception(
        nft,
        outward_port=config.tcp_port,
        inward_port=config.tls_port,
        has_ipv6=route.has_ipv6,
        untaken_port=config.ready_port,
        fail_closed=config.fail_closed,
    )
    watch = Watch(pod, nft, route, interception, log)
    if not interception.remembers:
        log.problem(NO_MEMORY)
    watch.look_after()

    def stop_listening() -> None:
        listening.close()
        watch.stop()

    run_service(
        config,
        log,
        notifier,
        partial(serve, listening, pod, config, share, log, status=status),
        stop_listening,
        watch.look,
        status,
    )


if __name__ == "__main__":
    sys.exit(main())
