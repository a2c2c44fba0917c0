"""docs/hosting.md, done as it says: its blocks are run, and what it claims of tenants is tried."""

import configparser
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.certificates import Certificates
from tests.support.daemon import Daemon, eventually
from tests.support.enclosure import why_no_enclosure
from tests.support.greeting import UNRECOGNIZED_NAME
from tests.support.sockets import receive_all, receive_exactly
from tests.support.tenants import Block, Page, SharedMachine

PAGE = Page(Path(__file__).parents[2] / "docs/hosting.md")

NAME = "two.example"
DIRECTORY = f"/srv/hosts/{NAME}"
SOCKET = f"{DIRECTORY}/tls-socket"

# A client's address that is not the first to come to mind.
CLIENT = "127.0.0.7"

# As the page says, and sniproxy/engine/pipes.py.
PIPES = 32


def needs(program: str, package: str) -> pytest.MarkDecorator:
    there = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    return pytest.mark.skipif(
        there is None, reason=f"{program} is not installed (Debian package {package})"
    )


needs_setfacl = needs("setfacl", "acl")
needs_nginx = needs("nginx", "nginx-light")
needs_haproxy = needs("haproxy", "haproxy")


@pytest.fixture(scope="module")
def lasting_machine() -> Iterator[SharedMachine]:
    if missing := why_no_enclosure():
        pytest.skip(missing)
    with SharedMachine() as machine:
        machine.follow(PAGE["before"])
        yield machine


@pytest.fixture
def machine(lasting_machine: SharedMachine) -> Iterator[SharedMachine]:
    yield lasting_machine
    lasting_machine.clean()


@pytest.fixture
def daemon(machine: SharedMachine) -> Iterator[Daemon]:
    with machine.daemon() as daemon:
        yield daemon


def cannot(machine: SharedMachine, user: str, command: str) -> None:
    """Make sure that the user has no right to do it."""
    answer = machine.tenant(user, f"! {command}")
    assert "Permission denied" in answer or "Operation not permitted" in answer, answer


def is_refused(machine: SharedMachine, daemon: Daemon, reason: str, name: str = NAME) -> bool:
    """Whether a client of the host is told that there is none, and the log gives this reason."""
    before = len(daemon.log())
    assert machine.ask(daemon, name) == UNRECOGNIZED_NAME
    eventually(lambda: len(daemon.log()) > before)
    return f"name={name} reason={reason} " in daemon.log()[-1]


def said(command: str) -> str:
    """Return a command, or a line of a configuration, if the page has it within its text."""
    assert f"`{command}`" in PAGE.text
    return command


def check(machine: SharedMachine) -> str:
    """Return what the check list has to say."""
    return machine.root("set +e\n" + PAGE["check"].text + "true")


def test_every_block_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert set(re.findall(r'PAGE\["(.+?)"\]', here)) == set(PAGE)


# Who hands out names.


def test_a_reviewed_name(machine: SharedMachine, daemon: Daemon) -> None:
    machine.follow(PAGE["reviewed"])
    machine.listen("two", SOCKET, "two")
    assert machine.ask(daemon, NAME) == b"two"
    # "two can't rename, remove or give away the directory."
    for command in f"mv {DIRECTORY} /srv/hosts/x", f"rmdir {DIRECTORY}", f"chown three {DIRECTORY}":
        cannot(machine, "two", command)
    # "No other tenant can look in"
    for command in f"ls {DIRECTORY}", f"stat {SOCKET}", "mkdir /srv/hosts/www.two.example":
        cannot(machine, "three", command)
    machine.tenant("two", f"chmod 700 {DIRECTORY}")
    assert is_refused(machine, daemon, "permission_denied")


def test_a_reviewed_name_hashed(machine: SharedMachine) -> None:
    hashed = said(f"sniproxy-hostname --hashed {NAME}")
    machine.root(PAGE["reviewed"].text.replace(f"sniproxy-hostname {NAME}", hashed))
    directory = machine.root(hashed).strip()
    machine.listen("two", f"/srv/hosts/{directory}/tls-socket", "two")
    with machine.daemon("--hashed") as daemon:
        assert machine.ask(daemon, NAME) == b"two"


