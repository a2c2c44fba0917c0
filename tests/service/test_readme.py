"""README.md and what it leads to, done as they say, on a new Debian 12 and on a new Debian 13.

The machine has the packages that the pages name, a clone of the checkout, and a network that ends
at its own loopback interface; what pip would fetch is there already.
"""

import faulthandler
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import pytest

from tests.support.daemon import eventually
from tests.support.machine import Machine, why_no_machine
from tests.support.tenants import Page
from tests.support.units import wait_for_log

ROOT: Final = Path(__file__).parents[2]
README = Page(ROOT / "README.md")
RUNNING = Page(ROOT / "docs/running.md")
MANY_MACHINES = Page(ROOT / "docs/many-machines.md")
TROUBLES = Page(ROOT / "docs/troubles.md")
COMING_FROM = Page(ROOT / "docs/coming-from.md")
KUBERNETES = Page(ROOT / "kubernetes/README.md")

# What the pages take, and what else their servers and checks do.
PACKAGES: Final = (
    *("acl", "b3sum", "haproxy", "iproute2", "nftables", "nginx-light", "procps"),
    # For the tests of the other pages.
    *("apache2-bin", "caddy", "execline", "fish", "libnginx-mod-stream", "s6", "socat", "zsh"),
)

# Those of pages whose commands other tests run.
OTHERS: Final = (
    "tests/service/test_hosting.py",
    "tests/service/test_s6.py",
    "tests/service/test_coming_from.py",
    "tests/test_coming_from.py",
    "tests/test_completions.py",
    "tests/tls_tproxy/test_checkers.py",
)

CHECKOUT: Final = "/root/sniproxy"

# Seconds. An environment takes ten or twenty to be made, three keys of RSA some more.
_BLOCK: Final = 120.0
_OTHERS: Final = 600.0

FETCH: Final = (
    "curl --silent --show-error --cacert ~/one.crt --resolve {0}:443:127.0.0.1 https://{0}/"
)


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    if missing := why_no_machine():
        pytest.skip(missing)
    with Machine(PACKAGES, request.param) as machine:
        machine.bring_checkout(CHECKOUT, "bridge", "pod", "tproxy", group="test")
        # The services that Debian starts with the packages: nothing of theirs is in the way.
        machine.run("systemctl", "stop", "caddy", "haproxy", "nginx")
        yield machine


