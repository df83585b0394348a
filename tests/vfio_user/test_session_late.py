"""Accesses of regions that are answered later, on the fast path and behind others."""

import errno

import pytest
from support.echo_device import EchoDevice
from support.qemu_messages import read, until, write

from vfiouser_virtio import holds
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_device import AnswerLater, Buffer, Hold
from vfiouser_virtio.vfio_user import Client


class LateDevice(EchoDevice):
    """What is at 0x100 and above in region 0 is answered when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.holds: list[Hold] = []
        self.expired = 0
        self.refuse = False

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        data = super().region_read(index, offset, count)
        if index == 0 and offset >= 0x100:
            raise self._late(data)
        return data

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        super().region_write(index, offset, data)
        if index == 0 and offset >= 0x100:
            raise self._late(b"")

    def _late(self, data: Buffer) -> AnswerLater:
        def expire() -> None:
            self.expired += 1
            self.holds[-1].finish()

        def answer() -> Buffer:
            if self.refuse:
                raise PeerError("not here", errno.EPERM)
            return data

        self.holds.append(Hold(on_expire=expire))
        return AnswerLater(self.holds[-1], answer)


@pytest.fixture
def device() -> LateDevice:
    """See `LateDevice`."""
    return LateDevice()


async def test_the_reply_and_all_behind_it_wait(client: RawClient, device: LateDevice) -> None:
    device.regions[0][0x100:0x104] = b"late"
    await client.send(client.request(9, read(0, 0x100, 4)))
    await client.send(client.request(9, read(0, 0x100, 4)))  # this one off the fast path
    await client.send(client.request(10, write(0, 0, b"x"), flags=0x10))
    await client.send(client.request(9, read(0, 0, 1)))
    await until(lambda: device.holds)
    await client.silence()
    assert len(device.holds) == 1
    device.holds[0].finish()
    assert (await client.receive()).body == read(0, 0x100, 4) + b"late"
    await until(lambda: len(device.holds) == 2)
    await client.silence()
    device.holds[1].finish()
    assert (await client.receive()).body == read(0, 0x100, 4) + b"late"
    assert (await client.receive()).body == read(0, 0, 1) + b"x"
    assert (await client.call(9, read(0, 0, 1))).body[-1:] == b"x"


@pytest.mark.parametrize("flags", [0, 0x10])
async def test_a_write_waits(flags: int, client: RawClient, device: LateDevice) -> None:
    await client.send(client.request(10, write(0, 0x100, b"abcd"), flags=flags))
    await client.send(client.request(9, read(0, 0, 1)))
    await until(lambda: device.holds)
    await client.silence()
    device.holds[0].finish()
    if not flags:
        reply = await client.receive()
        assert (reply.command, reply.body) == (10, read(0, 0x100, 4))
    assert (await client.receive()).command == 9


async def test_what_has_ended_is_answered_at_once(client: RawClient, device: LateDevice) -> None:
    device.region_read = lambda index, offset, count: (_ for _ in ()).throw(AnswerLater(Hold(0), lambda: b"12"))
    assert (await client.call(9, read(0, 0, 2))).body[-2:] == b"12"
    assert (await client.call(9, read(0, 0, 3))).error == errno.EIO, "a wrong length is a bug of the device"


async def test_a_refusal_that_comes_late(client: RawClient, device: LateDevice) -> None:
    device.refuse = True
    await client.send(client.request(9, read(0, 0x100, 4)))
    await until(lambda: device.holds)
    device.holds[0].finish()
    assert (await client.receive()).error == errno.EPERM
    assert (await client.call(9, read(0, 0, 1))).error == 0


async def test_the_device_is_told_that_it_takes_too_long(
    client: RawClient, device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 0.01)
    assert (await client.call(9, read(0, 0x100, 4))).body[-4:] == bytes(4)
    assert device.expired == 1


async def test_several_writes_at_once(echo: Client, device: LateDevice) -> None:
    """Each waits for the one before it."""
    echo.post_write_multi([(0, 0x100, b"a"), (0, 0x101, b"b"), (0, 0, b"c")])
    for number in (1, 2):
        await until(lambda: len(device.holds) == number)  # noqa: B023 - it is called here
        assert device.names().count("region_write") == number
        device.holds[-1].finish()
    assert await echo.region_read(0, 0, 1) == b"c"
    assert bytes(device.regions[0][0x100:0x102]) == b"ab"


async def test_a_client_that_goes_meanwhile(client: RawClient, device: LateDevice) -> None:
    await client.send(client.request(9, read(0, 0x100, 4)))
    await until(lambda: device.holds)
    client.close()
    device.holds[0].finish()
    await until(lambda: "disconnected" in device.names())
