"""Wires of the parent process between its hubs and the devices of other processes; here all is in one."""

import contextlib
import logging
import socket

import pytest
import trio
import trio.testing

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.wire import WireNetdev
from vfiouser_virtio.protocols.virtio.net import HDR_TUNNEL_CODEC
from vfiouser_virtio.serving.hub_wires import HubWire

MACS = [bytes.fromhex("0200000000") + bytes([number]) for number in range(4)]


def three_wires() -> list[HubWire]:
    wires = []
    for number in range(3):
        ours, theirs = WireNetdev.pair()
        theirs.setblocking(False)
        wires.append(HubWire(number, f"net{number}", HubNetdev(hub="lan"), ours, theirs))
    return wires


def send(end: socket.socket, to: int, sender: int, length: int = 50) -> None:
    end.send(bytes(HDR_TUNNEL_CODEC.size) + MACS[to] + MACS[sender] + b"\x88\xb5" + bytes(length))


async def receive(end: socket.socket) -> bytes:
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(end)
    return end.recv(1 << 17)[HDR_TUNNEL_CODEC.size :]


async def learn(wires: list[HubWire]) -> None:
    """Have the hub know where each device is: each sends a frame to nobody, which the others get."""
    for number, wire in enumerate(wires):
        send(wire.theirs, 3, number)
        for other in wires:
            if other is not wire:
                await receive(other.theirs)


async def test_a_device_that_reads_nothing_is_waited_for_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wait for its wire, which trio does not let them (BusyResourceError): the parent ended, and all devices."""
    monkeypatch.setattr("vfiouser_virtio.backends.net.outlet.PATIENCE", 600.0)
    wires = three_wires()
    async with trio.open_nursery() as nursery:
        for wire in wires:
            nursery.start_soon(wire.run)
        await trio.testing.wait_all_tasks_blocked()
        await learn(wires)
        sent = 0
        for _ in range(40):
            for sender in (0, 1):
                with contextlib.suppress(BlockingIOError):
                    send(wires[sender].theirs, 2, sender, 60_000)
                    sent += 1
            await trio.testing.wait_all_tasks_blocked()
        assert 2 < sent < 80  # neither could send all: both wait
        assert len(nursery.child_tasks) == 3
        for _ in range(sent):
            assert len(await receive(wires[2].theirs)) == 60_014
        nursery.cancel_scope.cancel()
    for wire in wires:
        wire.theirs.close()


async def test_a_bug_ends_the_wire_that_has_it_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wires = three_wires()

    def put_burst(frames: list[Frame]) -> int:
        raise RuntimeError("made for the test")

    async with trio.open_nursery() as nursery:
        for wire in wires:
            nursery.start_soon(wire.run)
        await trio.testing.wait_all_tasks_blocked()
        await learn(wires)
        monkeypatch.setattr(wires[0].port, "put_burst", put_burst)
        send(wires[0].theirs, 1, 0)
        assert await receive(wires[0].theirs) == b""  # its end is closed
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert line.startswith("net0: a bug in its wire to hub lan, which is cut: ")
        assert line.endswith("RuntimeError: made for the test")
        send(wires[1].theirs, 2, 1)
        assert (await receive(wires[2].theirs))[:12] == MACS[2] + MACS[1]
        nursery.cancel_scope.cancel()
    for wire in wires:
        wire.theirs.close()
