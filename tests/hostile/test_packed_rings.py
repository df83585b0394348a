"""Packed rings of drivers that lie (virtio 1.4, 2.8). What a driver must not do makes the device need a reset."""

import pytest
from support.hostile import PACKED, Attack, Rings, attacked, packed_rings
from support.hostile_devices import Gated

from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.fuzz.ram import TABLES
from vfiouser_virtio.testing.raw.packed import AVAIL, USED, RawPackedRing
from vfiouser_virtio.testing.raw.ring import INDIRECT, NEXT, WRITE

WITHOUT_INDIRECT = ((1 << 128) - 1) & ~Feature.INDIRECT_DESC.mask
ONE = (0x20000, 1, 0)


def ring_of(attack: Attack) -> RawPackedRing:
    ring = attack.driver.rings[0]
    assert isinstance(ring, RawPackedRing)
    ring.hostile = True
    return ring


@pytest.mark.parametrize("marks", [0, USED, AVAIL | USED], ids=["none", "other-wrap", "both"])
@packed_rings
async def test_marks_that_do_not_make_it_available(rings: Rings, marks: int) -> None:
    """AVAIL and USED alike, or those of the other wrap counter: there is nothing, however often it is said."""
    async with attacked("echo", rings) as attack:
        ring_of(attack).store([(0x20000, 1, 0, marks)], raw=True)
        for _ in range(3):
            await attack.kick()
        await attack.settle()
        assert not any("broke" in line for line in attack.log)


@packed_rings
async def test_a_list_that_goes_on_with_what_is_not_available(rings: Rings) -> None:
    """NEXT, and behind it a descriptor with marks of the other wrap counter."""
    async with attacked("echo", rings) as attack:
        ring_of(attack).store([(0x20000, 1, 0, NEXT | AVAIL), (0x20000, 1, 0, USED)], raw=True)
        await attack.breaks()


@packed_rings
async def test_next_past_the_end_of_the_ring(rings: Rings) -> None:
    """A list that goes round the end of the ring is served: its marks change there."""
    async with attacked("echo", rings, size=16) as attack:
        for number in range(15):
            attack.put(ONE, name=number)
        await attack.kick()
        await attack.settle()
        ring = ring_of(attack)
        ring.skip_used(15)
        attack.put((*attack.readable(b"abc")[:2], NEXT), attack.writable(3), name=0)
        assert await attack.length_of() == 3


@packed_rings
async def test_a_list_as_long_as_the_ring_without_an_end(rings: Rings) -> None:
    """All sixteen descriptors with NEXT: there is no seventeenth."""
    async with attacked("echo", rings, size=16) as attack:
        attack.put(*[(0x20000, 1, NEXT)] * 16)
        await attack.breaks()


@pytest.mark.parametrize("name", [16, 0x7FFF, 0xFFFF], ids=hex)
async def test_a_buffer_id_beyond_the_size(name: int) -> None:
    """Ids are the driver's: any 16 bits, and the same come back."""
    async with attacked("echo", PACKED) as attack:
        attack.put(ONE, name=name)
        await attack.length_of()
        assert ring_of(attack).used() == (name, 0)


@packed_rings
async def test_an_id_that_is_in_flight_already(rings: Rings) -> None:
    """Two slow requests of one id."""
    async with attacked("echo", rings) as attack:
        for _ in range(2):
            attack.put((*attack.readable(b"S")[:2], NEXT), attack.writable(1), name=5)
        await attack.kick()
        await attack.settle()
        await attack.breaks()


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0xFFFF])
@pytest.mark.parametrize("value", [0, 15, 16, 0x7FFF, 0x8000, 0xFFFF], ids=hex)
async def test_event_suppression_that_cannot_be(flags: int, value: int) -> None:
    """Reserved flags, a slot beyond the ring: an interrupt too many or too few, and all chains are served."""
    async with attacked("echo", PACKED) as attack:
        ring_of(attack).set_event(value, flags)
        attack.put(ONE)
        assert await attack.length_of() == 0


