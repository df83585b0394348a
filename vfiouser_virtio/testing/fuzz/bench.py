"""Execution of one fuzz case: the whole stack in this process, a client over a real socket, and the oracle."""

import contextlib
import faulthandler
import gc
import mmap
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import trio
import trio.testing

from vfiouser_virtio.background import background
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.deadline import Deadline, ends_within, waited_for_cpu
from vfiouser_virtio.testing.fuzz.message_performer import MessagePerformer
from vfiouser_virtio.testing.fuzz.oracle import Finding, Found, Hung, LogWatch, Resources, of_exception
from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS, PciTarget
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.stage import Stage, check_steps, stage
from vfiouser_virtio.testing.fuzz.stall import StallWatch
from vfiouser_virtio.testing.fuzz.store_bounds import StoreBounds
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget
from vfiouser_virtio.vfio_user import Listener, Server
from vfiouser_virtio.vfio_user.server.session import Session

STANDSTILL = 60
"""Seconds of what one client does, after which the event loop counts as hung: every single wait in it is shorter.

Not so the waits for a file's flushes: with a host's disk that others keep busy they added up to more than 20.
"""
_ALARMS = 4
"""So many parts of `STANDSTILL` are looked at for waits for a CPU, of which most of one must be free."""
SERVER_TIMEOUT = 6.0
"""Seconds until the server must have let go of a client: twice as long as it may wait for a device."""
Rearm = Callable[[Step | None], None]
"""Begins the watchdog's time anew, for a step or something else."""
MANY = 1 << 30
_ROOM = 1 << 30
"""Bytes that a device may take at once: a driver that says 4 GiB must not get them."""
_LOOKS = 5
"""At what the server still has of a client, until Python's collection is called: that takes long."""


def run_case(
    case: Case, target: FuzzTarget | PciTarget | None = None, began: Callable[[int], None] | None = None
) -> Finding | None:
    """What is wrong with the stack's answer to ``case``, if anything. ``target`` overrides the case's.

    ``began`` is called with the number of each step ``case``. Raises ValueError for a case with a step that there is
    not, or with a register that the device does not have.
    """
    if target is None:
        target = PCI_TARGETS.get(case.target) or TARGETS[case.target]
    check_steps(case, target)
    if isinstance(target, PciTarget) and (unknown := target.unknown(case)):
        raise ValueError(f"the device has no register {unknown!r}")
    stalls = StallWatch() if isinstance(target, PciTarget) else None
    with LogWatch() as log:
        try:
            with _watchdog(case, began) as rearm, _bounded_memory(isinstance(target, PciTarget)):
                found = trio.run(_run, case, target, log, rearm, stalls, instruments=[stalls] if stalls else [])
        except BaseException as error:
            if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves(error)):
                raise KeyboardInterrupt from None
            # A task that died takes the others with it; what the log says about it comes first.
            found = of_exception(error)
            if found.where == "event loop":
                # What an event loop that was left in the middle says of that, as it goes, is no bug of the next case.
                error.__traceback__ = error.__context__ = error.__cause__ = None
                gc.collect()
                return found
    if log.findings:
        return log.findings[0]
    return found or (stalls.finding if stalls is not None else None)


