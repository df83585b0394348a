"""DMA_MAP and DMA_UNMAP that no client should send, and memory that goes away while it is used."""

import os

import pytest
import trio
import trio.testing
from support.hostile import Rings, all_rings, attacked, both_rings
from support.hostile_messages import dma_map, dma_unmap

from vfiouser_virtio.protocols.vfio_user import Command, DmaUnmapFlags
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.testing.fuzz import fd_kinds
from vfiouser_virtio.testing.raw.ring import NEXT, WRITE

TOP = 1 << 64


@pytest.mark.parametrize(
    ("address", "size"),
    [(0x10_0000, 0), (TOP - 0x1000, 0x2000), (TOP - 1, 1), (0, TOP - 1), (0x2F000, 0x1000), (0x2F000, 0x2000),
     (0, 0x100000), (0x10_0001, 0x1000), (0x10_0000, 0x1001), (0x10_0000, 1 << 62)],
    ids=["empty", "wrap", "last-byte", "all", "inside", "overlap", "around", "unaligned", "odd-size", "huge"],
)  # fmt: skip
async def test_a_range_that_cannot_be_mapped(address: int, size: int) -> None:
    """Nothing, past 2^64, over what is mapped already, no whole pages, more than there is."""
    async with attacked() as attack:
        assert await attack.refused(Command.DMA_MAP, dma_map(address, size), [attack.ram.fd])


async def test_flags_and_offsets_that_cannot_be() -> None:
    """Unknown rights; an offset that is no page."""
    async with attacked() as attack:
        for flags in (4, 0x8000_0000, 0xFFFF_FFFF):
            assert await attack.refused(Command.DMA_MAP, dma_map(0x10_0000, 0x1000, flags=flags), [attack.ram.fd])
        for offset in (1, 0xFFF, 0x80001):
            assert await attack.refused(Command.DMA_MAP, dma_map(0x10_0000, 0x1000, offset=offset), [attack.ram.fd])
        for argsz in (0, 31):
            assert await attack.refused(Command.DMA_MAP, dma_map(0x10_0000, 0x1000, argsz=argsz), [attack.ram.fd])


@pytest.mark.parametrize(("offset", "size"), [(0, 0x41000), (0x40000, 0x1000), (0x3F000, 0x2000), (1 << 40, 0x1000)])
async def test_a_file_that_is_too_short(offset: int, size: int) -> None:
    """To touch what is behind the end of a file is SIGBUS, the end of the process: it is refused when it is mapped."""
    async with attacked() as attack:
        fd = fd_kinds.make("memfd", -1)
        assert await attack.refused(Command.DMA_MAP, dma_map(0x10_0000, size, offset=offset), [fd])
        os.close(fd)


@pytest.mark.parametrize("kind", ["memfd", "memfd-sealed"])
async def test_a_file_that_is_truncated_while_it_is_mapped(kind: str) -> None:
    """A memfd cannot become shorter any more once it is mapped."""
    async with attacked() as attack:
        fd = fd_kinds.make(kind, -1)
        await attack.accepted(Command.DMA_MAP, dma_map(0x10_0000, 0x40000), [fd])
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        attack.put((0x13_0000, 8, NEXT), attack.writable(8))
        assert await attack.length_of() == 8
        os.close(fd)


async def test_more_regions_than_there_may_be() -> None:
    """The number of regions of a client is bounded: behind it is an errno, and all of them go again."""
    async with attacked() as attack:
        for page in range(600):  # the whole limit is in tests/transports/test_many_mappings.py
            await attack.accepted(Command.DMA_MAP, dma_map(0x1000_0000 + 0x2000 * page, 0x1000), [attack.ram.fd])
        await attack.accepted(Command.DMA_UNMAP, dma_unmap(0, 0, flags=DmaUnmapFlags.ALL))


