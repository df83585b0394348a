"""Device configuration, ISR status and interrupts of virtio-pci (virtio 1.4, 4.1.4.5 and 4.1.5)."""

import logging
import os
import struct

import pytest
import trio
import trio.testing
from support.pci_guest import (
    DEVICE_CFG,
    EXP_CAP,
    ISR,
    MSIX_CAP,
    NO_VECTOR,
    NOTIFY,
    RAM,
    RAM_SIZE,
    Guest,
)

from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.vfio_device import IrqSetFlags, PciIrq, PciRegion

# ---- device configuration, ISR, window -------------------------------------------------------------------------------


def test_device_configuration(guest: Guest) -> None:
    assert guest.read(DEVICE_CFG, 4) == 0x11223344
    assert guest.read(DEVICE_CFG, 8) == 0x11223344  # SPDK reads eight at once
    assert guest.read(DEVICE_CFG + 1, 1) == 0x33
    assert guest.read(DEVICE_CFG + 6, 4) == 0


def test_the_window_in_config_space(guest: Guest) -> None:
    window = guest.virtio_structures()[5][0]

    def aim(bar: int, offset: int, length: int) -> None:
        guest.config_write(window + 4, bytes([bar]))
        guest.config_write(window + 8, struct.pack("<II", offset, length))

    aim(4, DEVICE_CFG, 4)
    assert guest.config(window + 16, 4) == 0x11223344
    aim(4, COMMON_CFG_OFFSETS["queue_select"][0], 2)
    guest.config_write(window + 16, b"\x01\x00\x00\x00")
    assert guest.get("queue_select") == 1
    aim(4, COMMON_CFG_OFFSETS["device_status"][0], 1)
    guest.config_write(window + 16, b"\x01")
    assert guest.get("device_status") == 1
    for bar, offset, length in ((6, 0, 4), (4, 0, 3), (4, 0x3FFE, 4), (4, 0x14, 0), (4, 1, 4), (0, 0, 4), (255, 0, 4)):
        aim(bar, offset, length)
        guest.config_write(window + 16, bytes(4))
        guest.config(window + 16, 4)
    assert (guest.get("device_status"), guest.get("queue_select")) == (1, 1)


# ---- the whole device ------------------------------------------------------------------------------------------------


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def assign(guest: Guest, index: PciIrq, start: int, *fds: int) -> None:
    flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
    guest.function.set_irqs(index, flags, start, len(fds), b"", [os.dup(fd) for fd in fds])


