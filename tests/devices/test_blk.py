"""The block device as a driver sees it, over shared and private memory; data is checked on the host's side."""

import os
from pathlib import Path

import pytest
from support.blk_device import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    SECURE_ERASE,
    SIZE,
    UNSUPP,
    WRITE_ZEROES,
    both_memories,
    header,
    segment,
    status,
)

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.blk_requests import MAX_DISCARD_SEGMENTS, MAX_RANGE_SECTORS
from vfiouser_virtio.protocols.virtio.blk import BlkFeature
from vfiouser_virtio.testing.driver import DeviceNeedsReset, running
from vfiouser_virtio.virtio.options import Size

# ---- data ----------------------------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("medium", ["file", "ram"])
async def test_write_then_read(image: Path, private: bool, indirect: bool, medium: str) -> None:
    device = Blk(path=image) if medium == "file" else Blk(size=Size(SIZE))
    data = os.urandom(8192)
    async with running(device, private=private) as driver:
        used = await driver.request([header(OUT, 3), data[:5000], data[5000:]], [1], indirect=indirect)
        assert (status(used), used.written) == (OK, 1)
        used = await driver.request([header(FLUSH)], [1])
        assert (status(used), used.written) == (OK, 1)
        if medium == "file":
            assert image.read_bytes()[1536 : 1536 + 8192] == data
        for sizes in ([8192, 1], [8193], [100, 8091, 2], [4096, 4096, 1]):
            used = await driver.request([header(IN, 3)], sizes, indirect=indirect)
            assert (status(used), used.written) == (OK, 8193)
            assert b"".join(used.data)[:-1] == data
    if medium == "file":
        assert image.stat().st_size == SIZE


@both_memories
async def test_framing_means_nothing(image: Path, private: bool) -> None:
    """2.7.4.1: the header in descriptors of one byte, data in the header's last one, the status behind the data."""
    data = os.urandom(512)
    async with running(Blk(path=image), private=private) as driver:
        request = header(OUT, 7) + data
        used = await driver.request([*(bytes([byte]) for byte in request[:15]), request[15:]], [1])
        assert (status(used), used.written) == (OK, 1)
        assert image.read_bytes()[7 * 512 :][:512] == data
        used = await driver.request([bytes([byte]) for byte in header(IN, 7)], [513])
        assert (used.data[0], used.written) == (data + b"\0", 513)
        # Empty descriptors anywhere.
        used = await driver.request([b"", header(IN, 7), b""], [0, 512, 0, 1])
        assert (used.data[1], status(used), used.written) == (data, OK, 513)


async def test_reads_give_each_request_its_own_data(image: Path) -> None:
    """Many at once, cached or not, over several queues: nothing is mixed up, and every request comes back."""
    content = image.read_bytes()
    async with running(Blk(path=image, num_queues=4)) as driver:
        with image.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, SIZE, os.POSIX_FADV_DONTNEED)
        for turn in range(20):
            tokens = []
            for number in range(48):
                sector = (turn * 131 + number * 37) % (SECTORS - 8)
                tokens.append((number % 4, sector, driver.add(number % 4, [header(IN, sector)], [4096, 1])))
            for queue in range(4):
                driver.kick(queue)
            for queue, sector, token in tokens:
                used = await driver.wait(queue, token)
                assert (status(used), used.data[0]) == (OK, content[sector * 512 :][:4096])


async def test_writes_of_a_burst_all_arrive(image: Path) -> None:
    pieces = [os.urandom(4096) for _ in range(60)]
    async with running(Blk(path=image)) as driver:
        tokens = [driver.add(0, [header(OUT, 8 * at), piece], [1]) for at, piece in enumerate(pieces)]
        driver.kick(0)
        for token in tokens:
            assert status(await driver.wait(0, token)) == OK
    assert image.read_bytes()[: 60 * 4096] == b"".join(pieces)


@both_memories
async def test_get_id(private: bool) -> None:
    async with running(Blk(size=Size(SIZE), serial="disk-0815"), private=private) as driver:
        used = await driver.request([header(GET_ID)], [20, 1])
        assert (used.data[0], status(used), used.written) == (b"disk-0815".ljust(20, b"\0"), OK, 21)
        # Room for less; room for more, where there is a gap in front of the status.
        used = await driver.request([header(GET_ID)], [4, 1])
        assert (used.data[0], status(used), used.written) == (b"disk", OK, 5)
        used = await driver.request([header(GET_ID)], [100, 1])
        assert (used.data[0][:9], status(used), used.written) == (b"disk-0815", OK, 20)


@both_memories
@pytest.mark.parametrize("flags", [0, 1])
async def test_write_zeroes(image: Path, private: bool, flags: int) -> None:
    before = image.read_bytes()
    async with running(Blk(path=image), private=private) as driver:
        used = await driver.request([header(WRITE_ZEROES), segment(3, 24, flags)], [1])
        assert (status(used), used.written) == (OK, 1)
        used = await driver.request([header(IN, 3)], [24 * 512, 1])
        assert used.data[0] == bytes(24 * 512)
    assert image.read_bytes() == before[:1536] + bytes(24 * 512) + before[27 * 512 :]


