"""The client against our own server, with an `EchoDevice`, over a real socket."""

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from support.echo_device import EchoDevice

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import Command, IrqSetFlags, PciIrq
from vfiouser_virtio.testing.raw.client import QEMU_CAPABILITIES
from vfiouser_virtio.vfio_device import Hold, IoEventFd
from vfiouser_virtio.vfio_user import (
    QEMU_OPTIONS,
    QEMU_VERSION,
    SPDK_OPTIONS,
    TWIN_VERSION,
    Client,
    ClientOptions,
    ConnectError,
    Listener,
    PrivateMemory,
    RemoteError,
    Server,
    SharedMemory,
    VersionProposal,
)
from vfiouser_virtio.vfio_user import connect as connect_to

MIB = 1 << 20


# Connecting


async def test_what_is_negotiated(echo: Client, device: EchoDevice) -> None:
    assert device.names() == ["connected"]
    assert echo.version is not None
    assert (echo.version.minor, echo.version.max_msg_fds, echo.version.write_multiple) == (1, 16, True)
    assert echo.alive


@pytest.mark.parametrize(
    ("options", "minor", "keys"),
    [
        (QEMU_OPTIONS, 0, {"max_msg_fds", "max_data_xfer_size", "pgsizes", "max_dma_maps", "write_multiple"}),
        (SPDK_OPTIONS, 1, set()),
        (ClientOptions(version=TWIN_VERSION), 1, None),
        (ClientOptions(version=VersionProposal(minor=7)), 1, None),
        (ClientOptions(version=VersionProposal(minor=0, capabilities={})), 0, set()),
        (ClientOptions(version=VersionProposal(data=b"\0")), 1, set()),
        (ClientOptions(version=VersionProposal(capabilities={"max_msg_fds": 1, "x": []}), strict=True), 1, set()),
    ],
)
async def test_every_kind_of_client(
    server: str, device: EchoDevice, options: ClientOptions, minor: int, keys: set[str] | None
) -> None:
    async with connect_to(server, options=options) as client:
        assert client.version is not None
        assert client.version.minor == minor
        assert keys is None or set(client.version.capabilities) - {"max_msg_fds"} == keys - {"max_msg_fds"}
        await client.config_write(4, 2, 0x0406)
        assert await client.config_read(4, 2) == 0x0406
        assert (await client.device_info()).num_regions == 9


@pytest.mark.parametrize(
    "proposal", [VersionProposal(major=1), VersionProposal(data=b"{}"), VersionProposal(data=b"nonsense\0")]
)
async def test_a_proposal_that_the_server_refuses(server: str, proposal: VersionProposal) -> None:
    with pytest.raises(RemoteError) as caught:
        async with connect_to(server, options=ClientOptions(version=proposal)):
            pass
    assert (caught.value.errno, caught.value.command) == (errno.EINVAL, Command.VERSION)
    assert "VERSION" in str(caught.value)


async def test_negotiating_late_and_twice(server: str) -> None:
    async with connect_to(server, options=ClientOptions(version=None)) as client:
        assert client.version is None
        version = await client.negotiate(QEMU_VERSION)
        assert client.version is version
        with pytest.raises(RemoteError):
            await client.negotiate(QEMU_VERSION)


async def test_another_command_first(server: str) -> None:
    async with connect_to(server, options=ClientOptions(version=None)) as client:
        with pytest.raises(RemoteError):
            await client.device_info()
        assert (await client.wait_closed()).errno == errno.ENOTCONN


@pytest.mark.parametrize("name", ["missing.sock", "file", "x" * 200])
async def test_nobody_there(tmp_path: Path, name: str, open_fds: Callable[[], int]) -> None:
    (tmp_path / "file").touch()
    before = open_fds()
    with pytest.raises(ConnectError, match=f"cannot connect to '{tmp_path}/{name}': "):
        async with connect_to(tmp_path / name):
            pass
    assert open_fds() == before


async def test_a_server_that_does_not_accept(tmp_path: Path, open_fds: Callable[[], int]) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(tmp_path / "s"))
        listening.listen(0)
        before = open_fds()
        options = ClientOptions(version=None, timeout=1)
        async with connect_to(tmp_path / "s", options=options):
            with pytest.raises(ConnectError, match="too many clients"):
                async with connect_to(tmp_path / "s", options=options):
                    pass
        assert open_fds() == before


async def test_an_exception_of_the_block_is_not_wrapped(server: str) -> None:
    with pytest.raises(ZeroDivisionError):
        async with connect_to(server):
            raise ZeroDivisionError
    with pytest.raises(pytest.skip.Exception):
        async with connect_to(server):
            pytest.skip("as a fixture may")