def fired(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def enable_msix(guest: Guest) -> None:
    at = next(at for number, at in guest.capabilities() if number == MSIX_CAP)
    guest.config_write(at + 2, b"\x00\x80")


async def test_msix(running: Guest) -> None:
    config_fd, queue_fd = eventfd(), eventfd()
    assign(running, PciIrq.MSIX, 0, config_fd, queue_fd)
    enable_msix(running)
    running.set("config_msix_vector", 0)
    running.start(vector=1)
    running.request(b"hello")
    assert await running.answer() == b"hello"
    assert (fired(config_fd), fired(queue_fd)) == (0, 1)
    assert running.read(ISR, 1) == 0
    running.function.device.config.update(value=1)
    assert (fired(config_fd), fired(queue_fd)) == (1, 0)
    assert running.read(ISR, 1) == 2  # IS2: also with MSI-X
    assert running.read(ISR, 1) == 0
    running.set("config_msix_vector", NO_VECTOR)
    running.function.device.config.update(value=2)
    assert (fired(config_fd), fired(queue_fd)) == (0, 0)  # MX3


async def test_intx(running: Guest) -> None:
    line = eventfd()
    assign(running, PciIrq.INTX, 0, line)
    running.config_write(4, b"\x06\x00")
    running.start()
    running.request(b"hello")
    assert await running.answer() == b"hello"
    assert fired(line) == 1
    assert running.config(6, 2) & 8  # Interrupt Status (IS3)
    running.request(b"more")
    await running.answer()
    assert fired(line) == 0  # held until the client unmasks
    assert running.read(ISR, 1) == 1
    assert not running.config(6, 2) & 8
    running.function.set_irqs(PciIrq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK, 0, 1, b"", [])
    assert fired(line) == 0
    running.request(b"again")
    await running.answer()
    assert fired(line) == 1
    # Unmasked while the condition still holds: it fires again.
    running.function.set_irqs(PciIrq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK, 0, 1, b"", [])
    assert fired(line) == 1


async def test_an_intx_is_unmasked_by_its_resample_eventfd(running: Guest) -> None:
    line, resample = eventfd(), eventfd()
    assign(running, PciIrq.INTX, 0, line)
    flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK
    running.function.set_irqs(PciIrq.INTX, flags, 0, 1, b"", [os.dup(resample)])
    running.config_write(4, b"\x06\x00")
    running.start()
    for _ in range(2):
        running.request(b"x")
        await running.answer()
        assert fired(line) == 1
        running.read(ISR, 1)
        os.eventfd_write(resample, 1)
        await trio.testing.wait_all_tasks_blocked()
    running.function.set_irqs(PciIrq.INTX, flags, 0, 1, b"", [os.dup(resample)])  # replaced live
    running.function.set_irqs(PciIrq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER, 0, 0, b"", [])


async def test_without_bus_mastering_memory_is_not_touched(running: Guest) -> None:
    running.start()
    running.config_write(4, b"\x02\x04")
    running.request(b"hello")
    await trio.testing.wait_all_tasks_blocked()
    assert os.pread(running.ram, 2, 0x2002) == b"\0\0"
    running.config_write(4, b"\x06\x04")
    assert await running.answer() == b"hello"


async def test_device_reset_and_flr(running: Guest) -> None:
    exp = next(at for number, at in running.capabilities() if number == EXP_CAP)
    for reset in (
        running.function.reset,
        lambda: running.config_write(exp + 8, b"\x00\x80"),
        lambda: running.set("device_status", 0),
    ):
        running.config_write(4, b"\x06\x04")
        running.avail_idx = 0
        os.pwrite(running.ram, bytes(0x8000), 0)
        running.start()
        running.request(b"hello")
        assert await running.answer() == b"hello"
        reset()
        running.config_write(4, b"\x06\x04")
        assert running.get("device_status") == running.get("queue_enable") == running.get("queue_desc") == 0
        assert running.function.memory.regions  # DEVICE_RESET does not unmap


async def test_queue_reset(running: Guest) -> None:
    old_fd, new_fd = eventfd(), eventfd()
    assign(running, PciIrq.MSIX, 1, old_fd, new_fd)
    enable_msix(running)
    running.start(vector=1)
    running.request(b"one")
    await running.answer()
    running.set("queue_reset", 1)
    assert (running.get("queue_reset"), running.get("queue_enable"), running.get("queue_desc")) == (0, 0, 0)  # CC7
    assert running.get("queue_msix_vector") == NO_VECTOR
    assert fired(old_fd) == 1
    os.pwrite(running.ram, bytes(0x8000), 0)
    running.avail_idx = 0
    running.set("queue_size", 8)
    running.enable(0, vector=2)
    assert running.get("queue_reset") == 0  # CC6
    running.request(b"two")
    assert await running.answer() == b"two"
    assert (fired(old_fd), fired(new_fd)) == (0, 1)  # QR3


async def test_queue_reset_is_for_drivers_that_have_accepted_it(running: Guest) -> None:
    running.negotiate(~(1 << Feature.RING_RESET))
    running.enable(0)
    running.set("device_status", 15)
    running.set("queue_reset", 1)
    assert (running.get("queue_reset"), running.get("queue_enable")) == (0, 1)


async def test_after_a_client_left_the_next_one_must_kick(running: Guest) -> None:
    running.start()
    running.request(b"one")
    await running.answer()
    running.function.disconnected()
    assert running.function.memory.regions == ()
    # The state is kept; the same memory comes back, with a request that nobody has announced.
    running.function.connected(running)
    running.function.dma_map(RAM, RAM_SIZE, readable=True, writable=True, fd=os.dup(running.ram), offset=0)
    assert running.get("device_status") == 15
    await trio.testing.wait_all_tasks_blocked()
    running.request(b"two")
    assert await running.answer() == b"two"


async def test_an_eventfd_for_each_notification(running: Guest) -> None:
    assert running.function.io_fds(0) == ()
    entries = running.function.io_fds(PciRegion.BAR4)
    assert [(entry.offset, entry.size) for entry in entries] == [(NOTIFY, 2), (NOTIFY + 4, 2)]
    assert running.function.io_fds(PciRegion.BAR4) is entries
    running.start()
    write, running.write = running.write, lambda offset, size, value: os.eventfd_write(entries[0].fd, 1)
    running.request(b"by eventfd")
    running.write = write
    assert await running.answer() == b"by eventfd"


async def test_notifications_that_mean_nothing(running: Guest, caplog: pytest.LogCaptureFixture) -> None:
    for offset, size in ((NOTIFY, 2), (NOTIFY + 4, 4), (NOTIFY + 2, 1), (NOTIFY + 0xFF8, 8), (NOTIFY + 0xFFE, 2)):
        running.write(offset, size, (1 << 8 * size) - 1)
    running.start()
    for _ in range(1000):
        running.write(NOTIFY + 4, 2, 1)
    running.request(b"still here")
    assert await running.answer() == b"still here"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
