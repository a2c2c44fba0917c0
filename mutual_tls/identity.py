"""A directory of PEM files becomes TLS contexts. Swapped files are noticed, broken ones kept out.

The directory holds `cert.pem`, `key.pem` and, if others are trusted than the system trusts,
`ca.pem`; or the same under the names of a Kubernetes secret, `tls.crt`, `tls.key` and `ca.crt`.
Files with any other names, in any places, can be named one by one.

Files are swapped one after the other, and can be read between two steps. So each file is read once,
all of them are looked at again afterwards, and OpenSSL loads the very bytes that were checked. What
does not fit together is not used: the identity of before stays.
"""

import errno
import os
import re
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from mutual_tls.exhausted import EXHAUSTED
from mutual_tls.signature import Signature, signature

# The names of the certificate, the key and the authorities. The first set wins.
_NAMES: Final = (("cert.pem", "key.pem", "ca.pem"), ("tls.crt", "tls.key", "ca.crt"))

# How often files are read, if they change meanwhile. One swap costs one try; who swaps more often
# than this within milliseconds has not finished yet.
_TRIES: Final = 3

# Seconds before the end of a certificate from which on it is warned of: time to act by hand.
_WARN_BEFORE: Final = 24 * 60 * 60
# Seconds between two warnings, so that a busy service does not fill its log.
_WARN_EVERY: Final = 60 * 60

# The longest file that is read, in bytes. A bundle of all public authorities has a quarter of it.
_LONGEST: Final = 1 << 20

_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"  # RFC 7468, section 5.1

# How the files of a directory of certificates are called: by a hash, openssl-rehash(1).
_HASHED: Final = re.compile(r"[0-9a-f]{8}\.[0-9]+")

