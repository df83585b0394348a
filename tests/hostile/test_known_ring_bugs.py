"""Bugs of other products' virtqueues, tried here: docs/known-bugs.md has the list.

A chain that must be refused is one after which the device needs a reset, and says once that the driver broke virtio.
"""

import pytest
from support.hostile import Rings, all_rings, attacked, both_rings, packed_rings, split_rings
from support.hostile_devices import Gated, Keeper

from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.testing.raw.ring import INDIRECT, NEXT, WRITE
from vfiouser_virtio.virtio import Offer

UNMAPPED = 0x50000
READ_ONLY = 0x60000


@both_rings
async def test_cve_2016_5403_more_in_flight_than_the_queue_has(rings: Rings) -> None:
    """CVE-2016-5403, QEMU: a driver that made buffers available again without end filled the host's memory."""
    async with attacked(Keeper, rings, size=4) as attack:
        device = attack.function.device
        assert isinstance(device, Keeper)
        for name in range(4):
            attack.put(attack.readable(b"K"), name=name)
        await attack.kick()
        await attack.settle()
        for name in range(4):
            attack.put(attack.readable(b"K"), name=name + 4 * rings.packed)
        await attack.breaks()
        assert len(device.kept) == 4


@all_rings
async def test_cve_2016_6490_descriptors_of_no_length(rings: Rings) -> None:
    """CVE-2016-6490, QEMU: a descriptor of no length was mapped again and again, for ever."""
    async with attacked("echo", rings) as attack:
        nothing, nowhere = (0x20000, 0, NEXT), (UNMAPPED, 0, NEXT)
        attack.put(nothing, nowhere, (0x20000, 0, NEXT | WRITE), (0x20000, 0, WRITE))
        assert await attack.length_of() == 0


@all_rings
async def test_cve_2018_1059_a_buffer_that_crosses_regions(rings: Rings) -> None:
    """CVE-2018-1059, DPDK: a buffer was taken for mapped whole because its first byte was."""
    async with attacked("echo", rings) as attack:
        attack.ram.write(0x2FFFC, b"12345678")
        attack.put((0x2FFFC, 8, NEXT), attack.writable(8))
        assert await attack.length_of() == 8


@pytest.mark.parametrize("hole", [UNMAPPED - 8, READ_ONLY - 8, 0x70000 - 8, 0x80000 - 8], ids=hex)
@both_rings
async def test_cve_2018_1059_a_buffer_that_ends_in_a_hole(rings: Rings, hole: int) -> None:
    """CVE-2018-1059, DPDK: what lay behind the end of a region was read and written."""
    async with attacked("echo", rings) as attack:
        attack.put((*attack.readable(b"x" * 16)[:2], NEXT), (hole, 16, WRITE))
        await attack.breaks()


@all_rings
async def test_cve_2020_10725_a_wrong_address_without_length(rings: Rings) -> None:
    """CVE-2020-10725, DPDK: no length meant that the address was not checked, and it was used all the same."""
    async with attacked("echo", rings) as attack:
        attack.put(((1 << 64) - 1, 0, NEXT), (*attack.readable(b"hi")[:2], NEXT), (1 << 63, 0, NEXT | WRITE),
                   attack.writable(4))  # fmt: skip
        assert await attack.length_of() == 2


@both_rings
async def test_cve_2020_14375_a_descriptor_that_changes_after_it_was_read(rings: Rings) -> None:
    """CVE-2020-14375, DPDK vhost-crypto: descriptors were read again after they had been checked."""
    async with attacked(Gated, rings) as attack:
        device = attack.function.device
        assert isinstance(device, Gated)
        address, _, _ = attack.writable(8)
        attack.put((*attack.readable(b"S1234567")[:2], NEXT), (address, 8, WRITE))
        await attack.kick()
        await attack.settle()  # the device has it
        ring = attack.driver.rings[0]
        before = attack.ram.read(0x40000, 16)
        for slot in range(2):
            attack.ram.write(ring.desc + 16 * slot, (0x40000).to_bytes(8, "little"))
        device.gate.set()
        await attack.settle()
        assert attack.ram.read(address, 8) == b"S1234567"
        assert attack.ram.read(0x40000, 16) == before
        attack.bounds.note()


@all_rings
async def test_cve_2021_29631_a_chain_of_any_number_of_descriptors(rings: Rings) -> None:
    """CVE-2021-29631, bhyve: devices did not look how many descriptors a chain has, no or too many."""
    async with attacked("echo", rings) as attack:
        entries = [(0x20000, 1, 0, 0)] * 600 if rings.packed else [
            (0x20000, 1, NEXT, number + 1) for number in range(599)] + [(0x20000, 1, 0, 0)]  # fmt: skip
        attack.put((attack.table(entries), 16 * 600, INDIRECT))
        assert await attack.length_of() == 0


