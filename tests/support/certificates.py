"""An authority that exists for one run of the tests, and what it issues."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its key, as files for a program."""

    certificate: Path
    key: Path

    def der(self) -> bytes:
        """Return the certificate the way it goes over the wire."""
        return ssl.PEM_cert_to_DER_cert(self.certificate.read_text())


class Certificates:
    """The authority.

    Attributes:
        authority: Its certificate as a PEM file, for those who are to trust it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.authority = folder / "authority.pem"
        self._ca.cert_pem.write_to_path(str(self.authority))

    def for_client(self, name: str) -> KeyPair:
        """Issue a certificate that a client may show."""
        pair = KeyPair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        issued = self._ca.issue_cert(name, common_name=name)
        issued.cert_chain_pems[0].write_to_path(str(pair.certificate))
        issued.private_key_pem.write_to_path(str(pair.key))
        return pair

    def server_context(
        self, name: str, protocols: Sequence[str] = (), *, asks_client: bool = False
    ) -> ssl.SSLContext:
        """Return what a backend needs to be `name`.

        Args:
            name: Whom the certificate is for.
            protocols: The ALPN protocols it knows, the best first.
            asks_client: Whether clients must show a certificate of this authority.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(name).configure_cert(context)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        if asks_client:
            self._ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context
