"""What is said of the library of scripts/preload on its page, done as it says there."""

import configparser
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Certificates
from tests.support.daemon import Daemon, eventually
from tests.support.enclosure import why_no_enclosure
from tests.support.tenants import Block, Page, SharedMachine

ROOT = Path(__file__).parents[2]
PAGE = Page(ROOT / "docs/handing-over.md")
HOSTING = Page(ROOT / "docs/hosting.md")

NAME = "two.example"
SOCKET = f"/srv/hosts/{NAME}/handoff-socket"

# Two clients. The configurations have something against the second.
CLIENT, UNWANTED = "127.0.0.7", "127.0.0.8"


def needs(program: str, package: str) -> pytest.MarkDecorator:
    there = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    return pytest.mark.skipif(
        there is None, reason=f"{program} is not installed (Debian package {package})"
    )


needs_nginx = needs("nginx", "nginx-light")
pytestmark = needs("cc", "gcc")


@pytest.fixture(scope="module")
def lasting_machine() -> Iterator[SharedMachine]:
    if missing := why_no_enclosure():
        pytest.skip(missing)
    with SharedMachine() as machine:
        machine.root(HOSTING["before"].text)
        # What is made and installed is no affair of the machine outside, nor of this checkout.
        machine.root(
            "mkdir -p /run/lib /run/lib-work /run/checkout/scripts; mount -t overlay "
            "-o lowerdir=/usr/local/lib,upperdir=/run/lib,workdir=/run/lib-work overlay "
            f"/usr/local/lib; cp {ROOT}/scripts/preload /run/checkout/scripts; "
            f"cp -R {ROOT}/packaging /run/checkout"
        )
        machine.root(f"cd /run/checkout; {PAGE['preload'].text}")
        yield machine


@pytest.fixture
def site(lasting_machine: SharedMachine, certificates: Certificates) -> Iterator["Site"]:
    with lasting_machine.daemon("--handoff") as daemon:
        yield Site(lasting_machine, daemon, certificates)
    lasting_machine.clean()


class Site:
    """The host of the tenant `two`."""

    def __init__(self, machine: SharedMachine, daemon: Daemon, certificates: Certificates) -> None:
        self.machine = machine
        self.daemon = daemon
        self._authority = certificates.authority
        machine.follow(HOSTING["reviewed"])
        pair = certificates.for_client(NAME)
        certificate, key = pair.certificate.read_text(), pair.key.read_text()
        for name, text in ("crt", certificate), ("key", key), ("pem", certificate + key):
            machine.write(f"/home/two/two.{name}", text, "two")

    def start(self, server: Block, user: str | None = None) -> None:
        """Have `two`, or another user, run the server, and wait until it is there."""
        self.machine.write(server.path, server.text, server.user)
        self.machine.start(user or server.user, f"cd /home/two; {server.command}")
        eventually(self.is_there)

    def get(self, path: str = "/", client: str = CLIENT) -> str:
        """Return a page of the site, or what curl has to say in its place."""
        return self.machine.root(
            f"curl --silent --show-error --fail --interface {client} "
            f"--cacert {self._authority} https://{NAME}{path} 2>&1 || true"
        )

    def is_there(self) -> bool:
        """Whether somebody serves it."""
        return not self.get().startswith("curl: ")

    def signal(self, program: str, number: signal.Signals) -> None:
        """Send a signal to the server's first process."""
        os.kill(min(self.machine.inside.processes(program)), number)

    def kill(self, program: str) -> None:
        """Have the server crash, with all its processes."""
        for pid in self.machine.inside.processes(program):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.machine.inside.processes(program))

    def mode(self) -> str:
        """Return that of the socket."""
        return self.machine.root(f"stat -c %a {SOCKET}").strip()

    def inode(self) -> int:
        """Return which socket it is."""
        return self.machine.outside(SOCKET).stat().st_ino

    def refuses(self) -> str:
        """Return what a client is refused for."""
        before = len(self.daemon.log())
        assert not self.is_there()
        eventually(lambda: len(self.daemon.log()) > before)
        [reason] = re.findall(f"name={NAME} reason=(\\w+) ", self.daemon.log()[-1])
        return str(reason)


def test_every_block_is_run_here() -> None:
    here = Path(__file__).read_text()
    blocks = {name for name in PAGE if name.startswith("preload")}
    assert set(re.findall(r'PAGE\["(.+?)"\]', here)) | {"preload"} == blocks


@needs_nginx
def test_nginx(site: Site) -> None:
    nginx = PAGE["preload nginx"]
    site.machine.tenant("two", "mkdir -m 755 site; echo private >site/private; chmod 711 .")
    site.start(nginx)
    assert site.get() == f"{CLIENT}\n"
    assert site.get("/private") == "private\n"
    assert "403" in site.get("/private", UNWANTED)
    assert site.machine.outside("/home/two/access.log").read_text().startswith(f"{CLIENT} - ")
    assert site.mode() == "666"
    # "stays over a reload (SIGHUP)"
    inode = site.inode()
    site.machine.write(nginx.path, nginx.text.replace('"$', '"again $'), nginx.user)
    site.signal("nginx", signal.SIGHUP)
    eventually(lambda: site.get() == f"again {CLIENT}\n")
    assert site.inode() == inode
    # "is removed when nginx ends in order"
    site.signal("nginx", signal.SIGTERM)
    eventually(lambda: not site.machine.outside(SOCKET).exists())
    eventually(lambda: not site.machine.inside.processes("nginx"))
    # "and stands in its way after a crash": test_hosting.py has the words for it.
    site.start(nginx)
    site.kill("nginx")
    assert site.refuses() == "not_listening"
    assert site.machine.outside(SOCKET).is_socket()


