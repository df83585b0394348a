"""Split rings of drivers that lie (virtio 1.4, 2.7). What a driver must not do makes the device need a reset."""

import pytest
from support.hostile import SPLIT, Rings, attacked, both_rings, split_rings

from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.testing.fuzz.ram import TABLES
from vfiouser_virtio.testing.raw.ring import INDIRECT, NEXT, WRITE
from vfiouser_virtio.testing.raw.split import RawSplitRing

WITHOUT_INDIRECT = ((1 << 128) - 1) & ~Feature.INDIRECT_DESC.mask
ONE = (0x20000, 1, 0)


@pytest.mark.parametrize("head", [16, 17, 0x8000, 0xFFFF], ids=hex)
@split_rings
async def test_a_head_beyond_the_table(rings: Rings, head: int) -> None:
    """The available ring names a descriptor that there is not."""
    async with attacked("echo", rings) as attack:
        ring = attack.driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        ring.hostile = True
        ring.offer(head)
        await attack.breaks()


@pytest.mark.parametrize("following", [16, 0x7FFF, 0xFFFF], ids=hex)
@split_rings
async def test_a_next_beyond_the_table(rings: Rings, following: int) -> None:
    """A descriptor links to one that there is not."""
    async with attacked("echo", rings) as attack:
        attack.put((0x20000, 1, NEXT), links=[following])
        await attack.breaks()


@pytest.mark.parametrize("following", [3, 0x7FFF, 0xFFFF], ids=hex)
async def test_a_next_beyond_an_indirect_table(following: int) -> None:
    """The same within an indirect table of three entries."""
    async with attacked() as attack:
        attack.put((attack.table([(0x20000, 1, NEXT, following), (*ONE, 0), (*ONE, 0)]), 48, INDIRECT))
        await attack.breaks()


async def test_a_chain_longer_than_the_queue() -> None:
    """Sixteen descriptors and no end."""
    async with attacked() as attack:
        attack.put(*[(0x20000, 1, NEXT)] * 16, links=[*range(1, 16), 7])
        await attack.breaks()


@pytest.mark.parametrize("jump", [16, 17, 0x7FFF, 0x8000, 0xFFFE], ids=hex)
@split_rings
async def test_avail_idx_that_jumps(rings: Rings, jump: int) -> None:
    """Further than the ring is long, or back: by one as well, which is 65,535 further."""
    async with attacked("echo", rings) as attack:
        attack.put(ONE)
        assert await attack.length_of() == 0
        ring = attack.driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        ring.offer(jump=jump + 1)
        await attack.breaks()


async def test_avail_idx_that_wraps() -> None:
    """From 0xffff to 0, with used_event and avail_event at each place: nothing is lost."""
    async with attacked("echo", size=4) as attack:
        ring = attack.driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        queue = attack.function.core.queues[0]
        state = queue.state()
        assert state.ring is not None
        queue.reset()
        there = state.ring._replace(available=0xFFFA, used=0xFFFA, signalled=0xFFFA)
        queue.restore(state._replace(ring=there))
        ring.avail_idx = ring.seen_idx = 0xFFFA
        attack.ram.write(ring.driver + 2, b"\xfa\xff")
        attack.ram.write(ring.device + 2, b"\xfa\xff")
        for event in (0xFFFF, 0, 0xFFFE, 1, 0x8000, 5, 0xFFFF, 2, 3, 4):
            ring.set_event(event)
            attack.put(ONE)
            assert await attack.length_of() == 0


@pytest.mark.parametrize(("address", "length"), [(0x20000, 0x8000_0000), ((1 << 64) - 8, 16), (1 << 63, 1 << 31)])
@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
async def test_lengths_and_addresses_that_wrap(address: int, length: int, flags: int) -> None:
    """2 GiB of what is not there; a range past 2^64."""
    async with attacked() as attack:
        attack.put((address, length, flags))
        await attack.breaks()


async def test_more_than_four_gigabytes_in_all() -> None:
    """Each buffer is there, and all together are too long (2.7.5.2)."""
    async with attacked() as attack:
        entries = [(0, 0x30000, NEXT, number + 1) for number in range(1023)] + [(0, 0x30000, 0, 0)]
        attack.put((attack.table(entries[-1000:] + entries[:24], at=TABLES), 16 * 1024, INDIRECT))
        await attack.kick()
        await attack.settle()
        await attack.performer.do_bring_up()
        attack.put((0x20000, 0xFFFF_FFFF, NEXT), (0x20000, 0xFFFF_FFFF, 0))
        await attack.breaks()


@split_rings
async def test_a_readable_buffer_behind_a_writable_one(rings: Rings) -> None:
    """2.7.4.2: the device reads first."""
    async with attacked("echo", rings) as attack:
        attack.put((0x20000, 4, NEXT | WRITE), (0x21000, 4, 0))
        await attack.breaks()


async def test_an_indirect_table_that_was_not_negotiated() -> None:
    """INDIRECT without INDIRECT_DESC."""
    async with attacked("echo", features=WITHOUT_INDIRECT) as attack:
        attack.put((attack.table([(*ONE, 0)]), 16, INDIRECT))
        await attack.breaks()


