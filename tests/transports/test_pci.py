"""The virtio-pci registers (virtio 1.4, 4.1), read and written as a protocol engine does for a client."""

import logging
import os
import struct
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from construct import Int32ul, Struct

from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports import VirtioPci, identity
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.vfio_device import IrqSetFlags, PciIrq, PciRegion
from vfiouser_virtio.virtio import Device, Offer, queue

COMMON, ISR, DEVICE_CFG, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
NO_VECTOR = 0xFFFF
RAM, RAM_SIZE = 0x10_0000, 0x10_0000
PM_CAP, MSIX_CAP, EXP_CAP, VENDOR_CAP = 0x01, 0x11, 0x10, 0x09


class Echo(Device):
    device_id = 2
    requestq = queue(max_size=8)
    otherq = queue(max_size=16)

    def __init__(self) -> None:
        super().__init__(
            config=record(Struct("value" / Int32ul, "other" / Int32ul))(value=0x11223344), features=1 << 68
        )

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read())
            chain.complete()


class Guest:
    """Register accesses by name, and a queue, through nothing but the seam."""

    name = "a client"
    uid: int | None = None

    def __init__(self, function: VirtioPci) -> None:
        self.function = function
        function.connected(self)
        fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, RAM_SIZE)
        self.ram = os.dup(fd)
        function.dma_map(RAM, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        self.config_write(4, b"\x06\x04")  # memory, bus master, no INTx
        self.avail_idx = 0

    async def dma_read(self, address: int, count: int) -> bytes:
        raise NotImplementedError

    async def dma_write(self, address: int, data: object) -> None:
        raise NotImplementedError

    def config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.region_read(PciRegion.CONFIG, offset, size), "little")

    def config_write(self, offset: int, data: bytes) -> None:
        self.function.region_write(PciRegion.CONFIG, offset, data)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.region_read(PciRegion.BAR4, offset, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.function.region_write(PciRegion.BAR4, offset, value.to_bytes(size, "little"))

    def get(self, name: str) -> int:
        return self.read(*COMMON_CFG_OFFSETS[name])

    def set(self, name: str, value: int) -> None:
        self.write(*COMMON_CFG_OFFSETS[name], value)

    def capabilities(self) -> Iterator[tuple[int, int]]:
        at = self.config(0x34, 1)
        while at:
            yield self.config(at, 1), at
            at = self.config(at + 1, 1)

    def virtio_structures(self) -> dict[int, tuple[int, int, int, int]]:
        """cfg_type -> place of the capability, BAR, offset, length."""
        return {
            self.config(at + 3, 1): (at, self.config(at + 4, 1), self.config(at + 8, 4), self.config(at + 12, 4))
            for number, at in self.capabilities()
            if number == VENDOR_CAP
        }

    def negotiate(self, accepted: int = -1) -> None:
        for status in (1, 3):
            self.set("device_status", status)
        for select in (0, 1):
            self.set("driver_feature_select", select)
            self.set("device_feature_select", select)
            # Without EVENT_IDX: every used buffer is worth an interrupt.
            offered = self.get("device_feature") & ~(1 << 29 if select == 0 else 0)
            self.set("driver_feature", offered & accepted >> 32 * select)
        self.set("device_status", 11)
        assert self.get("device_status") == 11

    def enable(self, index: int, vector: int = NO_VECTOR) -> None:
        base = RAM + 0x4000 * index
        self.set("queue_select", index)
        self.set("queue_msix_vector", vector)
        for name, at in (("queue_desc", 0), ("queue_driver", 0x1000), ("queue_device", 0x2000)):
            offset = COMMON_CFG_OFFSETS[name][0]
            self.write(offset, 4, base + at)  # Linux writes halves
            self.write(offset + 4, 4, 0)
        self.set("queue_enable", 1)

    def start(self, vector: int = NO_VECTOR) -> None:
        self.negotiate()
        self.enable(0, vector)
        self.set("device_status", 15)

    def request(self, message: bytes) -> None:
        os.pwrite(self.ram, message, 0x8000)
        descs = struct.pack("<QIHH", RAM + 0x8000, len(message), 1, 1), struct.pack("<QIHH", RAM + 0x9000, 64, 2, 0)
        os.pwrite(self.ram, b"".join(descs), 0)
        os.pwrite(self.ram, struct.pack("<H", 0), 0x1000 + 4 + 2 * (self.avail_idx % 8))
        self.avail_idx += 1
        os.pwrite(self.ram, struct.pack("<H", self.avail_idx), 0x1002)
        self.write(NOTIFY, 2, 0)

    async def answer(self) -> bytes:
        await trio.testing.wait_all_tasks_blocked()
        index = struct.unpack("<H", os.pread(self.ram, 2, 0x2002))[0]
        assert index == self.avail_idx
        _, written = struct.unpack("<II", os.pread(self.ram, 8, 0x2004 + 8 * ((index - 1) % 8)))
        return os.pread(self.ram, written, 0x9000)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest(VirtioPci(Echo()))
    yield guest
    guest.function.disconnected()
    os.close(guest.ram)


@pytest.fixture
async def running(guest: Guest, nursery: trio.Nursery) -> Guest:
    nursery.start_soon(guest.function.serve)
    await trio.testing.wait_all_tasks_blocked()
    return guest


# ---- what enumeration finds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "vendor", "subsystem_vendor", "subsystem", "class_code"),
    [
        ("default", 0x1AF4, 0x5000, 0x1042, 0x018000),
        ("2007", 0x5000, 0x5000, 0x1042, 0x018000),
        ("qemu", 0x1AF4, 0x1AF4, 0x1100, 0x010000),
    ],
)
def test_identity_styles(style: Style, vendor: int, subsystem_vendor: int, subsystem: int, class_code: int) -> None:
    guest = Guest(VirtioPci(Echo(), ids=style))
    assert (guest.config(0, 2), guest.config(2, 2)) == (vendor, 0x1042)
    assert (guest.config(0x2C, 2), guest.config(0x2E, 2)) == (subsystem_vendor, subsystem)
    assert guest.config(8, 4) == class_code << 8 | 1
    os.close(guest.ram)