# What OpenSSL says of a key that is not the certificate's, x509err.h; and sslerr.h, where it has a
# place for each kind of key and finds no certificate in that of this one.
_MISMATCH: Final = frozenset(
    {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
)

# Stands for a file that is not given: nothing is there, path_resolution(7), "Empty pathname".
_NO_NAME: Final = ""

# What tells a file from the one that was in its place before; or the error of stat(2).
_File = Signature | int


class _State(NamedTuple):
    """What can be seen of the files without reading them."""

    names: tuple[str, str, str]
    files: tuple[_File, _File, _File]


class _Kind(Enum):
    CLIENT = auto()
    CLIENT_BY_RULES = auto()
    SERVER = auto()


class _Material(NamedTuple):
    """What contexts are made of."""

    chain: bytes  # PEM
    key: bytes  # PEM, as it was read
    key_name: str
    certificate_name: str
    trusted: bytes  # DER, one certificate after the other
    not_after: float  # seconds since 1970


class _Loaded(NamedTuple):
    material: _Material
    contexts: dict[_Kind, ssl.SSLContext]


class Files(NamedTuple):
    """The files of an identity, one by one, where there is no directory of them.

    Attributes:
        certificate: the path of the certificate, and of its chain behind it.
        key: that of its key; it may be the same file.
        authorities: that of those who are trusted; None for those whom the system trusts. If a
            path is given, and nothing is there, the files are broken.
    """

    certificate: str
    key: str
    authorities: str | None = None


class IdentityError(Exception):
    """There is no identity; the message says why."""


class Identity:
    """Who we are and whom we trust, as the files in a directory say at the moment.

    Nothing is read before the first context is asked for. Reading happens then and after a swap,
    in the calling thread: milliseconds.

    Args:
        where: the directory of the files, which may be a link; or the files.
        on_event: called with a word and a text for the log. `identity_broken`: the files can't be
            used, once for each such state of them. `identity_loaded`: they were read again, with
            success. `identity_expires`: the certificate does within a day, or has; once an hour.
        clock: the time of day, in seconds since 1970.

    Raises:
        ValueError: the path of a file is empty.
    """

    def __init__(
        self,
        where: Path | Files,
        on_event: Callable[[str, str], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        # What stands before the names of the files, and the names that they may have.
        self._within = ""
        self._names: tuple[tuple[str, str, str], ...] = _NAMES
        self._is_directory = not isinstance(where, Files)
        if isinstance(where, Files):
            if "" in where:
                raise ValueError("the path of a file is empty")
            self._names = ((where.certificate, where.key, where.authorities or _NO_NAME),)
            self._shown = ", ".join(filter(None, where))
        else:
            self._within = f"{where}/"
            self._shown = str(where)
        self._on_event = on_event
        self._clock = clock
        self._is_new = True
        # Of the files that were read last; None to read them the next time in any case.
        self._state: _State | None = None
        self._loaded: _Loaded | None = None
        self._failure = ""
        self._reported: tuple[_State, str] | None = None
        self._next_warning = 0.0

    def client_context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Return the context for the next connection to a server.

        With `check_hostname` OpenSSL compares the name with the server's certificate within the
        handshake, and our certificate is not made ready before (RFC 9525; the subject's common name
        does not count).

        Without it the caller has to check the certificate, and has to do so before ours is sent.
        `ssl` has no callback for that moment. But a `MemoryBIO` holds what is to be sent until the
        caller sends it: so check after each `do_handshake()`, whether it returned or raised, and
        before sending what it left; after a refusal throw that away. With TLS 1.3 the handshake of
        a client has returned when ours lies there, and `getpeercert(True)` answers. With TLS 1.2 it
        has not: there `get_unverified_chain()` answers, which `ssl.SSLObject` has since Python
        3.13, and `SSLObject._sslobj` before. A socket wrapped by `ssl` sends at once: too late.

        Args:
            check_hostname: whether the certificate has to be for the name that is asked for.

        Raises:
            IdentityError: there is no identity, and never was a good one.
            OSError: no descriptor or no memory is left to read it.
        """
        return self._context(_Kind.CLIENT if check_hostname else _Kind.CLIENT_BY_RULES)

    def server_context(self) -> ssl.SSLContext:
        """Return the context for the next client, who has to show a certificate.

        Sessions are resumed by the same context only: `ssl` names the application in all of them
        (the session id context that OpenSSL asks for), but each context has ticket keys of its own.
        So after a swap clients make a full handshake, and are verified as the new files say.

        Raises:
            IdentityError: there is no identity, and never was a good one.
            OSError: no descriptor or no memory is left to read it.
        """
        return self._context(_Kind.SERVER)

    def _context(self, kind: _Kind) -> ssl.SSLContext:
        state = self._look()
        if state != self._state:
            self._load(state, kind)
        loaded = self._loaded
        if loaded is None:
            raise IdentityError(f"no identity in {self._shown}: {self._failure}")
        self._warn(loaded.material.not_after)
        context = loaded.contexts.get(kind)
        if context is None:
            try:
                context = loaded.contexts[kind] = _make_context(kind, loaded.material)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    raise
                raise IdentityError(f"no identity in {self._shown}: {error}") from None
        return context

    def _look(self) -> _State:
        """Look at the files: three calls of stat(2), and one more for Kubernetes' names."""
        names, *others = self._names
        certificate = self._stat(names[0])
        if certificate == errno.ENOENT:
            for theirs in others:
                other = self._stat(theirs[0])
                if other != errno.ENOENT:
                    names, certificate = theirs, other
        return _State(names, (certificate, self._stat(names[1]), self._stat(names[2])))

    def _stat(self, name: str) -> _File:
        try:
            # Joined by hand: it is done for each connection, and pathlib takes three times as long
            # as the call.
            seen = os.stat(f"{self._within}{name}")
        except OSError as error:
            return error.errno or errno.EIO
        return signature(seen)

    def _load(self, state: _State, kind: _Kind) -> None:
        """Read the files until they do not change meanwhile, and take them if they are good."""
        for _ in range(_TRIES):
            loaded, failure, is_lasting = None, "", True
            try:
                material = self._read(state)
                loaded = _Loaded(material, {kind: _make_context(kind, material)})
            except ssl.SSLError as error:  # an OSError, too
                files = " or ".join(filter(None, state.names))
                failure = f"OpenSSL refuses {files}: {error.reason}"
            except OSError as error:
                if error.errno in EXHAUSTED:
                    raise  # no fault of the files; nothing has changed here
                # Neither may this be, such as EIO: try again the next time.
                failure, is_lasting = _describe(error), False
            except ValueError as error:
                failure = str(error)
            before, state = state, self._look()
            if state == before:
                break
        else:
            loaded, failure, is_lasting = None, "the files change while they are read", False
        self._state = state if is_lasting else None
        self._failure = failure
        if loaded is None:
            if self._reported != (state, failure):
                self._reported = (state, failure)
                self._on_event("identity_broken", f"{self._shown}: {failure}")
        else:
            self._loaded = loaded
            self._reported = None
            if not self._is_new:
                self._on_event("identity_loaded", self._shown)
        self._is_new = False

    def _read(self, state: _State) -> _Material:
        """Read the files.

        Raises:
            OSError: one of them can't be read.
            ValueError: one of them is not what it should be.
        """
        certificate_name, key_name, authority_name = state.names
        directory = Path(self._within)
        chain = _certificates(certificate_name, _read_file(directory / certificate_name))
        key = _read_file(directory / key_name)
        authorities: list[x509.Certificate] = []
        authority_path = directory / authority_name
        # A dangling link was put there on purpose: it does not stand for the system's authorities.
        # Neither does a path that was given, and leads nowhere.
        is_absent = state.files[2] == errno.ENOENT and not os.path.lexists(authority_path)
        if authority_name == _NO_NAME or (is_absent and self._is_directory):
            trusted = system_authorities()
            if not trusted:
                what = authority_name or "file of authorities"
                raise ValueError(f"there is no {what}, and the system has no authorities")
        else:
            authorities = _certificates(authority_name, _read_file(authority_path))
            trusted = b"".join(each.public_bytes(Encoding.DER) for each in authorities)
        return _Material(
            b"".join(each.public_bytes(Encoding.PEM) for each in _complete(chain, authorities)),
            key,
            key_name,
            certificate_name,
            trusted,
            chain[0].not_valid_after_utc.timestamp(),
        )

    def _warn(self, not_after: float) -> None:
        now = self._clock()
        if not_after - now >= _WARN_BEFORE or now < self._next_warning:
            return
        self._next_warning = now + _WARN_EVERY
        when = datetime.fromtimestamp(not_after, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        # It is used all the same: whether it still counts is for the peer to say.
        what = "expires at" if now <= not_after else "has expired at"
        self._on_event("identity_expires", f"{self._shown}: the certificate {what} {when}")


class Identities:
    """The identities of a program, each with what is known of it already.

    Args:
        on_event: as for `Identity`.
    """

    def __init__(self, on_event: Callable[[str, str], None]) -> None:
        self._on_event = on_event
        self._known: dict[str | Path | Files, Identity] = {}

    def __call__(self, where: str | Path | Files) -> Identity:
        """Return the identity in a directory, or of files.

        Raises:
            ValueError: the path of a file is empty.
        """
        if where not in self._known:
            place = Path(where) if isinstance(where, str) else where
            self._known[where] = Identity(place, self._on_event)
        return self._known[where]


@cache
def system_authorities() -> bytes:
    """Return whom the system trusts: certificates in DER, one after the other.

    They are read once in the life of the process, and not by OpenSSL in each handshake, as it does
    with a directory of them. Call it before the process loses its way to these files, by chroot(2)
    or a sandbox. `SSL_CERT_FILE` and `SSL_CERT_DIR` are heeded, openssl-env(7).

    Raises:
        OSError: the directory can't be read, or no descriptor or no memory is left to.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        files = [Path(paths.cafile)]
    elif paths.capath:
        names = sorted(os.listdir(paths.capath))
        files = [Path(paths.capath, name) for name in names if _HASHED.fullmatch(name)]
    else:
        files = []
    for file in files:
        try:
            context.load_verify_locations(file)
        except ssl.SSLError:  # an OSError, too
            continue
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            # Any other that can't be read is one that is not trusted.
    return b"".join(context.get_ca_certs(binary_form=True))


def _make_context(kind: _Kind, material: _Material) -> ssl.SSLContext:
    """Make a context.

    Raises:
        OSError: no memory or no descriptor is left; an `ssl.SSLError`: OpenSSL refuses something.
        ValueError: the key is encrypted, or not that of the certificate.
    """
    if kind is _Kind.SERVER:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A ticket takes 180 µs to make, and the next connection needs one.
        context.num_tickets = 1
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = kind is _Kind.CLIENT
        # A common name is no hostname, RFC 9525, section 2.
        context.hostname_checks_common_name = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.load_verify_locations(cadata=material.trusted)
    with _memory_file(material.chain) as chain, _memory_file(material.key) as key:
        try:
            # It compares the key with the certificate, SSL_CTX_check_private_key(3).
            context.load_cert_chain(chain, key, password=_no_password)
        except ssl.SSLError as error:
            if error.reason in _MISMATCH:
                raise ValueError(
                    f"{material.key_name} is not the key of {material.certificate_name}"
                ) from None
            if not error.reason:  # "PEM lib": no key was found; the certificate is one
                raise ValueError(f"{material.key_name} is not a private key in PEM") from None
            raise
    return context


def _no_password() -> str:
    # Else OpenSSL asks for one at the terminal.
    raise ValueError("the key is encrypted")


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """Give a path for `data`: OpenSSL wants one.

    A file in memory is never on a disk. Its path works for every user, and where landlock(7)
    forbids to open files, which is no matter of files in memory; but not where /proc is missing.
    """
    fd = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _read_file(path: Path) -> bytes:
    """Return what is in a file.

    Raises:
        OSError: it can't be read.
        ValueError: it is no file, or too long.
    """
    # O_NONBLOCK: whoever opens a FIFO waits for a writer otherwise, fifo(7).
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # First: of a directory `open` makes no file, and leaves the descriptor open.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(_LONGEST + 1)
    finally:
        os.close(fd)
    if len(data) > _LONGEST:
        raise ValueError(f"{path.name} has more than {_LONGEST} bytes")
    return data


def _certificates(name: str, data: bytes) -> list[x509.Certificate]:
    """Return the certificates in a PEM file.

    Raises:
        ValueError: there is none, or one of them is damaged.
    """
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise ValueError(f"{name} is not a certificate in PEM") from None
    # One without its end is passed over in silence.
    if len(found) < data.count(_BEGIN):
        raise ValueError(f"{name} is cut off")
    return found


def _complete(
    chain: list[x509.Certificate], authorities: list[x509.Certificate]
) -> list[x509.Certificate]:
    """Return our chain with what it lacks of the way to its root.

    When OpenSSL has nothing but our certificate it looks for the rest and verifies it, in every
    handshake; when it has more it sends what it has. So intermediate certificates are appended. The
    root need not be sent: the peer has it, and reading it costs him a tenth of the handshake. But a
    certificate that the root has issued itself would stand alone. There the root goes with it, as
    it does when OpenSSL looks for it.
    """
    whole = list(chain)
    while not _is_root(whole[-1]):
        issuer = next((each for each in authorities if _has_issued(each, whole[-1])), None)
        if issuer is None or issuer in whole or (_is_root(issuer) and len(whole) > 1):
            break
        whole.append(issuer)
    return whole


def _is_root(certificate: x509.Certificate) -> bool:
    return certificate.issuer == certificate.subject


def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    if issuer.subject != certificate.issuer:
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, UnsupportedAlgorithm, TypeError, ValueError):
        return False
    return True


def _describe(error: OSError) -> str:
    words = error.strerror or str(error)
    return f"{Path(os.fsdecode(error.filename)).name}: {words}" if error.filename else words