@split_rings
async def test_an_indirect_table_within_another(rings: Rings) -> None:
    """A table's entry points to a table (2.7.5.3.1)."""
    async with attacked("echo", rings) as attack:
        attack.table([(*ONE, 0)], at=TABLES + 0x100)
        attack.put((attack.table([(TABLES + 0x100, 16, INDIRECT, 0)]), 16, INDIRECT))
        await attack.breaks()


@split_rings
async def test_an_indirect_descriptor_with_next(rings: Rings) -> None:
    """INDIRECT and NEXT on one descriptor (2.7.5.3.1)."""
    async with attacked("echo", rings) as attack:
        attack.put((attack.table([(*ONE, 0)]), 16, INDIRECT | NEXT), ONE)
        await attack.breaks()


@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 1025, 0xFFFF_FFF0, 0xFFFF_FFFF], ids=hex)
@split_rings
async def test_an_indirect_table_of_no_whole_entries_or_too_many(rings: Rings, length: int) -> None:
    """Nothing, half an entry, more than 1024, 4 GiB."""
    async with attacked("echo", rings) as attack:
        attack.put((attack.table([(*ONE, 0)] * 2), length, INDIRECT))
        await attack.breaks()


@pytest.mark.parametrize("address", [0x50000, 0x4FFF8, (1 << 64) - 16, 0x7FFF8], ids=hex)
async def test_an_indirect_table_outside_of_memory(address: int) -> None:
    """In a hole, across the end of a region, at the end of all."""
    async with attacked() as attack:
        attack.put((address, 32, INDIRECT))
        await attack.breaks()


async def test_write_on_an_indirect_descriptor_means_nothing() -> None:
    """2.7.5.3.2: it is ignored."""
    async with attacked() as attack:
        attack.put((attack.table([(*ONE, 0)]), 16, INDIRECT | WRITE))
        assert await attack.length_of() == 0


@pytest.mark.parametrize("flags", [8, 0x10, 0x80, 0x8000, 0xFFF8], ids=hex)
@split_rings
async def test_unknown_flags_of_a_descriptor(rings: Rings, flags: int) -> None:
    """Bits that have no meaning (AVAIL and USED among them) have none."""
    async with attacked("echo", rings) as attack:
        attack.put((*attack.readable(b"ab")[:2], NEXT | flags), (*attack.writable(2)[:2], WRITE | flags))
        assert await attack.length_of() == 2


@pytest.mark.parametrize("flags", [1, 2, 0x8000, 0xFFFF], ids=hex)
async def test_unknown_flags_of_the_available_ring(flags: int) -> None:
    """Whatever they are, chains are served."""
    async with attacked() as attack:
        ring = attack.driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        ring.set_avail_flags(flags)
        attack.put(ONE)
        assert await attack.length_of() == 0


@pytest.mark.parametrize("at", [0, 2, 4, 8], ids=["flags", "idx", "id", "len"])
async def test_a_driver_that_writes_the_used_ring(at: int) -> None:
    """What it stores there is not read again."""
    async with attacked() as attack:
        ring = attack.driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        attack.ram.write(ring.device + at, b"\xff\xff\xff\xff"[: 2 if at < 4 else 4])
        attack.driver.rings[0].hostile = True
        attack.put(ONE)
        await attack.kick()
        await attack.settle()
        assert ring.used_idx == 1
        assert ring.used_element(0) == (0, 0)


async def test_buffers_that_lie_in_the_ring_itself() -> None:
    """A driver has the device write over descriptors, heads and used elements: it is its memory, and no fault."""
    async with attacked() as attack:
        ring = attack.driver.rings[0]
        for target in ring.addresses:
            attack.put((*attack.readable(b"\xff" * 64)[:2], NEXT), (target, 64, WRITE))
            await attack.kick()
            await attack.settle()
            attack.bounds.note()
            await attack.performer.do_bring_up()


@both_rings
async def test_buffers_that_lie_in_the_ring_of_another_queue(rings: Rings) -> None:
    """The device is made to write over its other queue's ring, whose driver then uses it: it is refused, or served."""
    async with attacked("echo", rings) as attack:
        for target in attack.driver.rings[1].addresses:
            attack.put((*attack.readable(b"\xff" * 64)[:2], NEXT), (target, 64, WRITE))
            assert await attack.length_of() == 64
            attack.bounds.note()
            await attack.kick(1)
            await attack.settle()
            attack.bounds.note()
            await attack.performer.do_bring_up()


@both_rings
async def test_an_indirect_table_in_the_ring_of_another_queue(rings: Rings) -> None:
    """Memory is memory: a table may lie anywhere that can be read."""
    async with attacked("echo", rings) as attack:
        data = attack.driver.rings[0].table([attack.readable(b"abcd"), attack.writable(4)])
        at = attack.driver.rings[1].desc
        attack.ram.write(at, data)
        attack.put((at, len(data), INDIRECT))
        assert await attack.length_of() == 4


async def test_all_heads_at_once_and_all_wrong() -> None:
    """Sixteen entries of nonsense: the first is enough, and none is served."""
    async with attacked("echo", SPLIT) as attack:
        ring = attack.driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        ring.hostile = True
        ring.offer(*[0xFFFF] * 16)
        await attack.breaks()
        assert ring.used_idx == 0
        assert await attack.status() & DeviceStatus.NEEDS_RESET
