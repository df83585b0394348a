"""PCI config space and the common configuration, driven as no driver should."""

import os

import pytest
import trio
import trio.testing
from support.hostile import Attack, Rings, attacked
from support.hostile_messages import access, capability, dma_unmap, irq_set, look_through, push_through

from vfiouser_virtio.protocols.pci import CapId
from vfiouser_virtio.protocols.vfio_user import Command, PciIrq, PciRegion
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, COMMON_CFG_SIZE, NO_VECTOR
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.raw.bring_up import DRIVER, DRIVER_OK, FEATURES_OK
from vfiouser_virtio.testing.raw.client import raw_message
from vfiouser_virtio.transports.pci import COMMON, DEVICE, ISR, NOTIFY, VIRTIO_BAR
from vfiouser_virtio.virtio import Offer

SUSPEND = int(DeviceStatus.SUSPEND)


async def negotiated(attack: Attack, *, packed: bool = False, more: int = 0) -> None:
    """From reset to FEATURES_OK, nothing else."""
    await attack.driver.reset()
    attack.set(device_status=1)
    attack.set(device_status=DRIVER, driver_feature_select=1, driver_feature=1 | packed << 2 | more >> 32)
    attack.set(device_status=FEATURES_OK)


async def test_accesses_of_any_width_and_alignment() -> None:
    """1 to 9 bytes at each offset of every structure, and past its end: an answer, and whole fields or nothing."""
    async with attacked(up=False, lines=40) as attack:
        for base in (COMMON, ISR, DEVICE, NOTIFY - 4, 0x3FF0):
            for offset in range(0, COMMON_CFG_SIZE + 8, 3):
                for width in (1, 2, 3, 4, 5, 8, 9):
                    if base + offset + width <= 0x4000:
                        body = access(VIRTIO_BAR, base + offset, width)
                        assert len(await attack.accepted(Command.REGION_READ, body)) == 16 + width
                        attack.driver.write(VIRTIO_BAR, base + offset, b"\xff" * width)
        await attack.settle()


async def test_a_queue_that_does_not_exist_and_every_field_of_it() -> None:
    """queue_select beyond the last: all of its fields read as zero, and writes go nowhere."""
    async with attacked(up=False) as attack:
        for select in (2, 3, 0x8000, 0xFFFF):
            attack.set(queue_select=select)
            for name, (offset, size) in COMMON_CFG_OFFSETS.items():
                if name.startswith("queue_") and name != "queue_select":
                    attack.driver.write(VIRTIO_BAR, COMMON + offset, b"\xff" * size)
                    assert await attack.get(name) == (NO_VECTOR if name == "queue_msix_vector" else 0)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_queue_sizes_that_cannot_be(packed: bool) -> None:
    """0, no power of two (in a split ring), more than there is: the register stays as it was."""
    async with attacked(up=False, offer=Offer(packed=packed)) as attack:
        await negotiated(attack)
        attack.set(queue_select=0)
        for size in (0, 3, 48, 65, 128, 0x8000, 0xFFFF):
            attack.set(queue_size=size)
            assert await attack.get("queue_size") == 64


async def test_queue_enable_of_strange_values() -> None:
    """0 disables nothing, and what is neither 0 nor 1 enables nothing."""
    async with attacked(up=False) as attack:
        await negotiated(attack)
        attack.set(queue_select=0, queue_desc=0x2000, queue_driver=0x2800, queue_device=0x3000)
        for value in (2, 0x100, 0xFFFF):
            attack.set(queue_enable=value)
            assert await attack.get("queue_enable") == 0
        attack.set(queue_enable=1)
        for value in (0, 1, 2, 0xFFFF):
            attack.set(queue_enable=value)
            assert await attack.get("queue_enable") == 1


async def test_queue_enable_before_addresses() -> None:
    """Rings at address 0, where there is memory: they overlap, and hold what is there."""
    async with attacked(up=False) as attack:
        await negotiated(attack)
        attack.set(queue_select=0, queue_enable=1, device_status=DRIVER_OK)
        await attack.kick()
        await attack.settle()
        attack.bounds.note()