@needs_nginx
def test_a_server_that_root_starts(site: Site) -> None:
    nginx = PAGE["preload nginx"]
    site.machine.write(nginx.path, nginx.text, nginx.user)
    site.machine.start("root", f"cd /home/two; {nginx.command}")
    eventually(site.machine.outside(SOCKET).exists)
    assert site.refuses() == "wrong_owner"
    # "needs a directory of root's"
    site.machine.root(f"chown root /srv/hosts/{NAME}")
    assert site.get() == f"{CLIENT}\n"


@needs_nginx
def test_a_link_will_not_do(site: Site) -> None:
    nginx = PAGE["preload nginx"]
    elsewhere = nginx.text.replace(SOCKET, "/home/two/nginx.socket")
    site.machine.tenant("two", f"chmod 711 .; ln -s ~/nginx.socket {SOCKET}")
    site.machine.write(nginx.path, elsewhere, nginx.user)
    site.machine.start(nginx.user, nginx.command)
    eventually(site.machine.outside("/home/two/nginx.socket").exists)
    # Handed over, and not understood.
    assert not site.is_there()
    site.kill("nginx")
    # The other way round it does: what counts is what the server says.
    site.machine.tenant("two", f"rm {SOCKET}; ln -s {SOCKET} ~/site.socket")
    site.start(nginx)
    assert site.get() == f"{CLIENT}\n"


@needs("haproxy", "haproxy")
def test_haproxy(site: Site) -> None:
    haproxy = PAGE["preload haproxy"]
    site.start(haproxy)
    assert site.get() == f"{CLIENT}\n"
    assert "403" in site.get(client=UNWANTED)
    assert site.mode() == "666"
    # "Reload with SIGUSR2."
    text = haproxy.text.replace('"%[src]', '"again %[src]')
    site.machine.write(haproxy.path, text, haproxy.user)
    site.signal("haproxy", signal.SIGUSR2)
    eventually(lambda: site.get() == f"again {CLIENT}\n")
    # "It replaces a socket that was left over."
    site.kill("haproxy")
    assert site.machine.outside(SOCKET).is_socket()
    site.start(haproxy)
    assert site.get() == f"{CLIENT}\n"


@needs_nginx
def test_a_unit(site: Site) -> None:
    dropin = PAGE["preload unit"]
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(HOSTING["unit"].text)
    start = unit["Service"]["ExecStart"]
    unit.read_string(dropin.text)
    service = unit["Service"]
    # A crash lies behind us.
    nginx = PAGE["preload nginx"]
    site.start(nginx)
    site.kill("nginx")
    site.machine.tenant(service["User"], service["ExecStartPre"])
    site.machine.start(service["User"], f"export {service['Environment']}; {start}")
    eventually(site.is_there)
    assert site.get() == f"{CLIENT}\n"


@needs("systemd-analyze", "systemd")
def test_systemd_understands_the_drop_in(site: Site) -> None:
    unit, dropin = HOSTING["unit"], PAGE["preload unit"]
    site.machine.write(unit.path, unit.text, "root")
    site.machine.root(f"mkdir -p {Path(dropin.path).parent}")

    def complaints(text: str) -> str:
        site.machine.write(dropin.path, text, "root")
        # It looks at all other units that this one needs, too.
        verify = f"systemd-analyze verify --recursive-errors=no {unit.path} 2>&1 || true"
        return "\n".join(re.findall(".*two.service.*", site.machine.root(verify)))

    assert complaints(dropin.text) == ""
    assert "Environ'" in complaints(dropin.text.replace("Environment", "Environ"))


# What becomes of each connection: a shell that knows whom it is from.
STUNNEL = f"""
foreground = yes
pid =
[site]
accept = {SOCKET}
cert = /home/two/two.pem
exec = /bin/sh
execArgs = sh answer
"""
ANSWER = r"""
while read -r line && [ "$line" != "$(printf "\r")" ]; do :; done
printf "HTTP/1.0 200 OK\r\n\r\n$REMOTE_HOST\n"
"""


@needs("stunnel4", "stunnel4")
def test_stunnel(site: Site) -> None:
    site.machine.write("/home/two/stunnel.conf", STUNNEL, "two")
    site.machine.write("/home/two/answer", ANSWER, "two")
    [preload] = re.findall("with\n`(LD_PRELOAD=\\S+) nginx", PAGE.text)
    site.machine.start("two", f"umask 0; {preload} exec stunnel4 stunnel.conf 2>stunnel.log")
    eventually(site.is_there)
    assert site.get() == f"{CLIENT}\n"


def test_who_has_more_rights_than_who_starts_it_has_no_library(site: Site) -> None:
    """ld.so(8), secure-execution mode."""
    site.machine.root("cp /bin/cat /srv/cat; cp /bin/cat /srv/rights; chmod u+s /srv/rights")
    [preload] = re.findall("with\n`(LD_PRELOAD=\\S+) nginx", PAGE.text)
    assert "`grep sniproxy-handoff /proc/PID/maps`" in PAGE.text
    for program, has_it in ("cat", True), ("rights", False):
        maps = site.machine.tenant("two", f"{preload} /srv/{program} /proc/self/maps")
        assert ("sniproxy-handoff" in maps) == has_it


@needs("apache2", "apache2-bin")
def test_apache(site: Site) -> None:
    """It "listens on no Unix socket"."""
    site.machine.write(
        "/home/two/apache.conf",
        "ServerRoot /home/two\nDefaultRuntimeDir /home/two\nErrorLog error.log\n"
        "LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so\n"
        f"Listen {SOCKET}\n",
        "two",
    )
    answer = site.machine.tenant("two", "! apache2 -t -f ~/apache.conf")
    assert "Port must be specified" in answer