async def test_an_unmap_of_what_was_never_mapped() -> None:
    """It is none, and no fault: QEMU does so behind a vIOMMU. What would cut a region in two is refused."""
    async with attacked() as attack:
        for address, size in ((0x50000, 0x1000), (1 << 40, 1 << 40), (TOP - 0x1000, 0x1000)):
            await attack.accepted(Command.DMA_UNMAP, dma_unmap(address, size))
        for address, size in ((0x1000, 0x1000), (0x28000, 0x10000), (0, 0x2F000), (0, 0), (TOP - 1, 2)):
            assert await attack.refused(Command.DMA_UNMAP, dma_unmap(address, size))
        for flags in (DmaUnmapFlags.GET_DIRTY_BITMAP, 4, 0xFFFF_FFFF):
            assert await attack.refused(Command.DMA_UNMAP, dma_unmap(0, 0x30000, flags=flags))
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


@all_rings
async def test_an_unmap_of_what_is_in_use(rings: Rings) -> None:
    """Its answer waits for the slow request, or that request fails; nothing is stored after it."""
    async with attacked("echo", rings) as attack:
        attack.put((*attack.readable(b"S234")[:2], NEXT), (0x38000, 8, WRITE))
        await attack.kick()
        await attack.settle()
        await attack.performer.do_unmap([1])
        attack.bounds.check()
        before = attack.ram.read(0x38000, 8)
        await trio.sleep(0.03)
        assert attack.ram.read(0x38000, 8) == before
        await attack.performer.do_map([1])


@both_rings
async def test_a_ring_whose_memory_goes(rings: Rings) -> None:
    """Nothing is touched while it is away, and all goes on when it is back."""
    async with attacked("echo", rings) as attack:
        await attack.performer.do_unmap([0])
        await attack.nothing()
        await attack.performer.do_map([0])
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


@both_rings
async def test_a_ring_whose_memory_comes_back_read_only(rings: Rings) -> None:
    """A used ring that cannot be written: nothing is stored, nothing crashes."""
    async with attacked("echo", rings) as attack:
        await attack.performer.do_unmap([0])
        await attack.accepted(Command.DMA_MAP, dma_map(0, 0x30000, flags=1), [attack.ram.fd])
        attack.put(attack.readable(b"x"))
        await attack.kick()
        await attack.settle()
        assert attack.driver.rings[0].used() is None


@pytest.mark.parametrize("writes", [False, True], ids=["read-what-is-write-only", "write-what-is-read-only"])
async def test_a_buffer_in_memory_without_the_right(writes: bool) -> None:
    """Rights of a region are kept: read-only memory is not written, write-only memory is not read."""
    async with attacked() as attack:
        await attack.accepted(Command.DMA_MAP, dma_map(0x10_0000, 0x1000, flags=2), [attack.ram.fd])
        if writes:
            attack.put((*attack.readable(b"abcd")[:2], NEXT), (0x60000, 4, WRITE))
        else:
            attack.put((0x10_0000, 4, NEXT), attack.writable(4))
        await attack.breaks()


@pytest.mark.parametrize("answer", ["error", "short", "long", "empty", "wrong_id", "wrong_command", "twice", "never"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_memory_by_message_whose_client_answers_wrongly(packed: bool, answer: str) -> None:
    """DMA_READ and DMA_WRITE that fail, or are answered with too little, too much, twice, as another, or never."""
    async with attacked("echo", Rings(packed, "private")) as attack:
        attack.driver.offer(0, [b"hello"], [8])
        attack.client.answers.extend([answer] * 3)
        await attack.kick()
        await attack.settle()
        assert not attack.client.closed.is_set()


async def test_a_client_that_leaves_while_its_memory_is_used() -> None:
    """Slow requests, and the client goes: its memory is let go before the next one comes."""
    async with attacked() as attack:
        for _ in range(4):
            attack.driver.offer(0, [b"S" * 8], [8])
        await attack.kick()
        await attack.settle()
        assert not await attack.status() & DeviceStatus.NEEDS_RESET
        attack.client.close()
