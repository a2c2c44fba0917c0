"""The peer: what may be reached, and by whom, as the working directory says.

    clients/                        who may connect: rules as in mutual_tls.verify
    allow/HOST/PORT                 may be reached. Empty: under its own name; or HOST:PORT, or a
                                    Unix socket (with a slash in it)
    allow/HOST/clients/             who may, of those who may connect
    allow/HOST/send-proxy-v1        the service wants a PROXY header; send-proxy-v2: of version 2

Nothing else may be reached: this is no open proxy.
"""

from typing import NamedTuple

from mutual_tls.dial import Endpoint
from mutual_tls.refusal import Refusal, SessionReason
from mutual_tls.rules import rules_in
from mutual_tls.settings import SettingsError, exists, read_values
from mutual_tls.verify import Certificate, Rule, matches
from tls_bridge.refusal import BridgeReason


class Service(NamedTuple):
    """What a client may reach.

    Attributes:
        where: an address, or the path of a Unix socket.
        proxy: the version of the PROXY header that the service wants, 1 or 2; None for none.
    """

    where: Endpoint | str
    proxy: int | None


def check_client(certificate: Certificate) -> None:
    """Check that somebody may connect at all.

    Raises:
        Refusal: they may not.
    """
    try:
        rules = rules_in("clients")
    except SettingsError as error:
        raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None
    _check("clients", rules or [], certificate)


def find_service(target: Endpoint, certificate: Certificate) -> Service:
    """Return what is to be connected for a client that asks for `target`.

    Raises:
        Refusal: it may not be reached.
    """
    place = f"allow/{target.host}"
    path = f"{place}/{target.port}"
    try:
        try:
            values = read_values(path)
        except FileNotFoundError:
            if exists(place):
                message = f"{place} has no {target.port}"
                raise Refusal(BridgeReason.PORT_NOT_ALLOWED, message) from None
            raise Refusal(BridgeReason.NO_ROUTE, f"nothing is said of {target.host}") from None
        if (rules := rules_in(f"{place}/clients")) is not None:
            _check(f"{place}/clients", rules, certificate)
        if len(values) > 1:
            raise SettingsError(path, f"it has {len(values)} values, not one")
        return Service(_where(path, values[0]) if values else target, _proxy_version(place))
    except SettingsError as error:
        raise Refusal(SessionReason.MISCONFIGURED, str(error)) from None


def _where(path: str, value: str) -> Endpoint | str:
    if "/" in value:
        return value
    try:
        return Endpoint.parse(value)
    except ValueError as error:
        raise SettingsError(path, f"{value!a}: {error}") from None


def _proxy_version(place: str) -> int | None:
    for version in 2, 1:  # who wants both gets the one that says more
        if exists(f"{place}/send-proxy-v{version}"):
            return version
    return None


def _check(path: str, rules: list[Rule], certificate: Certificate) -> None:
    if not matches(rules, certificate, is_server=False):
        shown = certificate.show_names() or "a certificate without a name"
        raise Refusal(BridgeReason.CLIENT_NOT_ALLOWED, f"{path} does not have {shown}")
