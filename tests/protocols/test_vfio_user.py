"""The schemas of every vfio-user command: complete, of the sizes that the specification gives, and reversible."""

import struct

import construct
import pytest

from vfiouser_virtio.protocols import vfio_user as vu
from vfiouser_virtio.protocols.codec import codec, offsets
from vfiouser_virtio.protocols.vfio_user import COMMANDS, Command, Direction


def test_every_command_has_its_formats() -> None:
    assert list(COMMANDS) == list(Command)
    from_server = {command for command, formats in COMMANDS.items() if formats.direction is Direction.SERVER_TO_CLIENT}
    assert from_server == {Command.DMA_READ, Command.DMA_WRITE}


SIZES = {  # as the specification's tables give them, without what is of variable size
    "HEADER": 16, "DMA_MAP": 32, "DMA_UNMAP": 24, "DEVICE_INFO": 16, "REGION_INFO": 32, "INFO_CAP_HEADER": 8,
    "SPARSE_MMAP_AREA": 16, "REGION_IO_FDS": 16, "IOEVENTFD": 40, "IOREGIONFD": 40, "IRQ_INFO": 16, "IRQ_SET": 20,
    "REGION_ACCESS": 16, "DMA_ACCESS": 16, "WRITE_MULTI_ENTRY": 24, "WRITE_MULTI_REPLY": 8, "DEVICE_FEATURE_HEADER": 8,
    "FEATURE_MIGRATION": 8, "FEATURE_MIG_DEVICE_STATE": 8, "FEATURE_DMA_LOGGING_RANGE": 16, "MIG_DATA": 8,
    "DIRTY_PAGES_HEADER": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    schema = getattr(vu, name)
    assert schema.sizeof() == codec(schema).size == SIZES[name]


def test_offsets_of_the_sub_regions() -> None:
    expected = {"offset": (0, 8), "size": (8, 8), "fd_index": (16, 4), "type": (20, 4), "flags": (24, 4)}
    assert offsets(vu.IOEVENTFD) == {**expected, "datamatch": (32, 8)}
    assert offsets(vu.IOREGIONFD) == {**expected, "user_data": (32, 8)}


def test_sub_regions_of_both_kinds_in_one_reply() -> None:
    event = {"offset": 0x3000, "size": 2, "fd_index": 0, "type": vu.IoFdType.IOEVENTFD, "flags": 1, "datamatch": 7}
    region = {"offset": 0, "size": 8, "fd_index": 1, "type": vu.IoFdType.IOREGIONFD, "flags": 0, "user_data": 99}
    info = {"argsz": 96, "flags": 0, "index": 4, "count": 2}
    raw = vu.REGION_IO_FDS_REPLY.build({"info": info, "sub_regions": [event, region]})
    assert len(raw) == 96
    parsed = vu.REGION_IO_FDS_REPLY.parse(raw)
    assert parsed.sub_regions[0].datamatch == 7
    assert parsed.sub_regions[1].user_data == 99
    with pytest.raises(construct.ConstructError):
        vu.REGION_IO_FDS_REPLY.parse(raw[:36] + b"\2" + raw[37:])  # no such type


COUNTS_OF_64_BITS = (Command.DMA_READ, Command.DMA_WRITE, Command.REGION_WRITE_MULTI)


@pytest.mark.parametrize("command", Command, ids=lambda command: command.name)
@pytest.mark.parametrize("side", ["request", "reply"])
def test_parsing_and_building_are_inverse(command: Command, side: str) -> None:
    schema = getattr(COMMANDS[command], side)
    # Small numbers in every field, so that counts find what they count.
    raw = struct.pack("<32Q", *[1] * 32) if command in COUNTS_OF_64_BITS else struct.pack("<64I", *[1] * 64)
    parsed = schema.parse(raw)
    built = schema.build(parsed)
    assert len(built) <= len(raw)
    assert schema.parse(built) == parsed
    if command is not Command.DEVICE_GET_REGION_IO_FDS:  # whose padding is not kept
        assert raw.startswith(built)


def test_codecs_of_the_hot_paths() -> None:
    raw = bytes(range(32))
    both = construct.Struct("header" / vu.HEADER, "access" / vu.REGION_ACCESS).parse(raw)
    assert vu.HEADER_AND_REGION_ACCESS.unpack(raw) == (
        both.header.id,
        both.header.command,
        both.header.size,
        both.header.flags,
        both.header.error,
        both.access.offset,
        both.access.region,
        both.access.count,
    )
    assert vu.HEADER_AND_DMA_ACCESS.unpack(raw)[-2:] == tuple(
        int.from_bytes(raw[start : start + 8], "little") for start in (16, 24)
    )
    assert vu.HEADER_CODEC.size == 16
    assert vu.REGION_ACCESS_CODEC.size == 16
