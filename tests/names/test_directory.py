"""Hostname → directory name: plain, and as b3sum prints it."""

import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from sniproxy_hostname import Hostname, directory_namer

ROOT = Path(__file__).parents[2]

# BLAKE3's answer for the three bytes "abc", as many implementations print it in their own tests.
BLAKE3_ABC = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


def test_plain_is_the_name_itself() -> None:
    assert directory_namer(False)(Hostname(b"EXAMPLE.com.")) == "example.com"


def test_hashed_is_blake3_of_the_canonical_name() -> None:
    assert directory_namer(True)(Hostname(b"ABC.")) == BLAKE3_ABC


def test_hashed_is_64_lower_case_hex_digits() -> None:
    name = directory_namer(True)(Hostname(b"example.com"))
    assert len(name) == 64
    assert set(name) <= set(string.digits + "abcdef")


@pytest.mark.skipif(shutil.which("b3sum") is None, reason="no b3sum to compare with")
@pytest.mark.parametrize("name", ["a", "example.com", "xn--sr8hvo.ws"])
def test_hashed_is_what_b3sum_prints(name: str) -> None:
    printed = subprocess.check_output(["b3sum"], input=name.encode())
    assert directory_namer(True)(Hostname(name.encode())) == printed.decode().split()[0]


def run_python(*arguments: str) -> str:
    return subprocess.check_output([sys.executable, *arguments], cwd=ROOT, text=True).strip()


@pytest.mark.parametrize("unwanted", ["idna", "blake3", "trio", "socket", "_socket", "ssl"])
def test_the_package_loads_the_standard_library_only(unwanted: str) -> None:
    # -S: no site-packages, and nobody who has loaded modules before us.
    code = "import sys, sniproxy_hostname; print(*sys.modules)"
    assert unwanted not in run_python("-S", "-c", code).split()


def test_plain_names_need_no_blake3() -> None:
    code = (
        "import sys; from sniproxy_hostname import Hostname, directory_namer;"
        "directory_namer(False)(Hostname(b'a')); print('blake3' in sys.modules)"
    )
    assert run_python("-S", "-c", code) == "False"


def test_a_hashed_namer_has_loaded_all_it_needs() -> None:
    code = (
        "import sys; from sniproxy_hostname import Hostname, directory_namer;"
        "namer = directory_namer(True); loaded = set(sys.modules);"
        "namer(Hostname(b'a')); print(set(sys.modules) - loaded)"
    )
    assert run_python("-c", code) == "set()"
