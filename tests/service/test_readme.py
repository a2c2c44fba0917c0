"""README.md and docs/running.md, done as they say, on a new Debian 12 and on a new Debian 13.

The machine has the packages that the pages name, a clone of the checkout, and a network that ends
at its own loopback interface; what pip would fetch is there already.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import pytest

from tests.support.machine import Machine, why_no_machine
from tests.support.tenants import Page
from tests.support.units import wait_for_log

ROOT: Final = Path(__file__).parents[2]
README = Page(ROOT / "README.md")
RUNNING = Page(ROOT / "docs/running.md")

# What the pages take, and what else their servers and checks do.
PACKAGES: Final = ("b3sum", "haproxy", "iproute2", "nftables", "nginx-light", "procps")

CHECKOUT: Final = "/root/sniproxy"

# Seconds. An environment takes ten or twenty to be made, three keys of RSA some more.
_BLOCK: Final = 120.0

FETCH: Final = (
    "curl --silent --show-error --cacert ~/one.crt --resolve {0}:443:127.0.0.1 https://{0}/"
)


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    if missing := why_no_machine():
        pytest.skip(missing)
    with Machine(PACKAGES, request.param) as machine:
        machine.bring_checkout(CHECKOUT, "bridge", "pod", "tproxy")
        # The services that Debian starts with the packages: nothing of theirs is in the way.
        machine.run("systemctl", "stop", "nginx", "haproxy")
        yield machine


class Person:
    """Somebody who types what a page says, as root in the checkout, in a shell."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def type(self, text: str, *, place: str = CHECKOUT, code: int = 0) -> str:
        """Type it, and return what is seen until the shell has ended."""
        # What goes on in the background keeps the shell's output open.
        script = f"exec >/run/seen 2>&1; cd {place}; {text}"
        done = self._machine.run("bash", "-c", script, check=False, timeout=_BLOCK)
        seen = self._machine.run("cat", "/run/seen").stdout
        assert done.returncode == code, seen
        return seen

    @contextmanager
    def start(self, text: str, *, place: str = CHECKOUT) -> Iterator[IO[str]]:
        """Type what stays in the foreground; yield what is seen, line by line.

        At the end of the block it has been interrupted.
        """
        with self._machine.start("bash", "-c", f"exec 2>&1; cd {place}; {text}") as process:
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.terminate()

    def fetch(self, name: str = "one.example", code: int = 0) -> str:
        return self.type(FETCH.format(name), code=code)


@pytest.fixture
def person(machine: Machine) -> Person:
    return Person(machine)


def said(command: str, page: Page = README) -> str:
    """Return a command that the page has within its text."""
    assert f"`{command}`" in page.text.replace("\n", " ")
    return command


def test_every_block_is_run_here() -> None:
    here = Path(__file__).read_text()
    for name, page in ("README", README), ("RUNNING", RUNNING):
        # Those that run only where there is buildah, and those of one language with a name in it.
        elsewhere = {"image", "container"} if name == "RUNNING" else set()
        assert set(re.findall(rf'{name}\["(.+?)"\]', here)) == set(page) - elsewhere
        assert page.text.count("```sh\n") == len(re.findall(r"-->\n```sh\n", page.text))


def test_the_demo(machine: Machine, person: Person) -> None:
    with person.start(README["demo"].text) as seen:
        before = []
        for line in seen:
            before.append(line)
            if "Ctrl-C ends the sites" in line:
                break
        else:
            pytest.fail("".join(before))
        machine.run("pkill", "-INT", "-f", "scripts/demo")
        assert not seen.read().strip()  # and nothing is left that could say anything