def test_first_come_first_served(machine: SharedMachine) -> None:
    machine.follow(PAGE["sticky"])
    with machine.daemon() as daemon:
        machine.follow(PAGE["mkdir"])
        machine.listen("two", SOCKET, "two")
        assert machine.ask(daemon, NAME) == b"two"
        for command in f"mv {DIRECTORY} /srv/hosts/x", f"rm -r {DIRECTORY}", "ls /srv/hosts":
            cannot(machine, "three", command)
        cannot(machine, "sniproxy", "mkdir /srv/hosts/x")
        # A name that others will want.
        machine.tenant("three", "mkdir -m 0711 /srv/hosts/www.two.example")
        machine.listen("three", "/srv/hosts/www.two.example/tls-socket", "three")
        assert machine.ask(daemon, "www.two.example") == b"three"


@needs_setfacl
def test_first_come_first_served_in_a_group(machine: SharedMachine) -> None:
    machine.follow(PAGE["group"])
    machine.root("usermod -aG tenants two")
    with machine.daemon() as daemon:
        machine.follow(PAGE["mkdir"])
        machine.listen("two", SOCKET, "two")
        assert machine.ask(daemon, NAME) == b"two"
        for user in "sniproxy", "three":
            cannot(machine, user, "mkdir /srv/hosts/x")
        machine.root("usermod -aG tenants three")
        machine.tenant("three", "mkdir /srv/hosts/x")
        for command in f"mv {DIRECTORY} /srv/hosts/y", f"rm -r {DIRECTORY}":
            cannot(machine, "three", command)


@needs_setfacl
@pytest.mark.parametrize("form", ["sticky", "group"])
def test_links_in_a_sticky_directory(machine: SharedMachine, form: str) -> None:
    """They are not followed where everybody may write, if the machine is as Debian makes it."""
    machine.follow(PAGE[form])
    if form == "group":
        machine.root("usermod -aG tenants two")
    machine.tenant("two", f"chmod 0711 . && mkdir site && ln -s ~/site {DIRECTORY}")
    machine.listen("two", "/home/two/site/tls-socket", "two")
    protected = Path("/proc/sys/fs/protected_symlinks").read_text() == "1\n"
    with machine.daemon() as daemon:
        if protected and form == "sticky":
            assert is_refused(machine, daemon, "permission_denied")
        else:
            assert machine.ask(daemon, NAME) == b"two"
        # "Links further down are followed."
        machine.tenant("two", "mkdir -m 0711 /srv/hosts/www.two.example")
        machine.tenant("two", "ln -s ~/site/tls-socket /srv/hosts/www.two.example")
        assert machine.ask(daemon, "www.two.example") == b"two"


@needs_setfacl
def test_without_the_sticky_bit_any_member_takes_any_name(machine: SharedMachine) -> None:
    machine.follow(PAGE["group"])
    machine.root("chmod -t /srv/hosts; usermod -aG tenants two; usermod -aG tenants three")
    machine.follow(PAGE["mkdir"])
    machine.listen("two", SOCKET, "two")
    take = said(f"mv {NAME} old && mkdir {NAME}")
    machine.tenant("three", f"cd /srv/hosts && {take}")
    machine.listen("three", SOCKET, "three")
    with machine.daemon() as daemon:
        assert machine.ask(daemon, NAME) == b"three"


def test_a_group_of_tenants_in_the_place_of_the_proxys(machine: SharedMachine) -> None:
    machine.root("groupadd tenants; install -d -o root -g tenants -m 3775 /srv/hosts")
    machine.root("usermod -aG tenants two; usermod -aG tenants three")
    machine.tenant("two", f"umask 002; mkdir {DIRECTORY}")
    machine.listen("two", SOCKET, "two")
    with machine.daemon() as daemon:
        assert machine.ask(daemon, NAME) == b"two"
        machine.tenant("three", f"rm -f {SOCKET}")
        assert is_refused(machine, daemon, "no_socket")
        machine.listen("three", SOCKET, "three")
        assert is_refused(machine, daemon, "wrong_owner")


