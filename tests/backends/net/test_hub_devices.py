"""Network devices of a server joined by a hub, with the Python guest's driver in each."""

import tracemalloc
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing
from support.net_sink import Sink
from support.packets import Packet

from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest.drivers.net import NetHeader, NetInterface
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, GsoType, HdrFlags, NetFeature
from vfiouser_virtio.testing.carriers import carry
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, Ram, running
from vfiouser_virtio.testing.raw.ring import WRITE

TSO = sum(feature.mask for feature in (NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6, NetFeature.GUEST_ECN))
USO = NetFeature.GUEST_USO4.mask | NetFeature.GUEST_USO6.mask
TO_ALL = b"\xff" * 6
NO_OFFLOADS = ~(TSO | USO | NetFeature.GUEST_CSUM.mask)


async def guest(stack: AsyncExitStack, number: int, feature_mask: int = -1) -> NetInterface:
    net = Net(mac=f"52:54:00:00:00:{number:02x}", netdev=HubNetdev(hub="lan"))
    device = await stack.enter_async_context(carry(net, feature_mask=feature_mask))
    await trio.testing.wait_all_tasks_blocked()  # the device is on the network a moment after its driver is ready
    interface: NetInterface = device.driver_data
    return interface


async def test_a_segment_of_64_kib_crosses_whole_or_is_cut_for_who_cannot_take_it() -> None:
    packet = Packet(bytes(number * 11 % 256 for number in range(60_000)), flags=0x18)
    header = NetHeader(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, packet.transport + 20, 1448, packet.transport, 16)
    data = TO_ALL + packet.build(partial=True)[6:]
    async with AsyncExitStack() as stack:
        sender, able, unable = [await guest(stack, 1), await guest(stack, 2), await guest(stack, 3, NO_OFFLOADS)]
        with trio.fail_after(60):
            await sender.send(data, header)

            whole = await able.receive()
            assert whole.data == data
            assert (whole.header.flags, whole.header.gso_type, whole.header.gso_size) == (1, GsoType.TCPV4, 1448)

            for part in packet.cut(1448):
                received = await unable.receive()
                assert received.data == TO_ALL + part.build(partial=False)[6:]
                assert received.header[:2] == (0, 0)


@pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
async def test_a_segment_is_copied_once_from_guest_memory_to_guest_memory(private: bool) -> None:
    """It is in no bytes object on the way, unless the receiver's memory is reached by messages, which are such."""
    sender, receiver = (Net(netdev=HubNetdev(hub="lan"), mac=f"52:54:00:00:00:0{number}") for number in (1, 2))
    takes = mask_of((NetFeature.GUEST_CSUM, NetFeature.GUEST_TSO4, NetFeature.MRG_RXBUF))
    sends = mask_of((NetFeature.CSUM, NetFeature.HOST_TSO4))
    packet = Packet(bytes(number * 11 % 256 for number in range(60_000)))
    header = HDR_CODEC.pack(1, GsoType.TCPV4, packet.transport + 20, 1448, packet.transport, 16, 0)
    data = receiver.mac + sender.mac + packet.build(partial=True)[12:]
    async with running(sender, features=sends) as one, running(receiver, private=private, features=takes) as other:
        await trio.testing.wait_all_tasks_blocked()
        await other.request([bytes(12) + TO_ALL + receiver.mac + b"\x88\xb5" + bytes(50)], queue=1)  # the hub learns
        buffers = [other.add(0, [], [4096]) for _ in range(20)]
        other.kick(0)
        token = one.add(1, [header, data])
        await trio.testing.wait_all_tasks_blocked(0.01)

        tracemalloc.start()
        one.kick(1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert one.is_used(1, token)
        got = b"".join([(await other.wait(0, each)).data[0] for each in buffers[: -(-(len(data) + 12) // 4096)]])
        assert got[12 : 12 + len(data)] == data
        assert (most > len(packet.payload)) is private, most
        assert private or most < len(packet.payload) // 3, most


async def test_more_than_a_guest_has_buffers_for_waits_and_arrives() -> None:
    async with AsyncExitStack() as stack:
        sender, receiver = await guest(stack, 1), await guest(stack, 2)
        await receiver.send(TO_ALL + receiver.mac + b"\x88\xb5")
        with trio.fail_after(60):
            await sender.receive()
            frames = [receiver.mac + sender.mac + b"\x88\xb5" + number.to_bytes(2, "big") for number in range(300)]
            async with trio.open_nursery() as nursery:
                for frame in frames:
                    nursery.start_soon(sender.send, frame)
                got = [(await receiver.receive()).data for _ in frames]
        assert sorted(got) == frames


@pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
async def test_a_broadcast_reaches_memory_of_either_kind(private: bool) -> None:
    """Buffers that are fetched by messages are never there at once; each question of ARP was lost for that."""
    net, sender = Net(netdev=HubNetdev(hub="lan")), HubNetdev(hub="lan")
    async with running(net, private=private, features=0) as driver, trio.open_nursery() as nursery:
        nursery.start_soon(sender.run, Sink())
        tokens = [driver.add(0, [], [200]) for _ in range(5)]
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        frames = [TO_ALL + bytes.fromhex("525400000009") + b"\x88\xb5" + bytes([number]) * 50 for number in range(5)]
        for frame in frames:
            assert sender.put(frame_of(frame))
        with trio.fail_after(60):
            assert [(await driver.wait(0, token)).data[0][12:76] for token in tokens] == frames
        nursery.cancel_scope.cancel()


class Refusing(Ram):
    """RAM of a client that may come to refuse to have its descriptors read."""

    refuses = False

    async def dma_read(self, address: int, count: int) -> bytes:
        data = await super().dma_read(address, count)
        if self.refuses:
            raise PeerError("refused by the test")
        return data


def bad_descriptor(driver: Driver) -> None:
    driver.add_raw(0, [(0xDEAD_0000_000, 2000, WRITE)])


def bad_index(driver: Driver) -> None:
    driver.rings[0].offer(jump=1000)


def refusal(driver: Driver) -> None:
    assert isinstance(driver.ram, Refusing)
    driver.add(0, [], [2000])
    driver.ram.refuses = True


@pytest.mark.parametrize(
    ("private", "breaks"),
    [(False, bad_descriptor), (False, bad_index), (True, bad_descriptor), (True, bad_index), (True, refusal)],
    ids=["descriptor", "index", "descriptor by messages", "index by messages", "read refused"],
)
async def test_a_guest_that_is_waited_for_breaks_its_own_device_only(
    private: bool, breaks: Callable[[Driver], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender's task waits in the receiver's queue; an error there put the sender's device into NEEDS_RESET."""
    monkeypatch.setattr("vfiouser_virtio.testing.driver.Ram", Refusing)
    monkeypatch.setattr("vfiouser_virtio.backends.net.outlet.PATIENCE", 600.0)
    sender, receiver = Net(netdev=HubNetdev(hub="lan")), Net(netdev=HubNetdev(hub="lan"))
    async with running(sender, features=0) as one, running(receiver, private=private, features=0) as other:
        await trio.testing.wait_all_tasks_blocked()
        header, here, there = bytes(12), bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
        await other.request([header + TO_ALL + there + b"\x88\xb5" + bytes(50)], queue=1)
        token = one.add(1, [header + there + here + b"\x88\xb5" + bytes(50)])
        one.kick(1)
        await trio.testing.wait_all_tasks_blocked()
        assert not one.is_used(1, token)

        breaks(other)
        other.kick(0, force=True)
        await other.wait_broken()
        await one.wait(1, token)
        assert not one.status & NEEDS_RESET
        await one.request([header + TO_ALL + here + b"\x88\xb5" + bytes(50)], queue=1)  # and works on
