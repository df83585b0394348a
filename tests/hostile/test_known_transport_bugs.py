"""Bugs of other products' registers, messages and DMA, tried here: docs/known-bugs.md has the list."""

import os
import struct

import pytest
import trio
from support.hostile import Rings, all_rings, attacked, both_rings
from support.hostile_messages import access, dma_map, irq_set, push_through, window_cap

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import Command, PciIrq, PciRegion
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.pci import NO_VECTOR
from vfiouser_virtio.testing.fuzz import fd_kinds
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, FEATURES_OK
from vfiouser_virtio.testing.raw.ring import NEXT, WRITE
from vfiouser_virtio.transports.pci import COMMON, NOTIFY, NOTIFY_MULTIPLIER, VIRTIO_BAR


async def test_cve_2011_2512_a_notification_of_a_queue_that_cannot_be() -> None:
    """CVE-2011-2512, QEMU: a queue's number below zero passed a check that had only an upper bound."""
    async with attacked() as attack:
        for index in (2, 0x3FF):
            attack.driver.write(VIRTIO_BAR, NOTIFY + NOTIFY_MULTIPLIER * index, b"\xff\xff")
        attack.driver.write(VIRTIO_BAR, NOTIFY, b"\xff\xff\xff\xff")
        await attack.settle()
        assert not await attack.status() & DeviceStatus.NEEDS_RESET


async def test_cve_2019_14818_more_file_descriptors_than_a_message_has_use_for() -> None:
    """CVE-2019-14818, DPDK: descriptors that came in excess stayed open; a queue's size, set again, leaked memory."""
    async with attacked() as attack:
        for command, body in (
            (Command.DMA_MAP, dma_map(0x10_0000, 0x1000)),
            (Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, 0, 1)),
        ):
            fds = [os.eventfd(0) for _ in range(9)]
            assert await attack.refused(command, body, fds)
            close_all(fds)
        for _ in range(200):
            attack.set(queue_select=1, queue_size=8)
        await attack.settle()


@pytest.mark.parametrize("offset", [(1 << 64) - 0x1000, (1 << 63) - 0x1000, 1 << 62], ids=hex)
async def test_cve_2020_10722_an_offset_and_a_size_that_overflow(offset: int) -> None:
    """CVE-2020-10722, DPDK: offset and size were added up before mmap(2), and the sum had overflowed."""
    async with attacked() as attack:
        assert await attack.refused(Command.DMA_MAP, dma_map(0x10_0000, 0x2000, offset=offset), [attack.ram.fd])


async def test_cve_2020_10723_an_index_of_more_than_16_bits() -> None:
    """CVE-2020-10723, DPDK: an index was cut to 16 bits, and then checked."""
    async with attacked() as attack:
        fd = os.eventfd(0)
        for index, start in ((0x1_0000 + PciIrq.MSIX, 0), (PciIrq.MSIX, 0x1_0000), (PciIrq.MSIX, 0xFFFF_FFFF)):
            assert await attack.refused(Command.DEVICE_SET_IRQS, irq_set(index, start, 1), [fd])
        os.close(fd)
        assert await attack.refused(Command.REGION_READ, access(0x1_0000 + VIRTIO_BAR, COMMON, 4))
        assert await attack.refused(Command.DEVICE_GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, 0x1_0004, 0, 0, 0))
        assert await attack.refused(Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 0x1_0002, 0))


async def test_cve_2020_10726_a_message_that_is_repeated() -> None:
    """CVE-2020-10726, DPDK: the same message again and again leaked a descriptor and a mapping each time."""
    async with attacked() as attack:
        fd = os.eventfd(0)
        for _ in range(50):
            assert await attack.refused(Command.DMA_MAP, dma_map(0, 0x30000), [attack.ram.fd])
            await attack.accepted(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, 0, 1), [fd])
            await attack.accepted(Command.DEVICE_GET_REGION_IO_FDS, struct.pack("<IIII", 4096, 0, VIRTIO_BAR, 0))
        os.close(fd)


