"""Fields by name, over plain bytes: the operations that Dor Laor asked for."""

import pytest

from vfiouser_virtio.guest import ByteConfig, DeviceBroken, DriverConfig, device_type
from vfiouser_virtio.guest.config import MAX_TRIES
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.ids import DeviceId

CAPACITY, SERIAL = 0x1122_3344_5566_7788, b"\x01\x02\x03"


def disk(**changes: int) -> DriverConfig:
    return DriverConfig(ByteConfig(bytes(blk.Config(capacity=CAPACITY, blk_size=4096, **changes).data)), blk.CONFIG)


class Changing(ByteConfig):
    """Bytes that change during the first ``times`` readings, each time with a new generation."""

    def __init__(self, data: bytes, times: int) -> None:
        super().__init__(data)
        self.times = times
        self.accesses: list[tuple[int, int]] = []

    async def read(self, offset: int, size: int) -> bytes:
        self.accesses.append((offset, size))
        value = await super().read(offset, size)
        if self.times and offset:  # between two fields
            self.times -= 1
            self.data[:] = bytes(byte + 1 & 0xFF for byte in self.data)
            self.changed()
        return value


async def test_integers_and_bytes() -> None:
    config = disk(min_io_size=7)
    assert await config.get("capacity") == CAPACITY
    assert await config.get("blk_size") == 4096
    assert await config.get("min_io_size") == 7
    assert await config.get("geometry_sectors") == 0
    assert await config.get("unused1") == bytes(3)
    with pytest.raises(TypeError, match="unused1 is 3 bytes"):
        await config.get_int("unused1")


async def test_set() -> None:
    config = disk()
    await config.set("wce", 1)
    assert await config.get("wce") == 1
    await config.set("unused1", b"abc")
    assert await config.get("unused1") == b"abc"
    assert await config.get("max_secure_erase_sectors") == 0  # the neighbour


@pytest.mark.parametrize(("field", "value"), [("wce", 256), ("wce", -1), ("unused1", b"ab"), ("wce", b"")])
async def test_what_does_not_fit(field: str, value: int | bytes) -> None:
    with pytest.raises(ValueError, match=field):
        await disk().set(field, value)


async def test_unknown_fields() -> None:
    with pytest.raises(KeyError, match="no configuration field 'volume' among capacity, size_max"):
        await disk().get("volume")
    with pytest.raises(KeyError, match="volume"):
        await disk().set("volume", 1)
    with pytest.raises(KeyError, match="among none"):
        await DriverConfig(ByteConfig(b""), None).get("capacity")


async def test_all_fields() -> None:
    values = await disk().get_all()
    assert tuple(values) == disk().fields
    assert values["capacity"] == CAPACITY


async def test_a_change_between_two_fields_is_read_again() -> None:
    ops = Changing(bytes(8), times=3)
    config = DriverConfig(ops, device_type(DeviceId.CONSOLE).config)
    values = await config.get_all("cols", "rows")
    assert values == {"cols": 0x0303, "rows": 0x0303}  # of one generation: the last change was the third
    assert len(ops.accesses) == 8


async def test_a_field_of_one_access_needs_no_generation() -> None:
    ops = Changing(bytes(12), times=1)
    assert await DriverConfig(ops, device_type(DeviceId.CONSOLE).config).get("rows") == 0
    assert ops.accesses == [(2, 2)]


async def test_a_generation_that_never_rests() -> None:
    ops = Changing(bytes(12), times=1 << 30)
    with pytest.raises(DeviceBroken, match="config_generation changed") as caught:
        await DriverConfig(ops, device_type(DeviceId.CONSOLE).config).get_all("cols", "rows")
    assert caught.value.rule == "CC4"
    assert len(ops.accesses) == 2 * MAX_TRIES


async def test_beyond_the_end_there_are_zeros() -> None:
    config = DriverConfig(ByteConfig(bytes(8)), blk.CONFIG)
    assert await config.get("num_queues") == 0
