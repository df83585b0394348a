"""What a notification says (virtio 1.4, 2.9 and 4.1.5.2), right and wrong: the queue is looked at all the same."""

import pytest
import trio
import trio.testing
from support.bare_device import bare_device

from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.guest import DriverVirtqueue, VirtioDevice, new_vq
from vfiouser_virtio.guest.pci_transport import PciTransport
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.carriers import Carrier
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_device import PciRegion
from vfiouser_virtio.virtio import Device, DeviceCore, Offer, queue

BOTH = Offer(notification_data=True, notif_config_data=True)
BOTH_PACKED = Offer(notification_data=True, notif_config_data=True, packed=True)
NAME = 0xFFFF  # queue_notif_config_data of queue 0


class Two(Device):
    device_id = 63
    requestq = queue(max_size=16)
    otherq = queue(max_size=16)


async def answered(vq: DriverVirtqueue) -> None:
    while vq.get_buf() is None:
        await trio.sleep(0.001)


async def offer_one(device: VirtioDevice, vq: DriverVirtqueue) -> None:
    """A buffer that the device can take; nobody has told it yet."""
    buffer = device.memory.alloc(64)
    vq.add_buf([(buffer.address, 64)], 0, 1, None)
    vq.notify = lambda: None
    vq.kick()


async def tell(device: VirtioDevice, vq: DriverVirtqueue, size: int, value: int) -> None:
    transport = device.transport
    assert isinstance(transport, PciTransport)
    notify = transport.layout.notify
    await transport.port.bar_write(notify.bar, notify.offset, size, value)


# (what is negotiated, bytes, value, what is said of it)
PCI_CASES = {
    "plain": (Offer(), 2, 0, None),
    "plain, as another queue": (Offer(), 2, 1, "notified queue 0 as 0x1; its index is 0x0"),
    "plain, with data": (Offer(), 4, 1 << 16, "notified queue 0 with data, which was not negotiated"),
    "plain, a byte": (Offer(), 1, 0, "notified queue 0 with 1 bytes, not 2 or 4"),
    "by config data": (Offer(notif_config_data=True), 2, NAME, None),
    "by config data, index": (
        Offer(notif_config_data=True),
        2,
        0,
        "notified queue 0 as 0x0; its queue_notif_config_data is 0xffff",
    ),
    "data": (Offer(notification_data=True), 4, 1 << 16, None),
    "data, missing": (Offer(notification_data=True), 2, 0, "notified queue 0 without data, which was negotiated"),
    "data, late": (Offer(notification_data=True), 4, 0xFFF0 << 16, None),
    "data, impossible": (
        Offer(notification_data=True),
        4,
        17 << 16,
        "said that it goes on at 0x11 in queue 0 of 0x10 entries, which cannot be",
    ),
    "data, packed": (Offer(notification_data=True, packed=True), 4, 0x8001 << 16, None),
    "data, packed, impossible": (
        Offer(notification_data=True, packed=True),
        4,
        0x8010 << 16,
        "said that it goes on at 0x8010 in queue 0 of 0x10 entries, which cannot be",
    ),
    "both": (BOTH, 4, 1 << 16 | NAME, None),
    "both, index": (BOTH, 4, 1 << 16, "notified queue 0 as 0x0; its queue_notif_config_data is 0xffff"),
    "both, packed": (BOTH_PACKED, 4, 0x8001 << 16 | NAME, None),
}


class Answers(Two):
    async def run(self) -> None:
        async for chain in self.requestq:
            chain.complete(0)


@pytest.mark.parametrize("carrier", ["socket", "socket-private"])
@pytest.mark.parametrize("case", PCI_CASES)
@pytest.mark.diagonal("case", "carrier")
async def test_over_pci(carrier: Carrier, case: str, caplog: pytest.LogCaptureFixture) -> None:
    offer, size, value, complaint = PCI_CASES[case]
    async with bare_device(Answers(), carrier, offer) as device:
        vq = await new_vq(device, 0)
        await device.ready()
        await trio.testing.wait_all_tasks_blocked(0.01)
        for _ in range(3):
            await offer_one(device, vq)
            if complaint is None and size == 4 and case != "data, late":
                value = vq.next_available << 16 | value & 0xFFFF
            await tell(device, vq, size, value)
            await answered(vq)
    said = [each.getMessage() for each in caplog.records if "guest " in each.getMessage()]
    assert said == ([] if complaint is None else [f"answers: guest {complaint}"])


@pytest.mark.parametrize(
    ("offer", "following", "complaint"),
    [
        (Offer(), None, None),
        (Offer(), 1, "notified queue 0 with data, which was not negotiated"),
        (Offer(notification_data=True), 1, None),
        (Offer(notification_data=True), None, "notified queue 0 without data, which was negotiated"),
        (
            Offer(notification_data=True),
            100,
            "said that it goes on at 0x64 in queue 0 of 0x10 entries, which cannot be",
        ),
    ],
)
async def test_over_the_loopback(
    offer: Offer, following: int | None, complaint: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with bare_device(Answers(), "loopback", offer) as device:
        vq = await new_vq(device, 0)
        await device.ready()
        await offer_one(device, vq)
        for _ in range(2):
            device.transport.notify(0, following)
        await answered(vq)
    said = [each.getMessage() for each in caplog.records]
    assert said == ([] if complaint is None else [f"answers at loopback: guest {complaint}"])


async def test_complaints_begin_anew_with_each_reset(caplog: pytest.LogCaptureFixture) -> None:
    async with bare_device(Rng(), "socket", Offer()) as device:
        for _ in range(2):
            vq = await new_vq(device, 0)
            await device.ready()
            for _ in range(3):
                await tell(device, vq, 2, 7)
            await device.reset()
            vq.shutdown()
            vq.close()
            device.virtqueues.clear()
            await device.start()
            await device.negotiate(0)
    assert caplog.text.count("notified queue 0 as 0x7") == 2


# ---- registers -----------------------------------------------------------------------------------------------------


async def test_the_config_data_is_never_the_index() -> None:
    assert all(DeviceCore.notif_config_data(index) != index for index in range(0x10000))
    assert len({DeviceCore.notif_config_data(index) for index in range(0x10000)}) == 0x10000


@pytest.mark.parametrize("negotiated", [False, True])
async def test_the_register_of_the_config_data(negotiated: bool) -> None:
    mask = -1 if negotiated else ~Feature.NOTIF_CONFIG_DATA.mask
    async with bare_device(Two(), "socket", BOTH, features=mask) as device:
        transport = device.transport
        assert isinstance(transport, PciTransport)
        seen = []
        for index in range(3):
            await transport.write_common("queue_select", index)
            seen.append(await transport.read_common("queue_notif_config_data"))
        assert seen == ([0xFFFF, 0xFFFE, 0] if negotiated else [0, 0, 0])


async def test_an_eventfd_cannot_carry_data(nursery: trio.Nursery) -> None:
    plain, with_data = VirtioPci(Two()), VirtioPci(Two(), offer=BOTH)
    for function in (plain, with_data):
        nursery.start_soon(function.serve)
    await trio.testing.wait_all_tasks_blocked()
    assert len(plain.io_fds(PciRegion.BAR4)) == 2
    assert len(with_data.io_fds(PciRegion.BAR4)) == 0
