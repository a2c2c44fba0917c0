"""Who the other side may be, as small files say: the rules of `verify`, read as `settings` are."""

from collections.abc import Sequence

from mutual_tls.end import TLSError, TLSReason
from mutual_tls.settings import SettingsError, read_names
from mutual_tls.verify import Certificate, CertificateError, Rule, RuleError, matches, parse_rule


def rules_in(path: str) -> list[Rule] | None:
    """Return the rules in a file or directory; None if it is absent.

    Raises:
        SettingsError: one can't be read, or understood.
    """
    try:
        return [parse_rule(text) for text in read_names(path)]
    except FileNotFoundError:
        return None
    except RuleError as error:
        raise SettingsError(path, str(error)) from None


def check_server(rules: Sequence[Rule], der: bytes) -> None:
    """Check that a server is somebody whom the rules allow.

    Raises:
        TLSError: it is not.
    """
    try:
        certificate = Certificate.parse(der)
    except CertificateError as error:
        raise TLSError(TLSReason.UNTRUSTED, str(error)) from None
    if not matches(rules, certificate, is_server=True):
        shown = certificate.show_names() or "nobody"
        raise TLSError(TLSReason.WRONG_NAME, f"its certificate is for {shown}")
