"""scripts/coming-from: what it prints of other routers' configurations is run, and looked at."""

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniproxy_hostname import Hostname
from tests.support.daemon import PATIENCE, eventually, start_daemon
from tests.support.greeting import Greeter
from tests.support.hellos import hello_bytes
from tests.support.sockets import receive_all
from tests.support.tenants import Page

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/coming-from"
PAGE = Page(ROOT / "docs/coming-from.md")

EXAMPLES = {
    "nginx": (PAGE["nginx"], PAGE["nginx command"], PAGE["nginx output"]),
    "haproxy": (PAGE["haproxy"], PAGE["haproxy command"], PAGE["haproxy output"]),
    "snid": (PAGE["snid"], PAGE["snid command"], PAGE["snid output"]),
    "sniproxy": (PAGE["sniproxy"], PAGE["sniproxy command"], PAGE["sniproxy output"]),
}

# In the place of systemctl: it writes down what it was told.
SYSTEMCTL = '#!/bin/sh\nprintf "%s\\n" "$*" >>"$CALLS"\n'

NGINX = r"""
user www-data;
worker_processes auto;
include /etc/nginx/modules-enabled/*.conf;
error_log /var/log/nginx/error.log warn;
events { worker_connections 768; }

http {
    server { listen 80; return 301 https://$host$request_uri; }
}

stream {
    log_format routed '$remote_addr {"name": "$ssl_preread_server_name"}';  # a quoted { and ;
    access_log /var/log/nginx/stream.log routed;

    upstream one { server unix:/run/one.sock; }
    upstream pool {
        least_conn;
        server 192.0.2.9:443 backup;
        server 192.0.2.1:443 weight=2;
        server 192.0.2.2:443;
    }
    map $ssl_preread_server_name $backend {
        hostnames;
        One.Example.    one;
        .two.example    "unix:/run/with space.sock";
        *.three.example pool;
        four.example    [::1]:8443;
        default         localhost:8443;
    }
    server {
        listen 443;
        listen [::]:443;
        ssl_preread on;
        proxy_protocol on;
        proxy_pass $backend;
    }
    # For IPv6 apart, as some have it.
    server {
        listen [2001:db8::1]:443;
        ssl_preread on;
        proxy_protocol on;
        proxy_pass ${backend};
    }
}
"""

HAPROXY = r"""
global
    log /dev/log local0
    user haproxy
defaults
    mode tcp
    option tcplog
    timeout connect 5s
frontend plain
    mode http
    bind :80
    http-request redirect scheme https
frontend tls
    bind :443
    tcp-request inspect-delay 5s
    tcp-request content accept if { req_ssl_hello_type 1 }
    acl hello req.ssl_hello_type 1
    acl two req.ssl_sni -i two.example www.two.example
    acl two req_ssl_sni,lower -i "two.example.net" # the same once more
    acl below req.ssl_sni -m end .three.example
    use_backend one if { req_ssl_sni -i ONE.example }
    use_backend two if hello two
    use_backend 'three' if below or { req.ssl_sni -m reg ^(.+\.)?four\.example$ }
    use_backend one if { req.ssl_sni one.three.example }
    use_backend %[req.ssl_sni,lower,map(names.map)]
    default_backend rest
backend one
    server a unix@/run/one.sock send-proxy check
backend two
    balance roundrobin
    default-server send-proxy-v2
    server b /run/spare.sock backup
    server a /run/two.sock weight 10
backend three
    server a ::1:8443
backend rest
    server a ipv4@127.0.0.1:8443 check
"""
NAMES_MAP = "# name and backend\nfive.example one\n\nsix.example\tthree\nfive.example rest\n"

SNIPROXY = r"""
# sniproxy.conf, as Debian has it
user daemon
pidfile /var/run/sniproxy.pid
resolver { nameserver 127.0.0.1; mode ipv6_first }
error_log {
    syslog daemon
}
listen 80 { proto http }
listener 0.0.0.0:443 {
    proto tls
    table https_hosts
    fallback 192.0.2.9:443
}
table {
    unused.example 192.0.2.3
}
table https_hosts {
    ^one\.example$       unix:/run/one.sock # a comment
    two\.example$        192.0.2.1:8443 proxy_protocol
    ^.*\.three\.example$ unix:/run/x.sock proxy_protocol; ^(www\.)?four\.example$ 192.0.2.4
    ^www\.two\.example$  192.0.2.5
    ^five\.example$      backend.internal
    ^[^.]+\.six\.example$ unix:/run/six.sock
}
"""

SNID = """
[Unit]
Description=snid, before all sites

[Service]
ExecStart=/usr/local/bin/snid -listen tcp:443 -mode unix \\
    --unix-directory={directory} -proxy-proto -default-hostname www.two.example
Restart=always
"""