@pytest.mark.parametrize("kind", ["eventfd", "ram", "pipe-w", "epoll", "path-only"])
async def test_cve_2022_0669_file_descriptors_with_any_message(kind: str) -> None:
    """CVE-2022-0669, DPDK: messages that bring no descriptors brought some, which stayed open."""
    async with attacked(lines=len(Command) + 2) as attack:
        fds = [fd_kinds.make(kind, attack.ram.fd) for _ in range(3)]
        for command in (*Command, 0, 19, 0xFFFF):
            if command != Command.DEVICE_RESET:
                await attack.message(command, bytes(32), fds)
        close_all(fds)


async def test_cve_2026_5747_a_queue_is_resized_while_it_is_used() -> None:
    """CVE-2026-5747, Firecracker: queue_size could be written after activation, and the ring read behind its end."""
    async with attacked() as attack:
        for size in (0, 1, 32, 64, 0x8000, 0xFFFF):
            attack.set(queue_select=0, queue_size=size)
            assert await attack.get("queue_size") == 16
        for name in ("queue_desc", "queue_driver", "queue_device"):
            attack.set(**{name: 0x60000})
            assert await attack.get(name) == attack.driver.rings[0].addresses[0] + 0x800 * (
                ("queue_desc", "queue_driver", "queue_device").index(name)
            )
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


@pytest.mark.parametrize("select", [2, 0x7FFF, 0x8000, 0xFFFF], ids=hex)
async def test_ch_082fdc4d0_a_selected_queue_that_there_is_not(select: int) -> None:
    """Cloud Hypervisor 082fdc4d0: queue_select beyond the last queue indexed a list."""
    async with attacked() as attack:
        attack.set(queue_select=select)
        attack.set(queue_size=8, queue_msix_vector=0, queue_desc=0x20000, queue_driver=0x21000, queue_device=0x22000)
        attack.set(queue_enable=1, queue_reset=1)
        for name in ("queue_size", "queue_enable", "queue_notify_off", "queue_desc", "queue_driver", "queue_device"):
            assert await attack.get(name) == 0
        assert await attack.get("queue_msix_vector") == NO_VECTOR
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


@pytest.mark.parametrize("vector", [3, 0x7FF, 0x800, 0xFFFE], ids=hex)
async def test_ch_3b431afba_a_vector_beyond_the_table(vector: int) -> None:
    """Cloud Hypervisor 3b431afba, and CH pull requests 8131 and 8138: an MSI-X vector that the table has not."""
    async with attacked() as attack:
        attack.set(config_msix_vector=vector, queue_select=0, queue_msix_vector=vector)
        assert await attack.get("config_msix_vector") == await attack.get("queue_msix_vector") == NO_VECTOR
        fd = os.eventfd(0)
        assert await attack.refused(Command.DEVICE_SET_IRQS, irq_set(PciIrq.MSIX, vector, 1), [fd])
        os.close(fd)
        attack.put(attack.readable(b"x"))
        assert await attack.length_of() == 0


@pytest.mark.parametrize(("length", "accessed"), [(4, 1), (4, 2), (4, 3), (2, 1), (2, 4), (1, 4), (8, 4), (0, 4)])
async def test_ch_d0634d18d_a_window_of_another_length_than_the_access(length: int, accessed: int) -> None:
    """Cloud Hypervisor d0634d18d and pull request 8272: PCI_CFG was given fewer bytes than its length says."""
    async with attacked() as attack:
        await push_through(attack, VIRTIO_BAR, COMMON + 0x16, length, b"\1\0\0\0"[:accessed])
        await attack.driver.read(PciRegion.CONFIG, await window_cap(attack) + 16, accessed)
        assert await attack.get("queue_select") <= 1


