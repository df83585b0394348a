"""Execution of one fuzz case: the whole stack in this process, a client over a real socket, and the oracle."""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType

import trio
import trio.testing

from vfiouser_virtio.background import background
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Finding, Found, Hung, LogWatch, Resources, of_exception
from vfiouser_virtio.testing.fuzz.perform import Performer
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget
from vfiouser_virtio.transports.pci import VIRTIO_BAR, VirtioPci
from vfiouser_virtio.vfio_user import Listener, Server
from vfiouser_virtio.virtio import Offer

STANDSTILL = 60
"""Seconds of a whole case, after which the event loop counts as hung: every single wait in it is shorter.

Not so the waits for a file's flushes: with a host's disk that others keep busy they added up to more than 20.
"""
SERVER_TIMEOUT = 6.0
"""Seconds until the server must have let go of a client: twice as long as it may wait for a device."""
MANY = 1 << 30


def run_case(case: Case, target: FuzzTarget | None = None) -> Finding | None:
    """What is wrong with the stack's answer to ``case``, if anything. ``target`` overrides the case's."""
    target = TARGETS[case.target] if target is None else target
    with LogWatch() as log:
        try:
            with _watchdog(case):
                found = trio.run(_run, case, target, log)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            # A task that died takes the others with it; what the log says about it comes first.
            found = of_exception(error)
    return log.findings[0] if log.findings else found


@contextlib.contextmanager
def _watchdog(case: Case) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
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

    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, STANDSTILL, STANDSTILL / 4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def _run(case: Case, target: FuzzTarget, log: LogWatch) -> Finding | None:
    device = target.make()
    function = VirtioPci(device, name=case.target, offer=Offer(**case.offer))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("")  # a name of the kernel's, and nothing in the file system (unix(7): autobind)
    listening.listen(4)
    found: Finding | None = None
    with Listener(listening, case.target) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.serve)
            nursery.start_soon(Server(function).serve, listener)
            await trio.testing.wait_all_tasks_blocked()
            function.io_fds(VIRTIO_BAR)  # made once, kept for ever: no leak
            await trio.testing.wait_all_tasks_blocked()
            before = Resources.now()
            try:
                for steps in (case.steps, None):
                    with contextlib.closing(FuzzRam()) as ram:
                        bounds = Bounds(ram, function.core, takes_pages=target.type.takes_pages)
                        await _visit(listening, ram, bounds, case, target, steps, log)
                    # A device that runs has tasks and a ring in a window; the good client has reset it before it went.
                    allowed = before if steps is None else replace(before, tasks=MANY, address_space=MANY)
                    await _gone(allowed, "after a good client" if steps is None else "after the client")
            except Found as error:
                found = error.finding
            nursery.cancel_scope.cancel()
    return found


async def _visit(
    listening: socket.socket,
    ram: FuzzRam,
    bounds: Bounds,
    case: Case,
    target: FuzzTarget,
    steps: list[Step] | None,
    log: LogWatch,
) -> None:
    """One client from connect to close; without steps it is a good one, for which everything must work."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client = FuzzClient(sock, ram, bounds)
    log.hung_up = False
    try:
        sock.connect(listening.getsockname())
        async with background() as tasks:
            tasks.start_soon(client.run)
            performer = Performer(client, ram, bounds, case, target)
            await _perform(performer, client, case, steps)
            await _farewell(client, log, good=steps is None)
            bounds.check()
            client.close()
    except BaseExceptionGroup as group:
        if (found := next((leaf for leaf in leaves(group) if isinstance(leaf, Found)), None)) is None:
            raise
        raise found from group
    finally:
        client.close()


async def _perform(performer: Performer, client: FuzzClient, case: Case, steps: list[Step] | None) -> None:
    if steps is None or case.hello:
        await performer.do_hello()
    for step in steps or ():
        await performer.perform(step)
    if steps is None or (case.hello and client.in_step and not client.doomed):
        await performer.do_check()
    if steps is None:
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
        while before.grown():  # noqa: ASYNC110 - nothing tells when the last descriptor is closed
            await trio.sleep(0.002)
    before.check(what)