def run(kind: str, *files: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run the script."""
    return subprocess.run(
        [sys.executable, SCRIPT, kind, *files], cwd=cwd, capture_output=True, text=True
    )


def done(output: str, place: Path) -> dict[str, str]:
    """Run the commands with sh in an empty directory; return what is there then.

    Directories have "", files their text, links an arrow and where they lead; and `systemctl` has
    what it was told.
    """
    hosts, programs = place / "hosts", place / "programs"
    hosts.mkdir()
    programs.mkdir()
    (programs / "systemctl").write_text(SYSTEMCTL)
    (programs / "systemctl").chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(place / "calls")}
    # A umask that is not to matter.
    script = f"umask 002\n{output}"
    made = subprocess.run(
        ["sh", "-c", script], cwd=hosts, env=environment, capture_output=True, text=True
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    for entry in hosts.iterdir():
        if not entry.is_symlink():
            # Else who listens has to be its owner.
            assert entry.stat().st_mode & 0o777 == 0o755
    tree = dict(found(hosts))
    calls = place / "calls"
    if calls.exists():
        tree["systemctl"] = calls.read_text()
    return tree


def found(hosts: Path) -> Iterator[tuple[str, str]]:
    # Not rglob, which follows links, and some lead nowhere.
    for directory in hosts.iterdir():
        if directory.is_symlink():
            yield directory.name, f"-> {directory.readlink()}"
            continue
        yield directory.name, ""
        for path in directory.iterdir():
            name = f"{directory.name}/{path.name}"
            yield name, f"-> {path.readlink()}" if path.is_symlink() else path.read_text()


def host(name: str, *, to: str = "", tcp: str = "", proxy: int = 0) -> dict[str, str]:
    """Return what there is of a host, but for systemctl."""
    tree = {name: ""}
    if proxy:
        tree[f"{name}/send-proxy-v{proxy}"] = ""
    if to:
        tree[f"{name}/tls-socket"] = f"-> {to}"
    if tcp:
        tree[f"{name}/tcp-backend"] = f"ADDRESS={tcp}\n"
    return tree


def calls(*names: str) -> dict[str, str]:
    """Return what systemctl is told for these hosts."""
    return {"systemctl": "".join(f"enable --now tcp-backend@{name}.socket\n" for name in names)}


def converted(kind: str, text: str, place: Path) -> "subprocess.CompletedProcess[str]":
    """Run the script for a file with this text."""
    (place / "conf").write_text(text)
    return run(kind, "conf", cwd=place)


def in_stream(entries: str, more: str = "") -> str:
    """Return an nginx.conf with these entries in its map."""
    return (
        f"stream {{ {more} map $ssl_preread_server_name $x {{ hostnames;\n{entries}\n}}\n"
        "server { listen 443; ssl_preread on; proxy_pass $x; } }"
    )


# --- Each router ---------------------------------------------------------------------------------


def test_nginx(tmp_path: Path) -> None:
    answer = converted("nginx", NGINX, tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert done(answer.stdout, tmp_path) == {
        **host("one.example", to="/run/one.sock", proxy=1),
        **host("two.example", to="/run/with space.sock", proxy=1),
        **host("_.two.example", to="/run/with space.sock", proxy=1),
        **host("_.three.example", tcp="192.0.2.1:443", proxy=1),
        **host("four.example", tcp="[::1]:8443", proxy=1),
        **host("_unknown", tcp="127.0.0.1:8443", proxy=1),
        "_no-name": "-> _unknown",
        **calls("_.three.example", "four.example", "_unknown"),
    }
    for words in (
        "conf:8: http: left, it stays with nginx",
        "conf:27: '*.three.example': the first of 3 servers, the rest is left",
        "conf:29: default: localhost is 127.0.0.1 here",
        "conf:39: the same as at conf:31",
    ):
        assert f"# {words}\n" in answer.stdout


def test_what_is_there_already_is_left(tmp_path: Path) -> None:
    first = in_stream("one.example unix:/run/one.sock; default unix:/run/rest.sock;")
    made = done(converted("nginx", first, tmp_path).stdout, tmp_path)
    second = in_stream("one.example 192.0.2.1:443; default unix:/run/other.sock;")
    second = second.replace("ssl_preread on", "ssl_preread on; proxy_protocol on")
    printed = converted("nginx", second, tmp_path).stdout
    environment = {
        "PATH": f"{tmp_path}/programs:{os.environ['PATH']}",
        "CALLS": f"{tmp_path}/calls",
    }
    hosts = tmp_path / "hosts"
    subprocess.run(["sh", "-c", printed], cwd=hosts, env=environment, capture_output=True)
    assert dict(found(hosts)) == made
    assert not (tmp_path / "calls").exists()


def test_nginx_clients_who_ask_for_no_name(tmp_path: Path) -> None:
    entries = 'one.example unix:/run/one.sock; "" unix:/run/none.sock; default unix:/run/rest.sock;'
    answer = converted("nginx", in_stream(entries), tmp_path)
    assert done(answer.stdout, tmp_path) == {
        **host("one.example", to="/run/one.sock"),
        **host("_no-name", to="/run/none.sock"),
        **host("_unknown", to="/run/rest.sock"),
    }


def test_nginx_a_part_of_the_address_is_in_the_map(tmp_path: Path) -> None:
    text = in_stream("one.example one; two.example two;").replace("$x;", "unix:/run/${x}.sock;")
    answer = converted("nginx", text, tmp_path)
    assert done(answer.stdout, tmp_path) == {
        **host("one.example", to="/run/one.sock"),
        **host("two.example", to="/run/two.sock"),
    }


def test_nginx_in_several_files(tmp_path: Path) -> None:
    """The second one is what the first includes in `stream`."""
    (tmp_path / "stream.d").mkdir()
    (tmp_path / "nginx.conf").write_text("events {}\nstream { include stream.d/*.conf; }\n")
    inner = in_stream("one.example unix:/run/one.sock;")
    inner = inner.removeprefix("stream {").removesuffix("}")
    (tmp_path / "stream.d/sites.conf").write_text(inner)
    alone = run("nginx", "nginx.conf", cwd=tmp_path)
    assert alone.returncode == 1
    assert "nginx.conf:2: include 'stream.d/*.conf': not read" in alone.stderr
    both = run("nginx", "nginx.conf", "stream.d/sites.conf", cwd=tmp_path)
    assert (both.returncode, both.stderr) == (0, "")
    assert done(both.stdout, tmp_path) == host("one.example", to="/run/one.sock")


def test_haproxy(tmp_path: Path) -> None:
    (tmp_path / "names.map").write_text(NAMES_MAP)
    answer = converted("haproxy", HAPROXY, tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert done(answer.stdout, tmp_path) == {
        **host("one.example", to="/run/one.sock", proxy=1),
        **host("two.example", to="/run/two.sock", proxy=2),
        **host("www.two.example", to="/run/two.sock", proxy=2),
        **host("two.example.net", to="/run/two.sock", proxy=2),
        **host("_.three.example", tcp="[::1]:8443"),
        **host("four.example", tcp="[::1]:8443"),
        **host("_.four.example", tcp="[::1]:8443"),
        **host("five.example", to="/run/one.sock", proxy=1),
        **host("six.example", tcp="[::1]:8443"),
        **host("_unknown", tcp="127.0.0.1:8443"),
        "_no-name": "-> _unknown",
        **calls("_.three.example", "four.example", "_.four.example", "six.example", "_unknown"),
    }
    for words in (
        "conf:9: frontend plain: left, not in mode tcp",
        # The first rule wins there, and one.three.example never came to the later one.
        "conf:24: one.three.example: left out, conf:20 comes first",
        "names.map:5: five.example: left out, names.map:2 comes first",
    ):
        assert f"# {words}\n" in answer.stdout


def test_haproxy_in_another_root_directory(tmp_path: Path) -> None:
    """It connects after chroot(2), so the path of a server is below."""
    text = HAPROXY.replace("global", "global\n    chroot /var/lib/haproxy")
    text = text.replace("    use_backend %[req.ssl_sni,lower,map(names.map)]\n", "")
    answer = converted("haproxy", text, tmp_path)
    assert "ln -s /var/lib/haproxy/run/one.sock one.example/tls-socket\n" in answer.stdout


def test_snid(tmp_path: Path) -> None:
    directory = tmp_path / "sockets"
    directory.mkdir()
    with contextlib.ExitStack() as ends:
        for name in "one.example", "_.two.example", "Three.example", "four.example.new":
            listening = ends.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(directory / name))
        (directory / "four.example").symlink_to("four.example.new")
        (directory / "README").touch()
        answer = converted("snid", SNID.format(directory=directory), tmp_path)
    assert answer.returncode == 1
    assert "Three.example: not in lower case" in answer.stderr
    assert "README: no socket, left" in answer.stdout
    assert done(answer.stdout, tmp_path) == {
        **host("_.two.example", to=f"{directory}/_.two.example", proxy=2),
        **host("four.example", to=f"{directory}/four.example", proxy=2),
        **host("four.example.new", to=f"{directory}/four.example.new", proxy=2),
        **host("one.example", to=f"{directory}/one.example", proxy=2),
        "_no-name": "-> _.two.example",
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("snid -listen tcp:443 -mode tcp -backend-cidr 192.0.2.0/24", "conf:1: mode tcp"),
        ("snid -listen tcp:443 -mode unix -unix-directory /nowhere", "conf:1: /nowhere"),
        ("snid -mode unix -unix-directory . -strange", "conf:1: -strange: not understood"),
        ("exec something else", "no rule for a server name was found"),
    ],
)
def test_snid_without_a_counterpart(tmp_path: Path, line: str, words: str) -> None:
    answer = converted("snid", line, tmp_path)
    assert answer.returncode == 1
    assert words in answer.stderr


def test_sniproxy_in_c(tmp_path: Path) -> None:
    answer = converted("sniproxy", SNIPROXY, tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert done(answer.stdout, tmp_path) == {
        **host("one.example", to="/run/one.sock"),
        **host("two.example", tcp="192.0.2.1:8443", proxy=1),
        **host("_.two.example", tcp="192.0.2.1:8443", proxy=1),
        **host("_.three.example", to="/run/x.sock", proxy=1),
        **host("four.example", tcp="192.0.2.4:443"),
        **host("www.four.example", tcp="192.0.2.4:443"),
        **host("five.example", tcp="backend.internal:443"),
        **host("_.six.example", to="/run/six.sock"),
        **host("_unknown", tcp="192.0.2.9:443"),
        "_no-name": "-> _unknown",
        **calls(
            *("two.example", "_.two.example", "four.example", "www.four.example"),
            *("five.example", "_unknown"),
        ),
    }
    for words in (
        "conf:9: a listener for HTTP: left",
        # An expression without ^ matches that name, too, and comes first.
        "conf:22: www.two.example: left out, conf:20 comes first",
        "conf:23: '^five\\.example$': of this name only the first address is tried",
        "conf:24: '^[^.]+\\.six\\.example$': one label there, any number here",
    ):
        assert f"# {words}\n" in answer.stdout


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        (r"^one\.example$", ["one.example"]),
        (r"^one.example$", ["one.example"]),
        (r"^one\\.example$", ["one.example"]),
        (r"^.*\.one\.example$", ["_.one.example"]),
        (r".*\.one\.example$", ["_.one.example"]),
        (r"^.+\.one\.example$", ["_.one.example"]),
        (r"^(.*)\.one\.example$", ["_.one.example"]),
        (r"^[^.]+\.one\.example$", ["_.one.example"]),
        (r"^[a-z0-9-]+\.one\.example$", ["_.one.example"]),
        (r"^(.+\.)?one\.example$", ["one.example", "_.one.example"]),
        (r"^(?:www\.)?one\.example$", ["one.example", "www.one.example"]),
        (r".*one\.example$", ["one.example", "_.one.example"]),
        (r"one\.example$", ["one.example", "_.one.example"]),
        (r"one.example", ["one.example", "_.one.example"]),
        (r".*", ["_unknown"]),
        (r"^(.*\.|)one\.example$", ["one.example", "_.one.example"]),
        (r"^(one|two)\.example$", ["one.example", "two.example"]),
        (r"(one|two)\.example$", ["one.example", "_.one.example", "two.example", "_.two.example"]),
        (r"^(one|t[wW]o)\.example$", []),
        (r"^one[0-9]\.example$", []),
        (r"^one\d\.example$", []),
        (r"^o.*\.example$", []),
        (r"^one\.", []),
        (r"^.*$|x", []),
        (r"(.*\.example$", []),
        (r"^.*\..example$", []),
    ],
)
def test_expressions(tmp_path: Path, expression: str, names: list[str]) -> None:
    text = f"listener 443 {{ table t }}\ntable t {{\n{expression} unix:/run/s\n}}\n"
    answer = converted("sniproxy", text, tmp_path)
    assert answer.returncode == (not names)
    assert done(answer.stdout, tmp_path) == {
        key: value for name in names for key, value in host(name, to="/run/s").items()
    }
    if not names:
        assert f"coming-from: conf:3: {shlex.quote(expression)}: " in answer.stderr


# --- What has no counterpart ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (r"~^a+\.example$ unix:/s;", r"'~^a+\.example$': a regular expression"),
        ("mail.* unix:/s;", "'mail.*': a star"),
        ("a.*.example unix:/s;", "'a.*.example': a star"),
        ("192.0.2.1 unix:/s;", "192.0.2.1: no hostname"),
        ("a..example unix:/s;", "a..example: no hostname"),
        (f"{'a' * 300}.example unix:/s;", "no hostname"),
        ("a.example $ssl_preread_server_name:443;", "has a variable"),
        ('a.example "";', "it leads nowhere"),
        ("a.example s.sock;", "s.sock is no address"),
        ("a.example 192.0.2.1;", "192.0.2.1 is no address with a port"),
        ("a.example 192.0.2.1:65536;", "192.0.2.1:65536 is no address with a port"),
        ("a.example unix:s;", "s is not an absolute path"),
        ("a.example pool;", "upstream pool has no server"),
        (f"{'a' * 60}.{'b' * 30} 192.0.2.1:443;", "too long a path"),
        ("include more.map;", "include more.map: not read"),
        ("a b c;", "a: not understood"),
    ],
)
def test_an_entry_of_a_map(tmp_path: Path, entry: str, words: str) -> None:
    text = in_stream(f"{entry}\nz.example unix:/run/z.sock;", "upstream pool { }")
    answer = converted("nginx", text, tmp_path)
    assert answer.returncode == 1
    assert words in answer.stderr
    # It is in the output, too, and with its line; the rest is done.
    [line] = answer.stderr.splitlines()
    assert f"# {line.removeprefix('coming-from: ')}\n" in answer.stdout
    assert "coming-from: conf:2: " in line
    assert done(answer.stdout, tmp_path) == host("z.example", to="/run/z.sock")


def test_two_targets_for_a_name(tmp_path: Path) -> None:
    """nginx refuses such a map; where the others do not, the first counts."""
    entries = "a.example unix:/run/1;\n.A.example unix:/run/2;"
    answer = converted("nginx", in_stream(entries), tmp_path)
    assert answer.returncode == 0
    assert "# conf:3: a.example: left out, conf:2 comes first\n" in answer.stdout
    assert done(answer.stdout, tmp_path) == {
        **host("a.example", to="/run/1"),
        **host("_.a.example", to="/run/2"),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stream {\n map $remote_addr $x { }\n}", "conf:2: a map of '$remote_addr'"),
        ("stream { server { listen 443 ssl; proxy_pass a:1; } }", "listen with ssl"),
        ("stream { server { listen 443 proxy_protocol; proxy_pass a:1; } }", "in front"),
        ("stream { server {\nproxy_pass $ssl_preread_server_name:443; } }", "conf:2: proxy_pass"),
        ("stream { server { proxy_pass a:1; deny all; } }", "conf:1: deny: not understood"),
        ("stream { server {", "the file ends amid"),
        ("stream { } }", "a brace where none may be"),
        ("a 'b", "a quote or a backslash"),
        (
            "stream { map $ssl_preread_server_name $x { a.example unix:/s; } }",
            "no proxy_pass takes",
        ),
        ("", "no rule for a server name was found"),
    ],
)
def test_what_is_around_the_map(tmp_path: Path, text: str, words: str) -> None:
    answer = converted("nginx", text, tmp_path)
    assert answer.returncode == 1
    assert words in answer.stderr
    assert done(answer.stdout, tmp_path) == {}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("use_backend b if { req.ssl_sni a.example } { src 10.0.0.0/8 }", "src is not about"),
        ("use_backend b if !{ req.ssl_sni a.example }", "what must not be"),
        ("use_backend b unless { req.ssl_sni a.example }", "no counterpart for unless"),
        ("use_backend b if { req.ssl_sni -m sub a }", "-m sub"),
        ("use_backend b if { req.ssl_sni -m beg mail. }", "-m beg"),
        ("use_backend b if nobody", "nobody is not about the server name"),
        ("use_backend b if { req.ssl_sni -f names.lst }", "names.lst is not to be read"),
        ("use_backend %[req.ssl_sni,lower]", "not by a map"),
        ("use_backend x-%[req.ssl_sni,lower]-y", "not by a map"),
        ("use_backend %[req.ssl_sni,map_beg(a.map)]", "no counterpart for map_beg"),
        ("use_backend %[req.ssl_sni,map(a.map)]", "a.map is not to be read"),
        ("use_backend c if { req.ssl_sni a.example }", "there is no backend c"),
        ("use_backend tls if { req.ssl_sni a.example }", "speaks TLS itself"),
        ("use_backend abstract if { req.ssl_sni a.example }", "abns@x is no Unix socket"),
        ("use_backend b if { req.ssl_sni 'a;b.example' }", "no hostname"),
        ("tcp-request content reject", "tcp-request content reject"),
        ('use_backend b if { req.ssl_sni "a.example }', "a quote that has no end"),
    ],
)
def test_a_rule_of_haproxy(tmp_path: Path, rule: str, words: str) -> None:
    text = (
        f"frontend f\nuse_backend b if {{ req.ssl_sni z.example }}\n{rule}\n"
        "backend b\nserver s /run/z.sock\nbackend tls\nserver s /run/s ssl\n"
        "backend abstract\nserver s abns@x\n"
    )
    answer = converted("haproxy", text, tmp_path)
    assert answer.returncode == 1
    [line] = answer.stderr.splitlines()
    assert line.startswith("coming-from: conf:3: ")
    assert words in line
    assert done(answer.stdout, tmp_path) == host("z.example", to="/run/z.sock")


def test_a_name_that_is_not_ascii(tmp_path: Path) -> None:
    """It becomes what clients send; without the package idna, it is named."""
    text = in_stream("München.example unix:/run/m;\nxn--sr8hvo.ws unix:/run/spider;")
    answer = converted("nginx", text, tmp_path)
    assert done(answer.stdout, tmp_path) == {
        **host("xn--mnchen-3ya.example", to="/run/m"),
        **host("xn--sr8hvo.ws", to="/run/spider"),
    }
    # -S: nothing but the standard library is there.
    bare = subprocess.run(
        [sys.executable, "-S", SCRIPT, "nginx", "conf"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert bare.returncode == 1
    assert "coming-from: conf:2: 'M\\xfcnchen.example': not ASCII" in bare.stderr
    assert "mkdir -m 0755 xn--sr8hvo.ws" in bare.stdout


def test_what_comes_after_a_map(tmp_path: Path) -> None:
    """HAProxy never comes to it, unless the rule with the map has a condition of its own."""
    (tmp_path / "a.map").write_text("a.example b\n")
    for condition, comes in (
        ("", False),
        (" if { req.ssl_sni -m found }", False),
        (" if { req.ssl_sni -m end .a.example }", True),
    ):
        text = (
            f"frontend f\nuse_backend %[req.ssl_sni,lower,map(a.map)]{condition}\n"
            "use_backend b if { req.ssl_sni z.example }\nbackend b\nserver s /run/s\n"
        )
        answer = converted("haproxy", text, tmp_path)
        assert ("mkdir -m 0755 z.example" in answer.stdout) == comes
        assert ("# conf:3: left out, no client comes here after conf:2" in answer.stdout) != comes
        assert answer.returncode == comes


def test_other_rules_on_another_port(tmp_path: Path) -> None:
    text = SNIPROXY + "listener 8443 {\n}\n"
    answer = converted("sniproxy", text, tmp_path)
    assert answer.returncode == 1
    assert "conf:26: other rules than at conf:10: left out" in answer.stderr
    assert "unused.example" not in answer.stdout


def test_how_it_is_called(tmp_path: Path) -> None:
    for arguments in (), ("nginx",), ("apache", "conf"), ("nginx", "nowhere.conf"), ("nginx", "."):
        answer = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert answer.returncode == 2
        assert answer.stdout == ""
        assert answer.stderr


# --- The other router itself ---------------------------------------------------------------------

# Each listens on {door}, and leads to the sockets {a}, {b}, {c} and {d}.
REAL = {
    "nginx": r"""
{load}
user root;
pid {door}.pid;
error_log stderr;
events {{ }}
stream {{
    access_log off;
    map $ssl_preread_server_name $x {{
        hostnames;
        *.one.example       unix:{b};
        one.example         unix:{a};
        *.deep.one.example  unix:{c};
        .two.example        group;
        WWW.two.example     unix:{a};
        ~^x\.one\.example$ unix:{d};  # never, for there is *.one.example
        ~^(.+\.)?three\.example$ unix:{a};
        "~*^(FOUR|never)\.example$" unix:{b};
        ~^a\.b\.three\.example$ unix:{d};  # never, for another one comes first
        default             unix:{d};
    }}
    upstream group {{ server unix:{c}; }}
    server {{
        listen unix:{door};
        ssl_preread on;
        proxy_protocol on;
        proxy_pass $x;
    }}
}}
""",
    "haproxy": r"""
defaults
    mode tcp
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend all
    bind unix@{door}
    tcp-request inspect-delay 5s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    acl one req.ssl_sni -i ONE.example
    use_backend a if one
    use_backend b if {{ req.ssl_sni -i -m end .one.example }}
    use_backend c if {{ req.ssl_sni -i deep.one.example }}
    use_backend c if {{ req.ssl_sni -i -m dom two.example }}
    use_backend a if {{ req.ssl_sni -i -m reg ^(.+\.)?three\.example$ }}
    use_backend my-%[req.ssl_sni,lower,map({map})]
    use_backend a if {{ req.ssl_sni -i never.example }}
    default_backend d
backend a
    server s unix@{a} send-proxy
backend b
    server s {b}
backend my-a
    server s unix@{a} send-proxy
backend my-b
    server s {b}
backend c
    server s unix@{c}
backend d
    server s unix@{d}
""",
    "sniproxy": r"""
user root
error_log {{ filename /dev/null }}
listener unix:{door} {{
    protocol tls
    table all
    fallback unix:{d}
}}
table all {{
    ^one\.example$ unix:{a} proxy_protocol
    ^.*\.one\.example$ unix:{b}
    ^deep\.one\.example$ unix:{c}
    two.example unix:{c}
    ^(.+\.)?three\.example$ unix:{a}
}}
""",
}
COMMANDS = {
    "nginx": ("nginx", "-e", "stderr", "-g", "daemon off;", "-c"),
    "haproxy": ("haproxy", "-db", "-f"),
    "sniproxy": ("/usr/sbin/sniproxy", "-f", "-c"),
}
PACKAGES = {"nginx": "libnginx-mod-stream", "haproxy": "haproxy", "sniproxy": "sniproxy"}
ASKED = (
    *("one.example", "x.one.example", "deep.one.example", "x.deep.one.example", "x.y.one.example"),
    *("two.example", "www.two.example", "x.www.two.example", "three.example", "a.b.three.example"),
    *("four.example", "five.example", "x.five.example", "never.example", "example", None),
)
STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def why_not(kind: str) -> str | None:
    """Return what is missing here for the other router; None if nothing is."""
    there = shutil.which(COMMANDS[kind][0], path="/usr/sbin:/usr/bin:/sbin:/bin")
    if there is None or (kind == "nginx" and not STREAM.exists()):
        return f"{kind} is not installed (Debian package {PACKAGES[kind]})"
    return None


@contextlib.contextmanager
def router(kind: str, text: str, door: Path) -> Iterator[None]:
    """Run the other router."""
    config = door.with_suffix(".conf")
    config.write_text(text)
    command, *options = COMMANDS[kind]
    path = shutil.which(command, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert path is not None
    log = door.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen([path, *options, config], stdout=output, stderr=output)
    try:
        eventually(lambda: listens(door) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


def listens(door: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(door)) == 0


def connected(door: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(door))
    return client


def answer_of(client: socket.socket, name: str | None) -> bytes:
    """Return the word that comes back; b"" if it is none."""
    with client:
        client.settimeout(PATIENCE)
        client.sendall(hello_bytes(name))
        answer = receive_all(client)
    return b"" if answer.startswith(b"\x15") else answer


@pytest.mark.parametrize("kind", REAL)
def test_the_other_router_leads_to_the_same_backends(tmp_path: Path, kind: str) -> None:
    """With the same PROXY header, too, but for what is in it."""
    if missing := why_not(kind):
        pytest.skip(missing)
    paths = {name: tmp_path / f"{name}.sock" for name in ("a", "b", "c", "d")}
    names_map = tmp_path / "names.map"
    names_map.write_text("four.example b\nfive.example a\nfour.example a\n")
    door = tmp_path / "door"
    text = REAL[kind].format(door=door, map=names_map, load=f"load_module {STREAM};", **paths)
    printed = converted(kind, text, tmp_path)
    assert (printed.returncode, printed.stderr) == (0, "")
    done(printed.stdout, tmp_path)
    with contextlib.ExitStack() as ends:
        greeters = [
            ends.enter_context(Greeter(path, name.encode())) for name, path in paths.items()
        ]

        def asked(name: str | None, client: socket.socket) -> tuple[str | None, bytes, list[bool]]:
            """Return what comes back, and whether a PROXY header went before."""
            for greeter in greeters:
                greeter.heard.clear()
            word = answer_of(client, name)
            heard = [flight for greeter in greeters for flight in greeter.heard]
            # Who only looked whether somebody listens has said nothing.
            return name, word, [flight.startswith(b"PROXY ") for flight in heard if flight]

        with router(kind, text, door):
            theirs = [asked(name, connected(door)) for name in ASKED]
        with start_daemon(tmp_path / "hosts") as daemon:
            ours = [asked(name, daemon.connect()) for name in ASKED]
    assert ours == theirs
    assert {word for _, word, _ in ours} == {b"a", b"b", b"c", b"d"}


# --- What others wrote ---------------------------------------------------------------------------

HOSTILE = (
    "a;touch$IFS/canary.example",
    "$(touch${IFS}canary).example",
    "`touch canary`.example",
    "a'b.example",
    'a"b.example',
    "a\nb.example",
    "a\r\ntouch canary\n.example",
    "../../canary",
    "-canary.example",
    "--help",
    "a|touch canary",
    "a&touch canary",
    ">canary",
    "x\x1b]0;canary\x07.example",
    "\N{RIGHT-TO-LEFT OVERRIDE}canary.example",
    "a" * 300,
    "é\udcff.example",
    "*",
    "~/canary",
    "#",
)


def quoted(kind: str, text: str) -> str:
    """Write a word so that the router takes it for one."""
    if kind == "haproxy":
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def configuration(kind: str, name: str, path: str) -> str:
    """Return a configuration that leads a name to a path."""
    # An expression in the last one.
    name = "^one.example$" if (kind, name) == ("sniproxy", "one.example") else name
    name, path = quoted(kind, name), quoted(kind, f"unix:{path}")
    return {
        "nginx": f"stream {{ map $ssl_preread_server_name $x {{ hostnames; {name} {path}; }}\n"
        "server { proxy_pass $x; } }",
        "haproxy": f"frontend f\nuse_backend b if {{ req.ssl_sni {name} }}\n"
        f"backend b\nserver s {path.replace('unix:', 'unix@', 1)}\n",
        "sniproxy": f"listener 443 {{ table t }}\ntable t {{\n{name} {path}\n}}\n",
    }[kind]


@pytest.mark.parametrize("kind", ["nginx", "haproxy", "sniproxy"])
@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_names_and_paths(tmp_path: Path, kind: str, word: str) -> None:
    """What is run of them makes nothing but a link, if anything."""
    if kind == "haproxy":
        # It has no word over two lines.
        word = re.sub(r"[\r\n]", " ", word)
    for place, name, path in (
        (tmp_path / "name", word, "/run/s"),
        (tmp_path / "path", "one.example", f"/run/{word}"),
    ):
        place.mkdir()
        text = configuration(kind, name, path)
        (place / "conf").write_bytes(text.encode("utf-8", "surrogateescape"))
        answer = subprocess.run(
            [sys.executable, SCRIPT, kind, "conf"], cwd=place, capture_output=True
        )
        output = answer.stdout.decode("utf-8")
        # Nothing in there that a terminal obeys.
        assert all(c.isprintable() or c == "\n" for c in output + answer.stderr.decode("utf-8"))
        check_commands(output)
        tree = done(output, place)
        if name == word:
            assert (answer.returncode, tree) == (1, {})
        elif answer.returncode == 0:
            assert tree == host("one.example", to=path)
        else:
            assert tree == {}


COMMAND = re.compile(
    r"mkdir -m 0755 (?P<name>\S+) &&\n"
    r"(?:    touch (?P=name)/send-proxy-v[12] &&\n)?"
    r"(?:    ln -s (?P<path>'(?:[^'\n]|'\"'\"')*'|[A-Za-z0-9@%+=:,./_-]+) (?P=name)/tls-socket\n"
    r"|    echo (?P<setting>'ADDRESS=[][A-Za-z0-9:._-]+'|ADDRESS=[A-Za-z0-9:._-]+)"
    r" >(?P=name)/tcp-backend &&\n"
    r"    systemctl enable --now tcp-backend@(?P=name)\.socket\n)"
    r"|ln -sT (?P<target>\S+) _no-name\n"
    r"|#[^\n]*\n"
)


def check_commands(output: str) -> None:
    """See that there is nothing in the output but the commands that there may be."""
    at = 0
    while at < len(output):
        match = COMMAND.match(output, at)
        assert match is not None, output[at:]
        at = match.end()
        for name in filter(None, (match["name"], match["target"])):
            if name not in {"_unknown", "_no-name"}:
                name = name.removeprefix("_.")
                assert Hostname(name.encode()) == name
        if match[0].startswith("#"):
            # Who pastes it into a shell that takes comments for commands runs none of it.
            assert shlex.split(match[0].replace("#", "", 1))
            assert not re.search(r"[`$;&|<>()]", re.sub(r"'[^']*'|\"'\"", "", match[0]))


def module() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("coming_from", str(SCRIPT))
    spec = importlib.util.spec_from_loader("coming_from", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    # dataclasses look there for the module that they are in.
    sys.modules["coming_from"] = made
    loader.exec_module(made)
    return made


COMING_FROM = module()

PIECES = st.sampled_from(
    [
        *("stream {", "map $ssl_preread_server_name $x {", "hostnames;", "server {", "}", "{", ";"),
        *(
            "proxy_pass $x;",
            "listen 443;",
            "upstream u {",
            "default",
            "include",
            "proxy_protocol on;",
        ),
        *(
            "frontend f\n",
            "backend b\n",
            "\nuse_backend b if",
            "\nacl a req.ssl_sni -i",
            "\nserver s",
        ),
        *("{ req.ssl_sni -m end", "default_backend b", "or", "!", "a", "b", "u", "send-proxy"),
        *("listener 443 {", "table t", "table t {\n", "fallback", "\n", "proxy_protocol", "-m reg"),
        *("snid -mode unix", "-unix-directory /", "-default-hostname", "ExecStart="),
        *(
            ".example.com",
            "*.example.com",
            "one.example",
            r"^.*\.example\.net$",
            ".*",
            "unix:/run/s",
        ),
        *(
            "unix@/run/a b",
            "192.0.2.1:443",
            "[::1]:443",
            "'",
            '"',
            "\\",
            "#",
            "$(canary)",
            "`canary`",
        ),
        *("%[req.ssl_sni,lower,map(a)]", "\0", "\x1b", "~x", "é"),
    ]
)


@given(
    kind=st.sampled_from(["nginx", "haproxy", "snid", "sniproxy"]),
    pieces=st.lists(PIECES | st.text(max_size=5), max_size=30),
    glue=st.sampled_from([" ", "\n", ""]),
)
def test_any_file_makes_nothing_but_such_commands(kind: str, pieces: list[str], glue: str) -> None:
    text = glue.join(pieces)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        found = COMING_FROM.READERS[kind]([COMING_FROM.File("conf", text)])
        assert COMING_FROM.Printer().print(found) in {0, 1}
    check_commands(output.getvalue())


def test_a_big_file_takes_no_long_time(tmp_path: Path) -> None:
    """Each name is looked for once: ten thousand are done before pytest gives up."""
    lines = [f"use_backend b{n} if {{ req.ssl_sni n{n}.example }}" for n in range(10_000)]
    lines += [f"backend b{n}\nserver s /run/{n}" for n in range(10_000)]
    answer = converted("haproxy", "\n".join(["frontend f", *lines]), tmp_path)
    assert answer.returncode == 0
    assert answer.stdout.count("mkdir") == 10_000


# --- The page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_page_shows_what_is_printed(tmp_path: Path, kind: str) -> None:
    config, command, output = EXAMPLES[kind]
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    text, shown = config.text, output.text
    with contextlib.ExitStack() as ends:
        if kind == "snid":
            # Not in the /run of this machine.
            directory = tmp_path / "snid"
            directory.mkdir()
            for name in "one.example", "_.two.example":
                listening = ends.enter_context(socket.socket(socket.AF_UNIX))
                listening.bind(str(directory / name))
            text = text.replace("/run/snid", str(directory))
            shown = shown.replace("/run/snid", str(directory))
        (tmp_path / config.path).write_text(text)
        answer = subprocess.run(
            ["sh", "-c", command.text], cwd=tmp_path, capture_output=True, text=True
        )
    assert answer.stdout == shown
    assert done(answer.stdout, tmp_path)


def test_every_block_is_run_somewhere() -> None:
    places = Path(__file__), *(ROOT / "tests/service").glob("test_co*.py")
    texts = "".join(place.read_text() for place in places)
    assert set(re.findall(r'PAGE\["(.+?)"\]', texts)) == set(PAGE)