@pytest.mark.parametrize("field", ["queue_desc", "queue_driver", "queue_device"])
@pytest.mark.parametrize("address", [0x20001, 0x50000, (1 << 64) - 0x1000, 0x80000 - 16], ids=hex)
async def test_ch_22eeb3f80_a_queue_that_cannot_be_is_not_used(field: str, address: int) -> None:
    """Cloud Hypervisor 22eeb3f80: a queue that was found wrong was logged, and activated all the same."""
    async with attacked() as attack:
        await attack.driver.reset()
        attack.set(device_status=1, driver_feature_select=1, driver_feature=1)
        attack.set(device_status=FEATURES_OK, queue_select=0, queue_size=16)
        attack.set(queue_desc=0x2000, queue_driver=0x2800, queue_device=0x3000)
        attack.set(**{field: address})
        attack.set(queue_enable=1, device_status=DRIVER_OK)
        await attack.settle()
        assert await attack.status() & DeviceStatus.NEEDS_RESET
        assert not await attack.get("queue_enable")


@both_rings
async def test_cve_2021_3750_a_buffer_in_the_devices_own_registers(rings: Rings) -> None:
    """CVE-2021-3750 and 3929, QEMU: DMA to a device's own registers entered it again, and freed what it used."""
    async with attacked("echo", rings) as attack:
        for bar in (0x10, 0x20):
            attack.driver.write(PciRegion.CONFIG, bar, (0xFEBF_0000).to_bytes(4, "little"))
        attack.put((*attack.readable(bytes(8))[:2], NEXT), (0xFEBF_0014, 8, WRITE))
        await attack.breaks()


@both_rings
async def test_cve_2021_3750_a_ring_in_the_devices_own_registers(rings: Rings) -> None:
    """CVE-2021-3750: the used ring where the registers are."""
    async with attacked("echo", rings) as attack:
        attack.driver.write(PciRegion.CONFIG, 0x20, (0xFEBF_0000).to_bytes(4, "little"))
        await attack.driver.reset()
        attack.set(device_status=1, driver_feature_select=1, driver_feature=1 | rings.packed << 2)
        attack.set(device_status=FEATURES_OK, queue_select=0, queue_size=16)
        attack.set(queue_desc=0x2000, queue_driver=0x2800, queue_device=0xFEBF_0000)
        attack.set(queue_enable=1, device_status=DRIVER_OK)
        await attack.settle()
        assert await attack.status() & DeviceStatus.NEEDS_RESET


@pytest.mark.parametrize("how", ["reset", "notify", "unmap", "device-reset"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_cve_2024_3446_entered_again_while_it_waits_for_memory(packed: bool, how: str) -> None:
    """CVE-2024-3446, QEMU gpu, serial, crypto: what a DMA access caused entered the device again, and freed twice.

    Here the device waits for an answer to DMA_READ or DMA_WRITE, and its client does something else before it answers.
    """
    async with attacked("console", Rings(packed, "private")) as attack:
        attack.client.answers.extend(["late"] * 8)
        attack.driver.offer(1, [b"hello"], [])
        await attack.kick(1)
        await attack.settle()
        assert attack.client.lied  # it has asked
        if how == "reset":
            attack.set(device_status=0)
        elif how == "notify":
            for _ in range(10):
                await attack.kick(1)
        elif how == "unmap":
            await attack.performer.do_unmap()
        else:
            await attack.accepted(Command.DEVICE_RESET)
        await attack.settle()
        attack.client.answers.clear()
        await attack.client.answer_late()
        await attack.settle()


@all_rings
async def test_cve_2017_17381_a_queue_of_no_entries(rings: Rings) -> None:
    """CVE-2017-17381, QEMU: a queue of size or alignment 0 was divided by."""
    async with attacked("echo", rings) as attack:
        await attack.driver.reset()
        attack.set(device_status=1, driver_feature_select=1, driver_feature=1 | rings.packed << 2)
        attack.set(device_status=FEATURES_OK, queue_select=0, queue_size=0)
        assert await attack.get("queue_size") == 64
        attack.set(queue_enable=1, device_status=DRIVER_OK)
        await attack.kick()
        with trio.move_on_after(0):
            await trio.lowlevel.checkpoint()
        await attack.settle()
