"""From the command line to the serving loop: what every program does on the way."""

import contextlib
import gc
import os
import signal
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from socket import socket
from syslog import LOG_ERR, LOG_WARNING
from typing import Protocol

import trio

from sniproxy.service import descriptors, privileges, standard
from sniproxy.service.descriptors import Share
from sniproxy.service.eventlog import EventLog
from sniproxy.service.fatal import FatalError, attempt
from sniproxy.service.notify import Notifier
from sniproxy.service.options import ServiceOptions, look_up_user
from sniproxy.service.signals import Signals, ignore_habits
from sniproxy.service.status import StatusSocket
from sniproxy.service.syslogd import Syslog
from sniproxy.service.workers import Upgrading, Worker, Workers


class Upgrade(Upgrading, Protocol):
    """Upgrades, as far as they concern several processes."""

    def become(self, worker: Worker, workers: int) -> None:
        """Take note that this process is that worker, of so many, from now on."""


# Seconds between two looks at what is to be looked at.
_CHECK_EVERY = 1.0


def run_program(program: str, body: Callable[[Syslog | None], None]) -> int:
    """Run `body`, and tell of the error that it ends with; return the exit code.

    The body gets a connection to syslogd where standard error is no place for a log.
    """
    # Until we serve, SIGINT ends us as it ends any program, not by an exception somewhere.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ignore_habits()
    # From inetd standard error is the socket. It is connected before the root directory changes.
    syslogd = Syslog(program) if 2 in standard.copies_of_input() else None
    try:
        body(syslogd)
    except FatalError as error:
        _complain(program, f"fatal: {error}", syslogd)
        notifier = Notifier()
        notifier.failed(str(error))
        notifier.close()
        return error.code
    finally:
        if syslogd is not None:
            syslogd.close()
    return 0


def share_descriptors(options: ServiceOptions, most_pipes: int, log: EventLog) -> Share:
    """Raise the limit of descriptors; return what each process may have open.

    More connections than there can be are not refused, but the log says so.

    Raises:
        FatalError: that is not enough for one connection.
    """
    try:
        share = descriptors.share(descriptors.raise_limit(), most_pipes)
    except ValueError as error:
        raise FatalError(f"unable to serve a connection: {error}") from None
    if options.max_connections is not None:
        each = options.max_connections // options.workers
        if each > share.connections:
            log.event(
                "capacity",
                LOG_WARNING,
                asked=options.max_connections,
                given=share.connections * options.workers,
                detail="RLIMIT_NOFILE (LimitNOFILE= in systemd) suffices for no more",
            )
        share = share._replace(connections=min(share.connections, each))
    return share


def open_status_socket(
    options: ServiceOptions,
    program: str,
    kinds: tuple[str, ...],
    given: tuple[str, socket] | None = None,
) -> StatusSocket | None:
    """Open the status socket, if that is asked for; to be called before privileges are dropped.

    Args:
        options: say where.
        program: its name.
        kinds: what is timed.
        given: the one of a copy of the program before us, and its path.

    Raises:
        FatalError: it can't be opened.
    """
    listening = None
    if given is not None:
        if given[0] == options.status_socket:
            listening = given[1]
        else:
            given[1].close()
    if options.status_socket is None:
        return None
    with attempt("open the status socket"):
        fixed = options.status_socket, program, kinds, options.workers
        return StatusSocket(*fixed, listening)


def drop_privileges(options: ServiceOptions, keep: Collection[int] | None = None) -> None:
    """Change the root directory and the user, if that is asked for.

    Args:
        options: say whether, and whom to become.
        keep: the only capabilities that are needed from now on, even if we stay root; None if root
            is to stay what it is, and nobody else needs any.

    Raises:
        UsageError: there is no such user.
        FatalError: a system call failed.
    """
    identity = look_up_user(options.user)
    if options.chroot:
        with attempt("make the working directory the root directory"):
            privileges.enter_root()
    if identity is not None:
        with attempt(f"become the user {options.user!a}"):
            privileges.become(identity, keep or ())
    if keep is not None:
        with attempt("keep the capabilities that are needed, and no other"):
            privileges.keep_capabilities(keep)
    elif options.chroot or identity is not None:
        with attempt("drop all capabilities"):
            privileges.drop_capabilities()


def run_service(
    options: ServiceOptions,
    log: EventLog,
    notifier: Notifier,
    serve: Callable[[Signals | Worker, Notifier | Worker], Awaitable[None]],
    stop_listening: Callable[[], None],
    on_check: Callable[[], None] | None = None,
    status: StatusSocket | None = None,
    upgrade: Upgrade | None = None,
) -> None:
    """Serve, in this process or in several, until asked to end.

    Args:
        options: how many processes there are.
        log: where deaths of workers and bugs are told.
        notifier: how to speak to the supervisor.
        serve: called in each process that serves, with whom it takes orders from and whom it tells
            how it fares.
        stop_listening: closes the listening sockets of the first process among several.
        on_check: called once a second in the first process. It may raise a FatalError, which ends
            the program.
        status: closed likewise.
        upgrade: to another copy of the program, and from one.

    Raises:
        FatalError: serving ended with an error, which has been logged; or as above.
    """

    def on_drain() -> None:
        stop_listening()
        if status is not None:
            status.close()

    # What is here now stays: the collector need not look at it again.
    gc.freeze()
    orders: Signals | Worker = Signals()
    supervisor: Notifier | Worker = notifier
    if options.workers > 1:
        with attempt("start the workers"):
            workers = Workers(options.workers, notifier, log.worker_died, log.status)
            worker = workers.run(on_drain, on_check or (lambda: None), upgrade)
        if worker is None:
            if status is not None:
                status.end()
            return
        log.worker = worker.number
        if upgrade is not None:
            upgrade.become(worker, options.workers)
        orders = supervisor = worker
        on_check = None
    try:
        trio.run(_serve, partial(serve, orders, supervisor), on_check)
    except FatalError:
        raise
    except Exception as error:  # noqa: BLE001 - it is told in the log, and then in short
        # A bug, or no descriptors are left by now.
        log.bug(error)
        raise FatalError("unable to serve: the lines before this one say why") from None
    finally:
        if status is not None:
            status.end()


async def _serve(serve: Callable[[], Awaitable[None]], on_check: Callable[[], None] | None) -> None:
    """Serve; if there is something to be looked at meanwhile, look at it once a second."""
    if on_check is None:
        return await serve()
    fatal: list[FatalError] = []

    async def check() -> None:
        try:
            while True:
                await trio.sleep(_CHECK_EVERY)
                on_check()
        except FatalError as error:
            fatal.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(check)
        await serve()
        nursery.cancel_scope.cancel()
    if fatal:
        raise fatal[0]


def _complain(program: str, message: str, syslogd: Syslog | None) -> None:
    if syslogd is not None:
        syslogd.write(LOG_ERR, message)
    else:
        with contextlib.suppress(OSError):  # nobody is left to tell
            os.write(2, f"{program}: {message}\n".encode(errors="backslashreplace"))
