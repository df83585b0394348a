"""Virtio over PCI from the driver's side: over a real socket, and over functions made of bytes that do it wrong."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from support.guest import FakeBar, FakePort, wait_forever
from support.serving import serving_functions

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.errors import ConfigError, GuestError
from vfiouser_virtio.guest import (
    BlkDriver,
    DeviceBroken,
    DriverVirtqueue,
    Interrupts,
    PciPort,
    PciTransport,
    VirtioBus,
    VirtioDevice,
    VirtioPciDriver,
    bound_pci,
    free_vq,
    new_vq,
)
from vfiouser_virtio.guest import pci_transport as module
from vfiouser_virtio.guest.pci import enumerate_function
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_user import PrivateMemory, SharedMemory, connect
from vfiouser_virtio.virtio import Device, Queue, queue

every_way = pytest.mark.parametrize("interrupts", ["msix", "intx", "poll"])


class Echo(Device):
    """Five queues that copy; a chain that begins with ``!`` breaks the device."""

    device_id = 63
    a, b, c, d, e = queue(), queue(), queue(), queue(), queue()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.queues:
                nursery.start_soon(self._serve, each)

    async def _serve(self, queue: Queue) -> None:
        async for chain in queue:
            data = chain.readable.read()
            if data == b"!":
                raise GuestError("told to")
            chain.writable.write(data)
            chain.complete()


@asynccontextmanager
async def served(function: VirtioPci, *, private: bool = False) -> AsyncIterator[PciPort]:
    with trio.fail_after(60), (PrivateMemory if private else SharedMemory)(4 << 20) as ram:
        async with (
            serving_functions(function) as [arguments],
            connect(arguments["socket"]["path"], memory=[ram]) as port,
        ):
            yield port


async def echo(device: VirtioDevice, index: int) -> None:
    """One request and its interrupt."""
    lot = trio.lowlevel.ParkingLot()
    used: list[tuple[object, int]] = []

    def callback(vq: DriverVirtqueue) -> bool:
        while got := vq.get_buf():
            used.append(got)
        lot.unpark_all()
        return True

    vq = await new_vq(device, index, callback)
    buffer = device.memory.alloc(8)
    buffer.view[:4] = b"ping"
    vq.add_buf([(buffer.address, 4), (buffer.address + 4, 4)], 1, 1, "token")
    await device.ready()
    vq.kick()
    while not used:
        await device.wait(lot)
    assert used == [("token", 4)]
    assert bytes(buffer.view) == b"pingping"


async def start(transport: PciTransport) -> VirtioDevice:
    device = VirtioDevice(transport)
    await device.start()
    await device.negotiate(0)
    return device


# ---- over a socket -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
@every_way
async def test_a_disk(interrupts: Interrupts, private: bool) -> None:
    blk = Blk(size=1 << 20)
    async with served(VirtioPci(blk), private=private) as port, bound_pci(port, interrupts=interrupts) as device:
        disk = device.driver_data
        await disk.write(1, b"\xab" * 1024)
        assert await disk.read(0, 4) == bytes(512) + b"\xab" * 1024 + bytes(512)
        changed = trio.Event()
        device.on_config = changed.set
        blk.config.update(capacity=77)
        await changed.wait()
        assert await disk.capacity() == 77


@pytest.mark.parametrize("vectors", [1, 2, 3, 6, 9])
async def test_vectors_are_shared_where_there_are_few(vectors: int) -> None:
    async with served(VirtioPci(Echo(), vectors=vectors)) as port:
        transport = await PciTransport.open(port, interrupts="msix")
        device = await start(transport)
        for index in range(5):
            await echo(device, index)
        mapped = []
        for index in range(5):
            await transport.write_common("queue_select", index)
            mapped.append(await transport.read_common("queue_msix_vector"))
        assert mapped == {1: [0] * 5, 2: [1] * 5, 3: [1, 2, 1, 2, 1]}.get(vectors, [1, 2, 3, 4, 5])
        assert await transport.read_common("config_msix_vector") == 0
        await device.reset()


@every_way
async def test_needs_reset_is_noticed(interrupts: Interrupts) -> None:
    async with served(VirtioPci(Echo())) as port, trio.open_nursery() as nursery:
        device = await start(await PciTransport.open(port, interrupts=interrupts, nursery=nursery))
        lot = trio.lowlevel.ParkingLot()
        vq = await new_vq(device, 0)
        await device.ready()
        buffer = device.memory.alloc(1)
        buffer.view[:] = b"!"
        vq.add_buf([(buffer.address, 1)], 1, 0, "bad")
        vq.kick()
        with pytest.raises(DeviceBroken, match="needs a reset"):
            await wait_forever(device, lot)
        await device.reset()
        nursery.cancel_scope.cancel()


async def test_what_interrupts_can_be_had() -> None:
    async with served(VirtioPci(Rng(), vectors=0)) as port, trio.open_nursery() as nursery:
        with pytest.raises(ConfigError, match="no MSI-X capability"):
            await PciTransport.open(port, interrupts="msix")
        with pytest.raises(ConfigError, match="need a nursery"):
            await PciTransport.open(port, interrupts="poll")
        assert (await PciTransport.open(port, nursery=nursery)).interrupts == "intx"
    async with served(VirtioPci(Rng())) as port:
        assert (await PciTransport.open(port)).interrupts == "msix"


async def test_command_register() -> None:
    """Bus mastering only as long as the device is in use; INTx only where it is wanted."""
    async with served(VirtioPci(Rng())) as port:
        assert await port.config_read(4, 2) == 0
        cases: list[tuple[Any, int]] = [("msix", 0x406), ("intx", 0x006), ("poll", 0x406)]
        for interrupts, command in cases:
            async with bound_pci(port, interrupts=interrupts) as device:
                assert await port.config_read(4, 2) == command
                assert len(await device.driver_data.read(10)) == 10
            assert await port.config_read(4, 2) & 4 == 0


async def test_one_queue_is_reset() -> None:
    async with served(VirtioPci(Echo())) as port:
        device = await start(await PciTransport.open(port))
        for _ in range(2):
            await echo(device, 3)
            await free_vq(device.virtqueues[3])
        await device.reset()


async def test_functions_that_are_not_for_us() -> None:
    port = FakePort()
    port.put(2, 2, 0x1000)  # a transitional network device
    with pytest.raises(ConfigError, match=r"fake: 1af4:1000 .* is no virtio function"):
        await VirtioPciDriver(VirtioBus()).probe(port)


async def test_a_driver_that_fails_leaves_the_function_switched_off() -> None:
    class Failing(BlkDriver):
        async def probe(self, device: VirtioDevice) -> None:
            await super().probe(device)
            raise OSError("no")

    async with served(VirtioPci(Blk(size=1 << 20))) as port:
        with pytest.raises(OSError, match="no"):
            async with bound_pci(port, Failing()):
                pass
        info = await enumerate_function(port)
        assert info.command & 4 == 0
        assert info.msix is not None
        assert await port.config_read(info.msix.offset + 2, 2) & 0x8000 == 0


# ---- functions made of bytes ---------------------------------------------------------------------------------------


def fake(*, notify_length: int = 4, multiplier: int = 4, common_length: int = 64, device_length: int = 60) -> FakePort:
    """Structures spread over three BARs; common configuration at 0x800 of BAR 5."""
    port = FakePort({0: FakeBar(0x1000), 3: FakeBar(0x1000), 5: FakeBar(0x1000)})
    port.add_structure(4, 0, 0x40, device_length)
    port.add_structure(3, 0, 0, 1)
    port.add_structure(2, 3, 0x100, notify_length, multiplier.to_bytes(4, "little"))
    port.add_structure(1, 5, 0x800, common_length)
    port.add_capability(0x11, bytes([2, 0]) + (0x803).to_bytes(4, "little") + (0xC03).to_bytes(4, "little"))
    port.contents[5][0x812:0x814] = (3).to_bytes(2, "little")  # num_queues
    port.contents[5][0x818:0x81A] = (8).to_bytes(2, "little")  # queue_size
    return port


async def test_registers_where_they_are_and_as_wide_as_they_are() -> None:
    port = fake(notify_length=0x100)
    port.contents[5][0x81E] = 2  # queue_notify_off
    transport = await PciTransport.open(port, interrupts="msix")
    assert transport.num_queues == 3
    port.log.clear()
    await transport.enable_queue(1, 8, 0x1_0000_1000, 0x2_0000_2000, 0x3_0000_3000)
    transport.notify(1)
    assert port.log == [
        ("bar5 write", 0x816, 2, 1),
        ("bar5 read", 0x81E, 2, 0),
        ("bar5 read", 0x818, 2, 0),  # the size is as wanted: nothing to write
        ("bar5 write", 0x820, 4, 0x1000),
        ("bar5 write", 0x824, 4, 1),
        ("bar5 write", 0x828, 4, 0x2000),
        ("bar5 write", 0x82C, 4, 2),
        ("bar5 write", 0x830, 4, 0x3000),
        ("bar5 write", 0x834, 4, 3),
        ("bar5 write", 0x81C, 2, 1),
        ("bar3 write", 0x108, 2, 1),
    ]


@pytest.mark.parametrize(
    ("features", "notifications"),
    [
        ([], [(2, 1), (2, 1)]),
        ([Feature.NOTIFICATION_DATA], [(4, 0x0005_0001), (4, 0x8003_0001)]),
        ([Feature.NOTIF_CONFIG_DATA], [(2, 0xABCD), (2, 0xABCD)]),
        ([Feature.NOTIFICATION_DATA, Feature.NOTIF_CONFIG_DATA], [(4, 0x0005_ABCD), (4, 0x8003_ABCD)]),
    ],
)
async def test_notifications(features: list[Feature], notifications: list[tuple[int, int]]) -> None:
    """How wide they are, what names the queue, and what comes with it (2.9, 4.1.5.2)."""
    port = fake(notify_length=0x100)
    port.contents[5][0x838:0x83A] = b"\xcd\xab"  # queue_notif_config_data
    transport = await PciTransport.open(port, interrupts="msix")
    await transport.write_features(mask_of(features))
    await transport.enable_queue(1, 8, 0, 0, 0)
    port.log.clear()
    with_data = Feature.NOTIFICATION_DATA in features
    for next_available in (5, 0x8003):
        transport.notify(1, *[next_available] * with_data)
    assert port.log == [("bar3 write", 0x100, size, value) for size, value in notifications]


@pytest.mark.parametrize(
    ("offset", "size", "widths"),
    [(0, 8, [4, 4]), (8, 4, [4]), (26, 2, [2]), (32, 1, [1]), (57, 3, [1, 1, 1]), (2, 4, [2, 2]), (9, 2, [1, 1])],
)
async def test_configuration_in_accesses_of_natural_width(offset: int, size: int, widths: list[int]) -> None:
    port = fake()
    port.contents[0][0x40:0x7C] = bytes(range(60))
    transport = await PciTransport.open(port)
    port.log.clear()
    assert await transport.read_config(offset, size) == bytes(range(offset, offset + size))
    assert [(what, width) for what, _, width, _ in port.log] == [("bar0 read", width) for width in widths]
    port.log.clear()
    await transport.write_config(offset, b"\xee" * size)
    assert [(what, width) for what, _, width, _ in port.log] == [("bar0 write", width) for width in widths]
    assert port.contents[0][0x40 + offset :][:size] == b"\xee" * size


async def test_configuration_beyond_its_end() -> None:
    transport = await PciTransport.open(fake(device_length=8))
    with pytest.raises(DeviceBroken, match="of 0x8 bytes ends before 0xc") as caught:
        await transport.read_config(8, 4)
    assert caught.value.rule == "DC1"


async def test_all_feature_words() -> None:
    port = fake()

    def device_feature(bar: int, offset: int, size: int) -> None:
        if (bar, offset) == (5, 0x804):
            select = port.contents[5][0x800]
            port.contents[5][0x804:0x808] = bytes([select + 1] * 4)

    port.on_bar_read = device_feature
    transport = await PciTransport.open(port)
    assert await transport.read_features() == 0x04040404_03030303_02020202_01010101
    port.log.clear()
    await transport.write_features(0x44444444_33333333_22222222_11111111)
    assert [value for _, offset, _, value in port.log if offset == 0x80C] == [
        0x11111111,
        0x22222222,
        0x33333333,
        0x44444444,
    ]


@pytest.mark.parametrize(("notify_off", "multiplier"), [(1, 4), (0xFFFF, 4), (1, 0x8000_0000)])
async def test_a_notification_address_outside_of_its_structure(notify_off: int, multiplier: int) -> None:
    port = fake(notify_length=4, multiplier=multiplier)
    port.contents[5][0x81E:0x820] = notify_off.to_bytes(2, "little")
    transport = await PciTransport.open(port)
    with pytest.raises(DeviceBroken, match=r"queue 0 is notified at .* beyond NOTIFY at BAR3") as caught:
        await transport.enable_queue(0, 8, 0, 0, 0)
    assert caught.value.rule == "NT3"


async def test_a_vector_that_the_device_does_not_take() -> None:
    port = fake()

    def no_vector(bar: int, offset: int, size: int) -> None:
        if (bar, offset) == (5, 0x810):
            port.contents[5][0x810:0x812] = b"\xff\xff"

    port.on_bar_read = no_vector
    transport = await PciTransport.open(port)
    with pytest.raises(DeviceBroken, match="config_msix_vector 0x0 reads back as no vector") as caught:
        await transport.connect_interrupts(lambda index: None, lambda: None)
    assert caught.value.rule == "MX2"


async def test_a_short_common_configuration_has_no_queue_reset() -> None:
    transport = await PciTransport.open(fake(common_length=56))
    with pytest.raises(DeviceBroken, match="too short for queue_reset"):
        await transport.reset_queue(0)


async def test_a_queue_reset_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_RESET_TIMEOUT", 0.02)
    transport = await PciTransport.open(fake())  # the register just keeps what is written
    with pytest.raises(DeviceBroken, match="the reset of queue 0 does not end") as caught:
        await transport.reset_queue(0)
    assert caught.value.rule == "CC7"


async def test_a_queue_that_is_enabled_after_its_reset() -> None:
    port = fake()

    def ended(bar: int, offset: int, size: int) -> None:
        if (bar, offset) == (5, 0x83A):
            port.contents[5][0x83A] = 0

    port.on_bar_read = ended
    port.contents[5][0x81C] = 1
    transport = await PciTransport.open(port)
    with pytest.raises(DeviceBroken, match="queue 0 is still enabled after its reset"):
        await transport.reset_queue(0)


async def test_isr_says_what_an_intx_was() -> None:
    port = fake()
    isr = [0]

    def read(bar: int, offset: int, size: int) -> None:
        if (bar, offset) == (0, 0):
            port.contents[0][0], isr[0] = isr[0], 0

    port.on_bar_read = read
    log: list[str] = []
    async with trio.open_nursery() as nursery:
        transport = await PciTransport.open(port, interrupts="intx", nursery=nursery)
        await transport.connect_interrupts(lambda index: log.append(f"queue {index}"), lambda: log.append("config"))
        for value in (0, 1, 2, 3):
            isr[0] = value
            log.append(f"isr {value}")
            assert port.intx_handler is not None
            port.intx_handler()
            await trio.testing.wait_all_tasks_blocked()
        await transport.disconnect_interrupts()
        assert port.intx_handler is None
    queues = [f"queue {index}" for index in range(3)]
    assert log == ["isr 0", "isr 1", *queues, "isr 2", "config", "isr 3", "config", *queues]
