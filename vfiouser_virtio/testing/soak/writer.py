"""Guest that writes numbered blocks to a disk, several at a time, with a flush now and then, until it is killed."""

import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from pathlib import Path

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.dma import PrivateMemory, SharedMemory
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.guest import DeviceBroken, DeviceGone, Disk, RequestFailed, bound_pci
from vfiouser_virtio.testing.soak.ledger import BLOCK, BLOCK_SECTORS, Ledger, WriteState, block_content
from vfiouser_virtio.vfio_user import Client, ClientOptions, ConnectError, connect

RAM = 4 << 20
TIMEOUT = 120.0
"""Seconds for an answer: a server that was stopped, or a machine that does much else, are no faults."""


class WriterStatus(IntEnum):
    """Exit statuses of a writer."""

    DONE = 0
    """The ledger is full."""
    SERVER_GONE = 3
    WRONG_CONTENT = 4
    """What it has read in the beginning is not what it, or the one before it, has written."""
    DEVICE_FAILED = 5
    """The device broke virtio, or a request ended badly."""


def write_blocks(
    path: str, ledger: str, blocks: int, room: int, seed: int, shared: bool, depth: int, patience: float
) -> int:
    """Check the disk, then write; returns a `WriterStatus`. The main function of a process.

    When nothing has ended for ``patience`` seconds it prints what it waits for.
    """
    with Ledger(Path(ledger), blocks=blocks, room=room) as book:
        writer = _DiskWriter(book, random.Random(seed), depth, patience)
        try:
            trio.run(partial(writer.run, path, shared=shared))
        except BaseException as error:
            found = list(leaves(error))
            failed = [one for one in found if isinstance(one, WrongContent | DeviceBroken | RequestFailed)]
            if failed:
                print(f"{type(failed[0]).__name__}: {failed[0]}", file=sys.stderr)
                wrong = isinstance(failed[0], WrongContent)
                return WriterStatus.WRONG_CONTENT if wrong else WriterStatus.DEVICE_FAILED
            gone = PeerError | OSError | EOFError | ConnectError | DeviceGone | trio.Cancelled
            if all(isinstance(one, gone) for one in found):
                print(f"the server is gone: {found[0]!r}", file=sys.stderr)
                return WriterStatus.SERVER_GONE
            raise
    return WriterStatus.DONE


class WrongContent(Exception):
    """Content of a disk that it cannot have."""


class _DiskWriter:
    def __init__(self, ledger: Ledger, chance: random.Random, depth: int, patience: float) -> None:
        self._ledger, self._chance, self._depth = ledger, chance, depth
        self._patience = patience
        self._waits: dict[str, float] = {}
        """What is waited for, and since when."""
        self._ended = 0
        """How many such waits have ended."""
        self._flushes = 0
        self._busy: set[int] = set()
        self._completed: list[int] = []

    async def run(self, path: str, *, shared: bool) -> None:
        with SharedMemory(RAM) if shared else PrivateMemory(RAM) as memory:
            options = ClientOptions(timeout=TIMEOUT)
            async with background() as watch:
                watch.start_soon(self._tell)
                with self._waiting_for("the server's socket"):
                    sock = await connected(path)
                with self._waiting_for("the device to work, or to end"):
                    async with connect(sock, memory=[memory], options=options) as client, bound_pci(client) as device:
                        disk: Disk = device.driver_data
                        await self._check(disk)
                        # A driver that waits for an interrupt does not look at the socket.
                        watch.start_soon(_end_with, client)
                        async with trio.open_nursery() as nursery:
                            for _ in range(self._depth):
                                nursery.start_soon(self._write, disk)
                        watch.cancel_scope.cancel()

    @contextmanager
    def _waiting_for(self, what: str) -> Iterator[None]:
        self._waits[what] = trio.current_time()
        try:
            yield
        finally:
            del self._waits[what]
            self._ended += 1

    async def _tell(self) -> None:
        """Print what is waited for, whenever nothing has ended for some time."""
        before = -1
        while True:
            await trio.sleep(self._patience)
            if before == self._ended:
                now = trio.current_time()
                waits = ", ".join(f"{what} ({now - since:.0f} s)" for what, since in self._waits.items())
                print(f"nothing has ended for {self._patience:g} s; waits for {waits or 'nothing'}", flush=True)
            before = self._ended

    async def _check(self, disk: Disk) -> None:
        content = b""
        while len(content) < BLOCK * self._ledger.blocks:
            with self._waiting_for(f"a read at {len(content):#x}"):
                content += await disk.read(len(content) // 512, min(256, self._ledger.blocks * BLOCK_SECTORS))
        if complaints := list(self._ledger.complaints(content)):
            raise WrongContent("; ".join(complaints[:5]))

    async def _write(self, disk: Disk) -> None:
        chance, ledger = self._chance, self._ledger
        while not ledger.full:
            block = chance.choice([each for each in range(ledger.blocks) if each not in self._busy])
            self._busy.add(block)
            number = ledger.start(block)
            with self._waiting_for(f"write {number} of block {block}"):
                await disk.write(block * BLOCK_SECTORS, block_content(number, block))
            ledger.note(number, WriteState.COMPLETED)
            self._busy.discard(block)
            self._completed.append(number)
            if chance.random() < 0.25 or ledger.full:
                await self._flush(disk)
        await self._flush(disk)

    async def _flush(self, disk: Disk) -> None:
        completed, self._completed = self._completed, []
        self._flushes += 1
        with self._waiting_for(f"flush {self._flushes}"):
            await disk.flush()
        for number in completed:
            self._ledger.note(number, WriteState.FLUSHED)


async def _end_with(client: Client) -> None:
    raise await client.wait_closed()


async def connected(path: str) -> socket.socket:
    """A connection to a server that may have been started just now. Raises TooSlowError."""
    with trio.fail_after(TIMEOUT):
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                sock.connect(path)
            except OSError:
                sock.close()
                await trio.sleep(0.005)
            else:
                return sock