async def test_discard_frees_the_file_s_blocks(image: Path) -> None:
    async with running(Blk(path=image)) as driver:
        await driver.request([header(FLUSH)], [1])
        blocks = image.stat().st_blocks
        used = await driver.request([header(DISCARD), segment(0, 64), segment(1024, 1024)], [1])
        assert (status(used), used.written) == (OK, 1)
        assert image.stat().st_blocks < blocks
        assert image.stat().st_size == SIZE


# ---- what must not be done -----------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize(
    ("out", "room", "expected"),
    [
        ([header(IN, SECTORS)], 512, IOERR),
        ([header(IN, SECTORS - 1)], 1024, IOERR),
        ([header(IN, (1 << 64) - 1)], 512, IOERR),
        ([header(IN, (1 << 64) - 1)], 1024, IOERR),
        ([header(IN, 1 << 55)], 512, IOERR),
        ([header(IN)], 511, IOERR),
        ([header(IN)], 513, IOERR),
        ([header(OUT, SECTORS - 1), bytes(1024)], 0, IOERR),
        ([header(OUT), bytes(700)], 0, IOERR),
        ([header(DISCARD)], 0, IOERR),
        ([header(DISCARD), segment(0, 8)[:-1]], 0, IOERR),
        ([header(DISCARD), segment(0, 8) + b"\0"], 0, IOERR),
        ([header(DISCARD), segment(SECTORS, 1)], 0, IOERR),
        ([header(DISCARD), segment((1 << 64) - 1, 1)], 0, IOERR),
        ([header(DISCARD), segment(0, 8), segment(SECTORS - 4, 8)], 0, IOERR),
        ([header(DISCARD), segment(0, MAX_RANGE_SECTORS + 1)], 0, IOERR),
        ([header(DISCARD), segment(0, 1) * (MAX_DISCARD_SEGMENTS + 1)], 0, IOERR),
        ([header(DISCARD), segment(0, 8, flags=1)], 0, UNSUPP),
        ([header(DISCARD), segment(0, 8), segment(0, 8, flags=1 << 31)], 0, UNSUPP),
        ([header(WRITE_ZEROES), segment(0, 8, flags=2)], 0, UNSUPP),
        ([header(WRITE_ZEROES), segment(0, 8, flags=3)], 0, UNSUPP),
        ([header(WRITE_ZEROES), segment(0, 8), segment(8, 8)], 0, IOERR),
        ([header(WRITE_ZEROES), segment(SECTORS - 1, 2)], 0, IOERR),
        ([header(SECURE_ERASE), segment(0, 8)], 0, UNSUPP),
        ([header(2)], 0, UNSUPP),
        ([header(15), bytes(512)], 0, UNSUPP),
        ([header(0xFFFF_FFFF)], 512, UNSUPP),
    ],
)
async def test_refused(image: Path, private: bool, out: list[bytes], room: int, expected: int) -> None:
    before = image.read_bytes()
    async with running(Blk(path=image), private=private) as driver:
        used = await driver.request(out, [room, 1] if room else [1])
        assert status(used) == expected
        # Only what was really written counts (2.7.8.2), so that a driver never takes old bytes for data.
        assert used.written == (0 if room else 1)
        assert status(await driver.request([header(IN)], [512, 1])) == OK
    assert image.read_bytes() == before


async def test_no_data_is_a_request_too(image: Path) -> None:
    async with running(Blk(path=image)) as driver:
        for kind in (IN, OUT):
            used = await driver.request([header(kind, SECTORS)], [1])
            assert (status(used), used.written) == (OK, 1)


@both_memories
@pytest.mark.parametrize(
    ("out", "in_"),
    [([], [1]), ([header(IN)[:-1]], [512, 1]), ([header(IN)], []), ([header(OUT), bytes(512)], []), ([], [16, 512, 1])],
    ids=["no header", "short header", "no status", "write without status", "header where we write"],
)
async def test_broken_requests_need_a_reset(private: bool, out: list[bytes], in_: list[int]) -> None:
    async with running(Blk(size=Size(SIZE)), private=private) as driver:
        with pytest.raises(DeviceNeedsReset):
            await driver.request(out, in_)
        assert driver.config_interrupts == 1
        await driver.reset()
        driver.probe()
        assert status(await driver.request([header(IN)], [512, 1])) == OK


@both_memories
async def test_read_only(image: Path, private: bool) -> None:
    before = image.read_bytes()
    image.chmod(0o444)
    async with running(Blk(path=image, readonly=True), private=private) as driver:
        assert driver.offered & BlkFeature.RO.mask
        assert not driver.offered & (BlkFeature.DISCARD.mask | BlkFeature.WRITE_ZEROES.mask)
        used = await driver.request([header(OUT), bytes(512)], [1])
        assert (status(used), used.written) == (IOERR, 1)
        assert status(await driver.request([header(DISCARD), segment(0, 8)], [1])) == UNSUPP
        assert status(await driver.request([header(WRITE_ZEROES), segment(0, 8)], [1])) == UNSUPP
        assert status(await driver.request([header(FLUSH)], [1])) == OK
        assert (await driver.request([header(IN)], [512, 1])).data[0] == before[:512]
    assert image.read_bytes() == before