async def test_queue_enable_before_features_ok() -> None:
    """A queue that is set up before anything was negotiated, and used."""
    async with attacked(up=False) as attack:
        await attack.driver.reset()
        attack.set(queue_select=0, queue_size=16, queue_desc=0x2000, queue_driver=0x2800, queue_device=0x3000)
        attack.set(queue_enable=1)
        await attack.kick()
        attack.set(device_status=DRIVER, driver_feature_select=1, driver_feature=1)
        attack.set(device_status=FEATURES_OK)
        attack.set(device_status=DRIVER_OK)
        await attack.kick()
        await attack.settle()
        attack.bounds.note()


async def test_rings_that_overlap() -> None:
    """All three parts at one place: whatever is read there, nothing is stored elsewhere."""
    async with attacked(up=False) as attack:
        await negotiated(attack)
        attack.set(queue_select=0, queue_size=16, queue_desc=0x2000, queue_driver=0x2000, queue_device=0x2000)
        attack.set(queue_enable=1, device_status=DRIVER_OK)
        for value in (0, 0x0001_0000, 0xFFFF_FFFF):
            attack.ram.write(0x2000, value.to_bytes(4, "little") * 64)
            attack.bounds.note()
            await attack.kick()
            await attack.settle()
            attack.bounds.note()


async def test_features_after_features_ok() -> None:
    """What was accepted cannot be changed any more."""
    async with attacked() as attack:
        before = []
        for select in range(4):
            attack.set(driver_feature_select=select)
            before.append(await attack.get("driver_feature"))
            attack.set(driver_feature=0xFFFF_FFFF)
            assert await attack.get("driver_feature") == before[-1]
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


async def test_features_that_were_not_offered() -> None:
    """FEATURES_OK is not set, for one bit too many in any word, also beyond those that there are."""
    async with attacked(up=False, lines=16) as attack:
        for select, value in ((0, 1 << 24), (1, 1 | 1 << 31), (2, 1), (3, 0x8000_0000), (0, 0xFFFF_FFFF)):
            await attack.driver.reset()
            attack.set(device_status=DRIVER, driver_feature_select=1, driver_feature=1)
            attack.set(driver_feature_select=select, driver_feature=value)
            attack.set(device_status=FEATURES_OK)
            assert not await attack.status() & DeviceStatus.FEATURES_OK
        for select in (4, 0x7FFF_FFFF, 0xFFFF_FFFF):
            attack.set(device_feature_select=select, driver_feature_select=select, driver_feature=0xFFFF_FFFF)
            assert await attack.get("device_feature") == await attack.get("driver_feature") == 0


@pytest.mark.parametrize("value", [4, 0x0F & ~8, 0x84, 0xFF & ~8])
async def test_driver_ok_without_features_ok(value: int) -> None:
    """Status bits that jump: the device needs a reset, and does nothing."""
    async with attacked(up=False) as attack:
        await attack.driver.reset()
        attack.set(device_status=value)
        assert await attack.status() & DeviceStatus.NEEDS_RESET


@pytest.mark.parametrize("value", [1, 3, 0x0B, 0x80, 0x8F, 0x40, 0xFF, 0x20])
async def test_status_bits_that_are_cleared_or_made_up(value: int) -> None:
    """Of a running device: whatever is written, it is served, or stands still, until its reset."""
    async with attacked() as attack:
        attack.set(device_status=value)
        attack.put(attack.readable(b"x"))
        await attack.kick()
        await attack.settle()
        await attack.status()


async def test_suspend_too_early_or_not_offered() -> None:
    """SUSPEND before DRIVER_OK, and without the feature, is ignored."""
    async with attacked(up=False, offer=Offer(suspend=True)) as attack:
        await negotiated(attack, more=Feature.SUSPEND.mask)
        attack.set(device_status=FEATURES_OK | SUSPEND)
        assert not await attack.status() & DeviceStatus.SUSPEND
    async with attacked() as attack:
        attack.set(device_status=DRIVER_OK | SUSPEND)
        await attack.settle()
        assert not await attack.status() & DeviceStatus.SUSPEND
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


async def test_suspend_again_and_again() -> None:
    """SUSPEND and DRIVER_OK in turns, with requests under way: it ends in one or the other."""
    async with attacked("echo", offer=Offer(suspend=True)) as attack:
        for _ in range(10):
            attack.driver.offer(0, [b"S"], [4])
            await attack.kick()
            attack.set(device_status=DRIVER_OK | SUSPEND)
            attack.set(device_status=DRIVER_OK)
        await attack.performer.do_suspend()