@needs_setfacl
def test_a_link_to_a_home(machine: SharedMachine, daemon: Daemon) -> None:
    machine.tenant("two", "chmod 700 .")
    machine.follow(PAGE["link to a home"])
    machine.follow(PAGE["home"])
    machine.listen("two", "/home/two/site/tls-socket", "two")
    assert machine.ask(daemon, NAME) == b"two"
    cannot(machine, "three", "ls /home/two/site")
    # "the name goes with the path"
    machine.root("mv /home/two /home/gone; install -d -o three /home/two/site")
    machine.listen("three", "/home/two/site/tls-socket", "three")
    assert machine.ask(daemon, NAME) == b"three"


# The owner check.


def test_a_link_to_a_socket_of_somebody_else(machine: SharedMachine, daemon: Daemon) -> None:
    machine.follow(PAGE["reviewed"])
    for owner, path in ("three", "/home/three/socket"), ("root", "/srv/socket"):
        machine.listen(owner, path, "theirs")
        machine.tenant("two", f"ln -sf {path} {SOCKET}")
        assert is_refused(machine, daemon, "wrong_owner")


def test_a_link_to_a_directory_of_roots_in_which_others_may_write(
    machine: SharedMachine, daemon: Daemon
) -> None:
    machine.listen("root", "/srv/socket", "roots")
    # Not sticky as /tmp is: there the link may not be followed in the first place.
    machine.root(f"install -d -m 0777 /srv/tmp; ln -s /home/two/site {DIRECTORY}")
    machine.tenant("two", "ln -s /srv/tmp site; ln -s /srv/socket /srv/tmp/tls-socket")
    assert is_refused(machine, daemon, "writable_by_others")


def test_a_link_to_a_directory_of_another_tenant(machine: SharedMachine, daemon: Daemon) -> None:
    machine.root(f"install -d -o three /srv/hosts/three.example; ln -s /home/two/site {DIRECTORY}")
    machine.tenant("two", "ln -s /srv/hosts/three.example site")
    machine.listen("three", "/srv/hosts/three.example/tls-socket", "three")
    assert machine.ask(daemon, NAME) == b"three"


def test_a_rootless_container(machine: SharedMachine, daemon: Daemon) -> None:
    """Its root is the tenant: as good as a container, here, are the user IDs of one."""
    if machine.tenant("two", "unshare --map-root-user true 2>/dev/null || echo no"):
        pytest.skip("users may make no user namespaces here")
    machine.follow(PAGE["reviewed"])
    machine.listen("two", SOCKET, "two", under="unshare --map-root-user")
    assert machine.ask(daemon, NAME) == b"two"


def test_a_listener_of_roots_in_a_tenants_directory(machine: SharedMachine, daemon: Daemon) -> None:
    machine.follow(PAGE["reviewed"])
    machine.listen("root", SOCKET, "roots")
    assert is_refused(machine, daemon, "wrong_owner")


def is_stopped(process: Path) -> bool:
    """Tell whether a process or thread is stopped, by its state in proc_pid_stat(5)."""
    return (process / "stat").read_text().rpartition(") ")[2].startswith("T")


@needs("bindfs", "bindfs")
@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="there is no /dev/fuse")
def test_a_fuse_file_system_that_calls_itself_roots(machine: SharedMachine) -> None:
    show = "bindfs --force-user=root"
    machine.root("mknod -m 666 /dev/fuse c 10 229")
    machine.root(f"ln -s /home/two/shown {DIRECTORY}; install -d -o three /srv/hosts/three.example")
    machine.listen("three", "/home/three/socket", "secret")
    machine.listen("three", "/srv/hosts/three.example/tls-socket", "three")
    machine.tenant("two", "mkdir true shown; ln -s /home/three/socket true/tls-socket")

    def stop_and_go(number: signal.Signals) -> None:
        (pid,) = machine.inside.processes("bindfs")
        os.kill(pid, number)
        # kill(2) returns before all threads have stopped, and one of them might answer yet.
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        wanted = number == signal.SIGSTOP
        eventually(lambda: all(is_stopped(each) == wanted for each in threads))

    with machine.daemon() as daemon:
        # As it is by default.
        assert "user_allow_other" in machine.tenant("two", f"! {show} -o allow_other true shown")
        machine.tenant("two", f"{show} --no-allow-other true shown")
        stop_and_go(signal.SIGSTOP)
        assert is_refused(machine, daemon, "permission_denied")
        stop_and_go(signal.SIGCONT)
        machine.tenant("two", "fusermount3 -u shown")
        # As it should not be.
        machine.root("echo user_allow_other >>/etc/fuse.conf")
        assert "user_allow_other" in check(machine)
        machine.tenant("two", f"{show} -o allow_other true shown")
        assert machine.ask(daemon, NAME) == b"secret"
        assert machine.ask(daemon, "three.example") == b"three"
        # And one that does not answer.
        eventually(lambda: len(machine.inside.processes("bindfs")) == 1)
        stop_and_go(signal.SIGSTOP)
        with machine.connect(NAME) as waits, machine.connect("three.example") as waits_too:
            waits_too.settimeout(0.5)
            with pytest.raises(TimeoutError):
                waits_too.recv(1)
            stop_and_go(signal.SIGCONT)
            assert receive_all(waits) == b"secret"
            assert waits_too.recv(5) == b"three"


