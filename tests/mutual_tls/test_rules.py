"""Rules in files, and whether a server is whom they name."""

from pathlib import Path

import pytest
from cryptography import x509

from mutual_tls.end import TLSError, TLSReason
from mutual_tls.rules import check_server, rules_in
from mutual_tls.settings import SettingsError
from tests.mutual_tls.test_verify import der
from tests.support.bridge import write


def test_rules_in_a_directory(tmp_path: Path) -> None:
    assert rules_in(str(tmp_path / "servers")) is None
    (tmp_path / "servers").mkdir()
    assert rules_in(str(tmp_path / "servers")) == []
    write(tmp_path / "servers" / "cn:one")
    write(tmp_path / "servers" / "list", "*.example.com # all of them\n")
    assert list(map(str, rules_in(str(tmp_path / "servers")) or [])) == ["cn:one", "*.example.com"]


def test_one_rule_that_is_not_understood_spoils_all(tmp_path: Path) -> None:
    path = write(tmp_path / "servers", "a.example\na*.example\n")
    with pytest.raises(SettingsError, match=r"unable to read .*/servers: 'a\*\.example'"):
        rules_in(str(path))


def test_a_server_is_checked_by_rules(tmp_path: Path) -> None:
    rules = rules_in(str(write(tmp_path / "servers", "a.example")))
    assert rules is not None
    check_server(rules, der(x509.DNSName("a.example")))
    for names, shown in ([x509.DNSName("b.example")], "b.example"), ([], "nobody"):
        with pytest.raises(TLSError, match=f"its certificate is for {shown}") as caught:
            check_server(rules, der(*names))
        assert caught.value.reason is TLSReason.WRONG_NAME
    with pytest.raises(TLSError, match="unable to read") as caught:
        check_server(rules, b"no certificate")
    assert caught.value.reason is TLSReason.UNTRUSTED
    with pytest.raises(TLSError):
        check_server([], der(x509.DNSName("a.example")))