async def test_a_reset_within_a_reset() -> None:
    """Status 0 while a reset waits for slow requests, and other values behind it: it ends once, at 0."""
    async with attacked(lines=4) as attack:
        attack.driver.offer(0, [b"S"], [4])
        await attack.kick()
        await attack.settle()
        for value in (0, 1, 0x0F, 0, 0):
            attack.set(device_status=value)
        while await attack.get("device_status"):
            await trio.lowlevel.checkpoint()


async def test_queue_reset_without_its_feature_and_of_an_idle_queue() -> None:
    """Without RING_RESET the register does nothing; with it, of a queue that is not enabled or does nothing."""
    async with attacked(features=Feature.VERSION_1.mask) as attack:
        attack.set(queue_select=0, queue_reset=1)
        assert await attack.get("queue_reset") == 0
        assert await attack.get("queue_enable") == 1
    async with attacked() as attack:
        for _ in range(3):
            for select in (0, 1, 2):
                attack.set(queue_select=select, queue_reset=1)
                while await attack.get("queue_reset"):
                    await trio.lowlevel.checkpoint()
                assert await attack.get("queue_enable") == 0
            attack.set(queue_select=0, queue_reset=2)
            await attack.kick()


async def test_vectors_beyond_the_table_after_it_is_enabled() -> None:
    """MSI-X is on, and queues are given vectors that there are not: no interrupt, no other one."""
    async with attacked() as attack:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        await attack.accepted(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, 0, 1), [fd])
        for vector in (3, 0x7FF, 0xFFFE, 0xFFFF):
            attack.set(queue_select=0, queue_msix_vector=vector)
            assert await attack.get("queue_msix_vector") == NO_VECTOR
            attack.put(attack.readable(b"x"))
            await attack.length_of()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)


@pytest.mark.parametrize("bar", [0, 2, 5, 6, 7, 0x40, 0xFF])
async def test_a_window_onto_a_bar_that_there_is_not(bar: int) -> None:
    """PCI_CFG: BARs that are absent, numbers of regions that are none, config space itself."""
    async with attacked() as attack:
        await look_through(attack, bar, 0x14, 4)
        await push_through(attack, bar, 0x14, 1, b"\0")
        assert await attack.status() == DRIVER_OK


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0x14, 3), (0x14, 0), (0x14, 5), (0x14, 8), (0x14, 0xFFFF_FFFF), (0x3FFF, 2), (0x4000, 4), (0xFFFF_FFFC, 4),
     (0xFFFF_FFFF, 1), (0x15, 2), (0x16, 4)],
)  # fmt: skip
async def test_a_window_that_no_access_fits(offset: int, length: int) -> None:
    """PCI_CFG: a length that is none, not aligned, past the end of the BAR."""
    async with attacked() as attack:
        for count in (1, 2, 4):
            await look_through(attack, VIRTIO_BAR, offset, length, count)
        await push_through(attack, VIRTIO_BAR, offset, length, bytes(4))
        assert await attack.status() == DRIVER_OK


async def test_a_window_onto_the_msix_table() -> None:
    """PCI_CFG on the BAR of the MSI-X table and its pending bits, on any place of it."""
    async with attacked() as attack:
        for offset in (0, 12, 0x2F, 0x30, 0x7FC, 0x800, 0xFFC):
            await push_through(attack, 1, offset & ~3, 4, b"\xff" * 4)
            await look_through(attack, 1, offset & ~3, 4)
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


async def test_config_space_written_from_end_to_end() -> None:
    """All ones, all zeros, in every width: what may be written is, the rest stays, and the device works after it."""
    async with attacked() as attack:
        for value in (b"\xff", b"\0", b"\x55"):
            for width in (1, 4, 64):
                for offset in range(0, 256, width):
                    if not 0x40 <= offset < 0x100 or width == 1:
                        attack.driver.write(PciRegion.CONFIG, offset, value * width)
        assert await attack.driver.read(PciRegion.CONFIG, 0, 2) == 0x1AF4