# Permissions for the proxy.


@needs_setfacl
def test_an_acl(machine: SharedMachine, daemon: Daemon) -> None:
    machine.follow(PAGE["link to a home"])
    machine.follow(PAGE["home"])
    machine.listen("two", "/home/two/site/tls-socket", "two", umask="022")
    assert is_refused(machine, daemon, "permission_denied")
    for mode in "0660", "0666":
        machine.tenant("two", f"chmod {mode} site/tls-socket")
        assert machine.ask(daemon, NAME) == b"two"
    cannot(machine, "three", "ls /home/two/site/tls-socket")
    machine.tenant("two", "rm site/tls-socket")
    machine.listen("two", "/home/two/site/tls-socket", "007", umask="007")
    assert machine.ask(daemon, NAME) == b"007"


@needs_setfacl
def test_an_acl_in_a_directory_of_roots(machine: SharedMachine, daemon: Daemon) -> None:
    machine.root(f"install -d {DIRECTORY}; ln -s /home/two/socket {SOCKET}")
    machine.listen("two", "/home/two/socket", "two")
    machine.root(f"setfacl -m u:two:x {DIRECTORY}")
    assert machine.ask(daemon, NAME) == b"two"
    machine.root(f"setfacl -m u:two:rwx {DIRECTORY}")
    assert is_refused(machine, daemon, "writable_by_others")


# In a root directory of its own.


def test_a_root_directory_of_its_own(machine: SharedMachine) -> None:
    alias, switch = (
        "ln -s two.example www.two.example",
        "ln -sfn green.socket two.example/tls-socket",
    )
    machine.root("ln -s /home/two/site /srv/hosts/link.example; install -d -o two /home/two/site")
    machine.listen("two", "/home/two/site/tls-socket", "blue")
    machine.listen("two", "/home/two/site/green.socket", "green")
    with machine.daemon("--chroot") as daemon:
        assert is_refused(machine, daemon, "no_such_host", "link.example")
        machine.follow(PAGE["bind mount"])
        assert machine.ask(daemon, NAME) == b"blue"
        machine.root(f"cd /srv/hosts; {said(alias)}")
        assert machine.ask(daemon, "www.two.example") == b"blue"
        machine.tenant("two", f"cd /srv/hosts; {said(switch)}")
        assert machine.ask(daemon, "www.two.example") == b"green"
    with machine.daemon() as daemon:
        for name in NAME, "www.two.example":
            assert machine.ask(daemon, name) == b"green"


# Servers, and their certificates.


@pytest.fixture
def site(machine: SharedMachine, daemon: Daemon, certificates: Certificates) -> "Site":
    return Site(machine, daemon, certificates)


