"""A network device with UDP tunnel segmentation, over every carrier: features beyond bit 64, and a longer header."""

import pytest
import trio
from support.net_cable import Cable
from support.packets import MACS, UDP, Packet
from support.tunnels import Tunneled

from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.guest import VirtioDevice
from vfiouser_virtio.guest.drivers.net import NetHeader, NetInterface
from vfiouser_virtio.protocols.virtio.net import NetFeature

PACKET = Tunneled(Packet(bytes(20_000), flags=0x18), Packet(b"", protocol=UDP))


@pytest.fixture
def cable() -> Cable:
    return Cable()


@pytest.fixture
def virtio_device(cable: Cable) -> Net:
    return Net(
        netdev=cable,
        mac=MACS[:6].hex(":"),
        host_tunnel=True,
        host_tunnel_csum=True,
        guest_tunnel=True,
        guest_tunnel_csum=True,
    )


async def test_a_packet_of_a_tunnel_goes_through_whole(virtio_guest: VirtioDevice, cable: Cable) -> None:
    for feature in (NetFeature.HOST_UDP_TUNNEL_GSO_CSUM, NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM):
        assert feature > 64
        assert virtio_guest.has_feature(feature)
    guest: NetInterface = virtio_guest.driver_data
    data, offload = PACKET.build(partial=True), PACKET.offload(1400)
    header = NetHeader(*offload[:6], outer_th_offset=offload[6], inner_nh_offset=offload[7])
    with trio.fail_after(60):
        await guest.send(data, header)
        assert cable.sent[-1].tobytes() == data
        assert cable.sent[-1].offload == offload
        await cable.deliver(cable.sent[-1])
        received = await guest.receive()
    assert received.data == data
    assert received.header == header._replace(num_buffers=received.buffers)