class Person:
    """Somebody who types what a page says, as root in the checkout, in a shell."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def type(
        self, text: str, *, place: str = CHECKOUT, code: int = 0, timeout: float = _BLOCK
    ) -> str:
        """Type it, and return what is seen until the shell has ended."""
        # What goes on in the background keeps the shell's output open.
        script = f"exec >/run/seen 2>&1; cd {place}; {text}"
        done = self._machine.run("bash", "-c", script, check=False, timeout=timeout)
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
    # What people type may take longer than a test should.
    faulthandler.cancel_dump_traceback_later()
    return Person(machine)


def said(command: str, page: Page = README) -> str:
    """Return a command that the page has within its text."""
    assert f"`{command}`" in page.text.replace("\n", " ")
    return command


def test_every_block_is_run_here() -> None:
    here = Path(__file__).read_text()
    for name, page in {
        "README": README,
        "RUNNING": RUNNING,
        "MANY_MACHINES": MANY_MACHINES,
        "TROUBLES": TROUBLES,
        "KUBERNETES": KUBERNETES,
    }.items():
        # In test_container.py, which needs buildah; and in tests/tls_bridge, the rules of nftables.
        elsewhere = {"image", "container", "both", "one"}
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
    # In order: whom it has begun to serve it finishes. Then systemd starts it anew.
    # It starts no service more than five times in ten seconds, unless it is told to forget that.
    end = "systemctl reset-failed haproxy; systemctl kill --kill-whom=main --signal=USR1 haproxy"
    restart = f"(for each in 1 2 3; do sleep 1; {end}; done) &"
    visits = f"{restart} for visit in $(seq 200); do {FETCH.format('one.example')} || exit; done"
    assert person.type(f"{visits}; wait") == "HAProxy is here\n" * 200
    person.type(said("ln -s 30 one.example/hold").replace("ln -s", "ln -sfT"), place="/srv/hosts")
    restart = "systemctl reset-failed haproxy; systemctl restart haproxy"
    assert person.type(f"{restart}; {FETCH.format('one.example')}") == "HAProxy is here\n"
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
    person.type(RUNNING["reload"].text)
    assert "taken=" in wait_for_log(machine, "taken_over")[1]
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

    with person.start(RUNNING["by hand with upgrades"].text, place="/") as seen:
        assert "listening" in seen.readline() + seen.readline()
        assert not person.type(RUNNING["upgrade by hand"].text, place="/")
        assert any("taken_over" in line for line in seen)
        pids = machine.run("pgrep", "sniproxy").stdout.split()
        users = machine.run("stat", "--format=%U", *(f"/proc/{pid}" for pid in pids)).stdout
        assert set(users.split()) == {"sniproxy"}
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


# Both sides on one machine, with the files that the page shows.
_FRONT_AND_PEER: Final = """
set -e
front=/srv/front peer=/srv/peer
mkdir -p $front/hosts/site.example $front/peers/rack/identity
mkdir -p $peer/identity $peer/clients $peer/allow/site.example
cd /srv; openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=authority -keyout ca.key -out ca.pem
for side in $front/peers/rack/identity:front-1.example $peer/identity:peer.example; do
    at=${side%:*}; cp ca.pem $at/
    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=${side#*:} -CA ca.pem -CAkey ca.key \
        -addext subjectAltName=DNS:${side#*:} -addext basicConstraints=critical,CA:FALSE \
        -keyout $at/key.pem -out $at/cert.pem
done
echo rack >$front/hosts/site.example/peer
ln -s ../../run/bridge $front/hosts/site.example/tls-socket
echo 127.0.0.1:8443 >$front/peers/rack/address
echo peer.example >$front/peers/rack/server-name
touch $peer/clients/front-1.example
echo 127.0.0.1:4443 >$peer/allow/site.example/443
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=site.example \
    -addext subjectAltName=DNS:site.example -keyout ~/site.key -out ~/site.crt
openssl s_server -accept 127.0.0.1:4443 -www -cert ~/site.crt -key ~/site.key &
"""


def test_many_machines(machine: Machine, person: Person) -> None:
    person.type(_FRONT_AND_PEER)
    programs = "export PATH=~/bridge/bin:/opt/sniproxy/bin:$PATH; "
    person.type(programs + MANY_MACHINES["peer"].text)
    person.type(programs + MANY_MACHINES["front"].text)
    fetch = FETCH.format("site.example").replace("one.crt", "site.crt")
    eventually(lambda: "New, TLSv1.3" in person.type(f"{fetch} || true"))
    # Nobody is root any more, but who serves the site.
    users = person.type("ps -o user= -C tls-bridge,tls-bridge-peer,sniproxy | sort -u")
    assert users == "sniproxy\ntls-bridge\n"
    person.type("pkill tls-bridge; pkill sniproxy; pkill openssl", code=0)


def test_troubles(machine: Machine, person: Person) -> None:
    # As the page has it: two.example is a tenant's, whose home is closed to the daemon.
    person.type(
        "useradd --create-home two; install -d -m 0700 -o two /home/two/site; "
        "ln -sfn /home/two/site /srv/hosts/two.example; chmod 0700 /home/two; cd /home/two/site; "
        "(umask 077; exec setpriv --reuid=two --regid=two --clear-groups "
        "openssl s_server -unix tls-socket -www -nocert -cipher aNULL) & sleep 1",
    )
    options = "--status-socket /run/%N/status"
    override = (
        f"[Service]\nExecStart=\nExecStart=/opt/sniproxy/bin/sniproxy {options}\n"
        "BindReadOnlyPaths=/home\n"
    )
    machine.write("/etc/systemd/system/sniproxy.service.d/override.conf", override)
    units = "sniproxy.socket sniproxy.service"
    person.type(f"systemctl daemon-reload; systemctl stop {units}; systemctl start {units}")
    person.fetch("two.example", code=35)

    check, journal, status = TROUBLES["first"].text.splitlines()
    found = person.type(check.replace("check", "check --as sniproxy"), place="/srv/hosts", code=1)
    assert "permission_denied" in found
    assert "reason=permission_denied" in person.type(journal)
    assert "permission_denied" in person.type(status.replace("PATH", "/run/sniproxy/status"))

    rights = TROUBLES["rights"].text
    person.type("setfacl -m u:sniproxy:x /home/two/site")
    assert person.type(rights).endswith("good\n")
    # Nobody's process may be left of a user who goes.
    gone = "pkill openssl; while pgrep --uid two; do sleep 0.1; done; userdel --remove two"
    person.type(f"rm /srv/hosts/two.example; {gone}")

    pin = person.type("cp ~/one.crt server.pem; " + TROUBLES["pin"].text)
    assert re.fullmatch(r"[A-Za-z0-9+/]{43}=\n", pin)


def test_a_tcp_backend(machine: Machine, person: Person) -> None:
    for block in COMING_FROM["tcp socket"], COMING_FROM["tcp service"]:
        machine.write(block.path, block.text)
    person.type(
        "systemctl daemon-reload; rm -rf /srv/hosts/one.example; "
        "openssl s_server -accept 127.0.0.1:8443 -www -cert ~/one.crt -key ~/one.key & sleep 1"
    )
    person.type(COMING_FROM["tcp host"].text)
    assert "New, TLSv1.3" in person.fetch()
    person.type(f"{COMING_FROM['tcp leave'].text}pkill openssl")
    assert "unrecognized name" in person.fetch(code=35)


def test_kubernetes(machine: Machine, person: Person) -> None:
    """With a stand-in for kubectl, which needs a cluster: it notes what it is given."""
    machine.write(
        "/usr/local/bin/kubectl",
        '#!/bin/sh\necho "kubectl $*" >>/run/kubectl\n'
        '[ "$*" != "apply -f -" ] || cat >/run/applied\n',
        mode=0o755,
    )
    programs = "export PATH=~/pod/bin:$PATH; set -e; "
    person.type(programs + KUBERNETES["authority"].text)
    names = person.type("openssl verify -CAfile ca.crt tls.crt")
    assert names == "tls.crt: OK\n"
    person.type(programs + KUBERNETES["apply"].text)
    person.type(programs + KUBERNETES["webhook"].text)
    applied = machine.run("cat", "/run/applied").stdout
    assert applied.count("image: tproxy-pod:1") == 2
    calls = machine.run("cat", "/run/kubectl").stdout.splitlines()
    assert [call.split()[1] for call in calls] == [
        *("create", "apply", "apply", "logs", "logs", "apply", "label")
    ]
    # The files that it is given are there.
    for call in calls:
        for word in call.split():
            if word.endswith(".yaml"):
                person.type(f"test -f {word}")


def test_the_other_pages(machine: Machine, person: Person) -> None:
    """Those that run here, as the tests do, are run on Debian 13, too."""
    if "trixie" not in machine.run("cat", "/etc/os-release").stdout:
        pytest.skip("they run on this Debian by themselves, as tests of their own")
    # They make the same users.
    person.type("systemctl stop sniproxy.socket sniproxy; userdel sniproxy; userdel tls-bridge")
    # Not in /opt, /run or /srv, where the tests have things of their own.
    person.type("python3 -m venv /var/tests && /var/tests/bin/pip install -e . --group test")
    pytest_ = "PATH=/var/tests/bin:$PATH CI=yes python -m pytest -q -rs -p no:cacheprovider"
    seen = person.type(f"{pytest_} {' '.join(OTHERS)}", timeout=_OTHERS)
    sys.stdout.write(seen)  # what was skipped, and why