class Site:
    """The host of the tenant `two`, ready for a server that expects PROXY headers."""

    def __init__(self, machine: SharedMachine, daemon: Daemon, certificates: Certificates) -> None:
        self.machine = machine
        self.daemon = daemon
        self._certificates = certificates
        machine.follow(PAGE["reviewed"])
        machine.follow(PAGE["send-proxy-v1"])
        self.certify()

    def certify(self) -> None:
        """Get a new certificate."""
        pair = self._certificates.for_client(NAME)
        certificate, key = pair.certificate.read_text(), pair.key.read_text()
        for name, text in ("crt", certificate), ("key", key), ("pem", certificate + key):
            self.machine.write(f"/home/two/two.{name}", text, "two")

    def start(self, server: Block) -> None:
        """Have `two` run the server, and wait until it is there."""
        self.machine.write(server.path, server.text, server.user)
        self.machine.start(server.user, server.command)
        eventually(self.is_there)

    def get(self) -> str:
        """Return the page of the site, or what curl has to say in its place."""
        return self.machine.root(
            f"curl --silent --show-error --interface {CLIENT} "
            f"--cacert {self._certificates.authority} https://{NAME}/ || true"
        )

    def serial(self) -> str:
        """Return the number of the certificate that clients get."""
        return self.machine.root(
            f"openssl s_client -connect {NAME}:443 -servername {NAME} </dev/null 2>/dev/null"
            " | openssl x509 -noout -serial"
        )

    def inode(self) -> int:
        """Return which socket it is."""
        return self.machine.outside(SOCKET).stat().st_ino

    def is_there(self) -> bool:
        """Whether somebody listens."""
        return not self.get().startswith("curl: ")

    def signal(self, program: str, number: signal.Signals) -> None:
        """Send a signal to the server's first process."""
        os.kill(min(self.machine.inside.processes(program)), number)

    def kill(self, program: str) -> None:
        """Have the server crash, with all its processes."""
        for pid in self.machine.inside.processes(program):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.is_there())


@needs_nginx
def test_nginx(site: Site) -> None:
    nginx = PAGE["nginx"]
    site.start(nginx)
    assert site.get() == f"{CLIENT}\n"
    assert site.machine.root(f"stat -c %a {SOCKET}") == "666\n"
    # "Reload with SIGHUP."
    serial, inode = site.serial(), site.inode()
    site.certify()
    site.signal("nginx", signal.SIGHUP)
    eventually(lambda: site.serial() != serial)
    assert site.inode() == inode
    # "It removes its socket when it ends in order. After a crash the socket is still there"
    for number in signal.SIGTERM, signal.SIGQUIT:
        site.signal("nginx", number)
        eventually(lambda: not site.machine.outside(SOCKET).exists())
        eventually(lambda: not site.machine.inside.processes("nginx"))
        site.start(nginx)
    site.kill("nginx")
    assert "Address already in use" in site.machine.tenant("two", f"! {nginx.command}")


@needs_nginx
def test_a_unit(site: Site) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(PAGE["unit"].text)
    service = unit["Service"]
    # A crash lies behind us.
    site.start(PAGE["nginx"])
    site.kill("nginx")
    site.machine.tenant(service["User"], service["ExecStartPre"])
    site.machine.start(service["User"], service["ExecStart"])
    eventually(site.is_there)
    assert site.get() == f"{CLIENT}\n"
    serial = site.serial()
    site.certify()
    main = min(site.machine.inside.processes("nginx"))
    site.machine.tenant(service["User"], f"MAINPID={main}; {service['ExecReload']}")
    eventually(lambda: site.serial() != serial)


@needs("systemd-analyze", "systemd")
def test_systemd_understands_the_unit(machine: SharedMachine) -> None:
    unit = PAGE["unit"]
    machine.write(unit.path, unit.text, "root")
    # It looks at all other units that this one needs, too.
    complaints = machine.root(f"systemd-analyze verify --recursive-errors=no {unit.path}")
    assert "two.service" not in complaints


@needs_haproxy
def test_haproxy(site: Site) -> None:
    haproxy = PAGE["haproxy"]
    site.start(haproxy)
    assert site.get() == f"{CLIENT}\n"
    # "Reload with SIGUSR2."
    serial = site.serial()
    site.certify()
    site.signal("haproxy", signal.SIGUSR2)
    eventually(lambda: site.serial() != serial)
    # "It replaces sockets that were left over."
    site.kill("haproxy")
    assert site.machine.outside(SOCKET).is_socket()
    site.start(haproxy)
    assert site.get() == f"{CLIENT}\n"


