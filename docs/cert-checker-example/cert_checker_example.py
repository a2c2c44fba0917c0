"""A certificate checker for tls-tproxy: a server's certificate has to be a short-lived one."""

from collections.abc import Sequence
from datetime import timedelta

from cryptography import x509

from tls_tproxy.checkers import Rejected

# As long as public authorities may make them from 2027 on, CA/Browser Forum ballot SC-081.
LONGEST = timedelta(days=100)


def check_lifetime(names: Sequence[str], certificate: x509.Certificate) -> None:
    """Accept a certificate that was valid for at most 100 days when it was new.

    Args:
        names: those that the connection is for.
        certificate: the server's; its chain is verified already.

    Raises:
        Rejected: it is valid for longer.
    """
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    if lifetime > LONGEST:
        shown = ", ".join(names)
        raise Rejected(f"the certificate for {shown} is valid for {lifetime.days} days")
