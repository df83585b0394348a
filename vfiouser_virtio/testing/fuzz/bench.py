"""Execution of one fuzz case: the whole stack in this process, a client over a real socket, and the oracle."""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import FrameType

import trio
import trio.testing

from vfiouser_virtio.background import background
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Finding, Found, Hung, LogWatch, Resources, of_exception
from vfiouser_virtio.testing.fuzz.perform import Performer
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget
from vfiouser_virtio.transports.pci import VIRTIO_BAR, VirtioPci
from vfiouser_virtio.vfio_user import Listener, Server
from vfiouser_virtio.vfio_user.server.session import Session
from vfiouser_virtio.virtio import Offer

STANDSTILL = 60
"""Seconds of what one client does, after which the event loop counts as hung: every single wait in it is shorter.

Not so the waits for a file's flushes: with a host's disk that others keep busy they added up to more than 20.
"""
SERVER_TIMEOUT = 6.0
"""Seconds until the server must have let go of a client: twice as long as it may wait for a device."""
MANY = 1 << 30
_LOOKS = 5
"""At what the server still has of a client, until Python's collection is called: that takes long."""


def run_case(case: Case, target: FuzzTarget | None = None) -> Finding | None:
    """What is wrong with the stack's answer to ``case``, if anything. ``target`` overrides the case's."""
    target = TARGETS[case.target] if target is None else target
    with LogWatch() as log:
        try:
            with _watchdog(case) as rearm:
                found = trio.run(_run, case, target, log, rearm)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            # A task that died takes the others with it; what the log says about it comes first.
            found = of_exception(error)
    return log.findings[0] if log.findings else found


@contextlib.contextmanager
def _watchdog(case: Case) -> Iterator[Callable[[], None]]:
    """A timer for the block, and what begins it anew."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    alarms = 0

    def hung(_signal: int, _frame: FrameType | None) -> None:
        nonlocal alarms
        alarms += 1
        if alarms > 2:  # it spins in spite of the exception, as a task does that starts itself again for ever
            sys.stderr.write(f"hang: the event loop cannot even be stopped\n{case.dumps()}")
            faulthandler.dump_traceback()
            os._exit(1)
        raise Hung

    def rearm() -> None:
        signal.setitimer(signal.ITIMER_REAL, STANDSTILL, STANDSTILL / 4)

    before = signal.signal(signal.SIGALRM, hung)
    rearm()
    try:
        yield rearm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def _run(case: Case, target: FuzzTarget, log: LogWatch, rearm: Callable[[], None]) -> Finding | None:
    device = target.make()
    function = VirtioPci(device, name=case.target, offer=Offer(**case.offer))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("")  # a name of the kernel's, and nothing in the file system (unix(7): autobind)
    listening.listen(4)
    found: Finding | None = None
    with Listener(listening, case.target) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.serve)
            nursery.start_soon(Server(function, session=partial(Session, lingers=False)).serve, listener)
            await trio.testing.wait_all_tasks_blocked()
            function.io_fds(VIRTIO_BAR)  # made once, kept for ever: no leak
            await trio.testing.wait_all_tasks_blocked()
            before = Resources.now()
            try:
                for clients in (list(case.clients()), None):
                    with contextlib.closing(FuzzRam()) as ram:
                        bounds = Bounds(ram, function.core, takes_pages=target.type.takes_pages)
                        for part in clients or ():
                            rearm()
                            last = clients is not None and part is clients[-1]
                            await _visit(listening, function, ram, bounds, part, target, log, check=last)
                        if clients is None:
                            rearm()
                            good = replace(case, steps=[], hello=True, direct=False)
                            await _visit(listening, function, ram, bounds, good, target, log, good=True)
                    # A device that runs has tasks and a ring in a window; the good client has reset it before it went.
                    allowed = before if clients is None else replace(before, tasks=MANY, address_space=MANY)
                    await _gone(allowed, "after a good client" if clients is None else "after the client")
            except Found as error:
                found = error.finding
            nursery.cancel_scope.cancel()
    return found


async def _visit(
    listening: socket.socket,
    function: VirtioPci,
    ram: FuzzRam,
    bounds: Bounds,
    case: Case,
    target: FuzzTarget,
    log: LogWatch,
    *,
    check: bool = True,
    good: bool = False,
) -> None:
    """One client from connect to close; for a good one everything must work.

    ``check``: in the end the device is to work again. Else the next client of the case will see that.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client = FuzzClient(sock, ram, bounds)
    log.hung_up = False
    try:
        sock.connect(listening.getsockname())
        async with background() as tasks:
            tasks.start_soon(client.run)
            performer = Performer(client, ram, bounds, case, target, function if case.direct else None)
            await _perform(performer, client, case, check=check, good=good)
            await _farewell(client, log, good=good)
            bounds.check()
            client.close()
    except BaseExceptionGroup as group:
        if (found := next((leaf for leaf in leaves(group) if isinstance(leaf, Found)), None)) is None:
            raise
        raise found from group
    finally:
        client.close()


async def _perform(performer: Performer, client: FuzzClient, case: Case, *, check: bool, good: bool) -> None:
    if case.hello:
        await performer.do_hello()
    for step in case.steps:
        await performer.perform(step)
    if good or (check and case.hello and client.in_step and not client.doomed):
        await performer.do_check()
    if good:
        await performer.driver.reset()


async def _farewell(client: FuzzClient, log: LogWatch, *, good: bool) -> None:
    if client.doomed:
        with trio.move_on_after(SERVER_TIMEOUT):
            await client.closed.wait()
        if not client.closed.is_set():
            raise Found("hang", "the server does not hang up on a client that broke the protocol", "doomed")
    else:
        await trio.testing.wait_all_tasks_blocked()
    if client.closed.is_set() and (good or not log.hung_up):
        raise Found("closed", "the server hung up without a word", "closed")


async def _gone(before: Resources, what: str) -> None:
    """The server has let go of the client and of everything that it brought."""
    with trio.move_on_after(SERVER_TIMEOUT):
        for _ in range(_LOOKS):
            if not before.more():
                return
            await trio.sleep(0.002)  # nothing tells when the last descriptor is closed
        while before.grown():  # noqa: ASYNC110
            await trio.sleep(0.02)
    before.check(what)
