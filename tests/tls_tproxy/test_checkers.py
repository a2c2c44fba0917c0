"""Certificate checkers: whom they accept, and that all else is a rejection."""

import errno
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mutual_tls.end import TLSReason
from mutual_tls.refusal import Refusal
from tests.mutual_tls.test_verify import raw_names
from tests.support.bridge import authority, write
from tls_tproxy.checkers import GROUP, Checkers, UnknownCheckerError, ask
from tls_tproxy.refusal import WrapReason

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "cert-checker-example"
NAMES = ["db.example.com"]

PLUGIN = """\
import sys
from tls_tproxy.checkers import Rejected

asked = []

def accepts(names, certificate):
    asked.append((names, certificate))

def rejects(names, certificate):
    raise Rejected("not today")

def has_a_fault(names, certificate):
    names.no_such_attribute

def ends_the_program(names, certificate):
    sys.exit(0)

def is_a_predicate(names, certificate):
    return False

def says_yes(names, certificate):
    return True

def takes_too_little(names):
    pass

async def waits(names, certificate):
    pass

class Checker:
    def __call__(self, names, certificate):
        raise Rejected("an object")

an_object = Checker()
no_function = "text"
"""


def der(*names: str, common_name: str | None = None) -> bytes:
    issued = authority().issue_cert(*names, common_name=common_name)
    pem = issued.cert_chain_pems[0].bytes()
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def pin(certificate: bytes) -> str:
    key = x509.load_der_x509_certificate(certificate).public_key()
    info = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"pin-sha256:{b64encode(sha256(info).digest()).decode()}"


def refused(checkers: Checkers, *names: str, place: str = "", certificate: bytes = b"") -> Refusal:
    found = [checkers.find(name, place) for name in names]
    with pytest.raises(Refusal) as caught:
        ask(found, NAMES, certificate or der(*NAMES))
    return caught.value


Point = Callable[..., EntryPoint]


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """What makes an entry point of something in a plugin."""
    plugins = {
        "a_plugin": PLUGIN,
        "a_broken_plugin": "1 / 0",
        "a_final_plugin": "raise SystemExit(0)",
        "no_python": "def",
    }
    for module, text in plugins.items():
        write(tmp_path / f"{module}.py", text)
    monkeypatch.syspath_prepend(tmp_path)

    def make(attribute: str, name: str | None = None, module: str = "a_plugin") -> EntryPoint:
        return EntryPoint(name or attribute, f"{module}:{attribute}", GROUP)

    yield make
    for module in plugins:
        sys.modules.pop(module, None)


# --- plugins


def test_a_plugin_accepts_by_returning(point: Point) -> None:
    checkers = Checkers([point("accepts")])
    certificate = der(*NAMES)
    ask([checkers.find("accepts", "")], NAMES, certificate)
    [(names, shown)] = sys.modules["a_plugin"].asked
    assert names == NAMES
    assert shown == x509.load_der_x509_certificate(certificate)


def test_a_plugin_rejects_by_raising(point: Point) -> None:
    checkers = Checkers([point("rejects"), point("accepts"), point("an_object")])
    refusal = refused(checkers, "accepts", "rejects", "an_object")
    assert refusal.reason is WrapReason.CERTIFICATE_REJECTED
    assert str(refusal) == "rejects: not today"
    assert str(refused(checkers, "an_object")) == "an_object: an object"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("has_a_fault", "AttributeError(\"'list' object has no attribute 'no_such_attribute'\")"),
        ("ends_the_program", "SystemExit(0)"),
        ("takes_too_little", "TypeError("),
        ("is_a_predicate", "it has returned bool, and not None"),
        ("says_yes", "it has returned bool, and not None"),
    ],
)
def test_all_else_is_a_fault_and_a_rejection(point: Point, name: str, why: str) -> None:
    refusal = refused(Checkers([point(name)]), name)
    assert refusal.reason is WrapReason.CHECKER_FAILED
    assert str(refusal).startswith(f"{name}: {why}")
    if not why.startswith("it has"):
        assert ".py, line " in str(refusal)
        assert refusal.__cause__ is not None


def test_without_checkers_nothing_is_read() -> None:
    ask([], NAMES, b"no certificate")


def test_what_is_no_certificate_is_rejected() -> None:
    refusal = refused(Checkers([]), "san", certificate=b"no certificate")
    assert refusal.reason is TLSReason.UNTRUSTED
    assert "unable to read the certificate" in str(refusal)


def test_plugins_that_can_not_be_used_stop_nobody_else(point: Point) -> None:
    checkers = Checkers(
        [
            point("accepts"),
            point("absent"),
            point("no_function"),
            point("waits"),
            point("f", "broken", "a_broken_plugin"),
            point("f", "final", "a_final_plugin"),
            point("f", "no-python", "no_python"),
            point("f", "no-module", "no_such_module"),
            point("accepts", "twice"),
            point("rejects", "twice"),
            point("accepts", "twice"),
            point("accepts", "san"),
        ]
    )
    ask([checkers.find("accepts", ""), checkers.find("san", "")], NAMES, der(*NAMES))
    for name, why in {
        "absent": "unable to load a_plugin:absent: AttributeError",
        "no_function": "a_plugin:no_function is no function that can be called, or one that waits",
        "waits": "a_plugin:waits is no function that can be called, or one that waits",
        "broken": "unable to load a_broken_plugin:f: ZeroDivisionError",
        "final": "unable to load a_final_plugin:f: SystemExit",
        "no-python": "unable to load no_python:f: SyntaxError",
        "no-module": "unable to load no_such_module:f: ModuleNotFoundError",
        "twice": "several packages have a certificate checker 'twice'",
    }.items():
        with pytest.raises(UnknownCheckerError) as caught:
            checkers.find(name, "")
        assert why in str(caught.value)
        assert checkers.faults[name] == str(caught.value)
    assert checkers.faults["san"].endswith("can't be called san: that one is built in")
    assert len(checkers.faults) == 9


