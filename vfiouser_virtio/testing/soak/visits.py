"""Raw drivers that come to a server one after the other: good ones, ones that leave in the middle, hostile ones.

After each that was not good a good one must be served. What is checked is what a client can see: the answers, the
device's data, that it works after a reset. Of devices that lie on purpose nothing is expected.
"""

import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import get_args

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.protocols.vfio_user import REGION_IO_FDS, Command
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.testing.fuzz.case import Case, Kind, Memory
from vfiouser_virtio.testing.fuzz.client import FuzzClient, hello
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Found
from vfiouser_virtio.testing.fuzz.perform import Performer
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.run import generate
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget
from vfiouser_virtio.testing.raw.client import raw_message
from vfiouser_virtio.transports.pci import VIRTIO_BAR

TIMEOUT = 120.0
"""Seconds for whatever a server is asked: the soak is niced, on a machine that does much else."""
_KINDS: tuple[Kind, ...] = get_args(Kind)
_MEMORIES: tuple[Memory, ...] = get_args(Memory)
_WAITING = ("settle", "check")
"""Steps that wait for what a device that lies may never do."""


class VisitStatus(IntEnum):
    """Exit statuses of a process of visitors."""

    DONE = 0
    FOUND = 4
    """Something is wrong; it is on stderr."""


# For each queue an eventfd, made when it is asked for first, and then kept: to be early, as growth is looked for.
IO_FDS = REGION_IO_FDS.build({"argsz": 1024, "flags": 0, "index": VIRTIO_BAR, "count": 0})


class _Unwatched(Bounds):
    """Bounds of a device in another process, whose queues cannot be looked at."""

    def __init__(self) -> None:  # the device's core is not here
        self.blind = True

    def note(self) -> None:
        pass

    def allow(self, ranges: Iterable[tuple[int, int]]) -> None:
        pass

    def forget(self) -> None:
        pass

    def check(self) -> None:
        pass

    def check_store(self, address: int, data: bytes) -> None:
        pass


def visit(sockets: Sequence[Sequence[str]], seed: int, count: int, lies: bool) -> int:
    """``count`` visits to devices, each a type and a socket; the main function of a process."""
    try:
        trio.run(_visit_all, [(kind, path) for kind, path in sockets], random.Random(seed), count, lies)
    except BaseException as error:
        found = [each for each in leaves(error) if isinstance(each, Found)]
        if not found:
            raise
        print("\n".join(f"{each}\n{getattr(each, '__notes__', [])}" for each in found), file=sys.stderr)
        return VisitStatus.FOUND
    return VisitStatus.DONE


async def _visit_all(sockets: Sequence[tuple[str, str]], chance: random.Random, count: int, lies: bool) -> None:
    for index in range(count):
        kind, path = chance.choice(sockets)
        memory = chance.choice(_MEMORIES)
        way = chance.choice(["half", "leave"] if lies else ["good", "half", "leave", "hostile"])
        what = f"visit {index}, {way}, to {kind}, {memory} memory"
        try:
            with trio.fail_after(10 * TIMEOUT):
                await _visit(way, kind, path, memory, chance, lies)
                if way != "good" and not lies:
                    what += ", and then a good one"
                    await _visit("good", kind, path, memory, chance, lies)
        except trio.TooSlowError:
            raise Found("hang", f"{what}: {10 * TIMEOUT} s were not enough") from None
        except BaseException as error:
            error.add_note(what)
            for each in leaves(error):
                each.add_note(what)
            raise


async def visit_once(way: str, kind: str, path: str, memory: Memory = "shared", seed: int = 1) -> None:
    """One visit to a device. Raises Found."""
    await _visit(way, kind, path, memory, random.Random(seed), lies=False)


async def _visit(way: str, kind: str, path: str, memory: Memory, chance: random.Random, lies: bool) -> None:
    target = _target(kind)
    async with connected(path) as (client, ram):
        bounds = _Unwatched()
        if way == "good":
            driver = FuzzDriver(client, ram, bounds, memory)
            await driver.map()
            await driver.bring_up()
            await client.call(Command.DEVICE_GET_REGION_IO_FDS, IO_FDS)
            await target.works(driver)
            await driver.reset()
            if client.closed.is_set():
                raise Found("closed", "the server hung up on a good client")
        elif way == "half":
            message = raw_message(Command.REGION_WRITE, os.urandom(64), message_id=0x77)
            await client.send(message[: chance.randrange(1, len(message))])
            await trio.sleep(chance.random() * 0.02)
        else:
            fuzz_kind = chance.choice(_KINDS) if way == "hostile" else "requests"
            case = replace(generate(fuzz_kind, chance.randrange(1 << 30), 0, [kind]), memory=memory, twin=False)
            await _steps(way, case, Performer(client, ram, bounds, case, target), chance, lies)


async def _steps(way: str, case: Case, performer: Performer, chance: random.Random, lies: bool) -> None:
    client = performer.client
    await performer.driver.map()
    steps = [step for step in case.steps if step["do"] != "hello" and not (lies and step["do"] in _WAITING)]
    if way == "leave":  # in the middle, with requests under way
        steps = steps[: chance.randrange(1, len(steps) + 1)]
    try:
        for step in steps:
            await performer.perform(step)
    except Found:
        if not lies:
            raise
    if way == "hostile" and client.doomed:
        with trio.move_on_after(TIMEOUT):
            await client.closed.wait()
        if not client.closed.is_set():
            raise Found("hang", "the server does not hang up on a client that broke the protocol")


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[tuple[FuzzClient, FuzzRam]]:
    """A client that has said VERSION; one that is sent away comes again, as the one before may not have gone yet."""
    with closing(FuzzRam()) as ram, trio.CancelScope() as deadline:
        deadline.deadline = trio.current_time() + TIMEOUT
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client = FuzzClient(sock, ram, _Unwatched(), timeout=TIMEOUT)
            try:
                sock.connect(path)
                async with background() as tasks:
                    tasks.start_soon(client.run)
                    if await client.call(Command.VERSION, hello()):
                        deadline.deadline = float("inf")
                        yield client, ram
                        return
            except (ConnectionRefusedError, FileNotFoundError):
                pass  # it has not begun to listen
            finally:
                client.close()
            await trio.sleep(0.002)
    raise Found("closed", f"the server serves no client for {TIMEOUT} s")


def _target(kind: str) -> FuzzTarget:
    if kind == "net":  # those of the fuzzer are on a network that sends back
        return replace(TARGETS["net"], works=partial(_sends, net.TYPE.exercise.readable if net.TYPE.exercise else b""))
    return TARGETS[kind]


async def _sends(frame: bytes, driver: FuzzDriver) -> None:
    await driver.request(1, [frame], [])
