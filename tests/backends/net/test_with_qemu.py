"""The netdevs that are wire compatible with QEMU's, with a real QEMU at their other end: it is a relay between two.

::

    stream ◀──▶ QEMU's -netdev stream ◀── hub of QEMU's ──▶ QEMU's -netdev dgram ◀──▶ dgram

No virtual machine runs in it, so it starts at once.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from subprocess import DEVNULL

import pytest
import trio
from support.net_sink import Sink

from vfiouser_virtio import vm
from vfiouser_virtio.backends.net.dgram import DgramNetdev
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.backends.net.stream import StreamNetdev

pytestmark = [pytest.mark.qemu, pytest.mark.once]
MACHINE = ["-machine", "none", "-nodefaults", "-display", "none", "-monitor", "none"]
LENGTHS = [60, 61, 1514, 9014, 65000]


@asynccontextmanager
async def qemu(*netdevs: str) -> AsyncIterator[None]:
    """QEMU with these netdevs, ids n0, n1, … on one hub."""
    found = vm.find_qemu()
    arguments = [*MACHINE]
    for number, netdev in enumerate(netdevs):
        arguments += ["-netdev", f"{netdev},id=n{number}", "-netdev", f"hubport,id=p{number},hubid=0,netdev=n{number}"]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, found.command(arguments), env=found.environment, check=False)
        process = await nursery.start(partial(run, stdin=DEVNULL, stdout=DEVNULL))
        try:
            yield
        finally:
            process.kill()


async def exchange(one: Netdev, other: Netdev) -> None:
    """Frames of many lengths go both ways. What is sent before QEMU has both ends is lost: so begin with a few."""
    sinks = {one: Sink(), other: Sink()}
    async with trio.open_nursery() as nursery:
        for netdev, sink in sinks.items():
            nursery.start_soon(netdev.run, sink)
        for sender, sink in ((one, sinks[other]), (other, sinks[one])):
            with trio.fail_after(60):
                while not sink.frames:
                    sender.put(frame_of(bytes(60)))
                    await trio.sleep(0.02)
        with trio.fail_after(60):
            for sender, receiver in ((one, other), (other, one)):
                for length in LENGTHS:
                    data = os.urandom(length)
                    while not sender.put(frame_of(data)):
                        await sender.wait_room()
                    while sinks[receiver].frames[-1].tobytes() != data:
                        await sinks[receiver].wait_frames(len(sinks[receiver].frames) + 1)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("server", [True, False], ids=["we listen", "qemu listens"])
async def test_stream_and_dgram(server: bool, tmp_path: Path) -> None:
    path, ours, theirs = tmp_path / "s", tmp_path / "ours", tmp_path / "theirs"
    stream = StreamNetdev(addr__path=path, server=True) if server else StreamNetdev(addr__path=path, reconnect_ms=10)
    dgram = DgramNetdev(local__path=ours, remote__path=theirs)
    async with qemu(
        f"stream,server={'off' if server else 'on'},addr.type=unix,addr.path={path}",
        f"dgram,local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours}",
    ):
        await exchange(stream, dgram)
    stream.close()
    dgram.close()


async def test_a_group(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stream = StreamNetdev(addr__path=path, server=True)
    host, port = "239.192.1.2", 20000 + os.getpid() % 20000
    dgram = DgramNetdev(remote__host=host, remote__port=port, local__host="127.0.0.1")
    async with qemu(
        f"stream,server=off,addr.type=unix,addr.path={path}",
        f"dgram,remote.type=inet,remote.host={host},remote.port={port},"
        "local.type=inet,local.host=127.0.0.1,local.port=0",
    ):
        await exchange(stream, dgram)
    stream.close()
    dgram.close()