def test_an_identity_for_every_device_id() -> None:
    for number in range(1, 64):
        assert identity(number).device == 0x1040 + number


def test_capabilities_and_layout(guest: Guest) -> None:
    assert [number for number, _ in guest.capabilities()] == [9, 9, 9, 9, 9, MSIX_CAP, PM_CAP, EXP_CAP]
    found = {kind: place[1:] for kind, place in guest.virtio_structures().items()}
    assert found == {1: (4, 0, 64), 3: (4, ISR, 1), 4: (4, DEVICE_CFG, 0x1000), 2: (4, NOTIFY, 0x1000), 5: (0, 0, 0)}
    for kind, length in ((1, 16), (2, 20), (3, 16), (4, 16), (5, 20)):
        assert guest.config(guest.virtio_structures()[kind][0] + 2, 1) == length
    assert guest.config(guest.virtio_structures()[2][0] + 16, 4) == 4  # notify_off_multiplier
    assert guest.function.region_info(4).size == 0x4000
    assert guest.function.region_info(1).size == 0x1000
    assert guest.config(0x20, 4) & 0xF == 0xC  # 64-bit, prefetchable


# ---- common configuration --------------------------------------------------------------------------------------------


def test_registers_after_reset(guest: Guest) -> None:
    expected = dict.fromkeys(COMMON_CFG_OFFSETS, 0)
    low = guest.function.core.device_features & 0xFFFF_FFFF
    expected |= {"device_feature": low, "num_queues": 2, "queue_size": 8}
    expected |= {"config_msix_vector": NO_VECTOR, "queue_msix_vector": NO_VECTOR}
    assert {name: guest.get(name) for name in COMMON_CFG_OFFSETS} == expected


def test_device_features_follow_any_select(guest: Guest) -> None:
    offered = guest.function.core.device_features
    for select, value in ((1, offered >> 32 & 0xFFFF_FFFF), (2, 1 << 4), (3, 0), (4, 0), (0xFFFF_FFFF, 0)):
        guest.set("device_feature_select", select)
        assert guest.get("device_feature") == value