@both_rings
async def test_cve_2016_7422_a_length_of_four_gigabytes(rings: Rings) -> None:
    """CVE-2016-7422, QEMU: a huge length was cut to what could be mapped, of which there was nothing."""
    async with attacked("echo", rings) as attack:
        attack.put((*attack.readable(b"hi")[:2], NEXT), (0x20000, 0xFFFF_FFFF, WRITE))
        await attack.breaks()


@pytest.mark.parametrize("links", [[0], [1, 0], [1, 2, 3, 1], [3, 2, 3]], ids=str)
@split_rings
async def test_cve_2019_9547_a_chain_that_is_a_circle(rings: Rings, links: list[int]) -> None:
    """CVE-2019-9547, SPDK vhost: a chain of descriptors that comes back to itself was followed for ever."""
    async with attacked("echo", rings) as attack:
        attack.put(*[(0x20000, 1, NEXT)] * len(links), links=links)
        await attack.breaks()


@split_rings
async def test_cve_2019_9547_a_table_that_is_a_circle(rings: Rings) -> None:
    """CVE-2019-9547, SPDK vhost: the same within an indirect table."""
    async with attacked("echo", rings) as attack:
        table = attack.table([(0x20000, 1, NEXT, 1), (0x20000, 1, NEXT, 2), (0x20000, 1, NEXT, 0)])
        attack.put((table, 48, INDIRECT))
        await attack.breaks()


@both_rings
async def test_cve_2026_45782_same_head_twice(rings: Rings) -> None:
    """CVE-2026-45782, Cloud Hypervisor: a head that was available twice: the second completion freed the first."""
    async with attacked(Keeper, rings) as attack:
        device = attack.function.device
        assert isinstance(device, Keeper)
        attack.put(attack.readable(b"K"), name=3)
        await attack.kick()
        await attack.settle()
        attack.put(attack.readable(b"K"), name=3)
        await attack.breaks()
        assert len(device.kept) == 1
        device.kept[0].complete(0)
        await attack.settle()
        assert attack.driver.rings[0].used() is None  # nothing is shown of a device that needs a reset


@both_rings
async def test_cve_2026_45782_same_head_twice_in_one_look(rings: Rings) -> None:
    """CVE-2026-45782, Cloud Hypervisor: both are there before the device looks."""
    async with attacked(Keeper, rings) as attack:
        attack.put(attack.readable(b"K"), name=3)
        attack.put(attack.readable(b"K"), name=3)
        await attack.breaks()


@packed_rings
async def test_cve_2026_16457_an_indirect_descriptor_with_next(rings: Rings) -> None:
    """CVE-2026-16457, QEMU: INDIRECT and NEXT on one packed descriptor kept the device busy for ever."""
    async with attacked("echo", rings) as attack:
        table = attack.table([(0x20000, 1, 0, 0)])
        attack.put((table, 16, INDIRECT | NEXT))
        await attack.breaks()


@pytest.mark.parametrize("size", [1, 2, 16])
@both_rings
async def test_cve_2026_50626_all_of_a_queue_in_order(rings: Rings, size: int) -> None:
    """CVE-2026-50626, QEMU: an array of buffers in order was as large as another queue size than the driver's."""
    async with attacked("echo", rings, offer=Offer(in_order=True), size=size) as attack:
        assert attack.driver.has(Feature.IN_ORDER)
        for _ in range(3):
            for _ in range(size):
                assert attack.driver.offer(0, [b"x"], [])
            await attack.kick()
            await attack.settle()
            assert not await attack.status() & DeviceStatus.NEEDS_RESET
            await attack.performer.do_bring_up(size)


@both_rings
async def test_cve_2023_41051_a_view_is_as_long_as_it_was_asked_for(rings: Rings) -> None:
    """CVE-2023-41051, vm-memory: an implementation that gave another length than asked for was believed."""
    async with attacked("echo", rings) as attack:
        for length in (1, 4096, 0x10000):
            source, target = 0x2FFFF - length // 2, 0x70000
            attack.put((source, length, NEXT), (target, length, WRITE))
            expected = attack.ram.read(source, length)
            assert await attack.length_of() == length
            assert attack.ram.read(target, length) == expected
            await attack.performer.do_bring_up()
