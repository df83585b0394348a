"""Devices of ``serve --supervise``, their processes, clients and drivers."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from support.command import ServeProcess, serve_process
from support.processes import children

from vfiouser_virtio.guest import ALL_DRIVERS, VirtioDevice, VirtioDriver, bound_pci, virtio_ids
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.vfio_user import SharedMemory, connect
from vfiouser_virtio.vfio_user.client import Client

# Each does something when there is a file called as it says, and answers requests otherwise.
DEVICES = """\
import ctypes, os, time, trio
from vfiouser_virtio.virtio import Device, queue

class Mine(Device):
    device_id = 42
    requestq = queue()

    def __init__(self):
        super().__init__()
        while os.path.exists("stuck"):
            time.sleep(0.01)

    async def run(self):
        async for chain in self.requestq:
            word = chain.readable.read().rstrip(b"\\0").decode()
            if word == "hang" and os.path.exists("hang"):
                time.sleep(1000)
            while word == "compute" and os.path.exists("compute"):
                pass
            if word == "die" and os.path.exists("die"):
                ctypes.string_at(0)
            if word == "grow" and os.path.exists("grow"):
                self.grown = b"x" * (200 << 20)
                await trio.sleep_forever()
            if word == "exit":
                os._exit(0)
            chain.writable.write(b"done")
            chain.complete()

class Resumable(Mine):
    def can_resume(self):
        return True
"""


def device_process(served: ServeProcess) -> int | None:
    """That of the only device, if there is one at the moment."""
    [keeper] = children(served.process.pid)
    return next(iter(children(keeper)), None)


def keeper_fds(served: ServeProcess) -> int:
    """How many file descriptors the only keeper has open."""
    [keeper] = children(served.process.pid)
    return len(os.listdir(f"/proc/{keeper}/fd"))


async def kill_device(served: ServeProcess) -> None:
    """Kill it, as soon as there is one."""
    while (pid := device_process(served)) is None:
        await trio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


async def said(served: ServeProcess, words: str, times: int = 1) -> None:
    """Wait until the log has said this."""
    with trio.fail_after(60):
        while served.log.read_text().count(words) < times:
            await trio.sleep(0.01)


@asynccontextmanager
async def client_of(served: ServeProcess) -> AsyncIterator[Client]:
    """A connection that outlives the device."""
    with SharedMemory(16 << 20) as memory:
        async with connect(served.sockets[0], memory=[memory]) as client:
            yield client


class MineDriver(VirtioDriver):
    """Driver that makes a queue of requests of each such device."""

    name = "mine"
    id_table = virtio_ids(42)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(0)
        device.driver_data = await RequestQueue.open(device, 0)

    async def remove(self, device: VirtioDevice) -> None:
        device.driver_data.close()


@asynccontextmanager
async def driver_of(served: ServeProcess) -> AsyncIterator[VirtioDevice]:
    """A driver in this process, on such a connection."""
    async with (
        client_of(served) as client,
        bound_pci(client, MineDriver(), *(make() for make in ALL_DRIVERS)) as device,
    ):
        yield device


async def ask(device: VirtioDevice, word: str) -> bytes:
    with trio.fail_after(60):
        written, [answer] = await device.driver_data.request([word.encode()], [16])
    return bytes(answer[:written])


@asynccontextmanager
async def mine_served(folder: Path, kind: str, *more: str) -> AsyncIterator[ServeProcess]:
    (folder / "mine.py").write_text(DEVICES)
    options = ["--supervise", "--device", f"mine.py:{kind},id=mine", *more]
    async with serve_process(*options, folder=folder) as served:
        yield served
        assert await served.terminate() == 0