def test_a_checker_that_is_not_there(point: Point) -> None:
    with pytest.raises(UnknownCheckerError) as caught:
        Checkers([point("rejects"), point("accepts")]).find("a\nb", "")
    there = "there are san, spki-pin, accepts, rejects"
    assert str(caught.value) == rf"there is no certificate checker 'a\nb'; {there}"


# --- those that are built in


@pytest.mark.parametrize(
    "names", [["db.example.com"], ["DB.example.com", "other.example"], ["*.example.com"]]
)
def test_san_accepts(names: list[str]) -> None:
    ask([Checkers([]).find("san", "")], ["other.example.org", *NAMES], der(*names))


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["other.example.com"], "other.example.com"),
        (["example.com"], "example.com"),
        (["*.db.example.com"], "*.db.example.com"),
        (["192.0.2.1"], "192.0.2.1, db.example.com"),
        (["x@db.example.com"], "db.example.com"),
    ],
)
def test_san_rejects(names: list[str], shown: str) -> None:
    """Not even for its common name."""
    certificate = der(*names, common_name="db.example.com")
    refusal = refused(Checkers([]), "san", certificate=certificate)
    assert refusal.reason is WrapReason.CERTIFICATE_REJECTED
    assert str(refusal).startswith(f"san: it is for {shown}")
    assert str(refusal).endswith(", not for db.example.com")


def test_names_that_can_not_be_read_are_nobody_s(tmp_path: Path) -> None:
    certificate = raw_names(b"\x82\x02\xc3\xbc")  # a dNSName that is not ASCII
    write(tmp_path / "pins", pin(certificate))
    for name in "san", "spki-pin":
        refusal = refused(Checkers([]), name, place=str(tmp_path), certificate=certificate)
        assert refusal.reason is WrapReason.CERTIFICATE_REJECTED
        assert "unable to read the certificate" in str(refusal)


def test_pins(tmp_path: Path) -> None:
    checkers, certificate, other = Checkers([]), der(*NAMES), der(*NAMES)
    write(tmp_path / "pins", f"# the old one\n{pin(other)}\n{pin(certificate)} # the new one\n")
    for each in certificate, other:
        ask([checkers.find("spki-pin", str(tmp_path))], NAMES, each)
    write(tmp_path / "pins", pin(other))
    refusal = refused(checkers, "spki-pin", place=str(tmp_path), certificate=certificate)
    assert refusal.reason is WrapReason.CERTIFICATE_REJECTED
    assert str(refusal) == f"spki-pin: its public key is none of {tmp_path}/pins"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "pins has no pin"),
        ("", "pins has no pin"),
        ("# none", "pins has no pin"),
        ("db.example.com", "pins: 'db.example.com' is no pin, pin-sha256:BASE64"),
        ("pin-sha256:AAAA", "the pin has 3 bytes"),
        ("sha256//AAAA", "is not a name"),
    ],
)
def test_without_pins_that_are_some_nobody_is_accepted(
    tmp_path: Path, text: str | None, why: str
) -> None:
    certificate = der(*NAMES)
    if text is not None:
        write(tmp_path / "pins", text)
    refusal = refused(Checkers([]), "spki-pin", place=str(tmp_path), certificate=certificate)
    assert refusal.reason is WrapReason.CERTIFICATE_REJECTED
    assert why in str(refusal)
    if text:
        # Nor is one beside a good one.
        write(tmp_path / "pins", f"{pin(certificate)}\n{text}")
        if not text.startswith("#"):
            assert why in str(refused(Checkers([]), "spki-pin", place=str(tmp_path)))


def test_pins_that_no_descriptor_is_left_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = der(*NAMES)
    write(tmp_path / "pins", pin(certificate))

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", fail)
    refusal = refused(Checkers([]), "spki-pin", place=str(tmp_path), certificate=certificate)
    assert refusal.reason is WrapReason.CERTIFICATE_REJECTED
    assert "Too many open files" in str(refusal)


# --- the example


ASK = """\
import sys
from pathlib import Path
from tls_tproxy.checkers import Checkers, ask
from mutual_tls.refusal import Refusal

checker = Checkers().find("short-lived", "")
for path in sys.argv[1:]:
    try:
        ask([checker], ["db.example.com"], Path(path).read_bytes())
    except Refusal as refusal:
        print(refusal.reason, refusal)
    else:
        print("accepted")
"""


def test_the_example_accepts_and_rejects(installed: Path, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    paths = []
    for days in 100, 101:
        issued = trustme.CA().issue_cert(
            *NAMES, not_before=now, not_after=now + timedelta(days=days)
        )
        pem = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())
        paths.append(tmp_path / f"{days}.der")
        paths[-1].write_bytes(pem.public_bytes(Encoding.DER))
    environment = os.environ | {"PYTHONPATH": f"{installed}:{ROOT}"}
    command = [sys.executable, "-c", ASK, *map(str, paths)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path
    )
    why = "the certificate for db.example.com is valid for 101 days"
    expected = ["accepted", f"certificate_rejected short-lived: {why}"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_the_example_s_readme_says_what_the_program_says() -> None:
    text = (EXAMPLE / "README.md").read_text()
    for word in GROUP, WrapReason.CHECKER_FAILED, WrapReason.UNKNOWN_CHECKER, "short-lived":
        assert word in text