async def test_notifications_that_mean_nothing() -> None:
    """Of a queue that there is not, of one that is not enabled, before DRIVER_OK, of any width and content."""
    async with attacked(up=False, lines=4) as attack:
        for data in (b"", b"\0", b"\0\0", b"\1\0", b"\0\0\0", b"\xff" * 4, b"\xff" * 8):
            for queue in (0, 1, 2, 0x3FF):
                if data:
                    attack.driver.write(VIRTIO_BAR, NOTIFY + 4 * queue, data[: 4 if queue == 0x3FF else 8])
        await negotiated(attack)
        attack.driver.write(VIRTIO_BAR, NOTIFY, b"\0\0")
        await attack.settle()
        assert await attack.status() == FEATURES_OK


async def test_a_flood_of_notifications() -> None:
    """20,000 posted notifications of an empty queue: the request behind them is answered, and so is the neighbour."""
    async with attacked() as attack:
        for _ in range(20):
            for _ in range(1000):
                attack.client.post(Command.REGION_WRITE, access(VIRTIO_BAR, NOTIFY, 2) + b"\0\0")
            await attack.client.flush()
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


@pytest.mark.parametrize("command", [0, 2, 4, 0x400], ids=["nothing", "no-master", "no-memory", "intx-off"])
async def test_memory_or_bus_mastering_off_with_requests_under_way(command: int) -> None:
    """COMMAND is cleared while slow requests run: no memory is touched without bus mastering, no register without."""
    async with attacked() as attack:
        for _ in range(3):
            attack.driver.offer(0, [b"S" * 8], [8])
        await attack.kick()
        await attack.settle()
        attack.driver.write(PciRegion.CONFIG, 4, command.to_bytes(2, "little"))
        attack.driver.offer(0, [b"e"], [4])
        await attack.kick()
        await attack.settle()
        status = await attack.get("device_status")
        assert (status == 0xFF) == (command & 2 == 0)
        attack.driver.write(PciRegion.CONFIG, 4, b"\6\0")


async def test_d3hot_with_requests_under_way() -> None:
    """The function is put to sleep, and to states that there are not, in the middle of requests."""
    async with attacked() as attack:
        at = await capability(attack, CapId.PM) + 4
        for state in (3, 1, 2, 3):
            attack.driver.offer(0, [b"S" * 8], [8])
            await attack.kick()
            attack.driver.write(PciRegion.CONFIG, at, bytes([state]))
            await attack.settle()
            attack.driver.write(PciRegion.CONFIG, at, b"\0")


async def test_no_configuration_interrupt_without_a_change() -> None:
    """OpenVMM #4049: ISR bit 1 was set at DRIVER_OK, although nothing had changed."""
    async with attacked() as attack:
        assert not await attack.driver.read(VIRTIO_BAR, ISR, 1) & 2
        attack.put(attack.readable(b"x"))
        await attack.length_of()
        assert await attack.driver.read(VIRTIO_BAR, ISR, 1) == 1
        assert await attack.driver.read(VIRTIO_BAR, ISR, 1) == 0


@pytest.mark.parametrize(
    "how", ["suspend", "queue-reset", "reset", "device-reset", "flr", "no-master", "d3hot", "unmap"]
)
@pytest.mark.parametrize("memory", ["shared", "private"])
async def test_a_client_that_leaves_in_the_middle_of(memory: Memory, how: str) -> None:
    """Slow requests are under way, something has to wait for them, and the client goes: the next one is served."""
    async with attacked("echo", Rings(memory=memory), offer=Offer(suspend=True)) as attack:
        for _ in range(3):
            attack.driver.offer(0, [b"S" * 8], [8])
        await attack.kick()
        await attack.settle()
        if how == "suspend":
            attack.set(device_status=DRIVER_OK | SUSPEND)
        elif how == "queue-reset":
            attack.set(queue_select=0, queue_reset=1)
        elif how == "reset":
            attack.set(device_status=0)
        elif how == "device-reset":
            await attack.client.send(raw_message(Command.DEVICE_RESET))
        elif how == "flr":
            at = await capability(attack, CapId.EXP) + 9
            attack.driver.write(PciRegion.CONFIG, at, b"\x80")
        elif how == "no-master":
            attack.driver.write(PciRegion.CONFIG, 4, b"\0\0")
        elif how == "d3hot":
            attack.driver.write(PciRegion.CONFIG, await capability(attack, CapId.PM) + 4, b"\3")
        else:
            await attack.client.send(raw_message(Command.DMA_UNMAP, dma_unmap(0, 0x30000)))
        await attack.client.flush()
        attack.client.close()
