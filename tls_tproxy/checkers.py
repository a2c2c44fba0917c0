"""Certificate checkers: plugins that are asked for a server's certificate, beside the rules.

A plugin is an entry point of the group `tls_tproxy.cert_checkers`: a function that is called with
the names that the connection is for and the server's certificate, after its chain was verified and
before ours is sent. It accepts by returning None, and rejects by raising `Rejected`. Whatever else
it does is a fault of the plugin, and a rejection. docs/cert-checker-example/ is one.

A checker runs in the loop, and all connections wait for it: it must not wait for anything, such as
the network. All are loaded at the start, for a process in its sandbox can load no module later.

Built in are `san`, the certificate is for one of the names by a subject alternative name; and
`spki-pin`, its public key is one of the pins in the file `pins` of the name's directory.
"""

import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mutual_tls.end import TLSReason
from mutual_tls.refusal import Refusal
from mutual_tls.rules import rules_in
from mutual_tls.settings import SettingsError
from mutual_tls.verify import Certificate, CertificateError, matches, parse_rule
from tls_tproxy.refusal import WrapReason

__all__ = ["GROUP", "Checker", "Checkers", "Rejected", "UnknownCheckerError", "ask"]

GROUP = "tls_tproxy.cert_checkers"

_SAN, _SPKI_PIN = "san", "spki-pin"

Check = Callable[[Sequence[str], x509.Certificate], None]


class Rejected(Exception):  # noqa: N818 - it is an answer
    """The certificate is not accepted; the message says why, for the log."""


class UnknownCheckerError(LookupError):
    """There is no such certificate checker, or it can't be used. The message says why."""


class Checker(NamedTuple):
    """A certificate checker, and how it is called."""

    name: str
    check: Check


class Checkers:
    """The certificate checkers that there are.

    Args:
        points: the plugins; by default those of all packages that are installed.

    Attributes:
        faults: What is wrong with plugins that can't be used, by their names. They stop nobody
            who does not ask for them.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        self.faults: dict[str, str] = {}
        self._checks: dict[str, Check] = {}
        for point in entry_points(group=GROUP) if points is None else points:
            self._load(point)

    def _load(self, point: EntryPoint) -> None:
        name = point.name
        if name in (_SAN, _SPKI_PIN):
            self.faults[name] = f"{point.value} can't be called {name}: that one is built in"
            return
        if name in self._checks or name in self.faults:
            # Which of them comes first is chance.
            self._checks.pop(name, None)
            self.faults[name] = f"several packages have a certificate checker {name!a}"
            return
        try:
            check = point.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is somebody else's
            why = f"unable to load {point.value}: {error!a}"
        else:
            if callable(check) and not inspect.iscoroutinefunction(check):
                self._checks[name] = check
                return
            why = f"{point.value} is no function that can be called, or one that waits"
        self.faults[name] = f"the certificate checker {name!a}: {why}"

    def find(self, name: str, place: str) -> Checker:
        """Return a certificate checker.

        Args:
            name: its own.
            place: the directory of the name that the connection is for.

        Raises:
            UnknownCheckerError: there is none, or it can't be used.
        """
        if name == _SAN:
            return Checker(name, _check_san)
        if name == _SPKI_PIN:
            return Checker(name, partial(_check_pins, f"{place}/pins"))
        if name in self._checks:
            return Checker(name, self._checks[name])
        if name in self.faults:
            raise UnknownCheckerError(self.faults[name])
        there = ", ".join((_SAN, _SPKI_PIN, *sorted(self._checks)))
        raise UnknownCheckerError(f"there is no certificate checker {name!a}; there are {there}")


def ask(checkers: Iterable[Checker], names: Sequence[str], der: bytes) -> None:
    """Ask certificate checkers, in their order, until one rejects.

    Args:
        checkers: whom to ask.
        names: those that the connection is for.
        der: the certificate of the server, whose chain is verified.

    Raises:
        Refusal: one has rejected it, or has a fault, which is the exception's cause then.
    """
    certificate: x509.Certificate | None = None
    for checker in checkers:
        if certificate is None:
            certificate = _read(der)
        try:
            # Whatever it is declared to return.
            answer: object = checker.check(names, certificate)
        except Rejected as rejection:
            detail = f"{checker.name}: {rejection}"
            raise Refusal(WrapReason.CERTIFICATE_REJECTED, detail) from None
        except (Exception, SystemExit) as fault:
            detail = f"{checker.name}: {fault!a}{_where(fault)}"
            raise Refusal(WrapReason.CHECKER_FAILED, detail) from fault
        # Else a predicate that says False would accept, and so would one that is a coroutine.
        if answer is not None:
            detail = f"{checker.name}: it has returned {type(answer).__name__}, and not None"
            raise Refusal(WrapReason.CHECKER_FAILED, detail)


def _read(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except Exception as error:  # noqa: BLE001 - of many kinds, and what they mean is clear
        detail = f"unable to read the certificate: {error!a}"
        raise Refusal(TLSReason.UNTRUSTED, detail) from None


def _where(fault: BaseException) -> str:
    """Return where a plugin's fault is, for the log; the rest is in the traceback."""
    frames = traceback.extract_tb(fault.__traceback__)
    return f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _certificate(certificate: x509.Certificate) -> Certificate:
    try:
        return Certificate.parse(certificate.public_bytes(Encoding.DER))
    except CertificateError as error:
        raise Rejected(str(error)) from None


def _check_san(names: Sequence[str], certificate: x509.Certificate) -> None:
    shown = _certificate(certificate)
    if not matches([parse_rule(name) for name in names], shown, is_server=True):
        raise Rejected(f"it is for {shown.show_names() or 'nobody'}, not for {', '.join(names)}")


def _check_pins(path: str, names: Sequence[str], certificate: x509.Certificate) -> None:
    try:
        pins = rules_in(path)
    except (SettingsError, OSError) as error:  # EMFILE, for one: no fault of the checker
        raise Rejected(str(error)) from None
    if not pins:
        raise Rejected(f"{path} has no pin")
    if others := [str(rule) for rule in pins if not str(rule).startswith("pin-sha256:")]:
        raise Rejected(f"{path}: {others[0]!a} is no pin, pin-sha256:BASE64")
    if not matches(pins, _certificate(certificate), is_server=True):
        raise Rejected(f"its public key is none of {path}")
