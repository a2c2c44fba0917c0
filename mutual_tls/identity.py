"""A directory of PEM files → TLS contexts. Swapped files are noticed, broken ones are kept out.

`cert.pem`, `key.pem`, and optionally `ca.pem`; or as Kubernetes names them, `tls.crt`, `tls.key`
and `ca.crt`. Without an authority in the directory it is the system's that are trusted.

Whoever swaps files swaps one after the other, or a link to all of them. So they are read together,
compared with each other, and read again if they have changed meanwhile. What does not fit together
is not used: the identity from before is kept.
"""

import os
import ssl
import stat
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

# Names of the certificate, of the key, and of the authorities.
_NAMES: Final = (("cert.pem", "key.pem", "ca.pem"), ("tls.crt", "tls.key", "ca.crt"))

# Times that files are read again because they have changed meanwhile. Nobody swaps them so often.
_TRIES: Final = 3

# Seconds before the end of a certificate in which it is warned of, and between two warnings.
_WARN_BEFORE: Final = 24 * 60 * 60
_WARN_EVERY: Final = 60 * 60

# The longest file that is read. The system's own bundle of authorities has 220 KB.
_LONGEST: Final = 1 << 20

# What is done with each event: a word, and the reason in more words.
OnEvent = Callable[[str, str], None]

# What tells a file from the one that it replaces: device, inode, size, times.
_State = tuple[tuple[int, ...] | None, ...]


class IdentityError(Exception):
    """There is no identity; the message says why."""


class Identities:
    """The identities of a program, each with what is known of it already.

    Args:
        on_event: as for `Identity`.
    """

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._known: dict[Path, Identity] = {}

    def __call__(self, directory: Path) -> "Identity":
        """Return the identity in a directory."""
        if directory not in self._known:
            self._known[directory] = Identity(directory, self._on_event)
        return self._known[directory]


class _Loaded(NamedTuple):
    client: ssl.SSLContext
    client_by_rules: ssl.SSLContext
    server: ssl.SSLContext
    not_after: datetime


class Identity:
    """Who we are, and whom we trust, as of the files in a directory.

    Args:
        directory: where the files are.
        on_event: told of `identity_broken`, `identity_loaded` (again) and `identity_expires`.
        clock: the time of day, in seconds since 1970.
    """

    def __init__(
        self, directory: Path, on_event: OnEvent, clock: Callable[[], float] = time.time
    ) -> None:
        self._directory = directory
        self._on_event = on_event
        self._clock = clock
        self._state: _State | None = None
        self._loaded: _Loaded | None = None
        self._error = ""
        self._next_warning = 0.0

    def client_context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Return what we need to connect to a server.

        Args:
            check_hostname: whether the server's certificate has to be for the name that is asked
                for. If not, it has to be checked otherwise before ours is sent, as `TLSEnd` does.

        Raises:
            IdentityError: there is none.
        """
        loaded = self._current()
        return loaded.client if check_hostname else loaded.client_by_rules

    def server_context(self) -> ssl.SSLContext:
        """Return what we need to serve clients, who have to show a certificate.

        Raises:
            IdentityError: there is none.
        """
        return self._current().server

    def _current(self) -> _Loaded:
        """Return what the files say. It costs four or five calls of stat(2)."""
        state = self._look()
        if state != self._state:
            self._load(state)
        if self._loaded is None:
            raise IdentityError(self._error)
        self._warn(self._loaded.not_after)
        return self._loaded

    def _load(self, state: _State) -> None:
        is_again = self._state is not None
        for _ in range(_TRIES):
            try:
                loaded, error = _load(self._directory), ""
            except (OSError, ValueError, ssl.SSLError) as caught:
                loaded, error = None, _why(caught)
            before, state = state, self._look()
            if state == before:
                break
        else:
            loaded, error = None, "the files change all the time"
        self._state = state
        self._error = f"no identity in {self._directory}: {error}"
        if loaded is None:
            self._on_event("identity_broken", f"{self._directory}: {error}")
        else:
            self._loaded = loaded
            self._next_warning = 0.0
            if is_again:
                self._on_event("identity_loaded", str(self._directory))

    def _look(self) -> _State:
        return tuple(_signature(self._directory / name) for name in _names(self._directory))

    def _warn(self, not_after: datetime) -> None:
        now = self._clock()
        left = not_after.timestamp() - now
        if left < _WARN_BEFORE and now >= self._next_warning:
            self._next_warning = now + _WARN_EVERY
            word = "expires" if left > 0 else "expired"
            when = not_after.strftime("%Y-%m-%dT%H:%M:%SZ")
            self._on_event("identity_expires", f"{self._directory}: it {word} at {when}")


def _names(directory: Path) -> tuple[str, str, str]:
    ours, theirs = _NAMES
    return (
        theirs if not (directory / ours[0]).exists() and (directory / theirs[0]).exists() else ours
    )


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )


def _load(directory: Path) -> _Loaded:
    """Read the files, and make contexts of them.

    Raises:
        OSError: a file can't be read.
        ValueError: they are not what they should be, or do not fit together.
    """
    certificate_name, key_name, authority_name = _names(directory)
    chain = x509.load_pem_x509_certificates(_read(directory / certificate_name))
    key_pem = _read(directory / key_name)
    try:
        key = load_pem_private_key(key_pem, None)
    except TypeError:
        raise ValueError(f"{key_name} is encrypted") from None
    leaf = chain[0]
    if _public(key.public_key()) != _public(leaf.public_key()):
        raise ValueError(f"{key_name} is not the key of {certificate_name}")
    authorities: list[x509.Certificate] = []
    authority_path = directory / authority_name
    if authority_path.exists():
        authorities = x509.load_pem_x509_certificates(_read(authority_path))
    whole = _complete(chain, authorities)
    pem = b"".join(each.public_bytes(Encoding.PEM) for each in whole) + key_pem
    trusted = "".join(each.public_bytes(Encoding.PEM).decode() for each in authorities)
    client, client_by_rules, server = (
        _context(side, pem, trusted)
        for side in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
    )
    client_by_rules.check_hostname = False
    # Each costs the server 180 µs, and one is enough for the next connection.
    server.num_tickets = 1
    return _Loaded(client, client_by_rules, server, leaf.not_valid_after_utc)


def _context(side: int, pem: bytes, trusted: str) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if trusted:
        context.load_verify_locations(cadata=trusted)
    else:
        context.load_default_certs(
            ssl.Purpose.SERVER_AUTH if side == ssl.PROTOCOL_TLS_CLIENT else ssl.Purpose.CLIENT_AUTH
        )
    # OpenSSL wants a file. It is to have what was checked, and not what is in its place by now.
    fd = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=_no_password)
    finally:
        os.close(fd)
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _complete(
    chain: list[x509.Certificate], authorities: list[x509.Certificate]
) -> list[x509.Certificate]:
    """Append what the chain lacks, else OpenSSL looks for it and verifies it in every handshake."""
    whole = list(chain)
    while whole[-1].issuer != whole[-1].subject:
        for each in authorities:
            if each.subject == whole[-1].issuer and each not in whole:
                whole.append(each)
                break
        else:
            break
    return whole


def _public(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined,no-any-return]
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )


def _read(path: Path) -> bytes:
    # Not to wait for whoever writes to a FIFO.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path.name} is no regular file")
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise ValueError(f"{path.name} is longer than {_LONGEST} bytes")
    return data


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