async def test_a_slot_without_event_idx() -> None:
    """Flags that ask for a slot, which was not negotiated."""
    async with attacked("echo", PACKED, features=((1 << 128) - 1) & ~Feature.EVENT_IDX.mask) as attack:
        ring_of(attack).set_event(0x8003, 2)
        attack.put(ONE)
        assert await attack.length_of() == 0


@pytest.mark.parametrize("size", [1, 3, 5, 63])
async def test_a_size_that_is_no_power_of_two(size: int) -> None:
    """It may be: five times round the ring."""
    async with attacked("echo", PACKED, size=size) as attack:
        ring = ring_of(attack)
        assert ring.size == size
        for _ in range(5 * size if size < 10 else size + 2):
            attack.put(ONE)
            assert await attack.length_of() == 0
            ring.skip_used(1)


async def test_flags_that_change_after_it_was_made_available() -> None:
    """A request is taken, and its descriptors are overwritten: what was read of them holds."""
    async with attacked(Gated, PACKED) as attack:
        device = attack.function.device
        assert isinstance(device, Gated)
        ring = ring_of(attack)
        target = attack.writable(4)
        attack.put((*attack.readable(b"Sabc")[:2], NEXT), target, name=2)
        await attack.kick()
        await attack.settle()
        attack.ram.write(ring.desc, bytes(32))
        device.gate.set()
        await attack.settle()
        assert ring.used() == (2, 4)
        assert attack.ram.read(target[0], 4) == b"Sabc"


@packed_rings
async def test_a_readable_buffer_behind_a_writable_one(rings: Rings) -> None:
    """The device reads first, here too."""
    async with attacked("echo", rings) as attack:
        attack.put((0x20000, 4, NEXT | WRITE), (0x21000, 4, 0))
        await attack.breaks()


async def test_an_indirect_table_that_was_not_negotiated() -> None:
    """INDIRECT without INDIRECT_DESC."""
    async with attacked("echo", PACKED, features=WITHOUT_INDIRECT) as attack:
        attack.put((attack.table([(0x20000, 1, 0, 0)]), 16, INDIRECT))
        await attack.breaks()


@packed_rings
async def test_an_indirect_descriptor_in_a_list(rings: Rings) -> None:
    """A list ends with an indirect descriptor: not in a packed ring (2.8.7)."""
    async with attacked("echo", rings) as attack:
        attack.put((0x20000, 1, NEXT), (attack.table([(0x20000, 1, 0, 0)]), 16, INDIRECT))
        await attack.breaks()


@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 1025, 0xFFFF_FFF0], ids=hex)
async def test_an_indirect_table_of_no_whole_entries_or_too_many(length: int) -> None:
    """Nothing, half an entry, more than 1024, 4 GiB."""
    async with attacked("echo", PACKED) as attack:
        attack.put((attack.table([(0x20000, 1, 0, 0)] * 2), length, INDIRECT))
        await attack.breaks()


@pytest.mark.parametrize("flags", [NEXT, INDIRECT, AVAIL, USED, 0xFFFF & ~WRITE], ids=hex)
async def test_flags_in_a_table_of_which_only_write_means_anything(flags: int) -> None:
    """2.8.7: the others and the id are ignored; there is no table within a table."""
    async with attacked("echo", PACKED) as attack:
        target = attack.writable(2)
        entries = [(*attack.readable(b"ab")[:2], 0xFFFF, flags), (*target[:2], 0xFFFF, WRITE | flags)]
        attack.put((attack.table(entries, at=TABLES), 32, INDIRECT))
        assert await attack.length_of() == 2


async def test_all_flags_of_a_descriptor() -> None:
    """Every bit but the mark of the other wrap counter."""
    async with attacked("echo", PACKED) as attack:
        ring_of(attack).store([(0x20000, 1, 0, 0xFFFF & ~USED)], raw=True)
        await attack.breaks()


@pytest.mark.parametrize(("address", "length"), [((1 << 64) - 8, 16), (0x20000, 0xFFFF_FFFF), (1 << 63, 8)])
async def test_lengths_and_addresses_that_wrap(address: int, length: int) -> None:
    """Past 2^64, 4 GiB, nowhere."""
    async with attacked("echo", PACKED) as attack:
        attack.put((address, length, WRITE))
        await attack.breaks()