@contextlib.contextmanager
def _bounded_memory(wanted: bool) -> Iterator[None]:
    """In the block, whatever takes more than `_ROOM` of address space at once fails, at the line that does so."""
    if not wanted:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (min([now + _ROOM, *(each for each in (soft, hard) if each >= 0)]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _watchdog(case: Case, began: Callable[[int], None] | None = None) -> Iterator[Rearm]:
    """A timer for the block, and what begins it anew with a client, or a step."""

    def look(step: Step | None) -> None:
        if step is not None and step["do"] == "case" and began is not None:
            began(step["number"])

    if threading.current_thread() is not threading.main_thread():
        yield look
        return
    alarms, waited = 0, 0.0

    def hung(_signal: int, _frame: FrameType | None) -> None:
        nonlocal alarms, waited
        before, waited = waited, waited_for_cpu()
        if waited - before > STANDSTILL / _ALARMS / 2:  # at first: whenever that was
            return
        alarms += 1
        if alarms > 2:  # it spins in spite of the exception, as a task does that starts itself again for ever
            sys.stderr.write(f"hang: the event loop cannot even be stopped\n{case.dumps()}")
            faulthandler.dump_traceback()
            os._exit(1)
        raise Hung

    def rearm(step: Step | None = None) -> None:
        look(step)
        signal.setitimer(signal.ITIMER_REAL, STANDSTILL, STANDSTILL / _ALARMS)

    before = signal.signal(signal.SIGALRM, hung)
    rearm()
    try:
        yield rearm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def _run(
    case: Case, target: FuzzTarget | PciTarget, log: LogWatch, rearm: Rearm, stalls: StallWatch | None
) -> Finding | None:
    if stalls is None:
        return await _on_stage(case, stage(target, case), log, rearm)
    with stalls.looking():
        return await _on_stage(case, stage(target, case), log, rearm)


async def _on_stage(case: Case, staged: Stage, log: LogWatch, rearm: Rearm) -> Finding | None:
    function = staged.function
    good = replace(case, steps=[], hello=True, direct=False)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("")  # a name of the kernel's, and nothing in the file system (unix(7): autobind)
    listening.listen(4)
    found: Finding | None = None
    with Listener(listening, case.target) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.serve)
            nursery.start_soon(Server(function, session=partial(Session, lingers=False)).serve, listener)
            await trio.testing.wait_all_tasks_blocked()
            staged.prepare()
            await trio.testing.wait_all_tasks_blocked()
            before = Resources.now()
            try:
                if staged.learns:
                    await _client(listening, staged, [good], log, rearm, good=True)
                await _client(listening, staged, list(case.clients()), log, rearm)
                # A device that runs has tasks and a ring in a window; the good client has reset it before it went.
                await _gone(replace(before, tasks=MANY, address_space=MANY), "after the client")
                await _client(listening, staged, [good], log, rearm, good=True)
                await _gone(before, "after a good client")
            except Found as error:
                found = error.finding
            nursery.cancel_scope.cancel()
    return found


async def _client(
    listening: socket.socket,
    staged: Stage,
    parts: Sequence[Case],
    log: LogWatch,
    rearm: Rearm,
    *,
    good: bool = False,
) -> None:
    """Clients, one after another, with the same memory. For a good one everything must work."""
    with contextlib.closing(FuzzRam()) as ram:
        bounds = staged.bounds(ram)
        for part in parts:
            rearm(None)
            await _visit(listening, staged, ram, bounds, part, log, rearm, check=part is parts[-1], good=good)


async def _visit(
    listening: socket.socket,
    staged: Stage,
    ram: FuzzRam,
    bounds: StoreBounds,
    case: Case,
    log: LogWatch,
    rearm: Rearm,
    *,
    check: bool,
    good: bool,
) -> None:
    """One client from connect to close.

    ``check``: in the end the device is to work again. Else the next client of the case will see that.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client = FuzzClient(sock, ram, bounds)
    log.hung_up = False
    try:
        sock.connect(listening.getsockname())
        async with background() as tasks:
            tasks.start_soon(client.run)
            performer = staged.performer(client, ram, bounds, case)
            await _perform(performer, client, case, rearm, check=check, good=good)
            await _farewell(client, log, good=good)
            bounds.check()
            client.close()
    except BaseExceptionGroup as group:
        if (found := next((leaf for leaf in leaves(group) if isinstance(leaf, Found)), None)) is None:
            raise
        raise found from group
    finally:
        client.close()


async def _perform(
    performer: MessagePerformer[Any, Any],
    client: FuzzClient,
    case: Case,
    rearm: Rearm,
    *,
    check: bool,
    good: bool,
) -> None:
    if case.hello:
        await performer.do_hello()
    for step in case.steps:
        rearm(step)
        if step["do"] != "case":
            await performer.perform(step)
    if good or (check and case.hello and client.in_step and not client.doomed):
        await performer.do_check()
    if good:
        await performer.leave_quiet()


async def _farewell(client: FuzzClient, log: LogWatch, *, good: bool) -> None:
    if client.doomed:
        if not await ends_within(SERVER_TIMEOUT, client.closed.wait):
            raise Found("hang", "the server does not hang up on a client that broke the protocol", "doomed")
    else:
        await trio.testing.wait_all_tasks_blocked()
    if client.closed.is_set() and (good or not log.hung_up):
        raise Found("closed", "the server hung up without a word", "closed")


async def _gone(before: Resources, what: str) -> None:
    """The server has let go of the client and of everything that it brought."""
    for _ in range(_LOOKS):
        if not before.more():
            return
        await trio.sleep(0.002)  # nothing tells when the last descriptor is closed
    limit = Deadline(SERVER_TIMEOUT)
    while before.grown() and not limit.over():  # noqa: ASYNC110
        await trio.sleep(0.02)
    before.check(what)