def test_from_a_clone_to_hosts_of_ones_own(machine: Machine, person: Person) -> None:
    """From the first command to the last, in the order of the page."""
    person.type(README["install"].text)

    stays, ends = README["two commands"].text.splitlines()
    with person.start(stays, place="/") as seen:
        assert "listening address=[::]:443" in seen.readline() + seen.readline()
        assert person.type(ends) == "xn--sr8hvo.ws\n"
        assert ends.endswith("# prints xn--sr8hvo.ws")
        machine.run("pkill", "-INT", "sniproxy")
        assert "drained" in seen.read()

    person.type(README["unit"].text)
    assert "New, TLSv1.3" in person.type(README["first host"].text)
    assert "unrecognized name" in person.fetch("two.example", code=35)
    found = person.type(README["check"].text, place="/", code=1)
    assert "one.example  served" in found
    assert "two.example  no_such_host" in found
    ends_it = said("kill %1; rm /srv/hosts/one.example/tls-socket")
    person.type(ends_it.replace("kill %1", "pkill openssl"))
    assert "unrecognized name" in person.fetch(code=35)

    person.type(README["nginx"].text)
    assert person.fetch() == "nginx is here\n"
    header = README["nginx with a header"].text
    configuration = "/etc/nginx/conf.d/one.example.conf"
    lines = machine.run("cat", configuration).stdout.splitlines(keepends=True)
    listen = next(line for line in lines if "listen" in line)
    machine.write(configuration, "".join(lines).replace(listen, header))
    person.type("systemctl restart nginx")
    person.type(said("touch /srv/hosts/one.example/send-proxy-v2"))
    assert person.fetch() == "nginx is here\n"
    assert machine.run("tail", "-n1", "/var/log/nginx/access.log").stdout.startswith("127.0.0.1 ")
    machine.run("systemctl", "stop", "nginx")

    machine.run("rm", "/srv/hosts/one.example/send-proxy-v2")
    person.type(README["haproxy"].text)
    assert person.fetch() == "HAProxy is here\n"
    header = README["HAProxy with a header"].text
    configuration = "/etc/haproxy/haproxy.cfg"
    text = machine.run("cat", configuration).stdout
    bind = next(line for line in text.splitlines(keepends=True) if "one.example" in line)
    machine.write(configuration, text.replace(bind, header))
    person.type("systemctl restart haproxy")
    person.type(said("touch /srv/hosts/one.example/send-proxy-v2"))
    assert person.fetch() == "HAProxy is here\n"

    person.type(said("echo 30 >/srv/hosts/one.example/hold"))
    restart = "(sleep 1; systemctl stop haproxy; sleep 1; systemctl start haproxy) &"
    visits = f"{restart} for visit in $(seq 200); do {FETCH.format('one.example')} || exit; done"
    assert person.type(f"{visits}; wait") == "HAProxy is here\n" * 200
    person.type(said("ln -s 30 one.example/hold").replace("ln -s", "ln -sfT"), place="/srv/hosts")
    person.type("systemctl restart haproxy; " + FETCH.format("one.example"))
    # In its sandbox, and with the unit's filter of system calls.
    assert "forbids=new_privileges,files," in wait_for_log(machine, "sandbox")[1]


def test_links(machine: Machine, person: Person) -> None:
    hosts = "/srv/hosts"
    person.type("mkdir -p one.example .green; rm -f one.example/tls-socket", place=hosts)
    person.type(README["links"].text, place=hosts)
    person.type(README["links"].text, place=hosts)
    links = person.type("readlink one.example/tls-socket two.example", place=hosts)
    assert links == "green.socket\n.green\n"


def test_hashed_names(machine: Machine, person: Person) -> None:
    place = person.type("mktemp -d").strip()
    seen = person.type(README["hashed"].text, place=place)
    assert seen == person.type("ls", place=place)
    assert len(seen) == 65


def test_an_upgrade(machine: Machine, person: Person) -> None:
    person.type("cp systemd/sniproxy@.service /etc/systemd/system/; systemctl daemon-reload")
    person.type("systemctl start sniproxy")
    person.type(RUNNING["upgrade"].text)
    assert person.type("systemctl is-active sniproxy") == "active\n"
    person.type("systemctl is-active sniproxy@next", code=3)


def test_by_hand(machine: Machine, person: Person) -> None:
    """The port is free for it, and the user has been made."""
    assert RUNNING["user"].text + RUNNING["unit"].text == README["unit"].text
    person.type("systemctl stop sniproxy.socket sniproxy.service; mkdir -p /srv/hosts")
    with person.start(RUNNING["by hand"].text, place="/") as seen:
        assert "listening" in seen.readline() + seen.readline()
        pid = machine.run("pgrep", "sniproxy").stdout.strip()
        assert machine.run("stat", "--format=%U", f"/proc/{pid}").stdout == "sniproxy\n"
        machine.run("pkill", "-INT", "sniproxy")
        assert "drained" in seen.read()

    machine.write("/usr/local/bin/keep-port", RUNNING["keep-port"].text, mode=0o755)
    [how] = re.findall(r"# keep-port. Run it so: (.+)", RUNNING["keep-port"].text)
    with person.start(how, place="/") as seen:
        assert "listening" in seen.readline() + seen.readline()
        machine.run("pkill", "-HUP", "-f", "keep-port")
        assert any("drained" in line for line in seen)
        machine.run("pkill", "-TERM", "-f", "/usr/local/bin/keep-port")
        assert "drained" in seen.read()


@pytest.mark.parametrize(
    ("program", "alone", "sees"),
    [
        ("bridge", False, "hello\n"),
        ("tproxy", True, "Subject: CN = client.example"),
        ("pod", True, "<title>Directory listing for /</title>"),
    ],
)
def test_those_that_speak_tls(
    machine: Machine, person: Person, program: str, alone: bool, sees: str
) -> None:
    blocks = {
        "bridge": (README["install bridge"], README["bridge"]),
        "tproxy": (README["install tproxy"], README["tproxy"]),
        "pod": (README["install pod"], README["pod"]),
    }
    install, example = blocks[program]
    place = person.type("mktemp -d").strip()
    # In one shell, since the first says where its programs are. It ends with all that it started.
    script = f"{install.text}\ncd {place}\n{example.text}"
    machine.write("/run/example", script)
    # "in a shell with a network of its own": unshare --net
    network = ["--net"] if alone else []
    shell = f"unshare {' '.join(network)} --pid --fork --kill-child --mount-proc bash /run/example"
    if alone:
        assert "`unshare --net`" in README.text
    assert sees.replace(" = ", "=") in person.type(shell).replace(" = ", "=")