async def test_cancelling_the_block(server: str) -> None:
    with trio.move_on_after(0.05) as scope:
        async with connect_to(server):
            await trio.sleep_forever()
    assert scope.cancelled_caught


# Interrupts, raw


async def test_every_form_of_set_irqs(echo: Client, device: EchoDevice) -> None:
    data_flags = (IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD)
    actions = (IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, IrqSetFlags.ACTION_TRIGGER)
    fds = [os.eventfd(0), os.eventfd(0)]
    for flags in [data | action for data in data_flags for action in actions]:
        data = b"\1\0" if flags & IrqSetFlags.DATA_BOOL else b""
        sent = fds if flags & IrqSetFlags.DATA_EVENTFD else []
        await echo.set_irqs(PciIrq.MSIX, flags, 3, 2, data=data, fds=sent)
        assert device.calls[-1] == ("set_irqs", PciIrq.MSIX, flags, 3, 2, data, len(sent))
    with pytest.raises(RemoteError):
        await echo.set_irqs(PciIrq.MSIX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 32, 1)
    for fd in fds:
        os.close(fd)


# The end


@asynccontextmanager
async def server_that_ends(device: EchoDevice, listener: Listener) -> AsyncIterator[trio.CancelScope]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server(device).serve, listener)
        yield nursery.cancel_scope
        nursery.cancel_scope.cancel()


async def test_a_server_that_goes(device: EchoDevice, listener: Listener) -> None:
    async with server_that_ends(device, listener) as scope, connect_to(listener.name) as client:
        device.hold = hold = Hold()
        errors: list[PeerError] = []

        async def wait() -> None:
            try:
                await client.device_reset()
            except PeerError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.01)
            scope.cancel()
            hold.finish()
        assert [error.errno for error in errors] == [errno.ENOTCONN] * 2
        assert errors[0] is not errors[1]
        assert f"{listener.name}: the server closed the connection" in str(errors[0])
        assert not client.alive
        with pytest.raises(PeerError, match="the server closed"):
            await client.device_info()
        with pytest.raises(PeerError, match="the server closed"):
            client.bar_post(0, 0, 1, 0)


async def test_leaving_in_the_middle(echo: Client, device: EchoDevice) -> None:
    async def reset() -> None:
        with pytest.raises(PeerError, match="the client has disconnected"):
            await echo.device_reset()

    device.hold = Hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reset)
        await trio.testing.wait_all_tasks_blocked(0.01)
        echo.disconnect()
    device.hold = None
    assert (await echo.wait_closed()).errno == errno.ENOTCONN
    echo.disconnect()


async def test_leaving_with_a_twin_socket_is_no_mistake(
    server: str, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        async with connect_to(server, options=ClientOptions(version=TWIN_VERSION)):
            pass
    with trio.fail_after(60):
        while device.names().count("disconnected") < 10:
            await trio.sleep(0.001)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


async def test_nothing_leaks(server: str, device: EchoDevice, open_fds: Callable[[], int]) -> None:
    fds = [os.eventfd(0) for _ in range(2)]
    device.io = [IoEventFd(0, 2, fds[0])]
    device.region_fds[4] = (fds[1],)

    async def use(options: ClientOptions) -> None:
        with SharedMemory(4096) as ram, PrivateMemory(4096, address=0) as private:
            async with connect_to(server, options=options, memory=[ram, private]) as client:
                await client.use_io_fds(4)
                await client.region_info(4)
                await client.connect_msix([lambda: None] * 32)
                await client.connect_intx(lambda: None, resample=True)
                reply = await client.request(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 4, 0, 0, 0))
                for fd in reply.take_fds():
                    os.close(fd)
                device.regions[0] = bytearray(MIB)
                for _ in range(3):
                    client.region_post(0, 0, bytes(MIB))
                client.post(Command.DMA_MAP, bytes(32), fds)  # queued behind them, with copies
        with trio.fail_after(60):
            while "disconnected" not in device.names():
                await trio.sleep(0.001)
        device.calls.clear()

    for kind in (ClientOptions(), replace(QEMU_OPTIONS, version=TWIN_VERSION)):
        await use(kind)
        before, tasks = open_fds(), trio.lowlevel.current_statistics().tasks_living
        for _ in range(5):
            await use(kind)
        assert open_fds() == before
        assert trio.lowlevel.current_statistics().tasks_living == tasks
    for fd in fds:
        os.close(fd)


def test_qemus_proposal_is_the_one_in_these_tests() -> None:
    assert QEMU_OPTIONS.version is not None
    assert QEMU_CAPABILITIES.encode() in QEMU_OPTIONS.version.payload()