def test_a_queue_that_does_not_exist_is_zeros(guest: Guest) -> None:
    guest.set("queue_select", 2)
    for name in ("queue_size", "queue_enable", "queue_desc", "queue_driver", "queue_device", "queue_reset"):
        guest.set(name, 1)
        assert guest.get(name) == 0
    assert guest.get("queue_msix_vector") == NO_VECTOR
    guest.set("queue_select", 1)
    assert (guest.get("queue_size"), guest.get("queue_notify_off")) == (16, 1)


@pytest.mark.parametrize("value", [0, 3, 16, 0xFFFF])
def test_queue_sizes_that_cannot_be(guest: Guest, value: int, caplog: pytest.LogCaptureFixture) -> None:
    guest.set("queue_size", value)
    assert guest.get("queue_size") == 8
    assert f"queue_size {value:#x}" in caplog.text
    guest.set("queue_size", 4)
    assert guest.get("queue_size") == 4


def test_queue_sizes_of_packed_queues(caplog: pytest.LogCaptureFixture) -> None:
    """CC8: until RING_PACKED is negotiated the register has a power of two; then any size is taken, and no larger."""
    guest = Guest(VirtioPci(Echo(), offer=Offer(packed=True, queue_size=300)))
    assert guest.get("queue_size") == 256
    guest.set("queue_size", 3)
    assert guest.get("queue_size") == 256
    assert "queue_size 0x3: no power of two up to 0x100" in caplog.text
    guest.negotiate()
    assert guest.get("queue_size") == 300
    for value, seen in ((301, 300), (0, 300), (3, 3), (299, 299)):
        guest.set("queue_size", value)
        assert guest.get("queue_size") == seen
    guest.set("device_status", 0)
    assert guest.get("queue_size") == 256
    guest.function.disconnected()
    os.close(guest.ram)


def test_vectors_beyond_the_table_read_back_as_no_vector(guest: Guest) -> None:
    for name in ("config_msix_vector", "queue_msix_vector"):
        for value, found in ((2, 2), (3, NO_VECTOR), (0, 0), (NO_VECTOR, NO_VECTOR)):
            guest.set(name, value)
            assert guest.get(name) == found
        guest.set(name, 1)
    guest.set("device_status", 0)
    assert guest.get("config_msix_vector") == guest.get("queue_msix_vector") == NO_VECTOR  # MX2


def test_an_enabled_queue_cannot_be_changed(guest: Guest) -> None:
    guest.negotiate()
    guest.enable(0)
    for name in ("queue_size", "queue_desc", "queue_driver", "queue_device"):
        before = guest.get(name)
        guest.set(name, 4)
        assert guest.get(name) == before
    guest.set("queue_enable", 0)
    assert guest.get("queue_enable") == 1


def test_any_width_has_a_defined_answer(guest: Guest) -> None:
    guest.set("device_feature_select", 1)
    guest.set("queue_desc", 0x1122_3344_5566_7788)
    whole = bytes(guest.function.region_read(PciRegion.BAR4, 0, 64))
    for offset in range(72):
        for size in (1, 2, 3, 4, 8):
            assert guest.read(offset, size) == int.from_bytes(whole[offset : offset + size], "little")
    assert guest.read(ISR - 4, 4) == guest.read(NOTIFY, 4) == guest.read(NOTIFY + 0xFFE, 2) == 0


def test_writes_change_whole_fields_only(guest: Guest) -> None:
    guest.write(0x20, 8, 0x1122_3344_5566_7788)
    guest.write(0x24, 4, 0xAABB_CCDD)
    assert guest.get("queue_desc") == 0xAABB_CCDD_5566_7788
    guest.write(0x20, 2, 0xFFFF)
    guest.write(0x21, 4, 0xFFFF_FFFF)
    assert guest.get("queue_desc") == 0xAABB_CCDD_5566_7788
    guest.write(0x16, 4, 0x0004_0001)  # queue_select and queue_size in one
    assert (guest.get("queue_select"), guest.get("queue_size")) == (1, 4)
    guest.write(0x3C, 8, (1 << 64) - 1)  # over the end


def test_only_a_read_of_the_generation_sees_the_change(guest: Guest) -> None:
    before = guest.get("config_generation")
    guest.function.device.config.update(value=5)
    guest.read(0x10, 4)
    assert guest.get("config_generation") != before


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