@needs_haproxy
def test_an_acme_challenge(site: Site) -> None:
    site.machine.tenant(
        "two",
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=challenge "
        "-keyout acme.key -out acme.crt 2>/dev/null",
    )
    responder = "openssl s_server -unix acme.socket -www -alpn acme-tls/1"
    site.machine.start("two", f"exec {responder} -cert acme.crt -key acme.key")
    # "Any other server can listen on site.socket in the place of the last part."
    haproxy, python = PAGE["haproxy"], PAGE["python"]
    at_site = python.text.replace(SOCKET, "/home/two/site.socket")
    site.machine.write(python.path, at_site, python.user)
    site.machine.start(python.user, python.command)
    site.start(replace(haproxy, text=haproxy.text.partition("frontend site\n")[0]))
    eventually(site.machine.outside("/home/two/acme.socket").exists)
    answer = site.machine.follow(PAGE["challenge"])
    assert re.search("subject=CN ?= ?challenge", answer)
    assert "ALPN protocol: acme-tls/1" in answer
    # Everybody else gets the site.
    assert site.get() == f"{CLIENT}\n"


@needs_haproxy
def test_haproxy_without_challenges(site: Site) -> None:
    """The last part of its configuration is enough."""
    head, _, rest = PAGE["haproxy"].text.partition("frontend all\n")
    tail = rest[rest.index("frontend site\n") :]
    text = head + tail.replace("/home/two/site.socket mode 600", f"{SOCKET} mode 666")
    site.start(replace(PAGE["haproxy"], text=text))
    assert site.get() == f"{CLIENT}\n"


@needs("caddy", "caddy")
def test_caddy(site: Site) -> None:
    caddy = PAGE["caddy"]
    # "Debian's knows no PROXY header, so leave `send-proxy-v1` out."
    site.machine.root(f"rm {DIRECTORY}/send-proxy-v1")
    site.machine.write(caddy.path, caddy.text, caddy.user)

    def serves() -> bool:
        # The socket may be the one that was left over.
        site.machine.tenant("two", f"cd {DIRECTORY}; {said('chmod 666 tls-socket')} || true")
        return site.is_there()

    for ends in True, False:
        site.machine.start(caddy.user, caddy.command)
        eventually(serves)
        if ends:
            # "and replaces one that was left over"
            site.kill("caddy")
            assert site.machine.outside(SOCKET).is_socket()
    site.signal("caddy", signal.SIGTERM)
    # "It removes its socket when it ends"
    eventually(lambda: not site.machine.outside(SOCKET).exists())


def test_python(site: Site) -> None:
    site.start(PAGE["python"])
    assert site.get() == f"{CLIENT}\n"
    site.kill("python3")
    site.start(PAGE["python"])
    assert site.get() == f"{CLIENT}\n"


FORGE = f"""
import socket, ssl
with socket.socket(socket.AF_UNIX) as plain:
    plain.connect("{SOCKET}")
    plain.sendall(b"PROXY TCP4 203.0.113.9 192.0.2.1 1 443\\r\\n")
    with ssl._create_unverified_context().wrap_socket(plain) as tls:
        tls.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        answer = tls.makefile()
        while answer.readline().strip():
            pass
        print(answer.readline())
"""


def test_who_can_connect_can_be_any_client(site: Site) -> None:
    site.start(PAGE["python"])
    site.machine.write("/srv/forge.py", FORGE, "root")
    cannot(site.machine, "three", "python3 /srv/forge.py")
    site.machine.root(f"chmod 0711 {DIRECTORY}")
    assert "203.0.113.9\n" in site.machine.tenant("three", "python3 /srv/forge.py")


APACHE = """
ServerRoot /home/two
ServerName two.example
DefaultRuntimeDir /home/two
PidFile apache.pid
ErrorLog error.log
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule remoteip_module /usr/lib/apache2/modules/mod_remoteip.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
{listen}
<VirtualHost *:8443>
    {header}
    SSLEngine on
    SSLCertificateFile two.pem
    ErrorDocument 404 "%{{REMOTE_ADDR}}"
</VirtualHost>
"""


@needs("apache2", "apache2-bin")
@needs("socat", "socat")
def test_apache(site: Site) -> None:
    listen, header = said("Listen 127.0.0.1:8443"), said("RemoteIPProxyProtocol On")
    site.machine.write("/home/two/apache.conf", APACHE.format(listen=listen, header=header), "two")
    site.machine.tenant("two", "apache2 -f /home/two/apache.conf")
    for _ in range(2):  # the second time there is a socket that was left over
        site.machine.start("two", PAGE["socat"].text)
        eventually(site.is_there)
        assert site.get() == CLIENT
        site.kill("socat")
    # "listens on no Unix socket"
    unix = APACHE.format(listen=f"Listen {SOCKET}", header="")
    site.machine.write("/home/two/apache.conf", unix, "two")
    assert "Port must be specified" in site.machine.tenant("two", "! apache2 -t -f ~/apache.conf")


# What a tenant can do to the others, and the end.

# In bytes: more than all buffers on the way can hold, and enough to be taken for a fast transfer.
MUCH, ENOUGH = 1 << 25, 1 << 21


def test_stalled_transfers_hold_the_pipes_and_stop_nobody(
    machine: SharedMachine, daemon: Daemon
) -> None:
    def pipes() -> int:
        descriptors = Path(f"/proc/{daemon.process.pid}/fd").iterdir()
        return sum(os.readlink(each).startswith("pipe:") for each in descriptors) // 2

    machine.root(f"install -d -o two {DIRECTORY}")
    machine.listen("two", SOCKET, "x", times=MUCH)
    with ExitStack() as clients:

        def stall() -> None:
            client = clients.enter_context(machine.connect(NAME))
            assert len(receive_exactly(client, ENOUGH)) == ENOUGH

        # On a machine that does much else, not every transfer is fast.
        for _ in range(10 * PIPES):
            stall()
            if pipes() == PIPES:
                break
        # Those whose pipe was empty when it came back.
        for _ in range(3):
            stall()
        assert pipes() == PIPES
        assert len(receive_all(clients.enter_context(machine.connect(NAME)))) == MUCH


def test_a_tenant_leaves(machine: SharedMachine, daemon: Daemon) -> None:
    machine.follow(PAGE["reviewed"])
    machine.root("ln -s /home/two/site /srv/hosts/link.example")
    machine.root("install -d -o three /srv/hosts/three.example")
    machine.tenant("two", f"mkdir site {DIRECTORY}/more; touch {DIRECTORY}/more/file site/file")
    machine.listen("two", SOCKET, "two")
    machine.follow(PAGE["leave"])
    assert machine.root("ls /srv/hosts") == "three.example\n"
    assert is_refused(machine, daemon, "no_such_host")
    assert machine.outside("/home/two/site/file").exists()
    assert not machine.inside.processes("python3")


@needs_setfacl
def test_the_check_list(machine: SharedMachine) -> None:
    machine.follow(PAGE["reviewed"])
    machine.root("ln -s two.example /srv/hosts/www.two.example; install -d /srv/hosts/one.example")
    assert check(machine) == ""
    # What is wrong, what puts it right, and what is found between the two.
    for wrong, right, found in [
        ("chown two /srv/hosts", "chown root /srv/hosts", ["/srv/hosts"]),
        ("chmod 0775 /srv/hosts", "chmod 0755 /srv/hosts", ["/srv/hosts"]),
        ("chmod 0757 /srv/hosts", "chmod 3713 /srv/hosts", ["/srv/hosts"]),
        ("chmod 0775 /srv/hosts/one.example", "chmod 0755 /srv/hosts/one.example", ["one.example"]),
        (
            "setfacl -m u:two:w /srv/hosts/one.example",
            "setfacl -b /srv/hosts/one.example",
            ["one.example"],
        ),
        (f"chown 999999 {DIRECTORY}", f"chown two {DIRECTORY}", ["two.example", "www.two.example"]),
        (f"chmod 0711 {DIRECTORY}", f"chmod 0710 {DIRECTORY}", ["two.example", "www.two.example"]),
        (
            "echo user_allow_other >>/etc/fuse.conf",
            "sed -i /^user_allow/d /etc/fuse.conf",
            ["user_allow_other"],
        ),
        ("usermod -aG two sniproxy", "gpasswd -d sniproxy two", ["sniproxy", "two"]),
    ]:
        machine.root(wrong)
        words = check(machine).split()
        assert sorted(word.removeprefix("/srv/hosts/") for word in words) == found
        machine.root(right)
        assert check(machine) == ""
